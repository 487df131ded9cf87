"""Random networks: programs of small blocks over images, tokens and vectors.

Images are [N, C, H, W], tokens [N, L, C], vectors [N, C].

A program is data, so the same network can be built again. All choices come from a :class:`Source`:
numpy's generator for long runs, hypothesis for the test suite (which can then shrink a failure).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

T = TypeVar("T")
Options = dict[str, Any]
Shape = tuple[int, ...]
LAYOUT = {4: "image", 3: "tokens", 2: "vector"}
MAX_NUMBERS = 20_000  # of one value: keeps every graph quick


class Source(Protocol):
    """Where choices come from."""

    def integer(self, low: int, high: int) -> int:
        """low <= result <= high"""


@dataclass
class Seeded:
    """Choices from a seed."""

    seed: int
    rng: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)

    def integer(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))


def choose(s: Source, options: Sequence[T]) -> T:
    return options[s.integer(0, len(options) - 1)]


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


class Op(nn.Module):
    """A block; ``offer`` draws its options for an input of a shape, None where it does not fit."""

    takes: ClassVar[str] = "image"
    count: ClassVar[int] = 1  # inputs
    frequency: ClassVar[int] = 1  # how often it is drawn

    @classmethod
    def offer(cls, s: Source, shape: Shape) -> Options | None:
        raise NotImplementedError


OPS: dict[str, type[Op]] = {}


def register(cls: type[Op]) -> type[Op]:
    OPS[cls.__name__] = cls
    return cls


@dataclass(frozen=True)
class Step:
    """``op`` applied to the values numbered ``at``; its result is the next value."""

    op: str
    at: tuple[int, ...]
    options: Options


@dataclass(frozen=True)
class Program:
    """``heads``: values that a last convolution or linear layer makes outputs of."""

    inputs: tuple[Shape, ...]
    steps: tuple[Step, ...]
    heads: tuple[int, ...]

    def example(self, seed: int = 0, batch: int = 2) -> tuple[Tensor, ...]:
        g = torch.Generator().manual_seed(seed)
        return tuple(
            torch.randn(batch, *s[1:], generator=g, dtype=torch.float64) for s in self.inputs
        )

    def build(self, seed: int = 0) -> nn.Module:
        """A fresh instance in float64; its parameters depend on ``seed`` alone."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return Net(self).double()


