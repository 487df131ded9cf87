"""What each family of ATen ops does to channel labels: one registration for each op.

A rule is ``rule(labels, func, args, kwargs, out)``, called after the op has run. An op without a
rule locks the labels of all its inputs: never guessed, never ignored.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxprune.coupling import vanish
from fxprune.coupling.labels import Fields, Labels, align, varying
from fxprune.tables import registering

Rule = Callable[[Labels, Any, Sequence[Any], dict[str, Any], Any], None]
RULES: dict[str, Rule] = {}
PRODUCTS: set[str] = set()  # ops that count multiply-adds, with labels or without


register = registering(RULES, "op")
"""``register(*names)(rule)``: the rule of ATen ops, or a user's own, by name ("aten.view")."""


def apply_rule(
    labels: Labels, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any
) -> None:
    """Carry labels over one executed op."""
    tensors = _tensors(args, kwargs)
    name = _name(func)
    grows = labels.expands and name == "aten.expand"
    if name not in PRODUCTS and not grows and not any(labels.of(t) for t in tensors):
        return
    rule = RULES.get(name)
    if rule is None and _is_pointwise(func):
        rule = elementwise
    if rule is None:
        labels.lock_all(tensors, f"no rule for op {name}")
    else:
        rule(labels, func, args, kwargs, out)
    vanish.note(labels, func, args, kwargs, out)


@functools.cache
def _name(func: Any) -> str:
    return str(func.overloadpacket)


def _tensors(args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """Tensors among the arguments of an op, also in lists."""
    found: list[Tensor] = []
    for a in (*args, *kwargs.values()):
        if isinstance(a, Tensor):
            found.append(a)
        elif isinstance(a, (list, tuple)):
            found += [t for t in a if isinstance(t, Tensor)]
    return found


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


def dims_of(dims: Any, ndim: int) -> frozenset[int]:
    """Normalised dims; None or empty means all."""
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return frozenset(range(ndim))
    listed = dims if isinstance(dims, (list, tuple)) else [dims]
    return frozenset(d % max(ndim, 1) for d in listed)


_POINTWISE = (
    "aten.clone", "aten.alias", "aten.detach", "aten.contiguous", "aten.lift_fresh", "aten.fill",
    "aten.native_dropout", "aten.zeros_like", "aten.ones_like", "aten.full_like", "aten.rand_like",
    "aten._prelu_kernel", "aten.prelu", "aten.masked_fill", "aten.masked_fill_", "aten.where",
    "aten.hardswish", "aten.rrelu_with_noise", "aten.log_sigmoid_forward", "aten._to_copy",
    "aten.floor_divide", "aten.bernoulli", "aten.polar", "aten.complex", "aten.real", "aten.imag",
    "aten._conj", "aten.conj", "aten._conj_physical", "aten.conj_physical", "aten.resolve_conj",
    "aten.special_expm1", "aten.randn_like", "aten.empty_like", "aten.positive", "aten.dropout",
)  # fmt: skip


@register(*_POINTWISE)
def elementwise(labels: Labels, func: Any, args: Sequence[Any], kwargs: Any, out: Any) -> None:
    """Labels at the same position are one channel; a fixed tensor in their way locks them."""
    tensors = [a for a in _tensors(args, kwargs) if a.dim() > 0]
    result = out[0] if isinstance(out, (tuple, list)) else out
    fields = meet(labels, tensors, result.dim())
    if func._schema.is_mutable and isinstance(args[0], Tensor):
        written(labels, args[0], fields)
    else:
        labels.put(result, fields)


def meet(labels: Labels, tensors: Sequence[Tensor], ndim: int) -> Fields:
    """Fields of the broadcast of ``tensors``; labels against unlabelled extent are locked."""
    shapes = [(1,) * (ndim - t.dim()) + tuple(t.shape) for t in tensors]
    fields = [[align(f, ndim) for f in labels.of(t)] for t in tensors]
    return labels.combine(
        unfixed(labels, shapes, fields, "meets a tensor whose channels are fixed")
    )


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


def written(labels: Labels, target: Tensor, fields: Fields) -> None:
    """In-place: what the target's memory did not carry before cannot be tracked."""
    for f in labels.strided(target):
        labels.lock(f, "written through a strided slice")
    covered: frozenset[int] = frozenset().union(*(varying(h) for h in labels.of(target)))
    for f in fields:
        if not varying(f) <= covered:
            labels.lock(f, "written into a tensor whose channels are fixed")


@register(
    "aten.zero_", "aten.fill_", "aten.new_zeros", "aten.new_ones", "aten.new_full",
    "aten.new_empty", "aten.new_empty_strided",
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
    written(labels, target, meet(labels, [target, source], target.dim()))
