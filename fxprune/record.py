"""What the tracer's run does: the ATen ops of every node, with their tensors.

Coupling reads these ops, so that a model is run once and not twice. Common layers and functions
arrive as one op that is known beforehand: they are called as that op (``direct``), without the
dispatcher's way through Python, which takes longer than a small convolution.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

aten = torch.ops.aten

Op: TypeAlias = tuple[Any, Sequence[Any], dict[str, Any], Any]
"""(overload, positional arguments, keyword arguments, result)"""


@dataclass
class Recorded:
    """One run of a graph, until its labels are read.

    ops     node -> its ATen ops in execution order
    values  node -> its value
    """

    ops: dict[str, list[Op]] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


class Recorder(TorchDispatchMode):
    """Calls nodes and notes their ops.

    ``complete``: whether the ops say all. They do not where one has changed the shape or the
    memory of a tensor that earlier ones have seen, since rules read both off the tensors.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: dict[str, list[Op]] = {}
        self.complete = True
        self._now: list[Op] = []
        self._composites = Composites(lambda *op: self._now.append(op))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = args[0].shape if args and isinstance(args[0], Tensor) else None
        out = func(*args, **kwargs)
        self._now.append((func, args, kwargs, out))
        if func._schema.is_mutable and _reshapes(func, args, before):
            self.complete = False
        return out

    def call(self, node: str, target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """``target(*args, **kwargs)``, which is what ``node`` stands for."""
        known = direct(target, args, kwargs)
        if known is not None:
            out, self.ops[node] = known
            return out
        self._now = self.ops[node] = []
        if not _may_call_composites(target):
            with self:
                return target(*args, **kwargs)
        with self, self._composites:
            return target(*args, **kwargs)


def _reshapes(func: Any, args: Sequence[Any], before: torch.Size | None) -> bool:
    """Whether an op in place changes more than numbers; integers may be positions, also read."""
    target = args[0] if args else None
    name = func.overloadpacket.__name__
    if name == "as_strided_" and isinstance(target, Tensor):  # a pool in channels-last
        return target.shape != before
    if torch.Tag.inplace_view in func.tags or name in ("set_", "resize_"):
        return True
    return isinstance(target, Tensor) and target.dtype in (torch.int64, torch.int32)


class Composites(TorchFunctionMode):
    """Functions that would arrive as many ops, of which one locks the channels, taken as one op.

    ``found(op, args, kwargs, out)`` is called for each.
    """

    def __init__(self, found: Callable[[Any, Sequence[Any], dict[str, Any], Any], None]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        op, names, count = _COMPOSITES.get(func, (None, (), 0))
        given = dict(zip(names, args, strict=False)) | kwargs
        if op is None or (op is aten._pad_circular.default and given.get("mode") != "circular"):
            return func(*args, **kwargs)
        with _disable_current_modes():
            out = func(*args, **kwargs)
        self.found(op, [given.get(n) for n in names[:count]], {}, out)
        return out


_RMS = aten.rms_norm.default, ("input", "normalized_shape", "weight", "eps"), 3
_PAD = aten._pad_circular.default, ("input", "pad", "mode"), 2
_UNPACK = aten._pad_packed_sequence.default, ("data", "batch_sizes"), 2
_COMPOSITES: dict[Any, tuple[Any, tuple[str, ...], int]] = {
    torch._VF._pad_packed_sequence: _UNPACK,
    torch.rms_norm: _RMS,
    F.rms_norm: _RMS,
    F.pad: _PAD,
    torch._C._nn.pad: _PAD,
}
"""Function -> the op that it counts as, the names of its arguments, how many of them count."""


def _may_call_composites(target: Any) -> bool:
    """torch's own modules and functions do not call them, but for RMSNorm and circular padding."""
    home = getattr(type(target) if isinstance(target, nn.Module) else target, "__module__", None)
    own = (home or "builtins").partition(".")[0] in ("torch", "_operator", "builtins", "math")
    padded = getattr(target, "padding_mode", None) == "circular"
    composite = getattr(target, "__hash__", None) is not None and target in _COMPOSITES
    return not own or isinstance(target, nn.RMSNorm) or padded or composite


# -- calls whose ops are known ----------------------------------------------------------------

Known: TypeAlias = tuple[Any, list[Op]]
"""(result of a call, its ops)"""


def direct(target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Known | None:
    """The call, done by the ops that it stands for; None where they are not known."""
    if not args or torch._C._is_any_autocast_enabled():
        return None
    if not isinstance(target, nn.Module):
        function = _FUNCTIONS.get(target) if getattr(target, "__hash__", None) else None
        return None if function is None else function(args, kwargs)
    known = _MODULES.get(type(target))
    if known is None or kwargs or len(args) != 1 or type(args[0]) is not Tensor:
        return None
    forward, module = known
    changed = type(target).forward is not forward or "forward" in target.__dict__
    if changed or hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
        return None
    return module(target, args[0])


def _convolution(m: Any, x: Tensor) -> Known | None:
    w = m._parameters.get("weight")
    if w is None or m.padding_mode != "zeros" or isinstance(m.padding, str) or x.dim() != w.dim():
        return None
    steps = (list(m.stride), list(m.padding), list(m.dilation))
    args = (x, w, m._parameters.get("bias"), *steps, False, [0] * (w.dim() - 2), m.groups)
    out = torch.convolution(*args)
    return out, [(aten.convolution.default, args, {}, out)]


def _batch_norm(m: Any, x: Tensor) -> Known | None:
    statistics = m._buffers.get("running_mean"), m._buffers.get("running_var")
    if m.training or not all(isinstance(t, Tensor) for t in statistics):
        return None
    m._check_input_dim(x)
    affine = m._parameters.get("weight"), m._parameters.get("bias")
    args = (x, *affine, *statistics, False, m.momentum or 0.0, m.eps)
    out = torch.batch_norm(*args, torch.backends.cudnn.enabled)
    return out, [(aten.native_batch_norm.default, args, {}, (out,))]


def _linear(m: Any, x: Tensor) -> Known | None:
    w, b = m._parameters.get("weight"), m._parameters.get("bias")
    if w is None or b is None or not x.is_contiguous() or x.dim() < 2:
        return None
    lead, ops, flat = list(x.shape[:-1]), list[Op](), x
    if x.dim() > 2:
        shape = [math.prod(lead), x.shape[-1]]
        flat = x.view(shape)
        ops.append((aten.view.default, (x, shape), {}, flat))
    turned = w.t()
    out = made = torch.addmm(b, flat, turned)
    ops += [
        (aten.t.default, (w,), {}, turned),
        (aten.addmm.default, (b, flat, turned), {}, made),
    ]
    if x.dim() > 2:
        shape = [*lead, w.shape[0]]
        out = made.view(shape)
        ops.append((aten.view.default, (made, shape), {}, out))
    return out, ops


_MODULES: dict[type[nn.Module], tuple[Any, Callable[[Any, Tensor], Known | None]]] = {
    nn.Conv1d: (nn.Conv1d.forward, _convolution),
    nn.Conv2d: (nn.Conv2d.forward, _convolution),
    nn.Conv3d: (nn.Conv3d.forward, _convolution),
    nn.BatchNorm1d: (nn.BatchNorm1d.forward, _batch_norm),
    nn.BatchNorm2d: (nn.BatchNorm2d.forward, _batch_norm),
    nn.BatchNorm3d: (nn.BatchNorm3d.forward, _batch_norm),
    nn.Linear: (nn.Linear.forward, _linear),
}

Function: TypeAlias = Callable[[Sequence[Any], dict[str, Any]], "Known | None"]


def _unary(name: str, *numbers: str) -> Function:
    """f(x, *numbers, inplace=False); the numbers must be given."""
    ops = getattr(aten, name).default, getattr(aten, f"{name}_").default
    names = ("input", *numbers, "inplace")

    def function(args: Sequence[Any], kwargs: dict[str, Any]) -> Known | None:
        given = {"inplace": False} | dict(zip(names, args, strict=False)) | kwargs
        if len(given) != len(names) or type(given["input"]) is not Tensor:
            return None
        op = ops[bool(given["inplace"])]
        values = tuple(given[n] for n in names[:-1])
        out = op(*values)
        return out, [(op, values, {}, out)]

    return function


def _binary(name: str) -> Function:
    """f(x, y) of a tensor with a tensor or a number"""
    op = getattr(aten, name).Tensor

    def function(args: Sequence[Any], kwargs: dict[str, Any]) -> Known | None:
        x, y = args
        if type(x) is not Tensor or type(y) not in _OPERANDS:
            return None
        if name.endswith("_") and not x.is_floating_point():
            return None
        out = op(x, y)
        return out, [(op, (x, y), {}, out)]

    return function


_OPERANDS = (Tensor, nn.Parameter, int, float)


def _cat(args: Sequence[Any], kwargs: dict[str, Any]) -> Known | None:
    given = dict(zip(("tensors", "dim"), args, strict=False)) | kwargs
    parts = list(given["tensors"])
    if set(given) - {"tensors", "dim"} or not all(type(t) is Tensor for t in parts):
        return None
    values = (parts, given.get("dim", 0))
    out = torch.cat(*values)
    return out, [(aten.cat.default, values, {}, out)]


_FUNCTIONS: dict[Any, Function] = {
    F.relu: _unary("relu"),
    F.silu: _unary("silu"),
    F.hardswish: _unary("hardswish"),
    F.hardsigmoid: _unary("hardsigmoid"),
    F.hardtanh: _unary("hardtanh", "min_val", "max_val"),
    torch.relu: _unary("relu"),
    torch.sigmoid: _unary("sigmoid"),
    operator.add: _binary("add"),
    operator.iadd: _binary("add_"),
    operator.mul: _binary("mul"),
    torch.cat: _cat,
}
