"""How much is each channel worth? ``get(name)`` makes a criterion, ``register(name)`` adds one.

A criterion is

- a name: attention (the default), reconstruction, taylor, hessian, l1, l2, bn_scale, fpgm, lamp,
  random;
- one function of a group's channels (:mod:`fxprune.criteria.channels`);
- any ``torch_pruning.importance`` object;
- an object with the :class:`Criterion` protocol.
"""

from fxprune.criteria.adaptor import TorchPruningCriterion, is_importance
from fxprune.criteria.attention import AttentionCriterion
from fxprune.criteria.chance import RandomCriterion
from fxprune.criteria.channels import Channels, PerGroup
from fxprune.criteria.gradient import HessianCriterion, TaylorCriterion
from fxprune.criteria.magnitude import MagnitudeCriterion
from fxprune.criteria.maps import AttentionMap, attention_maps
from fxprune.criteria.registry import (
    Criterion,
    Generator,
    Scores,
    adapt,
    get,
    names,
    observe_options,
    register,
)
from fxprune.criteria.weights import bn_scale, fpgm, lamp
from fxprune.gradients import Labelled

__all__ = [
    "AttentionCriterion",
    "AttentionMap",
    "Channels",
    "Criterion",
    "Generator",
    "HessianCriterion",
    "Labelled",
    "MagnitudeCriterion",
    "PerGroup",
    "RandomCriterion",
    "Scores",
    "TaylorCriterion",
    "TorchPruningCriterion",
    "attention_maps",
    "bn_scale",
    "fpgm",
    "get",
    "lamp",
    "names",
    "observe_options",
    "register",
]

adapt(is_importance, TorchPruningCriterion)
adapt(callable, PerGroup)
