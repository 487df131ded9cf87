"""``uniform``: one ratio for every group, as close as rounding allows."""

from __future__ import annotations

import numpy as np

from fxprune.allocate.problem import AllocationProblem
from fxprune.allocate.space import Space, space_of
from fxprune.allocate.spend import spend
from fxprune.types import FloatArray, PrunePlan


def uniform(problem: AllocationProblem) -> PrunePlan:
    """Every group keeps the same share of its channels, rounded to its nearest allowed count.

    What rounding leaves of the budget goes to the groups that are furthest below the ratio.
    Raises BudgetError where the budget cannot be reached.
    """
    space = space_of(problem)
    state = spend(space, uniform_keys(space))
    return space.plan(state, {"allocation": "uniform"})


def uniform_keys(space: Space) -> FloatArray:
    """[F, S - 1]: minus the ratio at which a group's nearest choice becomes the next one."""
    width = space.table[:, -1:]
    between = (space.table[:, :-1] + space.table[:, 1:]) / 2
    return np.asarray(-between / width, dtype=np.float64)
