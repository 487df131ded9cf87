"""Where a model will run: runtime and threads; and the clock that suits it."""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fxprune.errors import SpecError, unknown

NAMES = ("onnxruntime-cpu", "torch-cpu", "torch-compile", "cuda")


@dataclass(frozen=True)
class Target:
    """A runtime on this machine. The batch is that of the example inputs.

    name     onnxruntime-cpu | torch-cpu | torch-compile | cuda
    threads  intra-op threads of the CPU runtimes; cuda takes no notice of it
    """

    name: str = "onnxruntime-cpu"
    threads: int = 1

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise unknown("latency target", self.name, NAMES)
        if self.threads < 1:
            raise SpecError(f"threads must be at least 1, got {self.threads}")
        if self.name == "cuda" and not torch.cuda.is_available():
            raise SpecError("latency target 'cuda': torch sees no GPU here; choose a CPU target")

    def __str__(self) -> str:
        return self.name if self.name == "cuda" else f"{self.name}, {self.threads} thread(s)"

    @property
    def device(self) -> str:
        """Processor and runtime version: measured times hold for this and nothing else."""
        package = "onnxruntime" if self.name.startswith("onnxruntime") else "torch"
        runtime = f"{package} {version(package)}"
        if self.name == "cuda":
            return f"{torch.cuda.get_device_name()}, {runtime}"
        return f"{processor()}, {runtime}"

    @property
    def slug(self) -> str:
        """File name for what was measured on this target and device."""
        text = f"{self.name}-{self.threads}t-{self.device}"
        return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def processor() -> str:
    """The processor's model name, with the vector extensions that kernels choose by."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.is_file() else ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    flags = re.search(r"^flags\s*:\s*(.+)$", text, re.M)
    wide = [f for f in ("avx512f", "avx2") if flags is not None and f in flags[1].split()]
    plain = name[1].strip() if name is not None else platform.processor() or platform.machine()
    return " ".join([plain, *wide[:1]])


def clock(target: Target) -> Callable[[], float]:
    """Seconds, as this target is timed.

    One CPU thread: CPU time of the calling thread. On an idle machine it is the wall clock; on one
    that others use too it leaves out the time in which the thread had to wait. Else the wall clock.
    """
    if target.name != "cuda" and target.threads == 1:
        return time.thread_time
    return time.perf_counter


FLUSH_BYTES = 32 << 20  # about a last-level cache
_other: list[NDArray[np.float32]] = []


def forget() -> None:
    """Read enough other memory that the next call finds its weights where a large net's are.

    In a net whose weights exceed the caches every layer's come from memory each time; timed over
    and over alone, they would stay in a cache (up to 1.5 times faster).
    """
    if not _other:
        _other.append(np.ones(FLUSH_BYTES // 4, dtype=np.float32))
    _other[0][::16].sum()


@dataclass(frozen=True)
class Sample:
    """Milliseconds of one measured thing: a median, over ``runs``; spread: (q75 - q25) / median."""

    ms: float
    runs: int
    spread: float


def sample(seconds: list[float]) -> Sample:
    """The median of repeated runs."""
    low, middle, high = np.quantile(np.array(seconds), (0.25, 0.5, 0.75)) * 1e3
    return Sample(float(middle), len(seconds), float((high - low) / max(middle, 1e-9)))


def repeat(
    target: Target, calls: list[Callable[[], object]], seconds: float, least: int = 10
) -> list[Sample]:
    """Time several calls, taking turns, so that a change in the machine's speed meets all of them.

    Each has warm-up runs first. Ends when ``seconds`` have been used and each ran ``least`` times.
    """
    now = clock(target)
    taken: list[list[float]] = [[] for _ in calls]
    for call in calls:
        for _ in range(3):
            call()
    begin = time.perf_counter()
    while len(taken[0]) < least or time.perf_counter() - begin < seconds:
        for call, times in zip(calls, taken, strict=True):
            start = now()
            call()
            times.append(now() - start)
    return [sample(t) for t in taken]
