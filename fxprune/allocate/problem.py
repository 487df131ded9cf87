"""What an allocator is given: scores, exact costs and a budget.

Legend for shapes: G groups, P plans, n channels of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import nn

from fxprune.allocate.budget import bounds
from fxprune.errors import BudgetError, InputError
from fxprune.types import Budget, ChannelGroup, FloatArray, IntArray, PrunePlan, Rounding


class CostModel(Protocol):
    """Exact cost of kept counts; never decreases when a count grows."""

    def measure(self, counts: IntArray, measures: Sequence[str], /) -> FloatArray:
        """``counts`` [P, G], kept channels of each row of each group -> [P, D] costs.

        measures: D of "macs", "params", "bytes", "memory" (bytes); no other is computed.
        """
        ...


class LatencyModel(Protocol):
    """Predicted latency of kept counts on one target."""

    def predict(self, counts: IntArray, /) -> FloatArray:
        """``counts`` [P, G], kept channels of each row of each group -> [P] milliseconds."""
        ...


class Prunable(Protocol):
    """The part of a traced model that allocation needs."""

    @property
    def groups(self) -> tuple[ChannelGroup, ...]: ...
    @property
    def costs(self) -> CostModel: ...
    @property
    def graph_module(self) -> nn.Module: ...


@dataclass(frozen=True)
class AllocationProblem:
    """How many channels may each group keep, and which?

    traced            groups and exact costs
    scores            [n] for each group that is not locked; higher = keep
    budget            upper bounds: shares of the original, or absolute values with their units
    round_to          granularity of kept counts, or the allowed counts of each group by its name
                      (``ChannelGroup.choices``)
    fitness           of a plan, lower is better; None where only scores can guide the choice.
                      A pure function; it is called from the executor's workers
    progress          show a bar on stderr
    max_evaluations   how often ``fitness`` may be called
    executor          evaluates several plans at once; the result does not depend on it
    finals            a dearer and truer fitness, by which the best few states are compared last
    max_seconds       of the search; then the best so far is the result
    journal           file to which every evaluation is appended; where it exists the search goes on
                      from it
    identity          content hash of what ``fitness`` depends on; a journal belongs to one
    latency           predicts milliseconds; a budget that bounds the latency needs it
    semifinals        between ``fitness`` and ``finals``: of more states it names those that
                      ``finals`` compares
    """

    traced: Prunable
    scores: Mapping[str, FloatArray]
    budget: Budget
    round_to: int | Rounding = 8
    seed: int = 0
    fitness: Callable[[PrunePlan], float] | None = None
    progress: bool = False
    max_evaluations: int = 60
    executor: Executor | None = None
    finals: Callable[[PrunePlan], float] | None = None
    max_seconds: float | None = None
    journal: Path | None = None
    identity: str = ""
    latency: LatencyModel | None = None
    semifinals: Callable[[PrunePlan], float] | None = None

    def __post_init__(self) -> None:
        if "latency" in bounds(self.budget) and self.latency is None:
            raise BudgetError("a budget for the latency needs a latency model of its target")
        if isinstance(self.round_to, int) and self.round_to < 1:
            raise InputError(f"round_to must be at least 1, got {self.round_to}")
        if self.max_evaluations < 1:
            raise InputError(f"max_evaluations must be at least 1, got {self.max_evaluations}")
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise InputError(f"max_seconds must be more than 0, got {self.max_seconds}")


class Allocator(Protocol):
    """Turns a problem into a plan whose cost is never above the budget."""

    def __call__(self, problem: AllocationProblem, /) -> PrunePlan: ...
