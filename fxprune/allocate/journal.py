"""A search on disk: JSON lines, each synced before the search goes on.

The first line says what the search is about. Every further line is one event:

    {"event": "evaluated", "stage": "step 4", "kept": [...], "fitness": 0.12, "seconds": 3.1}
    {"event": "accepted", "kept": [...]}
    {"event": "final", "kept": [...], "fitness": 0.08, "seconds": 9.0}

``kept``: the count of each free group; ``fitness`` null: not finite; ``seconds`` since the search
began, earlier runs included. A search is a function of its seed and of what the evaluations give,
so one that was killed is run again from the start, and what is on disk is not evaluated twice.
A last line that was torn when the process died is cut off.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from fxprune.errors import OutputError

Kept: TypeAlias = tuple[int, ...]

FORMAT = "fxprune search 1"


class Journal:
    """Opened for reading what is there and appending to it; a context manager.

    header   what must be the same for the search to go on: {"subject": content hash, ...}
    seconds  of the runs before

    Raises OutputError where the file cannot be written, is damaged, or is about something else.
    """

    def __init__(self, path: str | os.PathLike[str], header: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.seconds = 0.0
        self._known: dict[tuple[str, Kept], float] = {}
        self._header = {"format": FORMAT, **header}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+b")  # noqa: SIM115  closed by __exit__
        except OSError as e:
            raise OutputError(f"the journal {self.path} cannot be written: {e}") from e
        try:
            self._read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def _read(self) -> None:
        """Take over the events that are there; cut off a torn last line."""
        self._file.seek(0)
        whole = self._file.read()
        end = whole.rfind(b"\n") + 1
        self._file.truncate(end)
        lines = whole[:end].splitlines()
        if not lines:
            self._append(self._header)
            return
        found = self._parsed(lines[0], 1)
        if found.get("format") != FORMAT or found.get("subject") != self._header["subject"]:
            raise OutputError(
                f"the journal {self.path} is about another search (another model, data or "
                "options); delete it or name another file"
            )
        for number, line in enumerate(lines[1:], 2):
            self._take(self._parsed(line, number), number)

    def _parsed(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            found = json.loads(line)
        except ValueError as e:
            raise self._damaged(number) from e
        if not isinstance(found, dict):
            raise self._damaged(number)
        return found

    def _take(self, event: dict[str, Any], number: int) -> None:
        try:
            kept = tuple(int(n) for n in event["kept"])
            value = event.get("fitness")
            self._known[event["event"], kept] = math.inf if value is None else float(value)
            self.seconds = max(self.seconds, float(event.get("seconds", 0.0)))
        except (KeyError, TypeError, ValueError) as e:
            raise self._damaged(number) from e

    def _damaged(self, number: int) -> OutputError:
        return OutputError(
            f"line {number} of the journal {self.path} is not an event; delete the file to start "
            "the search anew"
        )

    def _append(self, event: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(event, allow_nan=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def known(self, event: str, kept: Kept) -> float | None:
        """The fitness of an event that is on disk."""
        return self._known.get((event, kept))

    def add(
        self,
        event: str,
        kept: Kept,
        fitness: float = math.nan,
        seconds: float = 0.0,
        stage: str = "",
    ) -> None:
        """Append an event, unless it is there already."""
        if (event, kept) in self._known:
            return
        self._known[event, kept] = fitness
        record: dict[str, Any] = {"event": event, "kept": list(kept)}
        if stage:
            record["stage"] = stage
        if event != "accepted":
            record["fitness"] = fitness if math.isfinite(fitness) else None
            record["seconds"] = round(seconds, 3)
        self._append(record)
