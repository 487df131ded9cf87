"""Distillation: its losses against closed forms, its points, and that it never harms."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from oracle import randomise
from scipy.special import rel_entr, softmax
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxprune
from fxprune.cut import cut
from fxprune.distill import RATES, SHARES, Distillation, distill
from fxprune.errors import ModelError, SpecError
from fxprune.fitness import KLFitness
from fxprune.imitate import Target, points, tapped
from fxprune.isolate import rng_kept
from fxprune.traced import Traced, trace
from fxprune.types import PrunePlan


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def images(n: int, seed: int) -> Tensor:
    """[n, 3, 9, 9]; the colour differs from one to the next, so the outputs do."""
    return 2 * normal(n, 3, 1, 1, seed=seed) + 0.5 * normal(n, 3, 9, 9, seed=seed + 100)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(width, 24, 3, padding=1), nn.Conv2d(24, width, 1)
        self.norm = nn.BatchNorm2d(24)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.b(F.relu(self.norm(self.a(x)))))


class Net(nn.Module):
    """Two residual blocks; the stream has 16 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(3, 16, 3), Block(16), Block(16)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.two(self.one(F.relu(self.stem(x))))
        return self.head(self.drop(y.mean((2, 3))))


def net(kind: type[nn.Module] = Net) -> nn.Module:
    with rng_kept(0):
        return randomise(kind())


def halves(traced: Traced, only: str = "") -> PrunePlan:
    """Every second channel of each free group, or of those whose name starts with ``only``."""
    free = [g for g in traced.groups if g.locked is None and g.name.startswith(only)]
    return traced.plan({g.name: range(0, g.n, 2) for g in free})


def setting(kind: type[nn.Module] = Net) -> tuple[Traced, PrunePlan, fx.GraphModule, list[Tensor]]:
    traced = trace(net(kind), normal(1, 3, 9, 9))
    plan = halves(traced)
    data = [images(16, s) for s in range(5)]
    return traced, plan, cut(traced, plan), data


# --- losses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 10), (4, 3, 5, 7)])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_classes_give_the_divergence(shape: tuple[int, ...], temperature: float) -> None:
    x, y = normal(*shape), normal(*shape, seed=1).requires_grad_()
    p, q = (softmax(t.detach().double().numpy() / temperature, 1) for t in (x, y))
    expected = rel_entr(p, q).sum(1).mean() * temperature**2
    loss = Target.of(x).loss(y, temperature)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)
    loss.backward()
    # d KL / d logits = temperature * (q - p) / number of positions
    gradient = (q - p) * temperature / (x.numel() / x.shape[1])
    np.testing.assert_allclose(y.grad.numpy(), gradient, atol=1e-6)


def test_probabilities_are_compared_as_such() -> None:
    p, q = normal(6, 10).softmax(1), normal(6, 10, seed=1).softmax(1)
    expected = rel_entr(p.double().numpy(), q.double().numpy()).sum(1).mean()
    assert float(Target.of(p).loss(q)) == pytest.approx(expected, rel=1e-4)


def test_other_outputs_give_a_relative_error() -> None:
    x, y = ({"a": normal(2, 3, 8, seed=s), "b": [torch.arange(2), normal(2, 1)]} for s in (0, 1))
    expected = float(((y["a"] - x["a"]) ** 2).sum() / (x["a"] ** 2).sum()) / 2
    assert float(Target.of(x).loss(y)) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ModelError, match="shapes"):
        Target.of(x).loss(y["a"])


# --- points ---------------------------------------------------------------------------------------


def test_points_are_the_ends_of_blocks() -> None:
    traced, plan, module, data = setting()
    found = points(traced, plan)
    kept = {p.node: {d: len(i) for d, i in p.kept.items()} for p in found}
    x = data[0]
    names = list(kept)
    _, original = tapped(traced.graph_module, names)(x)
    _, pruned = tapped(module, names)(x)
    assert [list(t.shape) for t in pruned] == [
        [kept[n].get(d, s) for d, s in enumerate(t.shape)]
        for n, t in zip(names, original, strict=True)
    ]
    # The stem's output and the two blocks' are among them, each after its activation.
    model = net().eval()
    with torch.no_grad():
        stem = F.relu(model.stem(x))
        ends = [stem, model.one(stem), model.two(model.one(stem))]
    for end in ends:
        assert any(t.shape == end.shape and torch.allclose(t, end) for t in original)


