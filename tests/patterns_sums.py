"""More patterns: sums, means and norms over channels. See ``patterns``.

Where every removed channel is zero before the sum, nothing is lost; else the channels stay.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from patterns import Between, case, conv
from torch import Tensor, nn

TOKENS = ((2, 5, 8),)


class HandRMS(nn.Module):
    """RMSNorm as written by hand."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(c))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


@case("a.weight:0 b.weight:1 g.weight:0 g.weight:1 n.weight:0", inputs=TOKENS)
class HandWrittenRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b = nn.Linear(8, 12), HandRMS(12), nn.Linear(12, 5)
        self.g = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = y + self.g(self.n(y)).relu()
        return self.b(self.n(y))


@case("a.weight:0 f.weight:0 e.weight:1 gamma:3 beta:3", inputs=((2, 6, 6, 4),))
class ResponseNorm(nn.Module):
    """Global response normalisation on channels-last images."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
        self.f, self.e = nn.Linear(8, 20), nn.Linear(20, 8)
        self.gamma = nn.Parameter(torch.randn(1, 1, 1, 20))
        self.beta = nn.Parameter(torch.randn(1, 1, 1, 20))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z = F.gelu(self.f(y))
        g = z.norm(p=2, dim=(1, 2), keepdim=True)
        g = g / (g.mean(dim=-1, keepdim=True) + 1e-6)
        return self.b(y + self.e(self.gamma * (z * g) + self.beta + z))


def _attended(y: Tensor) -> Tensor:
    """Spatial attention: a gate from mean and maximum over the channels."""
    both = torch.cat([y.mean(1, keepdim=True), torch.max(y, 1, keepdim=True)[0]], 1)
    return y * F.conv2d(both, both.new_ones(1, 2, 3, 3), padding=1).sigmoid()


_ADDED_UP = {
    "sum": lambda y: y * y.sum(1, keepdim=True),
    "mean": lambda y: y * y.mean(1, keepdim=True),
    "mean of squares": lambda y: y / (y.square().mean((1, 2, 3), keepdim=True) + 1).sqrt(),
    "mean without keepdim": lambda y: y + 0 * y + y * torch.mean(y, axis=1)[:, None],
    "norm": lambda y: F.normalize(y, dim=1),
    "norm of one": lambda y: y / (y.norm(p=1, dim=1, keepdim=True) + 1),
    "gate": lambda y: y * y.mean((1, 2, 3), keepdim=True).sigmoid(),
    "pooled": lambda y: y * F.max_pool2d(y, 3, 1, 1).mean(1, keepdim=True),
    "resized": lambda y: y * F.interpolate(F.avg_pool2d(y, 2), scale_factor=2).sum(1, True),
    "joined": lambda y: y * torch.cat([y, y.square()], 1).mean(1, keepdim=True),
    "halves": lambda y: y * (y.chunk(2, 1)[0] * y.chunk(2, 1)[1]).mean(1, keepdim=True),
    "tokens": lambda y: (
        (t := y.flatten(2).transpose(1, 2)) * t.square().mean(-1, keepdim=True)
    ).transpose(1, 2).view(y.shape),
    "written zero": lambda y: y * y.clone().masked_fill(y > 1, 0).mean(1, keepdim=True),
    "amax": lambda y: y * (2 - y.amax(1, keepdim=True)),
    "amin": lambda y: y * torch.amin(y - y.flip(2), (1, 2), keepdim=True),
    "max": lambda y: (z := y - y.flip(3)) * torch.max(z, dim=1, keepdim=True)[0].sigmoid(),
    "max values": lambda y: (z := y - y.flip(3)) * z.max(1, True).values.sigmoid(),
    "max of all": lambda y: y * (y - y.flip(3)).max(),
    "attended": lambda y: _attended(y - y.flip(3)),
    "cosine": lambda y: y * F.cosine_similarity(y, y.square() + y, dim=1)[:, None],
}  # fmt: skip


@case("a.weight:0 b.weight:1", kind="sum")
@case("a.weight:0 b.weight:1", kind="mean")
@case("a.weight:0 b.weight:1", kind="mean of squares")
@case("a.weight:0 b.weight:1", kind="mean without keepdim")
@case("a.weight:0 b.weight:1", kind="norm")
@case("a.weight:0 b.weight:1", kind="norm of one")
@case("a.weight:0 b.weight:1", kind="gate")
@case("a.weight:0 b.weight:1", kind="pooled")
@case("a.weight:0 b.weight:1", kind="resized")
@case("a.weight:0 b.weight:1", kind="joined")
@case("a.weight:0 b.weight:1", kind="halves")
@case("a.weight:0 b.weight:1", kind="tokens")
@case("a.weight:0 b.weight:1", kind="written zero")
@case("a.weight:0 b.weight:1", kind="amax")
@case("a.weight:0 b.weight:1", kind="amin")
@case("a.weight:0 b.weight:1", kind="max")
@case("a.weight:0 b.weight:1", kind="max values")
@case("a.weight:0 b.weight:1", batch=False, kind="max of all")
@case("a.weight:0 b.weight:1", kind="attended")
@case("a.weight:0 b.weight:1", kind="cosine")
class AddedUp(Between):
    """Removed channels are zero: adding them up changes nothing."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def middle(self, y: Tensor) -> Tensor:
        return _ADDED_UP[self.kind](y)


