"""What each family of ATen ops does to channel labels: one registration for each op.

A rule is ``rule(labels, func, args, kwargs, out)``, called after the op has run. An op without a
rule locks the labels of all its inputs: never guessed, never ignored.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fxprune.coupling.labels import Contraction, Fields, Labels, align, rows_by, varying
from fxprune.errors import InternalError
from fxprune.types import IntArray

Rule = Callable[[Labels, Any, Sequence[Any], dict[str, Any], Any], None]
RULES: dict[str, Rule] = {}


def register(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for ATen ops by name ("aten.view"); a second rule for one op is refused."""

    def add(rule: Rule) -> Rule:
        for name in names:
            if name in RULES:
                raise InternalError(f"op {name} has a rule already")
            RULES[name] = rule
        return rule

    return add


def apply_rule(labels: Labels, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """Carry labels over one executed op."""
    tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
    if not any(labels.of(t) for t in tensors):
        return
    name = str(func.overloadpacket)
    rule = RULES.get(name)
    if rule is None and _is_pointwise(func):
        rule = elementwise
    if rule is None:
        labels.lock_all(tensors, f"no rule for op {name}")
        return
    rule(labels, func, args, kwargs, out)


@functools.cache
def _is_pointwise(func: Any) -> bool:
    """Tagged pointwise, or the in-place form of an op that is."""
    if torch.Tag.pointwise in func.tags:
        return True
    name = func.overloadpacket.__name__
    plain = getattr(torch.ops.aten, name[:-1], None) if name.endswith("_") else None
    if plain is None:
        return False
    known = f"aten.{name[:-1]}" in _POINTWISE
    return known or any(torch.Tag.pointwise in getattr(plain, o).tags for o in plain.overloads())


def _dims(dims: Any, ndim: int) -> frozenset[int]:
    """Normalised dims; None or empty means all."""
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return frozenset(range(ndim))
    listed = dims if isinstance(dims, (list, tuple)) else [dims]
    return frozenset(d % max(ndim, 1) for d in listed)


# -- elementwise ------------------------------------------------------------------------------


_POINTWISE = (
    "aten.clone", "aten.alias", "aten.detach", "aten.contiguous", "aten.lift_fresh", "aten.fill",
    "aten.native_dropout", "aten.zeros_like", "aten.ones_like", "aten.full_like", "aten.rand_like",
    "aten._prelu_kernel", "aten.prelu", "aten.masked_fill", "aten.masked_fill_", "aten.where",
    "aten.hardswish", "aten.rrelu_with_noise", "aten.log_sigmoid_forward", "aten._to_copy",
    "aten.floor_divide", "aten.bernoulli", "aten.polar", "aten.complex", "aten.real", "aten.imag",
    "aten.special_expm1", "aten.randn_like", "aten.empty_like", "aten.positive", "aten.dropout",
)  # fmt: skip


@register(*_POINTWISE)
def elementwise(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Any) -> None:
    """Labels at the same position are one channel; a fixed tensor in their way locks them."""
    tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor) and a.dim() > 0]
    result = out[0] if isinstance(out, (tuple, list)) else out
    fields = meet(labels, tensors, result.dim())
    if func._schema.is_mutable and isinstance(args[0], Tensor):
        _written(labels, args[0], fields)
    else:
        labels.put(result, fields)


def meet(labels: Labels, tensors: Sequence[Tensor], ndim: int) -> Fields:
    """Fields of the broadcast of ``tensors``; labels against unlabelled extent are locked."""
    shapes = [(1,) * (ndim - t.dim()) + tuple(t.shape) for t in tensors]
    fields = [[align(f, ndim) for f in labels.of(t)] for t in tensors]
    return labels.combine(unfixed(labels, shapes, fields, "meets a tensor whose channels are fixed"))


def unfixed(
    labels: Labels, shapes: Sequence[Sequence[int]], fields: Sequence[Fields], reason: str
) -> Fields:
    """All aligned fields, locked along dims on which an operand has extent but no labels."""
    bare: set[int] = set()
    for shape, own in zip(shapes, fields, strict=True):
        covered: frozenset[int] = frozenset().union(*(varying(f) for f in own))
        bare |= {d for d, size in enumerate(shape) if size > 1 and d not in covered}
    mixed = [labels.mix(f, bare, reason) for own in fields for f in own]
    return [f for f in mixed if f is not None]


