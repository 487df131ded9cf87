"""How much does each group cost when it is cut alone? Curves as a table and a plot.

Legend for shapes: F free groups, K kept shares.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from fxprune import criteria
from fxprune.allocate import AllocationProblem
from fxprune.allocate.space import Space, space_of
from fxprune.checkpoint import check_values
from fxprune.criteria import Criterion
from fxprune.data import calibration_batches
from fxprune.errors import SEEDS, SpecError, whole
from fxprune.isolate import rng_kept, uncompiled
from fxprune.observe import observe
from fxprune.progress import bar, working
from fxprune.repair import LeastSquares
from fxprune.traced import trace
from fxprune.types import Budget, FloatArray, IntArray, PrunePlan
from fxprune.workers import Recipe, Shipped, local_workers

PICTURES = (".svg", ".png", ".pdf")
SHARES = (0.9, 0.75, 0.5, 0.25)  # of a group's channels that are kept
HELD_OUT = 0.25  # of the calibration samples: for the comparison of outputs


@dataclass(frozen=True)
class Sensitivity:
    """Curves of all groups that can be cut, in the order of the graph.

    groups   names; ``channels`` [F] their widths (of each row)
    kept     [F, K] kept counts, falling
    loss     [F, K] fitness of the repaired model with this cut alone, lower is better: the
             divergence of its outputs from the original's in nats, or minus the user's ``evaluate``
    saved    [F, K] share of the model's multiply-adds that the cut saves
    whole    fitness of the uncut model
    """

    groups: tuple[str, ...]
    channels: IntArray
    kept: IntArray
    loss: FloatArray
    saved: FloatArray
    whole: float

    def rows(self) -> list[dict[str, Any]]:
        """One dict for each measured cut."""
        return [
            {
                "group": name,
                "channels": int(self.channels[f]),
                "kept": int(self.kept[f, k]),
                "loss": float(self.loss[f, k]),
                "macs saved": float(self.saved[f, k]),
            }
            for f, name in enumerate(self.groups)
            for k in range(self.kept.shape[1])
        ]

    def plot(self, file: str | os.PathLike[str]) -> None:
        """Draw the curves to a file (.svg, .png, .pdf). Needs matplotlib (the extra "plot")."""
        check_plot(file)
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 5.5), layout="constrained")
        axes = figure.subplots()
        share = self.kept / self.channels[:, None]
        worst = np.argsort(-np.nanmax(self.loss, axis=1))[:12].tolist() if self.groups else []
        for f, name in enumerate(self.groups):
            colour = _colour(f / max(1, len(self.groups) - 1))
            axes.plot(
                [1, *share[f]], [self.whole, *self.loss[f]], ".-", color=colour, linewidth=1,
                label=name if f in worst else None,
            )  # fmt: skip
        axes.invert_xaxis()
        axes.set(
            xlabel="share of the group's channels that is kept", ylabel="fitness (lower: better)"
        )
        axes.set_title("Each group cut alone, after repair; blue: early in the graph, red: late")
        axes.grid(alpha=0.3)
        if self.groups:
            axes.legend(fontsize=8, title="most sensitive")
        figure.savefig(file, metadata={"Date": None} if Path(file).suffix == ".svg" else None)


def check_plot(file: str | os.PathLike[str]) -> None:
    """SpecError where the name is not that of a picture, or there is no matplotlib."""
    if Path(file).suffix.lower() not in PICTURES:
        raise SpecError(f"{file}: a plot is drawn as {', '.join(PICTURES)}; give such a name")
    if importlib.util.find_spec("matplotlib") is None:
        raise SpecError("the plot needs matplotlib; install the extra: pip install fxprune[plot]")


def _colour(depth: float) -> tuple[float, float, float]:
    """Blue to red along the graph; red, green and blue in [0, 1]."""
    return 0.15 + 0.7 * depth, 0.3, 0.85 - 0.7 * depth


def sensitivity(
    model: nn.Module,
    example_inputs: Any,
    data: Iterable[Any] | Tensor | None = None,
    *,
    criterion: str | Criterion = "attention",
    repair: str | None = "lstsq",
    evaluate: Callable[[Any], float] | None = None,
    shares: Sequence[float] = SHARES,
    exclude: Sequence[str] = (),
    round_to: int = 1,
    seed: int = 0,
    progress: bool = True,
    calibration_samples: int = 256,
    workers: int = 0,
    executor: Executor | None = None,
) -> Sensitivity:
    """Cut each group alone to some kept shares, repair, and measure: its curve.

    The arguments that ``fxprune.prune`` has too mean the same. shares: of a group's channels that
    are kept, in (0, 1). Nothing of ``model`` changes. Raises InputError for what cannot be used.
    """
    if not shares or not all(0 < s < 1 for s in shares):
        raise SpecError(f"shares must lie between 0 and 1, got {tuple(shares)}")
    if repair not in ("lstsq", "bn", None):
        raise SpecError(f"repair must be lstsq, bn or None, got {repair!r}")
    if whole("workers", workers) and executor is not None:
        raise SpecError(f"give a number of workers, or an executor; got workers={workers}")
    whole("seed", seed, 0, SEEDS)
    whole("calibration_samples", calibration_samples, 1)
    check_values(model)
    chosen = criteria.get(criterion)
    with rng_kept(), uncompiled():
        with working("trace", progress):
            traced = trace(model, example_inputs).excluding(exclude)
        given = traced.captured.given
        with working("read calibration data", progress):
            found = calibration_batches(
                data, given, limit=calibration_samples, batch_size=32, seed=seed
            )
        if found.random:
            warnings.warn("no calibration data: random inputs are used; give data=", stacklevel=2)
        batches = list(found.batches)
        held = max(1, round(HELD_OUT * len(batches)))
        seen, held_out = (batches[:-held] or batches), batches[-held:]
        statistics = observe(traced, seen, progress=progress, **criteria.observe_options(chosen))
        with working("rank", progress):
            scores = chosen(traced, statistics, np.random.default_rng(seed))
        problem = AllocationProblem(traced, scores, Budget(macs=1.0), round_to, seed)
        recipe = Recipe(model, traced.captured.given, seen, held_out, repair, evaluate)
        once = LeastSquares(traced, statistics)
        with Shipped(recipe, traced, once) as shipped, local_workers(workers) as pool:
            space = space_of(problem, overlapping=True)
            return _measured(space, shipped, executor or pool, shares, progress)


def _measured(
    space: Space,
    fitness: Callable[[PrunePlan], float],
    executor: Executor | None,
    shares: Sequence[float],
    progress: bool,
) -> Sensitivity:
    width = space.table[:, -1]
    wanted = np.outer(width, sorted(shares, reverse=True))
    steps = np.abs(space.table[:, None, :] - wanted[:, :, None]).argmin(axis=2)
    steps = np.minimum(steps, space.top[:, None])
    states = np.repeat(space.top[None], steps.size, axis=0)
    at = np.repeat(np.arange(len(width)), steps.shape[1])
    states[np.arange(len(states)), at] = steps.ravel()
    plans = [space.plan(s) for s in [space.top, *states]]
    values = []
    with bar(progress) as shown:
        task = shown.add_task("sensitivity", total=len(plans), note="")
        for value in (map if executor is None else executor.map)(fitness, plans):
            values.append(float(value))
            shown.update(task, advance=1, note=f"fitness {value:.4g}")
    saved = 1 - space.cost(states)[:, 0] / space.original[0]
    return Sensitivity(
        groups=tuple(space.groups[i].name for i in space.free),
        channels=width,
        kept=np.take_along_axis(space.table, steps, axis=1),
        loss=np.array(values[1:]).reshape(steps.shape),
        saved=saved.reshape(steps.shape),
        whole=values[0],
    )
