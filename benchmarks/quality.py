"""Accuracy without fine-tuning: criteria x allocations x repairs, on nets trained by this script.

    python benchmarks/quality.py --quick                 digits, a few minutes
    python benchmarks/quality.py                         Fashion-MNIST, hours on one core
    python benchmarks/quality.py --nets vgg --budgets 0.3 --markdown docs/quality.part.md

Fashion-MNIST is read from Debian's package dataset-fashion-mnist, or downloaded by torchvision.
Trained weights and results are kept in ``--cache`` (default ~/.cache/fxprune/quality); a run that
was broken off goes on where it was.

Legend for shapes: N images, C channels, H x W pixels.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch_pruning as tp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fxprune import allocate, criteria
from fxprune.allocate import AllocationProblem
from fxprune.cut import cut
from fxprune.data import load_data
from fxprune.fitness import KLFitness
from fxprune.observe import observe
from fxprune.repair import LeastSquares, repair_bn
from fxprune.sequential import repair_sequential
from fxprune.traced import Traced, trace
from fxprune.types import Budget, PrunePlan

# --- nets -------------------------------------------------------------------------------------


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution without a bias, and batch normalisation."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    )


def head(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)]


def vgg() -> nn.Module:
    """3x3 convolutions 32-32-pool-64-64-pool-128-128, global average, linear."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate([(1, 32), (32, 32), (32, 64), (64, 64), (64, 128), (128, 128)]):
        layers += [nn.MaxPool2d(2)] if i in (2, 4) else []
        layers += [conv(a, b, 3), nn.ReLU()]
    return nn.Sequential(*layers, *head(128))


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = conv(inputs, outputs, 3, stride), conv(outputs, outputs, 3)
        same = inputs == outputs
        self.shortcut = nn.Identity() if same else conv(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


def resnet20() -> nn.Module:
    layers: list[nn.Module] = [conv(1, 16, 3), nn.ReLU()]
    for a, b in [(16, 16), (16, 32), (32, 64)]:
        layers += [Residual(a if i == 0 else b, b, 2 if i == 0 < b - a else 1) for i in range(3)]
    return nn.Sequential(*layers, *head(64))


class Inverted(nn.Module):
    """Expansion, depthwise, projection; a shortcut where the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        wide = inputs * expand
        self.expand, self.project = conv(inputs, wide, 1), conv(wide, outputs, 1)
        self.depth = conv(wide, wide, 3, stride, wide)
        self.same = inputs == outputs and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(F.relu6(self.depth(F.relu6(self.expand(x)))))
        return x + y if self.same else y


def mobilenet() -> nn.Module:
    layers: list[nn.Module] = [conv(1, 16, 3, 2), nn.ReLU6()]
    plan = [(16, 16, 1), (16, 24, 1), (24, 24, 1), (24, 40, 2), (40, 40, 1), (40, 64, 1)]
    layers += [Inverted(a, b, s, 4) for a, b, s in plan]
    return nn.Sequential(*layers, conv(64, 160, 1), nn.ReLU6(), *head(160))


NETS: dict[str, Callable[[], nn.Module]] = {
    "vgg": vgg, "resnet20": resnet20, "mobilenet": mobilenet,
}  # fmt: skip


# --- training ---------------------------------------------------------------------------------


def images_of(spec: str, train: bool) -> tuple[Tensor, Tensor]:
    """All images [N, 1, H, W], normalised, and labels [N]."""
    size = 8 if spec == "digits" else 28
    batches = load_data(spec, torch.zeros(1, 1, size, size), train=train, batch_size=4096)
    assert batches is not None
    xs, ys = zip(*batches, strict=True)
    return torch.cat(xs), torch.cat(ys)


def train(net: nn.Module, x: Tensor, y: Tensor, epochs: int, flip: bool, rate: float) -> None:
    """SGD with one cycle of the learning rate; shifts of 2 pixels, mirrored where ``flip``."""
    net.train()
    net.to(memory_format=torch.channels_last)
    size = 128 if len(x) > 5000 else 64
    steps = epochs * (len(x) // size)
    optimizer = torch.optim.SGD(net.parameters(), rate, 0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.25)
    height, width = x.shape[2:]
    reach = max(1, height // 14)
    for _ in range(epochs):
        order = torch.randperm(len(x))
        for part in order[: len(x) // size * size].split(size):
            a, b = torch.randint(0, 2 * reach + 1, (2,)).tolist()
            batch = F.pad(x[part], [reach] * 4, value=float(x.min()))
            batch = batch[:, :, a : a + height, b : b + width]
            if flip and torch.rand(()) < 0.5:
                batch = batch.flip(3)
            with torch.autocast("cpu", torch.bfloat16, enabled=len(x) > 5000):
                out = net(batch.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(out.float(), y[part], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    net.to(memory_format=torch.contiguous_format).eval()


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percent of ``x`` that get their label; eval mode."""
    net.eval()
    right = sum(
        int((net(a).argmax(1) == b).sum()) for a, b in zip(x.split(500), y.split(500), strict=True)
    )
    return 100 * right / len(x)


def trained(name: str, spec: str, epochs: int, cache: Path, x: Tensor, y: Tensor) -> nn.Module:
    """The net with trained weights, from the cache where they are there."""
    torch.manual_seed(0)
    net = NETS[name]()
    file = cache / f"{name}-{spec}-{epochs}.safetensors"
    if not file.exists():
        start = time.perf_counter()
        train(net, x, y, epochs, flip=spec != "digits", rate=0.05 if name == "mobilenet" else 0.1)
        cache.mkdir(parents=True, exist_ok=True)
        save_file(net.state_dict(), file)
        print(f"{name}: {epochs} epochs in {time.perf_counter() - start:.0f} s", flush=True)
    net.load_state_dict(load_file(file))
    return net.eval()


# --- recipes ----------------------------------------------------------------------------------

CRITERIA = ("attention", "reconstruction", "l1", "l2", "random")
ALLOCATIONS = ("uniform", "local")
REPAIRS = ("none", "bn", "one-shot", "sequential")


@dataclass(frozen=True)
class Setting:
    """One net on one data set, ready to be pruned.

    ``test``: images and labels; ``recipes``: criteria, allocations and repairs to be tried.
    """

    name: str
    net: nn.Module
    traced: Traced
    seen: list[Any]
    held_out: list[Any]
    test: tuple[Tensor, Tensor]
    evaluations: int
    seed: int
    recipes: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]


