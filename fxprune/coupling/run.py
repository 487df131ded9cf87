"""One labelled run of a traced graph: Captured -> Run (facts, and the fields of every node)."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.nn.utils.parametrize import ParametrizationList
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from fxprune import parametrized, trees
from fxprune.capture import Captured, state_kept
from fxprune.coupling import (  # noqa: F401 - rules
    contraction,
    forms,
    mixing,
    movement,
    patches,
    routing,
)
from fxprune.coupling.branches import all_ways, same_form
from fxprune.coupling.labels import Facts, Labels, ProductRecord, varying
from fxprune.coupling.recurrent import recurrent
from fxprune.coupling.rules import apply_rule, meet
from fxprune.leaves import is_leaf
from fxprune.products import Product, as_product, evaluating, storage_key
from fxprune.record import Composites, Recorded
from fxprune.types import IntArray
from fxprune.values import PARTS
from fxprune.whole import KeptWhole


@dataclass(frozen=True)
class Traits:
    """What cutting needs to know of one tensor, at the example inputs."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    fields: tuple[IntArray, ...]
    learnable: bool = False


@dataclass(frozen=True)
class Run:
    """``values``: node name -> its value with every tensor replaced by Traits."""

    facts: Facts
    values: dict[str, Any]
    parameters: dict[str, Traits]


