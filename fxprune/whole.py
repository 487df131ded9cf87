"""Parts of a model that tracing does not look into, and what surrounds them."""

from __future__ import annotations

import inspect
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType, FunctionType, TracebackType
from typing import Any

import torch
from torch import fx, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from fxprune.inputs import Inputs

CONSTANT = "_tensor_constant"
"""How the names of attributes begin that a tracer adds to the root."""

_EXTENT = (torch.Tag.dynamic_output_shape,)
_READS = (torch.Tag.data_dependent_output,)


@dataclass
class Whole:
    """What is not looked into: module path -> reason, function -> reason."""

    modules: dict[str, str] = field(default_factory=dict)
    functions: dict[Callable[..., Any], str] = field(default_factory=dict)
    model: str | None = None  # the reason, where all of it stays whole

    def reasons(self) -> dict[str, str]:
        """Path of a module, or name of a function with (), or "forward" for all -> reason."""
        if self.model is not None:
            return {"forward": self.model}
        return self.modules | {f"{_name(f)}()": r for f, r in self.functions.items()}

    def blame(self, error: Exception, failed: tuple[str, Exception] | None) -> bool:
        """Add the smallest part in which ``error`` arose; False when there is none left.

        ``failed``: the innermost module, and the exception that left it. The functions that it had
        called come first, the last one called before all.
        """
        inner = error if failed is None else failed[1]
        reason = f"{type(inner).__name__}: {inner}"
        for function in _called(inner):
            if function not in self.functions:
                self.functions[function] = reason
                return True
        if failed is None or failed[0] in ("", *self.modules):
            self.model = reason
            return False
        self.modules[failed[0]] = reason
        return True


def _called(error: Exception) -> Iterator[Callable[..., Any]]:
    """The plain functions that were running when ``error`` arose, the innermost first.

    Only those of the innermost module, and none of the tracer's own. Before each come the scripted
    functions that it names: they take no traced values, and leave no frame.
    """
    frames: list[FrameType] = []
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == "call_module" and frame.f_globals.get("__name__") == _TRACER:
            frames = []
        frames.append(frame)
    for frame in reversed(frames):
        found = frame.f_globals.get(frame.f_code.co_name)
        own = str(frame.f_globals.get("__name__", "")).split(".")
        if own[0] in ("fxprune", "torch"):
            continue
        names = (frame.f_globals.get(name) for name in frame.f_code.co_names)
        yield from (f for f in names if isinstance(f, torch.jit.ScriptFunction))
        if isinstance(found, FunctionType) and inspect.unwrap(found).__code__ is frame.f_code:
            yield found


def _name(function: Callable[..., Any]) -> str:
    named: Any = function
    if isinstance(named, torch.jit.ScriptFunction):
        return str(named.name)
    return str(getattr(named, "__name__", "function"))


_TRACER = "fxprune.tracing"


class KeptWhole:
    """A function that is one node of the graph; it sees the real tensors, and Python runs it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.__name__ = _name(function)
        self.__qualname__ = self.__name__
        self.__module__ = __name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


class WholeModel(KeptWhole):
    """A whole model as one function of its parameters, its buffers and its inputs."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__(model.forward)
        self.__name__ = self.__qualname__ = f"whole_{type(model).__name__}"
        self.model, self.inputs = model, inputs
        tensors = [*model.named_parameters(), *model.named_buffers()]
        self.names = tuple(name for name, _ in tensors)
        self.lock = threading.Lock()  # the tensors take their places in the one model in turn

    def __call__(self, *args: Any) -> Any:
        """args: a tensor for each of ``names``, then the inputs."""
        count = len(self.names)
        given = dict(zip(self.names, args[:count], strict=True))
        values, named = args[count:], dict[str, Any]()
        if self.inputs.names is not None:
            values, named = (), dict(zip(self.inputs.names, values, strict=True))
        with self.lock:
            return functional_call(self.model, given, values, named)

    def graph(self) -> fx.Graph:
        """Placeholders, tensors, one call."""
        graph = fx.Graph()
        values = self.inputs.values
        names = self.inputs.names or [f"input_{i}" for i in range(len(values))]
        given = [graph.placeholder(name) for name in names]
        tensors = [graph.get_attr(name) for name in self.names]
        graph.output(graph.call_function(self, (*tensors, *given)))
        return graph


class DataDependence(TorchDispatchMode):
    """Watches a part of a model run: ``extent`` tells whether it made tensors sized by data."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.extent = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        custom = func.namespace not in ("aten", "prims")  # nms: such ops carry no tags
        self.extent |= any(t in func.tags for t in _EXTENT) or (custom and "nms" in func.name())
        return func(*args, **(kwargs or {}))


@contextmanager
def autocast_recorded(tracer: fx.Tracer) -> Iterator[None]:
    """``with torch.autocast(...)`` in forward becomes a pair of nodes, inside the block."""
    kind = torch.amp.autocast_mode.autocast
    enter, leave = kind.__enter__, kind.__exit__
    entered: list[fx.Node] = []

    def on_enter(self: Any) -> Any:
        if not getattr(tracer, "running", False):
            args = (self.device, self.fast_dtype, self._enabled, self._cache_enabled)
            node = tracer.create_node(
                "call_function", torch.amp.autocast_mode._enter_autocast, args, {}
            )
            node.meta["value"] = None
            entered.append(node)
        return enter(self)  # type: ignore[no-untyped-call]

    def on_exit(
        self: Any, kind: type[BaseException] | None, error: Any, where: TracebackType | None
    ) -> Any:
        if not getattr(tracer, "running", False) and entered:
            node = tracer.create_node(
                "call_function", torch.amp.autocast_mode._exit_autocast, (entered.pop(),), {}
            )
            node.meta["value"] = None
        return leave(self, kind, error, where)

    kind.__enter__, kind.__exit__ = on_enter, on_exit  # type: ignore[method-assign]
    try:
        yield
    finally:
        kind.__enter__, kind.__exit__ = enter, leave  # type: ignore[method-assign]
