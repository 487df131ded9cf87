"""Rules for ops that rearrange channels and patches of images: folds, shuffles, windows."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fxprune.coupling.labels import Labels, varying
from fxprune.coupling.rules import register


@register("aten.pixel_shuffle", "aten.col2im")
def _fan_in(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
    """[N, C * taps, *] -> [N, C, H, W]"""
    dim = out.dim() - 3
    fields = []
    for f in labels.of(args[0]):
        if varying(f) != {dim}:
            labels.lock(f, "shuffled or folded over more than the channel dim")
            continue
        shape = [out.shape[dim] if d == dim else 1 for d in range(out.dim())]
        fields.append(labels.merge(f.reshape(out.shape[dim], -1), [1]).reshape(shape))
    labels.put(out, fields)


@register("aten.pixel_unshuffle")
def _fan_out(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
    x = args[0]
    dim = x.dim() - 3
    fields = []
    for f in labels.of(x):
        if varying(f) != {dim}:
            labels.lock(f, "unfolded over more than the channel dim")
            continue
        times = out.shape[dim] // x.shape[dim]
        shape = [out.shape[dim] if d == dim else 1 for d in range(out.dim())]
        fields.append(np.repeat(f.ravel(), times).reshape(shape))
    labels.put(out, fields)


@register("aten.im2col")
def _patches(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
    """[N, C, H, W] -> [N, C * taps, L]; a patch may span a dim that carries labels itself."""
    x, kernel, dilation, padding = args[:4]
    dim = x.dim() - 3
    steps = zip(x.shape[-2:], kernel, padding, dilation, strict=True)
    whole = {dim + d for d, (n, k, *more) in enumerate(steps, 1) if (k, *more) == (n, 0, 1)}
    found = []
    for f in labels.of(x):
        if len(varying(f)) == 1 and varying(f) <= {dim, *whole} and not labels.opaque:
            found.append(f)
        else:
            labels.lock(f, "unfolded over more than the channel dim")
    if found:
        one = functools.reduce(labels.product, found)
        taken = np.broadcast_to(one.reshape(one.shape[dim:]), (x.shape[dim], *kernel))
        labels.put(out, [taken.reshape([1] * dim + [-1, 1])])


@register("aten.unfold")
def _windows(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
    """x.unfold(dim, size, step): [*, L, *] -> [*, windows, *, size]"""
    x, dim = args[0], args[1] % args[0].dim()
    if args[2] == x.shape[dim] and not labels.opaque:
        labels.put(out, [np.moveaxis(f[..., None], dim, -1) for f in labels.of(x)])
        return
    fields = [labels.mix(f, [dim], "unfolded along the channels") for f in labels.of(x)]
    labels.put(out, [f[..., None] for f in fields if f is not None])


@register("aten.native_channel_shuffle", "aten.channel_shuffle")
def _channel_shuffle(
    labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor
) -> None:
    groups = args[1]
    fields = []
    for f in labels.of(args[0]):
        if varying(f) != {1}:
            labels.lock(f, "channel shuffle over more than the channel dim")
            continue
        block = f.reshape(groups, -1)
        labels.rect(block, 1)
        labels.rect(block, 0)
        fields.append(block.T.reshape(f.shape))
    labels.put(out, fields)
