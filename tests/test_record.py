"""What the tracer records of a run: calls taken directly are the ops that the dispatcher sees."""

from __future__ import annotations

import copy
import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fxprune.record import Recorder, direct
from fxprune.traced import trace


class Seen(TorchDispatchMode):
    """Every op that arrives at the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.ops.append((func, args, kwargs or {}, out))
        return out


def image(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


X = image(2, 4, 6, 6)
CALLS: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "conv1d": (nn.Conv1d(4, 6, 3, bias=False), (image(2, 4, 6),), {}),
    "conv2d": (nn.Conv2d(4, 6, 3, 2, 1, 2, 2), (X,), {}),
    "conv3d": (nn.Conv3d(2, 4, 2), (image(1, 2, 3, 3, 3),), {}),
    "batch norm": (nn.BatchNorm2d(4).eval(), (X,), {}),
    "batch norm, no momentum": (nn.BatchNorm1d(4, momentum=None).eval(), (image(3, 4),), {}),
    "batch norm, plain": (nn.BatchNorm2d(4, affine=False).eval(), (X,), {}),
    "linear": (nn.Linear(6, 3), (image(2, 6),), {}),
    "linear on tokens": (nn.Linear(6, 3), (image(2, 5, 6),), {}),
    "linear on a grid": (nn.Linear(6, 3), (X,), {}),
    "relu": (F.relu, (X,), {"inplace": False}),
    "relu in place": (F.relu, (X,), {"inplace": True}),
    "silu": (F.silu, (X,), {"inplace": True}),
    "hardswish": (F.hardswish, (X, False), {}),
    "hardsigmoid": (F.hardsigmoid, (X, True), {}),
    "hardtanh": (F.hardtanh, (X, 0.0, 6.0, True), {}),
    "torch.relu": (torch.relu, (X,), {}),
    "sigmoid": (torch.sigmoid, (X,), {}),
    "x + y": (operator.add, (X, 2 * X), {}),
    "x + 1": (operator.add, (X, 1), {}),
    "x += y": (operator.iadd, (X, image(4, 1, 1)), {}),
    "x * y": (operator.mul, (X, X), {}),
    "cat": (torch.cat, ([X, X], 1), {}),
    "cat by name": (torch.cat, ((X, X),), {"dim": -1}),
}
OTHERS: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "padded with reflections": (nn.Conv2d(4, 4, 3, 1, 1, padding_mode="reflect"), (X,), {}),
    "padded by name": (nn.Conv2d(4, 4, 3, padding="same"), (X,), {}),
    "without a batch": (nn.Conv2d(4, 4, 3), (X[0],), {}),
    "in training": (nn.BatchNorm2d(4), (X,), {}),
    "batch statistics": (nn.BatchNorm2d(4, track_running_stats=False).eval(), (X,), {}),
    "strided tokens": (nn.Linear(2, 3), (image(3, 2, 5).mT,), {}),
    "integers in place": (operator.iadd, (torch.ones(3, dtype=torch.long), 1), {}),
    "a parameter": (torch.relu, (nn.Parameter(X),), {}),
}


def reference(target: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """(result, ops) by way of the dispatcher, on copies of the inputs."""
    with torch.no_grad(), Seen() as seen:
        return target(*args, **kwargs), seen.ops


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(p, q) for p, q in zip(a, b, strict=True))
    return bool(a == b)


@pytest.mark.parametrize("name", CALLS)
def test_a_direct_call_is_what_the_dispatcher_sees(name: str) -> None:
    target, args, kwargs = CALLS[name]
    args = copy.deepcopy(args)
    expected, ops = reference(target, copy.deepcopy(args), kwargs)
    with torch.no_grad():
        known = direct(target, args, kwargs)
    assert known is not None
    out, found = known
    assert same(out, expected)
    ops = [op for op in ops if op[0] is not torch.ops.aten.empty.memory_format]  # batch norm's
    assert [f for f, *_ in found] == [f for f, *_ in ops]
    for (_, a, own, o), (_, b, named, p) in zip(found, ops, strict=True):
        assert own == named == {}
        assert same(list(a)[: len(b)], list(b))  # what is left out is the default
        assert same(o if isinstance(o, Tensor) else o[0], p if isinstance(p, Tensor) else p[0])


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_known_goes_through_the_dispatcher(name: str) -> None:
    target, args, kwargs = OTHERS[name]
    with torch.no_grad():
        assert direct(target, copy.deepcopy(args), kwargs) is None
        expected, ops = reference(target, copy.deepcopy(args), kwargs)
        recorder = Recorder()
        out = recorder.call("node", copy.deepcopy(target), copy.deepcopy(args), kwargs)
    assert same(out, expected)
    assert [op[0] for op in recorder.ops["node"]] == [op[0] for op in ops]


def test_changed_modules_and_autocast_are_not_direct() -> None:
    conv = nn.Conv2d(4, 4, 1)
    with torch.no_grad():
        assert direct(conv, (X,), {}) is not None
        with torch.autocast("cpu", torch.bfloat16):
            assert direct(conv, (X,), {}) is None
        handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: None)
        try:
            assert direct(conv, (X,), {}) is None
        finally:
            handle.remove()
        conv.forward = lambda x: x  # type: ignore[method-assign]
        assert direct(conv, (X,), {}) is None


class Writes(nn.Module):
    """Writes to its input, and may change a shape in place."""

    def __init__(self, reshapes: bool) -> None:
        super().__init__()
        self.conv, self.reshapes = nn.Conv2d(4, 8, 1), reshapes
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        x = self.conv(x).mean((2, 3), keepdim=True)
        if self.reshapes:
            x.squeeze_(-1).squeeze_(-1)
        return self.head(x.flatten(1))


@pytest.mark.parametrize("reshapes", [False, True])
def test_inputs_stay_and_shapes_changed_in_place_are_run_again(reshapes: bool) -> None:
    x = X.clone()
    traced = trace(Writes(reshapes), x)
    assert torch.equal(x, X)
    assert traced.captured.recorded is None
    assert traced.group("conv").locked is None


def test_a_model_runs_once() -> None:
    calls = []

    class Counted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.aten.mul.Tensor(x, 2)

    model = nn.Sequential(nn.Conv2d(4, 8, 1), Counted(), nn.Conv2d(8, 2, 1))

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kw: Any = None) -> Any:
            if func is torch.ops.aten.convolution.default:
                calls.append(func)
            return func(*args, **(kw or {}))

    with Watch():
        trace(model.eval(), image(3, 4, 6, 6))
    assert len(calls) == 2
