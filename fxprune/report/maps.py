"""Attention maps for the report: where the kept and the removed channels of a group look.

The map of channels C over the positions of one sample is F = sum_c |x_c|^p, as in the criterion.
Positions are the pixels of an image, or the tokens, as a square where they make one.

Legend for shapes: N samples, C channels, H x W pixels, T tokens.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, fx

from fxprune.coupling.run import Traits
from fxprune.inputs import Inputs
from fxprune.isolate import rng_kept
from fxprune.products import evaluating
from fxprune.traced import Traced
from fxprune.types import BoolArray, FloatArray, IntArray, PrunePlan

MOST_GROUPS = 4
MOST_CHANNELS = 6  # that are shown one by one, of the kept and of the removed each
POWER = 2.0
_SIDE = 96  # pixels of a drawn map, at least
# From dark to light, even in lightness, told apart by the colour-blind too.
_COLOURS = np.array(
    [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], dtype=np.float64
)


@dataclass(frozen=True)
class GroupMaps:
    """Images as data URIs.

    whole, kept, removed  the group's map, and what both parts add to it
    share                 of the map's sum that the kept channels make
    kept_ones, removed_ones  (channel, image): those of most energy, one by one
    """

    name: str
    node: str
    n: int
    left: int
    whole: str
    kept: str
    removed: str
    share: float
    kept_ones: tuple[tuple[int, str], ...]
    removed_ones: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class Maps:
    """``input``: the sample as an image, or None where it is none."""

    input: str | None
    groups: tuple[GroupMaps, ...]


def attention_maps(traced: Traced, plan: PrunePlan, inputs: Any = None) -> Maps:
    """Of a few groups that lost channels, spread over the depth of the model.

    inputs: as the example inputs, first dim the samples; the first is shown. None: the example
    inputs. Groups without a map of at least 2 x 2 positions are left out.
    """
    values = traced.example_inputs if inputs is None else Inputs.of(inputs).values
    device = next((p.device for p in traced.graph_module.parameters()), torch.device("cpu"))
    values = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to(device), tuple(values))
    masks = dict(zip((g.name for g in traced.groups), traced.keep(plan), strict=True))
    places = [_place(traced, i, masks[g.name]) for i, g in enumerate(traced.groups)]
    found = [p for p in places if p is not None]
    found.sort(key=lambda p: p.order)
    if len(found) > MOST_GROUPS:
        at = np.linspace(0, len(found) - 1, MOST_GROUPS).round().astype(int)
        found = [found[i] for i in at]
    with rng_kept(), evaluating(traced.graph_module):
        seen = _Capture(traced.graph_module, {p.node for p in found}).look(values)
    drawn = [_drawn(p, seen[p.node], masks[p.name]) for p in found if p.node in seen]
    return Maps(_input_image(values), tuple(d for d in drawn if d is not None))


@dataclass(frozen=True)
class _Place:
    """A node where channels of a group can be seen.

    ``position`` [k] along ``dim`` and ``channel`` [k] of the group.
    """

    name: str
    node: str
    order: int
    dim: int
    position: IntArray
    channel: IntArray


def _place(traced: Traced, index: int, keep: BoolArray) -> _Place | None:
    """The last node of the group that has a map; None where nothing goes or there is none."""
    group = traced.groups[index]
    if keep.all() or not keep.any():
        return None
    governing = traced.coupling.governing
    order = {n.name: i for i, n in enumerate(traced.graph_module.graph.nodes)}
    for node in sorted(group.nodes, key=lambda n: -order.get(n, -1)):
        traits = traced.coupling.values.get(node)
        if not isinstance(traits, Traits) or not traits.dtype.is_floating_point:
            continue
        dim = {4: 1, 3: 2}.get(len(traits.shape))
        if dim is None or math.prod(traits.shape) < 4 * traits.shape[0] * traits.shape[dim]:
            continue
        for f in traits.fields:
            if f.shape[dim] == f.size == traits.shape[dim]:
                classes = traced.coupling.cls[f.ravel()]
                mine = (classes >= 0) & (governing.unit_group[classes] == index)
                position = np.flatnonzero(mine)
                channel = governing.unit_channel[classes][position]
                gone = ~keep[channel]
                if gone.any() and not gone.all():
                    return _Place(group.name, node, order[node], dim, position, channel)
    return None


class _Capture(fx.Interpreter):
    """Runs the graph and keeps the values of some nodes, of the first sample."""

    def __init__(self, module: fx.GraphModule, names: set[str]) -> None:
        super().__init__(module)
        self.names, self.seen = names, dict[str, Tensor]()

    def look(self, inputs: Sequence[Any]) -> dict[str, Tensor]:
        self.run(*inputs)
        return self.seen

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.names and isinstance(value, Tensor):
            self.seen[n.name] = value[0].detach().cpu().double().clone()
        return value


def _drawn(place: _Place, value: Tensor, keep: BoolArray) -> GroupMaps | None:
    """``value``: [C, H, W] or [T, C]."""
    x = value.numpy() if place.dim == 1 else _square(value.numpy())
    maps: FloatArray = np.abs(x[place.position]) ** POWER
    if not np.isfinite(maps).all() or min(maps.shape[1:]) < 2:
        return None
    stays = keep[place.channel]
    whole, kept, removed = maps.sum(0), maps[stays].sum(0), maps[~stays].sum(0)
    energy = maps.sum((1, 2))
    top = float(whole.max()) or 1.0

    def ones(which: BoolArray) -> tuple[tuple[int, str], ...]:
        at = np.flatnonzero(which)
        best = at[np.argsort(-energy[at], kind="stable")[:MOST_CHANNELS]]
        return tuple((int(place.channel[i]), image(maps[i] / (maps[i].max() or 1.0))) for i in best)

    return GroupMaps(
        place.name, place.node, len(keep), int(keep.sum()), image(whole / top), image(kept / top),
        image(removed / top), float(kept.sum() / (whole.sum() or 1.0)), ones(stays), ones(~stays),
    )  # fmt: skip


def _square(x: FloatArray) -> FloatArray:
    """[T, C] -> [C, H, W]: a square where the tokens, or all but the first, make one."""
    count, channels = x.shape
    for skip in (0, 1):
        side = math.isqrt(max(0, count - skip))
        if side > 1 and side * side == count - skip:
            return np.ascontiguousarray(x[skip:].T).reshape(channels, side, side)
    return np.repeat(np.ascontiguousarray(x.T)[:, None], 2, axis=1)


def image(values: FloatArray) -> str:
    """[H, W] in [0, 1] -> a PNG as a data URI; the square root is shown, for what is faint."""
    v = np.sqrt(np.clip(values, 0, 1)) * (len(_COLOURS) - 1)
    low = np.minimum(v.astype(np.int64), len(_COLOURS) - 2)
    part = (v - low)[..., None]
    return _png((_COLOURS[low] * (1 - part) + _COLOURS[low + 1] * part).round().astype(np.uint8))


def _input_image(values: Sequence[Any]) -> str | None:
    """The first sample of the first input, stretched to its own range."""
    x = next((v for v in values if isinstance(v, Tensor) and v.is_floating_point()), None)
    if x is None or x.ndim != 4 or x.shape[1] not in (1, 3):
        return None
    a = x[0].detach().cpu().double()
    low, high = torch.aminmax(a)
    a = (a - low) / (high - low).clamp_min(1e-12) * 255
    return _png(a.permute(1, 2, 0).expand(-1, -1, 3).round().to(torch.uint8).numpy())


def _png(pixels: Any) -> str:
    """[H, W, 3] bytes -> data URI, enlarged in whole steps so that pixels stay sharp."""
    times = max(1, -(-_SIDE // max(pixels.shape[:2])))
    large = pixels.repeat(times, axis=0).repeat(times, axis=1)
    buffer = io.BytesIO()
    Image.fromarray(large).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