class _LabelMode(TorchDispatchMode):
    def __init__(
        self, labels: Labels, names: dict[int, str], parameters: dict[str, Traits]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.labels, self.names, self.parameters = labels, names, parameters
        self.node, self.count = "", 0
        self.used: set[str] = set()  # parameters that parts which are kept whole have used

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.labels.opaque:
            found = (self.names.get(storage_key(t)) for t in trees.tensors((args, kwargs)))
            self.used.update(name for name in found if name is not None)
        self.done(func, args, kwargs, out)
        return out

    def done(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        """An op has run."""
        apply_rule(self.labels, func, args, kwargs, out)
        product = as_product(func, args)
        if product is not None and storage_key(product.w) in self.names:
            self._product(product)

    def _product(self, product: Product) -> None:
        key, name = f"{self.node}:{self.count}", self.names[storage_key(product.w)]
        self.count += 1
        weight = self.parameters.get(name)
        if weight is None or sorted(product.w.shape) != sorted(weight.shape):
            return
        in_dim = 0 if product.transposed else 1
        if product.kind == "linear" and product.w.stride(0) != 1:  # not a transposed view
            in_dim = 0
        bias = None if product.bias is None else self.names.get(storage_key(product.bias))
        channels = 1  # dim of the channels in x, for [N, C, *] and [M, C] alike
        found = [f.ravel() for f in self.labels.of(product.x) if varying(f) == {channels}]
        record = ProductRecord(
            key, self.node, product.kind, name, bias, in_dim, product.groups, product.transposed,
            found[0] if found else None,
        )  # fmt: skip
        self.labels.facts.products.append(record)


class _Shape(tuple[int, ...]):
    """A shape that notes which of its dims Python asks for."""

    note: Callable[[Iterable[int]], None]

    def __getitem__(self, at: Any) -> Any:
        found = range(len(self))[at]
        self.note([found] if isinstance(found, int) else found)
        return super().__getitem__(at)

    def __iter__(self) -> Iterator[int]:
        self.note(range(len(self)))
        return super().__iter__()

    def numel(self) -> int:
        return math.prod(self)


class SizesRead(TorchFunctionMode):
    """Inside a part that is kept whole, channel dims whose size Python reads are locked.

    What it makes of the number (a scale, say) would change with the channels.
    """

    def __init__(self, labels: Labels) -> None:
        super().__init__()
        self.labels = labels

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "__get__" and func == Tensor.shape.__get__:  # type: ignore[attr-defined]
            name = "size"
        if name in ("numel", "nelement"):
            self._read(args[0], range(args[0].dim()))
        elif name == "__len__":
            self._read(args[0], [0])
        elif name == "size" and isinstance(out, torch.Size):
            shape = _Shape(out)
            shape.note = functools.partial(self._read, args[0])
            return shape
        elif name == "size":
            dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
            self._read(args[0], [dim % args[0].dim()])
        return out

    def _read(self, t: Tensor, dims: Iterable[int]) -> None:
        wanted = frozenset(dims)
        for f in self.labels.of(t):
            if varying(f) & wanted:
                self.labels.lock(f, "its size is read inside a part that is kept whole")


# Calls whose sizes are arguments in the graph: their extent follows whatever they meet.
CREATORS = (
    "zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty",
)  # fmt: skip

# Functions of torch that are one call and keep sizes as numbers inside.
COMPOSITES = ("multi_head_attention_forward",)

EXPANDERS = (
    "expand", "expand_as", "broadcast_to", "matmul", "einsum", "scaled_dot_product_attention",
    "take_along_dim",
)  # fmt: skip


class _LabelInterpreter(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, mode: _LabelMode, values: dict[str, Any]) -> None:
        super().__init__(gm)
        self.mode, self.values = mode, values
        self.labels = mode.labels
        self.composites = Composites(functools.partial(apply_rule, self.labels))
        self.recorded: Recorded | None = None

    def read(self, recorded: Recorded) -> None:
        """The same as ``run``, from what has been recorded."""
        self.recorded = recorded
        for n in self.module.graph.nodes:  # type: ignore[union-attr]
            self.run_node(n)

    def _recorded(self, recorded: Recorded, n: fx.Node) -> Any:
        if n.op == "get_attr":
            recorded.values[n.name] = self.fetch_attr(str(n.target))
        if n.name in recorded.values:
            for op in recorded.ops.get(n.name, ()):
                self.mode.done(*op)
            return recorded.values[n.name]
        args, kwargs = self._known((n.args, n.kwargs))
        with self.mode:  # an object that holds results, made for the output
            made = args[0] if n.op == "output" else n.target(*args, **kwargs)  # type: ignore[operator]
        recorded.values[n.name] = made
        return made

    def _known(self, tree: Any) -> Any:
        """``tree`` with recorded values in place of nodes."""
        values = self.recorded.values if self.recorded is not None else {}
        return fx.node.map_arg(tree, lambda i: values[i.name])

    def run_node(self, n: fx.Node) -> Any:
        self.mode.node, self.mode.count = n.name, 0
        self.labels.where = f"{n.name} ({n.target})" if n.op == "call_module" else n.name
        self.labels.opaque = self._is_opaque(n)
        self.labels.literal = n.op != "call_module" and _addresses_literally(n)
        self.labels.measured = self._is_measured(n)
        self.labels.pads = n.op != "call_module" and call_name(n) == "pad"
        self.labels.averages = n.op != "call_module" and call_name(n) == "mean"
        self.labels.extremes = n.op != "call_module" and _extreme_alone(n)
        self.labels.expands = n.op != "call_module" and _expands(n)
        block = self.submodules.get(str(n.target)) if n.op == "call_module" else None
        if isinstance(block, ParametrizationList):
            result = self._parametrized(n, block)
        elif isinstance(block, torch.nn.RNNBase):
            result = self._recurrent(block, n)
        elif self.recorded is not None:
            result = self._recorded(self.recorded, n)
        elif self.labels.opaque:
            result = self._every_way(n)
        else:
            with self.composites:
                result = super().run_node(n)
        if n.op != "call_module" and call_name(n) in CREATORS and isinstance(result, Tensor):
            self.labels.created(result)
            if "zeros" in call_name(n):
                self.labels.vanish(result)
        self.values[n.name] = self._traits(result)
        if n.op == "output":
            self.labels.where = ""
            hidden = (t for t in trees.reachable(result) if isinstance(t, Tensor))
            self.labels.lock_all([*trees.tensors(result), *hidden], "model output")
        return result

    def _every_way(self, n: fx.Node) -> Any:
        """A part that is kept whole, through all of its branches; the result is the example's."""
        one_way = functools.partial(super().run_node, n)

        def run() -> Any:
            with SizesRead(self.labels):
                return one_way()

        ways = all_ways(run)
        result, _ = next(ways)
        facts = self.labels.facts
        ran = len(facts.contractions), len(facts.products), self.mode.count
        given: list[Tensor] = trees.tensors(
            [self.env[i] for i in n.all_input_nodes if i in self.env]
        )
        for other, cut_short in ways:
            del facts.contractions[ran[0] :], facts.products[ran[1] :]  # the costs are the way's
            self.mode.count = ran[2]
            pairs = [] if other is None else same_form(result, other)
            if pairs is None or cut_short:
                why = "a part that is kept whole has more branches than can be followed"
                self.labels.lock_all([*given, *trees.tensors([result, other])], why)
                continue
            for a, b in pairs:
                fields = meet(self.labels, [a, b], a.dim()) if _fits(a, b) else None
                if fields is None:
                    self.labels.lock_all([a, b], "its size depends on a branch")
        if self._unused(n):
            why = "a part that is kept whole has parameters that no branch has used"
            self.labels.lock_all([*given, *trees.tensors(result)], why)
        return result

    def _unused(self, n: fx.Node) -> bool:
        """Whether a part that is kept whole has parameters in a branch that was not found."""
        part = self.submodules.get(str(n.target)) if n.op == "call_module" else None
        own = [] if part is None else list(part.parameters())
        return any(self.mode.names.get(storage_key(t)) not in self.mode.used for t in own)

    def _parametrized(self, n: fx.Node, block: ParametrizationList) -> Tensor:
        """The weight has the labels of the parameter of its shape, along the dims that may go."""
        with _disable_current_modes():
            weight: Tensor = block() if self.recorded is None else self.recorded.values[n.name]
            free, name = parametrized.free_dims(block), parametrized.source(block)
        named = tensors_of(block)
        behind = next((t for own, t in named if own == name), None)
        fields = [f for f in self.labels.of(behind) if varying(f) <= free]
        reason = f"{type(block[0]).__name__} cannot give fewer of them"
        for _, t in named:
            along = t.dim() == weight.dim()
            for f in self.labels.of(t):
                mine = [g for g in fields if along and varying(g) == varying(f)]
                if mine and mine[0].shape == f.shape:
                    self.labels.union(mine[0], f)
                else:
                    self.labels.lock(f, reason)
        self.labels.put(weight, fields)
        self.labels.vanish(weight)
        return weight

    def _recurrent(self, block: torch.nn.RNNBase, n: fx.Node) -> Any:
        if self.recorded is None:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            with _disable_current_modes():
                result = block(*args, **kwargs)
        else:
            args, kwargs = self._known((n.args, n.kwargs))
            result = self.recorded.values[n.name]
        recurrent(self.labels, block, args, kwargs, result)
        return result

    def _is_opaque(self, n: fx.Node) -> bool:
        """Whether what a node does inside is out of reach of rewriting."""
        if n.op == "call_module":
            return not is_leaf(self.submodules[str(n.target)])
        return isinstance(n.target, KeptWhole) or call_name(n) in COMPOSITES

    def _is_measured(self, n: fx.Node) -> bool:
        """Whether a part is taken up to a number that is data."""
        name, parts = call_name(n) if n.op != "call_module" else "", n.args[1:]
        if name in ("getitem", "setitem"):
            listed = n.args[1] if isinstance(n.args[1], tuple) else n.args[1:2]
            parts = tuple(i for i in listed if isinstance(i, slice))
        elif name not in ("narrow", *PARTS):
            return False
        found: list[fx.Node] = []
        fx.node.map_arg((parts, n.kwargs), found.append)
        return any(i.meta.get("data") or isinstance(self.values[i.name], Traits) for i in found)

    def _traits(self, value: Any) -> Any:
        def one(t: Tensor) -> Traits:
            return Traits(tuple(t.shape), t.dtype, tuple(self.labels.of(t)))

        return one(value) if isinstance(value, Tensor) else trees.map_tensors(one, value)


def _fits(a: Tensor, b: Tensor) -> bool:
    """Whether two results of one part can stand in the same place: sizes broadcast."""
    return all(p == q or 1 in (p, q) for p, q in zip(a.shape, b.shape, strict=True))


def tensors_of(module: torch.nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters, then buffers, by name; each tensor once."""
    found: tuple[dict[int, tuple[str, Tensor]], ...] = ({}, {})
    for path, m in module.named_modules():
        for held, own in zip(found, (m._parameters, m._buffers), strict=True):
            for name, t in own.items():
                if t is not None:
                    held.setdefault(id(t), (f"{path}.{name}" if path else name, t))
    return [*found[0].values(), *found[1].values()]


def _expands(node: fx.Node) -> bool:
    """torch's own functional layers take every extent from their inputs."""
    functional = getattr(node.target, "__module__", None) == F.__name__
    return functional or call_name(node) in EXPANDERS


def _addresses_literally(node: fx.Node) -> bool:
    """Indexing by a list or a buffer, or a roll: the positions do not depend on the inputs."""
    if call_name(node) not in ("getitem", "index_select", "roll"):
        return False
    return all(n.op == "get_attr" for n in node.all_input_nodes[1:])


def _extreme_alone(node: fx.Node) -> bool:
    """A maximum or minimum of which only the values are used, not their positions."""
    name = call_name(node)
    whole = len(node.args) == 1 and not node.kwargs  # one number
    if name in ("amax", "amin") or (name in ("max", "min") and whole):
        return True
    values = ((operator.getitem, 0), (getattr, "values"))
    return name in ("max", "min") and all(
        len(u.args) > 1 and (u.target, u.args[1]) in values for u in node.users
    )


def call_name(node: fx.Node) -> str:
    """Name of the function or method that a node calls."""
    target: Any = node.target
    return str(target) if node.op == "call_method" else getattr(target, "__name__", "")


def _always_zero(model: torch.nn.Module) -> Iterator[str]:
    """Buffers of zeros that no state dict can change: absent biases."""
    for path, m in model.named_modules():
        for name in m._non_persistent_buffers_set:
            t = m._buffers.get(name)
            if t is not None and not t.is_meta and not t.any():
                yield f"{path}.{name}" if path else name


def label_run(captured: Captured) -> Run:
    """Gather what the ops of a graph say about channels, node by node.

    From what the tracer has recorded; where that does not say all, the graph is run once more. The
    inputs are copied first, so that a model that writes to them leaves the caller's alone.
    """
    gm = captured.graph_module
    labels = Labels()
    parameters: dict[str, Traits] = {}
    tensors = tensors_of(gm)
    names = {storage_key(t): name for name, t in reversed(tensors)}  # the first name of tied ones
    scripted = tuple(
        f"{path}." for path, m in gm.named_modules() if isinstance(m, torch.jit.ScriptModule)
    )
    zero = set(_always_zero(captured.base))
    for name, t in tensors:
        learnable = isinstance(t, torch.nn.Parameter)
        if (t.is_floating_point() or t.is_complex()) and not (
            scripted and name.startswith(scripted)
        ):
            labels.parameter(t, vanishing=learnable or name in zero)
        parameters[name] = Traits(tuple(t.shape), t.dtype, tuple(labels.of(t)), learnable)
    known = {id(t) for _, t in tensors}
    for name, t in tensors_of(captured.base):  # those that forward does not use
        if name not in parameters and id(t) not in known:
            learnable = isinstance(t, torch.nn.Parameter)
            parameters[name] = Traits(tuple(t.shape), t.dtype, (), learnable)
    mode = _LabelMode(labels, names, parameters)
    values: dict[str, Any] = {}
    interpreter = _LabelInterpreter(gm, mode, values)
    recorded = captured.recorded
    if recorded is not None and not any(call_name(n) in COMPOSITES for n in gm.graph.nodes):
        interpreter.read(recorded)
    else:
        inputs: Sequence[Any] = tree_map_only(Tensor, torch.clone, captured.inputs)
        rng = torch.get_rng_state()
        try:
            with evaluating(gm), state_kept(gm), mode:
                interpreter.run(*inputs)
        finally:
            torch.set_rng_state(rng)
    traits = [t for t in tree_leaves([*values.values(), parameters]) if isinstance(t, Traits)]
    labels.settle_products(f for t in traits for f in t.fields)
    return Run(labels.facts, values, parameters)
