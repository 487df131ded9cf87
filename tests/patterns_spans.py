"""More patterns: windows as large as a dim that carries channels. See ``patterns``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from patterns import case
from torch import Tensor, nn

TOKENS = ((2, 5, 8),)


def words(seed: int, batch: int) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(seed)
    return (torch.randint(0, 20, (batch, 9), generator=g),)


KIM = "e.weight:1 c.0.weight:0 c.0.weight:3 c.1.weight:0 c.1.weight:3 f.weight:1"


@case(KIM, inputs=words, padded=False)
@case(KIM, inputs=words, padded=True)
class SentenceConvolution(nn.Module):
    """Kernels over words are as wide as the embedding."""

    def __init__(self, padded: bool) -> None:
        super().__init__()
        self.e = nn.Embedding(20, 8)
        ends = [(k - 1 if padded else 0, 0) for k in (2, 3)]
        self.c = nn.ModuleList(
            nn.Conv2d(1, 6, (k, 8), padding=p) for k, p in zip((2, 3), ends, strict=True)
        )
        self.f = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.e(x).unsqueeze(1)
        maps = [c(y).relu().squeeze(3) for c in self.c]
        return self.f(torch.cat([F.max_pool1d(z, z.size(2)).squeeze(2) for z in maps], 1))


@case("", locked="e.weight:1 c.weight:3", inputs=words, padding=1, size=8)
@case("", locked="e.weight:1 c.weight:3", inputs=words, padding=0, size=7)
class EmbeddingInParts(nn.Module):
    """Kernels that also lie across the ends of the embedding, or in two places of it."""

    def __init__(self, padding: int, size: int) -> None:
        super().__init__()
        self.e, self.c = nn.Embedding(20, 8), nn.Conv2d(1, 6, (3, size), padding=(0, padding))
        self.f = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.c(self.e(x).unsqueeze(1)).relu().amax((2, 3)))


SPANNED = "a.weight:0 c.weight:0 d.weight:1 d.weight:3 f.weight:1"


@case(f"{SPANNED} d.weight:0", inputs=TOKENS, groups=1)
@case("a.weight:0 c.weight:0 d.weight:3 f.weight:1", inputs=TOKENS, groups=6)
class SpannedBands(nn.Module):
    """A convolution over channels and, at once, over all of what a layer made of the bands."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(8, 10), nn.Conv2d(1, 6, 1)
        self.d, self.f = nn.Conv2d(6, 12, (3, 10), groups=groups), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(self.a(x).sigmoid()[:, None]).relu()
        return self.f(self.d(y).relu().mean((2, 3)))


class Frames(nn.Module):
    """A layer of a time-delay network: patches of ``ctx`` frames, all of their features."""

    def __init__(self, i: int, o: int, ctx: int, dilation: int = 1) -> None:
        super().__init__()
        self.i, self.ctx, self.dilation = i, ctx, dilation
        self.k, self.bn = nn.Linear(i * ctx, o), nn.BatchNorm1d(o)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[2] == self.i
        x = F.unfold(
            x.unsqueeze(1), (self.ctx, self.i), stride=(1, self.i), dilation=(self.dilation, 1)
        )
        y = F.relu(self.k(x.transpose(1, 2)))
        return self.bn(y.transpose(1, 2)).transpose(1, 2)


@case("l.0.k.weight:0 l.1.k.weight:0 l.1.k.weight:1 f.weight:1", inputs=((2, 12, 7),))
class TimeDelays(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Sequential(Frames(7, 8, 3), Frames(8, 10, 2, 2), Frames(10, 12, 1))
        self.f = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.l(x)
        return self.f(torch.cat([y.mean(1), y.std(1)], 1))


@case("a.weight:0 c.weight:0 k.weight:1 k.weight:0", inputs=TOKENS)
class PatchesOfBoth(nn.Module):
    """Patches over channels and all bands: their columns are pairs of the two."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(8, 10), nn.Conv2d(1, 6, 1)
        self.k, self.f = nn.Linear(6 * 2 * 10, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.unfold(self.c(self.a(x)[:, None]).relu(), (2, 10))
        return self.f(self.k(y.transpose(1, 2)).relu().mean(1))


@case("a.weight:0 k.weight:1", inputs=TOKENS)
class WholeWindow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.k = nn.Linear(8, 10), nn.Linear(10, 7)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        return self.k(y.unfold(2, y.shape[-1], 1).squeeze(2)).mean(1)
