"""The space that allocators search: one step number for each group that may be cut.

Legend for shapes: G groups of the model, F of them free to move, S steps (allowed kept counts) of
the group that has the most, P states. A state [F] gives each free group one of its steps, 0 the
smallest; a group's highest step keeps all its channels.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fxprune.allocate.budget import bounds, in_words
from fxprune.allocate.problem import AllocationProblem, CostModel, LatencyModel
from fxprune.errors import BudgetError, InputError
from fxprune.types import BoolArray, ChannelGroup, FloatArray, IntArray, PrunePlan

CHUNK = 1 << 22  # counts that go through the cost model at once


@dataclass(frozen=True)
class Space:
    """Free groups, their steps, their channels from best to worst, and the budget.

    free      [F] position of each free group among ``groups``
    table     [F, S] kept count (of each row) at each step; padded with the full width
    top       [F] highest step of each free group
    order     for each free group [rows, width]: columns of each row from best to worst
    gain      [F, S] share of the group's score that is kept at each step, 1 at the top
    original  [D] cost of the whole model in each bounded measure, in its base unit
    limit     [D] what may stay of it, in the same unit; ``share`` [D] the same as a share
    """

    groups: tuple[ChannelGroup, ...]
    free: IntArray
    table: IntArray
    top: IntArray
    order: tuple[IntArray, ...]
    gain: FloatArray
    measures: tuple[str, ...]
    original: FloatArray
    limit: FloatArray
    costs: CostModel
    latency: LatencyModel | None = None

    @property
    def share(self) -> FloatArray:
        """[D] what may stay, as a share of the original."""
        return np.asarray(self.limit / self.original)

    def counts(self, states: IntArray) -> IntArray:
        """[P, F] states -> [P, G] kept counts, as the cost model takes them."""
        counts = np.tile(_widths(self.groups), (len(states), 1))
        counts[:, self.free] = self.table[np.arange(len(self.free)), states]
        return counts

    def state(self, counts: IntArray) -> IntArray:
        """[G] allowed kept counts -> [F] state, the inverse of :meth:`counts`."""
        return np.asarray((self.table < counts[self.free, None]).sum(axis=1), dtype=np.int64)

    def load(self, states: IntArray) -> FloatArray:
        """[P, F] states -> [P] share of the budget that is used; the budget holds up to 1."""
        return np.asarray(self.loads(states).max(axis=1), dtype=np.float64)

    def loads(self, states: IntArray) -> FloatArray:
        """[P, F] states -> [P, D] share of each bound that is used."""
        rows = max(1, CHUNK // max(1, len(self.groups)))
        parts = [self.cost(states[i : i + rows]) for i in range(0, len(states), rows)]
        found = np.concatenate(parts) if parts else np.empty((0, len(self.measures)))
        return np.asarray(found / self.limit, dtype=np.float64)

    def cost(self, states: IntArray) -> FloatArray:
        """[P, F] states -> [P, D] cost in each bounded measure, in its base unit."""
        return _cost(self.costs, self.latency, self.measures, self.counts(states))

    def holds(self, states: IntArray) -> BoolArray:
        """[P, F] states -> [P] whether the budget holds."""
        return np.asarray(self.load(states) <= 1.0)

    def plan(self, state: IntArray, meta: Mapping[str, Any] | None = None) -> PrunePlan:
        """The plan that keeps the best channels of every row at the state [F]'s counts.

        Groups that keep everything are not named.
        """
        kept = {}
        for f, order in enumerate(self.order):
            if state[f] < self.top[f]:
                group, count = self.groups[self.free[f]], int(self.table[f, state[f]])
                best = np.sort(order[:, :count], axis=1)
                offsets = np.arange(group.rows)[:, None] * group.width
                kept[group.name] = tuple((best + offsets).ravel().tolist())
        return PrunePlan(kept, dict(meta or {}))


def space_of(problem: AllocationProblem, *, overlapping: bool = False) -> Space:
    """The search space of a problem.

    Of groups that overlap, only the one with the most choices is free unless ``overlapping``; the
    others join in where the budget cannot be reached without them.
    Raises BudgetError where even the smallest choice of every group is above the budget.
    """
    groups = tuple(problem.traced.groups)
    choices = [g.choices(problem.round_to) for g in groups]
    every = [i for i, c in enumerate(choices) if len(c) > 1]
    widest = _without_overlaps(groups, choices, every)
    space = _space(problem, groups, choices, every if overlapping else widest)
    if not overlapping and len(widest) < len(every) and not _reachable(space):
        space = _space(problem, groups, choices, every)
    if not _reachable(space):
        raise _unreachable(problem, space)
    return space


def _space(
    problem: AllocationProblem,
    groups: tuple[ChannelGroup, ...],
    choices: list[IntArray],
    free: list[int],
) -> Space:
    steps = max((len(choices[i]) for i in free), default=1)
    table = np.ones((len(free), steps), dtype=np.int64)
    gain = np.ones((len(free), steps))
    order = []
    for f, i in enumerate(free):
        table[f] = np.pad(choices[i], (0, steps - len(choices[i])), mode="edge")
        scores = _checked(groups[i], problem.scores)
        order.append(np.argsort(-scores, axis=1, kind="stable"))
        gain[f] = _kept_share(scores)[table[f]]
    given = bounds(problem.budget)
    measures, costs = tuple(given), problem.traced.costs
    original = _cost(costs, problem.latency, measures, _widths(groups)[None])[0]
    original = np.where(original > 0, original, 1.0)
    limits = [b.limit(float(o)) for b, o in zip(given.values(), original, strict=True)]
    return Space(
        groups=groups,
        free=np.asarray(free, dtype=np.int64),
        table=table,
        top=np.array([len(choices[i]) - 1 for i in free], dtype=np.int64),
        order=tuple(order),
        gain=gain,
        measures=measures,
        original=original,
        limit=np.array(limits),
        costs=costs,
        latency=problem.latency,
    )


def _cost(
    costs: CostModel, latency: LatencyModel | None, measures: tuple[str, ...], counts: IntArray
) -> FloatArray:
    """[P, G] counts -> [P, D]; milliseconds come from ``latency``, the rest from ``costs``."""
    exact = [m for m in measures if m != "latency"]
    found = np.empty((len(counts), len(measures)))
    if exact:
        found[:, [measures.index(m) for m in exact]] = costs.measure(counts, exact)
    if latency is not None and "latency" in measures:
        found[:, measures.index("latency")] = latency.predict(counts)
    return found


def _widths(groups: tuple[ChannelGroup, ...]) -> IntArray:
    return np.array([g.width for g in groups], dtype=np.int64)


def _checked(group: ChannelGroup, scores: Mapping[str, FloatArray]) -> FloatArray:
    """The group's scores as [rows, width]. Raises InputError where they do not fit."""
    if not isinstance(scores, Mapping):
        raise InputError(f"the criterion must give {{group: scores}}, got {type(scores).__name__}")
    given = scores.get(group.name)
    shape = None if given is None else np.shape(given)
    if given is None or shape != (group.n,):
        came = "none" if given is None else f"shape {shape}"
        raise InputError(
            f"the criterion must score group {group.name!r} with one number for each of its "
            f"{group.n} channels; got {came}"
        )
    values = np.asarray(given, dtype=np.float64).reshape(group.rows, group.width)
    if not np.isfinite(values).all():
        raise InputError(
            f"the criterion gave NaN or Inf for group {group.name!r}; scores must be finite"
        )
    return values


