"""Weights computed from other parameters: pruned through, in the user's class where that can be.

The oracle is the model after ``remove_parametrizations``, with the removed positions of its plain
weights set to zero.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.utils.prune
from checks import prunable
from oracle import oracle_error, random_plan, randomise
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import fxprune
from fxprune import checkpoint
from fxprune.cut import as_user_class, cut
from fxprune.traced import Traced, trace
from fxprune.types import PrunePlan


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        first = (nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(*first, nn.Conv2d(8, 12, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Signed(nn.Module):
    """Elementwise, without an inverse."""

    def forward(self, w: Tensor) -> Tensor:
        return w * w.abs().sqrt()


class Standardised(nn.Module):
    """Over the inputs of each output: fewer inputs have another mean."""

    def forward(self, w: Tensor) -> Tensor:
        return w - w.mean((1, 2, 3), keepdim=True)


class Shifted(nn.Module):
    """Elementwise, with an inverse."""

    def forward(self, w: Tensor) -> Tensor:
        return w + 0.1

    def right_inverse(self, w: Tensor) -> Tensor:
        return w - 0.1


def all_layers(apply: Callable[..., object], **options: object) -> Callable[[Net], None]:
    def change(net: Net) -> None:
        for m in (net.body[0], net.body[3], net.head):
            apply(m, **options)

    return change


OUT, IN = "3.weight:0", "3.weight:1"
OWN, OTHER = True, False  # whether the user's class can compute what is left
CASES: dict[str, tuple[Callable[[Net], object], bool]] = {
    "weight_norm": (all_layers(parametrizations.weight_norm), OWN),
    "weight_norm over inputs": (
        lambda net: parametrizations.weight_norm(net.body[3], dim=1),
        OWN,
    ),
    "weight_norm over all": (
        lambda net: parametrizations.weight_norm(net.body[3], dim=None),
        OWN,
    ),
    "own, elementwise": (
        lambda net: parametrize.register_parametrization(net.body[3], "weight", Signed()),
        OWN,
    ),
    "own, over inputs": (
        lambda net: parametrize.register_parametrization(net.body[3], "weight", Standardised()),
        OTHER,
    ),
    "spectral_norm": (all_layers(parametrizations.spectral_norm), OWN),
    "spectral_norm over inputs": (
        lambda net: parametrizations.spectral_norm(net.body[3], dim=1),
        OWN,
    ),
    "orthogonal": (lambda net: parametrizations.orthogonal(net.body[3]), OTHER),
    "several": (
        lambda net: [
            parametrizations.weight_norm(net.body[3]),
            parametrize.register_parametrization(net.body[3], "weight", Shifted()),
        ],
        OWN,
    ),
}


def plain(model: nn.Module) -> nn.Module:
    """The model with weights of its own, as remove_parametrizations leaves it.

    (That one changes the class, which copies of a module share.)
    """
    made = Net()
    with torch.no_grad():
        for name, t in [*made.named_parameters(), *made.named_buffers()]:
            path, _, own = name.rpartition(".")
            t.copy_(getattr(model.get_submodule(path), own))
    return made


def plain_name(name: str) -> str:
    head, _, tail = name.partition(".parametrizations.weight.")
    return f"{head}.weight" if tail else name


def masked(model: nn.Module, traced: Traced, plan: PrunePlan) -> nn.Module:
    made = plain(model)
    own = dict(made.named_parameters()) | dict(made.named_buffers())
    mask = traced.masks(plan)
    with torch.no_grad():
        for (name, dim), classes in traced.param_classes.items():
            t = own[plain_name(name)]
            kept = torch.from_numpy(mask[classes])
            if len(kept) == t.shape[dim]:
                shape = [len(kept) if d == dim else 1 for d in range(t.dim())]
                t.mul_(kept.reshape(shape).to(t.dtype))
    return made.eval()


def removed(traced: Traced) -> set[str]:
    return {
        f"{plain_name(n)}:{d}".removeprefix("body.")
        for n, _, d in (m.rpartition(":") for m in prunable(traced))
    }


@pytest.mark.parametrize("name", CASES)
def test_pruned_through(name: str) -> None:
    change, own = CASES[name]
    torch.manual_seed(0)
    net = randomise(Net())
    change(net)
    net.eval()
    x, other = torch.randn(2, 3, 8, 8), torch.randn(3, 3, 8, 8)
    traced = trace(net, x)
    assert removed(traced) >= {OUT, IN}
    for seed in range(3):
        plan = random_plan(traced, seed, 0.5 if seed else None)
        pruned = cut(traced, plan)
        assert set(pruned.state_dict()) == set(net.state_dict())
        with torch.no_grad():
            expected = masked(net, traced, plan)(other)
            actual = pruned(other)
            error = float((actual - expected).abs().max() / expected.abs().max())
            assert error <= 1e-5
            small = as_user_class(traced, plan, pruned)
            assert (small is not None) == own
            if small is not None:
                assert torch.allclose(small(other), actual, atol=1e-5)
        trained = pruned if small is None else small
        trained.train()(x).square().sum().backward()
        grads = {n: p.grad for n, p in trained.named_parameters()}
        assert all(g is not None and bool(g.isfinite().all()) for g in grads.values()) or not own
        assert any(g is not None for g in grads.values())


NORMS: dict[str, Callable[[Net], object]] = {
    "parametrized": all_layers(parametrizations.weight_norm),
    "hooks": all_layers(nn.utils.weight_norm),
    "spectral": all_layers(parametrizations.spectral_norm),
    "spectral hooks": all_layers(nn.utils.spectral_norm),
}


def normed(kind: str) -> Net:
    torch.manual_seed(0)
    net = randomise(Net())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        NORMS[kind](net)
    net.eval()
    return net


@pytest.mark.parametrize("kind", NORMS)
def test_repaired_and_saved(kind: str, tmp_path: Path) -> None:
    """Weights that are computed are repaired too; the class sets its own parameters to that."""
    net, images = normed(kind), torch.randn(16, 3, 8, 8)
    result, bare = (
        fxprune.prune(net, images[:2], 0.5, images, allocation="uniform", repair=repair)
        for repair in ("lstsq", None)
    )
    assert type(result.model) is Net
    with torch.no_grad():
        left, cut_only = ((r.model(images) - net(images)).norm() for r in (result, bare))
    assert left < 0.7 * cut_only
    checkpoint.save(tmp_path / "kept", result.model, result.plan)
    again = fxprune.load(tmp_path / "kept", normed(kind), images[:2])
    assert torch.equal(again(images), result.model(images))


class Depthwise(nn.Module):
    """The number of groups is written in a layer whose weight is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Conv1d(3, 8, 1), nn.Conv1d(8, 4, 1)
        self.b = parametrizations.weight_norm(nn.Conv1d(8, 8, 3, groups=8))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)).relu())


