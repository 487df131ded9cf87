"""Candidates of a search, run once each: repaired on the way, and only from the first change on.

A plain loop cuts a copy of the model, repairs it with a pass of both models over the repair samples
and runs it on the held-out ones. The same result comes cheaper:

1. what enters each consumer of the original is gathered once, for all candidates;
2. the candidate runs once, with repair and held-out samples side by side: each consumer is repaired
   at the moment at which they reach it (:class:`sequential.Walk`);
3. activations are kept at cut points, the graph nodes at which some channel group first matters. A
   candidate starts at the last cut point in front of which it equals a plan that was run before.

Legend for shapes: N samples, S rows, V variables.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from fxprune.cut import Walked, cut
from fxprune.errors import InternalError
from fxprune.formats import channels_last
from fxprune.inputs import divisible, samples_of
from fxprune.isolate import exact_arithmetic
from fxprune.moments import Layout
from fxprune.products import evaluating, storage_key
from fxprune.regression import Cannot
from fxprune.renorm import some
from fxprune.sequential import HELD_OUT, Walk, in_pieces, live_profile
from fxprune.sides import Rows, Side
from fxprune.traced import Traced
from fxprune.types import ChannelGroup, Consumer, PrunePlan

MAX_SAMPLES = 128  # for the repair of candidates; the final repair takes more
MAX_BYTES = 1 << 30  # of activations that are kept at cut points
MAX_LIVE = 2 << 30  # of activations of a candidate at a time, and of the original's rows
MAX_MACS = 96 * 10**9  # of the original on the samples of one evaluation: a second or two
COMPARED = 3  # one of so many of these samples compares; repairs suffer more from few samples
FEWEST = 16  # samples that repair and compare, however large or dear they are
MAX_CUTS = 32  # cut points

Once: TypeAlias = Callable[[list[str]], Callable[[PrunePlan, fx.GraphModule], object]]
Key: TypeAlias = tuple[str, tuple[tuple[str, tuple[int, ...]], ...]]


class Replay:
    """Runs plans of one model: ``outputs(plan)`` for each held-out batch, repaired sequentially.

    repair    batches for the repair, the first ``max_samples`` samples count
    held_out  batches whose outputs are wanted
    max_live  bytes of activations: where they do not suffice, fewer samples repair and compare;
              so it is where samples are dear (:func:`affordable`)
    once      consumers (keys) that the sequential form cannot treat -> their one-shot repair

    Equal to cut, the one-shot repair, :func:`sequential.repair_sequential` on the same samples
    without its correction of outputs, and a forward pass, up to rounding. Calls may come from
    several threads.
    """

    def __init__(
        self,
        traced: Traced,
        repair: Sequence[Any],
        held_out: Sequence[Any],
        once: Once,
        *,
        max_samples: int = MAX_SAMPLES,
        max_bytes: int = MAX_BYTES,
        max_live: int = MAX_LIVE,
    ) -> None:
        self.traced = traced
        room = min(affordable(traced), _fitting(traced, some(repair, 1)[0], max_live))
        held_out = some(held_out, comparing(room))
        room -= sum(samples_of(b) for b in held_out)
        repair = some(repair, max(FEWEST, min(max_samples, room)))
        repair = _in_folds([p for b in repair for p in in_pieces(b)])
        self.inputs = channels_last(traced.graph_module, [*repair, *held_out])
        repair, self.held_out = self.inputs[: len(repair)], len(held_out)
        with exact_arithmetic(), evaluating(traced.graph_module):
            self.original = Recorded(traced, repair)
        refused = list(self.original.refused)
        self.once = once(refused) if refused else _nothing
        self.alone = once
        self.sketches: dict[str, Tensor] = {}
        self.map = GraphMap(traced)
        self.kept = Snapshots(max_bytes)
        self.originals = self.outputs(PrunePlan({}))

    def outputs(self, plan: PrunePlan) -> list[Any]:
        """What the repaired candidate gives for each held-out batch."""
        module = cut(self.traced, plan, Walked)
        self.once(plan, module)
        groups = self.map.changed(plan)
        first = groups[0][0] if groups else len(self.map.position)
        with exact_arithmetic(), evaluating(module):
            side = _Candidate(module, self.inputs, self, groups)
            walk = Walk(self.traced, plan, self.original, side)
            walk.sketches = self.sketches
            walk.fallback = self._fallback(plan, module)
            for consumer in self.traced.consumers:
                at = self.map.position.get(consumer.node, -1)
                if at >= first and not side.passed(consumer.node):
                    walk.attempt(consumer)
            return side.finish()[-self.held_out :]

    def mend(self, plan: PrunePlan, module: fx.GraphModule) -> None:
        """Repair ``module``, the cut of ``plan``, in place, with the same samples."""
        self.once(plan, module)
        with exact_arithmetic(), evaluating(module):
            side = Side(module, self.inputs[: len(self.inputs) - self.held_out])
            side.run.careful = self.original.writes
            walk = Walk(self.traced, plan, self.original, side)
            walk.fallback = self._fallback(plan, module)
            walk.run()

    def _fallback(self, plan: PrunePlan, module: fx.GraphModule) -> Callable[[Consumer], None]:
        """The one-shot repair of a consumer, unless it has it already."""

        def mend(consumer: Consumer) -> None:
            if consumer.key not in self.original.refused:
                self.alone([consumer.key])(plan, module)

        return mend


def affordable(traced: Traced) -> int:
    """Samples that pass the original for the multiply-adds of an evaluation."""
    one = traced.cost().macs / max(1, samples_of(traced.example_inputs))
    return int(MAX_MACS // max(1, one))


def comparing(room: int) -> int:
    """How many of the samples of an evaluation compare outputs, where there are enough of both."""
    return max(FEWEST, room // COMPARED)


def _fitting(traced: Traced, one: tuple[Any, ...], most: int) -> int:
    """How many samples may pass a candidate together, and have their rows kept."""
    module = traced.graph_module
    with exact_arithmetic(), evaluating(module):
        live = max(live_profile(module, one).held.values(), default=1)
        rows = Recorded(traced, [one]).bytes
    return most // max(1, live, rows // samples_of(one))


def _nothing(plan: PrunePlan, module: fx.GraphModule) -> None:
    """The one-shot repair where the sequential form treats all consumers."""


def _in_folds(pieces: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """The pieces that fit and those that choose ridges (the last quarter), each as one batch."""
    first = len(pieces) - len(pieces) // HELD_OUT
    folds = [_joined(part) for part in (pieces[:first], pieces[first:]) if part]
    return [f for f in folds if f is not None] if None not in folds else pieces


def _joined(batches: list[tuple[Any, ...]]) -> tuple[Any, ...] | None:
    """One batch of several; None where that cannot be told from the inputs."""
    flat = [tree_flatten(b) for b in batches]
    if not all(divisible(b) for b in batches) or any(spec != flat[0][1] for _, spec in flat):
        return None
    leaves = []
    for values in zip(*(f[0] for f in flat), strict=True):
        along = [
            isinstance(v, Tensor) and v.dim() and len(v) == samples_of(b)
            for v, b in zip(values, batches, strict=True)
        ]
        if all(along) and len({v.shape[1:] for v in values}) == 1:
            leaves.append(torch.cat(values))
        elif any(along) or any(isinstance(v, Tensor) or v != values[0] for v in values):
            return None
        else:
            leaves.append(values[0])
    joined: tuple[Any, ...] = tree_unflatten(leaves, flat[0][1])
    return joined


class _Original(Side):
    """Notes whether some node writes to what it reads."""

    writes = False

    def advance(self) -> None:
        node = self.nodes[self.at]
        before = [(t, t._version) for t in self._read(node)]
        super().advance()
        self.writes = self.writes or any(t._version != v for t, v in before)

    def _read(self, node: fx.Node) -> list[Tensor]:
        values = [env.get(n) for env in self.run.envs for n in node.all_input_nodes]
        return [t for t in tree_leaves(values) if isinstance(t, Tensor)]


class Recorded:
    """The original's side of the walk: the rows of each consumer, gathered once.

    refused   consumer key -> why its rows cannot be had
    writes    whether some node of the graph writes to what it reads
    """

    def __init__(self, traced: Traced, inputs: Sequence[tuple[Any, ...]]) -> None:
        side = _Original(traced.graph_module, inputs)
        self.sizes = side.sizes
        self.refused: dict[str, str] = {}
        self._rows: dict[str, list[Rows]] = {}
        self._coverage: dict[str, Tensor] = {}
        self._walk = Walk(traced, PrunePlan({}), self, side)
        for consumer in traced.consumers:
            self._record(consumer, side)
        while side.nodes[side.at].op != "output":
            side.advance()
        self.writes = side.writes

    def _record(self, consumer: Consumer, side: Side) -> None:
        try:
            self._walk.check(consumer)
            side.reach(consumer.node)
            layout = Layout.of(consumer)
            found = [side.rows(consumer, layout, i) for i in range(len(self.sizes))]
            self._coverage[consumer.key] = side.coverage(consumer)
            self._rows[consumer.key] = self._shared(found)
        except Cannot as reason:
            self.refused[consumer.key] = str(reason)

    def _shared(self, found: list[Rows]) -> list[Rows]:
        """The rows of the consumer before, where they are the same: queries, keys and values."""
        before = next(reversed(self._rows.values()), [])
        same = len(before) == len(found) and all(
            torch.equal(a.values, b.values) for a, b in zip(before, found, strict=True)
        )
        return before if same else [Rows(r.values.clone(), r.extent) for r in found]

    @property
    def bytes(self) -> int:
        """Of all rows."""
        every = {id(r): r.values.nbytes for rows in self._rows.values() for r in rows}
        return sum(every.values())

    def reach(self, name: str) -> None:
        """Nothing has to run."""

    def join(self, inputs: tuple[Any, ...]) -> None:
        """Raises InternalError: what is recorded is complete."""
        raise InternalError("a recorded model takes no further inputs")

    def rows(self, consumer: Consumer, layout: Layout, i: int) -> Rows:
        """What enters ``consumer`` in the original. Raises Cannot."""
        if consumer.key in self.refused:
            raise Cannot(self.refused[consumer.key])
        return self._rows[consumer.key][i]

    def coverage(self, consumer: Consumer) -> Tensor:
        """[T]; see observe.coverage_of."""
        return self._coverage[consumer.key]


class GraphMap:
    """Where in the graph each channel group first matters, and where each tensor is last read.

    position   node name -> its number
    first      group name -> number of the first node that differs when it is cut
    last       parameter or buffer name -> number of the last node that reads it
    cuts       names of the nodes in front of which activations are kept
    """

    def __init__(self, traced: Traced) -> None:
        module = traced.graph_module
        nodes = list(module.graph.nodes)
        self.position = {n.name: i for i, n in enumerate(nodes)}
        named = [
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        ]
        storage = {name: storage_key(t) for name, t in named}
        begin: dict[int, int] = {}
        end: dict[int, int] = {}
        for i, node in enumerate(nodes):
            for key in _read(module, node):
                begin.setdefault(key, i)
                users = [self.position[u.name] for u in node.users] if node.op == "get_attr" else []
                end[key] = max(end.get(key, 0), i, *users)
        self.last = {name: end.get(key, -1) for name, key in storage.items()}
        self.first = {
            g.name: self._first(g, {n: begin.get(k, 0) for n, k in storage.items()})
            for g in traced.groups
            if g.locked is None
        }
        self.size = {g.name: g.n for g in traced.groups}
        firsts = sorted({f for f in self.first.values() if f > 0})
        step = -(-len(firsts) // MAX_CUTS) or 1
        self.cuts = {nodes[f].name for f in firsts[::step]}

    def _first(self, group: ChannelGroup, begin: Mapping[str, int]) -> int:
        places = [self.position[n] for n in group.nodes if n in self.position]
        places += [self.position.get(u.consumer.rpartition(":")[0], 0) for u in group.uses]
        places += [begin.get(m.param, 0) for m in group.members]
        return min(places, default=0)

    def changed(self, plan: PrunePlan) -> list[tuple[int, str, tuple[int, ...]]]:
        """(first node, name, kept) of every group that loses channels, in that order."""
        return sorted(
            (self.first.get(name, 0), name, tuple(kept))
            for name, kept in plan.kept.items()
            if len(kept) < self.size.get(name, 0)
        )


def _read(module: fx.GraphModule, node: fx.Node) -> set[int]:
    """Storages of the parameters and buffers that a node reads or fetches."""
    if node.op == "call_module":
        inside = module.get_submodule(str(node.target))
        return {storage_key(t) for t in [*inside.parameters(), *inside.buffers()]}
    if node.op == "get_attr":
        value: Any = module
        for atom in str(node.target).split("."):
            value = getattr(value, atom)
        return {storage_key(value)} if isinstance(value, Tensor) else set()
    return set()


@dataclass
class Snapshot:
    """The state of a run in front of a cut point.

    values   for each input: node name -> value, of the nodes that are still needed
    written  tensors that the repair has changed and that are read later
    """

    values: list[dict[str, Any]]
    written: dict[str, Tensor]
    bytes: int
    used: int = 0
    age: int = 0


@dataclass
class Snapshots:
    """Snapshots by cut point and what was cut in front of it, at most ``max_bytes`` of them.

    Those that never served again go first, the oldest of them before the others.
    """

    max_bytes: int
    held: dict[Key, Snapshot] = field(default_factory=dict)
    bytes: int = 0
    clock: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def get(self, key: Key) -> Snapshot | None:
        with self.lock:
            found = self.held.get(key)
            if found is not None:
                self.clock += 1
                found.used, found.age = found.used + 1, self.clock
            return found

    def __contains__(self, key: Key) -> bool:
        return key in self.held

    def put(self, key: Key, snapshot: Snapshot) -> None:
        if snapshot.bytes > self.max_bytes // 4:
            return
        with self.lock:
            self.clock += 1
            snapshot.age = self.clock
            self.bytes += snapshot.bytes - (self.held[key].bytes if key in self.held else 0)
            self.held[key] = snapshot
            while self.bytes > self.max_bytes:
                worst = min(self.held, key=lambda k: (self.held[k].used > 0, self.held[k].age))
                self.bytes -= self.held.pop(worst).bytes


class _Candidate(Side):
    """A pruned model's side: starts from the latest snapshot that fits, and leaves its own."""

    def __init__(
        self,
        module: fx.GraphModule,
        inputs: Sequence[tuple[Any, ...]],
        replay: Replay,
        groups: list[tuple[int, str, tuple[int, ...]]],
    ) -> None:
        super().__init__(module, inputs)
        self.map, self.kept, self.groups = replay.map, replay.kept, groups
        self.run.careful = replay.original.writes
        self.versions = {name: t._version for name, t in self.tensors.items()}
        cuts = [n.name for n in self.nodes if n.name in self.map.cuts]
        for name in reversed(cuts):
            found = self.kept.get(self._key(name)) if self._key(name) in self.kept else None
            if found is not None and self._restore(name, found):
                break

    def _key(self, name: str) -> Key:
        at = self.map.position[name]
        return name, tuple((g, kept) for first, g, kept in self.groups if first < at)

    def passed(self, name: str) -> bool:
        """Whether the node of that name has run."""
        return self.number.get(name, len(self.nodes)) < self.at

    def advance(self) -> None:
        super().advance()
        name = self.nodes[self.at].name
        if name in self.map.cuts and self._key(name) not in self.kept:
            self._save(name)

    def finish(self) -> list[Any]:
        """The outputs of all inputs."""
        while self.nodes[self.at].op != "output":
            self.advance()
        results = []
        for env in self.run.envs:
            self.run.env = env
            results.append(self.run.run_node(self.nodes[self.at]))
        return results

    def _restore(self, name: str, found: Snapshot) -> bool:
        at = self.number[name]
        wanted = {n for node in self.nodes[at:] for n in node.all_input_nodes}
        wanted = {n for n in wanted if self.number[n.name] < at}
        fetched = {n for n in wanted if n.op == "get_attr"}
        names = {n.name for n in wanted - fetched}
        if any(not names <= values.keys() for values in found.values):
            return False
        for name, t in found.written.items():
            self.tensors[name].copy_(t)
        for i, values in enumerate(found.values):
            self.run.env = self.run.envs[i]
            for n in wanted - fetched:
                self.run.env[n] = self._copied(values[n.name])
            for n in fetched:
                self.run.env[n] = self.run.run_node(n)
        self.at = at
        return True

    def _save(self, name: str) -> None:
        values, size, seen = [], 0, set()
        for env in self.run.envs:
            held = {n.name: v for n, v in env.items() if n.op != "get_attr"}
            tensors = [t for t in tree_leaves(list(held.values())) if isinstance(t, Tensor)]
            for t in tensors:
                if storage_key(t) in self.run.own:
                    return  # a view of a parameter, which the repair may still change
                if storage_key(t) not in seen:
                    seen.add(storage_key(t))
                    size += t.untyped_storage().nbytes()
            values.append({n: self._copied(v) for n, v in held.items()})
        at = self.map.position[name]
        written = {
            k: t.detach().clone()
            for k, t in self.tensors.items()
            if self.map.last.get(k, -1) >= at and t._version != self.versions[k]
        }
        self.kept.put(self._key(name), Snapshot(values, written, size))

    def _copied(self, value: Any) -> Any:
        """Tensors as copies, where what runs later may write to them."""
        if not self.run.careful:
            return value
        return tree_map_only(Tensor, lambda t: t.clone(), value)
