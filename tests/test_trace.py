"""Tracing: the user's model is left as it was, and the graph computes what the model computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from patterns_attention import PackedAttention
from patterns_flow import ControlFlowOnData
from torch import Tensor, nn

import fxprune
from fxprune.cut import cut
from fxprune.errors import ModelError
from fxprune.traced import trace


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(8, 4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Raises(nn.Module):
    """Runs for a while, then fails; writes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.wrong = Net(), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.wrong(self.net(x))


class Noisy(Net):
    """Draws random numbers and writes a buffer, also in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x + 0 * torch.rand_like(x))
        self.seen += 1
        return y


def images(batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything that may not change."""
    return {
        "modes": [m.training for m in model.modules()],
        "types": [type(m) for m in model.modules()],
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for m in model.modules()
        ],
        "tensors": {k: (id(v), v.clone()) for k, v in model.state_dict(keep_vars=True).items()},
        "grads": [(p.requires_grad, p.grad) for p in model.parameters()],
        "attributes": sorted(model.__dict__),
        "threads": torch.get_num_threads(),
        "rng": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].copy(),  # noqa: NPY002 - the global state is meant
        "grad mode": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key in before:
        if key == "tensors":
            for name, (identity, value) in before[key].items():
                assert after[key][name][0] == identity, name
                assert torch.equal(value, after[key][name][1]), name
        elif key == "rng":
            assert torch.equal(before[key], after[key])
        elif key == "numpy":
            assert np.array_equal(before[key], after[key])
        else:
            assert before[key] == after[key], key


def hooked(model: nn.Module) -> nn.Module:
    """Training mode with one part frozen in eval mode, and hooks."""
    model.train()
    first = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    first.eval()
    next(iter(model.parameters())).requires_grad_(False)
    first.register_forward_hook(lambda m, i, o: None)
    model.register_forward_pre_hook(lambda m, i: None)
    return model


@pytest.mark.parametrize("build", [Net, Noisy])
def test_tracing_leaves_the_model_alone(build: type[nn.Module]) -> None:
    model, x = hooked(build()), images()
    kept = x.clone()
    before = state_of(model)
    traced = trace(model, x)
    cut(traced, traced.full_plan())
    traced.cost(traced.full_plan())
    assert_same(before, state_of(model))
    assert torch.equal(x, kept)


def test_pruning_leaves_the_model_alone() -> None:
    model, x = hooked(Net()), images(8)
    before = state_of(model)
    result = fxprune.prune(model, images(), 0.6, [x], allocation="uniform", progress=False)
    assert_same(before, state_of(model))
    assert result.model.training


def test_an_exception_leaves_the_model_alone() -> None:
    model = hooked(Raises())
    before = state_of(model)
    with pytest.raises(ModelError, match=r"Raises.*\(2, 3, 8, 8\)"):
        trace(model, images())
    assert_same(before, state_of(model))
    assert torch.rand is torch.rand and torch.zeros(1).shape == (1,)
    assert torch.zeros.__name__ == "zeros", "a patched function was left behind"


def test_too_many_inputs() -> None:
    with pytest.raises(ModelError, match=r"2 came|\(2, 3, 8, 8\), \(2, 3, 8, 8\)"):
        trace(Net(), (images(), images()))


def test_wrong_shape_names_shape_and_cure() -> None:
    with pytest.raises(ModelError, match=r"\(2, 5, 8, 8\).*Give inputs"):
        trace(Net(), torch.zeros(2, 5, 8, 8))


def test_opaque_part_is_named_with_its_reason() -> None:
    traced = trace(ControlFlowOnData(), images())
    assert set(traced.captured.opaque) == {"choice"}
    assert "data" in traced.captured.opaque["choice"]
    assert traced.locked["choice"] == traced.captured.opaque["choice"]


@pytest.mark.parametrize("build", [Net, PackedAttention])
def test_names_are_the_users(build: type[nn.Module]) -> None:
    model = build()
    x = images() if build is Net else torch.randn(2, 9, 16)
    traced = trace(model, x)
    gm = traced.graph_module
    assert {n for n, _ in gm.named_parameters()} == {n for n, _ in model.named_parameters()}
    assert {n for n, _ in gm.named_buffers()} == {n for n, _ in model.named_buffers()}
    mine, theirs = dict(gm.named_parameters()), dict(model.named_parameters())
    assert all(mine[n] is theirs[n] for n in mine), "the traced graph has the model's own tensors"
    pruned = cut(traced, traced.full_plan())
    assert set(pruned.state_dict()) == set(model.state_dict())
    nodes = [n.name for n in pruned.graph.nodes]
    assert nodes == [n.name for n in gm.graph.nodes]


def test_every_group_member_is_a_parameter_of_the_model() -> None:
    model = Net()
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for g in trace(model, images()).groups:
        for m in g.members:
            assert m.index.shape[0] == g.n
            assert m.index.max() < tensors[m.param].shape[m.dim]


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_batch_size_stays_free(batch: int) -> None:
    class Views(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            b, c, h, w = y.shape
            y = y.view(b, 2, c // 2, h * w).reshape(b * 2, c // 2, -1).sigmoid()
            return self.head(y.view(b, c, -1).mean(2))

    model = Views().eval()
    traced = trace(model, images(2))
    with torch.no_grad():
        expected = model(images(batch, 7))
        assert torch.equal(traced.graph_module(images(batch, 7)), expected)


def test_lists_and_tuples_of_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p, self.q = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor, y: Tensor | None = None, *, scale: float = 2.0) -> Tensor:
            z = self.p(x) * scale
            return self.q(z if y is None else z + self.p(y))

    x, y = torch.randn(2, 4), torch.randn(2, 4)
    model = Two().eval()
    for inputs in (x, (x, y), [x, y]):
        args = (x,) if isinstance(inputs, Tensor) else tuple(inputs)
        with torch.no_grad():
            assert torch.equal(trace(model, inputs).graph_module(*args), model(*args))


def test_dropout_is_off_in_the_graph_and_back_in_training() -> None:
    traced = trace(Net().train(), images())
    gm = traced.graph_module
    assert not any(m.training for m in gm.modules())
    with torch.no_grad():
        assert torch.equal(gm(images()), gm(images()))
    pruned = cut(traced, traced.full_plan()).train()
    with torch.no_grad():
        assert not torch.equal(pruned(images()), pruned(images()))


def test_names_that_torch_fx_keeps_for_itself() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.graph = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.graph(x)

    with pytest.raises(ModelError, match=r"Named\.graph .* another name"):
        trace(Named(), torch.randn(2, 3))
