"""The local search: against full enumeration, and for what it promises about its evaluations."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from allocate_fakes import Fake, attention, chain, group, problem, share_of

from fxprune import allocate
from fxprune.allocate.knapsack import knapsack
from fxprune.allocate.neighbours import neighbours
from fxprune.allocate.sensitivity import Sensitivity
from fxprune.allocate.space import space_of
from fxprune.allocate.spend import fill
from fxprune.types import Budget, PrunePlan

CHEAP = ("uniform", "global", "isomorphic")


def rough(fake: Fake, seed: int) -> Callable[[PrunePlan], float]:
    """A loss of kept counts that is neither additive nor known to the search."""
    rng = np.random.default_rng(seed)
    free = [g for g in fake.groups if g.locked is None]
    weight, power = rng.gamma(0.7, 1.0, len(free)), rng.uniform(1.2, 3, len(free))
    coupling = 0.3 * rng.random((len(free), len(free)))

    def loss(plan: PrunePlan) -> float:
        cut = np.array([1 - len(plan.kept.get(g.name, range(g.n))) / g.n for g in free])
        return float(
            (weight * cut**power).sum() + cut @ coupling @ cut + 0.01 * np.sin(9 * cut).sum()
        )

    return loss


def optimum(made: allocate.AllocationProblem, loss: Callable[[PrunePlan], float]) -> float:
    """The smallest loss of all allowed plans within the budget, by full enumeration."""
    space = space_of(made, overlapping=True)
    states = np.array(list(itertools.product(*[range(t + 1) for t in space.top])), dtype=np.int64)
    return min(loss(space.plan(s)) for s in states[space.holds(states)])


class Counting:
    """A fitness that notes every plan it is asked for."""

    def __init__(self, loss: Callable[[PrunePlan], float]) -> None:
        self.loss, self.asked = loss, []

    def __call__(self, plan: PrunePlan) -> float:
        self.asked.append(json.dumps(sorted((k, len(v)) for k, v in plan.kept.items())))
        return self.loss(plan)


def test_finds_the_optimum_of_small_spaces_or_comes_close() -> None:
    gaps = []
    for seed in range(25):
        fake = chain(np.random.default_rng(seed), [48, 64, 40])
        loss = rough(fake, seed)
        made = problem(fake, 0.45, seed, fitness=loss, max_evaluations=60)
        best = optimum(made, loss)
        gaps.append(loss(allocate.get("local")(made)) / best - 1)
    assert min(gaps) >= -1e-12
    assert np.median(gaps) == pytest.approx(0, abs=1e-12)
    assert np.mean(gaps) <= 0.02 and max(gaps) <= 0.15


def test_is_never_worse_than_the_cheap_allocations_and_mostly_much_better() -> None:
    gains = []
    for seed in range(15):
        rng = np.random.default_rng(seed)
        fake = chain(rng, rng.integers(32, 256, 10).tolist())
        loss = rough(fake, seed)
        made = problem(fake, 0.4, seed, fitness=loss)
        plan = allocate.get("local")(made)
        cheap = min(loss(allocate.get(name)(made)) for name in CHEAP)
        found = loss(plan)
        assert found <= cheap and found == pytest.approx(plan.meta["fitness"])
        assert share_of(fake, plan) <= 0.4
        gains.append(found / cheap)
    assert np.median(gains) < 0.8


def test_evaluations_are_bounded_counted_and_never_repeated() -> None:
    for most in (1, 2, 3, 5, 20, 60):
        fake = chain(np.random.default_rng(1), [64, 96, 48, 80])
        fitness = Counting(rough(fake, 1))
        plan = allocate.get("local")(problem(fake, 0.4, fitness=fitness, max_evaluations=most))
        assert 1 <= len(fitness.asked) <= most
        assert len(set(fitness.asked)) == len(fitness.asked) == plan.meta["evaluations"]
        assert share_of(fake, plan) <= 0.4


def test_the_trace_tells_the_search() -> None:
    fake = chain(np.random.default_rng(1), [64, 96, 48, 80])
    plan = allocate.get("local")(problem(fake, 0.4, fitness=rough(fake, 1)))
    meta = json.loads(PrunePlan.from_json(plan.to_json()).to_json())["meta"]
    assert meta["allocation"] == "local"
    trace = meta["trace"]
    assert [t["evaluation"] for t in trace] == list(range(1, meta["evaluations"] + 1))
    accepted = [t["fitness"] for t in trace if t["accepted"]]
    assert accepted == sorted(accepted, reverse=True)
    assert accepted[-1] == meta["fitness"]
    assert not any(t["accepted"] for t in trace if t["stage"] in ("whole", "alone"))


def test_workers_do_not_change_the_result() -> None:
    fake = chain(np.random.default_rng(4), [64, 96, 48, 80, 128])
    loss = rough(fake, 4)

    def slow(plan: PrunePlan) -> float:
        time.sleep(1e-3 * (len(str(plan.kept)) % 7))
        return loss(plan)

    plans = [allocate.get("local")(problem(fake, 0.4, fitness=loss))]
    for workers in (1, 3, 8):
        with ThreadPoolExecutor(workers) as executor:
            made = problem(fake, 0.4, fitness=slow, executor=executor)
            plans.append(allocate.get("local")(made))
    assert all(p.to_json() == plans[0].to_json() for p in plans)


def test_the_seed_decides_and_global_random_state_is_left_alone() -> None:
    fake = chain(np.random.default_rng(4), [64, 96, 48, 80, 128, 256])
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    runs = {}
    for seed in (0, 1, 0):
        made = problem(fake, 0.4, fitness=rough(fake, 4))
        made = allocate.AllocationProblem(**{**vars(made), "seed": seed})
        text = allocate.get("local")(made).to_json()
        assert runs.setdefault(seed, text) == text
    assert runs[0] != runs[1]
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002


def test_a_fitness_that_is_not_finite_is_never_accepted() -> None:
    fake = chain(np.random.default_rng(2), [64, 96, 48])
    loss = rough(fake, 2)
    calls = itertools.count()

    def sometimes(plan: PrunePlan) -> float:
        return loss(plan) if next(calls) % 3 else float(("nan", "inf")[next(calls) % 2])

    plan = allocate.get("local")(problem(fake, 0.4, fitness=sometimes))
    assert np.isfinite(plan.meta["fitness"]) and share_of(fake, plan) <= 0.4
    json.loads(plan.to_json(), parse_constant=pytest.fail)
    with pytest.warns(UserWarning, match="gave a finite number"):
        never = allocate.get("local")(problem(fake, 0.4, fitness=lambda _: float("nan")))
    assert never.meta["fitness"] is None and share_of(fake, never) <= 0.4


def test_an_error_in_the_fitness_reaches_the_caller() -> None:
    fake = chain(np.random.default_rng(2), [64, 96, 48])

    def broken(plan: PrunePlan) -> float:
        raise RuntimeError("evaluate failed")

    with pytest.raises(RuntimeError, match="evaluate failed"):
        allocate.get("local")(problem(fake, 0.4, fitness=broken))


def test_an_accuracy_to_maximise_works_negated() -> None:
    fake = chain(np.random.default_rng(3), [64, 96, 48])
    loss = rough(fake, 3)
    plan = allocate.get("local")(problem(fake, 0.4, fitness=lambda p: loss(p) - 100))
    same = allocate.get("local")(problem(fake, 0.4, fitness=loss))
    assert loss(plan) == pytest.approx(loss(same), rel=0.05)


def test_without_fitness_it_says_so() -> None:
    fake = chain(np.random.default_rng(3), [64, 96, 48])
    made = problem(fake, 0.4)
    plan = allocate.get("local")(made)
    assert plan.meta["evaluations"] == 0 and "no fitness" in plan.meta["note"]
    assert plan.kept == allocate.get(plan.meta["start"])(made).kept


def test_overlapping_groups_may_both_move() -> None:
    fake = attention()

    def loss(plan: PrunePlan) -> float:
        kept = {g.name: len(plan.kept.get(g.name, range(g.n))) / g.n for g in fake.groups}
        return 5 * (1 - kept["dims"]) + 0.1 * (1 - kept["heads"]) + (1 - kept["mlp"])

    plan = allocate.get("local")(problem(fake, 0.5, fitness=loss))
    assert "heads" in plan.kept and share_of(fake, plan) <= 0.5


def test_neighbours_keep_the_budget_and_move_channels_between_groups() -> None:
    fake = chain(np.random.default_rng(5), [64, 96, 128, 40])
    space = space_of(problem(fake, 0.5))
    state = space.state(np.array([32, 48, 64, 20, 10]))
    state = fill(space, np.minimum(state, [3, 4, 6, 4]), np.zeros((4, space.table.shape[1] - 1)))
    found = neighbours(space, state, 1, np.arange(4.0), 99)
    every = np.array(list(itertools.product(*[range(t + 1) for t in space.top])), dtype=np.int64)
    fits = every[space.holds(every)]
    change = fits - state
    two = ((change > 0).sum(1) == 1) & ((change < 0).sum(1) == 1)
    two &= (np.abs(change) == 1).any(1)
    most = {}
    for row, delta in zip(fits[two], change[two], strict=True):
        taker, giver = int(np.argmax(delta)), int(np.argmin(delta))
        if delta[giver] == -1:
            best = most.setdefault((giver, taker, 1), row)
            most[giver, taker, 1] = max(best, row, key=lambda r: r[taker])
        if delta[taker] == 1:
            best = most.setdefault((giver, taker, 2), row)
            most[giver, taker, 2] = max(best, row, key=lambda r: r[giver])
    assert {tuple(r) for r in found.tolist()} == {tuple(r.tolist()) for r in most.values()}


def test_the_model_learns_additive_losses() -> None:
    fake = chain(np.random.default_rng(6), [64, 96, 128, 40])
    space = space_of(problem(fake, 0.5))
    model = Sensitivity(space)
    truth = np.array([0.1, 5.0, 1.0, 2.0])
    rng = np.random.default_rng(0)
    states = rng.integers(0, space.top + 1, (40, 4))
    losses = model.shape[np.arange(4), states] @ truth
    model.whole = 3.0
    model.learn([(s, 3.0 + v) for s, v in zip(states, losses, strict=True)])
    predicted = model.predict(states)
    assert np.corrcoef(predicted, losses)[0, 1] > 0.97
    assert (np.argsort(model.weight) == np.argsort(truth)).all()


def test_curves_that_the_scores_do_not_tell_are_measured_where_they_matter() -> None:
    """Additive losses of very different size and bend, 20 groups, 60 evaluations: the optimum."""
    ratios = []
    for seed in range(2, 5):
        rng = np.random.default_rng(seed)
        fake = chain(rng, [128] * 20)
        weight, power = 10.0 ** rng.uniform(-2, 0, 20), rng.choice([1.0, 2.0, 4.0], 20)

        def loss(plan: PrunePlan, fake: Fake = fake, w: Any = weight, p: Any = power) -> float:
            cut = [1 - len(plan.kept.get(g.name, range(g.n))) / g.n for g in fake.groups[:20]]
            return float((w * np.array(cut) ** p).sum())

        made = problem(fake, 0.7, seed, fitness=loss)
        space = space_of(made)
        curves = weight[:, None] * (1 - space.table / 128) ** power[:, None]
        least = np.zeros(20, dtype=np.int64)
        optimum = knapsack(space, curves, np.ones((20, curves.shape[1] - 1)), least)
        plan = allocate.get("local")(made)
        alone = [t for t in plan.meta["trace"] if t["stage"] == "alone"]
        assert 20 < len(alone) <= 0.75 * 60
        ratios.append(plan.meta["fitness"] / loss(space.plan(optimum)))
    assert max(ratios) < 1.2 and np.mean(ratios) < 1.1


def test_hope_takes_a_deeper_cut_for_no_dearer_than_what_was_measured() -> None:
    fake = chain(np.random.default_rng(6), [64, 64])
    made = replace(problem(fake, 0.4), scores={g.name: np.ones(g.n) for g in fake.groups[:2]})
    space = space_of(made)
    model = Sensitivity(space)
    shallow, dear = space.top.copy(), space.top.copy()
    shallow[0], dear[1] = 6, 4  # 8 and 24 channels less
    model.measure(0.0, [(shallow, 0.1), (dear, 3.0)])
    assert model.deepest.tolist() == [6, 4]
    hoped, expected = model.hope(space.top // 4), model.proposal(space.top // 4)
    assert hoped[0] <= expected[0] and space.holds(np.stack([hoped, expected])).all()
    assert hoped[1] >= expected[1]
    deeper = space.top.copy()
    deeper[0] = 1
    model.measure(0.0, [(shallow, 0.1), (dear, 3.0), (deeper, 30.0)])
    assert model.deepest.tolist() == [1, 4] and model.hope(space.top // 4)[0] > 1


def test_many_groups_are_searched_in_little_time() -> None:
    rng = np.random.default_rng(0)
    fake = chain(rng, rng.integers(64, 1024, 150).tolist())
    made = problem(fake, 0.5, fitness=rough(fake, 0), max_evaluations=60)
    start = time.process_time()
    plan = allocate.get("local")(made)
    assert time.process_time() - start < 20
    assert 0.99 * 0.5 <= share_of(fake, plan) <= 0.5


def test_the_bar_is_shown_on_stderr_only_when_asked(capfd: Any) -> None:
    fake = chain(np.random.default_rng(3), [64, 96, 48])
    for progress in (False, True):
        allocate.get("local")(
            problem(fake, 0.4, fitness=rough(fake, 3), progress=progress, budget=Budget(macs=0.4))
        )
        out, err = capfd.readouterr()
        assert out == "" and (("local search (macs 40%)" in err) == progress)
    both = Budget(macs=0.4, params=0.9)
    allocate.get("local")(problem(fake, 0.4, fitness=rough(fake, 3), progress=True, budget=both))
    assert "local search (macs 40%, +1)" in capfd.readouterr().err


def test_groups_with_one_choice_stay_as_they_are() -> None:
    fake = Fake((group("a", 64), group("tiny", 1)), [(), (0,), (1,)], [1, 1])
    plan = allocate.get("local")(problem(fake, 0.5, fitness=rough(fake, 0)))
    assert set(plan.kept) == {"a"}
