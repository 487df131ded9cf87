"""More patterns: fused queries, keys and values with what real models add. See ``patterns``."""

from __future__ import annotations

import torch
from patterns import case
from torch import Tensor, nn
from torch.nn import functional as F

TOKENS = ((2, 5, 8),)
H, D = 3, 4


@case("qkv.weight:0 out.weight:1", inputs=TOKENS)
class TurnedPairs(nn.Module):
    """Rotary embedding that turns neighbours, from a buffer: whole heads can go."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 3 * H * D, bias=False), nn.Linear(H * D, 8)
        self.register_buffer("turn", torch.randn(5, 2 * D), persistent=False)

    def turned(self, x: Tensor) -> Tensor:
        sin, cos = self.turn.chunk(2, -1)
        other = torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)
        return x * cos + other * sin

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(self.turned(q), self.turned(k), v)
        return self.out(y.transpose(1, 2).reshape(n, t, -1))


@case("qkv.weight:0 periods:0 out.weight:1", inputs=TOKENS)
class TurnedByPeriods(nn.Module):
    """Angles from periods that several channels of a head share; the first token is not turned.

    Heads can go, and the channels of one period.
    """

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 3 * H * 2 * D), nn.Linear(H * 2 * D, 8)
        self.register_buffer("periods", torch.rand(2) + 1)

    def turned(self, x: Tensor) -> Tensor:
        places = torch.arange(8.0, dtype=x.dtype).view(4, 2, 1)
        angle = (places / self.periods).flatten(1).repeat(1, 2)
        first, rest = x[:, :, :1], x[:, :, 1:]
        a, b = rest.chunk(2, -1)
        rest = rest * angle.cos() + torch.cat([-b, a], -1) * angle.sin()
        return torch.cat([first, rest], 2)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, H, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(self.turned(q), self.turned(k), v)
        return self.out(y.transpose(1, 2).reshape(n, t, -1))


@case("qkv.weight:0 q_bias:0 v_bias:0 k_bias:0 out.weight:1", inputs=TOKENS)
class KeysWithoutBias(nn.Module):
    """A bias put together from two parameters and zeros that are in no state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 3 * H * D, bias=False), nn.Linear(H * D, 8)
        self.q_bias, self.v_bias = (nn.Parameter(torch.randn(H * D)) for _ in range(2))
        self.register_buffer("k_bias", torch.zeros(H * D), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        bias = torch.cat([self.q_bias, self.k_bias, self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).reshape(n, t, 3, H, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(n, t, -1))


@case("qkv.weight:0 fc1.weight:0 fc2.weight:0 out.weight:1", "places:0", inputs=TOKENS, how="sdpa")
@case("qkv.weight:0 fc1.weight:0 out.weight:1", "places:0 places:1", inputs=TOKENS, how="product")
class LearnedBias(nn.Module):
    """A bias of the scores that a small net makes from places and an index picks from."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.qkv, self.out = nn.Linear(8, 3 * H * D), nn.Linear(H * D, 8)
        self.fc1, self.fc2 = nn.Linear(2, 8), nn.Linear(8, H)
        self.register_buffer("places", torch.randn(3, 3, 2))
        self.register_buffer("index", torch.randint(0, 9, (25,)))

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        table = self.fc2(self.fc1(self.places).relu()).view(-1, H)
        bias = table[self.index].view(5, 5, H).permute(2, 0, 1)[None]
        q, k, v = self.qkv(x).reshape(n, t, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
        if self.how == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        else:
            bias = bias.expand(n, -1, -1, -1).flatten(0, 1)
            q, k, v = (z.flatten(0, 1) for z in (q, k, v))
            scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=0.5)
            y = torch.bmm(scores.softmax(-1), v).unflatten(0, (n, H))
        return self.out(y.transpose(1, 2).reshape(n, t, -1))
