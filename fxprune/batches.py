"""Calibration batches out of what a loader yields, and random ones, like the example inputs.

An input may be nested: lists, tuples and mappings of tensors. What is no tensor stays as it is in
the example inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fxprune.errors import DataError
from fxprune.inputs import Inputs, divisible, samples_of

Batch = tuple[Any, ...]
TARGETS = ("labels", "label", "targets", "target", "y")

# -- from data --------------------------------------------------------------------------------


def select(item: Any, given: Inputs, i: int) -> list[Any]:
    """The model's inputs out of item ``i`` of the data."""
    examples = given.values
    if isinstance(item, Mapping) and not (len(examples) == 1 and _alike(item, examples[0])):
        return _by_name(item, given, i) if given.names else _by_shape(item, examples, i)
    if not isinstance(item, (tuple, list)) or (len(examples) == 1 and _alike(item, examples[0])):
        item = (item,)
    if len(item) and isinstance(item[0], Mapping) and given.names:
        return _by_name(item[0], given, i)  # ({name: input}, targets)
    if len(item) and isinstance(item[0], (tuple, list)) and len(examples) > 1:
        item = item[0]  # ((a, b), targets)
    inputs, _ = positional(item, examples)
    if inputs is None:
        raise DataError(
            f"batch {i} has {len(item)} values, the model takes {len(examples)} inputs; give "
            "(inputs, targets), or a tuple of all inputs"
        )
    return inputs


def positional(
    item: Sequence[Any], examples: Sequence[Any]
) -> tuple[list[Any] | None, Sequence[Any]]:
    """The inputs at the front of ``item``, None where it has too few, and what is left.

    Inputs that are no tensors may be left out: they are the example's then.
    """
    wanted = [k for k, x in enumerate(examples) if _has_tensors(x)] or list(range(len(examples)))
    others = [item[k] for k in range(min(len(item), len(examples))) if k not in wanted]
    if len(item) >= len(examples) and not any(map(_has_arrays, others)):
        return list(item[: len(examples)]), item[len(examples) :]
    if len(item) < len(wanted):
        return None, ()
    return _filled(dict(zip(wanted, item, strict=False)), examples), item[len(wanted) :]


def targets_of(item: Mapping[str, Any], inputs: Sequence[Any]) -> Any:
    """The labels in a dict of which ``inputs`` were taken: by their name, or what alone is left."""
    rest = {k: v for k, v in item.items() if not any(v is x for x in inputs)}
    named = [k for k in TARGETS if k in rest]
    return rest[named[0]] if named else next(iter(rest.values())) if len(rest) == 1 else None


def _by_name(item: Mapping[str, Any], given: Inputs, i: int) -> list[Any]:
    assert given.names is not None
    chosen = {}
    for k, (name, example) in enumerate(zip(given.names, given.values, strict=True)):
        if name in item:
            chosen[k] = item[name]
        elif _has_tensors(example):
            raise DataError(
                f"batch {i} has no input {name!r}; it has {', '.join(map(str, item)) or 'nothing'}"
            )
    return _filled(chosen, given.values)


def _by_shape(item: Mapping[str, Any], examples: Sequence[Any], i: int) -> list[Any]:
    left = list(item.values())
    chosen = []
    for example in examples:
        if not isinstance(example, Tensor):
            chosen.append(example)
            continue
        fits = [k for k, v in enumerate(left) if _tail(v) == tuple(example.shape[1:])]
        if not fits:
            found = ", ".join(f"{k}: {describe(v)}" for k, v in item.items())
            raise DataError(f"batch {i} has no value like {describe(example)}; it has {found}")
        chosen.append(left.pop(fits[0]))
    return chosen


def _filled(chosen: Mapping[int, Any], examples: Sequence[Any]) -> list[Any]:
    return [chosen.get(k, x) for k, x in enumerate(examples)]


def _alike(value: Any, example: Any) -> bool:
    """Whether a container has the form of the example, as deep as it goes."""
    if isinstance(example, Mapping):
        return isinstance(value, Mapping) and all(
            k in value and _alike(value[k], x) for k, x in example.items()
        )
    if isinstance(example, (list, tuple)):
        return (
            isinstance(value, (list, tuple))
            and len(value) == len(example)
            and all(_alike(v, x) for v, x in zip(value, example, strict=True))
        )
    if not isinstance(example, Tensor):
        return not isinstance(value, (list, tuple, Mapping))
    return isinstance(value, (Tensor, np.ndarray)) and value.ndim == example.dim()


def check_batch(values: Sequence[Any], examples: Sequence[Any], i: int) -> Batch:
    """Values as tensors in the examples' dtype and device. Raises DataError."""
    batch = tuple(_checked(v, x, i, True) for v, x in zip(values, examples, strict=True))
    count = samples_of(examples)
    if divisible(batch):
        pairs = zip(_pieces(batch), _pieces(examples), strict=True)
        lengths = {len(v) for v, x in pairs if x.dim() and len(x) == count}
        if len(lengths) > 1:
            raise DataError(
                f"the inputs of one batch have {sorted(lengths)} samples; give equally many"
            )
    return batch


