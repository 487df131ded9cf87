"""More patterns: norms, moved channels, inputs and outputs, control flow. See ``patterns``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from patterns import IMAGE, Between, case, conv
from torch import Tensor, nn

# -- normalisation -------------------------------------------------------------------------------


@case("a.weight:0 b.weight:1 m.weight:0", kind="group")
@case("a.weight:0 b.weight:1 m.weight:0", kind="one group")
@case("a.weight:0 b.weight:1 m.weight:0", kind="instance")
@case("a.weight:0 b.weight:1 m.weight:0", kind="affine instance")
@case("a.weight:0 b.weight:1 m.weight:0", kind="batch")
@case("m.weight:0", kind="local response")
@case("m.weight:0", kind="softmax")
@case("m.weight:0", kind="cumsum")
@case("m.weight:0", kind="normalize")
@case("a.weight:0 b.weight:1 m.weight:0", kind="prelu")
class Norm(Between):
    """Norms over each channel go with it; what mixes the channels may lock them, not others."""

    width, out = 16, 16

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.m = conv(3, 6)
        self.a = conv(6, 16)
        layers: dict[str, Any] = {
            "group": nn.GroupNorm(4, 16),
            "one group": nn.GroupNorm(1, 16),
            "instance": nn.InstanceNorm2d(16),
            "affine instance": nn.InstanceNorm2d(16, affine=True, track_running_stats=True),
            "batch": nn.BatchNorm2d(16),
            "local response": nn.LocalResponseNorm(3),
            "softmax": nn.Softmax(1),
            "prelu": nn.PReLU(16),
        }
        functions = {"cumsum": lambda y: y.cumsum(1), "normalize": F.normalize}
        self.layer = layers[kind] if kind in layers else functions[kind]

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.layer(self.a(self.m(x).relu())))


@case("a.weight:0 b.weight:1 g.weight:0", inputs=((2, 5, 8),))
class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b = nn.Linear(8, 12), nn.RMSNorm(12, eps=1e-6), nn.Linear(12, 5)
        self.g = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y + self.g(self.n(y)).relu())


@case("a.weight:0 d.weight:0 f.weight:0 gamma:0")
class ConvNextBlock(Between):
    def __init__(self) -> None:
        super().__init__()
        self.d, self.n = conv(8, 8, 7, groups=8), nn.LayerNorm(8)
        self.f, self.e = nn.Linear(8, 24), nn.Linear(24, 8)
        self.gamma = nn.Parameter(torch.randn(8))

    def middle(self, y: Tensor) -> Tensor:
        z = self.n(self.d(y).permute(0, 2, 3, 1))
        return y + (self.gamma * self.e(F.gelu(self.f(z)))).permute(0, 3, 1, 2)


@case("a.weight:0 b.weight:1")
class NormOverChannelsFirst(Between):
    """LayerNorm on a moved channel dim, by the function."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))

    def middle(self, y: Tensor) -> Tensor:
        z = y.movedim(1, -1)
        return F.layer_norm(z, z.shape[-1:], self.w, self.v, 1e-6).movedim(-1, 1)


@case("a.weight:0")
class NormOverImage(Between):
    def __init__(self) -> None:
        super().__init__()
        self.m = conv(3, 6)
        self.a, self.n = conv(6, 8), nn.LayerNorm([8, 8, 8])

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.n(self.a(self.m(x).relu())))


# -- movement of channels ------------------------------------------------------------------------

