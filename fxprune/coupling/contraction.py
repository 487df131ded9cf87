"""Rules for products: matrix products, attention, convolutions. They also feed the cost model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fxprune.coupling import vanish
from fxprune.coupling.labels import (
    COLUMN,
    ROW,
    Contraction,
    Fields,
    Labels,
    align,
    rows_by,
    varying,
)
from fxprune.coupling.mixing import meet_along
from fxprune.coupling.rules import PRODUCTS, Rule, meet, register, unfixed
from fxprune.types import IntArray


def product(*names: str) -> Callable[[Rule], Rule]:
    """``register``, for ops that count multiply-adds also where nothing is labelled."""
    PRODUCTS.update(names)
    return register(*names)


def dim_labels(fields: Fields, dim: int) -> IntArray | None:
    """[P, Q] labels at each position along ``dim``; None where nothing varies."""
    found = [f for f in fields if dim in varying(f)]
    if not found:
        return None
    return rows_by(found[0], dim).T


def record(labels: Labels, const: int, dims: Sequence[tuple[int, IntArray | None]]) -> None:
    kept = []
    for size, labelled in dims:
        if labelled is None:
            const *= size
        else:
            kept += _sides(labels, labelled)
    labels.facts.contractions.append(Contraction(const, tuple(kept)))


ADDED = "sums products of channels of which none is zero"


def _sides(labels: Labels, labelled: IntArray) -> list[IntArray]:
    """[P, Q] labels of one dim; of one that is a whole product, those of its sides."""
    pair = labels.made_of(labelled)
    if pair is None or labelled.shape[1] > 1:
        return [labelled]
    if not np.array_equal(labelled.ravel(), pair.made.ravel()):
        return [labelled]
    return [x for f in (pair.a, pair.b) for x in _sides(labels, f.reshape(-1, 1))]


def contract(
    labels: Labels,
    x: Fields,
    y: Fields,
    shapes: Sequence[Sequence[int]],
    dim: int,
    zero: Sequence[Tensor],
) -> Fields:
    """Aligned fields of two operands through a product summed over ``dim`` (kept, size 1).

    zero: the operands, at least one of which must be zero where labels are removed
    """
    reason = "multiplied with a tensor whose channels are fixed"
    fields = unfixed(labels, shapes, [x, y], reason)
    along = [f for f in fields if dim in varying(f)]
    for f in along:  # whose labels are those of the others that vary as it does
        equal = [g for g in along if varying(g) == varying(f)]
        if not any(vanish.covers(labels, t, g, dim) for t in zero for g in equal):
            labels.lock(f, ADDED)
    for i, f in enumerate(along):
        for g in along[:i]:
            labels.relate(g, f)
    left = [labels.rows(f, [dim]) for f in fields]
    return labels.combine([f for f in left if f is not None])


def _matmul(labels: Labels, x: Tensor, y: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """[*, M, K] @ [*, K, N] with equal leading dims."""
    at = x.dim() - 1
    fx = [np.expand_dims(f, at + 1) for f in labels.of(x)]
    fy = [np.expand_dims(f, at - 1) for f in labels.of(y)]
    shapes = [[*x.shape, 1], [*y.shape[:-2], 1, *y.shape[-2:]]]
    fields = [np.squeeze(f, at) for f in contract(labels, fx, fy, shapes, at, (x, y))]
    sizes = [(s, dim_labels(fields, d)) for d, s in enumerate(out.shape)]
    inner = dim_labels(labels.of(x), at)
    record(labels, 1, [*sizes, (x.shape[-1], inner)])
    if bias is not None:
        labels.put(out, fields)
        fields = meet(labels, [out, bias], out.dim())
        labels.clear(out)
    labels.put(out, fields)


@product("aten.mm", "aten.bmm")
def _mm(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
    _matmul(labels, args[0], args[1], out)


@product("aten.addmm", "aten.baddbmm")
def _addmm(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
    _matmul(labels, args[1], args[2], out, args[0])


@product(
    "aten._scaled_dot_product_flash_attention_for_cpu", "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_efficient_attention", "aten._scaled_dot_product_cudnn_attention",
    "aten._scaled_dot_product_fused_attention_overrideable",
)  # fmt: skip
def _attention(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Any) -> None:
    q, k, v = args[0], args[1], args[2]
    result = out[0]
    n = q.dim()  # [*, L, D] x [*, S, D] -> [*, L, S]
    fq = [np.expand_dims(f, n - 1) for f in labels.of(q)]
    fk = [np.expand_dims(f, n - 2) for f in labels.of(k)]
    shapes = [
        [*q.shape[:-1], 1, q.shape[-1]],
        [*k.shape[:-2], 1, *k.shape[-2:]],
    ]
    scores = [np.squeeze(f, n) for f in contract(labels, fq, fk, shapes, n, (q, k))]
    scores = [
        f
        for f in (labels.mix(f, [n - 1], "softmax over the channels") for f in scores)
        if f is not None
    ]
    fs = [np.expand_dims(f, n) for f in scores]
    fv = [np.expand_dims(f, n - 2) for f in labels.of(v)]
    shapes = [[*q.shape[:-1], k.shape[-2], 1], [*v.shape[:-2], 1, *v.shape[-2:]]]
    fields = [np.squeeze(f, n - 1) for f in contract(labels, fs, fv, shapes, n - 1, (v,))]
    lead = [(s, dim_labels(fields, d)) for d, s in enumerate(q.shape[:-1])]
    record(labels, k.shape[-2], [*lead, (q.shape[-1], dim_labels(labels.of(q), n - 1))])
    record(labels, k.shape[-2], [*lead, (v.shape[-1], dim_labels(labels.of(v), n - 1))])
    if kwargs.get("attn_mask") is not None:
        _masked(labels, kwargs["attn_mask"], scores)
    labels.put(result, fields)


def _masked(labels: Labels, mask: Tensor, scores: Fields) -> None:
    """A mask that broadcasts against the scores [*, L, S]: where it has extent, it holds them."""
    fields = [align(f, scores[0].ndim) for f in labels.of(mask)] if scores else labels.of(mask)
    scored: frozenset[int] = frozenset().union(*(varying(g) for g in scores))
    for f in fields:
        for g in scores:
            labels.relate(f, g)
        if not varying(f) <= scored:  # positions that the scores have anyway
            labels.lock(f, "masks attention whose channels are fixed")
    covered: frozenset[int] = frozenset().union(*(varying(f) for f in fields))
    for g in scores:
        shape = (1,) * (g.ndim - mask.dim()) + tuple(mask.shape)
        bare = {d for d, size in enumerate(shape) if size > 1 and d not in covered}
        labels.mix(g, bare, "masked by a tensor whose channels are fixed")


@product("aten.convolution")
def _convolution(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
    x, w, bias, transposed, groups = args[0], args[1], args[2], args[6], args[8]
    if labels.opaque and groups > 1:
        labels.lock_all([x, w], "grouped convolution inside an opaque module")
    spanned = _spanned(labels, args)
    for f in labels.of(w):
        if varying(f) - {0, 1} and not any(varying(f) == {d} for d in spanned):
            labels.lock(f, "kernel position")
    inputs, kept = _conv_input(labels, x, _pointwise(args), frozenset(spanned))
    added = inputs is not None and inputs.size > groups  # else each output reads one channel
    summed = [*spanned.values(), *([inputs] if inputs is not None and added else [])]
    if not (labels.vanishes(w) or labels.vanishes(x)):
        for f in summed:
            labels.lock(f, ADDED)
    w0, w1, *taps = (_flat(labels, w, d) for d in range(w.dim()))
    for d, f in spanned.items():
        _meet_flat(labels, f, taps[d - 2], _FIXED)
    outputs = (_transposed if transposed else _forward)(labels, inputs, w0, w1, w, groups)
    own = [w0, w1, *(spanned.get(d + 2) for d in range(len(taps)))]
    sides = [(w.shape[d], None if f is None else f[:, None]) for d, f in enumerate(own)]
    at = x.shape if transposed else out.shape
    sides += [(s, dim_labels(kept, d)) for d, s in enumerate(at) if d != 1]
    record(labels, 1, sides)
    fields = list(kept)
    if outputs is not None:
        fields.append(outputs.reshape([-1 if d == 1 else 1 for d in range(out.dim())]))
    if bias is not None:
        labels.put(out, fields)
        meet_along(labels, out, [bias], 1, out)
    else:
        labels.put(out, fields)


def _flat(labels: Labels, t: Tensor, dim: int) -> IntArray | None:
    """[size] labels along one dim of a weight; labels that vary jointly are merged."""
    for f in labels.of(t):
        if dim in varying(f):
            others = varying(f) - {dim}
            return (labels.merge(f, others) if others else f).ravel()
    return None


def _steps(args: Sequence[Any], *at: int) -> Iterator[tuple[int, ...]]:
    """(kernel size, numbers of the arguments ``at``) of each spatial dim of a convolution."""
    n = args[1].dim() - 2
    steps = [args[i] * n if len(args[i]) == 1 else args[i] for i in at]
    return zip(args[1].shape[2:], *steps, strict=True)


def _pointwise(args: Sequence[Any]) -> frozenset[int]:
    """The dims along which a convolution takes each position for itself, and the batch."""
    plain = [step == (1, 1, 0, 0) for step in _steps(args, 3, 4, 7)]
    return frozenset([0, *(d + 2 for d, one in enumerate(plain) if one)])


def _spanned(labels: Labels, args: Sequence[Any]) -> dict[int, IntArray]:
    """Dims of which a convolution takes all positions at once, as it does of channels: labels.

    A kernel over words [N, 1, L, E] is as wide as their embedding, and moves along L alone.
    """
    x, transposed = args[0], args[6]
    found: dict[int, IntArray] = {}
    for d, (size, padding, dilation) in enumerate(_steps(args, 4, 5), 2):
        whole = not transposed and (size, padding, dilation) == (x.shape[d], 0, 1)
        fields = [f for f in labels.of(x) if varying(f) == {d}]
        if whole and len(fields) == 1:
            found[d] = fields[0].ravel()
    return found


def _conv_input(
    labels: Labels, x: Tensor, pointwise: frozenset[int], spanned: frozenset[int]
) -> tuple[IntArray | None, Fields]:
    """([C] channel labels or None, fields along dims that are not mixed)."""
    channel: IntArray | None = None
    kept: Fields = []
    mixed = frozenset(range(x.dim())) - pointwise
    for f in labels.of(x):
        if len(varying(f)) == 1 and varying(f) <= spanned:
            continue
        if 1 in varying(f):
            others = varying(f) - {1}
            channel = (labels.merge(f, others) if others else f).ravel()
        else:
            g = labels.mix(f, mixed, "convolution along the channels")
            if g is not None:
                kept.append(g)
    return channel, kept


def _meet_flat(labels: Labels, a: IntArray | None, b: IntArray | None, why: str) -> None:
    """Two label vectors of one dim meet; one that meets nothing is locked."""
    if a is not None and b is not None:
        labels.union(a, b)
    else:
        for f in (a, b):
            if f is not None:
                labels.lock(f, why)


_FIXED = "convolves channels that are fixed (model input or constant)"


def _forward(
    labels: Labels,
    x: IntArray | None,
    w0: IntArray | None,
    w1: IntArray | None,
    w: Tensor,
    groups: int,
) -> IntArray | None:
    """w [O, C/groups, *]: output labels [O]."""
    if groups > 1 and all(f is None or _repeats(f, groups) for f in (x, w0)):
        x, groups = None if x is None else x[: len(x) // groups], 1  # the samples are the groups
    if groups == 1:
        if w.shape[1] > 1:
            _meet_flat(labels, x, w1, _FIXED)
        return w0
    rows = _group_rows(labels, x, groups)
    if rows is None or x is None or (w1 is None and w.shape[1] > 1):
        _meet_flat(labels, x, None, _FIXED)
        _meet_flat(labels, None, w1, _FIXED)
    elif w1 is not None:
        labels.parent(w1[None], x.reshape(groups, -1), COLUMN)
    if w0 is None:
        if rows is not None:
            labels.lock(rows, _FIXED)
        return None
    block = w0.reshape(groups, -1)
    labels.rect(block, 1)
    if rows is None:
        labels.lock(block, "grouped convolution of fixed channels")
    elif block.shape[1] == 1:
        labels.union(rows, block)
    else:
        labels.parent(rows, block, ROW)
    return w0


def _repeats(f: IntArray, times: int) -> bool:
    """Whether a label vector is one that comes ``times`` times."""
    block = f.reshape(times, -1)
    return bool((block == block[:1]).all())


def _group_rows(labels: Labels, x: IntArray | None, groups: int) -> IntArray | None:
    """[groups, 1]: a label for each convolution group."""
    if x is None:
        return None
    block = x.reshape(groups, -1)
    return block if block.shape[1] == 1 else labels.rows(block, [1])


def _transposed(
    labels: Labels,
    x: IntArray | None,
    w0: IntArray | None,
    w1: IntArray | None,
    w: Tensor,
    groups: int,
) -> IntArray | None:
    """w [C, O/groups, *]: output labels [O]."""
    if w.shape[0] > 1:
        _meet_flat(labels, x, w0, _FIXED)
    if groups == 1:
        return w1
    rows = _group_rows(labels, x, groups)
    made = labels.new(groups * w.shape[1]).reshape(groups, -1)
    labels.rect(made, 1)
    if rows is None:
        labels.lock(made, _FIXED)
        _meet_flat(labels, None, w1, _FIXED)
        return made.ravel()
    if w.shape[1] == 1:
        labels.union(rows, made)
    elif w1 is not None:
        labels.parent(rows, made, ROW)
        labels.parent(w1[None], made, COLUMN)
    else:
        labels.lock(made, _FIXED)
    return made.ravel()
