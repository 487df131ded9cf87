"""Facts -> classes: unions solved once, blocks made consistent.

A class is a set of labels that are one channel. After the solve every class has at most one *row*
(a parent that is a whole row of a block: a head, a convolution group) and one *unit* (itself, or a
parent that is a whole column of a block), and stays when both stay.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from fxprune.coupling.labels import COLUMN, ROW, Facts
from fxprune.errors import InternalError
from fxprune.types import BoolArray, IntArray

_ROUNDS = 200


@dataclass(frozen=True)
class Solution:
    """Classes of labels.

    cls       [labels] class of each label
    row       [classes] class of the row parent, or -1
    unit      [classes] class of the column parent, or the class itself
    is_row    [classes] whether the class is the row parent of others
    pinned    [classes] rows that cross those of another block, and cannot go
    blocks    balanced blocks [S, D] of units: S >= 2 rows that keep equally many of D columns
    rects, uniforms   the recorded blocks in terms of classes
    """

    cls: IntArray
    row: IntArray
    unit: IntArray
    is_row: BoolArray
    pinned: BoolArray
    blocks: list[IntArray]
    rects: list[IntArray]
    uniforms: list[IntArray]

    @property
    def n(self) -> int:
        return len(self.row)


class _Solver:
    """The relations so far; each round adds unions until nothing contradicts."""

    def __init__(self, facts: Facts, slots: tuple[IntArray, IntArray]) -> None:
        self.count = facts.count
        self.slots = slots
        self.unions = list(facts.unions)
        self.parents = list(facts.parents)
        self.kinds = list(facts.kinds)
        self.probes = facts.probes
        self.meets = [m for m in facts.meets if m.shape[1] > 1]
        self.pinned_labels: list[IntArray] = []
        self.rect_labels = distinct(facts.rects)
        self.uniform_labels = distinct(facts.uniforms)

    # -- one round ----------------------------------------------------------------------------

    def round(self) -> Solution | None:
        """A solution, or None when new unions were needed."""
        self.classify()
        before = self.size()
        self.settle_parents()
        if self.size() > before:
            return None
        self.roles()
        blocks = self.blocks()
        if self.size() > before:
            return None
        return Solution(
            self.cls, self.row, self.unit, self.is_row, self.pinned, blocks, self.rects,
            self.uniforms,
        )  # fmt: skip

    def size(self) -> int:
        """How much has been said."""
        return len(self.unions) + len(self.parents) + len(self.pinned_labels)

    def classify(self) -> None:
        if self.unions:
            a = np.concatenate([u[0] for u in self.unions])
            b = np.concatenate([u[1] for u in self.unions])
            graph = sparse.coo_matrix(
                (np.ones(len(a), dtype=np.int8), (a, b)), shape=(self.count, self.count)
            )
            self.n, cls = connected_components(graph, directed=False)
            self.cls = cls.astype(np.int64)
            self.unions = [(self.cls_first()[self.cls], np.arange(self.count))]
        else:
            self.n, self.cls = self.count, np.arange(self.count, dtype=np.int64)
        self.rects = [self.cls[r] for r in self.rect_labels]
        self.uniforms = [self.cls[u] for u in self.uniform_labels]
        if self.parents:
            p = np.concatenate([pair[0] for pair in self.parents])
            c = np.concatenate([pair[1] for pair in self.parents])
            pairs = distinct_pairs(self.cls[p], self.cls[c], self.n)
            kinds = np.repeat(self.kinds, [len(pair[0]) for pair in self.parents])
            self.known = {k: np.unique(self.cls[p[kinds == k]]) for k in (ROW, COLUMN)}
            self.columns = self.cls[p[kinds == COLUMN]] * self.n + self.cls[c[kinds == COLUMN]]
            self.pairs = pairs[pairs[:, 0] != pairs[:, 1]]
        else:
            self.pairs = np.zeros((0, 2), dtype=np.int64)
            self.known = {k: np.zeros(0, dtype=np.int64) for k in (ROW, COLUMN)}
            self.columns = np.zeros(0, dtype=np.int64)
        self.pinned = np.zeros(self.n, dtype=np.bool_)
        if self.pinned_labels:
            self.pinned[self.cls[np.concatenate(self.pinned_labels)]] = True
            column = np.isin(self.pairs[:, 0] * self.n + self.pairs[:, 1], self.columns)
            self.pairs = self.pairs[~self.pinned[self.pairs[:, 0]] | column]

    def cls_first(self) -> IntArray:
        """[classes] the first label of each class."""
        first = np.full(self.n, self.count, dtype=np.int64)
        first[self.cls[::-1]] = np.arange(len(self.cls) - 1, -1, -1)  # the last to write is it
        return first

    def unite(self, a: IntArray, b: IntArray) -> None:
        """Unite classes (given by class) by uniting their first labels."""
        first = self.cls_first()
        differ = a != b
        if differ.any():
            self.unions.append((first[a[differ]], first[b[differ]]))

    def settle_parents(self) -> None:
        """Parents are one level deep, and two parents of one class cross in that class only."""
        before = self.size()
        self._whole_dims()
        if self.size() > before:
            return
        p, c = self.pairs.T
        if not len(p):
            return
        both = np.isin(p, np.intersect1d(self.known[ROW], self.known[COLUMN]))
        self.unite(p[both], c[both])
        deep = np.isin(c, p)
        self.unite(p[deep], c[deep])
        size = np.bincount(p, minlength=self.n)
        single = size[p] == 1
        self.unite(p[single], c[single])
        a = sparse.csr_matrix((np.ones(len(p), dtype=np.int64), (p, c)), shape=(self.n, self.n))
        shared = (a @ a.T).tocoo()
        upper = shared.row < shared.col
        x, y, s = (v[upper].astype(np.int64) for v in (shared.row, shared.col, shared.data))
        equal = (s == size[x]) & (s == size[y])
        self.unite(x[equal], y[equal])
        odd = ~equal & ((s > 1) | (s == np.minimum(size[x], size[y])))
        row = self._row_parents(p, c)
        nested = odd & row[x] & row[y] & (s == np.minimum(size[x], size[y]))
        columns = odd & ~row[x] & ~row[y]
        for which in (nested, columns):
            self.unite(x[which], y[which])
        said = np.isin(np.stack([x, y]), self.known[ROW])
        apart = odd & ~nested & row[x] & row[y] & (s > 1) & (said[0] != said[1])
        self._columns_of_several(np.where(said[0], y, x)[apart], p, c)
        odd &= ~nested & ~apart
        crossing = np.concatenate([x[odd & row[x]], y[odd & row[y]]])
        if len(crossing):
            self.pinned_labels.append(self.cls_first()[np.unique(crossing)])

    def _columns_of_several(self, columns: IntArray, p: IntArray, c: IntArray) -> None:
        """Classes under one of ``columns`` and one row (of the ops) go together.

        A column that several of a head's channels share, such as the period of a rotary embedding.
        """
        row = np.full(self.n, -1, dtype=np.int64)
        said = np.isin(p, self.known[ROW])
        row[c[said]] = p[said]
        mine = np.isin(p, columns) & (row[c] >= 0)
        key, child = p[mine] * self.n + row[c[mine]], c[mine]
        _, first, which = np.unique(key, return_index=True, return_inverse=True)
        self.unite(child[first][which], child)

    def _whole_dims(self) -> None:
        """A label that is all of a dim stays, and what is finer does not vary along that dim.

        So do those of which what is finer tells none apart.
        """
        for meet in self.meets:
            ends = self.cls[meet[:2, [0, -1]]]
            if not (ends[:, 0] == ends[:, 1]).any():
                continue
            found = self.cls[meet]
            same = found == found[:, :1]
            if same[0].all() or same[1:].all():
                if not self.pinned[found[0, 0]]:
                    self.pinned_labels.append(meet[0, :1])
                self.unite(np.broadcast_to(found[:, :1], found.shape), found)

    # -- roles --------------------------------------------------------------------------------

    def roles(self) -> None:
        """Which parents are rows and which are columns."""
        p, c = self.pairs.T
        self.row = np.full(self.n, -1, dtype=np.int64)
        self.unit = np.arange(self.n, dtype=np.int64)
        self.is_row = np.zeros(self.n, dtype=np.bool_)
        if not len(p):
            return
        self.is_row = self._row_parents(p, c)
        self._one_row_each(p, c)
        self._whole_rows(p, c)
        for want_row, target in ((True, self.row), (False, self.unit)):
            mine = self.is_row[p] == want_row
            target[c[mine]] = p[mine]
            twice = target[c[mine]] != p[mine]
            self.unite(p[mine][twice], target[c[mine]][twice])

    def _one_row_each(self, p: IntArray, c: IntArray) -> None:
        """Of two row parents of one class one is a column: one that no op calls a row, if any."""
        rows = self.is_row[p]
        count = np.bincount(c[rows], minlength=self.n)
        crossing = np.unique(p[rows & (count[c] > 1)])
        if not len(crossing):
            return
        free = crossing[~np.isin(crossing, self.known[ROW])]
        free = free if len(free) else crossing  # sums over either side of a block
        size = np.bincount(p, minlength=self.n)
        for q in free[np.argsort(size[free], kind="stable")]:
            mates = np.isin(c, c[p == q]) & self.is_row[p] & (p != q)
            if mates.any():
                self.is_row[q] = False

    def _whole_rows(self, p: IntArray, c: IntArray) -> None:
        """A column whose children are whole rows stays, so that they can go one by one.

        What is told apart by columns (a rotary embedding) is needed while any of the rows is left.
        """
        spans, shares = np.zeros((2, self.n), dtype=np.bool_)
        for rect in self.rects:
            rows = rect.reshape(-1, rect.shape[-1])
            one = (rows == rows[:, :1]).all(1)
            spans[rows[one, 0]] = True
            shares[rows[~one]] = True
        partly = np.bincount(p[~spans[c] | shares[c]], minlength=self.n) > 0
        alone = ~self.is_row & ~partly
        alone[self.known[COLUMN]] = False
        alone = np.unique(p[alone[p]])
        if len(alone):
            self.pinned_labels.append(self.cls_first()[alone])

    def _row_parents(self, p: IntArray, c: IntArray) -> BoolArray:
        """[classes] which parents are rows: as the ops say, else by the blocks.

        By the blocks: two or more of its children lie side by side in one row of a rect.
        """
        row = np.zeros(self.n, dtype=np.bool_)
        row[self._side_by_side()] = True
        row[self.known[COLUMN]] = False
        row[self.known[ROW]] = True
        return row

    def _side_by_side(self) -> IntArray:
        """Classes of parents that hold two or more classes of one row of a rect at one position."""
        if not (self.probes and self.rects):
            return np.zeros(0, dtype=np.int64)
        parents, which = np.unique(np.concatenate([q[0] for q in self.probes]), return_inverse=True)
        child = self.cls[np.concatenate([q[1] for q in self.probes])]
        rows = [r.reshape(-1, r.shape[-1]) for r in self.rects]
        ends = np.cumsum([len(r) for r in rows])
        i = np.concatenate(
            [
                np.repeat(np.arange(e - len(r), e), r.shape[1])
                for r, e in zip(rows, ends, strict=True)
            ]
        )
        j = np.concatenate([r.ravel() for r in rows])
        inside = _incidence(i, j, (int(ends[-1]), self.n))
        children = _incidence(child, which, (self.n, len(parents)))
        overlap = (inside @ children).tocoo()
        found: IntArray = self.cls[np.unique(parents[overlap.col[overlap.data > 1]])]
        return found

    # -- blocks -------------------------------------------------------------------------------

    def blocks(self) -> list[IntArray]:
        """Balanced blocks of units; adds unions where rows contradict each other."""
        rows: dict[bytes, int] = {}
        order: list[IntArray] = []
        links: list[tuple[int, int]] = []
        uses: list[tuple[IntArray, list[int]]] = []
        conflicts: list[tuple[int, IntArray]] = []
        for rect in self.rects:
            units = _without_repeats(self.unit[rect.reshape(-1, rect.shape[-1])])
            if units is None:
                conflicts.append((len(self.unit[rect].reshape(-1, rect.shape[-1])), rect))
                continue
            if 1 in units.shape:
                continue
            ids = []
            for line in units:
                key = np.sort(line).tobytes()
                if key not in rows:
                    rows[key] = len(order)
                    order.append(line)
                ids.append(rows[key])
            uses.append((rect, ids))
            links += [(ids[0], i) for i in ids[1:]]
        if not order and not conflicts:
            return []
        before = self.size()
        self._untangle(order, uses, conflicts)
        return self._components(order, links) if self.size() == before else []

    def _untangle(
        self,
        order: list[IntArray],
        uses: list[tuple[IntArray, list[int]]],
        conflicts: list[tuple[int, IntArray]],
    ) -> None:
        """Rows are equal or disjoint; those that overlap are tied column by column."""
        owner = np.full(self.n, -1, dtype=np.int64)
        bad = np.zeros(len(order), dtype=np.bool_)
        for i, line in enumerate(order):
            taken = owner[line]
            if (taken >= 0).any():
                bad[i] = True
                bad[taken[taken >= 0]] = True
            owner[line] = i
        for rect, ids in uses:
            if len(set(ids)) > 1 and bad[ids].any():
                conflicts.append((len(rect.reshape(-1, rect.shape[-1])), rect))
        touched = np.zeros(self.n, dtype=np.bool_)
        for _, rect in sorted(conflicts, key=lambda t: t[0]):  # few rows: many columns are left
            if not touched[rect].any():
                self._tie(rect)
                touched[rect] = True
        balanced = np.zeros(len(order), dtype=np.bool_)
        for _, ids in uses:
            if len(set(ids)) > 1:
                balanced[ids] = True
        for uniform in self.uniforms if len(order) else ():
            units = self.unit[uniform.reshape(-1, uniform.shape[-1])]
            lines = np.where(owner[units] >= 0, owner[units], -1)
            if _addresses_within(units, lines, balanced):
                self._tie(uniform)

    def _tie(self, block: IntArray) -> None:
        """All rows of [*R, D] keep the same columns."""
        flat = block.reshape(-1, block.shape[-1])
        if (self.unit[flat] == self.unit[flat[:1]]).all():
            return
        rows = self.row[flat]
        if (rows >= 0).all() and (rows == rows[:, :1]).all() and len(np.unique(rows[:, 0])) > 1:
            fresh = np.arange(self.count, self.count + flat.shape[1], dtype=np.int64)
            self.count += flat.shape[1]
            first = self.cls_first()
            self.parents.append((np.broadcast_to(fresh, flat.shape).ravel(), first[flat].ravel()))
            self.kinds.append(COLUMN)
            return
        self.unite(np.broadcast_to(flat[:1], flat.shape).ravel(), flat.ravel())

    def _components(self, order: list[IntArray], links: list[tuple[int, int]]) -> list[IntArray]:
        if not links:
            return []
        a, b = np.array(links).T
        graph = sparse.coo_matrix((np.ones(len(a)), (a, b)), shape=(len(order), len(order)))
        _, comp = connected_components(graph, directed=False)
        blocks = []
        for k in np.unique(comp):
            lines = [order[i] for i in np.flatnonzero(comp == k)]
            if len(lines) < 2:
                continue
            if len({len(line) for line in lines}) > 1:
                everything = np.concatenate(lines)
                self.unite(np.full(len(everything), everything[0]), everything)
                continue
            block = np.stack(lines)
            if not self._alike(block):
                self._pair(block)
            blocks.append(block)
        return blocks

    def _alike(self, block: IntArray) -> bool:
        """Whether all units of a block lie in the same parameter dims, equally often."""
        kinds = signatures(self.cls, self.unit, self.slots)[block]
        return bool((kinds == kinds.flat[0]).all())

    def _pair(self, block: IntArray) -> None:
        """Rows of different kinds in one block: tie those of one row parent, else all rows."""
        child = np.full(self.n, -1, dtype=np.int64)
        child[self.unit] = self.row
        parent = child[block[:, 0]]
        for k in np.unique(parent):
            lines = block[parent == k] if (parent >= 0).all() else block
            self.unite(np.broadcast_to(lines[:1], lines.shape).ravel(), lines.ravel())
        if (parent >= 0).all() and len(np.unique(parent)) == len(parent):
            self.unite(np.broadcast_to(block[:1], block.shape).ravel(), block.ravel())


def distinct_pairs(a: IntArray, b: IntArray, n: int) -> IntArray:
    """[K, 2] the distinct pairs (a, b), ascending; both below ``n``."""
    return np.stack(np.divmod(np.unique(a * n + b), n), 1)


def _incidence(i: IntArray, j: IntArray, shape: tuple[int, int]) -> sparse.csr_matrix:
    """Ones at (i, j)."""
    made = sparse.csr_matrix((np.ones(len(i), dtype=np.int64), (i, j)), shape=shape)
    made.data[:] = 1
    return made


def distinct(arrays: list[IntArray]) -> list[IntArray]:
    """Without exact repetitions, in order."""
    seen: dict[tuple[tuple[int, ...], bytes], IntArray] = {}
    for a in arrays:
        seen.setdefault((a.shape, a.tobytes()), a)
    return list(seen.values())


def _without_repeats(rows: IntArray) -> IntArray | None:
    """Distinct rows, each class once; None when a row repeats its classes irregularly."""
    order = np.argsort(rows, 1, kind="stable")
    ordered = np.take_along_axis(rows, order, 1)
    _, first = np.unique(ordered, axis=0, return_index=True)
    first = np.sort(first)
    rows, order, ordered = rows[first], order[first], ordered[first]
    starts = np.ones(ordered.shape, dtype=np.bool_)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    distinct = starts.sum(1)
    if (distinct == rows.shape[1]).all():
        return rows
    if (distinct != distinct[0]).any():
        return None
    run = rows.shape[1] // int(distinct[0])
    regular = np.zeros(rows.shape[1], dtype=np.bool_)
    regular[::run] = True
    if rows.shape[1] % run or (len(rows) > 1 and (starts != regular).any()):
        return None
    at = np.sort(order[starts].reshape(len(rows), -1), 1)
    return np.take_along_axis(rows, at, 1)


def _addresses_within(units: IntArray, lines: IntArray, balanced: BoolArray) -> bool:
    """Whether a row of ``units`` holds two units of one balanced line."""
    mine = (lines >= 0) & balanced[lines]
    rows = np.broadcast_to(np.arange(len(units))[:, None], units.shape)
    triples = np.unique(np.stack([rows[mine], lines[mine], units[mine]], 1), axis=0)
    return len(triples) > len(np.unique(triples[:, :2], axis=0))


def signatures(cls: IntArray, owner: IntArray, slots: tuple[IntArray, IntArray]) -> IntArray:
    """[classes] a hash of the multiset of slots in which each owner's labels lie.

    ``slots``: (labels, slot of each), a slot being one dim of one parameter or product. ``owner``
    [classes] is the class that each class counts for; -1 for none.
    """
    labels, slot = slots
    weights = np.random.default_rng(0).integers(1, 2**62, size=int(slot.max(initial=0)) + 1)
    total = np.zeros(len(owner), dtype=np.int64)
    target = owner[cls[labels]]
    mine = target >= 0
    with np.errstate(over="ignore"):
        np.add.at(total, target[mine], weights[slot[mine]])
    return total


def solve(facts: Facts, slots: tuple[IntArray, IntArray]) -> Solution:
    """Unions and blocks to a fixed point."""
    solver = _Solver(facts, slots)
    for _ in range(_ROUNDS):
        solution = solver.round()
        if solution is not None:
            return solution
    raise InternalError(f"channel blocks did not settle in {_ROUNDS} rounds")
