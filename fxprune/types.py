"""The frozen dataclasses that travel between stages. No stage logic lives here.

Legend for shapes: n channels of a group, k positions of one channel along a dim, C input channels
of a consumer, P plans, G groups.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from fxprune.errors import PlanError

IntArray: TypeAlias = NDArray[np.int64]
FloatArray: TypeAlias = NDArray[np.float64]
BoolArray: TypeAlias = NDArray[np.bool_]
T = TypeVar("T")
Rounding: TypeAlias = Mapping[str, IntArray]


class Parts(Sequence[IntArray]):
    """Arrays that lie one after the other: part i is ``flat[ends[i]:ends[i + 1]]``."""

    def __init__(self, flat: IntArray, ends: IntArray) -> None:
        self._flat, self._ends = flat, ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return tuple(self[j] for j in range(*i.indices(len(self))))
        at = range(len(self))[i]
        return self._flat[self._ends[at] : self._ends[at + 1]]


class Placed(Sequence[T]):
    """Members or uses of one group, each made when it is first asked for.

    A network in which every layer reads all before it has as many as layers squared. Number i is
    ``kind(*keys[slots[i]], index)`` with the positions ``flat[spans[i, 0]:spans[i, 1]]`` as
    ``index`` of ``counts[i]`` rows.
    """

    def __init__(
        self,
        kind: Callable[..., T],
        keys: Sequence[tuple[Any, ...]],
        flat: IntArray,
        slots: IntArray,
        spans: IntArray,
        counts: IntArray,
    ) -> None:
        self._kind, self._keys, self._flat = kind, keys, flat
        self.slots, self._spans, self._counts = slots, spans, counts
        self._made: list[T | None] = [None] * len(slots)

    def __len__(self) -> int:
        return len(self._made)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return tuple(self[j] for j in range(*i.indices(len(self))))
        made = self._made[i]
        if made is None:
            start, stop = self._spans[i].tolist()
            index = self._flat[start:stop].reshape(self._counts[i], -1)
            made = self._made[i] = self._kind(*self._keys[self.slots[i]], index)
        return made


@dataclass(frozen=True)
class Member:
    """Where a group's channels lie in one parameter or buffer.

    ``index`` [n, k]: the k positions of each channel along ``dim`` (k = 49 for a 7x7 flatten).
    """

    param: str
    dim: int
    index: IntArray


@dataclass(frozen=True)
class Use:
    """Where a group's channels enter one consumer: ``index`` [n, k] among its C input channels."""

    consumer: str
    index: IntArray


@dataclass(frozen=True)
class Consumer:
    """One product of an activation with a parameter: a convolution or a matrix product.

    key       "node:i", the i-th such product inside that graph node; unique
    kind      "conv" (input [N, C, *], weight [O, C/groups, *]; transposed: [C, O/groups, *]) or
              "linear" (input [M, C], weight viewed as out_dim x in_dim)
    classes   [C] channel class of each input channel, -1 where it is not labelled
    norm      path of the batch normalisation module that takes this output directly, if any
    """

    key: str
    node: str
    kind: str
    weight: str
    bias: str | None
    in_dim: int
    out_dim: int
    groups: int
    transposed: bool
    classes: IntArray
    norm: str | None = None


@dataclass(frozen=True)
class ChannelGroup:
    """Channels of one kind that can be removed one by one.

    n         number of channels
    rows      1, or the number of rows of a balanced block: channel r * (n // rows) + c is column c
              of row r, and every row keeps the same number of columns (each its own best ones)
    members   positions in parameters and buffers
    uses      positions in the inputs of consumers
    nodes     graph nodes whose output carries the channels
    classes   n integer arrays: the channel classes that go with each channel
    locked    None, or the reason why no channel may go
    overlaps  names of groups that govern some of the same parameter positions (attention heads and
              the dims of each head); a position is kept when all of its groups keep it
    """

    name: str
    n: int
    rows: int
    members: Sequence[Member]
    uses: Sequence[Use]
    nodes: tuple[str, ...]
    classes: Sequence[IntArray]
    locked: str | None = None
    overlaps: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """Columns of each row; equals n for a plain group."""
        return self.n // self.rows

    def step(self, round_to: int) -> int:
        """Granularity of the kept count of each row.

        ``round_to``; a group too small for four such steps takes the largest power of two that
        leaves it at least four steps.
        """
        step = max(1, round_to)
        if self.width >= 4 * step:
            return step
        return 1 << max(0, (self.width // 4).bit_length() - 1)

    def choices(self, round_to: int | Rounding) -> IntArray:
        """Allowed kept counts of each row, ascending; the last one is the full width.

        ``round_to``: a step (see :meth:`step`), or the allowed counts of each group by its name;
        a group that is not among them keeps all.
        """
        whole = np.array([self.width], dtype=np.int64)
        if self.locked is not None:
            return whole
        if isinstance(round_to, Mapping):
            given = np.asarray(round_to.get(self.name, whole), dtype=np.int64)
            return np.union1d(given[(given >= 1) & (given < self.width)], whole)
        step = self.step(round_to)
        counts = np.arange(step, self.width + 1, step, dtype=np.int64)
        return counts if counts[-1] == self.width else np.append(counts, self.width)


@dataclass(frozen=True)
class PrunePlan:
    """Kept channel indices of each group, ascending; groups not named keep all. No tensors."""

    kept: Mapping[str, tuple[int, ...]]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        body = {"kept": {k: list(v) for k, v in self.kept.items()}, "meta": dict(self.meta)}
        return json.dumps(body, indent=1)

    @classmethod
    def from_json(cls, text: str) -> PrunePlan:
        """Inverse of :meth:`to_json`. Raises PlanError on anything else."""
        try:
            body = json.loads(text)
            kept = {str(k): tuple(int(i) for i in v) for k, v in body["kept"].items()}
            return cls(kept, dict(body.get("meta", {})))
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise PlanError(
                'expected a plan as JSON, {"kept": {group: [indices]}}; '
                f"got something else ({e})"
            ) from e


@dataclass(frozen=True)
class Cost:
    """Of one forward pass at the example inputs' batch size (macs, memory) and of the weights.

    macs: multiply-adds of convolutions, matrix products and attention; params: learnable scalars;
    bytes: parameters and buffers in their own dtype; memory: peak activation bytes (``cost``).
    """

    macs: int
    params: int
    bytes: int
    memory: int = 0


@dataclass(frozen=True)
class Budget:
    """Upper bounds; all must hold.

    Each is a share of the original in (0, 1] (0.5, "50%"), or an absolute value with its unit
    ("300 MMACs", "5M params", "2.5 MB", "4 ms"); a whole number above 1 counts MACs, parameters or
    bytes. memory: peak activation bytes at the example inputs' batch; latency: of one forward pass
    on the target that is named beside the budget.
    """

    macs: float | str | None = None
    params: float | str | None = None
    bytes: float | str | None = None
    memory: float | str | None = None
    latency: float | str | None = None
