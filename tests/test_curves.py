"""Sensitivity curves, in Python and on the command line."""

from __future__ import annotations

import csv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import criteria
from fxprune.cli import main
from fxprune.cut import cut
from fxprune.errors import SpecError


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5),
    ).eval()  # fmt: skip


def images(n: int = 64) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def curves(**options: Any) -> fxprune.Sensitivity:
    return fxprune.sensitivity(net(), images(2), images(), progress=False, **options)


def test_each_group_is_cut_alone_by_the_criterion_and_measured() -> None:
    """Without a repair: by hand."""
    model, x = net(), images()
    found = fxprune.sensitivity(
        model, images(2), x, criterion="l2", repair=None, shares=(0.25, 0.5), progress=False
    )
    traced = fxprune.trace(model, images(2))
    held = x[32:]  # batches of 32; the last one is held out
    with torch.no_grad():
        p = model(held).double().log_softmax(1)
    assert found.whole == pytest.approx(0, abs=1e-12)
    assert found.kept.tolist() == [[8, 4], [12, 6]] and found.channels.tolist() == [16, 24]
    group = traced.group(found.groups[1])
    scores = criteria.get("l2")(traced, None, np.random.default_rng(0))[group.name]
    best = np.sort(np.argsort(-scores)[:12])
    module = cut(traced, fxprune.PrunePlan({group.name: tuple(best.tolist())}))
    with torch.no_grad():
        q = module(held).double().log_softmax(1)
    assert found.loss[1, 0] == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-5)
    saved = 1 - traced.cost(traced.plan({group.name: range(12)})).macs / traced.cost().macs
    assert found.saved[1, 0] == pytest.approx(saved)


def test_further_cuts_cost_more_and_an_executor_changes_nothing() -> None:
    alone = curves()
    assert alone.kept.shape == (2, 4) and (np.diff(alone.kept, axis=1) < 0).all()
    assert (np.diff(alone.loss, axis=1) > 0).all() and (alone.loss > 0).all()
    with ThreadPoolExecutor(2) as pool:
        assert np.array_equal(curves(executor=pool).loss, alone.loss)
    assert [r["kept"] for r in alone.rows()] == alone.kept.ravel().tolist()


def test_the_plot_has_a_line_for_each_group(tmp_path: Path) -> None:
    found = curves(shares=(0.5,))
    found.plot(tmp_path / "curves.svg")
    text = (tmp_path / "curves.svg").read_text()
    ElementTree.fromstring(text)
    assert text.count('id="line2d') >= 2 and "most sensitive" in text


@pytest.mark.parametrize(
    ("options", "match"),
    [({"shares": (0.5, 1.0)}, "between 0 and 1"), ({"shares": ()}, "between"),
     ({"repair": "glue"}, "repair"), ({"workers": -1}, "workers"), ({"seed": -1}, "seed")],
)  # fmt: skip
def test_what_cannot_be_asked_for(options: dict[str, Any], match: str) -> None:
    with pytest.raises(SpecError, match=match):
        curves(**options)


MODEL = """
import torch
from torch import nn
def make():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)]
    return nn.Sequential(*layers), (torch.randn(2, 1, 8, 8),)
"""


@pytest.fixture
def spec(tmp_path: Path) -> str:
    (tmp_path / "small.py").write_text(MODEL)
    return f"{tmp_path / 'small.py'}:make"


def test_the_command(spec: str, tmp_path: Path, capsys: Any) -> None:
    files = [tmp_path / "curves.csv", tmp_path / "curves.svg"]
    args = ["sensitivity", spec, "--data", "digits", "--quiet", "--calibration-samples", "64"]
    assert main([*args, "--csv", str(files[0]), "--plot", str(files[1])]) == 0
    out = capsys.readouterr().out
    assert "50% kept" in out and out.count("%)") == 8 and "nats" in out
    assert "random inputs" not in out and "0.0000" not in out
    with files[0].open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 and set(rows[0]) == {"group", "channels", "kept", "loss", "macs saved"}
    assert files[1].read_text().lstrip().startswith("<?xml")
    capsys.readouterr()
    for option in ("--plot", "--csv"):
        assert main([*args, option, str(tmp_path / "none" / "x.svg")]) == 2
        assert main([*args, option, str(tmp_path)]) == 2
    assert main([*args, "--plot", "curves.gif"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 5 and "drawn as .svg, .png, .pdf" in err


def test_nothing_that_could_be_cut_is_an_empty_plot(tmp_path: Path) -> None:
    found = curves(exclude=["*"])
    found.plot(tmp_path / "curves.svg")
    assert not found.groups and found.rows() == []


def test_the_command_without_data_says_so_once_and_without_a_warning(
    spec: str, capsys: Any
) -> None:
    assert main(["sensitivity", spec, "--quiet", "--calibration-samples", "8"]) == 0
    told = capsys.readouterr()
    assert (
        told.out.count("random inputs") == 1 and "--data" in told.out and "Warning" not in told.err
    )


def prune_args(spec: str, out: Path) -> list[str]:
    args = ["prune", spec, "--macs", "0.5", "--data", "digits", "--out", str(out), "--quiet"]
    return [*args, "--calibration-samples", "64", "--evals", "6", "--round-to", "1"]


def test_the_journal_of_prune_goes_into_the_results(spec: str, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "small"
    beside = tmp_path / ".small.search.jsonl"
    assert main(prune_args(spec, out)) == 0
    kept = (out / "search.jsonl").read_bytes()
    assert kept.count(b'"evaluated"') == 6 and not beside.exists()

    beside.write_bytes(kept[: len(kept) // 2])  # as if that run had been killed
    other = ["--overwrite", "--resume", "--journal", str(beside)]
    assert main(prune_args(spec, tmp_path / "other")) == 0
    assert main([*prune_args(spec, out), "--overwrite", "--journal", str(beside)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main([*prune_args(spec, out), *other]) == 0
    assert (out / "plan.json").read_bytes() == (tmp_path / "other" / "plan.json").read_bytes()
    assert beside.read_bytes().count(b'"evaluated"') == 6


def test_an_old_journal_is_not_used_by_accident(spec: str, tmp_path: Path, capsys: Any) -> None:
    beside = tmp_path / ".small.search.jsonl"
    beside.write_text("from before\n")
    assert main(prune_args(spec, tmp_path / "small")) == 2
    assert "--resume" in capsys.readouterr().err
    for wrong in (["--max-seconds", "0"], ["--workers", "-1"], ["--evals", "0"]):
        assert main([*prune_args(spec, tmp_path / "x"), *wrong]) == 2
