"""One of the two models of a sequential repair, run node by node, and what enters its products.

Legend for shapes: S rows (samples x positions), V variables, O outputs, T taps.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, fx

from fxprune.fused import Fused
from fxprune.inputs import samples_of
from fxprune.moments import Layout, input_rows
from fxprune.observe import coverage_of
from fxprune.products import Product, Watch, as_product, storage_key
from fxprune.regression import Cannot
from fxprune.repair import named_tensors
from fxprune.types import Consumer


@dataclass(frozen=True)
class Rows:
    """What enters a consumer for one batch.

    values [S, V]; extent: all sizes of the input but the channels'.
    """

    values: Tensor
    extent: tuple[int, ...]


@dataclass(frozen=True)
class Looked:
    """The products in a node with their results, and the value of the node.

    norm   the normalisation that the results and the value lie behind, if any
    """

    products: list[tuple[Product, Tensor]]
    value: Any
    norm: str | None


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

    def __init__(
        self,
        module: fx.GraphModule,
        inputs: Sequence[tuple[Any, ...]],
        harmless: Collection[str] = (),
    ) -> None:
        self.run = Fused(module, inputs)
        self.run.harmless = harmless
        self.seen: dict[int, Looked] = {}
        self.sizes = [samples_of(i) for i in inputs]
        self.tensors = named_tensors(module)
        self.nodes: list[fx.Node] = list(module.graph.nodes)
        self.number = {n.name: i for i, n in enumerate(self.nodes)}
        self.at = 0

    def reach(self, name: str) -> None:
        """All inputs pass the nodes before the one of that name. Raises Cannot without one."""
        number = self.number.get(name, -1)
        if number < self.at:
            raise Cannot("its node is not in both graphs at the same place")
        while self.at < number:
            self.advance()

    def advance(self) -> None:
        """All inputs pass one node."""
        node = self.nodes[self.at]
        for i in range(len(self.run.envs)):
            if i in self.seen:
                self.run.give(node, i, self.seen.pop(i).value)
            else:
                self.run.step(node, i)
        self.forget()
        self.at += 1

    def forget(self) -> None:
        """The weights of the node that was reached have changed: what it gives is not known."""
        self.seen.clear()
        self.run.changed()

    def join(self, inputs: tuple[Any, ...]) -> None:
        """One more batch, run up to where the others are."""
        self.run.envs.append({})
        self.run.sources.append(iter(inputs))
        self.sizes.append(samples_of(inputs))
        for node in self.nodes[: self.at]:
            self.run.step(node, len(self.sizes) - 1)

    def rows(self, consumer: Consumer, layout: Layout, i: int) -> Rows:
        """What enters ``consumer``, in the node that was reached. Raises Cannot."""
        product = self.run.enters(self.nodes[self.at], i) or self._entered(consumer, i)
        x = product.x
        wanted = consumer.kind, layout.variables * layout.taps
        if (product.kind, x.shape[1]) != wanted:
            raise Cannot("it is not the same product in both models")
        if product.w.numel() != self.tensors[consumer.weight].numel():
            raise Cannot("it uses a part of its parameter")
        values, _ = input_rows(consumer.kind, layout, x, self.sizes[i])
        return Rows(values.flatten(0, 1), (x.shape[0], *x.shape[2:]))

    def _entered(self, consumer: Consumer, i: int) -> Product:
        mode = _Stop(self.run.own, consumer.key)
        mode.node = consumer.node
        try:
            with mode:
                self.run.attempt(self.nodes[self.at], i)
        except _Reached as reached:
            return reached.product
        raise Cannot("it is not the same product in both models")

    def coverage(self, consumer: Consumer) -> Tensor:
        """[T] how often each tap of ``consumer`` meets its input; see observe.coverage_of."""
        products = self._looked(0).products
        return coverage_of(consumer, *products[int(consumer.key.rpartition(":")[2])])

    def outcome(
        self, consumer: Consumer, i: int, chain: Sequence[str] = ()
    ) -> tuple[Product, Tensor]:
        """The product of ``consumer`` at the node that was reached; what ``chain`` makes of it.

        Raises Cannot where the node's value is more than that product's result.
        """
        looked = self._looked(i)
        if looked.norm not in (None, *chain[:1]):
            looked = self._run(i)
        value = looked.value
        if len(looked.products) != 1 or not isinstance(value, Tensor):
            raise Cannot("its node computes more than one product")
        product, out = looked.products[0]
        channel = 1 if consumer.kind == "conv" else -1
        same = out.numel() == value.numel() and out.shape[channel] == value.shape[channel]
        if not same or (consumer.kind == "conv" and out.shape != value.shape):
            raise Cannot("its node computes more than the product")
        return product, self.follow(value, chain, i, 0 if looked.norm is None else 1)

    def _looked(self, i: int) -> Looked:
        """Kept until the node is passed, which then does not have to run again."""
        if i in self.seen:
            return self.seen[i]
        node = self.nodes[self.at]
        product = self.run.enters(node, i)
        if product is None:
            found = self._run(i)
        else:
            value = self.run.result(node, i)
            found = Looked([(product, value)], value, self.run.norms[node].name)
        if product is not None or node.name in self.run.harmless:
            self.seen[i] = found
        return found

    def _run(self, i: int) -> Looked:
        """The node that was reached, as it is."""
        found: list[tuple[Product, Tensor]] = []
        mode = Watch(self.run.own, lambda key, product, out: found.append((product, out)))
        with mode:
            value = self.run.attempt(self.nodes[self.at], i)
        return Looked(found, value, None)

    def follow(self, value: Tensor, chain: Sequence[str], i: int, done: int = 0) -> Tensor:
        """What the nodes ``chain``, one after the other, make of ``value``.

        It is that of the reached node, or of the ``done``-th of them.
        """
        node = self._last(chain[:done])
        for name in chain[done:]:
            before, node = node, self.nodes[self.number[name]]
            value = self.run.attempt(node, i, {before: value})
        return value

    def after(self, chain: Sequence[str]) -> str | None:
        """The only node that reads the last one of ``chain``, where all else that it reads ran."""
        node = self._last(chain)
        users = list(node.users)
        if len(users) != 1 or users[0].op == "output":
            return None
        others = [n for n in users[0].all_input_nodes if n is not node]
        ready = all(n in env for env in self.run.envs for n in others)
        return users[0].name if ready else None

    def _last(self, chain: Sequence[str]) -> fx.Node:
        """Of the nodes of a chain; the reached one where it is empty."""
        return self.nodes[self.number[chain[-1]] if chain else self.at]
