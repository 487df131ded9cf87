"""Modules that stay one node of the graph; how their attributes follow their new parameters.

All other modules are traced through. ``register(Module)(fit)`` adds a user's own: what it does to
channels then follows from the ops inside, and ``fit`` puts right what else mirrors its sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from torch import nn

from fxprune.tables import registering
from fxprune.types import BoolArray

Fit: TypeAlias = Callable[[Any, "BoolArray | None"], None]
"""``fit(module, kept)``: module with its new parameters; kept [C] of its input, None: not known."""

_FITS: dict[type[nn.Module], Fit] = {}
register = registering(_FITS, "module")


def is_leaf(module: nn.Module) -> bool:
    """torch's own leaf modules, subclasses of torch's among them, and exactly the user's."""
    kind = type(module)
    return kind in _FITS or (kind.__module__.startswith("torch.") and _base(kind) is not None)


def is_changed(module: nn.Module) -> bool:
    """Whether hooks or parametrizations make it another one: it is traced through."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return bool("parametrizations" in module._modules or hooks)


def fit(module: nn.Module, kept: BoolArray | None) -> None:
    """Attributes that mirror shapes follow the new parameters."""
    base = _base(type(module))
    if base is not None:
        _FITS[base](module, kept)


def _base(kind: type) -> type[nn.Module] | None:
    return next((c for c in kind.__mro__ if c in _FITS), None)


def kept_runs(kept: BoolArray | None, groups: int) -> int:
    """How many of ``groups`` equal runs of channels keep anything."""
    if kept is None or len(kept) % groups:
        return groups
    return int(kept.reshape(groups, -1).any(1).sum())


def _count(kept: BoolArray | None) -> int | None:
    return None if kept is None else int(np.count_nonzero(kept))


@register(
    nn.modules.dropout._DropoutNd, nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd, nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._MaxPoolNd,
)  # fmt: skip
def _nothing(m: nn.Module, kept: BoolArray | None) -> None:
    """No attribute mirrors the channels."""


@register(nn.modules.conv._ConvNd)
def _convolution(m: nn.modules.conv._ConvNd, kept: BoolArray | None) -> None:
    a, b = m.weight.shape[:2]
    m.groups = kept_runs(kept, m.groups)
    m.in_channels = a if m.transposed else b * m.groups
    m.out_channels = b * m.groups if m.transposed else a
    m.kernel_size = tuple(m.weight.shape[2:])


@register(nn.Linear)
def _linear(m: nn.Linear, kept: BoolArray | None) -> None:
    m.out_features, m.in_features = m.weight.shape


@register(nn.modules.batchnorm._NormBase)
def _batch_norm(m: nn.modules.batchnorm._NormBase, kept: BoolArray | None) -> None:
    m.num_features = _count(kept) or m.num_features


@register(nn.LayerNorm, nn.RMSNorm)
def _layer_norm(m: nn.LayerNorm | nn.RMSNorm, kept: BoolArray | None) -> None:
    count = _count(kept)
    if m.weight is not None:
        m.normalized_shape = tuple(m.weight.shape)
    elif count and len(m.normalized_shape) == 1:
        m.normalized_shape = (count,)


@register(nn.GroupNorm)
def _group_norm(m: nn.GroupNorm, kept: BoolArray | None) -> None:
    m.num_groups = kept_runs(kept, m.num_groups)
    m.num_channels = _count(kept) or m.num_channels


@register(nn.Embedding, nn.EmbeddingBag)
def _embedding(m: nn.Embedding | nn.EmbeddingBag, kept: BoolArray | None) -> None:
    m.num_embeddings, m.embedding_dim = m.weight.shape


@register(nn.RNNBase)
def _recurrent(m: nn.RNNBase, kept: BoolArray | None) -> None:
    own: dict[str, Any] = m._parameters
    w_ih, w_hh = own["weight_ih_l0"], own["weight_hh_l0"]
    m.input_size = w_ih.shape[1]
    m.hidden_size = w_hh.shape[0] // {"LSTM": 4, "GRU": 3}.get(m.mode, 1)
    m.proj_size = w_hh.shape[1] if m.proj_size else 0
    m._flat_weights = [own[name] for name in m._flat_weights_names]  # what its kernels are given


@register(nn.PReLU)
def _prelu(m: nn.PReLU, kept: BoolArray | None) -> None:
    m.num_parameters = m.weight.numel()
