"""The optimum of an additive model under the budget: a multiple-choice knapsack.

One choice for each group, the smallest sum of losses, every bound of the budget as a constraint.
Costs are not additive (a layer's is the product of two widths), so they are linearised around a
state that holds the budget: the cost of each single move from there is exact. The integer programme
is solved exactly (scipy's HiGHS); where its solution is above the real budget, the bound is
tightened by what the linearisation missed; and it is solved again around the solution, within half
the distance whenever that brought nothing.

:func:`choices` and :func:`solved` are the programme, for :mod:`fxprune.allocate.thrift` too.

Legend for shapes: F free groups, S steps of the group that has the most, V variables, D bounds.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from fxprune.allocate.space import Space
from fxprune.allocate.spend import fill
from fxprune.isolate import native_prints_dropped
from fxprune.types import FloatArray, IntArray

CHOICES = 24  # considered for each group at a time
ROUNDS = 6  # linearisations
TIGHTER = 4  # times that the bounds are tightened in one of them
GAP = 1e-3  # to which the integer programme is solved, relative
NODES = 1000  # that its solver may look at; not a time, so that the result is always the same


def knapsack(space: Space, loss: FloatArray, keys: FloatArray, start: IntArray) -> IntArray:
    """The state [F] within the budget with the smallest sum of ``loss`` [F, S] that is found.

    ``start`` [F] holds the budget; ``keys`` [F, S - 1] say where what is left of it goes (see
    :func:`spend.fill`). Never worse than ``start``.
    """
    if not len(start):
        return start
    at = np.arange(len(start))
    state = fill(space, start, keys)
    reach = max(1, int(space.top.max(initial=1)))
    for _ in range(ROUNDS):
        found = _around(space, loss, state, reach)
        if found is not None:
            found = fill(space, found, keys)
        if found is None or loss[at, found].sum() >= loss[at, state].sum() * (1 - GAP):
            if reach == 1:
                break
            reach = max(1, reach // 4)
        else:
            state = found
    return state


def _around(space: Space, loss: FloatArray, state: IntArray, reach: int) -> IntArray | None:
    """The optimum with costs linearised at ``state``, brought within the budget; None: none."""
    group, step = choices(space, state, reach)
    moved = np.repeat(state[None], len(group), axis=0)
    moved[np.arange(len(group)), group] = step
    base = space.loads(state[None])[0]
    change = space.loads(moved) - base
    slack = np.zeros(len(base))
    for _ in range(TIGHTER):
        found = solved(loss[group, step], group, step, change, 1 - base - slack)
        if found is None:
            return None
        over = space.loads(found[None])[0] - 1
        if (over <= 0).all():
            return found
        slack += np.where(over > 0, over * 1.02 + 1e-9, 0)
    return None


def choices(space: Space, state: IntArray, reach: int) -> tuple[IntArray, IntArray]:
    """(group [V], step [V]): for each group up to CHOICES steps within ``reach``, its own too."""
    groups, steps = [], []
    for f, here in enumerate(state.tolist()):
        low, high = max(0, here - reach), min(int(space.top[f]), here + reach)
        some = np.linspace(low, high, min(CHOICES, high - low + 1)).round().astype(np.int64)
        some = np.union1d(some, [here])
        groups.append(np.full(len(some), f))
        steps.append(some)
    return np.concatenate(groups), np.concatenate(steps)


def solved(
    loss: FloatArray, group: IntArray, step: IntArray, change: FloatArray, room: FloatArray
) -> IntArray | None:
    """One step for each group: least ``loss`` [V] with sum of ``change`` [V, D] <= ``room`` [D]."""
    count = len(loss)
    pick = csr_array((np.ones(count), (group, np.arange(count))))
    scale = np.maximum(np.abs(change).max(axis=0), 1e-12)
    scaled = change.T / scale[:, None]
    with native_prints_dropped():  # HiGHS reports tiny infeasibilities whatever its options say
        result = milp(
            loss / max(float(np.abs(loss).max()), 1e-300),
            integrality=np.ones(count),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(pick, 1, 1),
                LinearConstraint(scaled, -np.inf, room / scale),
            ],
            options={"mip_rel_gap": GAP, "node_limit": NODES},
        )
    if result.x is None:
        return None
    state = np.zeros(pick.shape[0], dtype=np.int64)
    chosen = np.flatnonzero(result.x > 0.5)
    state[group[chosen]] = step[chosen]
    return state if len(chosen) == len(state) else None
