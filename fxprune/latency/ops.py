"""What a traced model consists of, as far as its latency goes: products, and the rest in bytes.

Legend for shapes: P plans, G groups, I products.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fxprune.capture import state_kept
from fxprune.cost import Dims, Products, Terms, Widths
from fxprune.cost import Table as WidthTable
from fxprune.coupling.run import Traits
from fxprune.isolate import rng_kept
from fxprune.products import Product, as_product, evaluating, parameter_names, storage_key
from fxprune.traced import Traced
from fxprune.types import Consumer

# Pointwise ATen ops that a runtime computes inside the product before them.
NORMS = frozenset({"_native_batch_norm_legit_no_training", "native_batch_norm", "batch_norm"})
ACTIVATIONS = {
    **dict.fromkeys(("relu", "relu_"), "relu"),
    **dict.fromkeys(("hardtanh", "hardtanh_", "clamp", "clamp_"), "clip"),
    **dict.fromkeys(("leaky_relu", "leaky_relu_"), "leaky_relu"),
}
LARGE = 4_000_000  # bytes of weights above which a net's do not stay in a cache


@dataclass(frozen=True)
class Family:
    """Products of one geometry; one measured grid over widths serves all of them.

    kind    conv | transposed | linear
    form    plain (widths: in, out), depthwise (channels) or grouped (groups, in and out of each)
    batch   samples of a convolution, rows of a matrix product
    size    spatial dims of the input
    after   activation that is computed inside the product: "", relu, clip or leaky_relu
    cold    whether the weights come from memory, as in a net that exceeds the caches
    """

    kind: str
    form: str
    batch: int
    size: tuple[int, ...] = ()
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    after: str = ""
    cold: bool = False

    def key(self, widths: tuple[int, ...]) -> str:
        """Name of one measurement, the same in every session."""
        body = {k: v for k, v in asdict(self).items() if v not in ((), "", False)}
        return json.dumps({**body, "widths": widths}, sort_keys=True)

    @property
    def axes(self) -> int:
        """How many widths describe one product."""
        return {"plain": 2, "depthwise": 1, "grouped": 3}[self.form]

    def channels(self, widths: tuple[int, ...]) -> tuple[int, int, int]:
        """(in, out, groups) of the product with these widths."""
        if self.form == "plain":
            return widths[0], widths[1], 1
        if self.form == "depthwise":
            return widths[0], widths[0], widths[0]
        return widths[0] * widths[1], widths[0] * widths[2], widths[0]


@dataclass(frozen=True)
class Item:
    """One product of the model: its family, and its dims as columns of the widths.

    ``columns``: total in, total out, in of each group.
    """

    key: str
    family: Family
    columns: tuple[int, int, int]


@dataclass(frozen=True)
class Parts:
    """A model taken apart.

    items   products with a parameter, in execution order
    widths  of all their dims
    rest    bytes that each other node reads and writes, as products of widths
    weight  [products of ``rest``] bytes of one element
    fixed   bytes of nodes that no plan changes
    nodes   how many nodes the rest has
    """

    items: tuple[Item, ...]
    widths: Widths
    rest: Products
    weight: tuple[float, ...]
    fixed: float
    nodes: int


def parts(traced: Traced, *, fuses: bool) -> Parts:
    """Take a model apart; one forward pass at the example inputs.

    fuses: whether the runtime computes normalisations and activations inside the product before
    them; they then cost nothing of their own.
    """
    seen = _observed(traced)
    dims, table = Dims(traced.coupling), WidthTable(len(traced.groups))
    absorbed, after = _absorbed(traced, seen) if fuses else (set(), {})
    cold = traced.cost().bytes > LARGE
    items, products = [], set()
    for c in traced.consumers:
        found = seen.products.get(c.key)
        item = None if found is None else _item(traced, dims, table, c, found)
        if item is not None:
            family = replace(item.family, after=after.get(c.node, ""), cold=cold)
            items.append(replace(item, family=family))
            products.add(c.node)
    work = seen.busy - products - absorbed
    nodes = [n for n in traced.graph_module.graph.nodes if n.name in work]
    return Parts(tuple(items), table.widths(), *_rest(traced, dims, nodes))


# -- one run ----------------------------------------------------------------------------------


class _Observed(TorchDispatchMode):
    """products: key -> its operands' shapes; busy: nodes that compute; ops: names in each node."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = names
        self.node, self.count = "", 0
        self.products: dict[str, Product] = {}
        self.busy: set[str] = set()
        self.ops: dict[str, set[str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.busy.add(self.node)
            self.ops.setdefault(self.node, set()).add(func._schema.name.removeprefix("aten::"))
        product = as_product(func, args)
        if product is not None and storage_key(product.w) in self.names:
            self.products[f"{self.node}:{self.count}"] = _shapes(product)
            self.count += 1
        return out


def _shapes(p: Product) -> Product:
    """The same without the operands' values."""
    x, w = (torch.empty(t.shape, dtype=t.dtype, device="meta") for t in (p.x, p.w))
    return Product(p.kind, x, w, None, p.groups, p.transposed, p.stride, p.padding, p.dilation)


class _Interpreter(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, seen: _Observed) -> None:
        super().__init__(gm)
        self.seen = seen

    def run_node(self, n: fx.Node) -> Any:
        self.seen.node, self.seen.count = n.name, 0
        return super().run_node(n)


def _observed(traced: Traced) -> _Observed:
    gm = traced.graph_module
    inputs: Any = tree_map_only(Tensor, torch.clone, traced.example_inputs)
    seen = _Observed(parameter_names(gm))
    with rng_kept(), evaluating(gm), state_kept(gm), seen:
        _Interpreter(gm, seen).run(*inputs)
    return seen


# -- products ---------------------------------------------------------------------------------


def _item(traced: Traced, dims: Dims, table: WidthTable, c: Consumer, p: Product) -> Item | None:
    """None for a product whose weight is not the parameter as it is; that counts by its bytes."""
    shape = traced.coupling.parameters[c.weight].shape
    w = tuple(p.w.shape) if p.kind == "conv" else tuple(p.w.shape)[::-1]
    if shape != w and not (p.kind == "linear" and shape == w[::-1]):
        return None
    known = traced.param_classes

    def width(dim: int) -> Terms:
        classes = known.get((c.weight, dim))
        one = {(dims.groups, dims.groups): float(shape[dim])}
        return one if classes is None else dims.of_classes(classes[:, None])

    inner, out = width(c.in_dim), width(c.out_dim)
    total = inner if c.groups == 1 else dims.of_classes(c.classes[:, None])
    columns = tuple(table.width(t) for t in (total, out, inner))
    return Item(c.key, _family(p, shape[c.in_dim]), (columns[0], columns[1], columns[2]))


def _family(p: Product, inner: int) -> Family:
    if p.kind == "linear":
        return Family("linear", "plain", p.x.shape[0])
    form = "plain" if p.groups == 1 else "grouped"
    if p.groups > 1 and inner == 1 and p.w.shape[0] == p.groups and not p.transposed:
        form = "depthwise"
    return Family(
        "transposed" if p.transposed else "conv",
        form,
        p.x.shape[0],
        tuple(p.x.shape[2:]),
        tuple(p.w.shape[2:]),
        p.stride,
        p.padding,
        p.dilation,
    )


# -- the rest ---------------------------------------------------------------------------------


def _absorbed(traced: Traced, seen: _Observed) -> tuple[set[str], dict[str, str]]:
    """Norms and activations that take a product's output directly; product -> its activation."""
    nodes = {n.name: n for n in traced.graph_module.graph.nodes}
    found: set[str] = set()
    after: dict[str, str] = {}
    for c in traced.consumers:
        node, normed = nodes[c.node], False
        while len(node.users) == 1 and c.node not in after:
            (node,) = node.users
            ops = seen.ops.get(node.name, set())
            if ops and ops <= NORMS and not normed:
                normed = True
            elif len(ops) == 1 and ops <= set(ACTIVATIONS):
                after[c.node] = ACTIVATIONS[next(iter(ops))]
            elif ops:
                break
            found.add(node.name)
    return found, after


def _rest(
    traced: Traced, dims: Dims, nodes: list[fx.Node]
) -> tuple[Products, tuple[float, ...], float, int]:
    """Bytes that the nodes read and write, as functions of the plan."""
    table = WidthTable(dims.groups)
    weight: list[float] = []
    values = traced.coupling.values
    fixed = 0.0
    for node in nodes:
        tensors = [t for n in (*node.all_input_nodes, node) for t in tree_leaves(values[n.name])]
        for t in tensors:
            if not isinstance(t, Traits):
                continue
            size = float(t.dtype.itemsize)
            if not t.fields:
                fixed += size * float(np.prod(t.shape))
                continue
            i = table.item(dims.of_tensor(t))
            weight += [0.0] * (len(table) - len(weight))
            weight[i] += size
    return table.products(), tuple(weight), fixed, len(nodes)
