"""Models of torchvision and timm with inputs that fit them, from the libraries' own metadata.

Nothing here is a setting for pruning: a name gives a model with random weights and example inputs.
Shapes: images [N, 3, S, S], videos [N, 3, T, S, S], detection a list of images [3, S, S].

    python benchmarks/zoo.py    writes timm_smallest.json: the smallest model of each timm module
"""

from __future__ import annotations

import fnmatch
import inspect
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SIDE = 128  # of the images, where the metadata ask for no more
FRAMES = 16  # of a video, as torchvision's own models were trained
SMALLEST = Path(__file__).with_name("timm_smallest.json")  # module -> [model, parameters]


@dataclass(frozen=True)
class Built:
    """A model in eval mode with example inputs (batch 1) and others to check it on (batch 2 where
    the model takes images)."""

    model: nn.Module
    inputs: tuple[Any, ...]
    others: tuple[Any, ...]
    size: str


def names(library: str, only: str = "*", timm_modules: bool = False) -> list[str]:
    """Names of the models that match ``only`` (shell patterns, separated by commas)."""
    if library == "torchvision":
        from torchvision import models

        found = [n for n in models.list_models() if not n.startswith("quantized_")]
    else:
        import timm

        found = timm.list_models()
        if timm_modules:
            found = [name for name, _ in smallest().values()]
    patterns = only.split(",")
    chosen = [[n for n in found if fnmatch.fnmatchcase(n, p)] for p in patterns]
    return list(dict.fromkeys(n for part in chosen for n in part))


def build(library: str, name: str) -> Built:
    """The model with random weights, inputs of batch 1 and others to check it on."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _torchvision(name) if library == "torchvision" else _timm(name)


def _torchvision(name: str) -> Built:
    from torchvision import models

    builder = models.get_model_builder(name)
    options = {"weights_backbone": None} if "weights_backbone" in _options(builder) else {}
    model = builder(weights=None, **options).eval()
    meta = models.get_model_weights(name).DEFAULT.meta
    # A ViT's own image size comes first: its default weights may be those of a larger one.
    least = meta.get("min_size") or (1, 1)
    side = int(getattr(model, "image_size", None) or max(SIDE, *least))
    kind = builder.__module__.split(".")[2]
    if kind == "detection":
        _for_random_weights(model)
        one, two = ([_image(3, side, side)] for _ in range(2))
        return Built(model, (one,), (two,), f"[3x{side}x{side}]")
    if kind == "video":
        shape = (3, max(FRAMES, int(meta.get("min_temporal_size") or 1)), side, side)
        return Built(model, (_normal(1, *shape),), (_normal(1, *shape),), _text(shape))
    count = len(_required(type(model).forward))
    shape = (3, side, side)
    one, two = (tuple(_normal(n, *shape) for _ in range(count)) for n in (1, 2))
    return Built(model, one, two, _text(shape, count))


def _timm(name: str) -> Built:
    import timm

    model = timm.create_model(name, pretrained=False).eval()
    shape = tuple(int(s) for s in model.pretrained_cfg.get("input_size", (3, 224, 224)))
    return Built(model, (_normal(1, *shape),), (_normal(2, *shape),), _text(shape))


def _for_random_weights(model: nn.Module) -> None:
    """A detector resizes its images itself, to 800 pixels and more: here to 2 * SIDE.

    With random weights no score is high, so that every score counts as a detection.
    """
    transform: Any = model.transform
    if transform.fixed_size is None:
        transform.min_size, transform.max_size = (2 * SIDE,), 2 * SIDE
    for module in model.modules():
        if hasattr(module, "score_thresh"):
            module.score_thresh = 0.0


def smallest() -> dict[str, tuple[str, int]]:
    """timm module -> (its model with the fewest parameters, their number), as written by main."""
    return {k: (n, p) for k, (n, p) in json.loads(SMALLEST.read_text(encoding="utf-8")).items()}


def _find_smallest() -> dict[str, tuple[str, int]]:
    import timm

    found: dict[str, tuple[str, int]] = {}
    for module in timm.list_modules():
        sizes = {}
        for name in timm.list_models(module=module):
            with torch.device("meta"):
                model = timm.create_model(name, pretrained=False)
            sizes[name] = sum(p.numel() for p in model.parameters())
        if sizes:
            least = min(sizes, key=lambda n: sizes[n])
            found[module] = (least, sizes[least])
    return found


def _options(builder: Any) -> set[str]:
    return set(inspect.signature(builder).parameters)


def _required(forward: Any) -> list[str]:
    """Positional parameters of ``forward`` without a default, self left out."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    return [p.name for p in parameters if p.default is p.empty and p.kind != p.VAR_POSITIONAL]


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape)


def _image(*shape: int) -> Tensor:
    return torch.rand(shape)


def _text(shape: tuple[int, ...], count: int = 1) -> str:
    one = "x".join(str(s) for s in shape)
    return one if count == 1 else f"{count} of {one}"


def main() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = json.dumps(_find_smallest(), indent=1)
    SMALLEST.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
