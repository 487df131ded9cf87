"""Normalisation layers that are written by hand, recognised by what they compute.

Model code often has its own RMSNorm: x * rsqrt(mean(x ** 2) + eps) * weight. Op by op, that is a
mean over channels, which cannot lose any; as a norm it can, with its statistics over the channels
that stay. A module counts as one when it gives the norm's values on random inputs of several sizes.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOLERANCE = 1e-5
_SCALES = (1.0, 1e-3)  # at the second, eps counts


@dataclass(frozen=True)
class Norm:
    """An RMS norm over the last dim with weight [C] + ``shift``."""

    weight: str
    shift: float
    eps: float

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [*, C] -> [*, C]"""
        scale = weight + self.shift if self.shift else weight
        return F.rms_norm(x, (weight.shape[0],), scale, self.eps)


def recognise(module: nn.Module) -> Norm | None:
    """The norm that ``module`` computes; None where it is something else, or torch's own."""
    parameters = list(module.named_parameters())
    if (
        type(module).__module__.startswith("torch.")
        or len(parameters) != 1
        or parameters[0][1].dim() != 1
        or parameters[0][1].numel() < 2
        or next(module.children(), None) is not None
        or next(module.buffers(), None) is not None
        or module._forward_hooks
        or module._forward_pre_hooks
        or not _takes_one(module)
    ):
        return None
    name, weight = parameters[0]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(weight.shape, generator=generator) + 0.5
    inputs = [torch.randn(2, 3, len(weight), generator=generator) * s for s in _SCALES]
    try:
        with torch.no_grad():
            probe = copy.deepcopy(module).to("cpu", torch.float32)
            getattr(probe, name).copy_(drawn)
            outputs = [probe(x.clone()) for x in inputs]
    except Exception:  # noqa: BLE001 - whatever it is, it is no norm over the last dim
        return None
    for norm in _candidates(module, name):
        if all(_equal(norm.apply(x, drawn), y) for x, y in zip(inputs, outputs, strict=True)):
            return norm
    return None


def _takes_one(module: nn.Module) -> bool:
    parameters = inspect.signature(module.forward).parameters.values()
    required = [p for p in parameters if p.default is p.empty]
    return len(required) == 1 and all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


def _candidates(module: nn.Module, weight: str) -> Iterator[Norm]:
    found = {v for v in vars(module).values() if isinstance(v, float) and 0 < v < 0.1}
    for eps in sorted(found | {1e-5, 1e-6, 1e-8}):
        for shift in (0.0, 1.0):
            yield Norm(weight, shift, eps)


def _equal(expected: Tensor, actual: object) -> bool:
    return (
        isinstance(actual, Tensor)
        and actual.shape == expected.shape
        and bool(((actual - expected).abs() <= TOLERANCE * expected.abs().max()).all())
    )
