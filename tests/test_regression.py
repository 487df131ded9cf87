"""The choice of the ridge: large for few rows, small for many, and no repair where that is best."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fxprune.errors import InternalError
from fxprune.regression import Folds, Pair


def draw(seed: int, rows: int, noise: float) -> tuple[Tensor, Tensor]:
    """Original rows [S, 12] whose last four columns are mixtures of the first eight, and noise."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(4, 8, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    x = torch.randn(rows, 8, generator=g, dtype=torch.float64) + 3
    rest = x @ mix.T + noise * torch.randn(rows, 4, generator=g, dtype=torch.float64)
    return torch.cat([x, rest], 1), x


def pair(rows: int, noise: float, held: int = 400) -> Pair:
    keep = np.arange(12)[None] < 8
    made = Pair(keep)
    made.add(*draw(1, rows, noise))
    made.add(*draw(2, held, noise), 1)
    return made


def loss(found: Tensor, noise: float) -> float:
    """Of the removed columns, on rows that nobody has seen; about the mean."""
    x, y = draw(3, 2000, noise)
    error = x[:, 8:] - y @ found[0, 8:].T
    return float((error - error.mean(0)).square().mean())


EVERY = torch.eye(12, dtype=torch.float64)[None]


def test_without_noise_the_combination_is_found_and_the_mean_is_right() -> None:
    solved = pair(200, 0.0).solve(None, True, EVERY)
    assert solved.regression is not None
    assert loss(solved.regression, 0.0) < 1e-3
    x, y = draw(3, 2000, 0.0)
    left = (x - torch.cat([y, 0 * x[:, 8:]], 1) - y @ solved.regression[0].T).mean(0)
    assert torch.allclose(left, solved.offset[0], atol=0.05)


def test_the_ridge_follows_the_number_of_rows() -> None:
    """Ten rows for eight unknowns with much noise: any fixed small ridge is far behind."""
    noise = 12.0
    chosen = pair(10, noise).solve(None, True, EVERY, refit=False).regression
    small = pair(10, noise).solve(1e-4, True, EVERY, refit=False).regression
    assert chosen is not None
    assert small is not None
    assert loss(chosen, noise) < 0.7 * loss(small, noise)
    many = pair(5000, noise)
    choice = many.folds.chosen(True, EVERY)
    assert choice.guess is None
    assert choice.mean
    assert choice.ridge is not None
    assert choice.ridge <= 1e-2


def test_pure_noise_leaves_the_cut_alone() -> None:
    made = Pair(np.arange(12)[None] < 8)
    for fold in (0, 1):
        g = torch.Generator().manual_seed(fold)
        x = torch.randn(30, 12, generator=g, dtype=torch.float64)
        made.add(x, x[:, :8], fold)
    solved = made.solve(None, True, EVERY)
    assert solved.regression is not None
    assert not solved.regression.any()
    assert made.dropped
    assert torch.allclose(solved.offset[0, :8], torch.zeros(8, dtype=torch.float64), atol=1e-12)


def test_a_good_guess_is_kept_where_the_rows_cannot_do_better() -> None:
    guess = torch.zeros(1, 12, 8, dtype=torch.float64)
    guess[0, 8:] = torch.randn(
        4, 8, generator=torch.Generator().manual_seed(99), dtype=torch.float64
    )
    solved = pair(9, 5.0).solve(None, True, EVERY, (guess,), refit=False)
    without = pair(9, 5.0).solve(None, True, EVERY, refit=False)
    assert solved.regression is not None
    assert without.regression is not None
    assert loss(solved.regression, 5.0) < loss(without.regression, 5.0)


def test_the_weights_of_all_rows_are_those_of_a_direct_regression() -> None:
    """numpy: the removed column on the kept ones, from both folds."""
    x, y = draw(4, 300, 1.0)
    made = Pair(np.arange(12)[None] < 8)
    made.add(x[:200], y[:200])
    made.add(x[200:], y[200:], 1)
    one = made.solve(None, True, EVERY[:, 8:9])
    assert one.regression is not None
    direct, *_ = np.linalg.lstsq(np.c_[y.numpy(), np.ones(300)], x.numpy()[:, 8], rcond=None)
    assert np.allclose(one.regression[0, 8].numpy(), direct[:-1], atol=0.05)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("centred", [True, False])
def test_rows_that_are_known_are_summed_once(groups: int, centred: bool) -> None:
    """Both regressions on the same rows equal numpy's, with the ridge as extra rows."""
    g = torch.Generator().manual_seed(5)
    y = torch.randn(300, groups, 70, generator=g, dtype=torch.float64) + 1
    first, other = (torch.randn(300, groups, n, generator=g, dtype=torch.float64) for n in (4, 2))
    known = Folds()
    beside = Folds(known)
    for part in (slice(0, 90), slice(90, 300)):
        known.add(first[part], y[part], 0)
        beside.add(other[part], y[part], 0)
    for sums, target in ((known, first), (beside, other)):
        joint = sums.joint((0,), centred)
        found = joint.fit(0.1, None)
        for i in range(groups):
            x, t = (v[:, i].numpy() - centred * v[:, i].numpy().mean(0) for v in (y, target))
            level = 0.1 * (x**2).mean() * len(x)
            rows = np.r_[x, np.sqrt(level) * np.eye(70)]
            want, *_ = np.linalg.lstsq(rows, np.r_[t, np.zeros((70, t.shape[1]))], rcond=None)
            assert np.allclose(found[i].numpy(), want.T, atol=1e-10)
    assert len(known.joint((0,), centred).solvers) == 1  # for both
    beside.add(other, y, 0)
    with pytest.raises(InternalError, match="other rows"):
        beside.joint((0,), centred)


def test_a_guess_is_what_the_ridge_draws_to() -> None:
    sums = pair(200, 0.5).folds
    joint = sums.joint((0,), True)
    guess = torch.randn(1, 12, 8, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    level = 0.3 * joint.inside.diagonal(dim1=1, dim2=2).mean() * torch.eye(8, dtype=torch.float64)
    rest = joint.across - guess @ joint.inside
    want = guess + rest @ torch.linalg.inv(joint.inside + level)
    assert torch.allclose(joint.fit(0.3, guess), want, atol=1e-10)
    assert torch.allclose(joint.fit(1e9, guess), guess, atol=1e-6)
