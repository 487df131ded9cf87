"""How far a model is from the original, as a loss with a gradient: outputs and inner features.

Outputs with classes: Kullback-Leibler divergence over them (knowledge distillation, Hinton et al.,
2015); all others: squared error relative to the original's. Features: activations at points that
the graph itself offers (FitNets, Romero et al., 2015), compared on the channels that were kept.

Legend for shapes: N samples, K classes, * further dims.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fxprune.coupling.run import Traits
from fxprune.errors import ModelError
from fxprune.fitness import LEAST_PROBABILITY, floating, refer
from fxprune.sizes import Sizes
from fxprune.traced import Traced
from fxprune.types import IntArray, PrunePlan

MOST_POINTS = 16  # features that are compared; more cost memory and tell little


@dataclass(frozen=True)
class Target:
    """What the original gives for one batch.

    classes        whether it is one tensor [N, K, *] of log-probabilities
    probabilities  whether the model itself gives probabilities rather than logits
    outputs        float32, on the original's device
    """

    classes: bool
    probabilities: bool
    outputs: tuple[Tensor, ...]

    @classmethod
    def of(cls, output: Any) -> Target:
        """Raises ModelError where the output holds no floating tensor."""
        reference = refer(output)
        outputs = tuple(t.detach().float() for t in reference.outputs)
        return cls(reference.classes, reference.probabilities, outputs)

    def loss(self, output: Any, temperature: float = 1.0) -> Tensor:
        """Of another model's output for the same batch; 0 where both are equal.

        temperature: divides the logits of both; the loss is multiplied by its square, so that the
        gradient keeps its size. Raises ModelError where the outputs do not have the same form.
        """
        tensors = list(floating(output))
        shapes = [[tuple(t.shape) for t in ts] for ts in (self.outputs, tensors)]
        if shapes[0] != shapes[1]:
            raise ModelError(
                f"the outputs to compare have shapes {shapes[1]}, the original's {shapes[0]}; the "
                "teacher must give what the model gives"
            )
        if self.classes:
            q = tensors[0].float()
            if self.probabilities:
                q = q.clamp_min(LEAST_PROBABILITY).log()
            p = (self.outputs[0] / temperature).log_softmax(1)
            q = (q / temperature).log_softmax(1)
            return (p.exp() * (p - q)).sum(1).mean() * temperature**2
        errors = [
            (y.float() - x).square().sum() / x.square().sum().clamp_min(1e-30)
            for x, y in zip(self.outputs, tensors, strict=True)
        ]
        return torch.stack(errors).mean()


def spread(targets: Sequence[Target]) -> float:
    """The loss of a model that gives the mean probabilities of all samples for each of them.

    So a loss divided by it has a size that does not depend on the model. 1 where outputs have no
    classes (those losses are relative already) or do not differ.
    """
    if not all(t.classes for t in targets):
        return 1.0
    logs = [t.outputs[0].double() for t in targets]
    total = sum(len(p) for p in logs)
    zero = torch.zeros(1, dtype=torch.float64, device=logs[0].device)
    mean = sum((p.exp().sum(0) for p in logs), zero) / total
    rest = mean.clamp_min(LEAST_PROBABILITY).log()
    value = float(torch.cat([(p.exp() * (p - rest)).sum(1).flatten() for p in logs]).mean())
    return value if value > LEAST_PROBABILITY else 1.0


@dataclass(frozen=True)
class Point:
    """A graph node whose value both models have.

    ``kept``: dim -> positions of the original's value that the pruned model still has.
    """

    node: str
    kept: Mapping[int, IntArray]

    def loss(self, original: Tensor, pruned: Tensor) -> Tensor:
        """Mean squared error, relative to the variance of the original's kept values."""
        x = original.detach()
        for dim, index in self.kept.items():
            x = x.index_select(dim, torch.from_numpy(index).to(x.device))
        x, y = x.float(), pruned.float()
        spread = (x - x.mean()).square().mean()
        return (y - x).square().mean() / spread.clamp_min(1e-12)


