"""Models that do unusual things in forward: pruned rightly, or locked with a reason.

Each net is traced, cut by random plans and held to the oracle on other data than the example's; the
traced graph gives what the model gives there, too.
"""

from __future__ import annotations

import warnings
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import prunable
from einops import rearrange, reduce
from einops.layers.torch import Rearrange
from oracle import masked_original, oracle_error, random_plan, randomise, relative_error
from torch import Tensor, nn

from fxprune.cut import as_user_class, cut
from fxprune.inputs import Inputs
from fxprune.traced import trace
from fxprune.trees import tensors

with warnings.catch_warnings():
    warnings.simplefilter("ignore")

    @torch.jit.script
    def scripted(x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class Base(nn.Module):
    """Two convolutions of 8 and 12 channels, a pool, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        first = (nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(*first, nn.Conv2d(8, 12, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(12, 4)

    def top(self, y: Tensor) -> Tensor:
        return self.head(y.mean((2, 3)))

    def forward(self, x: Tensor) -> Any:
        return self.top(self.body(x))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...], bool]] = {}
"""name: (how to make it, what stays whole, whether both convolutions can be pruned)"""


def case(*whole: str, free: bool = True) -> Callable[[type[nn.Module]], type[nn.Module]]:
    def add(net: type[nn.Module]) -> type[nn.Module]:
        CASES[net.__name__] = (net, whole, free)
        return net

    return add


@case("forward")
class BranchOnData(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return self.top(y * 2 if y.sum() > 3 else y)


@case("forward")
class EarlyExit(Base):
    def __init__(self) -> None:
        super().__init__()
        self.second, self.exit = nn.Conv2d(12, 12, 3, padding=1), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        sure = self.exit(y.mean((2, 3)))
        if sure.softmax(-1).max() > 0.99:
            return sure
        return self.top(self.second(y))


@case("forward")
class AssertOnData(Base):
    def forward(self, x: Tensor) -> Tensor:
        assert torch.isfinite(x).all(), "not finite"
        return super().forward(x)


@case("forward")
class LoopOnData(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        for _ in range(int(x.abs().max())):
            y = y * 0.9
        return self.top(y)


@case()
class TryExcept(Base):
    def forward(self, x: Tensor) -> Tensor:
        try:
            y = self.body(x.unflatten(1, (2, 2)))
        except RuntimeError:
            y = self.body(x)
        return self.top(y)


@dataclass
class Prediction:
    logits: Tensor
    features: list[Tensor]
    extra: Any = None


@case(free=False)
class DataclassOutput(Base):
    def forward(self, x: Tensor) -> Prediction:
        y = self.body(x)
        return Prediction(self.top(y), [y.mean((2, 3))])


Pair = namedtuple("Pair", "logits features")


@case(free=False)
class NamedTupleOutput(Base):
    def forward(self, x: Tensor) -> Pair:
        y = self.body(x)
        return Pair(self.top(y), y.amax((2, 3)))


class Hidden:
    def __init__(self, features: Tensor) -> None:
        self.features = features


@case()
class ObjectOutput(Base):
    """An object that hides a tensor is no output of the graph."""

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.body(x)
        return {"logits": self.top(y), "state": Hidden(y)}


@case("forward", free=False)
class ObjectOutputWhole(Base):
    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.body(x)
        return {"logits": self.top(-y if y.max() > 1e9 else y), "state": Hidden(y)}


@case()
class Flags(Base):
    def forward(self, x: Tensor, features: bool = False, *, scale: float = 2.0) -> Any:
        y = self.body(x) * scale
        return (self.top(y), y) if features else self.top(y)


@case()
class KeepsState(Base):
    def __init__(self) -> None:
        super().__init__()
        self.cache: Tensor | None = None
        self.log: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.cache = self.body(x)
        self.log.append(self.cache.shape[1])
        return self.top(self.cache)


@case()
class Hooked(Base):
    """Hooks that change values, on leaves and on the root, and one that only looks."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []
        self.body[0].register_forward_hook(lambda m, i, o: o * 2)
        self.body[3].register_forward_pre_hook(lambda m, i: (i[0] * 3,))
        self.body[2].register_forward_hook(lambda m, i, o: self.seen.append(o.shape))
        self.register_forward_hook(lambda m, i, o: o * 4)


@case()
class Checkpointed(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.top(torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False))


@case()
class Autocast(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.body(x)
        with torch.no_grad():
            return self.top(y.float())


@case("scripted()", free=False)
class ScriptedFunction(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.top(scripted(self.body(x)))


@case("act", free=False)
class ScriptedModule(Base):
    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.act = torch.jit.script(nn.Sequential(nn.Conv2d(12, 12, 1), nn.ReLU()))

    def forward(self, x: Tensor) -> Tensor:
        return self.top(self.act(self.body(x)))


@case()
class UnusedParameters(Base):
    def __init__(self) -> None:
        super().__init__()
        self.aux, self.alone = nn.Linear(12, 7), nn.Parameter(torch.randn(5))


@case()
class Fourier(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return self.top(torch.fft.irfft2(torch.fft.rfft2(y) * 0.5, s=y.shape[-2:]))


@case("forward")
class Vmapped(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.top(torch.vmap(lambda a: a * 2)(self.body(x)))


@case("forward")
class ThroughNumpy(Base):
    def forward(self, x: Tensor) -> Tensor:
        scale = torch.from_numpy(x.mean((1, 2, 3)).numpy())
        return self.top(self.body(x)) * scale[:, None]


@case("forward")
class TypeIsTensor(Base):
    def forward(self, x: Tensor) -> Tensor:
        if type(x) is not Tensor:
            raise TypeError("a tensor is needed")
        return super().forward(x)


@case()
class MaskedRows(Base):
    """The number of rows follows from the data, and stays symbolic: len, min, topk."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.body(x).flatten(2).transpose(1, 2).flatten(0, 1)
        out = self.head(y)
        out = out[out.amax(1) > 0.1]
        count = min(40, out.shape[0])
        index = out[:, 0].topk(count)[1]
        return out.sum(0) / max(1, len(out)), out[index]


@case("part", free=False)
class ReadsItsWidth(Base):
    """A number that Python makes of a channel count, where it cannot be rewritten."""

    class Part(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 1e9 else x * x.shape[1] ** -0.5

    def __init__(self) -> None:
        super().__init__()
        self.part = self.Part()

    def forward(self, x: Tensor) -> Tensor:
        return self.top(self.part(self.body(x)))


@case("part", free=False)
class GroupsInside(Base):
    """Grouped convolution, GroupNorm and a shuffle inside a part that is kept whole."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
            self.norm, self.mix = nn.GroupNorm(3, 12), nn.Conv2d(12, 12, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.depthwise(x))
            if y.sum() > 1e9:
                return x
            p, q = self.mix(y).chunk(2, 1)
            return torch.cat([q, p], 1)

    def __init__(self) -> None:
        super().__init__()
        self.part = self.Part()

    def forward(self, x: Tensor) -> Tensor:
        return self.top(self.part(self.body(x)))


class Elsewhere(Base):
    """What the example's way does not show: another layer, channels by number, a fixed count."""

    class Part(nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.kind, self.other = kind, nn.Conv2d(12, 12, 1)
            self.scale = torch.rand(1, 12, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            if x.sum() < 3e3:
                return x
            if self.kind == "layer":
                return self.other(x) * 0.01
            return torch.cat([x[:, 6:], x[:, :6]], 1) if self.kind == "order" else x * self.scale

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.part = self.Part(kind)

    def forward(self, x: Tensor) -> Tensor:
        return self.top(self.part(self.body(x)))


@pytest.mark.parametrize(("kind", "free"), [("layer", True), ("order", False), ("scale", False)])
def test_branches_that_the_example_does_not_take(kind: str, free: bool) -> None:
    torch.manual_seed(0)
    model = randomise(Elsewhere(kind))
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert float(model.body(x).sum()) < 1e3 < 9e4 < float(model.body(x * 1000).sum())
    traced = trace(model, x)
    assert ("body.3.weight:0" in prunable(traced)) is free
    for seed in range(2):
        plan = random_plan(traced, seed, 0.75)
        pruned = cut(traced, plan)
        assert traced.cost(plan).macs < traced.cost().macs
        for data in (x, x * 1000):
            assert oracle_error(traced, plan, pruned, (data,)) <= 1e-5


CASES["double"] = (lambda: Base().double(), (), True)
CASES["bfloat16"] = (lambda: Base().bfloat16(), (), True)
CASES["DataParallel"] = (lambda: nn.DataParallel(Base()), (), True)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_oracle(name: str) -> None:
    make, whole, free = CASES[name]
    torch.manual_seed(0)
    model = randomise(make())
    dtype = next(model.parameters()).dtype
    x, other = (torch.randn(2, 3, 8, 8, dtype=torch.float32).to(dtype) for _ in range(2))
    traced = trace(model, x)
    assert tuple(traced.captured.opaque) == whole
    assert set(whole) <= set(traced.locked) and all(traced.locked.values())
    outputs = {m.rpartition("body.")[2] for m in prunable(traced)}
    assert {"0.weight:0", "3.weight:1"} <= outputs
    assert ("3.weight:0" in outputs) is free
    with torch.no_grad():
        given = tensors(traced.graph_module(other))
        expected = tensors(model(other))
    assert len(given) == len(expected) > 0
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))
    tolerance = {torch.float64: 1e-10, torch.bfloat16: 2e-2}.get(dtype, 1e-5)
    for seed in range(2):
        plan = random_plan(traced, seed, 0.5 if seed else None)
        pruned = cut(traced, plan)
        assert oracle_error(traced, plan, pruned, (other,)) <= tolerance
        small = as_user_class(traced, plan, pruned)
        if small is not None:
            with torch.no_grad():
                actual = small(other)
            assert relative_error(masked_original(traced, plan)(other), actual) <= tolerance


class SampleBySample(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return torch.stack([self.head(y[i].mean((1, 2))) for i in range(len(y))])


class Unbound(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.head(y.mean((1, 2))) for y in self.body(x)])


@pytest.mark.parametrize("make", [SampleBySample, Unbound])
def test_loops_over_the_samples_of_a_batch(make: type[nn.Module]) -> None:
    """A graph has as many steps as the example; this is one for which any other batch counts."""
    model = randomise(make())
    traced = trace(model, torch.randn(2, 3, 8, 8))
    plan = random_plan(traced, 1)
    pruned = cut(traced, plan)
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 8, 8)
        assert oracle_error(traced, plan, pruned, (x,)) <= 1e-5
        assert len(pruned(x)) == batch


@pytest.mark.parametrize("keyword", [False, True])
def test_any_number_of_inputs(keyword: bool) -> None:
    class Many(Base):
        def forward(self, *xs: Tensor, **named: Tensor) -> Tensor:
            parts = [self.body(x) for x in (*xs, *named.values())]
            return self.top(torch.stack(parts).sum(0))

    model = randomise(Many())
    x, y = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    given = {"x": x, "y": y} if keyword else (x, y)
    traced = trace(model, given)
    plan = random_plan(traced, 1)
    pruned = cut(traced, plan)
    assert oracle_error(traced, plan, pruned, (y, x)) <= 1e-5
    small = as_user_class(traced, plan, pruned)
    assert type(small) is Many
    with torch.no_grad():
        assert torch.allclose(Inputs.of(given).call(small), pruned(x, y), atol=1e-6)


def test_einops() -> None:
    """Layers and functions with patterns; heads by rearrange."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            patches = Rearrange("b c (h p) (w q) -> b (h w) (p q c)", p=2, q=2)
            self.embed = nn.Sequential(patches, nn.Linear(12, 16))
            self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
            self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            parts = self.qkv(self.norm(x)).chunk(3, -1)
            q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=4) for t in parts)
            y = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")
            return self.head(reduce(x + self.out(y), "b n d -> b d", "mean"))

    model = randomise(Net())
    traced = trace(model, torch.randn(2, 3, 8, 8))
    assert traced.captured.opaque == {}
    free = prunable(traced)
    assert {"embed.1.weight:0", "qkv.weight:0", "out.weight:1"} <= free
    for seed in range(3):
        plan = random_plan(traced, seed)
        pruned = cut(traced, plan)
        for batch in (2, 3):
            x = torch.randn(batch, 3, 8, 8)
            assert oracle_error(traced, plan, pruned, (x,)) <= 1e-5


def test_an_attention_as_the_whole_model() -> None:
    model = randomise(nn.MultiheadAttention(16, 4, batch_first=True))
    x = torch.randn(2, 5, 16)
    traced = trace(model, (x, x, x))
    assert {"in_proj_weight:0", "out_proj.weight:1"} <= prunable(traced)
    plan = random_plan(traced, 0)
    assert oracle_error(traced, plan, cut(traced, plan), (x, x + 1, x * 2)) <= 1e-5


def test_a_result_that_the_model_keeps_is_no_obstacle() -> None:
    """Modules that hold the result of a forward pass with gradients cannot be deep-copied."""
    model = KeepsState()
    model(torch.randn(2, 3, 8, 8))
    assert model.cache is not None and not model.cache.is_leaf
    kept = model.cache
    trace(model, torch.randn(2, 3, 8, 8))
    assert model.cache is kept and model.log == [12]
