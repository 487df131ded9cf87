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

from fxprune.errors import InternalError
from fxprune.isolate import exact_arithmetic, rng_kept
from fxprune.moments import CHUNK, MAX_VARIABLES, Layout, input_rows
from fxprune.observe import coverage_of
from fxprune.products import Product, Watch, as_product, evaluating, storage_key
from fxprune.renorm import RepairReport, SideBySide, samples_of, some
from fxprune.repair import (
    RIDGE,
    Solved,
    Writer,
    kept_variables,
    named_tensors,
    parameter_calls,
)
from fxprune.types import BoolArray, Consumer, PrunePlan

if TYPE_CHECKING:
    from fxprune.traced import Traced

MAX_SAMPLES = 256  # that pass through the models together
MAX_BYTES = 2 << 30  # of activations that both models may hold at a time


def repair_sequential(
    traced: Traced,
    plan: PrunePlan,
    module: fx.GraphModule,
    batches: Iterable[Any],
    *,
    ridge: float = RIDGE,
    max_samples: int = MAX_SAMPLES,
    max_bytes: int = MAX_BYTES,
) -> RepairReport:
    """Sequential least squares; ``module``, the cut of ``plan``, changes in place.

    batches      each a tensor or a tuple of positional inputs, first dim the samples
    ridge        lambda, as a share of the mean variance of the kept inputs
    max_samples  of the batches that are used; fewer where ``max_bytes`` of live activations of both
                 models together do not suffice for them

    Consumers that cannot be treated keep the weights that they have in ``module`` (those of the
    cut, or of the one-shot form where that ran before) and are reported with the reason. Costs
    about one forward pass of the original and two of the pruned model.

    Raises DataError where there is no sample, InternalError where plan and module do not fit.
    """
    inputs = some(batches, max_samples)
    with rng_kept(), exact_arithmetic(), evaluating(traced.graph_module), evaluating(module):
        fits = max_bytes // max(1, 2 * live_bytes(traced.graph_module, inputs[0]))
        inputs = some(inputs, max(1, min(max_samples, fits)))
        walk = Walk(traced, plan, Side(traced.graph_module, inputs), Side(module, inputs), ridge)
        walk.run()
    return RepairReport(tuple(walk.repaired), walk.skipped)


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
) -> Outcome:
    """The one-shot form, then the sequential one on top; the better of both stays in ``module``.

    ``once`` is the one-shot repair; ``measure`` a fitness of the repaired module on samples that
    the repair has not seen, lower is better. Consumers that the sequential form cannot treat keep
    what the one-shot form made of them.
    """
    report = once(plan, module)
    held = {name: t.detach().clone() for name, t in module.state_dict().items()}
    fitness = {"one-shot": measure(module)}
    sequential = repair_sequential(traced, plan, module, batches)
    fitness["sequential"] = measure(module)
    if fitness["sequential"] <= fitness["one-shot"]:
        return Outcome("sequential", sequential, fitness)
    with torch.no_grad():
        for name, t in module.state_dict().items():
            t.copy_(held[name])
    return Outcome("one-shot", report, fitness)


