"""The one place that knows which runtime does what."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from fxprune.latency import onnx_cpu, torch_runs
from fxprune.latency.ops import Family
from fxprune.latency.target import Sample, Target, repeat


def time_product(target: Target, family: Family, widths: tuple[int, ...]) -> Sample:
    """Milliseconds of one product: warm-up, then repeated runs."""
    if target.name == "onnxruntime-cpu":
        return onnx_cpu.time_product(target, family, widths)
    return torch_runs.time_product(target, family, widths)


def fuses(target: Target) -> bool:
    """Whether norms and activations are computed inside the product before them."""
    return target.name == "onnxruntime-cpu"


class Bench:
    """Times whole models on a target; a context manager. A model is prepared once.

    onnxruntime runs the checked ONNX files of :func:`fxprune.export_onnx`, torch runs copies in
    eval mode. Raises ExportError where there is no such file.
    """

    def __init__(self, target: Target, inputs: tuple[Any, ...], *, progress: bool = False) -> None:
        self.target, self.inputs, self.progress = target, inputs, progress
        self._calls: dict[int, tuple[nn.Module, Callable[[], object]]] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="fxprune-")

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *error: object) -> None:
        self._calls.clear()
        self._folder.cleanup()

    def measure(
        self, models: Sequence[nn.Module], *, seconds: float = 0.7, least: int = 20
    ) -> list[Sample]:
        """Latency of each model at the inputs' batch; they take turns, so that they compare.

        Each runs for ``seconds`` and ``least`` times at least. With one CPU thread the clock is the
        CPU time of the thread, else the wall clock.
        """
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            disable=not self.progress,
        )
        with bar, torch_runs.threads_of(self.target):
            task = bar.add_task(f"measuring ({self.target})", total=len(models) + 1)
            calls = []
            for model in models:
                calls.append(self._call(model))
                bar.update(task, advance=1)
            found = repeat(self.target, calls, seconds * len(calls), least)
            bar.update(task, advance=1)
            return found

    def _call(self, model: nn.Module) -> Callable[[], object]:
        if id(model) not in self._calls:
            if self.target.name == "onnxruntime-cpu":
                path = Path(self._folder.name) / f"{len(self._calls)}.onnx"
                call = onnx_cpu.whole_model(self.target, model, self.inputs, path)
            else:
                call = torch_runs.whole_model(self.target, model, self.inputs)
            self._calls[id(model)] = model, call
        return self._calls[id(model)][1]