def _pieces(values: Any) -> list[Tensor]:
    """Tensors that run along the batch, in the order of the inputs."""
    if isinstance(values, Tensor):
        return [values] if values.dim() else []
    if isinstance(values, Mapping):
        return [t for v in values.values() for t in _pieces(v)]
    return [t for v in values if isinstance(v, (Tensor, Mapping)) for t in _pieces(v)]


def _checked(value: Any, example: Any, i: int, batched: bool) -> Any:
    if isinstance(example, Mapping) and isinstance(value, Mapping):
        missing = [k for k in example if k not in value]
        if missing:
            raise DataError(f"batch {i} has no {missing[0]!r}; it has {', '.join(map(str, value))}")
        return {k: _checked(value[k], x, i, batched) for k, x in example.items()}
    if isinstance(example, (list, tuple)) and isinstance(value, (list, tuple)):
        if len(value) != len(example):
            raise DataError(
                f"batch {i} holds a list of {len(value)} where the example inputs hold "
                f"{len(example)}; give as many in each"
            )
        return type(example)(
            [_checked(v, x, i, False) for v, x in zip(value, example, strict=True)]
        )
    if not _has_tensors(example):
        return value
    if not isinstance(example, Tensor) or not isinstance(value, (Tensor, np.ndarray)):
        raise DataError(
            f"batch {i} holds {describe(value)} where a tensor is expected; give inputs, "
            "(inputs, targets) or a dict of inputs"
        )
    return _as_tensor(value, example, i, batched)


def _as_tensor(value: Any, example: Tensor, i: int, batched: bool) -> Tensor:
    x = torch.as_tensor(value).detach()
    fits = _tail(x) == tuple(example.shape[1:]) if batched else x.dim() == example.dim()
    if not fits:
        raise DataError(_other_shape(x, example, i))
    if x.is_floating_point() != example.is_floating_point():
        raise DataError(
            f"batch {i} is {x.dtype}, the example inputs are {example.dtype}; convert the data "
            "in the loader, scaled as in training"
        )
    if x.is_floating_point() and not bool(x.isfinite().all()):
        raise DataError(f"batch {i} holds NaN or Inf; remove such samples from the data")
    return x.to(device=example.device, dtype=example.dtype)


def _other_shape(x: Tensor, example: Tensor, i: int) -> str:
    expected = f"[N, {', '.join(map(str, example.shape[1:]))}]"
    cure = "give data of that shape, or example inputs of the data's shape"
    if x.shape == example.shape[1:]:
        cure = "single samples need a batch dim: wrap the data set in a DataLoader"
    return f"batch {i} has shape {list(x.shape)}, expected {expected} as the example inputs; {cure}"


def _tail(value: Any) -> tuple[int, ...] | None:
    shape = getattr(value, "shape", None)
    if shape is None:
        return None
    return tuple(int(n) for n in shape[1:])


def _has_arrays(value: Any) -> bool:
    return isinstance(value, np.ndarray) or _has_tensors(value)


def _has_tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))


def describe(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"{type(value).__name__} {list(shape)}"


# -- random -----------------------------------------------------------------------------------


def random_batches(given: Inputs, samples: int, batch_size: int, seed: int) -> tuple[Batch, ...]:
    """Random inputs like the example's.

    Floating tensors: uniform where the example lies in [0, 1] (images), else standard normal.
    Integers: uniform over the range of the example's own. Flags (masks; nothing but 0 and 1): rows
    of the example. Where a list holds the samples, each batch has as many as the example.
    """
    generator = torch.Generator().manual_seed(seed)
    whole = not divisible(given.values)
    count = samples_of(given.values)
    step = count if whole else batch_size
    batches = []
    for start in range(0, samples, step):
        n = None if whole else min(step, samples - start)
        batches.append(tuple(_drawn(x, n, count, generator) for x in given.values))
    return tuple(batches)


def _drawn(x: Any, n: int | None, count: int, generator: torch.Generator) -> Any:
    """``x`` with other values, and ``n`` samples in place of ``count`` (None: the same shape)."""
    if isinstance(x, Mapping):
        return {k: _drawn(v, n, count, generator) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x)([_drawn(v, None, count, generator) for v in x])
    if not isinstance(x, Tensor):
        return x
    along = n is not None and x.dim() > 0 and len(x) == count
    shape = (int(n or 0), *x.shape[1:]) if along else tuple(x.shape)
    if x.dtype == torch.bool or (not x.is_floating_point() and bool(((x == 0) | (x == 1)).all())):
        return x[torch.arange(shape[0], device=x.device) % count].clone() if along else x.clone()
    if not x.is_floating_point():
        low, high = (int(x.min()), int(x.max())) if x.numel() else (0, 0)
        y = torch.randint(low, high + 1, shape, generator=generator)
    elif _is_image(x):
        y = torch.rand(shape, generator=generator)
    else:
        y = torch.randn(shape, generator=generator)
    return y.to(device=x.device, dtype=x.dtype)


def _is_image(x: Tensor) -> bool:
    """In [0, 1] throughout, and not constant."""
    return bool(x.numel() > 1 and (x >= 0).all() and (x <= 1).all() and x.min() < x.max())
