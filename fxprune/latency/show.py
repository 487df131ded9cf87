"""What the latency model knows, and what a pruning was worth, for people to read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from fxprune.allocate import AllocationProblem, uniform
from fxprune.errors import BudgetError
from fxprune.latency.model import LatencyModel
from fxprune.latency.rounding import fast_counts
from fxprune.traced import Traced
from fxprune.types import Budget

SHARES = (1.0, 0.75, 0.5, 0.25)


@dataclass(frozen=True)
class Slow:
    """One product: its node, channels in and out, groups, milliseconds."""

    node: str
    channels: tuple[int, int, int]
    ms: float


@dataclass(frozen=True)
class Overview:
    """products: the slowest first; rest: milliseconds of everything else.

    sizes: (share of the MACs, predicted milliseconds) at uniform ratios and fast widths
    steps: the step between the fast widths of most groups
    """

    products: tuple[Slow, ...]
    rest: float
    sizes: tuple[tuple[float, float], ...]
    steps: int


def overview(traced: Traced, model: LatencyModel, most: int = 12) -> Overview:
    """The slowest products, the sizes that uniform pruning reaches, and the fast widths."""
    ms = model.products(model.full[None])[0]
    slow = [
        Slow(item.key.partition(":")[0], item.family.channels(w), float(t))
        for item, w, t in zip(model.parts.items, model.widths(model.full), ms, strict=True)
    ]
    allowed = fast_counts(model, traced.groups)
    scores = {g.name: np.ones(g.n) for g in traced.groups}
    sizes = []
    for share in SHARES:
        problem = AllocationProblem(traced, scores, Budget(macs=share), allowed, latency=model)
        try:
            counts = traced.counts(uniform(problem))[None]
        except BudgetError:
            break
        macs = float(traced.costs.measure(counts, ["macs"])[0, 0]) / max(1, traced.cost().macs)
        sizes.append((macs, float(model.predict(counts)[0])))
    gaps = np.concatenate([np.diff(c) for c in allowed.values()] or [np.ones(1, dtype=np.int64)])
    return Overview(
        tuple(sorted(slow, key=lambda s: -s.ms)[:most]),
        float(model.original.ms - ms.sum()),
        tuple(sizes),
        int(np.bincount(gaps.astype(np.int64)).argmax()) if len(gaps) else 1,
    )


def tables(title: str, traced: Traced, model: LatencyModel) -> tuple[Table, str]:
    """The slowest products, and one line that sums up, for rich to print."""
    found, ms = overview(traced, model), model.original.ms
    table = Table(title=f"Slowest products of {escape(title)} ({escape(str(model.target))})")
    for head in ("node", "in", "out", "groups", "ms", "share"):
        table.add_column(head, justify="left" if head == "node" else "right")
    for p in found.products:
        table.add_row(escape(p.node), *map(str, p.channels), f"{p.ms:.3f}", f"{p.ms / ms:.1%}")
    table.add_row("the rest", "", "", "", f"{found.rest:.3f}", f"{found.rest / ms:.1%}")
    sizes = ", ".join(f"{t:.3f} ms at {m:.0%} of the MACs" for m, t in found.sizes[1:])
    return table, (
        f"{ms:.3f} ms measured; most widths are fast in steps of {found.steps}; pruned uniformly, "
        f"predicted: {sizes or 'nothing, no group can be pruned'}"
    )


def latency_text(found: Mapping[str, Any]) -> str:
    """One line for ``report["latency"]``: measured, predicted, whether the budget holds."""
    before, after = found["before_ms"], found["after_ms"]
    text = (
        f"latency on {found['target']}, {found['threads']} thread(s), batch {found['batch']}: "
        f"{before:.3f} ms before, {after:.3f} ms after ({before / after:.2f} times faster; "
        f"{found['predicted_ms']:.3f} ms predicted; medians of {found['runs']} runs)"
    )
    again = len(found.get("tried_ms", ())) - 1
    if again > 0:
        text += f"; {again} plan(s) before it were measured above the limit and made smaller"
    if not found.get("holds", True):
        text += f"; the measured time is above the limit of {found['limit_ms']:.3f} ms"
    return text
