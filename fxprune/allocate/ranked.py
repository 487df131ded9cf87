"""``global`` and ``isomorphic``: the scores decide how much each group keeps.

``isomorphic`` follows the idea of Fang et al., "Isomorphic Pruning for Vision Models" (2024):
scores are compared only between structures of the same shape.

Legend for shapes: F free groups, S steps of the group that has the most.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

from fxprune.allocate.problem import AllocationProblem, Prunable
from fxprune.allocate.space import Space, space_of
from fxprune.allocate.spend import falling, spend
from fxprune.types import ChannelGroup, FloatArray, IntArray, PrunePlan

Signature: TypeAlias = tuple[int, int, tuple[tuple[int, int, int], ...]]


def global_threshold(problem: AllocationProblem) -> PrunePlan:
    """One threshold over all scores, each divided by the mean of its group.

    Raises BudgetError where the budget cannot be reached.
    """
    space = space_of(problem)
    state = spend(space, global_keys(space))
    return space.plan(state, {"allocation": "global"})


def isomorphic(problem: AllocationProblem) -> PrunePlan:
    """A global threshold within every cluster of groups that have the same signature shape.

    All clusters keep the same share of their channels. Raises BudgetError where the budget cannot
    be reached.
    """
    space = space_of(problem)
    clusters = cluster(problem.traced, space)
    state = spend(space, isomorphic_keys(space, clusters))
    meta = {"allocation": "isomorphic", "clusters": len(set(clusters.tolist()))}
    return space.plan(state, meta)


def global_keys(space: Space) -> FloatArray:
    """[F, S - 1]: mean score of the channels that a step adds, over the mean of their group."""
    added = np.diff(space.table, axis=1) / space.table[:, -1:]
    gained = np.diff(space.gain, axis=1)
    return falling(np.divide(gained, added, out=np.zeros_like(gained), where=added > 0))


def isomorphic_keys(space: Space, clusters: IntArray) -> FloatArray:
    """[F, S - 1]: minus the share of its cluster's channels that is kept once a step is taken.

    Within a cluster steps come in the order of their global keys.
    """
    scores = global_keys(space)
    real = np.arange(scores.shape[1])[None] < space.top[:, None]
    rows = np.array([space.groups[i].rows for i in space.free], dtype=np.int64)[:, None]
    added = np.diff(space.table, axis=1) * rows
    keys = np.full(scores.shape, -np.inf)
    for c in np.unique(clusters):
        inside = real & (clusters == c)[:, None]
        order = np.argsort(-scores[inside], kind="stable")
        least = (space.table[:, :1] * rows)[clusters == c].sum()
        kept = least + np.cumsum(added[inside][order])
        shares = np.empty(len(order))
        shares[order] = -kept / (space.table[:, -1:] * rows)[clusters == c].sum()
        keys[inside] = shares
    return keys


def cluster(traced: Prunable, space: Space) -> IntArray:
    """[F] number of each free group's cluster: groups with equal signature shapes share one."""
    module = traced.graph_module
    ndim = {name: t.ndim for name, t in [*module.named_parameters(), *module.named_buffers()]}
    known: dict[Signature, int] = {}
    numbers = [known.setdefault(signature(space.groups[i], ndim), len(known)) for i in space.free]
    return np.array(numbers, dtype=np.int64)


def signature(group: ChannelGroup, ndim: dict[str, int]) -> Signature:
    """(channels, rows, sorted (number of dims of the parameter, dim, positions per channel))."""
    members = sorted((ndim.get(m.param, 0), m.dim, m.index.shape[1]) for m in group.members)
    return group.n, group.rows, tuple(members)
