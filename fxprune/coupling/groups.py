"""Solved classes -> ChannelGroups, consumers, and what the later stages ask of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from torch import fx, nn

from fxprune.capture import Captured
from fxprune.coupling.labels import Contraction
from fxprune.coupling.run import Run, Traits, label_run
from fxprune.coupling.solve import Solution, signatures, solve
from fxprune.coupling.verify import Claims, Governing, checked, evened
from fxprune.types import BoolArray, ChannelGroup, Consumer, IntArray, Member, Parts, Placed, T, Use

KERNEL = "kernel position"


@dataclass(frozen=True)
class Coupling:
    """What the labelled run has found, in terms of classes.

    groups         all groups of channels, locked ones too
    cls            [labels] class of each label
    governing      which group and channel each class belongs to
    param_classes  (parameter, dim) -> [size] class of each position, -1 where nothing may go
    contractions   products, dims as arrays [P, Q] of classes
    values         graph node -> value, every tensor replaced by Traits (fields of *labels*)
    """

    groups: tuple[ChannelGroup, ...]
    consumers: tuple[Consumer, ...]
    cls: IntArray
    governing: Governing
    param_classes: dict[tuple[str, int], IntArray]
    contractions: tuple[Contraction, ...]
    values: dict[str, Any]
    parameters: dict[str, Traits]

    @property
    def n_classes(self) -> int:
        return len(self.governing.unit_group)


@dataclass(frozen=True)
class _Draft:
    """A group before it has a name: [S, D] owners (units or rows), and a lock reason."""

    owners: IntArray
    by_row: bool
    locked: str | None


def couple(captured: Captured) -> Coupling:
    """Group the channels of a traced model by running it once."""
    run = label_run(captured)
    slots = _slots(run)
    solution = solve(run.facts, slots)
    builder = _Builder(captured.graph_module, run, solution, slots)
    return builder.build()


def _slots(run: Run) -> tuple[IntArray, IntArray]:
    """(labels, slot of each): one slot for each parameter dim, and for each dim of a product."""
    arrays = [f.ravel() for p in run.parameters.values() for f in p.fields]
    for c in run.facts.contractions:
        arrays += [d.ravel() for d in c.dims if d.shape[1] == 1]
    if not arrays:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    sizes = [len(a) for a in arrays]
    return np.concatenate(arrays), np.repeat(np.arange(len(arrays)), sizes)


class _Builder:
    def __init__(
        self, gm: fx.GraphModule, run: Run, solution: Solution, slots: tuple[IntArray, IntArray]
    ) -> None:
        self.gm, self.run, self.s, self.slots = gm, run, solution, slots
        self.n = solution.n
        self.reason, self.reasons = self._reasons()
        self.at: dict[bytes, set[int]] = {}

    # -- locks --------------------------------------------------------------------------------

    def _reasons(self) -> tuple[IntArray, list[str]]:
        """([classes] number of the lock reason of each class or -1, the reasons).

        A locked class locks the row and the column it lies in. The first reason counts.
        """
        number = np.full(self.n, -1, dtype=np.int64)
        texts: dict[str, int] = {}

        def give(classes: IntArray, why: str) -> None:
            number[classes[number[classes] < 0]] = texts.setdefault(why, len(texts))

        for labels, why in self.run.facts.locks:
            give(self.s.cls[labels], why)
        give(np.flatnonzero(self.s.pinned), "its rows cross those of another block")
        touched = np.zeros(self.n, dtype=np.bool_)
        facts = self.run.facts
        for arrays in (
            [x for pair in facts.unions + facts.parents for x in pair],
            [d.ravel() for c in facts.contractions for d in c.dims],
        ):
            if arrays:
                touched[self.s.cls[np.concatenate(arrays)]] = True
        give(np.flatnonzero(~touched), "no operation uses it")
        locked = np.flatnonzero(number >= 0)[::-1]  # the last to be written is the first
        for owner in (self.s.row[locked], self.s.unit[locked]):
            free = (owner >= 0) & (number[owner] < 0)
            number[owner[free]] = number[locked[free]]
        return number, list(texts)

    # -- drafts -------------------------------------------------------------------------------

    def build(self) -> Coupling:
        drafts = self._balanced() + self._plain() + self._rows()
        drafts = [d for d in drafts if not (d.locked or "").startswith(KERNEL)]
        owner_of_unit = self.s.unit.copy()
        governed = [(owner_of_unit, False), (self.s.row.copy(), True)]
        governed[1][0][self.s.is_row] = np.flatnonzero(self.s.is_row)
        governed[0][0][self.s.is_row] = -1
        arrays: dict[bool, tuple[IntArray, IntArray]] = {}
        for owner, by_row in governed:
            group = np.full(self.n, -1, dtype=np.int64)
            channel = np.full(self.n, -1, dtype=np.int64)
            for g, d in enumerate(drafts):
                if d.by_row == by_row:
                    group[d.owners.ravel()] = g
                    channel[d.owners.ravel()] = np.arange(d.owners.size)
            mine = owner >= 0
            at = np.where(mine, owner, 0)
            arrays[by_row] = np.where(mine, group[at], -1), np.where(mine, channel[at], -1)
        self.governing = arrays
        params = self._param_classes()
        consumers = self._consumers(drafts, params)
        groups = self._groups(drafts, params, consumers)
        cls = self.s.cls[: self.run.facts.count]
        contractions = tuple(
            Contraction(c.const, tuple(cls[d] for d in c.dims)) for c in self.run.facts.contractions
        )
        governing = Governing(*arrays[False], *arrays[True])
        dims = [*params.values(), *(d for c in contractions for d in c.dims)]
        groups = evened(groups, governing, dims)
        groups = checked(groups, governing, Claims.of(self.run.facts, cls))
        return Coupling(
            groups, consumers, cls, governing, params, contractions, self.run.values,
            self.run.parameters,
        )  # fmt: skip

    def _balanced(self) -> list[_Draft]:
        drafts = []
        for block in self.s.blocks:
            why = self.reason[block.ravel()]
            locked = self.reasons[why[why >= 0][0]] if (why >= 0).any() else None
            drafts.append(_Draft(block, False, locked))
        return drafts

    def _plain(self) -> list[_Draft]:
        units = np.zeros(self.n, dtype=np.bool_)
        units[self.s.unit] = True
        units[self.s.is_row] = False
        for block in self.s.blocks:
            units[block] = False
        return self._by_signature(np.flatnonzero(units), self.s.unit, by_row=False)

    def _rows(self) -> list[_Draft]:
        owner = self.s.row.copy()
        rows = np.flatnonzero(self.s.is_row)
        owner[rows] = rows
        return self._by_signature(rows, owner, by_row=True)

    def _by_signature(self, owners: IntArray, owner: IntArray, by_row: bool) -> list[_Draft]:
        if not len(owners):
            return []
        kinds = signatures(self.s.cls[: self.run.facts.count], owner, self.slots)
        owners = owners[kinds[owners] != 0]
        if not len(owners):
            return []
        _, kind = np.unique(kinds[owners], return_inverse=True)
        key = kind.ravel() * (len(self.reasons) + 1) + self.reason[owners] + 1
        _, first, which = np.unique(key, return_index=True, return_inverse=True)
        parts = np.split(owners[np.argsort(which, kind="stable")], np.cumsum(np.bincount(which)))
        drafts = []
        for k in np.argsort(first):
            members = parts[k]
            number = int(self.reason[members[0]])
            why = self.reasons[number] if number >= 0 else None
            if why is None and len(members) == 1:
                why = "one channel: nothing to choose from"
            drafts.append(_Draft(members[None], by_row, why))
        return drafts

    # -- parameters and consumers -------------------------------------------------------------

    def _param_classes(self) -> dict[tuple[str, int], IntArray]:
        keys, flat = [], []
        for name, traits in self.run.parameters.items():
            for f in traits.fields:
                keys.append((name, next(d for d, size in enumerate(f.shape) if size > 1)))
                flat.append(f.ravel())
        if not keys:
            return {}
        classes = self.s.cls[np.concatenate(flat)]
        free = (self.governing[False][0][classes] >= 0) | (self.governing[True][0][classes] >= 0)
        starts = np.cumsum([0, *(len(f) for f in flat)])
        some = np.logical_or.reduceat(free, starts[:-1])
        parts = np.split(np.where(free, classes, -1), starts[1:-1])
        same: dict[bytes, IntArray] = {}  # equal dims share one array
        return {
            key: same.setdefault(part.tobytes(), part)
            for key, part, any_free in zip(keys, parts, some, strict=True)
            if any_free
        }

    def _free(self, drafts: list[_Draft], classes: IntArray) -> bool:
        """Whether any of these classes [K], -1 where fixed, may go."""
        found = [group[classes[classes >= 0]] for group, _ in self.governing.values()]
        return any(drafts[g].locked is None for g in np.unique(np.concatenate(found)) if g >= 0)

    def _consumers(
        self, drafts: list[_Draft], params: dict[tuple[str, int], IntArray]
    ) -> tuple[Consumer, ...]:
        nodes = {n.name: n for n in self.gm.graph.nodes}
        consumers = []
        for r in self.run.facts.products:
            shape = self.run.parameters[r.weight].shape
            taps = [params.get((r.weight, d)) for d in range(2, len(shape))]
            if any(c is not None and self._free(drafts, c) for c in taps):
                continue  # channels in its kernel: it has no taps that read all inputs
            size = shape[r.in_dim] * (1 if r.transposed else r.groups)
            classes = np.full(size, -1) if r.inputs is None else self.s.cls[r.inputs]
            if r.inputs is None and r.groups == 1:
                classes = params.get((r.weight, r.in_dim), classes)
            consumers.append(
                Consumer(
                    r.key,
                    r.node,
                    r.kind,
                    r.weight,
                    r.bias,
                    r.in_dim,
                    1 - r.in_dim,
                    r.groups,
                    r.transposed,
                    classes.astype(np.int64),
                    _norm_after(self.gm, nodes[r.node]),
                )
            )
        return tuple(consumers)

    # -- groups -------------------------------------------------------------------------------

    def _groups(
        self,
        drafts: list[_Draft],
        params: dict[tuple[str, int], IntArray],
        consumers: tuple[Consumer, ...],
    ) -> tuple[ChannelGroup, ...]:
        members = self._placed(Member, list(params), list(params.values()), len(drafts))
        keys = [(c.key,) for c in consumers]
        uses = self._placed(Use, keys, [c.classes for c in consumers], len(drafts))
        makes = [d == 0 and len(self.run.parameters[name].shape) > 1 for name, d in params]
        makers = np.array(makes, dtype=np.bool_)
        by_channel = self._classes(drafts)
        nodes = self._nodes(len(drafts))
        taken: dict[str, int] = defaultdict(int)
        groups = []
        for g, d in enumerate(drafts):
            name = _name(members[g], makers, d)
            taken[name] += 1
            name = name if taken[name] == 1 else f"{name}#{taken[name]}"
            groups.append(
                ChannelGroup(
                    name,
                    d.owners.size,
                    d.owners.shape[0],
                    members[g],
                    uses[g],
                    nodes[g],
                    by_channel[g],
                    d.locked,
                )
            )
        return _with_overlaps(groups, self.governing)

    def _placed(
        self,
        kind: Callable[..., T],
        keys: Sequence[tuple[Any, ...]],
        arrays: list[IntArray],
        n: int,
    ) -> list[Sequence[T]]:
        """For each of n groups, where its channels lie among the classes of each array."""
        result: list[Sequence[T]] = [()] * n
        if not arrays:
            return result
        classes = np.concatenate(arrays)
        sizes = np.array([len(a) for a in arrays])
        slot = np.repeat(np.arange(len(arrays)), sizes)
        position = np.arange(len(classes)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        for group, channel in self.governing.values():
            at = np.flatnonzero((classes >= 0) & (group[classes] >= 0))
            if not len(at):
                continue
            c = channel[classes[at]]
            key = group[classes[at]] * len(arrays) + slot[at]
            order = np.argsort(key * (c.max() + 1) + c, kind="stable")
            at, c, key = at[order], c[order], key[order]
            another = np.diff(key) != 0
            bounds = np.concatenate([[0], np.flatnonzero(another) + 1, [len(key)]])
            fresh = np.concatenate([[True], another | (np.diff(c) != 0)])
            counts = np.add.reduceat(fresh.astype(np.int64), bounds[:-1])
            even = np.flatnonzero(np.diff(bounds) % counts == 0)
            owner, slots = np.divmod(key[bounds[even]], len(arrays))
            spans = np.stack([bounds[even], bounds[even + 1]], 1)
            ends = np.searchsorted(owner, np.arange(n + 1)).tolist()
            flat = position[at]
            for g, (i, j) in enumerate(pairwise(ends)):
                if j > i:
                    mine = slots[i:j], spans[i:j], counts[even[i:j]]
                    result[g] = Placed(kind, keys, flat, *mine)
        return result

    def _classes(self, drafts: list[_Draft]) -> list[Sequence[IntArray]]:
        """For each draft, the classes that each of its channels governs."""
        result: list[Sequence[IntArray]] = [()] * len(drafts)
        for by_row, (group, channel) in self.governing.items():
            order = np.lexsort((channel, group))
            starts = np.searchsorted(group[order], np.arange(len(drafts) + 1)).tolist()
            for g, d in enumerate(drafts):
                if d.by_row == by_row:
                    mine = order[starts[g] : starts[g + 1]]
                    counts = np.bincount(channel[mine], minlength=d.owners.size)
                    result[g] = Parts(mine, np.cumsum([0, *counts]))
        return result

    def _nodes(self, count: int) -> list[tuple[str, ...]]:
        nodes: list[list[str]] = [[] for _ in range(count)]
        for name, value in self.run.values.items():
            if isinstance(value, Traits):
                seen: set[int] = set()
                for f in value.fields:
                    seen |= self._groups_at(self.s.cls[f.ravel()])
                for g in sorted(seen):
                    nodes[g].append(name)
        return [tuple(n) for n in nodes]

    def _groups_at(self, classes: IntArray) -> set[int]:
        key = classes.tobytes()
        if key not in self.at:
            found = [np.unique(group[classes]).tolist() for group, _ in self.governing.values()]
            self.at[key] = {g for one in found for g in one} - {-1}
        return self.at[key]


def _name(members: Sequence[Member], makers: BoolArray, draft: _Draft) -> str:
    """After the layer that makes the channels: the first member that is dim 0 of a weight.

    makers: which of all dims of parameters are dim 0 of a weight
    """
    if not members:
        base = "free"
    else:
        assert isinstance(members, Placed)
        made = np.flatnonzero(makers[members.slots])
        first: Member = members[int(made[0]) if len(made) else 0]
        base = first.param.rpartition(".")[0] or first.param
        if not len(made) and first.dim != 0:
            base = f"{base}.in"
    return f"{base}.rows" if draft.by_row else base


def _norm_after(gm: fx.GraphModule, node: fx.Node) -> str | None:
    users = list(node.users)
    if len(users) == 1 and users[0].op == "call_module" and users[0].args[:1] == (node,):
        path = str(users[0].target)
        if isinstance(gm.get_submodule(path), nn.modules.batchnorm._BatchNorm):
            return path
    return None


def _with_overlaps(
    groups: list[ChannelGroup], governing: dict[bool, tuple[IntArray, IntArray]]
) -> tuple[ChannelGroup, ...]:
    pairs = np.stack([governing[False][0], governing[True][0]], 1)
    pairs = np.unique(pairs[(pairs >= 0).all(1)], axis=0)
    names: dict[int, set[str]] = defaultdict(set)
    for a, b in pairs:
        names[int(a)].add(groups[b].name)
        names[int(b)].add(groups[a].name)
    return tuple(replace(g, overlaps=tuple(sorted(names[i]))) for i, g in enumerate(groups))
