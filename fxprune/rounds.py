"""Pruning in rounds: the budget of each, and one plan for all of them.

Each round traces the model that the one before has left, so its plan speaks of channels of that
model. What all rounds together keep of every parameter dim is told in the original's positions, and
a plan of the original is read off that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from fxprune.allocate import bounds
from fxprune.allocate.budget import in_words
from fxprune.cut import cut
from fxprune.errors import BudgetError, InternalError
from fxprune.fitness import refer
from fxprune.sizes import Sizes
from fxprune.traced import Traced
from fxprune.types import BoolArray, Budget, ChannelGroup, Cost, IntArray, PrunePlan

Positions = dict[tuple[str, int], IntArray]


def round_budgets(budget: Budget, original: Cost, rounds: int) -> list[Budget]:
    """Budgets of each round, as absolute values, the same share of what is there in each.

    Round r of R may keep original x (limit / original) ^ (r / R); the last one the limit itself.
    A latency is asked of the last round alone; as a share of the original it is refused
    (BudgetError), since each round measures another model.
    """
    limits: dict[str, tuple[float, float]] = {}
    last: dict[str, str] = {}
    for measure, bound in bounds(budget).items():
        if measure == "latency":
            if not bound.absolute:
                raise BudgetError(
                    f"budget latency={bound.value:g} as a share cannot be split into rounds; give "
                    'milliseconds, for example latency="4 ms"'
                )
            last[measure] = in_words(measure, bound.value)
            continue
        whole = float(getattr(original, measure))
        limits[measure] = (whole, bound.limit(whole))
    made = []
    for r in range(1, rounds + 1):
        parts: dict[str, Any] = {
            m: max(2, int(whole * (limit / whole) ** (r / rounds) if r < rounds else limit))
            for m, (whole, limit) in limits.items()
            if whole > 0
        }
        made.append(parts | (last if r == rounds else {}))
    if not limits and rounds > 1:
        raise BudgetError(
            "a latency alone cannot be split into rounds; give a share of the MACs too"
        )
    return [Budget(**parts) for parts in made]


def compose(
    traced: Traced, rounds: Iterable[tuple[Traced, PrunePlan]], meta: Mapping[str, Any]
) -> PrunePlan:
    """The plan of ``traced``, the original, that keeps what all rounds keep.

    ``rounds``: the traced model of each and its plan, in order; the first is ``traced`` itself.
    Raises InternalError where no plan of the original leaves the same.
    """
    kept = _positions(rounds)
    channels = {
        g.name: np.flatnonzero(_channels(g, kept)).tolist()
        for g in traced.groups
        if g.locked is None
    }
    return traced.plan(channels, meta)


def _positions(rounds: Iterable[tuple[Traced, PrunePlan]]) -> Positions:
    """(parameter, dim) -> positions of the original that all rounds keep."""
    kept: Positions = {}
    for traced, plan in rounds:
        sizes = Sizes(traced, traced.keep(plan))
        for key in traced.param_classes:
            index = sizes.kept_index(*key)
            if index is not None:
                kept[key] = kept[key][index] if key in kept else index
    return kept


def _channels(group: ChannelGroup, kept: Positions) -> BoolArray:
    """[n] channels of which anything is left.

    Of a group that shares positions with another (heads and their dims) a channel may have lost
    some to the other one; a row that is gone as a whole counts as keeping its first columns.
    """
    alive = np.zeros(group.n, dtype=np.bool_)
    for m in group.members:
        index = kept.get((m.param, m.dim))
        if index is None:
            return np.ones(group.n, dtype=np.bool_)
        there = np.isin(m.index, index)
        if not group.overlaps and (there != there[:, :1]).any():
            raise InternalError(f"rounds left a part of a channel of group {group.name!r}")
        alive |= there.any(1)
    block = alive.reshape(group.rows, -1)
    most = int(block.sum(1).max(initial=0))
    if group.overlaps and most:
        block[~block.any(1), :most] = True
    return block.ravel()


def transplanted(traced: Traced, plan: PrunePlan, last: fx.GraphModule) -> fx.GraphModule:
    """The cut of ``plan`` with the weights that the last round left.

    Raises InternalError where the shapes are not the same.
    """
    gm = cut(traced, plan)
    target, source = gm.state_dict(), last.state_dict()
    odd = [
        f"{k}: {list(t.shape)}, the rounds left {list(source[k].shape) if k in source else None}"
        for k, t in target.items()
        if k not in source or source[k].shape != t.shape
    ]
    if odd:
        raise InternalError(
            f"one plan for all rounds gives other shapes than they do ({'; '.join(odd[:3])}); "
            "prune with steps=1"
        )
    with torch.no_grad():
        for k, t in target.items():
            t.copy_(source[k])
    return gm


class Near:
    """Nearness of a model's outputs to the original's, as an ``evaluate``: higher is better.

    It holds samples and outputs but no model, so that workers can take it along.
    """

    def __init__(self, traced: Traced, batches: Sequence[tuple[Any, ...]]) -> None:
        with torch.no_grad():
            self.pairs = [(b, refer(traced.graph_module(*b))) for b in batches]

    def __call__(self, model: Callable[..., Any]) -> float:
        """Minus the divergence; minus infinity where it is not finite."""
        with torch.no_grad():
            parts = [(r.divergence(model(*b)), r.samples) for b, r in self.pairs]
        value = sum(d * n for d, n in parts) / sum(n for _, n in parts)
        return -value if math.isfinite(value) else -math.inf


def told(results: Sequence[Any]) -> list[dict[str, Any]]:
    """What the report says of each round: costs, seconds, evaluations."""
    return [
        {
            "macs": r.after.macs,
            "params": r.after.params,
            "seconds": round(sum(r.report["seconds"].values()), 2),
            "fitness": r.report["plan"].get("fitness"),
        }
        for r in results
    ]
