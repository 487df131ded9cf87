"""What one pruning asks of latency: a model of it, fast widths, and the measured result."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fxprune.allocate import AllocationProblem, bounds, uniform
from fxprune.cut import cut
from fxprune.errors import BudgetError
from fxprune.latency.model import LatencyModel, latency_model
from fxprune.latency.rounding import fast_counts
from fxprune.latency.runtimes import Bench
from fxprune.latency.target import Sample, Target
from fxprune.traced import Traced
from fxprune.types import PrunePlan, Rounding

AGAIN = 3  # times that a plan which turns out too slow is replaced by a smaller one
SECONDS = 1.0  # of repeated runs of each model
MARGIN = 0.01  # below a limit that was missed, for what two measurements differ


class Keeper:
    """Measures the original and its products at once; a context manager.

    tried  milliseconds of the plans that were measured against the budget, in their order
    Raises ExportError where the target needs an ONNX file and none can be made.
    """

    def __init__(self, traced: Traced, target: Target, *, progress: bool = False) -> None:
        self.traced, self.target = traced, target
        self.tried: list[float] = []
        self._folder = tempfile.TemporaryDirectory(prefix="fxprune-")
        self.folder = Path(self._folder.name)
        self.bench = Bench(target, traced.example_inputs, progress=progress)
        try:
            (original,) = self.bench.measure([traced.graph_module])
            self.model: LatencyModel = latency_model(
                traced, target, progress=progress, original=original
            )
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, *error: object) -> None:
        self.bench.__exit__(*error)
        self._folder.cleanup()

    def rounding(self) -> Rounding:
        """The kept counts that are fast on the target (``round_to="auto"``)."""
        return fast_counts(self.model, self.traced.groups)

    def tuned(self, problem: AllocationProblem) -> AllocationProblem:
        """The problem with a latency model that is also right where the budget leads.

        The uniform allocation within the budget is cut and measured beside the original.
        """
        problem = replace(problem, latency=self.model)
        if "latency" not in bounds(problem.budget):
            return problem
        plan = uniform(problem)
        if not plan.kept:
            return problem
        whole, small = self._compared(plan)
        self.model = self.model.measured(whole)
        self.model = self.model.bent(self.traced.counts(plan), small.ms)
        return replace(problem, latency=self.model)

    def within(
        self, problem: AllocationProblem, allocate: Callable[[AllocationProblem], PrunePlan]
    ) -> PrunePlan:
        """The plan of ``allocate`` whose measured time is within the budget's latency, if any is.

        A prediction may be some percent off. Where the cut model takes longer than the budget says,
        the limit of the prediction is tightened by as much, and ``allocate`` is asked again, at
        most ``AGAIN`` times. What a search knows of a state it does not evaluate again.
        """
        bound = bounds(problem.budget).get("latency")
        if bound is None:
            return allocate(problem)
        journal = problem.journal or self.folder / "search.jsonl"
        plan = allocate(replace(problem, journal=journal))
        share = 1.0
        for search in range(2, 2 + AGAIN):
            before, after = self._compared(plan)
            limit = bound.limit(before.ms)
            self.tried.append(after.ms)
            if after.ms <= limit:
                break
            share *= (1 - MARGIN) * limit / after.ms
            tighter = bound.value * share
            shown = f"{tighter!r} ms" if bound.absolute else tighter
            seconds = None if problem.max_seconds is None else search * problem.max_seconds
            budget = replace(problem.budget, latency=shown)
            try:
                plan = allocate(
                    replace(problem, budget=budget, journal=journal, max_seconds=seconds)
                )
            except BudgetError:
                break  # nothing is smaller; the report says that the limit does not hold
        return plan

    def _compared(self, plan: PrunePlan) -> list[Sample]:
        """The original and the plan's cut, side by side."""
        models = [self.traced.graph_module, cut(self.traced, plan)]
        return self.bench.measure(models, seconds=SECONDS)

    def report(
        self, small: nn.Module, plan: PrunePlan, problem: AllocationProblem
    ) -> dict[str, Any]:
        """Measured before and after, side by side; the prediction; and the limit, if any."""
        before, after = self.bench.measure([self.traced.graph_module, small], seconds=SECONDS)
        predicted = float(self.model.predict(self.traced.counts(plan)[None])[0])
        bound = bounds(problem.budget).get("latency")
        found: dict[str, Any] = {
            "target": self.target.name,
            "threads": self.target.threads,
            "device": self.target.device,
            "batch": _batch(self.traced.example_inputs),
            "before_ms": before.ms,
            "after_ms": after.ms,
            "predicted_ms": predicted,
            "runs": after.runs,
            "spread": max(before.spread, after.spread),
        }
        if bound is not None:
            limit = bound.limit(before.ms)
            found |= {"limit_ms": limit, "holds": bool(after.ms <= limit), "tried_ms": self.tried}
        return found


def _batch(inputs: tuple[Any, ...]) -> int:
    return next(
        (int(t.shape[0]) for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.dim()), 1
    )
