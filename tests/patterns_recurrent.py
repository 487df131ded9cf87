"""Recurrent layers, lookups and sampling: pruned through, with what feeds and follows them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from patterns import IMAGE, case
from torch import Tensor, nn

STEPS = (2, 7, 6)  # samples, time steps, features


@case(
    "c.weight:0 r.weight_ih_l0:0 r.weight_ih_l0:1 r.weight_hh_l0:1 o.weight:1", inputs=((2, 6, 9),)
)
class ConvLSTM(nn.Module):
    """A convolution in front of a recurrent layer; the last step is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv1d(6, 12, 3, padding=1)
        self.r, self.o = nn.LSTM(12, 10, batch_first=True), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.r(self.c(x).relu().transpose(1, 2))
        return self.o(y[:, -1])


class Stacked(nn.Module):
    """Two layers, both directions: each keeps units of its own, equally many."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        options: dict[str, Any] = {"num_layers": 2, "bidirectional": True, "batch_first": True}
        self.e = nn.Linear(6, 8)
        self.r = getattr(nn, kind)(8, 10, **options)
        self.o = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, state = self.r(self.e(x))
        h = state[0] if isinstance(state, tuple) else state
        return self.o(y.mean(1)), self.o(torch.cat([h[-2], h[-1]], 1))


for kind in ("LSTM", "GRU", "RNN"):
    free = "e.weight:0 r.weight_hh_l0:1 r.weight_hh_l1_reverse:1 r.weight_ih_l1:1 o.weight:1"
    case(free, inputs=(STEPS,), kind=kind)(Stacked)


@case("enc.weight_hh_l0:1 dec.weight_hh_l0:1 at.weight:1", inputs=(STEPS, (2, 4, 6)))
class EncoderDecoder(nn.Module):
    """The decoder starts from the encoder's state and attends to what it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.dec = (nn.LSTM(6, 10, batch_first=True) for _ in range(2))
        self.at, self.o = nn.Linear(10, 10, bias=False), nn.Linear(20, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        memory, state = self.enc(x)
        z, _ = self.dec(y, state)
        weights = (self.at(z) @ memory.transpose(1, 2)).softmax(-1)
        return self.o(torch.cat([z, weights @ memory], -1).tanh())


@case("r.weight_hh_l0:1 r.weight_hh_l1:1", inputs=(STEPS,))
class StartsAtZero(nn.Module):
    """States made in forward, by number and by attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.r, self.o = nn.LSTM(6, 10, 2, batch_first=True, bias=False), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(2, x.size(0), 10, dtype=x.dtype, device=x.device)
        _, (h, c) = self.r(x, (h, x.new_zeros(2, x.size(0), self.r.hidden_size)))
        return self.o(h[-1]) + self.o(c[0])


@case("h:2 r.weight_hh_l0:1", inputs=((7, 2, 6),), batch=False)
class LearnedState(nn.Module):
    """A parameter is where the layer starts; time comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.Parameter(torch.randn(1, 1, 10))
        self.r, self.o = nn.RNN(6, 10, nonlinearity="relu"), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.r(x, self.h.expand(-1, x.size(1), -1).contiguous())[0])


