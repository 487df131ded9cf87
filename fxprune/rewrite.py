"""Constants of a graph that follow a cut: shapes, split sizes, slices, groups, scales.

A size used as a shape takes its new value; a size used as a number in the arithmetic on tensors
keeps its original value, so that the pruned graph computes what the original computes without the
removed channels. One handler for each family of calls, by the name of the function or method.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from math import gcd
from typing import Any

import numpy as np
import torch
from torch import fx

from fxprune.coupling.run import CREATORS, Traits, call_name
from fxprune.leaves import kept_runs
from fxprune.sizes import Sizes
from fxprune.tables import registering

Handler = Callable[["Rewriter", fx.Node, fx.Node], None]
HANDLERS: dict[str, Handler] = {}


register = registering(HANDLERS, "call")
"""``register(*names)(handler)``: the handler of calls of functions and methods by name."""


class Rewriter:
    """Copies a graph and rewrites the constants that the plan changes."""

    def __init__(self, source: fx.Graph, sizes: Sizes) -> None:
        self.source, self.sizes = source, sizes
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.originals: dict[fx.Node, Any] = {}
        self.numbers: set[fx.Node] = set()  # nodes so far that give no tensors
        self.afterwards: dict[fx.Node, Callable[[fx.Node], fx.Node]] = {}
        self.computes_more = False  # than the class does at the new widths

    def run(self) -> fx.Graph:
        for old in self.source.nodes:
            new = self.graph.node_copy(old, lambda n: self.env[n])
            self.env[old] = new
            with self.graph.inserting_before(new):
                self._rewrite(old, new)
            if not makes_tensors(self.sizes.old(old)):
                self.numbers.add(old)
            if old in self.afterwards:
                self.env[old] = self.afterwards[old](self.env[old])
        self._prune_sizes()
        self.graph.lint()
        return self.graph

    def _rewrite(self, old: fx.Node, new: fx.Node) -> None:
        if old.op not in ("call_function", "call_method"):
            return
        handler = HANDLERS.get(call_name(old))
        makes = makes_tensors(self.sizes.old(old))
        if handler is not None and (makes or old.target is operator.setitem):
            handler(self, old, new)
        elif makes or self.sizes.old(old) is None:
            self.keep_numbers(old, new)

    def then(self, node: fx.Node, function: Callable[..., Any], *args: Any) -> fx.Node:
        """``function(node, *args)`` right after a node of the new graph."""
        self.computes_more = True
        with self.graph.inserting_after(node):
            return self.graph.call_function(function, (node, *args))

    # -- numbers ------------------------------------------------------------------------------

    def keep_numbers(self, old: fx.Node, new: fx.Node, but: tuple[Any, ...] = ()) -> None:
        """Sizes that the plan changes keep their original value as numbers in ``new``."""
        if self.numbers.isdisjoint(old.all_input_nodes):
            return

        def original(n: fx.Node) -> Any:
            return self.original(n) if n not in but else self.env[n]

        new.args = fx.node.map_arg(old.args, original)
        new.kwargs = fx.node.map_arg(old.kwargs, original)

    def original(self, node: fx.Node) -> Any:
        """A node or number with the value that ``node`` has in the unpruned graph."""
        if makes_tensors(self.sizes.old(node)) or not self.sizes.changed(node):
            return self.env[node]
        if isinstance(self.sizes.old(node), (int, float, tuple)):  # no device
            self.computes_more = True  # the class takes the number that it finds
        if node not in self.originals:
            self.originals[node] = self._original(node)
        return self.originals[node]

    def _original(self, node: fx.Node) -> Any:
        value = self.sizes.old(node)
        from_tensor = any(makes_tensors(self.sizes.old(n)) for n in node.all_input_nodes)
        if from_tensor and isinstance(value, tuple):
            return self._original_shape(node)
        if from_tensor and node.target == "size" and isinstance(value, int):
            return self._unpruned(node, self.env[node], argument(node, 1, "dim"), value)
        value = value.item() if isinstance(value, np.generic) else value
        if from_tensor or not node.all_input_nodes:
            return value
        args: Any = fx.node.map_arg(node.args, self.original)
        kwargs: Any = fx.node.map_arg(node.kwargs, self.original)
        if not _has_nodes((args, kwargs)):
            return value
        if node.target is operator.getitem and isinstance(args[0], (tuple, list)):
            return args[0][args[1]]
        return self.graph.create_node(node.op, node.target, args, kwargs)

    def _original_shape(self, node: fx.Node) -> Any:
        """A shape whose channel dims are numbers and whose other dims stay free."""
        old, new = self.sizes.old(node), self.sizes.new(node)
        parts: list[Any] = []
        for i, (o, n) in enumerate(zip(old, new, strict=True)):
            now = None
            if o == n or i == 0:
                now = self.graph.call_function(operator.getitem, (self.env[node], i))
            parts.append(now if o == n else self._unpruned(node, now, i, o))
        return tuple(parts)

    def _unpruned(self, node: fx.Node, now: Any, dim: int, value: int) -> Any:
        """A size that the plan changes, as it was; samples may be flattened into the first dim."""
        new = self.sizes.new(node)
        left = new[dim] if isinstance(new, tuple) else new
        if dim != 0 or left == 0 or node.all_input_nodes[0].op == "get_attr":
            return value
        common = gcd(value, left)
        more = self.graph.call_function(operator.mul, (now, value // common))
        return self.graph.call_function(operator.floordiv, (more, left // common))

    def scaled(self, arg: Any, want: int) -> Any:
        """``arg`` (a number, or an old node that gives one) so that it gives ``want``.

        A node may depend on the batch size, so it is scaled and not replaced by a number.
        """
        if isinstance(arg, fx.Node) and makes_tensors(self.sizes.old(arg)):
            return self.env[arg]  # lengths that are data
        now = self.sizes.new(arg) if isinstance(arg, fx.Node) else arg
        if now == want or (not isinstance(arg, fx.Node) and arg == -1):
            return self.env[arg] if isinstance(arg, fx.Node) else arg
        if not isinstance(arg, fx.Node) or not now > 0 or self._fixed(arg):
            return want
        common = gcd(want, int(now))
        value: Any = self.env[arg]
        if want // common != 1:
            value = self.graph.call_function(operator.mul, (value, want // common))
        if int(now) // common != 1:
            value = self.graph.call_function(operator.floordiv, (value, int(now) // common))
        return value

    def _fixed(self, node: fx.Node) -> bool:
        """Whether a size depends on channel dims alone, so that it is a number in the new graph."""
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            shape, i = node.args[0], node.args[1]
            if isinstance(i, int) and not makes_tensors(self.sizes.old(shape)):
                if not self.sizes.changed(shape):
                    return False
                return bool(self.sizes.old(shape)[i] != self.sizes.new(shape)[i])
        if node.target == "size" and len(node.args) > 1:
            return self.sizes.changed(node)
        sources = node.all_input_nodes
        if any(makes_tensors(self.sizes.old(n)) for n in sources):
            return False
        return all(self._fixed(n) for n in sources)

    def _prune_sizes(self) -> None:
        """Drop size arithmetic that nothing uses any more."""
        for node in reversed(list(self.graph.nodes)):
            if not node.users and (_is_arithmetic(node.target) or node.target == "size"):
                self.graph.erase_node(node)


def _is_arithmetic(target: Any) -> bool:
    """Python's own functions of numbers, none of which writes anything."""
    if target in (operator.setitem, operator.delitem):
        return False
    return getattr(target, "__module__", None) in ("_operator", "math", "builtins")


