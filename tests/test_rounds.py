"""prune(steps=n): one plan of the original, cut directly, gives what the rounds leave."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from checks import counted_macs, counted_params
from oracle import oracle_error, randomise
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune.allocate import bounds
from fxprune.checkpoint import save
from fxprune.cut import cut
from fxprune.errors import BudgetError, SpecError
from fxprune.fitness import KLFitness
from fxprune.isolate import rng_kept
from fxprune.rounds import Near, compose, round_budgets, transplanted
from fxprune.traced import Traced, trace
from fxprune.types import Budget, Cost, PrunePlan


class Conv(nn.Module):
    """A residual stream, a grouped and a depthwise convolution, a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24)
        self.wide, self.depth = nn.Conv2d(24, 48, 1), nn.Conv2d(48, 48, 3, padding=1, groups=48)
        self.narrow = nn.Conv2d(48, 24, 1)
        self.grouped = nn.Conv2d(24, 32, 3, padding=1, groups=4)
        self.head = nn.Linear(32 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.stem(x)))
        y = F.relu(y + self.narrow(F.relu6(self.depth(F.relu6(self.wide(y))))))
        y = F.adaptive_avg_pool2d(F.relu(self.grouped(y)), 2)
        return self.head(y.flatten(1))


class Tokens(nn.Module):
    """A transformer block: heads, head dims and a stream that overlap in the same parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.qkv, self.out = nn.Linear(8, 32), nn.Linear(32, 96), nn.Linear(32, 32)
        self.one, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)
        self.two, self.head = nn.LayerNorm(32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x.flatten(1, 2))
        q, k, v = self.qkv(self.one(y)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        y = y + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y = y + self.down(F.gelu(self.up(self.two(y))))
        return self.head(y.mean(1))


NETS = {"conv": Conv, "tokens": Tokens}


def net(kind: str = "conv") -> nn.Module:
    with rng_kept(0):
        return randomise(NETS[kind]())


def images(n: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(n, 3, 1, 1, generator=g) + torch.randn(n, 3, 8, 8, generator=g)


DATA = [images(16, s) for s in range(4)]


def prune(model: nn.Module, **options: Any) -> fxprune.PruneResult:
    given = {"budget": 0.4, "progress": False, "max_evaluations": 6, "round_to": 1} | options
    return fxprune.prune(model, DATA[0][:1], data=DATA, **given)


def random_plan(traced: Traced, seed: int) -> PrunePlan:
    """Three quarters of the columns of each row, another choice in each."""
    g = np.random.default_rng(seed)
    kept = {}
    for group in traced.groups:
        if group.locked is None:
            count = max(1, group.width * 3 // 4)
            rows = [g.permutation(group.width)[:count] for _ in range(group.rows)]
            kept[group.name] = [r * group.width + c for r, cs in enumerate(rows) for c in cs]
    return traced.plan(kept)


# --- composition ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("seed", range(3))
def test_the_composed_plan_cuts_to_what_the_rounds_leave(kind: str, seed: int) -> None:
    """Shapes and kept channels: cut directly, it has the very weights that the rounds kept."""
    original = trace(net(kind), DATA[0][:1])
    traced, rounds = original, []
    for r in range(3):
        plan = random_plan(traced, 10 * seed + r)
        rounds.append((traced, plan))
        gm = cut(traced, plan)
        traced = trace(gm, DATA[0][:1])
    plan = compose(original, rounds, {})
    direct = cut(original, plan)
    assert plan.kept.keys() == rounds[0][1].kept.keys()
    state = direct.state_dict()
    assert state.keys() == gm.state_dict().keys()
    assert all(torch.equal(v, state[k]) for k, v in gm.state_dict().items())
    torch.testing.assert_close(direct(DATA[0]), gm(DATA[0]))
    assert original.cost(plan) == traced.cost()
    assert oracle_error(original, plan, gm, (DATA[0],)) <= 1e-5
    same = transplanted(original, plan, gm)
    torch.testing.assert_close(same(DATA[0]), gm(DATA[0]))


def test_a_row_that_is_gone_is_filled() -> None:
    """Round 1 removes a head, round 2 dims of the heads that are left."""
    original = trace(net("tokens"), DATA[0][:1])
    heads = next(g for g in original.groups if g.overlaps and g.rows == 1 and g.n == 4)
    first = original.plan({heads.name: [0, 1, 3]})
    second_traced = trace(cut(original, first), DATA[0][:1])
    dims = next(g for g in second_traced.groups if g.rows == 3 and g.locked is None)
    second = second_traced.plan({dims.name: [r * 8 + c for r in range(3) for c in (1, 4, 6)]})
    plan = compose(original, [(original, first), (second_traced, second)], {})
    assert plan.kept[heads.name] == (0, 1, 3)
    whole = next(g for g in original.groups if g.name in heads.overlaps and g.rows == 4)
    assert len(plan.kept[whole.name]) in (12, 8 * 4)
    gm = cut(second_traced, second)
    state = cut(original, plan).state_dict()
    assert all(torch.equal(v, state[k]) for k, v in gm.state_dict().items())


# --- budgets --------------------------------------------------------------------------------------


def test_each_round_takes_the_same_share() -> None:
    cost = Cost(1_000_000, 40_000, 160_000, 5000)
    budgets = round_budgets(Budget(macs=0.25, params="10k"), cost, 2)
    assert budgets == [Budget(macs=500_000, params=20_000), Budget(macs=250_000, params=10_000)]
    found = round_budgets(Budget(macs=0.5, latency="4 ms"), cost, 2)
    assert found[0].latency is None and bounds(found[1])["latency"].value == 4
    for budget in (Budget(latency=0.5, macs=0.5), Budget(latency="4 ms")):
        with pytest.raises(BudgetError, match="rounds"):
            round_budgets(budget, cost, 2)


# --- prune(steps=n) -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NETS)
def test_rounds_end_within_the_budget_of_the_original(kind: str, tmp_path: Path) -> None:
    model = net(kind).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.get_rng_state()
    result = prune(model, steps=3, allocation="uniform")
    assert torch.equal(rng, torch.get_rng_state()) and model.training and result.model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    told = result.report["repair"]["rounds"]
    macs = [result.before.macs, *(r["macs"] for r in told)]
    assert len(told) == 3 and macs == sorted(macs, reverse=True)
    assert 0.3 * result.before.macs < result.after.macs == macs[-1] <= 0.4 * result.before.macs
    small = result.model.eval()
    assert counted_macs(small, (DATA[0][:1],)) == result.after.macs
    assert counted_params(small) == result.after.params
    torch.testing.assert_close(small(DATA[0]), result.graph_module.eval()(DATA[0]))
    save(tmp_path / "run", result.graph_module, result.plan)
    again = fxprune.load(tmp_path / "run", net(kind), DATA[0][:1]).eval()
    torch.testing.assert_close(again(DATA[0]), small(DATA[0]))


def test_cut_alone_in_rounds_equals_the_masked_original() -> None:
    result = prune(net(), steps=2, repair=None, criterion="l1", allocation="uniform")
    assert oracle_error(result.analysis, result.plan, result.graph_module, (DATA[0],)) <= 1e-5


def test_rounds_are_not_further_from_the_original_than_their_repair() -> None:
    result = prune(net(), steps=2, repair="lstsq", allocation="uniform")
    told = result.report["repair"]
    fitness = told["rounds fitness"]
    assert told["kept"] == min(fitness, key=fitness.get)
    held = DATA[-1]
    found = KLFitness(result.analysis, None, [held]).of(result.graph_module.eval())
    assert found == pytest.approx(min(fitness.values()), rel=1e-4)


def test_tuning_between_rounds_is_kept() -> None:
    seen: list[nn.Module] = []

    def tune(model: nn.Module) -> nn.Module:
        new = copy.deepcopy(model)
        with torch.no_grad():
            new.head.bias.fill_(7.0)  # a head's bias has no channel that goes
        seen.append(model)
        return new

    result = prune(net(), steps=3, tune=tune, repair="bn", allocation="uniform")
    assert len(seen) == 2
    assert torch.equal(result.model.head.bias, torch.full((10,), 7.0))


def test_what_guides_later_rounds_can_travel_to_workers() -> None:
    traced = trace(net(), DATA[0][:1])
    near = cloudpickle.loads(cloudpickle.dumps(Near(traced, [(x,) for x in DATA])))
    module = cut(traced, random_plan(traced, 0))
    assert near(module) == pytest.approx(-KLFitness(traced, None, DATA).of(module))
    assert near(lambda x: torch.full((len(x), 10), torch.nan)) == -np.inf
    assert near(traced.graph_module) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("options", "text"),
    [({"steps": 0}, "steps"), ({"steps": 1.5}, "steps"), ({"tune": lambda m: m}, "steps=2")],
)
def test_bad_rounds_are_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises(SpecError, match=text):
        prune(net(), **options)


def test_rounds_of_a_graph_module_are_quiet(capfd: Any) -> None:
    """The second round's model is a graph: fx would print each attempt that fails."""
    with rng_kept(0):
        model = Tokens()
    result = prune(torch.fx.symbolic_trace(model), steps=2, allocation="uniform", criterion="l1")
    assert isinstance(result.model, torch.fx.GraphModule)
    assert capfd.readouterr()[1] == ""
