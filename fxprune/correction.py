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

from fxprune.moments import MAX_POSITIONS, chosen_positions
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


def correction(
    consumer: Consumer,
    original: Side,
    pruned: Side,
    rows: BoolArray,
    folds: Sequence[int],
    ridge: float | None,
    centred: bool,
    refit: bool,
) -> Step | None:
    """What to add to the weight and mean of ``consumer``, at the reached node; None: nothing.

    rows     [O of the original] outputs that are kept
    folds    of each input of ``original``: 1 chooses the ridge
    centred  whether there is a place for a mean part
    Raises Cannot where its error cannot be seen or fitted.
    """
    if consumer.transposed:
        raise Cannot("patches of a transposed convolution")
    chain, slope = _affine(consumer, pruned)
    kept = torch.from_numpy(np.flatnonzero(rows))
    sums = Folds()
    taps: list[int] = []
    for i, fold in enumerate(folds):
        product, y = pruned.outcome(consumer, i)
        _, whole = original.outcome(consumer, i)
        channel = 1 if consumer.kind == "conv" else y.ndim - 1
        z, target = pruned.follow(y, chain, i), original.follow(whole, chain, i)
        if target.ndim != z.ndim or len(rows) != target.shape[channel]:
            raise Cannot("its output has another shape in the original")
        error = target.index_select(channel, kept.to(target.device)) - z
        if error.shape != y.shape:
            raise Cannot("its output has another shape in the original")
        taps = _taps(product)
        error = error.movedim(channel, -1) / slope
        for e, u in _patches(product, error, taps, original.sizes[i]):
            sums.add(e, u, fold)
    both = sums.joint((0, 1) if refit or sums.counts[0] == 0 else (0,), centred)
    found, mean = torch.zeros_like(both.across), centred
    if ridge is None and min(sums.counts) > 0:
        choice = sums.chosen(centred, None)
        ridge, mean = choice.ridge, choice.mean
    else:
        ridge = RIDGE if ridge is None else ridge
    if ridge is not None:
        found = both.fit(ridge, None)
    elif not mean:
        return None
    if not bool(found.isfinite().all()):
        raise Cannot("the moments of its input are not finite")
    weight = torch.zeros(*found.shape[:2], *_sizes(product), dtype=torch.float64)
    weight[..., taps] = found.unflatten(2, (-1, len(taps)))
    shift = both.left(found).flatten()
    return Step(weight, shift if mean else torch.zeros_like(shift))


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


def _patches(
    product: Product, error: Tensor, taps: Sequence[int], samples: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows (e [S, g, o], u [S, g, k * taps]) at the looked-at positions, some samples at a time.

    ``error``: [N, *, O] like the output.
    """
    wide = torch.float64 if error.dtype == torch.float64 else torch.float32
    x, g = product.x.to(wide), product.groups
    if product.kind == "linear":
        e = error.reshape(len(x), 1, -1).to(wide)
        chosen = chosen_positions(len(x) // samples) if len(x) % samples == 0 else None
        if chosen is not None:
            e, x = (t.unflatten(0, (samples, -1))[:, chosen].flatten(0, 1) for t in (e, x))
        yield e, x[:, None]
        return
    outs = error.shape[1:-1]
    few = product.w.shape[1] == 1
    chosen = chosen_positions(outs.numel(), FEW_POSITIONS if few else MAX_POSITIONS)
    at = torch.arange(outs.numel()) if chosen is None else chosen
    places, inside = _places(product, outs, at, taps)
    flat, e = x.flatten(2), error.flatten(1, -2)[:, at.to(error.device)].to(wide)
    places, inside = places.to(x.device), inside.to(x)
    step = max(1, AT_ONCE // max(1, x.shape[1] * places.numel()))
    for part in torch.arange(len(x)).split(step):
        u = flat[part].index_select(2, places.flatten()).unflatten(2, places.shape) * inside
        u = u.permute(0, 2, 1, 3).flatten(0, 1)  # [S, C, taps]
        yield (
            e[part].flatten(0, 1).unflatten(1, (g, -1)),
            u.unflatten(1, (g, -1)).flatten(2),
        )


def _places(
    product: Product, outs: torch.Size, at: Tensor, taps: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """[P, taps]: the flat input position of each tap at the output positions ``at``; in range?"""
    sizes, kernel = product.x.shape[2:], product.w.shape[2:]
    out_at = np.unravel_index(at.numpy(), tuple(outs))
    tap_at = np.unravel_index(np.asarray(taps), tuple(kernel))
    flat = np.zeros((len(at), len(taps)), dtype=np.int64)
    inside = np.ones(flat.shape, dtype=np.bool_)
    for d, size in enumerate(sizes):
        place = out_at[d][:, None] * product.stride[d] - product.padding[d]
        place = place + tap_at[d][None] * product.dilation[d]
        inside &= (place >= 0) & (place < size)
        flat = flat * size + place.clip(0, size - 1)
    return torch.from_numpy(flat), torch.from_numpy(inside)
