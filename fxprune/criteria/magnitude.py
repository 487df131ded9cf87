"""The criteria ``l1`` and ``l2``: the norm of all parameters that go with a channel."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from fxprune.criteria.registry import Generator, Scores, register
from fxprune.observe import Statistics
from fxprune.types import ChannelGroup, FloatArray

if TYPE_CHECKING:
    from fxprune.traced import Traced


@dataclass(frozen=True)
class MagnitudeCriterion:
    """(sum |w|^p)^(1/p) over every parameter position of the channel, in all members of its group.

    A position that two members share (row and column of one weight) counts twice. Buffers such as
    running statistics do not count.
    """

    p: float
    needs_data: bool = False

    def __call__(
        self, traced: Traced, statistics: Statistics | None, generator: Generator
    ) -> Scores:
        weights = dict(traced.graph_module.named_parameters(remove_duplicate=False))
        return {g.name: self._norms(g, weights) for g in traced.groups if g.locked is None}

    def _norms(self, group: ChannelGroup, weights: dict[str, torch.nn.Parameter]) -> FloatArray:
        powers = np.zeros(group.n)
        for member in group.members:
            if member.param not in weights:
                continue
            w = weights[member.param].detach()
            rest = [d for d in range(w.ndim) if d != member.dim % w.ndim]
            w = w.abs() if self.p == 1 else w.double().abs().pow(self.p)
            each = (w.sum(rest, dtype=torch.float64) if rest else w.double()).cpu().numpy()
            powers += each[member.index].sum(1)
        norms: FloatArray = powers ** (1.0 / self.p)
        return norms


register("l1")(functools.partial(MagnitudeCriterion, 1.0))
register("l2")(functools.partial(MagnitudeCriterion, 2.0))