def _written(labels: Labels, target: Tensor, fields: Fields) -> None:
    """In-place: what the target's memory did not carry before cannot be tracked."""
    for f in labels.strided.get(target, []):
        labels.lock(f, "written through a strided slice")
    covered: frozenset[int] = frozenset().union(*(varying(h) for h in labels.of(target)))
    for f in fields:
        if not varying(f) <= covered:
            labels.lock(f, "written into a tensor whose channels are fixed")


@register(
    "aten.zero_", "aten.fill_", "aten.new_zeros", "aten.new_ones", "aten.new_full", "aten.new_empty",
    "aten.new_empty_strided",
)  # fmt: skip
def _constant(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Any) -> None:
    """The result does not depend on the values of the input; its extent is fixed."""


@register("aten.as_strided_", "aten.as_strided")
def _as_strided(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
    same = out.shape == args[0].shape and func._schema.is_mutable
    for f in labels.of(args[0]):
        if not same:
            labels.lock(f, "as_strided")
    if same:
        labels.put(out, list(labels.of(args[0])))


@register("aten.copy_")
def _copy(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Any) -> None:
    target, source = args[0], args[1]
    _written(labels, target, meet(labels, [target, source], target.dim()))


# -- data movement ----------------------------------------------------------------------------


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
        if len(moved) > 1:
            labels.rect(f, moved[-1])
        if len(right) > 1:
            split.append(right)
    g = np.broadcast_to(f, grown).reshape(shape)
    for right in split:
        g = _squeezed(g, right)
        moved = [d for d in right if g.shape[d] > 1]
        if len(moved) > 1:
            labels.rect(g, moved[-1])
    return g


def _squeezed(f: IntArray, dims: Sequence[int]) -> IntArray:
    """Size 1 along those ``dims`` on which the field turns out not to vary."""
    for d in dims:
        if f.shape[d] > 1:
            head = np.take(f, [0], axis=d)
            if np.array_equal(np.broadcast_to(head, f.shape), f):
                f = head
    return f


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
        fields.append(g)
    labels.put(out, fields)


def _joined_by_reshape(
    labels: Labels, fields: Fields, old: Sequence[int], new: Sequence[int]
) -> Fields:
    """Fields on different dims that a reshape flattens into one become one field of products."""
    fields = list(fields)
    for left, _ in _blocks(old, new):
        inside = [f for f in fields if varying(f) & set(left)]
        if len(inside) < 2:
            continue
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
            if len(range(*index.indices(f.shape[dim]))) == 1:
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
    x, dim, start, stop, step = (*args, *(None, 0, None, None, 1)[len(args) :])
    dim = dim % x.dim()
    if x.shape[dim] == out.shape[dim]:
        labels.put(out, list(labels.of(x)))
        return
    start = start or 0
    labels.put(out, _taken(labels, labels.of(x), dim, slice(start, stop, step)))
    if step != 1 and any(dim in varying(f) for f in labels.of(x)):
        labels.strided[out] = labels.of(x)


@register("aten.split", "aten.split_with_sizes", "aten.unsafe_split", "aten.chunk", "aten.unsafe_chunk")
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
    pieces = [_piece(labels, t, fs, dim) for t, fs in zip(parts, fields, strict=True)]
    shape = [max(p.shape[d] for p in pieces) for d in range(pieces[0].ndim)]
    full = []
    for p in pieces:
        target = [p.shape[d] if d == dim else shape[d] for d in range(p.ndim)]
        full.append(np.broadcast_to(p, target))
    result = np.concatenate(full, axis=dim)
    labels.uniform(result, dim)
    return [result]


def _piece(labels: Labels, t: Tensor, fields: Fields, dim: int) -> IntArray:
    """The field of one part along the concatenated dim; fixed labels where it has none."""
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
def _view_as_complex(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
    """The last dim holds real and imaginary parts: they stay together."""
    last = args[0].dim() - 1
    mixed = [labels.mix(f, [last], "real and imaginary parts") for f in labels.of(args[0])]
    labels.put(out, [f[..., 0] for f in mixed if f is not None])


@register("aten.tril", "aten.triu")
def _triangle(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
    dims = [out.dim() - 2, out.dim() - 1]
    mixed = [labels.mix(f, dims, "a triangle of the channels") for f in labels.of(args[0])]
    labels.put(out, [f for f in mixed if f is not None])


@register("aten.roll")
def _roll(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
    dims = _dims(args[2] if len(args) > 2 else None, out.dim())
    fields = [labels.mix(f, dims, "rolled along the channels") for f in labels.of(args[0])]
    labels.put(out, [f for f in fields if f is not None])


@register("aten.flip")
def _flip(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
    fields = []
    for f in labels.of(args[0]):
        dims = _dims(args[1], out.dim()) & varying(f)
        for d in dims:
            labels.uniform(f, d)
        fields.append(np.flip(f, tuple(dims)) if dims else f)
    labels.put(out, fields)


@register("aten.constant_pad_nd", "aten.pad")
def _pad(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
    pads = args[1]
    padded = {out.dim() - 1 - i // 2 for i, p in enumerate(pads) if p != 0}
    fields = [labels.mix(f, padded, "padded along the channels") for f in labels.of(args[0])]
    labels.put(out, [f for f in fields if f is not None])


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
    if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices):
        labels.lock_all([x], "indexed by a mask")
        return
    width = max(i.dim() for i in indices if i is not None)
    adjacent = hit == list(range(hit[0], hit[-1] + 1))
    fields = []
    for f in labels.of(x):
        g = labels.mix(f, hit, "indexed along the channels")
        if g is not None:
            rest = [g.shape[d] for d in range(x.dim()) if d not in hit]
            at = hit[0] if adjacent else 0
            fields.append(g.reshape(rest[:at] + [1] * width + rest[at:]))
    labels.put(out, fields)


@register("aten.pixel_shuffle")
def _pixel_shuffle(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
    dim = out.dim() - 3
    fields = []
    for f in labels.of(args[0]):
        if varying(f) != {dim}:
            labels.lock(f, "pixel shuffle over more than the channel dim")
            continue
        block = f.reshape(out.shape[dim], -1)
        shape = [out.shape[dim] if d == dim else 1 for d in range(out.dim())]
        fields.append(labels.merge(block, [1]).reshape(shape))
    labels.put(out, fields)


@register("aten.pixel_unshuffle", "aten.im2col")
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


@register("aten.unfold")
def _unfold(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
    dim = args[1] % args[0].dim()
    fields = [labels.mix(f, [dim], "unfolded along the channels") for f in labels.of(args[0])]
    labels.put(out, [f[..., None] for f in fields if f is not None])


@register("aten.native_channel_shuffle", "aten.channel_shuffle")
def _channel_shuffle(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
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


# -- spatial ops and reductions ---------------------------------------------------------------


def _spatial(count: int) -> Rule:
    """An op that mixes positions along the last ``count`` dims and keeps the others."""

    def rule(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Any) -> None:
        x = args[0]
        dims = range(x.dim() - count, x.dim())
        name = str(func.overloadpacket)
        fields = [labels.mix(f, dims, f"{name} along the channels") for f in labels.of(x)]
        for t in out if isinstance(out, (tuple, list)) else [out]:
            labels.put(t, [f for f in fields if f is not None])

    return rule


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
    "aten._upsample_bicubic2d_aa", "aten.grid_sampler_2d", "aten.mkldnn_max_pool2d",
)(_spatial(2))  # fmt: skip
register("aten.upsample_trilinear3d", "aten.grid_sampler_3d")(_spatial(3))


@register(
    "aten.mean", "aten.sum", "aten.amax", "aten.amin", "aten.max", "aten.min", "aten.var", "aten.std",
    "aten.var_mean", "aten.std_mean", "aten.linalg_vector_norm", "aten.norm", "aten.prod", "aten.any",
    "aten.all", "aten.argmax", "aten.argmin", "aten.logsumexp", "aten.softmax", "aten._softmax",
    "aten._log_softmax", "aten._safe_softmax", "aten.cumsum", "aten.cumprod", "aten.sort", "aten.topk",
    "aten.median",
)  # fmt: skip
def _reduce(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Any) -> None:
    """Positions along the reduced dims are mixed."""
    x = args[0]
    if len(args) > 1 and isinstance(args[1], Tensor):  # max(a, b)
        elementwise(labels, func, args, kwargs, out)
        return
    at = {"linalg_vector_norm": 2, "norm": 2, "topk": 2}.get(func.overloadpacket.__name__, 1)
    dims = _dims(args[at] if len(args) > at else kwargs.get("dim", _default_dim(func)), x.dim())
    outs = [t for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, Tensor)]
    name = str(func.overloadpacket)
    mixed = [labels.mix(f, dims, f"{name} over the channels") for f in labels.of(x)]
    fields = [f for f in mixed if f is not None]
    if outs[0].dim() < x.dim():
        fields = [f.reshape([s for d, s in enumerate(f.shape) if d not in dims]) for f in fields]
    for t in outs:
        labels.put(t, fields)


def _default_dim(func: Any) -> Any:
    for a in func._schema.arguments:
        if a.name == "dim":
            return a.default_value if a.has_default_value() else None
    return None


# -- normalisation ----------------------------------------------------------------------------


def _shaped(labels: Labels, t: Tensor | None, shape: Sequence[int]) -> list[tuple[Tensor, Fields]]:
    return [] if t is None else [(t, [f.reshape(shape) for f in labels.of(t)])]


def _normalised(labels: Labels, x: Tensor, params: Sequence[Tensor | None], dim: int, out: Any) -> None:
    """x meets 1-d parameters along ``dim``."""
    size = x.shape[dim]
    own = labels.of(x)
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
    result = out[0] if isinstance(out, (tuple, list)) else out
    labels.put(result, labels.combine(found))


@register(
    "aten.native_batch_norm", "aten._native_batch_norm_legit", "aten.cudnn_batch_norm",
    "aten._native_batch_norm_legit_no_training", "aten._batch_norm_no_update", "aten.miopen_batch_norm",
    "aten._batch_norm_with_update", "aten.batch_norm",
)  # fmt: skip
def _batch_norm(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Any) -> None:
    tensors = [a for a in args[1:5] if isinstance(a, Tensor)]
    _normalised(labels, args[0], tensors, 1, out)


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
    _normalised(labels, x, [weight, bias], 1, out)
    for f in labels.of(x):
        if 1 not in varying(f):
            continue
        flat = f if varying(f) == {1} else labels.merge(f, varying(f) - {1})
        block = flat.reshape(groups, -1)
        if groups > 1 and block.shape[1] > 1:
            labels.rows(block, [1])


# -- contractions -----------------------------------------------------------------------------


def _dim_labels(fields: Fields, dim: int) -> IntArray | None:
    """[P, Q] labels at each position along ``dim``; None where nothing varies."""
    found = [f for f in fields if dim in varying(f)]
    if not found:
        return None
    return rows_by(found[0], dim).T


def _record(labels: Labels, const: int, dims: Sequence[tuple[int, IntArray | None]]) -> None:
    kept = []
    for size, labelled in dims:
        if labelled is None:
            const *= size
        else:
            kept.append(labelled)
    labels.facts.contractions.append(Contraction(const, tuple(kept)))


def contract(
    labels: Labels, x: Fields, y: Fields, shapes: Sequence[Sequence[int]], dim: int
) -> Fields:
    """Aligned fields of two operands through a product summed over ``dim`` (kept, size 1)."""
    reason = "multiplied with a tensor whose channels are fixed"
    fields = unfixed(labels, shapes, [x, y], reason)
    along = [f for f in fields if dim in varying(f)]
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
    fields = [np.squeeze(f, at) for f in contract(labels, fx, fy, shapes, at)]
    sizes = [(s, _dim_labels(fields, d)) for d, s in enumerate(out.shape)]
    inner = _dim_labels(labels.of(x), at)
    _record(labels, 1, [*sizes, (x.shape[-1], inner)])
    if bias is not None:
        labels.put(out, fields)
        fields = meet(labels, [out, bias], out.dim())
        labels.fields.pop(out, None)
    labels.put(out, fields)


@register("aten.mm", "aten.bmm")
def _mm(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
    _matmul(labels, args[0], args[1], out)


@register("aten.addmm", "aten.baddbmm")
def _addmm(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
    _matmul(labels, args[1], args[2], out, args[0])


@register(
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
    scores = [np.squeeze(f, n) for f in contract(labels, fq, fk, shapes, n)]
    scores = [f for f in (labels.mix(f, [n - 1], "softmax over the channels") for f in scores) if f is not None]
    fs = [np.expand_dims(f, n) for f in scores]
    fv = [np.expand_dims(f, n - 2) for f in labels.of(v)]
    shapes = [[*q.shape[:-1], k.shape[-2], 1], [*v.shape[:-2], 1, *v.shape[-2:]]]
    fields = [np.squeeze(f, n - 1) for f in contract(labels, fs, fv, shapes, n - 1)]
    lead = [(s, _dim_labels(fields, d)) for d, s in enumerate(q.shape[:-1])]
    _record(labels, k.shape[-2], [*lead, (q.shape[-1], _dim_labels(labels.of(q), n - 1))])
    _record(labels, k.shape[-2], [*lead, (v.shape[-1], _dim_labels(labels.of(v), n - 1))])
    mask = kwargs.get("attn_mask")
    for f in labels.of(mask):
        for g in scores:
            labels.relate(align(f, g.ndim), g)
        if not scores:
            labels.lock(f, "masks attention whose channels are fixed")
    labels.put(result, fields)


@register("aten.convolution")
def _convolution(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Tensor) -> None:
    x, w, bias, transposed, groups = args[0], args[1], args[2], args[6], args[8]
    for f in labels.of(w):
        if varying(f) - {0, 1}:
            labels.lock(f, "kernel position")
    inputs, batch = _conv_input(labels, x)
    w0, w1 = (_flat(labels, w, d) for d in (0, 1))
    outputs = (_transposed if transposed else _forward)(labels, inputs, w0, w1, w, groups)
    spatial = int(np.prod(x.shape[2:] if transposed else out.shape[2:]))
    taps = int(np.prod(w.shape[2:]))
    sides = [(w.shape[d], None if f is None else f[:, None]) for d, f in ((0, w0), (1, w1))]
    _record(labels, spatial * taps * x.shape[0], sides)
    fields = list(batch)
    if outputs is not None:
        fields.append(outputs.reshape([-1 if d == 1 else 1 for d in range(out.dim())]))
    if bias is not None:
        labels.put(out, fields)
        _normalised(labels, out, [bias], 1, out)
    else:
        labels.put(out, fields)


def _flat(labels: Labels, t: Tensor, dim: int) -> IntArray | None:
    """[size] labels along one dim of a weight; labels that vary jointly are merged."""
    for f in labels.of(t):
        if dim in varying(f):
            others = varying(f) - {dim}
            return (labels.merge(f, others) if others else f).ravel()
    return None


def _conv_input(labels: Labels, x: Tensor) -> tuple[IntArray | None, Fields]:
    """([C] channel labels or None, fields along the batch dim)."""
    channel: IntArray | None = None
    batch: Fields = []
    for f in labels.of(x):
        if 1 in varying(f):
            others = varying(f) - {1}
            channel = (labels.merge(f, others) if others else f).ravel()
        else:
            g = labels.mix(f, range(2, x.dim()), "convolution along the channels")
            if g is not None:
                batch.append(g)
    return channel, batch


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
    labels: Labels, x: IntArray | None, w0: IntArray | None, w1: IntArray | None, w: Tensor, groups: int
) -> IntArray | None:
    """w [O, C/groups, *]: output labels [O]."""
    if groups == 1:
        if w.shape[1] > 1:
            _meet_flat(labels, x, w1, _FIXED)
        return w0
    rows = _group_rows(labels, x, groups)
    if rows is None or x is None or (w1 is None and w.shape[1] > 1):
        _meet_flat(labels, x, None, _FIXED)
        _meet_flat(labels, None, w1, _FIXED)
    elif w1 is not None:
        labels.parent(w1, x.reshape(groups, -1))
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
        labels.parent(rows, block)
    return w0


def _group_rows(labels: Labels, x: IntArray | None, groups: int) -> IntArray | None:
    """[groups, 1]: a label for each convolution group."""
    if x is None:
        return None
    block = x.reshape(groups, -1)
    return block if block.shape[1] == 1 else labels.rows(block, [1])


def _transposed(
    labels: Labels, x: IntArray | None, w0: IntArray | None, w1: IntArray | None, w: Tensor, groups: int
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
        return made.ravel()
    if w.shape[1] == 1:
        labels.union(rows, made)
    elif w1 is not None:
        labels.parent(rows, made)
        labels.parent(w1, made)
    else:
        labels.lock(made, _FIXED)
    return made.ravel()
