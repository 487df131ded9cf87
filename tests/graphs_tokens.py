"""Blocks of the random networks that work on tokens and vectors, and lead there. See ``graphs``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from graphs import Op, Options, Shape, Source, choose, divisors, register
from torch import Tensor, nn


@register
class ToTokens(Op):
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

    def __init__(self, c: int, heads: int, d: int, kind: str, sdpa: bool, kv: int) -> None:
        super().__init__()
        self.heads, self.d, self.kind, self.sdpa, self.kv = heads, d, kind, sdpa, kv
        self.norm = nn.LayerNorm(c)
        self.proj = nn.Linear(heads * d, c)
        if kind in ("reshape", "chunk"):
            self.qkv = nn.Linear(c, 3 * heads * d)
        elif kind == "module":
            self.attn = nn.MultiheadAttention(c, heads, batch_first=True)
        else:
            self.q = nn.Linear(c, heads * d)
            self.k, self.v = nn.Linear(c, kv * d), nn.Linear(c, kv * d)

    @classmethod
    def offer(cls, s: Source, shape: Shape) -> Options:
        kind = choose(s, ("reshape", "chunk", "separate", "grouped", "module", "einsum"))
        heads, d = s.integer(1, 4), s.integer(1, 4)
        kv = heads
        if kind == "module":
            heads = choose(s, divisors(shape[2]))
            d = shape[2] // heads
        elif kind == "grouped":
            kv = choose(s, divisors(heads))
        sdpa = bool(s.integer(0, 1))
        return {"c": shape[2], "heads": heads, "d": d, "kind": kind, "sdpa": sdpa, "kv": kv}

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if self.kind == "module":
            return x + self.attn(y, y, y, need_weights=not self.sdpa)[0]
        b, n, _ = x.shape
        if self.kind == "reshape":
            qkv = self.qkv(y).reshape(b, n, 3, self.heads, self.d).permute(2, 0, 3, 1, 4)
            q, k, v = qkv[0], qkv[1], qkv[2]
        elif self.kind == "chunk":
            parts = self.qkv(y).chunk(3, dim=-1)
            q, k, v = (t.view(b, n, self.heads, -1).transpose(1, 2) for t in parts)
        else:
            q, k, v = (
                f(y).view(b, n, h, self.d).transpose(1, 2)
                for f, h in ((self.q, self.heads), (self.k, self.kv), (self.v, self.kv))
            )
        if self.kv != self.heads:
            k, v = (t.repeat_interleave(self.heads // self.kv, 1) for t in (k, v))
        if self.kind == "einsum":
            scores = torch.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5
            z = torch.einsum("bhij,bhjd->bihd", scores.softmax(-1), v).flatten(2)
        elif self.sdpa:
            z = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1)
        else:
            scores = (q * self.d**-0.5) @ k.transpose(-2, -1)
            z = (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, self.heads * self.d)
        return x + self.proj(z)


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
