"""Knapsack, finalists, and the searches beside ``local``."""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from allocate_fakes import Fake, chain, group, problem, share_of
from test_local import CHEAP, Counting, rough

from fxprune import allocate
from fxprune.allocate.knapsack import knapsack, solved
from fxprune.allocate.sensitivity import Sensitivity
from fxprune.allocate.space import space_of
from fxprune.allocate.spend import spend
from fxprune.allocate.uniform import uniform_keys
from fxprune.isolate import native_prints_dropped
from fxprune.types import Budget, PrunePlan

STRATEGIES = ("local", "evolution", "random", "greedy")


@pytest.mark.parametrize("budget", [Budget(macs=0.45), Budget(macs=0.5, params=0.45)])
def test_the_knapsack_is_solved_exactly_or_nearly(budget: Budget) -> None:
    """Against full enumeration, with costs that are products of widths."""
    gaps = []
    for seed in range(12):
        fake = chain(np.random.default_rng(seed), [48, 64, 40, 56])
        space = space_of(problem(fake, 0.45, seed, budget=budget))
        rng = np.random.default_rng(seed)
        cut = 1 - space.table / space.table[:, -1:]
        loss = rng.gamma(0.7, 1.0, (4, 1)) * cut ** rng.uniform(1.2, 3, (4, 1))
        keys = uniform_keys(space)
        found = knapsack(space, loss, keys, spend(space, keys))
        assert space.holds(found[None])[0]
        every = np.array(list(itertools.product(*[range(t + 1) for t in space.top])))
        at = np.arange(4)
        best = loss[at, every[space.holds(every)]].sum(1).min()
        gaps.append(loss[at, found].sum() / best - 1)
    assert min(gaps) >= -1e-12
    assert np.median(gaps) <= 1e-3 and max(gaps) <= 0.05


def test_one_layer_after_another_is_a_plain_knapsack() -> None:
    """Groups that do not meet: costs are additive, so one integer programme is the optimum."""
    groups = tuple(group(f"g{i}", n) for i, n in enumerate((64, 96, 32, 48)))
    layers: list[tuple[int, ...]] = [(), (0,), (), (1,), (), (2,), (), (3,), ()]
    fake = Fake(groups, layers, [7, 0, 3, 0, 20, 0, 11, 0])
    space = space_of(problem(fake, 0.5))
    loss = np.random.default_rng(0).gamma(1.0, 1.0, space.table.shape)
    loss = np.sort(loss, axis=1)[:, ::-1] * (np.arange(loss.shape[1]) < space.top[:, None])
    keys = uniform_keys(space)
    found = knapsack(space, loss, keys, spend(space, keys))
    every = np.array(list(itertools.product(*[range(t + 1) for t in space.top])))
    at = np.arange(4)
    best = loss[at, every[space.holds(every)]].sum(1).min()
    assert loss[at, found].sum() == pytest.approx(best, rel=1e-3)


def test_measured_curves_are_met_and_never_rise() -> None:
    fake = chain(np.random.default_rng(6), [64, 96, 128, 40])
    space = space_of(problem(fake, 0.5))
    model = Sensitivity(space)
    points = []
    for f, step, value in [(0, 2, 1.0), (0, 5, 0.3), (1, 4, 2.0), (2, 3, float("inf"))]:
        state = space.top.copy()
        state[f] = step
        points.append((state, 10.0 + value))
    before = model.shape[:, 0].copy()
    model.measure(10.0, points)
    assert model.shape[0, 2] == pytest.approx(1.0) and model.shape[0, 5] == pytest.approx(0.3)
    assert model.shape[1, 4] == pytest.approx(2.0)
    assert (np.diff(model.shape, axis=1) <= 0).all() and (model.shape >= 0).all()
    assert model.shape[3, 0] / before[3] == pytest.approx(model.shape[2, 0] / before[2])


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_search_keeps_its_promises(name: str) -> None:
    for seed, most in ((0, 1), (1, 7), (2, 40)):
        fake = chain(np.random.default_rng(seed), [64, 96, 48, 80, 120])
        fitness = Counting(rough(fake, seed))
        made = problem(fake, 0.4, seed, fitness=fitness, max_evaluations=most)
        plan = allocate.get(name)(made)
        assert share_of(fake, plan) <= 0.4
        assert len(set(fitness.asked)) == len(fitness.asked) == plan.meta["evaluations"] <= most
        assert plan.meta["allocation"] == name
        assert allocate.get(name)(made).to_json() == plan.to_json()
        cheap = [fitness.loss(allocate.get(c)(made)) for c in CHEAP]
        if most >= 7:
            assert fitness.loss(plan) <= min(cheap) + 1e-12


