"""One model of the coverage run: prune it, hold it to the oracle, write down what came out.

A model counts as right when the pruned network equals the masked original (tests/oracle.py) within
1e-5 in float32 or, where rounding alone exceeds that, within 1e-10 in float64.
"""

from __future__ import annotations

import copy
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / d) for d in ("tests", "")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from checks import counted_macs, counted_params  # noqa: E402
from oracle import (  # noqa: E402
    masked_original,
    oracle_error,
    random_plan,
    randomise,
    relative_error,
)
from torch import Tensor, fx, nn  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map  # noqa: E402
from zoo import Built, build  # noqa: E402

import fxprune  # noqa: E402
from fxprune.cut import cut  # noqa: E402
from fxprune.errors import BudgetError  # noqa: E402
from fxprune.traced import Traced  # noqa: E402
from fxprune.types import PrunePlan  # noqa: E402

FLOAT32, FLOAT64 = 1e-5, 1e-10
BUDGET = 0.5
SAMPLES = 8
ATTENTION_BELOW = 6.0  # GMACs; above, the activations of SAMPLES inputs take minutes: weights rank

Row = dict[str, Any]


@dataclass(frozen=True)
class Pruned:
    """What is checked; ``model`` is the user's class or None."""

    traced: Traced
    plan: PrunePlan
    graph: nn.Module
    model: nn.Module | None


def check(
    library: str,
    name: str,
    *,
    allocation: str = "uniform",
    onnx: bool = False,
    attention_below: float = ATTENTION_BELOW,
) -> Row:
    """All figures of one model as a flat dict that json can write. Never raises for a model."""
    row: Row = {"library": library, "name": name, "torch": torch.__version__, "status": "error"}
    try:
        built = build(library, name)
        randomise(built.model)
        row |= {"size": built.size, "params_model": counted_params(built.model)}
        _, row["forward_s"] = _seconds(lambda: _forward(built.model, built.inputs))
        pruned = _prune(built, row, allocation, attention_below)
        _describe(pruned, row)
        _compare(built, pruned, row)
        _count(pruned, row)
        if onnx:
            _export(built, pruned, row)
    except Exception as e:  # noqa: BLE001 - every failure is a row with its reason
        row["reason"] = "; ".join(w for w in (row.get("reason"), _reason(e)) if w)
    return row


# --- pruning --------------------------------------------------------------------------------


def _prune(built: Built, row: Row, allocation: str, attention_below: float) -> Pruned:
    """By prune() itself; by a random plan at the same budget where prune() cannot run."""
    traced, row["trace_s"] = _seconds(lambda: fxprune.trace(built.model, built.inputs))
    heavy = traced.cost().macs > attention_below * 1e9
    options: Row = {
        "criterion": "l2" if heavy else "attention",
        "allocation": allocation,
        "repair": None,
        "progress": False,
        "calibration_samples": SAMPLES,
        "max_evaluations": 6,
    }
    row["by"] = options["criterion"]
    try:
        result = _at_least_budget(built, row, options)
    except BudgetError as e:
        row |= {"by": "keep all", "reason": f"nothing to prune: {_reason(e)}"}
        plan = traced.full_plan()
        return Pruned(traced, plan, cut(traced, plan), None)
    except Exception as e:  # noqa: BLE001 - the reason is written down; the engine is checked
        row["prune_error"] = row.get("prune_error", "") + f"by {row['by']}: {_reason(e)}"
        if row["by"] == "attention":  # by weights, which need no activations
            return _prune(built, row, allocation, attention_below=-1.0)
        return _random(traced, row)
    row["cut_s"] = result.report["seconds"]["cut"]
    model = result.model if result.report["user_class"] else None
    return Pruned(result.analysis, result.plan, result.graph_module, model)


