"""More patterns: numbers that decide sizes, and answers that hold for all inputs.

See ``patterns``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from patterns import case
from torch import Tensor, nn

TOKENS = ((2, 5, 8),)
IMAGES = ((2, 3, 8, 8),)
H, D = 3, 4


class _Tokens(nn.Module):
    """first: 8 -> 12, then ``middle``, then last: 12 -> 5."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, H * D), nn.Linear(H * D, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)))

    def middle(self, y: Tensor) -> Tensor:
        raise NotImplementedError


THROUGH = "first.weight:0 last.weight:1"


@case(THROUGH, inputs=TOKENS)
class HeadsInTheBatch(_Tokens):
    """Samples times heads in one dim, and a table that is repeated once for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(H, 5, D))

    def middle(self, y: Tensor) -> Tensor:
        b, n, _ = y.shape
        y = y.view(b, n, H, -1).transpose(1, 2).contiguous().view(b * H, n, -1)
        scores = torch.bmm(y, self.table.repeat(y.size(0) // H, 1, 1).transpose(1, 2))
        y = torch.bmm(scores.softmax(-1), y)
        return y.view(b, H, n, -1).transpose(1, 2).flatten(2)


@case(THROUGH, inputs=TOKENS)
class SizedInterleave(_Tokens):
    """Each of three keys serves two heads; the number of heads is given."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(2 * H * D, 5)

    def middle(self, y: Tensor) -> Tensor:
        y = y.unflatten(-1, (H, D))
        return y.repeat_interleave(2, dim=2, output_size=2 * H).flatten(2)


@case("turn.weight:0", inputs=TOKENS)
class ComplexParts(nn.Module):
    """A part of the channels, turned as complex numbers (rotary embedding)."""

    def __init__(self) -> None:
        super().__init__()
        self.turn, self.last = nn.Linear(8, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        plain, turned = self.turn(x).split([6, 4], -1)
        pairs = torch.view_as_complex(turned.reshape(*turned.shape[:-1], -1, 2))
        turned = torch.view_as_real(pairs * torch.tensor(1j)).flatten(-2)
        return self.last(torch.cat([plain, turned], -1))


@case(THROUGH, inputs=TOKENS)
class NumbersOfNumpy(_Tokens):
    def middle(self, y: Tensor) -> Tensor:
        y = y.relu()
        y *= np.sqrt(12.0)
        return y + np.float32(0.5)


@case(THROUGH, inputs=TOKENS)
class Asserted(_Tokens):
    """Questions about data of which the other answer only raises."""

    def middle(self, y: Tensor) -> Tensor:
        assert y.abs().max().item() < 1e9, "too large"
        if torch.isnan(y).any():
            raise ValueError(f"not a number in {tuple(y.shape)}")
        return y.relu()


@case("a.weight:0 b.weight:1", inputs=IMAGES)
class StepsInBuffers(nn.Module):
    """Padding by arithmetic on buffers of integers and on sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 3, stride=2)
        self.register_buffer("stride", torch.tensor(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        frames = (y.shape[-1] - 3) / self.stride + 1
        extra = (torch.ceil(frames).to(torch.int64) - 1) * self.stride + 3 - y.shape[-1]
        if extra > 0:
            y = F.pad(y, (0, int(extra), 0, int(extra)))
        return self.b(y.relu())


@case("a.weight:0 w:0 w:1 b.weight:1", inputs=IMAGES)
class PositionalGroups(nn.Module):
    """A functional transposed convolution with every argument by position."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(12, 5, 1)
        self.w = nn.Parameter(torch.randn(8, 6, 3, 3) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.conv_transpose2d(self.a(x), self.w, None, 2, 1, 0, 2, 1).relu())


@case("v.weight:0 o.weight:1", inputs=TOKENS)
class SampledByHeads(nn.Module):
    """Deformable attention: heads in the batch of images, and of the places to look at."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.p, self.o = nn.Linear(8, 12), nn.Linear(8, H * 2), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        images = self.v(x).view(b, n, H, D).permute(0, 2, 3, 1).reshape(b * H, D, n, 1)
        places = self.p(x).tanh().view(b, n, H, 2).transpose(1, 2).flatten(0, 1)
        y = F.grid_sample(images, places[:, :, None], align_corners=False)
        return self.o(y.view(b, H * D, n).transpose(1, 2))


@case("q.weight:0 k.weight:0 v.weight:0 o.weight:0", inputs=TOKENS)
class LearnedQueries(nn.Module):
    """Tokens that are parameters: labelled by token and by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.places = (nn.Parameter(torch.randn(4, 8)) for _ in range(2))
        self.q, self.k, self.v = (nn.Linear(8, 12) for _ in range(3))
        self.o, self.last = nn.Linear(12, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Any:
        t = self.queries.expand(x.shape[0], -1, -1) + x.mean(1, keepdim=True)
        q = self.q(t) + self.q(t + self.places)
        scores = q @ self.k(t + self.places).transpose(1, 2)
        return self.last(self.o(scores.softmax(-1) @ self.v(t)))
