"""Copies of module trees, like copy.deepcopy but without walking through what cannot change.

Most of a deep copy's time goes into the dozen empty dicts and the numbers that every module holds.
"""

from __future__ import annotations

import copy
import functools
import types
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.products import storage_key

_UNCHANGING: frozenset[Any] = frozenset((
    type(None), bool, int, float, complex, str, bytes, type, types.FunctionType,
    types.BuiltinFunctionType, types.ModuleType, torch.dtype, torch.device, torch.Size,
))  # fmt: skip
_EMPTY: frozenset[Any] = frozenset((dict, list, set, OrderedDict))
_HOLDERS = ("_parameters", "_buffers", "_modules")
_COMPILED = "_compiled_call_impl"  # what Module.__getstate__ leaves out


def copied(model: nn.Module, memo: dict[Any, Any]) -> nn.Module:
    """A deep copy of ``model``; ``memo`` (id -> replacement) is as for copy.deepcopy, and grows."""
    kinds: list[tuple[nn.Module, Any]] = [(m, type(m)) for m in model.modules()]
    plain = [m for m, kind in kinds if id(m) not in memo and _is_plain(kind)]
    for m in plain:
        memo[id(m)] = type(m).__new__(type(m))
    for m in plain:
        own = memo[id(m)].__dict__
        own.update(m.__dict__)
        own.pop(_COMPILED, None)
        for name, value in m.__dict__.items():
            if type(value) in _EMPTY and not value:
                own[name] = type(value)()
            elif name in _HOLDERS and type(value) is dict:
                own[name] = {k: _value(v, memo) for k, v in value.items()}
            elif type(value) not in _UNCHANGING and name != _COMPILED:
                own[name] = _value(value, memo)
    result: nn.Module = copy.deepcopy(model, memo)
    return result


def twin(module: nn.Module) -> nn.Module:
    """``copy.copy(module)``: another module with the same attributes."""
    kind: Any = type(module)
    if not _is_plain(kind):
        return copy.copy(module)
    made: nn.Module = kind.__new__(kind)
    made.__dict__.update(module.__dict__)
    made.__dict__.pop(_COMPILED, None)
    return made


def eventful(module: nn.Module) -> list[Any]:
    """The attributes of a module that are more than numbers, names and empty containers.

    Its parameters, buffers and submodules are left out.
    """
    return [
        v
        for k, v in module.__dict__.items()
        if type(v) not in _UNCHANGING
        and k not in _HOLDERS
        and not (type(v) in _EMPTY and not v)
        and not (type(v) is tuple and all(type(i) in _UNCHANGING for i in v))
    ]


def _value(value: Any, memo: dict[Any, Any]) -> Any:
    if type(value) in _UNCHANGING:
        return value
    known = memo.get(id(value))
    if known is not None:
        return known
    if type(value) in _EMPTY and not value:
        return type(value)()
    if type(value) is tuple and all(type(v) in _UNCHANGING for v in value):
        return value
    if type(value) is Tensor and _owns_memory(value):
        storages = memo.setdefault("torch", {})  # where torch's own deep copies note memory
        if storage_key(value) not in storages:
            made = value.detach().clone(memory_format=torch.preserve_format)
            memo[id(value)] = made.requires_grad_(value.requires_grad)
            storages[storage_key(value)] = made.untyped_storage()
            return made
    return copy.deepcopy(value, memo)


def _owns_memory(t: Tensor) -> bool:
    """A leaf without views that share its memory, as far as can be seen."""
    whole = t.layout is torch.strided and not t.is_quantized and t._base is None and t.is_leaf
    return whole and t.untyped_storage().nbytes() == t.numel() * t.element_size()


@functools.cache
def _is_plain(kind: type) -> bool:
    """Whether a module class leaves copying to its attributes."""
    own = [_where(kind, n) for n in ("__deepcopy__", "__reduce_ex__", "__reduce__", "__new__")]
    state = [_where(kind, n) for n in ("__getstate__", "__setstate__")]
    return (
        all(c in (None, object) for c in own)
        and all(c in (None, object) or c.__module__.startswith("torch.nn.") for c in state)
        and not any(vars(c).get("__slots__") for c in kind.__mro__)
    )


def _where(kind: type, name: str) -> type | None:
    """The class that defines an attribute."""
    return next((c for c in kind.__mro__ if name in vars(c)), None)
