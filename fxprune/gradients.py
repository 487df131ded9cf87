"""Gradients of a loss along the channels of every group, gathered in one streaming pass.

A channel's gate is a factor on all parameters that go with it. Of the loss of a batch, the slope
along the gate is t_c = sum of w * dL/dw over those parameters, and the diagonal of the curvature is
taken as h_c = sum of w^2 (dL/dw)^2 (the empirical Fisher information; optimal brain damage,
LeCun et al., 1990; the squared slope: Molchanov et al., "Importance estimation", 2019).

Without targets the original's own outputs are the soft targets. Their cross-entropy has no slope at
the original, so its Fisher information is sampled: of each sample one class is drawn from the
model's own distribution, and -log p(class) differentiated; the square of that slope is, on average,
the curvature of the divergence from the original's outputs. Outputs that are no classes are
multiplied by random signs instead, which gives the curvature of the squared error.

Everything runs on a copy; the model, its gradients and its buffers stay as they are.

Legend for shapes: N samples, K classes, n channels of a group.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fxprune.errors import DataError
from fxprune.inputs import divisible, part_of, samples_of
from fxprune.types import ChannelGroup, FloatArray

if TYPE_CHECKING:
    from fxprune.traced import Traced

Loss: TypeAlias = Callable[[Any, Any], Tensor]
AT_ONCE = 8  # samples of one backward pass


@dataclass(frozen=True)
class ChannelGradients:
    """Of one group, each [n]: means of t_c, of t_c^2 and of h_c over the backward passes."""

    slope: FloatArray
    squared: FloatArray
    curvature: FloatArray


@dataclass(frozen=True)
class Labelled:
    """Batches (inputs, targets) and ``loss(output, targets)``, a scalar; one pass a sample."""

    batches: Iterable[tuple[Any, Any]]
    loss: Loss = nn.functional.cross_entropy


class GradientPass:
    """Gathers :class:`ChannelGradients` of every group that is not locked, batch by batch."""

    def __init__(self, traced: Traced) -> None:
        self.traced = traced
        self.module = copy.deepcopy(traced.graph_module).eval()
        for p in self.module.parameters():
            p.requires_grad_(p.is_floating_point())
        self.sums = {g.name: np.zeros((3, g.n)) for g in traced.groups if g.locked is None}
        self.generator = torch.Generator().manual_seed(0)
        self.passes = 0

    def feed(self, inputs: tuple[Any, ...]) -> None:
        """A batch of positional inputs, against the original's own outputs."""
        for at in range(0, samples_of(inputs), AT_ONCE):
            part = part_of(inputs, slice(at, at + AT_ONCE))
            self._backward(partial(self._own, part))
            if part is inputs or not divisible(inputs):
                return

    def feed_labelled(self, labelled: Labelled) -> None:
        """Batches with targets: one backward pass for each sample."""
        for inputs, targets in labelled.batches:
            values = inputs if isinstance(inputs, tuple) else (inputs,)
            for at in range(samples_of(values)):
                one = slice(at, at + 1)
                part, (target,) = part_of(values, one), part_of((targets,), one)
                self._backward(partial(self._labelled, labelled.loss, part, target))

    def result(self) -> dict[str, ChannelGradients]:
        """Raises DataError where no batch came."""
        if self.passes == 0:
            raise DataError("no batch to compute gradients on; give calibration data")
        return {name: ChannelGradients(*(s / self.passes)) for name, s in self.sums.items()}

    def _own(self, inputs: tuple[Any, ...]) -> Tensor:
        return own_loss(self.module(*inputs), self.generator)

    def _labelled(self, loss: Loss, inputs: tuple[Any, ...], target: Any) -> Tensor:
        return loss(self.module(*inputs), target)

    def _backward(self, loss_of: Callable[[], Tensor]) -> None:
        self.module.zero_grad(set_to_none=True)
        with torch.enable_grad():
            loss = loss_of()
            if not bool(torch.isfinite(loss)):
                raise DataError("the loss is not finite on calibration data; gradients need one")
            if loss.requires_grad:
                loss.backward()
        weights = dict(self.module.named_parameters(remove_duplicate=False))
        along: dict[tuple[str, int], tuple[FloatArray, FloatArray]] = {}
        for group in self.traced.groups:
            if group.name in self.sums:
                slope, curvature = _along(group, weights, along)
                self.sums[group.name] += np.stack([slope, slope**2, curvature])
        self.passes += 1


def own_loss(output: Any, generator: torch.Generator) -> Tensor:
    """A sum over samples whose squared slope is, on average, the curvature at the model itself."""
    tensors = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
    total = torch.zeros((), device=tensors[0].device if tensors else "cpu")
    for t in tensors:
        if len(tensors) == 1 and t.ndim in (2, 4) and t.shape[1] > 1:
            logs = t.log_softmax(1).movedim(1, -1).flatten(0, -2)
            drawn = torch.multinomial(logs.detach().exp().cpu(), 1, generator=generator)
            total = total - logs.gather(1, drawn.to(t.device)).sum()
        else:
            signs = torch.randint(0, 2, t.shape, generator=generator) * 2 - 1
            norm = t.detach().square().mean().sqrt().clamp_min(1e-12)
            total = total + (t * signs.to(t)).sum() / norm
    return total


def _along(
    group: ChannelGroup,
    weights: Mapping[str, nn.Parameter],
    known: dict[tuple[str, int], tuple[FloatArray, FloatArray]],
) -> tuple[FloatArray, FloatArray]:
    """t_c and h_c [n] of one group after a backward pass."""
    slope, curvature = np.zeros(group.n), np.zeros(group.n)
    for member in group.members:
        w = weights.get(member.param)
        if w is None or w.grad is None:
            continue
        key = member.param, member.dim % w.ndim
        if key not in known:
            product = (w.detach() * w.grad).double()
            rest = [d for d in range(w.ndim) if d != key[1]]
            first = product.sum(rest) if rest else product
            second = product.square().sum(rest) if rest else product.square()
            known[key] = first.cpu().numpy(), second.cpu().numpy()
        slope += known[key][0][member.index].sum(1)
        curvature += known[key][1][member.index].sum(1)
    return slope, curvature
