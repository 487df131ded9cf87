"""Sequential least squares against closed forms, and against the one-shot form where it must win.

Legend for shapes: B samples, T tokens, C channels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxprune.cut import cut
from fxprune.errors import DataError
from fxprune.observe import observe
from fxprune.pipeline import prune
from fxprune.renorm import RepairReport
from fxprune.repair import LeastSquares
from fxprune.sequential import best_form, live_profile, repair_sequential
from fxprune.traced import Traced, trace
from fxprune.types import ChannelGroup, PrunePlan

TINY = 1e-13  # a ridge that is all but none


def data(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(build: Callable[[], nn.Module], *shape: int) -> tuple[nn.Module, Traced]:
    torch.manual_seed(0)
    model = build().double().eval()
    return model, trace(model, torch.zeros(*shape, dtype=torch.float64))


def group_of(traced: Traced, param: str, dim: int = 0) -> ChannelGroup:
    (found,) = [
        g
        for g in traced.groups
        if g.locked is None and any((m.param, m.dim) == (param, dim) for m in g.members)
    ]
    return found


def without(traced: Traced, gone: dict[str, tuple[int, ...]]) -> PrunePlan:
    """Weight name -> its outputs that go."""
    kept = {}
    for param, indices in gone.items():
        group = group_of(traced, param)
        kept[group.name] = tuple(i for i in range(group.n) if i not in indices)
    return PrunePlan(kept)


def mixed(layer: nn.Module, row: int, sources: dict[int, float]) -> None:
    """Make output ``row`` of a layer a linear combination of other outputs."""
    with torch.no_grad():
        for t in (layer.weight, layer.bias):
            if t is not None:
                t[row] = sum(a * t[i] for i, a in sources.items())


def error(model: nn.Module, small: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        want, got = model(x), small(x)
    return float((got - want).norm() / want.norm())


def repaired(
    traced: Traced, plan: PrunePlan, x: Tensor, ridge: float = TINY
) -> tuple[fx.GraphModule, RepairReport]:
    small = cut(traced, plan)
    return small, repair_sequential(traced, plan, small, list(x.split(7)), ridge=ridge)


def stacked_linear() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 7), nn.Linear(7, 4))


def stacked_conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, bias=False), nn.Conv2d(8, 7, 3), nn.Conv2d(7, 4, 3, stride=2)
    )


def flattened() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 8, 1, bias=False), nn.Conv2d(8, 7, 1), nn.Flatten(), nn.Linear(7 * 16, 4)
    )


def transposed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, bias=False), nn.Conv2d(8, 7, 1), nn.ConvTranspose2d(7, 4, 3, stride=2)
    )


def functional() -> nn.Module:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("0", nn.Conv1d(2, 8, 3, bias=False))
            self.add_module("1", nn.Conv1d(8, 7, 3))
            self.weight = nn.Parameter(torch.randn(4, 7, 3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.get_submodule("1")(self.get_submodule("0")(x))
            return F.conv1d(x, self.weight, padding=1, stride=2)

    return Functional()


def tokens() -> nn.Module:
    """Linear layers on [B, T, C] with a normalisation that keeps what is linear linear."""
    return nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 7), nn.Linear(7, 4, bias=False))


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (stacked_linear, (5,)),
        (stacked_conv, (2, 9, 9)),
        (flattened, (2, 4, 4)),
        (transposed, (2, 7, 7)),
        (functional, (2, 9)),
        (tokens, (6, 5)),
    ],
)
def test_combinations_are_recovered_through_two_layers(
    build: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    model, traced = make(build, 2, *shape)
    first, second = model.get_submodule("0"), model.get_submodule("1")
    mixed(first, 2, {0: 0.5, 3: -1.5})
    mixed(first, 4, {1: 2.0, 5: 0.3})
    mixed(second, 6, {0: 1.0, 2: -0.7})
    plan = without(traced, {"0.weight": (2, 4), "1.weight": (6,)})
    x = data(40, *shape)
    small, report = repaired(traced, plan, x)
    assert len(report.repaired) == 2
    assert error(model, small, x) < 1e-6
    assert error(model, cut(traced, plan), x) > 1e-2


class Grouped(nn.Module):
    """A grouped convolution with other sources in each group, then a depthwise one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 8, 3, bias=False)
        self.second = nn.Conv2d(8, 6, 3, groups=2)
        self.third = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x)))


