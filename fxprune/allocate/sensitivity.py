"""What a cut is expected to cost: an additive model, corrected by every evaluation.

The loss of a state is the loss of the uncut model plus one term for each group,

    loss(x) = loss(top) + sum_f weight_f * shape_f(x_f),   shape_f = -log(share of the score kept).

The shape comes from the criterion and rises without bound as a group is emptied; where a group was
cut alone, the shape is bent to pass through the losses that were measured. The weights are what
further evaluations teach (ridge regression towards one common weight). The model only orders
neighbours and proposes allocations; no state is accepted without being evaluated.

Legend for shapes: F free groups, S steps of the group that has the most, P states, E evaluations.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fxprune.allocate.knapsack import knapsack
from fxprune.allocate.space import Space
from fxprune.allocate.spend import falling
from fxprune.types import FloatArray, IntArray

LEAST_SHARE = 1e-6  # kept share of the score below which the loss does not grow any more
RIDGE = 0.1  # pull of each weight to the common one, in units of the mean squared shape
LEAST_WEIGHT = 0.02  # no group is taken for cheaper than this share of the common weight


class Sensitivity:
    """The additive model of one search space.

    whole   fitness of the uncut model; NaN until it is known
    weight  [F], of each group's shape; all 1 until something is learnt
    deepest [F], the lowest step at which each group was cut alone
    """

    def __init__(self, space: Space) -> None:
        self.space = space
        self.shape = self._scores = -np.log(np.maximum(space.gain, LEAST_SHARE))
        self.weight = np.ones(len(space.free))
        self.deepest = space.top.copy()
        self.whole = np.nan
        self._seen: dict[tuple[int, ...], float] = {}

    def measure(self, whole: float, alone: Sequence[tuple[IntArray, float]]) -> None:
        """Take over curves: fitness of the uncut model and of states that cut one group alone.

        Between measured steps, and beyond them, the ratio of the measured loss to the criterion's
        shape is interpolated. A group that was not cut alone takes the median ratio. Called again,
        with more states: what was taken over before is forgotten.
        """
        self.whole = whole
        least = 1e-6 * max((v - whole for _, v in alone if np.isfinite(v)), default=0.0)
        points: dict[int, dict[int, float]] = {}
        for state, value in alone:
            (cut,) = np.flatnonzero(state < self.space.top)
            if np.isfinite(value) and least > 0:
                step = int(state[cut])
                ratio = max(value - whole, least) / max(self._scores[cut, step], 1e-12)
                points.setdefault(int(cut), {})[step] = ratio
        every = [r for ratios in points.values() for r in ratios.values()]
        scale = np.full(self.shape.shape, np.median(every) if every else 1.0)
        steps = np.arange(self.shape.shape[1])
        self.deepest = self.space.top.copy()
        for f, ratios in points.items():
            known = sorted(ratios)
            self.deepest[f] = known[0]
            scale[f] = np.interp(steps, known, [ratios[s] for s in known])
        bent = self._scores * scale
        self.shape = np.maximum.accumulate(bent[:, ::-1], axis=1)[:, ::-1].copy()
        self.learn(alone)

    def predict(self, states: IntArray) -> FloatArray:
        """[P, F] states -> [P] expected loss above that of the uncut model."""
        return np.asarray(self._features(states) @ self.weight)

    def _features(self, states: IntArray) -> FloatArray:
        return np.asarray(self.shape[np.arange(len(self.weight)), states])

    def learn(self, results: Sequence[tuple[IntArray, float]]) -> None:
        """Correct the weights by evaluations (state [F], fitness), once ``whole`` is known.

        Losses are fitted relative to their size, so that the small loss of a cut in one group
        counts as much as the large one of a cut in all. Values that are not finite teach nothing.
        """
        self._seen.update({tuple(s.tolist()): v for s, v in results if np.isfinite(v)})
        if not np.isfinite(self.whole) or not self._seen:
            return
        x = self._features(np.array(list(self._seen), dtype=np.int64))
        y = np.maximum(0.0, np.array(list(self._seen.values())) - self.whole)
        cut = x.any(axis=1)
        x, y = x[cut], y[cut]
        if not y.any():
            return
        scale = y + max(0.1 * float(np.median(y)), 1e-9 * float(y.max()))
        x, y = x / scale[:, None], y / scale
        total = x.sum(axis=1)
        common = float(total @ y) / float(total @ total)
        gram = x.T @ x
        pull = RIDGE * float(np.trace(gram)) / len(gram)
        weight = common + np.linalg.solve(
            gram + pull * np.eye(len(gram)), x.T @ (y - common * total)
        )
        self.weight = np.maximum(weight, LEAST_WEIGHT * common)

    def keys(self, at: IntArray) -> FloatArray:
        """[F, S - 1]: expected loss that a step avoids, for each share of the budget it takes.

        A step's cost is that of one channel more in its group at the state ``at`` [F].
        """
        steps = np.arange(len(at))
        up = np.repeat(at[None], len(at), axis=0)
        down = up.copy()
        up[steps, steps] = np.minimum(at + 1, self.space.top)
        down[steps, steps] = np.maximum(at - 1, 0)
        channels = self.space.table[steps, up[steps, steps]]
        channels = channels - self.space.table[steps, down[steps, steps]]
        price = (self.space.load(up) - self.space.load(down)) / np.maximum(channels, 1)
        price = np.maximum(price, 1e-9 * max(float(price.max(initial=0.0)), 1e-9))
        avoided = -np.diff(self.shape, axis=1) * self.weight[:, None]
        added = np.maximum(np.diff(self.space.table, axis=1), 1)
        return falling(avoided / (added * price[:, None]))

    def proposal(self, at: IntArray) -> IntArray:
        """The state [F] that the model expects to be best; ``at`` [F] holds the budget."""
        return knapsack(self.space, self.shape * self.weight[:, None], self.keys(at), at)

    def hope(self, at: IntArray) -> IntArray:
        """The state [F] that could be best: beyond what was measured a loss grows no faster.

        There each channel is taken for as dear as the mean one of the deepest measured cut. Losses
        grow faster as a rule, so what is not worth cutting even so needs no deeper measurement.
        """
        rows, steps = np.arange(len(at)), np.arange(self.shape.shape[1])
        gone = self.space.table[:, -1:] - self.space.table
        known = gone[rows, self.deepest]
        slope = self.shape[rows, self.deepest] / np.maximum(known, 1)
        deeper = (steps < self.deepest[:, None]) & (known > 0)[:, None]
        hoped = np.where(deeper, np.minimum(gone * slope[:, None], self.shape), self.shape)
        return knapsack(self.space, hoped, self.keys(at), at)
