"""Spend what rounding leaves open where it buys time.

Widths are rounded to those that are fast on the target, so near a state there are many others that
are as good by all that a budget and the scores tell, and differ in milliseconds: a layer on a large
map gives a block of channels for little of the budget, a tiny one whole for nothing. The fastest is
an integer programme, linearised around the state that is known and solved again (like
:mod:`fxprune.allocate.knapsack`).

Legend for shapes: F free groups, S steps, V variables.
"""

from __future__ import annotations

import numpy as np

from fxprune.allocate.knapsack import choices, solved
from fxprune.allocate.space import Space
from fxprune.types import FloatArray, IntArray

REACH = 1  # steps that a group may move: what rounding decides
USED = 0.98  # of the budget that ``state`` uses, the least that is used again
ROUNDS = 8  # linearisations
LEAST_SHARE = 1e-6  # kept share of the scores below which the loss does not grow any more
GAIN = 0.05  # of the state's time: less is not worth what scores do not tell of the outputs
WORTH = 1e-4  # of the state's time, the least that a round must save


def thrifty(space: Space, state: IntArray, gain: float = GAIN) -> IntArray:
    """The fastest state [F] found within ``REACH`` steps of ``state``, which holds the budget.

    It holds the budget too, uses at least ``USED`` as much of it, and the sum over groups of
    -log(share of the scores that is kept) is not larger. ``state`` itself where that saves less
    than ``gain`` of the time, where the target's times are not known, or where the budget bounds
    them anyway.
    """
    if space.latency is None or "latency" in space.measures or not len(state):
        return state
    best = _Thrift(space, state)
    enough = (1 - gain) * best.ms
    for _ in range(ROUNDS):
        found = best.around()
        if found is None or not best.take(found):
            break
    return best.state if best.ms <= enough else state


class _Thrift:
    """Where the search stands, within reach of where it began."""

    def __init__(self, space: Space, state: IntArray) -> None:
        self.space, self.state = space, state
        self.group, self.step = choices(space, state, REACH)
        self.loss = -np.log(np.maximum(space.gain, LEAST_SHARE))
        self.most = self._lost(state)
        self.bound = int(space.loads(state[None])[0].argmax())
        self.least = USED * float(space.load(state[None])[0])
        self.ms = float(self._times(state[None])[0])
        self.slack = np.zeros(len(space.measures) + 1)

    def _times(self, states: IntArray) -> FloatArray:
        assert self.space.latency is not None
        return self.space.latency.predict(self.space.counts(states))

    def _lost(self, state: IntArray) -> float:
        return float(self.loss[np.arange(len(state)), state].sum())

    def around(self) -> IntArray | None:
        """The optimum of the programme that is linear at the state; None: there is none."""
        moved = np.repeat(self.state[None], len(self.group), axis=0)
        moved[np.arange(len(self.group)), self.group] = self.step
        base = self.space.loads(self.state[None])[0]
        change = self.space.loads(moved) - base
        saved = self._times(moved) - self.ms
        lost = self.loss[self.group, self.step] - self.loss[self.group, self.state[self.group]]
        rows = [change, -change[:, [self.bound]], lost[:, None]]
        room = [1 - base, [base[self.bound] - self.least], [self.most - self._lost(self.state)]]
        tight = np.concatenate([self.slack, [0.0]])
        return solved(
            saved, self.group, self.step, np.concatenate(rows, axis=1), np.concatenate(room) - tight
        )

    def take(self, found: IntArray) -> bool:
        """Move to ``found`` if it keeps all promises and is faster; whether to go on."""
        loads = self.space.loads(found[None])[0]
        over = np.append(loads - 1, self.least - loads[self.bound])
        if (over > 0).any():  # the linear programme missed this: ask for more the next time
            self.slack += np.where(over > 0, 1.05 * over + 1e-9, 0)
            return True
        ms = float(self._times(found[None])[0])
        if self._lost(found) > self.most + 1e-9 or ms >= self.ms * (1 - WORTH):
            return False
        self.state, self.ms = found, ms
        self.slack[:] = 0
        return True
