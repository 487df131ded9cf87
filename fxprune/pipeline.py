"""prune(): the stages in order. The only file that knows them all."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, fx, nn

from fxprune import allocate, criteria
from fxprune.allocate import AllocationProblem, Allocator
from fxprune.checkpoint import check_values, load_state, read
from fxprune.criteria import Criterion
from fxprune.cut import as_user_class, cut
from fxprune.data import Calibration, calibration_batches
from fxprune.distill import Distillation
from fxprune.errors import SEEDS, BudgetError, SpecError, whole
from fxprune.fitness import FinalFitness, KLFitness, Repair, final_rounds
from fxprune.inputs import divisible, part_of, samples_of
from fxprune.isolate import rng_kept, uncompiled
from fxprune.latency import Keeper, Target
from fxprune.mending import Batches, Mending
from fxprune.observe import Statistics, observe
from fxprune.products import in_modes_of
from fxprune.progress import Clock, working
from fxprune.repair import LeastSquares
from fxprune.rounds import Near, compose, round_budgets, transplanted
from fxprune.rounds import told as rounds_told
from fxprune.traced import Traced, trace
from fxprune.types import Budget, Cost, PrunePlan
from fxprune.workers import Recipe, Shipped, local_workers

HELD_OUT = 0.25  # of the calibration samples: for the fitness alone
RANDOM_SAMPLES = 64  # where there is no data: more random inputs tell no more


@dataclass(frozen=True)
class PruneResult:
    """What :func:`prune` gives.

    model         smaller model: the user's own class where it runs so, else the GraphModule
    graph_module  the same as an fx.GraphModule
    traced        the unpruned GraphModule it came from, a copy with the same parameter names
    analysis      the traced model with its groups and cost model
    plan          kept channels of each group; JSON in and out
    before, after costs at the example inputs
    report        figures and notes: calibration, seconds of each stage, repair, search
    """

    model: nn.Module
    graph_module: fx.GraphModule
    traced: fx.GraphModule
    analysis: Traced
    plan: PrunePlan
    before: Cost
    after: Cost
    report: dict[str, Any]


@dataclass(frozen=True)
class _Options:
    """Everything that can be checked before the long work, checked."""

    budget: Budget
    criterion: Criterion
    allocation: Allocator
    mending: Mending
    round_to: int | str
    target: Target | None
    seed: int
    progress: bool
    max_evaluations: int
    executor: Executor | None
    max_seconds: float | None = None
    journal: Path | None = None
    workers: int = 0


def prune(
    model: nn.Module,
    example_inputs: Any,
    budget: Budget | float = 0.5,
    data: Iterable[Any] | Tensor | None = None,
    *,
    criterion: Any = "attention", allocation: str | Allocator = "local",
    repair: str | Distillation | None = "lstsq",
    evaluate: Callable[[Any], float] | None = None,
    exclude: Sequence[str] = (), round_to: int | str | None = None,
    target: str | Target | None = None, threads: int = 1, seed: int = 0, progress: bool = True,
    calibration_samples: int = 256, max_evaluations: int = 60, max_seconds: float | None = None,
    journal: str | os.PathLike[str] | None = None,
    workers: int = 0, executor: Executor | None = None,
    steps: int = 1, tune: Callable[[nn.Module], nn.Module | None] | None = None,
) -> PruneResult:  # fmt: skip
    """Make a smaller model that keeps at most ``budget`` of the original's cost.

    example_inputs  a tensor, a tuple with one entry for each positional input, or a mapping of
                    keyword inputs
    budget          a Budget, or the share of the MACs to keep, in (0, 1]
    data            calibration batches: inputs or (inputs, targets); None: random inputs, with a
                    warning (rankings and repair are then as good as random inputs are)
    criterion       a name, a function or an object: see :mod:`fxprune.criteria`
    allocation      local | evolution | greedy | random (searches) | uniform | global | isomorphic,
                    or an object with the protocol
    repair          lstsq | distill | bn | None (cut only: then the result equals the masked
                    original). distill: least squares, then some minutes of gradient steps towards
                    the original, without labels; ``fxprune.Distillation(steps=...)`` has options
    evaluate        optional: model -> float, higher is better; guides the search in place of the KL
    exclude         shell-style patterns of modules, parameters or groups that stay whole
    round_to        kept counts are multiples of it (fewer for small groups); "auto": those that
                    are fast on ``target``; default: "auto" with a target or latency, else 8
    target          where it will run, and is timed: a name or a ``fxprune.latency.Target``
    max_evaluations, max_seconds  of the search: when either is spent, the best so far is taken
    journal         file that the search writes; one that was broken off goes on from it
    workers         processes that evaluate candidates (their number does not change the result);
                    or ``executor``, any ``concurrent.futures.Executor``, for example of a cluster
    steps           rounds of ranking, cutting and repair; each takes the same share
    tune            with ``steps``: called with the model between two rounds; trains it, in place or
                    as a new one that it returns (``lambda m: finetune(m, train_data).model``)

    ``model``, its mode, the RNG state and the thread count are as they were when this returns.
    Raises InputError (see ``fxprune.errors``) for input that cannot be used.
    """
    given = dict(locals())
    if steps != 1 or tune is not None:
        return _in_rounds(**given)
    options = _checked(
        model, budget, criterion, allocation, repair, round_to, target, threads, seed, progress,
        max_evaluations, executor,
    )  # fmt: skip
    options = _limited(options, max_seconds, journal, workers, evaluate)
    clock = Clock()
    with rng_kept(), uncompiled():  # many widths, each for a moment
        traced = _traced(model, example_inputs, exclude, progress)
        clock.lap("trace and couple")
        calibration = _calibration(data, traced, calibration_samples, options)
        with _keeper(traced, options, clock) as keeper:
            return _pruned(model, traced, calibration, options, evaluate, keeper, clock)


def _traced(
    model: nn.Module, example_inputs: Any, exclude: Sequence[str], progress: bool
) -> Traced:
    with working("trace", progress):
        return trace(model, example_inputs).excluding(exclude)


def _calibration(data: Any, traced: Traced, samples: int, o: _Options) -> Calibration:
    whole("calibration_samples", samples, 1)
    limit = samples if data is not None else min(samples, RANDOM_SAMPLES)
    more = max(0, o.mending.samples - limit)
    given = traced.captured.given
    with working("read calibration data", o.progress):
        calibration = calibration_batches(data, given, limit=limit, seed=o.seed, more=more)
    if calibration.random:
        warnings.warn(
            "no calibration data: random inputs are used; give data= for a ranking and a "
            "repair that know the real activations",
            stacklevel=3,
        )
    return calibration


def _pruned(
    model: nn.Module,
    traced: Traced,
    calibration: Calibration,
    o: _Options,
    evaluate: Callable[[Any], float] | None,
    keeper: Keeper | None,
    clock: Clock,
) -> PruneResult:
    seen, held_out = _split(calibration.batches)
    statistics = _statistics(traced, o, seen)
    clock.lap("observe")
    with working("rank", o.progress):
        scores = o.criterion(traced, statistics, np.random.default_rng(o.seed))
    clock.lap("rank")
    mend = o.mending.repairer(traced, statistics, seen)
    measure = _loss(evaluate) if evaluate else KLFitness(traced, None, held_out).of
    kind = "lstsq" if o.mending.linear else o.mending.kind
    recipe = Recipe(model, traced.captured.given, seen, held_out, kind, evaluate)
    problem = _problem(traced, scores, o, keeper)
    if isinstance(mend, LeastSquares):
        final = FinalFitness(traced, mend, seen, held_out, measure)
        rough, final = final_rounds(final, divergence=evaluate is None)
        problem = replace(problem, semifinals=rough, finals=final)
    plan = _allocated(problem, recipe, traced, mend, o, keeper)
    clock.lap("allocate")
    gm = cut(traced, plan)
    clock.lap("cut")
    batches = Batches(seen, held_out, calibration.more)
    told = o.mending.run(traced, plan, gm, mend, batches, measure, clock)
    made = _result(model, traced, plan, gm, calibration, told, clock)
    if keeper is not None:
        made.report["latency"] = keeper.report(gm, plan, problem)
        clock.lap("measure the result")
    return made


@contextmanager
def _keeper(traced: Traced, o: _Options, clock: Clock) -> Iterator[Keeper | None]:
    """What times the model and knows the target's fast widths; None where no target was named."""
    if o.target is None:
        yield None
        return
    with Keeper(traced, o.target, progress=o.progress) as keeper:
        clock.lap("measure")
        yield keeper


