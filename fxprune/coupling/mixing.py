"""Rules for ops that mix positions along dims: spatial ops, reductions, normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fxprune.coupling import vanish
from fxprune.coupling.labels import Fields, Labels, varying
from fxprune.coupling.rules import Rule, dims_of, elementwise, meet, register, unfixed
from fxprune.types import IntArray


def _spatial(count: int) -> Rule:
    """An op that mixes positions along the last ``count`` dims and keeps the others."""

    def rule(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Any) -> None:
        x = args[0]
        dims = range(x.dim() - count, x.dim())
        name = str(func.overloadpacket)
        mixed = [labels.mix(f, dims, f"{name} along the channels") for f in labels.of(x)]
        fields = [f for f in mixed if f is not None]
        for other in (a for a in args[1:] if isinstance(a, Tensor)):
            if other.shape == x.shape:  # the positions of maxima
                fields = labels.combine([*fields, *labels.of(other)])
            else:
                fields = _where_sampled(labels, x, other, fields)
        for t in out if isinstance(out, (tuple, list)) else [out]:
            labels.put(t, fields)

    return rule


def _where_sampled(labels: Labels, x: Tensor, grid: Tensor, fields: Fields) -> Fields:
    """Images x [N, C, *] meet the places [N, ...] at which they are sampled in N alone."""
    given: Fields = []
    for f in labels.of(grid):
        if varying(f) == {0}:
            given.append(f.reshape([-1] + [1] * (x.dim() - 1)))
        else:
            labels.lock(f, "where an image is sampled")
    shape = [grid.shape[0]] + [1] * (x.dim() - 1)
    own = [1 if d else s for d, s in enumerate(x.shape)]
    return labels.combine(
        unfixed(labels, [own, shape], [fields, given], "sampled at places that are fixed")
    )


for _n in (1, 2, 3):
    register(
        f"aten.avg_pool{_n}d", f"aten.max_pool{_n}d", f"aten.max_pool{_n}d_with_indices",
        f"aten.adaptive_avg_pool{_n}d", f"aten._adaptive_avg_pool{_n}d",
        f"aten.adaptive_max_pool{_n}d", f"aten.upsample_nearest{_n}d",
        f"aten.reflection_pad{_n}d", f"aten.replication_pad{_n}d",
        f"aten._upsample_nearest_exact{_n}d",
    )(_spatial(_n))  # fmt: skip
register("aten.upsample_linear1d")(_spatial(1))
register(
    "aten.upsample_bilinear2d", "aten.upsample_bicubic2d", "aten._upsample_bilinear2d_aa",
    "aten._upsample_bicubic2d_aa", "aten.mkldnn_max_pool2d", "aten.max_unpool2d",
)(_spatial(2))  # fmt: skip
register("aten.upsample_trilinear3d", "aten.max_unpool3d")(_spatial(3))


@register("aten.grid_sampler_2d", "aten.grid_sampler_3d")
def _sampled(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
    """x [N, C, *S] at the places grid [N, *P, k]: [N, C, *P]."""
    x, grid = args[0], args[1]
    last = grid.dim() - 1
    mine = [labels.mix(f, range(2, x.dim()), "sampled along the channels") for f in labels.of(x)]
    places = [labels.mix(f, [last], "coordinates of places") for f in labels.of(grid)]
    fields = [
        [f for f in mine if f is not None],
        [np.expand_dims(np.squeeze(f, last), 1) for f in places if f is not None],
    ]
    batch = [[f for f in own if 0 in varying(f)] for own in fields]
    rest = [f for own in fields for f in own if 0 not in varying(f)]
    shapes = [[t.shape[0]] + [1] * (out.dim() - 1) for t in (x, grid)]
    met = unfixed(labels, shapes, batch, "sampled at places whose number is fixed")
    labels.put(out, labels.combine([*met, *rest]))


@register("torchvision.roi_align", "torchvision.roi_pool")
def _regions(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Any) -> None:
    """Regions of images: [N, C, H, W] -> [R, C, h, w]"""
    labels.lock_all([args[1]], "the regions of images")
    fields = [labels.mix(f, (0, 2, 3), "regions of the images") for f in labels.of(args[0])]
    result = out[0] if isinstance(out, (tuple, list)) else out
    labels.put(result, [f for f in fields if f is not None])


@register(
    "aten.mean", "aten.sum", "aten.amax", "aten.amin", "aten.max", "aten.min", "aten.var",
    "aten.std", "aten.var_mean", "aten.std_mean", "aten.linalg_vector_norm", "aten.norm",
    "aten.prod", "aten.any", "aten.all", "aten.argmax", "aten.argmin", "aten.logsumexp",
    "aten.softmax", "aten._softmax", "aten._log_softmax", "aten._safe_softmax", "aten.cumsum",
    "aten.cumprod", "aten.sort", "aten.topk", "aten.median", "aten.cummax", "aten.cummin",
    "aten.logcumsumexp", "aten.mode", "aten.kthvalue", "aten._fft_r2c", "aten._fft_c2c",
    "aten._fft_c2r",
)  # fmt: skip
def _reduce(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Any) -> None:
    """Positions along the reduced dims are mixed."""
    x = args[0]
    if len(args) > 1 and isinstance(args[1], Tensor):  # max(a, b)
        elementwise(labels, func, args, kwargs, out)
        return
    at = _DIM_LATER.get(func.overloadpacket.__name__, 1)
    dims = dims_of(args[at] if len(args) > at else kwargs.get("dim", _default_dim(func)), x.dim())
    outs = [t for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, Tensor)]
    name = str(func.overloadpacket)
    adds = _adds_up(labels, func.overloadpacket.__name__, args)
    mixed = [
        labels.rows(f, dims)
        if adds and _lacks_nothing(labels, x, f, dims)
        else labels.mix(f, dims, f"{name} over the channels")
        for f in labels.of(x)
    ]
    fields = labels.combine([f for f in mixed if f is not None])
    if outs[0].dim() < x.dim():
        fields = [f.reshape([s for d, s in enumerate(f.shape) if d not in dims]) for f in fields]
    for t in outs:
        labels.put(t, fields)


_DIM_LATER = {"linalg_vector_norm": 2, "norm": 2, "topk": 2, "kthvalue": 2}


@register("aten.linalg_cross")
def _cross(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
    """x, y, z of vectors along one dim make those of the result."""
    mixed = labels.combine(meet(labels, args[:2], out.dim()))
    dims = [kwargs.get("dim", -1) % out.dim()]
    left = [labels.mix(f, dims, "a cross product along the channels") for f in mixed]
    labels.put(out, [f for f in left if f is not None])


def _lacks_nothing(labels: Labels, x: Tensor, f: IntArray, dims: frozenset[int]) -> bool:
    """Whether ``x`` is zero where labels of its field ``f``, summed over ``dims``, are removed."""
    summed = varying(f) & dims
    alone = len(summed) == 1 and vanish.covers(labels, x, f, min(summed))
    return alone or labels.vanishes(x)


def _adds_up(labels: Labels, name: str, args: Sequence[Any]) -> bool:
    """Whether channels that are zero make no difference; a mean's divisor must be rewritable."""
    if name in ("linalg_vector_norm", "norm"):
        order = args[1] if len(args) > 1 else 2
        adds = order is None or (isinstance(order, (int, float)) and order >= 0)
    elif name in ("amax", "amin", "max", "min"):
        adds = labels.extremes
    else:
        adds = name == "sum" or (name == "mean" and labels.averages)
    return adds


