"""Checkpoints: the files are read back with json and safetensors alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fxprune import checkpoint
from fxprune.errors import ModelError, OutputError, PlanError
from fxprune.types import PrunePlan

PLAN = PrunePlan({"conv": (0, 2)}, {"seed": 3})


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = nn.Linear(3, 3)
        self.b.weight = self.a.weight
        self.norm = nn.BatchNorm1d(3)


def net(seed: int = 0) -> Tied:
    torch.manual_seed(seed)
    return Tied()


def same(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def test_there_and_back(tmp_path: Path) -> None:
    model = net()
    extra = {
        "error": np.float64(0.5),
        "lost": [float("inf"), np.nan],
        "widths": np.arange(2),
        "path": tmp_path,
        "names": {"b", "a"},
    }
    folder = checkpoint.save(tmp_path / "new" / "run", model, PLAN, extra)
    assert sorted(p.name for p in folder.iterdir()) == [
        "model.safetensors",
        "plan.json",
        "result.json",
    ]
    plan, state = checkpoint.read(folder)
    assert plan == PLAN
    assert state.keys() == model.state_dict().keys()
    other = net(1)
    assert not same(model, other)
    checkpoint.load_state(other, state)
    assert same(model, other)
    assert other.b.weight is other.a.weight
    result = json.loads((folder / "result.json").read_text())
    assert result == {
        "error": 0.5,
        "lost": [None, None],
        "widths": [0, 1],
        "path": str(tmp_path),
        "names": ["a", "b"],
    }
    assert "b.weight" not in load_file(folder / "model.safetensors")  # stored once
    assert [p.name for p in folder.parent.iterdir()] == ["run"]


def test_views_of_one_memory_keep_their_own_values(tmp_path: Path) -> None:
    model = nn.Module()
    base = torch.arange(6.0)
    model.register_buffer("low", base[:3])
    model.register_buffer("high", base[3:])
    checkpoint.save(tmp_path / "run", model, PLAN)
    state = checkpoint.read(tmp_path / "run")[1]
    assert state["low"].tolist() == [0, 1, 2]
    assert state["high"].tolist() == [3, 4, 5]


def test_an_existing_folder_is_refused_and_replaced_only_on_demand(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path / "run", net(), PLAN)
    (folder / "stale").write_text("")
    with pytest.raises(OutputError, match="exists; choose another folder, or say --overwrite"):
        checkpoint.save(folder, net(1), PLAN)
    assert (folder / "stale").exists()
    checkpoint.save(folder, net(1), PLAN, overwrite=True)
    assert not (folder / "stale").exists()
    loaded = net(2)
    checkpoint.load_state(loaded, checkpoint.read(folder)[1])
    assert same(loaded, net(1))
    assert list(tmp_path.iterdir()) == [folder]


def test_an_error_while_writing_leaves_what_was_there(tmp_path: Path) -> None:
    def fail(draft: Path) -> None:
        (draft / "half").write_text("half")
        raise RuntimeError("stop")

    folder = checkpoint.save(tmp_path / "run", net(), PLAN)
    for target in (folder, tmp_path / "other"):
        with pytest.raises(RuntimeError, match="stop"):
            checkpoint.save(target, net(1), PLAN, overwrite=True, write=fail)
    assert list(tmp_path.iterdir()) == [folder]
    assert not (folder / "half").exists()
    checkpoint.read(folder)


def test_targets_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OutputError, match="is not a folder; choose another name"):
        checkpoint.check_target(file)
    with pytest.raises(OutputError, match="is not a folder"):
        checkpoint.check_target(file / "run")
    with pytest.raises(OutputError, match="cannot be written"):
        checkpoint.save("/proc/nothing/run", net(), PLAN)
    foreign = tmp_path / "photos"
    foreign.mkdir()
    checkpoint.check_target(foreign)  # empty: fine
    (foreign / "a.jpg").write_text("")
    with pytest.raises(OutputError, match=r"holds no plan\.json"):
        checkpoint.check_target(foreign, overwrite=True)


def test_damaged_folders(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="is not a checkpoint"):
        checkpoint.read(tmp_path / "none")
    folder = checkpoint.save(tmp_path / "run", net(), PLAN)
    (folder / "model.safetensors").write_bytes(b"\x10")
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        checkpoint.read(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="does not exist"):
        checkpoint.read(folder)
    (folder / "plan.json").write_text("[]")
    with pytest.raises(PlanError, match="expected a plan as JSON"):
        checkpoint.read(folder)


@pytest.mark.parametrize("nest", [None, "state_dict", "model", "module."])
def test_torch_files_are_unwrapped(tmp_path: Path, nest: str | None) -> None:
    state = dict(net().state_dict())
    if nest == "module.":
        body = {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}
    else:
        body = {nest: state, "epoch": 3} if nest else state
    torch.save(body, tmp_path / "w.pt")
    other = net(1)
    checkpoint.load_state(other, checkpoint.read_state(tmp_path / "w.pt"))
    assert same(other, net())


def test_torch_files_that_run_code_are_refused(tmp_path: Path) -> None:
    torch.save(net(), tmp_path / "whole.pt")
    with pytest.raises(ModelError, match=r"holds only tensors.* whole Python objects$"):
        checkpoint.read_state(tmp_path / "whole.pt")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(ModelError, match="no named tensors"):
        checkpoint.read_state(tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("text")
    with pytest.raises(ModelError, match="cannot be loaded"):
        checkpoint.read_state(tmp_path / "text.pt")


def test_state_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    state = dict(net().state_dict())
    del state["a.bias"]
    state["c.bias"] = torch.zeros(3)
    state["b.bias"] = torch.zeros(4)
    save_file({k: v for k, v in state.items() if k != "b.weight"}, tmp_path / "w.safetensors")
    other = net(1)
    with pytest.raises(ModelError) as caught:
        checkpoint.load_state(other, checkpoint.read_state(tmp_path / "w.safetensors"), "weights w")
    assert str(caught.value) == (
        "weights w do not fit the model: 1 missing (a.bias); 1 unexpected (c.bias); "
        "1 of another shape (b.bias: [4] where the model has [3]); "
        "give the weights of this very model"
    )
    assert same(other, net(1))


def test_check_finite_names_the_parameter() -> None:
    model = net()
    checkpoint.check_finite(model)
    with torch.no_grad():
        model.a.bias[1] = float("nan")
        model.norm.running_var[0] = float("inf")
    with pytest.raises(ModelError, match=r"NaN or Inf in 'a\.bias', 'norm\.running_var'"):
        checkpoint.check_finite(model)


def test_check_finite_lets_masks_be_infinite() -> None:
    model = net()
    model.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))
    checkpoint.check_finite(model)
    model.mask[0, 1] = torch.nan
    with pytest.raises(ModelError, match="NaN or Inf in 'mask'"):
        checkpoint.check_finite(model)
