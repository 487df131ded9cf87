"""Criteria against hand sums, brute force and direct least squares."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from fxprune import criteria
from fxprune.criteria import elimination
from fxprune.criteria.elimination import Coupled, Independent, eliminate, factor_of, inverse_of
from fxprune.errors import DataError, SpecError
from fxprune.observe import observe
from fxprune.traced import Traced, trace

Problem = tuple[np.ndarray, np.ndarray]


def problem(m: int, outputs: int, seed: int) -> Problem:
    """Moments G [m, m] and a weight [outputs, m]."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((5 * m, m)) @ (np.eye(m) + 0.3 * rng.standard_normal((m, m)))
    return x.T @ x / len(x), rng.standard_normal((outputs, m))


def loss_without(problems: list[Problem], gone: list[int]) -> float:
    """What is left after the best linear reconstruction, by the Schur complement of G."""
    total = 0.0
    for g, w in problems:
        stay = [i for i in range(len(g)) if i not in gone]
        schur = g[np.ix_(gone, gone)]
        if stay:
            across = g[np.ix_(gone, stay)]
            schur = schur - across @ np.linalg.solve(g[np.ix_(stay, stay)], across.T)
        total += float(np.trace(w[:, gone] @ schur @ w[:, gone].T))
    return total


def variables(channels: list[int], k: int) -> list[int]:
    return [c * k + i for c in channels for i in range(k)]


