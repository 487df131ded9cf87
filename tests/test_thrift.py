"""Rounding slack is spent where it buys time, and never at the cost of what was asked for."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from allocate_fakes import Fake, chain, problem
from test_local import rough

from fxprune import allocate
from fxprune.allocate import AllocationProblem
from fxprune.allocate.space import space_of
from fxprune.allocate.spend import spend
from fxprune.allocate.thrift import GAIN, USED, thrifty
from fxprune.allocate.uniform import uniform_keys
from fxprune.types import Budget, FloatArray, IntArray, PrunePlan


class Clock:
    """Milliseconds that have little to do with the multiply-adds: a price for each block of 16."""

    def __init__(self, price: list[float]) -> None:
        self.price = np.array(price)

    def predict(self, counts: IntArray) -> FloatArray:
        return np.asarray(np.ceil(counts / 16) @ self.price)


def timed(seed: int, **options: Any) -> tuple[Fake, AllocationProblem]:
    rng = np.random.default_rng(seed)
    fake = chain(rng, [128, 192, 96, 160, 256, 144, 112])
    steps = {g.name: np.arange(8, g.n + 1, 8) for g in fake.groups}
    clock = Clock([*rng.lognormal(0, 1, 7).tolist(), 0.1])
    return fake, replace(problem(fake, 0.5, seed), round_to=steps, latency=clock, **options)


def lost(made: AllocationProblem, plan: PrunePlan) -> float:
    """Sum over groups of -log of the kept share of the scores, from the plan itself."""
    total = 0.0
    for name, kept in plan.kept.items():
        scores = np.asarray(made.scores[name])
        scores = scores - min(0.0, scores.min())
        total -= float(np.log(scores[list(kept)].sum() / scores.sum()))
    return total


def test_the_fastest_of_all_that_rounding_leaves_open() -> None:
    gains = []
    for seed in range(6):
        _, made = timed(seed)
        space = space_of(made)
        state = spend(space, uniform_keys(space))
        found = thrifty(space, state)
        ends = zip(state, space.top, strict=True)
        near = [range(max(0, s - 1), min(t, s + 1) + 1) for s, t in ends]
        every = np.array(list(itertools.product(*near)))
        loads = space.load(every)
        loss = np.array([lost(made, space.plan(s)) for s in every])
        most = lost(made, space.plan(state)) + 1e-9
        allowed = every[(loads <= 1) & (loads >= USED * space.load(state[None])) & (loss <= most)]
        ms = made.latency.predict(space.counts(allowed))  # type: ignore[union-attr]
        at = np.flatnonzero((allowed == found).all(1))
        assert len(at) == 1, "found is one of them"
        whole = ms[(allowed == state).all(1)][0]
        assert ms[at[0]] <= 1.05 * ms.min() or ms.min() > (1 - 1.5 * GAIN) * whole
        assert ms[at[0]] in (whole, *ms[ms <= (1 - GAIN) * whole])
        gains.append(ms[at[0]] / ms[(allowed == state).all(1)][0])
    assert max(gains) <= 1 and min(gains) <= 1 - GAIN and sum(g < 1 for g in gains) >= 2


def test_uniform_is_thrifty_where_counts_are_those_of_a_target_and_nothing_bounds_its_time() -> (
    None
):
    for seed in range(4):
        fake, made = timed(seed)
        space = space_of(made)
        plain = space.plan(spend(space, uniform_keys(space)))
        fast = space.plan(thrifty(space, spend(space, uniform_keys(space))))
        assert allocate.get("uniform")(made).kept == fast.kept
        both = replace(made, budget=Budget(macs=0.5, latency=0.99))
        other = space_of(both)
        state = spend(other, uniform_keys(other))
        assert (thrifty(other, state) == state).all()
        assert allocate.get("uniform")(replace(made, latency=None)).kept == plain.kept
        assert fake.groups[0].name in fast.kept


@pytest.mark.parametrize(("worse", "is_taken"), [(0.0, True), (0.01, True), (0.5, False)])
def test_of_nearly_equal_finalists_the_fastest_is_taken(worse: float, is_taken: bool) -> None:
    offered = 0
    for seed in range(3):
        fake, made = timed(seed, max_evaluations=12)
        space = space_of(made)
        asked: dict[str, float] = {}

        def final(plan: PrunePlan, at: Any = (made, space, asked)) -> float:
            problem, space, asked = at
            counts = space.counts(space.state(_counts(space, plan))[None])
            asked[str(plan.kept)] = float(problem.latency.predict(counts)[0])
            return 1.0

        made = replace(made, fitness=lambda p, f=fake, s=seed: rough(f, s)(p), finals=final)
        first = allocate.get("local")(made)
        fastest = min(asked, key=lambda k: asked[k])
        assert str(first.kept) == fastest and len(asked) >= 2
        offered += any(t["stage"] == "faster" for t in first.meta["finalists"])

        def again(plan: PrunePlan, fastest: str = fastest) -> float:
            return 1 + worse * (str(plan.kept) == fastest)

        plan = allocate.get("local")(replace(made, finals=again))
        assert (str(plan.kept) == fastest) == is_taken
    assert offered


def _counts(space: Any, plan: PrunePlan) -> IntArray:
    return np.array([len(plan.kept.get(g.name, range(g.n))) for g in space.groups])
