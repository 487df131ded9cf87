"""The one place that knows which runtime does what."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from fxprune.latency import onnx_cpu, torch_runs
from fxprune.latency.ops import Family
from fxprune.latency.target import Sample, Target, repeat


def time_product(target: Target, family: Family, widths: tuple[int, ...]) -> Sample:
    """Milliseconds of one product: warm-up, then the median of repeated runs."""
    module = onnx_cpu if target.name == "onnxruntime-cpu" else torch_runs
    return module.time_product(target, family, widths)


def fuses(target: Target) -> bool:
    """Whether norms and activations cost nothing of their own after a product."""
    return target.name in ("onnxruntime-cpu", "torch-compile")


def measure(
    models: Sequence[nn.Module],
    inputs: tuple[object, ...],
    target: Target,
    *,
    seconds: float = 4.0,
    least: int = 20,
) -> list[Sample]:
    """Measured latency of whole models at the inputs' batch, taking turns, so that they compare.

    onnxruntime runs the checked ONNX files of :func:`fxprune.export_onnx`. Raises ExportError
    where there is none. With one CPU thread the clock is the thread's CPU time, else the wall's.
    """
    with tempfile.TemporaryDirectory(prefix="fxprune-") as folder, torch_runs.threads_of(target):
        calls: list[Callable[[], object]]
        if target.name == "onnxruntime-cpu":
            calls = onnx_cpu.whole_models(target, models, tuple(inputs), Path(folder))
        else:
            calls = torch_runs.whole_models(target, models, tuple(inputs))
        return repeat(target, calls, seconds, least)