_MOVES = {
    "roll": lambda y: y.roll(3, 1),
    "roll space": lambda y: y.roll((1, 2), (2, 3)),
    "flip": lambda y: y.flip(1),
    "flip space": lambda y: torch.flip(y, [2, 3]),
    "repeat": lambda y: y.repeat(1, 2, 1, 1)[:, :8] + y,
    "list index": lambda y: y[:, [3, 1, 0, 2, 7, 6, 5, 4]],
    "pad channels": lambda y: F.pad(y, (0, 0, 0, 0, 1, 1))[:, 1:-1],
    "pad space": lambda y: F.pad(y, (1, 1, 1, 1), mode="reflect"),
    "fourier": lambda y: torch.fft.ifft2(torch.fft.fft2(y)).real,
    "maximum": lambda y: torch.maximum(y, y.flip(3)).clamp(max=1.0),
    "where": lambda y: torch.where(y > 0, y, 0.1 * y),
    "argmax gather": lambda y: y.gather(1, y.argmax(1, keepdim=True)).expand(-1, 8, -1, -1),
    "sort": lambda y: y.sort(1)[0],
    "topk": lambda y: y.topk(8, 1)[0],
    "zeros": lambda y: y + torch.zeros(y.shape[0], y.shape[1], 1, 1, dtype=y.dtype) + 1,
    "arange": lambda y: y * torch.arange(y.shape[1]).view(1, -1, 1, 1),
    "ones like": lambda y: y * torch.ones_like(y) + torch.full_like(y, 2.0),
    "mean by sum": lambda y: y - y.sum(1, keepdim=True) / y.shape[1],
    "variance": lambda y: y / (y.var(1, keepdim=True) + 1),
    "scale by width": lambda y: y * y.shape[1] ** -0.5 + 1 / y.size(1),
    "interpolate": lambda y: F.interpolate(y, scale_factor=2, mode="bilinear"),
    "strided alias": lambda y: y.as_strided(y.size(), y.stride()),
    "channels last": lambda y: y.contiguous(memory_format=torch.channels_last).sigmoid(),
    "in place": lambda y: y.mul_(2).add_(1).relu_(),
    "computed view": lambda y: y.view(y.shape[0], y.shape[1], -1).view(*y.shape),
    "batch in view": lambda y: y.view(y.size(0) * y.size(1), 1, 8, 8).view(y.size()),
    "negative view": lambda y: y.reshape(-1, 8, 64).transpose(1, 2).reshape(-1, 64, 8)
    .transpose(1, 2).reshape(-1, 8, 8, 8),
    "unflatten": lambda y: y.unflatten(1, (4, 2)).sigmoid().flatten(1, 2),
    "unbind": lambda y: torch.stack(y.unbind(1), 1),
    "stack": lambda y: torch.stack([y, y.sigmoid()], 0).sum(0),
    "interleave": lambda y: torch.stack([y, -y], 2).flatten(1, 2)[:, ::2],
    "chunk cat": lambda y: torch.cat(y.chunk(4, 1)[::-1], 1),
    "split flip": lambda y: torch.cat(torch.tensor_split(y, 2, 1)[::-1], 1),
    "squeeze": lambda y: y.mean((2, 3), keepdim=True).squeeze().unsqueeze(-1).unsqueeze(-1),
    "cross product": lambda y: y * (y.flatten(2) @ y.flatten(2).transpose(1, 2)).sum((1, 2))
    .view(-1, 1, 1, 1),
}  # fmt: skip
_FREE_MOVES = (
    "roll space", "flip space", "repeat", "pad space", "maximum", "where", "zeros", "ones like",
    "roll", "list index", "scale by width", "interpolate", "channels last", "in place",
    "computed view", "batch in view", "negative view", "unflatten", "stack", "flip", "chunk cat",
)  # fmt: skip


class Move(Between):
    """A function of [N, 8, H, W] that keeps the number of channels."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.m, self.kind = conv(3, 6), kind
        self.a = conv(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(_MOVES[self.kind](self.a(self.m(x).relu())))


for _kind in _MOVES:
    _free = "m.weight:0" + (" a.weight:0 b.weight:1" if _kind in _FREE_MOVES else "")
    case(_free, kind=_kind)(Move)


@case("a.weight:0 b.weight:1")
class Tile(Between):
    out = 16

    def middle(self, y: Tensor) -> Tensor:
        return y.tile(2, 1, 1).mul(0.5)


@case("a.weight:0")
class RepeatInterleave(Between):
    out = 16

    def __init__(self) -> None:
        super().__init__()
        self.m = conv(3, 6)
        self.a = conv(3, 8)

    def middle(self, y: Tensor) -> Tensor:
        return y.repeat_interleave(2, 1)


@case()
class ConstantPermutation(Between):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.tensor([3, 1, 0, 2, 7, 6, 5, 4]))

    def middle(self, y: Tensor) -> Tensor:
        return y[:, self.order] + torch.index_select(y, 1, self.order)


@case()
class BilinearPooling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.m, self.p, self.q = conv(3, 6), conv(6, 4), conv(6, 5)
        self.b = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.m(x).relu()
        p, q = self.p(y).flatten(2), self.q(y).flatten(2)
        return self.b((torch.einsum("bip,bjp->bij", p, q) / p.shape[-1]).flatten(1))


@case("a.weight:0 c.weight:0")
class OuterProductGate(nn.Module):
    """[N, C, H, 1] x [N, C, 1, W]: the channels are one dim of both."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c, self.b = conv(3, 8), conv(3, 8), conv(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).mean(3, keepdim=True) * self.c(x).mean(2, keepdim=True))


