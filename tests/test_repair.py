"""Repair against closed forms: what can be recovered exactly has to be."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune.cut import cut
from fxprune.errors import DataError
from fxprune.moments import Moments
from fxprune.observe import observe
from fxprune.renorm import some
from fxprune.repair import LeastSquares, repair_bn, repair_lstsq, solve
from fxprune.traced import Traced, trace
from fxprune.types import ChannelGroup, PrunePlan


def data(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def group_of(traced: Traced, param: str, dim: int = 0) -> ChannelGroup:
    (found,) = [
        g
        for g in traced.groups
        if g.locked is None and any((m.param, m.dim) == (param, dim) for m in g.members)
    ]
    return found


def without(group: ChannelGroup, *gone: int) -> PrunePlan:
    return PrunePlan({group.name: tuple(i for i in range(group.n) if i not in gone)})


def make(build: Callable[[], nn.Module], *shape: int) -> tuple[nn.Module, Traced]:
    torch.manual_seed(0)
    model = build().double().eval()
    return model, trace(model, torch.zeros(*shape, dtype=torch.float64))


def mixed(weight: Tensor, bias: Tensor | None, row: int, sources: dict[int, float]) -> None:
    """Make output ``row`` a linear combination of other rows."""
    with torch.no_grad():
        weight[row] = sum(a * weight[i] for i, a in sources.items())
        if bias is not None:
            bias[row] = sum(a * bias[i] for i, a in sources.items())


def repaired_error(model: nn.Module, traced: Traced, plan: PrunePlan, x: Tensor) -> float:
    """Relative error of the repaired output, all but exact ridge."""
    small = cut(traced, plan)
    statistics = observe(traced, list(x.split(7)), gamma=0.0, displacement=False)
    report = LeastSquares(traced, statistics, ridge=1e-13).apply(plan, small)
    assert report.repaired
    assert not report.skipped
    with torch.no_grad():
        want, got = model(x), small(x)
    return float((got - want).norm() / want.norm())


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 4))


def convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 6, 3, bias=False), nn.Conv2d(6, 4, 3, padding=1), nn.ReLU())


def transposed() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 6, 1, bias=False), nn.ConvTranspose2d(6, 4, 3, stride=2))


def flattened() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 6, 1, bias=False), nn.Flatten(), nn.Linear(6 * 16, 4))


def pooled() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 6, 1), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 8), nn.ReLU()
    )


CASES = [
    (linear, (1, 5)),
    (convolution, (1, 2, 6, 6)),
    (transposed, (1, 2, 4, 4)),
    (flattened, (1, 2, 4, 4)),
    (pooled, (1, 2, 4, 4)),
]


@pytest.mark.parametrize(("build", "shape"), CASES)
def test_a_combination_of_kept_channels_is_recovered(
    build: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    model, traced = make(build, *shape)
    first = model[0]
    mixed(first.weight, first.bias, 2, {0: 0.5, 3: -1.5})
    mixed(first.weight, first.bias, 4, {1: 2.0, 5: 0.3})
    plan = without(group_of(traced, "0.weight"), 2, 4)
    assert repaired_error(model, traced, plan, data(40, *shape[1:])) < 1e-6


class Grouped(nn.Module):
    """Grouped convolution, two groups; its input channels are tied over the groups."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 8, 3, bias=False)
        self.second = nn.Conv2d(8, 6, 3, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_grouped_convolution_is_recovered_group_by_group() -> None:
    """The sources differ from group to group, so one regression for both would not do."""
    model, traced = make(Grouped, 1, 2, 6, 6)
    mixed(model.first.weight, None, 1, {0: 1.0, 2: -1.0})
    mixed(model.first.weight, None, 5, {4: 0.5, 7: 2.0})
    (group,) = [g for g in traced.groups if g.locked is None and not g.name.endswith("rows")]
    (use,) = group.uses
    gone = [i for i, row in enumerate(use.index) if set(row.tolist()) & {1, 5}]
    plan = without(group, *gone)
    assert repaired_error(model, traced, plan, data(20, 2, 6, 6)) < 1e-6


def test_a_constant_channel_moves_into_the_bias() -> None:
    model, traced = make(linear, 1, 5)
    with torch.no_grad():
        model[0].weight[3] = 0
        model[0].bias[3] = 7.0
    plan = without(group_of(traced, "0.weight"), 3)
    assert repaired_error(model, traced, plan, data(40, 5)) < 1e-9


def test_a_constant_channel_moves_into_the_running_mean() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4))

    model, _ = make(build, 2, 5)
    with torch.no_grad():
        model[0].weight[3] = 0
        model[0].bias[3] = 7.0
        model[2].running_mean.copy_(data(4))
    traced = trace(model, torch.zeros(2, 5, dtype=torch.float64))
    mean = model[2].running_mean.clone()
    plan = without(group_of(traced, "0.weight"), 3)
    assert repaired_error(model, traced, plan, data(40, 5)) < 1e-9
    assert torch.equal(model[2].running_mean, mean)


