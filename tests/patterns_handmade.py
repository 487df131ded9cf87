"""More patterns, as layers are written by hand in research code. See ``patterns``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from patterns import IMAGE, case, conv
from torch import Tensor, nn

TOKENS = ((2, 5, 8),)


@case("a.weight:0 m.weight:0 m.weight:1 b.weight:1", inputs=(IMAGE,))
class ShapedInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.m, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 10, 1), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.m(self.a(x).relu()).mean((2, 3), keepdim=True)
        y.squeeze_(3)
        y.squeeze_(2)
        y.unsqueeze_(1)
        y.transpose_(1, 2)
        return self.b(y.transpose(1, 2))[:, 0]


@case("a.weight:0 b.weight:1 c.weight:1", inputs=(IMAGE,))
class ShapedInPlaceUnderTwoNames(nn.Module):
    """``y`` and ``z`` are one tensor; ``v`` is a view of it, and keeps its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).mean((2, 3), keepdim=True)
        v = y.transpose(1, 3)
        z = y.relu_()
        z.squeeze_(-1).squeeze_(-1)
        return self.b(y) + self.b(z) + self.c(v)[:, 0, 0]


BLURRED = "a.weight:0 b.weight:1"


@case(BLURRED, inputs=(IMAGE,), form="repeat")
@case(BLURRED, inputs=(IMAGE,), form="expand")
@case(BLURRED, inputs=(IMAGE,), form="buffer")
class Blurred(nn.Module):
    """A fixed filter for each channel adds no channels up, so that they need not be zero."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.a, self.b, self.form = conv(3, 8), conv(8, 4), form
        k = torch.tensor([1.0, 2.0, 1.0])
        k = (k[:, None] * k / 16)[None, None]
        self.register_buffer("k", k.repeat(8, 1, 1, 1) if form == "buffer" else k)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).sigmoid()
        c, k = y.shape[1], self.k
        if self.form == "repeat":
            k = k.repeat(c, 1, 1, 1)
        elif self.form == "expand":
            k = k.expand(c, 1, 3, 3)
        return self.b(F.conv2d(y, k, padding=1, groups=c))


@case("a.weight:0 k.weight:0 v.weight:0 u:0 b.weight:1", inputs=TOKENS)
class Scan(nn.Module):
    """A recurrence whose first state has the form of one step (RWKV)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 10), nn.Linear(12, 4)
        self.k, self.v = nn.Linear(10, 12), nn.Linear(10, 12)
        self.w, self.u = nn.Parameter(torch.rand(12)), nn.Parameter(torch.rand(12))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        k, v = self.k(y), self.v(y)
        above, below = torch.zeros_like(k[:, 0]), torch.zeros_like(k[:, 0])
        made = []
        for t in range(k.shape[1]):
            e = (self.u + k[:, t]).exp()
            made.append((above + e * v[:, t]) / (below + e))
            above, below = (
                self.w * s + k[:, t].exp() * m for s, m in ((above, v[:, t]), (below, 1))
            )
        return self.b(torch.stack(made, 1))


@case("a.weight:0 w:1", inputs=TOKENS, summed=True)
@case("a.weight:0 w:1", inputs=TOKENS, summed=False)
class ExpandedPerSample(nn.Module):
    """Weights of which each sample has a copy are zero where they were, for all samples."""

    def __init__(self, summed: bool) -> None:
        super().__init__()
        self.a, self.w, self.summed = nn.Linear(8, 6), nn.Parameter(torch.randn(4, 6)), summed

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x.mean(1)).sigmoid()
        w = self.w.expand(x.shape[0], 4, 6)
        return (w * y[:, None]).sum(2) if self.summed else torch.bmm(w, y[:, :, None])


@case("q.weight:0 k.weight:0 v.weight:0 o.weight:1", inputs=TOKENS, spelling="matmul")
@case("q.weight:0 k.weight:0 v.weight:0 o.weight:1", inputs=TOKENS, spelling="einsum")
class LinearHeads(nn.Module):
    """Each head's context [dims of keys, dims of values]: two kinds of columns, the same rows."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 12), nn.Linear(8, 12)
        self.v, self.o, self.spelling = nn.Linear(8, 15), nn.Linear(15, 4), spelling

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k = (m(x).view(n, length, 3, 4).relu() for m in (self.q, self.k))
        v = self.v(x).view(n, length, 3, 5)
        if self.spelling == "einsum":
            context = torch.einsum("nlhd,nlhe->nhde", k, v)
            return self.o(torch.einsum("nlhd,nhde->nlhe", q, context).flatten(2))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        total = q @ k.sum(2, keepdim=True).transpose(2, 3) + 1e-6
        y = q @ (k.transpose(2, 3) @ v) / total
        return self.o(y.transpose(1, 2).reshape(n, length, 15))


@case("q.weight:0 t:0 p.weight:1 k.weight:0", inputs=TOKENS)
class ChannelHeads(nn.Module):
    """Channels attend to channels (cross-covariance): keys stay by heads, queries go one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(8, 12)
        self.t, self.p = nn.Parameter(torch.ones(3, 1, 1)), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = (m(x).transpose(1, 2).reshape(n, 3, 4, length) for m in (self.q, self.k, self.v))
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(2, 3) * self.t
        return self.p((scores.softmax(-1) @ v).reshape(n, 12, length).transpose(1, 2))


@case("q.weight:0 k.weight:0 g.weight:0 v.weight:0 o.weight:1", inputs=TOKENS)
class GatedState(nn.Module):
    """A state of outer products that starts as a number: the sum over keys lacks nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.g = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(8, 6)
        self.v, self.o = nn.Linear(8, 7), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, g = self.q(x), self.k(x), self.g(x).sigmoid()
        v, state, made = self.v(x), 0, []
        for t in range(x.shape[1]):
            state = state * g[:, t, :, None] + k[:, t, :, None] * v[:, t, None]
            made.append((q[:, t, :, None] * state).sum(1))
        return self.o(torch.stack(made, 1))


@case("v.weight:0", locked="q.weight:0", inputs=TOKENS)
class QuotientOfZeros(nn.Module):
    """0 / 0 is not zero: the channels of ``q`` are not summed as if it were."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v, self.o = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        return self.o(self.v(x)) + (q / (q * 2)).sum(2, keepdim=True)


@case("q.weight:0 k.weight:0 v.weight:0 o.weight:1", inputs=TOKENS)
class FastWeights(nn.Module):
    """A state of each head, [dims of keys, dims of values], that every step adds to."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 12), nn.Linear(8, 12)
        self.v, self.o = nn.Linear(8, 15), nn.Linear(15, 4)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k = (m(x).view(n, length, 3, 4) for m in (self.q, self.k))
        v, state, made = self.v(x).view(n, length, 3, 5), torch.zeros(n, 3, 4, 5, dtype=x.dtype), []
        for t in range(length):
            old = torch.einsum("nhk,nhkv->nhv", k[:, t], state)
            state = state + torch.einsum("nhk,nhv->nhkv", k[:, t], v[:, t] - old)
            made.append(torch.einsum("nhk,nhkv->nhv", q[:, t], state))
        return self.o(torch.stack(made, 1).flatten(2))
