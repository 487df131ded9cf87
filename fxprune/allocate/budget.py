"""What a Budget says: shares of the original, and absolute values with their units."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from fxprune.errors import BudgetError
from fxprune.types import Budget

_PREFIX = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30}


def _units(words: tuple[str, ...], prefixes: str) -> dict[str, float]:
    names = [f" {w}" for w in words] + [w for w in words if w]
    return {f"{p}{w}".strip(): _PREFIX[p] for p in ("", *prefixes) for w in (*names, "")}


_BYTES = {p + "B": f for p, f in {**_PREFIX, **_BINARY}.items() if p != "B"}
_BYTES |= {"bytes": 1.0, "byte": 1.0}
# Every unit that a measure can be given in -> its size in the measure's base unit.
UNITS: dict[str, dict[str, float]] = {
    "macs": _units(("MACs", "MAC", "macs"), "kKMGT"),
    "params": _units(("params", "parameters", "param"), "kKMGB"),
    "bytes": _BYTES,
    "memory": _BYTES,
    "latency": {"us": 1e-3, "µs": 1e-3, "μs": 1e-3, "ms": 1.0, "s": 1e3},
}
_KNOWN = {
    "macs": "MACs, kMACs, MMACs, GMACs or TMACs",
    "params": "params, k params, M params or B params",
    "bytes": "B, kB, MB, GB, KiB, MiB or GiB",
    "memory": "B, kB, MB, GB, KiB, MiB or GiB",
    "latency": "us, ms or s",
}
_EXAMPLES = {
    "macs": ("300 MMACs", "1.2 GMACs"),
    "params": ("5M params", "300k"),
    "bytes": ("2.5 MB", "800 KiB"),
    "memory": ("2.5 MB", "800 KiB"),
    "latency": ("4 ms", "800 us"),
}
_SHOWN = {
    "macs": ((1e9, "GMACs"), (1e6, "MMACs"), (1e3, "kMACs"), (1, "MACs")),
    "params": ((1e6, "M params"), (1e3, "k params"), (1, "params")),
    "bytes": ((1e6, "MB"), (1e3, "kB"), (1, "bytes")),
    "latency": ((1e3, "s"), (1, "ms"), (1e-3, "us")),
}
_NUMBER = re.compile(r"\s*([+-]?(?:\d+(?:_\d+)*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(.*?)\s*")


@dataclass(frozen=True)
class Bound:
    """One upper bound: a share of the original, or an absolute value in the measure's base unit.

    Base units: MACs, parameters, bytes, and milliseconds for the latency.
    """

    measure: str
    value: float
    absolute: bool

    def limit(self, original: float) -> float:
        """What may stay of ``original``, in base units; never more than all of it."""
        return min(original, self.value) if self.absolute else self.value * original

    def __str__(self) -> str:
        shown = in_words(self.measure, self.value) if self.absolute else f"{self.value:g}"
        return f"{self.measure}={shown}"


def bounds(budget: Budget) -> dict[str, Bound]:
    """The bounds of a budget, by measure.

    Raises BudgetError for a budget that bounds nothing, a share outside (0, 1], an absolute value
    that is not positive, or a unit that the measure does not have.
    """
    given: Mapping[str, float | str | None] = {m: getattr(budget, m) for m in UNITS}
    found = {m: _bound(m, v) for m, v in given.items() if v is not None}
    if not found:
        raise BudgetError(
            f"the budget bounds nothing; give a share in (0, 1] for one of {', '.join(UNITS)}"
        )
    return found


def in_words(measure: str, value: float) -> str:
    """A value in base units, with the unit that suits its size."""
    shown = _SHOWN["bytes" if measure == "memory" else measure]
    for size, unit in shown:
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value / shown[-1][0]:.4g} {shown[-1][1]}"


def _bound(measure: str, value: float | str) -> Bound:
    if isinstance(value, str):
        return _of_text(measure, value)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value):
        raise _refused(measure, value)
    if 0 < value <= 1:
        return Bound(measure, float(value), absolute=False)
    if value > 1 and float(value).is_integer() and measure != "latency":
        return Bound(measure, float(value), absolute=True)
    raise _refused(measure, value)


def _of_text(measure: str, text: str) -> Bound:
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise _refused(measure, text)
    number, unit = float(match[1].replace("_", "")), match[2]
    if unit in ("", "%"):
        value = number / 100 if unit else number
        whole = not unit and value.is_integer() and value > 1
        return _bound(measure, int(value)) if whole else _share(measure, value, text)
    if unit not in UNITS[measure]:
        raise BudgetError(_unit_text(measure, text, unit))
    if not number > 0 or not math.isfinite(number):
        raise BudgetError(f"budget {measure}={text!r} must be above zero")
    return Bound(measure, number * UNITS[measure][unit], absolute=True)


def _share(measure: str, value: float, text: str) -> Bound:
    if not 0 < value <= 1:
        raise _refused(measure, text)
    return Bound(measure, value, absolute=False)


def _unit_text(measure: str, text: str, unit: str) -> str:
    examples = " or ".join(repr(e) for e in _EXAMPLES[measure])
    flops = " (2 FLOPs are one MAC)" if "flop" in unit.lower() else ""
    return (
        f"budget {measure}={text!r}: unknown unit {unit!r}{flops}; "
        f"{measure} is given in {_KNOWN[measure]}, for example {examples}, or as a share like 0.5"
    )


def _refused(measure: str, value: object) -> BudgetError:
    examples = " or ".join(repr(e) for e in _EXAMPLES[measure])
    return BudgetError(
        f"budget {measure}={value!r} is not a share of the original in (0, 1], nor an absolute "
        f"value with its unit; for example {measure}=0.5 keeps at most half, and {examples} so much"
    )
