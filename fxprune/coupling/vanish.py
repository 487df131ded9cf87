"""Which tensors are zero wherever their labels are removed.

A sum over channels, in which every removed channel is zero, is the sum over those that stay. So it
matters whether a tensor *vanishes*: with the parameters of a removed label set to zero, the tensor
is zero at the positions of that label. Parameters do by definition; a convolution's output does
with its weight and bias; relu keeps it, sigmoid does not.

``vanishes`` answers it for the result of one op. What is not known to vanish does not.

A norm of each head with one weight for all heads is zero in the columns that are removed, and not
in the heads that are: such a tensor is *zeroed* by the weight's labels. A sum over columns asks no
more than that. So is a layer of labelled tokens by its outputs, since a bias is no token's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fxprune.coupling.labels import Labels, align, varying
from fxprune.types import IntArray

Dims = set[frozenset[int]]  # the varying dims of each field of a tensor
Check = Callable[[Labels, Any, Sequence[Any], dict[str, Any], Tensor], bool]

# f(0) = 0 for each element
_UNARY = frozenset((
    "relu", "relu6", "gelu", "silu", "mish", "tanh", "abs", "neg", "sqrt", "square", "leaky_relu",
    "elu", "celu", "selu", "hardswish", "erf", "sin", "tan", "asin", "atan", "sinh", "asinh",
    "sign", "round", "floor", "ceil", "trunc", "clone", "alias", "detach", "contiguous",
    "lift_fresh", "_to_copy", "dropout", "native_dropout", "expm1", "special_expm1", "log1p",
    "nan_to_num", "hardshrink", "softshrink", "prelu", "_prelu_kernel", "real", "positive",
    "rad2deg", "deg2rad", "zeros_like", "_conj", "conj", "_conj_physical", "conj_physical",
    "resolve_conj",
))  # fmt: skip
# linear in the positions along dims that carry no labels, or the same values elsewhere
_MOVING = frozenset((
    "view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "unsqueeze", "flatten",
    "unflatten", "_reshape_copy", "view_copy", "permute", "transpose", "t", "movedim", "numpy_T",
    "repeat", "select", "slice", "split", "split_with_sizes", "unsafe_split", "chunk",
    "unsafe_chunk", "unbind", "flip", "roll", "view_as_real", "view_as_complex", "tril", "triu",
    "unfold", "im2col", "pixel_shuffle", "pixel_unshuffle", "native_channel_shuffle",
    "channel_shuffle", "index", "index_select", "sum", "mean", "amax", "amin", "linalg_vector_norm",
    "norm", "avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d",
    "max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d",
    "mkldnn_max_pool2d", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
    "upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d",
    "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d",
    "replication_pad2d", "replication_pad3d", "embedding", "fill", "zero", "gather", "col2im",
    "_pad_circular", "rot90", "diagonal", "max_unpool2d", "max_unpool3d",
    "grid_sampler_2d", "grid_sampler_3d", "_fft_r2c", "_fft_c2c",
    "_fft_c2r", "cumsum", "cummax", "cummin", "sort", "topk", "roi_align", "roi_pool",
    "_pack_padded_sequence", "_embedding_bag", "_embedding_bag_forward_only",
))  # fmt: skip

_KEEPING = _UNARY | _MOVING


def note(labels: Labels, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """After an op: remember which of its results vanish, and forget what it has written over."""
    name, mutable = _form(func)
    results = [t for t in (out if isinstance(out, (tuple, list)) else [out]) if labels.of(t)]
    known = _known(labels, func, name, args, kwargs, results)
    if mutable and args and isinstance(args[0], Tensor):
        if not known:
            labels.overwritten(args[0])
        return
    for t in results:
        if not t.is_floating_point() and not t.is_complex():
            continue  # positions of maxima are not zero where the values are
        if known:
            labels.vanish(t)
        elif (by := _zeroed_by(labels, func, name, args, t)) is not None:
            labels.zero(t, by)


def covers(labels: Labels, t: Tensor, f: IntArray, dim: int) -> bool:
    """Whether a sum of ``t`` over ``dim`` lacks nothing when labels of its field ``f`` are removed.

    Where columns alone are zero, ``dim`` must be the columns and no more: rows stay or go whole.
    """
    if labels.vanishes(t):
        return True
    by = labels.zeroed(t)
    if by is None:
        return False
    along = [side for side in labels.sides(f) if dim in varying(side)]  # of pairs: rows go whole
    if all(bool(np.isin(side, by).all()) for side in along):
        return True
    if len(by) != f.shape[dim]:
        return False
    return bool(np.isin(f, labels.children(by)).all())


def _zeroed_by(
    labels: Labels, func: Any, name: str, args: Sequence[Any], out: Tensor
) -> IntArray | None:
    if name in _NORMS:
        weight = args[_NORMS[name]] if len(args) > _NORMS[name] else None
        bias = args[_NORMS[name] + 1] if len(args) > _NORMS[name] + 1 else None
        if not isinstance(weight, Tensor) or not labels.vanishes(weight):
            return None
        if isinstance(bias, Tensor) and not labels.vanishes(bias):
            return None
        return np.concatenate([f.ravel() for f in labels.of(weight)]) if labels.of(weight) else None
    if name in ("mm", "bmm", "addmm", "baddbmm"):
        known = _of_product(labels, args, out)
        own = [f.ravel() for f in labels.of(out) if varying(f) in known]
        return np.concatenate(own) if own else None
    if name in _KEEPING or name == "expand":
        return _zero_by(labels, args[0]) if args else None
    if name == "div":  # 0 / y, where y itself is not zero
        return _zero_by(labels, args[0]) if _zero_by(labels, args[1]) is None else None
    if name == "mul":
        found = [by for t in args[:2] if (by := _zero_by(labels, t)) is not None]
        return np.concatenate(found) if found else None
    if name in ("add", "sub", "cat"):
        return _zeroed_by_all(labels, args[0] if name == "cat" else args[:2], out)
    return None


def _zero_by(labels: Labels, t: Any) -> IntArray | None:
    """The labels by which a tensor is zero: all of its own, or those that are known."""
    if not isinstance(t, Tensor) or not labels.vanishes(t):
        return labels.zeroed(t) if isinstance(t, Tensor) else None
    own = [f.ravel() for f in labels.of(t)]
    return np.concatenate(own) if own else None


def _zero_along(labels: Labels, t: Tensor, dims: frozenset[int], ndim: int) -> bool:
    mine = [g for g in labels.of(t) if varying(align(g, ndim)) == dims]
    by = labels.zeroed(t)
    known = by is not None and any(bool(np.isin(g, by).all()) for g in mine)
    return bool(mine) and (labels.vanishes(t) or known)


def _zeroed_by_all(labels: Labels, parts: Sequence[Any], out: Tensor) -> IntArray | None:
    """Of a sum: by the labels of a field along which every part is zero, or by coarser ones."""
    if not all(isinstance(t, Tensor) for t in parts):
        return None
    own = [
        f.ravel()
        for f in labels.of(out)
        if all(_zero_along(labels, t, varying(f), out.dim()) for t in parts)
    ]
    if own:
        return np.concatenate(own)
    found = [labels.zeroed(t) for t in parts if not labels.vanishes(t)]
    if not found or any(by is None for by in found):
        return None
    return functools.reduce(np.intersect1d, [by for by in found if by is not None])


@functools.cache
def _form(func: Any) -> tuple[str, bool]:
    """(name, whether it writes to its arguments)"""
    return func.overloadpacket.__name__, bool(func._schema.is_mutable)


def _known(
    labels: Labels, func: Any, name: str, args: Sequence[Any], kwargs: Any, results: Sequence[Any]
) -> bool:
    plain = name[:-1] if name.endswith("_") and not name.startswith("__") else name
    check = _CHECKS.get(plain)
    if check is not None:
        return bool(results) and check(labels, func, args, kwargs, results[0])
    if plain in ("zero", "zeros_like") or (plain == "fill" and args[1] == 0):
        return True
    if plain == "fill" or not args or not isinstance(args[0], Tensor):
        return False
    return plain in _KEEPING and labels.vanishes(args[0])


def _fields(labels: Labels, t: Any, ndim: int) -> Dims:
    """The varying dims of the fields of a tensor that vanishes, aligned; else nothing."""
    if not isinstance(t, Tensor) or not labels.vanishes(t):
        return set()
    return {varying(align(f, ndim)) for f in labels.of(t)}


def _cover(found: Dims, wanted: Dims) -> bool:
    """Whether each wanted field is among ``found``, or spanned by two of them.

    Of a block with a label for each row and each column, a position goes with one of these.
    """
    return all(w in found or any(v < w and (w - v) in found for v in found) for w in wanted)


def _wanted(labels: Labels, out: Tensor) -> Dims:
    return {varying(f) for f in labels.of(out)}


def _by_any(labels: Labels, out: Tensor, operands: Iterable[Any]) -> bool:
    """A product of its operands: zero where one of them is."""
    found: Dims = set()
    for t in operands:
        found |= _fields(labels, t, out.dim())
    return _cover(found, _wanted(labels, out))


def _by_all(labels: Labels, out: Tensor, operands: Iterable[Any]) -> bool:
    """A sum of its operands: zero where all of them are. Numbers must be zero."""
    wanted = _wanted(labels, out)
    return all(
        _cover(_fields(labels, t, out.dim()), wanted) if isinstance(t, Tensor) else t == 0
        for t in operands
    )


def _multiply(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> bool:
    nothing = any(not isinstance(t, Tensor) and t == 0 for t in args[:2])
    return nothing or _by_any(labels, out, args[:2])


def _divide(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> bool:
    """0 / y, where y itself does not vanish."""
    below = _fields(labels, args[1], out.dim())
    if any(_cover(below, {w}) for w in _wanted(labels, out)):
        return False
    return _by_any(labels, out, args[:1])


def _add(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> bool:
    return _by_all(labels, out, args[:2])


def _extreme(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> bool:
    """max(x, y) of two tensors, or max(x, dim)."""
    pair = len(args) > 1 and isinstance(args[1], Tensor)
    return _by_all(labels, out, args[:2]) if pair else labels.vanishes(args[0])


def _power(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> bool:
    return isinstance(args[1], (int, float)) and args[1] > 0 and _by_any(labels, out, args[:1])


def _clamp(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> bool:
    """Limits on either side of zero: clamp, hardtanh."""
    low = args[1] if len(args) > 1 else kwargs.get("min", kwargs.get("min_val"))
    high = args[2] if len(args) > 2 else kwargs.get("max", kwargs.get("max_val"))
    numbers = all(v is None or isinstance(v, (int, float)) for v in (low, high))
    if func.overloadpacket.__name__.startswith("hardtanh"):
        low, high = -1 if low is None else low, 1 if high is None else high
    spans = numbers and (low is None or low <= 0) and (high is None or high >= 0)
    return spans and _by_any(labels, out, args[:1])


def _where(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> bool:
    return len(args) == 3 and _by_all(labels, out, args[1:3])


def _filled(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> bool:
    """masked_fill(x, mask, value)"""
    value = args[2]
    return not isinstance(value, Tensor) and value == 0 and _by_any(labels, out, args[:1])


def _pad(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> bool:
    value = args[2] if len(args) > 2 else kwargs.get("value", 0)
    return not value and _by_any(labels, out, args[:1])


def _expand(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> bool:
    return _by_any(labels, out, args[:1])


@functools.lru_cache(maxsize=4096)
def _around(shape: tuple[int, ...], dim: int) -> frozenset[int]:
    """The dims other than ``dim`` along which a field varies."""
    return frozenset(d for d, size in enumerate(shape) if size > 1 and d != dim)


def _joined(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> bool:
    """cat, stack: parts without labels are fixed along the joined dim."""
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
    stacked = func.overloadpacket.__name__ == "stack"
    parts = [t for t in args[0] if t.dim() == out.dim() - stacked]
    for f in labels.of(out):
        across = varying(f) - {dim}
        for t in parts:
            fields = labels.of(t)
            if len(fields) == 1 and not stacked and _around(fields[0].shape, dim) == across:
                if labels.vanishes(t):
                    continue
                return False
            own = [varying(g) for g in fields]
            if stacked:
                own = [frozenset(d + (d >= dim) for d in v) for v in own]
            if not own and dim in varying(f):
                continue
            if not labels.vanishes(t) or not any(v - {dim} == across for v in own):
                return False
    return True


def _contracted(labels: Labels, t: Tensor, dim: int, ndim: int) -> Dims:
    """Fields of an operand by which it is zero, once ``dim`` is summed; dims of the result."""
    fields = labels.of(t)
    if not labels.vanishes(t):
        by = labels.zeroed(t)
        fields = [] if by is None else [f for f in fields if bool(np.isin(f, by).all())]
    return {varying(f) - {dim % ndim} for f in fields}


def _placed(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> bool:
    """scatter, index_add and the like: what is there, and what is put in its place."""
    given = [a for a in (args[0], *args[3:4], *_values(kwargs)) if a is not None]
    return all(labels.vanishes(t) if isinstance(t, Tensor) else t == 0 for t in given)


def _index_put(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> bool:
    return labels.vanishes(args[0]) and labels.vanishes(args[2])


def _values(kwargs: dict[str, Any]) -> list[Any]:
    return [kwargs[k] for k in ("src", "value", "source") if k in kwargs]


def _vector(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> bool:
    x = args[0]
    return _wanted(labels, out) <= _contracted(labels, x, x.dim() - 1, x.dim())


def _grouped(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> bool:
    """[T, K] times one of [E, K, N]"""
    found = _contracted(labels, args[0], 1, 2)
    if labels.vanishes(args[1]):
        found |= {frozenset([1])}
    return _wanted(labels, out) <= found


def _sampled(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> bool:
    return labels.vanishes(args[1]) and labels.vanishes(args[4])


def _matmul(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> bool:
    """mm, bmm [*, M, K] @ [*, K, N]; addmm, baddbmm with a bias before them."""
    return _wanted(labels, out) <= _of_product(labels, args, out)


def _of_product(labels: Labels, args: Sequence[Any], out: Tensor) -> Dims:
    """The varying dims of the fields by which a matrix product, with its bias, is zero."""
    bias = None if len(args) == 2 else args[0]
    x, y = args[-2:]
    n = out.dim()
    found = _contracted(labels, x, n - 1, n) | _contracted(labels, y, n - 2, n)
    return found if bias is None else found & _fields(labels, bias, n)


def _attention(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> bool:
    v = args[2]
    return _wanted(labels, out) <= _contracted(labels, v, v.dim() - 2, v.dim())


def _convolution(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> bool:
    w, bias = args[1], args[2]
    return (
        _wanted(labels, out) <= {frozenset([1])}
        and labels.vanishes(w)
        and (bias is None or labels.vanishes(bias))
    )


def _affine(at: int, needs_bias: bool, along: int | None) -> Check:
    """A norm ends in x * weight + bias; both lie along ``along``, or along the last dims."""

    def check(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> bool:
        given = [args[at + i] if len(args) > at + i else None for i in range(1 + needs_bias)]
        weight, *bias = given
        if weight is None or any(b is not None and not labels.vanishes(b) for b in bias):
            return False
        if along is None:
            return _by_any(labels, out, [weight])
        return labels.vanishes(weight) and _wanted(labels, out) <= {frozenset([along])}

    return check


def _scaled(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> bool:
    """A root mean square norm: zeros stay."""
    return _by_any(labels, out, [args[0], *args[2:3]])


_NORMS = {"native_layer_norm": 2, "layer_norm": 2}  # name -> position of the weight

_CHECKS: dict[str, Check] = {
    "mul": _multiply,
    "multiply": _multiply,
    "div": _divide,
    "add": _add,
    "sub": _add,
    "maximum": _add,
    "minimum": _add,
    "max": _extreme,
    "min": _extreme,
    "pow": _power,
    "clamp": _clamp,
    "hardtanh": _clamp,
    "clamp_min": _clamp,
    "where": _where,
    "masked_fill": _filled,
    "constant_pad_nd": _pad,
    "expand": _expand,
    "cat": _joined,
    "concat": _joined,
    "stack": _joined,
    "scatter": _placed,
    "scatter_add": _placed,
    "index_add": _placed,
    "index_copy": _placed,
    "index_put": _index_put,
    "_index_put_impl": _index_put,
    "linalg_cross": _multiply,
    "mv": _vector,
    "dot": _vector,
    "_grouped_mm": _grouped,
    "deform_conv2d": _sampled,
    "mm": _matmul,
    "bmm": _matmul,
    "addmm": _matmul,
    "baddbmm": _matmul,
    "convolution": _convolution,
    "native_layer_norm": _affine(2, True, None),
    "layer_norm": _affine(2, True, None),
    "rms_norm": _scaled,
    "_fused_rms_norm": _scaled,
    "native_group_norm": _affine(1, True, 1),
    "group_norm": _affine(2, True, 1),
    "native_batch_norm": _affine(1, True, 1),
    "cudnn_batch_norm": _affine(1, True, 1),
    "_native_batch_norm_legit": _affine(1, True, 1),
    "batch_norm": _affine(1, True, 1),
    "_native_batch_norm_legit_no_training": _affine(1, True, 1),
    "_batch_norm_no_update": _affine(1, True, 1),
    "miopen_batch_norm": _affine(1, True, 1),
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention": _attention,
    "_scaled_dot_product_efficient_attention": _attention,
    "_scaled_dot_product_cudnn_attention": _attention,
}