def makes_tensors(value: Any) -> bool:
    return isinstance(value, Traits) or any(
        isinstance(v, Traits) for v in torch.utils._pytree.tree_leaves(value)
    )


def _has_nodes(tree: Any) -> bool:
    found: list[fx.Node] = []

    def note(node: fx.Node) -> fx.Node:
        found.append(node)
        return node

    fx.node.map_arg(tree, note)
    return bool(found)


def arguments(node: fx.Node) -> Any:
    return node.args


def keywords(node: fx.Node) -> Any:
    return node.kwargs


# -- shapes -----------------------------------------------------------------------------------


def _new_sizes(r: Rewriter, sizes: Any, want: tuple[int, ...]) -> Any:
    """Size arguments (numbers and nodes, or one node that is a shape) for the shape ``want``."""
    if isinstance(sizes, fx.Node):
        now = r.sizes.new(sizes)
        if all(n in (w, -1) for n, w in zip(now, want, strict=True)):
            return r.env[sizes]
        parts: list[Any] = []
        for i, w in enumerate(want):
            if now[i] == -1:
                parts.append(-1)
                continue
            free = r.sizes.old(sizes)[i] == now[i] == w
            parts.append(r.graph.call_function(operator.getitem, (r.env[sizes], i)) if free else w)
        return tuple(parts)
    return tuple(r.scaled(a, w) for a, w in zip(sizes, want, strict=True))


