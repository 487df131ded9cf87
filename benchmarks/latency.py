"""Latency: predicted against measured, and what half the MACs are worth with and without it.

    python benchmarks/latency.py prediction   predicted and measured at 100%, 70%, 50% of the MACs
    python benchmarks/latency.py speedup      realised speed-up at half the MACs, by rounding and
                                              with a latency budget
    python benchmarks/latency.py search       the local search under half the MACs, and under the
                                              latency that its result has: loss of scores of both

Random weights (latency does not depend on them), L1 scores, uniform ratios. Sizes of one net take
turns in one process. With one thread the clock is the CPU time of the thread: other processes slow
the wall clock down, not it. Figures go to --out (JSON, one file for each net; what is there is not
measured again) and, as tables, to stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from timer import device_name

from fxprune import allocate
from fxprune.cut import cut
from fxprune.isolate import rng_kept
from fxprune.latency import Bench, LatencyModel, Sample, Target, fast_counts, latency_model
from fxprune.traced import Traced, trace
from fxprune.types import Budget, FloatArray, PrunePlan, Rounding

NETS = {
    "prediction": (
        "resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0", "densenet121", "regnet_y_400mf",
    ),
    "speedup": ("resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0"),
    "search": ("resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0"),
}  # fmt: skip
SHARES = (0.7, 0.5)
EVALUATIONS = 300  # of the searches
FASTER = 1.8  # what the latency budget asks for


def traced_net(name: str, pixels: int, batch: int) -> Traced:
    with rng_kept(0):
        model = torchvision.models.get_model(name, weights=None).eval()
        return trace(model, torch.randn(batch, 3, pixels, pixels))


def scores_of(traced: Traced) -> dict[str, FloatArray]:
    from fxprune import criteria

    return dict(criteria.get("l1")(traced, None, np.random.default_rng(0)))


def uniform(
    traced: Traced,
    budget: Budget,
    rounding: int | Rounding,
    latency: LatencyModel | None = None,
) -> PrunePlan:
    problem = allocate.AllocationProblem(
        traced, scores_of(traced), budget, rounding, latency=latency
    )
    return allocate.get("uniform")(problem)


def measured(traced: Traced, plans: Sequence[PrunePlan], target: Target) -> list[Sample]:
    """The original, then each plan's net, side by side."""
    with Bench(target, traced.example_inputs) as bench:
        models = [traced.graph_module, *(cut(traced, p) for p in plans)]
        return bench.measure(models, seconds=2.0, least=20)


def shares(traced: Traced, plans: Sequence[PrunePlan]) -> list[float]:
    counts = np.stack([traced.counts(p) for p in plans])
    whole = traced.cost().macs
    return [float(m) / whole for m in traced.costs.measure(counts, ["macs"])[:, 0]]


def prediction(traced: Traced, target: Target) -> dict[str, Any]:
    plans = [uniform(traced, Budget(macs=s), 16) for s in SHARES]
    times = measured(traced, plans, target)
    model = latency_model(traced, target, original=times[0], progress=True)
    plans = [traced.full_plan(), *plans]
    predicted = model.predict(np.stack([traced.counts(p) for p in plans]))
    return {
        "macs": shares(traced, plans),
        "predicted_ms": predicted.tolist(),
        "measured_ms": [t.ms for t in times],
        "spread": [t.spread for t in times],
        "runs": times[0].runs,
        "products": len(model.parts.items),
        "block": model.block,
    }


def speedup(traced: Traced, target: Target) -> dict[str, Any]:
    model = latency_model(traced, target, progress=True)
    auto = fast_counts(model, traced.groups)
    half, both = Budget(macs=0.5), Budget(macs=0.5, latency=1 / FASTER)
    plans = {
        "any width": uniform(traced, half, 1),
        "multiples of 8": uniform(traced, half, 8),
        "multiples of 16": uniform(traced, half, 16),
        "auto, MACs alone": uniform(traced, half, auto),
        "auto": uniform(traced, half, auto, model),
        "auto, latency": uniform(traced, both, auto, model),
    }
    # the budget is met where it leads: one measurement there bends the prediction
    first, *times = measured(traced, list(plans.values()), target)
    bent = model.measured(first).bent(traced.counts(plans["auto, latency"]), times[-1].ms)
    final = {"auto, latency, tuned": uniform(traced, both, auto, bent)}
    again, last = measured(traced, list(final.values()), target)
    plans |= final
    ratios = [first.ms / t.ms for t in times] + [again.ms / last.ms]
    predicted = bent.predict(np.stack([traced.counts(p) for p in plans.values()]))
    return {
        name: {"macs": m, "faster": r, "predicted": float(first.ms / p)}
        for name, m, r, p in zip(
            plans, shares(traced, list(plans.values())), ratios, predicted, strict=True
        )
    } | {
        "original_ms": first.ms,
        "spread": max(t.spread for t in (first, *times)),
        "runs": first.runs,
    }


