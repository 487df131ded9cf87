"""What all searches share: the state they stand on, the starts, the finalists, the plan.

A strategy is a function of a :class:`Search`: it visits states until it is content or nothing is
``left``. Strategies differ in what they visit; evaluations, journal, limits, workers and the choice
among the finalists are the same for all.

Legend for shapes: F free groups.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from fxprune.allocate.finalists import chosen
from fxprune.allocate.memory import Memory, key
from fxprune.allocate.problem import AllocationProblem
from fxprune.allocate.ranked import cluster, global_keys, isomorphic_keys
from fxprune.allocate.sensitivity import Sensitivity
from fxprune.allocate.space import Space, space_of
from fxprune.allocate.spend import spend
from fxprune.allocate.uniform import uniform_keys
from fxprune.types import IntArray, PrunePlan

Strategy: TypeAlias = Callable[["Search"], None]


@dataclass
class Search:
    """One run: where it stands, what it remembers, what it expects.

    starts  the cheap allocations by name, all within the budget
    state   [F], the best state within the budget so far; ``fitness`` its fitness
    found   name of the start that it came from
    hurry   whether, of finalists that are nearly equal, the fastest is taken
    """

    space: Space
    memory: Memory
    model: Sensitivity
    rng: np.random.Generator
    starts: Mapping[str, IntArray]
    state: IntArray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    fitness: float = np.inf
    found: str = ""
    hurry: bool = False

    def __post_init__(self) -> None:
        self.found = next(iter(self.starts))
        self.state = self.starts[self.found]

    def begin(self) -> None:
        """Stand on the best of the cheap allocations."""
        for name, state in self.starts.items():
            if self.visit([state], name):
                self.found = name

    def visit(self, states: list[IntArray], stage: str) -> bool:
        """Evaluate states within the budget; move to the best if it beats where we stand."""
        results = self.memory.evaluate(states, stage)
        self.model.learn(results)
        if not results:
            return False
        state, fitness = min(results, key=lambda r: r[1])
        if not fitness < self.fitness:
            return False
        self.state, self.fitness = state, fitness
        self.memory.accept(state)
        return True

    def within(self) -> list[tuple[IntArray, float]]:
        """The evaluated states within the budget whose fitness is finite, best first."""
        known = [(np.array(s, dtype=np.int64), v) for s, v in self.memory if np.isfinite(v)]
        known = [(s, v) for s, v in known if bool(self.space.holds(s[None])[0])]
        return sorted(known, key=lambda r: r[1])


def searched(problem: AllocationProblem, name: str, strategy: Strategy) -> PrunePlan:
    """The best allocation that a strategy finds; its cost is within the budget.

    Without a fitness: the cheap allocation with the smallest additive score loss, and
    ``plan.meta["note"]`` says so. Otherwise ``plan.meta`` has the number of evaluations, seconds,
    the best fitness, the start, the trace [{evaluation, stage, fitness, accepted}], and the
    finalists [{stage, fitness, final}] where the problem has a dearer fitness for them: then the
    plan is the one with the best ``final`` (see :mod:`finalists`).
    Raises BudgetError where the budget cannot be reached, OutputError for the journal.
    """
    space = space_of(problem, overlapping=True)
    starts = cheap_states(problem, space)
    if problem.fitness is None:
        return _by_scores(space, starts, name)
    with Memory(space, problem, name) as memory:
        rng = np.random.default_rng(problem.seed)
        hurry = isinstance(problem.round_to, Mapping)
        search = Search(space, memory, Sensitivity(space), rng, starts, hurry=hurry)
        strategy(search)
        firsts = {key(s) for s in starts.values()}
        best, finalists = chosen(space, memory, search.within(), firsts, search.hurry)
        state = search.state if best is None else best
    fitness = dict(memory).get(key(state), np.inf)
    if memory.trace and not any(np.isfinite(v) for _, v in memory):
        warnings.warn("no evaluation of the search gave a finite number", stacklevel=2)
    meta: dict[str, Any] = {
        "allocation": name,
        "start": search.found,
        "seed": problem.seed,
        "evaluations": len(memory.trace),
        "fitness": fitness if np.isfinite(fitness) else None,
        "trace": memory.trace,
    }
    if finalists:
        meta["finalists"] = finalists
    return space.plan(state, meta)


def cheap_states(problem: AllocationProblem, space: Space) -> dict[str, IntArray]:
    """The cheap allocations as states [F] of the (wider) space of the search."""
    cheap = space_of(problem)
    states = {
        "uniform": spend(cheap, uniform_keys(cheap)),  # what is faster is one of the finalists
        "global": spend(cheap, global_keys(cheap)),
        "isomorphic": spend(cheap, isomorphic_keys(cheap, cluster(problem.traced, cheap))),
    }
    return {name: space.state(cheap.counts(s[None])[0]) for name, s in states.items()}


def _by_scores(space: Space, starts: dict[str, IntArray], name: str) -> PrunePlan:
    """What can be said without a fitness: the start with the smallest score loss."""
    losses = Sensitivity(space).predict(np.stack(list(starts.values())))
    best = list(starts)[int(np.argmin(losses))]
    meta = {
        "allocation": name,
        "start": best,
        "evaluations": 0,
        "score_loss": float(losses.min()),
        "note": f"no fitness was given, so nothing was searched: this is {best!r}, "
        "the cheap allocation with the smallest additive score loss",
    }
    return space.plan(starts[best], meta)
