"""What the search is worth: strategies, starts, inner fitness, speed, kill points.

    python benchmarks/search.py --cells speed kill              minutes
    python benchmarks/search.py                                 everything, hours on one core
    python benchmarks/search.py --markdown docs/search.part.md  tables of what is known

The nets are those of benchmarks/nets.py, trained where quality.py has not done that yet. Every cell
is kept in ``--cache`` when it is known; a run that was broken off goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import numpy as np
import torch
from nets import EPOCHS, NETS, accuracy, images_of, train, trained
from scipy.stats import spearmanr
from torch import Tensor

from fxprune import allocate, criteria
from fxprune.allocate import AllocationProblem
from fxprune.allocate.chance import random_state
from fxprune.allocate.space import space_of
from fxprune.cut import cut
from fxprune.fitness import FinalFitness, KLFitness, ReplayFitness, final_rounds
from fxprune.latency import Bench, LatencyModel, Target, fast_counts, latency_model
from fxprune.observe import observe
from fxprune.repair import LeastSquares, repair_bn
from fxprune.replay import MAX_SAMPLES, Replay
from fxprune.sequential import best_form, repair_sequential
from fxprune.traced import Traced, trace
from fxprune.types import Budget, PrunePlan

STRATEGIES = ("uniform", "local", "random", "evolution", "greedy", "local, one-shot inside")
ALLOCATIONS = 12  # random ones, for the correlations
MEASURES = ("cut only", "bn", "one-shot", "sequential, as in the search", "final")
KILLS = 50
TEST = 5000  # images

Cell = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """One net, ready to be pruned. test: images and labels."""

    name: str
    net: torch.nn.Module
    traced: Traced
    seen: list[tuple[Tensor, ...]]
    held_out: list[tuple[Tensor, ...]]
    scores: dict[str, Any]
    once: LeastSquares
    test: tuple[Tensor, Tensor]

    def problem(self, budget: float | str, **options: Any) -> AllocationProblem:
        """A share of the MACs, or of the latency in onnxruntime: "latency 0.6"."""
        if isinstance(budget, str):
            model = timed_model(self.name)
            bound = Budget(latency=float(budget.split()[1]))
            options |= {"latency": model, "round_to": fast_counts(model, self.traced.groups)}
        else:
            bound = Budget(macs=budget)
        options = {"round_to": 1} | options
        return AllocationProblem(self.traced, self.scores, bound, **options)

    def final(self, plan: PrunePlan) -> tuple[float, float]:
        """(divergence on held-out samples, accuracy) after the final repair."""
        module = cut(self.traced, plan)
        measure = KLFitness(self.traced, None, self.held_out).of
        best_form(self.traced, plan, module, self.once, self.seen, measure, self.held_out)
        return measure(module), accuracy(module, *self.test)


@functools.cache
def setting(name: str) -> Setting:
    cache = Path(os.path.expanduser("~/.cache/fxprune/quality"))
    x, y = images_of("fashion-mnist", True)
    net = trained(name, "fashion-mnist", EPOCHS[name], cache, x, y)
    batches = [(b,) for b in x[:512].split(64)]
    seen, held_out = batches[:-2], batches[-2:]
    traced = trace(net, x[:2])
    criterion = criteria.get("attention")
    statistics = observe(traced, seen, **criteria.observe_options(criterion))
    scores = criterion(traced, statistics, np.random.default_rng(0))
    once = LeastSquares(traced, statistics)
    test = tuple(t[:TEST] for t in images_of("fashion-mnist", False))
    return Setting(name, net, traced, seen, held_out, dict(scores), once, test)


@functools.cache
def timed_model(name: str) -> LatencyModel:
    return latency_model(setting(name).traced, Target("onnxruntime-cpu", 1))


# --- cells ------------------------------------------------------------------------------------


def strategy(net: str, budget: float | str, name: str, seed: int, evaluations: int) -> Cell:
    """One search, and the accuracy of its plan after the final repair, without fine-tuning."""
    s = setting(net)
    kind, _, inside = name.partition(", ")
    measure = KLFitness(s.traced, None, s.held_out).of
    fitness: Any = KLFitness(s.traced, s.once, s.held_out)
    if not inside:
        replay = Replay(s.traced, s.seen, s.held_out, s.once.only)
        fitness = ReplayFitness(lambda: replay)
    final = FinalFitness(s.traced, s.once, s.seen, s.held_out, measure)
    rough, final = final_rounds(final, divergence=True)
    start = time.perf_counter(), time.process_time()
    plan = allocate.get(kind)(
        s.problem(
            budget,
            seed=seed,
            fitness=fitness,
            max_evaluations=evaluations,
            semifinals=rough,
            finals=final,
        )
    )
    seconds = time.perf_counter() - start[0], time.process_time() - start[1]
    divergence, right = s.final(plan)
    trace_ = plan.meta.get("trace", [])
    return {
        "accuracy": right,
        "KL": divergence,
        "evaluations": len(trace_),
        "seconds": round(seconds[0], 1),
        "CPU seconds": round(seconds[1], 1),
        "curve": best_so_far(trace_),
        "stages": [t["stage"] for t in trace_],
        "finalists": plan.meta.get("finalists", []),
        "start": plan.meta.get("start", ""),
        "macs": s.traced.cost(plan).macs / s.traced.cost().macs,
        "kept": {k: list(v) for k, v in plan.kept.items()},
        **(faster(s, plan) if isinstance(budget, str) else {}),
    }


def faster(s: Setting, plan: PrunePlan) -> Cell:
    """Measured side by side, one sample, one thread."""
    with Bench(Target("onnxruntime-cpu", 1), (s.test[0][:1],)) as bench:
        whole, small = bench.measure([s.traced.graph_module, cut(s.traced, plan)], seconds=1.0)
    return {"before, ms": whole.ms, "after, ms": small.ms}


def tuned(net: str, kept: dict[str, list[int]]) -> Cell:
    """Accuracy after the final repair of a plan and one epoch of training with labels."""
    s = setting(net)
    plan = s.traced.plan(kept)
    module = cut(s.traced, plan)
    measure = KLFitness(s.traced, None, s.held_out).of
    best_form(s.traced, plan, module, s.once, s.seen, measure, s.held_out)
    before = accuracy(module, *s.test)
    x, y = images_of("fashion-mnist", True)
    torch.manual_seed(0)
    train(module, x, y, 1, flip=True, rate=0.02)
    return {"before": before, "accuracy": accuracy(module, *s.test)}


def best_so_far(trace_: list[dict[str, Any]]) -> list[float | None]:
    """Best fitness within the budget after each evaluation."""
    best, curve = None, []
    for t in trace_:
        best = t["fitness"] if t["accepted"] else best
        curve.append(best)
    return curve


def correlation(net: str, budget: float, number: int) -> Cell:
    """One random allocation by every measure, and its accuracy after the final repair."""
    s = setting(net)
    space = space_of(s.problem(budget))
    rng = np.random.default_rng([number, 7])
    plan = space.plan(random_state(space, rng))
    held = KLFitness(s.traced, None, s.held_out)
    module = cut(s.traced, plan)
    found = {"cut only": held.of(module)}
    repair_bn(s.traced, plan, module, s.seen)
    found["bn"] = held.of(module)
    found["one-shot"] = KLFitness(s.traced, s.once, s.held_out)(plan)
    replay = Replay(s.traced, s.seen, s.held_out, s.once.only)
    found["sequential, as in the search"] = ReplayFitness(lambda: replay)(plan)
    found["final"], right = s.final(plan)
    return {"accuracy": right, **found}


def speed(net: str) -> Cell:
    """CPU seconds of an evaluation, by the plain loop and as the search does it, equal results."""
    s = setting(net)
    problem = s.problem(0.5)
    space = space_of(problem)
    base = space.state(s.traced.counts(allocate.get("uniform")(problem)))
    rng = np.random.default_rng(0)
    plans = []
    for _ in range(12):
        state = base.copy()
        give, take = rng.permutation(len(base))[:2]
        state[give], state[take] = max(0, state[give] - 4), min(space.top[take], state[take] + 2)
        plans.append(space.plan(state))
    replay = Replay(s.traced, s.seen, s.held_out, s.once.only)
    fitness = ReplayFitness(lambda: replay)
    fitness(space.plan(base))
    fast, seconds, slow, parts = [], [], [], []
    for plan in plans:  # in turns: other work on the machine meets both
        start = time.process_time()
        fast.append(fitness(plan))
        seconds.append(time.process_time() - start)
        value, laps = plain(s, plan)
        slow.append(value)
        parts.append(laps)
    mean = {k: float(np.mean([p[k] for p in parts])) for k in parts[0]}
    return {
        "search": float(np.mean(seconds)),
        "plain": sum(mean.values()),
        "parts": mean,
        "difference": max(abs(a / b - 1) for a, b in zip(fast, slow, strict=True)),
    }


def plain(s: Setting, plan: PrunePlan) -> tuple[float, dict[str, float]]:
    """The loop that copies, analyses, observes, cuts, repairs and compares for each plan."""
    parts: dict[str, float] = {}
    last = time.process_time()

    def lap(name: str) -> None:
        nonlocal last
        parts[name] = time.process_time() - last
        last = time.process_time()

    net = copy.deepcopy(s.net)
    traced = trace(net, s.test[0][:2])
    lap("copy and trace")
    once = LeastSquares(traced, observe(traced, s.seen, displacement=False))
    lap("Gram matrices")
    module = cut(traced, plan)
    lap("cut")
    once.apply(plan, module)
    repair_sequential(traced, plan, module, s.seen, max_samples=MAX_SAMPLES, correct=False)
    lap("repair")
    value = KLFitness(traced, None, s.held_out).of(module)
    lap("compare")
    return value, parts


@functools.cache
def undisturbed() -> tuple[str, float]:
    """(plan as JSON, seconds) of the search that is killed."""
    import test_journal

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        plan = test_journal.search(Path(folder) / "search.jsonl", loss=slowly, max_evaluations=60)
        return plan.to_json(), time.perf_counter() - start


def slowly(plan: PrunePlan) -> float:
    """A fitness that takes a while; tests/test_journal.py has the model."""
    import test_journal

    time.sleep(0.01)
    return test_journal.loss_of(test_journal.model())(plan)


def kill(number: int) -> Cell:
    """A search is killed by SIGKILL at a random time; is the plan of the resumed one the same?"""
    import test_journal

    whole, seconds = undisturbed()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "search.jsonl"
        child = os.fork()
        if child == 0:
            test_journal.search(path, loss=slowly, max_evaluations=60)
            os._exit(0)
        time.sleep(float(np.random.default_rng(number).uniform(0, seconds)))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        events = path.read_bytes().count(b"\n") if path.exists() else 0
        resumed = test_journal.search(path, max_evaluations=60)
    return {"same": resumed.to_json() == whole, "events": events}


# --- the run ----------------------------------------------------------------------------------


def cells(
    o: argparse.Namespace, known: dict[str, Cell]
) -> Iterator[tuple[str, Callable[[], Cell]]]:
    """(key, work), the cells asked for in their order."""
    for kind in o.cells:
        for net in o.nets if kind == "speed" else ():
            yield f"speed/{net}", functools.partial(speed, net)
        for i in range(KILLS) if kind == "kill" else ():
            yield f"kill/{i}", functools.partial(kill, i)
        for budget in o.budgets:
            for net in o.nets:
                yield from _cells(o, kind, net, budget, known)


def _cells(
    o: argparse.Namespace, kind: str, net: str, budget: float | str, known: dict[str, Cell]
) -> Iterator[tuple[str, Callable[[], Cell]]]:
    for i in range(ALLOCATIONS) if kind == "correlations" else ():
        if isinstance(budget, float):
            run = functools.partial(correlation, net, budget, i)
            yield f"correlation/{net}/{budget:g}/{i}", run
    for name in o.strategies if kind in ("strategies", "tune") else ():
        for seed in o.seeds if name == "local" else o.seeds[:1]:
            key = f"{net}/{budget}/{name}/{seed}/{o.evaluations}"
            if kind == "strategies":
                run = functools.partial(strategy, net, budget, name, seed, o.evaluations)
                yield f"strategy/{key}", run
            elif f"strategy/{key}" in known:
                run = functools.partial(tuned, net, known[f"strategy/{key}"]["kept"])
                yield f"tune/{key}", run


def tables(known: dict[str, Cell]) -> str:
    lines: list[str] = []
    parts = {k: tuple(k.split("/")) for k in known}
    heads = sorted({p[1:3] for p in parts.values() if p[0] == "strategy"})
    for net, budget in heads:
        lines += [f"### {net} at {in_words(budget)}", ""]
        lines += ["| allocation | seed | accuracy | after 1 epoch | KL | MACs | times faster |"
                  " evaluations | CPU seconds | best start |"]  # fmt: skip
        lines += ["|---" * 10 + "|"]
        for key, p in parts.items():
            if p[:3] == ("strategy", net, budget):
                lines.append(row(p, known[key], known.get("/".join(("tune", *p[1:])))))
        lines.append("")
    lines += correlation_table(known) + speed_table(known)
    kills = [c for k, c in known.items() if k.startswith("kill/")]
    if kills:
        events = [c["events"] for c in kills]
        same = sum(c["same"] for c in kills)
        lines += [
            f"{same} of {len(kills)} resumed searches gave the undisturbed plan; they were killed "
            f"after {min(events)} to {max(events)} lines of the journal "
            f"({len(set(events))} different places).",
            "",
        ]
    return "\n".join(lines)


def in_words(budget: str) -> str:
    kind, _, share = budget.rpartition(" ")
    return f"{float(share):.0%} of the {kind or 'MACs'}"


def row(p: tuple[str, ...], c: Cell, after: Cell | None) -> str:
    faster = f"{c['before, ms'] / c['after, ms']:.2f}" if "after, ms" in c else "-"
    epoch = f"{after['accuracy']:.2f}" if after else "-"
    return (
        f"| {p[3]} | {p[4]} | {c['accuracy']:.2f} | {epoch} | {c['KL']:.4f} | {c['macs']:.0%} | "
        f"{faster} | {c['evaluations']} | {c['CPU seconds']:.0f} | {c['start'] or '-'} |"
    )


def correlation_table(known: dict[str, Cell]) -> list[str]:
    heads = sorted({tuple(k.split("/")[1:3]) for k in known if k.startswith("correlation/")})
    if not heads:
        return []
    lines = ["| net, MACs | allocations | " + " | ".join(MEASURES) + " |", "|---" * 7 + "|"]
    for net, budget in heads:
        rows = [c for k, c in known.items() if k.startswith(f"correlation/{net}/{budget}/")]
        right = [c["accuracy"] for c in rows]
        found = [-spearmanr([c[m] for c in rows], right)[0] for m in MEASURES]
        span = f"{len(rows)}, {min(right):.1f} to {max(right):.1f}%"
        shown = " | ".join(f"{v:.2f}" for v in found)
        lines.append(f"| {net}, {float(budget):.0%} | {span} | {shown} |")
    return [*lines, ""]


def speed_table(known: dict[str, Cell]) -> list[str]:
    rows = {k.split("/")[1]: c for k, c in known.items() if k.startswith("speed/")}
    if not rows:
        return []
    names = list(next(iter(rows.values()))["parts"])
    lines = [f"| net | {' | '.join(names)} | plain loop | search | ratio | largest difference |"]
    lines += ["|---" * (len(names) + 5) + "|"]
    for net, c in rows.items():
        shown = " | ".join(f"{c['parts'][n]:.3f}" for n in names)
        lines.append(
            f"| {net} | {shown} | {c['plain']:.2f} | {c['search']:.3f} | "
            f"{c['plain'] / c['search']:.1f} | {c['difference']:.0e} |"
        )
    return [*lines, ""]


def share(text: str) -> float | str:
    return text if text.startswith("latency ") else float(text)


@functools.cache
def code() -> str:
    """The commit that a cell was measured with, where there is one."""
    here = Path(__file__).resolve().parent
    found = subprocess.run(
        ["git", "-C", str(here), "rev-parse", "--short", "HEAD"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return found.stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    every = ("speed", "strategies", "tune", "correlations", "kill")
    parser.add_argument("--cells", nargs="+", choices=every, default=every)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=["resnet20", "vgg"])
    parser.add_argument(
        "--budgets", nargs="+", type=share, default=[0.3, 0.5, "latency 0.6"],
        help='shares of the MACs, or "latency 0.6"',
    )  # fmt: skip
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=STRATEGIES)
    parser.add_argument("--evaluations", type=int, default=60)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of `local`")
    parser.add_argument("--cache", default=os.path.expanduser("~/.cache/fxprune/search"))
    parser.add_argument("--markdown", help="write the tables of all results to this file")
    o = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)
    file = Path(o.cache) / "results.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    known: dict[str, Cell] = json.loads(file.read_text()) if file.exists() else {}
    for key, work in cells(o, known):
        if key not in known:
            known[key] = work() | {"code": code()}
            file.write_text(json.dumps(known, indent=1))
            short = {
                k: v
                for k, v in known[key].items()
                if k not in ("curve", "stages", "finalists", "kept")
            }
            print(f"{key}: {short}", flush=True)
    text = tables(known)
    print(text)
    if o.markdown:
        Path(o.markdown).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
