"""Models of other libraries, pruned at random and held to the oracle, in float64.

    pip install segmentation-models-pytorch ultralytics monai diffusers vit-pytorch
    pip install torchaudio pytorchcv
    python benchmarks/foreign.py                          every library that is installed
    python benchmarks/foreign.py --libraries monai --only UNet

Weights are random, norms and biases away from 0 and 1 (``oracle.randomise``). For each: trace,
two random plans, cut, and the relative error against the masked original. Nothing is said about any
model but its class and its inputs. ``pytorchcv``: the first model of each of its files.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / d) for d in ("tests", "")]

import torch  # noqa: E402
from oracle import oracle_error, random_plan, randomise  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils._pytree import tree_map_only  # noqa: E402

import fxprune  # noqa: E402
from fxprune.cut import cut  # noqa: E402

R = torch.randn


class Model(NamedTuple):
    name: str
    build: Callable[[], nn.Module]
    inputs: Any  # a tensor, a tuple, a mapping of keywords; or a function of the model gives them


def smp() -> Iterator[Model]:
    """Segmentation models: every decoder, then a Unet on many encoders."""
    m = importlib.import_module("segmentation_models_pytorch")
    decoders = (
        "Unet UnetPlusPlus MAnet Linknet FPN PSPNet DeepLabV3 DeepLabV3Plus PAN UPerNet Segformer"
    )
    for name in decoders.split():
        kind = getattr(m, name)
        build = lambda kind=kind: kind("resnet18", encoder_weights=None, classes=3)  # noqa: E731
        yield Model(name, build, R(1, 3, 128, 128))
    encoders = (
        "mobilenet_v2 se_resnet50 densenet121 inceptionv4 xception dpn68 vgg11_bn mit_b0 "
        "mobileone_s0 timm-regnetx_002 timm-res2net50_26w_4s timm-skresnet18 tu-convnext_atto "
        "resnext50_32x4d efficientnet-b0"
    )
    for name in encoders.split():
        options = {"encoder_weights": None, "decoder_attention_type": "scse"}
        build = lambda name=name, options=options: m.Unet(name, **options)  # noqa: E731
        yield Model(f"Unet/{name}", build, R(1, 3, 96, 96))


def ultralytics() -> Iterator[Model]:
    """Detection, segmentation, poses, oriented boxes, classes: YOLO and RT-DETR."""
    tasks = importlib.import_module("ultralytics.nn.tasks")
    kinds = {
        "-seg": tasks.SegmentationModel, "-pose": tasks.PoseModel, "-obb": tasks.OBBModel,
        "-cls": tasks.ClassificationModel, "rtdetr": tasks.RTDETRDetectionModel,
    }  # fmt: skip
    names = (
        "yolov3-tiny yolov5n yolov6n yolov8n yolov8n-seg yolov8n-pose yolov8n-obb yolov8n-cls "
        "yolov8n-p2 yolov8n-ghost yolov9t yolov9c-seg yolov10n yolo11n yolo12n rtdetr-resnet50"
    )
    for name in names.split():
        kind = next((k for part, k in kinds.items() if part in name), tasks.DetectionModel)
        build = lambda kind=kind, name=name: kind(f"{name}.yaml", verbose=False)  # noqa: E731
        yield Model(name, build, R(1, 3, 128, 128))


def monai() -> Iterator[Model]:
    """Medical images, in two and three dimensions."""
    n = importlib.import_module("monai.networks.nets")
    flat, solid, wide = R(1, 1, 64, 64), R(1, 1, 32, 32, 32), (16, 16, 32, 64, 128, 16)
    small = {"spatial_dims": 2, "in_channels": 1, "num_classes": 2}
    yield Model("UNet", lambda: n.UNet(3, 1, 2, (8, 16, 32), (2, 2), num_res_units=2), solid)
    yield Model("BasicUNet", lambda: n.BasicUNet(2, 1, 2, wide), flat)
    yield Model("BasicUNetPlusPlus", lambda: n.BasicUNetPlusPlus(2, 1, 2, features=wide), flat)
    yield Model("SegResNet", lambda: n.SegResNet(3, 8, 1, 2), solid)
    yield Model(
        "DynUNet", lambda: n.DynUNet(2, 1, 2, [3] * 3, [1, 2, 2], [2, 2], [8, 16, 32]), flat
    )
    yield Model("VNet", lambda: n.VNet(2, 1, 2), flat)
    yield Model("AttentionUnet", lambda: n.AttentionUnet(2, 1, 2, (8, 16, 32), (2, 2)), flat)
    heads = {"feature_size": 8, "hidden_size": 48, "mlp_dim": 96, "num_heads": 4}
    yield Model("UNETR", lambda: n.UNETR(1, 2, (32, 32, 32), **heads), solid)
    yield Model("SwinUNETR", lambda: n.SwinUNETR(1, 2, feature_size=12), R(1, 1, 64, 64, 64))
    yield Model("DenseNet121", lambda: n.DenseNet121(2, 1, 2), flat)
    yield Model("SEResNet50", lambda: n.SEResNet50(**small), flat)
    yield Model("HighResNet", lambda: n.HighResNet(3, 1, 2), solid)
    efficient = lambda: n.EfficientNetBN("efficientnet-b0", pretrained=False, **small)  # noqa: E731
    yield Model("EfficientNetBN", efficient, flat)
    yield Model(
        "VarAutoEncoder", lambda: n.VarAutoEncoder(2, (1, 64, 64), 1, 8, (8, 16), (1, 2)), flat
    )
    yield Model("Quicknat", lambda: n.Quicknat(2, 1, num_filters=16), flat)


def diffusers() -> Iterator[Model]:
    """Denoisers and autoencoders of images, small."""
    d = importlib.import_module("diffusers")
    step, text = torch.tensor([3]), R(1, 7, 24)
    blocks = {"layers_per_block": 1, "block_out_channels": (16, 32), "norm_num_groups": 8}
    yield Model(
        "UNet2DModel",
        lambda: d.UNet2DModel(
            sample_size=16, attention_head_dim=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"), **blocks,
        ),
        {"sample": R(1, 3, 16, 16), "timestep": step},
    )  # fmt: skip
    yield Model(
        "UNet2DConditionModel",
        lambda: d.UNet2DConditionModel(
            sample_size=16, attention_head_dim=4, cross_attention_dim=24,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **blocks,
        ),
        {"sample": R(1, 4, 16, 16), "timestep": step, "encoder_hidden_states": text},
    )  # fmt: skip
    coder = {
        "block_out_channels": (16, 32), "norm_num_groups": 8, "latent_channels": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }  # fmt: skip
    yield Model("AutoencoderKL", lambda: d.AutoencoderKL(**coder), R(1, 3, 16, 16))
    yield Model("VQModel", lambda: d.VQModel(num_vq_embeddings=16, **coder), R(1, 3, 16, 16))
    heads = {"num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 4, "num_layers": 2}
    image = {"sample_size": 8, "patch_size": 2}
    yield Model(
        "DiTTransformer2DModel",
        lambda: d.DiTTransformer2DModel(num_embeds_ada_norm=10, **heads, **image),
        {"hidden_states": R(1, 4, 8, 8), "timestep": step, "class_labels": torch.tensor([1])},
    )
    yield Model(
        "SD3Transformer2DModel",
        lambda: d.SD3Transformer2DModel(
            joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=16,
            out_channels=4, **heads, **image,
        ),
        {"hidden_states": R(1, 4, 8, 8), "encoder_hidden_states": R(1, 5, 32),
         "pooled_projections": R(1, 16), "timestep": step},
    )  # fmt: skip
    yield Model(
        "FluxTransformer2DModel",
        lambda: d.FluxTransformer2DModel(
            patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=16,
            axes_dims_rope=(4, 4, 8),
        ),
        {"hidden_states": R(1, 16, 4), "encoder_hidden_states": R(1, 5, 32),
         "pooled_projections": R(1, 16), "timestep": torch.tensor([0.3]),
         "img_ids": torch.randint(0, 4, (16, 3)), "txt_ids": torch.zeros(5, 3)},
    )  # fmt: skip


def vit_pytorch() -> Iterator[Model]:
    """Vision transformers, many kinds."""
    plain = {
        "image_size": 64, "patch_size": 16, "num_classes": 10, "dim": 48, "depth": 2, "heads": 4,
        "mlp_dim": 96,
    }  # fmt: skip
    kinds = (
        "vit:ViT simple_vit:SimpleViT deepvit:DeepViT vit_for_small_dataset:ViT parallel_vit:ViT "
        "simple_flash_attn_vit:SimpleViT simple_vit_with_qk_norm:SimpleViT "
        "simple_vit_with_register_tokens:SimpleViT normalized_vit:nViT"
    )
    for kind in kinds.split():
        module, _, name = kind.partition(":")
        found = getattr(importlib.import_module(f"vit_pytorch.{module}"), name)
        more = {"dim_head": 12} if module == "normalized_vit" else {}
        build = lambda found=found, more=more: found(**plain, **more)  # noqa: E731
        yield Model(module, build, R(1, 3, 64, 64))
    special: dict[str, dict[str, Any]] = {
        "cait:CaiT": plain | {"cls_depth": 1},
        "xcit:XCiT": plain | {"cls_depth": 1},
        "pit:PiT": plain | {"patch_size": 8, "dim": 32, "depth": (1, 1)},
        "max_vit:MaxViT": {"num_classes": 10, "dim": 16, "dim_head": 8, "depth": (1, 1),
                           "window_size": 4, "dim_conv_stem": 16},
        "regionvit:RegionViT": {"dim": (16, 32, 48, 64), "depth": (1,) * 4, "window_size": 2,
                                "num_classes": 10},
        "nest:NesT": {"image_size": 64, "patch_size": 4, "dim": 16, "heads": 2, "num_classes": 10,
                      "num_hierarchies": 3, "block_repeats": (1, 1, 1)},
        "cvt:CvT": {"num_classes": 10, "s1_emb_dim": 16, "s2_emb_dim": 32, "s3_emb_dim": 48,
                    "s3_heads": 2, "s3_depth": 1, "s2_heads": 2},
    }  # fmt: skip
    for kind, options in special.items():
        module, _, name = kind.partition(":")
        found = getattr(importlib.import_module(f"vit_pytorch.{module}"), name)
        build = lambda found=found, options=options: found(**options)  # noqa: E731
        yield Model(module, build, R(1, 3, 64, 64))


def torchaudio() -> Iterator[Model]:
    """Speech."""
    a = importlib.import_module("torchaudio.models")
    yield Model("Wav2Letter", lambda: a.Wav2Letter(10, "mfcc", 13), R(1, 13, 60))
    yield Model("DeepSpeech", lambda: a.DeepSpeech(16, n_hidden=32, n_class=10), R(1, 1, 9, 16))
    yield Model("ConvTasNet", lambda: a.ConvTasNet(2, 8, 16, 3, 16, 16, 3, 2), R(1, 1, 200))
    lengths = torch.tensor([12, 12])
    yield Model("Conformer", lambda: a.Conformer(16, 4, 32, 2, 7), (R(2, 12, 16), lengths))
    yield Model("Emformer", lambda: a.Emformer(16, 4, 32, 2, 4), (R(1, 8, 16), torch.tensor([8])))
    yield Model("squim_objective", a.squim_objective_base, R(1, 4000))


def pytorchcv() -> Iterator[Model]:
    """The first model of each file that takes one image."""
    provider = importlib.import_module("pytorchcv.model_provider")
    first: dict[str, str] = {}
    for name in sorted(provider._models):
        first.setdefault(provider._models[name].__module__, name)
    for name in first.values():
        build = lambda name=name: provider.get_model(name, pretrained=False)  # noqa: E731
        yield Model(name, build, lambda net: R(1, 3, *net.in_size))


LIBRARIES = {f.__name__: f for f in (
    smp, ultralytics, monai, diffusers, vit_pytorch, torchaudio, pytorchcv,
)}  # fmt: skip


def checked(model: Model) -> str:
    """One line: what was found."""
    torch.manual_seed(0)
    net = randomise(model.build().eval()).double()
    given = model.inputs(net) if callable(model.inputs) else model.inputs
    given = given if isinstance(given, (tuple, dict)) else (given,)
    floats = tree_map_only(torch.Tensor, _as_double, given)
    start = time.process_time()
    traced = fxprune.trace(net, floats)
    seconds = time.process_time() - start
    errors = []
    for seed in range(2):
        plan = random_plan(traced, seed)
        errors.append(oracle_error(traced, plan, cut(traced, plan), traced.example_inputs))
    free = sum(g.locked is None for g in traced.groups)
    share = traced.cost(plan).macs / max(1, traced.cost().macs)
    verdict = "right" if max(errors) <= 1e-10 else "WRONG"
    return (
        f"{verdict} | {max(errors):.0e} | {free}/{len(traced.groups)} | {share:.2f} | "
        f"{len(traced.captured.opaque)} | {seconds:.1f}"
    )


def _as_double(t: torch.Tensor) -> torch.Tensor:
    return t.double() if t.is_floating_point() else t


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--libraries", nargs="+", default=list(LIBRARIES), choices=LIBRARIES)
    parser.add_argument("--only", default="", help="part of a model's name")
    parser.add_argument("--seconds", type=int, default=300, help="limit for one model")
    o = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    print("| model | status | error | free groups | MACs left | whole parts | s, trace |")
    print("|---|---|---|---|---|---|---|")
    wrong = 0
    for library in o.libraries:
        try:
            models = list(LIBRARIES[library]())
        except ImportError as e:
            print(f"{library} is not installed: {e}", file=sys.stderr)
            continue
        for model in models:
            if o.only not in model.name:
                continue
            signal.alarm(o.seconds)
            try:
                found = checked(model)
            except KeyboardInterrupt:
                found = f"stopped after {o.seconds} s | | | | |"
            except Exception as e:  # noqa: BLE001 - a table of all models, with their errors
                found = f"error | {type(e).__name__}: {' '.join(str(e).split())[:120]} | | | |"
            finally:
                signal.alarm(0)
            wrong += found.startswith("WRONG")
            print(f"| {library} {model.name} | {found} |", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
