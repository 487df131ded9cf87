"""Weights computed from other parameters: pruned through, or locked with a reason, never wrong.

The oracle is the model after ``remove_parametrizations``, with the removed positions of its plain
weights set to zero.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.utils.prune
from checks import prunable
from oracle import oracle_error, random_plan, randomise
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

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


def all_layers(apply: Callable[..., object], **options: object) -> Callable[[Net], None]:
    def change(net: Net) -> None:
        for m in (net.body[0], net.body[3], net.head):
            apply(m, **options)

    return change


OUT, IN = "3.weight:0", "3.weight:1"
CASES: dict[str, tuple[Callable[[Net], object], set[str]]] = {
    "weight_norm": (all_layers(parametrizations.weight_norm), {OUT, IN}),
    "weight_norm over inputs": (
        lambda net: parametrizations.weight_norm(net.body[3], dim=1),
        {OUT, IN},
    ),
    "weight_norm over all": (
        lambda net: parametrizations.weight_norm(net.body[3], dim=None),
        {OUT, IN},
    ),
    "own, elementwise": (
        lambda net: parametrize.register_parametrization(net.body[3], "weight", Signed()),
        {OUT, IN},
    ),
    "own, over inputs": (
        lambda net: parametrize.register_parametrization(net.body[3], "weight", Standardised()),
        {OUT},
    ),
    "spectral_norm": (lambda net: parametrizations.spectral_norm(net.body[3]), set()),
    "orthogonal": (lambda net: parametrizations.orthogonal(net.head), {IN}),
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
def test_pruned_through_or_locked(name: str) -> None:
    change, free = CASES[name]
    torch.manual_seed(0)
    net = randomise(Net())
    change(net)
    net.eval()
    x, other = torch.randn(2, 3, 8, 8), torch.randn(3, 3, 8, 8)
    traced = trace(net, x)
    found = removed(traced)
    assert {OUT, IN} & found == free
    if free != {OUT, IN}:
        assert any("cannot give fewer" in why or "fixed" in why for why in traced.locked.values())
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
            assert small is not None
            assert torch.allclose(small(other), actual, atol=1e-5)
        pruned.train()(x).sum().backward()
        grads = [p.grad for p in pruned.parameters() if p.grad is not None]
        assert grads and all(bool(g.isfinite().all()) for g in grads)


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
