"""Rules for ops that move data: the same movement on the labels.

A reshape leaves dims alone that carry no labels, so that token and pixel grids are never copied.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxprune.coupling.labels import Fields, Labels, align, squeezed, varying
from fxprune.coupling.rules import dims_of, register, unfixed
from fxprune.types import IntArray


def _blocks(a: Sequence[int], b: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Smallest runs of dims of ``a`` and ``b`` with equal products."""
    blocks: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(a) or j < len(b):
        left, right = ([i], [j]) if i < len(a) and j < len(b) else ([], [])
        if not left:
            blocks.append((list(range(i, len(a))), list(range(j, len(b)))))
            break
        p, q = a[i], b[j]
        i, j = i + 1, j + 1
        while p != q:
            if p < q:
                p, left, i = p * a[i], [*left, i], i + 1
            else:
                q, right, j = q * b[j], [*right, j], j + 1
        blocks.append((left, right))
    return blocks


def reshaped(labels: Labels, f: IntArray, old: Sequence[int], new: Sequence[int]) -> IntArray:
    """A field through a reshape from ``old`` to ``new``, without touching dims it does not need."""
    grown, shape = list(f.shape), [1] * len(new)
    split: list[list[int]] = []
    for left, right in _blocks(old, new):
        moved = [d for d in left if f.shape[d] > 1]
        if not moved:
            continue
        for d in left:
            grown[d] = old[d]
        for d in right:
            shape[d] = new[d]
        if len(moved) > 1 and labels.made_of(f) is None:
            labels.rect(f, moved[-1])
        if len(right) > 1:
            split.append(right)
    g = np.broadcast_to(f, grown).reshape(shape)
    for right in split:
        g = squeezed(g, right)
        moved = [d for d in right if g.shape[d] > 1]
        if len(moved) > 1 and labels.made_of(g) is None:
            labels.rect(g, moved[-1])
    return g


