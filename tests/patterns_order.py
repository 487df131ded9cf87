"""More patterns: channels put into another order by constants. See ``patterns``."""

from __future__ import annotations

import torch
from patterns import Between, case, conv
from torch import Tensor, nn

_ORDERS = {
    "rolls": lambda y, p: torch.roll(y, (4, 1), (1, 2)) + y,
    "roll back": lambda y, p: torch.roll(y, shifts=-2, dims=1).square(),
    "roll both": lambda y, p: torch.roll(torch.roll(y, (1, 5), (3, 1)), [2, 1], [-3, -1]),
    "roll all": lambda y, p: torch.roll(y, 5),
    "select": lambda y, p: torch.index_select(y, 1, p) + y,
    "select by name": lambda y, p: y.index_select(dim=1, index=p),
    "buffer": lambda y, p: y[:, p] * y,
    "list": lambda y, p: y[:, [7, 0, 1, 2, 3, 4, 5, 6]],
    "negative": lambda y, p: y[:, [-1, -2, 2, 3, 4, 5, -3, 0]],
    "repeated": lambda y, p: y[:, [0, 0, 1, 1, 2, 2, 3, 3]],
    "part": lambda y, p: torch.cat([y[:, [6, 2]], y[:, [1, 3, 5]], y[:, [0, 4, 7]]], 1),
    "rows": lambda y, p: y[:, :, [1, 0, 2, 3, 4, 5, 6, 7]][:, p],
    "of data": lambda y, p: y[:, y.mean((0, 2, 3)).argsort()],
    "last": lambda y, p: y.permute(0, 2, 3, 1)[..., p].permute(0, 3, 1, 2),
}  # fmt: skip
_LOCKED = ("roll all", "of data")


class Order(Between):
    """A constant order of [N, 8, H, W] along its channels."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.m, self.a = kind, conv(3, 6), conv(6, 8)
        self.register_buffer("order", torch.tensor([3, 1, 0, 2, 7, 6, 5, 4]))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(_ORDERS[self.kind](self.a(self.m(x).relu()), self.order))


for _kind in _ORDERS:
    _fixed = _kind in _LOCKED
    case(
        "m.weight:0" if _fixed else "m.weight:0 a.weight:0 b.weight:1",
        "a.weight:0" if _fixed else "",
        kind=_kind,
    )(Order)


@case("a.weight:0 b.weight:1")
class ShuffledGroups(Between):
    """A channel shuffle written as an index, before a grouped convolution."""

    out = 8

    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.register_buffer("order", torch.arange(8).view(2, 4).T.reshape(-1))

    def middle(self, y: Tensor) -> Tensor:
        return self.g(y[:, self.order]).relu()


@case("a.weight:0 t.weight:0", inputs=((2, 7),))
class OrderOfUnflattened(nn.Module):
    """Channels that came with their pixels in one vector, two and two in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(7, 32), nn.Conv2d(4, 3, 1)
        self.t = nn.ConvTranspose2d(16, 4, 3, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).view(x.shape[0], 8, 2, 2)
        return self.b(self.t(y[:, [i for i in (0, 4, 7, 2, 6, 5, 1, 3) for _ in range(2)]]))


@case("c.weight:0 one.weight:0")
class DiagonalOfABlock(nn.Module):
    """A slice with a step that takes one channel of each group of a grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 12, 3, groups=2)
        self.one, self.two, self.d = nn.Linear(2, 7), nn.Linear(7, 12), nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        gate = self.two(self.one(x[:, 1:5:2].mean((2, 3))))
        return self.d(self.c(x) * gate[:, :, None, None])


@case(locked="first.weight:0", inputs=((2, 3, 4, 4),))
class Diagonals(nn.Module):
    """Of a grid of 2 x 2 channels the diagonals stand or fall together: no smaller grid is left."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        n, c, h, w = y.shape
        y = y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.last(y + y.flip(1))
