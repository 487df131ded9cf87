"""One streaming pass of calibration batches: what the criteria and the repair need to know.

For every distinct tensor that enters a consumer: its second moments, weighted by the attention map
and unweighted; for every consumer the energy of its output. Memory does not grow with the number of
batches. Products are float32 where the activations are, around a point near the mean, and are
summed in float64 (a float64 product takes 2 to 4 times as long).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from fxprune.errors import DataError, InternalError
from fxprune.gradients import ChannelGradients, GradientPass, Labelled
from fxprune.inputs import samples_of
from fxprune.moments import (
    MAX_VARIABLES,
    InputAccumulator,
    InputStatistics,
    Layout,
    OutputEnergy,
    split_weight,
    tap_coverage,
)
from fxprune.products import Product, storage_key, watch
from fxprune.types import ChannelGroup, Consumer, IntArray, Use

if TYPE_CHECKING:
    from fxprune.traced import Traced


@dataclass(frozen=True)
class ConsumerStatistics:
    """Of one consumer.

    input     key of its input in :attr:`Statistics.inputs`
    energy    mean over output positions of |y - mean y|^2, summed over output channels
    coverage  [T]: the share of output positions at which each tap of the kernel meets the input:
              less than 1 at zero padding; of a transposed convolution input positions per output
    weight    the operand as the op saw it, in the parameter's layout for this kind, where the
              parameter holds more than that (a slice of it); None where it is the whole parameter
    """

    input: str
    energy: float
    coverage: Tensor
    weight: Tensor | None = None


@dataclass(frozen=True)
class Statistics:
    """What :func:`observe` saw. ``notes``: what was left out, and why.

    gradients: group name -> gradients along its channels, where they were asked for.
    """

    inputs: Mapping[str, InputStatistics]
    consumers: Mapping[str, ConsumerStatistics]
    samples: int
    gamma: float
    p: float
    notes: tuple[str, ...] = ()
    weights: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    gradients: Mapping[str, ChannelGradients] | None = None

    def input_of(self, consumer: str) -> InputStatistics:
        """The statistics of what enters ``consumer`` (its key)."""
        return self.inputs[self.consumers[consumer].input]

    def blocks(self, consumer: Consumer) -> Tensor:
        """The consumer's weight as a view [g, O/g, V/g, T]; see :func:`moments.split_weight`."""
        seen = self.consumers[consumer.key].weight
        weight = self.weights[consumer.weight] if seen is None else seen
        return split_weight(consumer, weight, self.input_of(consumer.key).layout)


