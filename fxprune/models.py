"""Model specs: a short text -> a model with example inputs.

    torchvision:NAME         torchvision.models, without weights unless they are asked for
    timm:NAME                timm, likewise (the extra "timm")
    FILE.py:FACTORY          a function or class without required arguments in a Python file
    package.module:FACTORY   the same in an importable module

A factory returns a model, or (model, example inputs); a mapping holds keyword inputs.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxprune import usercode
from fxprune.checkpoint import check_finite, load_state, read_state
from fxprune.errors import ModelError, SpecError, unknown
from fxprune.inputs import Inputs
from fxprune.isolate import rng_kept

PRETRAINED = "default"
"""The ``weights`` that ask a model library for its own; only this may download."""

_FORMS = "expected torchvision:NAME, timm:NAME, FILE.py:FACTORY or package.module:FACTORY"


def load_model(
    spec: str, weights: str | None = None, input_shape: str | None = None, seed: int = 0
) -> tuple[nn.Module, Any]:
    """The model of ``spec`` and example inputs (standard normal, or the factory's own).

    weights      file (see checkpoint.read_state), "default" for the library's own, or None
    input_shape  "1x3x224x224", several inputs separated by commas; None: what the library or the
                 factory says
    seed         for initial weights and example inputs; the global RNG state is left alone

    Raises SpecError (the spec, the shape) or ModelError (the factory fails, weights do not fit or
    are not finite).
    """
    shapes = parse_shapes(input_shape) if input_shape else None
    source, _, name = spec.partition(":")
    if not source or not name:
        raise SpecError(f"model {spec!r} is not a model spec; {_FORMS}")
    file = None if weights in (None, PRETRAINED) else weights
    state = read_state(file) if file else None
    with rng_kept(seed):
        if source == "torchvision":
            model, default = _torchvision(name, weights == PRETRAINED)
        elif source == "timm":
            model, default = _timm(name, weights == PRETRAINED)
        elif weights == PRETRAINED:
            raise SpecError(
                f"only torchvision: and timm: models have default weights, not {spec!r}"
            )
        else:
            model, default = _from_factory(spec)
        inputs = default if shapes is None else tuple(torch.randn(s) for s in shapes)
    if inputs is None:
        raise SpecError(
            f"the input shape of {spec} is not known; give --input, for example --input 1x3x224x224"
        )
    if state is not None:
        load_state(model, state, f"weights {file}")
    check_finite(model)
    return model, inputs


def parse_shapes(text: str) -> tuple[tuple[int, ...], ...]:
    """``"1x3x224x224,1x10"`` -> ((1, 3, 224, 224), (1, 10)). Raises SpecError."""
    shapes = []
    for part in text.split(","):
        if not re.fullmatch(r"\s*[1-9]\d*(\s*[xX]\s*[1-9]\d*)*\s*", part):
            raise SpecError(
                f"input shape {text!r}: expected sizes joined by x with the batch first, like "
                "1x3x224x224, and commas between several inputs"
            )
        shapes.append(tuple(int(n) for n in re.split(r"\s*[xX]\s*", part.strip())))
    return tuple(shapes)


# --- model libraries ----------------------------------------------------------------------------


def _torchvision(name: str, pretrained: bool) -> tuple[nn.Module, tuple[Tensor, ...] | None]:
    from torchvision import models

    if name not in models.list_models():
        raise unknown("torchvision model", name, models.list_models())
    builder = models.get_model_builder(name)
    weights = models.get_model_weights(name).DEFAULT
    options: dict[str, Any] = {"weights": weights if pretrained else None}
    if not pretrained and "weights_backbone" in inspect.signature(builder).parameters:
        options["weights_backbone"] = None  # the default would be downloaded
    with warnings.catch_warnings():
        # GoogLeNet and Inception announce a future change of their initial weights.
        warnings.simplefilter("ignore", FutureWarning)
        model = usercode.call(f"torchvision:{name}", lambda: builder(**options))
    transforms = usercode.call(f"torchvision:{name}", weights.transforms)
    size = getattr(transforms, "crop_size", None) or [224]
    height, width = (size[0], size[-1]) if isinstance(size, (list, tuple)) else (size, size)
    return model, (torch.randn(1, 3, int(height), int(width)),)


def _timm(name: str, pretrained: bool) -> tuple[nn.Module, tuple[Tensor, ...] | None]:
    try:
        import timm
    except ImportError as e:
        raise SpecError(
            f"timm:{name} needs the package timm; install the extra: pip install fxprune[timm]"
        ) from e
    if name.split(".")[0] not in timm.list_models():
        raise unknown("timm model", name, timm.list_models())
    model = usercode.call(f"timm:{name}", lambda: timm.create_model(name, pretrained=pretrained))
    config = getattr(model, "pretrained_cfg", None) or {}
    return model, (torch.randn(1, *config.get("input_size", (3, 224, 224))),)


# --- the user's own code ------------------------------------------------------------------------


def _from_factory(spec: str) -> tuple[nn.Module, Any]:
    made = usercode.made(spec, "builds the model", _FORMS)
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{spec} returned {type(model).__name__}; expected a torch.nn.Module, or a pair "
            "(module, example inputs)"
        )
    return model, None if inputs is None else _as_given(inputs)


def _as_given(inputs: Any) -> Any:
    """A mapping of keyword inputs as it is; positional inputs as a tuple."""
    return inputs if isinstance(inputs, Mapping) else Inputs.of(inputs).values