Result = dict[str, Any]


def plans(
    s: Setting, budget: float, wanted: dict[tuple[str, str], list[str]]
) -> Iterator[tuple[str, str, PrunePlan, LeastSquares, float]]:
    """(criterion, allocation, plan, one-shot repair, seconds for ranking and allocation).

    The search's fitness is the divergence after the one-shot repair, whatever repair comes last.
    """
    for criterion in dict.fromkeys(c for c, _ in wanted):
        chosen = criteria.get(criterion)
        start = time.perf_counter()
        statistics = observe(s.traced, s.seen, **criteria.observe_options(chosen))
        scores = chosen(s.traced, statistics, np.random.default_rng(s.seed))
        once = LeastSquares(s.traced, statistics)
        ranked = time.perf_counter() - start
        for allocation in (a for c, a in wanted if c == criterion):
            start = time.perf_counter()
            fitness = KLFitness(s.traced, once, s.held_out)
            problem = AllocationProblem(
                s.traced,
                scores,
                Budget(macs=budget),
                1,
                s.seed,
                fitness,
                False,
                s.evaluations,
                None,
            )
            plan = allocate.get(allocation)(problem)
            yield criterion, allocation, plan, once, ranked + time.perf_counter() - start


def repaired(s: Setting, plan: PrunePlan, once: LeastSquares, repair: str) -> nn.Module:
    module = cut(s.traced, plan)
    if repair == "bn":
        repair_bn(s.traced, plan, module, s.seen)
    elif repair != "none":
        once.apply(plan, module)
        if repair == "sequential":
            repair_sequential(s.traced, plan, module, s.seen)
    return module


