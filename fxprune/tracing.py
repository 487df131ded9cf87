"""nn.Module + example inputs -> Captured: an fx graph with concrete values at hand.

The tracer runs the model once while it records it, so every proxy knows its value: Python control
flow on shapes is decided by the shapes of the example inputs, and sizes stay symbolic where they
are passed to tensor operations (the batch size stays free). Control flow on tensor data cannot be
recorded: the innermost module in which tracing fails is kept whole, as an opaque leaf.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace as fx_trace
from torch.fx.proxy import TraceError

from fxprune.attention import TraceableAttention
from fxprune.copies import copied
from fxprune.errors import ModelError
from fxprune.products import evaluating

# Modules whose sizes are attributes that cutting keeps in step; all others are traced through.
LEAVES: tuple[type[nn.Module], ...] = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.Embedding,
    nn.PReLU,
    nn.modules.dropout._DropoutNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._MaxPoolNd,
)
_FOLLOW_DATA = ("nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "nms")
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
    "tensor",
)


@dataclass(frozen=True)
class Captured:
    """A traced model.

    graph_module  eval mode; parameters and buffers are the model's own tensors
    base          copy of the user's model that shares those tensors, attention made traceable
    inputs        the example inputs, one per placeholder
    opaque        path of each module kept whole -> reason
    """

    graph_module: fx.GraphModule
    base: nn.Module
    inputs: tuple[Any, ...]
    opaque: dict[str, str]


class _Value(fx.Proxy):
    """A proxy that knows the concrete value of its node."""

    _node_value_type: type | None = None

    @property
    def value(self) -> Any:
        return self.node.meta["value"]

    @property
    def __class__(self) -> Any:  # isinstance(x, Tensor) holds for traced tensors
        known = self.__dict__.get("_node_value_type")
        return known if known is not None else type(self)

    @__class__.setter
    def __class__(self, value: Any) -> None:
        raise TypeError("the class of a traced value is fixed")

    def __getattr__(self, name: str) -> Any:
        if name in ("_is_param", "_is_buffer"):  # asked by isinstance(x, nn.Parameter)
            return False
        if name.startswith("__"):
            raise AttributeError(name)
        if self.__dict__.get("attr") == "device":  # x.device.type is a string for Python alone
            return getattr(self.value, name)
        return _Attribute(self, name)

    def __len__(self) -> int:
        return len(self.value)

    def __index__(self) -> int:
        return int(self._number().__index__())

    def __int__(self) -> int:
        return int(self._number())

    def __float__(self) -> float:
        return float(self._number())

    def __contains__(self, item: Any) -> bool:
        return any(bool(item == part) for part in self)

    def __hash__(self) -> int:
        return id(self)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def _in_place(self, name: str, other: Any) -> Any:
        if not isinstance(self.value, Tensor):
            return NotImplemented
        target = getattr(operator, name)
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    def _number(self) -> Any:
        if isinstance(self.value, Tensor):
            raise TraceError(f"Python reads the data of tensor {self.node.name!r}")
        return self.value


_IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor")
for _name in _IN_PLACE:
    setattr(_Value, f"__{_name}__", functools.partialmethod(_Value._in_place, _name))


class _Attribute(_Value):
    """``x.name``, recorded only when it is used as a value and not called."""

    def __init__(self, root: _Value, name: str) -> None:
        self.root, self.attr, self.tracer = root, name, root.tracer
        self._node: fx.Node | None = None

    @property
    def node(self) -> fx.Node:  # type: ignore[override]
        if self._node is None:
            made = self.tracer.create_proxy("call_function", getattr, (self.root, self.attr), {})
            self._node = made.node
            self._node_value_type = made.__dict__.get("_node_value_type")
        return self._node

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tracer.create_proxy("call_method", self.attr, (self.root, *args), kwargs)


class ConcreteTracer(fx.Tracer):
    """Records a model while running it on ``inputs``; modules in ``opaque`` stay whole."""

    def __init__(self, inputs: Sequence[Any], opaque: dict[str, str], strict: bool) -> None:
        super().__init__(autowrap_modules=(math,))
        self.strict = strict
        self.inputs, self.opaque = tuple(inputs), opaque
        self.proxy_buffer_attributes = True
        self.running = False
        self.failed: tuple[str, BaseException] | None = None
        self.names: dict[int, str] = {}

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        tensors = list(root.named_parameters()) + list(root.named_buffers())
        self.names = {id(t): name for name, t in reversed(tensors)}
        with self._patched():
            return super().trace(root, concrete_args)

    # -- what becomes a node ------------------------------------------------------------------

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.opaque:
            return True
        parametrized = hasattr(m, "parametrizations")
        return (
            isinstance(m, LEAVES) and not parametrized and type(m).__module__.startswith("torch.")
        )

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self.running:
            return forward(*args, **kwargs)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:
            if self.failed is None:
                self.failed = (self.path_of_module(m), error)
            raise

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
        args: list[Any] = [self.root]
        for name, value in zip(_input_names(self.root, len(self.inputs)), self.inputs, strict=True):
            node = self.create_node("placeholder", name, (), {})
            node.meta["value"] = value
            args.append(self.proxy(node))
        return root_fn, args

    # -- values -------------------------------------------------------------------------------

    def proxy(self, node: fx.Node) -> fx.Proxy:
        made = _Value(node, self)
        if isinstance(node.meta.get("value"), Tensor):
            made._node_value_type = Tensor
        return made

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **kw: Any
    ) -> Any:
        made: Any = super().create_proxy(kind, target, args, kwargs, *rest, **kw)
        node = made.node
        if "value" not in node.meta:
            node.meta["value"] = self._run(node)
            self._check_extent(node)
        if isinstance(node.meta["value"], Tensor):
            made._node_value_type = Tensor
        return made

    def _check_extent(self, node: fx.Node) -> None:
        """Results whose extent depends on data: their module stays whole, if that is possible.

        In the model's own forward there is no such module; then it is noted.
        """
        if not self._follows_data(node):
            return
        what = f"the extent of {node.name!r} depends on data"
        if self.module_stack and self.strict:
            raise TraceError(what)
        self.opaque.setdefault("forward", f"{what}: control flow behind it is as for the examples")

    def _follows_data(self, node: fx.Node) -> bool:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if name == "getitem" and len(node.args) > 1:
            index = self._value_of(node.args[1]) if isinstance(node.args[1], fx.Node) else None
            return isinstance(index, Tensor) and index.dtype == torch.bool
        return name in _FOLLOW_DATA or (name == "where" and len(node.args) + len(node.kwargs) == 1)

    def _value_of(self, node: fx.Node) -> Any:
        if "value" not in node.meta:  # a tensor that became an attribute of the root
            node.meta["value"] = _attribute(self.root, str(node.target))
        return node.meta["value"]

    def _run(self, node: fx.Node) -> Any:
        args = fx.node.map_arg(node.args, self._value_of)
        kwargs = fx.node.map_arg(node.kwargs, self._value_of)
        self.running = True
        try:
            if node.op == "call_module":
                return self.root.get_submodule(str(node.target))(*args, **kwargs)
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            if node.op == "get_attr":
                return _attribute(self.root, str(node.target))
            return node.target(*args, **kwargs)  # type: ignore[operator]
        finally:
            self.running = False

    def create_arg(self, a: Any) -> Any:
        return a.node if type(a) in (_Value, _Attribute) else super().create_arg(a)

    def to_bool(self, obj: fx.Proxy) -> bool:
        value = obj.node.meta["value"]
        if isinstance(value, Tensor):
            raise TraceError(f"Python control flow on the data of tensor {obj.node.name!r}")
        return bool(value)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        value = obj.node.meta["value"]
        if isinstance(value, dict):
            return iter(value)
        if isinstance(value, Tensor):
            return iter(obj.unbind(0))
        items: Any = obj
        return iter([items[i] for i in range(len(value))])

    def keys(self, obj: fx.Proxy) -> Any:
        return obj.node.meta["value"].keys()

    # -- patches ------------------------------------------------------------------------------

    @contextmanager
    def _patched(self) -> Iterator[None]:
        """Creation functions are recorded; functions marked with fx.wrap are traced through."""
        functions = dict(fx_trace._wrapped_fns_to_patch)
        originals = {name: getattr(torch, name) for name in _CREATORS}
        assertion = torch._assert
        fx_trace._wrapped_fns_to_patch.clear()
        for name, original in originals.items():
            setattr(torch, name, self._recorded(original, always=name != "tensor"))
        torch._assert = self._checked(assertion)
        try:
            yield
        finally:
            torch._assert = assertion
            for name, original in originals.items():
                setattr(torch, name, original)
            fx_trace._wrapped_fns_to_patch.update(functions)

    def _recorded(self, original: Callable[..., Any], always: bool) -> Callable[..., Any]:
        def create(*args: Any, **kwargs: Any) -> Any:
            if self.running or not (always or _has_proxy((args, kwargs))):
                return original(*args, **kwargs)
            return self.create_proxy("call_function", original, args, kwargs)

        return create

    def _checked(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """An assertion is checked once, at the example inputs, and not recorded."""

        def check(condition: Any, message: str = "") -> None:
            original(condition.value if isinstance(condition, _Value) else condition, message)

        return check


def _has_proxy(tree: Any) -> bool:
    found: list[Any] = []

    def note(leaf: Any) -> Any:
        if type(leaf) in (_Value, _Attribute):
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


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the module tree that shares the parameters, with attention made traceable.

    Buffers are copied: a forward that writes to them must not change the user's.
    """
    base = copied(model, {id(t): t for t in model.parameters()})
    for path, module in list(base.named_modules()):
        if path and TraceableAttention.replaces(module):
            parent, _, name = path.rpartition(".")
            assert isinstance(module, nn.MultiheadAttention)
            setattr(base.get_submodule(parent), name, TraceableAttention(module))
    return base.eval()


