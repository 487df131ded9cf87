"""What is written on the command line, read: errors are one line and name the option."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from fxprune.errors import SEEDS, OutputError, SpecError


class Parser(argparse.ArgumentParser):
    """Raises SpecError in place of printing the usage of thirty options."""

    def error(self, message: str) -> NoReturn:
        raise SpecError(f"{message}; see {self.prog} --help")


def whole(least: int = 0, most: int | None = None) -> Callable[[str], int]:
    """Type of an option that counts."""
    to = "" if most is None else f" to {most:,}"

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(
                f"expected a whole number from {least}{to}, got {text!r}"
            )
        return value

    return read


seed = whole(0, SEEDS)


def seconds(text: str) -> float:
    """Type of an option that is a time."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected seconds, more than 0, got {text!r}")
    return value


def number(text: str) -> float:
    """Type of an option that is a number; its range is checked where it is used."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None


def rounding(text: str) -> int | str:
    """Type of --round-to."""
    if text == "auto":
        return text
    try:
        return whole(1)(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f'expected a whole number from 1, or "auto", got {text!r}'
        ) from None


def named(text: str, kind: str) -> Any:
    """A name of the library's as it is; what FILE.py:NAME or package.module:NAME holds."""
    from fxprune import usercode

    return usercode.found(text, kind) if ":" in text else text


def check_file(name: str | None) -> None:
    """OutputError unless a file of that name can be written; call it before long work."""
    if name is None:
        return
    if Path(name).is_dir():
        raise OutputError(f"{name} is a folder; give the name of a file")
    if not Path(name).absolute().parent.is_dir():
        raise OutputError(f"{name} cannot be written: its folder does not exist")
