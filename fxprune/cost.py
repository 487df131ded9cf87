"""MACs, parameters, bytes and peak activation memory of any plan, in numpy, without cutting.

The width of every dim is a constant plus a sum of coefficient x kept rows x kept columns of groups;
a product's multiply-adds, a parameter's size and an activation's bytes are products of widths.

**Peak activation memory** (``memory``, bytes, at the example inputs' batch): the graph runs node by
node and a value is freed after the last node that reads it. While a node runs, the model's inputs,
every earlier value that it or a later node reads, and its own output are held; the peak is the
largest such sum. Views and in-place results allocate nothing and keep alive what they look at.
Weights do not count (see ``bytes``), nor does what a kernel allocates and frees inside one node.
Where one channel or head is left, a reshape that copied may have become a view: it is an upper
bound then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch.utils._pytree import tree_leaves

from fxprune.coupling.groups import Coupling
from fxprune.coupling.run import Traits
from fxprune.lifetimes import Storage
from fxprune.types import Cost, FloatArray, IntArray

Terms = dict[tuple[int, int], float]  # (row group, column group) -> coefficient, of one dim
MEASURES = ("macs", "params", "bytes", "memory")


@dataclass(frozen=True)
class CostArrays:
    """Costs of P plans, each int64 [P]."""

    macs: IntArray
    params: IntArray
    bytes: IntArray


@dataclass(frozen=True)
class Widths:
    """D different widths as ``k @ linear + (k[row] * k[col]) @ square``.

    k has a trailing column of 1; linear [G + 1, D], row and col [Q], square [Q, D].
    """

    linear: FloatArray
    row: IntArray
    col: IntArray
    square: FloatArray

    def evaluate(self, k: FloatArray) -> FloatArray:
        """k [P, G + 1] -> widths [P, D]."""
        widths = k @ self.linear
        if len(self.row):
            widths += (k[:, self.row] * k[:, self.col]) @ self.square
        return widths


@dataclass(frozen=True)
class Products:
    """I products of widths; ``dims`` [I, L] (the last width is 1, for products of fewer than L)."""

    widths: Widths
    dims: IntArray

    def evaluate(self, k: FloatArray) -> FloatArray:
        """k [P, G + 1] -> [P, I]."""
        widths = self.widths.evaluate(k)
        items = widths[:, self.dims[:, 0]]
        for level in self.dims.T[1:]:
            items = items * widths[:, level]
        return items


class Table:
    """Collects products of widths; equal widths and equal products are kept once."""

    def __init__(self, groups: int) -> None:
        self.groups = groups
        self._widths: dict[tuple[tuple[tuple[int, int], float], ...], int] = {}
        self._items: dict[tuple[int, ...], int] = {}

    def width(self, terms: Terms) -> int:
        """Number of a width."""
        return self._widths.setdefault(tuple(sorted(terms.items())), len(self._widths))

    def item(self, dims: Sequence[Terms]) -> int:
        """Number of the product of these dims."""
        found = tuple(sorted(self.width(d) for d in dims))
        return self._items.setdefault(found, len(self._items))

    def __len__(self) -> int:
        return len(self._items)

    def products(self) -> Products:
        """All products so far, in the order of their numbers."""
        one = self.width({(self.groups, self.groups): 1.0})
        most = max((len(dims) for dims in self._items), default=1)
        dims = [[*d, *[one] * (max(1, most) - len(d))] for d in self._items]
        shape = (len(dims), max(1, most))
        return Products(self.widths(), np.array(dims, dtype=np.int64).reshape(shape))

    def widths(self) -> Widths:
        """All widths so far, in the order of their numbers."""
        k = self.groups
        linear = np.zeros((k + 1, len(self._widths)))
        pairs: dict[tuple[int, int], int] = {}
        for terms in self._widths:
            for pair, _ in terms:
                if k not in pair:
                    pairs.setdefault(pair, len(pairs))
        square = np.zeros((len(pairs), len(self._widths)))
        for d, terms in enumerate(self._widths):
            for pair, coef in terms:
                if pair in pairs:
                    square[pairs[pair], d] = coef
                else:
                    linear[min(pair), d] += coef
        row, col = (np.array([p[i] for p in pairs], dtype=np.int64) for i in (0, 1))
        return Widths(linear, row, col, square)


class Dims:
    """Widths of dims as functions of the kept count of each row of each group."""

    def __init__(self, coupling: Coupling) -> None:
        self.coupling = coupling
        self.groups = len(coupling.groups)
        self._n = np.array([g.n for g in coupling.groups], dtype=np.float64)
        self._width = np.array([g.width for g in coupling.groups], dtype=np.int64)

    def of_classes(self, classes: IntArray) -> Terms:
        """The width of one dim [P, Q]: Q classes at each of P positions (-1: fixed)."""
        c, k = self.coupling.governing, self.groups
        known = classes >= 0
        at = np.where(known, classes, 0)
        row_id = np.where(known, c.row_group[at] * (1 << 32) + c.row_channel[at], -1)
        group = np.where(known, c.unit_group[at], -1)
        rank = c.unit_channel[at] % self._width[np.maximum(group, 0)] if k else at
        col_id = np.where(group >= 0, group * (1 << 32) + rank, -1)
        row_group = np.where(known, c.row_group[at], -1)
        row = np.where((row_id == row_id[:, :1]).all(1), row_group[:, 0], -1)
        col = np.where((col_id == col_id[:, :1]).all(1), group[:, 0], -1)
        pairs, counts = np.unique(np.stack([row, col], 1), axis=0, return_counts=True)
        terms: Terms = {}
        for (r, g), count in zip(pairs.tolist(), counts.tolist(), strict=True):
            share = (self._n[r] if r >= 0 else 1.0) * (float(self._width[g]) if g >= 0 else 1.0)
            terms[(r if r >= 0 else k), (g if g >= 0 else k)] = count / share
        return terms

    def of_tensor(self, traits: Traits) -> list[Terms]:
        """One width for each dim of a graph value."""
        dims = [{(self.groups, self.groups): float(s)} for s in traits.shape]
        for f in traits.fields:
            if f.ndim != len(dims):
                continue  # its memory was given back while the model ran
            for d, size in enumerate(f.shape):
                if size > 1:
                    at = self.coupling.cls[np.moveaxis(f, d, 0).reshape(size, -1)]
                    dims[d] = self.of_classes(at)
        return dims


class CostModel:
    """Costs as functions of the kept count of each row of each group.

    ``storages`` is asked when memory is first wanted; it takes one forward pass.
    """

    def __init__(
        self, coupling: Coupling, storages: Callable[[], Sequence[Storage]] = tuple
    ) -> None:
        self._coupling, self._storages = coupling, storages
        self.dims = Dims(coupling)
        self._macs = _macs(self.dims)
        self._sizes = _Sizes(self.dims)

    @cached_property
    def _memory(self) -> _Memory:
        return _Memory(self.dims, self._storages())

    def full_counts(self) -> IntArray:
        """[G] kept count of each row when nothing goes."""
        return np.array([g.width for g in self._coupling.groups], dtype=np.int64)

    def measure(self, counts: IntArray, measures: Sequence[str]) -> FloatArray:
        """counts [P, G], kept per row of each group -> [P, D] costs, whole numbers.

        measures: D of "macs", "params", "bytes", "memory"; no other is computed.
        """
        k = with_one(counts)
        found: Mapping[str, FloatArray] = {}
        if "macs" in measures:
            found = {"macs": self._macs.evaluate(k)}
        if "params" in measures or "bytes" in measures:
            found = {**found, **self._sizes.evaluate(k)}
        if "memory" in measures:
            found = {**found, "memory": self._memory.evaluate(k)}
        return np.rint(np.stack([found[m] for m in measures], axis=1))

    def evaluate(self, counts: IntArray) -> CostArrays:
        """counts [P, G], kept per row of each group -> costs of P plans."""
        columns = self.measure(counts, MEASURES[:3]).astype(np.int64).T
        return CostArrays(*columns)

    def cost(self, counts: IntArray) -> Cost:
        """Of one plan, counts [G]."""
        return Cost(*(int(v) for v in self.measure(counts[None], MEASURES)[0]))


def with_one(counts: IntArray) -> FloatArray:
    """[P, G] (or [G]) counts -> [P, G + 1], the last column 1."""
    counts = np.atleast_2d(counts)
    k = np.ones((len(counts), counts.shape[1] + 1))
    k[:, :-1] = counts
    return k


@dataclass(frozen=True)
class _Sum:
    """``base`` + sum of ``weight`` [I] x products."""

    products: Products
    weight: FloatArray
    base: float

    def evaluate(self, k: FloatArray) -> FloatArray:
        return np.asarray(self.products.evaluate(k) @ self.weight + self.base)


def _macs(dims: Dims) -> _Sum:
    table = Table(dims.groups)
    weights: list[float] = []
    base = 0.0
    for c in dims.coupling.contractions:
        if not c.dims:
            base += c.const
            continue
        i = table.item([dims.of_classes(d) for d in c.dims])
        weights += [0.0] * (len(table) - len(weights))
        weights[i] += c.const
    return _Sum(table.products(), np.array(weights, dtype=np.float64), base)


class _Sizes:
    """Parameters and bytes: the same products, two weights."""

    def __init__(self, dims: Dims) -> None:
        table = Table(dims.groups)
        weights: list[list[float]] = []
        base = np.zeros(2)
        known: dict[bytes, Terms] = {}
        for name, t in dims.coupling.parameters.items():
            found = [dims.coupling.param_classes.get((name, d)) for d in range(len(t.shape))]
            rest = float(np.prod([s for s, c in zip(t.shape, found, strict=True) if c is None]))
            scalars = np.array([rest if t.learnable else 0.0, rest * t.dtype.itemsize])
            kept = [c for c in found if c is not None]
            if not kept:
                base += scalars
                continue
            for c in kept:
                if c.tobytes() not in known:
                    known[c.tobytes()] = dims.of_classes(c[:, None])
            i = table.item([known[c.tobytes()] for c in kept])
            weights += [[0.0, 0.0]] * (len(table) - len(weights))
            weights[i] = [a + b for a, b in zip(weights[i], scalars.tolist(), strict=True)]
        self.products = table.products()
        self.weights = np.array(weights, dtype=np.float64).reshape(len(table), 2)
        self.base = base

    def evaluate(self, k: FloatArray) -> dict[str, FloatArray]:
        params, size = (self.products.evaluate(k) @ self.weights + self.base).T
        return {"params": params, "bytes": size}


class _Memory:
    """Peak activation bytes."""

    def __init__(self, dims: Dims, storages: Sequence[Storage]) -> None:
        table = Table(dims.groups)
        items: list[int] = []
        sizes: list[float] = []
        for s in storages:
            traits = tree_leaves(dims.coupling.values[s.node])[s.leaf]
            found = dims.of_tensor(traits)
            items.append(table.item([t for d, t in enumerate(found) if d not in s.repeated]))
            sizes.append(traits.dtype.itemsize * s.share)
        self.products = table.products()
        self.items = np.array(items, dtype=np.int64)
        self.sizes = np.array(sizes)
        born = np.array([s.born for s in storages], dtype=np.int64)
        dies = np.array([s.dies for s in storages], dtype=np.int64)
        # The peak is reached where something is allocated: after each batch of births.
        self.by_death = np.argsort(dies, kind="stable")
        moments = np.unique(born)
        self.births = np.searchsorted(born, moments, side="right")
        self.deaths = np.searchsorted(dies[self.by_death], moments, side="left")

    def evaluate(self, k: FloatArray) -> FloatArray:
        """k [P, G + 1] -> [P] bytes."""
        if not len(self.items):
            return np.zeros(len(k))
        size = self.products.evaluate(k)[:, self.items] * self.sizes
        zero = np.zeros((len(k), 1))
        made = np.concatenate([zero, np.cumsum(size, axis=1)], axis=1)
        freed = np.concatenate([zero, np.cumsum(size[:, self.by_death], axis=1)], axis=1)
        alive = made[:, self.births] - freed[:, self.deaths]
        return np.asarray(alive.max(axis=1))
