"""Allocators on a small stand-in for a traced model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from allocate_fakes import Fake, attention, chain, group, problem, share_of

from fxprune import allocate
from fxprune.allocate.ranked import cluster
from fxprune.allocate.space import space_of
from fxprune.errors import BudgetError, InputError, InternalError, SpecError
from fxprune.types import Budget, PrunePlan

CHEAP = ("uniform", "global", "isomorphic")


@pytest.mark.parametrize("name", [*CHEAP, "local"])
def test_budget_holds_and_kept_counts_are_allowed(name: str) -> None:
    for seed in range(200):
        rng = np.random.default_rng(seed)
        sizes = rng.integers(1, 200, rng.integers(1, 7)).tolist()
        fake = chain(rng, sizes, rows=int(rng.integers(1, 4)))
        share = float(rng.uniform(0.3, 1.0))
        round_to = int(rng.integers(1, 20))
        try:
            plan = allocate.get(name)(problem(fake, share, seed, round_to=round_to))
        except BudgetError:
            least = np.array([[g.choices(round_to)[0] for g in fake.groups]])
            whole = fake.cost(PrunePlan({})).macs
            assert fake.evaluate(least).macs[0] / whole > share
            continue
        assert share_of(fake, plan) <= share
        for g in fake.groups:
            kept = np.array(plan.kept.get(g.name, range(g.n)))
            assert (np.diff(kept) > 0).all()
            per_row = np.bincount(kept // g.width, minlength=g.rows)
            assert (per_row == per_row[0]).all()
            assert per_row[0] in g.choices(round_to)


@pytest.mark.parametrize("name", [*CHEAP, "local"])
def test_fine_steps_come_within_one_percent(name: str) -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        fake = chain(rng, rng.integers(150, 400, 4).tolist())
        plan = allocate.get(name)(problem(fake, 0.4, seed, round_to=1))
        assert 0.99 * 0.4 <= share_of(fake, plan) <= 0.4


@pytest.mark.parametrize("name", CHEAP)
def test_no_further_step_fits(name: str) -> None:
    for seed in range(30):
        rng = np.random.default_rng(seed)
        fake = chain(rng, rng.integers(32, 200, 5).tolist())
        plan = allocate.get(name)(problem(fake, 0.5, seed))
        counts = np.array([len(plan.kept.get(g.name, range(g.n))) for g in fake.groups])
        if share_of(fake, plan) > 0.5 * 0.9995:
            continue
        for i, g in enumerate(fake.groups):
            larger = g.choices(8)[g.choices(8) > counts[i]]
            if len(larger):
                more = counts.copy()
                more[i] = larger[0]
                assert fake.evaluate(more[None]).macs[0] > 0.5 * fake.cost(PrunePlan({})).macs


def test_the_best_channels_of_every_row_are_kept() -> None:
    fake = chain(np.random.default_rng(0), [64, 32], rows=3)
    made = problem(fake, 0.5, 5)
    plan = allocate.get("uniform")(made)
    assert plan.kept
    for name, kept in plan.kept.items():
        g = next(g for g in fake.groups if g.name == name)
        rows = np.asarray(made.scores[name]).reshape(g.rows, g.width)
        for r, row in enumerate(rows):
            mine = [k - r * g.width for k in kept if k // g.width == r]
            assert min(row[mine]) >= max(np.delete(row, mine))


def test_equal_scores_keep_the_first_channels() -> None:
    fake = chain(np.random.default_rng(0), [64])
    made = problem(fake, 0.5)
    flat = {g.name: np.ones(g.n) for g in fake.groups}
    plan = allocate.get("uniform")(allocate.AllocationProblem(fake, flat, made.budget, round_to=8))
    assert plan.kept["g0"] == tuple(range(32))


def test_uniform_ratios_differ_by_rounding_only() -> None:
    fake = chain(np.random.default_rng(3), [128, 256, 512, 64])
    plan = allocate.get("uniform")(problem(fake, 0.3, round_to=1))
    ratios = [len(plan.kept[g.name]) / g.n for g in fake.groups if g.locked is None]
    assert max(ratios) - min(ratios) <= 1.5 / 64


def test_global_cuts_the_group_with_many_useless_channels() -> None:
    fake = chain(np.random.default_rng(0), [64, 64, 64])
    flat = {g.name: np.ones(g.n) for g in fake.groups}
    flat["g1"][10:] = 0.01
    made = allocate.AllocationProblem(fake, flat, Budget(params=0.6), round_to=1)
    kept = allocate.get("global")(made).kept
    assert len(kept["g1"]) <= 0.75 * min(len(kept.get(f"g{i}", range(64))) for i in (0, 2))


def test_isomorphic_gives_every_cluster_the_same_ratio() -> None:
    fake = chain(np.random.default_rng(1), [64, 128, 64, 128])
    made = problem(fake, 0.4, round_to=1)
    plan = allocate.get("isomorphic")(made)
    assert plan.meta["clusters"] == 2
    assert cluster(fake, space_of(made)).tolist() == [0, 1, 0, 1]
    kept = [len(plan.kept.get(f"g{i}", range(n))) for i, n in enumerate([64, 128, 64, 128])]
    first, second = (kept[0] + kept[2]) / 128, (kept[1] + kept[3]) / 256
    assert abs(first - second) < 0.02


def test_of_overlapping_groups_cheap_allocators_cut_the_finer_one() -> None:
    for name in CHEAP:
        plan = allocate.get(name)(problem(attention(), 0.5))
        assert "heads" not in plan.kept and "dims" in plan.kept


def test_overlapping_groups_are_both_cut_where_one_does_not_suffice() -> None:
    fake = attention()
    widths = [g.width for g in fake.groups]
    least = fake.evaluate(np.array([[12, 8, 8], widths])).macs
    one = least[0] / least[1]
    plan = allocate.get("uniform")(problem(fake, float(one) * 0.9))
    assert "heads" in plan.kept and share_of(fake, plan) <= one * 0.9


def test_several_bounds_hold_at_once() -> None:
    fake = chain(np.random.default_rng(2), [128, 256, 64])
    for name in (*CHEAP, "local"):
        plan = allocate.get(name)(problem(fake, 1, budget=Budget(macs=0.5, params=0.3)))
        whole, cut = fake.cost(PrunePlan({})), fake.cost(plan)
        assert cut.macs <= 0.5 * whole.macs and cut.params <= 0.3 * whole.params


@pytest.mark.parametrize("name", [*CHEAP, "local"])
def test_a_whole_budget_keeps_everything(name: str) -> None:
    fake = chain(np.random.default_rng(2), [128, 256, 64])
    assert allocate.get(name)(problem(fake, 1.0)).kept == {}


@pytest.mark.parametrize("name", [*CHEAP, "local"])
def test_a_model_without_free_groups(name: str) -> None:
    fake = Fake((group("out", 10, locked="model output"),), [(), (0,)], [5])
    assert allocate.get(name)(problem(fake, 1.0)).kept == {}
    with pytest.raises(BudgetError, match="10 channels: model output"):
        allocate.get(name)(problem(fake, 0.9))


def test_unreachable_budget_says_what_is_reachable_and_what_is_locked() -> None:
    groups = (
        group("a", 64),
        group("b", 100, locked="softmax over the channels"),
        group("c", 30, locked="model output"),
        group("d", 30, locked="model output"),
    )
    fake = Fake(groups, [(), (0,), (1,), (2,), (3,)], [1, 1, 1, 1])
    whole = 3 * 64 + 64 * 100 + 100 * 30 + 30 * 30
    least = 3 * 8 + 8 * 100 + 100 * 30 + 30 * 30
    with pytest.raises(BudgetError) as caught:
        allocate.get("uniform")(problem(fake, 0.2))
    message = str(caught.value)
    assert f"{least / whole:.4g} of the original macs" in message
    assert "100 channels: softmax over the channels; 60 channels: model output" in message
    asked = float(message.split("at least ")[1].split(",")[0])
    assert least / whole <= asked <= least / whole + 0.001
    allocate.get("uniform")(problem(fake, asked))


@pytest.mark.parametrize("share", [0, -0.1, 1.01, float("nan"), float("inf"), True, "half"])
def test_a_share_outside_the_range_is_named(share: Any) -> None:
    with pytest.raises(BudgetError, match="macs="):
        problem(chain(np.random.default_rng(0), [64]), share)


def test_an_empty_budget_is_refused() -> None:
    with pytest.raises(BudgetError, match="bounds nothing"):
        allocate.bounds(Budget())


@pytest.mark.parametrize(
    ("scores", "match"),
    [({}, "got none"), ({"g0": np.ones(3)}, "shape"), ({"g0": np.full(64, np.nan)}, "NaN")],
)
def test_scores_that_do_not_fit_are_named(scores: Any, match: str) -> None:
    fake = chain(np.random.default_rng(0), [64])
    with pytest.raises(InputError, match=match) as caught:
        allocate.get("global")(allocate.AllocationProblem(fake, scores, Budget(macs=0.5)))
    assert "'g0'" in str(caught.value)


def test_options_out_of_range_are_refused() -> None:
    fake = chain(np.random.default_rng(0), [64])
    for bad in ({"round_to": 0}, {"max_evaluations": 0}):
        with pytest.raises(InputError, match=next(iter(bad))):
            problem(fake, 0.5, **bad)


def test_registry() -> None:
    assert set(allocate.names()) >= {*CHEAP, "local"}
    with pytest.raises(SpecError, match="did you mean 'uniform'"):
        allocate.get("unifrom")
    with pytest.raises(SpecError, match="callable"):
        allocate.get(3)  # type: ignore[arg-type]
    with pytest.raises(InternalError, match="twice"):
        allocate.register("local")(allocate.local)
    assert allocate.get(allocate.uniform) is allocate.uniform


def test_cheap_allocators_agree_with_a_plain_sweep() -> None:
    """The uniform ratio, found by trying every ratio in turn."""
    fake = chain(np.random.default_rng(7), [64, 96, 128])
    whole = fake.cost(PrunePlan({})).macs
    best = np.zeros(3)
    for ratio in np.linspace(0, 1, 2001):
        near = [np.abs(g.choices(8) - ratio * g.width).argmin() for g in fake.groups]
        counts = np.array([g.choices(8)[i] for g, i in zip(fake.groups, near, strict=True)])
        if fake.evaluate(counts[None]).macs[0] <= 0.5 * whole:
            best = counts
    plan = allocate.get("uniform")(problem(fake, 0.5))
    kept = np.array([len(plan.kept.get(g.name, range(g.n))) for g in fake.groups])
    assert (kept >= best).all() and (kept > best).sum() <= 2
