"""Parts that are kept whole may branch on data; what the other branches do to channels counts too.

The example inputs take one way through such a part. Wherever Python asks a tensor for its truth or
its number there, the part is run again with another answer, so that every branch says what it does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from torch import Tensor
from torch.overrides import TorchFunctionMode

from fxprune.trees import tensors

Site: TypeAlias = tuple[Any, int]
"""A place in the code: (code object, offset of the instruction)."""

MOST = 24
"""Runs of one part; one with more branches than that is not followed through."""
_OTHERWISE: dict[str, Callable[[Any], Any]] = {
    "__bool__": lambda v: not v,
    "is_nonzero": lambda v: not v,
    "equal": lambda v: not v,
    "allclose": lambda v: not v,
    "item": lambda v: _other_number(v),
    "__int__": lambda v: v + 1,
    "__index__": lambda v: v + 1,
    "__float__": lambda v: _other_number(v),
}


def _other_number(v: Any) -> Any:
    """On the other side of zero, where most comparisons are."""
    if isinstance(v, float):
        return -v or 1.0
    return not v if isinstance(v, bool) else v + 1


class _Answers(TorchFunctionMode):
    """Other answers at the sites ``turned``, the first time each; ``seen`` are the others."""

    def __init__(self, turned: frozenset[Site]) -> None:
        super().__init__()
        self.left, self.turned = set(turned), turned
        self.seen: list[Site] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        otherwise = _OTHERWISE.get(getattr(func, "__name__", ""))
        if otherwise is None or isinstance(out, Tensor):
            return out
        frame = sys._getframe(1)
        site = (frame.f_code, frame.f_lasti)
        if site in self.left:
            self.left.discard(site)
            return otherwise(out)
        if site not in self.turned and site not in self.seen:
            self.seen.append(site)
        return out


def all_ways(run: Callable[[], Any]) -> Iterator[tuple[Any, bool]]:
    """Results of ``run()``: of the way that the data takes first, then of every other way.

    Each with whether it is the last that is followed although there are more. A way that raises is
    no way of the model's.
    """
    waiting = [frozenset[Site]()]
    done = set(waiting)
    count = 0
    while waiting:
        turned = waiting.pop(0)
        answers = _Answers(turned)
        count += 1
        try:
            with answers:
                result = run()
        except Exception:
            if not turned:
                raise
            result = None
        for site in answers.seen:
            more = turned | {site}
            if more not in done:
                done.add(more)
                waiting.append(more)
        yield result, count == MOST and bool(waiting)
        if count == MOST:
            return


def same_form(a: Any, b: Any) -> list[tuple[Tensor, Tensor]] | None:
    """Tensors of two results in pairs; None where the results differ in form."""
    first, second = tensors(a), tensors(b)
    if [t.dim() for t in first] != [t.dim() for t in second]:
        return None
    return list(zip(first, second, strict=True))