def test_a_grouped_convolution_is_recovered_group_by_group() -> None:
    model, traced = make(Grouped, 1, 2, 6, 6)
    mixed(model.first, 1, {0: 1.0, 2: -1.0})
    mixed(model.first, 5, {4: 0.5, 7: 2.0})
    (group,) = [
        g
        for g in traced.groups
        if g.locked is None
        and not g.name.endswith("rows")
        and any(m.param == "first.weight" for m in g.members)
    ]
    use = next(u for u in group.uses if u.consumer.startswith("second"))
    gone = [i for i, row in enumerate(use.index) if set(row.tolist()) & {1, 5}]
    plan = PrunePlan({group.name: tuple(i for i in range(group.n) if i not in gone)})
    x = data(20, 2, 6, 6)
    small, _ = repaired(traced, plan, x)
    assert error(model, small, x) < 1e-6


class Stream(nn.Module):
    """Two blocks write into one residual stream, which three consumers read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 8)
        self.up1, self.down1 = nn.Linear(8, 12), nn.Linear(12, 8)
        self.up2, self.down2 = nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.down1(self.up1(x).relu())
        x = x + self.down2(self.up2(x).relu())
        return self.head(x)


def test_a_residual_stream_is_recovered_by_all_of_its_readers() -> None:
    model, traced = make(Stream, 2, 5)
    for layer in (model.stem, model.down1, model.down2):
        mixed(layer, 3, {0: 1.5, 6: -1.0})
    plan = without(traced, {"stem.weight": (3,)})
    x = data(120, 5)
    small, report = repaired(traced, plan, x)
    assert {"up1:0", "up2:0", "head:0"} <= set(report.repaired)
    assert error(model, small, x) < 1e-6


class Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv1d(2, 6, 1), nn.Conv1d(2, 5, 3, padding=1)
        self.last = nn.Conv1d(11, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.left(x), self.right(x)], 1))


def test_a_concatenation_is_recovered_from_both_parts() -> None:
    """A channel of one branch that is made of the other's."""
    model, traced = make(Joined, 1, 2, 7)
    with torch.no_grad():
        model.left.weight[2] = 2 * model.left.weight[0]
        model.left.bias[2] = 0.7
        model.right.weight[1] = 0
        model.right.weight[1, :, 1] = model.left.weight[4, :, 0]
    plan = without(traced, {"left.weight": (2,), "right.weight": (1,)})
    x = data(30, 2, 7)
    small, _ = repaired(traced, plan, x)
    assert error(model, small, x) < 1e-6


def test_the_weights_are_those_of_direct_regressions() -> None:
    """A second implementation: numpy least squares, layer after layer."""

    def build() -> nn.Module:
        return nn.Sequential(
            nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3)
        )

    model, traced = make(build, 2, 5)
    plan = without(traced, {"0.weight": (1, 4), "2.weight": (0, 5)})
    x = data(60, 5)
    small, _ = repaired(traced, plan, x)
    a, b = [0, 2, 3, 5, 6, 7], [1, 2, 3, 4, 6]
    with torch.no_grad():
        hidden = torch.tanh(model[0](x))
        second = model[2](hidden).numpy()
        want = model[4](torch.tanh(model[2](hidden))).numpy()
    design = np.c_[hidden.numpy()[:, a], np.ones(60)]
    inner, *_ = np.linalg.lstsq(design, second, rcond=None)
    design = np.c_[np.tanh(design @ inner)[:, b], np.ones(60)]
    outer, *_ = np.linalg.lstsq(design, want, rcond=None)
    new = {n: p.detach().numpy() for n, p in small.named_parameters()}
    assert np.allclose(new["2.weight"], inner[:-1, b].T, atol=1e-7)
    assert np.allclose(new["2.bias"], inner[-1, b], atol=1e-7)
    assert np.allclose(new["4.weight"], outer[:-1].T, atol=1e-7)
    assert np.allclose(new["4.bias"], outer[-1], atol=1e-7)


