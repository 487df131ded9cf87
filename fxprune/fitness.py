"""How good is a plan? Measured on the really pruned and repaired model, lower is better.

Without labels: the divergence of the pruned model's outputs from the original's, on calibration
samples that neither the criterion nor the repair has seen. Or the user's own ``evaluate``.

Legend for shapes: N samples, K classes, * further dims.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from fxprune import trees
from fxprune.cut import cut
from fxprune.errors import DataError, InputError, ModelError
from fxprune.renorm import some
from fxprune.repair import LeastSquares
from fxprune.replay import FEWEST, Replay, affordable, comparing
from fxprune.sequential import best_form
from fxprune.traced import Traced
from fxprune.types import PrunePlan

Repair: TypeAlias = Callable[[PrunePlan, fx.GraphModule], object]
Evaluate: TypeAlias = Callable[[Any], float]
LEAST_PROBABILITY = 1e-12
SEMIFINAL_SAMPLES = 64  # on which the best states are repaired when they are first compared


def candidate(traced: Traced, plan: PrunePlan, repair: Repair | None) -> fx.GraphModule:
    """The pruned model of a plan, repaired in one shot; a new object in eval mode.

    ``repair(plan, graph_module)`` changes the graph module in place.
    """
    module = cut(traced, plan)
    if repair is not None:
        repair(plan, module)
    return module


class KLFitness:
    """Mean divergence from the original's outputs after cut and repair; a callable for plans.

    - one tensor [N, K] or [N, K, *, *]: Kullback-Leibler divergence in nats over dim 1, averaged
      over samples and positions; outputs that already are probabilities are taken as they are;
    - anything else (several tensors, [N, T, D], one class): squared error relative to the
      original's squared norm, averaged over the floating tensors.

    The original runs once, when this is made. Calls may come from several threads.
    ``batches``: each a tensor or a tuple of positional inputs, on the model's device. Raises
    DataError where there are none, ModelError where the output holds no floating tensor.
    """

    def __init__(self, traced: Traced, repair: Repair | None, batches: Sequence[Any]) -> None:
        if not batches:
            raise DataError("no held-out batches to compare outputs on; give at least one")
        self._traced, self._repair = traced, repair
        self._batches = [b if isinstance(b, tuple) else (b,) for b in batches]
        with torch.no_grad():
            self._references = [refer(traced.graph_module(*b)) for b in self._batches]

    def __call__(self, plan: PrunePlan) -> float:
        return self.of(candidate(self._traced, plan, self._repair))

    def of(self, module: Callable[..., Any]) -> float:
        """The divergence of any model in eval mode on the same inputs; inf where not finite."""
        with torch.no_grad():
            return mean_divergence(self._references, (module(*b) for b in self._batches))


class ReplayFitness:
    """:class:`KLFitness` of candidates as :class:`Replay` runs them: a callable for plans.

    ``replay`` gives the replay; it is called when the first plan comes. Calls may come from several
    threads.
    """

    def __init__(self, replay: Callable[[], Replay]) -> None:
        self._replay = replay

    def __call__(self, plan: PrunePlan) -> float:
        replay = self._replay()
        return mean_divergence(map(refer, replay.originals), replay.outputs(plan))


class EvaluateFitness:
    """The user's ``evaluate(model) -> float`` (higher is better), negated; a callable for plans.

    The model is a pruned and repaired GraphModule in eval mode. Raises InputError where
    ``evaluate`` gives something else than a number.
    """

    def __init__(self, traced: Traced, repair: Repair | None, evaluate: Evaluate) -> None:
        self._traced, self._repair, self._evaluate = traced, repair, evaluate

    def __call__(self, plan: PrunePlan) -> float:
        value = self._evaluate(candidate(self._traced, plan, self._repair))
        try:
            return -float(value.detach() if isinstance(value, Tensor) else value)
        except (TypeError, ValueError) as e:
            raise InputError(
                f"evaluate(model) must return one number, higher is better; got {value!r}"
            ) from e


@dataclass(frozen=True)
class FinalFitness:
    """What the final repair makes of a plan; for the best few of a search.

    seen, held_out  batches for the repair and for the choice of its ridges
    measure         of a repaired module, lower is better
    """

    traced: Traced
    once: LeastSquares
    seen: Sequence[Any]
    held_out: Sequence[Any]
    measure: Callable[[fx.GraphModule], float]

    def __call__(self, plan: PrunePlan) -> float:
        module = cut(self.traced, plan)
        outcome = best_form(
            self.traced, plan, module, self.once, self.seen, self.measure, self.held_out
        )
        return min(outcome.fitness.values())


def final_rounds(
    final: FinalFitness, *, divergence: bool
) -> tuple[FinalFitness | None, FinalFitness]:
    """(semifinals, finals): the comparisons at the end of a search, for an ``AllocationProblem``.

    Many states on few samples, then few states on all. Where a sample is so dear that evaluations
    cannot have many (:func:`replay.affordable`): few states on few samples, and nothing else.
    ``divergence``: whether ``final.measure`` is that, and not the user's, who alone knows what a
    call of it costs: then only few states are compared.
    """
    room = affordable(final.traced)
    dear = room < 2 * SEMIFINAL_SAMPLES
    held = comparing(room)
    seen = some(final.seen, max(FEWEST, min(SEMIFINAL_SAMPLES, room - held)))
    if not divergence:
        return None, replace(final, seen=seen) if dear else final
    held_out = some(final.held_out, held)
    measure = KLFitness(final.traced, None, held_out).of
    rough = replace(final, seen=seen, held_out=held_out, measure=measure)
    return (None, rough) if dear else (rough, final)


@dataclass(frozen=True)
class Reference:
    """What the original gives for one batch.

    classes        whether ``outputs`` is one tensor of log-probabilities [N, K, *]
    probabilities  whether the model itself gives probabilities rather than logits
    outputs        float64
    """

    samples: int
    classes: bool
    probabilities: bool
    outputs: tuple[Tensor, ...]

    def divergence(self, output: Any) -> float:
        """Of another model's output for the same batch, averaged over samples."""
        tensors = [t.double() for t in floating(output)]
        if self.classes:
            p, q = self.outputs[0], log_probabilities(tensors[0], self.probabilities)
            return float((p.exp() * (p - q)).sum(dim=1).mean())
        pairs = itertools.zip_longest(self.outputs, tensors)
        errors = [1.0 if x is None or y is None else relative(x, y) for x, y in pairs]
        return sum(errors) / len(errors)


