"""Structured pruning of PyTorch models: trace, group, rank, search, cut, repair, export."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxprune.curves import Sensitivity, sensitivity
    from fxprune.distill import Distillation
    from fxprune.errors import FxpruneError
    from fxprune.export import ExportReport, export_onnx
    from fxprune.pipeline import PruneResult, apply, load, prune
    from fxprune.report import Figure, write_report
    from fxprune.traced import Traced, trace
    from fxprune.tune import TuneResult, Tuning, finetune
    from fxprune.types import Budget, ChannelGroup, Cost, PrunePlan

__version__ = "0.6.0"
__all__ = [
    "Budget", "ChannelGroup", "Cost", "Distillation", "ExportReport", "Figure", "FxpruneError",
    "PrunePlan", "PruneResult", "Sensitivity", "Traced", "TuneResult", "Tuning", "__version__",
    "apply", "export_onnx", "finetune", "load", "prune", "sensitivity", "trace",
    "write_report",
]  # fmt: skip

_HOMES = {
    "curves": ("Sensitivity", "sensitivity"),
    "distill": ("Distillation",),
    "errors": ("FxpruneError",),
    "export": ("ExportReport", "export_onnx"),
    "pipeline": ("PruneResult", "apply", "load", "prune"),
    "report": ("Figure", "write_report"),
    "traced": ("Traced", "trace"),
    "tune": ("TuneResult", "Tuning", "finetune"),
    "types": ("Budget", "ChannelGroup", "Cost", "PrunePlan"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Public names are imported when first asked for: the command line starts without torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'fxprune' has no attribute {name!r}")
    value = getattr(import_module(f"fxprune.{_HOME[name]}"), name)
    globals()[name] = value
    return value
