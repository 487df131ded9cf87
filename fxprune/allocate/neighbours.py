"""Neighbours of a state: channels move from one group to another and the budget still holds.

Legend for shapes: F free groups, P states.
"""

from __future__ import annotations

import numpy as np

from fxprune.allocate.space import Space
from fxprune.types import FloatArray, IntArray


def neighbours(space: Space, state: IntArray, step: int, gain: FloatArray, most: int) -> IntArray:
    """[P, F]: all different states that one move of ``step`` steps leads to, in a fixed order.

    1. one group gives ``step`` steps (or all it has), another takes as many as the budget allows;
    2. one group takes ``step`` steps (or up to its width), another gives as few as it must.
    Where there are more than ``most`` groups, the givers are those with the smallest ``gain`` [F]
    (expected loss per share of the budget) and the takers those with the largest.
    """
    givers = np.flatnonzero(state > 0)
    takers = np.flatnonzero(state < space.top)
    givers = givers[np.argsort(gain[givers], kind="stable")][:most]
    takers = takers[np.argsort(-gain[takers], kind="stable")][:most]
    give, take = (a.ravel() for a in np.meshgrid(givers, takers, indexing="ij"))
    different = give != take
    give, take = give[different], take[different]
    row = np.arange(len(give))

    given = np.repeat(state[None], len(give), axis=0)
    given[row, give] = np.maximum(0, state[give] - step)
    given = raise_within(space, given, take)

    taken = np.repeat(state[None], len(take), axis=0)
    taken[row, take] = np.minimum(space.top[take], state[take] + step)
    taken = raise_within(space, taken, give)

    found = np.concatenate([given, taken])
    found = found[(found > state).any(axis=1) & (found < state).any(axis=1)]
    return np.unique(found[space.holds(found)], axis=0)


def raise_within(space: Space, states: IntArray, group: IntArray) -> IntArray:
    """[P, F] states with group[p] at the highest step that the budget allows (0 where none).

    Bisection for all P states at once; ``group`` [P] is the free group to move in each.
    """
    row = np.arange(len(states))
    low, high = np.zeros(len(states), dtype=np.int64), space.top[group].copy()
    states = states.copy()
    while (low < high).any():
        middle = (low + high + 1) // 2
        states[row, group] = middle
        fits = space.holds(states)
        low = np.where(fits, middle, low)
        high = np.where(fits, high, middle - 1)
    states[row, group] = low
    return states
