"""What one pruning asks of latency: a model of it, fast widths, and the measured result."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fxprune.allocate import AllocationProblem, bounds, uniform
from fxprune.cut import cut
from fxprune.latency.model import LatencyModel, latency_model
from fxprune.latency.rounding import fast_counts
from fxprune.latency.runtimes import Bench
from fxprune.latency.target import Target
from fxprune.traced import Traced
from fxprune.types import PrunePlan, Rounding


class Keeper:
    """Measures the original and its products at once; a context manager.

    Raises ExportError where the target needs an ONNX file and none can be made.
    """

    def __init__(self, traced: Traced, target: Target, *, progress: bool = False) -> None:
        self.traced, self.target = traced, target
        self.bench = Bench(target, traced.example_inputs, progress=progress)
        try:
            (original,) = self.bench.measure([traced.graph_module])
            self.model: LatencyModel = latency_model(
                traced, target, progress=progress, original=original
            )
        except BaseException:
            self.bench.__exit__(None, None, None)
            raise

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, *error: object) -> None:
        self.bench.__exit__(*error)

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
        whole, small = self.bench.measure([self.traced.graph_module, cut(self.traced, plan)])
        self.model = self.model.measured(whole)
        self.model = self.model.bent(self.traced.counts(plan), small.ms)
        return replace(problem, latency=self.model)

    def report(
        self, small: nn.Module, plan: PrunePlan, problem: AllocationProblem
    ) -> dict[str, Any]:
        """Measured before and after, side by side; the prediction; and the limit, if any."""
        before, after = self.bench.measure([self.traced.graph_module, small])
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
            found |= {"limit_ms": limit, "holds": bool(after.ms <= limit)}
        return found


def _batch(inputs: tuple[Any, ...]) -> int:
    return next(
        (int(t.shape[0]) for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.dim()), 1
    )
