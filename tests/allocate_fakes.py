"""A small stand-in for a traced model, whose costs are products of widths."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from fxprune import allocate
from fxprune.types import Budget, ChannelGroup, FloatArray, IntArray, Member, PrunePlan


def group(
    name: str, n: int, rows: int = 1, locked: str | None = None, overlaps: tuple[str, ...] = ()
) -> ChannelGroup:
    index = np.arange(n, dtype=np.int64)[:, None]
    members = (Member(f"{name}_weight", 0, index),)
    return ChannelGroup(name, n, rows, members, (), (), (), locked, overlaps=overlaps)


@dataclass
class Fake:
    """A chain of layers: layer l costs area[l] * width[l] * width[l + 1], widths from groups.

    ``layers``: for each width the groups whose kept counts are multiplied, () for a constant of 3.
    """

    groups: tuple[ChannelGroup, ...]
    layers: list[tuple[int, ...]]
    area: list[int]
    graph_module: nn.Module = field(default_factory=nn.Module)
    evaluated: int = 0

    def __post_init__(self) -> None:
        for g in self.groups:
            weight = nn.Parameter(torch.zeros(g.n, 2, 3, 3))
            self.graph_module.register_parameter(f"{g.name}_weight", weight)

    @property
    def costs(self) -> Fake:
        return self

    def evaluate(self, counts: IntArray) -> Any:
        assert counts.ndim == 2 and counts.shape[1] == len(self.groups)
        self.evaluated += len(counts)
        rows = np.array([1 if g.name.endswith("dims") else g.rows for g in self.groups])
        kept = counts * rows
        ones = np.full(len(counts), 3, dtype=np.int64)
        widths = [kept[:, list(w)].prod(axis=1) if w else ones for w in self.layers]
        pairs = list(itertools.pairwise(widths))
        macs = sum(a * u * v for a, (u, v) in zip(self.area, pairs, strict=True))
        params = sum(u * v for u, v in pairs)
        return SimpleNamespace(macs=macs, params=params, bytes=4 * params)

    def measure(self, counts: IntArray, measures: Sequence[str]) -> FloatArray:
        found = self.evaluate(counts)
        return np.stack([getattr(found, m) for m in measures], axis=1).astype(np.float64)

    def cost(self, plan: PrunePlan) -> Any:
        counts = [len(plan.kept.get(g.name, range(g.n))) // g.rows for g in self.groups]
        one = self.evaluate(np.array([counts], dtype=np.int64))
        return SimpleNamespace(macs=int(one.macs[0]), params=int(one.params[0]))


def chain(rng: np.random.Generator, sizes: list[int], rows: int = 1) -> Fake:
    groups = [group(f"g{i}", n) for i, n in enumerate(sizes)]
    if rows > 1:
        groups[-1] = group(groups[-1].name, sizes[-1] * rows, rows)
    groups.append(group("out", 10, locked="model output"))
    layers: list[tuple[int, ...]] = [(), *[(i,) for i in range(len(groups))]]
    return Fake(tuple(groups), layers, rng.integers(1, 500, len(groups)).tolist())


def scores_of(fake: Fake, rng: np.random.Generator) -> dict[str, Any]:
    return {g.name: rng.gamma(1.0, 1.0, g.n) * rng.uniform(0.1, 10) for g in fake.groups}


def problem(fake: Fake, share: float, seed: int = 0, **options: Any) -> allocate.AllocationProblem:
    scores = scores_of(fake, np.random.default_rng(seed))
    options = {"round_to": 8, "seed": seed, "budget": Budget(macs=share)} | options
    return allocate.AllocationProblem(fake, scores, **options)


def share_of(fake: Fake, plan: PrunePlan) -> float:
    return float(fake.cost(plan).macs / fake.cost(PrunePlan({})).macs)


def attention() -> Fake:
    """Heads and head dims over the same projections: their width is heads * dims."""
    groups = (
        group("heads", 12, overlaps=("dims",)),
        group("dims", 12 * 64, 12, overlaps=("heads",)),
        group("mlp", 512),
    )
    return Fake(groups, [(), (0, 1), (2,), ()], [10, 10, 10])
