"""Small nets for Fashion-MNIST and digits, and their training: for the benchmarks of quality.

A VGG-like net, ResNet-20 and a MobileNetV2-like net, with batch normalisation; a small ViT.

Legend for shapes: N images, C channels, H x W pixels.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune.data import load_data

EPOCHS = {"vgg": 4, "resnet20": 8, "mobilenet": 4, "vit": 5}  # on Fashion-MNIST
QUICK_EPOCHS = 24  # on digits
SLOW = {"vit": 120}  # to learn from few images: epochs on digits
RATES = {"mobilenet": 0.05, "vit": 3e-3}  # of training; others: 0.1

# --- nets -------------------------------------------------------------------------------------


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution without a bias, and batch normalisation."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    )


def head(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)]


def vgg() -> nn.Module:
    """3x3 convolutions 32-32-pool-64-64-pool-128-128, global average, linear."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate([(1, 32), (32, 32), (32, 64), (64, 64), (64, 128), (128, 128)]):
        layers += [nn.MaxPool2d(2)] if i in (2, 4) else []
        layers += [conv(a, b, 3), nn.ReLU()]
    return nn.Sequential(*layers, *head(128))


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = conv(inputs, outputs, 3, stride), conv(outputs, outputs, 3)
        same = inputs == outputs
        self.shortcut = nn.Identity() if same else conv(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


def resnet20() -> nn.Module:
    layers: list[nn.Module] = [conv(1, 16, 3), nn.ReLU()]
    for a, b in [(16, 16), (16, 32), (32, 64)]:
        layers += [Residual(a if i == 0 else b, b, 2 if i == 0 < b - a else 1) for i in range(3)]
    return nn.Sequential(*layers, *head(64))


class Inverted(nn.Module):
    """Expansion, depthwise, projection; a shortcut where the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        wide = inputs * expand
        self.expand, self.project = conv(inputs, wide, 1), conv(wide, outputs, 1)
        self.depth = conv(wide, wide, 3, stride, wide)
        self.same = inputs == outputs and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(F.relu6(self.depth(F.relu6(self.expand(x)))))
        return x + y if self.same else y


def mobilenet() -> nn.Module:
    layers: list[nn.Module] = [conv(1, 16, 3, 2), nn.ReLU6()]
    plan = [(16, 16, 1), (16, 24, 1), (24, 24, 1), (24, 40, 2), (40, 40, 1), (40, 64, 1)]
    layers += [Inverted(a, b, s, 4) for a, b, s in plan]
    return nn.Sequential(*layers, conv(64, 160, 1), nn.ReLU6(), *head(160))


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / 4).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.before, self.attend = nn.LayerNorm(width), SelfAttention(width, heads)
        self.between = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.before(x))
        return x + self.mlp(self.between(x))


class Transformer(nn.Module):
    """Patches, a class token, learned positions."""

    def __init__(self, size: int, patch: int, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2 + 1, width))
        self.layers = nn.Sequential(*[Layer(width, heads) for _ in range(4)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x).flatten(2).transpose(1, 2)
        y = torch.cat([self.token.expand(y.shape[0], -1, -1), y], 1) + self.places
        return self.head(self.norm(self.layers(y))[:, 0])


def vit(size: int = 28) -> nn.Module:
    """Patches of 4 x 4 pixels, or 2 x 2 where the image is small; 4 layers, 4 heads of 16."""
    return Transformer(size, max(2, size // 7))


NETS: dict[str, Callable[[], nn.Module]] = {
    "vgg": vgg, "resnet20": resnet20, "mobilenet": mobilenet, "vit": vit,
}  # fmt: skip


def epochs_of(name: str, quick: bool) -> int:
    return SLOW.get(name, QUICK_EPOCHS) if quick else EPOCHS[name]


# --- training ---------------------------------------------------------------------------------


def images_of(spec: str, train: bool) -> tuple[Tensor, Tensor]:
    """All images [N, 1, H, W], normalised, and labels [N]."""
    size = 8 if spec == "digits" else 28
    batches = load_data(spec, torch.zeros(1, 1, size, size), train=train, batch_size=4096)
    assert batches is not None
    xs, ys = zip(*batches, strict=True)
    return torch.cat(xs), torch.cat(ys)


def train(net: nn.Module, x: Tensor, y: Tensor, epochs: int, flip: bool, rate: float) -> None:
    """One cycle of the learning rate; shifts of 2 pixels, mirrored where ``flip``.

    SGD; AdamW for the transformer. In bfloat16 where the processor has it.
    """
    net.train()
    net.to(memory_format=torch.channels_last)
    size = 128 if len(x) > 5000 else 64
    steps = epochs * (len(x) // size)
    if isinstance(net, Transformer):
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(net.parameters(), rate)
    else:
        optimizer = torch.optim.SGD(net.parameters(), rate, 0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.25)
    height, width = x.shape[2:]
    reach = max(1, height // 14)
    half = len(x) > 5000 and has_bfloat16()
    for _ in range(epochs):
        order = torch.randperm(len(x))
        for part in order[: len(x) // size * size].split(size):
            a, b = torch.randint(0, 2 * reach + 1, (2,)).tolist()
            batch = F.pad(x[part], [reach] * 4, value=float(x.min()))
            batch = batch[:, :, a : a + height, b : b + width]
            if flip and torch.rand(()) < 0.5:
                batch = batch.flip(3)
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                out = net(batch.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(out.float(), y[part], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    net.to(memory_format=torch.contiguous_format).eval()


def has_bfloat16() -> bool:
    """Whether the processor computes in bfloat16; elsewhere float32 is ten times faster."""
    found = [
        getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile")
    ]
    return any(is_supported is not None and is_supported() for is_supported in found)


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percent of ``x`` that get their label; eval mode."""
    net.eval()
    right = sum(
        int((net(a).argmax(1) == b).sum()) for a, b in zip(x.split(500), y.split(500), strict=True)
    )
    return 100 * right / len(x)


def trained(name: str, spec: str, epochs: int, cache: Path, x: Tensor, y: Tensor) -> nn.Module:
    """The net with trained weights, from the cache where they are there."""
    torch.manual_seed(0)
    net = vit(x.shape[-1]) if name == "vit" else NETS[name]()
    file = cache / f"{name}-{spec}-{epochs}.safetensors"
    if not file.exists():
        start = time.perf_counter()
        train(net, x, y, epochs, flip=spec != "digits", rate=RATES.get(name, 0.1))
        cache.mkdir(parents=True, exist_ok=True)
        save_file(net.state_dict(), file)
        print(f"{name}: {epochs} epochs in {time.perf_counter() - start:.0f} s", flush=True)
    net.load_state_dict(load_file(file))
    return net.eval()
