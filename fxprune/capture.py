"""nn.Module + example inputs -> Captured: the graph of the model, whatever the model is."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from fxprune.assembly import LazyGraphModule, assembled, attributes, targets
from fxprune.attention import TraceableAttention
from fxprune.copies import copied, eventful
from fxprune.errors import ModelError, first_line
from fxprune.inputs import Inputs, longer
from fxprune.isolate import uncompiled
from fxprune.products import evaluating
from fxprune.record import Recorded
from fxprune.rephrase import rephrase
from fxprune.tracing import ConcreteTracer
from fxprune.trees import reachable, tensors
from fxprune.values import IN_PLACE
from fxprune.whole import Whole, WholeModel

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Captured:
    """A traced model.

    graph_module  eval mode; parameters and buffers are the model's own tensors, but for ``settled``
    base          copy of the user's model that shares those tensors, attention made traceable
    given         the example inputs, and how the user's class takes them
    opaque        path of each module kept whole -> reason
    settled       parameters that hold what the model computes from them (``coupling.computed``)
    remade        those of them that the user's class can be made to compute (``parametrized``)
    recorded      what the run has done, where that says all; only until it is read
    """

    graph_module: fx.GraphModule
    base: nn.Module
    given: Inputs
    opaque: dict[str, str]
    settled: tuple[str, ...] = ()
    remade: tuple[str, ...] = ()
    recorded: Recorded | None = None

    @property
    def inputs(self) -> tuple[Any, ...]:
        """The example inputs, one for each placeholder."""
        return self.given.values


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the module tree that shares the parameters, with attention made traceable.

    Buffers are copied: a forward that writes to them must not change the user's.
    """
    memo: dict[int, Any] = {id(t): t for t in model.parameters()}
    for m in model.modules():  # results that a module keeps cannot be copied otherwise
        for v in reachable(eventful(m)):
            if isinstance(v, Tensor) and not v.is_leaf:
                memo[id(v)] = v.detach().clone()
    base = copied(model, memo)
    if TraceableAttention.replaces(base):
        assert isinstance(base, nn.MultiheadAttention)
        base = TraceableAttention(base)
    for path, module in list(base.named_modules()):
        if path and TraceableAttention.replaces(module):
            parent, _, name = path.rpartition(".")
            assert isinstance(module, nn.MultiheadAttention)
            setattr(base.get_submodule(parent), name, TraceableAttention(module))
    return _evaluated(base)


def _evaluated(module: M) -> M:
    """In eval mode; only what is not is written to."""
    for m in module.modules():
        if m.training:
            m.training = False
    return module


def _unchanged(a: Any, b: Any) -> bool:
    """Whether two dicts, lists or sets hold the same objects."""
    x, y = ([*c.keys(), *c.values()] if isinstance(c, dict) else [*c] for c in (a, b))
    return len(x) == len(y) and all(map(operator.is_, x, y))


@contextmanager
def state_kept(module: nn.Module) -> Iterator[None]:
    """Attributes and buffers that a run replaces, and buffers that it writes to, are put back.

    What the tracer itself adds (tensors that are constants of the graph) stays.
    """
    internal = nn.Module().__dict__
    ours = [m for m in module.modules() if not isinstance(m, torch.jit.ScriptModule)]
    held = [(m, dict(m.__dict__), dict(m._buffers)) for m in ours]
    tensors = [t for _, _, own in held for t in own.values() if t is not None]
    values = {id(t): t.clone() for t in tensors}
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
            if _unchanged(container, content):
                continue  # some do not let themselves be changed
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


def capture(model: nn.Module, example_inputs: Any) -> Captured:
    """Trace ``model``; it is left as it was. Raises ModelError when it does not run."""
    inputs = Inputs.of(example_inputs)
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            "a TorchScript module has no Python forward that could be traced; give the "
            "torch.nn.Module that it was made from"
        )
    _check_names(model)
    base = shared_copy(model)
    rng = torch.get_rng_state()
    try:
        with evaluating(base), uncompiled():
            gm, run = _captured(base, inputs, any_batch=False)
            if run.counts and _bound_to_batch(gm, base, inputs):
                gm, run = _captured(base, inputs, any_batch=True)
    finally:
        torch.set_rng_state(rng)
    gm.__class__.__name__ = type(model).__name__
    return Captured(gm, base, inputs, run.whole.reasons(), recorded=run.recorded)


