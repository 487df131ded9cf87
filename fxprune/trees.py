"""Nested values: tensors in tuples, lists, mappings, dataclasses and registered pytrees.

torch's pytree takes a dataclass for a leaf unless it was registered; models return them, so here
they are containers.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree


def _fields(value: Any) -> dict[str, Any] | None:
    """The fields of a dataclass instance that pytree knows nothing of."""
    if not dataclasses.is_dataclass(value) or isinstance(value, (type, dict)):
        return None
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}


def leaves(value: Any) -> Iterator[Any]:
    """Everything that is no container, in order."""
    for leaf in pytree.tree_leaves(value):
        inner = _fields(leaf)
        if inner is None:
            yield leaf
        else:
            yield from leaves(inner)


def tensors(value: Any) -> list[Tensor]:
    """All tensors in ``value``, in order."""
    return [t for t in leaves(value) if isinstance(t, Tensor)]


def map_tensors(change: Callable[[Tensor], Any], value: Any) -> Any:
    """The same with every tensor changed; a dataclass becomes the dict of its fields.

    A packed sequence, which takes nothing but tensors, becomes a tuple.
    """

    def one(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return change(leaf)
        if isinstance(leaf, PackedSequence):
            return tuple(map_tensors(change, [*leaf]))
        inner = _fields(leaf)
        return leaf if inner is None else map_tensors(change, inner)

    return pytree.tree_map(one, value, is_leaf=lambda v: isinstance(v, PackedSequence))


def plain(value: Any) -> Any:
    """``value`` itself, or a copy in which dataclasses are dicts where it holds any."""
    return (
        map_tensors(lambda t: t, value)
        if any(_fields(v) for v in pytree.tree_leaves(value))
        else value
    )


_CLOSED = (str, bytes, int, float, type, types.ModuleType, Tensor)


def reachable(value: Any, depth: int = 6) -> Iterator[Any]:
    """``value`` and what it contains, also in the attributes of objects."""
    seen: set[int] = set()

    def walk(v: Any, left: int) -> Iterator[Any]:
        yield v
        if left == 0 or id(v) in seen or isinstance(v, _CLOSED):
            return
        seen.add(id(v))
        if isinstance(v, Mapping):
            inner = [*v.values()]
        else:
            inner = [*v] if isinstance(v, (list, tuple, set, frozenset)) else []
        for i in [*inner, *getattr(v, "__dict__", {}).values()]:
            yield from walk(i, left - 1)

    return walk(value, depth)


def holds(value: Any, wanted: Callable[[Any], bool]) -> bool:
    """Whether ``value`` is or contains, also in the attributes of objects, something wanted."""
    return any(wanted(v) for v in reachable(value))
