"""Tables of rules, one entry for each key, filled by decorators."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from fxprune.errors import SpecError

K = TypeVar("K")
R = TypeVar("R")


def registering(table: dict[K, R], what: str) -> Callable[..., Callable[[R], R]]:
    """A decorator ``register(*keys)`` that enters what it decorates; a second entry is refused."""

    def register(*keys: K) -> Callable[[R], R]:
        def add(rule: R) -> R:
            for key in keys:
                if key in table:
                    raise SpecError(f"{what} {key} has a rule already; a second one is refused")
                table[key] = rule
            return rule

        return add

    return register
