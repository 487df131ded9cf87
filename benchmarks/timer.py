"""The one timer of all benchmarks: what was measured, where, how often, and how far it spread."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of a repeated call.

    median, least, most   wall-clock seconds over the runs
    cpu                   median CPU seconds of this process, all threads: on a machine that is
                          shared with others it is steadier than the wall clock
    """

    device: str
    threads: int
    runs: int
    median: float
    least: float
    most: float
    cpu: float

    @property
    def spread(self) -> float:
        """(most - least) / median."""
        return (self.most - self.least) / self.median if self.median else 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"spread": self.spread}


def device_name() -> str:
    """The processor's name and the number of its cores that can be seen here."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {len(names) or '?'} cores visible"


def measure(
    call: Callable[[Any], Any],
    *,
    prepare: Callable[[], Any] = lambda: None,
    runs: int = 3,
    warmup: int = 0,
    enough: float = float("inf"),
) -> Timing:
    """Time ``call(prepare())``; what ``prepare`` does is not timed.

    No further run begins once the timed ones have taken ``enough`` wall-clock seconds; ``runs`` of
    the result says how many there were. The number of threads is torch's at the time of the call.
    """
    wall: list[float] = []
    cpu: list[float] = []
    for run in range(warmup + runs):
        given = prepare()
        start, start_cpu = time.perf_counter(), time.process_time()
        call(given)
        end, end_cpu = time.perf_counter(), time.process_time()
        if run >= warmup:
            wall.append(end - start)
            cpu.append(end_cpu - start_cpu)
        if sum(wall) > enough:
            break
    return Timing(
        device=device_name(),
        threads=torch.get_num_threads(),
        runs=len(wall),
        median=statistics.median(wall),
        least=min(wall),
        most=max(wall),
        cpu=statistics.median(cpu),
    )