def own_results(
    s: Setting, budget: float, known: dict[str, Result]
) -> Iterator[tuple[str, Result]]:
    """(key, result) of every recipe of this library that is not known yet."""
    some, allocations, repairs = s.recipes
    every = {
        (c, a): [r for r in repairs if key(s, budget, c, a, r) not in known]
        for c in some
        for a in allocations
    }
    wanted = {recipe: missing for recipe, missing in every.items() if missing}
    for criterion, allocation, plan, once, seconds in plans(s, budget, wanted):
        share = s.traced.cost(plan).macs / s.traced.cost().macs
        for repair in wanted[criterion, allocation]:
            start = time.perf_counter()
            module = repaired(s, plan, once, repair)
            mending = time.perf_counter() - start
            yield (
                key(s, budget, criterion, allocation, repair),
                {
                    "accuracy": accuracy(module, *s.test),
                    "macs": share,
                    "plan seconds": round(seconds, 2),
                    "repair seconds": round(mending, 2),
                },
            )


def key(s: Setting, budget: float, criterion: str, allocation: str, repair: str) -> str:
    return f"{s.name}/{budget:g}/{s.seed}/{criterion}/{allocation}/{repair}"


# --- Torch-Pruning ----------------------------------------------------------------------------


def macs_of(net: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x)
    return int(counter.get_total_flops()) // 2


def torch_pruned(s: Setting, budget: float, kind: str) -> tuple[nn.Module, float]:
    """Its own pruner at a uniform ratio, by bisection the largest net within the budget."""
    x = s.test[0][:1]
    whole = macs_of(s.net, x)
    importances = {
        "magnitude": lambda: tp.importance.GroupMagnitudeImportance(p=2),
        "BN scale": tp.importance.BNScaleImportance,
        "LAMP": lambda: tp.importance.LAMPImportance(p=2),
    }
    pruners = {"BN scale": tp.pruner.BNScalePruner}
    low, high, best = 0.0, 0.98, (s.net, 1.0)
    for _ in range(9):
        ratio = (low + high) / 2
        net = copy.deepcopy(s.net)
        ignored = [m for m in net.modules() if isinstance(m, nn.Linear)]
        pruner = pruners.get(kind, tp.pruner.MagnitudePruner)
        pruner(net, x, importances[kind](), pruning_ratio=ratio, ignored_layers=ignored).step()
        share = macs_of(net, x) / whole
        if share <= budget:
            high = ratio
            best = (net.eval(), share) if best[1] > budget or share > best[1] else best
        else:
            low = ratio
    return best


def their_results(
    s: Setting, budget: float, known: dict[str, Result]
) -> Iterator[tuple[str, Result]]:
    for kind in ("magnitude", "BN scale", "LAMP"):
        name = key(s, budget, f"Torch-Pruning {kind}", "uniform", "none")
        if name not in known:
            net, share = torch_pruned(s, budget, kind)
            yield name, {"accuracy": accuracy(net, *s.test), "macs": share}


# --- tables -----------------------------------------------------------------------------------


