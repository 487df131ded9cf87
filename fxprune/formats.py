"""Images with the channels of a pixel next to each other, for models that run so.

On a CPU convolutions of few channels are up to four times faster in that memory format, and what
enters a consumer needs no gathering. Values are equal to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from fxprune.isolate import exact_arithmetic, rng_kept
from fxprune.products import evaluating
from fxprune.renorm import some
from fxprune.trees import tensors

_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_SAMPLES = 2  # on which both formats are compared
_TOLERANCE = 1e-3  # relative to the largest output of the kind: rounding and nothing else


def channels_last(
    module: fx.GraphModule, inputs: Sequence[tuple[Any, ...]]
) -> list[tuple[Any, ...]]:
    """``inputs`` in that format where ``module`` gives the same on them, else as they are."""
    return [turned(i) for i in inputs] if turns(module, inputs) else list(inputs)


def turns(module: fx.GraphModule, inputs: Sequence[tuple[Any, ...]]) -> bool:
    """Whether ``module`` gives the same on :func:`turned` inputs, and there is something to turn.

    A model may refuse them (``view`` of what does not lie in one piece) or read the memory itself.
    """
    if not inputs:
        return False
    plain = some([inputs[0]], _SAMPLES)[0]
    last = turned(plain)
    if all(a is b for a, b in zip(tensors(plain), tensors(last), strict=True)):
        return False
    with rng_kept(), exact_arithmetic(), evaluating(module):
        wanted = tensors(module.forward(*plain))
        try:
            found = tensors(module.forward(*last))
        except RuntimeError:  # the model's own: it does not run in this format
            return False
    return _alike(wanted, found)


def turned(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same values, images in that format; the same objects where nothing is to be turned."""
    found: tuple[Any, ...] = tree_map_only(Tensor, _turned, inputs)
    return found


def _turned(t: Tensor) -> Tensor:
    """The same values; the same object where nothing is to be turned."""
    images = t.ndim in _LAST and t.is_floating_point() and t.device.type == "cpu"
    if not images or (t.shape[1] > 1 and t.is_contiguous(memory_format=_LAST[t.ndim])):
        return t
    return t.clone(memory_format=_LAST[t.ndim])


def _alike(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> bool:
    return len(wanted) == len(found) and all(map(_close, wanted, found))


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    a, b = a.double(), b.double()
    level = _TOLERANCE * float(a.nan_to_num(0.0, 0.0, 0.0).abs().amax()) if a.numel() else 0.0
    return torch.allclose(a, b, rtol=_TOLERANCE, atol=level, equal_nan=True)
