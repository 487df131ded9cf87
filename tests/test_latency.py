"""Latency: predictions against an analytic clock on really cut nets, the table, fast widths."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import random_plan
from torch import Tensor, nn

import fxprune.latency.model as model_file
from fxprune import allocate, cli
from fxprune.cut import cut
from fxprune.errors import BudgetError, OutputError, SpecError
from fxprune.latency import Bench, LatencyModel, Sample, Target, fast_counts, latency_model
from fxprune.latency.ops import Family
from fxprune.latency.runtimes import time_product
from fxprune.latency.table import Table
from fxprune.traced import Traced, trace
from fxprune.types import Budget

TARGET = Target("torch-cpu")


class Net(nn.Module):
    """Plain, depthwise, strided and pointwise convolutions, a residual, a linear layer."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.wide = nn.Conv2d(width, 4 * width, 1)
        self.deep = nn.Conv2d(4 * width, 4 * width, 3, padding=1, groups=4 * width)
        self.back = nn.Conv2d(4 * width, width, 1)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = x + self.back(torch.relu(self.deep(torch.relu(self.wide(x)))))
        return self.head(torch.relu(self.down(x)).mean((2, 3)))


def analytic(block: int) -> Callable[[Family, tuple[int, ...]], float]:
    """Milliseconds: bilinear in whole blocks of the widths; 3 units a width that is not 4's."""

    def ms(family: Family, widths: tuple[int, ...]) -> float:
        cin, cout, groups = family.channels(widths)
        up = [math.ceil(w / block) * block if w >= 8 else w for w in (cin, cout)]
        work = up[0] * (1 if groups > 1 else up[1]) * math.prod(family.kernel)
        positions = math.prod(n / s for n, s in zip(family.size, family.stride, strict=True))
        return 1e-6 * work * max(1.0, positions) + 1e-3

    return ms


def clocked(
    monkeypatch: pytest.MonkeyPatch, traced: Traced, folder: Path, block: int, original: float
) -> LatencyModel:
    """A latency model that was measured with the analytic clock."""
    ms = analytic(block)
    monkeypatch.setattr(model_file, "time_product", lambda _, f, w: Sample(ms(f, tuple(w)), 1, 0.0))
    return latency_model(traced, TARGET, folder=folder, original=Sample(original, 1, 0.0))


def run_products(module: nn.Module, x: Tensor) -> list[tuple[Family, tuple[int, ...]]]:
    """Every convolution and linear layer that really runs, with its widths."""
    found: list[tuple[Family, tuple[int, ...]]] = []

    def note(layer: nn.Module, inputs: Any, out: Tensor) -> None:
        if isinstance(layer, nn.Linear):
            widths = (layer.in_features, layer.out_features)
            found.append((Family("linear", "plain", 1), widths))
        elif isinstance(layer, nn.Conv2d):
            deep = layer.groups > 1
            widths = (layer.groups,) if deep else (layer.in_channels, layer.out_channels)
            size = tuple(inputs[0].shape[2:])
            family = Family(
                "conv", "depthwise" if deep else "plain", 1, size, layer.kernel_size, layer.stride
            )
            found.append((family, widths))

    handles = [m.register_forward_hook(note) for m in module.modules()]
    with torch.no_grad():
        module(x)
    for h in handles:
        h.remove()
    return found


