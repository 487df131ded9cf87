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
positions the samples, and all taps have the same D; each convolution group has its own.

Legend for shapes: S rows (samples x positions), g convolution groups that stay, v variables of each
in the original, k of them kept, C input channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, fx

from fxprune.inputs import samples_of
from fxprune.isolate import exact_arithmetic, rng_kept
from fxprune.moments import MAX_VARIABLES, Layout, input_rows, split_weight
from fxprune.observe import coverage_of
from fxprune.products import Product, Watch, as_product, evaluating, storage_key
from fxprune.regression import Cannot, Pair
from fxprune.renorm import RepairReport, SideBySide, some
from fxprune.repair import LeastSquares, Writer, kept_variables, named_tensors, parameter_calls
from fxprune.types import Consumer, PrunePlan

if TYPE_CHECKING:
    from fxprune.traced import Traced

MAX_SAMPLES = 1024  # that pass through the models together
MAX_BYTES = 2 << 30  # of activations that both models may hold at a time
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
    max_samples  of the batches that are used
    max_bytes    of live activations of both models together: where a sample holds much (early
                 layers of a large image) fewer take part, the others join in further down

    Consumers that cannot be treated keep the weights that they have in ``module`` (those of the
    cut, or of the one-shot form where that ran before) and are reported with the reason. Costs
    about one forward pass of the original and two of the pruned model.

    Raises DataError where there is no sample, InternalError where plan and module do not fit.
    """
    waiting = _pieces(some(batches, max_samples), held_out)
    original, pruned = Side(traced.graph_module, []), Side(module, [])
    with rng_kept(), exact_arithmetic(), evaluating(traced.graph_module), evaluating(module):
        held = live_profile(traced.graph_module, waiting[0].inputs)
        most = {name: max_bytes // max(1, 2 * n) for name, n in held.items()}
        walk = Walk(traced, plan, original, pruned, ridge)
        walk.queue, walk.once, walk.refit = Queue(waiting, most), once, held_out is None
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
    fitted = [p for batch in inputs for p in _split(batch)]
    if held_out is None:
        first = len(fitted) - len(fitted) // HELD_OUT
        fitted, chosen = fitted[:first], fitted[first:]
    else:
        chosen = [p for batch in some(held_out, MAX_SAMPLES) for p in _split(batch)]
    at = [(i + 0.5) / len(fitted) for i in range(len(fitted))]
    at += [(i + 1.0) / len(chosen) for i in range(len(chosen))]
    folds = [0] * len(fitted) + [1] * len(chosen)
    order = sorted(range(len(at)), key=lambda i: at[i])
    return [Piece((fitted + chosen)[i], folds[i]) for i in order]


def _split(batch: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """A batch as batches of at most PIECE samples."""
    samples = samples_of(batch)
    if samples <= PIECE:
        return [batch]
    whole = [isinstance(x, Tensor) and x.ndim > 0 and len(x) == samples for x in batch]
    return [
        tuple(x[i : i + PIECE] if w else x for x, w in zip(batch, whole, strict=True))
        for i in range(0, samples, PIECE)
    ]


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
    """The one-shot form, then the sequential one on top; the better of both stays in ``module``.

    ``once`` is the one-shot repair; ``measure`` a fitness of the repaired module on samples that
    the repair has not seen, lower is better; ``held_out``: see :func:`repair_sequential`.
    Consumers that the sequential form cannot treat keep what the one-shot form made of them.
    """
    report = once(plan, module)
    held = {name: t.detach().clone() for name, t in module.state_dict().items()}
    fitness = {"one-shot": measure(module)}
    guess = once if isinstance(once, LeastSquares) else None
    sequential = repair_sequential(traced, plan, module, batches, held_out=held_out, once=guess)
    fitness["sequential"] = measure(module)
    if fitness["sequential"] <= fitness["one-shot"]:
        return Outcome("sequential", sequential, fitness)
    with torch.no_grad():
        for name, t in module.state_dict().items():
            t.copy_(held[name])
    return Outcome("one-shot", report, fitness)


def live_profile(module: fx.GraphModule, inputs: tuple[Any, ...]) -> dict[str, int]:
    """Node name -> most bytes of activations that one sample holds from that node on."""
    run = SideBySide(module, [inputs])
    held: dict[str, int] = {}
    for node in module.graph.nodes:
        if node.op == "output":
            break
        run.step(node, 0)
        found = torch.utils._pytree.tree_leaves(list(run.envs[0].values()))
        tensors = [t for t in found if isinstance(t, Tensor)]
        alive = {storage_key(t): t.untyped_storage().nbytes() for t in tensors}
        held[node.name] = sum(n for key, n in alive.items() if key not in run.own)
    most, samples = 0, samples_of(inputs)
    for name in reversed(held):
        most = max(most, held[name])
        held[name] = -(-most // samples)
    return held


class Walk:
    """One pass of both models; ``repaired`` and ``skipped`` are its result.

    ``pruned`` may hold more inputs than ``original``: they pass too, and take no part in the fit.
    Of the inputs that the original holds already, the last quarter chooses ridges.

    queue  samples that start when there is room for them
    once   gives first guesses
    refit  whether the samples that choose take part in the fit
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
        self.refit = True
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
            self.original.join(piece.inputs)
            self.pruned.join(piece.inputs)
            self.folds.append(piece.fold)

    def _treat(self, consumer: Consumer) -> None:
        layout = Layout.of(consumer)
        keep = kept_variables(consumer, layout, self.masks[consumer.classes])
        pair = Pair(keep.reshape(consumer.groups, -1))
        coverage = self._measure(consumer, layout, pair)
        if pair.unchanged:
            return
        place = self.writer.place([consumer], self.targets)
        outputs = self._outputs(consumer, layout, coverage, pair)
        guess = None if self.once is None else self.once.guess(consumer, keep)
        guesses = () if guess is None else (guess,)
        centred = not isinstance(place, str)
        solved = pair.solve(self.ridge, centred, outputs, guesses, refit=self.refit)
        self.writer.write([consumer], solved, layout, coverage, self.masks, self.targets)
        self.repaired.append(consumer.key)
        if isinstance(place, str):
            self.skipped[consumer.key] = f"{place}; fitted without a mean part"

    def _outputs(self, consumer: Consumer, layout: Layout, coverage: Tensor, pair: Pair) -> Tensor:
        """[g, f, v] rows of the weight, each tap by the root of its coverage; or mixtures of them.

        f is at most SKETCH: random signs keep squared errors right on average.
        """
        blocks = split_weight(consumer, self.weights[consumer.weight], layout)
        blocks = blocks.cpu()[pair.alive].double() * coverage.sqrt()
        rows = blocks.transpose(2, 3).flatten(1, 2)
        if rows.shape[1] <= SKETCH:
            return rows
        generator = torch.Generator().manual_seed(rows.shape[1])
        signs = torch.randint(0, 2, (SKETCH, rows.shape[1]), generator=generator) * 2 - 1
        mixed: Tensor = signs.double() @ rows / SKETCH**0.5
        return mixed

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


