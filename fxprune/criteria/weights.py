"""Criteria that only look at weights: ``bn_scale``, ``fpgm``, ``lamp``.

bn_scale  |gamma| of the normalisations of a channel (network slimming, Liu et al., 2017); where a
          group has none, the L2 norm of its weights
fpgm      how far a channel's weights lie from those of all others (filter pruning by geometric
          median, He et al., 2019): replaceable ones go first
lamp      squared norm over that of all channels that are at least as large (layer-adaptive
          sparsity, Lee et al., 2021): orders a group like l2, and makes groups comparable

All see every member of a group: producers, normalisations and consumers.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.criteria.channels import Channels, PerGroup
from fxprune.criteria.registry import register
from fxprune.types import FloatArray

NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


def squared_norms(channels: Channels) -> Tensor:
    """[n]: over all parameters of each channel, float64."""
    total = torch.zeros(channels.n, dtype=torch.float64)
    for _, rows in channels.rows():
        total += rows.square().sum(1, dtype=torch.float64).cpu()
    return total


def bn_scale(channels: Channels) -> Tensor:
    """[n] mean of |gamma| over the normalisations."""
    scales = [
        rows.abs().mean(1, dtype=torch.float64).cpu()
        for _, module, rows in channels.layers()
        if isinstance(module, NORMS)
    ]
    return torch.stack(scales).mean(0) if scales else squared_norms(channels).sqrt()


def fpgm(channels: Channels) -> Tensor:
    """[n] sum of the distances to all other channels, over the weights with at least two dims."""
    square = torch.zeros(channels.n, channels.n, dtype=torch.float64)
    for member, rows in channels.rows():
        if rows.shape[1] > member.index.shape[1]:  # a matrix; scales and biases are no filters
            rows = rows.double().cpu()
            gram = rows @ rows.t()
            own = gram.diagonal()
            square += (own[:, None] + own[None] - 2 * gram).clamp_min(0)
    if not square.any():
        return squared_norms(channels).sqrt()
    return square.sqrt().sum(1)


def lamp(channels: Channels) -> FloatArray:
    """[n] squared norm over the sum of those that are not smaller."""
    square = squared_norms(channels).numpy()
    order = np.argsort(square, kind="stable")
    rest = np.cumsum(square[order][::-1])[::-1]
    scores = np.empty_like(square)
    scores[order] = square[order] / np.maximum(rest, np.finfo(np.float64).tiny)
    return scores


register("bn_scale")(lambda: PerGroup(bn_scale))
register("fpgm")(lambda: PerGroup(fpgm))
register("lamp")(lambda: PerGroup(lamp))
