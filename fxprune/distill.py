"""repair="distill": a short distillation from the original on the calibration data, no labels.

After least squares, hundreds of steps of gradient descent draw the pruned model's outputs and
inner features (:mod:`fxprune.imitate`) to the original's. Batch normalisation stays in eval mode:
its statistics do not move, since calibration data is rarely the training distribution; its scale
and shift do. Few samples are fitted too well soon, so most batches are mixtures of two samples
(mixup, Zhang et al., 2018), for which the original says what it gives, and of all states that were
measured on held-out samples the best stays: never a worse one than least squares left. Among them
are some on the way from there to the last one (Wortsman et al., 2022): part of a way that went
too far is often better than either end.

Steps are relative to the size of each tensor (as in LARS, You et al., 2017, and Adafactor, Shazeer
and Stern, 2018), since an absolute step that small nets need tears fine weights apart. What share
of its size a tensor may move differs from net to net by a factor of ten and more all the same, so
short runs tell: the largest rate that does no lasting harm. (Not the best of the short runs: it is
a small one, which gains little in a whole run. Last, small steps take out the noise of large ones.)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from fxprune.errors import ModelError, SpecError
from fxprune.formats import turned, turns
from fxprune.imitate import Point, Target, points, spread, tapped
from fxprune.inputs import divisible, part_of, samples_of
from fxprune.isolate import rng_kept
from fxprune.products import evaluating
from fxprune.progress import bar
from fxprune.renorm import some
from fxprune.traced import Traced
from fxprune.types import PrunePlan

WARM_UP = 0.05  # of the steps, for a linear rise of the learning rate; a cosine takes it to zero
WORK = 2.5e12  # multiply-adds of the original in all steps together, where no number is given
FEWEST_STEPS, MOST_STEPS = 300, 2000  # then
SPREAD_SAMPLES = 256  # on which the size of the outputs' loss is told
GRADIENT_NORM = 1.0  # longer gradients are clipped
RATES = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4)  # tried where none is given, until one is borne
TRIAL = 0.1  # of the steps, for each rate that is tried
BORNE = 1.5  # times the measure before, up to which a short run may end
TORN = 10.0  # times the loss of the first batch, above which a short run breaks off
SHARES = (0.25, 0.5, 0.75)  # of the way from the state before to the last one
LEAST_SIZE = 0.01  # of the median size: smaller tensors (a bias of zeros) move as if they had that


@dataclass(frozen=True)
class Distillation:
    """Options of ``repair="distill"``; give it as ``repair=Distillation(steps=1000)``.

    steps       of the optimiser, each one batch; None: 300 to 2,000, as many as take some minutes
                on one core (by the original's multiply-adds, so always the same number)
    lr          highest rate of Adam, relative: the share of its own size (root mean square) that a
                tensor moves in one step; None: the largest that a short run bears
    batch_size  samples of each step
    features    weight of the inner features against the outputs; 0: outputs alone
    mix         share of the batches that are mixtures of two samples; inputs of whole numbers
                (tokens) are never mixed
    checks      how often the held-out samples are measured
    samples     to learn from, where the data has so many; those beyond ``calibration_samples`` are
                for the distillation alone. More of them cost no more steps. 0: those of the repair
    """

    steps: int | None = None
    lr: float | None = None
    batch_size: int = 32
    features: float = 1.0
    mix: float = 0.75
    checks: int = 10
    samples: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 1), ("checks", 1), ("samples", 0)):
            value = getattr(self, name)
            if name == "steps" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise SpecError(
                    f"distillation: {name} must be a whole number from {least}, got {value}"
                )
        for name, most in (("lr", math.inf), ("features", math.inf), ("mix", 1.0)):
            value = getattr(self, name)
            if name == "lr" and value is None:
                continue
            if not isinstance(value, (int, float)) or not 0 <= value <= most or value == math.inf:
                limit = "" if most == math.inf else f" and at most {most:g}"
                raise SpecError(f"distillation: {name} must be at least 0{limit}, got {value}")

    def counted(self, macs: float) -> Distillation:
        """With a number of steps; ``macs``: multiply-adds of the original for one sample."""
        if self.steps is not None:
            return self
        fitting = int(WORK / max(1.0, macs * self.batch_size))
        return replace(self, steps=min(max(fitting, FEWEST_STEPS), MOST_STEPS))


@dataclass(frozen=True)
class DistillReport:
    """What :func:`distill` did.

    before, after  the measure on held-out samples, lower is better; after <= before
    best_step      the step whose state stays; 0: none was better
    share          1, or how much of the way from the state before to the last one was taken
    curve          (step, measure) of every check
    lr             the rate; trials: rate -> measure after its short run, where several were tried
    points         nodes whose features were compared
    """

    before: float
    after: float
    best_step: int
    curve: tuple[tuple[int, float], ...]
    points: tuple[str, ...]
    steps: int
    seconds: float
    lr: float = 0.0
    trials: Mapping[float, float] = field(default_factory=dict)
    share: float = 1.0
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For result.json."""
        return {
            "fitness": {"before": self.before, "after": self.after},
            "best_step": self.best_step,
            "share": self.share,
            "steps": self.steps,
            "points": list(self.points),
            "curve": [list(c) for c in self.curve],
            "seconds": round(self.seconds, 2),
            "lr": self.lr,
            **({"trials": {f"{r:g}": v for r, v in self.trials.items()}} if self.trials else {}),
            **({"note": self.note} if self.note else {}),
        }


def distill(
    traced: Traced,
    plan: PrunePlan,
    module: fx.GraphModule,
    batches: Iterable[Any],
    measure: Callable[[fx.GraphModule], float],
    options: Distillation | None = None,
    *,
    seed: int = 0,
    progress: bool = False,
) -> DistillReport:
    """Draw ``module``, the cut of ``plan``, to the original; its weights change in place.

    batches  each a tensor or a tuple of positional inputs, first dim the samples
    measure  fitness of the module in eval mode on samples that are not in ``batches``, lower is
             better; asked ``options.checks`` times

    Deterministic for a seed; global RNG states and ``requires_grad`` are put back.
    Raises DataError where there is no sample.
    """
    given = traced.captured.given.values
    o = (options or Distillation()).counted(traced.cost().macs / max(1, samples_of(given)))
    inputs = some(batches, 1 << 62)
    with rng_kept(seed), evaluating(traced.graph_module), evaluating(module):
        run = _Run(traced, plan, module, o, inputs)
        last = turns(traced.graph_module, inputs) and turns(module, inputs)
        with _learning(run.parameters), bar(progress) as shown:
            return run.run(lambda: iter(_Samples(inputs, o, seed, last)), measure, shown)


class _Samples:
    """Batches without end: every sample once in a seeded order, then again in another.

    ``last``: with the channels of a pixel next to each other.
    """

    def __init__(
        self,
        batches: Sequence[tuple[Any, ...]],
        o: Distillation,
        seed: int,
        last: bool = False,
    ) -> None:
        self.batches, self.mix, self.last = batches, o.mix, last
        self.generator = torch.Generator().manual_seed(seed)
        self.whole = not all(divisible(b) for b in batches)  # a list holds the samples
        self.where = [
            (b, i)
            for b, batch in enumerate(batches)
            for i in range(1 if self.whole else samples_of(batch))
        ]
        self.size = 1 if self.whole else min(o.batch_size, len(self.where))

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        queue: list[int] = []
        while True:
            while len(queue) < self.size:
                queue += torch.randperm(len(self.where), generator=self.generator).tolist()
            taken, queue = [self.where[i] for i in queue[: self.size]], queue[self.size :]
            if self.whole:
                batch = self.batches[taken[0][0]]
            else:
                wholes = [self.batches[b] for b, _ in taken]
                parts = [part_of(self.batches[b], slice(i, i + 1)) for b, i in taken]
                batch = self._mixed(_joined(wholes, parts))
            yield turned(batch) if self.last else batch

    def _mixed(self, batch: tuple[Any, ...]) -> tuple[Any, ...]:
        """Each sample and another one of the batch, in shares of its own."""
        n = samples_of(batch)
        along = [t for t in tree_leaves(batch) if isinstance(t, Tensor) and t.ndim and len(t) == n]
        if float(torch.rand((), generator=self.generator)) >= self.mix or n < 2:
            return batch
        if not all(t.is_floating_point() for t in along):
            return batch
        shift = int(torch.randint(1, n, (), generator=self.generator))
        share = torch.rand(n, generator=self.generator) * 0.5

        def one(x: Tensor) -> Tensor:
            if not any(x is t for t in along):
                return x
            part = share.to(x).view(-1, *[1] * (x.ndim - 1))
            return x + part * (x.roll(shift, 0) - x)

        mixed: tuple[Any, ...] = tree_map_only(Tensor, one, batch)
        return mixed


def _joined(wholes: Sequence[Any], samples: Sequence[Any]) -> tuple[Any, ...]:
    """One batch of samples, each a batch of one out of the batch in ``wholes``.

    What does not go by samples is that of the first.
    """
    counts = [samples_of(w) for w in wholes]

    def one(whole: Sequence[Any], parts: Sequence[Any]) -> Any:
        if isinstance(parts[0], Mapping):
            return {k: one([w[k] for w in whole], [p[k] for p in parts]) for k in parts[0]}
        along = all(
            isinstance(w, Tensor) and w.ndim and len(w) == n
            for w, n in zip(whole, counts, strict=True)
        )
        return torch.cat(list(parts)) if along else parts[0]

    pairs = zip(zip(*wholes, strict=True), zip(*samples, strict=True), strict=True)
    return tuple(one(whole, parts) for whole, parts in pairs)


class _Run:
    """One distillation: both models with their taps, the optimiser, the best state."""

    def __init__(
        self,
        traced: Traced,
        plan: PrunePlan,
        module: fx.GraphModule,
        o: Distillation,
        inputs: Sequence[tuple[Any, ...]],
    ) -> None:
        own = {n.name for n in module.graph.nodes}
        found = points(traced, plan) if o.features else ()
        self.points: tuple[Point, ...] = tuple(p for p in found if p.node in own)
        names = [p.node for p in self.points]
        self.teacher = tapped(traced.graph_module, names)
        self.student = tapped(module, names)
        self.module, self.o = module, o
        assert o.steps is not None, "counted"
        self.steps = o.steps
        self.cannot = ""  # why outputs cannot be compared, where they cannot
        self.spread = self._spread(traced, some(inputs, SPREAD_SAMPLES))
        self.best = self._state()
        self.parameters = [p for p in module.parameters() if p.is_floating_point()]

    def _spread(self, traced: Traced, inputs: Sequence[tuple[Any, ...]]) -> float:
        try:
            return spread([Target.of(traced.graph_module(*x)) for x in inputs])
        except ModelError as e:
            self.cannot = str(e)
            return 1.0

    def loss(self, batch: tuple[Any, ...]) -> Tensor | None:
        """None where nothing can be compared. Outputs that do not have one form (a detector's
        boxes) are left to the features."""
        with torch.no_grad():
            output, features = self.teacher(*batch)
        with torch.enable_grad():
            given, own = self.student(*batch)
            parts: list[Tensor] = []
            if not self.cannot:
                try:
                    parts.append(Target.of(output).loss(given) / self.spread)
                except ModelError as e:
                    self.cannot = str(e)
            pairs = zip(self.points, features, own, strict=True)
            errors = [p.loss(x, y) for p, x, y in pairs]
            if errors:
                parts.append(self.o.features * torch.stack(errors).mean())
            loss = sum(parts[1:], parts[0]) if parts else None
            return loss if loss is not None and loss.requires_grad else None

    def run(
        self,
        samples: Callable[[], Iterator[tuple[Any, ...]]],
        measure: Callable[[fx.GraphModule], float],
        shown: Any,
    ) -> DistillReport:
        """``samples()`` starts the same batches anew."""
        o, start = self.o, time.perf_counter()
        steps = self.steps
        self.task = shown.add_task("distill", total=steps, note="")
        self.shown, self.note = shown, ""
        before = measure(self.module)
        rates = RATES if o.lr is None else (o.lr,)
        trials = self._trials(rates, samples, measure, before) if len(rates) > 1 else {}
        rate = next(reversed(trials), rates[0])
        curve, best, step, share = [(0, before)], (0, before), 0, 1.0
        first = self._state()
        every = max(1, steps // o.checks)
        for step, _ in self._descend(rate, steps, samples()):
            if step % every == 0 or step == steps:
                curve.append((step, measure(self.module)))
                if curve[-1][1] < best[1]:
                    best = curve[-1]
                    self.best = self._state()
        last = self._state()
        for part in () if self.note else SHARES:
            self._put({k: t.lerp(last[k], part) for k, t in first.items() if t.is_floating_point()})
            value = measure(self.module)
            if value < best[1]:
                best, share = (step, value), part
                self.best = self._state()
        self._put_back()
        names = tuple(p.node for p in self.points)
        seconds = time.perf_counter() - start
        return DistillReport(
            before, best[1], best[0], tuple(curve), names, step, seconds, rate, trials, share,
            self.note,
        )  # fmt: skip

    def _trials(
        self,
        rates: Sequence[float],
        samples: Callable[[], Iterator[tuple[Any, ...]]],
        measure: Callable[[fx.GraphModule], float],
        before: float,
    ) -> dict[float, float]:
        """Rate -> the measure after a whole short run with it; inf where that tears the model.

        Until one is borne, which is the last. The module is as before.
        """
        steps = max(1, round(TRIAL * self.steps))
        self.shown.update(self.task, total=self.steps + len(rates) * steps)
        found: dict[float, float] = {}
        for rate in rates:
            first, torn = math.inf, False
            for step, value in self._descend(rate, steps, samples()):
                first = value if step == 1 else first
                torn = bool(self.note) or value > TORN * first
                if torn:
                    break
            value = math.inf if torn else measure(self.module)
            found[rate] = value if math.isfinite(value) else math.inf
            self._put_back()
            self.note = ""
            if found[rate] <= before + (BORNE - 1) * abs(before):
                break
        return found

    def _descend(
        self, rate: float, steps: int, samples: Iterator[tuple[Any, ...]]
    ) -> Iterator[tuple[int, float]]:
        """A run from where the module is: (step, loss) of each. Ends early with a note."""
        sizes = [float(p.detach().double().square().mean().sqrt()) for p in self.parameters]
        least = LEAST_SIZE * sorted(sizes)[len(sizes) // 2] if sizes else 0.0
        optimizer = torch.optim.Adam([{"params": [p]} for p in self.parameters], rate)
        for step, batch in zip(range(1, steps + 1), samples, strict=False):
            loss = self.loss(batch)
            if loss is None:
                why = self.cannot or "no gradient"
                self.note = f"nothing of the outputs can be compared ({why})"
                yield step, math.nan
                return
            value = float(loss.detach())
            if not math.isfinite(value):
                self.note = f"the loss was {value} at step {step}; it ended there"
                yield step, value
                return
            for group, size in zip(optimizer.param_groups, sizes, strict=True):
                group["lr"] = rate * _share(step, steps) * max(size, least)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, GRADIENT_NORM)
            optimizer.step()
            self.shown.update(self.task, advance=1, note=f"loss {value:.4f}, rate {rate:g}")
            yield step, value

    def _state(self) -> dict[str, Tensor]:
        return {k: t.clone() for k, t in self.module.state_dict().items()}

    def _put(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            own = self.module.state_dict()
            for k, t in state.items():
                own[k].copy_(t)

    def _put_back(self) -> None:
        self._put(self.best)


@contextmanager
def _learning(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """All parameters learn inside the block; flags and gradients are as before after it."""
    before = [p.requires_grad for p in parameters]
    try:
        for p in parameters:
            p.requires_grad_(True)
        yield
    finally:
        for p, flag in zip(parameters, before, strict=True):
            p.grad = None
            p.requires_grad_(flag)


def _share(step: int, steps: int) -> float:
    """Of the highest learning rate, for step 1..steps: a linear rise, then half a cosine."""
    rise = max(1, round(WARM_UP * steps))
    if step <= rise:
        return step / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))
