"""Attention in its many forms: 4 heads of 4 dims on [2, 9, 16] tokens. See ``patterns``."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from patterns import IMAGE, case, conv
from torch import Tensor, nn

TOKENS = ((2, 9, 16),)
E, H, D = 16, 4, 4


class Block(nn.Module):
    """A first linear layer, x + attention(norm(x)), and a last one; subclasses give ``attend``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(16, E), nn.LayerNorm(E)
        self.proj, self.last = nn.Linear(E, E), nn.Linear(E, 5)

    def attend(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(y + self.proj(self.attend(self.norm(y))))


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return ((q * scale) @ k.transpose(-2, -1)).softmax(-1) @ v


FUSED = "first.weight:0 proj.weight:1 qkv.weight:0 qkv.weight:1"


@case(FUSED, inputs=TOKENS)
class FusedReshape(Block):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(E, 3 * E)

    def attend(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, H, c // H).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = softmax_attention(q, k, v, D**-0.5)
        return y.transpose(1, 2).reshape(b, n, c)


@case(FUSED, inputs=TOKENS)
class FusedIndexed(Block):
    """Computed head dim and scale: the scale keeps the original's value."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(E, 3 * E, bias=False)

    def attend(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        d = c // H
        qkv = self.qkv(x).reshape(b, n, 3, H, d).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        y = softmax_attention(q, k, v, d**-0.5)
        return y.transpose(1, 2).flatten(2)


@case(FUSED, inputs=TOKENS)
class FusedChunk(Block):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(E, 3 * E)

    def attend(self, x: Tensor) -> Tensor:
        b, n = x.shape[:2]
        q, k, v = (t.view(b, n, H, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v)
        return y.transpose(1, 2).reshape(b, n, -1)


@case(FUSED, inputs=TOKENS)
class FusedPerHead(Block):
    """[H, 3 D] rows: each head holds its own q, k and v (as in Falcon or BLOOM)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(E, 3 * E)

    def attend(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        qkv = self.qkv(x).view(b, n, H, 3 * D).transpose(1, 2)
        q, k, v = qkv.split(D, -1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return y.transpose(1, 2).reshape(b, n, E)


class _Separate(Block):
    kv, scale_by = H, "computed"

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(E, E)
        self.k, self.v = nn.Linear(E, self.kv * D), nn.Linear(E, self.kv * D)

    def heads(self, t: Tensor) -> Tensor:
        return t.view(t.shape[0], t.shape[1], -1, D).transpose(1, 2)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
        k, v = self.grown(k), self.grown(v)
        q, k = self.turned(q), self.turned(k)
        y = self.mixed(q, k, v)
        return y.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1)

    def grown(self, t: Tensor) -> Tensor:
        return t

    def turned(self, t: Tensor) -> Tensor:
        return t

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return softmax_attention(q, k, v, q.shape[-1] ** -0.5)


SEPARATE = "first.weight:0 q.weight:0 k.weight:0 v.weight:0 proj.weight:1"


@case(SEPARATE, inputs=TOKENS)
class Separate(_Separate):
    pass


@case(SEPARATE, inputs=TOKENS)
class RootOfSize(_Separate):
    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.size(-1))
        mask = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).tril()
        return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v


@case(SEPARATE, inputs=TOKENS)
class GroupedQueriesRepeated(_Separate):
    kv = 2

    def grown(self, t: Tensor) -> Tensor:
        return t.repeat_interleave(2, 1)


@case(SEPARATE, inputs=TOKENS)
class GroupedQueriesExpanded(_Separate):
    kv = 2

    def grown(self, t: Tensor) -> Tensor:
        b, h, n, d = t.shape
        return t[:, :, None].expand(b, h, 2, n, d).reshape(b, h * 2, n, d)


@case(SEPARATE, inputs=TOKENS)
class MultiQuery(_Separate):
    kv = 1

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k.expand_as(q), v.expand_as(q))


class _Rotary(_Separate):
    def angles(self, t: Tensor, repeat: bool) -> tuple[Tensor, Tensor]:
        n, d = t.shape[-2:]
        rate = 1.0 / 100 ** (torch.arange(0, d, 2, dtype=t.dtype) / d)
        angle = torch.arange(n, dtype=t.dtype)[:, None] * rate
        angle = angle.repeat_interleave(2, -1) if repeat else torch.cat([angle, angle], -1)
        return angle.cos(), angle.sin()


@case("v.weight:0 proj.weight:1", inputs=TOKENS)
class RotaryHalves(_Rotary):
    def turned(self, t: Tensor) -> Tensor:
        cos, sin = self.angles(t, repeat=False)
        p, q = t.chunk(2, -1)
        return t * cos + torch.cat([-q, p], -1) * sin


