"""ONNX export: every figure is measured again here, with onnxruntime and onnx directly."""

from __future__ import annotations

import dataclasses
import logging
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torchvision
from torch import Tensor, nn

from fxprune import export
from fxprune.errors import ExportError, ModelError, OutputError, SpecError
from fxprune.export import export_onnx, relative_error


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


class Wrapped(nn.Module):
    """A module made of one function, for odd signatures."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.linspace(-1, 1, 12).reshape(4, 3))

    def forward(self, *args: Any) -> Any:
        return self.function(self.weight, *args)


def run(path: Path, *inputs: Tensor) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    return session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})


@pytest.fixture
def x() -> Tensor:
    return torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def test_any_batch_size_computes_what_the_model_computes(tmp_path: Path, x: Tensor) -> None:
    model = small_net()
    report = export_onnx(model, x, tmp_path / "net.onnx")
    assert report.dynamic_batch
    assert report.exporter == "torch.export"
    assert report.notes == ()
    assert set(report.batch_sizes) == {1, 2, 3}
    assert report.max_error <= 1e-5
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]  # one file, the weights inside
    assert report.bytes == (tmp_path / "net.onnx").stat().st_size
    model.eval()
    shape = onnx.load(report.path).graph.input[0].type.tensor_type.shape
    assert [d.dim_param or d.dim_value for d in shape.dim] == ["batch", 3, 6, 6]
    for n in (1, 7):
        y = torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(n))
        np.testing.assert_allclose(run(report.path, y)[0], model(y).detach().numpy(), atol=1e-6)


def test_a_torchvision_model_in_eval_mode_and_with_its_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None)
    y = torch.randn(4, 3, 32, 32)
    report = export_onnx(model, y, tmp_path / "net.onnx")
    assert report.batch_sizes == (1, 3, 4)
    expected = model.eval()(y).detach().numpy()
    assert np.abs(run(report.path, y)[0] - expected).max() <= 1e-4 * np.abs(expected).max()


def test_model_rng_warnings_and_loggers_are_left_alone(tmp_path: Path, x: Tensor) -> None:
    model = small_net()
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    kept = x.clone()
    torch.manual_seed(5)
    random.seed(5)
    rng, python_rng = torch.get_rng_state(), random.getstate()
    filters, level = list(warnings.filters), logging.getLogger("torch.onnx").level
    tf32 = torch.backends.cudnn.allow_tf32
    export_onnx(model, x, tmp_path / "net.onnx")
    assert [m.training for m in model] == [True, False, True, True, True, True]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(x, kept)
    assert torch.equal(torch.get_rng_state(), rng)
    assert random.getstate() == python_rng
    assert warnings.filters == filters
    assert logging.getLogger("torch.onnx").level == level
    assert torch.backends.cudnn.allow_tf32 == tf32


def test_the_exporters_say_nothing(tmp_path: Path, x: Tensor, capfd: Any) -> None:
    export_onnx(small_net(), x, tmp_path / "net.onnx", opset=23)
    assert capfd.readouterr() == ("", "")


def test_several_inputs_and_named_outputs(tmp_path: Path) -> None:
    def function(w: Tensor, a: Tensor, b: Tensor) -> dict[str, Any]:
        return {"sum": a + b, "both": (a @ w, b.mean(1))}

    a, b = torch.randn(2, 4), torch.randn(2, 4)
    model = Wrapped(function)
    report = export_onnx(model, (a, b), tmp_path / "net.onnx")
    assert report.inputs == ("input_0", "input_1")
    assert report.outputs == ("sum", "both_0", "both_1")
    graph = onnx.load(report.path).graph
    assert [o.name for o in graph.output] == list(report.outputs)
    got = run(report.path, a, b)
    for ours, expected in zip(got, [a + b, a @ model.weight, b.mean(1)], strict=True):
        np.testing.assert_allclose(ours, expected.detach().numpy(), atol=1e-6)


def test_a_baked_batch_is_exported_at_that_size_with_the_reason(tmp_path: Path) -> None:
    model = Wrapped(lambda w, x: x.reshape(2, 2, 2) @ w[:2, :2])
    report = export_onnx(model, torch.randn(2, 4), tmp_path / "net.onnx")
    assert not report.dynamic_batch
    assert report.batch_sizes == (2,)
    assert "the model itself fails at batch" in report.notes[0]
    assert onnx.load(report.path).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 2


def test_a_fixed_batch_can_be_asked_for(tmp_path: Path, x: Tensor) -> None:
    report = export_onnx(small_net(), x, tmp_path / "net.onnx", dynamic_batch=False)
    assert not report.dynamic_batch
    assert report.batch_sizes == (1,)
    assert report.notes == ("a fixed batch was asked for",)


def test_the_second_exporter_takes_over(
    tmp_path: Path, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no such op\nin this exporter")

    monkeypatch.setattr(export, "_torch_export", fail)
    model = small_net()
    report = export_onnx(model, x, tmp_path / "net.onnx")
    assert report.exporter == "torchscript"
    assert report.dynamic_batch
    assert report.notes == (
        "torch.export with a dynamic batch: RuntimeError: no such op in this exporter",
    )
    y = torch.randn(5, 3, 6, 6)
    np.testing.assert_allclose(run(report.path, y)[0], model.eval()(y).detach(), atol=1e-6)


@pytest.mark.parametrize("opset", [18, 21])
def test_the_opset_is_the_one_asked_for(tmp_path: Path, x: Tensor, opset: int) -> None:
    report = export_onnx(small_net(), x, tmp_path / "net.onnx", opset=opset)
    assert report.opset == opset
    assert {o.version for o in onnx.load(report.path).opset_import if o.domain == ""} == {opset}


def test_a_difference_is_an_error_and_keeps_the_old_file(
    tmp_path: Path, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3)) @ torch.ones(3, 5)

    write = export._torch_export

    def wrong(job: Any, dynamic: bool, draft: Path) -> None:
        write(dataclasses.replace(job, model=Other()), dynamic, draft)

    monkeypatch.setattr(export, "_torch_export", wrong)
    target = tmp_path / "net.onnx"
    target.write_text("the old file")
    with pytest.raises(ExportError, match="'output' differs in onnxruntime at batch 1"):
        export_onnx(small_net(), x, target)
    assert target.read_text() == "the old file"
    assert list(tmp_path.iterdir()) == [target]


def test_nothing_works_is_one_error_with_all_reasons(tmp_path: Path) -> None:
    model = Wrapped(lambda w, x: torch.from_numpy(np.sort(x.detach().numpy())))
    with pytest.raises(ExportError, match="cannot be exported") as caught:
        export_onnx(model, torch.randn(2, 4), tmp_path / "net.onnx", opset=23)
    assert "torchscript" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_prove_nothing_are_named(tmp_path: Path) -> None:
    report = export_onnx(Wrapped(lambda w, x: x @ w * 0), torch.randn(2, 4), tmp_path / "n.onnx")
    assert report.notes == ("output 'output' is zero everywhere, so its comparison proves nothing",)


@pytest.mark.parametrize("opset", [7, 17, 99])
def test_an_opset_out_of_range(tmp_path: Path, x: Tensor, opset: int) -> None:
    with pytest.raises(SpecError, match=f"opset {opset} is not supported; choose from 18 to 23"):
        export_onnx(small_net(), x, tmp_path / "net.onnx", opset=opset)


def test_bad_models_and_paths(tmp_path: Path, x: Tensor) -> None:
    with pytest.raises(ModelError, match="does not run on the example inputs"):
        export_onnx(small_net(), torch.randn(1, 4, 6, 6), tmp_path / "net.onnx")
    with pytest.raises(ModelError, match="expected tensors"):
        export_onnx(small_net(), (1,), tmp_path / "net.onnx")
    with pytest.raises(ModelError, match="'output' of the model holds NaN"):
        export_onnx(Wrapped(lambda w, x: x / 0), torch.zeros(1, 3), tmp_path / "net.onnx")
    with pytest.raises(ModelError, match="returns no tensor"):
        export_onnx(Wrapped(lambda w, x: None), x, tmp_path / "net.onnx")
    with pytest.raises(OutputError, match="does not exist"):
        export_onnx(small_net(), x, tmp_path / "no" / "net.onnx")
    with pytest.raises(OutputError, match="is a folder"):
        export_onnx(small_net(), x, tmp_path)
    with pytest.raises(ModelError, match=r"got SimpleNamespace; give its \.model"):
        export_onnx(SimpleNamespace(model=small_net()), x, tmp_path / "net.onnx")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_relative_error() -> None:
    a = np.array([1.0, -4.0])
    assert relative_error(a, np.array([1.0, -3.0])) == 0.25
    assert relative_error(np.zeros(2), a) == 4.0
    assert relative_error(a, a[:1]) == float("inf")
    assert relative_error(a, np.array([1.0, np.nan])) == float("inf")
    assert relative_error(np.array([3]), np.array([3])) == 0.0


@dataclasses.dataclass
class Detections:
    scores: Tensor
    boxes: Tensor


def test_outputs_in_a_dataclass(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Wrapped(lambda w, x: Detections(x @ w, x.relu()))
    x = torch.randn(2, 4)
    report = export_onnx(model, (x,), tmp_path / "d.onnx")
    scores, boxes = run(report.path, x)
    np.testing.assert_allclose(scores, (x @ model.weight).detach().numpy(), rtol=1e-5)
    np.testing.assert_allclose(boxes, x.relu().numpy())
    assert report.outputs == ("scores", "boxes")


def test_outputs_that_are_no_tensors_are_left_out(tmp_path: Path) -> None:
    model = Wrapped(lambda w, x: {"logits": x @ w.T, "cache": None, "flag": True})
    x = torch.randn(2, 3)
    report = export_onnx(model, x, tmp_path / "net.onnx")
    assert report.dynamic_batch and report.outputs == ("logits",)
    found = run(tmp_path / "net.onnx", x)[0]
    np.testing.assert_allclose(found, (x @ model.weight.T).detach(), rtol=1e-5)


def test_half_precision_has_its_own_tolerance(tmp_path: Path, x: Tensor) -> None:
    report = export_onnx(small_net().half().eval(), x.half(), tmp_path / "net.onnx")
    assert report.tolerance == 1e-2 and report.dynamic_batch and not report.notes


def test_nothing_is_printed_when_no_exporter_succeeds(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = nn.Sequential(nn.LSTM(4, 6, proj_size=3))
    with pytest.raises(ExportError):
        export_onnx(model, (torch.randn(2, 3, 4),), tmp_path / "p.onnx")
    assert capfd.readouterr().out == ""