@contextmanager
def state_kept(module: nn.Module) -> Iterator[None]:
    """Attributes and buffers that a run replaces, and buffers that it writes to, are put back.

    What the tracer itself adds (tensors that are constants of the graph) stays.
    """
    internal = nn.Module().__dict__
    held = [(m, dict(m.__dict__), dict(m._buffers)) for m in module.modules()]
    values = {id(t): t.clone() for _, _, own in held for t in own.values() if t is not None}
    containers = [
        (v, copy.copy(v))
        for _, own, _ in held
        for k, v in own.items()
        if isinstance(v, (dict, list, set)) and k not in internal
    ]
    try:
        yield
    finally:
        for container, content in containers:  # caches that forward fills
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(content)
        with torch.no_grad():
            for m, attributes, buffers in held:
                made = {k: v for k, v in m.__dict__.items() if k.startswith("_tensor_constant")}
                m.__dict__.clear()
                m.__dict__.update(made | attributes)
                m._buffers.clear()
                m._buffers.update(buffers)
                for t in buffers.values():
                    if t is not None:
                        t.copy_(values[id(t)])


def as_inputs(example_inputs: Any) -> tuple[Any, ...]:
    """A tensor, or a tuple or list with one entry for each positional input -> tuple."""
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs)
    return (example_inputs,)