@case("a.weight:0 b.weight:1")
class InPlaceSlices(Between):
    def middle(self, y: Tensor) -> Tensor:
        y[:, :4] = y[:, :4] * 2
        y[:, 2:6] += 1
        y[:, 5:].mul_(3)
        y[..., 0] = 0.5
        return y


@case("m.weight:0")
class InPlaceStride(Between):
    """Kept positions need not lie at equal steps: such a write may lock its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.m = conv(3, 6)
        self.a = conv(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(self.m(x).relu())
        y[:, ::2].mul_(3)
        y[:, 1::3] -= 1
        return self.b(y)


@case("a.weight:0 b.weight:1")
class WrittenParts(Between):
    """Results written into a new tensor of the same size."""

    def middle(self, y: Tensor) -> Tensor:
        z = torch.zeros_like(y)
        z[:, :, 1:] = y[:, :, :-1]
        return z + y


@case()
class MaxOut(Between):
    width, out = 16, 8

    def middle(self, y: Tensor) -> Tensor:
        b, c, h, w = y.shape
        return y.view(b, c // 2, 2, h, w).amax(2)


@case("a.weight:0 w:0 w:1")
class EinsumConvolution(Between):
    out = 6

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 8))

    def middle(self, y: Tensor) -> Tensor:
        return torch.einsum("bchw,oc->bohw", y, self.w)


@case("a.weight:0 w:0 w:1")
class MatmulParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 8), nn.Linear(6, 5)
        self.w, self.v = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).flatten(2).transpose(1, 2)
        return self.b((y @ self.w + self.v).sigmoid())


@case("f.weight:0", inputs=((2, 7, 6), (2, 7, 5)))
class BilinearLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(6, 8), nn.Linear(8, 4)
        self.bilinear, self.out = nn.Bilinear(4, 5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.out(self.bilinear(self.g(self.f(x).relu()), y))


# -- recurrent, inputs and outputs, control flow -------------------------------------------------


@case("p.weight:0 q.weight:0", inputs=((2, 5, 6),), kind="LSTM")
@case("p.weight:0 q.weight:0", inputs=((2, 5, 6),), kind="GRU")
class Recurrent(nn.Module):
    """The recurrent part stays; around it all goes."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.p, self.i = nn.Linear(6, 12), nn.Linear(12, 8)
        self.cell = getattr(nn, kind)(8, 7, batch_first=True, bidirectional=True)
        self.q, self.out = nn.Linear(14, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.cell(self.i(self.p(x).relu()))
        return self.out(self.q(y[:, -1]).relu())


@case("p.weight:0 q.weight:0 r.weight:0", inputs=(IMAGE, (2, 7)))
class SeveralInputsAndOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p, self.q, self.r = conv(3, 8), nn.Linear(7, 8), conv(8, 6)
        self.s, self.t = conv(6, 4), nn.Linear(6, 3)

    def forward(self, x: Tensor, c: Tensor) -> dict[str, Any]:
        y = self.r(self.p(x) + self.q(c)[:, :, None, None]).relu()
        return {"map": self.s(y), "others": (self.t(y.mean((2, 3))), [x * 2])}


def _mapping(seed: int, batch: int) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(seed)
    image = torch.randn(batch, *IMAGE[1:], generator=g, dtype=torch.float64)
    return ({"image": image, "code": torch.randn(batch, 7, generator=g, dtype=torch.float64)},)


@case("p.weight:0 q.weight:0", inputs=_mapping)
class MappingInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p, self.q, self.r = conv(3, 8), nn.Linear(7, 8), conv(8, 6)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.r(self.p(batch["image"]) * self.q(batch["code"])[:, :, None, None])


@case("m.weight:0", "a.weight:0")
class InnerFeaturesOut(Between):
    def __init__(self) -> None:
        super().__init__()
        self.m = conv(3, 6)
        self.a = conv(6, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.a(self.m(x).relu())
        return self.b(y.relu()), y


class _Choice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p, self.q = conv(8, 8), conv(8, 8)

    def forward(self, y: Tensor) -> Tensor:
        return self.p(y) if float(y.sum()) > 0 else self.q(y)


@case("m.weight:0 k.weight:0")
class ControlFlowOnData(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.m, self.a, self.choice = conv(3, 6), conv(6, 8), _Choice()
        self.k, self.b = conv(8, 6), conv(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.k(self.choice(self.a(self.m(x).relu()))).relu())


@case("m.weight:0 a.weight:0")
class ControlFlowOnShapes(Between):
    def __init__(self) -> None:
        super().__init__()
        self.m = conv(3, 6)
        self.a = conv(6, 8)

    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        y = self.a(self.m(x))
        if y.shape[2] > 4 and y.shape[1] == 8:
            y = y.relu()
        assert y.dim() == 4
        return self.b(y if scale is None else y * scale)


# -- detection -----------------------------------------------------------------------------------


class _Unit(nn.Module):
    def __init__(self, i: int, o: int, k: int = 1) -> None:
        super().__init__()
        self.conv, self.bn = conv(i, o, k, bias=False), nn.BatchNorm2d(o)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.bn(self.conv(x)))


class _C2f(nn.Module):
    def __init__(self, i: int, o: int, hidden: int, count: int) -> None:
        super().__init__()
        self.first, self.last = _Unit(i, 2 * hidden), _Unit((2 + count) * hidden, o)
        self.blocks = nn.ModuleList(_Unit(hidden, hidden, 3) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, 1))
        parts.extend(block(parts[-1]) + parts[-1] for block in self.blocks)
        return self.last(torch.cat(parts, 1))


class _SPPF(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.first, self.last = _Unit(c, c // 2), _Unit(2 * c, c)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.first(x)]
        parts.extend(self.pool(parts[-1]) for _ in range(3))
        return self.last(torch.cat(parts, 1))


@case("stem.conv.weight:0 c1.first.conv.weight:0 c1.last.conv.weight:0 s.first.conv.weight:0")
class Detector(nn.Module):
    """C2f, SPPF, upsampling, repeated concatenation and a distribution (DFL) head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.c1 = _Unit(3, 8, 3), _C2f(8, 12, 4, 2)
        self.down, self.s = nn.Conv2d(12, 16, 3, 2, 1), _SPPF(16)
        self.c2, self.up = _C2f(28, 12, 6, 1), nn.Upsample(scale_factor=2)
        self.box, self.kind = conv(12, 4 * 8, 1), conv(12, 3, 1)
        self.dfl = nn.Conv2d(8, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        p = self.c1(self.stem(x))
        q = self.s(self.down(p))
        y = self.c2(torch.cat([self.up(q), p], 1))
        both = torch.cat([self.box(y), self.kind(y)], 1).view(x.shape[0], 35, -1)
        box, kind = both.split((32, 3), 1)
        box = box.view(x.shape[0], 4, 8, -1).transpose(2, 1).softmax(1)
        return torch.cat([self.dfl(box).view(x.shape[0], 4, -1), kind.sigmoid()], 1)


@case("a.weight:0 b.weight:1")
class AsksItsWeight(nn.Module):
    """The weight of a module that is called is also read by name, for its dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 8), conv(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).to(self.b.weight.dtype).relu())
