"""How a model is called: its inputs by position, or by keyword.

Everything that runs a graph has inputs as a tuple, one entry for each placeholder. Only the user's
own class is called as the user calls it; :class:`Inputs` knows how.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

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
    """A model that takes keyword inputs, as one that takes them by position."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.model, self.inputs = model, inputs
        self.training = model.training

    def forward(self, *values: Any) -> Any:
        return self.inputs.call(self.model, values)