def _check_names(model: nn.Module) -> None:
    """ModelError where the model has attributes under names that torch.fx keeps for itself."""
    empty = fx.GraphModule(nn.Module(), fx.Graph())
    taken = (set(dir(empty)) - set(dir(nn.Module()))) & {
        *model._modules, *model._parameters, *model._buffers
    }  # fmt: skip
    if taken and not isinstance(model, fx.GraphModule):
        raise ModelError(
            f"{type(model).__name__}.{min(taken)} has a name that torch.fx.GraphModule keeps for "
            "itself; give that attribute another name"
        )


@dataclass
class _Run:
    """One trace: what stays whole, what it has recorded, whether Python may have counted samples
    (see ConcreteTracer)."""

    whole: Whole
    recorded: Recorded | None = None
    counts: bool = False


def _captured(base: nn.Module, inputs: Inputs, any_batch: bool) -> tuple[fx.GraphModule, _Run]:
    """The graph module, and how it came about."""
    run = _Run(Whole())
    graph = _trace(base, inputs, run, any_batch)
    if rephrase(graph):
        run.recorded = None
    values = {n.name: n.meta.pop("value") for n in graph.nodes if "value" in n.meta}
    if run.recorded is not None:
        run.recorded.values = values
    graph.eliminate_dead_code(is_impure)
    names = targets(graph)
    found = attributes(base, names)
    name, value = type(base).__name__, found.__getitem__
    return assembled(LazyGraphModule, graph, name, names, value, base), run


def _trace(base: nn.Module, inputs: Inputs, run: _Run, any_batch: bool) -> fx.Graph:
    """The graph; what cannot be recorded is added to ``run.whole``, the smallest part first."""
    while True:
        tracer = ConcreteTracer(inputs, run.whole, any_batch)
        try:
            with state_kept(base):
                graph = tracer.trace(base)
        except Exception as error:  # noqa: BLE001 - user code may raise anything; it is kept
            _check_runs(base, inputs)
            if not run.whole.blame(error, tracer.failed):
                return WholeModel(base, inputs).graph()
        else:
            run.counts = tracer.counts
            run.recorded = Recorded(tracer.recorder.ops) if tracer.recorder.complete else None
            return graph


def _bound_to_batch(gm: fx.GraphModule, base: nn.Module, inputs: Inputs) -> bool:
    """Whether the graph gives something else than the model for one sample more."""
    more = longer(inputs.values)
    try:
        with state_kept(base):
            expected = tensors(inputs.call(base, copy.deepcopy(more)))
    except Exception:  # noqa: BLE001 - the model itself takes no other batch
        return False
    try:
        with state_kept(gm):
            given = tensors(gm.forward(*copy.deepcopy(more)))
    except Exception:  # noqa: BLE001 - whatever it is, the model does not do it
        return True
    same = [a.shape == b.shape for a, b in zip(expected, given, strict=False)]
    return not all(same)


def _check_runs(base: nn.Module, inputs: Inputs) -> None:
    try:
        inputs.call(base)
    except Exception as error:
        shapes = [
            tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in inputs.values
        ]
        cure = "Give inputs that the model accepts"
        if not tensors(inputs.values):
            cure += ": a tensor such as torch.randn(1, 3, 224, 224), a tuple or a mapping of them"
        raise ModelError(
            f"{type(base).__name__} raises on the example inputs {shapes}: "
            f"{type(error).__name__}: {first_line(error)}. {cure}"
        ) from error


def is_impure(node: fx.Node) -> bool:
    """Whether a node without users must stay: it may write to a tensor."""
    if node.op in ("placeholder", "output", "call_module"):
        return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    writes = name.endswith("_") or name in (
        "setitem",
        "_enter_autocast",
        "_exit_autocast",
        *IN_PLACE,
    )
    return node.op != "get_attr" and (
        writes or bool(node.kwargs.get("inplace")) or "out" in node.kwargs
    )
