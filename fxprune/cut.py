"""Traced + PrunePlan -> a smaller model, as a new fx.GraphModule; nothing of the input changes.

Every tensor's kept positions are known from its labels, so each parameter is gathered once, module
attributes are read off the new parameters, and constants of the graph are rewritten (``rewrite``).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import ParametrizationList

from fxprune import indexing, reductions  # noqa: F401 - they register rewriting rules
from fxprune.agreement import agree
from fxprune.assembly import assembled, attributes, targets
from fxprune.capture import capture
from fxprune.copies import copied, twin
from fxprune.leaves import fit, is_leaf
from fxprune.mirrors import changed_numbers, mirror, same_numbers
from fxprune.parametrized import remake, settle
from fxprune.rewrite import Rewriter, makes_tensors
from fxprune.sizes import Sizes
from fxprune.traced import Traced
from fxprune.types import PrunePlan

_OWN = "computes what the class does not"


class Walked(fx.GraphModule):
    """A graph that is run node by node and never called: no Python code is made of it."""

    def recompile(self) -> Any:
        """Nothing."""


def cut(
    traced: Traced, plan: PrunePlan, kind: type[fx.GraphModule] = fx.GraphModule
) -> fx.GraphModule:
    """The pruned graph, eval mode, own tensors; node and parameter names as in the traced graph.

    ``kind``: :class:`Walked` where an interpreter runs it.
    Raises PlanError when the plan is not one of this model.
    """
    keep = traced.keep(plan)
    sizes = Sizes(traced, keep)
    source = traced.captured.graph_module
    tensors = _sliced(source, sizes)
    modules = _modules(source, tensors, sizes)
    rewriter = Rewriter(source.graph, sizes)
    graph = rewriter.run()
    held = _attributes(source, tensors, modules)
    names = sorted(targets(graph), key=lambda path: path.count("."))
    result = assembled(kind, graph, source.__class__.__name__, names, held.__getitem__)
    result.meta[_OWN] = rewriter.computes_more
    _add_unused(result, source, traced.captured.base, tensors)
    return result


def _add_unused(
    result: nn.Module, source: nn.Module, base: nn.Module, tensors: dict[int, Tensor]
) -> None:
    """Parameters and buffers that forward does not use stay in the state dict, as they are.

    tensors: id of each one that it does use -> its new tensor, which other names of it share
    """
    made, used = dict(tensors), _tensors_of(source)
    for path, module in base.named_modules():
        own = [*module._parameters.items(), *module._buffers.items()]
        for atom, t in own:
            if t is None or (f"{path}." if path else "") + atom in used:
                continue
            holder = result
            for part in path.split(".") if path else ():
                if not hasattr(holder, part):
                    holder.add_module(part, nn.Module())
                holder = getattr(holder, part)
            if id(t) not in made:
                value = t.detach().clone()
                learned = isinstance(t, nn.Parameter)
                made[id(t)] = nn.Parameter(value, t.requires_grad) if learned else value
            new = made[id(t)]
            if isinstance(new, nn.Parameter):
                holder.register_parameter(atom, new)
            else:
                persistent = atom not in module._non_persistent_buffers_set
                holder.register_buffer(atom, new, persistent=persistent)


def _tensors_of(module: nn.Module) -> set[str]:
    """Names of all parameters and buffers, every name of a shared one among them."""
    return {
        f"{path}.{atom}" if path else atom
        for path, m in module.named_modules(remove_duplicate=False)
        for own in (m._parameters, m._buffers)
        for atom, _ in own.items()
    }


def _sliced(source: nn.Module, sizes: Sizes) -> dict[int, Tensor]:
    """id of each parameter and buffer -> its new tensor."""
    new: dict[int, Tensor] = {}
    for path, module in source.named_modules():
        for own in (module._parameters, module._buffers):
            for atom, t in own.items():
                if t is not None and id(t) not in new:
                    new[id(t)] = _cut_tensor(t, f"{path}.{atom}" if path else atom, sizes)
    return new


def _cut_tensor(t: Tensor, name: str, sizes: Sizes) -> Tensor:
    value = t.detach()
    whole = True
    for d in range(t.dim()):
        index = sizes.kept_tensor(name, d)
        if index is not None:
            value, whole = value.index_select(d, index.to(value.device)), False
    if whole:
        value = value.clone(memory_format=torch.preserve_format)
    parameter = type(t) is nn.Parameter or isinstance(t, nn.Parameter)
    return nn.Parameter(value, t.requires_grad) if parameter else value


def _modules(
    source: fx.GraphModule, tensors: dict[int, Tensor], sizes: Sizes
) -> dict[str, nn.Module]:
    """New leaf modules for every call_module target, attributes in step with their parameters."""
    inputs: dict[str, str] = {}
    for node in source.graph.nodes:
        if node.op == "call_module" and node.args and isinstance(node.args[0], fx.Node):
            inputs.setdefault(str(node.target), node.args[0].name)
    made: dict[int, nn.Module] = {}
    modules: dict[str, nn.Module] = {}
    known = dict(source.named_modules(remove_duplicate=False))
    for node in source.graph.nodes:
        if node.op == "call_module" and node.target not in modules:
            path = str(node.target)
            old = known[path]
            if id(old) not in made:
                made[id(old)] = copy_module(old, tensors)
                dim = -1 if isinstance(old, (nn.LayerNorm, nn.RMSNorm)) else 1
                fit(made[id(old)], sizes.kept_along(inputs.get(path), dim))
            modules[path] = made[id(old)]
    return modules


def copy_module(module: nn.Module, tensors: dict[int, Tensor]) -> nn.Module:
    """A copy whose parameters and buffers are replaced as ``tensors`` (by id) says."""
    if module._modules:
        return copied(module, dict(tensors))
    new = twin(module)
    new._parameters = {}
    for name, p in module._parameters.items():
        made: Any = None if p is None else tensors.get(id(p), p)
        new._parameters[name] = made
    new._buffers = {
        k: None if b is None else tensors.get(id(b), b) for k, b in module._buffers.items()
    }
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_modules"):
        new.__dict__[name] = type(module.__dict__[name])(module.__dict__[name])
    return new


def _attributes(
    source: fx.GraphModule, tensors: dict[int, Tensor], modules: dict[str, nn.Module]
) -> dict[str, Any]:
    """Everything that the new graph uses, by qualified name."""
    names = [n for n in targets(source.graph) if n not in modules]
    held = {name: tensors.get(id(v), v) for name, v in attributes(source, names).items()}
    return held | modules


def as_user_class(traced: Traced, plan: PrunePlan, pruned: fx.GraphModule) -> nn.Module | None:
    """An instance of the user's class with the parameters of ``pruned``, or None.

    None where that class does not run at the new widths, or does not compute what the graph
    computes on the example inputs, or by its operations cannot.
    """
    base = traced.captured.base
    if pruned.meta.get(_OWN) or isinstance(base, fx.GraphModule):
        return None  # a graph module is no class: its sizes are written into its code
    if set(traced.captured.remade) != set(traced.captured.settled):
        return None  # the class would compute its weights once more
    new = dict(pruned.named_parameters(remove_duplicate=False)) | dict(
        pruned.named_buffers(remove_duplicate=False)
    )
    memo: dict[int, Any] = {}
    for name, t in list(base.named_parameters()) + list(base.named_buffers()):
        if name in new:
            memo[id(t)] = new[name]
    model = copied(base, memo)
    if not all(_remade(model, name, new[name]) for name in traced.captured.remade):
        return None
    twins = dict(pruned.named_modules())
    for name, module in model.named_modules():
        if name and is_leaf(module):
            twin = twins.get(name)
            if twin is not None and type(twin) is type(module):
                own = module.__dict__
                own.update({k: v for k, v in twin.__dict__.items() if isinstance(v, (int, tuple))})
    model.eval()
    call = functools.partial(traced.captured.given.call, model)
    inputs, graph = traced.example_inputs, traced.captured.graph_module
    alike = functools.partial(agree, model, call, pruned, inputs, traced.captured.settled)
    if not alike():
        followed = mirror(model, changed_numbers(graph.graph, pruned.graph))
        if not followed or not alike():
            return None
        if not _calculates_alike(traced, model):
            return None
    return model


def _remade(model: nn.Module, name: str, weight: Tensor) -> bool:
    """Whether ``model`` computes a weight that is plain in the graph; it is made to."""
    path, _, atom = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, ParametrizationList):
        return settle(module, weight)
    return remake(module, atom, weight)


def _calculates_alike(traced: Traced, model: nn.Module) -> bool:
    """Whether a class whose numbers were changed calculates with the same ones as before."""
    values = traced.coupling.values
    return same_numbers(
        traced.captured.graph_module.graph,
        capture(model, traced.captured.given).graph_module.graph,
        lambda node: makes_tensors(values.get(node.name)),
    )
