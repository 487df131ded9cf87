"""What stderr shows while anything takes longer than two seconds: a bar, or at least a line."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def bar(shown: bool) -> Progress:
    """What is done, a note (the task's field ``note``), time gone and time left: 80 columns."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(compact=True),
        console=Console(stderr=True),
        disable=not shown,
    )


@contextmanager
def working(what: str, shown: bool) -> Iterator[None]:
    """What is going on and since when, while the block runs; the line is gone after it."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, refresh_per_second=4,
        disable=not (shown and console.is_terminal),
    ) as display:  # fmt: skip
        display.add_task(what, total=None)
        yield


class Clock:
    """Seconds of each stage."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self.last = round(now - self.last, 4), now
