"""Rules for ops that pick positions by a tensor of numbers: gather, scatter, index_add and so on.

Positions along the dim that is indexed (tokens, experts, images) are mixed; all others stay what
they are. So channels pass, as long as they are not what the numbers speak of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxprune.coupling.labels import Fields, Labels, align, varying
from fxprune.coupling.rules import register, unfixed, written
from fxprune.types import IntArray

_BY_NUMBER = "picked by number along the channels"


def _others(labels: Labels, t: Tensor, dim: int) -> Fields:
    """The fields of ``t`` that do not vary along ``dim``."""
    mixed = [labels.mix(f, [dim], _BY_NUMBER) for f in labels.of(t)]
    return [f for f in mixed if f is not None]


def _meet(labels: Labels, tensors: Sequence[Tensor], fields: list[Fields], dim: int) -> Fields:
    """Fields of tensors of which each position stands for itself along all dims but ``dim``."""
    shapes = [[1 if d == dim else s for d, s in enumerate(t.shape)] for t in tensors]
    for d in range(len(shapes[0])):
        if len({s[d] for s in shapes}) > 1:  # only the first ones are picked from
            for f in (f for own in fields for f in own if d in varying(f)):
                labels.lock(f, "only a part of the channels is picked from")
    return labels.combine(unfixed(labels, shapes, fields, "picked for channels that are fixed"))


@register("aten.gather")
def _gather(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
    """out[i, j, k] = x[i, index[i, j, k], k] for dim 1"""
    x, index = args[0], args[2]
    dim = args[1] % max(x.dim(), 1)
    along = [f for f in labels.of(index) if dim in varying(f)]
    rest = [f for f in labels.of(index) if dim not in varying(f)]
    met = _meet(labels, [x, index], [_others(labels, x, dim), rest], dim)
    labels.put(out, labels.combine([*met, *along]))


@register(
    "aten.scatter", "aten.scatter_", "aten.scatter_add", "aten.scatter_add_", "aten.scatter_reduce",
    "aten.scatter_reduce_",
)  # fmt: skip
def _scatter(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
    """out[i, index[i, j, k], k] = source[i, j, k] for dim 1, elsewhere x"""
    dim = args[1] % max(args[0].dim(), 1)
    _placed(labels, func, [args[0], *(t for t in args[2:4] if isinstance(t, Tensor))], dim, out)


@register(
    "aten.index_add", "aten.index_add_", "aten.index_copy", "aten.index_copy_",
    "aten.index_reduce", "aten.index_reduce_",
)  # fmt: skip
def _index_add(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
    """out[:, index[j]] = source[:, j] for dim 1, elsewhere x"""
    _placed(labels, func, [args[0], args[3]], args[1] % max(args[0].dim(), 1), out)


def _placed(labels: Labels, func: Any, tensors: list[Tensor], dim: int, out: Tensor) -> None:
    own = [f for f in labels.of(tensors[0]) if dim in varying(f)]
    fields = _meet(labels, tensors, [_others(labels, t, dim) for t in tensors], dim)
    if not func._schema.is_mutable:
        labels.put(out, fields)
        return
    for f in own:
        labels.lock(f, _BY_NUMBER)
    written(labels, tensors[0], fields)


@register("aten.index_put", "aten.index_put_", "aten._index_put_impl_")
def _index_put(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
    """x[:, i, j] = values, where i and j are tensors of numbers: neighbouring dims are indexed"""
    x, indices, values = args[0], args[1], args[2]
    hit = [d for d, i in enumerate(indices) if i is not None]
    width = max((i.dim() for i in indices if i is not None), default=0)
    masks = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)
    if masks or hit != list(range(hit[0], hit[-1] + 1)):
        labels.lock_all([x, values], "written to by a mask, or along several dims apart")
        return
    at, after = hit[0], x.dim() - hit[-1] - 1  # dims before those that are indexed, and after
    kept = [f for f in (labels.mix(f, hit, _BY_NUMBER) for f in labels.of(x)) if f is not None]
    picked = [_with_middle(f, at, after, width) for f in kept]
    spread = range(at, at + width)
    ndim = at + width + after
    given = [labels.mix(align(f, ndim), spread, _BY_NUMBER) for f in labels.of(values)]
    shape = [*x.shape[:at], *[1] * width, *x.shape[x.dim() - after :]]
    sizes = [1] * (ndim - values.dim()) + list(values.shape)
    sizes = [1 if d in spread else s for d, s in enumerate(sizes)]
    both = [picked, [g for g in given if g is not None]]
    met = labels.combine(unfixed(labels, [shape, sizes], both, _BY_NUMBER))
    fields = [_with_middle(f, at, after, len(hit)) for f in met]
    if func._schema.is_mutable:
        written(labels, x, fields)
    else:
        labels.put(out, fields)


def _with_middle(f: IntArray, at: int, after: int, width: int) -> IntArray:
    """``width`` dims of size 1 between the first ``at`` and the last ``after`` dims of a field."""
    return f.reshape(*f.shape[:at], *[1] * width, *f.shape[f.ndim - after :])
