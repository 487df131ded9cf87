"""What an export is compared on: inputs at several batch sizes and the model's own outputs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.errors import ModelError
from fxprune.inputs import Inputs, Positional
from fxprune.trees import plain

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Job:
    """One export: what every attempt needs. ``sizes`` maps a batch size to its flat inputs."""

    model: nn.Module
    inputs: tuple[Any, ...]
    opset: int | None
    tolerance: float
    names_in: tuple[str, ...]
    names_out: tuple[str, ...]
    batch: int
    batched: tuple[bool, ...]
    samples: Mapping[int, tuple[Any, ...]]
    expected: Mapping[int, tuple[NDArray[Any], ...]]


def by_position(
    model: nn.Module, example_inputs: Any
) -> tuple[nn.Module, tuple[Any, ...], tuple[str, ...] | None]:
    """(model of positional tensors, its inputs, their names in the file or None)."""
    given = Inputs.of(example_inputs)
    fixed = any(not isinstance(v, Tensor) and not pytree.tree_leaves(v) for v in given.values)
    fixed |= any(isinstance(v, (bool, int, float, str)) for v in given.values)
    if given.names is None and not fixed:
        return model, given.values, None
    made = Positional(model, given)
    single = all(isinstance(v, Tensor) for v in made.given().values)
    return made, made.given().values, made.given().names if single else None


def prepare(
    model: nn.Module,
    inputs: tuple[Any, ...],
    names: tuple[str, ...] | None,
    opset: int | None,
    tolerance: float,
    dynamic: bool,
) -> tuple[Job, list[str]]:
    """Inputs and the model's own outputs at every batch size to compare, and what went wrong."""
    leaves = pytree.tree_leaves(inputs)
    if not leaves or not all(isinstance(x, Tensor) for x in leaves):
        kinds = ", ".join(type(x).__name__ for x in leaves) or "nothing"
        raise ModelError(f"expected tensors as example inputs, got {kinds}")
    batch = next((int(x.shape[0]) for x in leaves if x.dim()), 0)
    batched = tuple(x.dim() > 0 and int(x.shape[0]) == batch for x in leaves)
    notes: list[str] = []
    sizes = [batch]
    if not dynamic:
        notes.append("a fixed batch was asked for")
    elif batch == 0:
        notes.append("the example inputs have no batch dim")
    else:
        sizes = sorted({1, 2, 3, batch} if batch < 3 else {1, 3, batch})
    samples: dict[int, tuple[Any, ...]] = {}
    expected: dict[int, tuple[NDArray[Any], ...]] = {}
    names_out: tuple[str, ...] = ()
    for n in sorted(sizes, key=lambda n: n != batch):
        given = _at_batch(inputs, batched, n)
        try:
            output = model(*given)
        except Exception as e:
            if n == batch:
                raise ModelError(
                    f"the model does not run on the example inputs: {one_line(e)}"
                ) from e
            notes.append(f"fixed batch, since the model itself fails at batch {n}: {one_line(e)}")
            samples, expected = {batch: samples[batch]}, {batch: expected[batch]}
            break
        leaves_out = pytree.tree_leaves(plain(output))
        other = any(not isinstance(leaf, (Tensor, type(None))) for leaf in leaves_out)
        if n == batch and (other or plain(output) is not output):
            model = _Plain(model)
        named = _named_outputs(plain(output))
        samples[n], expected[n] = given, tuple(as_numpy(t) for t in named.values())
        names_out = tuple(named)
    notes += _check_outputs(names_out, expected[batch])
    numbered = ("input",) if len(leaves) == 1 else tuple(f"input_{i}" for i in range(len(leaves)))
    names_in = names or numbered
    job = Job(
        model, inputs, opset, tolerance, names_in, names_out, batch, batched, samples, expected
    )
    return job, notes


def _check_outputs(names: Sequence[str], arrays: Sequence[NDArray[Any]]) -> list[str]:
    """ModelError for outputs that are not finite; a note for those that are always zero."""
    notes = []
    if not arrays:
        raise ModelError("the model returns no tensor, so there is nothing to export")
    for name, a in zip(names, arrays, strict=True):
        if not np.isfinite(a).all():
            raise ModelError(f"output {name!r} of the model holds NaN or Inf on the example inputs")
        if a.size and not a.any():
            notes.append(f"output {name!r} is zero everywhere, so its comparison proves nothing")
    return notes


def _at_batch(inputs: tuple[Any, ...], batched: Sequence[bool], n: int) -> tuple[Any, ...]:
    """Inputs of batch size n: the example's samples in turn, each a little different."""
    leaves, spec = pytree.tree_flatten(inputs)
    generator = torch.Generator().manual_seed(n)
    made = []
    for x, is_batched in zip(leaves, batched, strict=True):
        y = x.detach()
        if is_batched:
            y = y[torch.arange(n, device=y.device) % y.shape[0]]
        if y.is_floating_point():
            noise = torch.randn(y.shape, generator=generator, dtype=torch.float32).to(y)
            # An input of a single value (zeros, ones) would hide most errors.
            flat = x.numel() == 0 or bool((x == x.flatten()[0]).all())
            y = y + noise if flat else y * (1 + 0.1 * noise)
        made.append(y.contiguous())
    return tuple(pytree.tree_unflatten(made, spec))


def _named_outputs(output: Any) -> dict[str, Tensor]:
    """Tensors of a nested output in order; a dict's are named by their keys."""
    if isinstance(output, Tensor):
        return {"output": output}
    pairs, _ = pytree.tree_flatten_with_path(output)
    named: dict[str, Tensor] = {}
    for path, leaf in pairs:
        if isinstance(leaf, Tensor):
            keys = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", "")))) for k in path]
            text = "_".join(keys)
            name = f"output_{text}" if not text or text[0].isdigit() else text
            named[name if name not in named else f"{name}_{len(named)}"] = leaf
    return named


def as_numpy(t: Tensor) -> NDArray[Any]:
    """bfloat16, which numpy does not know, as float32."""
    t = t.detach().cpu()
    return np.asarray((t.float() if t.dtype is torch.bfloat16 else t).numpy())


class _Plain(nn.Module):
    """A model whose outputs hold what exporters do not know (dataclasses, flags): its tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = False

    def forward(self, *args: Any) -> Any:
        return _named_outputs(plain(self.model(*args)))


def one_line(e: BaseException, limit: int = 300) -> str:
    """Kind and text of an exception, without line breaks and terminal colours."""
    text = " ".join(_COLOURS.sub("", str(e)).split()) or "no message"
    text = text if len(text) <= limit else text[: limit - 3] + "..."
    return f"{type(e).__name__}: {text}"
