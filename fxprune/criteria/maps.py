"""Attention maps to look at: where a layer responds, before and after channels go.

F = sum_c |x_c|^p over the positions of one sample, at the input of the first consumer of a group.

Legend for shapes: N samples, n channels of a group, * positions (spatial dims, or tokens).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxprune.inputs import samples_of
from fxprune.products import Product, watch
from fxprune.types import PrunePlan, Use

if TYPE_CHECKING:
    from fxprune.traced import Traced


@dataclass(frozen=True)
class AttentionMap:
    """Of one group, float32 [N, *]: of all channels, of those that stay, of those that go."""

    whole: Tensor
    kept: Tensor
    removed: Tensor


def attention_maps(
    traced: Traced,
    inputs: tuple[Any, ...],
    plan: PrunePlan | None = None,
    *,
    groups: Sequence[str] | None = None,
    p: float = 2.0,
) -> dict[str, AttentionMap]:
    """The maps of every group (or those named) that enters a product, for one batch of inputs.

    ``plan``: which channels stay; all of them where None. Groups whose channels enter only
    matrices of samples have one position each: [N].
    """
    wanted: dict[str, list[tuple[str, Use]]] = {}
    for group in traced.groups:
        if group.uses and (groups is None or group.name in groups):
            wanted.setdefault(group.uses[0].consumer, []).append((group.name, group.uses[0]))
    masks = [] if plan is None else traced.keep(plan)
    keep = {g.name: mask for g, mask in zip(traced.groups, masks, strict=False)}
    samples = samples_of(inputs)
    found: dict[str, AttentionMap] = {}

    def look(key: str, product: Product, out: Tensor) -> None:
        for name, use in wanted.get(key, ()):
            power = _power(product, use, samples, p)
            stays = torch.ones(len(use.index), dtype=torch.bool)
            if name in keep:
                stays = torch.from_numpy(keep[name])
            kept = power[:, stays].sum(1)
            whole = power.sum(1)
            found[name] = AttentionMap(whole, kept, whole - kept)

    watch(traced.graph_module, inputs, look)
    return found


def _power(product: Product, use: Use, samples: int, p: float) -> Tensor:
    """|x_c|^p of each channel of ``use``: [N, n, *]."""
    x = product.x.detach().float()
    if product.kind == "linear":
        tokens = len(x) // samples if len(x) % samples == 0 else 1
        x = x.unflatten(0, (-1, tokens)).transpose(1, 2)  # [N, C, tokens]
    index = torch.from_numpy(use.index).to(x.device)
    chosen: Tensor = x.abs().pow(p)[:, index.flatten()].unflatten(1, index.shape).sum(2)
    if product.kind == "linear" and chosen.shape[-1] == 1:
        chosen = chosen[..., 0]
    return chosen.cpu()
