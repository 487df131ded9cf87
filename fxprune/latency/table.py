"""Measured times on disk: one JSON line for each, appended at once, so that a run can go on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from platformdirs import user_cache_dir

from fxprune.errors import OutputError
from fxprune.latency.target import Sample, Target


def cache_folder() -> Path:
    """$FXPRUNE_CACHE, or the user's cache folder of this system."""
    return Path(os.environ.get("FXPRUNE_CACHE") or user_cache_dir("fxprune")) / "latency"


class Table:
    """What has been measured on one target: key of an op with its widths -> Sample.

    A line is written with one append and synced, so a killed run loses nothing, and several
    processes may write to one file. A line that is torn or not understood is passed over.
    """

    def __init__(self, target: Target, folder: Path | None = None) -> None:
        self.target = target
        self.path = (folder or cache_folder()) / f"{target.slug}.jsonl"
        self._known: dict[str, Sample] = {}
        self._complete = True
        if self.path.is_file():
            text = self.path.read_text(encoding="utf-8", errors="replace")
            self._complete = text.endswith("\n") or not text
            for line in text.splitlines():
                self._read(line)

    def _read(self, line: str) -> None:
        try:
            row = json.loads(line)
            found = Sample(float(row["ms"]), int(row["runs"]), float(row["spread"]))
            self._known[str(row["op"])] = found
        except (ValueError, KeyError, TypeError):
            return  # torn by a crash, or of another version: it is measured again

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: str) -> Sample | None:
        """What was measured for ``key``, if anything."""
        return self._known.get(key)

    def known(self) -> Mapping[str, Sample]:
        """All that was measured."""
        return dict(self._known)

    def put(self, key: str, found: Sample) -> None:
        """Remember, and write to disk. Raises OutputError where the folder cannot be written."""
        row = {"op": key, "ms": found.ms, "runs": found.runs, "spread": round(found.spread, 4)}
        line = ("" if self._complete else "\n") + json.dumps(row) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(file, line.encode())
                os.fsync(file)
            finally:
                os.close(file)
        except OSError as e:
            raise OutputError(
                f"measured times cannot be kept in {self.path.parent} ({e}); "
                "let FXPRUNE_CACHE name a folder that can be written"
            ) from e
        self._complete = True
        self._known[key] = found
