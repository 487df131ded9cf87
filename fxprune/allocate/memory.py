"""Evaluated states: none is evaluated twice, and every evaluation is on record.

Legend for shapes: F free groups.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor
from typing import Any

from fxprune.allocate.journal import Journal
from fxprune.allocate.problem import AllocationProblem
from fxprune.allocate.space import Space
from fxprune.progress import bar
from fxprune.types import IntArray, PrunePlan

EVALUATING = 0.75  # of the time, where the best states are compared in what is left


class Memory:
    """Evaluates states through the problem's fitness and executor; a context manager.

    limit      evaluations allowed
    trace      one record for each evaluation: its number, stage, fitness (None where it was not
               finite) and whether the search moved there
    """

    def __init__(self, space: Space, problem: AllocationProblem, name: str) -> None:
        if problem.fitness is None:
            raise ValueError("a memory of evaluations needs a fitness")
        self.space = space
        self.limit = problem.max_evaluations
        self.trace: list[dict[str, Any]] = []
        self._fitness, self._executor = problem.fitness, problem.executor
        dearer = {"semifinal": problem.semifinals, "final": problem.finals}
        self._dearer = {name: f for name, f in dearer.items() if f is not None}
        self._max_seconds = problem.max_seconds
        self._known: dict[tuple[int, ...], float] = {}
        self._number: dict[tuple[int, ...], int] = {}
        self._journal = (
            Journal(problem.journal, _header(space, problem, name)) if problem.journal else None
        )
        self._begin = time.monotonic() - (self._journal.seconds if self._journal else 0.0)
        self._expired = False
        self._best = math.inf
        self._bar = bar(problem.progress)
        self._task = self._bar.add_task(
            f"{name} search ({_budget(space)})", total=self.limit, note="no fitness yet"
        )

    def __enter__(self) -> Memory:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()
        if self._journal is not None:
            self._journal.__exit__(*error)

    @property
    def seconds(self) -> float:
        """Since the search began, the runs before it was killed included."""
        return time.monotonic() - self._begin

    @property
    def left(self) -> int:
        """Evaluations that may still be made."""
        return 0 if self._expired else self.limit - len(self.trace)

    def __contains__(self, state: IntArray) -> bool:
        return key(state) in self._known

    def __iter__(self) -> Iterator[tuple[tuple[int, ...], float]]:
        """All evaluated states with their fitness, in the order of their evaluation."""
        return iter(self._known.items())

    def stage(self, state: IntArray) -> str:
        """The stage in which an evaluated state was met."""
        return str(self.trace[self._number[key(state)]]["stage"])

    def evaluate(self, states: Sequence[IntArray], stage: str) -> list[tuple[IntArray, float]]:
        """Fitness of the states [F], as far as evaluations and time last; known ones cost nothing.

        A fitness that is NaN counts as infinitely bad.
        """
        new = {key(s): s for s in states if s not in self}
        new = dict(list(new.items())[: self.left])
        for state, value in self._values(new, "evaluated", self._fitness, stage):
            self._record(state, value, stage)
        return [(s, self._known[key(s)]) for s in states if s in self]

    @property
    def rounds(self) -> list[str]:
        """The comparisons that end the search, the cheaper one first."""
        return list(self._dearer)

    def compare(self, name: str, states: Sequence[IntArray]) -> list[float]:
        """The dearer fitness of a few states, by the round's name; inf where time did not last."""
        new = {key(s): s for s in states}
        task = self._bar.add_task(f"{name}ists", total=len(new), note="repair of the best states")
        values: dict[tuple[int, ...], float] = {}
        for state, value in self._values(new, name, self._dearer[name], ""):
            values[state] = value
            self._bar.update(task, advance=1, note=f"fitness {value:.4g}")
        return [values.get(key(s), math.inf) for s in states]

    def _values(
        self,
        states: dict[tuple[int, ...], IntArray],
        event: str,
        fitness: Callable[[PrunePlan], float],
        stage: str,
    ) -> Iterator[tuple[tuple[int, ...], float]]:
        """Values of states from the journal, else measured and written there, in order."""
        counts = {k: tuple(self._counts(s)) for k, s in states.items()}
        fresh = [k for k in states if not self._journal or self._old(event, counts[k]) is None]
        measured = self._measured(fitness, [self.space.plan(states[k]) for k in fresh])
        for k in states:
            old = self._old(event, counts[k])
            if old is None or k in fresh:
                if self._over(event):
                    return
                old = float(next(measured))
                old = math.inf if math.isnan(old) else old
                if self._journal is not None:
                    self._journal.add(event, counts[k], old, self.seconds, stage)
            yield k, old

    def _over(self, event: str) -> bool:
        """Whether the time is spent; at least one state is evaluated in any case.

        Where states are compared at the end, a part of the time is left for that.
        """
        if self._max_seconds is None:
            return False
        if event != "evaluated":
            return self.seconds >= self._max_seconds
        share = EVALUATING if self._dearer else 1.0
        late = self.seconds >= share * self._max_seconds
        self._expired = self._expired or (late and bool(self.trace))
        return self._expired

    def _measured(
        self, fitness: Callable[[PrunePlan], float], plans: list[PrunePlan]
    ) -> Iterator[float]:
        """Values in the order of the plans; lazily where there is no executor."""
        done = 0
        if self._executor is not None and plans and fitness is self._fitness:
            try:
                for value in self._executor.map(fitness, plans):
                    done += 1
                    yield value
            except BrokenExecutor as e:
                self._executor = None
                warnings.warn(
                    f"the workers are gone ({e}); the search goes on in this process", stacklevel=2
                )
        yield from map(fitness, plans[done:])

    def _counts(self, state: IntArray) -> Iterable[int]:
        return (int(self.space.table[f, s]) for f, s in enumerate(state))

    def _old(self, event: str, counts: tuple[int, ...]) -> float | None:
        return None if self._journal is None else self._journal.known(event, counts)

    def _record(self, state: tuple[int, ...], value: float, stage: str) -> None:
        self._known[state] = value
        self._number[state] = len(self.trace)
        self.trace.append(
            {
                "evaluation": len(self.trace) + 1,
                "stage": stage,
                "fitness": value if math.isfinite(value) else None,
                "accepted": False,
            }
        )
        self._bar.update(self._task, advance=1, note=f"{value:.3g}, best {self._best:.3g}")

    def accept(self, state: IntArray) -> None:
        """The search moved to this state, which has been evaluated."""
        self.trace[self._number[key(state)]]["accepted"] = True
        if self._journal is not None:
            self._journal.add("accepted", tuple(self._counts(state)))
        self._best = self._known[key(state)]
        self._bar.update(self._task, note=f"{self._best:.3g}, best {self._best:.3g}")


def key(state: IntArray) -> tuple[int, ...]:
    """A state as a dictionary key."""
    return tuple(state.tolist())


def _budget(space: Space) -> str:
    """The first bound; the line has 80 columns."""
    more = f", +{len(space.measures) - 1}" if len(space.measures) > 1 else ""
    return f"{space.measures[0]} {space.share[0]:.0%}{more}"


def _header(space: Space, problem: AllocationProblem, name: str) -> dict[str, Any]:
    """``subject`` is a hash of what the fitness of a kept count depends on.

    Budget, seed and limits are not part of it: what is known of a state holds for any search.
    """
    names = [space.groups[i].name for i in space.free]
    orders = [hashlib.sha256(o.tobytes()).hexdigest() for o in space.order]
    text = json.dumps([problem.identity, names, orders])
    return {
        "subject": hashlib.sha256(text.encode()).hexdigest(),
        "allocation": name,
        "budget": _budget(space),
        "seed": problem.seed,
        "groups": names,
    }
