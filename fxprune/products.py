"""Find the products of an activation with a parameter while a graph runs.

All convolutions and linear layers, as modules, functions or inside opaque parts, arrive under a
dispatch mode as a handful of ATen ops. This file is the one place that knows them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fxprune.errors import ModelError

aten = torch.ops.aten


@dataclass(frozen=True)
class Product:
    """One ATen product ``x * w``.

    kind "conv": x [N, C, *], w [O, C/groups, *] (transposed: [C, O/groups, *]);
    kind "linear": x [M, C], w [C, O] as the op sees it.
    stride, padding, dilation: of a convolution, one entry for each spatial dim.
    """

    kind: str
    x: Tensor
    w: Tensor
    bias: Tensor | None
    groups: int = 1
    transposed: bool = False
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()


def as_product(func: Any, args: Sequence[Any]) -> Product | None:
    """The operands of a convolution or matrix product; None for every other op.

    For a matrix product the second operand is taken as ``w`` (F.linear arrives that way).
    """
    if func is aten.convolution.default:
        dims = args[1].ndim - 2
        steps = (tuple(int(n) for n in args[i]) for i in (3, 4, 5))  # one entry holds for all dims
        stride, padding, dilation = (s * dims if len(s) == 1 else s for s in steps)
        return Product(
            "conv",
            args[0],
            args[1],
            args[2],
            int(args[8]),
            bool(args[6]),
            stride,
            padding,
            dilation,
        )
    if func is aten.addmm.default:
        return Product("linear", args[1], args[2], args[0])
    if func is aten.mm.default:
        return Product("linear", args[0], args[1], None)
    return None


def storage_key(t: Tensor) -> int:
    """Identity of the memory that a tensor and its views share."""
    return int(t.untyped_storage()._cdata)


def parameter_names(module: nn.Module) -> dict[int, str]:
    """Storage identity -> qualified name, for parameters and buffers (first name of tied ones)."""
    names: dict[int, str] = {}
    for name, t in list(module.named_parameters()) + list(module.named_buffers()):
        names.setdefault(storage_key(t), name)
    return names


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every submodule's mode is put back afterwards."""
    modes = [(m, m.training) for m in module.modules()]
    try:
        for m, training in modes:
            if training:
                m.training = False
        with torch.no_grad():
            yield
    finally:
        for m, training in modes:
            if m.training != training:
                m.training = training


def check_module(model: Any) -> None:
    """ModelError for what is no module."""
    if not isinstance(model, nn.Module):
        cure = "; give its .model" if isinstance(getattr(model, "model", None), nn.Module) else ""
        raise ModelError(f"expected a torch.nn.Module, got {type(model).__name__}{cure}")


def in_modes_of(original: nn.Module, made: nn.Module) -> None:
    """Each part of ``made`` trains if the part of that name in ``original`` does, else its parent.

    A frozen normalisation stays frozen.
    """
    modes = {name: m.training for name, m in original.named_modules()}
    for name, m in made.named_modules():
        m.training = modes.setdefault(name, modes[name.rpartition(".")[0]])


OnProduct = Callable[[str, Product, Tensor], "Tensor | None"]


class Watch(TorchDispatchMode):
    """Calls ``on_product`` for every product; ``node`` and ``count`` make the keys.

    Whoever runs the graph sets ``node`` to the node's name and ``count`` to 0 before each node.
    """

    def __init__(self, names: dict[int, str], on_product: OnProduct) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names, self.on_product = names, on_product
        self.node, self.count = "", 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        product = as_product(func, args)
        if product is not None and storage_key(product.w) in self.names:
            key = f"{self.node}:{self.count}"
            self.count += 1
            with torch.utils._python_dispatch._disable_current_modes():
                replaced = self.on_product(key, product, out)
            return out if replaced is None else replaced
        return out


class _NodeByNode(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, mode: Watch) -> None:
        super().__init__(gm)
        self.mode = mode

    def run_node(self, n: fx.Node) -> Any:
        self.mode.node, self.mode.count = n.name, 0
        return super().run_node(n)


def watch(gm: fx.GraphModule, inputs: Sequence[Any], on_product: OnProduct) -> Any:
    """Run ``gm`` in eval mode without gradients and return its output.

    ``on_product(key, product, out)`` is called after each product with a parameter, in execution
    order; ``key`` equals ``Consumer.key``. A tensor that it returns takes the place of ``out``.
    """
    mode = Watch(parameter_names(gm), on_product)
    with evaluating(gm), mode:
        return _NodeByNode(gm, mode).run(*inputs)
