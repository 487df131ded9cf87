"""Equal calls that say more: what cannot be cut as it is written, written so that it can be."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from fxprune import norms
from fxprune.values import named


def rephrase(graph: fx.Graph) -> bool:
    """Rewrite ``graph`` in place; nodes carry their values in ``meta["value"]``.

    Returns whether anything was rewritten.
    """
    nodes = list(graph.nodes)
    for node in nodes:
        _shaped_in_place(graph, node)
    for node in list(graph.nodes):
        _repeated_heads(graph, node)
        _repeated_once(graph, node)
        _form_alone(graph, node)
        norms.by_hand(graph, node)
    return list(graph.nodes) != nodes


_SHAPED = ("squeeze_", "unsqueeze_", "transpose_", "swapaxes_", "swapdims_", "t_")


def _shaped_in_place(graph: fx.Graph, node: fx.Node) -> None:
    """x.squeeze_(1): what uses x from there on uses x.squeeze(1), under all of its names."""
    source: Any = node.args[0] if node.args else None
    if node.op != "call_method" or node.target not in _SHAPED or source.op == "get_attr":
        return
    value, nodes = source.meta.get("value"), list(graph.nodes)
    if not isinstance(value, Tensor):
        return
    before, later = nodes[: nodes.index(node)], set(nodes[nodes.index(node) + 1 :])
    with graph.inserting_before(node):
        made = graph.call_method(str(node.target)[:-1], node.args, node.kwargs)
    made.meta.update(node.meta)
    for n in (*before, node):
        if n.meta.get("value") is value:
            n.replace_all_uses_with(made, lambda user: user in later)
    graph.erase_node(node)


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


def _repeated_once(graph: fx.Graph, node: fx.Node) -> None:
    """index.repeat(1, 1, c), where that dim had size 1, is an expansion: its extent may be cut."""
    if node.op != "call_method" or node.target != "repeat" or node.kwargs:
        return
    x: Any = node.args[0]
    given: Any = node.args[1] if isinstance(node.args[1], (list, tuple)) else node.args[1:]
    before, after = x.meta.get("value"), node.meta.get("value")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return
    if len(given) != before.dim() or any(isinstance(n, fx.Node) and _holds_more(n) for n in given):
        return
    same = [a == b for a, b in zip(before.shape, after.shape, strict=True)]
    if not all(e or s == 1 for e, s in zip(same, before.shape, strict=True)):
        return
    if all(same[1:]) and (all(same) or not _is_width(given[0])):
        return  # as often as there are samples
    sizes = tuple(-1 if e and n == 1 else n for e, n in zip(same, given, strict=True))
    with graph.inserting_before(node):
        grown = graph.call_method("expand", (x, *sizes))
        made = graph.call_method("clone", (grown,))
    grown.meta["value"] = made.meta["value"] = after
    node.replace_all_uses_with(made)
    graph.erase_node(node)


def _is_width(count: Any) -> bool:
    """Whether a size is a number, or the size of a dim other than the first."""
    if not isinstance(count, fx.Node):
        return True
    named_so = named(count) in ("getitem", "size") and len(count.args) > 1
    return named_so and isinstance(count.args[1], int) and count.args[1] != 0


def _holds_more(node: fx.Node) -> bool:
    return not isinstance(node.meta.get("value"), int)


def _form_alone(graph: fx.Graph, node: fx.Node) -> None:
    """x[:, :, -1] or x[..., :1], of which only the form is used: nobody reads that position."""
    if named(node) != "getitem" or not isinstance(node.args[1], tuple):
        return
    source: Any = node.args[0]
    before, after = source.meta.get("value"), node.meta.get("value")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor) or not node.users:
        return
    index = _spelled_out(node.args[1], before)
    if not any(i != slice(None) for i in index) or len(index) != before.dim():
        return
    if not all(_asks_for_form(user, node) for user in node.users):
        return
    kept = [d for d, i in enumerate(index) if not isinstance(i, int)]
    with graph.inserting_before(node):
        shape = graph.call_function(getattr, (source, "shape"))
        sizes: list[Any] = [1] * len(kept)
        for i, d in enumerate(kept):
            if index[d] == slice(None):
                sizes[i] = graph.call_function(operator.getitem, (shape, d))
                sizes[i].meta["value"] = before.shape[d]
        made = graph.call_method("new_empty", (source, tuple(sizes)))
    shape.meta["value"] = before.shape
    made.meta["value"] = after
    node.replace_all_uses_with(made)
    graph.erase_node(node)


def _spelled_out(index: tuple[Any, ...], x: Tensor) -> list[Any]:
    """One number or slice for each dim, a slice being all or one position; else nothing."""
    whole = [slice(None)] * (x.dim() - len(index) + (Ellipsis in index))
    at = index.index(Ellipsis) if Ellipsis in index else len(index)
    spelled = [*index[:at], *whole, *index[at + 1 :]]
    for i, s in zip(spelled, x.shape, strict=False):
        numbers = (i.start, i.stop, i.step) if isinstance(i, slice) else (i,)
        if not all(n is None or type(n) is int for n in numbers) or i is None:
            return []
        if isinstance(i, slice) and i != slice(None) and len(range(*i.indices(s))) != 1:
            return []
    return spelled


_FORMS = ("shape", "device", "dtype")
_CALLS = (
    "size", "dim", "numel", "len", "zeros_like", "ones_like", "full_like", "empty_like",
    "rand_like", "randn_like",
)  # fmt: skip


def _asks_for_form(user: fx.Node, node: fx.Node) -> bool:
    if named(user) == "getattr":
        return user.args[1] in _FORMS
    return named(user) in _CALLS and user.args[0] is node