def _default_dim(func: Any) -> Any:
    for a in func._schema.arguments:
        if a.name == "dim":
            return a.default_value if a.has_default_value() else None
    return None


# -- normalisation ----------------------------------------------------------------------------


def _shaped(labels: Labels, t: Tensor | None, shape: Sequence[int]) -> list[tuple[Tensor, Fields]]:
    return [] if t is None else [(t, [f.reshape(shape) for f in labels.of(t)])]


def meet_along(
    labels: Labels, x: Tensor, params: Sequence[Tensor | None], dim: int, out: Any
) -> None:
    """x meets 1-d parameters along ``dim``."""
    size = x.shape[dim]
    own = labels.of(x)
    result = out[0] if isinstance(out, (tuple, list)) else out
    if len(own) == 1 and varying(own[0]) == {dim} and all(labels.of(p) for p in params):
        for p in params:
            labels.union(own[0].ravel(), labels.of(p)[0].ravel())
        labels.put(result, own)
        return
    found = list(own)
    covered: frozenset[int] = frozenset().union(*(varying(f) for f in own))
    for p in params:
        for f in labels.of(p):
            g = f.reshape([size if d == dim else 1 for d in range(x.dim())])
            if dim not in covered:
                labels.lock(g, "normalises channels that are fixed")
            found.append(g)
        if p is not None and not labels.of(p):
            for f in own:
                labels.mix(f, [dim], "normalised with constants")
    labels.put(result, labels.combine(found))


@register(
    "aten.native_batch_norm", "aten._native_batch_norm_legit", "aten.cudnn_batch_norm",
    "aten._native_batch_norm_legit_no_training", "aten._batch_norm_no_update",
    "aten.miopen_batch_norm", "aten._batch_norm_with_update", "aten.batch_norm",
)  # fmt: skip
def _batch_norm(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Any) -> None:
    """With batch statistics, all positions but those along dim 1 are mixed."""
    x = args[0]
    names = [a.name for a in func._schema.arguments]
    training = bool(args[names.index("training")]) if "training" in names else False
    if training:
        others = [d for d in range(x.dim()) if d != 1]
        mixed = [labels.mix(f, others, "statistics over the channels") for f in labels.of(x)]
        labels.replace(x, [f for f in mixed if f is not None])
    meet_along(labels, x, [a for a in args[1:5] if isinstance(a, Tensor)], 1, out)


@register("aten.native_layer_norm", "aten.layer_norm", "aten._fused_rms_norm", "aten.rms_norm")
def _layer_norm(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Any) -> None:
    x, shape = args[0], args[1]
    result = out[0] if isinstance(out, (tuple, list)) else out
    params = [a for a in args[2:4] if isinstance(a, Tensor)]
    dims = range(x.dim() - len(shape), x.dim())
    if labels.opaque:
        for f in labels.of(x):
            labels.mix(f, dims, "normalised inside an opaque module")
    labels.put(result, meet(labels, [x, *params], x.dim()))


@register("aten.native_group_norm", "aten.group_norm")
def _group_norm(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Any) -> None:
    x, weight, bias = args[0], args[1], args[2]
    groups = args[6] if "native" in str(func.overloadpacket) else args[1]
    if labels.opaque:
        labels.lock_all([x], "normalised inside an opaque module")
    meet_along(labels, x, [weight, bias], 1, out)
    for f in labels.of(x):
        if 1 not in varying(f):
            continue
        flat = f if varying(f) == {1} else labels.merge(f, varying(f) - {1})
        block = flat.reshape(groups, -1)
        if groups > 1 and block.shape[1] > 1:
            labels.rows(block, [1])
