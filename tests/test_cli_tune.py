"""``fxprune finetune``, and what ``fxprune prune`` got for it: --repair distill, --steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file

import fxprune
from fxprune import cli, models
from fxprune.data import load_data

FILE = """
import torch
from torch import nn
from safetensors.torch import load_file

def net():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10),
    ), torch.randn(1, 3, 8, 8)
"""


@pytest.fixture
def net(tmp_path: Path) -> str:
    (tmp_path / "nets.py").write_text(FILE)
    return f"{tmp_path / 'nets.py'}:net"


def prune(net: str, out: Path, *options: str) -> int:
    defaults = ["--macs", "0.5", "--allocation", "uniform", "--data", "digits"]
    samples = ["--calibration-samples", "64"]
    return cli.main(["prune", net, "--out", str(out), "--quiet", *defaults, *samples, *options])


def finetune(source: Path | str, out: Path, *options: str) -> int:
    given = ["--data", "digits", "--out", str(out), "--quiet"]
    return cli.main(["finetune", str(source), *given, *options])


def tuned_here(net: str, epochs: int, **options: Any) -> fxprune.TuneResult:
    """What the command does with a model spec, by the library."""
    model, inputs = models.load_model(net)
    seed = options.get("seed", 0)
    data = load_data("digits", inputs, seed=seed, shuffle=True)
    return fxprune.finetune(
        model, data or (), epochs, options=fxprune.Tuning(**options), progress=False
    )


def test_from_a_trained_net_to_a_tuned_small_one(net: str, tmp_path: Path, capfd: Any) -> None:
    whole, small, tuned = tmp_path / "whole.safetensors", tmp_path / "small", tmp_path / "tuned"
    trained = tuned_here(net, 5, lr=0.01)
    save_file(trained.model.state_dict(), whole)
    weights = ["--weights", str(whole)]
    assert prune(net, small, *weights, "--macs", "0.2", "--repair", "none") == 0
    capfd.readouterr()
    assert finetune(small, tuned, "--epochs", "2", "--lr", "0.003") == 0
    said, err = capfd.readouterr()
    assert err == "" and str(tuned) in said and "2 epochs, 46 steps" in said
    names = ["model.safetensors", "plan.json", "pruned.onnx", "report.html", "result.json"]
    assert set(names) <= {p.name for p in tuned.iterdir()}
    assert not (tmp_path / "tuned.tuning").exists()
    assert (tuned / "plan.json").read_text() == (small / "plan.json").read_text()
    figures = json.loads((tuned / "result.json").read_text())
    accuracy = figures["accuracy"]
    assert accuracy["original"] > 0.9 and accuracy["after"] > accuracy["before"] + 0.05
    assert f"{accuracy['after']:.2%}" in said
    assert figures["options"]["model"] == net and len(figures["tuning"]["epochs"]) == 2
    # The folder is a checkpoint like any other, and its ONNX file has the tuned weights.
    model, inputs = models.load_model(net)
    again = fxprune.load(tuned, model, inputs).eval()
    right, total = 0, 0
    session = onnxruntime.InferenceSession(str(tuned / "pruned.onnx"))
    for x, y in load_data("digits", inputs, train=False) or ():
        with torch.no_grad():
            out = again(x)
        right, total = right + int((out.argmax(1) == y).sum()), total + len(y)
        found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
        np.testing.assert_allclose(found, out.numpy(), rtol=1e-3, atol=1e-4)
    assert accuracy["after"] == right / total


def test_a_killed_run_goes_on(net: str, tmp_path: Path, monkeypatch: Any) -> None:
    from fxprune.tune.loop import _Job

    given = ["--epochs", "3", "--seed", "4"]
    first = tuned_here(net, 3, seed=4).model.state_dict()
    score = _Job.end_epoch
    monkeypatch.setattr(_Job, "end_epoch", lambda self: 1 / 0 if self.epoch == 2 else score(self))
    with pytest.raises(ZeroDivisionError):
        finetune(net, tmp_path / "killed", *given)
    assert not (tmp_path / "killed").exists()
    monkeypatch.setattr(_Job, "end_epoch", score)
    assert finetune(net, tmp_path / "killed", *given) == 0
    second = load_file(tmp_path / "killed" / "model.safetensors")
    assert all(torch.equal(v, second[k]) for k, v in first.items())
    told = json.loads((tmp_path / "killed" / "result.json").read_text())["tuning"]
    assert told["resumed"] == 46 and told["steps"] == 69


def test_distill_and_rounds(net: str, tmp_path: Path, capfd: Any) -> None:
    out = tmp_path / "out"
    assert prune(net, out, "--repair", "distill", "--distill-steps", "20", "--steps", "2") == 0
    told = json.loads((out / "result.json").read_text())
    repair = told["pruning"]["repair"]
    assert repair["distill"]["steps"] == 20 and len(repair["rounds"]) == 2
    assert told["after"]["macs"] <= 0.5 * told["before"]["macs"]
    model, inputs = models.load_model(net)
    assert fxprune.load(out, model, inputs)[0].out_channels < 16


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--data", "random"], "labelled"),
        (["--data", "digit"], "did you mean"),
        (["--epochs", "0"], "epochs"),
        (["--lr", "-1"], "lr"),
        (["--optimizer", "adam"], "adamw"),
        (["--distill", "3"], "distill"),
        (["--batch-size", "0"], "--batch-size"),
        (["--mixed-precision", "int8"], "mixed precision"),
        (["--ema", "2"], "ema"),
        (["--ema", "1"], "below 1"),
        (["--checkpoint", __file__], "is a file"),
        (["--test", "imagefolder:/nowhere"], "/nowhere"),
        (["--lr", "fast"], "expected a number, got 'fast'"),
    ],
)
def test_bad_input_is_one_line_and_two(
    net: str, tmp_path: Path, capfd: Any, options: list[str], text: str
) -> None:
    assert finetune(net, tmp_path / "out", *options) == 2
    _, err = capfd.readouterr()
    assert err.count("\n") == 1 and text in err
    assert not (tmp_path / "out").exists()


def test_folders_that_are_none(tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "empty").mkdir()
    assert finetune(tmp_path / "empty", tmp_path / "out") == 2
    assert "holds no plan.json" in capfd.readouterr()[1]
    (tmp_path / "empty" / "plan.json").write_text('{"kept": {}}')
    assert finetune(tmp_path / "empty", tmp_path / "out") == 2
    assert "give --model" in capfd.readouterr()[1]


def test_bad_steps(net: str, tmp_path: Path, capfd: Any) -> None:
    assert prune(net, tmp_path / "out", "--steps", "0") == 2
    assert prune(net, tmp_path / "out", "--repair", "distill", "--distill-steps", "0") == 2
    assert "steps" in capfd.readouterr()[1]


def test_help_without_torch(capsys: Any) -> None:
    with pytest.raises(SystemExit) as e:
        cli.main(["finetune", "--help"])
    assert e.value.code == 0
    said = capsys.readouterr()[0]
    assert "--epochs" in said and "goes on when the same command" in said
