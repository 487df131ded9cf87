"""How much is each channel worth? ``get(name)`` makes a criterion, ``register(name)`` adds one."""

from fxprune.criteria.attention import AttentionCriterion
from fxprune.criteria.chance import RandomCriterion
from fxprune.criteria.magnitude import MagnitudeCriterion
from fxprune.criteria.registry import (
    Criterion,
    Generator,
    Scores,
    get,
    names,
    observe_options,
    register,
)

__all__ = [
    "AttentionCriterion",
    "Criterion",
    "Generator",
    "MagnitudeCriterion",
    "RandomCriterion",
    "Scores",
    "get",
    "names",
    "observe_options",
    "register",
]