def relative(x: Tensor, y: Tensor) -> float:
    """Squared error of ``y`` relative to the squared norm of ``x``.

    Where the data decides how much there is (detections, in their order), the shorter one is taken
    as filled up with zeros.
    """
    if x.dim() != y.dim():
        return 1.0
    if x.shape != y.shape:
        size = [max(a, b) for a, b in zip(x.shape, y.shape, strict=True)]
        x, y = _filled(x, size), _filled(y, size)
    wrong, whole = float((y - x).square().sum()), float(x.square().sum())
    return wrong / whole if whole else float(wrong > 0)


def _filled(t: Tensor, size: Sequence[int]) -> Tensor:
    made = t.new_zeros(size)
    made[tuple(slice(0, n) for n in t.shape)] = t
    return made


def mean_divergence(references: Iterable[Reference], outputs: Iterable[Any]) -> float:
    """Over all samples of several batches; inf where it is not finite."""
    total, samples = 0.0, 0
    for reference, output in zip(references, outputs, strict=True):
        total += reference.divergence(output) * reference.samples
        samples += reference.samples
    value = total / samples
    return value if math.isfinite(value) else math.inf


def refer(output: Any) -> Reference:
    """The reference that an original's output makes."""
    tensors = [t.double() for t in floating(output)]
    if not tensors:
        raise ModelError(
            f"the model's output holds no floating tensor to compare ({type(output).__name__}); "
            "give evaluate=, a function of the model that returns a number"
        )
    first = tensors[0]
    samples = max(1, len(first)) if first.ndim else 1
    if isinstance(output, Tensor) and first.ndim not in (0, 1, 3) and first.shape[1] > 1:
        probabilities = _are_probabilities(first)
        return Reference(samples, True, probabilities, (log_probabilities(first, probabilities),))
    return Reference(samples, False, False, tuple(tensors))


def log_probabilities(x: Tensor, probabilities: bool) -> Tensor:
    """[N, K, *] logits, or probabilities, -> float64 log-probabilities over dim 1."""
    x = x.double()
    return x.clamp_min(LEAST_PROBABILITY).log() if probabilities else x.log_softmax(dim=1)


def _are_probabilities(x: Tensor) -> bool:
    """Whether [N, K, *] is nowhere negative and sums to one over dim 1."""
    return bool((x >= 0).all()) and bool(((x.sum(dim=1) - 1).abs() < 1e-3).all())


def floating(output: Any) -> Iterator[Tensor]:
    """Floating tensors of a nested output, in order."""
    yield from (t for t in trees.tensors(output) if t.is_floating_point())
