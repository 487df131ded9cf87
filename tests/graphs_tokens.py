"""Blocks of the random networks that work on tokens and vectors, and lead there. See ``graphs``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from graphs import Op, Options, Shape, Source, choose, divisors, register
from torch import Tensor, nn


@register
class ToTokens(Op):
    frequency = 3

    def __init__(self, c: int, length: int, literal: bool, position: bool) -> None:
        super().__init__()
        self.c, self.literal = c, literal
        self.position = nn.Parameter(torch.randn(1, length, c)) if position else None

    @classmethod
    def offer(cls, s: Source, shape: Shape) -> Options:
        literal, position = bool(s.integer(0, 1)), bool(s.integer(0, 1))
        return {
            "c": shape[1], "length": shape[2] * shape[3], "literal": literal, "position": position,
        }  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        if self.literal:
            y = x.reshape(-1, self.c, x.shape[2] * x.shape[3]).permute(0, 2, 1)
        else:
            y = x.flatten(2).transpose(1, 2)
        return y if self.position is None else y + self.position


@register
class ToVector(Op):
    def __init__(self, c: int, o: int, kind: str) -> None:
        super().__init__()
        self.kind, self.c = kind, c
        self.fc = nn.Linear(c, o)

    @classmethod
    def offer(cls, s: Source, shape: Shape) -> Options:
        kind = choose(s, ("mean", "flatten", "literal", "last"))
        kind = "mean" if shape[2] > 4 else kind
        c = shape[1] * (1 if kind == "mean" else shape[2] * shape[3])
        return {"c": c, "o": s.integer(2, 12), "kind": kind}

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "mean":
            y = F.adaptive_avg_pool2d(x, 1).flatten(1)
        elif self.kind == "flatten":
            y = torch.flatten(x, 1)
        elif self.kind == "last":
            y = x.permute(0, 2, 3, 1).reshape(x.size(0), -1)
        else:
            y = x.reshape(-1, self.c)
        return self.fc(y)


@register
class VectorLayer(Op):
    takes = "vector"

    def __init__(self, c: int, o: int, kind: str) -> None:
        super().__init__()
        self.fc, self.kind = nn.Linear(c, o), kind
        self.norm = nn.BatchNorm1d(o) if kind == "norm" else nn.LayerNorm(o)

    @classmethod
    def offer(cls, s: Source, shape: Shape) -> Options:
        return {"c": shape[1], "o": s.integer(2, 12), "kind": choose(s, ("norm", "layer", "gate"))}

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return y * y.sigmoid() if self.kind == "gate" else self.norm(y).relu()


@register
class ToImage(Op):
    takes = "vector"

    def __init__(self, c: int, o: int, size: int) -> None:
        super().__init__()
        self.fc, self.size = nn.Linear(c, o * size * size), size

    @classmethod
    def offer(cls, s: Source, shape: Shape) -> Options:
        return {"c": shape[1], "o": s.integer(2, 8), "size": choose(s, (2, 4))}

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).view(x.shape[0], -1, self.size, self.size)


@register
class Attention(Op):
    """x + attention(norm(x)), written in the ways that are found in the wild."""

    takes = "tokens"
    frequency = 4

    def __init__(self, c: int, heads: int, d: int, kind: str, sdpa: bool, kv: int) -> None:
        super().__init__()
        self.heads, self.d, self.kind, self.sdpa, self.kv = heads, d, kind, sdpa, kv
        self.norm = nn.LayerNorm(c)
        self.proj = nn.Linear(heads * d, c)
        if kind in ("reshape", "chunk", "rows"):
            self.qkv = nn.Linear(c, 3 * heads * d)
        elif kind == "module":
            self.attn = nn.MultiheadAttention(c, heads, batch_first=True)
        else:
            self.q = nn.Linear(c, heads * d)
            self.bias = nn.Parameter(torch.randn(heads, 1, 1)) if kind == "bias" else None
            self.k, self.v = nn.Linear(c, kv * d), nn.Linear(c, kv * d)

    @classmethod
    def offer(cls, s: Source, shape: Shape) -> Options:
        kinds = (
            "reshape",
            "chunk",
            "separate",
            "grouped",
            "module",
            "einsum",
            "rows",
            "rotary",
            "bias",
        )
        kind = choose(s, kinds)
        heads, d = s.integer(1, 4), s.integer(1, 4)
        kv = heads
        if kind == "module":
            heads = choose(s, divisors(shape[2]))
            d = shape[2] // heads
        elif kind == "rotary":
            d *= 2
        elif kind == "grouped":
            kv = choose(s, divisors(heads))
        sdpa = bool(s.integer(0, 1))
        return {"c": shape[2], "heads": heads, "d": d, "kind": kind, "sdpa": sdpa, "kv": kv}

    def project(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[N, L, C] -> query, key, value [N, heads, L, d]"""
        b, n, _ = y.shape
        if self.kind == "reshape":
            qkv = self.qkv(y).reshape(b, n, 3, self.heads, self.d).permute(2, 0, 3, 1, 4)
            return qkv[0], qkv[1], qkv[2]
        if self.kind == "rows":
            qkv = self.qkv(y).view(b, n, self.heads, 3 * self.d).transpose(1, 2)
            q, k, v = qkv.split(self.d, -1)
            return q, k, v
        if self.kind == "chunk":
            parts = self.qkv(y).chunk(3, dim=-1)
            q, k, v = (t.view(b, n, self.heads, -1).transpose(1, 2) for t in parts)
            return q, k, v
        q, k, v = (
            f(y).view(b, n, h, self.d).transpose(1, 2)
            for f, h in ((self.q, self.heads), (self.k, self.kv), (self.v, self.kv))
        )
        if self.kv != self.heads:
            k, v = (t.repeat_interleave(self.heads // self.kv, 1) for t in (k, v))
        return (self.turned(q), self.turned(k), v) if self.kind == "rotary" else (q, k, v)

    @staticmethod
    def turned(t: Tensor) -> Tensor:
        n, d = t.shape[-2:]
        rate = 1.0 / 100 ** (torch.arange(0, d, 2, dtype=t.dtype) / d)
        angle = torch.arange(n, dtype=t.dtype)[:, None] * rate
        angle = torch.cat([angle, angle], -1)
        p, q = t.chunk(2, -1)
        return t * angle.cos() + torch.cat([-q, p], -1) * angle.sin()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if self.kind == "module":
            return x + self.attn(y, y, y, need_weights=not self.sdpa)[0]
        b, n, _ = x.shape
        q, k, v = self.project(y)
        if self.kind == "einsum":
            scores = torch.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5
            z = torch.einsum("bhij,bhjd->bihd", scores.softmax(-1), v).flatten(2)
        elif self.sdpa:
            z = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1)
        else:
            scores = (q * self.d**-0.5) @ k.transpose(-2, -1)
            if self.kind == "bias":
                scores = scores * self.bias.sigmoid()
            z = (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, self.heads * self.d)
        return x + self.proj(z)


@register
class Windows(Op):
    """Shifted 2 x 2 windows with a bias for each head, as in Swin."""

    def __init__(self, c: int, heads: int, d: int) -> None:
        super().__init__()
        self.heads, self.d, self.norm = heads, d, nn.LayerNorm(c)
        self.qkv, self.proj = nn.Linear(c, 3 * heads * d), nn.Linear(heads * d, c)
        self.bias = nn.Parameter(torch.randn(1, heads, 4, 4))

    @classmethod
    def offer(cls, s: Source, shape: Shape) -> Options | None:
        if shape[2] % 2:
            return None
        return {"c": shape[1], "heads": s.integer(1, 4), "d": s.integer(1, 4)}

    def forward(self, x: Tensor) -> Tensor:
        y = torch.roll(self.norm(x.permute(0, 2, 3, 1)), (-1, -1), (1, 2))
        b, h, w, c = y.shape
        y = y.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        q, k, v = self.qkv(y).view(-1, 4, 3, self.heads, self.d).permute(2, 0, 3, 1, 4).unbind(0)
        y = (((q * self.d**-0.5) @ k.transpose(-2, -1)) + self.bias).softmax(-1) @ v
        y = self.proj(y.transpose(1, 2).reshape(-1, 4, self.heads * self.d))
        y = y.view(b, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return x + torch.roll(y, (1, 1), (1, 2)).permute(0, 3, 1, 2)


@register
class Sequence(Op):
    """A one-dimensional convolution, a gate of one half by the other, a recurrent layer."""

    takes = "tokens"

    def __init__(self, c: int, o: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.p = nn.Linear(c, 2 * o)
        self.n, self.q = nn.LayerNorm(o), nn.Conv1d(o, o, 3, padding=1)
        self.cell = nn.GRU(2 * o, 3, batch_first=True) if kind == "recurrent" else None

    @classmethod
    def offer(cls, s: Source, shape: Shape) -> Options:
        kind = choose(s, ("gate", "glu", "convolution", "recurrent"))
        return {"c": shape[2], "o": s.integer(2, 6), "kind": kind}

    def forward(self, x: Tensor) -> Tensor:
        y = self.p(x)
        if self.cell is not None:
            return self.cell(y)[0]
        if self.kind == "glu":
            return F.glu(y, -1)
        p, q = y.chunk(2, -1)
        gate = self.q(self.n(q).transpose(1, 2)).transpose(1, 2)
        return p * gate if self.kind == "gate" else gate


@register
class FeedForward(Op):
    takes = "tokens"

    def __init__(self, c: int, hidden: int, kind: str) -> None:
        super().__init__()
        self.kind, self.norm = kind, nn.LayerNorm(c)
        self.p, self.q = nn.Linear(c, hidden), nn.Linear(hidden, c)
        if kind == "gated":
            self.g = nn.Linear(c, hidden, bias=False)

    @classmethod
    def offer(cls, s: Source, shape: Shape) -> Options:
        return {"c": shape[2], "hidden": s.integer(2, 12), "kind": choose(s, ("plain", "gated"))}

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        z = F.gelu(self.p(y))
        return x + self.q(z * self.g(y) if self.kind == "gated" else z)


@register
class Project(Op):
    takes = "tokens"

    def __init__(self, c: int, o: int, kind: str) -> None:
        super().__init__()
        self.kind, self.fc = kind, nn.Linear(c, o)
        self.token = nn.Parameter(torch.randn(1, 1, o)) if kind == "class" else None
        self.mix = nn.Parameter(torch.randn(o, o)) if kind == "matmul" else None

    @classmethod
    def offer(cls, s: Source, shape: Shape) -> Options:
        kind = choose(s, ("plain", "class", "matmul"))
        return {"c": shape[2], "o": s.integer(2, 12), "kind": kind}

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        if self.token is not None:
            return torch.cat([self.token.expand(x.shape[0], -1, -1), y], 1)
        return y if self.mix is None else (y @ self.mix).tanh()


@register
class Pooled(Op):
    """Tokens to a vector: their mean, or the first one."""

    takes = "tokens"

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first

    @classmethod
    def offer(cls, s: Source, shape: Shape) -> Options:
        return {"first": bool(s.integer(0, 1))}

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0] if self.first else x.mean(1)


SUMS = {
    "rms": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3),
    "mean": lambda x: x * x.mean(-1, keepdim=True).tanh(),
    "sum": lambda x: x + x.relu().sum(-1, keepdim=True).tanh(),
    "unit": lambda x: F.normalize(x, dim=-1),
    "sigmoid": lambda x: x * x.sigmoid().mean(-1, keepdim=True),
    "maximum": lambda x: x * x.amax(-1, keepdim=True).tanh(),
    "least": lambda x: x + torch.min(x, -1, keepdim=True)[0],
    "centred": lambda x: x - x.mean(-1, keepdim=True),
    "response": lambda x: x * (g := x.norm(p=2, dim=1, keepdim=True)) / (g.mean(-1, True) + 0.1),
}


class _Summed(Op):
    """Sums, means and norms over channels; where removed channels are not zero, they stay."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    @classmethod
    def offer(cls, s: Source, shape: Shape) -> Options:
        return {"kind": choose(s, tuple(SUMS))}


@register
class SummedTokens(_Summed):
    takes = "tokens"

    def forward(self, x: Tensor) -> Tensor:
        return SUMS[self.kind](x)


@register
class SummedImage(_Summed):
    def forward(self, x: Tensor) -> Tensor:
        return SUMS[self.kind](x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@register
class Ordered(Op):
    """Channels in another order: a roll, or an index by a list or buffer, plain or doubled."""

    def __init__(self, c: int, kind: str, seed: int) -> None:
        super().__init__()
        self.kind, self.shift = kind, 1 + seed % c
        order = torch.randperm(c, generator=torch.Generator().manual_seed(seed))
        self.listed = order.tolist()
        self.register_buffer("order", order)

    @classmethod
    def offer(cls, s: Source, shape: Shape) -> Options:
        kind = choose(s, ("roll", "list", "buffer", "added", "pairs"))
        return {"c": shape[1], "kind": kind, "seed": s.integer(0, 99)}

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "roll":
            return x.roll(self.shift, 1)
        if self.kind == "list":
            return x[:, self.listed]
        if self.kind == "pairs":
            return x[:, [i for i in self.listed for _ in range(2)]]
        y = x.index_select(1, self.order)
        return y + x if self.kind == "added" else y
