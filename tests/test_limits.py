"""A limit on the latency holds for what is measured, not for what was predicted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_latency import TARGET, Net, clocked, run_products
from torch import nn

import fxprune
import fxprune.latency.keeper as keeper_file
from fxprune import allocate
from fxprune.allocate import AllocationProblem
from fxprune.latency import Keeper, Sample, fast_counts, latency_text
from fxprune.latency.keeper import AGAIN
from fxprune.traced import trace
from fxprune.types import Budget, PrunePlan

X = torch.zeros(1, 3, 16, 16)
ORIGINAL = 4.0


def keeper_of(
    monkeypatch: pytest.MonkeyPatch, folder: Path, slower: Callable[[float], float]
) -> Keeper:
    """The real one, on a machine where a model takes ``slower(share of its products' work)`` ms."""
    traced = trace(Net(), X)
    model = clocked(monkeypatch, traced, folder, 16, ORIGINAL)
    work = {True: 0.0}

    class Bench:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            pass

        def measure(self, models: Sequence[nn.Module], **_: Any) -> list[Sample]:
            found = []
            for m in models:
                parts = run_products(m, X)
                done = sum(f.channels(w)[0] * f.channels(w)[1] for f, w in parts)
                work[True] = work[True] or done
                found.append(Sample(slower(done / work[True]), 5, 0.0))
            return found

    monkeypatch.setattr(keeper_file, "Bench", Bench)
    monkeypatch.setattr(keeper_file, "latency_model", lambda *_, **__: model)
    return Keeper(traced, TARGET)


def problem_of(keeper: Keeper, **options: Any) -> AllocationProblem:
    groups = keeper.traced.groups
    scores = {g.name: np.arange(g.n, dtype=np.float64) for g in groups}
    rounding = fast_counts(keeper.model, groups)
    made = AllocationProblem(
        keeper.traced, scores, Budget(latency=0.6), rounding, latency=keeper.model
    )
    return replace(made, **options)


@pytest.mark.parametrize("latency", [0.6, "2.4 ms"])
@pytest.mark.parametrize("name", ["uniform", "local"])
def test_a_plan_that_is_measured_above_the_limit_is_made_smaller(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, latency: float | str, name: str
) -> None:
    asked: list[PrunePlan] = []

    def loss(plan: PrunePlan) -> float:
        asked.append(plan)
        return -float(sum(map(len, plan.kept.values())))

    with keeper_of(monkeypatch, tmp_path, lambda share: ORIGINAL * share**0.8) as keeper:
        made = problem_of(keeper, budget=Budget(latency=latency), fitness=loss, max_evaluations=12)
        first = allocate.get(name)(made)
        asked.clear()
        plan = keeper.within(made, allocate.get(name))
        told = keeper.report(keeper_file.cut(keeper.traced, plan), plan, made)
    assert told["tried_ms"][0] > 2.4 >= told["tried_ms"][-1] == told["after_ms"]
    assert told["holds"] and told["limit_ms"] == pytest.approx(2.4)
    assert 2 <= len(told["tried_ms"]) <= 1 + AGAIN
    assert keeper.traced.cost(plan).macs < keeper.traced.cost(first).macs
    keys = [str(p.kept) for p in asked]
    assert len(set(keys)) == len(keys), "what one search knows the next does not ask again"
    assert "measured above the limit and made smaller" in latency_text(told)
    assert not keeper.folder.exists()


def test_a_limit_that_holds_at_once_is_searched_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[AllocationProblem] = []

    def uniform(problem: AllocationProblem) -> PrunePlan:
        calls.append(problem)
        return allocate.get("uniform")(problem)

    with keeper_of(monkeypatch, tmp_path, lambda share: ORIGINAL * share**2) as keeper:
        made = problem_of(keeper)
        plan = keeper.within(made, uniform)
        told = keeper.report(keeper_file.cut(keeper.traced, plan), plan, made)
        assert len(calls) == len(told["tried_ms"]) == 1 and told["holds"]
        keeper.within(replace(made, budget=Budget(macs=0.5)), uniform)
        assert len(calls) == 2 and len(keeper.tried) == 1, "nothing to hold"


@pytest.mark.parametrize("floor", [2.6, 3.9])
def test_what_cannot_be_reached_is_given_up_and_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, floor: float
) -> None:
    with keeper_of(monkeypatch, tmp_path, lambda share: max(floor, ORIGINAL * share)) as keeper:
        made = problem_of(keeper)
        plan = keeper.within(made, allocate.get("uniform"))
        told = keeper.report(keeper_file.cut(keeper.traced, plan), plan, made)
    assert not told["holds"] and told["after_ms"] >= floor
    assert 1 <= len(told["tried_ms"]) <= AGAIN
    assert "above the limit of 2.400 ms" in latency_text(told)


def test_prune_holds_what_the_user_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keeper_of(monkeypatch, tmp_path, lambda share: ORIGINAL * share**0.8).__exit__()
    result = fxprune.prune(
        Net(), X, Budget(latency="2.4 ms"), torch.randn(8, 3, 16, 16), criterion="l1",
        target="torch-cpu", max_evaluations=6, progress=False,
    )  # fmt: skip
    told = result.report["latency"]
    assert told["holds"] and told["after_ms"] <= 2.4 and told["limit_ms"] == 2.4
    assert told["tried_ms"][-1] == told["after_ms"]
