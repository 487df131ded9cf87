"""What every pruned net is held to, in one place: oracle, exact costs, batch size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from oracle import oracle_error
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fxprune.traced import Traced
from fxprune.types import PrunePlan


def counted_macs(model: nn.Module, inputs: Sequence[Any]) -> int:
    """Multiply-adds of one forward pass, by torch's own counter."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(*inputs)
    return counter.get_total_flops() // 2


def counted_params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def counted_bytes(model: nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors)


def prunable(traced: Traced) -> set[str]:
    """ "parameter:dim" of everything that may lose positions."""
    return {f"{m.param}:{m.dim}" for g in traced.groups if g.locked is None for m in g.members}


def assert_right(
    traced: Traced,
    plan: PrunePlan,
    pruned: nn.Module,
    inputs: Sequence[Sequence[Any]],
    tolerance: float = 1e-10,
    exact_macs: bool = True,
) -> None:
    """The pruned module equals the masked original on each of ``inputs``, at the predicted cost.

    exact_macs: off where torch itself leaves a product out (torch.einsum over a dim of size 1).
    """
    for one in inputs:
        error = oracle_error(traced, plan, pruned, one)
        assert error <= tolerance, f"relative error {error:.2e}; kept {dict(plan.kept)}"
    cost = traced.cost(plan)
    macs, params = counted_macs(pruned, traced.example_inputs), counted_params(pruned)
    assert cost.macs == macs or not exact_macs, (
        f"{cost.macs} MACs predicted, {macs} counted; kept {dict(plan.kept)}"
    )
    assert cost.params == params, f"{cost.params} parameters predicted, {params} counted"
