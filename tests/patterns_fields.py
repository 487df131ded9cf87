"""Habits of other fields: speech, operators, graphs, dynamic kernels, splines. See ``patterns``."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from patterns import IMAGE, Between, case, conv
from torch import Tensor, nn

TOKENS = ((2, 6, 5),)


# -- numbers -------------------------------------------------------------------------------------


def gated(x: Tensor, n: Tensor) -> Tensor:
    """As speech models are written for TorchScript: the number of channels as a tensor."""
    width = n[0]
    return torch.tanh(x[:, :width]) * torch.sigmoid(x[:, width:])


@case("a.weight:0 b.weight:1", kind="bound")
@case("a.weight:0 b.weight:1", kind="buffer")
@case("a.weight:0 b.weight:1", kind="size")
@case("a.weight:0 b.weight:1", kind="narrow")
class NumbersInTensors(Between):
    width, out = 12, 6

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("n", torch.tensor(6))

    def middle(self, y: Tensor) -> Tensor:
        n: Any = self.n
        if self.kind == "bound":
            return gated(y, torch.IntTensor([6]))
        if self.kind == "buffer":
            return y[:, :n] + y[:, n : 2 * n].sigmoid()
        if self.kind == "narrow":
            return y.narrow(1, n, n) * torch.narrow(y, 1, torch.tensor(0), n)
        return y.view(y.shape[0], 2, n, *y.shape[2:]).prod(1)


@case("a.weight:0 b.weight:1", kind="root")
@case("a.weight:0 b.weight:1", kind="logarithm")
@case("a.weight:0 b.weight:1", kind="times")
class RootsOfNumpy(Between):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def middle(self, y: Tensor) -> Tensor:
        if self.kind == "times":
            return np.sqrt(2.0) * y
        c = y.shape[1]
        return y / (np.sqrt(c) if self.kind == "root" else np.log2(np.float64(2.0) * c))


@case("a.weight:0 b.weight:1 b.weight:0", as_int=False)
@case("a.weight:0 b.weight:1 b.weight:0", as_int=True)
class ProductsOfNumpy(nn.Module):
    def __init__(self, as_int: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 6), nn.Linear(6 * 64, 7), nn.Linear(7, 4)
        self.as_int = as_int

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        size: Any = np.prod(y.shape[1:])
        return self.c(self.b(y.reshape(y.shape[0], int(size) if self.as_int else size)))


@case("m.weight:0", "a.weight:0", kind="number")
@case("m.weight:0", "a.weight:0", kind="tensor")
class PartsFromData(Between):
    """How many channels are taken depends on the input: their count is no constant."""

    out = 1

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.m, self.a = kind, conv(3, 6), conv(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(self.m(x).relu())
        n = 3 + (x.mean() > 0).long()
        return self.b(y[:, : n.item() if self.kind == "number" else n].sum(1, keepdim=True))


@case("qkv.weight:0 o.weight:1", inputs=((2, 5, 7),), kind="split")
@case("qkv.weight:0 o.weight:1", inputs=((2, 5, 7),), kind="slices")
class HeadsOfSamples(nn.Module):
    """Heads are in the batch: when one goes, the size that divides its rows does not change."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.qkv, self.o = kind, nn.Conv1d(5, 24, 1), nn.Conv1d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.qkv(x)
        n, width, length = y.shape
        d = width // (3 * 2)
        y = y.reshape(n * 2, d * 3, length)
        parts = (y[:, :d], y[:, d : 2 * d], y[:, 2 * d :])
        q, k, v = y.split(d, dim=1) if self.kind == "split" else parts
        scores = torch.einsum("bct,bcs->bts", q / math.sqrt(d), k).softmax(-1)
        return self.o(torch.einsum("bts,bcs->bct", scores, v).reshape(n, -1, length))


