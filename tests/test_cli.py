"""The command line: files, figures and exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

from fxprune import __version__, cli, demo, export, models, pipeline
from fxprune.errors import ExportError, InternalError

FILE = """
import torch
from torch import nn

def net():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    ), torch.randn(1, 3, 8, 8)

def wrong_input():
    return nn.Linear(3, 3), torch.randn(1, 4)
"""


@pytest.fixture
def net(tmp_path: Path) -> str:
    (tmp_path / "nets.py").write_text(FILE)
    return f"{tmp_path / 'nets.py'}:net"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def prune(net: str, out: Path, *options: str) -> int:
    defaults = ["--macs", "0.5", "--allocation", "uniform", "--calibration-samples", "32"]
    return cli.main(["prune", net, "--out", str(out), "--quiet", *defaults, *options])


def test_prune_writes_what_it_says(net: str, out: Path, capfd: Any) -> None:
    assert prune(net, out, "--data", "digits", "--seed", "3") == 0
    said, err = capfd.readouterr()
    assert err == ""
    assert str(out) in said
    assert sorted(p.name for p in out.iterdir()) == [
        "model.safetensors",
        "plan.json",
        "pruned.onnx",
        "report.html",
        "result.json",
    ]
    result = json.loads((out / "result.json").read_text())
    assert result["options"]["seed"] == 3
    assert not {"command", "again", "quiet", "overwrite"} & result["options"].keys()
    assert result["pruning"]["calibration"] == "32 calibration samples"
    assert result["after"]["macs"] <= 0.5 * result["before"]["macs"]
    assert f"{result['after']['macs']:,}" in said
    assert result["versions"]["torch"] == torch.__version__.split("+")[0]
    assert result["onnx"]["dynamic_batch"] is True
    # The original, counted by hand: two convolutions at 8 x 8 pixels and one linear layer.
    assert result["before"]["macs"] == 64 * (3 * 16 + 16 * 32) * 9 + 32 * 10
    # The three files agree: the state's sizes are the plan's, and the ONNX file has its weights.
    plan = json.loads((out / "plan.json").read_text())["kept"]
    state = load_file(out / "model.safetensors")
    assert sorted(len(k) for k in plan.values())[:2] == sorted(
        [state["0.weight"].shape[0], state["3.weight"].shape[0]]
    )
    session = onnxruntime.InferenceSession(str(out / "pruned.onnx"))
    x = torch.randn(5, 3, 8, 8)
    model, inputs = models.load_model(net)
    expected = pipeline.load(out, model, inputs).eval()(x).detach().numpy()
    got = session.run(None, {"input": x.numpy()})[0]
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_no_data_is_said(net: str, out: Path, capfd: Any) -> None:
    assert prune(net, out, "--evals", "2", "--repair", "none", "--params", "0.9") == 0
    assert "32 random inputs (no data was given)" in capfd.readouterr().out


def test_inspect(net: str, capfd: Any) -> None:
    assert cli.main(["inspect", net, "--exclude", "0"]) == 0
    said, err = capfd.readouterr()
    assert err == ""
    lines = said.splitlines()
    # 16 channels of the first convolution are excluded, one comes in, ten go out
    assert "Locked: 3 of 4 groups, 29 channels" in lines
    assert "  16 channels: excluded by the caller (0): 0" in lines
    assert "  10 channels: model output: 7" in lines
    assert cli.main(["inspect", net]) == 0
    said = capfd.readouterr().out
    # what goes with the first convolution: it, the normalisation, its part of the second
    before = 16 * 27 + 16 + 32 + 16 * 32 * 9 + 32 + 32 * 10 + 10
    (row,) = [line for line in said.splitlines() if "│ 0 " in line]
    gone = 16 * 27 + 16 + 32 + 16 * 32 * 9
    assert f"{gone / before:.1%}" in row and f"{1 - 320 / (64 * 5040 + 320):.1%}" in row
    assert "2 of 4 groups can be pruned, down to " in said
    assert f"{64 * (3 * 16 + 16 * 32) * 9 + 32 * 10:,} MACs at batch 1" in said


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--macs", "0"], "0"),
        (["--macs", "-1"], "-1"),
        (["--macs", "1.5"], "1.5"),
        (["--macs", "1e-6"], "smallest"),
        (["--criterion", "atention"], "did you mean 'attention'"),
        (["--allocation", "unform"], "did you mean 'uniform'"),
        (["--allocation", "unform", "--evals", "2"], "did you mean 'uniform'"),
        (["--repair", "lstq"], "lstsq"),
        (["--data", "digit"], "did you mean 'digits'"),
        (["--data", "imagefolder:/nowhere"], "/nowhere"),
        (["--exclude", "nothing"], "nothing"),
        (["--opset", "5"], "opset 5 is not supported; choose from 18 to 23"),
        (["--input", "1x3xx"], "1x3xx"),
        (["--input", "1x4x8x8"], "4, 8, 8]"),
        (["--weights", "none.pt"], "none.pt does not exist"),
        (["--round-to", "0"], "0"),
        (
            ["--round-to", "1.5"],
            'argument --round-to: expected a whole number from 1, or "auto", got',
        ),
        (["--calibration-samples", "0"], "expected a whole number from 1, got '0'"),
        (["--evals", "0"], "argument --evals: expected a whole number from 1, got '0'"),
        (["--evals", "x"], "got 'x'; see fxprune prune --help"),
        (["--max-seconds", "nan"], "--max-seconds: expected seconds, more than 0, got 'nan'"),
        (["--workers", "-1"], "--workers"),
        (["--threads", "0"], "--threads"),
        (["--seed", "-1"], "--seed: expected a whole number from 0 to 4,294,967,295"),
        (["--seed", "99999999999999999999"], "--seed"),
        (["--distill-steps", "9"], "belong to --repair distill"),
        (["--speed"], "unrecognized arguments: --speed; see fxprune --help"),
    ],
)
def test_bad_options(net: str, out: Path, capfd: Any, options: list[str], text: str) -> None:
    assert prune(net, out, *options) == 2
    said, err = capfd.readouterr()
    assert said == ""
    assert err.startswith("fxprune: error: ")
    assert err.count("\n") == 1
    assert text in err
    assert [p.name for p in out.parent.iterdir() if p.suffix != ".py"] in ([], ["__pycache__"])


def test_bad_models_and_targets(net: str, out: Path, capfd: Any) -> None:
    assert prune(net.replace(":net", ":nett"), out) == 2
    assert "did you mean 'net'" in capfd.readouterr().err
    assert prune(net.replace(":net", ":wrong_input"), out) == 2
    assert "(1x4 and 3x3)" in capfd.readouterr().err
    assert cli.main(["prune", net, "--out", str(out)]) == 2
    assert "no budget; give one of --macs" in capfd.readouterr().err
    out.mkdir()
    (out / "mine").write_text("")
    assert prune(net, out) == 2
    assert "say --overwrite" in capfd.readouterr().err
    assert prune(net, out, "--overwrite") == 2
    assert "was not written by fxprune" in capfd.readouterr().err
    assert [p.name for p in out.iterdir()] == ["mine"]
    assert cli.main(["prune", net]) == 2
    assert capfd.readouterr().err.count("\n") == 1
    assert cli.main(["prun"]) == 2
    assert "choose from 'demo', 'inspect'" in capfd.readouterr().err
    assert cli.main(["prune", net, "--macs", "half", "--out", str(out)]) == 2
    assert "macs='half' is not a share" in capfd.readouterr().err


def test_a_failed_export_leaves_nothing(
    net: str, out: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ExportError("the outputs differ\nby far")

    monkeypatch.setattr(export, "export_onnx", fail)
    assert prune(net, out) == 1
    said, err = capfd.readouterr()
    assert said == "" and err.startswith("fxprune: error: the outputs differ by far. The same")
    assert err.count("\n") == 1 and not out.exists()
    assert prune(net, out, "--no-onnx") == 0
    assert not (out / "pruned.onnx").exists() and (out / "report.html").is_file()
    assert json.loads((out / "result.json").read_text())["onnx"] is None


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (InternalError("bug"), 1)])
def test_exit_codes(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(demo, "main", fail)
    assert cli.main(["demo"]) == code
    assert capfd.readouterr().err.startswith("fxprune: ")
    monkeypatch.setattr(pipeline, "prune", fail)
    assert (
        cli.main(["prune", "torch.nn:Identity", "--input", "1x2", "--macs", "0.5", "--out", "o"])
        == code
    )
    assert ("--resume goes on" in capfd.readouterr().err) == (code == 130)


def test_sigterm_clears_away_what_was_begun(
    net: str, out: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(export, "export_onnx", killed)
    assert prune(net, out) == 143
    assert "fxprune: terminated; the same command with --resume" in capfd.readouterr().err
    assert [p.suffix for p in out.parent.iterdir() if p.name != "__pycache__"] == [".py"]
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("options", "overwrite"),
    [([], True), (["--out", "else"], False), (["--out", "else", "--overwrite"], True)],
)
def test_demo_replaces_only_its_own_folder(
    options: list[str], overwrite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(demo, "main", lambda out, **options: calls.append((out, options)))
    assert cli.main(["demo", "--quiet", *options]) == 0
    out = options[1] if options else "runs/demo"
    assert calls == [(out, {"seed": 0, "overwrite": overwrite, "progress": False})]


def test_help_is_not_an_error(capfd: Any) -> None:
    for command in ([], ["demo"], ["inspect"], ["prune"]):
        with pytest.raises(SystemExit) as stop:
            cli.main([*command, "--help"])
        assert stop.value.code == 0
        assert "usage: fxprune" in capfd.readouterr().out


def test_it_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "fxprune", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"fxprune {__version__}\n"
