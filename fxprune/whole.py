"""Parts of a model that tracing does not look into, and what surrounds them."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType, FunctionType, TracebackType
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

CONSTANT = "_tensor_constant"
"""How the names of attributes begin that a tracer adds to the root."""

_EXTENT = (torch.Tag.dynamic_output_shape,)
_READS = (torch.Tag.data_dependent_output,)


@dataclass
class Whole:
    """What is not looked into: module path -> reason, function -> reason."""

    modules: dict[str, str] = field(default_factory=dict)
    functions: dict[Callable[..., Any], str] = field(default_factory=dict)

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
            return False
        self.modules[failed[0]] = reason
        return True

    def named_functions(self) -> dict[str, str]:
        return {f"{f.__name__}()": reason for f, reason in self.functions.items()}


def _called(error: Exception) -> Iterator[FunctionType]:
    """The plain functions that were running when ``error`` arose, the innermost first.

    Only those of the innermost module, and none of the tracer's own.
    """
    frames: list[FrameType] = []
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == "call_module" and frame.f_globals.get("__name__") == _TRACER:
            frames = []
        frames.append(frame)
    for frame in reversed(frames):
        found = frame.f_globals.get(frame.f_code.co_name)
        own = str(frame.f_globals.get("__name__", "")).split(".")
        if own[0] == "fxprune" or own[:2] in (["torch", "fx"], ["torch", "nn"]):
            continue
        if isinstance(found, FunctionType) and inspect.unwrap(found).__code__ is frame.f_code:
            yield found


_TRACER = "fxprune.tracing"


class KeptWhole:
    """A function that is one node of the graph; it sees the real tensors, and Python runs it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.__name__ = getattr(function, "__name__", "function")
        self.__qualname__ = self.__name__
        self.__module__ = __name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


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
