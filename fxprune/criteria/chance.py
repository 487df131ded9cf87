"""The criterion ``random``: the baseline that every other one has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from fxprune.criteria.registry import Generator, Scores, register
from fxprune.observe import Statistics

if TYPE_CHECKING:
    from fxprune.traced import Traced


@register("random")
@dataclass(frozen=True)
class RandomCriterion:
    """Uniform in [0, 1), from the generator given; groups in order."""

    needs_data: bool = False

    def __call__(
        self, traced: Traced, statistics: Statistics | None, generator: Generator
    ) -> Scores:
        return {g.name: _uniform(g.n, generator) for g in traced.groups if g.locked is None}


def _uniform(n: int, generator: Generator) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    if isinstance(generator, torch.Generator):
        drawn = torch.rand(n, generator=generator, dtype=torch.float64, device=generator.device)
        return np.asarray(drawn.cpu().numpy(), dtype=np.float64)
    return generator.random(n)