def _kept_share(scores: FloatArray) -> FloatArray:
    """[rows, width] scores -> [width + 1] share of their sum in the best 0, 1, ... columns.

    Scores below zero are shifted to zero first; where nothing is left, columns count alike.
    """
    positive = scores - min(0.0, float(scores.min()))
    best = -np.sort(-positive, axis=1)
    columns = best.sum(axis=0)
    if columns.sum() <= 0:
        columns = np.ones_like(columns)
    kept = np.concatenate([[0.0], np.cumsum(columns)])
    return np.asarray(kept / kept[-1])


def _without_overlaps(
    groups: tuple[ChannelGroup, ...], choices: list[IntArray], every: list[int]
) -> list[int]:
    """Of the groups ``every``, those that stay free when none may overlap another."""
    taken: set[str] = set()
    for i in sorted(every, key=lambda i: (-len(choices[i]), i)):
        if not taken.intersection(groups[i].overlaps):
            taken.add(groups[i].name)
    return [i for i in every if groups[i].name in taken]


def _reachable(space: Space) -> bool:
    return bool(space.holds(np.zeros((1, len(space.free)), dtype=np.int64))[0])


def _unreachable(problem: AllocationProblem, space: Space) -> BudgetError:
    """What is the smallest reachable cost, and what stands in the way?"""
    smallest = space.cost(np.zeros((1, len(space.free)), dtype=np.int64))[0]
    given = bounds(problem.budget)
    parts = []
    for m, least, whole, limit in zip(
        space.measures, smallest, space.original, space.limit, strict=True
    ):
        if least > limit:
            share = math.ceil(least / whole * 1000) / 1000
            parts.append(
                f"{given[m]} cannot be reached: with every group at its smallest, "
                f"{least / whole:.4g} of the original {m} is left ({in_words(m, least)} of "
                f"{in_words(m, whole)}); ask for at least {share:g}"
            )
    locked: Counter[str] = Counter()
    for group in space.groups:
        if group.locked is not None:
            locked[group.locked] += group.n
    rounding = problem.round_to if isinstance(problem.round_to, int) else "read off a table"
    reasons = "; ".join(f"{n} channels: {why}" for why, n in locked.most_common(3))
    return BudgetError(
        f"budget {', '.join(parts)}, or a smaller round_to (it is {rounding}). "
        f"Locked: {reasons or 'nothing'}"
    )
