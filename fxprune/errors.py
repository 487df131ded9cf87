"""Every error that fxprune raises on purpose.

FxpruneError
├── InputError            what the caller gave cannot be used (exit code 2 on the command line)
│   ├── ModelError        the model does not run, does not trace, or holds NaN or Inf
│   ├── DataError         calibration data is empty, not finite, or of another shape
│   ├── BudgetError       the budget is not a budget, or cannot be reached
│   ├── PlanError         a plan does not belong to this model
│   ├── SpecError         an unknown model, data set, criterion, allocation or option
│   └── OutputError       a file or folder cannot be written
├── ExportError           no ONNX file could be made that computes what the model computes
└── InternalError         a stage broke its own contract: a bug in fxprune, never a wrong model

A message says what was expected, what came, where, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class FxpruneError(Exception):
    """Root of all errors raised on purpose."""


class InputError(FxpruneError, ValueError):
    """What the caller gave cannot be used."""


class ModelError(InputError):
    """The model does not run on the example inputs, or its weights are not finite."""


class DataError(InputError):
    """Calibration data is empty, not finite, or of another shape than the example inputs."""


class BudgetError(InputError):
    """The budget is out of range or cannot be reached."""


class PlanError(InputError):
    """A plan names groups or channels that this model does not have."""


class SpecError(InputError):
    """An unknown name where one of a known set is expected."""


class OutputError(InputError):
    """A file or folder cannot be written."""


class ExportError(FxpruneError, RuntimeError):
    """The ONNX file could not be made or does not compute what the model computes."""


class InternalError(FxpruneError, RuntimeError):
    """A stage broke its own contract. Please report it with the model that shows it."""


def unknown(kind: str, name: str, known: Iterable[str]) -> SpecError:
    """SpecError for an unknown ``name``, with near matches from ``known``."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        hint = f"did you mean {' or '.join(repr(c) for c in close)}?"
    elif len(names) <= 20:
        hint = f"choose one of: {', '.join(names)}"
    else:
        hint = f"{len(names)} names are known, e.g. {', '.join(names[:5])}"
    return SpecError(f"unknown {kind} {name!r}; {hint}")


def first_line(error: BaseException) -> str:
    """Of what another library raised: the rest is for its own developers."""
    text = str(error).strip() or "no message"
    line = text.splitlines()[0]
    return line if len(line) <= 300 else f"{line[:297]}..."


SEEDS = 2**32 - 1
"""The largest seed that all generators take."""


def whole(name: str, value: Any, least: int = 0, most: int | None = None) -> int:
    """``value`` where it is a whole number from ``least`` (to ``most``), else SpecError."""
    fits = hasattr(value, "__index__") and not isinstance(value, bool)
    if not fits or value < least or (most is not None and value > most):
        to = "" if most is None else f" to {most:,}"
        raise SpecError(f"{name} must be a whole number from {least}{to}, got {value!r}")
    return int(value)
