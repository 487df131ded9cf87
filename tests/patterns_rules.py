"""More patterns: sums of products, norms without parameters, computed weights. See ``patterns``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from patterns import case
from torch import Tensor, nn

TOKENS = ((2, 5, 8),)


class _Scores(nn.Module):
    """Products of two activations, summed over channels: q [N, L, C], k [N, L, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(8, 10)
        self.o = nn.Linear(10, 3)

    def mapped(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.mapped(self.q(x)), self.mapped(self.k(x))
        return self.o(q @ (k.transpose(1, 2) @ self.v(x)))


@case("q.weight:0 k.weight:0 v.weight:0", inputs=TOKENS)
class ReluLinearAttention(_Scores):
    def mapped(self, t: Tensor) -> Tensor:
        return F.relu(t)


@case("v.weight:0", locked="q.weight:0 k.weight:0", inputs=TOKENS)
class PositiveLinearAttention(_Scores):
    """elu(0) + 1 is 1: a removed channel would still add to the sum."""

    def mapped(self, t: Tensor) -> Tensor:
        return F.elu(t) + 1


@case("a.weight:0 b.weight:1", inputs=TOKENS)
class ModulatedNorm(nn.Module):
    """A norm without parameters, shifted and scaled by another layer (diffusion transformers)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.ada, self.b = nn.Linear(8, 12), nn.Linear(8, 24), nn.Linear(12, 5)
        self.n = nn.LayerNorm(12, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.ada(x.mean(1, keepdim=True)).chunk(2, -1)
        return self.b(self.n(self.a(x)) * (1 + scale) + shift)


@case("q.weight:0 w:1", locked="p.weight:0 u:1", inputs=TOKENS)
class ComputedWeights(nn.Module):
    """exp(0) is 1: a removed input of such a weight counts, unless what it meets is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.p, self.q = nn.Linear(8, 6), nn.Linear(8, 6)
        self.u, self.w = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        opened = F.linear(self.p(x).sigmoid(), self.u.exp())
        return opened + F.linear(self.q(x).relu(), self.w.exp())
