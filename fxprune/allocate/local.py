"""``local``: a local neighbourhood search over kept counts at a fixed budget.

Follows the idea of ARPruning (attention-map channel ranking with a local neighbourhood search for
each layer's kept count); what the search is allowed to cost is bounded by ``max_evaluations``.

    state       the kept count of every group, in steps
    neighbour   one group gives channels, another takes as many as the budget then allows
    fitness     measured on the really pruned and repaired model, lower is better
    start       the best of the cheap allocations and of the optimum of an additive model, whose
                curves are measured by cutting each group alone
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
ALONE = 2  # at most one evaluation in so many goes into cutting groups alone
DEEP = 2.5  # times the budget that the whole model takes, above which curves have a third point
DEEPER = 4  # that point is at this part of the state's kept share
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
    """Cut each group alone, as far as the current state does and further: curves for the model.

    These states are above the budget: they are never accepted. First every group once, those that
    save most before the others, then every group again, and once more where the budget is deep, as
    far as the evaluations go. False where there are not enough for it.
    """
    space, top = search.space, search.space.top
    share = search.state / np.maximum(top, 1)
    alone = [_alone(search, np.minimum(search.state, top - 1))]
    alone.append(_alone(search, np.floor(top * np.maximum(share - 0.3, share / 2))))
    if space.load(top[None])[0] > DEEP:
        alone.append(_alone(search, np.floor(top * share / DEEPER)))
    order = np.argsort(space.load(alone[0]), kind="stable")
    order = order[top[order] > 0]
    wanted = [points[f] for points in alone for f in order]
    wanted = wanted[: search.memory.limit // ALONE]
    if not wanted or search.memory.left <= len(wanted) + 1:
        return False
    whole = search.memory.evaluate([top], "whole")
    results = search.memory.evaluate(wanted, "alone")
    if whole and results:
        search.model.measure(whole[0][1], results)
    return bool(whole and results)


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
