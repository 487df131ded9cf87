"""Greedy backward elimination: optimal brain surgeon for channels.

Source: B. Hassibi, D. Stork, "Second order derivatives for network pruning", NIPS 1992, for single
weights; here whole channels of a consumer's input go, and those that stay make up for them by least
squares.

Legend for shapes: n channels of a group, k variables of a channel at one input, m = n * k of them,
r rows of the factor (at most m).

With second moments G at the input and the consumer's weight W [O, m], removing the set R and
solving for the best weights of the rest leaves the loss tr(W_R (P_RR)^-1 W_R^T), P = G^-1. Then
P_KK <- P_KK - P_KR (P_RR)^-1 P_RK and W_K <- W_K - W_R (P_RR)^-1 P_RK. Only the group's own part of
P takes part, and only H = W^T W counts, so W may be any factor of H.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import lapack

from fxprune.types import FloatArray, IntArray

STEPS = 32  # a round takes one of this many parts of what is left
LEAST = 1e-9  # bound of the diagonal of P against rounding; G is of about unit scale
LOOKAHEAD = 2  # candidates per channel that a round takes


class Loss(Protocol):
    """What the channels of a group are worth to the consumers of one input.

    Channels are named by their present positions; a removal moves the last ones into the gaps, as
    :func:`gaps` says.
    """

    def costs(self) -> FloatArray:
        """[n]: the loss when one channel goes."""
        ...

    def restricted(self, units: IntArray) -> Loss:
        """The same for these channels alone, as if all others stayed; a copy."""
        ...

    def remove(self, units: IntArray) -> None:
        """These channels go, all others make up for them."""
        ...


def gaps(count: int, gone: IntArray) -> tuple[IntArray, IntArray]:
    """Of ``count`` positions some go: (positions to fill, the last positions that fill them)."""
    left = count - len(gone)
    last = np.ones(len(gone), dtype=np.bool_)
    last[gone[gone >= left] - left] = False
    return gone[gone < left], left + np.flatnonzero(last)


class Coupled:
    """Channels that can stand in for each other. inverse P [m, m], factor [r, m], channel-major.

    What is left lies in the first ``size`` columns of both.
    """

    def __init__(self, inverse: FloatArray, factor: FloatArray, k: int) -> None:
        self.inverse, self.factor = inverse.copy(order="C"), factor.copy(order="C")
        self.k = k
        self.size = len(inverse)

    def costs(self) -> FloatArray:
        k, m = self.k, self.size
        factor = self.factor[:, :m]
        if k == 1:
            diagonal = np.maximum(np.diagonal(self.inverse)[:m], LEAST)
            costs: FloatArray = np.einsum("rm,rm->m", factor, factor) / diagonal
            return costs
        n = m // k
        at = np.arange(n)
        p = self.inverse[:m, :m].reshape(n, k, n, k)[at, :, at, :]
        w = factor.reshape(-1, n, k)
        h = np.einsum("rni,rnj->nij", w, w)
        return np.asarray(np.maximum(np.trace(np.linalg.solve(p, h), axis1=1, axis2=2), 0.0))

    def restricted(self, units: IntArray) -> Coupled:
        at = self._variables(units)
        return Coupled(self.inverse[np.ix_(at, at)], factor_of(self.factor[:, at]), self.k)

    def remove(self, units: IntArray) -> None:
        gone = self._variables(units)
        holes, movers = gaps(self.size, gone)
        p, w = self.inverse[: self.size, : self.size], self.factor[:, : self.size]
        across, taken = p[gone], w[:, gone]
        update: FloatArray = np.asarray(np.linalg.solve(across[:, gone], across), dtype=np.float64)
        p[holes] = p[movers]
        for columns in (p, w, across, update):
            columns[:, holes] = columns[:, movers]
        m = self.size = self.size - len(gone)
        subtract_product(p[:m, :m], across[:, :m].T, update[:, :m])
        subtract_product(w[:, :m], taken, update[:, :m])

    def _variables(self, units: IntArray) -> IntArray:
        if self.k == 1:
            return units
        return (units[:, None] * self.k + np.arange(self.k)).ravel()


class Independent:
    """Channels that cannot stand in for each other; ``losses`` [n] add up."""

    def __init__(self, losses: FloatArray) -> None:
        self.losses = losses

    def costs(self) -> FloatArray:
        return self.losses

    def restricted(self, units: IntArray) -> Independent:
        return Independent(self.losses[units])

    def remove(self, units: IntArray) -> None:
        self.losses = _removed(self.losses, units)


def _removed(values: NDArray[Any], gone: IntArray) -> NDArray[Any]:
    holes, movers = gaps(len(values), gone)
    left = values[: len(values) - len(gone)].copy()
    left[holes] = values[movers]
    return left


def subtract_product(target: FloatArray, a: FloatArray, b: FloatArray) -> None:
    """``target`` -= ``a`` @ ``b``, in place; large ones without a temporary array."""
    if target.size < 1 << 16:
        target -= a @ b
    else:
        torch.from_numpy(target).addmm_(torch.from_numpy(a), torch.from_numpy(b), alpha=-1)


def factor_of(w: FloatArray) -> FloatArray:
    """A factor of w^T w with no more rows than columns. ``w`` [O, m] -> [min(O, m), m]."""
    return w if w.shape[0] <= w.shape[1] else factor_of_square(w.T @ w)


def factor_of_square(h: FloatArray) -> FloatArray:
    """F [m, m] with F^T F = ``h`` [m, m], positive semidefinite up to rounding."""
    scale = float(np.trace(h)) / len(h)
    if scale <= 0:
        return np.zeros_like(h)
    upper, info = lapack.dpotrf(h + 1e-12 * scale * np.eye(len(h)), lower=0, clean=1)
    if info == 0:
        factor: FloatArray = upper
        return factor
    values, vectors = np.linalg.eigh(h)
    return np.asarray(np.sqrt(np.maximum(values, 0))[:, None] * vectors.T)


def inverse_of(g: FloatArray) -> FloatArray:
    """The inverse of a matrix [m, m], by Cholesky; made positive definite where it is not quite."""
    upper, info = lapack.dpotrf(g, lower=0, clean=1)
    if info != 0:
        values, vectors = np.linalg.eigh(g)
        values = np.maximum(values, 1e-3 * max(float(np.abs(values).mean()), 1e-30))
        return np.asarray((vectors / values) @ vectors.T, dtype=np.float64)
    inverse, info = lapack.dpotri(upper, lower=0)
    full: FloatArray = np.triu(inverse) + np.triu(inverse, 1).T
    return full


def eliminate(losses: Sequence[Loss], n: int, rows: int = 1) -> FloatArray:
    """Remove channel after channel, the cheapest first; every row loses equally many.

    ``losses``: one for each input, of the same n channels; they add up and are used up.
    Returns [n]: the loss summed up to each channel's removal, strictly increasing in that order.

    A round picks greedily among the cheapest channels (``LOOKAHEAD`` times as many as it takes),
    exactly as if they went one by one, and then updates all others at once.
    """
    order: list[IntArray] = []
    spent: list[FloatArray] = []
    alive = np.arange(n)
    width = n // rows
    while len(alive):
        quota = max(1, len(alive) // rows // STEPS)
        costs = np.sum([loss.costs() for loss in losses], axis=0)
        by_row = np.lexsort((costs, alive // width)).reshape(rows, -1)
        near = by_row[:, : LOOKAHEAD * quota]
        picked, paid = _pick([loss.restricted(near.ravel()) for loss in losses], quota, near.shape)
        gone = near.ravel()[picked]
        order.append(alive[gone])
        spent.append(paid)
        gone = np.sort(gone)
        for loss in losses:
            loss.remove(gone)
        alive = _removed(alive, gone)
    return _cumulative(np.concatenate(order), np.concatenate(spent))


def _pick(
    losses: Sequence[Loss], quota: int, shape: tuple[int, ...]
) -> tuple[IntArray, FloatArray]:
    """``quota`` of each row of ``shape`` [rows, candidates], one by one -> positions, losses."""
    rows, each = shape
    left = np.full(rows, quota)
    alive = np.arange(rows * each)
    picked, paid = np.empty(rows * quota, dtype=np.int64), np.empty(rows * quota)
    for i in range(rows * quota):
        costs = np.sum([loss.costs() for loss in losses], axis=0)
        costs = np.where(left[alive // each] > 0, costs, np.inf)
        at = int(costs.argmin())
        picked[i], paid[i] = alive[at], costs[at]
        left[alive[at] // each] -= 1
        for loss in losses:
            loss.remove(np.array([at]))
        alive = _removed(alive, np.array([at]))
    return picked, paid


def _cumulative(order: IntArray, spent: FloatArray) -> FloatArray:
    n = len(order)
    total = np.cumsum(np.maximum(spent, 0.0))
    scores = np.empty(n)
    scores[order] = total + (total[-1] + 1e-30) * 1e-12 * np.arange(1, n + 1)
    return scores
