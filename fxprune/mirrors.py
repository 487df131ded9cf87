"""Numbers in the user's own modules that mirror widths: they follow as the graph's literals do.

A module that reshapes to ``self.num_heads, self.head_dim`` leaves two literals in the graph. Where
the graph of the pruned model has one other number instead of the old one, the attributes of that
module that hold the old one are set to the new one. Whether that is right is for ``agree`` to say,
and for ``same_numbers``: a scale of ``self.head_dim ** -0.5`` has to stay what it was.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, TypeAlias

from torch import fx, nn

from fxprune.coupling.run import call_name
from fxprune.leaves import is_changed, is_leaf
from fxprune.rewrite import HANDLERS
from fxprune.tracing import WITHIN

Numbers: TypeAlias = dict[str, dict[int, int]]  # path of a module -> old number -> new number


def changed_numbers(before: fx.Graph, after: fx.Graph) -> Numbers:
    """What literals of ``before`` became, for each module that wrote them; doubts left out.

    A number that stays in one place and changes in another (the 3 of q, k and v, and three heads)
    is taken for one that changes.
    """
    twins = {n.name: n for n in after.nodes}
    seen: dict[str, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for node in before.nodes:
        twin, path = twins.get(node.name), node.meta.get(WITHIN)
        if twin is None or path is None or node.op not in ("call_function", "call_method"):
            continue
        old, new = (_flat(n.args) + _flat(dict(n.kwargs)) for n in (node, twin))
        if len(old) != len(new):
            continue  # written in another form
        for a, b in zip(old, new, strict=True):
            if type(a) is int and type(b) is int:
                seen[path][a].add(b)
    found: Numbers = {}
    for path, numbers in seen.items():
        sure = {a: next(iter(b - {a})) for a, b in numbers.items() if len(b - {a}) == 1}
        if sure:
            found[path] = sure
    return found


def same_numbers(before: fx.Graph, after: fx.Graph, makes: Callable[[fx.Node], bool]) -> bool:
    """Whether two traces of one class calculate with the same numbers.

    makes: whether a node of ``before`` gives tensors. Whole numbers of those whose constants follow
    the widths (views, splits) may differ, and all that only sizes are made from.
    """
    twins = {n.name: n for n in after.nodes}
    for node in before.nodes:
        if node.op not in ("call_function", "call_method") or not makes(node):
            continue
        twin = twins.get(node.name)
        if twin is None or twin.target != node.target:
            return False
        follows = call_name(node) in HANDLERS
        old, new = (
            [i for i in _flat(n.args) + _flat(dict(n.kwargs)) if not (follows and type(i) is int)]
            for n in (node, twin)
        )
        if old != new:
            return False
    return True


def _flat(value: Any) -> list[int | float | None]:
    """The numbers in nested arguments, in order; None for all that is no number."""
    if type(value) in (int, float):
        return [value]
    if isinstance(value, dict):
        return [i for v in value.values() for i in _flat(v)]
    if isinstance(value, (tuple, list)):
        return [i for v in value for i in _flat(v)]
    if isinstance(value, slice):
        return _flat((value.start, value.stop, value.step))
    return [None]


def mirror(model: nn.Module, numbers: Numbers) -> bool:
    """Put the new numbers into the attributes of ``model``'s modules; whether any changed."""
    changed = False
    for path, module in model.named_modules():
        known = numbers.get(path)
        if known is None or (is_leaf(module) and not is_changed(module)):
            continue
        own = module.__dict__
        for name, value in list(own.items()):
            new = _mirrored(value, known)
            if new != value:
                own[name], changed = new, True
    return changed


def _mirrored(value: Any, known: dict[int, int]) -> Any:
    if type(value) is int:
        return known.get(value, value)
    if type(value) in (tuple, list) and all(type(v) is int for v in value):
        return type(value)(known.get(v, v) for v in value)
    return value
