"""The latency of any plan, from times that were measured op by op on the target itself.

    latency = sum over products of time(widths) + rest

``time`` comes from the measured grid of a product's family (``grid``), and ``rest`` is everything
else (additions, concatenations, pooling, activations that are not fused, what a run costs before
any op): what the measured original takes beyond its products, in proportion to the bytes that those
nodes read and write. So the prediction for the original equals its measured time.

Legend for shapes: P plans, G groups, I products.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fxprune.cost import with_one
from fxprune.latency.grid import Axes, Grids, Point, shared_tops
from fxprune.latency.ops import Family, Parts, parts
from fxprune.latency.runtimes import Bench, fuses, time_product
from fxprune.latency.table import Table
from fxprune.latency.target import Sample, Target
from fxprune.traced import Traced
from fxprune.types import FloatArray, IntArray

LEAST_REST = 0.02  # share of the latency that the rest has at least
BLOCKS = (32, 16, 8, 4)
PROBE = Family("conv", "plain", 1, (14, 14), (3, 3), (1, 1), (1, 1), (1, 1))


@dataclass(frozen=True)
class LatencyModel:
    """Predicts milliseconds of one model on one target.

    original  measured latency of the unpruned model
    block     channels that the target's kernels take at once
    scale     measured / summed time of the original's products, 1 unless they exceed the whole
    rest      milliseconds of the original beside its products; ``bytes`` of it at full widths
    full      [G] the counts of the unpruned model
    bend      relative correction at a plan that takes no time, 0 at the original; see ``bent``
    """

    target: Target
    original: Sample
    block: int
    parts: Parts
    grids: Grids
    scale: float
    rest: float
    bytes: float
    full: IntArray
    bend: float = 0.0

    def predict(self, counts: IntArray) -> FloatArray:
        """counts [P, G], kept per row of each group -> [P] milliseconds."""
        k = with_one(counts)
        own = self.grids.predict(_widths(self.parts, k)).sum(axis=1)
        ms = self.scale * own + self.rest * _bytes(self.parts, k) / self.bytes
        return np.asarray(ms * (1.0 + self.bend * (1.0 - ms / self.original.ms)))

    def products(self, counts: IntArray) -> FloatArray:
        """counts [P, G] -> [P, I] milliseconds of each product."""
        return self.scale * self.grids.predict(_widths(self.parts, with_one(counts)))

    def widths(self, counts: IntArray) -> list[tuple[int, ...]]:
        """counts [G] -> widths of each product along its family's axes."""
        found = np.rint(_widths(self.parts, with_one(counts))[0]).astype(np.int64)
        return [
            tuple(int(v) for v in w[: item.family.axes])
            for item, w in zip(self.parts.items, found, strict=True)
        ]

    def measured(self, original: Sample) -> LatencyModel:
        """The same for another measurement of the original."""
        by = original.ms / self.original.ms
        return replace(self, original=original, scale=self.scale * by, rest=self.rest * by)

    def bent(self, counts: IntArray, ms: float) -> LatencyModel:
        """The same, also right for the plan of ``counts`` [G], which was measured at ``ms``.

        The relative error at that plan is taken off in proportion to how much of the original's
        time a plan saves.
        """
        plain = replace(self, bend=0.0)
        found = float(plain.predict(counts[None])[0])
        saved = 1.0 - found / self.original.ms
        if saved < 0.05:
            return plain
        return replace(plain, bend=float(np.clip(ms / found - 1.0, -0.2, 0.2)) / saved)


