"""The criteria ``taylor`` and ``hessian``: what a loss says when a channel's gate closes.

taylor   the mean squared slope along the gate, E[t_c^2] (Molchanov et al., 2019)
hessian  half the diagonal of the curvature, sum of w^2 E[(dL/dw)^2] / 2 (optimal brain damage)

By name both are label-free: the loss is the divergence from the original's own outputs. With
labels, give ``TaylorCriterion(Labelled(batches))``. See :mod:`fxprune.gradients`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fxprune.criteria.registry import Generator, Scores, register
from fxprune.errors import DataError
from fxprune.gradients import ChannelGradients, Labelled
from fxprune.observe import Statistics
from fxprune.types import FloatArray

if TYPE_CHECKING:
    from fxprune.traced import Traced


@dataclass(frozen=True)
class GradientCriterion(ABC):
    """``labelled``: batches with targets and their loss; None: the original's own outputs.

    Raises DataError without statistics that hold gradients (``observe(gradients=True)``).
    """

    labelled: Labelled | None = None
    needs_data: bool = True

    @property
    def observe(self) -> Mapping[str, Any]:
        """Options for :func:`fxprune.observe.observe`."""
        wanted = True if self.labelled is None else self.labelled
        return {"gamma": 0.0, "displacement": False, "gradients": wanted}

    def __call__(
        self, traced: Traced, statistics: Statistics | None, generator: Generator
    ) -> Scores:
        if statistics is None or statistics.gradients is None:
            raise DataError("this criterion needs gradients: observe with gradients=True")
        return {name: self.score(g) for name, g in statistics.gradients.items()}

    @abstractmethod
    def score(self, gradients: ChannelGradients) -> FloatArray:
        """[n] scores of a group from its gradients; higher = keep."""


class TaylorCriterion(GradientCriterion):
    """Mean squared slope along each channel's gate."""

    def score(self, gradients: ChannelGradients) -> FloatArray:
        return gradients.squared


class HessianCriterion(GradientCriterion):
    """Half the summed diagonal curvature of each channel's parameters."""

    def score(self, gradients: ChannelGradients) -> FloatArray:
        return gradients.curvature / 2


register("taylor")(TaylorCriterion)
register("hessian")(HessianCriterion)