def capture(model: nn.Module, example_inputs: Any) -> Captured:
    """Trace ``model``; it is left as it was. Raises ModelError when it does not run."""
    inputs = as_inputs(example_inputs)
    base = shared_copy(model)
    opaque: dict[str, str] = {}
    rng = torch.get_rng_state()
    try:
        with evaluating(base):
            try:
                graph = _trace(base, inputs, opaque, strict=True)
            except ModelError:
                opaque.clear()
                graph = _trace(base, inputs, opaque, strict=False)
    finally:
        torch.set_rng_state(rng)
    for node in graph.nodes:
        node.meta.pop("value", None)
    graph.eliminate_dead_code(lambda n: _impure(n, base))
    gm = fx.GraphModule(base, graph, type(model).__name__)
    gm.eval()
    return Captured(gm, base, inputs, opaque)


def _trace(
    base: nn.Module, inputs: tuple[Any, ...], opaque: dict[str, str], strict: bool
) -> fx.Graph:
    while True:
        tracer = ConcreteTracer(inputs, opaque, strict)
        try:
            with state_kept(base):
                return tracer.trace(base)
        except Exception as error:
            _check_runs(base, inputs)
            if tracer.failed is None or tracer.failed[0] in opaque:
                raise ModelError(
                    f"{type(base).__name__}.forward cannot be traced: {type(error).__name__}: "
                    f"{error}. Move control flow on data into a submodule; it is then kept whole"
                ) from error
            path, reason = tracer.failed
            opaque[path] = f"{type(reason).__name__}: {reason}"


def _check_runs(base: nn.Module, inputs: tuple[Any, ...]) -> None:
    try:
        base(*inputs)
    except Exception as error:
        shapes = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in inputs]
        raise ModelError(
            f"{type(base).__name__} raises on the example inputs {shapes}: "
            f"{type(error).__name__}: {error}. Give inputs that the model accepts"
        ) from error


def _impure(node: fx.Node, base: nn.Module) -> bool:
    """Whether a node without users must stay: it may write to a tensor."""
    if node.op in ("placeholder", "output", "call_module"):
        return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    writes = name.endswith("_") or name in ("setitem", *_IN_PLACE)
    return node.op != "get_attr" and (
        writes or bool(node.kwargs.get("inplace")) or "out" in node.kwargs
    )
