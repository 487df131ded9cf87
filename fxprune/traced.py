"""The public face of the analysis: a traced model, its groups, and the cost of any plan."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import networkx as nx
import numpy as np
from torch import fx, nn

from fxprune.assembly import compiled
from fxprune.capture import Captured, capture
from fxprune.cost import CostModel
from fxprune.coupling.computed import coupled
from fxprune.coupling.groups import Coupling
from fxprune.errors import PlanError, SpecError, unknown
from fxprune.lifetimes import storages
from fxprune.products import check_module
from fxprune.types import BoolArray, ChannelGroup, Consumer, Cost, IntArray, PrunePlan


@dataclass(frozen=True)
class Traced:
    """A model that has been traced and whose channels have been grouped."""

    captured: Captured
    coupling: Coupling

    @property
    def graph_module(self) -> fx.GraphModule:
        """The unpruned graph, eval mode; its tensors are the model's own: do not write to them."""
        return compiled(self.captured.graph_module)

    @property
    def example_inputs(self) -> tuple[Any, ...]:
        return self.captured.inputs

    @property
    def groups(self) -> tuple[ChannelGroup, ...]:
        return self.coupling.groups

    @property
    def consumers(self) -> tuple[Consumer, ...]:
        """Products of an activation with a parameter, in execution order."""
        return self.coupling.consumers

    @property
    def locked(self) -> dict[str, str]:
        """Group -> why its channels stay; and each module kept whole -> why."""
        found = {g.name: g.locked for g in self.groups if g.locked is not None}
        return found | self.captured.opaque

    @property
    def reasons(self) -> dict[str, list[str]]:
        """Why something stays -> its names; together where only the place in the graph differs."""
        found: dict[str, list[str]] = {}
        for name, reason in self.locked.items():
            found.setdefault(reason.rpartition(" at ")[0] or reason, []).append(name)
        return {k if len(v) > 1 else self.locked[v[0]]: v for k, v in found.items()}

    @property
    def n_classes(self) -> int:
        return self.coupling.n_classes

    @property
    def param_classes(self) -> dict[tuple[str, int], IntArray]:
        """(parameter, dim) -> class of each position, -1 where nothing may go."""
        return self.coupling.param_classes

    @cached_property
    def costs(self) -> CostModel:
        return CostModel(self.coupling, partial(storages, self.captured))

    @cached_property
    def _by_name(self) -> dict[str, ChannelGroup]:
        return {g.name: g for g in self.groups}

    def group(self, name: str) -> ChannelGroup:
        """Raises PlanError with near matches for an unknown name."""
        if name not in self._by_name:
            raise PlanError(str(unknown("channel group", name, self._by_name)))
        return self._by_name[name]

    # -- plans --------------------------------------------------------------------------------

    def full_plan(self) -> PrunePlan:
        """The plan that keeps every channel."""
        return PrunePlan({g.name: tuple(range(g.n)) for g in self.groups if g.locked is None})

    def plan(
        self, kept: Mapping[str, Sequence[int]], meta: Mapping[str, Any] | None = None
    ) -> PrunePlan:
        """A validated plan from kept channel indices; groups not named keep all."""
        plan = PrunePlan({k: tuple(sorted(int(i) for i in v)) for k, v in kept.items()}, meta or {})
        self.keep(plan)
        return plan

    def keep(self, plan: PrunePlan) -> list[BoolArray]:
        """[n] kept channels of each group. Raises PlanError for a plan of another model."""
        if not isinstance(plan, PrunePlan):
            raise PlanError(
                f"expected a PrunePlan, got {type(plan).__name__}; PrunePlan.from_json reads text"
            )
        masks = {g.name: np.ones(g.n, dtype=np.bool_) for g in self.groups}
        for name, kept in plan.kept.items():
            if name not in masks:
                raise PlanError(
                    f"the plan is not of this model: {unknown('channel group', name, masks)}"
                )
            masks[name] = self._kept(self.group(name), kept)
        return [masks[g.name] for g in self.groups]

    def _kept(self, group: ChannelGroup, kept: Sequence[int]) -> BoolArray:
        index = np.asarray(kept, dtype=np.int64)
        where = f"plan for group {group.name!r} ({group.n} channels)"
        if len(index) == 0 or index.min() < 0 or index.max() >= group.n:
            raise PlanError(f"{where}: expected indices in [0, {group.n}), got {list(kept)[:8]}")
        if len(np.unique(index)) < len(index):
            raise PlanError(f"{where}: an index comes twice")
        mask = np.zeros(group.n, dtype=np.bool_)
        mask[index] = True
        if group.locked is not None and not mask.all():
            raise PlanError(f"{where}: it is locked: {group.locked}")
        counts = mask.reshape(group.rows, -1).sum(1)
        if (counts != counts[0]).any():
            raise PlanError(
                f"{where}: each of its {group.rows} rows must keep equally many channels, "
                f"got {counts.tolist()[:8]}"
            )
        return mask

    def counts(self, plan: PrunePlan) -> IntArray:
        """[G] kept count of each row of each group."""
        kept = zip(self.groups, self.keep(plan), strict=True)
        return np.array([int(k.sum()) // g.rows for g, k in kept], dtype=np.int64)

    def masks(self, plan: PrunePlan) -> BoolArray:
        """[n_classes + 1] whether each class is kept; the last entry (index -1) is True."""
        return self.coupling.governing.mask(self.keep(plan))

    def cost(self, plan: PrunePlan | None = None) -> Cost:
        """Of ``plan``, or of the unpruned model."""
        counts = self.costs.full_counts() if plan is None else self.counts(plan)
        return self.costs.cost(counts)

    # -- views --------------------------------------------------------------------------------

    def excluding(self, patterns: Iterable[str]) -> Traced:
        """The same with every group locked that touches a module or parameter matching a pattern.

        Patterns are shell-style and match whole paths or path prefixes ("layer1", "*.conv2").
        """
        groups = list(self.groups)
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            if not isinstance(pattern, str):
                raise SpecError(
                    f"exclude: expected names or patterns, got {type(pattern).__name__}; give the "
                    "module's path, like 'layer1.0.conv1'"
                )
            hits = [i for i, g in enumerate(groups) if _matches(g, pattern)]
            if not hits:
                names = sorted({m.param.rpartition(".")[0] for g in groups for m in g.members})
                raise SpecError(f"exclude: {unknown('module or group', pattern, names)}")
            for i in hits:
                if groups[i].locked is None:
                    groups[i] = replace(groups[i], locked=f"excluded by the caller ({pattern})")
        return Traced(self.captured, replace(self.coupling, groups=tuple(groups)))

    def to_networkx(self) -> nx.Graph:
        """Bipartite graph: groups (n, rows, locked) and the parameters that they tie together."""
        graph = nx.Graph()
        for g in self.groups:
            graph.add_node(g.name, kind="group", n=g.n, rows=g.rows, locked=g.locked)
            for m in g.members:
                layer = f"param:{m.param}"
                graph.add_node(layer, kind="parameter")
                graph.add_edge(g.name, layer, dim=m.dim)
        return graph


def _matches(group: ChannelGroup, pattern: str) -> bool:
    names = [group.name, *(m.param for m in group.members)]
    tests = (pattern, f"{pattern}.*")
    return any(fnmatch.fnmatchcase(name, t) for name in names for t in tests)


def trace(model: nn.Module, example_inputs: Any) -> Traced:
    """Trace a model and group its channels. The model is left as it was.

    example_inputs: a tensor, a tuple with one entry for each positional input of ``forward``, or a
    mapping of keyword inputs.
    Raises ModelError when the model does not run on them or its forward cannot be traced.
    """
    check_module(model)
    captured, coupling = coupled(capture(model, example_inputs))
    return Traced(replace(captured, recorded=None), coupling)
