"""What the command line shows and keeps: tables, lines, the body of result.json."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxprune import __version__
from fxprune.cli_values import whole
from fxprune.errors import ExportError

if TYPE_CHECKING:  # --help must not wait for torch
    from rich.console import Console
    from rich.table import Table
    from torch import nn

    from fxprune.export import ExportReport
    from fxprune.pipeline import PruneResult
    from fxprune.traced import Traced
    from fxprune.types import Cost


def options(args: argparse.Namespace) -> dict[str, Any]:
    """What was asked for, as result.json keeps it."""
    return {
        k: v for k, v in vars(args).items() if k not in ("command", "again", "quiet", "overwrite")
    }


def figures(
    args: argparse.Namespace,
    result: PruneResult,
    report: ExportReport | None,
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """The body of result.json."""
    import platform
    from dataclasses import asdict

    before, after = asdict(result.before), asdict(result.after)
    asked = options(args)
    packages = ("torch", "torchvision", "numpy", "onnx", "onnxscript", "onnxruntime")
    return {
        "options": asked,
        "before": before,
        "after": after,
        "share": {k: after[k] / before[k] if before[k] else 1.0 for k in before},
        "onnx": report.to_dict() if report else None,
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


def add_onnx_arguments(command: Any) -> None:
    command.add_argument(
        "--opset", type=whole(1), metavar="N", help="ONNX opset; default: the exporter's"
    )
    command.add_argument("--no-onnx", action="store_true", help="write no ONNX file")


def export(
    args: argparse.Namespace, model: nn.Module, inputs: Any, folder: Path
) -> ExportReport | None:
    """``pruned.onnx``, unless it is not wanted. An ExportError says how to go on without."""
    from fxprune.export import export_onnx
    from fxprune.progress import working

    if args.no_onnx:
        return None
    try:
        with working("export", not args.quiet):
            return export_onnx(model, inputs, folder / "pruned.onnx", opset=args.opset)
    except ExportError as e:
        raise ExportError(f"{e}. The same command with --no-onnx writes everything else") from e


def tell(console: Console, report: ExportReport | None, out: Path, first: str) -> None:
    lines = [first]
    if report is not None:
        batch = "any batch size" if report.dynamic_batch else f"batch {report.batch_sizes[0]} only"
        sizes = ", ".join(map(str, report.batch_sizes))
        lines += [
            f"ONNX: {report.bytes / 1e6:,.1f} MB, opset {report.opset}, {batch}; in onnxruntime "
            f"relative error {report.max_error:.1e} at batch {sizes} "
            f"(at most {report.tolerance:.0e})",
            *(f"ONNX: {note}" for note in report.notes),
        ]
    lines += [
        f"Everything lies in {out}: {', '.join(sorted(p.name for p in out.iterdir()))}",
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def shares(traced: Traced) -> tuple[list[float], list[float]]:
    """For each group, what of the parameters and of the multiply-adds would go with all of it."""
    import numpy as np

    full = traced.costs.full_counts()
    without = np.where(np.eye(len(full), dtype=bool), 0, full)
    left, whole = traced.costs.evaluate(np.vstack([without, full])), traced.cost()
    n = len(full)
    params = 1 - left.params[:n] / (whole.params or 1)
    return params.tolist(), (1 - left.macs[:n] / (whole.macs or 1)).tolist()


def inspected(title: str, traced: Traced) -> dict[str, Any]:
    """``fxprune inspect --json``."""
    from dataclasses import asdict

    return {
        "model": title,
        "cost": asdict(traced.cost()),
        "groups": [
            {
                "name": g.name,
                "channels": g.n,
                "rows": g.rows,
                "locked": g.locked,
                "share": {"params": params, "macs": macs},
                "members": [{"tensor": m.param, "dim": m.dim} for m in g.members],
                "overlaps": list(g.overlaps),
            }
            for g, params, macs in zip(traced.groups, *shares(traced), strict=True)
        ],
        "kept whole": dict(traced.captured.opaque),
    }


def groups_table(title: str, traced: Traced) -> Table:
    """One row for each group that can be pruned; what of the whole model would go with it."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"Channel groups of {escape(title)}")
    table.add_column("group", overflow="fold")
    for head in ("channels", "tensors", "params", "MACs"):
        table.add_column(head, justify="right", no_wrap=True)
    for g, *gone in zip(traced.groups, *shares(traced), strict=True):
        if g.locked is None:
            channels = str(g.n) if g.rows == 1 else f"{g.rows} x {g.width}"
            tensors = len({m.param for m in g.members})
            table.add_row(escape(g.name), channels, str(tensors), *(f"{s:.1%}" for s in gone))
    return table


def locked_lines(traced: Traced) -> list[str]:
    """Why channels stay, one line for each reason."""
    locked = {g.name: g.n for g in traced.groups if g.locked is not None}
    lines = []
    for reason, names in traced.reasons.items():
        channels = sum(locked.get(name, 0) for name in names)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        if channels:
            lines.append(
                (channels, f"  {channels:,} channels: {reason}: {', '.join(names[:3])}{more}")
            )
    head = (
        f"Locked: {len(locked)} of {len(traced.groups)} groups, {sum(locked.values()):,} channels"
    )
    whole = [f"Kept whole: {k}: {reason}" for k, reason in traced.captured.opaque.items()]
    return [head, *(text for _, text in sorted(lines, reverse=True)), *whole]


def cost_line(traced: Traced) -> str:
    """What the model costs, and what would be left of it with all groups at their smallest."""
    import numpy as np

    from fxprune.inputs import samples_of

    cost, groups = traced.cost(), traced.groups
    smallest = traced.costs.cost(np.array([g.choices(8)[0] for g in groups], dtype=np.int64))
    free = sum(g.locked is None for g in groups)
    shares = smallest.macs / (cost.macs or 1), smallest.params / (cost.params or 1)
    down = f", down to {shares[0]:.1%} of the MACs and {shares[1]:.1%} of the parameters"
    return (
        f"{cost.macs:,} MACs at batch {samples_of(traced.example_inputs)}, {cost.params:,} "
        f"parameters, {cost.bytes / 1e6:,.1f} MB; {free} of {len(groups)} groups can be pruned"
        f"{down if free else ''}"
    )


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