@register(
    "aten.view", "aten._unsafe_view", "aten.reshape", "aten._reshape_alias", "aten.squeeze",
    "aten.unsqueeze", "aten.flatten", "aten.unflatten", "aten._reshape_copy", "aten.view_copy",
)  # fmt: skip
def _reshape(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
    x = args[0]
    fields = []
    for f in _joined_by_reshape(labels, labels.of(x), x.shape, out.shape):
        g = reshaped(labels, f, x.shape, out.shape)
        if labels.opaque and [s for s in g.shape if s > 1] != [s for s in f.shape if s > 1]:
            labels.lock(f, "reshaped inside an opaque module")
        fields += labels.factors(g)
    labels.put(out, fields)


def _joined_by_reshape(
    labels: Labels, fields: Fields, old: Sequence[int], new: Sequence[int]
) -> Fields:
    """Fields on different dims that a reshape flattens into one become one field of products."""
    fields = list(fields)
    for left, _ in _blocks(old, new):
        inside = [f for f in fields if varying(f) & set(left)]
        if len({varying(f) & set(left) for f in inside}) < 2:
            continue  # each by itself
        fields = [f for f in fields if not varying(f) & set(left)]
        sides = [varying(f) for f in inside]
        if sum(len(v) for v in sides) > len(frozenset().union(*sides)):
            for f in inside:
                labels.lock(f, "two channel dims flattened into one")
            continue
        fields.append(functools.reduce(labels.product, inside))
    return fields


@register("aten.permute", "aten.transpose", "aten.t", "aten.movedim", "aten.numpy_T")
def _permute(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
    n = args[0].dim()
    order = list(range(n))
    name = str(func.overloadpacket)
    if name == "aten.permute":
        order = [d % n for d in args[1]]
    else:
        i, j = (args[1] % n, args[2] % n) if name == "aten.transpose" else (0, n - 1)
        order[i], order[j] = order[j], order[i]
    labels.put(out, [f.transpose(order) for f in labels.of(args[0])])


@register("aten.expand")
def _expand(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
    """Dims that grow from 1 take fresh labels: their extent follows whatever they meet."""
    x = args[0]
    fields = [align(f, out.dim()) for f in labels.of(x)]
    old = (1,) * (out.dim() - x.dim()) + tuple(x.shape)
    if labels.expands:
        grown = [d for d, s in enumerate(out.shape) if s > 1 and old[d] == 1]
        fields += [labels.along(out, d) for d in grown]
    labels.put(out, fields)


@register("aten.repeat")
def _repeat(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
    fields = []
    for f in labels.of(args[0]):
        g = align(f, out.dim())
        reps = [r if g.shape[d] > 1 else 1 for d, r in enumerate(args[1])]
        fields.append(np.tile(g, reps))
    labels.put(out, fields)


def _taken(labels: Labels, fields: Fields, dim: int, index: slice) -> Fields:
    """Fields indexed along one dim. A single position cannot be asked for and go: it is mixed."""
    taken: Fields = []
    for f in fields:
        g: IntArray | None = f
        if f.shape[dim] > 1:
            if labels.opaque:
                labels.lock(f, "indexed inside an opaque module")
            if labels.measured:
                labels.lock(f, "how many of them are taken follows from data")
            stepped = index.step not in (None, 1) and len(varying(f)) > 1
            if stepped or len(range(*index.indices(f.shape[dim]))) == 1:
                g = labels.mix(f, [dim], "indexed by number")
            else:
                labels.uniform(f, dim)
                g = f[(slice(None),) * dim + (index,)]
        if g is not None:
            taken.append(g)
    return taken


@register("aten.select")
def _select(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
    x, dim, i = args[0], args[1] % args[0].dim(), args[2] % args[0].shape[args[1]]
    taken = _taken(labels, labels.of(x), dim, slice(i, i + 1))
    labels.put(out, [f.squeeze(dim) for f in taken])


@register("aten.slice")
def _slice(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
    given: list[Any] = [*args, *[None, 0, None, None, 1][len(args) :]]
    x, dim, start, stop, step = given
    dim = dim % x.dim()
    if x.shape[dim] == out.shape[dim]:
        labels.put(out, list(labels.of(x)))
        return
    start = start or 0
    labels.put(out, _taken(labels, labels.of(x), dim, slice(start, stop, step)))
    if step != 1 and (along := [f for f in labels.of(x) if dim in varying(f)]):
        labels.stride(out, [*labels.strided(x), *along])


@register(
    "aten.split", "aten.split_with_sizes", "aten.unsafe_split", "aten.chunk", "aten.unsafe_chunk"
)
def _split(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Any) -> None:
    x = args[0]
    dim = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % x.dim()
    start = 0
    for part in out:
        stop = start + part.shape[dim]
        labels.put(part, _taken(labels, labels.of(x), dim, slice(start, stop)))
        start = stop


@register("aten.unbind")
def _unbind(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Any) -> None:
    dim = (args[1] if len(args) > 1 else 0) % args[0].dim()
    for i, part in enumerate(out):
        taken = _taken(labels, labels.of(args[0]), dim, slice(i, i + 1))
        labels.put(part, [f.squeeze(dim) for f in taken])


@register("aten.cat", "aten.concat")
def _cat(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
    parts = [t for t in args[0] if t.numel() > 0 and t.dim() == out.dim()]
    labels.put(out, joined(labels, parts, [labels.of(t) for t in parts], dim))


@register("aten.stack")
def _stack(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
    parts = list(args[0])
    fields = [[np.expand_dims(f, dim) for f in labels.of(t)] for t in parts]
    labels.put(out, joined(labels, [t.unsqueeze(dim) for t in parts], fields, dim))


def joined(labels: Labels, parts: Sequence[Tensor], fields: list[Fields], dim: int) -> Fields:
    """Fields of a concatenation: joined along ``dim``, related along all other dims."""
    along = any(dim in varying(f) for fs in fields for f in fs)
    if not along:
        shapes = [[1 if d == dim else s for d, s in enumerate(t.shape)] for t in parts]
        reason = "concatenated with a tensor whose channels are fixed"
        return labels.combine(unfixed(labels, shapes, fields, reason))
    around: Fields = []
    if all(varying(f) == {dim} for fs in fields for f in fs if dim in varying(f)):
        rest = [[f for f in fs if dim not in varying(f)] for fs in fields]
        fields = [[f for f in fs if dim in varying(f)] for fs in fields]
        if any(rest):
            around = joined(labels, parts, rest, dim)
    pieces = [_piece(labels, t, fs, dim) for t, fs in zip(parts, fields, strict=True)]
    shape = [max(p.shape[d] for p in pieces) for d in range(pieces[0].ndim)]
    if math.prod(shape) > shape[dim]:  # they vary along other dims too
        ends = shape[:dim], shape[dim + 1 :]
        pieces = [np.broadcast_to(p, (*ends[0], p.shape[dim], *ends[1])) for p in pieces]
    result = np.concatenate(pieces, axis=dim)
    labels.uniform(result, dim)
    for d in varying(result) - {dim}:  # the parts keep equal extents along all other dims
        labels.rect(result, d)
    return [result, *around]


def _piece(labels: Labels, t: Tensor, fields: Fields, dim: int) -> IntArray:
    """The field of one part along the concatenated dim; fixed labels where it has none."""
    if len(fields) == 1 and fields[0].shape[dim] > 1:
        return fields[0]
    own = [f for f in fields if dim in varying(f)]
    for f in fields:
        if f is not (own[0] if own else None):
            labels.lock(f, "concatenated across two channel dims")
    if own:
        return own[0]
    size = t.shape[dim]
    fixed = labels.new(size).reshape([size if d == dim else 1 for d in range(t.dim())])
    labels.lock(fixed, "concatenated with channels that are fixed")
    return fixed


@register("aten.glu")
def _glu(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
    """The halves of a dim meet."""
    x = args[0]
    dim = (args[1] if len(args) > 1 else -1) % x.dim()
    half = out.shape[dim]
    first = _taken(labels, labels.of(x), dim, slice(0, half))
    second = _taken(labels, labels.of(x), dim, slice(half, 2 * half))
    labels.put(out, labels.combine(first + second))


@register("aten.view_as_real")
def _view_as_real(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
    labels.put(out, [f[..., None] for f in labels.of(args[0])])


@register("aten.view_as_complex")
def _view_as_complex(
    labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor
) -> None:
    """The last dim holds real and imaginary parts: they stay together."""
    last = args[0].dim() - 1
    mixed = [labels.mix(f, [last], "real and imaginary parts") for f in labels.of(args[0])]
    labels.put(out, [f[..., 0] for f in mixed if f is not None])


@register("aten.tril", "aten.triu")
def _triangle(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
    dims = [out.dim() - 2, out.dim() - 1]
    mixed = [labels.mix(f, dims, "a triangle of the channels") for f in labels.of(args[0])]
    labels.put(out, [f for f in mixed if f is not None])


def _reordered(labels: Labels, fields: Fields, dim: int, order: IntArray) -> Fields:
    """Fields of a tensor indexed along one dim by constants; positions may come several times."""
    made = []
    for f in fields:
        if f.shape[dim] > 1:
            if len(order) == 1:
                g = labels.mix(f, [dim], "indexed by number")
                if g is not None:
                    made.append(g)
                continue
            labels.uniform(f, dim)
            f = np.take(f, order, axis=dim)
        made.append(f)
    return made


@register("aten.roll")
def _roll(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
    dims = dims_of(args[2] if len(args) > 2 else None, out.dim())
    if labels.literal and len(args) > 2 and args[2]:
        fields = list(labels.of(args[0]))
        for shift, d in zip(args[1], args[2], strict=True):
            order = np.roll(np.arange(out.shape[d]), shift)
            fields = _reordered(labels, fields, d % out.dim(), order)
        labels.put(out, fields)
        return
    mixed = [labels.mix(f, dims, "rolled along the channels") for f in labels.of(args[0])]
    labels.put(out, [f for f in mixed if f is not None])


@register("aten.flip")
def _flip(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
    fields = []
    for f in labels.of(args[0]):
        dims = dims_of(args[1], out.dim()) & varying(f)
        for d in dims:
            labels.uniform(f, d)
        fields.append(np.flip(f, tuple(dims)) if dims else f)
    labels.put(out, fields)


@register("aten.constant_pad_nd", "aten.pad", "aten._pad_circular")
def _pad(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
    """Zeros before and after the channels are channels too, which follow what they meet."""
    last = out.dim() - 1
    ends = {last - i // 2: args[1][i : i + 2] for i in range(0, len(args[1]), 2)}
    ends = {d: e for d, e in ends.items() if any(e)}
    zeros = labels.pads and "constant" in str(func) and not any(args[2:])
    fields = []
    for f in labels.of(args[0]):
        along = varying(f) & ends.keys()
        if zeros and len(varying(f)) == 1 and along and min(ends[min(along)]) >= 0:
            (dim,) = along
            shapes = [[n if d == dim else 1 for d in range(f.ndim)] for n in ends[dim]]
            before, after = (labels.new(ends[dim][i]).reshape(shapes[i]) for i in (0, 1))
            fields.append(np.concatenate([before, f, after], axis=dim))
        elif (g := labels.mix(f, ends, "padded along the channels")) is not None:
            fields.append(g)
    labels.put(out, fields)


@register("aten.index", "aten.index_select", "aten.embedding")
def _index(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
    x, name = args[0], str(func.overloadpacket)
    indices: list[Tensor | None]
    if name == "aten.embedding":
        indices = [args[1]]
    elif name == "aten.index_select":
        indices = [None] * (args[1] % x.dim()) + [args[2]]
    else:
        indices = list(args[1])
    hit = [d for d, i in enumerate(indices) if i is not None]
    labels.lock_all([i for i in indices if i is not None], "used as positions")
    if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices):
        labels.lock_all([x], "indexed by a mask")
        return
    width = max(i.dim() for i in indices if i is not None)
    adjacent = hit == list(range(hit[0], hit[-1] + 1))
    if labels.literal and len(hit) == 1 and width == 1:
        order = next(i for i in indices if i is not None).cpu().numpy()
        labels.put(out, _reordered(labels, labels.of(x), hit[0], order))
        return
    fields = []
    for f in labels.of(x):
        g = labels.mix(f, hit, "indexed along the channels")
        if g is not None:
            rest = [g.shape[d] for d in range(x.dim()) if d not in hit]
            at = hit[0] if adjacent else 0
            fields.append(g.reshape(rest[:at] + [1] * width + rest[at:]))
    labels.put(out, fields)


@register("aten._pack_padded_sequence", "aten._pad_packed_sequence")
def _packed(
    labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Sequence[Tensor]
) -> None:
    """[T, N, *] or [N, T, *] to the rows of a packed sequence [R, *], or back; * stay."""
    x, made = args[0], out[0]
    lead = 2 if str(func.overloadpacket) == "aten._pack_padded_sequence" else 1
    fields = [labels.mix(f, range(lead), "samples or time steps") for f in labels.of(x)]
    rows = made.dim() - (x.dim() - lead)
    labels.put(
        made, [f.reshape([1] * rows + list(f.shape[lead:])) for f in fields if f is not None]
    )


@register("aten._embedding_bag", "aten._embedding_bag_forward_only")
def _embedding_bag(
    labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Sequence[Tensor]
) -> None:
    """Sums, means or maxima of rows of args[0] [V, D]."""
    named = [t for t in [*args[1:], *kwargs.values()] if isinstance(t, Tensor)]
    labels.lock_all(named, "looks rows up")
    fields = [labels.mix(f, [0], "indexed along the channels") for f in labels.of(args[0])]
    labels.put(out[0], [f for f in fields if f is not None])


@register("aten.rot90")
def _rot90(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
    k = args[1] if len(args) > 1 else 1
    dims = args[2] if len(args) > 2 else (0, 1)
    i, j = sorted(d % out.dim() for d in dims)
    mixed = [labels.mix(f, [i, j], "rotated along the channels") for f in labels.of(args[0])]
    labels.put(out, [np.swapaxes(f, i, j) if k % 2 else f for f in mixed if f is not None])


@register("aten.diagonal")
def _diagonal(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
    """The diagonal of two dims becomes the last one."""
    x = args[0]
    at = (*args[2:4], *(kwargs.get("dim1", 0), kwargs.get("dim2", 1))[max(len(args) - 2, 0) :])
    dims = tuple(d % x.dim() for d in at)
    mixed = [labels.mix(f, dims, "a diagonal of the channels") for f in labels.of(x)]
    labels.put(out, [np.squeeze(f, dims)[..., None] for f in mixed if f is not None])