def steps_of(traced: Traced, plan_step: int, seed: int) -> dict[str, list[int]]:
    rng = np.random.default_rng(seed)
    kept = {}
    for g in traced.groups:
        if g.locked is None:
            counts = np.arange(plan_step, g.n + 1, plan_step)
            counts = counts[counts >= g.n // 8]
            kept[g.name] = sorted(rng.permutation(g.n)[: rng.choice(counts)].tolist())
    return kept


@pytest.mark.parametrize(("block", "step"), [(16, 4), (8, 8)])
def test_predictions_are_the_sum_of_the_cut_nets_products(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, block: int, step: int
) -> None:
    x = torch.zeros(1, 3, 16, 16)
    traced = trace(Net(), x)
    ms = analytic(block)

    def products(module: nn.Module) -> float:
        return sum(ms(f, w) for f, w in run_products(module, x))

    whole = products(traced.graph_module)
    model = clocked(monkeypatch, traced, tmp_path, block, original=whole / 0.9)
    assert model.block == block
    assert model.predict(model.full[None])[0] == pytest.approx(whole / 0.9, rel=1e-9)
    for seed in range(20):
        plan = traced.plan(steps_of(traced, step, seed))
        counts = traced.counts(plan)[None]
        expected = products(cut(traced, plan))
        assert model.products(counts).sum() == pytest.approx(expected, rel=1e-6)
        rest = model.predict(counts)[0] - expected
        assert 0 < rest < 0.1 * whole / 0.9


def test_the_rest_follows_the_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One convolution, then a long chain of activations: half the channels, half the rest."""
    layers = [nn.Conv2d(3, 64, 1), *(nn.Sigmoid() for _ in range(5)), nn.Conv2d(64, 8, 1)]
    traced = trace(nn.Sequential(*layers), torch.zeros(1, 3, 8, 8))
    model = clocked(monkeypatch, traced, tmp_path, 16, original=100.0)
    (i,) = [i for i, g in enumerate(traced.groups) if g.locked is None]
    half = model.full.copy()
    half[i] = 32
    rest = [
        float(model.predict(c[None])[0] - model.products(c[None]).sum()) for c in (model.full, half)
    ]
    assert rest[1] == pytest.approx(rest[0] / 2)
    assert rest[0] > 99


def test_nets_of_one_kind_of_product_or_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    deep = nn.Conv2d(8, 8, 3, groups=8)
    for net, products in ((nn.ReLU(), 0), (deep, 1), (nn.Conv2d(8, 16, 3, groups=4), 1)):
        traced = trace(nn.Sequential(net), torch.zeros(1, 8, 8, 8))
        model = clocked(monkeypatch, traced, tmp_path, 16, original=2.0)
        assert model.products(model.full[None]).shape == (1, products)
        assert model.predict(model.full[None])[0] == pytest.approx(2.0)


def test_grouped_products(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Columns of each group go; the widths of a group are (groups, in, out)."""
    net = nn.Sequential(
        nn.Conv2d(3, 64, 1), nn.Conv2d(64, 64, 3, padding=1, groups=4), nn.Conv2d(64, 8, 1)
    )
    traced = trace(net, torch.zeros(1, 3, 8, 8))
    model = clocked(monkeypatch, traced, tmp_path, 16, original=2.0)
    assert model.widths(model.full)[1] == (4, 16, 16)
    plan = random_plan(traced, 3)
    middle = cut(traced, plan).get_submodule("1")
    assert isinstance(middle, nn.Conv2d)
    widths = (
        middle.groups,
        middle.in_channels // middle.groups,
        middle.out_channels // middle.groups,
    )
    assert model.widths(traced.counts(plan))[1] == widths


def test_a_second_measurement_bends_the_prediction(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    traced = trace(Net(), torch.zeros(1, 3, 16, 16))
    model = clocked(monkeypatch, traced, tmp_path, 16, original=50.0)
    counts = traced.counts(random_plan(traced, 1))
    was = float(model.predict(counts[None])[0])
    bent = model.bent(counts, 1.07 * was)
    assert bent.predict(counts[None])[0] == pytest.approx(1.07 * was)
    assert bent.predict(model.full[None])[0] == pytest.approx(50.0)
    again = bent.measured(Sample(60.0, 1, 0.0))
    assert again.predict(model.full[None])[0] == pytest.approx(60.0)


@pytest.mark.parametrize("block", [8, 16])
def test_fast_counts_are_whole_blocks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, block: int
) -> None:
    traced = trace(Net(), torch.zeros(1, 3, 16, 16))
    model = clocked(monkeypatch, traced, tmp_path, block, original=1e-6)
    allowed = fast_counts(model, traced.groups)
    free = {g.name: g for g in traced.groups if g.locked is None}
    assert set(allowed) == set(free)
    for name, counts in allowed.items():
        assert counts[-1] == free[name].width and (np.diff(counts) > 0).all()
        assert (counts % block == 0).all() and len(counts) >= free[name].width // block * 0.8
        assert free[name].choices(allowed).tolist() == counts.tolist()


def test_a_latency_budget_with_fast_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    traced = trace(Net(), torch.zeros(1, 3, 16, 16))
    model = clocked(monkeypatch, traced, tmp_path, 16, original=4.0)
    scores = {g.name: np.arange(g.n, dtype=np.float64) for g in traced.groups}
    for limit in (0.5, "2 ms"):
        problem = allocate.AllocationProblem(
            traced, scores, Budget(latency=limit), fast_counts(model, traced.groups), latency=model
        )
        plan = allocate.get("uniform")(problem)
        assert 1.6 < model.predict(traced.counts(plan)[None])[0] <= 2.0
        assert all(len(kept) % 16 == 0 for kept in plan.kept.values())
    with pytest.raises(BudgetError, match="read off a table"):
        allocate.get("uniform")(
            allocate.AllocationProblem(traced, scores, Budget(latency="1 us"), {}, latency=model)
        )


def test_measured_times_are_kept_and_used_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    traced = trace(Net(32), torch.zeros(1, 3, 8, 8))
    asked: list[tuple[Family, tuple[int, ...]]] = []

    def slow(_: Target, family: Family, widths: Sequence[int]) -> Sample:
        asked.append((family, tuple(widths)))
        if len(asked) == 20:
            raise KeyboardInterrupt
        return Sample(analytic(16)(family, tuple(widths)), 7, 0.01)

    monkeypatch.setattr(model_file, "time_product", slow)
    original = Sample(1.0, 1, 0.0)
    with pytest.raises(KeyboardInterrupt):
        latency_model(traced, TARGET, folder=tmp_path, original=original)
    first = latency_model(traced, TARGET, folder=tmp_path, original=original)
    assert len(set(asked)) == len(asked) - 1, "only the interrupted one was asked for again"
    done = len(asked)
    again = latency_model(traced, TARGET, folder=tmp_path, original=original)
    assert len(asked) == done
    counts = traced.counts(random_plan(traced, 0))[None]
    assert first.predict(counts) == again.predict(counts)


def test_torn_lines_are_passed_over(tmp_path: Path) -> None:
    table = Table(TARGET, tmp_path)
    table.put("a", Sample(1.5, 10, 0.1))
    with table.path.open("a") as f:
        f.write('{"op": "b", "ms": 2')
    again = Table(TARGET, tmp_path)
    assert again.get("a") == Sample(1.5, 10, 0.1) and again.get("b") is None
    again.put("b", Sample(2.5, 11, 0.2))
    assert Table(TARGET, tmp_path).get("b") == Sample(2.5, 11, 0.2)
    rows = [json.loads(x) for x in table.path.read_text().splitlines() if x.endswith("}")]
    assert [r["op"] for r in rows] == ["a", "b"]
    assert Table(Target("torch-cpu", 2), tmp_path).get("a") is None, "another target, another file"


def test_where_the_table_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FXPRUNE_CACHE", str(tmp_path / "mine"))
    assert Table(TARGET).path.parent == tmp_path / "mine" / "latency"
    (tmp_path / "mine").write_text("a file")
    with pytest.raises(OutputError, match="FXPRUNE_CACHE"):
        Table(TARGET).put("a", Sample(1.0, 1, 0.0))


def test_targets() -> None:
    with pytest.raises(SpecError, match="onnxruntime-cpu"):
        Target("onnxruntime")
    with pytest.raises(SpecError, match="threads"):
        Target(threads=0)
    if not torch.cuda.is_available():
        with pytest.raises(SpecError, match="no GPU"):
            Target("cuda")


@pytest.mark.parametrize("name", ["onnxruntime-cpu", "torch-cpu"])
def test_real_products_are_timed(name: str) -> None:
    """16 times the work takes several times longer; a depthwise one far less than a dense one."""
    target, ones = Target(name), (1, 1)
    conv = Family("conv", "plain", 1, (14, 14), (3, 3), ones, ones, ones)
    small, large = (time_product(target, conv, (n, n)) for n in (32, 128))
    assert 4 < large.ms / small.ms < 40 and small.runs >= 10
    deep = Family("conv", "depthwise", 1, (14, 14), (3, 3), ones, ones, ones)
    assert 0 < time_product(target, deep, (128,)).ms < 0.5 * large.ms
    assert 0 < time_product(target, Family("linear", "plain", 1), (256, 64)).ms < large.ms
    up = Family("transposed", "plain", 1, (8, 8), (2, 2), (2, 2), (0, 0), ones)
    assert time_product(target, up, (16, 16)).ms > 0


def test_whole_models_in_onnxruntime() -> None:
    x = torch.randn(1, 8, 16, 16)
    small = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3))
    target = Target()
    with Bench(target, (x,)) as bench:
        first = bench.measure([small], seconds=0.05)[0]
        again = bench.measure([small], seconds=0.05)[0]
    assert 0 < first.ms < 10 and first.runs >= 20 and again.ms < 3 * first.ms