def brute_force(problems: list[Problem], n: int, k: int = 1, rows: int = 1) -> np.ndarray:
    gone: list[int] = []
    scores = np.zeros(n)
    width = n // rows
    while len(gone) < n:
        lost = [sum(g // width == r for g in gone) for r in range(rows)]
        open_rows = [r for r in range(rows) if lost[r] == min(lost)]
        options = [c for c in range(n) if c not in gone and c // width in open_rows]
        losses = [loss_without(problems, variables([*gone, c], k)) for c in options]
        best = options[int(np.argmin(losses))]
        gone.append(best)
        scores[best] = min(losses)
    return scores


def coupled(problems: list[Problem], k: int = 1) -> list[Coupled]:
    return [Coupled(inverse_of(g), factor_of(w), k) for g, w in problems]


@pytest.mark.parametrize("outputs", [3, 9])
def test_elimination_is_brute_force(outputs: int) -> None:
    problems = [problem(6, outputs, 1), problem(6, 4, 2)]
    assert np.allclose(eliminate(coupled(problems), 6), brute_force(problems, 6), rtol=1e-8)


def test_elimination_of_blocks_is_brute_force() -> None:
    problems = [problem(18, 5, 3)]
    found = eliminate(coupled(problems, k=3), 6)
    assert np.allclose(found, brute_force(problems, 6, k=3), rtol=1e-8)


def test_elimination_in_rows_is_brute_force() -> None:
    problems = [problem(8, 5, 4)]
    found = eliminate(coupled(problems), 8, rows=2)
    assert np.allclose(found, brute_force(problems, 8, rows=2), rtol=1e-8)
    order = found.argsort()
    for taken in range(2, 9, 2):
        assert np.bincount(order[:taken] // 4, minlength=2).tolist() == [taken // 2, taken // 2]


def test_many_at_once_is_exact_and_nearly_greedy() -> None:
    """Rounds of several channels: the losses are exact, the choice close to one by one."""
    problems = [problem(96, 20, 5)]
    found = eliminate(coupled(problems), 96)
    order = found.argsort()
    for taken in (1, 10, 48, 90):
        direct = loss_without(problems, order[:taken].tolist())
        assert found[order[taken - 1]] == pytest.approx(direct, rel=1e-7)
    assert (np.diff(found[order]) > 0).all()
    one_by_one = brute_force(problems, 96)
    assert np.sort(found)[48] <= 1.05 * np.sort(one_by_one)[48]


def test_elimination_beats_every_other_choice_of_three() -> None:
    problems = [problem(7, 6, 6)]
    order = eliminate(coupled(problems), 7).argsort()
    best = min(loss_without(problems, list(c)) for c in itertools.combinations(range(7), 3))
    assert loss_without(problems, order[:3].tolist()) <= 1.3 * best


def test_a_copy_goes_first_and_the_other_then_stays() -> None:
    g, w = problem(6, 4, 7)
    mix = np.eye(6)
    mix[5] = 0
    mix[5, 2] = 1.0  # channel 5 is a copy of channel 2
    g = mix @ g @ mix.T + 1e-9 * np.eye(6)
    order = eliminate(coupled([(g, w)]), 6).argsort()
    assert order[0] in (2, 5)
    assert order[1] not in (2, 5)


def test_independent_channels_add_up() -> None:
    losses = np.array([3.0, 1.0, 2.0])
    assert np.allclose(eliminate([Independent(losses)], 3), [6.0, 1.0, 3.0])


def test_factor_has_the_same_square() -> None:
    rng = np.random.default_rng(8)
    for shape in ((3, 5), (9, 5)):
        w = rng.standard_normal(shape)
        f = factor_of(w)
        assert f.shape[0] <= 5
        assert np.allclose(f.T @ f, w.T @ w, atol=1e-9)
    flat = np.outer([1.0, 2.0], [1.0, 2.0])
    f = elimination.factor_of_square(flat)
    assert np.allclose(f.T @ f, flat, atol=1e-9)
    assert not elimination.factor_of_square(np.zeros((2, 2))).any()


# -- with models ------------------------------------------------------------------------------


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.second = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.attend = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        return self.head((x + self.attend(x, x, x, need_weights=False)[0]).mean(1))


@pytest.fixture
def plain() -> Traced:
    torch.manual_seed(0)
    return trace(Plain().eval(), torch.zeros(1, 5))


def data(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def run(name: str, traced: Traced, x: torch.Tensor) -> dict[str, np.ndarray]:
    criterion = criteria.get(name)
    statistics = observe(traced, [x], **criteria.observe_options(criterion))
    return criterion(traced, statistics, np.random.default_rng(0))


def test_registry() -> None:
    assert {"attention", "l1", "l2", "random", "reconstruction"} <= set(criteria.names())
    with pytest.raises(SpecError, match="did you mean 'attention'"):
        criteria.get("atention")
    with pytest.raises(SpecError, match="function of a group"):
        criteria.get(3)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="a second one is refused"):
        criteria.register("l1")(criteria.RandomCriterion)
    own = criteria.RandomCriterion()
    assert criteria.get(own) is own


def test_magnitude_is_the_hand_sum(plain: Traced) -> None:
    weights = dict(plain.graph_module.named_parameters())
    parts = [weights["first.weight"], weights["first.bias"][:, None], weights["second.weight"].t()]
    rows = torch.cat([p.detach().double() for p in parts], dim=1)
    (free,) = [g for g in plain.groups if g.locked is None]
    for name, p in (("l1", 1), ("l2", 2)):
        found = criteria.get(name)(plain, None, np.random.default_rng(0))
        assert list(found) == [free.name]
        assert np.allclose(found[free.name], rows.norm(p, dim=1).numpy(), rtol=1e-6)


def test_magnitude_leaves_buffers_out() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1))
    traced = trace(model.eval(), torch.zeros(1, 1, 2, 2))
    before = criteria.get("l2")(traced, None, np.random.default_rng(0))
    dict(traced.graph_module.named_buffers())["1.running_mean"].fill_(9.0)
    after = criteria.get("l2")(traced, None, np.random.default_rng(0))
    (name,) = before
    assert np.array_equal(before[name], after[name])


def test_random_follows_its_generator(plain: Traced) -> None:
    draw = criteria.get("random")
    one, same, other = (draw(plain, None, np.random.default_rng(s)) for s in (0, 0, 1))
    (name,) = one
    assert np.array_equal(one[name], same[name])
    assert not np.array_equal(one[name], other[name])
    assert draw(plain, None, torch.Generator().manual_seed(0))[name].shape == (6,)


def test_reconstruction_is_direct_least_squares(plain: Traced) -> None:
    """Regress with the ridge on the samples themselves, and divide by the output's variance."""
    x = data(60, 5)
    (scores,) = run("reconstruction", plain, x).values()
    module = plain.graph_module
    with torch.no_grad():
        hidden = module.first(x).relu().double()
        out = module.second(hidden.float()).double()
    centred = (hidden - hidden.mean(0)).numpy()
    g = centred.T @ centred / 60
    g += 1e-3 * np.trace(g) / 6 * np.eye(6)
    w = module.second.weight.detach().double().numpy() / np.sqrt(
        float(out.var(0, correction=0).sum())
    )
    assert np.allclose(scores, brute_force([(g, w)], 6), rtol=1e-4)


def test_tiny_activations_rank_like_large_ones() -> None:
    """In float64 the scale of the input must not matter, down to 1e-60 of its energy."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False))
    model = model.double().eval()
    traced = trace(model, torch.zeros(1, 5, dtype=torch.float64))
    (one,) = run("reconstruction", traced, data(60, 5).double()).values()
    (tiny,) = run("reconstruction", traced, data(60, 5).double() * 1e-60).values()
    assert np.allclose(one, tiny, rtol=1e-6)
    (dead,) = run("reconstruction", traced, torch.zeros(60, 5, dtype=torch.float64)).values()
    assert np.isfinite(dead).all()


def test_attention_needs_its_statistics(plain: Traced) -> None:
    criterion = criteria.get("attention")
    with pytest.raises(DataError, match="calibration"):
        criterion(plain, None, np.random.default_rng(0))
    statistics = observe(plain, [data(20, 5)], gamma=0.0, displacement=False)
    with pytest.raises(SpecError, match="gamma"):
        criterion(plain, statistics, np.random.default_rng(0))
    with pytest.raises(SpecError, match="displacement"):
        criteria.AttentionCriterion("displacement")(plain, statistics, np.random.default_rng(0))
    with pytest.raises(SpecError, match="form"):
        criteria.AttentionCriterion("reconstructed")


def test_displacement_of_a_model_is_the_direct_one(plain: Traced) -> None:
    x = data(30, 5)
    criterion = criteria.AttentionCriterion("displacement")
    statistics = observe(plain, [x[:11], x[11:]], **criteria.observe_options(criterion))
    (scores,) = criterion(plain, statistics, np.random.default_rng(0)).values()
    with torch.no_grad():
        a = plain.graph_module.first(x).relu().double().square().numpy()
    f = a.sum(1)
    for c in range(6):
        left = f - a[:, c]
        moved = np.linalg.norm(f / np.linalg.norm(f) - left / np.linalg.norm(left))
        assert scores[c] == pytest.approx(moved, rel=1e-4)


@pytest.mark.parametrize("name", ["attention", "reconstruction", "l1", "l2", "random"])
def test_every_group_of_a_transformer_is_ranked(name: str) -> None:
    torch.manual_seed(0)
    traced = trace(Attention().eval(), torch.zeros(1, 7, 6))
    scores = run(name, traced, data(8, 7, 6))
    free = [g for g in traced.groups if g.locked is None]
    assert set(scores) == {g.name for g in free}
    for group in free:
        assert scores[group.name].shape == (group.n,)
        assert np.isfinite(scores[group.name]).all()
        assert len(np.unique(scores[group.name])) == group.n


def test_queries_and_keys_rank_by_their_energies() -> None:
    """They enter no consumer. E[q^2] E[k^2] of each channel, from the samples themselves."""
    torch.manual_seed(0)
    model = Attention().eval()
    traced = trace(model, torch.zeros(1, 7, 6))
    x = data(8, 7, 6)
    scores = run("attention", traced, x)
    quiet = [g for g in traced.groups if g.locked is None and not g.uses]
    assert quiet, [g.name for g in traced.groups]
    with torch.no_grad():
        inside = model.embed(x)
        made = (inside @ model.attend.in_proj_weight.t()).double().square().mean((0, 1)).numpy()
    for group in quiet:
        rows = {m.param: m.index for m in group.members}["attend.in_proj_weight"]
        expected = np.log(made[rows]).mean(1)
        assert np.array_equal(scores[group.name].argsort(), expected.argsort())