def test_every_search_gains_and_the_neighbourhood_more_than_chance() -> None:
    found: dict[str, list[float]] = {name: [] for name in STRATEGIES}
    for seed in range(3):
        rng = np.random.default_rng(seed)
        fake = chain(rng, rng.integers(32, 256, 8).tolist())
        loss = rough(fake, seed)
        made = problem(fake, 0.4, seed, fitness=loss, max_evaluations=40)
        uniform = loss(allocate.get("uniform")(made))
        for name in STRATEGIES:
            found[name].append(loss(allocate.get(name)(made)) / uniform)
    mean = {name: float(np.mean(v)) for name, v in found.items()}
    assert mean["local"] < 0.9 * mean["random"] and max(mean.values()) < 0.75


def test_the_finalists_are_compared_by_the_dearer_fitness() -> None:
    fake = chain(np.random.default_rng(1), [64, 96, 48, 80])
    loss = rough(fake, 1)
    asked: list[PrunePlan] = []

    def final(plan: PrunePlan) -> float:
        asked.append(plan)
        return -loss(plan)  # the order turns round

    made = problem(fake, 0.4, fitness=loss, max_evaluations=30)
    first = allocate.get("local")(made)
    turned = allocate.AllocationProblem(**{**vars(made), "finals": final})
    plan = allocate.get("local")(turned)
    told = plan.meta["finalists"]
    assert 2 <= len(told) == len(asked) <= 5
    assert [t["final"] for t in told] == [-loss(p) for p in asked]
    assert plan.kept == max(asked, key=loss).kept != first.kept
    assert plan.meta["fitness"] == loss(plan) and plan.meta["trace"] == first.meta["trace"]
    starts = {"uniform", "global", "isomorphic"}
    assert any(t["stage"] in starts for t in told), "the best start takes part"


def test_the_best_of_a_first_comparison_of_many_take_part_in_the_last() -> None:
    fake = chain(np.random.default_rng(1), [64, 96, 48, 80])
    loss = rough(fake, 1)
    first: list[PrunePlan] = []
    last: list[PrunePlan] = []

    def semifinal(plan: PrunePlan) -> float:
        first.append(plan)
        return 2 - loss(plan)  # the order turns round

    def final(plan: PrunePlan) -> float:
        last.append(plan)
        return loss(plan)  # and back

    made = replace(
        problem(fake, 0.4, fitness=loss, max_evaluations=40), semifinals=semifinal, finals=final
    )
    plan = allocate.get("local")(made)
    values = [loss(p) for p in first]
    assert 5 <= len(first) <= 9 and max(values) <= 1.5 * min(values)
    assert sorted(map(loss, last)) == sorted(values)[-3:]
    assert loss(plan) == sorted(values)[-3] == plan.meta["fitness"]
    assert [t["final"] for t in plan.meta["finalists"]] == [loss(p) for p in last]
    assert [t["semifinal"] for t in plan.meta["finalists"]] == [2 - loss(p) for p in last]


@pytest.mark.parametrize(("shift", "rough_ones"), [(1e-9, 2), (1e-3, 9)])
def test_a_first_comparison_that_tells_nothing_new_ends_soon(shift: float, rough_ones: int) -> None:
    fake = chain(np.random.default_rng(1), [64, 96, 48, 80])
    loss = rough(fake, 1)
    first: list[PrunePlan] = []
    last: list[PrunePlan] = []
    made = replace(
        problem(fake, 0.4, fitness=loss, max_evaluations=40),
        semifinals=lambda p: first.append(p) or loss(p) * (1 + shift),
        finals=lambda p: last.append(p) or loss(p),
    )
    plan = allocate.get("local")(made)
    assert len(first) == rough_ones and len(last) == 3
    assert [t["final"] for t in plan.meta["finalists"]] == sorted(map(loss, last))
    assert plan.meta["fitness"] == min(t["fitness"] for t in plan.meta["trace"] if t["accepted"])
    assert all(("semifinal" in t) == (rough_ones > 2) for t in plan.meta["finalists"])


