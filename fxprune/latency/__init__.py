"""Latency on the runtime that will be used: measured op by op, predicted for any plan."""

from __future__ import annotations

from fxprune.latency.keeper import Keeper
from fxprune.latency.model import LatencyModel, latency_model
from fxprune.latency.rounding import fast_counts
from fxprune.latency.runtimes import Bench
from fxprune.latency.show import latency_text, overview, tables
from fxprune.latency.target import NAMES, Sample, Target

__all__ = [
    "NAMES", "Bench", "Keeper", "LatencyModel", "Sample", "Target", "fast_counts",
    "latency_model", "latency_text", "overview", "tables",
]  # fmt: skip
