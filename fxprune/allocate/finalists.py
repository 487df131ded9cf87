"""The end of a search: its best few states, compared by what the final repair makes of them.

The fitness inside a search is cheap and orders states that are nearly equal badly (measured on
twenty states of a VGG: rank correlation 0.7 with the final divergence; the final repair on 64
samples: 0.9). So many states take part in a first comparison on few samples, and the best of it in
one on all. Where a first comparison repeats what the search has found of its first states (few
samples add nothing to the repair that the search used), the others are not compared.

Legend for shapes: F free groups.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from fxprune.allocate.memory import Memory, key
from fxprune.allocate.space import Space
from fxprune.allocate.thrift import thrifty
from fxprune.types import FloatArray, IntArray

SEMIFINALISTS = 8  # states in the first comparison, besides the best start
FINALISTS = 3  # states in the last one; where it is the only one the best start comes with them
PROBED = 2  # states of a first comparison after which it may end
SAME = 1e-6  # relative difference of fitness that is rounding
FAR = 1.5  # times the best fitness: what is worse does not take part
NEARLY = 0.02  # relative to the best final fitness: what a faster state may be behind


@dataclass(frozen=True)
class Candidate:
    """A state [F], the stage in which it was met, its fitness in the search and those after it."""

    state: IntArray
    stage: str
    fitness: float | None
    values: tuple[float, ...] = ()

    def told(self) -> dict[str, Any]:
        """For ``plan.meta``."""
        rough = {"semifinal": self.values[0]} if len(self.values) > 1 else {}
        told = {"stage": self.stage, "fitness": self.fitness}
        return {**told, **rough, "final": self.values[-1]}


def chosen(
    space: Space,
    memory: Memory,
    known: list[tuple[IntArray, float]],
    starts: Collection[tuple[int, ...]],
    hurry: bool,
) -> tuple[IntArray | None, list[dict[str, Any]]]:
    """(the best of the finalists, how they compare); None where nothing was compared.

    known   states within the budget with their fitness, best first
    starts  keys of the cheap allocations: the best of them is what a search has to beat
    hurry   where counts are those that are fast on a target: what is faster than the best at as
            much of the budget takes part, and of nearly equal ones the fastest is taken
    """
    rounds = memory.rounds
    found = _first(space, memory, known, starts, SEMIFINALISTS if len(rounds) > 1 else FINALISTS)
    if hurry and found:
        faster = thrifty(space, found[0].state, gain=0.0)  # its fitness is measured
        if key(faster) not in {key(c.state) for c in found}:
            fitness = next((v for s, v in known if key(s) == key(faster)), None)
            found.append(Candidate(faster, "faster", fitness))
    compared: list[Candidate] = []
    for name in rounds:
        last = name == rounds[-1]
        after = _compared(memory, name, compared[:FINALISTS] or found, last)
        if after is None:
            found = [c for i, c in enumerate(found) if i < FINALISTS or c.stage == "faster"]
            continue
        if not after:
            break
        compared = after if last else sorted(after, key=lambda c: c.values[-1])
    if not compared:
        return None, []
    found = compared
    values = np.array([c.values[-1] for c in found])
    winner = found[_winner(space, hurry, [c.state for c in found], values)]
    return winner.state, [c.told() for c in found]


def _first(
    space: Space,
    memory: Memory,
    known: list[tuple[IntArray, float]],
    starts: Collection[tuple[int, ...]],
    most: int,
) -> list[Candidate]:
    """The best of what was evaluated, and the best start, unless they are far behind."""
    picked = known[:most]
    first = next(((s, v) for s, v in known if key(s) in starts), None)
    if first is not None and key(first[0]) not in {key(s) for s, _ in picked}:
        picked.append(first)
    best = picked[0][1] if picked else 0.0
    near = [(s, v) for s, v in picked if best <= 0 or v <= FAR * best]
    return [Candidate(s, memory.stage(s), v) for s, v in near]


def _compared(
    memory: Memory, name: str, found: list[Candidate], last: bool
) -> list[Candidate] | None:
    """Those of which the comparison gave something finite, with it.

    None where it is not the last one and gives no more than the search knows.
    """
    states = [c.state for c in found]
    values = memory.compare(name, states[: len(states) if last else PROBED])
    if not last and all(map(_repeats, found, values)):
        return None
    if len(values) < len(states):
        values += memory.compare(name, states[len(values) :])
    return [
        Candidate(c.state, c.stage, c.fitness, (*c.values, v))
        for c, v in zip(found, values, strict=True)
        if np.isfinite(v)
    ]


def _repeats(candidate: Candidate, value: float) -> bool:
    fitness = candidate.fitness
    return fitness is not None and math.isclose(fitness, value, rel_tol=SAME)


def _winner(space: Space, hurry: bool, states: list[IntArray], values: FloatArray) -> int:
    best = int(np.argmin(values))
    if not hurry or space.latency is None or "latency" in space.measures:
        return best
    ms = space.latency.predict(space.counts(np.stack(states)))
    near = values <= values[best] + NEARLY * abs(values[best])
    return int(np.argmin(np.where(near, ms, np.inf)))
