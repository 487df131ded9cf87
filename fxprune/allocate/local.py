"""``local``: a local neighbourhood search over kept counts at a fixed budget.

Follows the idea of ARPruning (attention-map channel ranking with a local neighbourhood search for
each layer's kept count); what the search is allowed to cost is bounded by ``max_evaluations``.

    state       the kept count of every group, in steps
    neighbour   one group gives channels, another takes as many as the budget then allows
    fitness     measured on the really pruned and repaired model, lower is better
    search      from the best cheap allocation: evaluate neighbours, the most promising first; move
                to a better one; where none is better, halve the step; end at step one, or when the
                evaluations are spent

Legend for shapes: F free groups, P states.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fxprune.allocate.memory import Memory, key
from fxprune.allocate.neighbours import neighbours
from fxprune.allocate.problem import AllocationProblem
from fxprune.allocate.ranked import cluster, global_keys, isomorphic_keys
from fxprune.allocate.sensitivity import Sensitivity
from fxprune.allocate.space import Space, space_of
from fxprune.allocate.spend import fill, spend
from fxprune.allocate.uniform import uniform_keys
from fxprune.types import IntArray, PrunePlan

BATCH = 4  # neighbours evaluated at once; fixed, so that workers do not change the result
PATIENCE = 3  # batches without a better neighbour before a step larger than one is halved
ALONE = 3  # at most one evaluation in so many goes into cutting groups alone
PROPOSALS = 2  # times that the model proposes an allocation, with what it has learnt
PAIRS = 20  # givers and takers considered where more groups could give or take


def local(problem: AllocationProblem) -> PrunePlan:
    """The best allocation that the neighbourhood search finds; its cost is within the budget.

    Without a fitness: the cheap allocation with the smallest additive score loss, and
    ``plan.meta["note"]`` says so. Otherwise ``plan.meta`` has the number of evaluations, the best
    fitness, the start, and the trace [{evaluation, stage, fitness, accepted}].
    Raises BudgetError where the budget cannot be reached.
    """
    space = space_of(problem, overlapping=True)
    starts = cheap_states(problem, space)
    if problem.fitness is None:
        return _by_scores(space, starts)
    with Memory(space, problem) as memory:
        search = Search(space, memory, Sensitivity(space), np.random.default_rng(problem.seed))
        start = search.begin(starts)
        search.descend()
    meta: dict[str, Any] = {
        "allocation": "local",
        "start": start,
        "seed": problem.seed,
        "evaluations": len(memory.trace),
        "fitness": search.fitness if np.isfinite(search.fitness) else None,
        "trace": memory.trace,
    }
    return space.plan(search.state, meta)


def cheap_states(problem: AllocationProblem, space: Space) -> dict[str, IntArray]:
    """The cheap allocations as states [F] of the (wider) space of the search."""
    cheap = space_of(problem)
    keys = {
        "uniform": uniform_keys(cheap),
        "global": global_keys(cheap),
        "isomorphic": isomorphic_keys(cheap, cluster(problem.traced, cheap)),
    }
    states = {name: spend(cheap, k) for name, k in keys.items()}
    return {name: space.state(cheap.counts(s[None])[0]) for name, s in states.items()}


def _by_scores(space: Space, starts: dict[str, IntArray]) -> PrunePlan:
    """What can be said without a fitness: the start with the smallest score loss."""
    losses = Sensitivity(space).predict(np.stack(list(starts.values())))
    name = list(starts)[int(np.argmin(losses))]
    meta = {
        "allocation": "local",
        "start": name,
        "evaluations": 0,
        "score_loss": float(losses.min()),
        "note": f"no fitness was given, so nothing was searched: this is {name!r}, "
        "the cheap allocation with the smallest additive score loss",
    }
    return space.plan(starts[name], meta)


@dataclass
class Search:
    """One run: where it stands, what it remembers, what it expects."""

    space: Space
    memory: Memory
    model: Sensitivity
    rng: np.random.Generator
    state: IntArray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    fitness: float = np.inf

    def begin(self, starts: dict[str, IntArray]) -> str:
        """Stand on the best of the cheap allocations and the model's own; return its name."""
        found = next(iter(starts))
        self.state = starts[found]
        for name, state in starts.items():
            found = name if self.visit([state], name) else found
        if self.measure_groups_alone():
            for _ in range(PROPOSALS):
                proposed = [self.model.proposal(self.state)]
                found = "sensitivity" if self.visit(proposed, "sensitivity") else found
        return found

    def measure_groups_alone(self) -> bool:
        """Cut each group alone as far as the current state does, those that save most first.

        These states are above the budget: they teach the model and are never accepted.
        False where the evaluations do not suffice for it.
        """
        alone = np.repeat(self.space.top[None], len(self.state), axis=0)
        np.fill_diagonal(alone, self.state)
        order = np.argsort(self.space.load(alone), kind="stable")
        order = order[self.state[order] < self.space.top[order]]
        order = order[: self.memory.limit // ALONE]
        if len(order) == 0 or self.memory.left <= len(order) + 1:
            return False
        whole = self.memory.evaluate([self.space.top], "whole")
        self.model.whole = whole[0][1]
        self.model.learn(self.memory.evaluate(list(alone[order]), "alone"))
        return True

    def descend(self) -> None:
        """Move to better neighbours until step one has none, or no evaluations are left."""
        step = 1 << max(0, (int(self.space.top.max(initial=0)) // 4).bit_length() - 1)
        while step >= 1 and self.memory.left:
            failures = 0
            moved = False
            while self.memory.left and not moved and (step == 1 or failures < PATIENCE):
                batch = self.promising(step)
                if not batch:
                    break
                moved = self.visit(batch, f"step {step}")
                failures += 1
            step = step if moved else step // 2

    def promising(self, step: int) -> list[IntArray]:
        """Up to BATCH unknown neighbours: those of least expected loss, and one drawn at random.

        The one drawn at random keeps a wrong model from hiding a good move. What a move leaves of
        the budget goes to other groups, the most urgent first.
        """
        keys = self.model.keys(self.state)
        at = np.arange(len(self.state))
        urgent = keys[at, np.minimum(self.state, keys.shape[1] - 1)]
        found = neighbours(self.space, self.state, step, urgent, PAIRS)
        found = found[np.argsort(self.model.predict(found), kind="stable")]
        batch: dict[tuple[int, ...], IntArray] = {}
        for wanted, order in ((BATCH - 1, found), (BATCH, self.rng.permutation(found))):
            for neighbour in order:
                if len(batch) >= wanted:
                    break
                filled = fill(self.space, neighbour, keys)
                if filled not in self.memory:
                    batch.setdefault(key(filled), filled)
        return list(batch.values())

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
