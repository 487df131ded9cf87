"""prune(), apply() and load() as a user calls them."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo
from oracle import oracle_error, randomise
from torch import Tensor, nn

import fxprune
from fxprune.checkpoint import save
from fxprune.errors import BudgetError, DataError, ModelError, PlanError, SpecError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32))
        self.one = nn.Conv2d(32, 32, 3, padding=1)
        self.two = nn.Conv2d(32, 32, 3, padding=1)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).relu()
        y = (y + self.two(self.one(y).relu())).relu()
        return self.head(y.mean((2, 3)))


def net() -> nn.Module:
    torch.manual_seed(0)
    return randomise(Net()).train()


X = torch.zeros(1, 3, 8, 8)


def data(n: int = 4) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(16, 3, 8, 8, generator=g) for _ in range(n)]


def prune(model: nn.Module, **options: object) -> fxprune.PruneResult:
    given = {"data": data(), "progress": False, "max_evaluations": 8, "round_to": 1} | options
    return fxprune.prune(model, X, **({"budget": 0.5} | given))  # type: ignore[arg-type]


def test_the_model_and_the_process_are_left_alone() -> None:
    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rng, threads = torch.get_rng_state(), torch.get_num_threads()
    legacy = np.random.get_state()[1].copy()  # noqa: NPY002 - user code may use it
    result = prune(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training and result.model.training
    assert torch.equal(rng, torch.get_rng_state()) and threads == torch.get_num_threads()
    assert np.array_equal(legacy, np.random.get_state()[1])  # noqa: NPY002


@pytest.mark.parametrize("allocation", ["local", "uniform", "global", "isomorphic"])
@pytest.mark.parametrize("criterion", ["attention", "reconstruction", "l1", "l2", "random"])
def test_cut_alone_equals_the_masked_original(allocation: str, criterion: str) -> None:
    result = prune(net(), allocation=allocation, criterion=criterion, repair=None)
    inputs = (data(1)[0],)
    module = result.graph_module.eval()
    assert oracle_error(result.analysis, result.plan, module, inputs) <= 1e-5
    assert type(result.model) is Net
    torch.testing.assert_close(result.model.eval()(*inputs), module(*inputs))
    assert 0.4 * result.before.macs < result.after.macs <= 0.5 * result.before.macs
    assert result.after.params == sum(p.numel() for p in result.model.parameters())


def test_repair_comes_nearer_to_the_original() -> None:
    model, x = net().eval(), data(6)[-1]

    def distance(repair: str | None) -> float:
        small = prune(model, allocation="uniform", criterion="l1", repair=repair).model.eval()
        return float((small(x) - model(x)).square().mean())

    with torch.no_grad():
        assert distance("lstsq") < 0.5 * distance(None)


def test_one_seed_one_plan() -> None:
    first, second = prune(net(), seed=3), prune(net(), seed=3)
    assert first.plan.kept == second.plan.kept
    state = second.model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in first.model.state_dict().items())


def test_saved_and_loaded_by_the_class(tmp_path: Path) -> None:
    result = prune(net())
    save(tmp_path / "run", result.graph_module, result.plan)
    again = fxprune.load(tmp_path / "run", net(), X)
    x = data(1)[0]
    torch.testing.assert_close(again.eval()(x), result.model.eval()(x))


def test_excluded_layers_keep_their_width_and_evaluate_guides() -> None:
    seen: list[float] = []

    def evaluate(model: nn.Module) -> float:
        seen.append(float(sum(p.numel() for p in model.parameters())))
        return seen[-1]

    result = prune(net(), exclude=["one.bias"], evaluate=evaluate, repair="bn")
    assert result.model.one.out_channels == 32 and result.model.stem[0].out_channels < 32
    assert seen


def test_random_inputs_are_said() -> None:
    with pytest.warns(UserWarning, match="no calibration data"):
        result = prune(net(), data=None, allocation="uniform")
    assert "random" in result.report["calibration"]


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"budget": 0}, BudgetError, "budget"),
        ({"budget": 1.5}, BudgetError, "budget"),
        ({"budget": 1e-6}, BudgetError, "cannot be reached"),
        ({"criterion": "l11"}, SpecError, "did you mean"),
        ({"allocation": "locale"}, SpecError, "did you mean 'local'"),
        ({"repair": "lsq"}, SpecError, "repair"),
        ({"exclude": ["nothing.here"]}, SpecError, "exclude"),
        ({"data": []}, DataError, "no samples"),
        ({"data": "digits"}, DataError, "data is the text 'digits'"),
        ({"seed": -1}, SpecError, "seed must be a whole number from 0 to 4,294,967,295, got -1"),
        ({"seed": 0.5}, SpecError, "seed"),
        ({"calibration_samples": "8"}, SpecError, "calibration_samples"),
        ({"max_evaluations": 2.5}, SpecError, "max_evaluations"),
        ({"max_seconds": "5"}, SpecError, "max_seconds"),
        ({"workers": "2"}, SpecError, "workers"),
        ({"round_to": True}, SpecError, "round_to"),
        ({"allocation": lambda p: {"one": [0]}}, SpecError, "must return a PrunePlan, got dict"),
        (
            {"allocation": lambda p: p.traced.full_plan()},
            BudgetError,
            "above the budget macs=0.5; it must keep fewer channels",
        ),
        ({"criterion": nn.Linear}, SpecError, "expected the name of a criterion"),
        ({"evaluate": 3}, SpecError, "evaluate must be a function"),
        ({"exclude": [nn.Linear(1, 1)]}, SpecError, "expected names or patterns, got Linear"),
        ({"data": [torch.full((2, 3, 8, 8), torch.nan)]}, DataError, "NaN"),
        ({"data": [torch.zeros(2, 4, 8, 8)]}, DataError, "shape"),
    ],
)
def test_bad_input_is_named(options: dict[str, object], error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        prune(net(), **options)


def test_bad_models_are_named() -> None:
    broken = net()
    with torch.no_grad():
        broken.one.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"one\.weight"):
        prune(broken)
    with pytest.raises(ModelError, match="raises on the example inputs"):
        fxprune.prune(net(), torch.zeros(1, 4, 8, 8), 0.5, data())
    with pytest.raises(ModelError, match=r"got \(NoneType.*a tensor such as") as caught:
        fxprune.prune(net(), None, 0.5, data())
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match=r"expected a torch\.nn\.Module, got type"):
        fxprune.trace(Net, X)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="is on the meta device and has no values"):
        fxprune.prune(Net().to("meta"), X.to("meta"))
    with pytest.raises(ModelError, match=r"'weight' has no shape yet \(a lazy module\)"):
        fxprune.prune(nn.LazyConv2d(8, 3), X)
    plan = fxprune.trace(net(), X).plan({"one": [0, 1]})
    with pytest.raises(PlanError, match="the plan is not of this model"):
        fxprune.apply(nn.Linear(3, 3), plan, torch.zeros(1, 3))
    with pytest.raises(PlanError, match="expected a PrunePlan, got str"):
        fxprune.apply(net(), plan.to_json(), X)  # type: ignore[arg-type]


def test_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = Net()
    assert prune(model, allocation="uniform").after.macs > 0


@pytest.mark.filterwarnings("ignore")
def test_parts_whose_weights_are_packed_stay() -> None:
    packed = torch.ao.quantization.quantize_dynamic(net().eval(), {nn.Linear})
    result = prune(packed, allocation="uniform")
    assert result.after.macs < result.before.macs
    assert result.model(X).shape == (1, 10)


def test_parts_that_were_frozen_in_eval_mode_stay_so() -> None:
    model = net()
    model.stem[1].eval()
    result = prune(model, allocation="uniform")
    for made in (result.model, result.graph_module, fxprune.apply(model, result.plan, X)):
        modes = {name: m.training for name, m in made.named_modules()}
        assert [name for name, training in modes.items() if not training] == ["stem.1"]


class Masked(nn.Module):
    """Causal attention with a mask of -inf, and a clamp without bounds, in buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.mlp, self.out = nn.Linear(8, 24), nn.Linear(8, 32), nn.Linear(32, 5)
        self.register_buffer("mask", torch.full((6, 6), -torch.inf).triu(1))
        self.register_buffer("most", torch.tensor(torch.inf))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        y = (q @ k.transpose(1, 2) + self.mask).softmax(-1) @ v
        return self.out(torch.minimum(self.mlp(y).relu(), self.most))