def _as_list(args: tuple[Any, ...]) -> Any:
    """Sizes given one by one, or as one list, tuple or node."""
    if len(args) == 1 and isinstance(args[0], (list, tuple, fx.Node)):
        return args[0]
    return args


@register("view", "reshape", "expand", "view_copy", "broadcast_to")
def _shape(r: Rewriter, old: fx.Node, new: fx.Node) -> None:
    """x.view(2, C, -1), torch.reshape(x, shape), x.expand(...)"""
    key = next((k for k in ("shape", "size") if k in keywords(old)), None)
    sizes = keywords(old)[key] if key else _as_list(arguments(old)[1:])
    if isinstance(sizes, fx.Node) and not isinstance(r.sizes.old(sizes), (tuple, list)):
        sizes = (sizes,)
    if not isinstance(sizes, (fx.Node, tuple, list)):
        return  # a dtype
    want = r.sizes.shape(r.sizes.old(old))
    made = _new_sizes(r, sizes, want)
    if key:
        new.kwargs = {**new.kwargs, key: made}
    else:
        new.args = (new.args[0], made)


@register("view_as", "expand_as", "reshape_as")
def _like(r: Rewriter, old: fx.Node, new: fx.Node) -> None:
    """The other tensor may change where this one does not: the shape is made explicit."""
    want = r.sizes.shape(r.sizes.old(old))
    other = arguments(old)[1] if len(arguments(old)) > 1 else keywords(old)["other"]
    now = r.sizes.shape(r.sizes.old(other))
    if now != want:
        shape = r.graph.call_function(getattr, (r.env[other], "shape"))
        parts = (r.graph.call_function(operator.getitem, (shape, i)) for i in range(len(want)))
        made = tuple(p if n == w else w for p, n, w in zip(parts, now, want, strict=True))
        new.target = call_name(old).removesuffix("_as")
        new.op = "call_method"
        new.args, new.kwargs = (r.env[arguments(old)[0]], made), {}


@register(*CREATORS)
def _created(r: Rewriter, old: fx.Node, new: fx.Node) -> None:
    """torch.zeros(2, C), x.new_full((2, C), v)"""
    want = r.sizes.shape(r.sizes.old(old))
    at = 1 if old.op == "call_method" else 0
    one = "full" in call_name(old)
    sizes = keywords(old).get(
        "size", _as_list(arguments(old)[at : at + 1] if one else arguments(old)[at:])
    )
    if isinstance(sizes, fx.Node) and not isinstance(r.sizes.old(sizes), (tuple, list)):
        sizes = (sizes,)
    made = _new_sizes(r, sizes, want)
    if "size" in keywords(old):
        new.kwargs = {**new.kwargs, "size": made}
    else:
        new.args = (*new.args[:at], made, *(new.args[at + 1 :] if one else ()))


@register("unflatten")
def _unflatten(r: Rewriter, old: fx.Node, new: fx.Node) -> None:
    names = dict(zip(("dim", "sizes"), arguments(old)[1:], strict=False)) | dict(keywords(old))
    source = r.sizes.old(arguments(old)[0])
    dim = names["dim"] % len(source.shape)
    want = r.sizes.shape(r.sizes.old(old))
    count = len(want) - len(source.shape) + 1
    sizes = _new_sizes(r, names["sizes"], want[dim : dim + count])
    new.args, new.kwargs = (new.args[0], dim, sizes), {}


