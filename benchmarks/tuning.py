"""What distillation, rounds and an epoch of fine-tuning give back after pruning.

    python benchmarks/tuning.py --quick                   digits, some minutes
    python benchmarks/tuning.py --markdown docs/tuning.md     Fashion-MNIST

The nets are those of nets.py, trained by it and kept in its cache. Uniform ratios unless
``--allocation`` says otherwise, so that the rows differ in one thing. One core, one thread.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import nets
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fxprune

CALIBRATION = 512  # training images without their labels


def kl(original: nn.Module, small: nn.Module, x: Tensor) -> float:
    """Mean divergence in nats from the original's outputs on ``x``."""
    with torch.no_grad():
        p, q = (m.eval()(x).log_softmax(1) for m in (original, small))
        return float(F.kl_div(q, p, log_target=True, reduction="batchmean"))


def rows(
    net: nn.Module, x: Tensor, y: Tensor, budget: float, o: argparse.Namespace
) -> Iterator[tuple[str, nn.Module, float]]:
    """(recipe, model, seconds)."""
    options: dict[str, Any] = {
        "allocation": o.allocation, "round_to": 1, "progress": False, "max_evaluations": o.evals,
        "calibration_samples": CALIBRATION, "seed": o.seed,
    }  # fmt: skip
    data = list(x[:CALIBRATION].split(64))

    def pruned(**more: Any) -> tuple[fxprune.PruneResult, float]:
        start = time.perf_counter()
        result = fxprune.prune(net, x[:2], budget, data, **options, **more)
        return result, time.perf_counter() - start

    plain, seconds = pruned(repair="lstsq")
    yield "least squares", plain.model, seconds
    rounds, seconds = pruned(repair="lstsq", steps=3)
    yield "least squares, 3 rounds", rounds.model, seconds
    start = time.perf_counter()
    found, seconds = pruned(repair=fxprune.Distillation(steps=o.steps))
    yield f"distill, {o.steps} steps", found.model, seconds
    loader = DataLoader(
        TensorDataset(x, y), 128, shuffle=True, generator=torch.Generator().manual_seed(o.seed)
    )
    for name, source in (("least squares", plain), ("distill", found)):
        for share in (0.0, 0.5, 1.0):
            start = time.perf_counter()
            tuned = fxprune.finetune(
                source, loader, o.epochs, options=fxprune.Tuning(distill=share, seed=o.seed),
                teacher="original" if share else None, progress=False,
            )  # fmt: skip
            taught = {0.0: "labels", 0.5: "labels and original", 1.0: "original"}[share]
            label = f"{name}, {o.epochs} epoch(s) on {taught}"
            yield label, tuned.model, time.perf_counter() - start


def run(o: argparse.Namespace) -> Iterator[str]:
    """Lines of Markdown, as they are known."""
    spec, epochs = ("digits", 24) if o.quick else ("fashion-mnist", 2)
    x, y = nets.images_of(spec, True)
    test = nets.images_of(spec, False)
    for name in o.nets:
        net = nets.trained(name, spec, epochs, Path(o.cache), x, y)
        whole = nets.accuracy(net, *test)
        for budget in o.budgets:
            yield f"\n{name} on {spec} at {budget:.0%} of the MACs (original {whole:.2f}%)\n"
            yield "| recipe | test accuracy | KL on test images | seconds |\n|---|---|---|---|"
            for recipe, model, seconds in rows(net, x, y, budget, o):
                right = nets.accuracy(model, *test)
                far = kl(net, model, test[0][:2000])
                yield f"| {recipe} | {right:.2f} | {far:.4f} | {seconds:.0f} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="digits instead of Fashion-MNIST")
    parser.add_argument("--nets", nargs="+", choices=nets.NETS, default=["resnet20"])
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.3])
    parser.add_argument("--allocation", default="uniform")
    parser.add_argument("--evals", type=int, default=30)
    parser.add_argument("--steps", type=int, default=300, help="of the distillation")
    parser.add_argument("--epochs", type=int, default=1, help="of fine-tuning")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", default=os.path.expanduser("~/.cache/fxprune/quality"))
    parser.add_argument("--markdown", metavar="FILE", help="append the tables to this file")
    o = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)
    head = f"{platform.machine()}, 1 thread, torch {torch.__version__}, seed {o.seed}"
    lines = [head]
    print(head, flush=True)
    for line in run(o):
        lines.append(line)
        print(line, flush=True)
    if o.markdown:
        with open(o.markdown, "a", encoding="utf-8") as f:
            f.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
