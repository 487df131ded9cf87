"""torchvision at half the MACs: the oracle in float32, exact costs, ONNX for some."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from checks import counted_macs, counted_params
from oracle import oracle_error, randomise
from torch import nn

import fxprune

SMALL = {"weights": None, "num_classes": 10}
MODELS: dict[str, tuple[int, dict[str, Any]]] = {  # name: (size of the image, options)
    "resnet18": (64, {}),
    "resnet50": (64, {}),
    "densenet121": (64, {}),
    "mobilenet_v2": (64, {}),
    "mobilenet_v3_large": (64, {}),
    "efficientnet_b0": (64, {}),
    "shufflenet_v2_x1_0": (64, {}),
    "googlenet": (64, {"aux_logits": False, "init_weights": False}),
    "inception_v3": (96, {"aux_logits": False, "init_weights": False}),
    "squeezenet1_1": (64, {}),
    "resnext50_32x4d": (64, {}),
    "regnet_y_400mf": (64, {}),
    "vgg11_bn": (32, {}),
    "alexnet": (64, {}),
    "convnext_tiny": (64, {}),
    "vit_b_16": (64, {"image_size": 64}),
    "swin_t": (64, {}),
    "swin_v2_t": (64, {}),
    "maxvit_t": (224, {}),
    "deeplabv3_resnet50": (64, {"weights_backbone": None}),
    "lraspp_mobilenet_v3_large": (64, {"weights_backbone": None}),
}
EXPORTED = (
    "resnet18",
    "mobilenet_v2",
    "shufflenet_v2_x1_0",
    "convnext_tiny",
    "lraspp_mobilenet_v3_large",
)


def images(size: int, batch: int, seed: int) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def pruned_half(name: str) -> tuple[fxprune.PruneResult, int]:
    size, options = MODELS[name]
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.get_model(name, **SMALL, **options)
    randomise(model)
    result = fxprune.prune(
        model, images(size, 1, 0), 0.5, images(size, 2, 1), criterion="l1",
        allocation="uniform", repair=None, progress=False,
    )  # fmt: skip
    return result, size


@pytest.mark.parametrize("name", MODELS)
def test_half_the_macs(name: str, tmp_path: Path) -> None:
    result, size = pruned_half(name)
    one, three = images(size, 1, 2), images(size, 3, 3)
    for module in (result.model, result.graph_module):
        assert oracle_error(result.analysis, result.plan, module, (one,)) <= 1e-5
    assert oracle_error(result.analysis, result.plan, result.model, (three,)) <= 1e-5

    assert result.after.macs == counted_macs(result.graph_module, (one,))
    assert result.before.macs == counted_macs(result.traced, (one,))
    assert result.after.params == counted_params(result.graph_module)
    assert result.before.params == counted_params(result.traced)
    assert 0.45 * result.before.macs <= result.after.macs <= 0.5 * result.before.macs

    if name in EXPORTED:
        report = fxprune.export_onnx(result.model, one, tmp_path / "pruned.onnx")
        assert max(report.errors) <= 1e-4 and len(report.batch_sizes) > 1