NET_FILE = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )
"""


def test_the_command_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FXPRUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "nets.py").write_text(NET_FILE)
    threads = torch.get_num_threads()
    spec = [f"{tmp_path}/nets.py:net", "--input", "1x3x16x16", "--quiet"]
    assert cli.main(["latency", *spec, "--target", "torch-cpu"]) == 0
    said = capsys.readouterr().out
    assert "ms measured" in said and "of the MACs" in said and "_2" in said
    out = tmp_path / "out"
    options = ["--latency", "70%", "--target", "torch-cpu", "--allocation", "uniform"]
    options += ["--criterion", "l1", "--calibration-samples", "8", "--out", str(out)]
    assert cli.main(["prune", *spec, *options]) == 0
    assert "times faster" in capsys.readouterr().out
    found = json.loads((out / "result.json").read_text())["pruning"]["latency"]
    assert found["after_ms"] < found["before_ms"] and found["threads"] == 1
    assert found["limit_ms"] == pytest.approx(0.7 * found["before_ms"])
    assert found["predicted_ms"] <= 0.71 * found["before_ms"] * 1.2, "both were measured twice"
    assert found["holds"] == (found["after_ms"] <= found["limit_ms"])
    assert torch.get_num_threads() == threads and len(list(tmp_path.glob("cache/*/*.jsonl"))) == 1
    assert cli.main(["latency", *spec, "--target", "tensorrt"]) == 2
    assert "unknown latency target" in capsys.readouterr().err