@register("split", "chunk", "tensor_split", "split_with_sizes", "unsafe_split", "unsafe_chunk")
def _split(r: Rewriter, old: fx.Node, new: fx.Node) -> None:
    parts = r.sizes.old(old)
    names = dict(zip(("sizes", "dim"), arguments(old)[1:], strict=False)) | dict(keywords(old))
    dim = names.get("dim", 0) % len(parts[0].shape)
    before = [p.shape[dim] for p in parts]
    after = [r.sizes.shape(p)[dim] for p in parts]
    if before != after:
        new.op, new.target = "call_function", torch.split
        new.args, new.kwargs = (r.env[arguments(old)[0]], after, dim), {}
    else:
        r.keep_numbers(old, new)


# -- numbers of a call ----------------------------------------------------------------------


def number(r: Rewriter, value: Any) -> Any:
    return r.sizes.old(value) if isinstance(value, fx.Node) else value


def argument(old: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return keywords(old).get(
        name, arguments(old)[position] if len(arguments(old)) > position else default
    )


def set_argument(new: fx.Node, position: int, name: str, value: Any) -> None:
    if len(new.args) > position:
        new.update_arg(position, value)
    else:
        new.update_kwarg(name, value)


# -- functional layers ------------------------------------------------------------------------


@register("layer_norm", "rms_norm")
def _layer_norm(r: Rewriter, old: fx.Node, new: fx.Node) -> None:
    shape = r.sizes.shape(r.sizes.old(old))
    sizes = argument(old, 1, "normalized_shape")
    count = len(r.sizes.old(sizes) if isinstance(sizes, fx.Node) else sizes)
    set_argument(new, 1, "normalized_shape", _new_sizes(r, sizes, shape[len(shape) - count :]))


@register("group_norm", "channel_shuffle", "native_channel_shuffle")
def _group_norm(r: Rewriter, old: fx.Node, new: fx.Node) -> None:
    name = "num_groups" if call_name(old) == "group_norm" else "groups"
    groups = number(r, argument(old, 1, name))
    set_argument(new, 1, name, kept_runs(r.sizes.kept_along(source_of(old), 1), groups))


def source_of(old: fx.Node) -> str:
    first = arguments(old)[0] if arguments(old) else keywords(old)["input"]
    assert isinstance(first, fx.Node)
    return first.name


@register(
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
)  # fmt: skip
def _convolution(r: Rewriter, old: fx.Node, new: fx.Node) -> None:
    r.keep_numbers(old, new)
    groups = argument(old, 6, "groups", 1)
    kept = kept_runs(r.sizes.kept_along(source_of(old), 1), number(r, groups))
    if kept != number(r, groups) or isinstance(groups, fx.Node):
        set_argument(new, 6, "groups", r.scaled(groups, kept))  # samples may be groups


@register("unfold")
def _unfold(r: Rewriter, old: fx.Node, new: fx.Node) -> None:
    """F.unfold(x, kernel_size), x.unfold(dim, size, step): windows as large as a dim follow it."""
    r.keep_numbers(old, new)
    source = r.sizes.coupling.values[source_of(old)]
    ends = source.shape, r.sizes.shape(source)
    at, name = (2, "size") if old.op == "call_method" else (1, "kernel_size")
    if old.op == "call_method":
        dims, sizes = [argument(old, 1, "dimension")], [argument(old, at, name)]
    else:
        kernel = argument(old, at, name)
        dims, sizes = [-2, -1], list(kernel) if isinstance(kernel, (list, tuple)) else [kernel] * 2
    before, after = ([end[number(r, d)] for d in dims] for end in ends)
    if before != after:
        made = [
            r.scaled(k, n) if b != n else r.original(k) if isinstance(k, fx.Node) else k
            for k, b, n in zip(sizes, before, after, strict=True)
        ]
        set_argument(new, at, name, made[0] if len(made) == 1 else tuple(made))


@register("scaled_dot_product_attention")
def _attention(r: Rewriter, old: fx.Node, new: fx.Node) -> None:
    """Without a scale the call takes it from the head dim: the original one is made explicit."""
    r.keep_numbers(old, new)
    query = r.sizes.old(arguments(old)[0] if arguments(old) else keywords(old)["query"])
    if argument(old, 6, "scale") is None and r.sizes.shape(query)[-1] != query.shape[-1]:
        new.kwargs = {**new.kwargs, "scale": query.shape[-1] ** -0.5}
        r.computes_more = True
