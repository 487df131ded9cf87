"""``evolution``: a population of allocations, crossed and mutated; all hold the budget.

The usual scheme of searches over widths (steady state, tournament selection, uniform crossover),
here for comparison with the neighbourhood search: it needs more evaluations for the same fitness.

Legend for shapes: F free groups.
"""

from __future__ import annotations

import numpy as np

from fxprune.allocate.chance import random_state
from fxprune.allocate.memory import key
from fxprune.allocate.problem import AllocationProblem
from fxprune.allocate.search import Search, searched
from fxprune.allocate.space import Space
from fxprune.allocate.spend import spend
from fxprune.types import IntArray, PrunePlan

BATCH = 4  # children of a generation, evaluated at once
POPULATION = 12  # states that may have children, the best so far
TOURNAMENT = 3  # drawn for each parent; the best of them is it
MUTATED = 0.3  # chance of each group
SPREAD = 0.25  # standard deviation of the logarithm of a mutation's factor
TRIES = 20  # for a child that is not known yet

Member = tuple[IntArray, float]


def evolution(problem: AllocationProblem) -> PrunePlan:
    """The best allocation of the last generation; see :func:`search.searched`."""
    return searched(problem, "evolution", _run)


def _run(search: Search) -> None:
    search.begin()
    first = [random_state(search.space, search.rng) for _ in range(POPULATION - len(search.starts))]
    for i in range(0, len(first), BATCH):
        search.visit(first[i : i + BATCH], "first")
    while search.memory.left:
        people = sorted(((np.array(s), v) for s, v in search.memory), key=lambda m: m[1])
        born = _children(search, people[:POPULATION])
        if not born:
            break
        search.visit(born, "child")


def _children(search: Search, people: list[Member]) -> list[IntArray]:
    """Up to BATCH states that are not known yet."""
    born: dict[tuple[int, ...], IntArray] = {}
    for _ in range(TRIES * BATCH):
        if len(born) == BATCH:
            break
        parents = [_parent(people, search.rng) for _ in range(2)]
        child = _child(search.space, parents[0], parents[1], search.rng)
        if child not in search.memory:
            born.setdefault(key(child), child)
    return list(born.values())


def _parent(people: list[Member], rng: np.random.Generator) -> IntArray:
    drawn = rng.integers(0, len(people), TOURNAMENT)
    return people[int(drawn.min())][0]


def _child(space: Space, one: IntArray, other: IntArray, rng: np.random.Generator) -> IntArray:
    """[F]: each group's kept share from one parent, some mutated, then scaled to the budget."""
    at = np.arange(len(one))
    mixed = np.where(rng.random(len(one)) < 0.5, space.table[at, one], space.table[at, other])
    factor = np.exp(rng.normal(0, SPREAD, len(one)) * (rng.random(len(one)) < MUTATED))
    share = mixed / space.table[:, -1] * factor
    between = (space.table[:, :-1] + space.table[:, 1:]) / 2
    return spend(space, -between / (space.table[:, -1:] * share[:, None]))