def _problem(
    traced: Traced,
    scores: Mapping[str, Any],
    o: _Options,
    keeper: Keeper | None,
) -> AllocationProblem:
    rounding = o.round_to if isinstance(o.round_to, int) or keeper is None else keeper.rounding()
    assert not isinstance(rounding, str), "auto comes with a target"
    problem = AllocationProblem(
        traced, scores, o.budget, rounding, o.seed, None, o.progress, o.max_evaluations,
        o.executor, None, o.max_seconds, o.journal,
        latency=None if keeper is None else keeper.model,
    )  # fmt: skip
    return problem if keeper is None else keeper.tuned(problem)


def _allocated(
    problem: AllocationProblem,
    recipe: Recipe,
    traced: Traced,
    mend: Repair | None,
    o: _Options,
    keeper: Keeper | None,
) -> PrunePlan:
    """The allocator's plan; candidates are evaluated here or by workers.

    Where the budget bounds the latency, that of the cut model is measured.
    """
    once = mend if isinstance(mend, LeastSquares) else None
    probe = allocate.get("uniform")(problem)
    with Shipped(recipe, traced, once, probe) as shipped, local_workers(o.workers) as pool:
        problem = replace(
            problem,
            fitness=shipped,
            executor=o.executor or pool,
            identity=shipped.identity() if o.journal else "",
        )
        within = o.allocation if keeper is None else partial(keeper.within, allocate=o.allocation)
        plan = _within(within(problem), traced, o.budget)
        if plan.meta.get("evaluations"):
            plan = replace(plan, meta={**plan.meta, "repair inside": shipped.form})
        return plan