def test_an_uncut_model_is_no_distance_away() -> None:
    traced, *_, data = setting()
    plan = traced.full_plan()
    found = points(traced, plan)
    assert len(found) >= 3
    _, a = tapped(traced.graph_module, [p.node for p in found])(data[0])
    _, b = tapped(cut(traced, plan), [p.node for p in found])(data[0])
    assert all(float(p.loss(x, y.detach())) == 0 for p, x, y in zip(found, a, b, strict=True))
    # A prediction of the mean alone is at distance one.
    mean = a[0].mean().expand_as(a[0])
    assert float(found[0].loss(a[0], mean).detach()) == pytest.approx(1, rel=1e-4)


class Parallel(nn.Module):
    """Heads that keep dims of their own, a late skip, a tuple in between, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.qkv, self.out = nn.Linear(9, 16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.inner(x.flatten(1, 2))
        q, k, v = self.qkv(y).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        z = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        y = y + self.out(z)
        return self.head(y), y.mean((1, 2))


def test_any_graph_can_be_distilled() -> None:
    traced, plan, module, data = setting(Parallel)
    fitness = KLFitness(traced, None, data[4:])
    report = distill(traced, plan, module, data[:4], fitness.of, Distillation(steps=60))
    assert report.points
    assert report.after < 0.7 * report.before


# --- distill --------------------------------------------------------------------------------------


def test_it_draws_the_outputs_nearer_and_says_what_it_did() -> None:
    traced, plan, module, data = setting()
    fitness = KLFitness(traced, None, data[4:])
    before = fitness.of(module)
    norm = copy.deepcopy(module.get_submodule("one.norm"))
    frozen = next(iter(module.parameters())).requires_grad_(False)
    original = {k: v.clone() for k, v in traced.graph_module.state_dict().items()}
    rng = torch.get_rng_state()
    report = distill(traced, plan, module, data[:4], fitness.of, Distillation(steps=80, checks=4))
    assert torch.equal(rng, torch.get_rng_state())
    assert not frozen.requires_grad and all(p.grad is None for p in module.parameters())
    assert all(torch.equal(v, original[k]) for k, v in traced.graph_module.state_dict().items())
    assert report.before == before
    assert report.after == fitness.of(module) < 0.5 * before
    assert [s for s, _ in report.curve] == [0, 20, 40, 60, 80]
    assert report.after <= min(f for _, f in report.curve)
    now = module.get_submodule("one.norm")
    assert torch.equal(now.running_mean, norm.running_mean)
    assert torch.equal(now.running_var, norm.running_var)
    assert not torch.equal(now.weight, norm.weight)
    assert not module.training and not traced.graph_module.training


def test_a_step_moves_each_tensor_by_a_share_of_its_own_size() -> None:
    traced, plan, module, data = setting()
    with torch.no_grad():
        module.get_submodule("one.a").bias.zero_()
    before = {k: p.detach().clone() for k, p in module.named_parameters()}
    values = iter((2.0, 1.0, 3.0, 3.0, 3.0))
    options = Distillation(steps=1, lr=0.01, checks=1)
    report = distill(traced, plan, module, data[:2], lambda _: next(values), options)
    assert report.best_step == 1 and report.lr == 0.01 and not report.trials
    sizes = {k: float(p.double().square().mean().sqrt()) for k, p in before.items()}
    least = 0.01 * sorted(sizes.values())[len(sizes) // 2]
    for name, p in module.named_parameters():
        moved = (p.detach() - before[name]).abs()
        # Adam's first step is one rate for each number that has a gradient.
        assert float(moved.max()) == pytest.approx(0.01 * max(sizes[name], least), rel=2e-3), name


def test_the_rate_is_the_largest_that_a_short_run_bears() -> None:
    traced, plan, module, data = setting()
    fitness = KLFitness(traced, None, data[4:])
    report = distill(traced, plan, module, data[:4], fitness.of, Distillation(steps=40))
    tried = list(report.trials)
    assert tried == list(RATES[: len(tried)]) and report.lr == tried[-1]
    assert [report.trials[r] <= 1.5 * report.before for r in tried] == [
        r == report.lr for r in tried
    ]
    assert report.curve[0] == (0, report.before)
    traced, plan, again, data = setting()
    given = Distillation(steps=40, lr=report.lr)
    assert distill(traced, plan, again, data[:4], fitness.of, given).curve == report.curve
    assert all(torch.equal(t, again.state_dict()[k]) for k, t in module.state_dict().items())
    told = report.to_dict()
    assert told["lr"] == report.lr and told["trials"][f"{report.lr:g}"] == report.trials[report.lr]


def test_a_rate_that_tears_the_model_is_given_up() -> None:
    traced, plan, module, data = setting()
    seen: list[int] = []

    def measure(_: Any) -> float:
        seen.append(1)
        return 1.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fxprune.distill.RATES", (30.0, 1e-3, 1e-4))
        report = distill(traced, plan, module, data[:4], measure, Distillation(steps=40, checks=1))
    assert report.trials == {30.0: float("inf"), 1e-3: 1.0} and report.lr == 1e-3
    assert len(seen) == 3 + len(SHARES)  # before, one trial, the end, and on the way to it


def test_one_seed_one_result() -> None:
    def state(seed: int) -> dict[str, Tensor]:
        traced, plan, module, data = setting()
        options = Distillation(steps=6, checks=1)
        torch.manual_seed(seed + 100)  # the global state must not matter
        seen: list[int] = []

        def measure(_: Any) -> float:
            seen.append(1)
            return -float(len(seen))

        distill(traced, plan, module, data, measure, options, seed=seed)
        return module.state_dict()

    first, again, other = state(0), state(0), state(1)
    assert all(torch.equal(v, again[k]) for k, v in first.items())
    assert any(not torch.equal(v, other[k]) for k, v in first.items())


def test_never_worse_on_the_held_out_samples() -> None:
    traced, plan, module, data = setting()
    fitness = KLFitness(traced, None, data[4:])
    before = {k: v.clone() for k, v in module.state_dict().items()}
    wild = Distillation(steps=10, lr=10.0, checks=5)
    report = distill(traced, plan, module, data[:1], fitness.of, wild)
    assert report.best_step == 0 and report.after == report.before
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert max(f for _, f in report.curve) > 10 * report.before


def test_part_of_a_way_that_went_too_far() -> None:
    traced, plan, module, data = setting()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    states: list[dict[str, Tensor]] = []
    values = iter((2.0, 5.0, 1.5, 1.0, 1.2))  # before, the end, then 25, 50 and 75% of the way

    def measure(m: fx.GraphModule) -> float:
        states.append({k: v.clone() for k, v in m.state_dict().items()})
        return next(values)

    report = distill(traced, plan, module, data[:2], measure, Distillation(3, 0.01, checks=1))
    assert (report.after, report.share, report.best_step) == (1.0, 0.5, 3)
    for k, t in module.state_dict().items():
        if t.is_floating_point():  # batch normalisation counts its batches
            torch.testing.assert_close(t, (before[k] + states[1][k]) / 2)
    assert report.to_dict()["share"] == 0.5


def later_is_better() -> Callable[[fx.GraphModule], float]:
    """A measure that keeps the last state."""
    values = itertools.chain(range(0, -3, -1), itertools.repeat(0))
    return lambda _: next(values)


class Viewed(Net):
    """Refuses images whose channels lie next to each other."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view(len(x), 27, 9).view_as(x))


