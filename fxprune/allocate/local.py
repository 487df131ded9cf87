"""``local``: a local neighbourhood search over kept counts at a fixed budget.

Follows the idea of ARPruning (attention-map channel ranking with a local neighbourhood search for
each layer's kept count); what the search is allowed to cost is bounded by ``max_evaluations``.

    state       the kept count of every group, in steps
    neighbour   one group gives channels, another takes as many as the budget then allows
    fitness     measured on the really pruned and repaired model, lower is better
    start       the best of the cheap allocations and of the optimum of an additive model, whose
                curves are measured by cutting each group alone, deeper where the optimum wants that
    search      evaluate neighbours, the most promising first; move to a better one; where none is
                better, halve the step. At step one the model, which has learnt since, proposes
                again; end where that is not better either, or when the evaluations are spent

Legend for shapes: F free groups, P states.
"""

from __future__ import annotations

import numpy as np

from fxprune.allocate.memory import key
from fxprune.allocate.neighbours import neighbours
from fxprune.allocate.problem import AllocationProblem
from fxprune.allocate.search import Search, searched
from fxprune.allocate.spend import fill
from fxprune.types import IntArray, PrunePlan

BATCH = 4  # neighbours evaluated at once; fixed, so that workers do not change the result
PATIENCE = 3  # batches without a better neighbour before a step larger than one is halved
ALONE = 0.75  # most of the evaluations that go into cutting groups alone
POINTS = 2  # such cuts of a group on average, at most: after them neighbours tell more
NEAR = 0.1  # of a group's steps: an optimum as near as that to a measured cut is taken as measured
PROPOSALS = 2  # times that the model proposes an allocation, with what it has learnt
PAIRS = 20  # givers and takers considered where more groups could give or take


def local(problem: AllocationProblem) -> PrunePlan:
    """The best allocation that the neighbourhood search finds; see :func:`search.searched`."""
    return searched(problem, "local", _run)


def _run(search: Search) -> None:
    search.begin()
    if measure_groups_alone(search) and propose(search):
        search.found = "sensitivity"
    descend(search)
    while search.memory.left and propose(search):
        descend(search)


def propose(search: Search) -> bool:
    """Try the optimum of the additive model, twice: it learns from the first try."""
    better = [
        search.visit([search.model.proposal(search.state)], "sensitivity") for _ in range(PROPOSALS)
    ]
    return any(better)


def measure_groups_alone(search: Search) -> bool:
    """Cut each group alone: curves for the model, deep where it wants to cut deep.

    First every group as far as the current state does, those that save most before the others.
    Then each group that the model would cut elsewhere than where it was measured, there, or half
    as deep again, until that brings nothing new. Beyond what was measured the model hopes (see
    :meth:`Sensitivity.hope`): a shallow cut says little of a deep one. These states are
    above the budget: they are never accepted. False where there are not enough evaluations for it.
    """
    space, top = search.space, search.space.top
    first = _alone(search, np.minimum(search.state, top - 1))
    order = np.argsort(space.load(first), kind="stable")
    wanted = [first[f] for f in order[top[order] > 0]]
    most = min(int(search.memory.limit * ALONE), POINTS * len(wanted))
    if not wanted or min(most, search.memory.left - 2) < len(wanted) // 2 + 1:
        return False
    whole = search.memory.evaluate([top], "whole")
    results: list[tuple[IntArray, float]] = []
    while whole and wanted and len(results) < most:
        found = search.memory.evaluate(wanted[: most - len(results)], "alone")
        results += found
        if not found:
            break
        search.model.measure(whole[0][1], results)
        wanted = _unmeasured(search, [state for state, _ in results])
    return bool(whole and results)


def _unmeasured(search: Search, measured: list[IntArray]) -> list[IntArray]:
    """The groups whose steps in the model's hope are far from all measured ones, alone there.

    At most twice as deep as they were measured; those that save most by it are the first.
    """
    top, deepest = search.space.top, search.model.deepest
    best = np.maximum(search.model.hope(search.state), deepest // 2)
    far = np.minimum(top - best, np.abs(np.array(measured) - best).min(axis=0))
    alone = _alone(search, np.minimum(best, top - 1))
    order = np.argsort(search.space.load(alone), kind="stable")
    return [alone[f] for f in order if far[f] > np.maximum(1, NEAR * top[f])]


def _alone(search: Search, state: IntArray) -> IntArray:
    """[F, F]: each group at its step of ``state`` while the others are whole."""
    alone = np.repeat(search.space.top[None], len(state), axis=0)
    np.fill_diagonal(alone, np.maximum(state, 0))
    return alone


def descend(search: Search) -> None:
    """Move to better neighbours until step one has none, or no evaluations are left."""
    step = 1 << max(0, (int(search.space.top.max(initial=0)) // 4).bit_length() - 1)
    while step >= 1 and search.memory.left:
        failures = 0
        moved = False
        while search.memory.left and not moved and (step == 1 or failures < PATIENCE):
            batch = promising(search, step)
            if not batch:
                break
            moved = search.visit(batch, f"step {step}")
            failures += 1
        step = step if moved else step // 2


def promising(search: Search, step: int) -> list[IntArray]:
    """Up to BATCH unknown neighbours: those of least expected loss, and one drawn at random.

    The one drawn at random keeps a wrong model from hiding a good move. What a move leaves of the
    budget goes to other groups, the most urgent first.
    """
    keys = search.model.keys(search.state)
    at = np.arange(len(search.state))
    urgent = keys[at, np.minimum(search.state, keys.shape[1] - 1)]
    found = neighbours(search.space, search.state, step, urgent, PAIRS)
    found = found[np.argsort(search.model.predict(found), kind="stable")]
    batch: dict[tuple[int, ...], IntArray] = {}
    for wanted, order in ((BATCH - 1, found), (BATCH, search.rng.permutation(found))):
        for neighbour in order:
            if len(batch) >= wanted:
                break
            filled = fill(search.space, neighbour, keys)
            if filled not in search.memory:
                batch.setdefault(key(filled), filled)
    return list(batch.values())
