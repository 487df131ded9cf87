"""Geometry of the report's charts: numbers and SVG paths, which the template draws. No markup here.

Units: pixels of the SVG's own coordinates, y downward.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx

from fxprune.traced import Traced
from fxprune.types import PrunePlan

WIDTH = 960.0
ROW = 22.0
_LABELS = 250.0  # of the bar chart, left of the bars
_NUMBERS = 110.0  # right of them
_BACK = 90.0  # of arcs on the left of the groups
MOST_BARS = 400


@dataclass(frozen=True)
class Bar:
    """One group: ``full`` and ``kept`` are lengths of bars, ``y`` its upper edge."""

    name: str
    n: int
    left: int
    y: float
    full: float
    kept: float
    locked: str | None


@dataclass(frozen=True)
class Bars:
    rows: tuple[Bar, ...]
    left_out: int
    x: float = _LABELS

    @property
    def height(self) -> float:
        return ROW * len(self.rows) + 4


def bars(traced: Traced, plan: PrunePlan) -> Bars:
    """Widths of each group before and after, in the order of execution."""
    counts = traced.counts(plan)
    groups = [(g, int(c) * g.rows) for g, c in zip(traced.groups, counts, strict=True)]
    order = _ranks(traced)
    groups.sort(key=lambda pair: order[pair[0].name])
    most = max((g.n for g, _ in groups), default=1)
    scale = (WIDTH - _LABELS - _NUMBERS) / math.sqrt(most)
    shown = groups[:MOST_BARS]
    rows = []
    for i, (g, left) in enumerate(shown):
        full = scale * math.sqrt(g.n)
        rows.append(Bar(g.name, g.n, left, i * ROW + 4, full, full * left / g.n, g.locked))
    return Bars(tuple(rows), len(groups) - len(shown))


# --- curves ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True)
class Dot:
    x: float
    y: float
    kind: str
    text: str


@dataclass(frozen=True)
class Curve:
    """``line``: an SVG path; ``dots``: what was measured."""

    title: str
    x_name: str
    y_name: str
    line: str
    dots: tuple[Dot, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    width: float = WIDTH
    height: float = 280.0
    left: float = 80.0
    bottom: float = 240.0


def search_curve(trace: Sequence[Mapping[str, Any]]) -> Curve | None:
    """Fitness against evaluations; the line is the best so far within the budget."""
    points = [
        (int(t["evaluation"]), float(t["fitness"]), bool(t.get("accepted")), str(t.get("stage")))
        for t in trace
        if t.get("fitness") is not None and math.isfinite(t["fitness"])
    ]
    if len(points) < 2:
        return None
    best: list[tuple[float, float]] = []
    for x, y, accepted, _ in points:
        if accepted:
            best.append((x, y))
    return _curve(
        "Search", "evaluations", "fitness (lower is better)",
        [(x, y, "taken" if a else "tried", s) for x, y, a, s in points], best, steps=True,
    )  # fmt: skip


def step_curve(title: str, y_name: str, points: Sequence[tuple[float, float]]) -> Curve | None:
    """A measure over the steps of a training."""
    good = [(float(x), float(y)) for x, y in points if math.isfinite(y)]
    if len(good) < 2:
        return None
    return _curve(title, "steps", y_name, [(x, y, "taken", "") for x, y in good], good, steps=False)


def _curve(
    title: str,
    x_name: str,
    y_name: str,
    points: Sequence[tuple[float, float, str, str]],
    line: Sequence[tuple[float, float]],
    *,
    steps: bool,
) -> Curve:
    ys = [p[1] for p in points]
    log = min(ys) > 0 and max(ys) / min(ys) > 8
    left, right, top, bottom = 80.0, WIDTH - 20, 26.0, 240.0
    last = max(p[0] for p in points)
    place = _scale(min(ys), max(ys), bottom, top, log)
    across = _scale(0.0, last, left, right, log=False)
    dots = tuple(
        Dot(round(across(x), 1), round(place(y), 1), k, f"{t} {y:.4g}".strip())
        for x, y, k, t in points
    )
    path: list[str] = []
    for x, y in line:
        u, v = across(x), place(y)
        move = f"H{u:.1f}V{v:.1f}" if steps else f"L{u:.1f},{v:.1f}"
        path.append(move if path else f"M{u:.1f},{v:.1f}")
    if steps and path:
        path.append(f"H{right:.1f}")
    x_ticks = tuple(Tick(across(v), f"{v:g}") for v in _round_values(0, last))
    values = _log_values(min(ys), max(ys)) if log else _round_values(min(ys), max(ys))
    y_ticks = tuple(Tick(place(v), f"{v:g}") for v in values)
    return Curve(title, x_name, y_name, "".join(path), dots, x_ticks, y_ticks)


def _scale(low: float, high: float, start: float, end: float, log: bool) -> Any:
    a, b = (math.log(low), math.log(high)) if log else (low, high)
    span = b - a or 1.0

    def at(value: float) -> float:
        v = math.log(value) if log else value
        return start + (v - a) / span * (end - start)

    return at


def _round_values(low: float, high: float) -> list[float]:
    """About five round numbers from ``low`` to ``high``."""
    span = high - low or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span / 4))
    step = next(step * m for m in (1, 2, 5, 10) if span / (step * m) <= 6)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_values(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    wide = math.log10(high / low) > 2
    found = [m * 10.0**d for d in decades for m in ((1,) if wide else (1, 2, 5))]
    return [v for v in found if low <= v <= high]


# --- the graph of groups --------------------------------------------------------------------------


@dataclass(frozen=True)
class Node:
    """A group: a disc of radius ``r``; ``pie`` is the SVG path of the part that stays."""

    name: str
    text: str
    y: float
    r: float
    share: float
    pie: str
    locked: bool


@dataclass(frozen=True)
class Arc:
    path: str
    forward: bool


@dataclass(frozen=True)
class Arcs:
    """Groups in the order of execution, one below the other, joined by the layers between them."""

    nodes: tuple[Node, ...]
    arcs: tuple[Arc, ...]
    left_out: int
    x: float
    width: float = WIDTH

    @property
    def height(self) -> float:
        return ROW * len(self.nodes) + 8


def group_graph(traced: Traced) -> nx.DiGraph:
    """Groups as nodes (n, locked); an edge where a layer reads the one and makes the other."""
    graph = nx.DiGraph()
    makers: dict[tuple[str, int], list[str]] = {}
    for g in traced.groups:
        graph.add_node(g.name, n=g.n, locked=g.locked is not None)
        for m in g.members:
            makers.setdefault((m.param, m.dim), []).append(g.name)
    readers: dict[str, list[str]] = {}
    for g in traced.groups:
        for use in g.uses:
            readers.setdefault(use.consumer, []).append(g.name)
    for c in traced.consumers:
        for source in readers.get(c.key, ()):
            for target in makers.get((c.weight, c.out_dim), ()):
                if source != target:
                    graph.add_edge(source, target, layer=c.weight)
    return graph


def arcs(traced: Traced, plan: PrunePlan) -> Arcs | None:
    """None where there is nothing to see."""
    graph = group_graph(traced)
    order = _ranks(traced)
    groups = sorted(traced.groups, key=lambda g: order[g.name])
    shown = groups[:MOST_BARS]
    if len(shown) < 2:
        return None
    at = {g.name: ROW * (i + 0.5) + 4 for i, g in enumerate(shown)}
    edges = [(at[a], at[b]) for a, b in graph.edges if a in at and b in at]
    back = max(((a - b) / 2 for a, b in edges if b < a), default=0.0)
    reach = max(((b - a) / 2 for a, b in edges if b > a), default=0.0)
    x = _LABELS + 12 + min(_BACK, back)
    room = WIDTH - x - 30
    counts = dict(zip((g.name for g in traced.groups), traced.counts(plan).tolist(), strict=True))
    most = max(g.n for g in groups)
    nodes = []
    for g in shown:
        r = 0.48 * ROW * max(0.3, math.sqrt(g.n / most))
        share = counts[g.name] / g.width
        text = f"{g.name}: {counts[g.name] * g.rows} of {g.n}"
        pie = _pie(x, at[g.name], r, share)
        nodes.append(Node(g.name, text, at[g.name], r, share, pie, g.locked is not None))
    flat = min(1.0, _BACK / max(back, 1.0)), min(3.0, room / max(reach, 1.0))
    drawn = tuple(_arc(a, b, x, flat[b > a]) for a, b in edges)
    return Arcs(tuple(nodes), drawn, len(groups) - len(shown), x)


def _arc(a: float, b: float, x: float, flat: float) -> Arc:
    """Half an ellipse: on the right of the line downward, on its left upward."""
    ry = abs(b - a) / 2
    return Arc(f"M{x:.1f},{a:.1f}A{ry * flat:.1f},{ry:.1f} 0 0 1 {x:.1f},{b:.1f}", b > a)


def _pie(x: float, y: float, r: float, share: float) -> str:
    """A sector from the top, clockwise."""
    if share >= 1:
        half = f"a{r:.2f},{r:.2f} 0 1 0 "
        return f"M{x - r:.2f},{y:.2f}{half}{2 * r:.2f},0{half}{-2 * r:.2f},0Z"
    angle = 2 * math.pi * share
    u, v = x + r * math.sin(angle), y - r * math.cos(angle)
    large = int(share > 0.5)
    return f"M{x:.2f},{y:.2f}V{y - r:.2f}A{r:.2f},{r:.2f} 0 {large} 1 {u:.2f},{v:.2f}Z"


def _ranks(traced: Traced) -> dict[str, float]:
    """Group -> place of the first graph node that carries its channels, or else reads them."""
    at = {n.name: float(i) for i, n in enumerate(traced.graph_module.graph.nodes)}
    last = float(len(at))
    ranks = {}
    for g in traced.groups:
        made = [at[n] for n in g.nodes if n in at]
        read = [at.get(u.consumer.rpartition(":")[0], last) - 0.5 for u in g.uses]
        ranks[g.name] = min([*made, *read], default=last)
    return ranks
