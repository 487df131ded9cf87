"""Layer norms as written by hand, written as what they are.

    u = x.mean(dim, keepdim=True); s = (x - u).pow(2).mean(dim, keepdim=True)
    y = (x - u) / torch.sqrt(s + eps)

With fewer channels such a norm takes its statistics over those that are left, as F.layer_norm does;
as a sum of squares of what is not zero it could not lose any.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxprune.values import named

_PRECISION = 64  # times the rounding error of the dtype


def by_hand(graph: fx.Graph, node: fx.Node) -> None:
    """Replace ``node`` where it is the quotient in which such a norm ends; values in ``meta``."""
    parts = _quotient(node)
    if parts is None:
        return
    centred, scale = parts
    x, dim = _centred(centred)
    eps = _eps(scale)
    value, given = node.meta.get("value"), None if x is None else x.meta.get("value")
    if x is None or dim is None or eps is None or not isinstance(given, Tensor):
        return
    if not isinstance(value, Tensor) or value.shape != given.shape or not value.is_floating_point():
        return
    if not _same(value, _norm(given, dim, eps)):
        return
    last = given.dim() - 1
    with graph.inserting_before(node):
        moved = x if dim == last else graph.call_method("transpose", (x, dim, last))
        shape = graph.call_function(getattr, (moved, "shape"))
        size = graph.call_function(operator.getitem, (shape, -1))
        made = graph.call_function(F.layer_norm, (moved, (size,)), {"eps": eps})
        back = made if dim == last else graph.call_method("transpose", (made, dim, last))
    turned = given.transpose(dim, last)
    for n, v in ((moved, turned), (shape, turned.shape), (size, turned.shape[-1])):
        n.meta.setdefault("value", v)
    made.meta["value"], back.meta["value"] = value.transpose(dim, last), value
    node.replace_all_uses_with(back)
    graph.erase_node(node)


def _norm(x: Tensor, dim: int, eps: float) -> Tensor:
    turned = x.transpose(dim, -1)
    return F.layer_norm(turned, turned.shape[-1:], eps=eps).transpose(dim, -1)


def _same(a: Tensor, b: Tensor) -> bool:
    if a.device.type == "meta":
        return False
    scale = float(a.abs().max()) or 1.0
    return bool((a - b).abs().max() <= _PRECISION * torch.finfo(a.dtype).eps * scale)


def _quotient(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(x - u) and the node that holds variance + eps, of (x - u) / sqrt(.) or (x - u) * rsqrt(.)"""
    wanted = {"truediv": "sqrt", "div": "sqrt", "mul": "rsqrt"}.get(named(node))
    if wanted is None or len(node.args) != 2:
        return None
    for first, second in (node.args, node.args[::-1]):
        if isinstance(first, fx.Node) and isinstance(second, fx.Node) and named(first) == "sub":
            half = named(second) == "pow" and second.args[1:] == (
                0.5 if wanted == "sqrt" else -0.5,
            )
            if named(second) == wanted or half:
                inside: Any = second.args[0]
                return first, inside
        if named(node) != "mul":
            break
    return None


def _centred(node: fx.Node) -> tuple[fx.Node | None, int | None]:
    """x and the one dim over which its mean is taken, of x - x.mean(dim, keepdim=True)"""
    x, mean = (*node.args, None, None)[:2]
    if not isinstance(x, fx.Node) or not isinstance(mean, fx.Node) or named(mean) != "mean":
        return None, None
    dims: Any = mean.kwargs.get("dim", mean.args[1] if len(mean.args) > 1 else None)
    listed = dims if isinstance(dims, (tuple, list)) else (dims,)
    value = x.meta.get("value")
    if mean.args[0] is not x or len(listed) != 1 or not isinstance(listed[0], int):
        return None, None
    return x, listed[0] % value.dim() if isinstance(value, Tensor) else None


def _eps(node: fx.Node) -> float | None:
    """The number that is added to the variance."""
    if not isinstance(node, fx.Node) or named(node) != "add":
        return None
    numbers = [a for a in node.args if isinstance(a, (int, float))]
    return float(numbers[0]) if len(numbers) == 1 else None
