"""The demo's parts and the demo itself, at a fraction of its training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from fxprune import demo
from fxprune.errors import OutputError
from fxprune.pipeline import prune
from fxprune.types import Budget, PrunePlan


@pytest.fixture(scope="module")
def net() -> demo.DigitsNet:
    return demo.train_digits_net(epochs=4, seed=0)


def test_the_split_is_stratified_seeded_and_without_overlap() -> None:
    data, again, other = demo.digits(0), demo.digits(0), demo.digits(1)
    assert torch.equal(data.test_x, again.test_x) and not torch.equal(data.test_x, other.test_x)
    assert data.train_x.shape == (1347, 1, 8, 8) and data.test_x.shape == (450, 1, 8, 8)
    share = np.bincount(data.test_y.numpy()) / np.bincount(load_digits().target)
    assert np.abs(share - 0.25).max() < 0.01
    assert float(data.train_x.min()) == 0 and float(data.train_x.max()) == 1
    together = torch.cat([data.train_x, data.test_x]).flatten(1) * 16
    ours = np.sort(together.numpy().astype(int) @ np.arange(1, 65) ** 2)
    assert (ours == np.sort(load_digits().data.astype(int) @ np.arange(1, 65) ** 2)).all()


def test_shifts_move_each_image_by_at_most_one_pixel() -> None:
    x = torch.rand(50, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    moved = demo.shifted(x, torch.Generator().manual_seed(1))
    offsets = set()
    for before, after in zip(x[:, 0], moved[:, 0], strict=True):
        found = [
            (dy, dx)
            for dy in (-1, 0, 1)
            for dx in (-1, 0, 1)
            if torch.equal(torch.roll(before, (dy, dx), (0, 1))[1:-1, 1:-1], after[1:-1, 1:-1])
        ]
        assert len(found) == 1
        offsets.add(found[0])
    assert len(offsets) == 9


def test_training_is_deterministic_learns_and_leaves_no_trace(net: demo.DigitsNet) -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    again = demo.train_digits_net(epochs=4, seed=0)
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    data = demo.digits(0)
    assert demo.accuracy(net, data.test_x, data.test_y) >= 0.96
    assert not net.training
    assert 200_000 <= sum(p.numel() for p in net.parameters()) <= 500_000


def test_pruned_to_sixty_percent_it_keeps_its_accuracy(net: demo.DigitsNet) -> None:
    data = demo.digits(0)
    result = prune(
        net,
        data.train_x[:1],
        budget=Budget(macs=0.6),
        data=list(data.train_x[: demo.CALIBRATION].split(demo.BATCH)),
        progress=False,
    )
    assert result.after.macs <= 0.6 * result.before.macs
    assert result.after.macs >= 0.55 * result.before.macs
    before = demo.accuracy(net, data.test_x, data.test_y)
    assert demo.accuracy(result.model, data.test_x, data.test_y) >= before - 0.03
    assert result.plan.meta["allocation"] == "local"


def test_the_whole_demo(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "runs" / "demo"
    assert demo.main(out, epochs=2, progress=False) == 0
    assert {p.name for p in out.iterdir()} == set(demo.FILES)
    shown = capsys.readouterr()
    assert "test accuracy" in shown.out and str(out) in shown.out.replace("\n", "")
    assert shown.err == ""
    figures = json.loads((out / "result.json").read_text())
    assert figures["after"]["macs"] <= demo.SHARE * figures["before"]["macs"]
    assert figures["after"]["accuracy"] >= figures["before"]["accuracy"] - 0.1
    assert PrunePlan.from_json((out / "plan.json").read_text()).kept
    params = sum(
        t.numel()
        for k, t in load_file(out / "model.safetensors").items()
        if "running" not in k and "num_batches" not in k
    )
    assert params == figures["after"]["params"]
    session = onnxruntime.InferenceSession(str(out / "pruned.onnx"))
    data = demo.digits(0)
    logits = session.run(None, {session.get_inputs()[0].name: data.test_x.numpy()})[0]
    assert (logits.argmax(1) == data.test_y.numpy()).mean() == figures["after"]["accuracy"]
    with pytest.raises(OutputError, match="exists"):
        demo.main(out, epochs=1, overwrite=False, progress=False)


def test_a_folder_that_is_not_ours_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="not written by fxprune"):
        demo.main(tmp_path, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_nothing_is_left_where_the_demo_fails(tmp_path: Path, monkeypatch: Any) -> None:
    def broken(*args: Any, **options: Any) -> None:
        raise RuntimeError("stop")

    monkeypatch.setattr(demo, "prune", lambda *args, **options: None)
    monkeypatch.setattr(demo, "measure", broken)
    with pytest.raises(RuntimeError, match="stop"):
        demo.main(tmp_path / "runs" / "demo", epochs=1, progress=False)
    assert not list(tmp_path.rglob("*.*"))