class Net(nn.Module):
    """The network of a program."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.steps = nn.ModuleList(_made(s, i, program) for i, s in enumerate(program.steps))
        for step, module in zip(program.steps, self.steps, strict=True):
            if step.op == "Again":
                module.inner = self.steps[step.options["which"]]
        self.heads = nn.ModuleList()
        values = self.values([torch.zeros(s) for s in program.inputs])
        for i in program.heads:
            c = values[i].shape[1 if values[i].dim() == 4 else -1]
            self.heads.append(nn.Conv2d(c, 3, 1) if values[i].dim() == 4 else nn.Linear(c, 3))

    def values(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        values = list(inputs)
        for step, module in zip(self.program.steps, self.steps, strict=True):
            values.append(module(*(values[i] for i in step.at)))
        return values

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        values = self.values([x] if y is None else [x, y])
        outputs = [h(values[i]) for h, i in zip(self.heads, self.program.heads, strict=True)]
        return outputs[0] if len(outputs) == 1 else {"outputs": outputs}


def _made(step: Step, index: int, program: Program) -> Op:
    return OPS[step.op](**step.options)


def random_program(s: Source, most: int = 10) -> Program:
    """Draw a program of up to ``most`` blocks."""
    size = choose(s, (4, 8))
    inputs = [(2, s.integer(1, 4), size, size)]
    if s.integer(0, 3) == 0:
        inputs.append((2, 3, size, size))
    values = [torch.zeros(i) for i in inputs]
    steps: list[Step] = []
    fresh = len(inputs)
    for _ in range(s.integer(3, most)):
        step = _draw(s, values, steps, fresh)
        if step is None:
            continue
        try:
            module = Net(Program(tuple(inputs), (*steps, step), ()))
        except _Unfit:
            continue
        with torch.no_grad():
            result = module.values([torch.zeros(i) for i in inputs])[-1]
        if result.shape[-1 if result.dim() < 4 else 1] >= 2 and result.numel() <= MAX_NUMBERS:
            steps.append(step)
            values.append(result)
    last = len(values) - 1
    heads = [last]
    used = {i for st in steps for i in st.at}
    loose = [i for i in range(fresh, last) if i not in used]
    heads += loose[-2:]
    return Program(tuple(inputs), tuple(steps), tuple(heads))


class _Unfit(Exception):
    """A block that was offered does not fit after all."""


def _draw(s: Source, values: list[Tensor], steps: list[Step], fresh: int) -> Step | None:
    """One more block on a value, mostly the last one."""
    at = len(values) - 1 if s.integer(0, 3) else s.integer(0, len(values) - 1)
    shape = tuple(values[at].shape)
    names = [
        n for n, op in OPS.items() if op.takes == LAYOUT[len(shape)] for _ in range(op.frequency)
    ]
    if at < fresh:  # a model input: first a convolution
        names = ["Convolution"]
    name = choose(s, names)
    op = OPS[name]
    inputs = [at]
    if name == "Again":
        same = [
            i
            for i, st in enumerate(steps)
            if st.op in ("Convolution", "Norm", "Residual", "Excite")
            and tuple(values[st.at[0]].shape)[1:] == shape[1:]
        ]
        return Step(name, (at,), {"which": choose(s, same)}) if same else None
    if op.count > 1:
        free = {"Concat": lambda v: v[2:] == shape[2:], "Combine": lambda v: v == shape}[name]
        fits = [i for i, v in enumerate(values) if v.dim() == 4 and free(tuple(v.shape))]
        inputs += [choose(s, fits) for _ in range(op.count - 1)]
        if name == "Combine" and min(inputs) < fresh:
            return None
    options = op.offer(s, shape)
    return None if options is None else Step(name, tuple(inputs), options)


# -- images --------------------------------------------------------------------------------------


@register
class Convolution(Op):
    """Plain, grouped, depthwise, with multiplier, strided, transposed; module or function."""

    frequency = 3

    def __init__(self, i: int, o: int, k: int, groups: int, bias: bool, form: str) -> None:
        super().__init__()
        self.form, self.groups = form, groups
        if form == "transposed":
            self.conv = nn.ConvTranspose2d(i, o, 2, 2, groups=groups, bias=bias)
        elif form == "function":
            self.weight = nn.Parameter(torch.randn(o, i // groups, k, k) / (i * k))
        else:
            stride = 2 if form == "strided" else 1
            self.conv = nn.Conv2d(i, o, k, stride, k // 2, groups=groups, bias=bias)

    @classmethod
    def offer(cls, s: Source, shape: Shape) -> Options:
        i = shape[1]
        form = choose(s, ("plain", "plain", "strided", "transposed", "function"))
        groups = choose(s, (1, 1, *divisors(i)))
        if form == "transposed" and shape[2] > 8:
            form = "plain"
        o = groups * s.integer(1, max(1, 12 // groups)) if groups < i else i * s.integer(1, 2)
        return {
            "i": i, "o": o, "k": choose(s, (1, 3)), "groups": groups,
            "bias": bool(s.integer(0, 1)), "form": form,
        }  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "function":
            k = self.weight.shape[-1]
            return F.conv2d(x, self.weight, padding=k // 2, groups=self.groups)
        return self.conv(x)


@register
class Norm(Op):
    def __init__(self, c: int, kind: str, groups: int) -> None:
        super().__init__()
        self.norm = {
            "batch": lambda: nn.BatchNorm2d(c),
            "group": lambda: nn.GroupNorm(groups, c),
            "instance": lambda: nn.InstanceNorm2d(c, affine=True),
            "prelu": lambda: nn.PReLU(c),
            "layer": lambda: nn.LayerNorm(c),
        }[kind]()
        self.kind = kind

    @classmethod
    def offer(cls, s: Source, shape: Shape) -> Options:
        kind = choose(s, ("batch", "batch", "group", "instance", "prelu", "layer"))
        kind = "batch" if shape[2] == 1 and kind == "instance" else kind
        groups = choose(s, [d for d in divisors(shape[1]) if d * 2 <= shape[1]] or [1])
        return {"c": shape[1], "kind": kind, "groups": groups}

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "layer":
            return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()
        return self.norm(x)


def _written(x: Tensor) -> Tensor:
    x[:, 1:] = x[:, 1:].tanh()
    x[:, :2] += 1
    return x


_ACTIVATIONS = {
    "relu": torch.relu,
    "in place": lambda x: F.relu(x * 1.5, inplace=True),
    "gelu": F.gelu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "pool": lambda x: F.max_pool2d(x, 3, 1, 1),
    "mean pool": lambda x: F.adaptive_avg_pool2d(x, 2),
    "upsample": lambda x: F.interpolate(x, scale_factor=2) if x.shape[2] <= 4 else x,
    "flip": lambda x: x.flip(3),
    "roll": lambda x: torch.roll(x, (1, 1), (2, 3)),
    "pad": lambda x: F.pad(x, (1, 0, 1, 0)),
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "tile": lambda x: x.repeat(1, 2, 1, 1) if x.shape[1] <= 8 else x,
    "interleave": lambda x: x.repeat_interleave(2, 1) if x.shape[1] <= 8 else x,
    "turn": lambda x: x.flip(1),
    "roll channels": lambda x: x.roll(1, 1),
    "softmax": lambda x: x.softmax(1),
    "write": lambda x: _written(x * 1.0),
    "outer": lambda x: x.mean(3, keepdim=True) * x.mean(2, keepdim=True),
}


@register
class Pointwise(Op):
    """Activations and everything that works on each channel alone."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    @classmethod
    def offer(cls, s: Source, shape: Shape) -> Options:
        return {"kind": choose(s, list(_ACTIVATIONS))}

    def forward(self, x: Tensor) -> Tensor:
        return _ACTIVATIONS[self.kind](x)


