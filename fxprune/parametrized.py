"""Weights that are computed from other parameters (``torch.nn.utils.parametrize``).

Where any weight can be had, the graph holds it as a plain parameter, which is cut, ranked and
repaired like any other (``coupling.computed``). The user's class goes on computing it: the
parameters behind it are set by the parametrization's own ``right_inverse`` such that they give the
weight that is left (weight_norm: the gains are the norms of what is left).

The older way, by hooks before forward (:func:`remake`), is the same to the graph and the class.

Where not any weight can be had, but the function is elementwise, the parameter behind the weight
loses the same positions. Dims along which that does not work are found by trying, and stay.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

TOLERANCE = 1e-6  # of the largest weight, in float32 and better
_ROUNDS = 15  # of the power iteration


def source(block: ParametrizationList) -> str | None:
    """The parameter behind a weight that has its shape: its positions are those of the weight."""
    with torch.no_grad():
        shape = block().shape
    own = [(name, t) for name, t in block._parameters.items() if t is not None]
    found = [name for name, t in own if t.shape == shape]
    return found[-1] if found else None


def free_dims(block: ParametrizationList) -> frozenset[int]:
    """The dims of the weight along which positions can go and leave the others as they were."""
    weight, name = block().detach(), source(block)
    if name is None:
        return frozenset()
    return frozenset(
        d for d, n in enumerate(weight.shape) if n > 1 and _elementwise(block, name, weight, d)
    )


def _elementwise(block: ParametrizationList, name: str, weight: Tensor, dim: int) -> bool:
    """Whether every other position of a parameter gives every other one of the weight."""
    kept = torch.arange(0, weight.shape[dim], 2, device=weight.device)
    made = _own(block)
    try:
        with torch.no_grad():
            _put(made, {name: getattr(block, name).index_select(dim, kept)})
            return _gives(made, weight.index_select(dim, kept))
    except Exception:  # noqa: BLE001 - whatever it raises, it cannot be computed for fewer channels
        return False


def gives_any(block: ParametrizationList) -> bool:
    """Whether ``block`` can be made to give whatever weight is wanted, at fewer positions too."""
    with torch.no_grad():
        weight = block()
    if weight.is_meta:
        return all(type(part) in _FITS or hasattr(part, "right_inverse") for part in block)
    generator = torch.Generator().manual_seed(0)
    shapes = weight.shape, [(n + 1) // 2 for n in weight.shape]
    wanted = (torch.randn(list(shape), generator=generator) for shape in shapes)
    return all(settle(_own(block), w.to(weight)) for w in wanted)


def _own(block: ParametrizationList) -> ParametrizationList:
    """A copy with memory of its own."""
    memo: dict[int, Any] = {}
    for t in block.parameters():
        memo[id(t)] = nn.Parameter(t.detach().clone(), t.requires_grad)
    return copy.deepcopy(block, memo)


def settle(block: ParametrizationList, weight: Tensor) -> bool:
    """Give ``block`` parameters of its own, so that it gives ``weight``; whether it does."""
    try:
        with torch.no_grad():
            _put(block, _inverted(block, weight))
            return _gives(block, weight)
    except Exception:  # noqa: BLE001 - whatever it raises, it cannot be had
        return False


def _inverted(block: ParametrizationList, weight: Tensor) -> dict[str, Tensor]:
    value: Tensor | tuple[Tensor, ...] = weight.detach()
    for part in reversed(list(block)):
        value = part.right_inverse(value)  # type: ignore[operator]
        fit = _FITS.get(type(part))
        if fit is not None:
            fit(part, value)
    values = (value,) if isinstance(value, Tensor) else tuple(value)
    names = ["original"] if block.is_tensor else [f"original{i}" for i in range(len(values))]
    return dict(zip(names, values, strict=True))


def _put(block: ParametrizationList, values: dict[str, Tensor]) -> None:
    """Memory of its own for each: the graph goes on with the plain weight."""
    for name, value in values.items():
        old, new = getattr(block, name), value.detach().clone()
        made: Any = nn.Parameter(new, old.requires_grad) if name in block._parameters else new
        setattr(block, name, made)


def _gives(block: ParametrizationList, weight: Tensor) -> bool:
    return _near(block(), weight)


def _near(made: Tensor, weight: Tensor) -> bool:
    if made.shape != weight.shape:
        return False
    if weight.is_meta:
        return True
    precision = max(TOLERANCE, 8 * torch.finfo(weight.dtype).eps)
    scale = weight.abs().max().clamp_min(torch.finfo(weight.dtype).tiny)
    return bool((made - weight).abs().max() <= precision * scale)


def _vectors(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """(u, v) of a spectral norm: a weight is divided by u W v, which is 1 so that it stays.

    In training mode they are vectors of norm 1 again, and the weight has the norm 1.
    """
    matrix = weight.movedim(dim, 0).flatten(1)
    v = matrix[matrix.norm(dim=1).argmax()]
    for _ in range(_ROUNDS):
        u = F.normalize(matrix.mv(F.normalize(v, dim=0)), dim=0)
        v = F.normalize(matrix.t().mv(u), dim=0)
    return u / u.dot(matrix.mv(v)), v


def _spectral(part: Any, weight: Tensor) -> None:
    if weight.dim() > 1:
        part._u, part._v = _vectors(weight, part.dim)


_FITS: dict[type[nn.Module], Callable[[Any, Any], None]] = {_SpectralNorm: _spectral}
"""Parametrizations that keep more that mirrors the weight's shape, and how that follows."""


# -- hooks --------------------------------------------------------------------------------------


def hook_of(module: nn.Module, name: str) -> Any:
    """The hook that makes a weight from the parameter ``name`` of a module; None: there is none."""
    suffixes = {WeightNorm: "_v", SpectralNorm: "_orig"}
    hooks: list[Any] = list(module._forward_pre_hooks.values())
    return next((h for h in hooks if f"{_named(h)}{suffixes.get(type(h), '')}" == name), None)


def _named(hook: Any) -> str:
    return str(hook.name) if type(hook) in (WeightNorm, SpectralNorm) else ""


def hooked(module: nn.Module, name: str) -> Tensor | None:
    """The weight that a module's hook makes from its parameter ``name``; None: there is no hook."""
    hook = hook_of(module, name)
    if hook is None:
        return None
    with torch.no_grad():
        more = (False,) if type(hook) is SpectralNorm else ()  # no step of the power iteration
        made: Tensor = hook.compute_weight(module, *more)
    return made


def remake(module: nn.Module, name: str, weight: Tensor) -> bool:
    """Set what else a hook makes the weight from, so that it makes ``weight``; whether it does.

    The parameter ``name`` of the module holds the weight.
    """
    hook = hook_of(module, name)
    value = weight.detach()
    try:
        if type(hook) is WeightNorm:
            norms = torch.norm_except_dim(value, 2, hook.dim)
            learned = getattr(module, f"{hook.name}_g").requires_grad
            setattr(module, f"{hook.name}_g", nn.Parameter(norms, learned))
        else:
            u, v = _vectors(value, hook.dim)
            setattr(module, f"{hook.name}_u", u)
            setattr(module, f"{hook.name}_v", v)
        made = hooked(module, name)
        setattr(module, hook.name, made)
        return made is not None and _near(made, value)
    except Exception:  # noqa: BLE001 - whatever it raises, it cannot be had
        return False
