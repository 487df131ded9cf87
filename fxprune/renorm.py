"""Relative re-estimation of batch normalisation after a cut.

The running statistics move by what the cut changed on the calibration data: mean + (mean' -
mean_cal), var * var' / var_cal, where mean_cal and var_cal are the original model's on that data.
Calibration data is rarely the training distribution, so its own statistics do not take the place of
the trained ones (source of plain re-estimation: EagleEye, B. Li et al., 2020).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxprune.errors import DataError
from fxprune.inputs import divisible, part_of, samples_of
from fxprune.products import evaluating, parameter_names, storage_key
from fxprune.types import PrunePlan

if TYPE_CHECKING:
    from fxprune.traced import Traced


@dataclass(frozen=True)
class RepairReport:
    """repaired: consumer keys or module paths; skipped: the same -> why, or which part was."""

    repaired: tuple[str, ...]
    skipped: Mapping[str, str]


def repair_bn(
    traced: Traced,
    plan: PrunePlan,
    module: fx.GraphModule,
    batches: Iterable[Any],
    max_samples: int = 256,
) -> RepairReport:
    """Relative re-estimation of every batch normalisation; ``module`` changes in place.

    The first ``max_samples`` samples of ``batches`` go through both models side by side, node by
    node: all batches pass one node before any enters the next. So a normalisation is corrected
    before anything behind it is measured, in one pass, and each is measured on corrected inputs.
    Memory is that of one forward pass of these samples together.

    Raises DataError where there is no sample.
    """
    inputs = some(batches, max_samples)
    masks = traced.masks(plan)
    before = _norm_inputs(traced.graph_module, inputs, None)
    repaired: list[str] = []
    skipped: dict[str, str] = {}

    def correct(path: str, norm: Any, seen: tuple[Tensor, Tensor]) -> None:
        if path not in before:
            skipped[path] = "the original has no such normalisation"
            return
        classes = traced.param_classes.get((f"{path}.running_mean", 0))
        keep = slice(None) if classes is None else torch.from_numpy(masks[classes])
        mean, var = (t[keep] for t in before[path])
        norm.running_mean += (seen[0] - mean).to(norm.running_mean)
        ratio = (seen[1] + norm.eps) / (var + norm.eps)
        norm.running_var *= ratio.to(norm.running_var)
        repaired.append(path)

    _norm_inputs(module, inputs, correct)
    for path, m in module.named_modules():
        tracked = isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
        if tracked and path not in repaired:
            skipped.setdefault(path, "it is inside an opaque module, or runs more than once")
    return RepairReport(tuple(repaired), skipped)


def some(batches: Iterable[Any], most: int) -> list[tuple[Any, ...]]:
    """Batches as tuples, at most ``most`` samples of them, from all over the data.

    Of batches that cannot be divided, the first. Raises DataError where there is no sample.
    """
    every = [b if isinstance(b, tuple) else (b,) for b in batches]
    sizes = [samples_of(b) for b in every]
    if sum(sizes) == 0:
        raise DataError("the calibration data holds no sample; give at least one batch")
    ends = np.cumsum(sizes)
    if ends[-1] <= most:
        return every
    if not all(divisible(b) for b in every):
        return every[: max(1, int(np.searchsorted(ends, most, side="right")))]
    wanted = np.diff(ends * most // ends[-1], prepend=0)
    picked = zip(every, sizes, wanted.tolist(), strict=True)
    return [part_of(b, torch.arange(q) * n // q) for b, n, q in picked if q]


Correct = Callable[[str, Any, "tuple[Tensor, Tensor]"], None]


def _norm_inputs(
    module: fx.GraphModule, inputs: Sequence[tuple[Any, ...]], correct: Correct | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance [C] of what enters each batch normalisation that runs once.

    ``correct(path, norm, (mean, var))`` is called before the normalisation runs.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    called = [str(n.target) for n in module.graph.nodes if n.op == "call_module"]

    def before(node: fx.Node, values: Sequence[Tensor]) -> None:
        path = str(node.target)
        norm = module.get_submodule(path)
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_mean is None:
            return
        if called.count(path) == 1:
            found[path] = _mean_var(values)
            if correct is not None:
                correct(path, norm, found[path])

    with torch.random.fork_rng(devices=[]), evaluating(module):
        run = SideBySide(module, inputs)
        for node in module.graph.nodes:
            if node.op == "output":
                break
            if node.op == "call_module" and node.args:
                before(node, [env[node.args[0]] for env in run.envs if node.args[0] in env])
            for i in range(len(inputs)):
                run.step(node, i)
    return found


def _mean_var(values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Over all samples and positions of several [N, C, *]; float64."""
    counts = [v.numel() / v.shape[1] for v in values]
    parts = [torch.var_mean(v, [0, *range(2, v.ndim)], correction=0) for v in values]
    total = sum(counts)
    mean = sum(
        (n / total * m.double() for n, (_, m) in zip(counts, parts, strict=True)),
        torch.zeros(1, dtype=torch.float64, device=values[0].device),
    )
    var = sum(
        (
            n / total * (v.double() + (m.double() - mean) ** 2)
            for n, (v, m) in zip(counts, parts, strict=True)
        ),
        torch.zeros(1, dtype=torch.float64, device=values[0].device),
    )
    return mean, var


class SideBySide(fx.Interpreter):
    """Runs several inputs node by node: all of them pass a node before any enters the next.

    careful   whether :meth:`attempt` must reckon with nodes that write to what they read
    harmless  names of nodes that do not, as far as that is known
    """

    careful = True
    harmless: Collection[str] = ()

    def __init__(self, module: fx.GraphModule, inputs: Sequence[tuple[Any, ...]]) -> None:
        super().__init__(module)
        self.graph = module.graph
        self.own = parameter_names(module)
        self.envs: list[dict[fx.Node, Any]] = [{} for _ in inputs]
        self.sources = [iter(args) for args in inputs]

    def step(self, node: fx.Node, i: int) -> None:
        """Input ``i`` passes ``node``; values that nothing else reads are freed."""
        self.env, self.args_iter = self.envs[i], self.sources[i]
        self.give(node, i, self.run_node(node))

    def give(self, node: fx.Node, i: int, value: Any) -> None:
        """Input ``i`` passes ``node``, whose result is known."""
        env = self.envs[i]
        env[node] = value
        for used in self.user_to_last_uses.get(node, []):
            del env[used]

    def attempt(self, node: fx.Node, i: int, values: Mapping[fx.Node, Any] | None = None) -> Any:
        """Run ``node`` on input ``i`` and give its result; what it reads is left as it is.

        ``values`` take the place of those of input ``i``.
        """
        known = self.envs[i] if values is None else {**self.envs[i], **values}
        self.env = {n: known[n] for n in node.all_input_nodes}
        if self.careful and node.name not in self.harmless:
            self.env = {n: self._copied(v) for n, v in self.env.items()}
        return self.run_node(node)

    def _copied(self, value: Any) -> Any:
        """Activations as copies; parameters as they are, since products are known by them."""

        def one(t: Tensor) -> Tensor:
            return t if storage_key(t) in self.own else t.clone()

        return torch.utils._pytree.tree_map_only(Tensor, one, value)
