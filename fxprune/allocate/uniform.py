"""``uniform``: one ratio for every group, as close as rounding allows."""

from __future__ import annotations

import numpy as np

from fxprune.allocate.problem import AllocationProblem
from fxprune.allocate.space import Space, space_of
from fxprune.allocate.spend import spend
from fxprune.allocate.thrift import thrifty
from fxprune.types import FloatArray, IntArray, PrunePlan, Rounding


def uniform(problem: AllocationProblem) -> PrunePlan:
    """Every group keeps the same share of its channels, rounded to its nearest allowed count.

    What rounding leaves of the budget goes to the groups that are furthest below the ratio. Where
    the counts are those that are fast on a target, of all that are as near to the ratio those that
    take the least time there (:func:`thrift.thrifty`).
    Raises BudgetError where the budget cannot be reached.
    """
    space = space_of(problem)
    return space.plan(uniform_state(space, problem.round_to), {"allocation": "uniform"})


def uniform_state(space: Space, round_to: int | Rounding) -> IntArray:
    """[F]: see :func:`uniform`."""
    state = spend(space, uniform_keys(space))
    return state if isinstance(round_to, int) else thrifty(space, state)


def uniform_keys(space: Space) -> FloatArray:
    """[F, S - 1]: minus the ratio at which a group's nearest choice becomes the next one."""
    width = space.table[:, -1:]
    between = (space.table[:, :-1] + space.table[:, 1:]) / 2
    return np.asarray(-between / width, dtype=np.float64)
