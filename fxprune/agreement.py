"""Whether the user's class computes what the graph computes, at the pruned widths.

A class that takes its sizes from constants or from its weights may well run there and split the
channels otherwise: with other heads, or in another order. That shows in what enters its layers; and
where the weights are so small that hardly anything comes of them (attention that weights all tokens
alike), it shows with larger ones. So there are two runs, one with the weights as they are, and one
more with weak weights made stronger.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from fxprune.inputs import longer
from fxprune.isolate import uncompiled
from fxprune.leaves import is_leaf
from fxprune.trees import tensors as tensors_in

_SOME = 4096  # elements of a tensor that are compared
_NEAR = 200  # times the rounding error of the dtype, and of its norm
_FAR = 1e-2  # share of its norm, where rounding may have grown with the weights

Call = Callable[[Any], Any]


def agree(
    model: nn.Module,
    call: Call,
    graph: nn.Module,
    inputs: tuple[Any, ...],
    fixed: Sequence[str] = (),
) -> bool:
    """Whether ``call``, which runs ``model``, gives what ``graph`` gives, from the same parameters.

    ``fixed``: names of those that are not the same, since ``model`` computes them.

    At the example inputs and, where the graph takes that, with one sample more: a class with fixed
    sizes may happen to run at one batch size and fail at the next.
    """
    runs, more = _Runs(model, call, graph), longer(inputs)
    with uncompiled():  # what the user compiled need not be, here
        if not runs.same(inputs):
            return False
        with _stronger(graph, fixed):
            same = runs.same(more, _FAR)
        if same is None:
            same = runs.same(more)
        if same is None:
            with _stronger(graph, fixed):
                same = runs.same(inputs, _FAR)
    return same is not False


@dataclass(frozen=True)
class _Runs:
    """The user's class and the graph, side by side.

    Equal outputs are not enough: behind a softmax or a norm of few channels another order of the
    channels may hardly show. So what enters each leaf module is compared too.
    """

    model: nn.Module
    call: Call
    graph: nn.Module

    def same(self, inputs: tuple[Any, ...], far: float = 0.0) -> bool | None:
        """Whether the class gives what the graph gives; None where the graph gives nothing.

        ``far``: difference that is let pass, as a share of the norm, if more than that of rounding.
        """
        with _entering(self.graph) as second:
            y = _outputs(lambda x: self.graph.forward(*x), inputs)  # __call__ would print errors
        if y is None:
            return None
        with _entering(self.model) as first:
            x = _outputs(self.call, inputs)
        if x is None or len(x) != len(y):
            return False
        return all(_equal(p, q, far) for p, q in zip(x, y, strict=True)) and all(
            _alike(first[path], second[path], far) for path in first.keys() & second.keys()
        )


def _equal(p: Tensor, q: Tensor, far: float) -> bool:
    if p.shape != q.shape:
        return False
    if far:
        return _alike([_numbers(p)], [_numbers(q)], far)
    return torch.allclose(p, q, rtol=1e-4, atol=1e-5, equal_nan=True)


_Trace = list[tuple[float, float, float]]


@contextmanager
def _entering(model: nn.Module) -> Iterator[dict[str, _Trace]]:
    """Path of each leaf module -> numbers for each tensor that has entered it."""
    paths = {id(m): name for name, m in model.named_modules() if is_leaf(m)}
    found: dict[str, _Trace] = defaultdict(list)

    def note(module: nn.Module, args: Any) -> None:
        path = paths.get(id(module))
        if path is not None and args and isinstance(args[0], Tensor):
            found[path].append(_numbers(args[0]))

    handle = register_module_forward_pre_hook(note)
    try:
        with warnings.catch_warnings():
            # A compiled model warns of hooks like this one; it runs eagerly here.
            warnings.filterwarnings("ignore", "Using `torch.compile", UserWarning)
            yield found
    finally:
        handle.remove()


def _numbers(x: Tensor) -> tuple[float, float, float]:
    """(a weighted sum that knows the order of the elements, the norm, how near is near)."""
    if x.device.type == "meta" or not x.is_floating_point() or not x.numel():
        return 0.0, 0.0, 0.0
    flat = x.detach().reshape(-1)
    some = flat[:: max(1, len(flat) // _SOME)].double()
    weights = torch.arange(len(some), dtype=torch.float64, device=x.device).mul(0.7).cos()
    near = min(max(_NEAR * torch.finfo(x.dtype).eps, 1e-9), 0.02)
    return float(some @ weights), float(some.norm()), near


def _alike(a: _Trace, b: _Trace, far: float) -> bool:
    if len(a) != len(b):
        return True  # one of them takes some calls together
    return all(
        not abs(p[0] - q[0]) > max(p[2], q[2], far) * (p[1] + q[1])
        for p, q in zip(a, b, strict=True)
    )


def _outputs(call: Call, inputs: tuple[Any, ...]) -> list[Tensor] | None:
    """All tensors that a call gives; None where it does not run."""
    rng = torch.get_rng_state()
    try:
        with torch.no_grad():
            return tensors_in(call(copy.deepcopy(inputs)))
    except Exception:  # noqa: BLE001 - any failure means: it cannot run like this
        return None
    finally:
        torch.set_rng_state(rng)


@contextmanager
@torch.no_grad()
def _stronger(graph: nn.Module, fixed: Sequence[str]) -> Iterator[None]:
    """Weights of a root mean square far below 1 / sqrt(inputs) are multiplied by a power of two.

    So they are afterwards, bit for bit, what they were.
    """
    changed: list[tuple[Tensor, float]] = []
    try:
        for name, p in graph.named_parameters():
            if (
                name in fixed
                or p.dim() < 2
                or not p.is_floating_point()
                or not p.numel()
                or p.is_meta
            ):
                continue
            norm, top = float(p.norm()), float(p.abs().max())
            if not (0.0 < norm < math.inf):
                continue
            power = 2.0 ** math.floor(math.log2(math.sqrt(p.shape[0]) / norm))
            if 1.0 < power < torch.finfo(p.dtype).max / top / 2:
                p.mul_(power)
                changed.append((p, power))
        yield
    finally:
        for weight, power in changed:
            weight.div_(power)
