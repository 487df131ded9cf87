"""Structured pruning of PyTorch models: trace, group, rank, search, cut, repair, export."""

from fxprune.errors import FxpruneError
from fxprune.export import ExportReport, export_onnx
from fxprune.pipeline import PruneResult, apply, load, prune
from fxprune.traced import Traced, trace
from fxprune.types import Budget, ChannelGroup, Cost, PrunePlan

__version__ = "0.1.0"
__all__ = [
    "Budget", "ChannelGroup", "Cost", "ExportReport", "FxpruneError", "PrunePlan", "PruneResult",
    "Traced", "__version__", "apply", "export_onnx", "load", "prune", "trace",
]  # fmt: skip
