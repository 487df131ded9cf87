"""What is left at an output, fitted once more: against numpy least squares on patches.

Legend for shapes: N samples, C channels, P positions, T taps.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune.cut import cut
from fxprune.sequential import repair_sequential
from fxprune.traced import Traced, trace
from fxprune.types import PrunePlan

TINY = 1e-13


def data(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(build: Callable[[], nn.Module], *shape: int) -> tuple[nn.Module, Traced]:
    torch.manual_seed(0)
    model = build().double().eval()
    return model, trace(model, torch.zeros(*shape, dtype=torch.float64))


def without(traced: Traced, param: str, gone: tuple[int, ...]) -> PrunePlan:
    (group,) = [
        g
        for g in traced.groups
        if g.locked is None and any((m.param, m.dim) == (param, 0) for m in g.members)
    ]
    return PrunePlan({group.name: tuple(i for i in range(group.n) if i not in gone)})


def fitted(design: Tensor, target: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Weights and intercept of ``target`` [S, O] on ``design`` [S, K]."""
    rows = np.c_[design.numpy(), np.ones(len(design))]
    found, *_ = np.linalg.lstsq(rows, target.numpy(), rcond=None)
    return found[:-1], found[-1]


class Branches(nn.Module):
    """The second branch of a sum can make up for what the first one lost."""

    def __init__(self, behind: nn.Module) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 4)
        self.hidden, self.last = nn.Linear(5, 6), nn.Linear(6, 4)
        self.behind = behind

    def forward(self, x: Tensor) -> Tensor:
        first = self.down(self.up(x).tanh())
        return first + self.behind(self.last(self.hidden(x).tanh()))


@pytest.mark.parametrize("behind", [nn.Identity(), nn.BatchNorm1d(4), nn.Dropout()])
def test_the_last_branch_of_a_sum_makes_up_for_the_first(behind: nn.Module) -> None:
    if isinstance(behind, nn.BatchNorm1d):
        with torch.no_grad():
            behind.weight.copy_(torch.tensor([0.5, 2.0, -1.0, 3.0]))
            behind.running_mean.copy_(data(4))
    model, traced = make(lambda: Branches(behind), 2, 5)
    plan = without(traced, "up.weight", (1, 4, 6))
    x = data(60, 5)
    small = cut(traced, plan)
    report = repair_sequential(traced, plan, small, list(x.split(9)), ridge=TINY)
    assert "last:0" in report.repaired
    with torch.no_grad():
        first = small.get_submodule("down")(small.get_submodule("up")(x).tanh())
        scale = behind.weight / (behind.running_var + behind.eps).sqrt() if scaled(behind) else 1.0
        missing = (model.down(model.up(x).tanh()) - first) / scale
        hidden = model.hidden(x).tanh()
        weight, _ = fitted(hidden, missing + model.last(hidden))
        want, got = model(x), small(x)
        left = want - first - behind(model.last(hidden))
    new = small.get_submodule("last").weight.detach().numpy()
    assert np.allclose(new, weight.T, atol=1e-7)
    assert float((want - got).norm()) < 0.9 * float(left.norm())
    assert torch.allclose((want - got).mean(0), torch.zeros(4, dtype=torch.float64), atol=1e-9)


def scaled(behind: nn.Module) -> bool:
    return isinstance(behind, nn.BatchNorm1d)


def test_nothing_is_asked_of_what_lies_behind_a_nonlinearity() -> None:
    """Its own output is right already, and behind the activation it is no longer affine."""
    _, traced = make(lambda: Branches(nn.Tanh()), 2, 5)
    plan = without(traced, "up.weight", (1, 4, 6))
    small = cut(traced, plan)
    before = small.get_submodule("last").weight.detach().clone()
    repair_sequential(traced, plan, small, [data(60, 5)], ridge=TINY)
    assert torch.allclose(small.get_submodule("last").weight, before, atol=1e-9)


@pytest.mark.parametrize(
    ("last", "shape"),
    [
        (lambda: nn.Conv2d(6, 3, 3, padding=1), (2, 6, 6)),
        (lambda: nn.Conv2d(6, 3, (3, 2), stride=2, padding=(2, 0), dilation=(2, 1)), (2, 7, 6)),
        (lambda: nn.Conv1d(6, 3, 3, stride=2), (2, 15)),
        (lambda: nn.Conv3d(6, 3, 2, padding=1), (2, 3, 3, 3)),
    ],
)
def test_every_tap_of_a_kernel_is_fitted(
    last: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    """numpy on the patches that a convolution with unit kernels cuts out."""
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(shape) - 1]
    model, traced = make(lambda: nn.Sequential(kind(2, 6, 1), nn.Tanh(), last()), 1, *shape)
    plan = without(traced, "0.weight", (1, 4))
    x = data(80, *shape)
    small = cut(traced, plan)
    repair_sequential(traced, plan, small, list(x.split(20)), ridge=TINY)
    conv = model[2]
    with torch.no_grad():
        inputs = small.get_submodule("0")(x).tanh()
        taps = conv.kernel_size
        unit = torch.eye(int(np.prod(taps)), dtype=torch.float64).reshape(-1, 1, *taps)
        apply = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(shape) - 1]
        patches = apply(
            inputs, unit.repeat(4, *[1] * (unit.ndim - 1)), None, conv.stride, conv.padding,
            conv.dilation, 4,
        )  # fmt: skip
        design = patches.flatten(2).transpose(1, 2).flatten(0, 1)
        target = model(x).flatten(2).transpose(1, 2).flatten(0, 1)
    weight, bias = fitted(design, target)
    new = small.get_submodule("2")
    assert np.allclose(new.weight.detach().flatten(1).numpy(), weight.T, atol=1e-6)
    assert np.allclose(new.bias.detach().numpy(), bias, atol=1e-6)


def test_a_depthwise_kernel_is_fitted_channel_by_channel() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(2, 8, 1), nn.Conv2d(8, 5, 1)
            self.depth = nn.Conv2d(5, 5, 3, groups=5)

        def forward(self, x: Tensor) -> Tensor:
            return self.depth(self.second(self.first(x).tanh()))

    model, traced = make(Net, 1, 2, 6, 6)
    plan = without(traced, "first.weight", (0, 3, 5))
    x = data(50, 2, 6, 6)
    small = cut(traced, plan)
    repair_sequential(traced, plan, small, [x], ridge=TINY)
    with torch.no_grad():
        inputs = small.get_submodule("second")(small.get_submodule("first")(x).tanh())
        patches = F.unfold(inputs, 3).unflatten(1, (5, 9))  # [N, C, T, P]
        want = model(x).flatten(2)
    for c in range(5):
        design = patches[:, c].transpose(1, 2).flatten(0, 1)
        weight, _ = fitted(design, want[:, c].reshape(-1, 1))
        new = small.get_submodule("depth").weight.detach()[c].flatten()
        assert np.allclose(new.numpy(), weight[:, 0], atol=1e-6)
