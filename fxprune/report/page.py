"""The page: figures of a PruneResult, put into the template beside this file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from fxprune.errors import OutputError, SpecError
from fxprune.pipeline import PruneResult
from fxprune.report.charts import arcs, bars, search_curve, step_curve
from fxprune.report.maps import Maps, attention_maps

_UNITS = {"share": "", "bytes": "B", "ms": "ms", "": ""}


@dataclass(frozen=True)
class Figure:
    """A row of the table. unit: "bytes", "ms", "share" (shown in percent) or "" for counts.

    ``after`` or ``before`` is None where it was not measured. ``better``: "less" or "more".
    """

    name: str
    before: float | None
    after: float | None
    unit: str = ""
    better: str = "less"

    @property
    def texts(self) -> tuple[str, str, str]:
        """before, after, change."""
        old, new = ("-" if v is None else number(v, self.unit) for v in (self.before, self.after))
        if self.before is None or self.after is None:
            return old, new, ""
        if self.unit == "share":
            return old, new, f"{100 * (self.after - self.before):+.2f} points"
        return old, new, f"{self.after / self.before - 1:+.1%}" if self.before else ""

    @property
    def good(self) -> bool:
        """Whether it changed for the better, or not at all."""
        if self.before is None or self.after is None:
            return True
        gain = self.after - self.before
        return gain <= 0 if self.better == "less" else gain >= 0


def number(value: float, unit: str = "") -> str:
    """With the prefix that suits its size: 1.23 M, 4.5 MB, 0.81 ms, 97.3%."""
    if unit == "share":
        return f"{value:.2%}"
    if unit == "ms":
        return f"{value:.3g} ms" if value < 1000 else f"{value / 1000:.3g} s"
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g} {prefix}{_UNITS[unit]}"
    return f"{value:.4g} {_UNITS[unit]}".strip()


def write_report(
    result: PruneResult,
    path: str | os.PathLike[str],
    *,
    title: str = "Pruned model",
    figures: Iterable[Figure] = (),
    inputs: Any = None,
    notes: Iterable[str] = (),
) -> Path:
    """Write the report of ``result`` to ``path``, whole or not at all.

    figures  rows besides the costs: ``Figure("test accuracy", 0.98, 0.97, "share", "more")``
    inputs   for the attention maps, of the form of the example inputs (which are taken where none
             are given): of a real sample the maps say more
    notes    lines below the table

    Raises OutputError where it cannot be written, SpecError for another result.
    """
    if not isinstance(result, PruneResult):
        cure = "; give its .pruned" if hasattr(result, "pruned") else ""
        raise SpecError(f"expected a PruneResult, got {type(result).__name__}{cure}")
    maps, without = _maps(result, inputs)
    environment = Environment(
        loader=PackageLoader("fxprune.report", ""), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    page = environment.get_template("page.html.j2").render(
        title=title,
        figures=[*_costs(result), *figures],
        notes=[*notes, *_notes(result), *without],
        bars=bars(result.analysis, result.plan),
        curves=_curves(result.report),
        arcs=arcs(result.analysis, result.plan),
        maps=maps,
        locked=_locked(result),
        stages=_stages(result.report),
        rounds=result.report.get("repair", {}).get("rounds", []),
        number=number,
    )
    return _written(Path(path), page)


def _maps(result: PruneResult, inputs: Any) -> tuple[Maps, list[str]]:
    """The maps, or why there are none: a report must not sink a pruning that is done."""
    try:
        return attention_maps(result.analysis, result.plan, inputs), []
    except Exception as e:  # noqa: BLE001 - a sample that the model does not take, and the like
        return Maps(None, ()), [f"No attention maps: {type(e).__name__}: {e}"]


def _costs(result: PruneResult) -> list[Figure]:
    before, after = result.before, result.after
    rows = [
        Figure("MACs", before.macs, after.macs),
        Figure("Parameters", before.params, after.params),
        Figure("Weights", before.bytes, after.bytes, "bytes"),
    ]
    if before.memory:
        rows.append(Figure("Peak activations", before.memory, after.memory, "bytes"))
    latency = result.report.get("latency")
    if latency:
        name = f"Latency ({latency['target']}, batch {latency['batch']})"
        rows.append(Figure(name, latency["before_ms"], latency["after_ms"], "ms"))
    return rows


def _notes(result: PruneResult) -> list[str]:
    report = result.report
    found = []
    if "calibration" in report:
        found.append(f"Calibrated on {report['calibration']}.")
    repair = report.get("repair", {})
    if "repaired" in repair:
        found.append(f"Repair: {repair.get('kind')}, {repair['repaired']} layers.")
    if "distill" in repair:
        fitness = repair["distill"]["fitness"]
        found.append(
            f"Distillation: {fitness['before']:.4g} before, {fitness['after']:.4g} after, on "
            "held-out samples (lower is better)."
        )
    note = report.get("plan", {}).get("note")
    return [*found, *([str(note)] if note else [])]


def _curves(report: dict[str, Any]) -> list[Any]:
    curves = [search_curve(report.get("plan", {}).get("trace") or [])]
    distilled = report.get("repair", {}).get("distill", {}).get("curve", [])
    points = [(float(x), float(y)) for x, y in distilled]
    curves.append(step_curve("Distillation", "fitness (lower is better)", points))
    return [c for c in curves if c is not None]


def _locked(result: PruneResult) -> list[tuple[str, list[str]]]:
    """(reason, names of the groups and modules), the most frequent reason first."""
    return sorted(result.analysis.reasons.items(), key=lambda pair: -len(pair[1]))


def _stages(report: dict[str, Any]) -> list[tuple[str, float]]:
    return [(str(k), float(v)) for k, v in report.get("seconds", {}).items()]


def _written(path: Path, text: str) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    except OSError as e:
        raise OutputError(f"{path} cannot be written: {e.strerror or e}") from e
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as f:
            f.write(text)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(draft, 0o666 & ~mask)
        os.replace(draft, path)
    except OSError as e:
        raise OutputError(f"{path} cannot be written: {e.strerror or e}") from e
    finally:
        Path(draft).unlink(missing_ok=True)
    return path
