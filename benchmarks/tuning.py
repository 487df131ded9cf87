"""What distillation without labels and an epoch of fine-tuning give back after pruning.

    python benchmarks/tuning.py --quick                    digits, some minutes
    python benchmarks/tuning.py --nets resnet20 vgg --budgets 0.3 0.5 --seeds 0 1 2

The nets are those of nets.py, trained and kept as quality.py does. Torch-Pruning's own magnitude
pruner has the largest net within the same MACs (quality.py) and the same fine-tuning. Rows are kept
as JSON lines in ``--cache``; what is known is not run again. One core, one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import nets
import quality
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fxprune

CALIBRATION = 512  # training images without their labels
ROUNDS = 3
TAUGHT = {"labels": 0.0, "labels and original": 0.5, "original": 1.0}  # share of the distillation


class Case:
    """One net, budget and set of calibration images; each model is made when it is asked for."""

    def __init__(self, name: str, budget: float, seed: int, o: argparse.Namespace) -> None:
        self.name, self.budget, self.seed, self.o = name, budget, seed, o
        self.x, self.y = nets.images_of(o.data, True)
        test = nets.images_of(o.data, False)
        self.test = test[0][: o.test], test[1][: o.test]
        epochs = nets.epochs_of(name, o.quick)
        self.net = nets.trained(name, o.data, epochs, Path(o.cache), self.x, self.y)
        self.first = seed * CALIBRATION % (len(self.x) - CALIBRATION)
        self.journal = Path(tempfile.mkdtemp()) / "search.journal"  # one search for all repairs

    def calibration(self, samples: int) -> torch.Tensor:
        return self.x.roll(-self.first, 0)[:samples]

    def pruned(self, repair: Any, samples: int = CALIBRATION, **more: Any) -> nn.Module:
        if "steps" not in more and self.o.allocation == "local":
            more["journal"] = self.journal
        return fxprune.prune(
            self.net, self.x[:2], self.budget, self.calibration(samples), repair=repair,
            allocation=self.o.allocation, round_to=1, progress=False, seed=0,
            max_evaluations=self.o.evaluations, calibration_samples=CALIBRATION, **more,
        ).model  # fmt: skip

    @cached_property
    def least_squares(self) -> nn.Module:
        return self.pruned("lstsq")

    @cached_property
    def distilled(self) -> nn.Module:
        return self.pruned(fxprune.Distillation(steps=self.o.steps))

    @cached_property
    def theirs(self) -> nn.Module:
        case = quality.Case(self.name, self.seed, quality.options(self.o.quality))
        return quality.torch_pruned(case, self.budget, "magnitude")[0]

    def tuned(self, model: nn.Module, taught: str) -> nn.Module:
        generator = torch.Generator().manual_seed(self.seed)
        data = TensorDataset(self.x, self.y)
        loader = DataLoader(data, 128, shuffle=True, generator=generator)
        share = TAUGHT[taught]
        return fxprune.finetune(
            model, loader, self.o.epochs, options=fxprune.Tuning(distill=share, seed=self.seed),
            teacher=self.net if share else None, progress=False,
        ).model  # fmt: skip

    def recipes(self) -> dict[str, Callable[[], nn.Module]]:
        """Name of a row -> how its model is made."""
        more = self.o.samples
        found: dict[str, Callable[[], nn.Module]] = {
            "least squares": lambda: self.least_squares,
            "distill": lambda: self.distilled,
            f"distill, {more:,} images": lambda: self.pruned(
                fxprune.Distillation(steps=self.o.steps, samples=more), more
            ),
            f"least squares, {ROUNDS} rounds": lambda: self.pruned("lstsq", steps=ROUNDS),
            "Torch-Pruning magnitude": lambda: self.theirs,
        }
        bases: dict[str, Callable[[], nn.Module]] = {
            "least squares": lambda: self.least_squares,
            "distill": lambda: self.distilled,
            "Torch-Pruning magnitude": lambda: self.theirs,
        }
        for name, base in bases.items():
            for taught in TAUGHT:
                label = f"{name}, {self.o.epochs} epoch(s) on {taught}"
                found[label] = lambda base=base, taught=taught: self.tuned(base(), taught)
        return found

    def measured(self, make: Callable[[], nn.Module]) -> dict[str, float]:
        """Accuracy in percent, KL in nats on the test images, CPU seconds of making it."""
        start = time.process_time()
        model = make()
        seconds = time.process_time() - start
        return {
            "accuracy": nets.accuracy(model, *self.test),
            "original": nets.accuracy(self.net, *self.test),
            "kl": divergence(self.net, model, self.test[0]),
            "macs": quality.macs_of(model, self.x[:1]) / quality.macs_of(self.net, self.x[:1]),
            "cpu seconds": round(seconds, 1),
        }


@torch.no_grad()
def divergence(original: nn.Module, small: nn.Module, x: torch.Tensor) -> float:
    """Mean divergence in nats from the original's outputs on ``x``."""
    original.eval(), small.eval()
    parts = [
        F.kl_div(
            small(a).log_softmax(1), original(a).log_softmax(1), log_target=True, reduction="sum"
        )
        for a in x.split(500)
    ]
    return float(sum(parts)) / len(x)


