"""How the seconds of trace, couple and cut grow with the depth of the network.

    python benchmarks/scaling.py            writes docs/scaling.png and the table in docs/speed.md

Two families: a chain of N residual blocks (all blocks share one channel group), and a dense block
of N layers, each of which reads the concatenation of all before it (N groups; the input of the last
layer has N members). Widths are small, so that the analysis and not the arithmetic is measured. The
exponents are slopes of a straight line through log(seconds), over log(N) and over the logarithm of
the graph's size, for all N and for the last two. The size is the number of edges (inputs of nodes):
that of a chain grows with N, that of a dense block with N^2.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / d) for d in ("tests", "")]

import numpy as np  # noqa: E402
import speed_table  # noqa: E402
import torch  # noqa: E402
from oracle import random_plan  # noqa: E402
from timer import measure  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import fxprune  # noqa: E402
from fxprune.cut import cut  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SIZES = (50, 100, 200, 400, 800)
WIDTH, GROWTH = 16, 4
LONG = 4.0  # CPU seconds; the next, larger network is then measured once


class Residual(nn.Module):
    """x + conv(relu(bn(conv(x)))), [N, WIDTH, H, W]."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False),
            nn.BatchNorm2d(WIDTH),
            nn.ReLU(),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Dense(nn.Module):
    """``n`` layers; each reads all earlier outputs and adds GROWTH channels."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Conv2d(WIDTH + i * GROWTH, GROWTH, 3, padding=1) for i in range(n)
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = [x]
        for layer in self.layers:
            parts.append(layer(torch.cat(parts, 1)).relu())
        return torch.cat(parts, 1)


def network(family: str, n: int) -> nn.Module:
    """A stem, ``n`` blocks or layers, a pooled head."""
    body = nn.Sequential(*(Residual() for _ in range(n))) if family == "chain" else Dense(n)
    width = WIDTH if family == "chain" else WIDTH + n * GROWTH
    pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(nn.Conv2d(3, WIDTH, 3), body, *pool, nn.Linear(width, 10)).eval()


def seconds(family: str, n: int, runs: int) -> dict[str, Any]:
    """Timings of trace + couple, and of cut, for one network."""
    torch.manual_seed(0)
    model, x = network(family, n), torch.randn(1, 3, 10, 10)
    kept: dict[str, Any] = {}

    def analyse(_: Any) -> None:
        kept["traced"] = fxprune.trace(model, x)

    analysis = measure(analyse, runs=runs)
    traced = kept["traced"]
    plan = random_plan(traced, 0, 0.5)
    cutting = measure(lambda _: cut(traced, plan), runs=runs)
    return {
        "groups": len(traced.groups),
        "edges": sum(len(n.all_input_nodes) for n in traced.graph_module.graph.nodes),
        "trace": analysis.as_dict(),
        "cut": cutting.as_dict(),
        "total": analysis.cpu + cutting.cpu,
    }


def exponents(sizes: list[int], values: list[float]) -> list[float]:
    """Slope of log(values) over log(sizes): over all, and over the last two."""
    x, y = np.log(sizes), np.log(values)
    return [float(np.polyfit(x[-last:], y[-last:], 1)[0]) for last in (len(x), 2)]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--sizes", default=",".join(str(n) for n in SIZES))
    p.add_argument("--runs", type=int, default=3)
    p.add_argument("--limit", type=float, default=120.0, help="no larger N after these seconds")
    options = p.parse_args()
    torch.set_num_threads(1)
    seconds("chain", 2, 1)  # first-call costs of the libraries
    path = ROOT / "runs" / "speed" / "scaling.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Any] = {}
    for family in ("chain", "dense"):
        points: dict[str, Any] = {}
        runs = options.runs
        for n in (int(s) for s in options.sizes.split(",")):
            points[str(n)] = seconds(family, n, runs)
            print(f"{family} {n}: {points[str(n)]['total']:.2f} s of CPU", flush=True)
            totals = [v["total"] for v in points.values()]
            rows[family] = {"points": points}
            if len(points) > 1:
                rows[family]["over N"] = exponents([int(k) for k in points], totals)
                rows[family]["over edges"] = exponents(
                    [v["edges"] for v in points.values()], totals
                )
            path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
            if points[str(n)]["total"] > options.limit:
                break
            runs = 1 if points[str(n)]["total"] > LONG else options.runs
    speed_table.write(ROOT)


if __name__ == "__main__":
    main()
