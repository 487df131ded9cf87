"""``greedy``: from the whole model down to the budget, each time by the cut that costs least.

The scheme of NetAdapt (T.-J. Yang et al., 2018), without its short fine-tuning between the rounds:
in every round each group proposes the smallest cut of its own that saves the round's share of the
cost; the proposals of least expected loss are evaluated, the best is taken. There are as many
rounds as the evaluations allow, so that a round asks for little.

Legend for shapes: F free groups, P states.
"""

from __future__ import annotations

import numpy as np

from fxprune.allocate.problem import AllocationProblem
from fxprune.allocate.search import Search, searched
from fxprune.allocate.spend import fill
from fxprune.types import FloatArray, IntArray, PrunePlan

PROPOSALS = 4  # evaluated in a round; more would leave fewer and larger rounds


def greedy(problem: AllocationProblem) -> PrunePlan:
    """The state in which the greedy descent reaches the budget; see :func:`search.searched`."""
    return searched(problem, "greedy", _run)


def _run(search: Search) -> None:
    search.begin()
    space = search.space
    state = space.top.copy()
    for _, whole in search.memory.evaluate([state], "whole"):
        search.model.measure(whole, [])
    while (load := float(space.load(state[None])[0])) > 1:
        rounds = max(1, (search.memory.left - 1) // PROPOSALS)
        goal = load ** (1 - 1 / rounds)
        proposals = _proposals(search, state, goal)
        loss = search.model.predict(proposals)
        promising = proposals[np.argsort(loss, kind="stable")[:PROPOSALS]]
        results = search.memory.evaluate(list(promising), f"load {goal:.2f}")
        if not results:
            return
        search.model.learn(results)
        state = min(results, key=lambda r: r[1])[0]
    search.visit([fill(space, state, search.model.keys(state))], "greedy")


def _proposals(search: Search, state: IntArray, goal: float) -> IntArray:
    """[P, F]: for each group that can still give, its smallest cut that reaches the goal, or all.

    Where no group reaches it alone, each gives what it can.
    """
    space = search.space
    found = []
    for f in np.flatnonzero(state > 0).tolist():
        low, high = 0, int(state[f]) - 1
        while low < high:  # the highest step of this group at which the goal is reached
            middle = (low + high + 1) // 2
            low, high = (
                (middle, high) if _load(search, state, f, middle) <= goal else (low, middle - 1)
            )
        cut = state.copy()
        cut[f] = low
        found.append(cut)
    every = np.array(found, dtype=np.int64).reshape(len(found), len(state))
    loads: FloatArray = space.load(every)
    reached = loads <= goal
    return every[reached] if reached.any() else every[loads < space.load(state[None])[0]]


def _load(search: Search, state: IntArray, group: int, step: int) -> float:
    moved = state.copy()
    moved[group] = step
    return float(search.space.load(moved[None])[0])
