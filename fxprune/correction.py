"""The error that is left at the output of a repaired consumer, fitted once more.

Channels in place of channels is one kind of repair: all taps of a kernel get the same mixture. What
is left after it, at the output, is regressed on everything that the product reads there, tap by
tap:

    e = (Z - Z') / a,    dW = S_e,u (S_uu + lambda I)^-1,    u the patch in front of an output.

Z is taken as far behind the output y as the graph stays affine in it, channel by channel,
Z' = a y' + b: behind the normalisation, and behind the sum with a residual branch. So the last
layer of a block makes up for what its stream has lost before, and nothing adds up along a deep net.
That it is affine is measured, not known by name. lambda is chosen like that of :mod:`regression`.

Legend for shapes: N samples, P positions of an output map, g convolution groups, o outputs of a
group, k inputs of a group, T taps, S rows (N x P), O = g * o, C = g * k.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fxprune.moments import MAX_POSITIONS, Layout, chosen_positions, taken
from fxprune.products import Product
from fxprune.regression import Cannot, Folds
from fxprune.repair import RIDGE
from fxprune.sides import Side
from fxprune.types import BoolArray, Consumer

MAX_CHAIN = 6  # nodes behind a consumer that are looked at
MAX_PATCH = 1200  # k * T up to which all taps are fitted, above it only the middle one

FEW_POSITIONS = 16  # of a sample, where an output reads one channel: few unknowns
AT_ONCE = 1 << 24  # numbers of patches that are held at a time
TOLERANCE = 1e-3  # of the slope, where a chain counts as affine
LEAST_SLOPE = 1e-3  # of the largest one, below which an output does not reach Z


@dataclass(frozen=True)
class Step:
    """dW [g, o, k, T] and the shift of the outputs' means [O], both of the pruned model's shape."""

    weight: Tensor
    shift: Tensor


@dataclass(frozen=True)
class Sides:
    """Both models in front of the same node, and what is known there.

    probe   the pruned model with few samples, which tell how far it is affine
    folds   of each input of ``original``: 1 chooses the ridge
    inputs  moments of the pruned model's inputs, at the positions that are looked at
    """

    original: Side
    pruned: Side
    probe: Side
    folds: Sequence[int]
    inputs: Folds


def correction(
    consumer: Consumer,
    sides: Sides,
    rows: BoolArray,
    ridge: float | None,
    centred: bool,
    refit: bool,
) -> Step | None:
    """What to add to the weight and mean of ``consumer``, at the reached node; None: nothing.

    rows     [O of the original] outputs that are kept
    centred  whether there is a place for a mean part
    Raises Cannot where its error cannot be seen or fitted.
    """
    if consumer.transposed:
        raise Cannot("patches of a transposed convolution")
    product, _ = sides.probe.outcome(consumer, 0)
    taps = _taps(product)
    sums = _sums(consumer, sides, rows, taps)
    both = sums.joint((0, 1) if refit or sums.counts[0] == 0 else (0,), centred)
    mean = centred
    if ridge is None and min(sums.counts) > 0:
        choice = sums.chosen(centred, None)
        mean = choice.mean
        if choice.ridge is None and not mean:
            return None
        found = choice.found
        if refit and choice.ridge is not None:
            found = both.fit(choice.ridge, None)
    else:
        found = both.fit(RIDGE if ridge is None else ridge, None)
    if not bool(found.isfinite().all()):
        raise Cannot("the moments of its input are not finite")
    weight = torch.zeros(*found.shape[:2], *_sizes(product), dtype=torch.float64)
    weight[..., taps] = found.unflatten(2, (len(taps), -1)).transpose(2, 3)
    shift = both.left(found).flatten()
    return Step(weight, shift if mean else torch.zeros_like(shift))


def _sums(consumer: Consumer, sides: Sides, rows: BoolArray, taps: Sequence[int]) -> Folds:
    """Moments of the error of the outputs ``rows`` and of the patches in front of them."""
    chain, slope = _affine(consumer, sides.probe)
    kept = torch.from_numpy(np.flatnonzero(rows)).to(slope.device)
    sums: Folds | None = None
    for i, fold in enumerate(sides.folds):
        samples = sides.original.sizes[i]
        product, z = sides.pruned.outcome(consumer, i, chain)
        _, target = sides.original.outcome(consumer, i, chain)
        shape = [*z.shape]
        shape[1 if consumer.kind == "conv" else -1] = len(rows)
        if [*target.shape] != shape:
            raise Cannot("its output has another shape in the original")
        ours, theirs = (_maps(consumer.kind, t, samples) for t in (z, target))
        at = _looked_at(product, ours.shape[1], samples)
        error = (taken(theirs, at).index_select(2, kept) - taken(ours, at)) / slope
        if sums is None:
            alike = _pointwise(product) and Layout.of(consumer).taps == 1
            sums = Folds(sides.inputs if alike else None)
        for e, u in _patches(product, error, z.shape[2:], at, taps, samples):
            sums.add(e, u, fold)
    if sums is None:
        raise Cannot("no sample reaches it")
    return sums


def _sizes(product: Product) -> tuple[int, int]:
    """(k, T) of a product's weight."""
    if product.kind == "linear":
        return product.w.shape[0], 1
    return product.w.shape[1], product.w.shape[2:].numel()


