"""What makes replayed candidates cheap: memory format, normalisations inside weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from oracle import random_plan, randomise
from torch import Tensor, fx, nn

from fxprune.cut import Walked, cut
from fxprune.formats import channels_last
from fxprune.fused import Fused
from fxprune.products import evaluating
from fxprune.renorm import SideBySide
from fxprune.traced import trace


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=2, bias=False)
        self.na, self.nb = nn.BatchNorm2d(8), nn.BatchNorm2d(8, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.na(self.a(x)))
        return self.nb(self.b(x)).mean((2, 3))


class Viewed(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.na(self.a(x)).view(len(x), -1)


class Strided(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * x.stride()[1]


class Shared(Plain):
    """A normalisation that runs twice, and a convolution that is read twice."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.na(self.a(x))
        y = self.b(x)
        return self.nb(y).mean((2, 3)) + y.mean((2, 3)) + self.na(x).mean((2, 3))


def made(kind: type[nn.Module]) -> tuple[fx.GraphModule, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(3, 3, 6, 6, dtype=torch.float64)
    return trace(randomise(kind().double()).eval(), x).graph_module, x


@pytest.mark.parametrize(("kind", "taken"), [(Plain, True), (Viewed, False), (Strided, False)])
def test_channels_last_where_the_model_gives_the_same(kind: type[nn.Module], taken: bool) -> None:
    module, x = made(kind)
    state = torch.get_rng_state()
    (found,), (held,) = channels_last(module, [(x,), (x[:1],)])
    for t, given in ((found, x), (held, x[:1])):
        assert t.is_contiguous(memory_format=torch.channels_last) == taken
        assert torch.equal(t, given)
        with torch.no_grad():
            torch.testing.assert_close(module(t), module(given), rtol=1e-12, atol=1e-12)
    assert torch.equal(torch.get_rng_state(), state) and x.is_contiguous()


def test_other_tensors_stay_the_same_objects() -> None:
    module, x = made(Plain)
    given = (torch.ones(2, 3, 4, 4, dtype=torch.long), x[0], 3)
    found = channels_last(module, [given])[0]
    assert all(a is b for a, b in zip(found, given, strict=True))


def run(
    kind: type[SideBySide], module: fx.GraphModule, inputs: Sequence[tuple[Any, ...]]
) -> list[Any]:
    with evaluating(module):
        walk = kind(module, inputs)
        for node in module.graph.nodes:
            if node.op == "output":
                return [env[node.args[0]] for env in walk.envs]
            for i in range(len(inputs)):
                walk.step(node, i)
    raise AssertionError("a graph without an output")


@pytest.mark.parametrize(("kind", "pairs"), [(Plain, 2), (Shared, 0)])
def test_fused_convolutions_give_the_same_and_leave_the_weights(
    kind: type[nn.Module], pairs: int
) -> None:
    module, x = made(kind)
    before = {k: t.clone() for k, t in module.state_dict().items()}
    assert len(Fused(module, [(x,)]).norms) == pairs
    found, wanted = (run(k, module, [(x,), (x[:2] + 1,)]) for k in (Fused, SideBySide))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(t, before[k]) for k, t in module.state_dict().items())


def test_a_convolution_with_a_hook_is_left_alone() -> None:
    module, x = made(Plain)
    seen: list[int] = []
    hook = module.get_submodule("a").register_forward_hook(lambda *_: seen.append(1))
    assert [n.name for n in Fused(module, [(x,)]).norms] == ["b"]
    run(Fused, module, [(x,)])
    hook.remove()
    assert seen == [1]


def test_a_walked_graph_is_the_same_graph_without_code() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    traced = trace(randomise(Plain().double()).eval(), x)
    plan = random_plan(traced, 1)
    walked, called = cut(traced, plan, Walked), cut(traced, plan)
    assert [str(n) for n in walked.graph.nodes] == [str(n) for n in called.graph.nodes]
    torch.testing.assert_close(run(SideBySide, walked, [(x,)])[0], called(x))