def _within(plan: PrunePlan, traced: Traced, budget: Budget) -> PrunePlan:
    """``plan``, checked: an allocation may be anyone's."""
    if not isinstance(plan, PrunePlan):
        raise SpecError(
            f"the allocation must return a PrunePlan, got {type(plan).__name__}; "
            "problem.traced.plan({group: kept indices}) makes one"
        )
    before, after = asdict(traced.cost()), asdict(traced.cost(plan))
    for measure, bound in allocate.bounds(budget).items():
        if measure in after and after[measure] > bound.limit(before[measure]) * (1 + 1e-9):
            raise BudgetError(
                f"the allocation's plan has {after[measure]:,} {measure} of {before[measure]:,}, "
                f"above the budget {bound}; it must keep fewer channels"
            )
    return plan


def _result(
    model: nn.Module,
    traced: Traced,
    plan: PrunePlan,
    gm: fx.GraphModule,
    calibration: Calibration,
    told: dict[str, Any],
    clock: Clock,
) -> PruneResult:
    small = as_user_class(traced, plan, gm)
    report = {
        "calibration": calibration.note,
        "samples": calibration.samples,
        "seconds": clock.laps,
        "user_class": small is not None,
        "groups": len(traced.groups),
        "locked": traced.locked,
        "plan": dict(plan.meta),
        **({"repair": told} if told else {}),
    }
    for m in (gm, small):
        if m is not None:
            in_modes_of(model, m)
    return PruneResult(
        gm if small is None else small, gm, copy.deepcopy(traced.graph_module), traced, plan,
        traced.cost(), traced.cost(plan), report,
    )  # fmt: skip


def _in_rounds(
    model: nn.Module,
    example_inputs: Any,
    budget: Budget | float,
    data: Any,
    steps: int,
    tune: Callable[[nn.Module], nn.Module | None] | None,
    **given: Any,
) -> PruneResult:
    """Rounds of prune(), and one plan of ``model`` for all of them.

    Without ``tune`` the last model is also repaired straight from the original's weights; the
    better of both on held-out samples stays.
    """
    whole("steps", steps, 1)
    if tune is not None and (steps < 2 or not callable(tune)):
        raise SpecError("tune must be a function of a model, called between rounds: give steps=2")
    o = _checked(
        model, budget, *(given[k] for k in (
            "criterion", "allocation", "repair", "round_to", "target", "threads", "seed",
            "progress", "max_evaluations", "executor",
        )),
    )  # fmt: skip
    clock = Clock()
    with rng_kept(), uncompiled():  # many widths, each for a moment
        traced = _traced(model, example_inputs, given["exclude"], o.progress)
        calibration = _calibration(data, traced, given["calibration_samples"], o)
        seen, held_out = _split(calibration.batches)
        near = given["evaluate"] or Near(traced, held_out)
        measure = _loss(near)
        clock.lap("trace and couple")
        done: list[PruneResult] = []
        current = model
        given |= {
            "data": calibration.batches,
            "repair": "lstsq" if o.mending.linear else o.mending.kind,
        }
        journal = None if given["journal"] is None else Path(given["journal"])
        for budget in round_budgets(o.budget, traced.cost(), steps):
            if journal is not None:
                given["journal"] = journal.with_name(f"{len(done) + 1}-{journal.name}")
            done.append(prune(current, example_inputs, budget, **given))
            current = done[-1].model
            if tune is not None and len(done) < steps:
                current = tune(current) or current
            # from now on nearness to the original counts, not to the round before
            given["evaluate"] = near
            clock.lap(f"round {len(done)}")
        plan = compose(traced, [(r.analysis, r.plan) for r in done], done[-1].plan.meta)
        gm = transplanted(traced, plan, done[-1].graph_module)
        statistics = _statistics(traced, o, seen) if tune is None else None
        batches = Batches(seen, held_out, calibration.more)
        told = o.mending.again(traced, plan, gm, statistics, batches, measure, clock)
        told["rounds"] = rounds_told(done)
        made = _result(model, traced, plan, gm, calibration, told, clock)
        first, last = (r.report.get("latency") for r in (done[0], done[-1]))
        if first and last:
            made.report["latency"] = last | {"before_ms": first["before_ms"]}
        return made