class Padded(nn.Module):
    """A module that only calls F.conv2d: its padding is known from the op itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6, 3, 3))
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, padding=1)


@pytest.mark.parametrize("second", [lambda: nn.Conv2d(6, 4, 3, padding=1), Padded])
def test_the_mean_is_right_at_zero_padding_too(second: Callable[[], nn.Module]) -> None:
    """At 3x3 positions a 3x3 kernel meets padding at half of its taps' places."""
    model, _ = make(lambda: nn.Sequential(nn.Conv2d(2, 6, 1), second()), 1, 2, 3, 3)
    with torch.no_grad():
        model[0].weight[3] = 0
        model[0].bias[3] = 7.0
    traced = trace(model, torch.zeros(1, 2, 3, 3, dtype=torch.float64))
    x = data(20, 2, 3, 3)
    plan = without(group_of(traced, "0.weight"), 3)
    small = cut(traced, plan)
    statistics = observe(traced, [x], gamma=0.0)
    LeastSquares(traced, statistics, ridge=1e-13).apply(plan, small)
    with torch.no_grad():
        want, got = model(x).mean((0, 2, 3)), small(x).mean((0, 2, 3))
    assert torch.allclose(got, want, atol=1e-9)


def test_without_a_place_for_the_mean_it_says_so() -> None:
    model, traced = make(lambda: nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 4, bias=False)), 1, 5)
    statistics = observe(traced, [data(40, 5)])
    plan = without(group_of(traced, "0.weight"), 3)
    report = repair_lstsq(traced, plan, cut(traced, plan), statistics)
    (reason,) = report.skipped.values()
    assert "no bias" in reason
    assert len(report.repaired) == 1
    assert model[1].bias is None


def test_the_weights_are_those_of_a_direct_regression() -> None:
    """A second implementation: numpy least squares on the activations of the kept channels."""
    model, traced = make(
        lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4), nn.Linear(4, 3)), 1, 5
    )
    x = data(50, 5)
    kept = [0, 2, 3, 6]
    inner, outer = group_of(traced, "0.weight"), group_of(traced, "2.weight")
    plan = PrunePlan({inner.name: tuple(kept), outer.name: (0, 1, 3)})
    small = cut(traced, plan)
    statistics = observe(traced, [x], gamma=0.0)
    LeastSquares(traced, statistics, ridge=1e-12).apply(plan, small)
    with torch.no_grad():
        hidden = model[1](model[0](x))
        want = model[2](hidden).numpy()
    design = np.c_[hidden.numpy()[:, kept], np.ones(50)]
    direct, *_ = np.linalg.lstsq(design, want, rcond=None)
    new = dict(small.named_parameters())
    rows = [0, 1, 3]
    assert np.allclose(new["2.weight"].detach().numpy(), direct[:-1, rows].T, atol=1e-7)
    assert np.allclose(new["2.bias"].detach().numpy(), direct[-1, rows], atol=1e-7)


