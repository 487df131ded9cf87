"""Tables and plots from the cells that benchmarks/quality.py left in its cache.

    python benchmarks/quality_table.py --markdown tables.md --plots docs

Takes the options of quality.py that choose a results file (--test, --calibration, ...).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

from quality import ALLOCATIONS, CRITERIA, REPAIRS, THEIRS, Cell, known, options, results_file

Known: TypeAlias = dict[Cell, dict[str, Any]]
HEADS = {"lstsq": "least squares", "one-shot": "one-shot", "bn": "BatchNorm", "none": "cut only"}
COLOURS = {"lstsq": "#1b7837", "one-shot": "#7fbf7b", "bn": "#af8dc3", "none": "#999999"}


def shown(cells: Known, wanted: dict[str, Any], what: str = "accuracy") -> str:
    """Mean over seeds, and where there are several their standard deviation; "-" for none."""
    values = [
        figures[what]
        for cell, figures in cells.items()
        if what in figures and all(getattr(cell, k) == v for k, v in wanted.items())
    ]
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def rows_of(cells: Iterable[Cell], net: str, budget: float) -> list[tuple[str, str]]:
    """(criterion, allocation) of a table, in the order of the lists in quality.py."""
    found = {(c.criterion, c.allocation) for c in cells if (c.net, c.budget) == (net, budget)}
    criteria = [*CRITERIA, *sorted({c for c, _ in found if c.startswith(THEIRS)})]
    order = [(c, a) for a in ALLOCATIONS for c in criteria]
    return [row for row in order if row in found]


def tables(cells: Known) -> str:
    """Markdown: one table for each net and budget, recipes down and repairs across."""
    lines: list[str] = []
    heads = list(dict.fromkeys((c.net, c.budget) for c in cells if c.budget < 1))
    for net, budget in sorted(heads, key=lambda h: (h[0], -h[1])):
        whole = shown(cells, {"net": net, "criterion": "original"})
        repairs = [
            r
            for r in REPAIRS
            if any((c.net, c.budget, c.repair) == (net, budget, r) for c in cells)
        ]
        lines += [f"### {net} at {budget:.0%} of the MACs (original {whole})", ""]
        across = " | ".join(HEADS[r] for r in repairs)
        lines.append(f"| ranking | allocation | {across} | plan, s | repair, s |")
        lines.append("|---" * (len(repairs) + 4) + "|")
        for criterion, allocation in rows_of(cells, net, budget):
            at = {"net": net, "budget": budget, "criterion": criterion, "allocation": allocation}
            texts = [shown(cells, at | {"repair": r}) for r in repairs]
            seconds = shown(cells, at, "plan seconds"), shown(cells, at, "repair seconds")
            seconds = tuple(s.split(" ")[0] for s in seconds)
            lines.append(f"| {criterion} | {allocation} | {' | '.join((*texts, *seconds))} |")
        lines.append("")
    return "\n".join(lines)


def plot(cells: Known, net: str, file: Path) -> None:
    """Bars: accuracy of each ranking at uniform ratios, by repair, one panel for each budget."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    budgets = sorted({c.budget for c in cells if c.net == net and c.budget < 1}, reverse=True)
    figure, axes = plt.subplots(1, len(budgets), figsize=(4.6 * len(budgets), 3.2), squeeze=False)
    for axis, budget in zip(axes[0], budgets, strict=True):
        rows = [r for r in rows_of(cells, net, budget) if r[1] == "uniform"]
        rows = [r for r in rows if not r[0].startswith(THEIRS)]
        for i, repair in enumerate(r for r in REPAIRS if r != "one-shot"):
            heights = [
                figures["accuracy"]
                for criterion, _ in rows
                for cell, figures in cells.items()
                if cell == Cell(net, budget, 0, criterion, "uniform", repair)
            ]
            if len(heights) == len(rows):
                at = [x + 0.27 * (i - 1) for x in range(len(rows))]
                axis.bar(at, heights, 0.25, label=HEADS[repair], color=COLOURS[repair])
        axis.set_xticks(range(len(rows)), [c for c, _ in rows], rotation=40, ha="right")
        axis.set_title(f"{net}, {budget:.0%} of the MACs")
        axis.set_ylabel("accuracy, %")
        axis.set_ylim(0, 100)
    axes[0][0].legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--markdown", help="write the tables to this file")
    parser.add_argument("--plots", help="write one SVG for each net into this folder")
    own, rest = parser.parse_known_args()
    cells = known(results_file(options(rest)))
    text = tables(cells)
    print(text)
    if own.markdown:
        Path(own.markdown).write_text(text)
    if own.plots:
        for net in dict.fromkeys(c.net for c in cells if c.budget < 1):
            plot(cells, net, Path(own.plots) / f"quality-{net}.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
