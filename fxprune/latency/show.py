"""What the latency model knows, as rows for a table."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

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
        problem = AllocationProblem(traced, scores, Budget(macs=share), allowed)
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
