"""Criteria of weights and gradients against plain loops; Torch-Pruning's against themselves.

Legend for shapes: n channels of a group.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet18

import fxprune
from fxprune import criteria
from fxprune.criteria import Channels, Labelled, TaylorCriterion
from fxprune.errors import InputError, SpecError
from fxprune.gradients import GradientPass, own_loss
from fxprune.observe import observe
from fxprune.traced import Traced, trace


class Net(nn.Module):
    """A residual stream of 6 channels (stem, second), an inner group of 5, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.first, self.second = nn.Conv2d(6, 5, 1), nn.Conv2d(5, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.second(self.first(x).relu())
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def net() -> tuple[Net, Traced, Tensor]:
    torch.manual_seed(0)
    model = Net().eval()
    with torch.no_grad():
        model.norm.weight.copy_(torch.randn(6))
    return model, trace(model, torch.zeros(1, 3, 6, 6)), torch.randn(12, 3, 6, 6)


def scores(traced: Traced, criterion: Any, x: Tensor | None = None) -> dict[str, np.ndarray]:
    chosen = criteria.get(criterion)
    options = criteria.observe_options(chosen)
    statistics = None if x is None else observe(traced, [x[:7], x[7:]], **options)
    return chosen(traced, statistics, np.random.default_rng(0))


def name_of(traced: Traced, param: str) -> str:
    (found,) = [g.name for g in traced.groups if any(m.param == param for m in g.members[:9])
                and g.locked is None and g.members and (param, 0) in
                {(m.param, m.dim) for m in g.members}]  # fmt: skip
    return found


def inner(model: Net) -> list[Tensor]:
    """Rows [5, m] of everything that goes with a channel between first and second."""
    w = model.first.weight.detach().flatten(1), model.second.weight.detach()[:, :, 0, 0].T
    return [*w, model.first.bias.detach()[:, None]]


def test_bn_scale_is_the_scale_or_the_norm(net: tuple[Net, Traced, Tensor]) -> None:
    model, traced, _ = net
    found = scores(traced, "bn_scale")
    want = model.norm.weight.detach().abs().numpy()
    assert np.allclose(found[name_of(traced, "stem.weight")], want)
    norm = torch.cat(inner(model), 1).norm(dim=1).numpy()
    assert np.allclose(found[name_of(traced, "first.weight")], norm)


def test_fpgm_is_the_sum_of_distances(net: tuple[Net, Traced, Tensor]) -> None:
    model, traced, _ = net
    rows = torch.cat(inner(model)[:2], 1).double()
    want = [sum(float((rows[i] - rows[j]).norm()) for j in range(5)) for i in range(5)]
    assert np.allclose(scores(traced, "fpgm")[name_of(traced, "first.weight")], want, rtol=1e-5)


def test_lamp_is_a_share_of_the_larger_ones(net: tuple[Net, Traced, Tensor]) -> None:
    model, traced, _ = net
    square = torch.cat(inner(model), 1).double().square().sum(1)
    want = [float(s / square[square >= s].sum()) for s in square]
    found = scores(traced, "lamp")[name_of(traced, "first.weight")]
    assert np.allclose(found, want)
    assert found.max() == 1.0


def by_hand(model: Net, x: Tensor, y: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Means over samples of the squared slope and of the summed squared terms, inner group."""
    squared, curvature = np.zeros(5), np.zeros(5)
    for i in range(len(x)):
        model = copy.deepcopy(model)
        model.zero_grad()
        F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
        for c in range(5):
            pairs = [(model.first.weight, (c,)), (model.first.bias, (c,))]
            pairs.append((model.second.weight, (slice(None), c)))
            terms = torch.cat([(w * w.grad)[at].detach().flatten() for w, at in pairs])
            squared[c] += float(terms.sum()) ** 2 / len(x)
            curvature[c] += float(terms.square().sum()) / len(x)
    return squared, curvature


def test_gradients_of_labelled_samples_are_those_of_a_loop(
    net: tuple[Net, Traced, Tensor],
) -> None:
    model, traced, x = net
    y = torch.arange(12) % 4
    squared, curvature = by_hand(model, x, y)
    labelled = Labelled([(x[:5], y[:5]), (x[5:], y[5:])])
    group = name_of(traced, "first.weight")
    assert np.allclose(scores(traced, TaylorCriterion(labelled), x)[group], squared, rtol=1e-4)
    hessian = criteria.HessianCriterion(labelled)
    assert np.allclose(scores(traced, hessian, x)[group], curvature / 2, rtol=1e-4)
    assert all(p.grad is None for p in model.parameters())


def test_without_labels_the_squared_slope_is_the_curvature_of_the_divergence() -> None:
    """On average over draws: Gauss-Newton, J^T (diag p - p p^T) J for classes, J^T J / scale."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([[0.3, -1.0, 1.2]], requires_grad=True)
    p = logits.detach().softmax(1)[0]
    draws = []
    for _ in range(4000):
        (g,) = torch.autograd.grad(own_loss(logits * 1.0, generator), logits)
        draws.append(torch.outer(g[0], g[0]))
    want = torch.diag(p) - torch.outer(p, p)
    assert torch.allclose(torch.stack(draws).mean(0), want, atol=0.02)
    other = torch.tensor([1.0, -2.0], requires_grad=True)
    draws = []
    for _ in range(2000):
        (g,) = torch.autograd.grad(own_loss(other * 1.0, generator), other)
        draws.append(torch.outer(g, g))
    assert torch.allclose(torch.stack(draws).mean(0), torch.eye(2) / 2.5, atol=0.03)


def test_label_free_gradients_leave_the_model_alone(net: tuple[Net, Traced, Tensor]) -> None:
    model, traced, x = net
    state = copy.deepcopy(model.state_dict())
    first = scores(traced, "taylor", x)
    again = scores(traced, "taylor", x)
    hessian = scores(traced, "hessian", x)
    for name, found in first.items():
        assert np.array_equal(found, again[name])
        assert (found > 0).any()
        assert (hessian[name] >= 0).all()
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    run = GradientPass(traced)
    with pytest.raises(fxprune.FxpruneError, match="no batch"):
        run.result()


def test_a_function_is_a_criterion(net: tuple[Net, Traced, Tensor]) -> None:
    model, traced, x = net

    def loudest(channels: Channels) -> Tensor:
        return torch.stack([rows.abs().amax(1) for _, rows in channels.rows()]).amax(0)

    found = scores(traced, loudest)[name_of(traced, "first.weight")]
    assert np.allclose(found, torch.cat(inner(model), 1).abs().amax(1).numpy())
    result = fxprune.prune(
        model, x[:1], 0.6, x, criterion=loudest, allocation="uniform", round_to=1, progress=False
    )
    assert result.after.macs <= 0.6 * result.before.macs


def test_what_is_no_criterion_is_refused(net: tuple[Net, Traced, Tensor]) -> None:
    _, traced, _ = net
    with pytest.raises(SpecError, match="function of a group"):
        criteria.get(3)
    with pytest.raises(InputError, match=r"6 channels.*shape \(2,\)"):
        scores(traced, lambda channels: [1.0, 2.0])


# --- Torch-Pruning's own ----------------------------------------------------------------------

INNER = ("layer1.0.conv1", "layer2.1.conv1", "layer3.0.conv1", "layer4.1.conv1")


@pytest.fixture(scope="module")
def resnet() -> tuple[nn.Module, Traced, Tensor]:
    torch.manual_seed(0)
    model = resnet18(num_classes=7).eval()
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.uniform_(0.2, 2.0)
    x = torch.randn(2, 3, 64, 64)
    return model, trace(model, x), x


def theirs(model: nn.Module, x: Tensor, importance: Any, path: str) -> np.ndarray:
    graph = tp.DependencyGraph().build_dependency(model, x)
    module = model.get_submodule(path)
    indices = list(range(module.out_channels))
    group = graph.get_pruning_group(module, tp.prune_conv_out_channels, indices)
    return importance(group).detach().numpy()


@pytest.mark.parametrize(
    "make",
    [
        lambda: tp.importance.GroupMagnitudeImportance(p=2),
        lambda: tp.importance.GroupMagnitudeImportance(p=1, group_reduction="first"),
        tp.importance.BNScaleImportance,
        tp.importance.FPGMImportance,
        tp.importance.LAMPImportance,
        tp.importance.GroupTaylorImportance,
        tp.importance.GroupHessianImportance,
    ],
)
def test_importances_rank_inner_convolutions_as_in_their_own_tool(
    make: Any, resnet: tuple[nn.Module, Traced, Tensor]
) -> None:
    model, traced, x = resnet
    F.cross_entropy(model(x), torch.tensor([1, 3])).backward()
    found = criteria.get(make())(traced, None, np.random.default_rng(0))
    for path in INNER:
        ours = found[name_of(traced, f"{path}.weight")]
        want = theirs(model, x, make(), path)
        assert np.allclose(ours, want, rtol=1e-5)
        assert np.array_equal(ours.argsort(), want.argsort())
    model.zero_grad(set_to_none=True)


def test_random_importance_and_one_without_gradients(
    resnet: tuple[nn.Module, Traced, Tensor],
) -> None:
    _, traced, _ = resnet
    found = criteria.get(tp.importance.RandomImportance())(traced, None, np.random.default_rng(0))
    assert found.keys() == {g.name for g in traced.groups if g.locked is None}
    with pytest.raises(InputError, match="backward"):
        criteria.get(tp.importance.GroupTaylorImportance())(traced, None, np.random.default_rng(0))


def test_maps_add_up_and_are_the_powers_of_the_input(net: tuple[Net, Traced, Tensor]) -> None:
    model, traced, x = net
    group = name_of(traced, "first.weight")
    plan = fxprune.PrunePlan({group: (0, 2, 3)})
    maps = criteria.attention_maps(traced, (x,), plan)
    with torch.no_grad():
        hidden = model.first(model.norm(model.stem(x)).relu()).relu().square()
    assert torch.allclose(maps[group].whole, hidden.sum(1), rtol=1e-5, atol=1e-6)
    assert torch.allclose(maps[group].kept, hidden[:, [0, 2, 3]].sum(1), rtol=1e-5, atol=1e-6)
    assert torch.allclose(maps[group].removed, hidden[:, [1, 4]].sum(1), rtol=1e-4, atol=1e-5)
    assert maps[group].whole.shape == (12, 4, 4)
