"""Evaluated states: none is evaluated twice, and every evaluation is on record.

Legend for shapes: F free groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fxprune.allocate.problem import AllocationProblem
from fxprune.allocate.space import Space
from fxprune.types import IntArray


class Memory:
    """Evaluates states through the problem's fitness and executor; a context manager.

    limit      evaluations allowed
    trace      one record for each evaluation: its number, stage, fitness (None where it was not
               finite) and whether the search moved there
    """

    def __init__(self, space: Space, problem: AllocationProblem) -> None:
        if problem.fitness is None:
            raise ValueError("a memory of evaluations needs a fitness")
        self.space = space
        self.limit = problem.max_evaluations
        self.trace: list[dict[str, Any]] = []
        self._fitness, self._executor = problem.fitness, problem.executor
        self._known: dict[tuple[int, ...], float] = {}
        self._number: dict[tuple[int, ...], int] = {}
        self._bar = _bar(problem.progress)
        budget = ", ".join(f"{m} {s:.0%}" for m, s in zip(space.measures, space.share, strict=True))
        self._task = self._bar.add_task(
            f"local search ({budget})", total=self.limit, fitness="-", best="-"
        )

    def __enter__(self) -> Memory:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self._bar.stop()

    @property
    def left(self) -> int:
        """Evaluations that may still be made."""
        return self.limit - len(self.trace)

    def __contains__(self, state: IntArray) -> bool:
        return key(state) in self._known

    def evaluate(self, states: Sequence[IntArray], stage: str) -> list[tuple[IntArray, float]]:
        """Fitness of the states [F], as far as the evaluations last; known ones cost nothing.

        A fitness that is NaN counts as infinitely bad.
        """
        new = {key(s): s for s in states if s not in self}
        new = dict(list(new.items())[: self.left])
        plans = [self.space.plan(s) for s in new.values()]
        values = map if self._executor is None else self._executor.map
        for state, value in zip(new, values(self._fitness, plans), strict=True):
            self._record(state, float(value), stage)
        return [(s, self._known[key(s)]) for s in states if s in self]

    def _record(self, state: tuple[int, ...], value: float, stage: str) -> None:
        self._known[state] = math.inf if math.isnan(value) else value
        self._number[state] = len(self.trace)
        self.trace.append(
            {
                "evaluation": len(self.trace) + 1,
                "stage": stage,
                "fitness": value if math.isfinite(value) else None,
                "accepted": False,
            }
        )
        self._bar.update(self._task, advance=1, fitness=f"{value:.4g}")

    def accept(self, state: IntArray) -> None:
        """The search moved to this state, which has been evaluated."""
        self.trace[self._number[key(state)]]["accepted"] = True
        self._bar.update(self._task, best=f"{self._known[key(state)]:.4g}")


def key(state: IntArray) -> tuple[int, ...]:
    """A state as a dictionary key."""
    return tuple(state.tolist())


def _bar(shown: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("fitness {task.fields[fitness]}, best {task.fields[best]}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        disable=not shown,
    )