@pytest.mark.parametrize(("kind", "last"), [(Net, True), (Viewed, False)])
def test_images_are_learnt_in_the_faster_format(
    kind: type[nn.Module], last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Distillation(steps=4, lr=0.01, checks=2)
    traced, plan, plain, data = setting(kind)
    with monkeypatch.context() as patched:
        patched.setattr("fxprune.distill.turns", lambda *_: False)
        distill(traced, plan, plain, data, later_is_better(), options)
    module = cut(traced, plan)
    seen: list[bool] = []

    def look(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            seen.append(given[0].is_contiguous(memory_format=torch.channels_last))

    module.get_submodule("stem").register_forward_pre_hook(look)
    distill(traced, plan, module, data, later_is_better(), options)
    assert seen == [last] * 4
    assert not torch.equal(module.get_submodule("stem").weight, cut(traced, plan).stem.weight)
    for k, t in module.state_dict().items():  # the same up to rounding
        torch.testing.assert_close(t, plain.state_dict()[k], rtol=1e-3, atol=1e-4)


def test_a_loss_that_is_not_finite_ends_it() -> None:
    traced, plan, module, data = setting()
    data[0][:] = 1e38
    options = Distillation(steps=10, mix=0.0, batch_size=64)
    report = distill(traced, plan, module, data[:1], lambda _: 1.0, options)
    assert report.steps == 1 and "nan" in report.note


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"steps": 0}, "steps"),
        ({"lr": -1.0}, "lr"),
        ({"mix": 2}, "mix"),
        ({"checks": 1.5}, "checks"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises(SpecError, match=text):
        Distillation(**options)


class Chooser(nn.Module):
    """Numbers of classes: nothing to compare but inside."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(243, 32), nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.two(F.relu(self.one(x.flatten(1)))))).argmax(1)


@pytest.mark.parametrize("features", [1.0, 0.0])
def test_outputs_that_cannot_be_compared_are_left_to_the_features(features: float) -> None:
    traced, plan, module, data = setting(Chooser)
    last = points(traced, plan)[-1]

    def measure(m: fx.GraphModule) -> float:
        x, y = (tapped(g, [last.node])(data[4])[1][0] for g in (traced.graph_module, m))
        return float(last.loss(x, y).detach())

    options = Distillation(steps=30, features=features)
    report = distill(traced, plan, module, data[:4], measure, options)
    if features:
        assert report.after < 0.7 * report.before
    else:
        assert report.after == report.before and "compared" in report.note


def test_prune_with_distill() -> None:
    data = [images(16, s) for s in range(5)]
    held = images(64, 9)

    def run(repair: Any) -> tuple[float, fxprune.PruneResult]:
        model = net().train()
        result = fxprune.prune(
            model, data[0][:1], 0.2, data, repair=repair, progress=False, max_evaluations=4,
            round_to=1,
        )  # fmt: skip
        assert model.training and result.model.training
        with torch.no_grad():
            target = Target.of(model.eval()(held))
            return float(target.loss(result.model.eval()(held))), result

    plain, _ = run("lstsq")
    better, result = run(Distillation(steps=80))
    assert better < 0.8 * plain
    told = result.report["repair"]
    assert told["kind"] == "distill" and told["distill"]["fitness"]["after"] > 0
    small, graph = result.model.eval(), result.graph_module.eval()
    torch.testing.assert_close(small(held), graph(held))


def test_further_samples_are_for_the_distillation_alone() -> None:
    data = [images(16, s) for s in range(8)]
    seen: list[Tensor] = []

    def run(samples: int) -> fxprune.PruneResult:
        return fxprune.prune(
            net(), data[0][:1], 0.3, data, repair=Distillation(steps=2, samples=samples),
            progress=False, allocation="uniform", calibration_samples=40, round_to=1,
        )  # fmt: skip

    def spied(traced: Any, plan: Any, module: Any, batches: Any, *rest: Any, **more: Any) -> Any:
        seen.extend(b[0] for b in batches)
        return distill(traced, plan, module, batches, *rest, **more)

    plain = run(0).report
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fxprune.mending.distill", spied)
        report = run(100).report
    assert plain["samples"] == report["samples"] == 40
    assert plain["repair"]["fitness"] == report["repair"]["fitness"]
    # of 16, 16 and 8 calibration samples the last batch is held out; then 60 that follow them
    given = torch.cat(data)
    torch.testing.assert_close(torch.cat(seen), torch.cat([given[:32], given[40:100]]))


@pytest.mark.parametrize(("macs", "steps"), [(1e3, 2000), (1e8, 781), (1e12, 300)])
def test_the_number_of_steps_follows_from_the_work(macs: float, steps: int) -> None:
    assert Distillation().counted(macs).steps == steps
    assert Distillation(steps=7).counted(macs).steps == 7