@case("a.weight:0 k.weight:0 b.weight:1", inputs=(IMAGE, (2, 3, 2, 2)))
class CorrelatedTemplates(nn.Module):
    """Every channel of every sample is a group (Siamese trackers)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.k, self.b = conv(3, 8), conv(3, 8), conv(8, 4, 1)

    def forward(self, x: Tensor, template: Tensor) -> Tensor:
        x, k = self.a(x), self.k(template)
        n, c = x.shape[:2]
        kernels = k.view(n * c, 1, k.size(2), k.size(3))
        y = F.conv2d(x.reshape(1, n * c, x.size(2), x.size(3)), kernels, groups=n * c)
        return self.b(y.view(n, c, y.size(2), y.size(3)))


# -- moves ---------------------------------------------------------------------------------------


@case("a.weight:0 b.weight:1")
class InverseWavelet(Between):
    """Four parts of the channels are written to every other pixel."""

    width, out = 16, 4

    def middle(self, y: Tensor) -> Tensor:
        p, q, r, s = y.chunk(4, 1)
        n, c, h, w = p.shape
        made = torch.zeros([n, c, 2 * h, 2 * w], dtype=y.dtype)
        made[:, :, 0::2, 0::2] = p - q - r + s
        made[:, :, 1::2, 0::2] = p - q + r - s
        made[:, :, 0::2, 1::2] = p + q - r - s
        made[:, :, 1::2, 1::2] = p + q + r + s
        return made


@case("a.weight:0 c.weight:0 d.weight:0 b.weight:1", kind="numbers")
@case("a.weight:0 c.weight:0 d.weight:0 b.weight:1", kind="sizes")
@case("a.weight:0 c.weight:0 d.weight:0 b.weight:1", kind="mean")
@case("c.weight:0", "a.weight:0 d.weight:0", kind="ones")
class PaddedShortcut(nn.Module):
    """A residual net without a convolution in its shortcut: new channels start with zeros."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.a, self.b = kind, conv(3, 8), conv(14, 4, 1)
        self.c, self.d = conv(8, 10, stride=2), conv(10, 14)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        y, z = self.d(self.c(x).relu()), x[:, :, ::2, ::2]
        more = y.size(1) - z.size(1)
        if self.kind == "sizes":
            return self.b(y + F.pad(z, (0, 0, 0, 0, more // 2, more - more // 2)))
        z = F.pad(z, (0, 0, 1, 0, 2, 4), "constant", float(self.kind == "ones"))[:, :, :-1]
        return self.b(y + (z * z.mean(1, keepdim=True) if self.kind == "mean" else z))


@case("q.weight:0 k.weight:0 v.weight:0 o.weight:1", inputs=TOKENS)
class SpectralCorrelation(nn.Module):
    """Autoformer: delays are weighed by the correlation of queries and keys over all channels."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(5, 8) for _ in range(3))
        self.o = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k = (torch.fft.rfft(f(x), dim=1) for f in (self.q, self.k))
        scores = torch.fft.irfft(q * torch.conj(k), dim=1, n=x.shape[1]).mean(-1).softmax(1)
        return self.o(scores[..., None] * self.v(x))


@case("e.weight:0 t.weight:0 o.weight:1", inputs=TOKENS)
class PointwiseTokens(nn.Module):
    """Tokens are mixed by a convolution with a kernel of one: every channel for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.o, self.norm = nn.Linear(5, 8), nn.Linear(8, 3), nn.LayerNorm(8)
        self.t, self.u = nn.Conv1d(6, 12, 1), nn.ConvTranspose1d(12, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.e(x)
        return self.o((x + self.u(self.t(self.norm(x)).relu())).mean(1))


@case("", "e.weight:0", inputs=((2, 5, 6),), kind="stride")
@case("", "e.weight:0", inputs=((2, 5, 6),), kind="padding")
@case("", "e.weight:0", inputs=((2, 5, 6),), kind="bias")
class AlmostPointwise(nn.Module):
    """Channels are stepped over, padded, or summed together with a bias."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.e, self.o = nn.Linear(6, 8), nn.Linear(4, 3)
        stride, padding = 1 + (kind == "stride"), int(kind == "padding")
        self.t = nn.Conv1d(5, 4, 1, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.t(self.e(x)).sum(-1))


@case("q.weight:0 k.weight:0 p.weight:0 v.weight:0 o.weight:1", inputs=TOKENS)
class RelativeShift(nn.Module):
    """Transformer-XL and Conformer: biases of each head, and scores that a column is put before."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(5, 12) for _ in range(3))
        self.p, self.o = nn.Linear(4, 12, bias=False), nn.Linear(12, 3)
        self.u, self.w = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3, 4))
        self.register_buffer("places", torch.randn(1, 11, 4))

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q = self.q(x).view(n, -1, 3, 4)
        k, v, p = (
            f(t).view(t.size(0), -1, 3, 4).transpose(1, 2)
            for f, t in ((self.k, x), (self.v, x), (self.p, self.places))
        )
        content = (q + self.u).transpose(1, 2) @ k.transpose(-2, -1)
        places = (q + self.w).transpose(1, 2) @ p.transpose(-2, -1)
        zero = torch.zeros((n, 3, length, 1), dtype=x.dtype)
        shifted = torch.cat([zero, places], -1).view(n, 3, -1, length)
        shifted = shifted[:, :, 1:].view_as(places)[..., :length]
        y = (content + shifted).softmax(-1) @ v
        return self.o(y.transpose(1, 2).reshape(n, -1, 12))


# -- weights -------------------------------------------------------------------------------------


@case("a.weight:0 w:0 w:1 b.weight:1", inputs=TOKENS)
class ComplexWeight(nn.Module):
    """Fourier neural operators: one complex matrix for each of the low frequencies."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(7, 3)
        self.w = nn.Parameter(torch.randn(8, 7, 3, dtype=torch.cdouble))

    def forward(self, x: Tensor) -> Tensor:
        f = torch.fft.rfft(self.a(x).permute(0, 2, 1))
        made = torch.zeros(x.shape[0], 7, f.shape[-1], dtype=f.dtype)
        made[:, :, :3] = torch.einsum("bix,iox->box", f[..., :3], self.w)
        return self.b(torch.fft.irfft(made, n=x.shape[1]).relu().permute(0, 2, 1))


@case("a.weight:0 w:0 w:1 w:2 bias:1 n.weight:0 b.weight:1", inputs=(IMAGE,))
class MixedKernels(nn.Module):
    """CondConv: each sample's kernel is a product of its shares and all kernels, flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.r = conv(3, 6), nn.Linear(6, 4)
        self.w, self.bias = nn.Parameter(torch.randn(4, 8, 6, 3, 3)), nn.Parameter(torch.ones(4, 8))
        self.n, self.b = nn.BatchNorm2d(8), conv(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        n, c, h, w = x.shape
        share = self.r(x.mean((2, 3))).sigmoid()
        kernels = torch.mm(share, self.w.view(4, -1)).view(n * 8, c, 3, 3)
        bias = torch.mm(share, self.bias).view(-1)
        y = F.conv2d(x.reshape(1, -1, h, w), kernels, bias, padding=1, groups=n)
        return self.b(self.n(y.view(n, 8, h, w)).relu())


@case("q.weight:0 k.weight:0 at:2 o.weight:1", inputs=TOKENS)
class MeanOverHeads(nn.Module):
    """Graph attention: scores sum over the channels of a head, the result is the mean of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o = nn.Linear(5, 12), nn.Linear(5, 12), nn.Linear(6, 3)
        self.at = nn.Parameter(torch.randn(1, 2, 6))

    def forward(self, x: Tensor) -> Tensor:
        q, k = (f(x).view(*x.shape[:2], 2, 6) for f in (self.q, self.k))
        pairs = F.leaky_relu(q[:, :, None] + k[:, None], 0.2)
        scores = (pairs * self.at).sum(-1).softmax(2)
        return self.o((scores[..., None] * k[:, None]).sum(2).mean(2))


class Splines(nn.Module):
    """A Kolmogorov-Arnold layer: a linear one on B-splines of each input over a grid."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.base, self.scale = nn.Parameter(torch.randn(o, i)), nn.Parameter(torch.randn(o, i))
        self.weight = nn.Parameter(torch.randn(o, i, 6))
        self.register_buffer("grid", (torch.arange(-2, 7) * 0.5 - 1).expand(i, -1).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        g: Any = self.grid
        y = x.unsqueeze(-1)
        b = ((y >= g[:, :-1]) & (y < g[:, 1:])).to(x.dtype)
        for k in (1, 2):
            up = (y - g[:, : -(k + 1)]) / (g[:, k:-1] - g[:, : -(k + 1)])
            down = (g[:, k + 1 :] - y) / (g[:, k + 1 :] - g[:, 1:-k])
            b = up * b[..., :-1] + down * b[..., 1:]
        weight = (self.weight * self.scale.unsqueeze(-1)).view(self.weight.shape[0], -1)
        return F.linear(F.silu(x), self.base) + F.linear(b.view(x.shape[0], -1), weight)


@case("a.base:0 a.weight:0 b.base:1 b.weight:1 b.scale:1 b.grid:0", inputs=((4, 5),))
class KolmogorovArnold(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Splines(5, 8), Splines(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh())


# -- structures ----------------------------------------------------------------------------------


@case("q.weight:0 k.weight:0 places.weight:1", inputs=TOKENS)
class QueriesOfADetector(nn.Module):
    """Learned queries, repeated for each sample, attend to each other; samples times heads."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.i, self.o = nn.Embedding(4, 16), nn.Linear(5, 12), nn.Linear(12, 3)
        self.q, self.k, self.v = (nn.Linear(16, 12) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        places = self.places.weight.unsqueeze(1).repeat(1, n, 1)
        q, k, v = (f(places).view(4, n * 3, 4).transpose(0, 1) for f in (self.q, self.k, self.v))
        y = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
        return self.o(y.transpose(0, 1).reshape(4, n, 12) * self.i(x).mean(1))


@case("e.weight:0 f.weight:0 o.weight:1", inputs=TOKENS, kind="slice")
@case("e.weight:0 f.weight:0 o.weight:1", inputs=TOKENS, kind="position")
@case("f.weight:0", "e.weight:0", inputs=TOKENS, kind="read")
class TimeAsAChannel(nn.Module):
    """Neural differential equations: a channel is asked for its form alone, and filled with t."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.e, self.o = kind, nn.Linear(5, 8), nn.Linear(8, 3)
        self.f, self.g = nn.Linear(9, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.e(x)
        for t in (0.0, 0.5):
            time = torch.ones_like(h[..., :1]) * t
            if self.kind == "position":
                time = torch.full_like(h[:, :, -1], t).unsqueeze(-1)
            if self.kind == "read":
                time = time + h[..., :1]
            h = h + self.g(self.f(torch.cat([time, h], -1)).tanh())
        return self.o(h)


@case("e.weight:1 o.weight:1", "o.bias:0", inputs=lambda seed, batch: (torch.tensor([[1, 3]]),))
class TiedBias(nn.Module):
    """A parameter under two names, of which forward uses one: it is counted once."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(7))
        self.e, self.h = nn.Embedding(7, 8), nn.Linear(8, 8)
        self.o = nn.Linear(8, 7, bias=False)
        self.o.bias = self.bias

    def forward(self, tokens: Tensor) -> Tensor:
        return self.o(self.h(self.e(tokens)).relu())
