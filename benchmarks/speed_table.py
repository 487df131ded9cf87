"""docs/speed.md and docs/scaling.png from the figures of speed.py and scaling.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]

HEAD = """# Speed of the analysis

Seconds to trace, couple and cut a model in one thread. To repeat:

    pip install -e .[bench]
    python benchmarks/speed.py          # against Torch-Pruning
    python benchmarks/scaling.py        # growth with depth

"""
AGAINST = """## Against Torch-Pruning

Half the channels, the final layer ignored, one process for each model and tool, fresh copies of
the model, medians of {runs} runs after one to warm up (none for Torch-Pruning on densenet201). A
number of runs in brackets: fewer, since they took over a minute.
Machine: {device}; {threads} thread. Torch-Pruning {version}. The machine was shared with other
work, so **CPU seconds of the process** are compared, with wall-clock seconds beside them. Inputs:
1x3x128x128 (as in `benchmarks/zoo.py`). Ratio: Torch-Pruning's CPU seconds / fxprune's; above 1,
fxprune is faster.

| model | fxprune, CPU s | wall s (spread) | Torch-Pruning, CPU s | wall s (spread) | ratio |
|---|---|---|---|---|---|
"""
GROWTH = """
## Growth with depth

CPU seconds of trace, couple and cut, one thread, median of the runs. A chain of N residual blocks
of 16 channels, and a dense block of N layers, each reading the concatenation of all before it
(growth 4). The size of a graph is the number of its edges (inputs of nodes): those of the chain
grow with N, those of the dense block with N^2, since each layer reads all before it.

![seconds over N and over edges](scaling.png)

"""

HOT = """
## Where the time goes

Sampled while `trace`, `couple` and `cut` run many times (`--profile` is cProfile, which weighs
Python calls more than they cost without it). A model runs once: coupling reads the ATen ops that
the tracer has recorded, and layers whose ops are known (convolutions, batch norms, linear layers,
common functions: `fxprune/record.py`) do not pass through a dispatch mode. A model with a part that
is kept whole, and one that changes shapes in place, runs once more for its labels.

- mobilenet_v2: the forward pass 13%, recording it 22%, the copy of the model and putting back its
  state 9%; labelling 13%, grouping 10%, solving 5%; cutting 22%, of which new tensors 5% and the
  Python code of the new graph 6%.
- Dense block of 800 layers: the convolutions themselves 20%; the rest goes into the 320,000
  arguments of its concatenations, of which every graph node holds a list: torch.fx, while the graph
  is recorded and copied, about 25%, the rules for concatenations about 15%. That part is quadratic
  in N, and linear in the graph. Members of groups are made only when they are asked for.
"""


def line(name: str, row: Row) -> str:
    """One row of the comparison."""
    mine, other = row["fxprune"], row.get("torch-pruning", {"reason": "not run"})
    ratio = f"{other['cpu'] / mine['cpu']:.1f}" if "cpu" in mine and "cpu" in other else "-"
    return f"| {name} | {_two(mine)} | {_two(other)} | {ratio} |"


def _two(t: Row) -> str:
    if "reason" in t:
        return f"{t['reason']} | -"
    fewer = f" [{t['runs']}]" if t["runs"] < 3 else ""
    return f"{t['cpu']:.2f}{fewer} | {t['median']:.2f} ({t['spread']:.0%})"


def write(root: Path) -> None:
    """Write docs/speed.md, with whatever of the two parts has been measured."""
    folder, text = root / "runs" / "speed", HEAD
    if (folder / "speed.json").is_file():
        rows = json.loads((folder / "speed.json").read_text(encoding="utf-8"))
        text += _against(rows)
    if (folder / "scaling.json").is_file():
        points = json.loads((folder / "scaling.json").read_text(encoding="utf-8"))
        text += _growth(points)
        _plot(points, root / "docs" / "scaling.png")
    text += HOT
    (root / "docs" / "speed.md").write_text(text, encoding="utf-8")
    print("wrote docs/speed.md")


def _against(rows: dict[str, Row]) -> str:
    from importlib.metadata import version

    first = next(r["fxprune"] for r in rows.values() if "device" in r["fxprune"])
    counts = [t["runs"] for r in rows.values() for t in r.values() if t.get("runs", 0) > 2]
    head = AGAINST.format(
        runs=" to ".join(str(n) for n in sorted({min(counts), max(counts)})),
        device=first["device"],
        threads=first["threads"],
        version=version("torch-pruning"),
    )
    return head + "".join(line(name, row) + "\n" for name, row in rows.items())


def _growth(rows: dict[str, Row]) -> str:
    text = (
        GROWTH + "| network | N | groups | edges | trace + couple | cut | total, CPU s | runs |\n"
    )
    text += "|---|---|---|---|---|---|---|---|\n"
    for family, row in rows.items():
        for n, p in row["points"].items():
            text += (
                f"| {family} | {n} | {p['groups']} | {p['edges']} | {p['trace']['cpu']:.2f} "
                f"| {p['cut']['cpu']:.2f} | {p['total']:.2f} "
                f"| {p['trace']['runs']} |\n"
            )
    text += "\n"
    for family, row in rows.items():
        for over in ("N", "edges"):
            if f"over {over}" in row:
                every, last = row[f"over {over}"]
                text += (
                    f"- {family}: seconds ~ {over}^{every:.2f}, over the last two ^{last:.2f}.\n"
                )
    return text


def _plot(rows: dict[str, Row], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, both = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axes, over in zip(both, ("N", "edges"), strict=True):
        for (family, row), marker in zip(rows.items(), "os", strict=False):
            points = row["points"]
            sizes = [int(n) if over == "N" else p["edges"] for n, p in points.items()]
            values = [p["total"] for p in points.values()]
            label = f"{family}: {over}^{row[f'over {over}'][0]:.2f}"
            axes.loglog(sizes, values, marker=marker, label=label)
            axes.loglog(sizes, [values[0] * n / sizes[0] for n in sizes], ":", color="grey", lw=1)
        axes.legend(title="dotted: linear")
    both[0].set_xticks(sorted({int(n) for r in rows.values() for n in r["points"]}))
    both[0].xaxis.set_major_formatter("{x:.0f}")
    both[0].minorticks_off()
    both[0].set(xlabel="N blocks or layers", ylabel="trace + couple + cut, CPU seconds, one thread")
    both[1].set(xlabel="edges of the graph")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