def latency_model(
    traced: Traced,
    target: Target,
    *,
    least: IntArray | None = None,
    folder: Path | None = None,
    progress: bool = False,
    original: Sample | None = None,
) -> LatencyModel:
    """Measure what is not known yet of the model's products, and of the model as a whole.

    least     [G] smallest kept count of each row that will be asked for; default: an eighth
    folder    of the measured times; default: the user's cache
    original  latency of the unpruned model where it is known already
    Raises ExportError where the target needs an ONNX file and none can be made.
    """
    full = traced.costs.full_counts()
    free = np.array([g.locked is None for g in traced.groups], dtype=np.bool_)
    least = np.maximum(1, full // 8) if least is None else least
    least = np.where(free, least, full)
    table = Table(target, folder)
    apart = parts(traced, fuses=fuses(target))
    block = find_block(table)
    axes = _axes(apart, full, least)
    odd = [[a.odd(i, block) if a.varies(i) and a.family.form != "grouped" else {}
            for i in range(len(a.full))] for a in axes]  # fmt: skip
    points = [p for a in axes for p in a.grid(block)]
    points += [(a.family, w) for a, o in zip(axes, odd, strict=True) for d in o for w in d.values()]
    fill(table, points, progress)
    if original is None:
        with Bench(target, traced.example_inputs, progress=progress) as bench:
            (original,) = bench.measure([traced.graph_module])
    grids = _grids(table, axes, odd, block)
    k = with_one(full)
    if not _bytes(apart, k)[0]:
        apart = replace(apart, fixed=1.0)  # nothing but products: what is left is constant
    own = float(grids.predict(_widths(apart, k)).sum())
    rest = max(original.ms - own, LEAST_REST * original.ms)
    return LatencyModel(
        target, original, block, apart, grids, (original.ms - rest) / own if own else 1.0, rest,
        float(_bytes(apart, k)[0]), full,
    )  # fmt: skip


def find_block(table: Table) -> int:
    """The largest block of channels within which a convolution's time does not change."""

    def ms(width: int) -> float:
        return fill(table, [(PROBE, (64, width))], False)[0].ms

    whole = ms(128)
    for block in BLOCKS:
        if ms(128 - block + 4) > 0.94 * whole and ms(128 - block) < 0.985 * whole:
            return block
    return 1


def fill(table: Table, points: Iterable[Point], progress: bool) -> list[Sample]:
    """Samples of the points; those that the table lacks are measured and kept."""
    wanted = {family.key(widths): (family, widths) for family, widths in points}
    missing = {k: v for k, v in wanted.items() if table.get(k) is None}
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not progress or len(missing) < 8,
    )
    with bar:
        task = bar.add_task(f"timing products ({table.target})", total=len(missing))
        for key, (family, widths) in missing.items():
            table.put(key, time_product(table.target, family, widths))
            bar.update(task, advance=1)
    return [s for k in wanted if (s := table.get(k)) is not None]


def _axes(apart: Parts, full: IntArray, least: IntArray) -> list[Axes]:
    high, low = (_widths(apart, with_one(c))[0] for c in (full, least))
    found = []
    for item, h, m in zip(apart.items, np.rint(high), np.rint(low), strict=True):
        n = item.family.axes
        whole = tuple(int(v) for v in h[:n])
        found.append(Axes(item.family, whole, tuple(int(v) for v in m[:n]), whole))
    return shared_tops(found)


def _widths(apart: Parts, k: FloatArray) -> FloatArray:
    """k [P, G + 1] -> [P, I, A] the widths of each product along its family's axes."""
    columns = np.array([i.columns for i in apart.items], dtype=np.int64).reshape(-1, 3)
    widths = apart.widths.evaluate(k)
    total, out, inner = (widths[:, columns[:, j]] for j in range(3))
    forms = [i.family.form for i in apart.items]
    axes = 3 if "grouped" in forms else 2
    found = np.ones((*total.shape, axes))
    found[:, :, 0] = total
    plain = np.array([f == "plain" for f in forms], dtype=np.bool_)
    found[:, plain, 1] = out[:, plain]
    grouped = np.array([f == "grouped" for f in forms], dtype=np.bool_)
    if grouped.any():
        groups = total[:, grouped] / inner[:, grouped]
        found[:, grouped] = np.stack([groups, inner[:, grouped], out[:, grouped] / groups], axis=2)
    return found


def _bytes(apart: Parts, k: FloatArray) -> FloatArray:
    """k [P, G + 1] -> [P] bytes that the rest reads and writes."""
    if not apart.weight:
        return np.full(len(k), apart.fixed)
    return np.asarray(apart.rest.evaluate(k) @ np.array(apart.weight) + apart.fixed)


def _grids(
    table: Table, axes: list[Axes], odd: list[list[dict[int, tuple[int, ...]]]], block: int
) -> Grids:
    def ms(family: Family, widths: Sequence[int]) -> float:
        found = table.get(family.key(tuple(widths)))
        assert found is not None, "every point has been measured"
        return found.ms

    times, factors = [], []
    for a, one in zip(axes, odd, strict=True):
        shape = [len(a.levels(i, block)) for i in range(len(a.full))]
        times.append(np.array([ms(*p) for p in a.grid(block)]).reshape(shape))
        top = [a.levels(i, block)[-1] for i in range(len(a.full))]
        whole = ms(a.family, top)
        found = [{n: max(1.0, ms(a.family, w) / whole) for n, w in d.items()} for d in one]
        factors.append(found)
    return Grids(axes, block, times, factors)