_NOT_ZERO = {
    "sigmoid": lambda y: y * y.sigmoid().mean(1, keepdim=True),
    "plus one": lambda y: y * (y + 1).sum(1, keepdim=True),
    "exponential": lambda y: y * y.exp().mean(1, keepdim=True),
    "centred": lambda y: y * (y - y.mean(1, keepdim=True)).square().mean(1, keepdim=True),
    "written": lambda y: y * _written(y).mean(1, keepdim=True),
    "written view": lambda y: y * _written_view(y).mean(1, keepdim=True),
    "padded": lambda y: y * F.pad(y, (1, 1, 1, 1), value=1.0)[:, :, 1:-1, :-2].mean(1, True),
    "maximum": lambda y: y * (y - 1).amax(1, keepdim=True),
    "its position": lambda y: y + y.max(1, keepdim=True)[1],
    "position too": lambda y: y * sum(y.max(1, keepdim=True)),
    "least norm": lambda y: y + torch.linalg.vector_norm(y, -1.0, dim=1, keepdim=True),
    "variance": lambda y: y * y.var(1, keepdim=True),
    "cosine": lambda y: y * torch.cos(y).sum(1, keepdim=True),
    "position": lambda y: y * (y + torch.arange(8, dtype=y.dtype)).mean(1, keepdim=True),
    "divided": lambda y: y * (2.0 / (y + 3)).sum(1, keepdim=True),
    "error": lambda y: y * F.mse_loss(y, y.detach().flip(3)),
    "clamped": lambda y: y * y.clamp(min=0.5).sum(1, keepdim=True),
}  # fmt: skip


def _written(y: Tensor) -> Tensor:
    z = y.clone()
    z.add_(1.0)
    return z


def _written_view(y: Tensor) -> Tensor:
    z = y.clone()
    z[:, :, 0].fill_(2.0)
    return z


@case("m.weight:0", "a.weight:0", kind="sigmoid")
@case("m.weight:0", "a.weight:0", kind="plus one")
@case("m.weight:0", "a.weight:0", kind="exponential")
@case("m.weight:0", "a.weight:0", kind="centred")
@case("m.weight:0", "a.weight:0", kind="written")
@case("m.weight:0", "a.weight:0", kind="written view")
@case("m.weight:0", "a.weight:0", kind="padded")
@case("m.weight:0", "a.weight:0", kind="maximum")
@case("m.weight:0", "a.weight:0", kind="its position")
@case("m.weight:0", "a.weight:0", kind="position too")
@case("m.weight:0", "a.weight:0", kind="least norm")
@case("m.weight:0", "a.weight:0", kind="variance")
@case("m.weight:0", "a.weight:0", kind="cosine")
@case("m.weight:0", "a.weight:0", kind="position")
@case("m.weight:0", "a.weight:0", kind="divided")
@case("m.weight:0", kind="error")
@case("m.weight:0", "a.weight:0", kind="clamped")
class NotZero(Between):
    """Removed channels would still count: they stay."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.m, self.a = kind, conv(3, 6), conv(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(_NOT_ZERO[self.kind](self.a(self.m(x).relu()).relu()))


@case("a.weight:0 b.weight:1", norm="batch")
@case("a.weight:0 b.weight:1", norm="group")
@case("a.weight:0 b.weight:1", norm="one group")
class MeanAfterNorm(Between):
    """An affine norm ends in weight and bias: zero with them. The mean spans the gap."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        kinds = {"batch": nn.BatchNorm2d(8), "group": nn.GroupNorm(2, 8)}
        self.n = kinds[norm] if norm in kinds else nn.GroupNorm(1, 8)

    def middle(self, y: Tensor) -> Tensor:
        z = self.n(y)
        return z * z.mean(1, keepdim=True)


@case("m.weight:0", "a.weight:0")
class MeanAfterBareNorm(Between):
    """Without weight and bias a removed channel is not zero after the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.m, self.a, self.n = conv(3, 6), conv(6, 8), nn.BatchNorm2d(8, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        z = self.n(self.a(self.m(x).relu()))
        return self.b(z * z.mean(1, keepdim=True))


@case("q.weight:0 k.weight:0 v.weight:0", inputs=((2, 5, 8),))
class CosineAttention(nn.Module):
    """Queries and keys of unit length in each head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 12) for _ in range(3))
        self.o = nn.Linear(12, 4)
        self.scale = nn.Parameter(torch.randn(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, 3, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        a = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        y = (a * self.scale.exp()).softmax(-1) @ v
        return self.o(y.transpose(1, 2).reshape(b, n, -1))
