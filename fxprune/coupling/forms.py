"""Rules for other sums of products: vectors, bilinear forms, distances, sampled convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fxprune.coupling.contraction import ADDED, contract, dim_labels, product, record
from fxprune.coupling.labels import Fields, Labels, align, varying
from fxprune.coupling.mixing import meet_along
from fxprune.coupling.rules import register, unfixed


@register("aten.mv", "aten.dot", "aten.vdot")
def _vector(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
    """[M, K] @ [K], [K] @ [K]"""
    x, y = args
    last = x.dim() - 1
    shapes = [list(x.shape), [1] * last + list(y.shape)]
    fy = [align(f, x.dim()) for f in labels.of(y)]
    fields = contract(labels, labels.of(x), fy, shapes, last, (x, y))
    labels.put(out, [f[..., 0] for f in fields])


@product("aten._grouped_mm")
def _grouped(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
    """Tokens [T, K], sorted by expert, times the weight [E, K, N] of each one's expert: [T, N]"""
    x, w = args[0], args[1]
    if x.dim() != 2 or w.dim() != 3 or kwargs.get("bias") is not None or len(args) > 3:
        labels.lock_all([t for t in args if isinstance(t, Tensor)], "grouped product of this form")
        return
    fx = [f[:, :, None] for f in labels.of(x)]
    fw = []
    for f in labels.of(w):
        g = labels.mix(f, [0], "experts are chosen by number")
        if g is not None:
            fw.append(g)
    shapes = [[*x.shape, 1], [1, *w.shape[1:]]]
    fields = [f[:, 0] for f in contract(labels, fx, fw, shapes, 1, (x, w))]
    inner = dim_labels(labels.of(x), 1)
    sizes = [(s, dim_labels(fields, d)) for d, s in enumerate(out.shape)]
    record(labels, 1, [*sizes, (x.shape[1], inner)])
    labels.put(out, fields)


@register("aten._trilinear")
def _bilinear(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
    """A product of three tensors, each with dims of size 1 put in, summed over some dims."""
    operands, grown, summed = args[:3], args[3:6], sorted(args[6])
    shapes: list[list[int]] = []
    fields: list[Fields] = []
    for t, dims in zip(operands, grown, strict=True):
        shape, own = list(t.shape), list(labels.of(t))
        for d in sorted(dims):
            shape.insert(d, 1)
            own = [np.expand_dims(f, d) for f in own]
        shapes.append(shape)
        fields.append(own)
    for d in summed:
        along = [(t, f) for t, own in zip(operands, fields, strict=True) for f in own]
        along = [(t, f) for t, f in along if d in varying(f)]
        if not any(labels.vanishes(t) for t, _ in along):
            for _, f in along:
                labels.lock(f, ADDED)
    reason = "multiplied with a tensor whose channels are fixed"
    met = labels.combine(unfixed(labels, shapes, fields, reason))
    left = [f for f in (labels.rows(f, summed) for f in met) if f is not None]
    labels.put(out, [np.squeeze(f, tuple(summed)) for f in left])


@register("aten._cdist_forward", "aten._euclidean_dist")
def _distances(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
    """Of all pairs: [*, P, M], [*, R, M] -> [*, P, R]; a sum of |x - y| to some power"""
    x, y = args[0], args[1]
    last = out.dim()
    fx = [np.expand_dims(align(f, last), last - 1) for f in labels.of(x)]
    fy = [np.expand_dims(align(f, last), last - 2) for f in labels.of(y)]
    shapes = [[*x.shape[:-1], 1, x.shape[-1]], [*y.shape[:-2], 1, *y.shape[-2:]]]
    shapes = [[1] * (last + 1 - len(s)) + s for s in shapes]
    met = unfixed(labels, shapes, [fx, fy], "distance to a tensor whose channels are fixed")
    if not (labels.vanishes(x) and labels.vanishes(y)):
        for f in met:
            if last in varying(f):
                labels.lock(f, "a distance to channels that are not zero")
    left = [labels.rows(f, [last]) for f in labels.combine(met)]
    labels.put(out, [f[..., 0] for f in left if f is not None])


@register("aten._pdist_forward")
def _own_distances(
    labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor
) -> None:
    """[N, M] -> one for each pair of rows"""
    x = args[0]
    zero = labels.vanishes(x)
    for f in labels.of(x):
        if not zero or 0 in varying(f):
            labels.lock(f, "distances between channels, or over channels that are not zero")
        else:
            labels.rows(f, [1])


@register("torchvision.deform_conv2d")
def _deformed(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
    """Input [N, C, H, W], weight [O, C, k, k], offsets and masks [N, taps, H, W], bias [O]"""
    x, w, offset, mask, bias = args[:5]
    groups, offset_groups = args[11], args[12]
    labels.lock_all([offset, mask], "offsets and masks of a deformable convolution")
    for f in labels.of(w):
        if varying(f) - {0, 1}:
            labels.lock(f, "kernel position")
    if groups > 1 or offset_groups > 1:
        labels.lock_all([x, w, bias], "grouped deformable convolution")
        return
    fx = [labels.mix(f, (0, 2, 3), "sampled along the channels") for f in labels.of(x)]
    inputs = [f.reshape(1, -1) for f in fx if f is not None]
    weights = [f.reshape(f.shape[:2]) for f in labels.of(w) if varying(f) <= {0, 1}]
    shapes = [[1, x.shape[1]], list(w.shape[:2])]
    outputs = contract(labels, inputs, weights, shapes, 1, (x, w))
    labels.put(out, [f.reshape(1, -1, 1, 1) for f in outputs])
    meet_along(labels, out, [bias], 1, out)
