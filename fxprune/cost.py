"""MACs, parameters and bytes of any plan, in numpy, without cutting.

The width of every dim is a constant plus a sum of coefficient x kept rows x kept columns of groups,
and every product's multiply-adds (every parameter's size) is a product of widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fxprune.coupling.groups import Coupling
from fxprune.types import Cost, FloatArray, IntArray


@dataclass(frozen=True)
class CostArrays:
    """Costs of P plans, each int64 [P]."""

    macs: IntArray
    params: IntArray
    bytes: IntArray


@dataclass(frozen=True)
class Widths:
    """Widths of D dims as sums of terms ``coef * k[row] * k[col]``; k has a trailing column of 1.

    ``start`` [D]: the first term of each dim.
    """

    row: IntArray
    col: IntArray
    coef: FloatArray
    start: IntArray

    def evaluate(self, k: FloatArray) -> FloatArray:
        """k [P, G + 1] -> widths [P, D]."""
        terms = self.coef * k[:, self.row] * k[:, self.col]
        return np.asarray(np.add.reduceat(terms, self.start, axis=1), dtype=np.float64)


@dataclass(frozen=True)
class Products:
    """Sum over I items of ``const * product of widths``; ``start`` [I]: first dim of each."""

    widths: Widths
    start: IntArray
    const: FloatArray
    base: float

    def items(self, k: FloatArray) -> FloatArray:
        """[P, I] the product of the widths of each item."""
        if not len(self.start):
            return np.zeros((len(k), 0))
        return np.asarray(np.multiply.reduceat(self.widths.evaluate(k), self.start, axis=1))

    def total(self, k: FloatArray, weights: FloatArray | None = None) -> FloatArray:
        """[P]; ``weights`` [I] take the place of ``const``."""
        return np.asarray(self.items(k) @ (self.const if weights is None else weights))


Pair = tuple[int, int]


class CostModel:
    """Costs as functions of the kept count of each row of each group."""

    def __init__(self, coupling: Coupling) -> None:
        self._groups = coupling.groups
        self._n = np.array([g.n for g in coupling.groups], dtype=np.float64)
        self._width = np.array([g.width for g in coupling.groups], dtype=np.int64)
        self._coupling = coupling
        full: list[list[dict[Pair, float]]] = []
        const: list[float] = []
        fixed = 0.0
        for c in coupling.contractions:
            dims = [self._terms(d) for d in c.dims]
            if dims:
                full.append(dims)
                const.append(float(c.const))
            else:
                fixed += c.const
        self._macs = self._products(full, const, fixed)
        self._sizes()

    # -- building -----------------------------------------------------------------------------

    def _terms(self, classes: IntArray) -> dict[Pair, float]:
        """(row group, column group) -> coefficient, for one dim [P, Q] of classes (-1: fixed)."""
        c, k = self._coupling.governing, len(self._groups)
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
        terms: dict[Pair, float] = {}
        for (r, g), count in zip(pairs.tolist(), counts.tolist(), strict=True):
            share = (self._n[r] if r >= 0 else 1.0) * (float(self._width[g]) if g >= 0 else 1.0)
            terms[(r if r >= 0 else k), (g if g >= 0 else k)] = count / share
        return terms

    def _products(
        self, items: list[list[dict[Pair, float]]], const: Sequence[float], base: float
    ) -> Products:
        rows: list[int] = []
        cols: list[int] = []
        coefs: list[float] = []
        dim_start: list[int] = []
        item_start: list[int] = []
        for dims in items:
            item_start.append(len(dim_start))
            for terms in dims:
                dim_start.append(len(rows))
                for (r, c), coef in terms.items():
                    rows.append(r)
                    cols.append(c)
                    coefs.append(coef)
        ints = [np.array(a, dtype=np.int64) for a in (rows, cols, dim_start, item_start)]
        widths = Widths(ints[0], ints[1], np.array(coefs, dtype=np.float64), ints[2])
        return Products(widths, ints[3], np.array(const, dtype=np.float64), base)

    def _sizes(self) -> None:
        items: list[list[dict[Pair, float]]] = []
        params, weight_bytes = [], []
        base_params = base_bytes = 0
        for name, t in self._coupling.parameters.items():
            keys = [
                (name, d) for d in range(len(t.shape)) if (name, d) in self._coupling.param_classes
            ]
            rest = int(np.prod([s for d, s in enumerate(t.shape) if (name, d) not in keys]))
            size = t.dtype.itemsize
            if keys:
                items.append([self._terms(self._coupling.param_classes[k][:, None]) for k in keys])
                params.append(rest if t.learnable else 0)
                weight_bytes.append(rest * size)
            else:
                base_params += rest if t.learnable else 0
                base_bytes += rest * size
        self._params = self._products(items, params, base_params)
        self._weight_bytes = np.array(weight_bytes, dtype=np.float64)
        self._base_bytes = base_bytes

    # -- evaluating ---------------------------------------------------------------------------

    def full_counts(self) -> IntArray:
        """[G] kept count of each row when nothing goes."""
        return self._width.copy()

    def evaluate(self, counts: IntArray) -> CostArrays:
        """counts [P, G], kept per row of each group -> costs of P plans."""
        counts = np.atleast_2d(counts).astype(np.float64)
        k = np.concatenate([counts, np.ones((len(counts), 1))], axis=1)
        macs = self._macs.total(k) + self._macs.base
        params = self._params.total(k) + self._params.base
        size = self._params.total(k, self._weight_bytes) + self._base_bytes
        return CostArrays(*(np.rint(v).astype(np.int64) for v in (macs, params, size)))

    def cost(self, counts: IntArray) -> Cost:
        """Of one plan, counts [G]."""
        c = self.evaluate(counts[None])
        return Cost(int(c.macs[0]), int(c.params[0]), int(c.bytes[0]))
