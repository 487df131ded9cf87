"""The command line with code of the user's: data, criterion, allocation, evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fxprune import cli
from fxprune.data import first_batch, load_data
from fxprune.errors import DataError, ModelError
from fxprune.traced import trace
from fxprune.types import PrunePlan

FILE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.b(self.a(x).relu()).relu())

def net():
    return Net(), torch.zeros(1, 12)

def batches(named=False):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 12, generator=generator)
    y = x[:, :4].argmax(1)
    pairs = list(zip(x.split(16), y.split(16)))
    return [{"x": a, "labels": b} for a, b in pairs] if named else pairs

def named():
    return batches(True)

def once():
    yield from batches()

def broken():
    raise KeyError("no such file")

def last(channels):
    return torch.arange(channels.n, dtype=torch.float)

def quarter(problem):
    groups = [g for g in problem.traced.groups if g.locked is None]
    return problem.traced.plan({g.name: range(g.n // 4) for g in groups})

def heavy(model):
    return float(sum(p.abs().sum() for p in model.parameters()).detach())
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(FILE)
    return str(tmp_path / "mine.py")


def prune(file: str, out: Path, *options: str) -> int:
    given = [f"{file}:net", "--macs", "0.5", "--out", str(out), "--quiet", "--no-onnx"]
    return cli.main(["prune", *given, "--round-to", "1", *options])


def plan_of(out: Path) -> PrunePlan:
    return PrunePlan.from_json((out / "plan.json").read_text())


def test_data_of_your_own(file: str, tmp_path: Path, capfd: Any) -> None:
    options = ("--data", f"{file}:batches", "--allocation", "uniform")
    assert prune(file, tmp_path / "small", *options) == 0
    assert "calibrated on 64 calibration samples" in capfd.readouterr().out
    tune = ["finetune", str(tmp_path / "small"), "--quiet", "--no-onnx", "--epochs", "2"]
    tune += ["--data", f"{file}:batches"]
    assert cli.main([*tune, "--out", str(tmp_path / "a")]) == 0
    assert "accuracy" not in capfd.readouterr().out  # nothing was held out
    assert cli.main([*tune, "--out", str(tmp_path / "b"), "--test", f"{file}:batches"]) == 0
    assert "accuracy" in capfd.readouterr().out
    told = json.loads((tmp_path / "b" / "result.json").read_text())
    assert set(told["accuracy"]) == {"original", "before", "after"}


def test_inputs_by_name(file: str, tmp_path: Path, capfd: Any) -> None:
    options = ("--data", f"{file}:named", "--allocation", "uniform")
    assert prune(file, tmp_path / "small", *options) == 0
    assert "calibrated on 64 calibration samples" in capfd.readouterr().out


def test_a_criterion_of_your_own(file: str, tmp_path: Path) -> None:
    options = ("--criterion", f"{file}:last", "--allocation", "uniform", "--repair", "none")
    assert prune(file, tmp_path / "out", *options) == 0
    for kept in plan_of(tmp_path / "out").kept.values():
        assert 0 < len(kept) < 16
        np.testing.assert_array_equal(kept, np.arange(16 - len(kept), 16))


def test_an_allocation_of_your_own(file: str, tmp_path: Path) -> None:
    assert prune(file, tmp_path / "out", "--allocation", f"{file}:quarter") == 0
    assert {k: list(v) for k, v in plan_of(tmp_path / "out").kept.items()} == {
        "a": [0, 1, 2, 3],
        "b": [0, 1, 2, 3],
    }


def test_an_evaluation_of_your_own(file: str, tmp_path: Path) -> None:
    options = ("--evaluate", f"{file}:heavy", "--evals", "6", "--repair", "none")
    assert prune(file, tmp_path / "out", *options) == 0
    lines = (tmp_path / "out" / "search.jsonl").read_text().splitlines()
    values = [e["fitness"] for e in map(json.loads, lines) if e.get("event") == "evaluated"]
    assert values
    assert max(values) < -1  # minus the sum of the weights, no divergence


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--data", "{}:once"], "returned generator; expected batches that can be iterated more"),
        (["--data", "{}:net"], "batch 0 holds Net where a tensor is expected"),
        (["--data", "{}:batchs"], "did you mean 'batches'"),
        (["--data", "none.py:make"], "file none.py does not exist"),
        (["--data", "{}:broken"], "failed: KeyError: 'no such file'"),
        (["--data", "mine"], "Your own batches: FILE.py:NAME"),
        (["--criterion", "{}:lost"], "unknown criterion in"),
        (["--criterion", "nowhere.at.all:x"], "no module 'nowhere.at.all'"),
        (["--allocation", "{}:lost"], "unknown allocation in"),
        (["--evaluate", "heavy"], "expected FILE.py:NAME"),
        (["--threads", "2"], "give --target or --latency too"),
    ],
)
def test_mistakes_are_one_line(
    file: str, tmp_path: Path, capfd: Any, options: list[str], text: str
) -> None:
    assert prune(file, tmp_path / "out", *(o.format(file) for o in options)) in (1, 2)
    err = capfd.readouterr().err
    assert text in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_batches_of_a_factory(file: str) -> None:
    inputs = (torch.zeros(1, 12),)
    data = load_data(f"{file}:named", inputs)
    first = first_batch(data, inputs)
    assert first is not None
    assert [tuple(t.shape) for t in first] == [(16, 12)]
    assert first_batch(None, inputs) is None
    with pytest.raises(DataError, match="returned generator"):
        load_data(f"{file}:once", inputs)
    with pytest.raises(ModelError, match="no such file"):
        load_data(f"{file}:broken", inputs)


def test_inspect_for_programs(file: str, capfd: Any) -> None:
    assert cli.main(["inspect", f"{file}:net", "--json"]) == 0
    out, _ = capfd.readouterr()
    told = json.loads(out)
    model = {"a": 12 * 16, "b": 16 * 16, "head": 16 * 4}
    assert told["cost"]["macs"] == sum(model.values())
    groups = {g["name"]: g for g in told["groups"]}
    assert groups["b"]["channels"] == 16
    assert groups["b"]["share"]["macs"] == pytest.approx((256 + 64) / sum(model.values()))
    assert {m["tensor"] for m in groups["b"]["members"]} >= {"b.weight", "b.bias", "head.weight"}
    locked = [g["locked"] for g in told["groups"] if g["locked"]]
    assert any("output" in reason for reason in locked)


def test_trace_is_what_inspect_tells(file: str, capfd: Any) -> None:
    from fxprune.models import load_model

    assert cli.main(["inspect", f"{file}:net", "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    traced = trace(*load_model(f"{file}:net"))
    assert [g["name"] for g in told["groups"]] == [g.name for g in traced.groups]
