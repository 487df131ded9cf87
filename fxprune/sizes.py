"""What a plan leaves of every tensor: kept positions, new shapes, new values of sizes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.utils._pytree import tree_map_only

from fxprune.coupling.run import Traits
from fxprune.coupling.verify import first_columns
from fxprune.errors import InternalError
from fxprune.traced import Traced
from fxprune.types import BoolArray, IntArray


class Sizes:
    """Kept positions under one plan.

    Two masks over classes: ``mask`` is the plan's; ``outline`` keeps, in every balanced block, the
    *first* columns of each row instead of each row's own, so that widths can be read off each dim.
    """

    def __init__(self, traced: Traced, keep: list[BoolArray]) -> None:
        self.coupling = traced.coupling
        self.mask = self.coupling.governing.mask(keep)
        self.outline = self.coupling.governing.mask(
            [first_columns(k, g.rows) for k, g in zip(keep, traced.groups, strict=True)],
        )
        self.touched = ~(self.mask & self.outline)
        self._new: dict[str, Any] = {}
        self._kept: dict[int, tuple[IntArray | None, torch.Tensor | None]] = {}
        self._along: dict[tuple[int, int], BoolArray] = {}  # by id of a field, which values share
        self._whole: dict[int, bool] = {}

    # -- parameters ---------------------------------------------------------------------------

    def kept_index(self, name: str, dim: int) -> IntArray | None:
        """Kept positions of a parameter dim, None when all are."""
        classes = self.coupling.param_classes.get((name, dim))
        if classes is None:
            return None
        if id(classes) not in self._kept:  # many dims share one array
            kept = self.mask[classes]
            index = None if kept.all() else np.flatnonzero(kept)
            self._kept[id(classes)] = index, None if index is None else torch.from_numpy(index)
        return self._kept[id(classes)][0]

    def kept_tensor(self, name: str, dim: int) -> torch.Tensor | None:
        """``kept_index`` as a tensor on the CPU."""
        index = self.kept_index(name, dim)
        return None if index is None else self._kept[id(self.coupling.param_classes[name, dim])][1]

    # -- channels of activations --------------------------------------------------------------

    def kept_along(self, node: str | None, dim: int) -> BoolArray | None:
        """[size] kept positions along one dim of a node's output; None where it has no such dim."""
        traits = self.coupling.values.get(node or "")
        if not isinstance(traits, Traits) or not -len(traits.shape) <= dim < len(traits.shape):
            return None
        return self.positions(traits, dim % len(traits.shape))

    # -- shapes -------------------------------------------------------------------------------

    def positions(self, traits: Traits, dim: int) -> BoolArray:
        """[size] kept positions along one dim of a tensor."""
        found = [self._positions(f, dim) for f in traits.fields if f.shape[dim] > 1]
        if not found:
            return np.ones(traits.shape[dim], dtype=np.bool_)
        return found[0].copy() if len(found) == 1 else np.logical_and.reduce(found)

    def _positions(self, f: IntArray, dim: int) -> BoolArray:
        key = id(f), dim
        if key not in self._along:
            classes = self.coupling.cls[f]
            kept = np.moveaxis(self.mask[classes], dim, -1).reshape(-1, f.shape[dim])
            rows = kept[kept.any(1)]
            if len(rows) and (rows != rows[0]).any():  # each row has columns of its own
                kept = np.moveaxis(self.outline[classes], dim, -1).reshape(-1, f.shape[dim])
            self._along[key] = np.asarray(kept.any(axis=0))
        return self._along[key]

    def shape(self, traits: Traits) -> tuple[int, ...]:
        """The new shape of a tensor."""
        if all(self._stays(f) for f in traits.fields):
            return traits.shape
        return tuple(int(self.positions(traits, d).sum()) for d in range(len(traits.shape)))

    def _stays(self, f: IntArray) -> bool:
        if id(f) not in self._whole:
            self._whole[id(f)] = not self.touched[self.coupling.cls[f]].any()
        return self._whole[id(f)]

    def new_traits(self, value: Any) -> Any:
        """A node's value with every tensor's new shape (fields left out)."""
        return tree_map_only(Traits, lambda t: Traits(self.shape(t), t.dtype, ()), value)

    # -- values of graph nodes ----------------------------------------------------------------

    def old(self, node: fx.Node) -> Any:
        return self.coupling.values[node.name]

    def new(self, node: fx.Node) -> Any:
        """What the node gives in the pruned graph, if its size arithmetic stays as it is."""
        if node.name not in self._new:
            self._new[node.name] = self._evaluate(node)
        return self._new[node.name]

    def changed(self, node: fx.Node) -> bool:
        """Whether a value without tensors (a size, a shape) differs in the pruned graph."""
        old, new = self.old(node), self.new(node)
        if isinstance(old, np.ndarray):
            return not np.array_equal(old, new)
        return new is not old and not _holds_tensors(old) and bool(new != old)

    def _evaluate(self, node: fx.Node) -> Any:
        old = self.old(node)
        if _holds_tensors(old):
            return self.new_traits(old)
        inputs = node.all_input_nodes
        if not any(_shapes(self.new(n)) != _shapes(self.old(n)) for n in inputs):
            return old
        args: Any = fx.node.map_arg(node.args, self._stand_in)
        kwargs: Any = fx.node.map_arg(node.kwargs, self._stand_in)
        try:
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            if node.op == "call_function":
                return node.target(*args, **kwargs)  # type: ignore[operator]
        except (ArithmeticError, ValueError):
            return math.nan  # a head of no width, to the power of -0.5: the old number will stay
        except Exception as error:
            raise InternalError(f"size arithmetic of node {node.name} failed: {error}") from error
        return old

    def _stand_in(self, node: fx.Node) -> Any:
        def empty(t: Traits) -> torch.Tensor:
            return torch.empty(t.shape, dtype=t.dtype, device="meta")

        return tree_map_only(Traits, empty, self.new(node))


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Traits) or any(
        isinstance(v, Traits) for v in torch.utils._pytree.tree_leaves(value)
    )


def _shapes(value: Any) -> Any:
    return tree_map_only(Traits, lambda t: t.shape, value)
