"""Means and extremes over channels, and grouped products, under a cut; see ``rewrite``.

They are free only where removed channels were zero (``coupling.vanish``): so the original's mean
divides by all channels, and its maximum is never below the zeros that are gone. A grouped product
takes only rows of whole blocks of memory: zeros fill them up.
"""

from __future__ import annotations

import operator
from math import prod

import torch
from torch import fx
from torch.nn.functional import pad

from fxprune.coupling.run import Traits, call_name
from fxprune.rewrite import Rewriter, argument, keywords, number, register, source_of


def _reduced(r: Rewriter, old: fx.Node) -> tuple[int, int]:
    """Number of positions that are reduced, before the cut and after it."""
    source = r.sizes.coupling.values[source_of(old)]
    dims = argument(old, 1, "dim", keywords(old).get("axis"))
    if dims is None or dims == ():
        dims = range(len(source.shape))
    listed = [number(r, d) for d in (dims if isinstance(dims, (tuple, list, range)) else [dims])]
    now = r.sizes.shape(source)
    return prod(source.shape[d] for d in listed), prod(now[d] for d in listed)


@register("mean")
def _mean(r: Rewriter, old: fx.Node, new: fx.Node) -> None:
    r.keep_numbers(old, new)
    before, after = _reduced(r, old)
    if after != before:
        r.env[old] = r.then(new, operator.mul, after / before)


@register("amax", "amin", "max", "min")
def _extreme(r: Rewriter, old: fx.Node, new: fx.Node) -> None:
    r.keep_numbers(old, new)
    other = argument(old, 1, "other")
    if isinstance(other, fx.Node) and isinstance(r.sizes.old(other), Traits):
        return  # of two tensors
    before, after = _reduced(r, old)
    if after == before:
        return
    limit = torch.clamp_min if call_name(old) in ("amax", "max") else torch.clamp_max

    def limited(node: fx.Node) -> fx.Node:
        return r.then(node, limit, 0)

    if isinstance(r.sizes.old(old), Traits):
        r.env[old] = limited(new)
        return
    for user in old.users:  # the values of (values, indices)
        r.afterwards[user] = limited


_BLOCK = 16  # bytes


@register("grouped_mm", "_grouped_mm")
def _grouped(r: Rewriter, old: fx.Node, new: fx.Node) -> None:
    """[T, K] times one of [E, K, N]: K and N in whole blocks."""
    r.keep_numbers(old, new)
    x, w = (r.sizes.coupling.values[n.name] for n in old.all_input_nodes[:2])
    step = max(1, _BLOCK // x.dtype.itemsize)
    more = [-size % step for size in r.sizes.shape(w)[1:]]
    if not any(more) or len(x.shape) != 2 or len(w.shape) != 3:
        return
    nodes = [r.env[n] for n in old.all_input_nodes[:2]]
    padded = [
        r.graph.call_function(pad, (node, by))
        for node, by in zip(nodes, ((0, more[0]), (0, more[1], 0, more[0])), strict=True)
    ]
    instead = dict(zip(nodes, padded, strict=True))
    new.args = fx.node.map_arg(new.args, lambda n: instead.get(n, n))
    new.kwargs = fx.node.map_arg(new.kwargs, lambda n: instead.get(n, n))
    if more[1]:
        index = (slice(None), slice(0, r.sizes.shape(w)[2]))
        r.env[old] = r.then(new, operator.getitem, index)
