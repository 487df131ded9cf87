"""Indexing and slicing of channels under a cut, as rewriting rules; see ``rewrite``."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from torch import fx

from fxprune.coupling.run import Traits, call_name
from fxprune.errors import InternalError
from fxprune.rewrite import (
    Rewriter,
    argument,
    arguments,
    keywords,
    number,
    register,
    set_argument,
    source_of,
)
from fxprune.types import BoolArray, IntArray


def _moved_slice(r: Rewriter, s: Any, traits: Traits, dim: int) -> Any:
    """A slice along ``dim`` in terms of kept positions; None when it need not change."""
    kept = r.sizes.positions(traits, dim)
    if kept.all() or s == slice(None):
        return None
    start, stop, step = (number(r, v) for v in (s.start, s.stop, s.step))
    taken = np.arange(traits.shape[dim])[slice(start, stop, step)]
    moved = (np.cumsum(kept) - 1)[taken[kept[taken]]]
    if len(moved) == 0:
        return slice(0, 0)
    steps = np.unique(np.diff(moved))
    if len(steps) == 0:
        return slice(int(moved[0]), int(moved[0]) + 1)
    if len(steps) == 1 and steps[0] > 0:
        step = int(steps[0])
        return slice(int(moved[0]), int(moved[-1]) + 1, None if step == 1 else step)
    return moved.tolist()


@register("getitem", "setitem")
def _getitem(r: Rewriter, old: fx.Node, new: fx.Node) -> None:
    source = r.sizes.old(arguments(old)[0])
    if not isinstance(source, Traits):
        return
    index = arguments(old)[1] if isinstance(arguments(old)[1], tuple) else (arguments(old)[1],)
    if any(isinstance(i, fx.Node) and isinstance(r.sizes.old(i), tuple) for i in index):
        return
    r.keep_numbers(old, new)  # a bound that says the size of another dim
    made, changed = _moved_index(r, index, source)
    if changed:
        new.args = (r.env[arguments(old)[0]], made, *new.args[2:])


def _moved_index(
    r: Rewriter, index: tuple[Any, ...], source: Traits
) -> tuple[tuple[Any, ...], bool]:
    used = sum(1 for i in index if i is not None and i is not Ellipsis)
    dim, made, changed = 0, [], False
    for i in index:
        if i is Ellipsis:
            dim += len(source.shape) - used
        elif isinstance(i, slice):
            moved = _moved_slice(r, i, source, dim)
            changed |= moved is not None
            made.append(_copied(r, i) if moved is None else moved)
            dim += 1
            continue
        elif i is not None:
            at = number(r, i)
            kept = r.sizes.positions(source, dim)
            dim += 1
            order = _constant(i)
            if not kept.all() and (isinstance(at, int) or order is not None):
                moved = int(np.cumsum(kept)[at] - 1) if order is None else _moved_order(kept, order)
                made.append(moved)
                changed = True
                continue
        made.append(_copied(r, i))
    return tuple(made), changed


def _constant(index: Any) -> IntArray | None:
    """[K] positions of an index that is a list of numbers or an integer buffer."""
    if isinstance(index, fx.Node) and index.op == "get_attr":
        module: Any = index.graph.owning_module
        for atom in str(index.target).split("."):
            module = getattr(module, atom)
        index = module
    if isinstance(index, torch.Tensor) and index.dim() == 1 and index.dtype == torch.int64:
        return np.asarray(index.cpu().numpy())
    listed = isinstance(index, (list, tuple)) and all(isinstance(i, int) for i in index)
    return np.asarray(index, dtype=np.int64) if listed and index else None


def _moved_order(kept: BoolArray, order: IntArray | None) -> list[int]:
    """Where the positions ``order``, as far as they are kept, lie among the kept ones."""
    if order is None:
        raise InternalError("channels are indexed by values that are no constants")
    order = order % len(kept)
    return [int(i) for i in (np.cumsum(kept) - 1)[order[kept[order]]]]


def _copied(r: Rewriter, value: Any) -> Any:
    return fx.node.map_arg(value, r.original)


@register("index_select", "roll")
def _reorder(r: Rewriter, old: fx.Node, new: fx.Node) -> None:
    """Positions along channel dims, of which some are gone, are given as a list."""
    source = r.sizes.coupling.values[source_of(old)]
    ndim = len(source.shape)
    shifts: dict[int, int] = {}
    orders: dict[int, IntArray | None] = {}
    if call_name(old) == "roll":
        shifts = _shifts(argument(old, 1, "shifts"), argument(old, 2, "dims", ()), ndim)
        orders = {d: np.roll(np.arange(source.shape[d]), s) for d, s in shifts.items()}
    else:
        orders[argument(old, 1, "dim") % ndim] = _constant(argument(old, 2, "index"))
    hit = [d for d in orders if not r.sizes.positions(source, d).all()]
    if not hit:
        r.keep_numbers(old, new)
        return
    rest = {d: s for d, s in shifts.items() if d not in hit}
    steps: list[tuple[Any, tuple[Any, ...]]] = []
    if rest:
        steps.append((torch.roll, (tuple(rest.values()), tuple(rest))))
    for d in hit:
        kept = r.sizes.positions(source, d)
        moved = _moved_order(kept, orders[d])
        steps.append((operator.getitem, ((*[slice(None)] * d, moved),)))
    value: fx.Node = r.env[old.all_input_nodes[0]]
    for i, (target, args) in enumerate(steps):
        if i == 0:
            new.op, new.target, new.args, new.kwargs = "call_function", target, (value, *args), {}
            value = new
        else:
            with r.graph.inserting_after(value):
                value = r.graph.call_function(target, (value, *args))
    r.env[old] = value


def _shifts(shifts: Any, dims: Any, ndim: int) -> dict[int, int]:
    """dim -> shift of a roll; nothing where the whole tensor is rolled as one vector."""
    lists = [list(v) if isinstance(v, (list, tuple)) else [v] for v in (shifts, dims)]
    return {d % ndim: s for s, d in zip(*lists, strict=True)} if lists[1] else {}


@register("narrow", "select")
def _narrow(r: Rewriter, old: fx.Node, new: fx.Node) -> None:
    source = r.sizes.old(arguments(old)[0])
    names = ("dim", "start", "length") if call_name(old) == "narrow" else ("dim", "index")
    values = dict(zip(names, arguments(old)[1:], strict=False)) | dict(keywords(old))
    dim = values["dim"] % len(source.shape)
    if r.sizes.positions(source, dim).all():
        r.keep_numbers(old, new)
        return
    if "start" in values:
        start = number(r, values["start"])
        item: Any = slice(start, start + number(r, values["length"]))
    else:
        item = values["index"]
    index = (*[slice(None)] * dim, item)
    made, _ = _moved_index(r, index, source)
    new.op, new.target = "call_function", operator.getitem
    new.args, new.kwargs = (r.env[arguments(old)[0]], made), {}


@register("repeat", "tile")
def _repeat(r: Rewriter, old: fx.Node, new: fx.Node) -> None:
    """x.repeat(n, 1, 1): how often a dim comes, which sizes that the plan changes may say."""
    source, result = r.sizes.coupling.values[source_of(old)], r.sizes.old(old)
    key = next((k for k in ("repeats", "dims") if k in keywords(old)), None)
    given = keywords(old)[key] if key else arguments(old)[1:]
    if len(given) == 1 and isinstance(given[0], (list, tuple)):
        given = given[0]
    if isinstance(given, fx.Node) or any(isinstance(number(r, n), (tuple, list)) for n in given):
        r.keep_numbers(old, new)
        return
    ahead = len(result.shape) - len(source.shape)
    ends = [(1,) * ahead + shape for shape in (source.shape, r.sizes.shape(source))]
    counts = [
        [b // max(a, 1) for a, b in zip(end, shape, strict=True)]
        for end, shape in zip(ends, (result.shape, r.sizes.shape(result)), strict=True)
    ]
    made = list(given)
    for i, n in enumerate(given):
        before, after = (c[len(result.shape) - len(given) + i] for c in counts)
        same = before == after or not isinstance(n, fx.Node)
        made[i] = r.original(n) if same and isinstance(n, fx.Node) else r.scaled(n, after)
    if key:
        new.kwargs = {**new.kwargs, key: tuple(made)}
    else:
        new.args = (r.env[old.all_input_nodes[0]], tuple(made))


@register("repeat_interleave")
def _interleave(r: Rewriter, old: fx.Node, new: fx.Node) -> None:
    """``output_size``, where it is given, is a size."""
    r.keep_numbers(old, new)
    dim = argument(old, 2, "dim")
    if "output_size" in keywords(old) and isinstance(dim, int):
        want = r.sizes.shape(r.sizes.old(old))[dim]
        given = keywords(old)["output_size"]
        if want != number(r, given) or isinstance(given, fx.Node):
            new.kwargs = {**new.kwargs, "output_size": r.scaled(given, want)}


@register("pad")
def _pad(r: Rewriter, old: fx.Node, new: fx.Node) -> None:
    """Of the zeros before and after the channels some are gone too."""
    r.keep_numbers(old, new)
    result, pads = r.sizes.old(old), argument(old, 1, "pad")
    if not isinstance(pads, (list, tuple)):
        return
    made = []
    for i, n in enumerate(pads):
        kept = r.sizes.positions(result, len(result.shape) - 1 - i // 2)
        side = kept[len(kept) - number(r, n) :] if i % 2 else kept[: number(r, n)]
        made.append(r.original(n) if kept.all() and isinstance(n, fx.Node) else n)
        if not kept.all():
            made[i] = r.scaled(n, int(side.sum()))
    set_argument(new, 1, "pad", tuple(made))


@register("view_as_complex")
def _complex(r: Rewriter, old: fx.Node, new: fx.Node) -> None:
    """Pairs of numbers must lie at even places, which they do in memory of their own."""
    with r.graph.inserting_before(new):
        whole = r.graph.call_method("contiguous", (r.env[old.all_input_nodes[0]],))
    new.args = (whole,)