@case("v.weight:0 proj.weight:1", inputs=TOKENS)
class RotaryPairs(_Rotary):
    def turned(self, t: Tensor) -> Tensor:
        cos, sin = self.angles(t, repeat=True)
        turned = torch.stack([-t[..., 1::2], t[..., ::2]], -1).flatten(-2)
        return t * cos + turned * sin


@case("v.weight:0 proj.weight:1", inputs=TOKENS)
class RotaryComplex(_Rotary):
    def turned(self, t: Tensor) -> Tensor:
        cos, sin = self.angles(t, repeat=False)
        half = t.shape[-1] // 2
        turn = torch.complex(cos[..., :half], sin[..., :half])
        z = torch.view_as_complex(t.contiguous().view(*t.shape[:-1], half, 2))
        return torch.view_as_real(z * turn).flatten(-2)


@case("q.weight:0 v.weight:0", inputs=TOKENS)
class TalkingHeads(_Separate):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(H, H)

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q * D**-0.5) @ k.transpose(-2, -1)
        scores = self.mix(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return scores.softmax(-1) @ v


@case("v.weight:0 proj.weight:1", inputs=TOKENS)
class LinearAttention(_Separate):
    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q.softmax(-1) @ (k.softmax(-2).transpose(-2, -1) @ v)


@case("first.weight:0 q.weight:0 k.weight:0", inputs=TOKENS)
class CrossCovariance(_Separate):
    """XCiT: attention between channels."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = F.normalize(q, dim=-2), F.normalize(k, dim=-2)
        return (v @ (k.transpose(-2, -1) @ q).softmax(-2)) * 1.0


@case(SEPARATE, inputs=TOKENS)
class SharedBias(_Separate):
    """A relative position bias for each head, gathered from a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(17, H))
        index = torch.arange(9)[:, None] - torch.arange(9) + 8
        self.register_buffer("index", index)

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[-2]
        bias = self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1)
        return (((q @ k.transpose(-2, -1)) * D**-0.5) + bias[None]).softmax(-1) @ v


@case(SEPARATE, inputs=TOKENS)
class NormedQueries(_Separate):
    def __init__(self) -> None:
        super().__init__()
        self.qn, self.kn = nn.LayerNorm(D), nn.LayerNorm(D)

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.qn(q), self.kn(k), v)


@case(SEPARATE, inputs=TOKENS)
class EinsumAttention(_Separate):
    def attend(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, H, D) for f in (self.q, self.k, self.v))
        weights = (torch.einsum("bihd,bjhd->bhij", q, k) * D**-0.5).softmax(-1)
        return torch.einsum("bhij,bjhd->bihd", weights, v).reshape(b, n, E)


@case("first.weight:0 wq:0 wq:2 wo:0 wo:2", inputs=TOKENS)
class EinsumWeights(Block):
    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk, self.wv = (nn.Parameter(torch.randn(H, E, D) / 4) for _ in range(3))
        self.wo = nn.Parameter(torch.randn(H, D, E) / 4)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("bne,hed->bhnd", x, w) for w in (self.wq, self.wk, self.wv))
        weights = torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1)
        return torch.einsum("bhij,bhjd,hde->bie", weights, v, self.wo)


