"""One of the two models of a sequential repair, run node by node, and what enters its products.

Legend for shapes: S rows (samples x positions), V variables, O outputs, T taps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, fx

from fxprune.inputs import samples_of
from fxprune.moments import Layout, input_rows
from fxprune.observe import coverage_of
from fxprune.products import Product, Watch, as_product, storage_key
from fxprune.regression import Cannot
from fxprune.renorm import SideBySide
from fxprune.repair import named_tensors
from fxprune.types import Consumer


@dataclass(frozen=True)
class Rows:
    """What enters a consumer for one batch.

    values [S, V]; extent: all sizes of the input but the channels'.
    """

    values: Tensor
    extent: tuple[int, ...]


class _Reached(Exception):
    """The product that was looked for is about to run; never leaves this file."""

    def __init__(self, product: Product) -> None:
        super().__init__()
        self.product = product


class _Stop(Watch):
    """Raises _Reached in front of the product of that key: it does not have to run."""

    def __init__(self, names: dict[int, str], key: str) -> None:
        super().__init__(names, lambda *_: None)
        self.key = key

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        product = as_product(func, args)
        here = product is not None and storage_key(product.w) in self.names
        if product is not None and here and self.key == f"{self.node}:{self.count}":
            raise _Reached(product)
        return super().__torch_dispatch__(func, types, args, kwargs)


class Observed(Protocol):
    """What the walk needs of the original; see :class:`Side`."""

    @property
    def sizes(self) -> list[int]: ...
    def reach(self, name: str) -> None: ...
    def rows(self, consumer: Consumer, layout: Layout, i: int) -> Rows: ...
    def coverage(self, consumer: Consumer) -> Tensor: ...


class Side:
    """One of the two models, run up to some node; ``sizes``: samples of each input."""

    def __init__(self, module: fx.GraphModule, inputs: Sequence[tuple[Any, ...]]) -> None:
        self.run = SideBySide(module, inputs)
        self.sizes = [samples_of(i) for i in inputs]
        self.tensors = named_tensors(module)
        self.nodes: list[fx.Node] = list(module.graph.nodes)
        self.at = 0

    def reach(self, name: str) -> None:
        """All inputs pass the nodes before the one of that name. Raises Cannot without one."""
        if name not in {n.name for n in self.nodes[self.at :]}:
            raise Cannot("its node is not in both graphs at the same place")
        while self.nodes[self.at].name != name:
            self.advance()

    def advance(self) -> None:
        """All inputs pass one node."""
        for i in range(len(self.run.envs)):
            self.run.step(self.nodes[self.at], i)
        self.at += 1

    def join(self, inputs: tuple[Any, ...]) -> None:
        """One more batch, run up to where the others are."""
        self.run.envs.append({})
        self.run.sources.append(iter(inputs))
        self.sizes.append(samples_of(inputs))
        for node in self.nodes[: self.at]:
            self.run.step(node, len(self.sizes) - 1)

    def rows(self, consumer: Consumer, layout: Layout, i: int) -> Rows:
        """What enters ``consumer``, in the node that was reached. Raises Cannot."""
        mode = _Stop(self.run.own, consumer.key)
        mode.node = consumer.node
        try:
            with mode:
                self.run.attempt(self.nodes[self.at], i)
        except _Reached as reached:
            product = reached.product
        else:
            raise Cannot("it is not the same product in both models")
        x = product.x
        wanted = consumer.kind, layout.variables * layout.taps
        if (product.kind, x.shape[1]) != wanted:
            raise Cannot("it is not the same product in both models")
        if product.w.numel() != self.tensors[consumer.weight].numel():
            raise Cannot("it uses a part of its parameter")
        values, _ = input_rows(consumer.kind, layout, x, self.sizes[i])
        return Rows(values.flatten(0, 1), (x.shape[0], *x.shape[2:]))

    def coverage(self, consumer: Consumer) -> Tensor:
        """[T] how often each tap of ``consumer`` meets its input; see observe.coverage_of."""
        found: list[Tensor] = []

        def look(key: str, product: Product, out: Tensor) -> None:
            if key == consumer.key:
                found.append(coverage_of(consumer, product, out))

        mode = Watch(self.run.own, look)
        mode.node = consumer.node
        with mode:
            self.run.attempt(self.nodes[self.at], 0)
        return found[0]

    def outcome(self, consumer: Consumer, i: int) -> tuple[Product, Tensor]:
        """The product of ``consumer`` and the value of its node, which was reached.

        Raises Cannot where the value is more than that product's result.
        """
        found: list[tuple[Product, Tensor]] = []
        mode = Watch(self.run.own, lambda key, product, out: found.append((product, out)))
        mode.node = consumer.node
        with mode:
            value = self.run.attempt(self.nodes[self.at], i)
        if len(found) != 1 or not isinstance(value, Tensor):
            raise Cannot("its node computes more than one product")
        product, out = found[0]
        channel = 1 if consumer.kind == "conv" else -1
        same = out.numel() == value.numel() and out.shape[channel] == value.shape[channel]
        if not same or (consumer.kind == "conv" and out.shape != value.shape):
            raise Cannot("its node computes more than the product")
        return product, value

    def follow(self, value: Tensor, chain: Sequence[str], i: int) -> Tensor:
        """What the nodes ``chain``, one after the other, make of ``value`` at the reached node."""
        node = self.nodes[self.at]
        by_name = {n.name: n for n in self.nodes[self.at :]}
        for name in chain:
            value = self.run.attempt(by_name[name], i, {node: value})
            node = by_name[name]
        return value

    def after(self, chain: Sequence[str]) -> str | None:
        """The only node that reads the last one of ``chain``, where all else that it reads ran."""
        node = self.nodes[self.at]
        by_name = {n.name: n for n in self.nodes[self.at :]}
        for name in chain:
            node = by_name[name]
        users = list(node.users)
        if len(users) != 1 or users[0].op == "output":
            return None
        others = [n for n in users[0].all_input_nodes if n is not node]
        ready = all(n in env for env in self.run.envs for n in others)
        return users[0].name if ready else None