@dataclass(frozen=True)
class Rows:
    """What enters a consumer for one batch.

    values [S, V]; extent: all sizes of the input but the channels'.
    """

    values: Tensor
    extent: tuple[int, ...]


class _Reached(Exception):
    """The product that was looked for is about to run; never leaves this file."""

    def __init__(self, product: Product) -> None:
        super().__init__()
        self.product = product


class _Stop(Watch):
    """Raises _Reached in front of the product of that key: it does not have to run."""

    def __init__(self, names: dict[int, str], key: str) -> None:
        super().__init__(names, lambda *_: None)
        self.key = key

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        product = as_product(func, args)
        here = product is not None and storage_key(product.w) in self.names
        if product is not None and here and self.key == f"{self.node}:{self.count}":
            raise _Reached(product)
        return super().__torch_dispatch__(func, types, args, kwargs)


class Observed(Protocol):
    """What the walk needs of the original; see :class:`Side`."""

    @property
    def sizes(self) -> list[int]: ...
    def reach(self, name: str) -> None: ...
    def rows(self, consumer: Consumer, layout: Layout, i: int) -> Rows: ...
    def coverage(self, consumer: Consumer) -> Tensor: ...


class Side:
    """One of the two models, run up to some node; ``sizes``: samples of each input."""

    def __init__(self, module: fx.GraphModule, inputs: Sequence[tuple[Any, ...]]) -> None:
        self.run = SideBySide(module, inputs)
        self.sizes = [samples_of(i) for i in inputs]
        self.tensors = named_tensors(module)
        self.nodes: list[fx.Node] = list(module.graph.nodes)
        self.at = 0

    def reach(self, name: str) -> None:
        """All inputs pass the nodes before the one of that name. Raises Cannot without one."""
        if name not in {n.name for n in self.nodes[self.at :]}:
            raise Cannot("its node is not in both graphs at the same place")
        while self.nodes[self.at].name != name:
            self.advance()

    def advance(self) -> None:
        """All inputs pass one node."""
        for i in range(len(self.run.envs)):
            self.run.step(self.nodes[self.at], i)
        self.at += 1

    def join(self, inputs: tuple[Any, ...]) -> None:
        """One more batch, run up to where the others are."""
        self.run.envs.append({})
        self.run.sources.append(iter(inputs))
        self.sizes.append(samples_of(inputs))
        for node in self.nodes[: self.at]:
            self.run.step(node, len(self.sizes) - 1)

    def rows(self, consumer: Consumer, layout: Layout, i: int) -> Rows:
        """What enters ``consumer``, in the node that was reached. Raises Cannot."""
        mode = _Stop(self.run.own, consumer.key)
        mode.node = consumer.node
        try:
            with mode:
                self.run.attempt(self.nodes[self.at], i)
        except _Reached as reached:
            product = reached.product
        else:
            raise Cannot("it is not the same product in both models")
        x = product.x
        wanted = consumer.kind, layout.variables * layout.taps
        if (product.kind, x.shape[1]) != wanted:
            raise Cannot("it is not the same product in both models")
        if product.w.numel() != self.tensors[consumer.weight].numel():
            raise Cannot("it uses a part of its parameter")
        values, _ = input_rows(consumer.kind, layout, x, self.sizes[i])
        return Rows(values.flatten(0, 1), (x.shape[0], *x.shape[2:]))

    def coverage(self, consumer: Consumer) -> Tensor:
        """[T] how often each tap of ``consumer`` meets its input; see observe.coverage_of."""
        found: list[Tensor] = []

        def look(key: str, product: Product, out: Tensor) -> None:
            if key == consumer.key:
                found.append(coverage_of(consumer, product, out))

        mode = Watch(self.run.own, look)
        mode.node = consumer.node
        with mode:
            self.run.attempt(self.nodes[self.at], 0)
        return found[0]