def run(o: argparse.Namespace, file: Path) -> list[dict[str, Any]]:
    """Every row that was asked for; new ones are added to ``file`` as they become known."""
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for name in o.nets:
        for budget in o.budgets:
            for seed in o.seeds:
                case = Case(name, budget, seed, o)
                for recipe, make in case.recipes().items():
                    cell = {"net": name, "budget": budget, "seed": seed, "recipe": recipe}
                    wanted = not o.recipes or recipe in o.recipes
                    if not wanted or any(cell.items() <= r.items() for r in rows):
                        continue
                    rows.append(cell | case.measured(make))
                    with file.open("a") as out:
                        out.write(json.dumps(rows[-1]) + "\n")
                    print(rows[-1], flush=True)
    return rows


def tables(rows: list[dict[str, Any]], o: argparse.Namespace) -> str:
    """Markdown: a table for each net, recipes down, budgets across; mean ± deviation of seeds."""
    lines: list[str] = []
    for name in o.nets:
        mine = [r for r in rows if r["net"] == name]
        if not mine:
            continue
        budgets = sorted({r["budget"] for r in mine}, reverse=True)
        heads = [f"{b:.0%} MACs: accuracy | KL" for b in budgets]
        lines += ["", f"{name} (original {mine[0]['original']:.2f})", ""]
        lines += ["| recipe | " + " | ".join(heads) + " | CPU s |"]
        lines += ["|---" * (2 * len(budgets) + 2) + "|"]
        for recipe in dict.fromkeys(r["recipe"] for r in mine):
            of = [r for r in mine if r["recipe"] == recipe]
            cells = []
            for b in budgets:
                found = [r for r in of if r["budget"] == b]
                cells += [spread([r["accuracy"] for r in found], 2)]
                cells += [spread([r["kl"] for r in found], 4, False)]
            seconds = statistics.mean(r["cpu seconds"] for r in of)
            lines.append(f"| {recipe} | " + " | ".join(cells) + f" | {seconds:.0f} |")
    return "\n".join(lines)


def spread(values: list[float], digits: int, deviation: bool = True) -> str:
    if not values:
        return "-"
    text = f"{statistics.mean(values):.{digits}f}"
    more = deviation and len(values) > 1
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if more else text


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="digits instead of Fashion-MNIST")
    parser.add_argument("--nets", nargs="+", choices=nets.NETS, default=["resnet20", "vgg"])
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.5, 0.3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="calibration images")
    parser.add_argument("--recipes", nargs="+", help="rows to run, by their full names")
    parser.add_argument("--allocation", default="local")
    parser.add_argument("--evaluations", type=int, default=60, help="of the search")
    parser.add_argument("--steps", type=int, help="of the distillation; default: its own")
    parser.add_argument("--samples", type=int, default=4096, help="of the larger distillation")
    parser.add_argument("--epochs", type=int, default=1, help="of fine-tuning")
    parser.add_argument("--test", type=int, default=5000, help="test images")
    parser.add_argument("--cache", default=os.path.expanduser("~/.cache/fxprune/quality"))
    o = parser.parse_args()
    o.data = "digits" if o.quick else "fashion-mnist"
    o.samples = min(o.samples, 1200) if o.quick else o.samples
    o.quality = ["--test", str(o.test), "--cache", o.cache] + ["--quick"] * o.quick
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)
    print(f"{platform.machine()}, 1 thread, torch {torch.__version__}", flush=True)
    settings = f"{o.data}-{o.allocation}-{o.evaluations}-{o.steps}-{o.epochs}-{o.test}"
    file = Path(o.cache) / f"tuning-{settings}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    print(tables(run(o, file), o))
    print(f"rows: {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
