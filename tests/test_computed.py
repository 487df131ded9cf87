"""Weights that forward computes from parameters: standardised, spectrally normalised, gated.

What they compute is a constant, which the parameter takes over: checked against the user's own
model, and against a twin of plain layers that hold the computed weights.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from checks import assert_right, prunable
from oracle import random_plan, randomise
from torch import Tensor, nn

import fxprune
from fxprune import checkpoint
from fxprune.cut import as_user_class, cut
from fxprune.traced import trace
from fxprune.types import ChannelGroup

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
FREE = {"a.weight:0", "b.weight:0", "b.weight:1", "c.weight:0", "c.weight:1"}


class Centred(nn.Conv2d):
    """Mean 0 and deviation 1 over the inputs of each output."""

    def standard(self) -> Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return w / (w.view(w.size(0), -1).std(1).view(-1, 1, 1, 1).expand_as(w) + 1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.standard(), self.bias, self.stride, self.padding, 1, self.groups)


class Gained(nn.Conv2d):
    """As a norm of the weight in training mode, with a learned gain."""

    def __init__(self, *args: int, **kwargs: int) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.full((self.out_channels, 1, 1, 1), 0.7))

    def standard(self) -> Tensor:
        flat, gain = self.weight.reshape(1, self.out_channels, -1), self.gain.view(-1)
        w = F.batch_norm(flat, None, None, weight=gain, training=True, momentum=0.0, eps=1e-6)
        return w.reshape_as(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.standard(), self.bias, self.stride, self.padding, 1, self.groups)


def spectral(*args: int, **kwargs: int) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nn.utils.spectral_norm(nn.Conv2d(*args, **kwargs))


class Net(nn.Module):
    def __init__(self, layer: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.a, self.b = layer(3, 8, 3, padding=1), layer(8, 12, 3, padding=1)
        self.c, self.head = layer(12, 12, 3, padding=1), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x).sigmoid()).relu()
        return self.head(self.c(y).relu().mean((2, 3)))


def built(layer: Callable[..., nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return randomise(Net(layer).double())


@pytest.mark.parametrize("layer", [Centred, Gained, spectral])
def test_its_inputs_and_outputs_are_free(layer: Callable[..., nn.Module]) -> None:
    traced = trace(built(layer), IMAGES)
    name = "weight_orig" if layer is spectral else "weight"
    assert {f.replace("weight", name) for f in FREE} <= prunable(traced), traced.locked
    for seed in range(3):
        plan = random_plan(traced, seed)
        assert_right(traced, plan, cut(traced, plan), [(IMAGES,)])


@torch.no_grad()
@pytest.mark.parametrize("layer", [Centred, Gained])
def test_equal_to_plain_layers_with_the_computed_weights(layer: Callable[..., nn.Module]) -> None:
    model, plain = built(layer), built(nn.Conv2d)
    for name in "abc":
        own, twin = getattr(model, name), getattr(plain, name)
        twin.weight.copy_(own.standard())
        twin.bias.copy_(own.bias)
    plain.head = model.head
    assert torch.equal(model(IMAGES), plain(IMAGES))
    traced, same = trace(model, IMAGES), trace(plain, IMAGES)
    plan = random_plan(same, 0)
    kept = {_key(g): plan.kept[g.name] for g in same.groups if g.name in plan.kept}
    mine = {g.name: kept[_key(g)] for g in traced.groups if _key(g) in kept}
    assert len(mine) == len(kept) == 3
    pruned, expected = cut(traced, traced.plan(mine)), cut(same, plan)
    assert torch.equal(pruned(IMAGES), expected(IMAGES))


def _key(group: ChannelGroup) -> frozenset[str]:
    return frozenset(f"{m.param}:{m.dim}" for m in group.members)


@torch.no_grad()
def test_the_users_model_stays_as_it_is_and_its_class_is_not_used() -> None:
    model = built(Centred)
    before = copy.deepcopy(model.state_dict())
    traced = trace(model, IMAGES)
    assert set(traced.captured.settled) == {"a.weight", "b.weight", "c.weight"}
    whole = cut(traced, traced.full_plan())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(whole(IMAGES), model(IMAGES))
    assert as_user_class(traced, traced.full_plan(), whole) is None
    assert set(whole.state_dict()) == set(before)


def test_a_saved_plan_rebuilds_it_from_a_fresh_model(tmp_path: Path) -> None:
    result = fxprune.prune(built(Gained), IMAGES, 0.5, IMAGES, allocation="uniform")
    assert result.after.macs < 0.6 * result.before.macs
    checkpoint.save(tmp_path / "kept", result.model, result.plan)
    again = fxprune.load(tmp_path / "kept", built(Gained), IMAGES)
    assert torch.equal(again(IMAGES), result.model(IMAGES))


class Untouched(nn.Module):
    """Formulas that are no obstacle, or whose parameter serves other uses as well."""

    def __init__(self) -> None:
        super().__init__()
        self.shifted, self.shared = nn.Linear(3, 8), nn.Linear(8, 8)
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, 1 + self.shifted.weight, self.shifted.bias).relu()
        w = self.shared.weight
        return self.last(F.linear(y, w - w.mean(1, keepdim=True)) + self.shared(y))


def test_other_formulas_stay() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3).double()
    traced = trace(randomise(Untouched().double()), x)
    assert traced.captured.settled == ()
    for seed in range(3):
        plan = random_plan(traced, seed)
        assert_right(traced, plan, cut(traced, plan), [(x,)])


class Prototypes(nn.Module):
    """Cosines with learned directions: labels follow both norms, so that the class can stay."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(6, 5)
        self.directions = nn.Parameter(torch.randn(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = F.normalize(self.first(x), dim=-1)
        return self.last(F.linear(y, F.normalize(self.directions, dim=-1)))


def test_a_formula_stays_where_nothing_is_gained() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3).double()
    traced = trace(randomise(Prototypes().double()), x)
    assert traced.captured.settled == ()
    plan = random_plan(traced, 0)
    pruned = cut(traced, plan)
    assert_right(traced, plan, pruned, [(x,)])
    assert as_user_class(traced, plan, pruned) is not None
