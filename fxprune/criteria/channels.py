"""One group of channels as a criterion sees it, and criteria that are one function of it.

    def loudest(channels):                       # how large is the largest weight of each channel?
        return sum(rows.abs().amax(1) for _, rows in channels.rows())

    fxprune.prune(model, x, 0.5, data, criterion=loudest)

Legend for shapes: n channels of the group, m numbers of one parameter that go with a channel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.criteria.registry import Generator, Scores
from fxprune.errors import InputError
from fxprune.observe import Statistics
from fxprune.types import ChannelGroup, FloatArray, Member

if TYPE_CHECKING:
    from fxprune.traced import Traced


@dataclass(frozen=True)
class Channels:
    """A group that is not locked, with what is known about it.

    group       its members (positions in parameters) and uses (positions in inputs)
    traced      the model; ``traced.graph_module`` has the tensors: do not write to them
    statistics  what calibration data showed; None for a criterion that does not ask for data
    generator   for draws that have to be repeatable
    """

    group: ChannelGroup
    traced: Traced
    statistics: Statistics | None
    generator: Generator

    @property
    def n(self) -> int:
        return self.group.n

    def rows(self) -> Iterator[tuple[Member, Tensor]]:
        """Every parameter that holds some of the channels, as [n, m]: one row for each channel.

        A weight whose rows and columns both belong to the group comes twice; buffers do not come.
        """
        weights = dict(self.traced.graph_module.named_parameters(remove_duplicate=False))
        for member in self.group.members:
            if member.param in weights:
                yield member, _rows(member, weights[member.param])

    def layers(self) -> Iterator[tuple[Member, nn.Module, Tensor]]:
        """The ``weight`` among them: (where, the module that owns it, rows [n, m])."""
        modules = dict(self.traced.graph_module.named_modules())
        for member, rows in self.rows():
            path, _, name = member.param.rpartition(".")
            if name == "weight" and path in modules:
                yield member, modules[path], rows


def _rows(member: Member, parameter: nn.Parameter) -> Tensor:
    w = parameter.detach()
    w = w[:, None] if w.ndim == 1 else w.movedim(member.dim, 0).flatten(1)
    index = torch.from_numpy(member.index).to(w.device)
    return w[index].flatten(1)


OneGroup: TypeAlias = Callable[[Channels], Any]


@dataclass(frozen=True)
class PerGroup:
    """The criterion that ``score`` is for each group: [n] numbers, higher = keep.

    Raises InputError where it gives something else.
    """

    score: OneGroup
    needs_data: bool = False

    def __call__(
        self, traced: Traced, statistics: Statistics | None, generator: Generator
    ) -> Scores:
        return {
            g.name: self._checked(Channels(g, traced, statistics, generator))
            for g in traced.groups
            if g.locked is None
        }

    def _checked(self, channels: Channels) -> FloatArray:
        given = self.score(channels)
        if isinstance(given, Tensor):
            given = given.detach().double().cpu().numpy()
        try:
            scores = np.asarray(given, dtype=np.float64)
        except (TypeError, ValueError) as e:
            raise InputError(f"{self._name()} must give numbers; got {given!r}") from e
        if scores.shape != (channels.n,):
            raise InputError(
                f"{self._name()} must give one number for each of the {channels.n} channels of "
                f"group {channels.group.name!r}; got shape {scores.shape}"
            )
        return scores

    def _name(self) -> str:
        return f"criterion {getattr(self.score, '__name__', type(self.score).__name__)}"