def _checked(
    model: Any,
    budget: Budget | float,
    criterion: Any,
    allocation: str | Allocator,
    repair: str | Distillation | None,
    round_to: int | str | None,
    target: str | Target | None,
    threads: int,
    seed: int,
    progress: bool,
    max_evaluations: int,
    executor: Executor | None,
) -> _Options:
    check_values(model)
    whole("seed", seed, 0, SEEDS)
    whole("max_evaluations", max_evaluations, 1)
    if not isinstance(budget, Budget):
        budget = Budget(macs=budget)
    allocate.bounds(budget)
    round_to, target = _aim(budget, round_to, target, threads)
    mending = Mending.of(repair, seed, progress)
    return _Options(
        budget, criteria.get(criterion), allocate.get(allocation), mending, round_to, target,
        seed, progress, max_evaluations, executor,
    )  # fmt: skip


def _limited(
    o: _Options,
    seconds: float | None,
    journal: str | os.PathLike[str] | None,
    workers: int,
    evaluate: object,
) -> _Options:
    """The options of the search, checked."""
    if evaluate is not None and not callable(evaluate):
        raise SpecError(f"evaluate must be a function of a model, got {evaluate!r}")
    if whole("workers", workers) and o.executor is not None:
        raise SpecError(f"give a number of workers, or an executor; got workers={workers}")
    if seconds is not None and not (isinstance(seconds, (int, float)) and seconds > 0):
        raise SpecError(f"max_seconds must be more than 0, got {seconds!r}")
    path = None if journal is None else Path(journal)
    return replace(o, max_seconds=seconds, journal=path, workers=workers)


def _aim(
    budget: Budget, round_to: int | str | None, target: str | Target | None, threads: int
) -> tuple[int | str, Target | None]:
    """What ``round_to`` and ``target`` are where they were not given. SpecError for others."""
    if target is None and (round_to == "auto" or "latency" in allocate.bounds(budget)):
        target = "onnxruntime-cpu"
    if isinstance(target, str):
        target = Target(target, threads)
    if round_to is None:
        round_to = 8 if target is None else "auto"
    return round_to if round_to == "auto" else whole('round_to (or "auto")', round_to, 1), target


def _split(batches: Sequence[tuple[Any, ...]]) -> tuple[list[Any], list[Any]]:
    """(batches for statistics, batches for the fitness): disjoint where there are two samples."""
    whole = list(batches)
    if len(whole) == 1:
        n = samples_of(whole[0])
        if n < 2 or not divisible(whole[0]):
            return whole, whole
        at = n - max(1, round(HELD_OUT * n))
        return [part_of(whole[0], slice(0, at))], [part_of(whole[0], slice(at, n))]
    held = max(1, round(HELD_OUT * len(whole)))
    return whole[:-held], whole[-held:]


def _statistics(traced: Traced, o: _Options, batches: list[Any]) -> Statistics | None:
    if not o.criterion.needs_data and not o.mending.linear:
        return None
    options = criteria.observe_options(o.criterion)
    return observe(traced, batches, progress=o.progress, **options)


def _loss(evaluate: Callable[[Any], float] | None) -> Callable[[fx.GraphModule], float]:
    """The user's measure, lower is better."""

    def measure(module: fx.GraphModule) -> float:
        assert evaluate is not None
        value = evaluate(module)
        return -float(value.detach() if isinstance(value, Tensor) else value)

    return measure


def apply(model: nn.Module, plan: PrunePlan, example_inputs: Any) -> nn.Module:
    """The same pruning on another instance of the same model (cut only, no repair).

    Raises PlanError when the plan does not belong to this model.
    """
    with rng_kept(), uncompiled():  # many widths, each for a moment
        traced = trace(model, example_inputs)
        gm = cut(traced, plan)
        small = as_user_class(traced, plan, gm)
    result = gm if small is None else small
    in_modes_of(model, result)
    return result


def load(folder: str | os.PathLike[str], model: nn.Module, example_inputs: Any) -> nn.Module:
    """The pruned model that was saved in ``folder``, from a fresh instance of its class."""
    plan, state = read(folder)
    small = apply(model, plan, example_inputs)
    load_state(small, state, str(folder))
    return small
