"""The oracle itself: it passes the right cut, flags the wrong ones, and its norms are right."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import (
    _group_norm,
    _over_kept,
    masked_original,
    oracle_error,
    random_plan,
    randomise,
    relative_error,
)
from patterns_attention import FusedChunk
from torch import Tensor, fx, nn

from fxprune.cut import cut
from fxprune.traced import Traced, trace
from fxprune.types import PrunePlan


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.d = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.b, self.g = nn.Conv2d(8, 12, 3, padding=1), nn.GroupNorm(3, 12)
        self.c = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.d(self.n(self.a(x)).relu())
        return self.c(self.g(self.b(y)).relu().mean((2, 3)))


def data(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def setting() -> tuple[Traced, PrunePlan, fx.GraphModule, Tensor]:
    torch.manual_seed(0)
    traced = trace(randomise(Net().double()), data(2, 3, 6, 6))
    plan = random_plan(traced, 3, share=0.5)
    return traced, plan, cut(traced, plan), data(2, 3, 6, 6, seed=2)


def test_right_cut_passes() -> None:
    traced, plan, pruned, x = setting()
    assert sum(p.numel() for p in pruned.parameters()) < traced.cost().params
    assert oracle_error(traced, plan, pruned, (x,)) <= 1e-12


@torch.no_grad()
def swap_inputs(pruned: fx.GraphModule, traced: Traced) -> None:
    """Two kept inputs of one consumer change places."""
    pruned.b.weight[:, [0, 1]] = pruned.b.weight[:, [1, 0]].clone()


@torch.no_grad()
def wrong_norm(pruned: fx.GraphModule, traced: Traced) -> None:
    """The batch norm keeps the first channels and not those of the plan."""
    k = len(pruned.n.weight)
    assert not torch.equal(pruned.n.weight, traced.graph_module.n.weight[:k])
    pruned.n.weight.copy_(traced.graph_module.n.weight[:k])


@torch.no_grad()
def wrong_running_mean(pruned: fx.GraphModule, traced: Traced) -> None:
    pruned.n.running_mean.copy_(pruned.n.running_mean.roll(1))


@torch.no_grad()
def wrong_depthwise(pruned: fx.GraphModule, traced: Traced) -> None:
    pruned.d.weight.copy_(pruned.d.weight.roll(1, 0))


@torch.no_grad()
def wrong_bias(pruned: fx.GraphModule, traced: Traced) -> None:
    pruned.b.bias.copy_(pruned.b.bias.flip(0))


@torch.no_grad()
def wrong_classifier(pruned: fx.GraphModule, traced: Traced) -> None:
    pruned.c.weight.copy_(pruned.c.weight.roll(2, 1))


def wrong_groups(pruned: fx.GraphModule, traced: Traced) -> None:
    """One group norm statistic for all channels."""
    pruned.g.num_groups = 1


@pytest.mark.parametrize(
    "spoil",
    [
        swap_inputs, wrong_norm, wrong_running_mean, wrong_depthwise, wrong_bias, wrong_classifier,
        wrong_groups,
    ],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_misaligned_cut_is_flagged(spoil: Callable[[fx.GraphModule, Traced], None]) -> None:
    traced, plan, pruned, x = setting()
    spoil(pruned, traced)
    assert oracle_error(traced, plan, pruned, (x,)) > 1e-3


def test_another_plan_is_flagged() -> None:
    traced, plan, _, x = setting()
    other = random_plan(traced, 4, share=0.5)
    assert other.kept != plan.kept
    assert oracle_error(traced, plan, cut(traced, other), (x,)) > 1e-3


def test_wrong_attention_scale_is_flagged() -> None:
    torch.manual_seed(0)
    x = data(2, 9, 16)
    traced = trace(randomise(FusedChunk().double()), x)
    plan = random_plan(traced, 0, share=0.5)
    pruned = cut(traced, plan)
    assert oracle_error(traced, plan, pruned, (x,)) <= 1e-12
    (node,) = [n for n in pruned.graph.nodes if "scaled_dot_product" in str(n.target)]
    assert node.kwargs["scale"] == pytest.approx(0.5)
    node.kwargs = {k: v for k, v in node.kwargs.items() if k != "scale"}
    pruned.recompile()
    assert oracle_error(traced, plan, pruned, (x,)) > 1e-3


def test_keeping_all_gives_the_same_bits() -> None:
    traced, _, _, x = setting()
    with torch.no_grad():
        expected = traced.graph_module(x)
        assert torch.equal(cut(traced, traced.full_plan())(x), expected)
        assert torch.equal(cut(traced, traced.plan({}))(x), expected)
    assert relative_error(masked_original(traced, traced.full_plan())(x), expected) <= 1e-13


def test_masked_original_in_closed_form() -> None:
    """Two linear layers: V[:, k] relu(W[k] x + b[k]) + c."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)).double()
    x = data(4, 5)
    traced = trace(model, x)
    (name,) = [g.name for g in traced.groups if g.locked is None]
    k = [0, 3, 4]
    p, q = model[0], model[2]
    expected = F.linear(F.linear(x, p.weight[k], p.bias[k]).relu(), q.weight[:, k], q.bias)
    actual = masked_original(traced, traced.plan({name: k}))(x)
    torch.testing.assert_close(actual, expected.detach(), rtol=1e-12, atol=1e-12)


