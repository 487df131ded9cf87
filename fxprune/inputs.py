"""How a model is called: its inputs by position, or by keyword.

Everything that runs a graph has inputs as a tuple, one entry for each placeholder. Only the user's
own class is called as the user calls it; :class:`Inputs` knows how.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fxprune.errors import ModelError


@dataclass(frozen=True)
class Inputs:
    """Example inputs.

    values   one entry for each placeholder of the traced graph
    names    the keyword of each, or None where they are positional
    """

    values: tuple[Any, ...]
    names: tuple[str, ...] | None = None

    @classmethod
    def of(cls, example_inputs: Any) -> Inputs:
        """From one input, a tuple or list of positional inputs, or a mapping of keyword inputs."""
        if isinstance(example_inputs, Inputs):
            return example_inputs
        if isinstance(example_inputs, Mapping):
            odd = [k for k in example_inputs if not isinstance(k, str) or not k.isidentifier()]
            if odd or not example_inputs:
                raise ModelError(
                    "example_inputs as a mapping holds keyword inputs, {name: value}; got "
                    f"{f'the key {odd[0]!r}' if odd else 'none'}. An input that is itself a dict "
                    "goes into a tuple: ({...},)"
                )
            return cls(tuple(example_inputs.values()), tuple(example_inputs))
        if isinstance(example_inputs, (tuple, list)):
            return cls(tuple(example_inputs))
        return cls((example_inputs,))

    def call(self, model: Callable[..., Any], values: Sequence[Any] | None = None) -> Any:
        """``model`` on ``values`` (default: the example inputs), as the user calls it."""
        given = self.values if values is None else values
        if self.names is None:
            return model(*given)
        return model(**dict(zip(self.names, given, strict=True)))


class Positional(nn.Module):
    """A model by the tensors among its inputs alone, by position; the other inputs are fixed."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.model, self.inputs = model, inputs
        self.open = [i for i, v in enumerate(inputs.values) if _holds_tensors(v)]
        self.training = model.training

    def given(self) -> Inputs:
        """The example inputs that are left."""
        names = self.inputs.names
        return Inputs(
            tuple(self.inputs.values[i] for i in self.open),
            None if names is None else tuple(names[i] for i in self.open),
        )

    def forward(self, *values: Any) -> Any:
        given = list(self.inputs.values)
        for i, value in zip(self.open, values, strict=True):
            given[i] = value
        return self.inputs.call(self.model, given)


def _holds_tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))


# -- batches ----------------------------------------------------------------------------------


def samples_of(values: Sequence[Any]) -> int:
    """How many samples a batch has.

    First dim of the first tensor that is an input or in a mapping; where there is none, the length
    of the first list of tensors (a detector's images); 1 where there is none either.
    """
    for value in values:
        for t in _along_batch(value):
            return len(t)
    lists = (v for v in values if isinstance(v, (list, tuple)) and _holds_tensors(v))
    return next((len(v) for v in lists), 1)


def part_of(values: Sequence[Any], part: slice | Tensor) -> tuple[Any, ...]:
    """The same with ``part`` of the samples: of every tensor that is as long as the batch."""
    count = samples_of(values)

    def cut(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: cut(v) for k, v in value.items()}
        along = isinstance(value, Tensor) and value.dim() and len(value) == count
        return value[part] if along else value

    return tuple(cut(v) for v in values) if divisible(values) else tuple(values)


def longer(values: Sequence[Any]) -> tuple[Any, ...]:
    """The same with the first sample once more at the end."""
    count = samples_of(values)

    def grown(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: grown(v) for k, v in value.items()}
        along = isinstance(value, Tensor) and value.dim() and len(value) == count
        return torch.cat([value, value[:1]]) if along else value

    return tuple(grown(v) for v in values)


def divisible(values: Sequence[Any]) -> bool:
    """Whether a batch can be divided: not where a list holds the samples."""
    return any(True for v in values for _ in _along_batch(v))


def _along_batch(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from _along_batch(inner)
    elif isinstance(value, Tensor) and value.dim():
        yield value