def test_groups_of_a_computed_weight() -> None:
    torch.manual_seed(0)
    net, x = randomise(Depthwise()), torch.randn(2, 3, 9)
    traced = trace(net, x)
    plan = random_plan(traced, 0, 0.5)
    pruned = cut(traced, plan)
    assert oracle_error(traced, plan, pruned, (x,)) <= 1e-5
    small = as_user_class(traced, plan, pruned)
    assert isinstance(small, Depthwise) and small.b.groups == 4
    assert torch.allclose(small(x), pruned(x), atol=1e-5)


@pytest.mark.parametrize("dim", [0, 1, None])
def test_gains_of_hooks_stay_trainable(dim: int | None) -> None:
    torch.manual_seed(0)
    net, x = randomise(Net()), torch.randn(2, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(net.body[3], dim=dim)
    traced = trace(net.eval(), x)
    plan = random_plan(traced, 1, 0.5)
    pruned = cut(traced, plan)
    assert oracle_error(traced, plan, pruned, (x,)) <= 1e-5
    small = as_user_class(traced, plan, pruned)
    assert small is not None
    assert torch.allclose(small(x), pruned(x), atol=1e-5)
    small.train()(x).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in small.parameters())


@pytest.mark.parametrize(
    "change",
    [
        all_layers(nn.utils.weight_norm),
        lambda net: nn.utils.spectral_norm(net.body[3]),
        lambda net: nn.utils.prune.l1_unstructured(net.body[3], "weight", 0.3),
    ],
)
def test_hooks_that_compute_weights(change: Callable[[Net], object]) -> None:
    """The older way, by a hook before forward: what cannot be followed is locked."""
    torch.manual_seed(0)
    net = randomise(Net())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        change(net)
    net.eval()
    net(torch.randn(2, 3, 8, 8))
    traced = trace(net, torch.randn(2, 3, 8, 8))
    for seed in range(2):
        plan = random_plan(traced, seed)
        pruned = cut(traced, plan)
        assert oracle_error(traced, plan, pruned, (torch.randn(3, 3, 8, 8),)) <= 1e-5
