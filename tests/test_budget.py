"""Budgets: shares, absolute values with units, several at once, and what is said when one fails."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from allocate_fakes import Fake, chain, problem
from torch import nn

from fxprune import allocate
from fxprune.allocate.budget import bounds
from fxprune.allocate.space import space_of
from fxprune.errors import BudgetError
from fxprune.traced import trace
from fxprune.types import Budget, FloatArray, IntArray, PrunePlan


@pytest.mark.parametrize(
    ("measure", "text", "value"),
    [
        ("macs", "300 MMACs", 300e6), ("macs", "1.2 GMACs", 1.2e9), ("macs", "1.2GMACs", 1.2e9),
        ("macs", "5 kMACs", 5e3), ("macs", "300M", 300e6), ("macs", "2e6 MACs", 2e6),
        ("macs", 300_000_000, 300e6), ("macs", "300_000", 3e5), ("params", "5M params", 5e6),
        ("params", "5 M params", 5e6), ("params", "250k", 250e3), ("params", "1.5B", 1.5e9),
        ("bytes", "2.5 MB", 2.5e6), ("bytes", "800 KiB", 800 * 1024), ("bytes", "12B", 12),
        ("bytes", "7 bytes", 7), ("memory", "1 GiB", 2**30), ("latency", "4 ms", 4),
        ("latency", "0.25s", 250), ("latency", "800us", 0.8), ("latency", ".5 ms", 0.5),
    ],
)  # fmt: skip
def test_absolute_values_in_base_units(measure: str, text: Any, value: float) -> None:
    bound = bounds(Budget(**{measure: text}))[measure]
    assert bound.absolute and bound.value == pytest.approx(value, rel=1e-12)
    assert bound.limit(10 * value) == pytest.approx(value)
    assert bound.limit(value / 2) == value / 2, "above the original: it holds already"


@pytest.mark.parametrize(("given", "share"), [(0.5, 0.5), ("0.5", 0.5), ("50%", 0.5), (1, 1.0)])
def test_shares(given: Any, share: float) -> None:
    for measure in ("macs", "params", "bytes", "memory", "latency"):
        bound = bounds(Budget(**{measure: given}))[measure]
        assert not bound.absolute and bound.value == share and bound.limit(80.0) == 80 * share


@pytest.mark.parametrize(
    ("measure", "given", "match"),
    [
        ("macs", "3 ms", "unknown unit 'ms'.*300 MMACs"),
        ("macs", "300 MFLOPs", "2 FLOPs are one MAC"),
        ("latency", "4 MB", "unknown unit 'MB'.*us, ms or s"),
        ("latency", 4, "4 ms"),
        ("bytes", "2.5 Mb", "unknown unit 'Mb'.*2.5 MB"),
        ("params", "many", "params='many'"),
        ("bytes", "-1 MB", "above zero"),
        ("bytes", "120%", "not a share"),
        ("memory", 1.5, "not a share"),
    ],
)
def test_what_is_no_budget_is_named(measure: str, given: Any, match: str) -> None:
    with pytest.raises(BudgetError, match=match):
        bounds(Budget(**{measure: given}))


@pytest.mark.parametrize("name", ["uniform", "global", "isomorphic", "local"])
def test_absolute_and_relative_bounds_hold_at_once(name: str) -> None:
    fake = chain(np.random.default_rng(2), [128, 256, 64])
    whole = fake.cost(PrunePlan({}))
    macs, params = int(0.5 * whole.macs), whole.params // 3
    for budget in (
        Budget(macs=0.5, params=params),
        Budget(macs=macs, params="33.3%"),
        Budget(macs=f"{macs / 1e6!r} MMACs", bytes=4 * params),
    ):
        plan = allocate.get(name)(problem(fake, 1, budget=budget))
        assert fake.cost(plan).macs <= 0.5 * whole.macs
        assert fake.cost(plan).params <= params


def test_a_bound_above_the_original_holds_already() -> None:
    fake = chain(np.random.default_rng(2), [128, 64])
    assert allocate.get("uniform")(problem(fake, 1, budget=Budget(macs="900 TMACs"))).kept == {}


def test_an_unreachable_absolute_value_says_what_is_reachable() -> None:
    fake = chain(np.random.default_rng(0), [64, 32])
    least = fake.evaluate(np.array([[8, 8, 10]])).params[0]
    whole = fake.cost(PrunePlan({})).params
    with pytest.raises(BudgetError) as caught:
        allocate.get("uniform")(problem(fake, 1, budget=Budget(params=50, macs=1.0)))
    message = str(caught.value)
    assert "params=50 params cannot be reached" in message
    assert f"{least / whole:.4g} of the original params is left ({least} params of" in message
    assert "macs" not in message.split("Locked")[0]


class Clock:
    """Milliseconds that grow with the first group's count alone."""

    def predict(self, counts: IntArray) -> FloatArray:
        return counts[:, 0] / 8.0


def test_latency_comes_from_its_model() -> None:
    fake = chain(np.random.default_rng(2), [128, 64])
    plan = allocate.get("uniform")(
        problem(fake, 1, budget=Budget(latency="4 ms", macs=0.9), latency=Clock())
    )
    assert (
        len(plan.kept["g0"]) <= 32 and fake.cost(plan).macs <= 0.9 * fake.cost(PrunePlan({})).macs
    )
    with pytest.raises(BudgetError, match=r"latency=500 us cannot.*1 ms of 16 ms"):
        allocate.get("uniform")(problem(fake, 1, budget=Budget(latency="500 us"), latency=Clock()))
    with pytest.raises(BudgetError, match="latency model"):
        problem(fake, 1, budget=Budget(latency=0.5))


def test_only_bounded_measures_are_computed() -> None:
    asked: list[tuple[str, ...]] = []

    class Spy(Fake):
        def measure(self, counts: IntArray, measures: Any) -> FloatArray:
            asked.append(tuple(measures))
            return super().measure(counts, measures)

    plain = chain(np.random.default_rng(0), [64, 32])
    space = space_of(
        problem(Spy(plain.groups, plain.layers, plain.area), 1, budget=Budget(params=0.5))
    )
    space.load(np.zeros((3, 2), dtype=np.int64))
    assert set(asked) == {("params",)}


def test_a_memory_budget_on_a_real_net() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 4, 1),
    )  # fmt: skip
    traced = trace(model, torch.zeros(1, 3, 16, 16))
    scores = {g.name: np.arange(g.n, dtype=np.float64) for g in traced.groups}
    whole = traced.cost().memory
    assert whole == 256 * 4 * (3 + 64 + 64)
    made = allocate.AllocationProblem(traced, scores, Budget(memory="80 kB"))
    plan = allocate.get("uniform")(made)
    assert 60_000 <= traced.cost(plan).memory <= 80_000
