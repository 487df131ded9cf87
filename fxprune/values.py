"""Proxies that know the value of their node: what Python sees while a model is traced.

Some values follow from the data and not from the shapes of the inputs: how many boxes are left,
what ``.item()`` gave. They are marked (``data``), and so is what is made from them. Python may pass
them on, but where it needs the number itself, that holds for the example inputs only: TraceError.
"""

from __future__ import annotations

import builtins
import functools
import math
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.proxy import TraceError

from fxprune.decisions import settled_tensor

# What neither cutting nor other data changes is a plain value for Python.
_FORM = (
    "ndim", "layout", "is_cuda", "is_sparse", "is_quantized", "is_leaf", "is_meta", "is_nested",
    "requires_grad", "itemsize",
)  # fmt: skip
_FORM_CALLS = (
    "dim", "ndimension", "is_floating_point", "is_complex", "element_size", "is_signed",
)  # fmt: skip
# Calls whose result has an extent that depends on data.
FOLLOW_DATA = ("nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "nms")
# Calls that give Python the data of a tensor.
READ_DATA = ("item", "tolist", "numpy", "equal", "allclose", "is_nonzero")
# Calls with as many results as a tensor is long, where the count is not given.
PARTS = ("unbind", "split", "tolist")


_NUMPY = {  # as ``operator`` names them
    "add": "add", "subtract": "sub", "multiply": "mul", "divide": "truediv", "power": "pow",
    "floor_divide": "floordiv", "remainder": "mod",
}  # fmt: skip


class Value(fx.Proxy):
    """A proxy that knows the concrete value of its node."""

    @property
    def value(self) -> Any:
        return self.node.meta["value"]

    def __getattr__(self, name: str) -> Any:
        if name in ("_is_param", "_is_buffer"):  # asked by isinstance(x, nn.Parameter)
            return False
        if name.startswith("__"):
            raise AttributeError(name)
        if name in _FORM and isinstance(self.value, Tensor):
            return getattr(self.value, name)
        if self.__dict__.get("attr") == "device":  # x.device.type is a string for Python alone
            return getattr(self.value, name)
        return Attribute(self, name)

    def __len__(self) -> int:
        self.settled("its length")
        return len(self.value)

    def __index__(self) -> int:
        return self.counted(int(self._number().__index__()))

    def __int__(self) -> int:
        return self.counted(int(self._number()))

    def counted(self, number: int) -> int:
        """``number``, which Python uses as such; noted where it may be the number of samples."""
        tracer: Any = self.tracer
        if number == tracer.samples:
            if tracer.any_batch:
                raise TraceError(f"Python counts with {self.node.name!r}, as it does with samples")
            tracer.counts = True
        return number

    def __float__(self) -> float:
        return float(self._number())

    def __contains__(self, item: Any) -> bool:
        return any(bool(item == part) for part in self)

    def __hash__(self) -> int:
        return id(self)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __array_ufunc__(self, function: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        """np.sqrt(x.shape[-1]), np.sqrt(2.0) * x: recorded as Python's own functions."""
        name = _NUMPY.get(function.__name__, function.__name__)
        own = getattr(operator if len(args) > 1 else math, name, None)
        if method != "__call__" or kwargs or own is None:
            return NotImplemented
        return self.tracer.create_proxy("call_function", own, args, {})

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """np.prod(x.shape[1:])"""
        own = getattr(math, function.__name__, None)
        if kwargs or own is None:
            return NotImplemented
        return self.tracer.create_proxy("call_function", own, args, {})

    def _in_place(self, name: str, other: Any) -> Any:
        if not isinstance(self.value, Tensor):
            return NotImplemented
        target = getattr(operator, name)
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    def _number(self) -> Any:
        if isinstance(self.value, Tensor):
            if settled_tensor(self.node):
                return self.value
            raise TraceError(f"Python reads the data of tensor {self.node.name!r}")
        self.settled("its value")
        return self.value

    def settled(self, what: str) -> None:
        """Raise TraceError where a number that Python needs depends on data."""
        if not self.node.meta.get("data") or settled_tensor(self.node):
            return
        value = self.value
        if isinstance(value, dict) or (isinstance(value, (tuple, list)) and not varies(self.node)):
            return
        raise TraceError(f"Python needs {what}, but {self.node.name!r} depends on data")


IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor")
for _name in IN_PLACE:
    setattr(Value, f"__{_name}__", functools.partialmethod(Value._in_place, _name))


class Attribute(Value):
    """``x.name``, recorded only when it is used as a value and not called."""

    def __init__(self, root: Value, name: str) -> None:
        self.root, self.attr, self.tracer = root, name, root.tracer
        self._node: fx.Node | None = None

    @property
    def value(self) -> Any:
        return getattr(self.root.value, self.attr)

    @property
    def node(self) -> fx.Node:  # type: ignore[override]
        if self._node is None:
            made = self.tracer.create_proxy("call_function", getattr, (self.root, self.attr), {})
            self._node = made.node
        return self._node

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.attr in _FORM_CALLS and not args and isinstance(self.root.value, Tensor):
            return self.value()
        return self.tracer.create_proxy("call_method", self.attr, (self.root, *args), kwargs)


def is_traced(value: Any) -> bool:
    return type(value) in (Value, Attribute)


# -- marks ------------------------------------------------------------------------------------


def named(node: fx.Node) -> str:
    """Name of the function or method that a node calls."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def varies(node: fx.Node) -> bool:
    """Whether a sequence that depends on data has a length that does too."""
    name = named(node)
    counted = len(node.args) > 1 and isinstance(node.args[1], (list, tuple))
    return name in PARTS and not (name == "split" and counted)


def follows_data(node: fx.Node) -> bool:
    """Whether the size of a node's value, or the number that it is, comes from data."""
    name = named(node)
    if name in _FORM_CALLS or (name == "getattr" and node.args[1] in ("device", "dtype")):
        return False
    if name == "getitem" and len(node.args) > 1:
        listed = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        if _up_to_data(listed):
            return True
        masks = [i.meta.get("value") for i in listed if isinstance(i, fx.Node)]
        if any(isinstance(m, Tensor) and m.dtype in (torch.bool, torch.uint8) for m in masks):
            return True
    if name in FOLLOW_DATA or name in READ_DATA:
        return True
    if name == "where" and len(node.args) + len(node.kwargs) == 1:
        return True
    return any(i.meta.get("data") and _passes(node, i) for i in node.all_input_nodes)


def _up_to_data(index: Any) -> bool:
    """Whether a bound of a slice is a tensor."""
    bounds = [v for i in index if isinstance(i, slice) for v in (i.start, i.stop, i.step)]
    return any(isinstance(v, fx.Node) and isinstance(v.meta.get("value"), Tensor) for v in bounds)


_ARITHMETIC = {"add", "sub", "mul", "truediv", "div", "pow", "neg", "eq", "ne", "lt", "gt", "le"}


def _passes(node: fx.Node, source: fx.Node) -> bool:
    """Whether a mark goes on: a tensor keeps its extent when a number is added to it."""
    number = isinstance(source.meta.get("value"), (int, float))
    return not (
        number and isinstance(node.meta.get("value"), Tensor) and named(node) in _ARITHMETIC
    )


# -- builtins ---------------------------------------------------------------------------------


@contextmanager
def seen_as_values() -> Iterator[None]:
    """Python's own functions take traced values for what they stand for, inside the block.

    ``isinstance`` and ``callable`` are told what it is, and a Variable of one is the value. Only
    Python is: torch's C++ code asks for the real type and must get it, since it would read a
    proxy's memory as a tensor's. ``len`` of a tensor, and ``min`` and ``max`` of numbers that
    depend on data, are recorded.
    """
    names = ("isinstance", "callable", "len", "min", "max")
    kept = {name: getattr(builtins, name) for name in names}
    variable = type(torch.autograd.Variable)
    is_instance: Callable[[Any, Any], bool] = kept["isinstance"]

    def seen(obj: Any, kinds: Any, /) -> bool:
        if is_instance(obj, kinds):
            return True
        return type(obj) in (Value, Attribute) and is_instance(obj.value, kinds)

    def length(obj: Any, /) -> Any:
        if type(obj) in (Value, Attribute) and is_instance(obj.value, Tensor):
            return obj.tracer.create_proxy("call_function", kept["len"], (obj,), {})
        return kept["len"](obj)

    def calls(obj: Any, /) -> bool:
        traced = type(obj) in (Value, Attribute)
        return bool(kept["callable"](obj.value if traced else obj))

    def extreme(name: str) -> Callable[..., Any]:
        original = kept[name]

        @functools.wraps(original)
        def choose(*args: Any, **kwargs: Any) -> Any:
            marked = [a for a in args if type(a) in (Value, Attribute) and a.node.meta.get("data")]
            if marked and kept["len"](args) > 1 and not kwargs:
                return marked[0].tracer.create_proxy("call_function", original, args, {})
            return original(*args, **kwargs)

        return choose

    def of(kind: Any, data: Any = None, *args: Any, **kwargs: Any) -> Any:
        if type(data) in (Value, Attribute):
            return data
        return type.__call__(kind, data, *args, **kwargs)

    patches = {"isinstance": seen, "callable": calls, "len": length}
    patches |= {name: extreme(name) for name in ("min", "max")}
    for name, patch in patches.items():
        setattr(builtins, name, patch)
    type.__setattr__(variable, "__call__", of)
    try:
        yield
    finally:
        type.__delattr__(variable, "__call__")
        for name, original in kept.items():
            setattr(builtins, name, original)
