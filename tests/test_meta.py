"""A transformer of a billion parameters is grouped, costed and cut on the meta device."""

from __future__ import annotations

import resource

import torch
import torch.nn.functional as F
from oracle import random_plan
from torch import Tensor, nn

from fxprune.cut import cut
from fxprune.traced import trace


class Norm(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(c))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Block(nn.Module):
    def __init__(self, c: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.n, self.m = heads, Norm(c), Norm(c)
        self.q, self.k, self.v, self.o = (nn.Linear(c, c, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(c, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, c, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        y = self.n(x)
        q, k, v = (
            f(y).view(b, n, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(b, n, -1))
        y = self.m(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Language(nn.Module):
    def __init__(self, words: int, c: int, heads: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, c)
        self.blocks = nn.Sequential(*(Block(c, heads, hidden) for _ in range(depth)))
        self.norm, self.head = Norm(c), nn.Linear(c, words, bias=False)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(words))))


def test_a_billion_parameters_need_no_memory() -> None:
    with torch.device("meta"):
        model = Language(32000, 4096, 32, 14336, 4).eval()
        words = torch.zeros(1, 8, dtype=torch.long)
    count = sum(p.numel() for p in model.parameters())
    assert count > 1e9
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    traced = trace(model, words)
    free = [g for g in traced.groups if g.locked is None]
    plan = random_plan(traced, 0, 0.5)
    small = cut(traced, plan)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    assert grown < 1, f"{grown:.2f} GiB; the weights alone have {4 * count / 2**30:.2f}"
    # heads and hidden width of each block, head dims, the residual stream
    assert len(free) >= 4 * 3 + 1, traced.locked
    assert all(p.is_meta for p in small.parameters())
    assert traced.cost(plan).params == sum(p.numel() for p in small.parameters())
    assert small(words).shape == (1, 8, 32000)
