"""What the command line shows and keeps: tables, lines, the body of result.json."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxprune import __version__

if TYPE_CHECKING:  # --help must not wait for torch
    from rich.console import Console
    from rich.table import Table
    from torch import nn

    from fxprune.export import ExportReport
    from fxprune.pipeline import PruneResult
    from fxprune.types import ChannelGroup, Cost


def figures(
    args: argparse.Namespace,
    result: PruneResult,
    report: ExportReport,
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """The body of result.json."""
    import platform
    from dataclasses import asdict

    before, after = asdict(result.before), asdict(result.after)
    asked = {k: v for k, v in vars(args).items() if k not in ("command", "quiet", "overwrite")}
    packages = ("torch", "torchvision", "numpy", "onnx", "onnxscript", "onnxruntime")
    return {
        "options": asked,
        "before": before,
        "after": after,
        "share": {k: after[k] / before[k] if before[k] else 1.0 for k in before},
        "onnx": report.to_dict(),
        "pruning": result.report,
        "seconds": dict(seconds),
        "versions": {
            "fxprune": __version__,
            "python": platform.python_version(),
            **{p: version(p) for p in packages},
        },
        "machine": platform.processor() or platform.machine(),
    }


def cost_table(title: str, before: Cost, after: Cost) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"{escape(title)}, pruned")
    table.add_column("")
    for head in ("before", "after", "after / before"):
        table.add_column(head, justify="right")
    for name, old, new in (
        ("MACs", before.macs, after.macs),
        ("parameters", before.params, after.params),
        ("bytes of weights", before.bytes, after.bytes),
        ("peak activation bytes", before.memory, after.memory),
    ):
        table.add_row(name, f"{old:,}", f"{new:,}", f"{new / old:.3f}" if old else "-")
    return table


def tell(console: Console, report: ExportReport, out: Path, first: str) -> None:
    batch = "any batch size" if report.dynamic_batch else f"batch {report.batch_sizes[0]} only"
    sizes = ", ".join(map(str, report.batch_sizes))
    lines = [
        first,
        f"ONNX: {report.bytes / 1e6:,.1f} MB, opset {report.opset}, {batch}; in onnxruntime "
        f"relative error {report.max_error:.1e} at batch {sizes} (at most {report.tolerance:.0e})",
        *(f"ONNX: {note}" for note in report.notes),
        f"Everything lies in {out}: {', '.join(sorted(p.name for p in out.iterdir()))}",
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def groups_table(title: str, groups: Sequence[ChannelGroup], model: nn.Module) -> Table:
    """One row for each group; params: share of all parameters that lie at its channels."""
    from rich.markup import escape
    from rich.table import Table

    shapes = {name: p.shape for name, p in model.named_parameters()}
    total = sum(s.numel() for s in shapes.values()) or 1
    table = Table(title=f"Channel groups of {escape(title)}")
    for head, justify in (
        ("group", "left"),
        ("channels", "right"),
        ("rows", "right"),
        ("members", "right"),
        ("params", "right"),
        ("locked", "left"),
    ):
        table.add_column(head, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for g in groups:
        touched: dict[str, float] = {}
        for m in g.members:
            if m.param in shapes:
                shape = shapes[m.param]
                part = shape.numel() * m.index.size / shape[m.dim]
                touched[m.param] = max(part, touched.get(m.param, 0))
        share = sum(touched.values()) / total
        table.add_row(
            escape(g.name), str(g.n), str(g.rows), str(len(g.members)), f"{share:.1%}",
            escape(g.locked or ""),
        )  # fmt: skip
    return table


def console() -> Console:
    """A wide table where stdout is a file or a pipe; the terminal's width else."""
    from rich.console import Console

    made = Console()
    return made if made.is_terminal else Console(width=140)


def version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None