def _at_least_budget(built: Built, row: Row, options: Row) -> fxprune.PruneResult:
    """At BUDGET, or at the least budget that can be reached. Raises BudgetError where that is 1."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return fxprune.prune(built.model, built.inputs, BUDGET, None, **options)
        except BudgetError as e:
            found = re.search(r"ask for at least ([\d.]+\d)", str(e))
            if found is None or float(found[1]) >= 1:
                raise
            why = str(e).partition("Locked: ")[2][:200]
            row["note"] = f"least reachable {found[1]}: {why}"
        return fxprune.prune(built.model, built.inputs, float(found[1]), None, **options)


def _random(traced: Traced, row: Row) -> Pruned:
    """Random channels; every group keeps the same share, the largest within the budget."""
    low, high = 0.0, 1.0
    for _ in range(7):
        share = (low + high) / 2
        fits = traced.cost(random_plan(traced, 0, share)).macs <= BUDGET * traced.cost().macs
        low, high = (share, high) if fits else (low, share)
    row["by"] = "random plan"
    plan = random_plan(traced, 0, low)
    graph, row["cut_s"] = _seconds(lambda: cut(traced, plan))
    return Pruned(traced, plan, graph, None)


# --- figures ----------------------------------------------------------------------------------


def _describe(p: Pruned, row: Row) -> None:
    free = [g for g in p.traced.groups if g.locked is None]
    before, after = p.traced.cost(), p.traced.cost(p.plan)
    locked: dict[str, int] = {}
    for g in p.traced.groups:
        if g.locked is not None:
            locked[g.locked] = locked.get(g.locked, 0) + g.n
    row |= {
        "opaque": dict(p.traced.captured.opaque),
        "user_class": p.model is not None,
        "groups_free": len(free),
        "groups": len(p.traced.groups),
        "free_share": _free_share(p.traced, row["params_model"]),
        "macs_before": before.macs,
        "macs_after": after.macs,
        "params_before": before.params,
        "params_after": after.params,
        "locked": dict(sorted(locked.items(), key=lambda i: -i[1])[:3]),
    }


def _free_share(traced: Traced, total: int) -> float:
    """Share of the model's parameters that a plan may remove (at least one of their dims)."""
    free = np.zeros(traced.n_classes + 1, dtype=np.bool_)
    for g in traced.groups:
        if g.locked is None:
            for classes in g.classes:
                free[np.asarray(classes).ravel()] = True
    free[-1] = False
    stays: dict[str, float] = {}
    for (name, dim), classes in traced.param_classes.items():
        size = traced.graph_module.get_parameter(name) if _is_parameter(traced, name) else None
        if size is not None and size.shape[dim] == len(classes):
            stays[name] = stays.get(name, 1.0) * float(1 - free[classes].mean())
    sizes = {n: p.numel() for n, p in traced.graph_module.named_parameters()}
    return sum(sizes[n] * (1 - s) for n, s in stays.items() if n in sizes) / max(1, total)


def _is_parameter(traced: Traced, name: str) -> bool:
    return name in dict(traced.graph_module.named_parameters(remove_duplicate=False))


def _count(p: Pruned, row: Row) -> None:
    """The cost model against torch's counter on the pruned network."""
    counted = counted_macs(p.graph, copy.deepcopy(p.traced.example_inputs))
    row["macs_counted"] = counted
    row["macs_exact"] = counted == row["macs_after"]
    row["params_exact"] = counted_params(p.graph) == row["params_after"]


def _export(built: Built, p: Pruned, row: Row) -> None:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = time.perf_counter()
        try:
            report = fxprune.export_onnx(
                p.model if p.model is not None else p.graph,
                built.inputs,
                Path(folder) / "pruned.onnx",
            )
        except Exception as e:  # noqa: BLE001 - the exporter's limits are a finding
            row["onnx_error"] = _reason(e)
        else:
            row |= {"onnx": max(report.errors), "onnx_batches": list(report.batch_sizes)}
            row |= {"onnx_opset": report.opset, "onnx_exporter": report.exporter}
        row["onnx_s"] = time.perf_counter() - start


# --- the oracle ---------------------------------------------------------------------------------


def _compare(built: Built, p: Pruned, row: Row) -> None:
    """Fills status, error32 and, where rounding may be to blame, error64."""
    row["compared"] = "outputs"
    try:
        row["error32"] = _errors(p, _inputs_for(p, built, row))
    except (AssertionError, RuntimeError) as e:  # other shapes, or no detection at all
        row["first_reason"] = _reason(e)
        row["error32"] = float("inf")
    if row["error32"] <= FLOAT32:
        row["status"] = "right"
        return
    if _decisions(p.traced.graph_module, built.inputs):
        row["compared"] = "outputs, with the original's decisions"
        row["first_error32"] = str(row["error32"])
        row["error32"] = _error_with_decisions(p, built.inputs)
        if row["error32"] <= FLOAT32:
            row["status"] = "right"
            return
    row["reason"] = f"relative error {row['error32']:.1e}, and float64 could not be tried"
    row["status"] = "wrong"
    row["error64"] = _in_float64(built, p, row["compared"] != "outputs")
    right = row["error64"] <= FLOAT64
    row["status"] = "right" if right else "wrong"
    row.pop("reason")
    if not right:
        row["reason"] = f"relative error {row['error32']:.1e}, in float64 {row['error64']:.1e}"
    if row["error32"] == float("inf"):
        row["error32"] = None


def _inputs_for(p: Pruned, built: Built, row: Row) -> tuple[Any, ...]:
    """The second inputs, or the example where the original itself takes no other batch size."""
    try:
        _forward(p.traced.graph_module, built.others)
    except Exception as e:  # noqa: BLE001 - the traced original does not take them: said so
        row["batch_note"] = f"checked at the example inputs only: {_reason(e)}"
        return built.inputs
    return built.others


def _errors(p: Pruned, inputs: tuple[Any, ...]) -> float:
    modules = [p.graph] if p.model is None else [p.graph, p.model]
    expected = masked_original(p.traced, p.plan)(*inputs)
    return max(relative_error(expected, _forward(m, inputs)) for m in modules)


