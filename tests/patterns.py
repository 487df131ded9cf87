"""Small nets, each with one pattern that is easily pruned wrongly. Used by test_patterns.

A case says what goes in and which parameter dims ("conv.weight:0") have to be prunable (``free``)
or whole (``locked``); whatever is pruned is held to the oracle. Images are [2, 3, 8, 8].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGE = (2, 3, 8, 8)


@dataclass(frozen=True)
class Case:
    """``inputs``: shapes of random tensors; or a function seed, batch -> inputs.

    batch  whether the net works at another batch size
    """

    build: Callable[[], nn.Module]
    inputs: tuple[tuple[int, ...], ...] | Callable[[int, int], tuple[Any, ...]]
    free: tuple[str, ...]
    locked: tuple[str, ...]
    batch: bool

    def example(self, seed: int = 0, batch: int = 2) -> tuple[Any, ...]:
        if callable(self.inputs):
            return self.inputs(seed, batch)
        g = torch.Generator().manual_seed(seed)
        return tuple(
            torch.randn(batch, *s[1:], generator=g, dtype=torch.float64) for s in self.inputs
        )


CASES: dict[str, Case] = {}


def case(
    free: str = "",
    locked: str = "",
    inputs: Any = (IMAGE,),
    batch: bool = True,
    **options: Any,
) -> Callable[[Any], Any]:
    """Register a module class (or factory) under its name; ``options`` go to its constructor."""

    def add(build: Any) -> Any:
        name = build.__name__ + "".join(f"-{v}" for v in options.values())
        assert name not in CASES, name
        CASES[name] = Case(
            lambda: build(**options), inputs, tuple(free.split()), tuple(locked.split()), batch
        )
        return build

    return add


def conv(i: int, o: int, k: int = 3, **kw: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2, **kw)


class Between(nn.Module):
    """a: 3 -> width, then ``middle``, then b: ``out`` -> 5."""

    width, out = 8, 8

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, self.width), conv(self.out, 5)

    def middle(self, y: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.middle(self.a(x).relu()))


# -- concatenation and splitting ----------------------------------------------------------------


@case("a.weight:0 b.weight:1")
class ConcatItself(Between):
    out = 16

    def middle(self, y: Tensor) -> Tensor:
        return torch.cat([y, y.sigmoid()], 1)


@case("a.weight:0 b.weight:1")
class ConcatRawInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 8), conv(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.cat([x, self.a(x), x], 1))


@case("a.weight:0 b.weight:1 c.weight:0")
class ConcatAlongHeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.c, self.b = conv(3, 8), conv(3, 8), conv(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.cat([self.a(x), self.c(x)], 2))


@case("a.weight:0 p.weight:1 q.weight:1 r.weight:1")
class UnequalSplit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.p, self.q, self.r = conv(3, 12), conv(2, 5), conv(4, 5), conv(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        p, q, r = self.a(x).split([2, 4, 6], 1)
        return self.p(p) + self.q(q.relu()) + self.r(r)


@case("a.weight:0 p.weight:1")
class SliceSteps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.p, self.q, self.r = conv(3, 12), conv(6, 5), conv(4, 5), conv(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.p(y[:, ::2]) + self.q(y[:, 1::3]) + self.r(y[:, -3:])


@case("a.weight:0")
class OverlappingSlices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.p, self.q = conv(3, 12), conv(8, 5), conv(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.p(y[:, :8]) + self.q(torch.narrow(y, 1, 4, 8))


@case("a.weight:0 b.weight:1")
class ChunkHalvesMeet(Between):
    width, out = 16, 16

    def middle(self, y: Tensor) -> Tensor:
        p, q = y.chunk(2, 1)
        return torch.cat([p * q.sigmoid(), p], 1)


@case("a.weight:0 b.weight:1")
class SplitBySize(Between):
    width, out = 12, 4

    def middle(self, y: Tensor) -> Tensor:
        p, q, r = y.split(y.shape[1] // 3, 1)
        return p + q * r


@case()
class GatedLinearUnit(Between):
    width, out = 16, 8

    def middle(self, y: Tensor) -> Tensor:
        return F.glu(y, 1)


@case("a.weight:0 b.weight:1")
class DenseBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = conv(3, 6)
        self.layers = nn.ModuleList(conv(6 + 4 * i, 4) for i in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(6 + 4 * i) for i in range(3))
        self.b = conv(18, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.a(x)]
        for norm, layer in zip(self.norms, self.layers, strict=True):
            features.append(layer(norm(torch.cat(features, 1)).relu()))
        return self.b(torch.cat(features, 1))


# -- shuffles ------------------------------------------------------------------------------------


@case("a.weight:0 b.weight:1")
class ChannelShuffle(Between):
    width, out = 12, 12

    def middle(self, y: Tensor) -> Tensor:
        b, c, h, w = y.shape
        return y.view(b, 3, c // 3, h, w).transpose(1, 2).reshape(b, -1, h, w)


@case("a.weight:0 b.weight:1")
class ChannelShuffleModule(Between):
    width, out = 12, 12

    def __init__(self) -> None:
        super().__init__()
        self.shuffle = nn.ChannelShuffle(4)

    def middle(self, y: Tensor) -> Tensor:
        return self.shuffle(y)


@case("a.weight:0 g.weight:0")
class ShuffleBetweenGroups(nn.Module):
    """ShuffleNet: every group of the second convolution takes 3 channels of each of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.g = conv(3, 12), conv(12, 27, groups=3)
        self.h, self.b = conv(27, 12, groups=3), conv(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.g(self.a(x)).relu()
        return self.b(self.h(F.channel_shuffle(y, 3)))


@case("a.weight:0 c.weight:0")
class ShuffleUnit(nn.Module):
    """ShuffleNet v2: half of the channels passes by, then both halves are shuffled. Twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 16), conv(16, 5)
        self.c, self.d, self.e = conv(8, 8, 1), conv(8, 8, groups=8), conv(8, 8, 1)
        self.f = conv(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        for last in (self.e, self.f):
            p, q = y.chunk(2, dim=1)
            y = torch.cat((p, last(self.d(self.c(q).relu()))), dim=1)
            n, c, h, w = y.size()
            y = y.view(n, 2, c // 2, h, w)
            y = torch.transpose(y, 1, 2).contiguous().view(n, c, h, w)
        return self.b(y)


@case("a.weight:0 b.weight:1")
class PixelShuffle(Between):
    width, out = 16, 4

    def middle(self, y: Tensor) -> Tensor:
        return F.pixel_shuffle(y, 2)


@case("a.weight:0 b.weight:1")
class PixelUnshuffle(Between):
    width, out = 6, 24

    def middle(self, y: Tensor) -> Tensor:
        return F.pixel_unshuffle(y, 2)


@case("a.weight:0 b.weight:1")
class SpaceToDepth(Between):
    width, out = 6, 24

    def middle(self, y: Tensor) -> Tensor:
        parts = [y[..., i::2, j::2] for i in (0, 1) for j in (0, 1)]
        return torch.cat(parts, 1)


@case("a.weight:0 b.weight:1")
class DepthToSpaceByView(Between):
    width, out = 24, 6

    def middle(self, y: Tensor) -> Tensor:
        b, c, h, w = y.shape
        y = y.view(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3)
        return y.reshape(b, c // 4, 2 * h, 2 * w)


# -- convolutions of all kinds -------------------------------------------------------------------


@case("a.weight:0 g.weight:0")
class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.g, self.b = conv(3, 16), conv(16, 24, groups=4), conv(24, 5)
        self.norm = nn.BatchNorm2d(24)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.g(self.a(x))).relu())


@case("a.weight:0 d.weight:0 e.weight:0")
class DepthwiseMultiplier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.d = conv(3, 6), conv(6, 6, groups=6)
        self.e, self.b = conv(6, 18, groups=6), conv(18, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.e(self.d(self.a(x)).relu()))


@case("a.weight:0 t.weight:1 g.weight:0 b.weight:1")
class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.t = conv(3, 8), nn.ConvTranspose2d(8, 12, 2, 2)
        self.g, self.b = nn.ConvTranspose2d(12, 16, 3, 1, 1, groups=4), conv(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.g(self.t(self.a(x)).relu()).relu())


@case("a.weight:0 t.weight:0 b.weight:1")
class DepthwiseTransposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 8), conv(8, 5)
        self.t = nn.ConvTranspose2d(8, 8, 4, 2, 1, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.t(self.a(x)).relu())


@case("w:0 bias:0 v:1")
class FunctionalConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.bias = nn.Parameter(torch.randn(8, 3, 3, 3)), nn.Parameter(torch.randn(8))
        self.u, self.v = nn.Parameter(torch.randn(8, 1, 3, 3)), nn.Parameter(torch.randn(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.w, self.bias, padding=1).relu()
        y = F.conv2d(y, self.u, padding=1, groups=8)
        return F.linear(y.mean((2, 3)), self.v)


@case("a.weight:0 b.weight:1", inputs=((2, 3, 16),))
class OneDimensional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8)
        self.b = nn.Conv1d(8, 5, 3, dilation=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.max_pool1d(self.n(self.a(x)), 2))


@case("a.weight:0 b.weight:1", inputs=((2, 3, 4, 6, 6),))
class ThreeDimensional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b = nn.Conv3d(3, 8, 3, padding=1), nn.BatchNorm3d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.adaptive_avg_pool3d(self.n(self.a(x)).relu(), 1).flatten(1))


@case("a.weight:0 b.weight:0", inputs=((2, 8),))
class LinearBeforeView(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 6 * 16), conv(6, 7), conv(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).view(-1, 6, 4, 4).relu()).relu())


@case("a.weight:0 b.weight:1 b.weight:0")
class FlattenBeforeLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 6), nn.Linear(6 * 16, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.max_pool2d(self.a(x).relu(), 2)
        return self.c(self.b(y.view(y.size(0), 6 * 4 * 4)).relu())


@case("a.weight:0 b.weight:1")
class FlattenPermuted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 6), nn.Linear(6 * 64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).permute(0, 2, 3, 1).flatten(1))


@case("a.weight:0")
class UnfoldedPatches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 6), nn.Linear(6 * 9, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.unfold(self.a(x), 3, padding=1).transpose(1, 2))
