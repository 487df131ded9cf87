"""Any ``torch_pruning.importance`` object as a criterion.

    fxprune.prune(model, x, 0.5, data, criterion=tp.importance.GroupMagnitudeImportance(p=2))

Torch-Pruning scores a list of (layer, pruning function, indices). The groups here say the same in
positions of parameters, so the list is written from them: for each layer with a ``weight``, its
outputs or its inputs, each position with the channel that it belongs to. Importances that read
gradients (Taylor, Hessian, OBD-C) find those that the caller left on the model's parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch_pruning as tp
from torch import Tensor, nn

from fxprune.criteria.channels import Channels
from fxprune.criteria.registry import Generator, Scores
from fxprune.errors import FxpruneError, InputError
from fxprune.observe import Statistics
from fxprune.types import FloatArray, Member

if TYPE_CHECKING:
    from fxprune.traced import Traced


@dataclass(frozen=True)
class TorchPruningCriterion:
    """``importance``: a callable that scores a ``torch_pruning`` group.

    A group of which Torch-Pruning knows no layer gets equal scores. Raises InputError where the
    importance fails or does not give one number for each channel.
    """

    importance: Any
    needs_data: bool = False

    def __call__(
        self, traced: Traced, statistics: Statistics | None, generator: Generator
    ) -> Scores:
        return {
            g.name: self._scores(Channels(g, traced, statistics, generator))
            for g in traced.groups
            if g.locked is None
        }

    def _scores(self, channels: Channels) -> FloatArray:
        group = as_torch_pruning(channels)
        name = type(self.importance).__name__
        if len(group) == 0:
            return np.ones(channels.n)
        try:
            given = self.importance(group)
        except FxpruneError:
            raise
        except Exception as e:
            raise InputError(
                f"{name} failed on group {channels.group.name!r}: {type(e).__name__}: {e}; an "
                "importance that reads gradients needs loss.backward() on the model before"
            ) from e
        if given is None:
            return np.ones(channels.n)
        scores = given.detach().double().cpu().numpy() if isinstance(given, Tensor) else given
        scores = np.asarray(scores, dtype=np.float64)
        if scores.shape != (channels.n,):
            raise InputError(
                f"{name} gave shape {scores.shape} for the {channels.n} channels of "
                f"{channels.group.name!r}"
            )
        return scores


def is_importance(value: Any) -> bool:
    """Whether this is one of Torch-Pruning's."""
    return isinstance(value, tp.importance.Importance)


def as_torch_pruning(channels: Channels) -> Any:
    """The group as a ``torch_pruning`` Group: outputs first, then normalisations, then inputs."""
    graph = tp.DependencyGraph()
    found: list[tuple[int, Any, nn.Module, list[int], list[int]]] = []
    for member, module, _ in channels.layers():
        pruner = graph.get_pruner_of_module(module)
        if pruner is None:
            continue
        inputs = _is_input(member, module)
        function = pruner.prune_in_channels if inputs else pruner.prune_out_channels
        index = member.index
        if inputs and getattr(module, "groups", 1) > 1:
            continue  # its rows are shared by the inputs of all its groups
        roots = np.repeat(np.arange(channels.n), index.shape[1])
        rank = 2 if inputs else int(isinstance(module.weight, Tensor) and module.weight.ndim == 1)
        found.append((rank, function, module, index.ravel().tolist(), roots.tolist()))
    found.sort(key=lambda item: (item[0], len(item[3])))
    group = tp.dependency.Group()
    for _, function, module, index_list, root_list in found:
        node = tp.dependency.Node(module, None)
        dependency = tp.dependency.Dependency(function, function, node, node)
        group.add_dep(dependency, index_list)
        group[len(group) - 1].root_idxs = root_list
    return group


def _is_input(member: Member, module: nn.Module) -> bool:
    """Whether the member's dim is the one along which the module reads its input."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    if weight.ndim == 1:
        return False
    transposed = bool(getattr(module, "transposed", False))
    return (member.dim % weight.ndim == 1) != transposed