class _Doubles(TorchDispatchMode):
    """Whatever asks for float32 (``x.float()``, ``dtype=torch.float32``) gets float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def _in_float64(built: Built, p: Pruned, decisions: bool) -> float:
    """The same plan on the model in float64: rounding disappears, a wrong channel does not."""
    model = copy.deepcopy(built.model).double()
    inputs = _double(built.inputs)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Doubles():
            traced = fxprune.trace(model, inputs)
            graph = cut(traced, p.plan)
            double = Pruned(traced, p.plan, graph, None)
            if decisions:
                return _error_with_decisions(double, inputs)
            return oracle_error(traced, p.plan, graph, inputs)
    finally:
        torch.set_default_dtype(default)


def _double(tree: Any) -> Any:
    return tree_map(
        lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, tree
    )


# --- models that decide: NMS, top-k, thresholds ---------------------------------------------------


class _Decisions(fx.Interpreter):
    """Finds the nodes that make integers or booleans out of computed numbers.

    Top-k, NMS, comparisons: two networks that agree to rounding may still decide differently, and
    then nothing after that can be compared.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.computed: set[fx.Node] = set()
        self.found: list[str] = []

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        leaves = [t for t in tree_leaves(value) if isinstance(t, Tensor)]
        computed = n.op == "call_module" or any(m in self.computed for m in n.all_input_nodes)
        if n.op == "get_attr":
            computed = any(t.is_floating_point() for t in leaves)
        if computed and leaves:
            self.computed.add(n)
            if n.op not in ("output", "get_attr") and any(not _floats(t) for t in leaves):
                self.found.append(n.name)
        return value


def _decisions(gm: fx.GraphModule, inputs: tuple[Any, ...]) -> list[str]:
    finder = _Decisions(gm)
    with torch.no_grad():
        finder.run(*copy.deepcopy(inputs))
    return finder.found


def _floats(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


class _Decided(fx.Interpreter):
    """Runs the pruned graph with the integers and booleans that the masked original computed."""

    def __init__(self, gm: fx.GraphModule, decided: dict[str, Any], wanted: list[str]) -> None:
        super().__init__(gm)
        self.decided = decided
        self.wanted = set(wanted)
        self.values: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.decided:
            value = _with_decisions(value, self.decided[n.name])
        if n.name in self.wanted:
            self.values[n.name] = value
        return value


def _with_decisions(own: Any, given: Any) -> Any:
    if isinstance(own, Tensor):
        return own if own.is_floating_point() else given
    if isinstance(own, tuple | list):
        parts = [_with_decisions(a, b) for a, b in zip(own, given, strict=True)]
        return type(own)(parts) if type(own) in (tuple, list) else tuple(parts)
    return own


def _error_with_decisions(p: Pruned, inputs: tuple[Any, ...]) -> float:
    """Relative error when both networks take the same decisions.

    Compared: the outputs, and what the decisions are made from (where no channel of it was cut).
    Tensors that are empty or zero in the masked original say nothing and are left out.
    """
    gm = copy.deepcopy(p.traced.graph_module)
    by_name = {n.name: n for n in gm.graph.nodes}
    names = _decisions(p.traced.graph_module, inputs)
    before = list(dict.fromkeys(m.name for n in names for m in by_name[n].all_input_nodes))
    out = next(n for n in gm.graph.nodes if n.op == "output")
    out.args = ((out.args[0], [by_name[n] for n in names], [by_name[n] for n in before]),)
    gm.recompile()
    wider = replace(p.traced, captured=replace(p.traced.captured, graph_module=gm))
    expected, decided, basis = masked_original(wider, p.plan)(*inputs)
    runner = _Decided(p.graph, dict(zip(names, decided, strict=True)), before)
    with torch.no_grad():
        actual = runner.run(*copy.deepcopy(inputs))
    pairs = [*zip(_told(expected), _told(actual), strict=True)]
    for name, value in zip(before, basis, strict=True):
        told = [*zip(_told(value), _told(runner.values.get(name)), strict=False)]
        pairs += [(a, b) for a, b in told if a.shape == b.shape]
    pairs = [(a, b) for a, b in pairs if a.numel() and float(a.abs().max()) > 1e-12]
    return relative_error([a for a, _ in pairs], [b for _, b in pairs])


def _told(tree: Any) -> list[Tensor]:
    """The floating tensors in ``tree``."""
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor) and t.is_floating_point()]


# --- small things ---------------------------------------------------------------------------------


def _forward(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    with torch.no_grad():
        return model(*copy.deepcopy(inputs))


def _seconds(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    value = call()
    return value, time.perf_counter() - start


def _reason(e: BaseException) -> str:
    """Kind, first lines and place of an error."""
    frames = traceback.extract_tb(e.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(e).__name__}: {' '.join(str(e).split())[:240]}{where}"