@case("a.weight:0 qkv.weight:0 proj.weight:1", inputs=(IMAGE,))
class Window(nn.Module):
    """Shifted windows of 4 x 4 with a bias, as in Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = conv(3, E), nn.LayerNorm(E)
        self.qkv, self.proj, self.last = nn.Linear(E, 3 * E), nn.Linear(E, E), nn.Linear(E, 5)
        self.bias = nn.Parameter(torch.randn(1, H, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).permute(0, 2, 3, 1)
        z = torch.roll(self.norm(y), (-2, -2), (1, 2))
        b, h, w, c = z.shape
        z = z.view(b, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5)
        z = z.reshape(-1, 16, c)
        qkv = self.qkv(z).reshape(z.size(0), z.size(1), 3, H, c // H).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        q = q * (c // H) ** -0.5
        attn = (q.matmul(k.transpose(-2, -1)) + self.bias).softmax(-1)
        z = self.proj(attn.matmul(v).transpose(1, 2).reshape(z.size(0), z.size(1), c))
        z = z.view(b, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return self.last(y + torch.roll(z, (2, 2), (1, 2)))


@case("q.weight:0 k.weight:0 g.weight:0 a.weight:0", inputs=(IMAGE,))
class NonLocal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 8), conv(8, 5)
        self.q, self.k, self.g, self.o = (conv(8, 4, 1) for _ in range(4))
        self.o = conv(4, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        b, _, h, w = y.shape
        q, k, g = (f(y).view(b, 4, -1) for f in (self.q, self.k, self.g))
        z = (q.transpose(1, 2) @ k).softmax(-1) @ g.transpose(1, 2)
        return self.b(y + self.o(z.transpose(1, 2).reshape(b, 4, h, w)))


# -- nn.MultiheadAttention and nn.TransformerEncoder ---------------------------------------------


@case("first.weight:0 attn.in_proj_weight:0 attn.out_proj.weight:1", inputs=TOKENS)
class PackedAttention(Block):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(E, H, batch_first=True)

    def attend(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x, need_weights=False)[0]


@case("first.weight:0 attn.out_proj.weight:1", inputs=TOKENS)
class MaskedAttention(Block):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(E, H, bias=False)
        self.register_buffer("mask", torch.ones(9, 9).triu(1).bool())

    def attend(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        padding = torch.zeros(x.shape[1], 9, dtype=torch.bool)
        padding[:, -2:] = True
        y, _ = self.attn(x, x, x, attn_mask=self.mask, key_padding_mask=padding)
        return y.transpose(0, 1)


@case("a.weight:0 attn.q_proj_weight:0", inputs=((2, 9, 16), (2, 5, 6)))
class CrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(16, E), nn.Linear(6, 10), nn.Linear(E, 5)
        self.attn = nn.MultiheadAttention(E, H, kdim=10, vdim=10, batch_first=True)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x, y = self.a(x), self.b(y)
        z, weights = self.attn(x, y, y)
        return self.out(x + z), weights


class _Encoder(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, E), nn.Linear(E, 5)
        layer = nn.TransformerEncoderLayer(E, H, 24, batch_first=True, **options)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(self.first(x)))


_LAYER = "first.weight:0 body.layers.0.linear1.weight:0 body.layers.1.self_attn.in_proj_weight:0"


@case(_LAYER, inputs=TOKENS)
class Encoder(_Encoder):
    pass


@case(_LAYER, inputs=TOKENS)
class EncoderNormFirst(_Encoder):
    def __init__(self) -> None:
        super().__init__(norm_first=True, activation="gelu")


@case("first.weight:0 body.linear1.weight:0", inputs=((2, 9, 16), (2, 5, E)))
class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, E), nn.Linear(E, 5)
        self.memory = nn.Linear(E, E)
        self.body = nn.TransformerDecoderLayer(E, H, 24, batch_first=True)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.last(self.body(self.first(x), self.memory(memory)))


@case("first.weight:0 attn.in_proj_weight:0", inputs=TOKENS)
class ClassToken(Block):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(E, H, batch_first=True)
        self.token = nn.Parameter(torch.randn(1, 1, E))
        self.position = nn.Parameter(torch.randn(1, 10, E))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y = torch.cat([self.token.expand(y.shape[0], -1, -1), y], 1) + self.position
        z = self.norm(y)
        y = y + self.proj(self.attn(z, z, z, need_weights=False)[0])
        return self.last(y[:, 0])


# -- mixing tokens without attention -------------------------------------------------------------


@case("first.weight:0 p.weight:0 t.weight:0", inputs=TOKENS)
class Mixer(Block):
    def __init__(self) -> None:
        super().__init__()
        self.t, self.u = nn.Linear(9, 12), nn.Linear(12, 9)
        self.p, self.r = nn.Linear(E, 24), nn.Linear(24, E)

    def attend(self, x: Tensor) -> Tensor:
        x = x + self.u(F.gelu(self.t(x.transpose(1, 2)))).transpose(1, 2)
        return self.r(F.gelu(self.p(x)))


@case("first.weight:0 p.weight:0", inputs=TOKENS)
class SpatialGate(Block):
    """gMLP: one half of the channels gates the other."""

    def __init__(self) -> None:
        super().__init__()
        self.p, self.q = nn.Linear(E, 24), nn.Linear(12, E)
        self.n, self.t = nn.LayerNorm(12), nn.Linear(9, 9)

    def attend(self, x: Tensor) -> Tensor:
        p, q = F.gelu(self.p(x)).chunk(2, -1)
        return self.q(p * self.t(self.n(q).transpose(1, 2)).transpose(1, 2))


@case("gate.weight:0 up.weight:0 first.weight:0", inputs=TOKENS)
class GatedFeedForward(Block):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(E, 24, bias=False), nn.Linear(E, 24, bias=False)
        self.down = nn.Linear(24, E, bias=False)

    def attend(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))