def search(traced: Traced, target: Target) -> dict[str, Any]:
    """The fitness is additive, so that both searches are cheap and compare: see ``score_loss``."""
    model = latency_model(traced, target, progress=True)
    auto = fast_counts(model, traced.groups)
    loss = score_loss(traced)

    def found(budget: Budget) -> tuple[PrunePlan, float]:
        problem = allocate.AllocationProblem(
            traced, scores_of(traced), budget, auto, fitness=loss, latency=model,
            max_evaluations=EVALUATIONS,
        )  # fmt: skip
        plan = allocate.get("local")(problem)
        return plan, float(model.predict(traced.counts(plan)[None])[0])

    by_macs, ms = found(Budget(macs=0.5))
    by_ms, other = found(Budget(latency=ms / model.original.ms))
    return {
        "loss": [loss(by_macs), loss(by_ms)],
        "predicted_ms": [ms, other],
        "macs": shares(traced, [by_macs, by_ms]),
        "original_ms": model.original.ms,
    }


def score_loss(traced: Traced) -> Callable[[PrunePlan], float]:
    """Sum over the groups of minus the logarithm of the share of its L1 scores that is kept."""
    scores = scores_of(traced)

    def loss(plan: PrunePlan) -> float:
        return sum(
            -float(np.log(scores[g][list(kept)].sum() / scores[g].sum()))
            for g, kept in plan.kept.items()
        )

    return loss


def search_table(found: dict[str, Any]) -> None:
    print("| net | budget | loss of scores | MACs | predicted, ms | faster |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for net, f in found.items():
        rows = zip(("MACs", "latency"), f["loss"], f["macs"], f["predicted_ms"], strict=True)
        for budget, loss, macs, ms in rows:
            faster = f["original_ms"] / ms
            print(f"| {net} | {budget} | {loss:.3f} | {macs:.0%} | {ms:.2f} | {faster:.2f} |")


def prediction_table(found: dict[str, Any]) -> None:
    print(
        "| net | MACs | predicted, ms | measured, ms | error |\n| --- | ---: | ---: | ---: | ---: |"
    )
    for net, f in found.items():
        rows = zip(f["macs"], f["predicted_ms"], f["measured_ms"], strict=True)
        for macs, predicted, ms in rows:
            error = predicted / ms - 1
            print(f"| {net} | {macs:.0%} | {predicted:.2f} | {ms:.2f} | {error:+.1%} |")


def speedup_table(found: dict[str, Any]) -> None:
    names = [n for n in next(iter(found.values())) if n not in ("original_ms", "spread", "runs")]
    print("| net | original, ms |" + "".join(f" {n} |" for n in names))
    print("| --- | ---: |" + " ---: |" * len(names))
    for net, f in found.items():
        cells = "".join(f" {f[n]['faster']:.2f} ({f[n]['macs']:.0%}) |" for n in names)
        print(f"| {net} | {f['original_ms']:.1f} |{cells}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=sorted(NETS))
    parser.add_argument("--nets", nargs="+", metavar="NET", help="torchvision names")
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--target", default="onnxruntime-cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/latency"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    target = Target(args.target, args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    found = {}
    for net in args.nets or NETS[args.what]:
        path = args.out / f"{args.what}-{net}-{args.pixels}px-b{args.batch}-{target.slug}.json"
        if not path.exists():
            sys.stderr.write(f"{net}\n")
            traced = traced_net(net, args.pixels, args.batch)
            one = {"prediction": prediction, "speedup": speedup, "search": search}[args.what](
                traced, target
            )
            path.write_text(json.dumps(one, indent=1), encoding="utf-8")
        found[net] = json.loads(path.read_text(encoding="utf-8"))
    print(
        f"{target}; {device_name()}; {target.device}; batch {args.batch}, {args.pixels} px; medians"
    )
    {"prediction": prediction_table, "speedup": speedup_table, "search": search_table}[args.what](
        found
    )


if __name__ == "__main__":
    main()
