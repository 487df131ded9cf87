"""More patterns: gates, shared modules and parameters, parametrizations. See ``patterns``."""

from __future__ import annotations

import torch
from patterns import IMAGE, Between, case, conv
from torch import Tensor, nn

# -- gates and attention over channels -----------------------------------------------------------


@case("a.weight:0 b.weight:1 gate.weight:1")
class OneChannelGate(Between):
    def __init__(self) -> None:
        super().__init__()
        self.gate = conv(8, 1)

    def middle(self, y: Tensor) -> Tensor:
        return y * self.gate(y).sigmoid()


@case("a.weight:0 b.weight:1 f.weight:0 e.weight:0")
class SqueezeExcite(Between):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.e = nn.Linear(8, 4), nn.Linear(4, 8)

    def middle(self, y: Tensor) -> Tensor:
        b, c, _, _ = y.size()
        gate = self.e(self.f(y.mean((2, 3)).view(b, c)).relu()).sigmoid()
        return y * gate.view(b, c, 1, 1).expand_as(y)


@case("z.weight:0")
class MeanMaxOverChannels(Between):
    """CBAM's spatial attention: the channels under the mean are whole, others may go."""

    def __init__(self) -> None:
        super().__init__()
        self.z, self.a, self.s = conv(3, 6), conv(6, 8), conv(2, 1, 7)

    def middle(self, y: Tensor) -> Tensor:
        both = torch.cat([y.mean(1, keepdim=True), y.max(1, keepdim=True)[0]], 1)
        return y * self.s(both).sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.middle(self.a(self.z(x).relu())))


@case("a.weight:0")
class EfficientChannelAttention(Between):
    """ECA: a convolution along the channels, which therefore stay; around it all goes."""

    def __init__(self) -> None:
        super().__init__()
        self.z = conv(3, 8)
        self.a = conv(8, 6)
        self.c, self.k = conv(6, 8), nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(self.a(self.z(x)).relu())
        gate = self.k(y.mean((2, 3)).unsqueeze(1)).squeeze(1)
        return self.b(y * gate[:, :, None, None].sigmoid())


# -- sharing -------------------------------------------------------------------------------------


@case("a.weight:0 s.weight:0 b.weight:1")
class CalledTwice(Between):
    def __init__(self) -> None:
        super().__init__()
        self.s, self.n = conv(8, 8), nn.BatchNorm2d(8)

    def middle(self, y: Tensor) -> Tensor:
        return self.n(self.s(self.n(self.s(y))).relu())


@case("p.weight:0 q.weight:0", inputs=(IMAGE, IMAGE))
class SiameseBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p, self.q, self.b = conv(3, 6), conv(6, 8), conv(16, 5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        both = [self.q(self.p(t).relu()) for t in (x, y)]
        return self.b(torch.cat(both, 1))


def _tokens(seed: int, batch: int) -> tuple[Tensor]:
    return (torch.randint(0, 11, (batch, 6), generator=torch.Generator().manual_seed(seed)),)


@case("e.weight:1 f.weight:0", inputs=_tokens)
class TiedEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.f, self.g = nn.Embedding(11, 8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.e.weight

    def forward(self, i: Tensor) -> Tensor:
        y = self.e(i)
        return self.out(y + self.g(self.f(y).relu()))


@case("e.weight:1 p:2", inputs=_tokens)
class EmbeddingAndPosition(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.p = nn.Embedding(11, 8), nn.Parameter(torch.randn(1, 9, 8))
        self.out = nn.Linear(8, 4)

    def forward(self, i: Tensor) -> Tensor:
        return self.out(self.e(i) + self.p[:, : i.shape[1]])


@case("a.weight:0 scale:0 shift:1 b.weight:1")
class BareParameters(Between):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(8, 1, 1))
        self.shift = nn.Parameter(torch.randn(1, 8, 1, 1))
        self.register_buffer("offset", torch.randn(8))

    def middle(self, y: Tensor) -> Tensor:
        return y * self.scale + self.shift + self.offset.view(1, -1, 1, 1)


@case("b.weight:1 b.weight:0")
class WeightNorm(nn.Module):
    """The parametrized convolution may be pruned or locked; what is around it is free."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.utils.parametrizations.weight_norm(conv(3, 8))
        self.b, self.c, self.d = conv(6, 6), conv(8, 6), conv(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.b(self.c(self.a(x)).relu()).relu())


@case("b.weight:1 b.weight:0")
class SpectralNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.utils.parametrizations.spectral_norm(conv(3, 8))
        self.b, self.c, self.d = conv(6, 6), conv(8, 6), conv(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.b(self.c(self.a(x)).relu()).relu())
