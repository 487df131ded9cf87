"""Costs: of any plan, in numpy, equal to what torch counts on the really cut net."""

from __future__ import annotations

import time
from collections.abc import Callable

import graphs_tokens  # noqa: F401 - registers its blocks
import numpy as np
import pytest
import torch
from checks import counted_bytes, counted_macs, counted_params
from oracle import random_plan
from patterns import CASES
from patterns_attention import FusedReshape, PackedAttention
from patterns_flow import Detector
from torch import nn

from fxprune.cut import cut
from fxprune.traced import Traced, trace

NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "detector": (Detector, (2, 3, 8, 8)),
    "grouped": (lambda: CASES["ShuffleUnit"].build(), (2, 3, 8, 8)),
    "transposed": (lambda: CASES["Transposed"].build(), (2, 3, 8, 8)),
    "attention": (FusedReshape, (2, 9, 16)),
    "packed attention": (PackedAttention, (2, 9, 16)),
}


def traced_net(name: str) -> Traced:
    build, shape = NETS[name]
    torch.manual_seed(0)
    return trace(build(), torch.randn(*shape))


@pytest.mark.parametrize("name", NETS)
def test_fifty_plans(name: str) -> None:
    traced = traced_net(name)
    plans = [random_plan(traced, seed) for seed in range(50)]
    costs = traced.costs.evaluate(np.stack([traced.counts(p) for p in plans]))
    for i, plan in enumerate(plans):
        pruned = cut(traced, plan)
        assert costs.macs[i] == counted_macs(pruned, traced.example_inputs)
        assert costs.params[i] == counted_params(pruned)
        assert costs.bytes[i] == counted_bytes(pruned)
        one = traced.cost(plan)
        assert (one.macs, one.params, one.bytes) == (costs.macs[i], costs.params[i], costs.bytes[i])


@pytest.mark.parametrize("name", NETS)
def test_unpruned_cost(name: str) -> None:
    traced = traced_net(name)
    gm = traced.graph_module
    cost = traced.cost()
    assert cost == traced.cost(traced.full_plan())
    assert cost.macs == counted_macs(gm, traced.example_inputs)
    assert cost.params == counted_params(gm)
    assert cost.bytes == counted_bytes(gm)


def test_closed_form() -> None:
    """3x3 convolution 3 -> k on 8x8, then a linear layer k*64 -> 5, batch 2."""
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Flatten(), nn.Linear(16 * 64, 5))
    traced = trace(model, torch.zeros(2, 3, 8, 8))
    (group,) = [g for g in traced.groups if g.locked is None]
    for k in (1, 7, 16):
        cost = traced.cost(traced.plan({group.name: range(k)}))
        assert cost.macs == 2 * (k * 3 * 9 * 64 + k * 64 * 5)
        assert cost.params == (k * 27 + k) + (k * 64 * 5 + 5)
        assert cost.bytes == 4 * cost.params


def test_macs_do_not_depend_on_labels() -> None:
    """A product of unlabelled tensors counts too."""

    class Gram(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(7, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x @ x.transpose(1, 2))

    traced = trace(Gram(), torch.zeros(2, 7, 5))
    assert traced.cost().macs == 2 * 7 * 7 * 5 + 2 * 7 * 7 * 3


def test_dtypes_and_buffers_count_in_bytes() -> None:
    """float64 weights and running statistics, and the int64 counter of the norm."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).double()
    cost = trace(model, torch.zeros(3, 4, dtype=torch.float64)).cost()
    assert cost.params == 30 + 12 + 14
    assert cost.bytes == 8 * (cost.params + 12) + 8


def test_thousands_of_plans_are_quick() -> None:
    traced = traced_net("detector")
    full = traced.costs.full_counts()
    rng = np.random.default_rng(0)
    free = np.array([g.locked is None for g in traced.groups])
    counts = np.where(free, rng.integers(1, full + 1, size=(4000, len(full))), full)
    traced.costs.evaluate(counts[:10])
    start = time.perf_counter()
    costs = traced.costs.evaluate(counts)
    assert time.perf_counter() - start < 1.0
    assert costs.macs.shape == costs.params.shape == costs.bytes.shape == (4000,)
    assert costs.macs.dtype == np.int64
    whole = traced.cost()
    assert (costs.macs <= whole.macs).all() and (costs.params <= whole.params).all()


def test_fewer_channels_never_cost_more() -> None:
    traced = traced_net("detector")
    full = traced.costs.full_counts()
    for i, g in enumerate(traced.groups):
        if g.locked is None:
            counts = np.tile(full, (g.width, 1))
            counts[:, i] = np.arange(1, g.width + 1)
            costs = traced.costs.evaluate(counts)
            assert (np.diff(costs.macs) >= 0).all() and (np.diff(costs.params) > 0).all()
