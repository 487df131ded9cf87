"""Accuracy without fine-tuning: criteria x allocations x repairs, on nets trained by this script.

    python benchmarks/quality.py --quick                 digits, a few minutes
    python benchmarks/quality.py                         Fashion-MNIST, many hours on one core
    python benchmarks/quality.py --nets vgg --budgets 0.3 --minutes 30
    python benchmarks/quality_table.py --markdown tables.md --plots docs

Fashion-MNIST is read from Debian's package dataset-fashion-mnist, or downloaded by torchvision.
Trained weights and results are kept in ``--cache`` (default ~/.cache/fxprune/quality), one JSON
line for each cell: a run that was broken off goes on where it was. The cells that say most come
first; ``--minutes`` ends the run.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import nets
import numpy as np
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fxprune import allocate, criteria
from fxprune.allocate import AllocationProblem
from fxprune.cut import cut
from fxprune.fitness import KLFitness, ReplayFitness
from fxprune.observe import Statistics, observe
from fxprune.repair import LeastSquares, repair_bn
from fxprune.replay import Replay
from fxprune.sequential import best_form
from fxprune.traced import Traced, trace
from fxprune.types import Budget, PrunePlan

MAIN = ("attention", "reconstruction")  # criteria whose search comes early
CRITERIA = (*MAIN, "l1", "random", "bn_scale", "fpgm", "taylor", "hessian", "lamp", "l2")
ALLOCATIONS = ("uniform", "local", "isomorphic", "global")
REPAIRS = ("lstsq", "one-shot", "bn", "none")
BUDGETS = (0.5, 0.3, 0.7)
SEEDS = (0, 1, 2)
THEIRS = "Torch-Pruning"


@dataclass(frozen=True)
class Cell:
    """One figure of the tables; ``seed`` chooses the calibration images."""

    net: str
    budget: float
    seed: int
    criterion: str
    allocation: str
    repair: str

    def possible(self) -> bool:
        """Nothing goes by batch normalisation where there is none."""
        about = {self.criterion, self.repair} & {"bn", "bn_scale", f"{THEIRS} BN scale"}
        return not (self.net == "vit" and about)

    @property
    def urgency(self) -> tuple[int, ...]:
        """Sorts first what says most: first seed, 50% and 30%, uniform ratios, the search."""
        searched = self.allocation == "local"
        main = self.allocation == "uniform" or (searched and self.criterion in MAIN)
        late = self.seed > 0 and (self.repair != "lstsq" or self.criterion not in (*MAIN, "l1"))
        return (
            int(late or not main),
            int(self.seed > 0),
            int(self.budget not in BUDGETS[:2]),
            int(searched),
        )


def cells(o: argparse.Namespace) -> list[Cell]:
    """All cells that were asked for, the most urgent first; those of one plan together."""
    found = [
        Cell(net, budget, seed, criterion, allocation, repair)
        for net in o.nets
        for budget in o.budgets
        for seed in o.seeds
        for criterion in o.criteria
        for allocation in o.allocations
        for repair in o.repairs
    ]
    if 0 in o.seeds:
        found += [
            Cell(net, budget, 0, f"{THEIRS} {kind}", "uniform", "none")
            for net in o.nets
            for budget in o.budgets
            for kind in IMPORTANCES
        ]
    return sorted(filter(Cell.possible, found), key=lambda c: c.urgency)


class Case:
    """One net with its data and one seed's calibration images."""

    def __init__(self, name: str, seed: int, o: argparse.Namespace) -> None:
        self.name, self.seed, self.o = name, seed, o
        x, y = nets.images_of(o.data, True)
        test = nets.images_of(o.data, False)
        self.test = test[0][: o.test], test[1][: o.test]
        epochs = o.epochs or nets.epochs_of(name, o.quick)
        self.net = nets.trained(name, o.data, epochs, Path(o.cache), x, y)
        first = seed * o.calibration % (len(x) - o.calibration)
        chosen = slice(first, first + o.calibration)
        parts = list(zip(x[chosen].split(64), y[chosen].split(64), strict=True))
        held = max(1, len(parts) // 4)
        self.labelled = parts[:-held]
        self.seen = [x for x, _ in self.labelled]
        self.held_out = [x for x, _ in parts[-held:]]
        self.traced: Traced = trace(self.net, x[:2])
        self.ranked: dict[str, tuple[Statistics, Any, float]] = {}

    @cached_property
    def accuracy(self) -> float:
        return nets.accuracy(self.net, *self.test)

    @cached_property
    def once(self) -> LeastSquares:
        return LeastSquares(self.traced, observe(self.traced, self.seen, gamma=0.0))

    @cached_property
    def fitness(self) -> KLFitness:
        return KLFitness(self.traced, self.once, [(x,) for x in self.held_out])

    @cached_property
    def searched(self) -> ReplayFitness:
        batches = [(x,) for x in self.seen], [(x,) for x in self.held_out]
        return ReplayFitness(lambda: Replay(self.traced, *batches, self.once))

    def scores(self, criterion: str) -> tuple[Any, float]:
        """Scores, and seconds for observing and ranking."""
        if criterion not in self.ranked:
            start = time.perf_counter()
            chosen = criteria.get(criterion)
            options = criteria.observe_options(chosen)
            statistics = observe(self.traced, [(x,) for x in self.seen], **options)
            found = chosen(self.traced, statistics, np.random.default_rng(self.seed))
            self.ranked[criterion] = statistics, found, time.perf_counter() - start
        _, found, seconds = self.ranked[criterion]
        return found, seconds


def plan_of(case: Case, cell: Cell) -> tuple[PrunePlan, float]:
    """The plan of a cell, and seconds for ranking and allocation."""
    scores, ranked = case.scores(cell.criterion)
    start = time.perf_counter()
    problem = AllocationProblem(
        case.traced, scores, Budget(macs=cell.budget), case.o.round_to, cell.seed,
        case.searched, False, case.o.evaluations, None,
    )  # fmt: skip
    plan = allocate.get(cell.allocation)(problem)
    return plan, ranked + time.perf_counter() - start


def repaired(case: Case, plan: PrunePlan, repair: str) -> nn.Module:
    """The cut model after one of REPAIRS; ``lstsq`` is what prune() does."""
    module = cut(case.traced, plan)
    if repair == "bn":
        repair_bn(case.traced, plan, module, case.seen)
    elif repair == "one-shot":
        case.once.apply(plan, module)
    elif repair == "lstsq":
        best_form(case.traced, plan, module, case.once, case.seen, case.fitness.of, case.held_out)
    return module


def own(case: Case, cell: Cell, plan: PrunePlan, seconds: float) -> dict[str, Any]:
    start = time.perf_counter()
    module = repaired(case, plan, cell.repair)
    mending = time.perf_counter() - start
    return {
        "accuracy": nets.accuracy(module, *case.test),
        "macs": case.traced.cost(plan).macs / case.traced.cost().macs,
        "plan seconds": round(seconds, 2),
        "repair seconds": round(mending, 2),
    }


# --- Torch-Pruning ----------------------------------------------------------------------------

IMPORTANCES: dict[str, Callable[[], Any]] = {
    "magnitude": lambda: tp.importance.GroupMagnitudeImportance(p=2),
    "BN scale": tp.importance.BNScaleImportance,
    "Taylor": tp.importance.GroupTaylorImportance,
}


def macs_of(net: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x)
    return int(counter.get_total_flops()) // 2


def torch_pruned(case: Case, budget: float, kind: str) -> tuple[nn.Module, float]:
    """Its own pruner at a uniform ratio, by bisection the largest net within the budget."""
    x = case.test[0][:1]
    whole = macs_of(case.net, x)
    pruners = {"BN scale": tp.pruner.BNScalePruner}
    low, high, best = 0.0, 0.98, (case.net, 1.0)
    for _ in range(9):
        ratio = (low + high) / 2
        net = copy.deepcopy(case.net)
        if kind == "Taylor":
            for images, labels in case.labelled:
                nn.functional.cross_entropy(net(images), labels).backward()
        head = [m for m in net.modules() if isinstance(m, nn.Linear)][-1]
        heads = {m.qkv: m.heads for m in net.modules() if isinstance(m, nets.SelfAttention)}
        pruner = pruners.get(kind, tp.pruner.MagnitudePruner)
        pruner(
            net, x, IMPORTANCES[kind](), pruning_ratio=ratio, ignored_layers=[head],
            num_heads=heads,
        ).step()  # fmt: skip
        share = macs_of(net, x) / whole
        if share <= budget:
            high = ratio
            best = (net.eval(), share) if best[1] > budget or share > best[1] else best
        else:
            low = ratio
    return best


def theirs(case: Case, cell: Cell) -> dict[str, Any]:
    start = time.perf_counter()
    net, share = torch_pruned(case, cell.budget, cell.criterion.removeprefix(f"{THEIRS} "))
    seconds = round(time.perf_counter() - start, 2)
    return {"accuracy": nets.accuracy(net, *case.test), "macs": share, "plan seconds": seconds}


# --- the run ----------------------------------------------------------------------------------


def results_file(o: argparse.Namespace) -> Path:
    """Where results are kept; other settings, another file."""
    settings = f"{o.calibration}-{o.evaluations}-{o.round_to}-{o.test}"
    return Path(o.cache) / f"cells-{o.data}-{settings}.jsonl"


def known(file: Path) -> dict[Cell, dict[str, Any]]:
    """The cells of a results file with their figures; later lines win."""
    lines = file.read_text().splitlines() if file.exists() else []
    found = {}
    for line in lines:
        record = json.loads(line)
        found[Cell(**record.pop("cell"))] = record
    return found


def run(o: argparse.Namespace) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Every cell that is not known yet, with its figures, as it becomes known."""
    done = known(results_file(o))
    cases: dict[tuple[str, int], Case] = {}
    plans: dict[tuple[Any, ...], tuple[PrunePlan, float]] = {}
    end = time.perf_counter() + 60 * o.minutes
    for cell in cells(o):
        if cell in done or time.perf_counter() > end:
            continue
        at = cell.net, cell.seed
        if at not in cases:
            cases[at] = Case(*at, o)
            whole = Cell(cell.net, 1.0, cell.seed, "original", "-", "-")
            yield whole, {"accuracy": cases[at].accuracy, "macs": 1.0}
        if cell.criterion.startswith(THEIRS):
            yield cell, theirs(cases[at], cell)
            continue
        key = (*at, cell.budget, cell.criterion, cell.allocation)
        if key not in plans:
            plans[key] = plan_of(cases[at], cell)
        yield cell, own(cases[at], cell, *plans[key])


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="digits instead of Fashion-MNIST")
    parser.add_argument("--nets", nargs="+", choices=nets.NETS, default=list(nets.NETS))
    parser.add_argument("--budgets", nargs="+", type=float, default=BUDGETS)
    some = [c for c in CRITERIA if c in criteria.names()]
    parser.add_argument("--criteria", nargs="+", choices=criteria.names(), default=some)
    parser.add_argument("--allocations", nargs="+", choices=allocate.names(), default=ALLOCATIONS)
    parser.add_argument("--repairs", nargs="+", choices=REPAIRS, default=REPAIRS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--epochs", type=int, help="of training; default: what nets.py says")
    parser.add_argument("--evaluations", type=int, default=60, help="of the search")
    parser.add_argument("--calibration", type=int, default=512, help="training images, no labels")
    parser.add_argument("--test", type=int, default=10_000, help="test images")
    parser.add_argument("--round-to", type=int, default=1, dest="round_to")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no cell after that")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", default=os.path.expanduser("~/.cache/fxprune/quality"))
    o = parser.parse_args(arguments)
    o.data = "digits" if o.quick else "fashion-mnist"
    return o


def main() -> int:
    o = options()
    torch.set_num_threads(o.threads)
    warnings.simplefilter("ignore", UserWarning)
    file = results_file(o)
    file.parent.mkdir(parents=True, exist_ok=True)
    for cell, figures in run(o):
        with file.open("a") as out:
            out.write(json.dumps({"cell": asdict(cell), **figures}) + "\n")
        name = " / ".join(str(v) for v in asdict(cell).values())
        print(f"{name}: {figures['accuracy']:.2f}", flush=True)
    print(f"results: {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
