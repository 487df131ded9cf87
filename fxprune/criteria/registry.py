"""What a criterion is, and the criteria by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch

from fxprune.errors import SpecError, unknown
from fxprune.observe import Statistics
from fxprune.tables import registering
from fxprune.types import FloatArray

if TYPE_CHECKING:
    from fxprune.traced import Traced

Scores: TypeAlias = dict[str, FloatArray]
Generator: TypeAlias = "np.random.Generator | torch.Generator"


@runtime_checkable
class Criterion(Protocol):
    """Ranks the channels of every group that is not locked.

    ``needs_data``: whether it reads the statistics of calibration data (None else). An optional
    attribute ``observe`` holds keyword options that :func:`fxprune.observe.observe` has to run
    with. The result has float64 [n] for each group; higher = keep.
    """

    @property
    def needs_data(self) -> bool: ...

    def __call__(
        self, traced: Traced, statistics: Statistics | None, generator: Generator
    ) -> Scores: ...


_MADE: dict[str, Callable[[], Criterion]] = {}
_ADAPTORS: list[tuple[Callable[[Any], bool], Callable[[Any], Criterion]]] = []


register = registering(_MADE, "criterion")
"""``register(name)(make)``: ``make()`` gives the criterion of that name; taken: SpecError."""


def names() -> tuple[str, ...]:
    """Registered names, sorted."""
    return tuple(sorted(_MADE))


def adapt(fits: Callable[[Any], bool], make: Callable[[Any], Criterion]) -> None:
    """Objects that ``fits`` says yes to become criteria by ``make``; earlier ones go first."""
    _ADAPTORS.append((fits, make))


def get(criterion: Any) -> Criterion:
    """A criterion by name, the object itself, or what its adaptor makes of it.

    Raises SpecError for anything else.
    """
    if isinstance(criterion, str):
        if criterion not in _MADE:
            raise unknown("criterion", criterion, _MADE)
        return _MADE[criterion]()
    made = not isinstance(criterion, type)
    if made and isinstance(criterion, Criterion) and callable(criterion):
        return criterion
    for fits, make in _ADAPTORS:
        if made and fits(criterion):
            return make(criterion)
    raise SpecError(
        f"expected the name of a criterion ({', '.join(names())}), a function of a group's "
        "channels, a torch_pruning.importance object or an object with the protocol; got "
        f"{type(criterion).__name__}"
    )


def observe_options(criterion: Criterion) -> Mapping[str, Any]:
    """Keyword options for ``observe``; without the attribute nothing beyond plain moments."""
    plain = {"gamma": 0.0, "displacement": False}
    options: Mapping[str, Any] = getattr(criterion, "observe", plain)
    return options
