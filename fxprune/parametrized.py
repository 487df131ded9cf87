"""Weights that are computed from other parameters (``torch.nn.utils.parametrize``).

Channels go from the weight that comes out. The parameters behind it lose the same positions and are
then set so that they give the weight that is left: as they are where that is enough (an elementwise
function), else by the parametrization's own ``right_inverse`` (weight_norm: rows keep their norm).
Dims along which neither works are found by trying, and stay.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from fxprune.errors import InternalError

TOLERANCE = 1e-6  # of the largest weight, in float32 and better


def source(block: ParametrizationList) -> str | None:
    """The parameter behind a weight that has its shape: its positions are those of the weight."""
    shape = block().shape
    found = [name for name, t in _originals(block).items() if t.shape == shape]
    return found[-1] if found else None


def _originals(block: ParametrizationList) -> dict[str, Tensor]:
    own = [*block._parameters.items(), *block._buffers.items()]
    return {name: t for name, t in own if t is not None}


def free_dims(block: ParametrizationList) -> frozenset[int]:
    """The dims of the weight along which positions can go and leave the others as they were."""
    weight = block().detach()
    if source(block) is None:
        return frozenset()
    return frozenset(d for d, n in enumerate(weight.shape) if n > 1 and _tried(block, weight, d))


def _tried(block: ParametrizationList, weight: Tensor, dim: int) -> bool:
    """Whether the weight without every other position along ``dim`` can be had."""
    kept = torch.arange(0, weight.shape[dim], 2, device=weight.device)
    memo: dict[int, Tensor] = {}
    for t in _originals(block).values():
        along = t.dim() == weight.dim() and t.shape[dim] == weight.shape[dim]
        value = t.detach().index_select(dim, kept) if along else t.detach().clone()
        memo[id(t)] = nn.Parameter(value, False) if isinstance(t, nn.Parameter) else value
    try:
        settle(copy.deepcopy(block, dict(memo)), weight.index_select(dim, kept))
    except Exception:  # noqa: BLE001 - whatever it raises, it cannot be computed for fewer channels
        return False
    return True


def settle(block: ParametrizationList, weight: Tensor) -> None:
    """Set the parameters behind ``block``, in place, so that it gives ``weight``.

    Raises InternalError where they cannot be.
    """
    with torch.no_grad():
        if _gives(block, weight):
            return
        value: Tensor | tuple[Tensor, ...] = weight
        for part in reversed(list(block)):
            value = part.right_inverse(value)  # type: ignore[operator]
        values = (value,) if isinstance(value, Tensor) else tuple(value)
        names = ["original"] if block.is_tensor else [f"original{i}" for i in range(len(values))]
        for name, made in zip(names, values, strict=True):
            getattr(block, name).copy_(made)
        if not _gives(block, weight):
            raise InternalError("a parametrization does not give the weight that was asked for")


def _gives(block: ParametrizationList, weight: Tensor) -> bool:
    try:
        made = block()
    except Exception:  # noqa: BLE001 - it holds more that mirrors the weight's shape
        return False
    if made.shape != weight.shape:
        return False
    precision = max(TOLERANCE, 8 * torch.finfo(weight.dtype).eps)
    scale = weight.abs().max().clamp_min(torch.finfo(weight.dtype).tiny)
    return bool((made - weight).abs().max() <= precision * scale)