def points(traced: Traced, plan: PrunePlan, most: int = MOST_POINTS) -> tuple[Point, ...]:
    """Where features of the original and of the cut of ``plan`` can be compared, in graph order.

    A point is a node that every path through the graph takes (the end of a block), or one that is
    read several times (a residual stream, a skip connection); one of them between two products with
    a parameter. No op has a name here.
    """
    found = _between(traced, _candidates(traced))
    sizes = Sizes(traced, traced.keep(plan))
    made = [p for p in (_point(traced, sizes, name) for name in found) if p is not None]
    if len(made) > most:
        made = [made[i] for i in np.linspace(0, len(made) - 1, most).round().astype(int)]
    return tuple(made)


def _candidates(traced: Traced) -> list[fx.Node]:
    """Nodes that all paths take or several nodes read, among those that carry activations."""
    nodes = list(traced.graph_module.graph.nodes)
    at = {n: i for i, n in enumerate(nodes)}
    live: set[fx.Node] = set()
    for n in nodes:
        if n.op == "placeholder" or (n.op != "output" and live.intersection(n.all_input_nodes)):
            if isinstance(traced.coupling.values.get(n.name), Traits):
                live.add(n)
            elif n.op != "placeholder" and _passes(traced, n):
                live.add(n)  # a tuple of activations
    crossing = np.zeros(len(nodes) + 1, dtype=np.int64)
    for n in live:
        for user in n.users:
            if user in live or user.op == "output":
                crossing[at[n] + 1] += 1
                crossing[at[user]] -= 1
    bypassed = np.cumsum(crossing)
    return [
        n
        for n in nodes
        if n in live
        and n.op != "placeholder"
        and (not bypassed[at[n]] or sum(u in live for u in n.users) > 1)
        and not any(u.op == "output" for u in n.users)
    ]


def _passes(traced: Traced, node: fx.Node) -> bool:
    leaves = torch.utils._pytree.tree_leaves(traced.coupling.values.get(node.name))
    return any(isinstance(v, Traits) for v in leaves)


def _between(traced: Traced, candidates: Sequence[fx.Node]) -> list[str]:
    """After each consumer and before the next, the last of the largest; none before the first.

    So it is one behind normalisation and activation, and before a pooling.
    """
    consumers = {c.node for c in traced.consumers}
    wanted = set(candidates)
    chosen: dict[int, tuple[int, str]] = {}
    passed = 0
    for n in traced.graph_module.graph.nodes:
        passed += n.name in consumers
        if n in wanted and passed:
            traits = traced.coupling.values[n.name]
            size = math.prod(traits.shape) if isinstance(traits, Traits) else 0
            if size >= chosen.get(passed, (0, ""))[0]:
                chosen[passed] = (size, n.name)
    return [name for _, name in chosen.values()]


def _point(traced: Traced, sizes: Sizes, name: str) -> Point | None:
    """None where the value is no floating tensor, or where its rows keep columns of their own."""
    traits = traced.coupling.values.get(name)
    if not isinstance(traits, Traits) or not traits.dtype.is_floating_point:
        return None
    for f in traits.fields:
        joint = f.size not in f.shape
        if joint and not sizes.mask[sizes.coupling.cls[f]].all():
            return None
    kept = {d: sizes.positions(traits, d) for d in range(len(traits.shape))}
    return Point(name, {d: np.flatnonzero(k) for d, k in kept.items() if not k.all()})


def tapped(module: fx.GraphModule, names: Sequence[str]) -> fx.GraphModule:
    """``module`` with the output (its own output, [value of each named node]); tensors shared."""
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(module.graph, made)
    by_name = {old.name: new for old, new in made.items()}
    graph.output((output, [by_name[n] for n in names]))
    return fx.GraphModule(module, graph)