def takes_outputs_along(use: Use, consumer: Consumer) -> bool:
    """Whether each channel of ``use`` is whole convolution groups: their outputs go with it."""
    each = len(consumer.classes) // consumer.groups
    if consumer.groups == 1 or use.index.shape[1] % each:
        return False
    return all(len(set(row)) * each == len(row) for row in (use.index // each).tolist())


def is_depthwise(consumer: Consumer) -> bool:
    """Whether each output reads one input channel: it goes with that channel, nothing is lost."""
    return consumer.groups > 1 and consumer.groups == len(consumer.classes)


def needed_consumers(
    groups: Iterable[ChannelGroup], consumers: Iterable[Consumer]
) -> dict[str, Consumer]:
    """Consumers whose input has to be observed, in execution order.

    Those that an unlocked group enters, depthwise ones apart; and for a group that enters none
    (queries and keys), those that make its channels.
    """
    known = {c.key: c for c in consumers if not is_depthwise(c)}
    wanted: set[str] = set()
    for group in groups:
        if group.locked is not None:
            continue
        entered = {u.consumer for u in group.uses if u.consumer in known}
        wanted |= entered or {c.key for c, _ in producers(group, known.values())}
    return {key: c for key, c in known.items() if key in wanted}


def producers(
    group: ChannelGroup, consumers: Iterable[Consumer]
) -> list[tuple[Consumer, IntArray]]:
    """Consumers whose output rows are the group's channels, with those rows [n, k]."""
    rows = {(m.param, m.dim): m.index for m in group.members}
    found = [(c, rows.get((c.weight, c.out_dim))) for c in consumers]
    return [(c, index) for c, index in found if index is not None]


def unit_variables(index: IntArray, layout: Layout) -> IntArray:
    """Input channels of each of a group's channels [n, k] -> variables [n, k / T]."""
    variable = index % layout.variables if layout.tiled else index // layout.taps
    ordered = np.sort(variable, axis=1)
    return np.ascontiguousarray(ordered[:, :: layout.taps])


def observe(
    traced: Traced,
    batches: Iterable[Any],
    *,
    gamma: float = 1.0,
    p: float = 2.0,
    displacement: bool = True,
    gradients: bool | Labelled = False,
    progress: bool = False,
) -> Statistics:
    """Run ``batches`` through the traced model once.

    batches       each a tensor or a tuple of positional inputs, first dim the samples
    gamma, p      the attention weight of a position is F^gamma, F = sum_c |x_c|^p
    displacement  gather the displacement form too (a quarter more time)
    gradients     gather :mod:`fxprune.gradients` in a pass forward and backward: of the original's
                  own outputs, or of a loss on labelled batches
    progress      show a bar on stderr

    Positions are the spatial ones of a convolution's input, the tokens of a linear layer's (input
    rows a multiple of the samples), the taps of a flatten; F has mean 1 over the positions of each
    sample. Where a sample has one position, the samples are the positions and F is not scaled.
    Of a sample with more than 128 positions a fixed random choice of that many is looked at.

    Raises DataError where there is no batch or an activation is not finite (the node is named).
    """
    with torch.random.fork_rng(devices=[]):
        needed = needed_consumers(traced.groups, traced.consumers)
        run = _Pass(traced, needed, shared_inputs(traced, needed), gamma, p, displacement)
        console = Console(stderr=True)
        slopes = GradientPass(traced) if gradients else None
        for batch in track(
            batches, "observe", console=console, disable=not progress, transient=True
        ):
            inputs = batch if isinstance(batch, tuple) else (batch,)
            run.feed(inputs)
            if slopes is not None and gradients is True:
                slopes.feed(inputs)
        if slopes is None:
            return run.result()
        if isinstance(gradients, Labelled):
            slopes.feed_labelled(gradients)
        return replace(run.result(), gradients=slopes.result())


def shared_inputs(traced: Traced, needed: Mapping[str, Consumer]) -> dict[str, str]:
    """Consumer key -> key of the first consumer that reads the very same tensor.

    Found on the example inputs, with every input held, so that no memory is used twice.
    """
    held: list[Tensor] = []
    first: dict[tuple[Any, ...], str] = {}
    shared: dict[str, str] = {}

    def look(key: str, product: Product, out: Tensor) -> None:
        consumer = needed.get(key)
        if consumer is None:
            return
        x = product.x
        held.append(x)
        same = (storage_key(x), x.data_ptr(), x._version, x.shape, x.stride(), product.groups)
        shared[key] = first.setdefault((*same, consumer.classes.tobytes()), key)

    watch(traced.graph_module, traced.example_inputs, look)
    return shared


def coverage_of(consumer: Consumer, product: Product, out: Tensor) -> Tensor:
    """[T]: how often each tap meets the input; see :class:`ConsumerStatistics`."""
    if consumer.kind != "conv":
        return torch.ones(Layout.of(consumer).taps, dtype=torch.float64)
    kernel = product.w.shape[2:]
    if product.transposed:
        share = product.x.numel() / product.x.shape[1] * out.shape[1] / out.numel()
        return torch.full((kernel.numel(),), share, dtype=torch.float64)
    sizes = zip(product.x.shape[2:], out.shape[2:], strict=True)
    steps = zip(kernel, product.stride, product.dilation, product.padding, strict=True)
    return tap_coverage([(*a, *b) for a, b in zip(sizes, steps, strict=True)])


class _Pass:
    """The state of one pass over the calibration batches."""

    def __init__(
        self,
        traced: Traced,
        needed: Mapping[str, Consumer],
        shared: Mapping[str, str],
        gamma: float,
        p: float,
        displacement: bool,
    ) -> None:
        self.traced, self.needed, self.shared = traced, needed, shared
        self.gamma, self.p, self.samples = gamma, p, 0
        self.inputs = {
            key: InputAccumulator(
                needed[key], gamma, p, displacement, _units(traced.groups, key, shared, needed)
            )
            for key in dict.fromkeys(shared.values())
        }
        self.energy = {key: OutputEnergy(needed[key].kind) for key in shared}
        self.coverage: dict[str, Tensor] = {}
        self.operands: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {
            **dict(traced.graph_module.named_buffers(remove_duplicate=False)),
            **dict(traced.graph_module.named_parameters(remove_duplicate=False)),
        }

    def feed(self, inputs: tuple[Any, ...]) -> None:
        """One batch."""
        batch = samples_of(inputs)
        if batch == 0:
            return

        def see(key: str, product: Product, out: Tensor) -> None:
            if key not in self.shared:
                return
            if not bool(torch.isfinite(out.sum(dtype=torch.float32))):
                self._not_finite(key, product.x, out)
            if key in self.inputs:
                self.inputs[key].add(product.x, batch)
            self.energy[key].add(out)
            if key not in self.coverage:
                self._first(key, product, out)

        watch(self.traced.graph_module, inputs, see)
        self.samples += batch

    def _first(self, key: str, product: Product, out: Tensor) -> None:
        consumer = self.needed[key]
        self.coverage[key] = coverage_of(consumer, product, out)
        if product.w.numel() != self.weights[consumer.weight].numel():
            w = product.w
            if consumer.kind == "linear":
                w = w.t() if consumer.in_dim == 1 else w
            self.operands[key] = w.detach().clone()

    def _not_finite(self, key: str, x: Tensor, out: Tensor) -> None:
        if bool(torch.isfinite(out).all()):
            return  # only the float32 sum overflowed
        where = "input" if not bool(torch.isfinite(x).all()) else "output"
        raise DataError(
            f"the {where} of node {self.needed[key].node!r} holds NaN or Inf on calibration data; "
            "give finite data in the range that the model was trained on"
        )

    def result(self) -> Statistics:
        """Raises DataError where no batch came."""
        if self.samples == 0:
            raise DataError("the calibration data holds no sample; give at least one batch")
        missing = [key for key in self.shared if key not in self.coverage]
        if missing:
            raise InternalError(f"consumers {missing} ran on the example inputs, not on the data")
        inputs = {key: a.result() for key, a in self.inputs.items()}
        consumers = {
            key: ConsumerStatistics(
                self.shared[key],
                self.energy[key].result(),
                self.coverage[key],
                self.operands.get(key),
            )
            for key in self.shared
        }
        return Statistics(
            inputs, consumers, self.samples, self.gamma, self.p, self._notes(), self.weights
        )

    def _notes(self) -> tuple[str, ...]:
        notes = [
            f"{key}: more than {MAX_VARIABLES} channels, only their variances are kept"
            for key, a in self.inputs.items()
            if a.plain is not None and a.plain.diagonal
        ]
        notes += [f"{key}: never ran" for key in self.needed if key not in self.shared]
        return tuple(notes)


def _units(
    groups: Iterable[ChannelGroup],
    key: str,
    shared: Mapping[str, str],
    needed: Mapping[str, Consumer],
) -> dict[str, IntArray]:
    """Group name -> [n, k] variables at this input, for unlocked groups with k > 1."""
    layout = Layout.of(needed[key])
    units: dict[str, IntArray] = {}
    for group in groups:
        for use in group.uses if group.locked is None else ():
            if shared.get(use.consumer) == key:
                variables = unit_variables(use.index, layout)
                if variables.shape[1] > 1:
                    units[group.name] = variables
    return units
