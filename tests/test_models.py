"""Model specs and weights."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fxprune.errors import ModelError, SpecError
from fxprune.models import load_model, parse_shapes

FILE = """
import torch
from torch import nn
import neighbour

WIDTH = 4

class Net(nn.Linear):
    def __init__(self, inputs=3):
        super().__init__(inputs, WIDTH)

def pair():
    return Net(), torch.ones(2, 3)

def needs(width):
    return nn.Linear(width, 1)

def broken():
    raise KeyError("no such thing")

def text():
    return "a model"
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "nets.py").write_text(FILE)
    (tmp_path / "neighbour.py").write_text("")
    return str(tmp_path / "nets.py")


def test_torchvision_without_weights_and_without_touching_the_rng() -> None:
    torch.manual_seed(4)
    rng = torch.get_rng_state()
    model, inputs = load_model("torchvision:squeezenet1_1", input_shape="2x3x64x64")
    assert torch.equal(torch.get_rng_state(), rng)
    assert type(model).__name__ == "SqueezeNet"
    assert [tuple(x.shape) for x in inputs] == [(2, 3, 64, 64)]
    again, _ = load_model("torchvision:squeezenet1_1")
    pairs = zip(model.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_library_knows_the_input_size() -> None:
    assert load_model("torchvision:squeezenet1_1")[1][0].shape == (1, 3, 224, 224)
    assert load_model("torchvision:inception_v3")[1][0].shape == (1, 3, 299, 299)


def test_segmentation_models_download_no_backbone() -> None:
    model, _ = load_model("torchvision:lraspp_mobilenet_v3_large")
    assert isinstance(model, nn.Module)


def test_timm_has_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(SpecError, match=r"pip install fxprune\[timm\]"):
        load_model("timm:resnet18")


def test_factories(file: str) -> None:
    path, modules = list(sys.path), set(sys.modules)
    model, inputs = load_model(f"{file}:pair")
    assert inputs[0].tolist() == torch.ones(2, 3).tolist()
    assert isinstance(model, nn.Linear)
    assert load_model(f"{file}:pair", input_shape="5x3")[1][0].shape == (5, 3)
    assert load_model(f"{file}:Net", input_shape="5x3")[0].out_features == 4
    assert sys.path == path
    assert set(sys.modules) - modules <= {"neighbour", "_fxprune_spec_nets"}  # nothing else is left
    model, _ = load_model("torch.nn:Identity", input_shape="1x2")
    assert isinstance(model, nn.Identity)


@pytest.mark.parametrize(
    ("spec", "error", "text"),
    [
        ("torchvision:resnet81", SpecError, "did you mean 'resnet18'"),
        ("torchvison:resnet18", SpecError, "no module 'torchvison'; expected torchvision:NAME"),
        ("resnet18", SpecError, "expected torchvision:NAME"),
        (":x", SpecError, "expected torchvision:NAME"),
        ("none.py:make", SpecError, "file none.py does not exist"),
        ("torch.nn:Identety", SpecError, "did you mean 'Identity'"),
        ("{file}:Nett", SpecError, "did you mean 'Net'"),
        ("{file}:WIDTH", SpecError, "WIDTH is a int, not a function or class"),
        ("{file}:needs", SpecError, r"needs arguments \(width\)"),
        ("{file}:Net", SpecError, "give --input"),
        ("{file}:broken", ModelError, r"failed: KeyError: 'no such thing' \(.*nets.py:19\)"),
        ("{file}:text", ModelError, "returned str; expected a torch.nn.Module"),
    ],
)
def test_bad_specs(file: str, spec: str, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        load_model(spec.format(file=file))


def test_files_that_do_not_import(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("import nothing_of_this_name")
    with pytest.raises(ModelError, match="No module named 'nothing_of_this_name'"):
        load_model(f"{tmp_path}/a.py:make")
    (tmp_path / "b.py").write_text("def (")
    with pytest.raises(ModelError, match="SyntaxError"):
        load_model(f"{tmp_path}/b.py:make")


def test_shapes() -> None:
    assert parse_shapes("1x3x224x224") == ((1, 3, 224, 224),)
    assert parse_shapes("2X3, 4 x 5") == ((2, 3), (4, 5))
    for bad in ("", "1x", "0x3", "1x-3", "1,3,", "axb", "1.5x2"):
        with pytest.raises(SpecError, match="expected sizes joined by x"):
            parse_shapes(bad)


def test_weights(file: str, tmp_path: Path) -> None:
    state = {"weight": torch.full((4, 3), 2.0), "bias": torch.zeros(4)}
    save_file(state, tmp_path / "w.safetensors")
    model, _ = load_model(f"{file}:pair", weights=str(tmp_path / "w.safetensors"))
    assert torch.equal(model.weight, state["weight"])  # type: ignore[arg-type]
    state["weight"][0, 0] = float("nan")
    torch.save(state, tmp_path / "nan.pt")
    with pytest.raises(ModelError, match="NaN or Inf in 'weight'"):
        load_model(f"{file}:pair", weights=str(tmp_path / "nan.pt"))
    torch.save({"weight": state["weight"][:2]}, tmp_path / "short.pt")
    with pytest.raises(
        ModelError, match=r"short\.pt do not fit the model: 1 missing \(bias\); 1 of"
    ):
        load_model(f"{file}:pair", weights=str(tmp_path / "short.pt"))
    with pytest.raises(ModelError, match="does not exist"):
        load_model(f"{file}:pair", weights="none.safetensors")
    with pytest.raises(SpecError, match="have default weights"):
        load_model(f"{file}:pair", weights="default")