def test_without_a_bias_the_fit_is_about_zero() -> None:
    model, traced = make(
        lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4, bias=False)), 2, 5
    )
    plan = without(traced, {"0.weight": (3,)})
    x = data(40, 5)
    small, report = repaired(traced, plan, x)
    (reason,) = report.skipped.values()
    assert "no bias" in reason
    assert len(report.repaired) == 1
    with torch.no_grad():
        hidden = model[0](x).relu().numpy()
        want = model(x).numpy()
    direct, *_ = np.linalg.lstsq(np.delete(hidden, 3, 1), want, rcond=None)
    assert np.allclose(dict(small.named_parameters())["2.weight"].detach(), direct.T, atol=1e-7)


def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """Four layers with batch normalisation, fitted to a function; calibration, held-out inputs."""
    torch.manual_seed(3)
    layers: list[nn.Module] = []
    for a, b in [(2, 16), (16, 16), (16, 16)]:
        layers += [nn.Conv1d(a, b, 3, padding=1, bias=False), nn.BatchNorm1d(b), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Conv1d(16, 6, 1), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    x = data(600, 2, 12, seed=5).float()
    x = x + 0.7 * torch.cumsum(x, 2)
    y = torch.cat([x.amax(2), x.std(2), (x * x.roll(1, 2)).mean(2)], 1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for part in torch.randint(0, 400, (150, 64)):
        optimizer.zero_grad()
        F.mse_loss(model(x[part]), y[part]).backward()
        optimizer.step()
    return model.eval(), x[:400], x[400:]


def test_held_out_error_is_not_above_the_one_shot_form() -> None:
    model, calibration, held_out = trained()
    traced = trace(model, calibration[:2])
    plan = without(traced, {f"{i}.weight": tuple(range(0, 16, 2)) for i in (0, 3, 6)})
    batches = list(calibration.split(100))
    once = cut(traced, plan)
    LeastSquares(traced, observe(traced, batches, gamma=0.0)).apply(plan, once)
    small = cut(traced, plan)
    report = repair_sequential(traced, plan, small, batches)
    assert len(report.repaired) == 3
    assert not report.skipped
    raw = error(model, cut(traced, plan), held_out)
    assert error(model, small, held_out) < error(model, once, held_out) < raw


def test_everything_else_stays_as_it_was() -> None:
    model, calibration, _ = trained()
    model.train()
    model[1].eval()
    modes = [m.training for m in model.modules()]
    state = copy.deepcopy(model.state_dict())
    batches = [calibration.clone()]
    traced = trace(model, calibration[:2])
    plan = without(traced, {"0.weight": (0, 1, 2)})
    small = cut(traced, plan)
    rng, threads = torch.get_rng_state(), torch.get_num_threads()
    untouched = copy.deepcopy(small.state_dict())
    repair_sequential(traced, plan, small, batches)
    assert torch.equal(rng, torch.get_rng_state())
    assert threads == torch.get_num_threads()
    assert modes == [m.training for m in model.modules()]
    assert not any(m.training for m in small.modules())
    assert torch.equal(batches[0], calibration)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    changed = {n for n, t in small.state_dict().items() if not torch.equal(t, untouched[n])}
    assert "0.weight" not in changed
    assert {"3.weight", "4.running_mean"} <= changed
    once = copy.deepcopy(small.state_dict())
    repair_sequential(traced, plan, small, batches)  # from the original's weights: the same again
    assert all(torch.equal(t, once[n]) for n, t in small.state_dict().items())


def test_the_full_plan_changes_nothing_and_no_data_is_an_error() -> None:
    model, traced = make(stacked_conv, 1, 2, 9, 9)
    full = cut(traced, PrunePlan({}))
    report = repair_sequential(traced, PrunePlan({}), full, [data(5, 2, 9, 9)], ridge=0.1)
    assert report == RepairReport((), {})
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in full.state_dict().items())
    with pytest.raises(DataError, match="no sample"):
        repair_sequential(traced, PrunePlan({}), full, [])


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.head(x + self.shared(x) + self.shared(x.tanh()))


def test_what_cannot_be_treated_says_why_and_stays() -> None:
    _, traced = make(Twice, 1, 5)
    plan = without(traced, {"first.weight": (1,)})
    small = cut(traced, plan)
    before = small.get_submodule("shared").weight.clone()
    report = repair_sequential(traced, plan, small, [data(30, 5)])
    assert "more than once" in report.skipped["shared:0"]
    assert report.repaired == ("head:0",)
    assert torch.equal(before, small.get_submodule("shared").weight)


def test_nodes_that_write_to_what_they_read_are_known() -> None:
    """What a node gives is kept for when it is passed, but not where its input is another then."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            z = y.relu_()
            y[:, 0] = 0
            return self.last(z + y)

    _, traced = make(Net, 2, 5)
    profile = live_profile(traced.graph_module, (data(2, 5),))
    names = {n.name for n in traced.graph_module.graph.nodes if n.op != "output"}
    assert sorted(names - profile.harmless) == ["relu_", "setitem"]


def test_samples_follow_the_memory_that_is_allowed() -> None:
    """Between two nodes a sample holds at most the 6 doubles of the hidden layer, in each model."""
    model, traced = make(lambda: nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 4)), 1, 5)
    batch = data(30, 5)
    profile = live_profile(traced.graph_module, (batch,)).held
    assert max(profile.values()) == 6 * 8
    plan = without(traced, {"0.weight": (3,)})
    allowed, first = cut(traced, plan), cut(traced, plan)
    repair_sequential(traced, plan, allowed, [batch], ridge=TINY, max_bytes=12 * 2 * 6 * 8)
    spread = batch[torch.arange(12) * 30 // 12]
    repair_sequential(traced, plan, first, [spread], ridge=TINY)
    assert torch.equal(allowed.get_submodule("1").weight, first.get_submodule("1").weight)
    assert model[1].weight.shape == (4, 6)


def test_the_better_form_is_kept() -> None:
    """Whatever the measure says; the winner's weights are in the module, the report says which."""

    def middle(a: dict[str, Tensor], b: dict[str, Tensor], name: str) -> Tensor:
        return (a[name] + b[name]) / 2 if a[name].is_floating_point() else a[name]

    _, calibration, _ = trained()
    traced = trace(trained()[0], calibration[:2])
    plan = without(traced, {"0.weight": (0, 1, 2), "3.weight": (4, 5)})
    once = LeastSquares(traced, observe(traced, [calibration], gamma=0.0))
    for values in ((1.0, 2.0, 3.0), (3.0, 1.0, 2.0), (3.0, 2.0, 1.0)):
        module = cut(traced, plan)
        seen: list[dict[str, Tensor]] = []

        def measure(m: fx.GraphModule, values: tuple = values, seen: list = seen) -> float:
            seen.append(copy.deepcopy(m.state_dict()))
            return values[len(seen) - 1]

        outcome = best_form(traced, plan, module, once, [calibration], measure)
        assert outcome.fitness == dict(zip(("one-shot", "sequential", "mean"), values, strict=True))
        assert outcome.form == min(outcome.fitness, key=lambda f: outcome.fitness[f])
        chosen = seen[values.index(1.0)]
        assert all(torch.equal(t, chosen[n]) for n, t in module.state_dict().items())
        assert all(torch.allclose(t, middle(*seen[:2], n)) for n, t in seen[2].items())


def test_prune_reports_the_form() -> None:
    model, calibration, _ = trained()
    result = prune(
        model, calibration[:2], 0.5, [calibration], allocation="uniform", round_to=1, progress=False
    )
    repair = result.report["repair"]
    assert repair["form"] in ("sequential", "one-shot", "mean")
    best = min(repair["fitness"], key=repair["fitness"].get)
    assert repair["form"] == best


def test_a_repair_is_not_worse_than_none_on_new_samples() -> None:
    """Three samples for eight channels of noise: what they say does not hold for others."""
    model, traced = make(
        lambda: nn.Sequential(nn.Linear(40, 10), nn.Tanh(), nn.Linear(10, 3)), 1, 40
    )
    plan = without(traced, {"0.weight": (2, 7)})
    small = cut(traced, plan)
    repair_sequential(
        traced, plan, small, [data(3, 40)], held_out=[data(60, 40, seed=2)], correct=False
    )
    wild = cut(traced, plan)
    repair_sequential(traced, plan, wild, [data(3, 40)], ridge=TINY, correct=False)
    x = data(500, 40, seed=3)
    assert error(model, small, x) < 1.02 * error(model, cut(traced, plan), x)
    assert error(model, small, x) < error(model, wild, x)
