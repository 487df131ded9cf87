"""Allocation: how many channels each group keeps under a budget.

An allocator is a callable that takes an :class:`AllocationProblem` and returns a PrunePlan whose
cost is never above the budget.
"""

from __future__ import annotations

from collections.abc import Callable

from fxprune.allocate.budget import Bound, bounds
from fxprune.allocate.chance import chance
from fxprune.allocate.evolve import evolution
from fxprune.allocate.greedy import greedy
from fxprune.allocate.local import local
from fxprune.allocate.problem import AllocationProblem, Allocator, CostModel, LatencyModel, Prunable
from fxprune.allocate.ranked import global_threshold, isomorphic
from fxprune.allocate.uniform import uniform
from fxprune.errors import InternalError, SpecError, unknown

__all__ = [
    "AllocationProblem",
    "Allocator",
    "Bound",
    "CostModel",
    "LatencyModel",
    "Prunable",
    "bounds",
    "chance",
    "evolution",
    "get",
    "global_threshold",
    "greedy",
    "isomorphic",
    "local",
    "names",
    "register",
    "uniform",
]

_registry: dict[str, Allocator] = {}


def register(name: str) -> Callable[[Allocator], Allocator]:
    """Make an allocator known by ``name``. A duplicate is refused (InternalError)."""

    def add(allocator: Allocator) -> Allocator:
        if name in _registry:
            raise InternalError(f"allocation {name!r} is registered twice")
        _registry[name] = allocator
        return allocator

    return add


def names() -> tuple[str, ...]:
    """Names of all registered allocators, sorted."""
    return tuple(sorted(_registry))


def get(allocation: str | Allocator) -> Allocator:
    """The allocator of that name, or the object itself where it is callable.

    Raises SpecError for an unknown name or an object that cannot be called.
    """
    if isinstance(allocation, str):
        if allocation not in _registry:
            raise unknown("allocation", allocation, _registry)
        return _registry[allocation]
    if not callable(allocation):
        raise SpecError(
            f"allocation must be a name ({', '.join(names())}) or a callable that takes an "
            f"AllocationProblem; got {type(allocation).__name__}"
        )
    return allocation


register("uniform")(uniform)
register("global")(global_threshold)
register("isomorphic")(isomorphic)
register("local")(local)
register("evolution")(evolution)
register("random")(chance)
register("greedy")(greedy)
