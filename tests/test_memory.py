"""Peak activation memory: of any plan, equal to what the really cut graph holds while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from oracle import random_plan
from patterns_attention import FusedReshape, PackedAttention
from patterns_flow import Detector
from test_patterns import CASES  # every file of patterns has registered its own
from torch import Tensor, fx, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fxprune.cut import cut
from fxprune.traced import trace


class Held(TorchDispatchMode):
    """Every storage that an op makes, for as long as something holds it."""

    def __init__(self, own: Sequence[Tensor]) -> None:
        super().__init__()
        self.own = {t.untyped_storage()._cdata for t in own}
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def see(self, value: Any) -> None:
        for t in tree_leaves(value):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in self.own:
                s = t.untyped_storage()
                self.storages.setdefault(s._cdata, (StorageWeakRef(s), s.nbytes()))

    def sample(self) -> None:
        gone = [k for k, (weak, _) in self.storages.items() if weak.expired()]
        for k in gone:
            del self.storages[k]
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.see(out)
        return out


class NodeByNode(fx.Interpreter):
    """Looks at what is held at the end of every node, before dead values are dropped."""

    def __init__(self, gm: fx.GraphModule, held: Held) -> None:
        super().__init__(gm)
        self.held = held

    def run_node(self, n: fx.Node) -> Any:
        for unread in [m for m in self.env if not m.users]:  # the generated code drops these too
            del self.env[unread]
        value = super().run_node(n)
        self.held.sample()
        return value


def measured_peak(gm: fx.GraphModule, inputs: Sequence[Any]) -> int:
    held = Held([*gm.parameters(), *gm.buffers()])
    held.see(list(inputs))
    with torch.no_grad(), held:
        NodeByNode(gm, held).run(*inputs)
    return held.peak


class Branches(nn.Module):
    """A long skip, in-place activations, views that keep a large value alive, a concat, a stem."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.bn = nn.BatchNorm2d(24)
        self.a = nn.Conv2d(24, 40, 3, padding=1, stride=2)
        self.b = nn.Conv2d(40, 16, 1)
        self.c = nn.Conv2d(24, 16, 3, padding=1, stride=2)
        self.d = nn.Conv2d(12, 5, 1)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.bn(self.stem(x)))
        left = x.chunk(2, dim=1)[0]
        skip = self.c(x)
        y = nn.functional.relu(self.b(self.a(x)), inplace=True)
        y = torch.cat([y, skip], 1)
        return self.head(y.mean((2, 3))) + self.d(left).mean((2, 3))


NETS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "branches": (Branches, (2, 3, 16, 16)),
    "detector": (Detector, (2, 3, 8, 8)),
    "grouped": (lambda: CASES["ShuffleUnit"].build(), (2, 3, 8, 8)),
    "transposed": (lambda: CASES["Transposed"].build(), (2, 3, 8, 8)),
    "attention": (FusedReshape, (2, 9, 16)),
    "packed attention": (PackedAttention, (2, 9, 16)),
}


@pytest.mark.parametrize("name", NETS)
def test_the_peak_is_what_the_cut_graph_holds(name: str) -> None:
    build, shape = NETS[name]
    torch.manual_seed(0)
    traced = trace(build(), torch.randn(*shape))
    plans = [traced.full_plan(), *(random_plan(traced, seed) for seed in range(12))]
    counts = np.stack([traced.counts(p) for p in plans])
    predicted = traced.costs.measure(counts, ["memory"])[:, 0]
    for plan, peak in zip(plans, predicted, strict=True):
        assert peak == measured_peak(cut(traced, plan), traced.example_inputs)
        assert traced.cost(plan).memory == peak
    assert (len(set(predicted.tolist())) > 1) == (name != "detector"), "its peak is in the head"


@pytest.mark.parametrize("name", [n for n in list(CASES)[::2] if n != "ControlFlowOnData"])
def test_odd_nets(name: str) -> None:
    torch.manual_seed(0)
    traced = trace(CASES[name].build().double(), CASES[name].example())
    for seed in (1, 2):
        plan = random_plan(traced, seed)
        peak, told = measured_peak(cut(traced, plan), traced.example_inputs), traced.cost(plan)
        single = any(len(k) == 1 for k in plan.kept.values())  # a copy may become a view
        assert told.memory == peak or (single and told.memory > peak)


def test_closed_form() -> None:
    """3x3 convolution 3 -> k on 8x8, in-place relu, 1x1 convolution k -> 2; batch 4, float64."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(16, 2, 1)
    ).double()
    traced = trace(model, torch.zeros(4, 3, 8, 8, dtype=torch.float64))
    (group,) = [g for g in traced.groups if g.locked is None]
    for k in (1, 5, 16):
        plan = traced.plan({group.name: range(k)})
        assert traced.cost(plan).memory == 4 * 64 * 8 * (3 + k + 2)


def test_the_model_is_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(2, 3, 8, 8)
    traced = trace(model, x)
    rng = torch.get_rng_state()
    assert traced.cost().memory > 0
    assert torch.equal(rng, torch.get_rng_state()) and model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
