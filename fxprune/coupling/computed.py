"""Weights that forward computes from parameters alone, and in which channels cannot go.

A standardised weight, (w - mean) / deviation over the inputs of each output, would be another one
with fewer inputs, so labels lock it. But it depends on no input: it is a constant that someone
wrote as a formula. Here the parameter takes the value of the formula, under its own name, and the
formula goes from the graph. What is left is a plain weight, which is cut, ranked and repaired like
any other; other parameters of the formula (a gain) stay in the state dict and have no effect.

A formula stays where it mixes no channels (1 + w), where the parameter behind it is used in other
ways too, and where nothing would be gained (a norm that labels follow): :func:`coupled` tries both.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import ParametrizationList

from fxprune.capture import Captured, is_impure
from fxprune.coupling.groups import Coupling, couple
from fxprune.coupling.run import call_name
from fxprune.parametrized import gives_any, hooked, source
from fxprune.products import evaluating

_WEIGHTED = (
    "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d",
    "conv_transpose3d", "matmul", "mm", "bmm", "einsum", "addmm", "baddbmm",
)  # fmt: skip


_FORMS = ("getattr", "size", "dim", "numel", "len")  # of a tensor, and not its values


def settled(captured: Captured) -> Captured | None:
    """``captured`` with every such weight as a plain parameter; None where there is none."""
    gm = captured.graph_module
    formulas, blocks = _Formulas(gm), _blocks(gm)
    found = {name: roots for name, roots in formulas.found().items() if formulas.stay(name, roots)}
    if not found and not blocks:
        return None
    values = {name: formulas.values[roots[0]] for name, roots in found.items()}
    with evaluating(gm):
        values |= {name: _block(gm, nodes[0])() for name, nodes in blocks.items()}
    found |= blocks
    gm = _plain(formulas.gm, values, found)
    names = (*captured.settled, *values)
    by_hooks = (name for name, value in values.items() if _by_hook(captured.base, name, value))
    remade = (*captured.remade, *by_hooks)
    return replace(captured, graph_module=gm, settled=names, remade=remade, recorded=None)


def _by_hook(base: nn.Module, name: str, value: Tensor) -> bool:
    """Whether a weight is what a hook of torch's makes, so that the class can make another one."""
    path, _, atom = name.rpartition(".")
    made = hooked(base.get_submodule(path), atom)
    return made is not None and made.shape == value.shape and _equal(made, value)


def unparametrized(captured: Captured) -> Captured:
    """``captured`` with weights of ``torch.nn.utils.parametrize`` as plain parameters.

    Those that the user's class can compute whatever is left of them (``parametrized``).
    """
    gm = captured.graph_module
    found = {name: nodes for name, nodes in _blocks(gm).items() if gives_any(_block(gm, nodes[0]))}
    if not found:
        return captured
    with evaluating(gm):
        values = {name: _block(gm, nodes[0])() for name, nodes in found.items()}
    plain, names = _plain(gm, values, found), tuple(found)
    return replace(captured, graph_module=plain, settled=names, remade=names, recorded=None)


def _block(gm: fx.GraphModule, node: fx.Node) -> Any:
    return gm.get_submodule(str(node.target))


def _blocks(gm: fx.GraphModule) -> dict[str, list[fx.Node]]:
    """Parameter of which a parametrization makes a weight, for that alone -> the nodes that do."""
    names: dict[int, str] = {}  # by parametrization
    found: dict[str, list[fx.Node]] = defaultdict(list)
    for node in gm.graph.nodes:
        block = _block(gm, node) if node.op == "call_module" else None
        own = source(block) if isinstance(block, ParametrizationList) else None
        if own is not None:
            found[names.setdefault(id(block), f"{node.target}.{own}")].append(node)
    read = {str(n.target) for n in gm.graph.nodes if n.op == "get_attr"}
    held = Counter(id(t) for m in gm.modules() for t in m._parameters.values() if t is not None)
    return {
        name: nodes
        for name, nodes in found.items()
        if name not in read and held[id(gm.get_parameter(name))] == 1
    }


def coupled(captured: Captured) -> tuple[Captured, Coupling]:
    """The groups of a captured model; with plain weights where more can go that way.

    And where that costs nothing: what is left of a weight is then what it was, and not a norm's
    share of less.
    """
    captured = unparametrized(captured)
    coupling, plain = couple(captured), settled(captured)
    if plain is not None:
        other = couple(plain)
        mine, others = _free(coupling), _free(other)
        used = {str(n.target) for n in plain.graph_module.graph.nodes}
        lost = {param for param, _ in mine - others} & used
        if len(others) > len(mine) or (not lost and plain.remade == plain.settled):
            return plain, other
    return captured, coupling


def _free(coupling: Coupling) -> set[tuple[str, int]]:
    """The dims of parameters that may lose positions."""
    free = [g for g in coupling.groups if g.locked is None]
    return {(m.param, m.dim) for g in free for m in g.members}


