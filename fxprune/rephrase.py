"""Equal calls that say more: what cannot be cut as it is written, written so that it can be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxprune.values import named


def rephrase(graph: fx.Graph) -> None:
    """Rewrite ``graph`` in place; nodes carry their values in ``meta["value"]``."""
    for node in list(graph.nodes):
        _repeated_heads(graph, node)


def _repeated_heads(graph: fx.Graph, node: fx.Node) -> None:
    """x[:, :, None].expand(b, h, r, n, d).reshape(b, h * r, n, d) repeats each head r times.

    An expanded dim may be cut like any other; here it is no dim of its own.
    """
    if named(node) not in ("reshape", "view", "flatten") or not node.args:
        return
    source: Any = node.args[0]
    if not isinstance(source, fx.Node) or named(source) != "expand" or len(source.users) > 1:
        return
    x: Any = source.args[0]
    values = [n.meta.get("value") for n in (x, source, node)]
    if not all(isinstance(t, Tensor) for t in values):
        return
    before, grown, after = (t for t in values if isinstance(t, Tensor))
    dims = [d for d, s in enumerate(grown.shape) if s != before.shape[d - grown.dim()]]
    if before.dim() != grown.dim() or len(dims) != 1 or dims[0] == 0:
        return
    dim, count = dims[0], grown.shape[dims[0]]
    merged = [*grown.shape[: dim - 1], grown.shape[dim - 1] * count, *grown.shape[dim + 1 :]]
    if list(after.shape) != merged or grown.shape[dim - 1] == 1:
        return
    with graph.inserting_before(node):
        squeezed = graph.call_method("squeeze", (x, dim))
        made = graph.call_method("repeat_interleave", (squeezed, count, dim - 1))
    squeezed.meta["value"] = before.squeeze(dim)
    made.meta["value"] = torch.empty(merged, dtype=after.dtype, device="meta")
    node.replace_all_uses_with(made)
    graph.erase_node(node)
    graph.erase_node(source)