def _taps(product: Product) -> list[int]:
    """The taps that are fitted: all, or the middle one, or Cannot."""
    k, t = _sizes(product)
    if k * t <= MAX_PATCH:
        return list(range(t))
    if k <= MAX_PATCH:
        sizes = torch.tensor(product.w.shape[2:])
        middle = ((sizes - 1) // 2).tolist() if product.kind == "conv" else []
        return [int(np.ravel_multi_index(middle, tuple(sizes.tolist())))] if middle else [0]
    raise Cannot(f"more than {MAX_PATCH} inputs of an output")


def _affine(consumer: Consumer, side: Side) -> tuple[list[str], Tensor]:
    """(nodes behind the consumer as far as they are affine in it, slope [O], inf where it is 0)."""
    _, value = side.outcome(consumer, 0)
    channel = 1 if consumer.kind == "conv" else value.ndim - 1
    rest = [d for d in range(value.ndim) if d != channel]
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(value.shape, generator=generator, dtype=torch.float64) + 0.5
    step = noise.to(value) * value.std().clamp_min(1e-6)
    chain: list[str] = []
    slope = torch.ones(value.shape[channel], dtype=value.dtype, device=value.device)
    for _ in range(MAX_CHAIN):
        name = side.after(chain)
        if name is None:
            break
        longer = [*chain, name]
        found = _slope(side, value, step, longer, rest)
        if found is None:
            break
        chain, slope = longer, found
    least = LEAST_SLOPE * slope.abs().amax()
    return chain, torch.where(slope.abs() > least, slope, torch.full_like(slope, torch.inf))


def _slope(
    side: Side, value: Tensor, step: Tensor, chain: Sequence[str], rest: list[int]
) -> Tensor | None:
    """[O] slope of each channel behind ``chain``; None where it is not affine or does not run.

    ``rest``: all dims but the channels'.
    """
    try:
        z = side.follow(value, chain, 0)
        if not isinstance(z, Tensor) or z.shape != value.shape:
            return None
        ratio = (side.follow(value + step, chain, 0) - z) / step
    except Exception:  # noqa: BLE001 - a node of the model may refuse values that it never meets
        return None
    mean: Tensor = ratio.mean(rest, keepdim=True)
    far = (ratio - mean).abs().amax()
    return mean.flatten() if bool(far <= TOLERANCE * mean.abs().amax()) else None


def _maps(kind: str, value: Tensor, samples: int) -> Tensor:
    """[N, P, C] of what enters or leaves a product; N = 1 where rows are no positions of samples.

    ``value``: [N, C, *] of a convolution, [*, C] of a matrix product.
    """
    if kind == "conv":
        return value.flatten(2).transpose(1, 2)
    rows = value.reshape(-1, value.shape[-1])
    return rows.reshape(samples if len(rows) % samples == 0 else 1, -1, rows.shape[1])


def _looked_at(product: Product, positions: int, samples: int) -> Tensor | None:
    """Of the positions of an output map those that take part; None: all."""
    if product.kind == "linear" and len(product.x) % samples:
        return None
    few = product.kind == "conv" and product.w.shape[1] == 1
    return chosen_positions(positions, FEW_POSITIONS if few else MAX_POSITIONS)


def _patches(
    product: Product,
    error: Tensor,
    outs: Sequence[int],
    at: Tensor | None,
    taps: Sequence[int],
    samples: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows (e [S, g, o], u [S, g, taps * k]) of some samples at a time.

    ``error``: [N, P, O] at the positions ``at`` of an output map with the sizes ``outs``.
    """
    wide = torch.float64 if error.dtype == torch.float64 else torch.float32
    e, x = error.to(wide).unflatten(2, (product.groups, -1)), product.x.to(wide)
    maps = _maps(product.kind, x, samples)
    if _pointwise(product):
        u = taken(maps, at).flatten(0, 1)
        yield e.flatten(0, 1), u.unflatten(1, (product.groups, -1))
        return
    places, inside = _places(product, outs, at, taps)
    shares = None if bool(inside.all()) else inside.to(x).flatten()[:, None]
    step = max(1, AT_ONCE // max(1, x.shape[1] * places.numel()))
    for some, part in zip(maps.split(step), e.split(step), strict=True):
        u = taken(some, places.flatten())
        u = u if shares is None else u * shares
        u = u.unflatten(2, (product.groups, -1)).unflatten(1, places.shape).flatten(0, 1)
        yield part.flatten(0, 1), u.transpose(1, 2).flatten(2)  # [S, taps, g, k] before


def _pointwise(product: Product) -> bool:
    """Whether an output reads all channels of its group at its own position, and nothing else."""
    if product.kind == "linear":
        return True
    plain = set(product.stride) <= {1} and set(product.padding) <= {0}
    return plain and product.w.shape[2:].numel() == 1 and product.w.shape[1] > 1


def _places(
    product: Product, outs: Sequence[int], at: Tensor | None, taps: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """[P, taps]: the flat input position of each tap at the output positions ``at``; in range?

    ``outs``: sizes of the output map.
    """
    sizes, kernel = product.x.shape[2:], product.w.shape[2:]
    looked_at = np.arange(np.prod(outs)) if at is None else at.numpy()
    out_at = np.unravel_index(looked_at, tuple(outs))
    tap_at = np.unravel_index(np.asarray(taps), tuple(kernel))
    flat = np.zeros((len(looked_at), len(taps)), dtype=np.int64)
    inside = np.ones(flat.shape, dtype=np.bool_)
    for d, size in enumerate(sizes):
        place = out_at[d][:, None] * product.stride[d] - product.padding[d]
        place = place + tap_at[d][None] * product.dilation[d]
        inside &= (place >= 0) & (place < size)
        flat = flat * size + place.clip(0, size - 1)
    return torch.from_numpy(flat), torch.from_numpy(inside)
