"""The repair stage as ``prune(repair=...)`` runs it: which parts, in which order, what is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import fx

from fxprune.cut import cut
from fxprune.distill import Distillation, distill
from fxprune.errors import unknown
from fxprune.fitness import Repair
from fxprune.observe import Statistics
from fxprune.progress import Clock, working
from fxprune.repair import LeastSquares, RepairReport, repair_bn
from fxprune.sequential import best_form
from fxprune.traced import Traced
from fxprune.types import PrunePlan

REPAIRS = ("lstsq", "distill", "bn")
Measure = Callable[[fx.GraphModule], float]


class Batches(NamedTuple):
    """Those for the repair, those that are held out, and more for the distillation alone."""

    seen: list[Any]
    held_out: list[Any]
    more: Sequence[Any] = ()


@dataclass(frozen=True)
class Mending:
    """``kind``: one of REPAIRS, or None for a cut alone."""

    kind: str | None
    distillation: Distillation
    seed: int
    progress: bool

    @classmethod
    def of(cls, repair: str | Distillation | None, seed: int, progress: bool) -> Mending:
        """Raises SpecError for a name that is not known."""
        if isinstance(repair, Distillation):
            return cls("distill", repair, seed, progress)
        if repair is not None and repair not in REPAIRS:
            raise unknown("repair", str(repair), REPAIRS)
        return cls(repair, Distillation(), seed, progress)

    @property
    def samples(self) -> int:
        """How many the distillation asks for; 0: those of the repair."""
        return self.distillation.samples if self.kind == "distill" else 0

    @property
    def linear(self) -> bool:
        """Whether least squares are a part of it."""
        return self.kind in ("lstsq", "distill")

    def repairer(
        self, traced: Traced, statistics: Statistics | None, seen: Sequence[Any]
    ) -> Repair | None:
        """The fast form, for every candidate of a search."""
        if self.linear and statistics is not None:
            return LeastSquares(traced, statistics)
        if self.kind == "bn":
            return lambda plan, module: repair_bn(traced, plan, module, seen)
        return None

    def run(
        self,
        traced: Traced,
        plan: PrunePlan,
        gm: fx.GraphModule,
        mend: Repair | None,
        batches: Batches,
        measure: Measure,
        clock: Clock,
    ) -> dict[str, Any]:
        """Repair ``gm``, the cut of ``plan``, in place; what the report says about it."""
        told = self._repair(traced, plan, gm, mend, batches, measure)
        clock.lap("repair")
        return told | self._distill(traced, plan, gm, batches, measure, clock)

    def again(
        self,
        traced: Traced,
        plan: PrunePlan,
        gm: fx.GraphModule,
        statistics: Statistics | None,
        batches: Batches,
        measure: Measure,
        clock: Clock,
    ) -> dict[str, Any]:
        """After rounds: ``gm`` or, if that is better, the cut repaired from the original's weights.

        statistics: of the original; None: ``gm`` stays.
        """
        told: dict[str, Any] = {"kind": self.kind}
        if self.linear and statistics is not None:
            other = cut(traced, plan)
            mend = LeastSquares(traced, statistics)
            straight = self._repair(traced, plan, other, mend, batches, measure)
            fitness = {"rounds": measure(gm), "direct": measure(other)}
            best = "direct" if fitness["direct"] <= fitness["rounds"] else "rounds"
            if best == "direct":
                told = straight
                gm.load_state_dict(other.state_dict())
            told |= {"kept": best, "rounds fitness": fitness}
        clock.lap("repair")
        return told | self._distill(traced, plan, gm, batches, measure, clock)

    def _repair(
        self,
        traced: Traced,
        plan: PrunePlan,
        gm: fx.GraphModule,
        mend: Repair | None,
        batches: Batches,
        measure: Measure,
    ) -> dict[str, Any]:
        """All but the distillation."""
        seen, held_out, _ = batches
        outcome = None
        with working("repair", self.progress):
            if isinstance(mend, LeastSquares):
                outcome = best_form(traced, plan, gm, mend, seen, measure, held_out)
            repaired = outcome.report if outcome else mend(plan, gm) if mend else None
        if not isinstance(repaired, RepairReport):
            return {}
        return {
            "kind": self.kind,
            "repaired": len(repaired.repaired),
            "skipped": dict(repaired.skipped),
            # the form whose fitness on held-out samples is better stays
            **({"form": outcome.form, "fitness": dict(outcome.fitness)} if outcome else {}),
        }

    def _distill(
        self,
        traced: Traced,
        plan: PrunePlan,
        gm: fx.GraphModule,
        batches: Batches,
        measure: Measure,
        clock: Clock,
    ) -> dict[str, Any]:
        if self.kind != "distill":
            return {}
        found = distill(
            traced, plan, gm, [*batches.seen, *batches.more], measure, self.distillation,
            seed=self.seed, progress=self.progress,
        )  # fmt: skip
        clock.lap("distill")
        return {"distill": found.to_dict()}