def live_bytes(module: fx.GraphModule, inputs: tuple[Any, ...]) -> int:
    """Most bytes of activations that one sample of a batch holds between two nodes."""
    run = SideBySide(module, [inputs])
    most = 0
    for node in module.graph.nodes:
        if node.op == "output":
            break
        run.step(node, 0)
        held = torch.utils._pytree.tree_leaves(list(run.envs[0].values()))
        tensors = [t for t in held if isinstance(t, Tensor)]
        alive = {storage_key(t): t.untyped_storage().nbytes() for t in tensors}
        most = max(most, sum(n for key, n in alive.items() if key not in run.own))
    return -(-most // samples_of(inputs))


class Cannot(Exception):
    """Why a consumer cannot be treated; never reaches a caller."""


class Walk:
    """One pass of both models; ``repaired`` and ``skipped`` are its result.

    ``pruned`` may hold more inputs than ``original``: they pass too, and take no part in the fit.
    """

    def __init__(
        self,
        traced: Traced,
        plan: PrunePlan,
        original: Observed,
        pruned: Side,
        ridge: float = RIDGE,
    ) -> None:
        self.traced, self.ridge = traced, ridge
        self.masks = traced.masks(plan)
        self.original, self.pruned = original, pruned
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

    def _treat(self, consumer: Consumer) -> None:
        layout = Layout.of(consumer)
        keep = kept_variables(consumer, layout, self.masks[consumer.classes])
        pair = Pair(keep.reshape(consumer.groups, -1))
        coverage = self._measure(consumer, layout, pair)
        if pair.unchanged:
            return
        place = self.writer.place([consumer], self.targets)
        solved = pair.solve(self.ridge, centred=not isinstance(place, str))
        self.writer.write([consumer], solved, layout, coverage, self.masks, self.targets)
        self.repaired.append(consumer.key)
        if isinstance(place, str):
            self.skipped[consumer.key] = f"{place}; fitted without a mean part"

    def _measure(self, consumer: Consumer, layout: Layout, pair: Pair) -> Tensor:
        """Gather both models' inputs to ``consumer``; how often its taps meet them, [T]."""
        smaller = replace(layout, variables=int(pair.keep.sum()))
        for i in range(len(self.original.sizes)):
            full = self.original.rows(consumer, layout, i)
            cut = self.pruned.rows(consumer, smaller, i)
            if full.extent != cut.extent:
                raise Cannot("the rows of its input are not the same in both models")
            pair.add(full.values, cut.values)
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


class Pair:
    """Moments of the kept inputs X' and of what they leave of the original's, X - E X'; float64.

    ``keep`` [groups, v]: the original's variables that are kept. A convolution group that keeps
    nothing is gone; the others keep equally many.
    """

    def __init__(self, keep: BoolArray) -> None:
        self.keep = keep
        count = keep.sum(1)
        self.alive = torch.from_numpy(np.flatnonzero(count))
        widths = set(count[count > 0].tolist())
        if len(widths) != 1:
            raise Cannot(f"its convolution groups keep different numbers of inputs: {widths}")
        order = torch.from_numpy(np.argsort(~keep, axis=1, kind="stable"))
        self.kept = order[self.alive, : widths.pop()]
        self.total = 0
        self.unchanged = True
        self.shifts: tuple[Tensor, Tensor] | None = None
        self.sums: list[Tensor] = []

    def add(self, x: Tensor, y: Tensor) -> None:
        """Rows of the original's input [S, V] and of the pruned model's [S, V']."""
        x, y = (t if t.dtype == torch.float64 else t.float() for t in (x, y))
        kept = self.kept.to(x.device)
        y = y.unflatten(1, kept.shape)
        rest = x.unflatten(1, self.keep.shape)[:, self.alive.to(x.device)].clone()
        rest.scatter_add_(2, kept.expand(len(rest), -1, -1), -y)
        if self.shifts is None:
            self.shifts = rest.mean(0), y.mean(0)
        self.unchanged = self.unchanged and not bool(rest.any())
        rest, y = rest - self.shifts[0], y - self.shifts[1]
        for r, k in zip(rest.split(CHUNK), y.split(CHUNK), strict=True):
            parts = [
                r.sum(0),
                k.sum(0),
                torch.einsum("sgv,sgk->gvk", r, k),
                torch.einsum("sgi,sgk->gik", k, k),
            ]
            wide = [p.double().cpu() for p in parts]
            self.sums = [a + b for a, b in zip(self.sums, wide, strict=True)] if self.sums else wide
        self.total += len(rest)

    def solve(self, ridge: float, centred: bool) -> Solved:
        """D [g, v, k] and the mean that it leaves [g, v]; for all variables, the kept ones too."""
        if self.shifts is None:
            raise InternalError("a regression without a row")
        rest, mean, across, inside = (s / self.total for s in self.sums)
        across = across - rest[:, :, None] * mean[:, None]
        inside = inside - mean[:, :, None] * mean[:, None]
        rest, mean = rest + self.shifts[0].double().cpu(), mean + self.shifts[1].double().cpu()
        if not centred:
            across = across + rest[:, :, None] * mean[:, None]
            inside = inside + mean[:, :, None] * mean[:, None]
        level = inside.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30) * ridge
        inside.diagonal(dim1=1, dim2=2).add_(level[:, None])
        factor, failed = torch.linalg.cholesky_ex(inside)
        if bool(failed.any()):
            found = across @ torch.linalg.pinv(inside, hermitian=True)
        else:
            found = torch.cholesky_solve(across.transpose(1, 2), factor).transpose(1, 2)
        offset = rest - (found @ mean[:, :, None])[:, :, 0]
        if not bool(found.isfinite().all()):
            raise Cannot("the moments of its input are not finite")
        every = torch.arange(self.keep.shape[1]).expand(len(self.alive), -1)
        return Solved(
            self.alive, self.kept, every, found, offset if centred else torch.zeros_like(offset)
        )
