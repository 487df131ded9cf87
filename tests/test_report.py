"""report.html: one page, whole, self-contained, and its figures those of the result."""

from __future__ import annotations

import base64
import io
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from oracle import randomise
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune.errors import OutputError, SpecError
from fxprune.isolate import rng_kept
from fxprune.report import Figure, write_report
from fxprune.report.charts import arcs, bars, group_graph, search_curve
from fxprune.report.maps import attention_maps, image
from fxprune.report.page import number

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = (
            nn.Conv2d(3, 16, 3),
            nn.Conv2d(16, 32, 1),
            nn.Conv2d(32, 16, 1),
        )
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.stem(x))
        y = F.relu(y + self.two(F.relu(self.one(y))))
        return self.head(y.mean((2, 3)))


@pytest.fixture(scope="module")
def result() -> fxprune.PruneResult:
    with rng_kept(0):
        model = randomise(Net())
    data = [
        torch.randn(16, 3, 10, 10, generator=torch.Generator().manual_seed(s)) for s in range(4)
    ]
    return fxprune.prune(
        model, data[0][:1], 0.5, data, round_to=4, progress=False, max_evaluations=12,
        repair=fxprune.Distillation(steps=10),
    )  # fmt: skip


class Page(HTMLParser):
    """Tags balance; what is asked of the outside; the text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []
        self.ids: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        given = dict(attrs)
        self.links += [given[k] for k in ("src", "href", "action", "srcset", "data") if k in given]
        self.ids += [given["id"]] if "id" in given else []
        assert not any(k.startswith("on") for k in given), "no scripts"
        assert tag not in ("script", "iframe", "link", "object", "embed")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}>"

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def written(result: fxprune.PruneResult, tmp_path: Path, **options: Any) -> tuple[str, Page]:
    path = write_report(result, tmp_path / "report.html", **options)
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def test_one_page_that_needs_nothing_else(result: fxprune.PruneResult, tmp_path: Path) -> None:
    text, page = written(result, tmp_path)
    assert page.links and all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "url(" not in text and "@import" not in text
    assert "prefers-color-scheme: dark" in text
    assert {"figures", "widths", "maps", "graph", "locked", "seconds"} <= set(page.ids)
    assert len(list(tmp_path.iterdir())) == 1
    for svg in re.findall(r"<svg.*?</svg>", text, re.S):
        root = ET.fromstring(svg)  # well-formed as XML too
        numbers = re.findall(r"-?\d+\.?\d*", " ".join(root.itertext()))
        assert numbers and "nan" not in svg.lower() and "inf" not in re.sub(r"<title.*?>", "", svg)
    shown = "".join(page.text)
    for value in (result.before.macs, result.after.macs, result.after.params):
        assert number(value) in shown
    assert f"{result.after.macs / result.before.macs - 1:+.1%}" in shown
    assert all(str(reason) in shown for reason in result.analysis.locked.values())
    assert "Distillation" in shown and "Search" in shown


def test_names_and_titles_are_escaped(result: fxprune.PruneResult, tmp_path: Path) -> None:
    bad = "<script>alert('x')</script>\"&"
    text, page = written(result, tmp_path, title=bad, notes=[bad], figures=[Figure(bad, 1, 2)])
    assert "<script" not in text
    assert "".join(page.text).count(bad) >= 4  # title, heading, card, row, note


def test_the_table_has_what_was_measured(result: fxprune.PruneResult, tmp_path: Path) -> None:
    figures = [
        Figure("Test accuracy", 0.98, 0.97, "share", "more"),
        Figure("Latency", 2.0, 1.0, "ms"),
        Figure("ONNX file", None, 1.5e6, "bytes"),
    ]
    text, page = written(result, tmp_path, figures=figures)
    shown = "".join(page.text)
    for piece in ("98.00%", "-1.00 points", "1 ms", "-50.0%", "1.5 MB"):
        assert piece in shown
    row = text[text.index("<td>Test accuracy") :]
    assert 'class="bad"' in row[: row.index("</tr>")]
    assert (number(1234567), number(999), number(0.5, "ms")) == ("1.235 M", "999", "0.5 ms")


def test_another_result_is_named(result: fxprune.PruneResult, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"got SimpleNamespace; give its \.pruned"):
        write_report(SimpleNamespace(pruned=result), tmp_path / "r.html")  # type: ignore[arg-type]


def test_bars_are_the_plan(result: fxprune.PruneResult) -> None:
    traced, plan = result.analysis, result.plan
    rows = {b.name: b for b in bars(traced, plan).rows}
    assert rows.keys() == {g.name for g in traced.groups}
    for g in traced.groups:
        b = rows[g.name]
        assert b.left == len(plan.kept.get(g.name, range(g.n)))
        assert b.kept / b.full == pytest.approx(b.left / g.n)
        assert (b.locked is None) == (g.locked is None)
    widest = max(rows.values(), key=lambda b: b.n)
    other = min(rows.values(), key=lambda b: b.n)
    assert widest.full / other.full == pytest.approx(math.sqrt(widest.n / other.n))


def test_the_graph_of_groups_is_the_network(result: fxprune.PruneResult) -> None:
    """By hand: inputs make the stream, it makes the hidden channels and the head, they make it."""
    traced = result.analysis
    by_member = {m.param: g.name for g in traced.groups for m in g.members if m.dim == 0}
    stream, hidden, head = (by_member[f"{k}.weight"] for k in ("stem", "one", "head"))
    colours = next(g.name for g in traced.groups if g.n == 3)
    edges = {(a, b) for a, b in group_graph(traced).edges}
    assert edges == {
        (colours, stream), (stream, hidden), (hidden, stream), (stream, head),
    }  # fmt: skip
    drawn = arcs(traced, result.plan)
    assert drawn is not None
    assert sorted(a.forward for a in drawn.arcs) == [False, True, True, True]
    assert [n.name for n in drawn.nodes] == [colours, stream, hidden, head]
    assert [n.y for n in drawn.nodes] == sorted({n.y for n in drawn.nodes})
    for arc in drawn.arcs:  # within the picture, right of the names
        radius = float(arc.path.partition("A")[2].partition(",")[0])
        assert 250 < drawn.x + (radius if arc.forward else -radius) < drawn.width


def test_a_graph_of_many_groups_is_drawn() -> None:
    layers = [nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(90)]
    traced = fxprune.trace(nn.Sequential(*layers), torch.zeros(1, 8))
    drawn = arcs(traced, traced.full_plan())
    assert drawn is not None and len(drawn.nodes) == 91 and len(drawn.arcs) == 90
    assert drawn.left_out == 0 and max(n.y + n.r for n in drawn.nodes) < drawn.height


def test_the_search_curve_is_the_best_so_far() -> None:
    trace = [
        {"evaluation": 1, "stage": "uniform", "fitness": 4.0, "accepted": True},
        {"evaluation": 2, "stage": "alone", "fitness": 1.0, "accepted": False},
        {"evaluation": 3, "stage": "step 1", "fitness": None, "accepted": False},
        {"evaluation": 4, "stage": "step 1", "fitness": 2.0, "accepted": True},
    ]
    curve = search_curve(trace)
    assert curve is not None and len(curve.dots) == 3
    taken = [d for d in curve.dots if d.kind == "taken"]
    assert [d.text for d in taken] == ["uniform 4", "step 1 2"]
    heights = [float(v) for v in re.findall(r"[,V](-?[\d.]+)", curve.line)]
    assert heights == [taken[0].y, taken[1].y] and heights[0] < heights[1]
    assert search_curve(trace[:1]) is None


def test_maps_add_up(result: fxprune.PruneResult) -> None:
    """Against a map computed from the model itself, with hooks."""
    x = torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(9))
    found = {m.name: m for m in attention_maps(result.analysis, result.plan, (x,)).groups}
    group = next(g for g in result.analysis.groups if any(m.param == "one.weight" for m in g.members
                 if m.dim == 0))  # fmt: skip
    shown = found[group.name]
    kept = list(result.plan.kept[group.name])
    with rng_kept(0):
        model = randomise(Net()).eval()
    with torch.no_grad():
        y = F.relu(model.one(F.relu(model.stem(x))))[0].double().numpy() ** 2
    assert shown.share == pytest.approx(y[kept].sum() / y.sum(), rel=1e-5)
    assert (shown.n, shown.left) == (32, len(kept))
    strongest = [c for c in np.argsort(-y.sum((1, 2))) if c in kept][:3]
    assert [c for c, _ in shown.kept_ones][:3] == strongest
    assert shown.whole == image(y.sum(0) / y.sum(0).max())
    assert shown.kept == image(y[kept].sum(0) / y.sum(0).max())


def test_an_image_shows_its_values() -> None:
    body = image(np.array([[0.0, 1.0], [0.25, 0.0]])).removeprefix("data:image/png;base64,")
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(body))))
    side = len(pixels) // 2
    assert pixels[0, 0].tolist() == [68, 1, 84] and pixels[0, side].tolist() == [253, 231, 37]
    assert pixels[side, 0].tolist() == [33, 145, 140]  # the root of a quarter is half way


def test_tokens_make_a_square() -> None:
    layer = nn.Sequential(nn.Linear(4, 24), nn.GELU(), nn.Linear(24, 3))
    x = torch.randn(1, 17, 4, generator=torch.Generator().manual_seed(0))
    traced = fxprune.trace(layer, x)
    plan = traced.plan({traced.groups[0].name: range(12)})
    (shown,) = attention_maps(traced, plan).groups
    pixels = Image.open(io.BytesIO(base64.b64decode(shown.whole.split(",")[1])))
    assert pixels.size[0] == pixels.size[1] and 0 < shown.share < 1


def test_a_sample_that_the_model_does_not_take(result: fxprune.PruneResult, tmp_path: Path) -> None:
    text, page = written(result, tmp_path, inputs=torch.zeros(1, 7, 10, 10))
    assert "No attention maps: RuntimeError" in text and not page.links
    one, _ = written(result, tmp_path, inputs=torch.ones(1, 3, 10, 10))
    assert one == written(result, tmp_path, inputs=(torch.ones(1, 3, 10, 10),))[0]


def test_a_folder_that_cannot_be_written(result: fxprune.PruneResult, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        write_report(result, tmp_path / "file" / "report.html")
