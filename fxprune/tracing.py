"""A tracer with concrete values at hand: nn.Module + example inputs -> fx.Graph.

The tracer runs the model once while it records it, so every proxy knows its value: Python control
flow on shapes is decided by the shapes of the example inputs, and sizes stay symbolic where they
are passed to tensor operations (the batch size stays free). Control flow on tensor data cannot be
recorded: the innermost module in which tracing fails is kept whole, as an opaque leaf.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace as fx_trace
from torch.fx.proxy import TraceError
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils._pytree import tree_map_only

from fxprune.attention import in_operations
from fxprune.decisions import other_way_raises, settled_tensor
from fxprune.errors import ModelError
from fxprune.inputs import Inputs, divisible, samples_of
from fxprune.leaves import is_changed, is_leaf
from fxprune.record import Recorder
from fxprune.trees import holds, leaves
from fxprune.values import Attribute, Value, follows_data, is_traced, seen_as_values
from fxprune.whole import CONSTANT, DataDependence, KeptWhole, Whole, autocast_recorded

_CREATORS = (
    "arange",
    "zeros",
    "ones",
    "full",
    "empty",
    "linspace",
    "eye",
    "rand",
    "randn",
)
_METHODS = (
    "expand",
    "view",
    "reshape",
    "repeat",
    "to",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
    "unflatten",
    "tile",
    "narrow",
    "split",
    "chunk",
)  # fmt: skip - of plain tensors; torch's C++ code takes no traced sizes in lists
_SIZED = ("zeros", "ones", *(name for name in _METHODS if name not in ("to", "new_full")))
_PLAIN = frozenset((int, float, bool, str, type(None), torch.dtype, torch.device))
_OURS = ("torch.fx", "fxprune")  # modules whose frames are not the model's
WITHIN = "within"  # of a node's meta: the path of the module in whose forward it was made
_OF_VALUES = ("tensor", "as_tensor", "finfo", "iinfo")  # recorded where a traced value goes in


class ConcreteTracer(fx.Tracer):
    """Records a model while running it on ``inputs``; what is in ``whole`` becomes one node.

    failed    after an exception: path of the innermost module, and the exception
    dropped   after a trace: parts of the output that no graph can give -> their type
    counts    after a trace: whether Python used a number that may be the number of samples;
              with ``any_batch`` that is an error
    """

    def __init__(self, inputs: Inputs, whole: Whole, any_batch: bool = False) -> None:
        super().__init__(autowrap_modules=(math,))
        self.inputs, self.whole = inputs, whole
        self.recorder = Recorder()
        self.proxy_buffer_attributes = True
        self.running, self.within = False, ""
        self.failed: tuple[str, Exception] | None = None
        self.dropped: dict[str, str] = {}
        self.names: dict[int, str] = {}
        self.paths: dict[nn.Module, str] = {}
        self.modules: dict[str, nn.Module] = {}
        self.objects: dict[int, str] = {}
        self.samples = samples_of(inputs.values) if divisible(inputs.values) else None
        self.any_batch, self.counts = any_batch, False

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        tensors = list(root.named_parameters()) + list(root.named_buffers())
        self.names = {id(t): name for name, t in reversed(tensors)}
        modules = list(root.named_modules())
        self.paths, self.modules = {m: path for path, m in modules}, dict(modules)
        with self._patched(), seen_as_values():
            return super().trace(root, concrete_args)

    # -- what becomes a node ------------------------------------------------------------------

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, ParametrizationList):
            return True
        if isinstance(m, torch.jit.ScriptModule):
            self.whole.modules.setdefault(module_qualified_name, "a scripted module")
        if module_qualified_name in self.whole.modules:
            return True
        return not is_changed(m) and is_leaf(m)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self.running:
            return forward(*args, **kwargs)
        path = self.paths.get(m)
        if path is None:  # made in forward, or hidden in a plain list
            return forward(*args, **kwargs)
        outer, self.within = self.within, path
        try:
            if self.is_leaf_module(m, path):
                return self.create_proxy("call_module", path, args, kwargs)
            return forward(*args, **kwargs)
        except Exception as error:
            if self.failed is None:
                self.failed = (path, error)
            raise
        finally:
            self.within = outer

    def create_node(
        self,
        kind: str,
        target: Any,
        args: Any,
        kwargs: Any,
        name: Any = None,
        type_expr: Any = None,
    ) -> fx.Node:
        """A node that knows the module in whose forward it was made, instead of fx's stacks."""
        node = self.graph.create_node(kind, target, args, kwargs, name, type_expr)
        node.meta[WITHIN] = self.within
        return node

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        name = None if self.running else self.names.get(id(attr_val))
        if name is None or not isinstance(attr_val, Tensor):
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        names = self.inputs.names or _input_names(self.root, len(self.inputs.values))
        args: list[Any] = []
        values = tree_map_only(Tensor, torch.clone, self.inputs.values)  # forward may write to them
        for name, value in zip(names, values, strict=True):
            node = self.create_node("placeholder", name, (), {})
            node.meta["value"] = value
            args.append(self.proxy(node))
        call = functools.partial(nn.Module.__call__, self.root)  # as it is now, not recorded

        def run(*given: Any) -> Any:
            return self._output(self.inputs.call(call, given), "output")

        return run, args

    # -- values -------------------------------------------------------------------------------

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Value(node, self)

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **kw: Any
    ) -> Any:
        if target is F.scaled_dot_product_attention and kwargs.get("enable_gqa"):
            args, kwargs = self._repeated_heads(args, kwargs)
        if kind in ("call_function", "call_method"):
            name = target if isinstance(target, str) else getattr(target, "__name__", "")
            if name in _SIZED:
                first = 0 if name in ("zeros", "ones") else 1
                args = (*args[:first], *fx.node.map_aggregate(args[first:], _bound))
                kwargs = fx.node.map_aggregate(kwargs, _bound)
        made: Any = super().create_proxy(kind, target, args, kwargs, *rest, **kw)
        node = made.node
        if "value" not in node.meta:
            node.meta["value"] = self._run(node)
            node.meta["data"] = node.meta.get("data", False) or follows_data(node)
        return made

    def _repeated_heads(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Grouped-query attention with the repetition of its keys and values written out."""
        given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        del given["enable_gqa"]
        for name in ("key", "value"):
            count = given["query"].value.shape[-3] // given[name].value.shape[-3]
            if count > 1:
                given[name] = given[name].repeat_interleave(count, -3)
        rest = {k: v for k, v in given.items() if k not in ("query", "key", "value")}
        return (given["query"], given["key"], given["value"], *args[3:]), rest

    def _value_of(self, node: fx.Node) -> Any:
        if "value" not in node.meta:  # a tensor that became an attribute of the root, a named tuple
            alone = node.op == "get_attr"
            made = _attribute(self.root, str(node.target)) if alone else self._run(node)
            node.meta["value"] = made
        return node.meta["value"]

    def _run(self, node: fx.Node) -> Any:
        args = fx.node.map_arg(node.args, self._value_of)
        kwargs = fx.node.map_arg(node.kwargs, self._value_of)
        call: Any = node.target
        self.running = True
        try:
            if node.op == "get_attr":
                return _attribute(self.root, call)
            if node.op == "call_module":
                call = self.modules[call]
            elif node.op == "call_method":
                call, args = getattr(args[0], call), args[1:]
            if isinstance(call, KeptWhole) or node.target in self.whole.modules:
                self.recorder.complete = False
                return self._run_whole(node, call, args, kwargs)
            return self.recorder.call(node.name, call, args, kwargs)
        finally:
            self.running = False

    def _run_whole(self, node: fx.Node, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A part that is not traced through: its results may have extents that depend on data."""
        with DataDependence() as found:
            result = call(*args, **kwargs)
        number = not any(isinstance(leaf, Tensor) for leaf in leaves(result))
        node.meta["data"] = found.extent or number
        return result

    def create_arg(self, a: Any) -> Any:
        kind = type(a)
        if kind is Value or kind is Attribute:
            return a.node
        if kind in _PLAIN:
            return a
        if kind is tuple or kind is list:
            return kind([self.create_arg(v) for v in a])
        if kind is slice:
            return slice(*(self.create_arg(_bound(v)) for v in (a.start, a.stop, a.step)))
        if isinstance(a, np.generic):
            return a.item()
        if isinstance(a, dict) and is_dataclass(a):
            made = self.create_proxy(
                "call_function", type(a), (), {str(k): v for k, v in a.items()}
            )
            return made.node
        try:
            return super().create_arg(a)
        except NotImplementedError:
            return self._constant(a)

    def _constant(self, a: Any) -> Any:
        """An object that the graph only hands on, as an attribute of the root."""
        if isinstance(a, nn.Module) or holds(a, lambda v: is_traced(v) or id(v) in self.names):
            raise TraceError(f"a {type(a).__name__} that holds traced values cannot be recorded")
        if id(a) not in self.objects:
            self.objects[id(a)] = f"{CONSTANT}_object{len(self.objects)}"
            setattr(self.root, self.objects[id(a)], a)
        return self.create_node("get_attr", self.objects[id(a)], (), {})

    def _output(self, value: Any, where: str) -> Any:
        """What a graph can return of an output: objects that hide tensors (caches) are left out."""
        if type(value) in (dict, list, tuple) or (isinstance(value, dict) and is_dataclass(value)):
            items: Any = value.items() if isinstance(value, dict) else enumerate(value)
            kept: Any = {k: self._output(v, f"{where}.{k}") for k, v in items}
            if type(value) in (list, tuple):
                return type(value)(kept.values())
            return kept if type(value) is dict else type(value)(**kept)
        plain = is_traced(value) or value is None or isinstance(value, (tuple, list, dict, Tensor))
        if not plain and not is_dataclass(value) and holds(value, is_traced):
            self.dropped[where] = type(value).__name__
            return None
        return value

    def to_bool(self, obj: fx.Proxy) -> bool:
        assert isinstance(obj, Value)
        value = obj.node.meta["value"]
        if isinstance(value, Tensor) and settled_tensor(obj.node):
            return bool(value)
        data = isinstance(value, Tensor) or obj.node.meta.get("data")
        if data and other_way_raises(_OURS, bool(value)):
            return bool(value)
        if isinstance(value, Tensor):
            raise TraceError(f"Python control flow on the data of tensor {obj.node.name!r}")
        obj.settled("its truth")
        return bool(value)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        value = obj.node.meta["value"]
        if isinstance(value, dict):
            return iter(value)
        assert isinstance(obj, Value)
        obj.settled("its length")
        if isinstance(value, Tensor):
            obj.counted(len(value))
            return iter(obj.unbind(0))
        items: Any = obj
        return iter([items[i] for i in range(len(value))])

    def keys(self, obj: fx.Proxy) -> Any:
        return obj.node.meta["value"].keys()

    # -- patches ------------------------------------------------------------------------------

    @contextmanager
    def _patched(self) -> Iterator[None]:
        """Creation functions and those that stay whole are recorded; fx.wrap means nothing here."""
        wrapped = dict(fx_trace._wrapped_fns_to_patch)
        fx_trace._wrapped_fns_to_patch.clear()
        patches: list[tuple[dict[str, Any], str, Any]] = []
        for name in _CREATORS + _OF_VALUES:
            patches += [(vars(torch), name, self._recorded(getattr(torch, name), name))]
        for name in ("_assert", *(n for n in vars(torch) if n.startswith("_check"))):
            patches.append((vars(torch), name, self._checked(getattr(torch, name))))
        patches.append((vars(F), "multi_head_attention_forward", in_operations))
        for function in self.whole.functions:
            made = self._as_one(function)
            patches += [(space, name, made) for space, name in _homes(function)]
        originals = [(space, name, space[name]) for space, name, _ in patches]
        try:
            for space, name, patch in patches:
                space[name] = patch
            with autocast_recorded(self), self._methods_recorded():
                yield
        finally:
            for space, name, original in reversed(originals):
                space[name] = original
            fx_trace._wrapped_fns_to_patch.update(wrapped)

    @contextmanager
    def _methods_recorded(self) -> Iterator[None]:
        """A constant tensor that is given traced sizes, a device or a dtype becomes a node too."""

        def recorded(name: str) -> Callable[..., Any]:
            original = getattr(Tensor, name)

            @functools.wraps(original)
            def call(t: Tensor, *args: Any, **kwargs: Any) -> Any:
                if self.running or not _has_proxy((args, kwargs)):
                    return original(t, *args, **kwargs)
                return self.create_proxy("call_method", name, (t, *args), kwargs)

            return call

        own = {name: vars(Tensor)[name] for name in _METHODS if name in vars(Tensor)}
        patches = {name: recorded(name) for name in _METHODS}
        try:
            for name, patch in patches.items():
                setattr(Tensor, name, patch)
            yield
        finally:
            for name in _METHODS:
                if name in own:
                    setattr(Tensor, name, own[name])
                elif name in vars(Tensor):
                    delattr(Tensor, name)

    def _recorded(self, original: Callable[..., Any], name: str) -> Callable[..., Any]:
        always = name in _CREATORS

        def create(*args: Any, **kwargs: Any) -> Any:
            if self.running or not (always or _has_proxy((args, kwargs))):
                return original(*args, **kwargs)
            return self.create_proxy("call_function", original, args, kwargs)

        return create

    def _as_one(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that stays whole: one node; traced through where its arguments forbid that."""
        whole = KeptWhole(function)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.running or not _has_proxy((args, kwargs)):
                return function(*args, **kwargs)
            try:
                self.create_arg((args, kwargs))
            except TraceError:
                return function(*args, **kwargs)
            return self.create_proxy("call_function", whole, args, kwargs)

        return call

    def _checked(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """An assertion is checked once, at the example inputs, and not recorded."""

        def check(*args: Any, **kwargs: Any) -> Any:
            values = [a.value if is_traced(a) else a for a in args]
            return original(*values, **kwargs)

        return check


def _bound(v: Any) -> Any:
    """A size or a bound of a slice; a number that a constant tensor holds is a number."""
    value = v.value if is_traced(v) else v
    if not isinstance(value, Tensor) or (is_traced(v) and not settled_tensor(v.node)):
        return v
    return int(v)


def _homes(function: Callable[..., Any]) -> list[tuple[dict[str, Any], str]]:
    """Every module-level name under which a function can be called."""
    found = []
    for module in list(sys.modules.values()):
        space = getattr(module, "__dict__", None)
        if isinstance(space, dict):
            found += [(space, k) for k, v in list(space.items()) if v is function]
    return found


def _has_proxy(tree: Any) -> bool:
    found: list[Any] = []

    def note(leaf: Any) -> Any:
        if is_traced(leaf):
            found.append(leaf)
        return leaf

    fx.node.map_aggregate(tree, note)
    return bool(found)


def _attribute(module: nn.Module, path: str) -> Any:
    value: Any = module
    for atom in path.split("."):
        value = getattr(value, atom)
    return value


def _input_names(model: nn.Module, count: int) -> list[str]:
    names = []
    for p in inspect.signature(type(model).forward).parameters.values():
        if p.kind is p.VAR_POSITIONAL:
            names += [f"{p.name}_{i}" for i in range(count)]
        elif p.kind is not p.VAR_KEYWORD:
            names.append(p.name)
    names = names[1:] if inspect.signature(type(model).forward).parameters else names
    if len(names) < count:
        raise ModelError(
            f"{type(model).__name__}.forward takes {len(names)} positional inputs, {count} came; "
            "give example_inputs as a tuple with one entry for each"
        )
    return names[:count]
