"""Seconds to analyse and cut a model, fxprune against Torch-Pruning, one thread, the same run.

    python benchmarks/speed.py              writes docs/speed.md (and its plot, if scaling.py ran)
    python benchmarks/speed.py --only resnet18 --profile     where fxprune's time goes

fxprune: trace, couple and cut with half the channels of every free group kept at random.
Torch-Pruning: MagnitudePruner with its dependency graph, and step(), pruning ratio 0.5, the final
layer ignored (its documentation's usual call). Neither has to look at data: the rest of a pruning
run (statistics, search) is left out. Each run gets a fresh copy of the model.
"""

from __future__ import annotations

import argparse
import copy
import cProfile
import io
import json
import pstats
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / d) for d in ("tests", "")]

import speed_table  # noqa: E402
import torch  # noqa: E402
import torch_pruning  # noqa: E402
from oracle import random_plan  # noqa: E402
from timer import measure  # noqa: E402
from torch import nn  # noqa: E402
from zoo import build  # noqa: E402

import fxprune  # noqa: E402
from fxprune.cut import cut  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
MODELS = (
    "resnet18", "resnet50", "resnet152", "mobilenet_v2", "efficientnet_b0", "efficientnet_v2_l",
    "regnet_y_16gf", "inception_v3", "convnext_tiny", "densenet201",
)  # fmt: skip
ALONE = ("swin_t",)  # Torch-Pruning does not finish on it
MARK = "RESULT "


def ours(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Trace, couple and cut."""
    traced = fxprune.trace(model, inputs)
    cut(traced, random_plan(traced, 0, 0.5))


def theirs(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Build the dependency graph and prune, at the same ratio; the last linear layer stays."""
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    pruner = torch_pruning.pruner.MagnitudePruner(
        model,
        inputs[0],
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=[last],
    )
    pruner.step()


def child(name: str, tool: str, runs: int) -> None:
    """One model and tool in a process of its own; prints the timing."""
    torch.set_num_threads(1)
    built = build("torchvision", name)
    with torch.no_grad():
        built.model(*built.inputs)
    call = ours if tool == "fxprune" else theirs
    timing = measure(
        lambda model: call(model, built.inputs),
        prepare=lambda: copy.deepcopy(built.model),
        runs=runs,
        warmup=0 if name == "densenet201" and tool != "fxprune" else 1,
        enough=60.0,
    )
    print(MARK + json.dumps(timing.as_dict()), flush=True)


def timed(name: str, tool: str, options: argparse.Namespace) -> dict[str, Any]:
    """The timing of one model and tool, or the reason why there is none."""
    words = [sys.executable, __file__, "--one", f"{name},{tool}", "--runs", str(options.runs)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=options.time)
    except subprocess.TimeoutExpired:
        return {"reason": f"not done in {options.time:g} s"}
    found = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if not found:
        return {"reason": (done.stderr.strip().splitlines() or ["no message"])[-1][:200]}
    return dict(json.loads(found[-1][len(MARK) :]))


def profile(name: str) -> None:
    """The functions that take most of fxprune's own time."""
    torch.set_num_threads(1)
    built = build("torchvision", name)
    ours(built.model, built.inputs)
    profiler = cProfile.Profile()
    profiler.runcall(ours, built.model, built.inputs)
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(25)
    pstats.Stats(profiler, stream=text).sort_stats("cumtime").print_stats("fxprune|oracle", 40)
    print(text.getvalue())


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--only", default="", help="names, separated by commas")
    p.add_argument("--runs", type=int, default=3)
    p.add_argument("--time", type=float, default=400.0, help="seconds for one model and tool")
    p.add_argument("--profile", action="store_true")
    p.add_argument("--one", help=argparse.SUPPRESS)
    options = p.parse_args()
    if options.one:
        name, _, tool = options.one.partition(",")
        child(name, tool, options.runs)
        return
    names = options.only.split(",") if options.only else [*MODELS, *ALONE]
    if options.profile:
        for name in names:
            profile(name)
        return
    path = ROOT / "runs" / "speed" / "speed.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for name in names:
        row: dict[str, Any] = {"fxprune": timed(name, "fxprune", options)}
        if name not in ALONE:
            row["torch-pruning"] = timed(name, "torch-pruning", options)
        rows[name] = row
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        print(speed_table.line(name, row), flush=True)
    speed_table.write(ROOT)


if __name__ == "__main__":
    main()