def test_what_is_far_behind_takes_no_part_unless_fitness_has_no_zero() -> None:
    fake = chain(np.random.default_rng(1), [64, 96, 48, 80])
    loss = rough(fake, 1)
    for shift, few in ((0.0, True), (-100.0, False)):
        made = problem(fake, 0.4, fitness=lambda p, s=shift: loss(p) ** 8 + s, max_evaluations=30)
        asked: list[PrunePlan] = []
        made = replace(made, finals=lambda p, a=asked: a.append(p) or loss(p))
        allocate.get("random")(made)
        powers = [loss(p) ** 8 for p in asked]
        assert (max(powers) <= 1.5 * min(powers)) == few and len(asked) >= 1


def test_comparisons_end_when_the_time_does() -> None:
    fake = chain(np.random.default_rng(1), [64, 96, 48, 80])
    loss = rough(fake, 1)
    asked: list[PrunePlan] = []

    def slow(plan: PrunePlan) -> float:
        asked.append(plan)
        time.sleep(1.0)
        return -loss(plan)

    made = problem(fake, 0.4, fitness=loss, max_evaluations=10, max_seconds=0.6)
    plan = allocate.get("random")(replace(made, finals=slow))
    assert len(asked) == len(plan.meta["finalists"]) == 1
    assert plan.kept == asked[0].kept


def test_finals_that_fail_leave_the_search_as_it_is() -> None:
    fake = chain(np.random.default_rng(1), [64, 96, 48, 80])
    made = problem(fake, 0.4, fitness=rough(fake, 1), max_evaluations=20)
    options: dict[str, Any] = {**vars(made), "finals": lambda _: float("nan")}
    plan = allocate.get("local")(allocate.AllocationProblem(**options))
    assert plan.kept == allocate.get("local")(made).kept and "finalists" not in plan.meta


def test_greedy_goes_down_in_small_rounds() -> None:
    fake = chain(np.random.default_rng(3), [64, 96, 48, 80, 120, 72])
    made = problem(fake, 0.3, 3, fitness=rough(fake, 3), max_evaluations=60)
    stages = [t["stage"] for t in allocate.get("greedy")(made).meta["trace"]]
    goals = [float(s.removeprefix("load ")) for s in stages if s.startswith("load ")]
    assert len(set(goals)) >= 10 and goals == sorted(goals, reverse=True) and goals[-1] <= 1.05


def test_what_compiled_code_prints_is_dropped_and_nothing_else(
    capfd: pytest.CaptureFixture[str],
) -> None:
    c = ctypes.CDLL(None)
    c.puts(b"before")
    with native_prints_dropped():
        c.puts(b"a solver's advice")
        os.write(1, b"more of it")
    c.puts(b"after")
    c.fflush(None)
    sys.stdout.write("and Python\n")
    assert capfd.readouterr().out == "before\nafter\nand Python\n"


def test_the_solver_is_silent_where_it_meets_tiny_infeasibilities(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """HiGHS tells of them in spite of all its options; this problem is one that has them."""
    group, step, loss, change, room = tiny_infeasibility()
    assert solved(loss, group, step, change, room) is not None
    ctypes.CDLL(None).fflush(None)
    assert capfd.readouterr().out == ""


def tiny_infeasibility() -> tuple[Any, Any, Any, Any, Any]:
    rng = np.random.default_rng(137)
    groups, steps, bounds = rng.integers(2, 60), rng.integers(2, 24), rng.integers(1, 4)
    group, step = np.repeat(np.arange(groups), steps), np.tile(np.arange(steps), groups)
    width = rng.lognormal(0, 1.5, groups)[:, None]
    cost = ((np.arange(steps)[None] - steps // 2) / steps * width).ravel()
    change = np.stack([cost * rng.lognormal(0, 0.3) for _ in range(bounds)], 1)
    change += rng.normal(0, 0.05, change.shape)
    shape = -np.log((np.arange(steps) + 1) / steps)[None]
    loss = (rng.lognormal(0, 2, groups)[:, None] * shape).ravel()
    room = np.full(bounds, rng.uniform(-0.3, 0.3) * np.abs(change).sum() / groups)
    return group, step, loss, change, room
