"""Habits of other people's code: old Variables, frozen settings, attention as a function."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from patterns import IMAGE, case
from torch import Tensor, nn


class Frozen(OrderedDict[str, Any]):
    """Settings that refuse every change, as some libraries keep them beside a model."""

    def clear(self) -> None:
        raise TypeError("frozen")

    def update(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("frozen")


@case("a.weight:0 b.weight:1", inputs=(IMAGE,))
class Settings(nn.Module):
    """A frozen dict, a module of Python and a function that asks what is callable."""

    def __init__(self) -> None:
        super().__init__()
        self.settings, self.lib = Frozen([("act", "relu")]), math
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def default(self, value: Tensor | None, other: Any) -> Any:
        return value if value is not None else other() if callable(other) else other

    def forward(self, x: Tensor) -> Tensor:
        y = self.default(None, getattr(F, self.settings["act"])(self.a(x)))
        return self.b(y * self.lib.sqrt(2.0))


@case("a.weight:0 b.weight:1", inputs=(IMAGE,))
class OldVariable(nn.Module):
    """Code of the time when tensors were wrapped; channels in a constant order."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.register_buffer("order", torch.tensor([3, 1, 0, 2, 7, 6, 5, 4]))

    def forward(self, x: Tensor) -> Tensor:
        variable: Any = torch.autograd.Variable
        return self.b(torch.index_select(variable(self.a(x)), 1, variable(self.order)))


@case("stem.weight:0 q.weight:0 k.weight:0 v.weight:0 out.weight:1", inputs=(IMAGE,))
class PoolingByAttention(nn.Module):
    """torch's attention as a function, with its sizes read from the input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.at = nn.Conv2d(3, 16, 2, 2), nn.Parameter(torch.randn(17, 16))
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.out = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).flatten(2).permute(2, 0, 1)
        y = torch.cat([y.mean(0, keepdim=True), y]) + self.at[:, None].to(x.dtype)
        bias = torch.cat([self.q.bias, self.k.bias, self.v.bias])
        z, _ = F.multi_head_attention_forward(
            y[:1], y, y, y.shape[-1], 4, None, bias, None, None, False, 0.0,
            self.out.weight, self.out.bias, use_separate_proj_weight=True, training=False,
            q_proj_weight=self.q.weight, k_proj_weight=self.k.weight,
            v_proj_weight=self.v.weight, need_weights=False,
        )  # fmt: skip
        return z.squeeze(0)


@case("qkv.weight:0 out.weight:1", inputs=((2, 5, 16),))
class ScaleOfWidth(nn.Module):
    """A scale from the width of a head, which is nothing once too few channels are left."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        scale = (q.shape[-1] // 8) ** -0.5
        q, k, v = (t.unflatten(-1, (8, -1)).transpose(1, 2) for t in (q, k, v))
        y = (q * scale @ k.mT).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


def sentences(seed: int, batch: int) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([6, 3, 5, 4, 6, 2][:batch])
    return torch.randn(batch, 6, 5, generator=g, dtype=torch.float64), lengths


@case("e.weight:0 r.weight_ih_l0:1 r.weight_hh_l0:1 o.weight:1", inputs=sentences)
class PackedSentences(nn.Module):
    """Sequences of different lengths through a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Linear(5, 8)
        self.r, self.o = nn.LSTM(8, 10, batch_first=True, bidirectional=True), nn.Linear(20, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(self.e(x), lengths, True, False)
        y, _ = nn.utils.rnn.pad_packed_sequence(self.r(packed)[0], batch_first=True)
        return self.o(y.sum(1))
