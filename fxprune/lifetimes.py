"""Which activation memory each graph node allocates, and how long it lives.

One run of the traced graph, node by node, tells new storages from views and in-place results by
identity; the graph tells the last node that reads each of them. ``cost`` makes the peak of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves, tree_map_only

from fxprune.capture import Captured, state_kept
from fxprune.isolate import rng_kept
from fxprune.products import evaluating, storage_key


@dataclass(frozen=True)
class Storage:
    """Memory that one node allocates.

    node, leaf  the tensor that was made: the ``leaf``-th of the node's output
    repeated    dims of that tensor that take no memory (stride 0)
    share       bytes of the storage for each one of that tensor, 1 nearly always
    born, dies  positions of the nodes, in execution order, during which it is alive (both count)
    """

    node: str
    leaf: int
    repeated: tuple[int, ...]
    share: float
    born: int
    dies: int


def storages(captured: Captured) -> tuple[Storage, ...]:
    """The storages of one forward pass at the example inputs, in the order of their allocation.

    A value dies after the last node that reads it, as in the code that fx generates; the model's
    inputs are the caller's and live until the end. Parameters, buffers and constants of the graph
    are no activations.
    """
    gm = captured.graph_module
    inputs: Any = tree_map_only(Tensor, torch.clone, captured.inputs)
    run = _Run(gm)
    with rng_kept(), evaluating(gm), state_kept(gm):
        run.run(*inputs)
    return tuple(run.found)


class _Run(fx.Interpreter):
    """Finds storages while the graph runs; dead values are dropped, as always."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.at = {n: i for i, n in enumerate(gm.graph.nodes)}
        self.found: list[Storage] = []
        self.weak: list[StorageWeakRef] = []  # keeps identities from being used again
        fixed = [*gm.parameters(), *gm.buffers()]
        self.known: dict[int, int] = {storage_key(t): -1 for t in fixed}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        last = len(self.at) - 1
        dies = last if n.op == "placeholder" else max((self.at[u] for u in n.users), default=0)
        for leaf, t in enumerate(tree_leaves(value)):
            if isinstance(t, Tensor) and t.layout is torch.strided:
                self._see(n, leaf, t, max(dies, self.at[n]))
        return value

    def _see(self, n: fx.Node, leaf: int, t: Tensor, dies: int) -> None:
        key = storage_key(t)
        if key not in self.known:
            self.weak.append(StorageWeakRef(t.untyped_storage()))
            self.known[key] = -1 if n.op == "get_attr" else len(self.found)
            if n.op != "get_attr":
                self.found.append(_made(n, leaf, t, self.at[n]))
        i = self.known[key]
        if i >= 0:
            self.found[i] = replace(self.found[i], dies=max(self.found[i].dies, dies))


def _made(n: fx.Node, leaf: int, t: Tensor, at: int) -> Storage:
    repeated = tuple(d for d, s in enumerate(t.stride()) if s == 0 and t.shape[d] > 1)
    size = t.element_size()
    for d, s in enumerate(t.shape):
        size *= 1 if d in repeated else s
    share = max(1.0, t.untyped_storage().nbytes() / max(size, 1))
    return Storage(n.name, leaf, repeated, share, at, at)
