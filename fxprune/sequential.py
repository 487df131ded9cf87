"""Sequential least squares: each consumer is repaired on what really reaches it after the cut.

Both models walk through their graphs side by side: all calibration samples pass a node before any
enters the next. At each consumer the original's full input X is regressed on the pruned model's own
input X', whose producers are repaired already: so errors do not add up. With E X' the pruned
input in the places of the kept channels,

    D = S_(X - E X'),X' (S_X'X' + lambda I)^-1,    W' = W (E + D),
    mean part W (mean X - (E + D) mean X'),

centred; where an output has no place for a mean part (no bias, no batch normalisation behind it)
about zero instead. Regressing X - E X' rather than X draws to the weights of the cut and not to
zero, so what was not cut stays exactly as it was. For a convolution the channels are the variables,
positions the samples, and all taps have the same D; each convolution group has its own. What is
left at the output after that is fitted by :mod:`fxprune.correction`.

Legend for shapes: S rows (samples x positions), g convolution groups that stay, v variables of each
in the original, k of them kept, C input channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx

from fxprune.correction import Sides, correction
from fxprune.formats import channels_last
from fxprune.inputs import divisible, part_of, samples_of
from fxprune.isolate import exact_arithmetic, rng_kept
from fxprune.moments import MAX_VARIABLES, Layout, split_weight
from fxprune.products import evaluating, storage_key
from fxprune.regression import Cannot, Pair
from fxprune.renorm import RepairReport, SideBySide, some
from fxprune.repair import LeastSquares, Writer, kept_variables, named_tensors, parameter_calls
from fxprune.sides import Observed, Side
from fxprune.trees import tensors
from fxprune.types import Consumer, PrunePlan

if TYPE_CHECKING:
    from fxprune.traced import Traced

MAX_SAMPLES = 1024  # that pass through the models together
MAX_BYTES = 2 << 30  # of activations that both models may hold at a time
FEW = 2  # samples that tell what a sample holds
PROBED = 4 << 20  # bytes of activations that tell whether a chain of nodes is affine
PIECE = 32  # samples that run as one batch, at most
HELD_OUT = 4  # one piece in so many decides on ridges
SKETCH = 128  # outputs, or random mixtures of outputs, on which a ridge is judged


def repair_sequential(
    traced: Traced,
    plan: PrunePlan,
    module: fx.GraphModule,
    batches: Iterable[Any],
    *,
    held_out: Iterable[Any] | None = None,
    once: LeastSquares | None = None,
    ridge: float | None = None,
    correct: bool = True,
    max_samples: int = MAX_SAMPLES,
    max_bytes: int = MAX_BYTES,
) -> RepairReport:
    """Sequential least squares; ``module``, the cut of ``plan``, changes in place.

    batches      each a tensor or a tuple of positional inputs, first dim the samples
    held_out     samples that choose, for each consumer, its ridge and its first guess, and take no
                 part in the fit; None: the last quarter of ``batches`` chooses, and then takes part
    once         the one-shot form, whose solution is then one of the first guesses; it must not
                 have seen the samples that choose
    ridge        lambda, as a share of the mean variance of the kept inputs; None: chosen
    correct      whether what is left at the outputs is fitted too (:mod:`fxprune.correction`)
    max_samples  of the batches that are used
    max_bytes    of live activations of both models together, without what the node at hand gives:
                 where a sample holds much (early layers of a large image) fewer take part, the
                 others join in further down

    Consumers that cannot be treated keep the weights that they have in ``module`` (those of the
    cut, or of the one-shot form where that ran before) and are reported with the reason. Costs
    about one forward pass of the original, two of the pruned model, and the regressions.

    Raises DataError where there is no sample, InternalError where plan and module do not fit.
    """
    waiting = _pieces(some(batches, max_samples), held_out)
    waiting = _turned(traced.graph_module, waiting)
    with rng_kept(), exact_arithmetic(), evaluating(traced.graph_module), evaluating(module):
        profile = live_profile(traced.graph_module, some([waiting[0].inputs], FEW)[0])
        most = {name: max_bytes // max(1, 2 * n) for name, n in profile.held.items()}
        original = Side(traced.graph_module, [], profile.harmless)
        pruned = Side(module, [], profile.harmless)
        walk = Walk(traced, plan, original, pruned, ridge)
        walk.queue, walk.once, walk.refit = Queue(waiting, most), once, held_out is None
        if correct:
            probed = max(FEW, PROBED // max(1, *profile.held.values()))
            walk.probe = Side(module, some([waiting[0].inputs], probed), profile.harmless)
        walk.run()
    return RepairReport(tuple(walk.repaired), walk.skipped)


@dataclass(frozen=True)
class Piece:
    """Inputs of some samples; fold 1 decides on ridges, fold 0 does not."""

    inputs: tuple[Any, ...]
    fold: int


@dataclass
class Queue:
    """Pieces that have not started yet; ``most``: node name -> samples allowed at a time there."""

    waiting: list[Piece]
    most: Mapping[str, int]

    def next(self, node: str, samples: int) -> Piece | None:
        """The next piece, where ``samples`` that have reached ``node`` leave room for it."""
        if not self.waiting:
            return None
        room = self.most.get(node, 0) - samples
        count = samples_of(self.waiting[0].inputs)
        if samples and room < count:
            return None
        piece = self.waiting.pop(0)
        if room < count:  # the first one, however little room there is
            return Piece(some([piece.inputs], max(1, room))[0], piece.fold)
        return piece


def _pieces(inputs: Sequence[tuple[Any, ...]], held_out: Iterable[Any] | None) -> list[Piece]:
    """Small batches of both folds, evenly mixed; fold 0 first.

    Without ``held_out`` the last quarter of the samples is fold 1.
    """
    fitted = [p for batch in inputs for p in in_pieces(batch)]
    if held_out is None:
        first = len(fitted) - len(fitted) // HELD_OUT
        fitted, chosen = fitted[:first], fitted[first:]
    else:
        chosen = [p for batch in some(held_out, MAX_SAMPLES) for p in in_pieces(batch)]
    at = [(i + 0.5) / len(fitted) for i in range(len(fitted))]
    at += [(i + 1.0) / len(chosen) for i in range(len(chosen))]
    folds = [0] * len(fitted) + [1] * len(chosen)
    order = sorted(range(len(at)), key=lambda i: at[i])
    return [Piece((fitted + chosen)[i], folds[i]) for i in order]


def _turned(module: fx.GraphModule, pieces: Sequence[Piece]) -> list[Piece]:
    """The same in the memory format in which ``module`` is fastest."""
    inputs = channels_last(module, [p.inputs for p in pieces])
    return [replace(p, inputs=i) for p, i in zip(pieces, inputs, strict=True)]


def in_pieces(batch: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """A batch as batches of at most PIECE samples."""
    samples = samples_of(batch)
    if samples <= PIECE or not divisible(batch):
        return [batch]
    return [part_of(batch, slice(i, i + PIECE)) for i in range(0, samples, PIECE)]


@dataclass(frozen=True)
class Outcome:
    """Of :func:`best_form`: the form that is kept, its report, what both measured."""

    form: str
    report: RepairReport
    fitness: Mapping[str, float]


def best_form(
    traced: Traced,
    plan: PrunePlan,
    module: fx.GraphModule,
    once: Callable[[PrunePlan, fx.GraphModule], RepairReport],
    batches: Iterable[Any],
    measure: Callable[[fx.GraphModule], float],
    held_out: Iterable[Any] | None = None,
) -> Outcome:
    """The one-shot form, the sequential one, and the mean of both; the best stays in ``module``.

    Both forms estimate the same weights, with errors of their own: the one-shot form does not see
    what the cut before a layer did, the sequential one follows it on the samples at hand. Where
    samples are few, the mean of the weights is nearer to the original than either.

    ``once`` is the one-shot repair; ``measure`` a fitness of the repaired module on samples that
    the repair has not seen, lower is better; ``held_out``: see :func:`repair_sequential`.
    Consumers that the sequential form cannot treat keep what the one-shot form made of them.
    """
    reports = {"one-shot": once(plan, module)}
    states = {"one-shot": _state(module)}
    fitness = {"one-shot": measure(module)}
    guess = once if isinstance(once, LeastSquares) else None
    sequential = repair_sequential(traced, plan, module, batches, held_out=held_out, once=guess)
    reports["sequential"] = reports["mean"] = sequential
    states["sequential"] = _state(module)
    fitness["sequential"] = measure(module)
    first, second = states.values()
    states["mean"] = {k: t.lerp(second[k], 0.5) for k, t in first.items() if t.is_floating_point()}
    _put(module, states["mean"])
    fitness["mean"] = measure(module)
    form = min(("sequential", "mean", "one-shot"), key=lambda f: fitness[f])
    _put(module, states[form])
    return Outcome(form, reports[form], fitness)


def _state(module: fx.GraphModule) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in module.state_dict().items()}


def _put(module: fx.GraphModule, state: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        own = module.state_dict()
        for name, t in state.items():
            own[name].copy_(t)


@dataclass(frozen=True)
class Profile:
    """What a run of a model showed.

    held      node name -> most bytes of activations that one sample holds from that node on
    harmless  names of nodes that do not write to what they read
    """

    held: dict[str, int]
    harmless: frozenset[str]


def live_profile(module: fx.GraphModule, inputs: tuple[Any, ...]) -> Profile:
    """Of one run on ``inputs``, which stay as they are."""
    # copies: a slice of all data would be counted with all of its memory
    inputs = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.clone(), inputs)
    run = SideBySide(module, [inputs])
    held: dict[str, int] = {}
    harmless = set()
    for node in module.graph.nodes:
        if node.op == "output":
            break
        read = tensors([run.envs[0][n] for n in node.all_input_nodes])
        before = [t._version for t in read]
        run.step(node, 0)
        if before == [t._version for t in read]:
            harmless.add(node.name)
        found = tensors(list(run.envs[0].values()))
        alive = {storage_key(t): t.untyped_storage().nbytes() for t in found}
        held[node.name] = sum(n for key, n in alive.items() if key not in run.own)
    most, samples = 0, samples_of(inputs)
    for name in reversed(held):
        most = max(most, held[name])
        held[name] = -(-most // samples)
    return Profile(held, frozenset(harmless))


class Walk:
    """One pass of both models; ``repaired`` and ``skipped`` are its result.

    ``pruned`` may hold more inputs than ``original``: they pass too, and take no part in the fit.
    Of the inputs that the original holds already, the last quarter chooses ridges.

    queue  samples that start when there is room for them
    once   gives first guesses
    probe  the pruned model on few samples; None: what is left at the outputs is not fitted
    refit  whether the samples that choose take part in the fit
    fallback  for a consumer that this plan leaves without equal rows
    sketches  consumer key -> its outputs, on which ridges are judged; the same for every plan
    """

    def __init__(
        self,
        traced: Traced,
        plan: PrunePlan,
        original: Observed,
        pruned: Side,
        ridge: float | None = None,
    ) -> None:
        self.traced, self.ridge = traced, ridge
        self.masks = traced.masks(plan)
        self.original, self.pruned = original, pruned
        self.queue: Queue | None = None
        self.once: LeastSquares | None = None
        self.probe: Side | None = None
        self.fallback: Callable[[Consumer], object] | None = None
        self.refit = True
        self.sketches: dict[str, Tensor] = {}
        sizes = np.cumsum(original.sizes)
        starts = (sizes - original.sizes).tolist()
        self.folds = [int(n >= sizes[-1] * (1 - 1 / HELD_OUT)) for n in starts]
        self.weights, self.targets = named_tensors(traced.graph_module), pruned.tensors
        self.calls = parameter_calls(traced.graph_module)
        self.sharing: dict[str, list[Consumer]] = {}
        for c in traced.consumers:
            self.sharing.setdefault(c.weight, []).append(c)
        self.writer = Writer(traced, self.weights, self.sharing.values())
        self.repaired: list[str] = []
        self.skipped: dict[str, str] = {}

    def run(self) -> None:
        """Consumer by consumer in execution order; nothing behind the last one has to run."""
        for consumer in self.traced.consumers:
            self.attempt(consumer)

    def attempt(self, consumer: Consumer) -> None:
        """Repair one consumer, or note why it cannot be."""
        try:
            self.check(consumer)
            self.original.reach(consumer.node)
            self.pruned.reach(consumer.node)
            self._admit(consumer.node)
            self._treat(consumer)
        except Cannot as reason:
            self.skipped[consumer.key] = str(reason)
            if self.fallback is not None:
                self.fallback(consumer)

    def check(self, consumer: Consumer) -> None:
        """Raises Cannot for what is known before anything is measured."""
        weight = self.weights[consumer.weight]
        calls = self.calls.get(storage_key(weight), 0)
        if len(self.sharing[consumer.weight]) > 1 or calls > 1:
            raise Cannot("its parameter is used more than once")
        if consumer.kind == "linear" and weight.ndim != 2:
            raise Cannot("its parameter is not a matrix")
        if Layout.of(consumer).variables // consumer.groups > MAX_VARIABLES:
            raise Cannot(f"more than {MAX_VARIABLES} channels")

    def _admit(self, node: str) -> None:
        """Samples for which there is room now start, and come to where the others are."""
        while self.queue is not None:
            piece = self.queue.next(node, sum(self.original.sizes))
            if piece is None:
                return
            for side in (self.original, self.pruned):
                if isinstance(side, Side):
                    side.join(piece.inputs)
            self.folds.append(piece.fold)

    def _treat(self, consumer: Consumer) -> None:
        layout = Layout.of(consumer)
        keep = kept_variables(consumer, layout, self.masks[consumer.classes])
        pair = Pair(keep.reshape(consumer.groups, -1))
        coverage = self._measure(consumer, layout, pair)
        place = self.writer.place([consumer], self.targets)
        if pair.unchanged:
            if self.repaired:
                self._correct(consumer, pair, not isinstance(place, str))
            return
        outputs = self._outputs(consumer, layout, coverage, pair)
        guess = None if self.once is None else self.once.guess(consumer, keep)
        guesses = () if guess is None else (guess,)
        centred = not isinstance(place, str)
        solved = pair.solve(self.ridge, centred, outputs, guesses, refit=self.refit)
        self.writer.write([consumer], solved, layout, coverage, self.masks, self.targets)
        self.repaired.append(consumer.key)
        if isinstance(place, str):
            self.skipped[consumer.key] = f"{place}; fitted without a mean part"
        if pair.dropped:
            self.skipped[consumer.key] = "no fit of its inputs was better on held-out samples"
        self._correct(consumer, pair, centred)

    def _correct(self, consumer: Consumer, pair: Pair, centred: bool) -> None:
        """What is left at the output; nothing where that cannot be seen or fitted."""
        if self.probe is None or not isinstance(self.original, Side):
            return
        classes = self.traced.param_classes.get((consumer.weight, consumer.out_dim))
        outs = self.weights[consumer.weight].shape[consumer.out_dim]
        rows = np.ones(outs, dtype=np.bool_) if classes is None else self.masks[classes]
        sides = Sides(self.original, self.pruned, self.probe, self.folds, pair.folds)
        try:
            self.probe.reach(consumer.node)
            step = correction(consumer, sides, rows, self.ridge, centred, self.refit)
        except Cannot:
            return
        if step is not None:
            self.pruned.forget()
            self.probe.forget()
            self.writer.add(consumer, step.weight, step.shift, self.targets)
            if consumer.key not in self.repaired:
                self.repaired.append(consumer.key)

    def _outputs(self, consumer: Consumer, layout: Layout, coverage: Tensor, pair: Pair) -> Tensor:
        """[g, f, v] rows of the weight, each tap by the root of its coverage; or mixtures of them.

        f is at most SKETCH: random signs keep squared errors right on average.
        """
        known = self.sketches.get(consumer.key)
        if known is None:
            blocks = split_weight(consumer, self.weights[consumer.weight], layout)
            known = _sketch(blocks.cpu().double() * coverage.sqrt())
            self.sketches[consumer.key] = known
        return known if len(pair.alive) == len(known) else known[pair.alive]

    def _measure(self, consumer: Consumer, layout: Layout, pair: Pair) -> Tensor:
        """Gather both models' inputs to ``consumer``; how often its taps meet them, [T]."""
        smaller = replace(layout, variables=int(pair.keep.sum()))
        for i in range(len(self.original.sizes)):
            full = self.original.rows(consumer, layout, i)
            cut = self.pruned.rows(consumer, smaller, i)
            if full.extent != cut.extent:
                raise Cannot("the rows of its input are not the same in both models")
            pair.add(full.values, cut.values, self.folds[i])
        return self.original.coverage(consumer)


def _sketch(blocks: Tensor) -> Tensor:
    """Weights [g, o, v, T] -> [g, f, v]."""
    rows = blocks.transpose(2, 3).flatten(1, 2)
    if rows.shape[1] > SKETCH:
        generator = torch.Generator().manual_seed(rows.shape[1])
        signs = torch.randint(0, 2, (SKETCH, rows.shape[1]), generator=generator) * 2 - 1
        rows = signs.double() @ rows / SKETCH**0.5
    # squared errors are those of the triangle
    return torch.linalg.qr(rows, mode="r").R if rows.shape[1] > rows.shape[2] else rows
