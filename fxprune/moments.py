"""Streaming second moments of what enters a product, and the layout of its weight. No models here.

Legend for shapes: C input channels of a consumer; V variables, the channels after folding; T taps
of a variable (C = V * T); g convolution groups, v = V / g; O outputs; B samples; P positions of a
sample; S = B * P rows.

The attention map is F = sum_c |x_c|^p over the positions of one sample. The displacement of channel
c is how far the normalised map moves when c goes, || F/|F| - (F - a_c)/|F - a_c| ||, a_c = |x_c|^p.
Both follow DESIGN's reading of the abstract of ARPruning; its exact formulas are not public.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fxprune.types import Consumer, FloatArray, IntArray

MAX_VARIABLES = 8192  # above this only the diagonal of the second moments is kept
MAX_POSITIONS = 128  # positions that are looked at in one sample
CHUNK = 4096  # most rows of one float32 product; the sum over products is float64
WAIT = 512  # rows that are gathered before they are multiplied, where batches give fewer
STRIPES = 4  # of a symmetric product, of which only the upper part is computed


@dataclass(frozen=True)
class Layout:
    """How the C input channels of a consumer are V variables with T taps each.

    repeat (tiled False): channel c = variable * T + tap, a flatten of [C, H, W];
    tiled: c = tap * V + variable, a flatten of [H, W, C].
    """

    variables: int
    taps: int = 1
    tiled: bool = False

    @property
    def columns(self) -> IntArray:
        """[V, T]: the input channels of each variable."""
        c = np.arange(self.variables * self.taps, dtype=np.int64)
        return c.reshape(self.taps, -1).T if self.tiled else c.reshape(-1, self.taps)

    @classmethod
    def of(cls, consumer: Consumer) -> Layout:
        """Taps are folded where a linear layer reads one channel at T neighbouring columns.

        The taps of a flatten are one feature at T places, like the taps of a convolution. Tiled
        columns may also be T different features that only go together, so they are folded where
        the matrix would be too large else.
        """
        classes = consumer.classes
        plain = cls(len(classes))
        if consumer.kind != "linear" or len(classes) == 0 or classes.min() < 0:
            return plain
        distinct, counts = np.unique(classes, return_counts=True)
        taps = int(counts[0])
        if taps == 1 or (counts != taps).any():
            return plain
        if (classes.reshape(-1, taps) == classes.reshape(-1, taps)[:, :1]).all():
            return cls(len(distinct), taps)
        tiled = (classes.reshape(taps, -1) == classes[: len(distinct)]).all()
        if tiled and len(classes) > MAX_VARIABLES:
            return cls(len(distinct), taps, tiled=True)
        return plain


def split_weight(consumer: Consumer, weight: Tensor, layout: Layout) -> Tensor:
    """The weight, in its own layout, -> a view [g, O/g, V/g, T]. T: kernel or folded taps."""
    w = weight.detach()
    g = consumer.groups
    if consumer.kind == "linear":
        w = w if consumer.in_dim == 1 else w.t()
        if layout.tiled:
            return w.reshape(1, len(w), layout.taps, layout.variables).transpose(2, 3)
        return w.reshape(1, len(w), layout.variables, layout.taps)
    if consumer.transposed:
        return w.reshape(g, w.shape[0] // g, w.shape[1], -1).transpose(1, 2)
    return w.reshape(g, w.shape[0] // g, w.shape[1], -1)


def join_weight(consumer: Consumer, blocks: Tensor, kernel: torch.Size, layout: Layout) -> Tensor:
    """Inverse of :func:`split_weight`, for any number of variables; ``kernel``: spatial sizes."""
    g, outs, ins, _ = blocks.shape
    if consumer.kind == "linear":
        flat = blocks[0].transpose(1, 2) if layout.tiled else blocks[0]
        w = flat.reshape(outs, -1)
        return w if consumer.in_dim == 1 else w.t()
    if consumer.transposed:
        return blocks.transpose(1, 2).reshape(g * ins, outs, *kernel)
    return blocks.reshape(g * outs, ins, *kernel)


@dataclass(frozen=True)
class Moments:
    """total: weight of all positions; mean [V]; cov [g, v, v], or [V] if only the diagonal is."""

    total: float
    mean: FloatArray
    cov: FloatArray


class RunningMoments:
    """Weighted sums of x and x x^T around a fixed point near the mean, in float64."""

    def __init__(self, groups: int, shift: Tensor) -> None:
        v = len(shift) // groups
        self.diagonal = v > MAX_VARIABLES
        self.shift = shift
        self.total = 0.0
        self.first = torch.zeros(groups, v, dtype=torch.float64)
        shape = (groups, v) if self.diagonal else (groups, v, v)
        self.second = torch.zeros(shape, dtype=torch.float64)

    def add(self, rows: Tensor, weight: Tensor | None = None) -> None:
        """``rows`` [S, g, v] with the shift taken off; ``weight`` [S], 1 where None."""
        for at in range(0, len(rows), CHUNK):
            x = rows[at : at + CHUNK]
            wx = x if weight is None else x * weight[at : at + CHUNK, None, None]
            if self.diagonal:
                self.second += (wx * x).sum(0).cpu()
            elif x.shape[1] == 1:
                self._add_upper(wx[:, 0], x[:, 0])
            else:
                self.second += torch.einsum("sgi,sgj->gij", wx, x).cpu()
            self.first += wx.sum(0).cpu()
        self.total += float(len(rows) if weight is None else weight.double().sum())

    def _add_upper(self, wx: Tensor, x: Tensor) -> None:
        step = max(64, -(-x.shape[1] // STRIPES))
        for at in range(0, x.shape[1], step):
            stripe = wx[:, at : at + step].t() @ x[:, at:]
            self.second[0, at : at + step, at:] += stripe.cpu()

    def result(self) -> Moments:
        total = self.total or 1.0
        offset = self.first / total
        if self.diagonal:
            cov = (self.second / total - offset**2).flatten()
        else:
            cov = self.second / total
            cov.baddbmm_(offset[:, :, None], offset[:, None, :], alpha=-1)
            for part in cov:
                mirror(part)
        mean = offset.flatten() + self.shift.double().cpu()
        return Moments(self.total, mean.numpy(), cov.numpy())


def mirror(square: Tensor) -> None:
    """Copy the upper triangle of [m, m] below the diagonal, in place, by stripes."""
    step = max(64, -(-len(square) // (2 * STRIPES)))
    for at in range(0, len(square), step):
        inside = square[at : at + step, at : at + step]
        inside.copy_(inside.triu() + inside.triu(1).t())
        square[at + step :, at : at + step] = square[at : at + step, at + step :].t()


def displacements(along: Tensor, square: Tensor, total: Tensor) -> Tensor:
    """|| F/|F| - (F - a)/|F - a| || from <F, a>, |a|^2 and |F|^2 (broadcast); float64.

    The sine of the angle between F and F - a comes from the part of ``a`` across F, so nothing
    cancels for small channels, where the cosine is nearly 1. A channel that is the whole map
    moves it by a right angle; an empty map does not move.
    """
    along, square, total = along.double(), square.double(), total.double()
    norm = total.clamp(min=torch.finfo(torch.float64).tiny).sqrt()
    across = (square - (along / norm) ** 2).clamp(min=0).sqrt()
    left = norm - along / norm
    angle = torch.atan2(across, left)
    gone = (across == 0) & (left <= 1e-12 * norm)
    angle = torch.where(gone, torch.full_like(angle, math.pi / 2), angle)
    return torch.where(total > 0, 2 * torch.sin(angle / 2), torch.zeros_like(angle))


class RunningDisplacement:
    """Mean over samples of the displacement; where samples are the positions, of the one map."""

    def __init__(self, pooled: bool) -> None:
        self.pooled = pooled
        self.count = 0
        self.sums: list[Tensor] = []

    def add(self, a: Tensor, attention: Tensor) -> None:
        """``a`` [B, P, units], ``attention`` [B, P]; pooled: B = 1."""
        along = torch.einsum("bp,bpu->bu", attention, a).double().cpu()
        square = torch.einsum("bpu,bpu->bu", a, a).double().cpu()
        total = (attention * attention).sum(1, keepdim=True).double().cpu()
        if self.pooled:
            terms = [along, square, total]
        else:
            terms = [displacements(along, square, total).sum(0)]
        self.sums = [s + t for s, t in zip(self.sums, terms, strict=True)] if self.sums else terms
        self.count += len(a)

    def result(self) -> FloatArray:
        if self.pooled:
            return displacements(*self.sums)[0].numpy()
        return (self.sums[0] / self.count).numpy()


@functools.lru_cache(maxsize=64)
def chosen_positions(positions: int, most: int = MAX_POSITIONS) -> Tensor | None:
    """``most`` positions of a sample, ascending, the same for every sample; None: all of them.

    Drawn without replacement by a generator of its own: a regular stride would meet only some
    columns of an image.
    """
    if positions <= most:
        return None
    generator = torch.Generator().manual_seed(positions)
    return torch.randperm(positions, generator=generator)[:most].sort().values


def taken(maps: Tensor, at: Tensor | None) -> Tensor:
    """Of [B, P, C] the positions ``at``; None: all of them."""
    if at is None:
        return maps
    at = at.to(maps.device)
    if not maps.is_contiguous():
        return maps.transpose(1, 2).index_select(2, at).transpose(1, 2)
    lines = torch.arange(len(maps), device=at.device)[:, None] * maps.shape[1] + at
    return F.embedding(lines, maps.view(-1, maps.shape[2]))  # the fastest way to gather lines


@dataclass(frozen=True)
class InputStatistics:
    """Of one tensor that enters one or more consumers. Variables: see :class:`Layout`.

    layout        the folding
    plain         moments with every position alike
    attention     moments weighted by F^gamma; ``plain`` itself where gamma is 0
    displacement  [V], None where it was not asked for
    blocks        group name -> [n]: displacement of channels with several variables each
    """

    layout: Layout
    plain: Moments
    attention: Moments
    displacement: FloatArray | None
    blocks: Mapping[str, FloatArray]


def input_rows(kind: str, layout: Layout, x: Tensor, batch: int) -> tuple[Tensor, bool]:
    """A product's input -> ([B, P, V], pooled): pooled where the samples are the positions.

    ``x``: [N, C, *] of a convolution, [M, C] of a matrix product; ``batch``: samples of the batch.
    At most MAX_POSITIONS positions of a sample, the same ones for the same number of positions.
    """
    v, t = layout.variables, layout.taps
    pooled = False
    if kind == "conv":
        x = x.reshape(len(x), v, -1).transpose(1, 2)
    else:
        pooled = len(x) % batch != 0
        samples = 1 if pooled else batch
        taps = (
            x.reshape(samples, -1, t, v)
            if layout.tiled
            else (x.reshape(samples, -1, v, t).transpose(2, 3))
        )
        x = taps.reshape(samples, -1, v)
    if pooled or x.shape[1] == 1:
        return x.reshape(1, -1, v), True
    return taken(x, chosen_positions(x.shape[1])), False


class InputAccumulator:
    """Gathers :class:`InputStatistics` from the inputs of one consumer, batch by batch.

    ``units``: group name -> [n, k] variables of each channel, for channels of several variables.
    """

    def __init__(
        self,
        consumer: Consumer,
        gamma: float,
        p: float,
        displacement: bool,
        units: Mapping[str, IntArray],
    ) -> None:
        self.consumer, self.layout = consumer, Layout.of(consumer)
        self.gamma, self.p, self.displacement = gamma, p, displacement
        self.units = {name: torch.from_numpy(u) for name, u in units.items()}
        self.plain: RunningMoments | None = None
        self.weighted: RunningMoments | None = None
        self.moved: dict[str, RunningDisplacement] = {}
        self.waiting: list[tuple[Tensor, Tensor | None]] = []

    def add(self, x: Tensor, batch: int) -> None:
        """``x``: the op's input, [N, C, *] or [M, C]; ``batch``: samples of the batch."""
        x = x if x.dtype == torch.float64 else x.float()
        rows, pooled = input_rows(self.consumer.kind, self.layout, x, batch)
        wants_map = self.gamma != 0 or self.displacement
        weight = self._maps(rows, pooled) if wants_map else None
        flat = rows.reshape(-1, self.layout.variables)
        groups = self.consumer.groups
        if self.plain is None:
            self.plain = RunningMoments(groups, flat.mean(0))
            self.weighted = RunningMoments(groups, self.plain.shift) if self.gamma else self.plain
        centred = (flat - self.plain.shift).reshape(len(flat), groups, -1)
        self.waiting.append((centred, weight if self.gamma else None))
        if sum(len(rows) for rows, _ in self.waiting) >= WAIT:
            self._flush()

    def _flush(self) -> None:
        """Multiply what is waiting: a few large products are faster than many small ones."""
        if not self.waiting:
            return
        assert self.plain is not None
        assert self.weighted is not None
        rows = torch.cat([rows for rows, _ in self.waiting])
        weights = [weight for _, weight in self.waiting if weight is not None]
        self.waiting.clear()
        self.plain.add(rows)
        if weights:
            self.weighted.add(rows, torch.cat(weights))

    def _maps(self, rows: Tensor, pooled: bool) -> Tensor:
        """Gathers displacements; returns the weights F^gamma [S], F of mean 1 in each sample."""
        a = rows.square() if self.p == 2 else rows.abs().pow(self.p)
        attention = a.sum(-1)
        if self.displacement:
            self._moved("", pooled).add(a, attention)
            for name, unit in self.units.items():
                unit = unit.to(a.device)
                block = a.index_select(-1, unit.flatten()).unflatten(-1, unit.shape).sum(-1)
                self._moved(name, pooled).add(block, attention)
        if not pooled:
            mean = attention.mean(1, keepdim=True)
            attention = torch.where(mean > 0, attention / mean, torch.ones_like(attention))
        return attention.flatten().pow(self.gamma)

    def _moved(self, name: str, pooled: bool) -> RunningDisplacement:
        return self.moved.setdefault(name, RunningDisplacement(pooled))

    def result(self) -> InputStatistics:
        """What was gathered, after at least one batch."""
        self._flush()
        assert self.plain is not None
        assert self.weighted is not None
        plain = self.plain.result()
        attention = self.weighted.result() if self.weighted is not self.plain else plain
        if attention.total == 0:  # every activation is 0
            attention = plain
        moved = {name: m.result() for name, m in self.moved.items()}
        single = moved.pop("", None)
        return InputStatistics(self.layout, plain, attention, single, moved)


