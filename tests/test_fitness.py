"""Fitness against divergences computed another way, on models whose outputs are known."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax
from torch import Tensor, fx, nn

from fxprune.cut import cut
from fxprune.errors import DataError, InputError, ModelError
from fxprune.fitness import EvaluateFitness, KLFitness, refer
from fxprune.traced import Traced, trace
from fxprune.types import PrunePlan


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def entropy(p: np.ndarray, q: np.ndarray, axis: int) -> float:
    return float(rel_entr(p, q).sum(axis=axis).mean())


@pytest.mark.parametrize("shape", [(6, 10), (4, 3, 5, 7)])
def test_logits_give_the_divergence_over_dim_one(shape: tuple[int, ...]) -> None:
    x, y = normal(*shape), normal(*shape, seed=1)
    expected = entropy(softmax(x.double().numpy(), 1), softmax(y.double().numpy(), 1), 1)
    assert refer(x).divergence(y) == pytest.approx(expected, rel=1e-10)
    assert refer(x).divergence(x) == 0
    assert refer(x).divergence(x + 3) == pytest.approx(0, abs=1e-12)


def test_probabilities_are_taken_as_they_are() -> None:
    p, q = normal(6, 10).double().softmax(1), normal(6, 10, seed=1).double().softmax(1)
    expected = entropy(p.numpy(), q.numpy(), 1)
    assert refer(p).divergence(q) == pytest.approx(expected, rel=1e-10)
    logp, logq = log_softmax(p.log().numpy(), 1), log_softmax(q.log().numpy(), 1)
    assert refer(torch.tensor(logp)).divergence(torch.tensor(logq)) == pytest.approx(expected)


@pytest.mark.parametrize("shape", [(6, 1), (6,), (2, 5, 8)])
def test_outputs_without_classes_give_a_relative_error(shape: tuple[int, ...]) -> None:
    x, y = normal(*shape), normal(*shape, seed=1)
    expected = ((y - x) ** 2).sum() / (x**2).sum()
    assert refer(x).divergence(y) == pytest.approx(float(expected), rel=1e-5)


def test_nested_outputs_average_over_their_floating_tensors() -> None:
    def out(seed: int) -> dict[str, Any]:
        return {"a": normal(4, 5, seed=seed), "b": [torch.arange(4), (normal(4, 2, 2, seed=seed),)]}

    x, y = out(0), out(1)
    first = ((y["a"] - x["a"]) ** 2).sum() / (x["a"] ** 2).sum()
    second = ((y["b"][1][0] - x["b"][1][0]) ** 2).sum() / (x["b"][1][0] ** 2).sum()
    assert refer(x).divergence(y) == pytest.approx(float(first + second) / 2, rel=1e-5)


def test_an_output_without_floating_tensors_is_refused() -> None:
    with pytest.raises(ModelError, match="evaluate="):
        refer((torch.arange(3), None))


def small() -> tuple[nn.Module, Traced]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 24, 3),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(24, 5),
        ).train()
    return model, trace(model, normal(2, 3, 8, 8))


def half(traced: Traced) -> PrunePlan:
    return PrunePlan({g.name: tuple(range(g.n // 2)) for g in traced.groups if g.locked is None})


def test_a_plan_costs_the_divergence_of_its_cut_model() -> None:
    _, traced = small()
    batches = [normal(8, 3, 8, 8, seed=1), (normal(3, 3, 8, 8, seed=2),)]
    fitness = KLFitness(traced, None, batches)
    assert fitness(PrunePlan({})) == pytest.approx(0, abs=1e-10)
    x = torch.cat([batches[0], batches[1][0]])
    with torch.no_grad():
        p = traced.graph_module(x).double().numpy()
        q = cut(traced, half(traced))(x).double().numpy()
    expected = entropy(softmax(p, 1), softmax(q, 1), 1)
    assert fitness(half(traced)) == pytest.approx(expected, rel=1e-6)
    assert expected > 1e-4


def test_the_repair_is_applied_to_the_cut_model() -> None:
    _, traced = small()
    seen = []

    def repair(plan: PrunePlan, module: fx.GraphModule) -> None:
        seen.append(plan)
        with torch.no_grad():
            for p in module.parameters():
                p.zero_()

    fitness = KLFitness(traced, repair, [normal(8, 3, 8, 8)])
    with torch.no_grad():
        p = traced.graph_module(normal(8, 3, 8, 8)).double().softmax(1).numpy()
    assert fitness(half(traced)) == pytest.approx(entropy(p, np.full_like(p, 0.2), 1), rel=1e-6)
    assert seen == [half(traced)]
    assert fitness(PrunePlan({})) > 0  # the tensors of the original were not touched


def test_threads_agree_and_nothing_of_the_users_changes() -> None:
    model, traced = small()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fitness = KLFitness(traced, None, [normal(8, 3, 8, 8)])
    plans = [half(traced), PrunePlan({}), half(traced), half(traced)] * 3
    state = torch.get_rng_state()
    with ThreadPoolExecutor(4) as executor:
        together = list(executor.map(fitness, plans))
    assert together == [fitness(p) for p in plans]
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and all(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.is_grad_enabled()


def test_a_model_that_breaks_is_infinitely_bad() -> None:
    _, traced = small()

    def repair(plan: PrunePlan, module: fx.GraphModule) -> None:
        with torch.no_grad():
            next(module.parameters()).fill_(float("nan"))

    assert KLFitness(traced, repair, [normal(8, 3, 8, 8)])(half(traced)) == float("inf")


def test_no_batches_are_refused() -> None:
    with pytest.raises(DataError, match="held-out"):
        KLFitness(small()[1], None, [])


def test_the_users_evaluation_is_negated() -> None:
    _, traced = small()
    count = EvaluateFitness(traced, None, lambda m: sum(p.numel() for p in m.parameters()))
    assert count(PrunePlan({})) < count(half(traced)) < 0
    with pytest.raises(InputError, match="one number"):
        EvaluateFitness(traced, None, lambda m: "good")(half(traced))  # type: ignore[arg-type, return-value]