def tables(results: dict[str, Result]) -> str:
    """Markdown: for each net and budget, recipes down and repairs across."""
    lines: list[str] = []
    heads = list(dict.fromkeys(tuple(k.split("/")[:3]) for k in results if k.count("/") == 5))
    for net, budget, seed in sorted(heads, key=lambda h: (h[0] != "vgg", h[0], -float(h[1]))):
        start = f"{net}/{budget}/{seed}/"
        rows = {k.removeprefix(start): v for k, v in results.items() if k.startswith(start)}
        whole = results.get(net, {}).get("accuracy", float("nan"))
        lines += [f"### {net} at {float(budget):.0%} of the MACs (original {whole:.1f})", ""]
        lines += ["| ranking | allocation | cut only | bn | one-shot | sequential | MACs |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for name in dict.fromkeys(r.rpartition("/")[0] for r in rows):
            cells = [rows.get(f"{name}/{r}") for r in REPAIRS]
            share = next(c["macs"] for c in cells if c)
            shown = " | ".join(f"{c['accuracy']:.1f}" if c else "-" for c in cells)
            lines.append(f"| {name.replace('/', ' | ')} | {shown} | {share:.1%} |")
        lines.append("")
    return "\n".join(lines)


# --- the run ----------------------------------------------------------------------------------


def setting(name: str, o: argparse.Namespace) -> tuple[Setting, float]:
    """A trained net with its data, and its accuracy."""
    x, y = images_of(o.data, True)
    test = images_of(o.data, False)
    net = trained(name, o.data, o.epochs, Path(o.cache), x, y)
    batches = list(x[: o.calibration].split(64))
    held = max(1, len(batches) // 4)
    seen, held_out = batches[:-held], batches[-held:]
    traced = trace(net, x[:2])
    recipes = (tuple(o.criteria), tuple(o.allocations), tuple(o.repairs))
    s = Setting(name, net, traced, seen, held_out, test, o.evaluations, o.seed, recipes)
    return s, accuracy(net, *test)


def results_file(name: str, o: argparse.Namespace) -> Path:
    """Where the results of a net are kept; other settings, another file."""
    settings = f"{o.epochs}-{o.calibration}-{o.evaluations}"
    return Path(o.cache) / f"results-{o.data}-{name}-{settings}.json"


def run(o: argparse.Namespace) -> None:
    """Every recipe that is not in the results file yet; prints each as it is known."""
    for name in o.nets:
        file = results_file(name, o)
        results: dict[str, Result] = json.loads(file.read_text()) if file.exists() else {}
        s, whole = setting(name, o)
        results[name] = {"accuracy": whole}
        print(f"{name}: {whole:.2f}", flush=True)
        for budget in o.budgets:
            for work in (their_results, own_results):
                for found, result in work(s, budget, results):
                    results[found] = result
                    file.write_text(json.dumps(results, indent=1))
                    print(f"{found}: {result['accuracy']:.2f}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="digits instead of Fashion-MNIST")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.5, 0.3])
    parser.add_argument("--criteria", nargs="+", choices=criteria.names(), default=CRITERIA)
    parser.add_argument("--allocations", nargs="+", choices=allocate.names(), default=ALLOCATIONS)
    parser.add_argument("--repairs", nargs="+", choices=REPAIRS, default=REPAIRS)
    parser.add_argument("--epochs", type=int, help="of training; default 2, quick 24")
    parser.add_argument("--evaluations", type=int, help="of the search; default 60, quick 20")
    parser.add_argument("--calibration", type=int, default=512, help="training images, no labels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", default=os.path.expanduser("~/.cache/fxprune/quality"))
    parser.add_argument("--markdown", help="write the tables of all results to this file")
    o = parser.parse_args()
    o.data = "digits" if o.quick else "fashion-mnist"
    o.epochs = o.epochs or (24 if o.quick else 2)
    o.evaluations = o.evaluations or (20 if o.quick else 60)
    torch.set_num_threads(o.threads)
    warnings.simplefilter("ignore", UserWarning)
    run(o)
    merged: dict[str, Result] = {}
    for name in NETS:
        file = results_file(name, o)
        merged |= json.loads(file.read_text()) if file.exists() else {}
    text = tables(merged)
    print(f"\n{platform.machine()} {o.threads} thread(s), torch {torch.__version__}\n\n{text}")
    if o.markdown:
        Path(o.markdown).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
