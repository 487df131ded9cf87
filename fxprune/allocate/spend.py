"""Spend a budget step by step, the most urgent step first.

Every cheap allocation is one order of steps: a table ``keys`` [F, S - 1] says how urgent it is to
raise group f from step s to s + 1. Uniform ratios, a global threshold and a sensitivity profile
differ in nothing but their keys.

Legend for shapes: F free groups, S steps of the group that has the most.
"""

from __future__ import annotations

from bisect import bisect_left

import numpy as np

from fxprune.allocate.space import Space
from fxprune.types import FloatArray, IntArray

ENOUGH = 0.9995  # share of the budget above which no more steps are looked for


def spend(space: Space, keys: FloatArray) -> IntArray:
    """The state [F] of the longest run of steps within the budget, then all that still fits.

    ``keys`` [F, S - 1] never grow along a group's steps. Ties: the earlier group, then its lower
    step. Starts from the smallest choice of every group.
    """
    free, steps = keys.shape
    group = np.repeat(np.arange(free), steps)
    real = (np.arange(steps)[None] < space.top[:, None]).ravel()
    order = np.argsort(-keys.ravel()[real], kind="stable")
    group = group[real][order]

    def state(length: int) -> IntArray:
        return np.bincount(group[:length], minlength=free).astype(np.int64)

    def above(length: int) -> bool:
        return not space.holds(state(length)[None])[0]

    length = bisect_left(range(len(group) + 1), True, key=above) - 1
    return fill(space, state(max(0, length)), keys)


def fill(space: Space, state: IntArray, keys: FloatArray) -> IntArray:
    """Raise ``state`` [F] by the most urgent step that the budget allows, until none fits."""
    state = state.copy()
    while True:
        movable = np.flatnonzero(state < space.top)
        if not len(movable) or space.load(state[None])[0] > ENOUGH:
            return state
        urgent = movable[np.argsort(-keys[movable, state[movable]], kind="stable")]
        raised = np.repeat(state[None], len(urgent), axis=0)
        raised[np.arange(len(urgent)), urgent] += 1
        fits = np.flatnonzero(space.holds(raised))
        if not len(fits):
            return state
        state = raised[fits[0]]


def falling(keys: FloatArray) -> FloatArray:
    """``keys`` made non-increasing along the steps: a late step cannot come before an early one."""
    return np.minimum.accumulate(keys, axis=1)
