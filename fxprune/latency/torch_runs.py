"""Time single products, and whole models, in torch: eager or compiled on the CPU, or on a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fxprune.isolate import rng_kept
from fxprune.latency.ops import Family
from fxprune.latency.target import Sample, Target, clock, forget, sample

SECONDS = 0.04  # of repeated runs for one product
LEAST, MOST = 10, 500


@contextmanager
def threads_of(target: Target) -> Iterator[None]:
    """torch's intra-op threads are the target's inside the block."""
    before = torch.get_num_threads()
    try:
        if target.name != "cuda":
            torch.set_num_threads(target.threads)
        yield
    finally:
        torch.set_num_threads(before)


def time_product(target: Target, family: Family, widths: tuple[int, ...]) -> Sample:
    """Milliseconds of one product with these widths.

    A compiled product is timed in eager mode: the compiler calls the same kernels for products.
    """
    with torch.no_grad(), rng_kept(0), threads_of(target):
        device = torch.device("cuda" if target.name == "cuda" else "cpu")
        module, x = _product(family, widths)
        module, x = module.to(device).eval(), x.to(device)
        small, little = _product(*_tiny(family))
        call = synchronized(target, lambda: module(x))
        now = clock(target)
        for _ in range(3):
            call()
        seconds: list[float] = []
        most = 2 * LEAST if family.cold else MOST  # forgetting takes longer than most products
        while len(seconds) < LEAST or (sum(seconds) < SECONDS and len(seconds) < most):
            if family.cold and target.name != "cuda":
                forget()
                x.add_(0.0)  # the input was just written, and the code was just used
                small(little)
            start = now()
            call()
            seconds.append(now() - start)
    return sample(seconds)


def synchronized(target: Target, call: Callable[[], object]) -> Callable[[], object]:
    """The call, ended only when the GPU has done it."""
    if target.name != "cuda":
        return call

    def run() -> None:
        call()
        torch.cuda.synchronize()

    return run


def _tiny(family: Family) -> tuple[Family, tuple[int, ...]]:
    """A product that runs through the same code and takes next to no time."""
    reach = zip(family.kernel, family.dilation, strict=True)
    size = tuple((k - 1) * d + 1 for k, d in reach)
    widths = {"plain": (8, 8), "depthwise": (8,), "grouped": (2, 4, 4)}[family.form]
    return replace(family, batch=1, size=size), widths


def _product(family: Family, widths: tuple[int, ...]) -> tuple[nn.Module, Tensor]:
    cin, cout, groups = family.channels(widths)
    if family.kind == "linear":
        return nn.Linear(cin, cout), torch.randn(family.batch, cin)
    x = torch.randn(family.batch, cin, *family.size)
    n = len(family.size)
    kinds: dict[tuple[str, int], Callable[..., nn.Module]] = {
        ("conv", 1): nn.Conv1d,
        ("conv", 2): nn.Conv2d,
        ("conv", 3): nn.Conv3d,
        ("transposed", 1): nn.ConvTranspose1d,
        ("transposed", 2): nn.ConvTranspose2d,
        ("transposed", 3): nn.ConvTranspose3d,
    }
    module = kinds[family.kind, n](
        cin,
        cout,
        family.kernel,
        stride=family.stride,
        padding=family.padding,
        dilation=family.dilation,
        groups=groups,
    )
    return module, x


def whole_model(target: Target, model: nn.Module, inputs: tuple[Any, ...]) -> Callable[[], object]:
    """A call that runs a copy of the model once, in eval mode without gradients."""
    device = torch.device("cuda" if target.name == "cuda" else "cpu")
    given: Any = tree_map_only(Tensor, lambda t: t.detach().clone().to(device), inputs)
    own = copy.deepcopy(model).to(device).eval()
    run: Callable[..., object] = torch.compile(own) if target.name == "torch-compile" else own

    def call() -> object:
        with torch.no_grad():
            return run(*given)

    return synchronized(target, call)
