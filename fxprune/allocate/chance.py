"""``random``: allocations drawn at random within the budget; what any search has to beat.

Legend for shapes: F free groups.
"""

from __future__ import annotations

import numpy as np

from fxprune.allocate.problem import AllocationProblem
from fxprune.allocate.search import Search, searched
from fxprune.allocate.space import Space
from fxprune.allocate.spend import spend
from fxprune.allocate.uniform import uniform_keys
from fxprune.types import IntArray, PrunePlan

BATCH = 4  # states evaluated at once
SPREAD = 0.35  # standard deviation of the logarithm of a group's kept share around the uniform one


def chance(problem: AllocationProblem) -> PrunePlan:
    """The best of the cheap allocations and random ones; see :func:`search.searched`."""
    return searched(problem, "random", _run)


def _run(search: Search) -> None:
    search.begin()
    while search.memory.left:
        drawn = [random_state(search.space, search.rng) for _ in range(BATCH)]
        if all(s in search.memory for s in drawn):
            break  # a space so small that it is known
        search.visit(drawn, "random")


def random_state(space: Space, rng: np.random.Generator) -> IntArray:
    """[F]: uniform ratios, each times a log-normal factor, as large as the budget allows."""
    factor = np.exp(rng.normal(0, SPREAD, len(space.free)))
    return spend(space, uniform_keys(space) / factor[:, None])