class _Formulas:
    """The parts of a graph that depend on parameters and buffers alone.

    constant  nodes that do
    weights   those of them that a product takes as its weight
    values    of all that the weights are made from
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.parameters: dict[str, nn.Parameter] = {}
        self.constant: set[fx.Node] = set()
        self.weights: list[fx.Node] = []
        self.called: set[int] = set()  # parameters of modules that stay one node
        for node in gm.graph.nodes:
            inputs = node.all_input_nodes
            if node.op == "get_attr" or (
                node.op in ("call_function", "call_method")
                and inputs
                and all(i in self.constant for i in inputs)
                and not is_impure(node)
            ):
                self.constant.add(node)
            elif self.constant and node.op != "call_module" and call_name(node) in _WEIGHTED:
                behind = [i for i in inputs if i in self.constant and i not in node.args[:1]]
                self.weights += [i for i in behind if i.op != "get_attr"]
        if self.weights:
            self.parameters = dict(gm.named_parameters())
            called = (
                gm.get_submodule(str(n.target)) for n in gm.graph.nodes if n.op == "call_module"
            )
            self.called = {id(t) for m in called for t in m.parameters()}
        self.values = _values(gm, self.weights)

    def found(self) -> dict[str, list[fx.Node]]:
        """Parameter -> the last nodes of the formulas that it can take the place of."""
        roots: dict[str, list[fx.Node]] = defaultdict(list)
        for weight in self.weights:
            for node in _back_from(weight):
                name = self._twin(node)
                if name is not None:
                    if node not in roots[name]:
                        roots[name].append(node)
                    break
        return roots

    def _twin(self, node: fx.Node) -> str | None:
        """A parameter behind ``node`` that has its shape."""
        value = self.values[node]
        if node.op == "get_attr" or not isinstance(value, Tensor):
            return None
        for origin in _back_from(node):
            t = self.parameters.get(str(origin.target)) if origin.op == "get_attr" else None
            if t is not None and t.shape == value.shape and t.dtype == value.dtype:
                return str(origin.target)
        return None

    def stay(self, name: str, roots: list[fx.Node]) -> bool:
        """Whether the parameter can take their place, and they mix channels."""
        if id(self.parameters[name]) in self.called or not self._only_for(name, roots):
            return False
        alone = [_alone(self.gm, [root]) for root in roots]
        again = [_run(gm)[0] for gm in alone]
        first = self.values[roots[0]]
        if not all(_equal(first, value) for value in again):
            return False  # by chance, or from other parameters as well
        return _mixes(alone[0], name, first)

    def _only_for(self, name: str, roots: Iterable[fx.Node]) -> bool:
        """Whether the values of a parameter are used in these formulas alone."""
        ends = set(roots)
        waiting = [n for n in self.gm.graph.nodes if n.op == "get_attr" and n.target == name]
        while waiting:
            for user in waiting.pop().users:
                if user in ends or call_name(user) in _FORMS:
                    continue
                if user not in self.constant:
                    return False
                waiting.append(user)
        return True


def _back_from(node: fx.Node) -> list[fx.Node]:
    """``node`` and all that it is made from, the nearest first."""
    found = {node: None}
    waiting = [node]
    while waiting:
        for i in waiting.pop(0).all_input_nodes:
            if i not in found:
                found[i] = None
                waiting.append(i)
    return list(found)


def _alone(gm: fx.GraphModule, ends: list[fx.Node]) -> fx.GraphModule:
    """What ``ends`` are made from, as a graph without inputs that gives their values."""
    inside = {n for end in ends for n in _back_from(end)}
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node in inside:
            made[node] = graph.node_copy(node, lambda i: made[i])
    graph.output(tuple(made[end] for end in ends))
    return fx.GraphModule(gm, graph).eval()


def _run(alone: fx.GraphModule) -> Any:
    rng = torch.get_rng_state()
    try:
        with evaluating(alone):
            return alone()
    finally:
        torch.set_rng_state(rng)


def _values(gm: fx.GraphModule, ends: list[fx.Node]) -> dict[fx.Node, Any]:
    """The values of ``ends`` and of all that they are made from."""
    nodes = list({n: None for end in ends for n in _back_from(end)})
    return dict(zip(nodes, _run(_alone(gm, nodes)), strict=True)) if nodes else {}


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.device.type == "meta" or torch.equal(a, b)


def _mixes(alone: fx.GraphModule, name: str, like: Tensor) -> bool:
    """Whether outputs or inputs of the weight (dims 0 and 1) depend on each other.

    alone: the formula, on any device; its parameter is replaced by numbers from 0.5 to 1.5
    """
    generator = torch.Generator().manual_seed(0)
    path, _, atom = name.rpartition(".")
    holder, kept = alone.get_submodule(path), alone.get_parameter(name)

    def value(numbers: Tensor) -> Tensor:
        holder._parameters[atom] = nn.Parameter(numbers.to(like), requires_grad=False)
        found: Tensor = _run(alone)[0]
        return found

    try:
        for dim in range(min(2, kept.dim())):
            one, other = (torch.rand(kept.shape, generator=generator) + 0.5 for _ in range(2))
            half = torch.arange(0, kept.shape[dim], 2)
            first = value(one).index_select(dim, half.to(like.device))
            other.index_copy_(dim, half, one.index_select(dim, half))
            second = value(other).index_select(dim, half.to(like.device))
            if like.device.type == "meta" or not torch.allclose(first, second, equal_nan=True):
                return True
        return False
    finally:
        holder._parameters[atom] = kept


def _plain(
    gm: fx.GraphModule, values: dict[str, Tensor], roots: dict[str, list[fx.Node]]
) -> fx.GraphModule:
    """A copy of ``gm`` in which the parameters hold the values of their formulas."""
    copied = fx.Graph()
    ends = {root: name for name, nodes in roots.items() for root in nodes}
    made: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node in ends:
            made[node] = copied.get_attr(ends[node])
        else:
            made[node] = copied.node_copy(node, lambda i: made[i])
    copied.eliminate_dead_code(is_impure)
    result = fx.GraphModule(gm, copied, gm.__class__.__name__)
    for name, value in values.items():
        path, _, atom = name.rpartition(".")
        old = gm.get_parameter(name)
        new = nn.Parameter(value.detach().clone(), old.requires_grad)
        setattr(result.get_submodule(path), atom, new)
    return result.eval()