@pytest.mark.parametrize("criterion", ["attention", "l1"])
def test_masks_of_infinity_are_no_diverged_weights(criterion: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(32, 6, 8)
    options = {"criterion": criterion, "max_evaluations": 4, "progress": False}
    result = fxprune.prune(Masked().eval(), x[:2], 0.6, x, **options)
    assert result.after.macs <= 0.6 * result.before.macs
    assert bool(result.model(x).isfinite().all())


def test_an_evaluate_that_gives_no_finite_number_is_said() -> None:
    with pytest.warns(UserWarning, match="gave a finite number"):
        prune(net(), evaluate=lambda m: float("nan"))


def test_an_evaluate_with_gradients() -> None:
    assert prune(net(), evaluate=lambda m: -m(X).square().sum()).report["plan"]["fitness"] > 0


@pytest.mark.parametrize("allocation", ["local", "uniform", "global", "isomorphic"])
def test_a_model_of_which_nothing_can_go_stays_whole(allocation: str) -> None:
    model = nn.Linear(8, 8)
    x = torch.randn(2, 8)
    result = fxprune.prune(model, x, 1.0, [x] * 4, allocation=allocation, progress=False)
    assert result.after == result.before and not result.plan.kept
    assert torch.equal(result.model(x), model(x))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="TorchScript module has no Python forward"):
        prune(torch.jit.trace(net().eval(), X))


def test_a_compiled_model_is_not_compiled_again_for_every_width() -> None:
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = prune(torch.compile(net(), backend="eager"))
    assert not counters["frames"], "compiled while pruning"
    assert result.after.macs < result.before.macs
