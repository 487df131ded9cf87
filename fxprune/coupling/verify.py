"""The last defence: what the ops said about channels, held against random plans.

The solve is meant to satisfy every claim by construction. Whatever it would not is locked here,
with a reason, instead of becoming a wrong model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fxprune.coupling.labels import Facts
from fxprune.coupling.solve import distinct, distinct_pairs
from fxprune.types import BoolArray, ChannelGroup, IntArray

REASON = "its channels cannot go one by one and leave every tensor rectangular"
UNEVEN = "some tensor holds a few columns of its rows only, so its size depends on which rows stay"
_PLANS, _ROUNDS = 3, 8


@dataclass(frozen=True)
class Governing:
    """For each class: the group and channel of its unit, and of its row; -1 for none."""

    unit_group: IntArray
    unit_channel: IntArray
    row_group: IntArray
    row_channel: IntArray

    def mask(self, keep: Sequence[BoolArray]) -> BoolArray:
        """[classes + 1] from the kept channels of each group; the last entry is always kept."""
        mask = np.ones(len(self.unit_group) + 1, dtype=np.bool_)
        if not len(keep):
            return mask
        flat = np.concatenate(keep)
        starts = np.cumsum([0, *(len(k) for k in keep)])
        for group, channel in (
            (self.unit_group, self.unit_channel),
            (self.row_group, self.row_channel),
        ):
            mine = np.flatnonzero(group >= 0)
            mask[mine] &= flat[starts[group[mine]] + channel[mine]]
        return mask

    def groups_of(self, classes: IntArray) -> set[int]:
        """The groups that govern any of these classes."""
        found = np.concatenate([self.unit_group[classes], self.row_group[classes]])
        return set(np.unique(found).tolist()) - {-1}


@dataclass(frozen=True)
class Claims:
    """rects, uniforms and meets of ``labels``, and parent pairs [K, 2], in terms of classes."""

    rects: tuple[IntArray, ...]
    uniforms: tuple[IntArray, ...]
    meets: tuple[IntArray, ...]
    pairs: IntArray

    @classmethod
    def of(cls, facts: Facts, classes: IntArray) -> Claims:
        """``classes`` [labels]."""
        none = [np.zeros(0, dtype=np.int64)]
        p, c = (
            classes[np.concatenate([pair[i] for pair in facts.parents] or none)] for i in (0, 1)
        )
        arrays = [
            tuple(distinct([classes[a] for a in which]))
            for which in (facts.rects, facts.uniforms, facts.meets)
        ]
        return cls(
            arrays[0], arrays[1], arrays[2], distinct_pairs(p, c, int(classes.max(initial=0)) + 1)
        )

    def __bool__(self) -> bool:
        return bool(self.rects or self.uniforms or self.meets or len(self.pairs))

    def violated(self, mask: BoolArray, outline: BoolArray) -> list[IntArray]:
        """The classes of every claim that does not hold under ``mask``.

        ``outline``: the same with the first columns of each row, of which sizes are read off.
        """
        bad = [
            block
            for block in self.rects
            if not (_rectangular(mask[block]) and _same_rows(outline[block]))
        ]
        bad += [block for block in self.uniforms if not _same_rows(mask[block])]
        bad += [block for block in self.meets if not _aligned(mask[block])]
        p, c = self.pairs.T
        some = np.zeros(len(mask), dtype=np.bool_)
        np.logical_or.at(some, p, mask[c])
        wrong = (mask[c] & ~mask[p]) | (mask[p] & ~some[p])
        return [*bad, *self.pairs[wrong]]


def first_columns(keep: BoolArray, rows: int) -> BoolArray:
    """As many kept columns in each row, the first ones; plain groups stay as they are."""
    if rows == 1:
        return keep
    block = keep.reshape(rows, -1)
    first: BoolArray = np.arange(block.shape[1]) < block.sum(1, keepdims=True)
    return first.ravel()


def _rectangular(kept: BoolArray) -> bool:
    """[*R, D]: rows that stay keep equally many, and are a box."""
    counts = kept.sum(-1)
    rows = counts > 0
    box = np.array(True)
    for d in range(rows.ndim):
        box = box[..., None] & rows.any(axis=tuple(i for i in range(rows.ndim) if i != d))
    return not (counts[rows] != counts.max()).any() and np.array_equal(box, rows)


def _same_rows(kept: BoolArray) -> bool:
    """[*R, D]: rows that stay keep the same columns."""
    rows = kept.reshape(-1, kept.shape[-1])
    rows = rows[rows.any(1)]
    return len(rows) == 0 or not (rows != rows[0]).any()


def _aligned(kept: BoolArray) -> bool:
    """[1 + O, P]: a coarse and a fine field: position i along P means the same for all.

    As columns (all rows keep the same ones) or as whole rows (columns that stay are alike).
    """
    fine = kept[1:]
    counts = fine.sum(0)
    alike = _same_rows(fine) or not (counts[counts > 0] != counts.max()).any()
    return alike and np.array_equal(kept[0], counts > 0)


def checked(
    groups: Sequence[ChannelGroup], governing: Governing, claims: Claims
) -> tuple[ChannelGroup, ...]:
    """The groups, with those locked under which a random plan breaks a claim."""
    rng = np.random.default_rng(0)
    result = list(groups)
    if not claims:
        return tuple(result)
    for _ in range(_ROUNDS):
        worst: set[int] = set()
        for _ in range(_PLANS):
            keep = [_random_keep(g, rng) for g in result]
            first = [first_columns(k, g.rows) for k, g in zip(keep, result, strict=True)]
            for classes in claims.violated(governing.mask(keep), governing.mask(first)):
                worst |= governing.groups_of(np.unique(classes))
        worst = {g for g in worst if result[g].locked is None}
        if not worst:
            break
        for g in worst:
            result[g] = replace(result[g], locked=REASON)
    return tuple(result)


def evened(
    groups: Sequence[ChannelGroup], governing: Governing, dims: Iterable[IntArray]
) -> tuple[ChannelGroup, ...]:
    """The groups, with rows locked of which some dim does not hold every column equally often.

    ``dims``: classes [P, Q] of parameter dims and of the dims of products, -1 where fixed. The size
    of a dim is kept rows times kept columns only if it holds the whole block.
    """
    bad: set[int] = set()
    width = np.array([g.width for g in groups], dtype=np.int64)
    n = np.array([g.n for g in groups], dtype=np.int64)
    for classes in distinct([d.ravel() for d in dims]):
        c = classes[classes >= 0]
        c = c[(governing.row_group[c] >= 0) & (governing.unit_group[c] >= 0)]
        if not len(c):
            continue
        row, group = governing.row_group[c], governing.unit_group[c]
        column = governing.unit_channel[c] % width[group]
        cells = np.stack([row, group, governing.row_channel[c], column])
        found, times = np.unique(cells, axis=1, return_counts=True)
        pairs, which = np.unique(found[:2], axis=1, return_inverse=True)
        ends = [np.zeros(pairs.shape[1], dtype=np.int64) for _ in range(2)]
        np.add.at(ends[0], which.ravel(), 1)
        np.maximum.at(ends[1], which.ravel(), times)
        whole = n[pairs[0]] * width[pairs[1]]
        uneven = np.bincount(which.ravel(), times) != whole * ends[1]
        bad |= set(pairs[0][uneven | (ends[0] != whole)].tolist())
    return tuple(
        replace(g, locked=UNEVEN) if i in bad and g.locked is None else g
        for i, g in enumerate(groups)
    )


def _random_keep(group: ChannelGroup, rng: np.random.Generator) -> BoolArray:
    keep = np.ones(group.n, dtype=np.bool_)
    if group.locked is None and group.width > 1:
        count = int(rng.integers(1, group.width))
        order = rng.random((group.rows, group.width)).argsort(1)
        keep = (order < count).ravel()
    return keep