@case(locked="r.weight_hh_l0:1", inputs=(STEPS, (2, 10)))
class GivenState(nn.Module):
    """The state is an input of the model: all of its channels stay."""

    def __init__(self) -> None:
        super().__init__()
        self.r = nn.GRU(6, 10, batch_first=True)
        self.a, self.o = nn.Linear(10, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        y, h = self.r(x, h[None])
        return self.o(self.a(y)), h


@case("r.weight_hr_l0:0 o.weight:1", "r.weight_hr_l0:1", inputs=(STEPS,))
class Projected(nn.Module):
    """What an LSTM with a projection gives can go; torch wants more units than that."""

    def __init__(self) -> None:
        super().__init__()
        self.r, self.o = nn.LSTM(6, 10, proj_size=6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.r(x)[0])


@case("c.weight:0 r.weight_ih_l0:1 r.weight_hh_l0:1", inputs=((2, 4, 3, 8, 8),))
class Video(nn.Module):
    """Frames through a convolution, flattened, then through time."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.r = nn.Conv2d(3, 6, 3, 2, 1), nn.GRU(6 * 4, 10)
        self.o = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, t = x.shape[:2]
        y = F.adaptive_avg_pool2d(self.c(x.flatten(0, 1)).relu(), 2).view(b, t, -1)
        return self.o(self.r(y.permute(1, 0, 2))[1].squeeze(0))


@case("a.weight_hh:1 b.weight_hh:1 a.weight_ih:0", inputs=(STEPS,))
class Cells(nn.Module):
    """One cell after the other, step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.LSTMCell(6, 8), nn.GRUCell(8, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.size(0), 8)
        g = x.new_zeros(x.size(0), 10)
        for t in range(x.size(1)):
            h, c = self.a(x[:, t], (h, c))
            g = self.b(h, g)
        return self.o(g)


def rows_and_values(seed: int, batch: int) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, 9, (batch, 3), generator=g)
    return rows, torch.randn(batch, 6, generator=g, dtype=torch.float64)


@case("e.weight:1 a.weight:0 f.weight:1 o.weight:1", "e.weight:0", inputs=rows_and_values)
class Bags(nn.Module):
    """Sums and means of rows of a table, beside a branch of values."""

    def __init__(self) -> None:
        super().__init__()
        self.e = nn.EmbeddingBag(9, 8, mode="mean")
        self.f = nn.EmbeddingBag(9, 8, mode="sum")
        self.a, self.o = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, rows: Tensor, x: Tensor) -> Tensor:
        return self.o((self.e(rows) + self.a(x)).relu() * self.f(rows))


@case("a.weight:0 w:1 w:2 r.weight:0 o.weight:1", inputs=(IMAGE,))
class DynamicConvolution(nn.Module):
    """Each sample mixes a kernel of its own from all experts, by einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.r = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 4)
        self.w, self.o = nn.Parameter(torch.randn(4, 8, 6, 3, 3) / 5), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        b, c, h, w = x.shape
        share = self.r(x.mean((2, 3))).sigmoid()
        kernel = torch.einsum("be,eoihw->boihw", share, self.w).reshape(b * 8, c, 3, 3)
        y = F.conv2d(x.reshape(1, b * c, h, w), kernel, padding=1, groups=b)
        return self.o(y.view(b, 8, h, w).relu())


@case("i.weight:0 v.weight:1 p.weight:0", inputs=(IMAGE,))
class DeformableAttention(nn.Module):
    """Heads sample the image at places of their own: heads of values and of places go together."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.q = nn.Conv2d(3, 12, 3, padding=1), nn.Embedding(5, 12)
        self.places, self.share = nn.Linear(12, 4 * 3 * 2), nn.Linear(12, 4 * 3)
        self.v, self.p, self.o = nn.Linear(12, 8), nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        f = self.i(x)
        b, _, h, w = f.shape
        q = self.q.weight.repeat(b, 1, 1)
        v = self.v(f.flatten(2).transpose(1, 2)).view(b, h * w, 4, 2)
        v = v.flatten(2).transpose(1, 2).reshape(b * 4, 2, h, w)
        places = self.places(q).view(b, 5, 4, 3, 2).tanh().transpose(1, 2).flatten(0, 1)
        share = self.share(q).view(b, 5, 4, 3).softmax(-1).transpose(1, 2).reshape(b * 4, 1, 5, 3)
        y = (F.grid_sample(v, places, align_corners=False) * share).sum(-1).view(b, 8, 5)
        return self.o(self.p(y.transpose(1, 2)) + q)


@case("a.weight:0 e.weight:0 o.weight:1", "flow.weight:0", inputs=(IMAGE, IMAGE))
class Warp(nn.Module):
    """Features of one image at places that are computed from both."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.flow = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 2, 3, padding=1)
        self.e, self.o = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        places = self.flow(self.a(torch.cat([x, y], 1)).relu()).permute(0, 2, 3, 1).tanh()
        return self.o(F.grid_sample(self.e(y), places, align_corners=True))