@register
class Residual(Op):
    def __init__(self, c: int, hidden: int) -> None:
        super().__init__()
        self.p, self.n, self.q = (
            nn.Conv2d(c, hidden, 1),
            nn.BatchNorm2d(hidden),
            nn.Conv2d(hidden, c, 1),
        )

    @classmethod
    def offer(cls, s: Source, shape: Shape) -> Options:
        return {"c": shape[1], "hidden": s.integer(2, 12)}

    def forward(self, x: Tensor) -> Tensor:
        return x + self.q(self.n(self.p(x)).relu())


@register
class Again(Op):
    """An earlier block once more, with the same parameters."""

    inner: Op

    def __init__(self, which: int) -> None:
        super().__init__()
        self.which = which

    @classmethod
    def offer(cls, s: Source, shape: Shape) -> Options | None:
        return None  # drawn by ``_draw``

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@register
class Concat(Op):
    count = 2

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    @classmethod
    def offer(cls, s: Source, shape: Shape) -> Options:
        return {"times": s.integer(1, 2)}

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([x, *[y] * self.times], 1)


@register
class Combine(Op):
    count = 2

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    @classmethod
    def offer(cls, s: Source, shape: Shape) -> Options:
        return {"kind": choose(s, ("add", "gate", "maximum"))}

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.kind == "add":
            return x + y
        return x * y.sigmoid() if self.kind == "gate" else torch.maximum(x, y)


@register
class Split(Op):
    """Unequal parts in another order, halves that meet, slices with steps."""

    def __init__(self, kind: str, at: int) -> None:
        super().__init__()
        self.kind, self.at = kind, at

    @classmethod
    def offer(cls, s: Source, shape: Shape) -> Options | None:
        if shape[1] < 4:
            return None
        kinds = ["parts", "step", "drop", "odd"] + ["halves", "swap", "pass"] * (shape[1] % 2 == 0)
        return {"kind": choose(s, kinds), "at": s.integer(1, shape[1] - 2)}

    def forward(self, x: Tensor) -> Tensor:
        c = x.shape[1]
        if self.kind == "parts":
            p, q = x.split([self.at, c - self.at], 1)
            return torch.cat([q.relu(), p], 1)
        if self.kind == "step":
            return torch.cat([x[:, ::2], x[:, 1::2].sigmoid()], 1)
        if self.kind == "drop":
            return x[:, self.at :]
        if self.kind == "odd":
            return x[:, 1 : c - 1 : 2]
        p, q = x.chunk(2, dim=1)
        if self.kind == "halves":
            return p * q.sigmoid()
        return torch.cat([q, p], 1) if self.kind == "swap" else torch.cat([p, q.relu(), p], 1)


@register
class Shuffle(Op):
    """Channel and pixel shuffles, with literal and with computed sizes."""

    def __init__(self, kind: str, groups: int, shape: Shape) -> None:
        super().__init__()
        self.kind, self.groups, self.shape = kind, groups, shape

    @classmethod
    def offer(cls, s: Source, shape: Shape) -> Options | None:
        c, h = shape[1:3]
        groups = choose(s, divisors(c))
        kinds = ["channel", "literal", "function", "view"]
        kinds += ["unpixel", "depth"] * (h % 2 == 0 and h > 1 and c <= 12)
        kinds += ["pixel"] * (c % 4 == 0 and c > 4 and h <= 8)
        return {"kind": choose(s, kinds), "groups": groups, "shape": tuple(shape[1:])}

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        g = self.groups
        if self.kind == "channel":
            return x.view(b, g, c // g, h, w).transpose(1, 2).reshape(b, -1, h, w)
        if self.kind == "literal":
            c, h, w = self.shape
            return x.reshape(-1, g, c // g, h, w).permute(0, 2, 1, 3, 4).reshape(-1, c, h, w)
        if self.kind == "function":
            return F.channel_shuffle(x, g)
        if self.kind == "view":
            return x.flatten(2).unflatten(1, (g, c // g)).relu().view(b, c, h, w)
        if self.kind == "pixel":
            return F.pixel_shuffle(x, 2)
        if self.kind == "unpixel":
            return F.pixel_unshuffle(x, 2)
        return torch.cat([x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], 1)


@register
class Excite(Op):
    """Gates: squeeze-excite, one channel, a bare parameter, a buffer."""

    def __init__(self, c: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind == "squeeze":
            self.p, self.q = nn.Linear(c, 3), nn.Linear(3, c)
        elif kind == "one":
            self.p = nn.Conv2d(c, 1, 1)
        elif kind == "parameter":
            self.scale = nn.Parameter(1 + torch.rand(c, 1, 1))
        else:
            self.register_buffer("scale", 1 + torch.rand(1, c, 1, 1))

    @classmethod
    def offer(cls, s: Source, shape: Shape) -> Options:
        return {"c": shape[1], "kind": choose(s, ("squeeze", "one", "parameter", "buffer"))}

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "squeeze":
            gate = self.q(self.p(x.mean((2, 3))).relu()).sigmoid()
            return x * gate.view(x.shape[0], x.shape[1], 1, 1)
        return x * self.p(x).sigmoid() if self.kind == "one" else x * self.scale
