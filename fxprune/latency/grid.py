"""Measured grids of widths, and what lies between their points.

Kernels work on blocks of channels: the time is that of the next full block, and widths that do not
fit a runtime's blocks take a slower path. So a width is first raised to a whole block, the time of
that is interpolated between measured grid points, and multiplied by what was measured for widths
that are multiples of 8, of 4, or of neither.

Legend for shapes: P plans, I products, A axes (widths of a product that may vary), L grid levels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from fxprune.latency.ops import Family
from fxprune.types import FloatArray, IntArray

UNITS = (16, 8, 4, 1)  # classes of widths: multiples of the first that divides them
MANY = 3  # different full widths in a family above which they share one top
Point = tuple[Family, tuple[int, ...]]


@dataclass(frozen=True)
class Axes:
    """One product's widths: of the whole model, and the least that a plan leaves.

    full, least  one for each axis of the family; equal where the width cannot change
    tops         highest grid level of each axis: the full width, or one that many products share
    """

    family: Family
    full: tuple[int, ...]
    least: tuple[int, ...]
    tops: tuple[int, ...]

    def varies(self, axis: int) -> bool:
        return self.least[axis] < self.full[axis]

    def levels(self, axis: int, block: int) -> tuple[int, ...]:
        """Grid levels around the widths: powers of two in blocks, and the top in whole blocks."""
        full, least = self.full[axis], self.least[axis]
        if not self.varies(axis):
            return (full,)
        if self.family.form == "grouped":
            return tuple(sorted({least, max(least, full // 2), full}))
        top = raised(self.tops[axis], block)
        steps = [*(block << j for j in range(32) if block << j < top), top]
        low = max((s for s in steps if s <= least), default=steps[0])
        high = next(s for s in steps if s >= full)
        return tuple(s for s in steps if low <= s <= high)

    def grid(self, block: int) -> Iterator[Point]:
        """All points that must be measured."""
        axes = [self.levels(a, block) for a in range(len(self.full))]
        for widths in itertools.product(*axes):
            yield self.family, widths

    def odd(self, axis: int, block: int) -> dict[int, tuple[int, ...]]:
        """Class of widths -> widths of a product of that class, all within the highest block.

        The other axes stay at their highest levels.
        """
        top = [self.levels(a, block)[-1] for a in range(len(self.full))]
        found = {}
        for number, unit in enumerate(UNITS):
            width = top[axis] - (unit if unit > 1 else 3)
            if unit < 16 and width > max(0, top[axis] - block):
                found[number] = (*top[:axis], width, *top[axis + 1 :])
        return found


def shared_tops(axes: list[Axes]) -> list[Axes]:
    """The same with one top for all products of a family that has many different full widths."""
    fulls: dict[tuple[Family, int], set[int]] = {}
    for one in axes:
        for a, full in enumerate(one.full):
            if one.varies(a):
                fulls.setdefault((one.family, a), set()).add(full)
    return [
        replace(
            one,
            tops=tuple(
                max(found) if len(found := fulls.get((one.family, a), {full})) > MANY else full
                for a, full in enumerate(one.full)
            ),
        )
        for one in axes
    ]


def raised(width: int, block: int) -> int:
    """The next multiple of ``block``; ``width`` itself where blocks do not matter."""
    return -(-width // block) * block


class Grids:
    """Milliseconds of I products at any widths.

    levels [I, A, L] and time [I, L, ...] padded by repeating the last; factor [I, A, classes].
    """

    def __init__(
        self,
        axes: list[Axes],
        block: int,
        times: list[FloatArray],
        factors: list[list[dict[int, float]]],
    ) -> None:
        count = 3 if any(a.family.axes == 3 for a in axes) else 2
        found = [[a.levels(i, block) for i in range(len(a.full))] for a in axes]
        most = max((len(x) for one in found for x in one), default=1)
        self.block = np.ones((len(axes), count), dtype=np.int64)
        for i, one in enumerate(axes):
            if one.family.form != "grouped":
                varies = [j for j in range(len(one.full)) if one.varies(j)]
                self.block[i, varies] = block
        self.levels = np.ones((len(axes), count, most))
        self.factor = np.ones((len(axes), count, len(UNITS)))
        self.time = np.zeros((len(axes), *[most] * count))
        for i, (steps, time) in enumerate(zip(found, times, strict=True)):
            for a, x in enumerate(steps):
                self.levels[i, a] = np.pad(np.array(x, float), (0, most - len(x)), mode="edge")
                for number, value in factors[i][a].items():
                    self.factor[i, a, number] = value
            shape = [*time.shape, *[1] * (count - time.ndim)]
            wide = [(0, most - s) for s in shape]
            self.time[i] = np.pad(time.reshape(shape), wide, mode="edge")
        self.count = np.array([[len(x) for x in one] + [1] * (count - len(one)) for one in found])
        self.active = [a for a in range(count) if len(axes) and (self.count[:, a] > 1).any()]

    def predict(self, widths: FloatArray) -> FloatArray:
        """widths [P, I, A] -> [P, I] milliseconds."""
        whole = np.rint(widths).astype(np.int64)
        snapped = (-(-whole // self.block) * self.block).astype(np.float64)
        scale = self._scale(whole)
        corner: dict[int, tuple[IntArray, IntArray]] = {}
        share: dict[int, FloatArray] = {}
        for a in self.active:
            levels = self.levels[:, a]
            at = (snapped[:, :, a, None] >= levels[None, :, 1:]).sum(-1)
            at = np.minimum(at, np.maximum(self.count[:, a] - 2, 0))
            up = np.minimum(at + 1, self.count[:, a] - 1)
            row = np.arange(len(levels))
            low, high = levels[row, at], levels[row, up]
            part = (snapped[:, :, a] - low) / np.maximum(high - low, 1.0)
            corner[a], share[a] = (at, up), np.clip(part, 0.0, 1.0)
        return scale * self._between(corner, share, widths.shape[0])

    def _between(
        self, corner: dict[int, tuple[IntArray, IntArray]], share: dict[int, FloatArray], plans: int
    ) -> FloatArray:
        items, axes = self.levels.shape[:2]
        row = np.broadcast_to(np.arange(items), (plans, items))
        zero = np.zeros((plans, items), dtype=np.int64)
        total = np.zeros((plans, items))
        for ends in itertools.product((0, 1), repeat=len(self.active)):
            index = [zero] * axes
            weight = np.ones((plans, items))
            for a, end in zip(self.active, ends, strict=True):
                index[a] = corner[a][end]
                weight = weight * (share[a] if end else 1.0 - share[a])
            total += weight * self.time[(row, *index)]
        return total

    def _scale(self, whole: IntArray) -> FloatArray:
        """[P, I]: what widths that are no multiples of 16 cost more."""
        if (self.factor == 1.0).all():
            return np.ones(whole.shape[:2])
        kind = np.full(whole.shape, len(UNITS) - 1)
        for number in range(len(UNITS) - 1, -1, -1):
            kind[whole % UNITS[number] == 0] = number
        items, axes = np.ogrid[: whole.shape[1], : whole.shape[2]]
        return np.asarray(self.factor[items, axes, kind].prod(axis=2))
