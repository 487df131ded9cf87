"""More patterns: sums of products, norms without parameters, computed weights. See ``patterns``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from patterns import case
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

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


class _Picked(nn.Module):
    """a: 8 -> 12, then ``pick`` along the tokens, then b: 12 -> 5; r gives numbers of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.r, self.b = nn.Linear(8, 12), nn.Linear(8, 4), nn.Linear(12, 5)

    def pick(self, y: Tensor, order: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.pick(self.a(x), self.r(x).mean(-1).argsort(1)))


PICKED = "a.weight:0 b.weight:1"


@case(PICKED, inputs=TOKENS)
class GatherExpanded(_Picked):
    def pick(self, y: Tensor, order: Tensor) -> Tensor:
        return y.gather(1, order[:, :3, None].expand(-1, -1, y.shape[-1]))


@case(PICKED, inputs=TOKENS)
class GatherRepeated(_Picked):
    def pick(self, y: Tensor, order: Tensor) -> Tensor:
        return torch.gather(y, 1, order.unsqueeze(-1).repeat(1, 1, y.size(-1)))


@case(PICKED, inputs=TOKENS)
class GatherConstant(_Picked):
    """A constant tensor whose method is given a traced size."""

    def pick(self, y: Tensor, order: Tensor) -> Tensor:
        return y.gather(1, torch.tensor([0, 3, 1])[None, :, None].expand(y.shape[0], 3, 12))


@case("", locked=PICKED, inputs=TOKENS)
class GatherChannels(_Picked):
    def pick(self, y: Tensor, order: Tensor) -> Tensor:
        return y.gather(2, (order[..., None] + torch.arange(12)) % 12)


@case(PICKED, inputs=TOKENS)
class TakenAlong(_Picked):
    def pick(self, y: Tensor, order: Tensor) -> Tensor:
        return torch.take_along_dim(y, order[..., None], 1)


@case(PICKED, inputs=TOKENS)
class Scattered(_Picked):
    def pick(self, y: Tensor, order: Tensor) -> Tensor:
        return torch.zeros_like(y).scatter(1, order[..., None].expand_as(y), y)


@case(PICKED, inputs=TOKENS)
class ScatterAdded(_Picked):
    def pick(self, y: Tensor, order: Tensor) -> Tensor:
        into = torch.zeros(y.shape[0], 3, y.shape[-1], dtype=y.dtype)
        return into.scatter_add_(1, (order % 3)[..., None].expand_as(y), y)


@case(PICKED, inputs=TOKENS)
class IndexAdded(_Picked):
    """As sparse mixtures of experts collect their tokens."""

    def pick(self, y: Tensor, order: Tensor) -> Tensor:
        flat = y.flatten(0, 1)
        rows = torch.arange(flat.shape[0]).flip(0)
        return torch.zeros_like(flat).index_add_(0, rows, flat.relu()).view_as(y)


@case(PICKED, inputs=TOKENS)
class IndexWritten(_Picked):
    def pick(self, y: Tensor, order: Tensor) -> Tensor:
        result = torch.zeros_like(y)
        result[:, torch.tensor([4, 2])] = y[:, :2]
        return result + y


@case("a.weight:0 b.weight:1 w:0", inputs=((2, 3, 8, 8),))
class Spectrum(nn.Module):
    """A filter in the frequencies of an image (global filter networks)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.w = nn.Parameter(torch.randn(8, 8, 5, 2) / 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.fft.rfft2(self.a(x), norm="ortho") * torch.view_as_complex(self.w)
        return self.b(torch.fft.irfft2(y, s=(8, 8), norm="ortho"))


@case("a.weight:0 b.weight:0 f.weight:0 f.weight:1 f.weight:2", inputs=TOKENS)
class BilinearForm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 6), nn.Linear(8, 7), nn.Linear(9, 4)
        self.f = nn.Bilinear(6, 7, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.f(self.a(x), self.b(x).relu()).sigmoid())


@case("a.weight:0 book:1 b.weight:1", locked="book:0", inputs=TOKENS)
class Quantised(nn.Module):
    """The nearest entries of a codebook, by distances over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 4)
        self.book = nn.Parameter(torch.randn(10, 6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        nearest = F.embedding(torch.cdist(y, self.book).argmin(-1), self.book)
        return self.b(y + (nearest - y).detach())


@case("a.weight:0 w:0 w:1", locked="o.weight:0", inputs=((2, 3, 8, 8),))
class Deformable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 18, 3, padding=1)
        self.w, self.b = nn.Parameter(torch.randn(6, 8, 3, 3) / 8), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        return self.b(deform_conv2d(y, self.o(y), self.w, padding=1).relu())


@case("a.weight:0 b.weight:0", locked="g.weight:0", inputs=((2, 3, 8, 8),))
class Images(nn.Module):
    """Folds, circular padding, rotation, unpooling, sampling at learned places."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular")
        self.b = nn.Conv2d(8, 6, 3, padding=1, padding_mode="circular")
        self.g, self.c = nn.Conv2d(8, 2, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = F.fold(F.unfold(y, 3, padding=1), (8, 8), 3, padding=1).rot90(1, (2, 3))
        y = F.grid_sample(y, self.g(y).permute(0, 2, 3, 1).tanh(), align_corners=False)
        y, at = F.max_pool2d(self.b(y), 2, return_indices=True)
        return self.c(F.max_unpool2d(y, at, 2))


class HandNorm(nn.Module):
    """A layer norm over ``dim`` as written by hand, in one of four spellings."""

    def __init__(self, c: int, dim: int, spelling: str) -> None:
        super().__init__()
        shape = [c] + [1] * (2 if dim == 1 else 0)
        self.weight, self.bias = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.zeros(shape))
        self.dim, self.spelling = dim, spelling

    def forward(self, x: Tensor) -> Tensor:
        u = x.mean(self.dim, keepdim=True)
        if self.spelling == "sqrt":
            y = (x - u) / torch.sqrt((x - u).pow(2).mean(self.dim, keepdim=True) + 1e-6)
        elif self.spelling == "rsqrt":
            y = (x - u) * torch.rsqrt(((x - u) ** 2).mean(self.dim, keepdim=True) + 1e-6)
        elif self.spelling == "power":
            y = (x - u) / (x.var(self.dim, unbiased=False, keepdim=True) + 1e-6) ** 0.5
        else:  # not a layer norm: the deviation of a sample
            y = (x - u) / torch.sqrt(x.var(self.dim, keepdim=True) + 1e-6)
        return self.weight * y + self.bias


NORMED = "a.weight:0 n.weight:0 b.weight:1"


@case(NORMED, inputs=((2, 3, 8, 8),), spelling="sqrt")
@case(NORMED, inputs=((2, 3, 8, 8),), spelling="rsqrt")
@case(NORMED, inputs=((2, 3, 8, 8),), spelling="power")
@case("", locked="a.weight:0 b.weight:1", inputs=((2, 3, 8, 8),), spelling="sample")
class HandWrittenNorm(nn.Module):
    """As ConvNeXt normalises channels that come first."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.n = HandNorm(8, 1, spelling)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.n(self.a(x)))


@case("a.weight:0 m.weight:0 m.weight:1 n.weight:0 b.weight:1", inputs=TOKENS)
class HandWrittenTokens(nn.Module):
    """The norm of a residual stream, channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.m, self.b = nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, 5)
        self.n = HandNorm(12, -1, "sqrt")

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = y + self.m(self.n(y)).relu()
        return self.b(self.n(y))
