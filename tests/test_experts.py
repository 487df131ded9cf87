"""Mixtures of experts: tokens sorted by expert, one grouped product for each layer of all experts.

torch's grouped product takes no float64, and only rows of 16 bytes: any width must still come out.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from checks import counted_params, prunable
from oracle import oracle_error, random_plan, randomise
from torch import Tensor, nn

from fxprune.cut import cut
from fxprune.traced import trace


class GroupedExperts(nn.Module):
    """Tokens sorted by expert, one grouped product for each layer of all experts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 12), nn.Linear(12, 5)
        self.up, self.down = (nn.Parameter(torch.randn(3, *s) / 4) for s in ((24, 12), (12, 24)))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x.flatten(0, 1))
        ends = torch.tensor([2, 2, 5], dtype=torch.int32)
        z = F.grouped_mm(y, self.up.transpose(1, 2), offs=ends).relu()
        return self.last(y + F.grouped_mm(z, self.down.transpose(1, 2), offs=ends))


TOKENS = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("seed", range(4))
def test_grouped_products_at_any_width(seed: int) -> None:
    torch.manual_seed(0)
    traced = trace(randomise(GroupedExperts()), TOKENS)
    assert {"up:1", "up:2", "down:1", "down:2", "first.weight:0"} <= prunable(traced), traced.locked
    assert not {"up:0", "down:0"} & prunable(traced)
    plan = random_plan(traced, seed)
    pruned = cut(traced, plan)
    assert oracle_error(traced, plan, pruned, (TOKENS,)) <= 1e-5
    assert traced.cost(plan).params == counted_params(pruned)
    width = pruned.up.shape[1:]
    products = 5 * (width[0] * width[1] * 2 + 8 * width[1] + width[1] * 5)
    assert traced.cost(plan).macs == products
