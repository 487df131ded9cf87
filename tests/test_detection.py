"""Detectors: lists of images go in, and the data decides how many boxes come out."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from checks import prunable
from oracle import masked_original, random_plan, randomise, relative_error
from torch import Tensor, fx, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

import fxprune
from fxprune.cut import cut
from fxprune.traced import trace
from fxprune.whole import KeptWhole


class Backbone(nn.Sequential):
    out_channels = 32

    def __init__(self) -> None:
        first = (nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        super().__init__(*first, nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU())


def anchors(per_place: int = 4) -> AnchorGenerator:
    return AnchorGenerator(((8,), (16,))[:1] if per_place == 1 else ((8, 16),),
                           ((1.0,),) if per_place == 1 else ((0.5, 1.0),))  # fmt: skip


SIZES = {"min_size": 32, "max_size": 32}


def retinanet() -> nn.Module:
    anchor = {"anchor_generator": anchors(), "topk_candidates": 40, "score_thresh": 0.1}
    return RetinaNet(Backbone(), 3, **SIZES, **anchor)


def faster_rcnn() -> nn.Module:
    pool = MultiScaleRoIAlign(["0"], 4, 2)
    proposals = {"rpn_pre_nms_top_n_test": 40, "rpn_post_nms_top_n_test": 20}
    return FasterRCNN(
        Backbone(), 3, rpn_anchor_generator=anchors(), box_roi_pool=pool, **SIZES, **proposals
    )


def fcos() -> nn.Module:
    anchor = {"anchor_generator": anchors(1), "topk_candidates": 40, "score_thresh": 0.15}
    return FCOS(Backbone(), 3, **SIZES, **anchor)


DETECTORS = {"retinanet": retinanet, "faster_rcnn": faster_rcnn, "fcos": fcos}


def image(seed: int) -> tuple[list[Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return ([torch.rand(3, 32, 32, generator=g)],)


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = randomise(DETECTORS[name]())
    for p in model.parameters():
        if p.dim() == 4:  # scores and boxes that follow the image
            nn.init.kaiming_normal_(p)
    return model


@pytest.mark.parametrize("name", DETECTORS)
def test_the_graph_runs_on_other_images(name: str) -> None:
    """Other images have other numbers of boxes; the graph finds what the model finds."""
    model = build(name)
    traced = trace(model, image(0))
    assert traced.captured.opaque and "forward" not in traced.captured.opaque
    counts = set()
    for seed in range(1, 5):
        with torch.no_grad():
            (expected,) = model(*image(seed))
            given = traced.graph_module(*image(seed))
        (given,) = given if isinstance(given, list) else (given,)
        assert set(given) == set(expected)
        assert all(torch.equal(given[k], expected[k]) for k in expected)
        counts.add(len(expected["boxes"]))
    assert len(counts) > 1 or name == "faster_rcnn", "the images say nothing"


def features(gm: fx.GraphModule, whole: set[str]) -> list[str]:
    """Names of the nodes whose values enter a part that is kept whole, and of network outputs."""
    found = {}
    for n in gm.graph.nodes:
        kept = isinstance(n.target, KeptWhole) or (n.op == "call_module" and n.target in whole)
        if kept:
            return [*found]
        if n.op == "call_module":
            found[n.name] = True
    return [*found]


def values_of(gm: fx.GraphModule, names: list[str]) -> fx.GraphModule:
    made = copy.deepcopy(gm)
    by_name = {n.name: n for n in made.graph.nodes}
    out = next(n for n in made.graph.nodes if n.op == "output")
    out.args = ([by_name[n] for n in names],)
    made.recompile()
    return made


@pytest.mark.parametrize("name", DETECTORS)
def test_oracle_before_the_first_decision(name: str) -> None:
    """Every layer's output up to there, at the positions that stay."""
    traced = trace(build(name), image(0))
    names = features(traced.graph_module, set(traced.captured.opaque))
    assert len(names) >= 6
    wider = replace(
        traced,
        captured=replace(traced.captured, graph_module=values_of(traced.graph_module, names)),
    )
    assert {"backbone.0.weight:0", "backbone.3.weight:1"} <= prunable(traced)
    for seed in range(2):
        plan = random_plan(traced, seed)
        pruned = values_of(cut(traced, plan), names)
        expected = masked_original(wider, plan)(*image(7))
        with torch.no_grad():
            actual = pruned(*image(7))
        pairs = [(a, b) for a, b in zip(expected, actual, strict=True) if a.shape == b.shape]
        assert len(pairs) >= 2, "nothing left to compare"
        assert relative_error([a for a, _ in pairs], [b for _, b in pairs]) <= 1e-5


def run(model: nn.Module, seed: int) -> Any:
    with torch.no_grad():
        return model(*image(seed))


@pytest.mark.parametrize("loader", [False, True])
def test_prune_takes_lists_of_images(loader: bool) -> None:
    model = build("retinanet")
    data = [(image(s)[0], [{"boxes": torch.zeros(1, 4)}]) for s in range(6)] if loader else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if data is None else "error")
        result = fxprune.prune(
            model, image(0), 0.6, data, allocation="uniform", progress=False,
            calibration_samples=6,
        )  # fmt: skip
    assert result.after.macs <= 0.6 * result.before.macs
    assert type(result.model) is RetinaNet
    for seed in range(10, 13):
        (boxes,) = run(result.model, seed)
        found = run(result.graph_module, seed)
        (again,) = found if isinstance(found, list) else (found,)
        assert torch.equal(boxes["scores"], again["scores"])


def test_search_on_a_detector() -> None:
    """Two models rarely find the same number of boxes; the search compares them all the same."""
    result = fxprune.prune(
        build("retinanet"), image(0), 0.6, [image(s) for s in range(4)], max_evaluations=3,
        repair=None, criterion="l1", progress=False,
    )  # fmt: skip
    assert result.after.macs <= 0.6 * result.before.macs
    assert len(run(result.model, 9)) == 1