def test_masked_original_leaves_the_model_alone() -> None:
    traced, plan, _, x = setting()
    before = {k: v.clone() for k, v in traced.graph_module.state_dict().items()}
    masked_original(traced, plan)(x)
    after = traced.graph_module.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


# -- norms over the kept channels ----------------------------------------------------------------


@pytest.mark.parametrize("centre", [True, False])
def test_norm_over_kept_channels(centre: bool) -> None:
    x, w, b = data(4, 3, 10), data(10, seed=2), data(10, seed=3)
    kept = [1, 2, 5, 9]
    keep = torch.zeros(10, dtype=torch.bool)
    keep[kept] = True
    bias = b if centre else None
    actual = _over_kept(x, keep, w, bias, 1e-5, centre)[..., kept]
    if centre:
        expected = F.layer_norm(x[..., kept], (4,), w[kept], b[kept], 1e-5)
    else:
        expected = F.rms_norm(x[..., kept], (4,), w[kept], 1e-5)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_layer_norm_over_an_image() -> None:
    x, w, b = data(2, 6, 3, 3), data(6, 3, 3, seed=2), data(6, 3, 3, seed=3)
    kept = [0, 4, 5]
    keep = torch.zeros(6, 3, 3, dtype=torch.bool)
    keep[kept] = True
    actual = _over_kept(x, keep, w, b, 1e-5, True)[:, kept]
    expected = F.layer_norm(x[:, kept], (3, 3, 3), w[kept], b[kept], 1e-5)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("kept", "groups"),
    [([0, 2, 5, 6, 8, 11], 3), ([0, 1, 2, 3, 8, 9, 10, 11], 2), ([3, 7, 8], 3)],
    ids=["columns", "a whole group gone", "one channel each"],
)
def test_group_norm_over_kept_channels(kept: list[int], groups: int) -> None:
    """3 groups of 4; ``groups`` of them keep something."""
    x, w, b = data(2, 12, 5), data(12, seed=2), data(12, seed=3)
    keep = torch.zeros(12, dtype=torch.bool)
    keep[kept] = True
    actual = _group_norm(x, 3, keep, w, b, 1e-5)[:, kept]
    expected = F.group_norm(x[:, kept], groups, w[kept], b[kept], 1e-5)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# -- the measure ---------------------------------------------------------------------------------


def test_relative_error_is_the_worst_tensor() -> None:
    a = {"x": torch.tensor([1.0, -4.0]), "y": [torch.tensor([2.0])]}
    b = {"x": torch.tensor([1.0, -3.0]), "y": [torch.tensor([1.0])]}
    assert relative_error(a, b) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.ones(2), torch.ones(3)),
        (torch.zeros(2), torch.zeros(2)),
        (torch.tensor([np.nan]), torch.ones(1)),
        ((torch.ones(2), torch.ones(2)), torch.ones(2)),
        (torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64)),
    ],
    ids=["shape", "all zero", "not finite", "count", "nothing to compare"],
)
def test_a_comparison_that_says_nothing_fails(a: object, b: object) -> None:
    with pytest.raises(AssertionError):
        relative_error(a, b)


def test_an_output_that_is_not_a_number_is_no_pass() -> None:
    try:
        error = relative_error(torch.ones(2), torch.tensor([1.0, np.nan]))
    except AssertionError:
        return
    assert not error <= 1e-5