class Twice(nn.Module):
    """One layer used on two activations."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.shared = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.head(x + self.shared(x) + self.shared(x.tanh()))


def test_a_weight_used_twice_is_written_once() -> None:
    _, traced = make(Twice, 1, 5)
    free = [g for g in traced.groups if g.locked is None]
    plan = without(free[0], 1)
    statistics = observe(traced, [data(40, 5)], gamma=0.0)
    small = cut(traced, plan)
    report = LeastSquares(traced, statistics).apply(plan, small)
    assert len(report.repaired) == 2
    again = copy.deepcopy(dict(small.named_parameters()))
    LeastSquares(traced, statistics).apply(plan, small)
    for name, p in small.named_parameters():
        assert torch.equal(p, again[name])


def test_everything_else_stays_as_it_was() -> None:
    model, traced = make(convolution, 1, 2, 6, 6)
    before = copy.deepcopy(model.state_dict())
    statistics = observe(traced, [data(8, 2, 6, 6)])
    rng = torch.get_rng_state()
    full = cut(traced, PrunePlan({}))
    report = repair_lstsq(traced, PrunePlan({}), full, statistics)
    assert report.repaired == ()
    assert all(torch.equal(p, before[n]) for n, p in full.state_dict().items())
    plan = without(group_of(traced, "0.weight"), 0)
    repair_lstsq(traced, plan, cut(traced, plan), statistics)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_solve_is_the_formula() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((30, 6)) + 1
    cov, mean = np.cov(x.T, bias=True), x.mean(0)
    keep = np.array([[True, False, True, True, False, True]])
    found = solve(Moments(30.0, mean, cov[None]), keep, ridge=1e-3)
    k, r = [0, 2, 3, 5], [1, 4]
    inside = cov[np.ix_(k, k)]
    inside = inside + 1e-3 * np.trace(inside) / 4 * np.eye(4)
    direct = cov[np.ix_(r, k)] @ np.linalg.inv(inside)
    assert found.regression is not None
    assert np.allclose(found.regression[0].numpy(), direct)
    assert np.allclose(found.offset[0].numpy(), mean[r] - direct @ mean[k])


# -- batch normalisation ----------------------------------------------------------------------


def normed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 1),
    )


def norm_inputs(module: nn.Module, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """By hooks: mean and variance of what enters each normalisation."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        m.register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(
                name, (args[0].mean((0, 2, 3)), args[0].var((0, 2, 3), correction=0))
            )
        )
        for name, m in module.named_modules()
        if isinstance(m, nn.BatchNorm2d)
    ]
    with torch.no_grad():
        module(x)
    for handle in handles:
        handle.remove()
    return seen


def test_norms_move_by_what_the_cut_changed() -> None:
    model, _ = make(normed, 1, 2, 8, 8)
    with torch.no_grad():
        model[1].running_mean.copy_(data(8, seed=2))
        model[4].running_var.copy_(data(6, seed=3).abs() + 0.5)
    traced = trace(model, torch.zeros(1, 2, 8, 8, dtype=torch.float64))
    before = copy.deepcopy(model.state_dict())
    x = data(30, 2, 8, 8)
    group = group_of(traced, "0.weight")
    plan = without(group, 1, 5, 6)
    small = cut(traced, plan)
    report = repair_bn(traced, plan, small, x.split(8))
    assert report.repaired == ("1", "4")
    was, now = norm_inputs(model, x), norm_inputs(small, x)
    kept = [0, 2, 3, 4, 7]
    for name, rows in (("1", kept), ("4", list(range(6)))):
        norm = small.get_submodule(name)
        mean = before[f"{name}.running_mean"][rows] + now[name][0] - was[name][0][rows]
        ratio = (now[name][1] + norm.eps) / (was[name][1][rows] + norm.eps)
        assert torch.allclose(norm.running_mean, mean, atol=1e-12)
        assert torch.allclose(norm.running_var, before[f"{name}.running_var"][rows] * ratio)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    for name, p in small.named_parameters():
        assert torch.equal(p, dict(cut(traced, plan).named_parameters())[name])


def test_norms_without_a_cut_stay() -> None:
    model, traced = make(normed, 1, 2, 8, 8)
    full = cut(traced, PrunePlan({}))
    repair_bn(traced, PrunePlan({}), full, [data(8, 2, 8, 8)])
    assert all(torch.allclose(t, model.state_dict()[n]) for n, t in full.state_dict().items())
    with pytest.raises(DataError, match="no sample"):
        repair_bn(traced, PrunePlan({}), full, [])


def test_some_samples_are_of_all_batches_and_of_everything_that_goes_by_samples() -> None:
    x = torch.arange(30.0)
    batches = [(x[:10, None], x[:10] * 2), x[10:, None]]
    picked = some(batches, 6)
    assert [len(b[0]) for b in picked] == [2, 4]
    assert picked[0][0].flatten().tolist() == [0, 5] and picked[0][1].tolist() == [0, 10]
    assert picked[1][0].flatten().tolist() == [10, 15, 20, 25]
    assert sum(len(b[0]) for b in some(batches, 29)) == 29
    assert some(batches, 30)[1][0] is batches[1] and some(batches, 1)[0][0].tolist() == [[10]]
    lists = [([x, x],), ([x],), ([x, x],)]  # a detector's images: not to be divided
    assert some(lists, 4) == lists[:2] and some(lists, 1) == lists[:1]
    with pytest.raises(DataError, match="no sample"):
        some([x[:0, None]], 5)
