"""Numbers that the user's own modules hold follow the widths, where that is right."""

from __future__ import annotations

import pytest
import torch
from oracle import oracle_error, random_plan, randomise
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune.cut import as_user_class, cut
from fxprune.mirrors import changed_numbers
from fxprune.traced import Traced, trace
from fxprune.types import PrunePlan


class OwnNorm(nn.LayerNorm):
    """A norm over channels that lie first, as many image models have it."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class Scaled(nn.Module):
    """A scale for each channel, viewed with a shape that is held."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale, self.shape = nn.Parameter(torch.ones(channels)), (channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.view(self.shape)


class Heads(nn.Module):
    """Fused attention with its numbers held; ``own``: the scale is computed from them anew."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.heads, self.head_dim, self.own, self.fixed = 3, 8, own, 8**-0.5
        self.norm, self.qkv, self.out = nn.LayerNorm(24), nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (
            self.qkv(self.norm(x)).reshape(n, t, 3, self.heads, self.head_dim)
            .permute(2, 0, 3, 1, 4).unbind(0)
        )  # fmt: skip
        scale = self.head_dim**-0.5 if self.own else self.fixed
        y = ((q * scale) @ k.transpose(-2, -1)).softmax(-1) @ v
        return x + self.out(y.transpose(1, 2).reshape(n, t, self.heads * self.head_dim))


class Net(nn.Module):
    def __init__(self, own: bool = False) -> None:
        super().__init__()
        self.stem, self.norm, self.scaled = nn.Conv2d(3, 24, 4, 4), OwnNorm(24), Scaled(24)
        self.width, self.heads = 24, Heads(own)
        self.last = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.scaled(self.norm(self.stem(x)))
        x = x.reshape(x.shape[0], self.width, -1).transpose(1, 2)
        return self.last(self.heads(x).mean(1))


def traced_net(own: bool = False) -> Traced:
    torch.manual_seed(0)
    return trace(randomise(Net(own).double()), torch.randn(2, 3, 16, 16).double())


@pytest.mark.parametrize("seed", range(4))
def test_attributes_follow_the_widths(seed: int) -> None:
    traced = traced_net()
    plan = random_plan(traced, seed)
    pruned = cut(traced, plan)
    small = as_user_class(traced, plan, pruned)
    assert isinstance(small, Net)
    width = len(small.stem.weight)
    assert small.width == width < 24 and small.scaled.shape == (width, 1, 1)
    assert small.norm.normalized_shape == (width,)
    assert 3 * small.heads.heads * small.heads.head_dim == len(small.heads.qkv.weight)
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(seed)).double()
    assert oracle_error(traced, plan, small, (x,)) < 1e-10
    base = traced.captured.base
    assert base.width == 24 and base.heads.head_dim == 8  # as it was


@pytest.mark.parametrize("seen", [True, False])
def test_a_number_that_is_also_used_otherwise_is_not_let_pass(seen: bool) -> None:
    """The class would scale its scores by another number of columns, whether that shows or not."""
    traced = traced_net(own=True)
    if not seen:  # all tokens alike: so are the scores, whatever their scale
        traced.captured.base.stem.weight.data.zero_()
    columns = next(g for g in traced.groups if g.rows == 3)
    plan = PrunePlan({columns.name: tuple(c for c in range(24) if c % 8 < 4)})
    pruned = cut(traced, plan)
    assert as_user_class(traced, plan, pruned) is None
    assert oracle_error(traced, plan, pruned, traced.example_inputs) < 1e-10


def test_what_changed_in_which_module() -> None:
    traced = traced_net()
    stream = next(g for g in traced.groups if any(m.param == "stem.weight" for m in g.members))
    pruned = cut(traced, PrunePlan({stream.name: tuple(range(10))}))
    found = changed_numbers(traced.captured.graph_module.graph, pruned.graph)
    assert found == {"": {24: 10}, "norm": {24: 10}, "scaled": {24: 10}}