def tap_coverage(dims: Sequence[tuple[int, int, int, int, int, int]]) -> Tensor:
    """[T]: the share of output positions at which each tap of a kernel meets no padding.

    ``dims``: (input size, output size, kernel, stride, dilation, padding before) of each dim.
    """
    total = torch.ones(1, dtype=torch.float64)
    for size, outs, kernel, stride, dilation, padding in dims:
        at = torch.arange(outs)[:, None] * stride + torch.arange(kernel) * dilation - padding
        share = ((at >= 0) & (at < size)).double().mean(0)
        total = (total[:, None] * share).flatten()
    return total


class OutputEnergy:
    """Mean over positions of |y - mean y|^2, summed over output channels; streaming, float64."""

    def __init__(self, kind: str) -> None:
        self.channel = 1 if kind == "conv" else -1
        self.count = 0
        self.shift: Tensor | None = None
        self.first, self.second = torch.zeros(1, dtype=torch.float64), 0.0

    def add(self, out: Tensor) -> None:
        """``out`` [N, O, *] of a convolution, [M, O] of a matrix product."""
        out = out if out.dtype == torch.float64 else out.float()
        dims = [d for d in range(out.ndim) if d != self.channel % out.ndim]
        var, mean = torch.var_mean(out, dims, correction=0)
        count = out.numel() // len(mean)
        mean = mean.double().cpu()
        if self.shift is None:
            self.shift = mean
        offset = mean - self.shift
        self.first = self.first + count * offset
        self.second += count * float(var.double().sum().cpu() + offset.square().sum())
        self.count += count

    def result(self) -> float:
        if self.count == 0:
            return 0.0
        return max(0.0, self.second / self.count - float((self.first / self.count).square().sum()))
