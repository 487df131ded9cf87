"""Channel labels: integers that follow the channels of every tensor through a running model.

A *field* is an integer array with as many dims as its tensor; it has size 1 along every dim on
which it does not vary (a convolution's output [N, C, H, W] has one field [1, C, 1, 1]). A tensor
has a list of fields, none of which varies on a subset of the dims of another.

What the ops say about labels is collected here and solved once, in ``groups``:

union     two labels are one channel
parent    (p, c): when p goes, c goes; when all children of p go, p goes. p is a whole row (an
          attention head, a convolution group) or a whole column of a block of children; where the
          op does not know which, the blocks tell
meet      an array [1 + O, P]: a coarse field [P] met a fine one [O, P]; positions stay aligned
rect      an array [*R, D]: every row that stays keeps the same number of labels
uniform   an array [*R, D]: positions along D are addressed by number, so rows may not choose freely
lock      the label stays, for a reason
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fxprune.products import storage_key
from fxprune.types import BoolArray, IntArray

Fields = list[IntArray]
EITHER, ROW, COLUMN = 0, 1, 2


def varying(f: IntArray) -> frozenset[int]:
    """The dims along which a field varies."""
    return _varying(f.shape)


@functools.lru_cache(maxsize=4096)
def _varying(shape: tuple[int, ...]) -> frozenset[int]:
    return frozenset(d for d, size in enumerate(shape) if size > 1)


def align(f: IntArray, ndim: int) -> IntArray:
    """Prepend dims of size 1, as broadcasting does."""
    return f.reshape((1,) * (ndim - f.ndim) + f.shape)


def rows_by(f: IntArray, dim: int) -> IntArray:
    """[R, D]: D positions along ``dim``, R all the rest."""
    return np.moveaxis(f, dim, -1).reshape(-1, f.shape[dim])


def _positions(coarse: IntArray, fine: IntArray) -> IntArray:
    """[O, P]: the fine field at each of the P positions along which the coarse one varies."""
    along = sorted(varying(coarse))
    return np.moveaxis(fine, along, range(-len(along), 0)).reshape(-1, coarse.size)


def _block(f: IntArray, dim: int) -> IntArray:
    """``f`` with ``dim`` last and without dims of size 1."""
    moved = np.moveaxis(f, dim, -1)
    return moved.reshape([s for s in moved.shape if s > 1])


def squeezed(f: IntArray, dims: Iterable[int]) -> IntArray:
    """Size 1 along those ``dims`` on which the field turns out not to vary."""
    for d in dims:
        if f.shape[d] > 1:
            head = np.take(f, [0], axis=d)
            if np.array_equal(np.broadcast_to(head, f.shape), f):
                f = head
    return f


@dataclass(frozen=True)
class Contraction:
    """One product for the cost model: multiply-adds = ``const`` times the width of each dim.

    A dim is an array [P, Q] of labels: P positions along it, Q labels at each.
    """

    const: int
    dims: tuple[IntArray, ...]


@dataclass(frozen=True)
class ProductRecord:
    """A product with a parameter, before classes are known; see ``types.Consumer``."""

    key: str
    node: str
    kind: str
    weight: str
    bias: str | None
    in_dim: int
    groups: int
    transposed: bool
    inputs: IntArray | None


@dataclass
class Facts:
    """Everything that one labelled run has said."""

    count: int = 0
    unions: list[tuple[IntArray, IntArray]] = field(default_factory=list)
    parents: list[tuple[IntArray, IntArray]] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)  # of the parents: ROW, COLUMN or EITHER
    probes: list[tuple[IntArray, IntArray]] = field(default_factory=list)
    meets: list[IntArray] = field(default_factory=list)
    rects: list[IntArray] = field(default_factory=list)
    uniforms: list[IntArray] = field(default_factory=list)
    locks: list[tuple[IntArray, str]] = field(default_factory=list)
    contractions: list[Contraction] = field(default_factory=list)
    products: list[ProductRecord] = field(default_factory=list)


@dataclass(slots=True)
class _Note:
    """What one run knows of one tensor.

    strided    of a slice with steps along labelled dims: the labels of the whole
    vanishing  see ``vanish``
    zeroed     see ``vanish``: the labels [K] that are coarser than the tensor's own
    """

    run: object
    fields: Fields
    strided: Fields
    vanishing: bool = False
    zeroed: IntArray | None = None


@dataclass(frozen=True)
class _Product:
    """Fresh labels ``made`` for each pair of ``a`` and ``b``, in a row; the shapes broadcast."""

    a: IntArray
    b: IntArray
    made: IntArray


_NOTE = "_channel_labels"


class Labels:
    """The labels of all live tensors of one run, and the facts gathered so far.

    Notes on intermediate results are kept as an attribute of the tensor, and go with it; those on
    parameters and buffers, which outlive the run, are kept here.
    """

    def __init__(self) -> None:
        self.facts = Facts()
        self._run = object()
        self._products: dict[int, _Product] = {}  # by their first labels
        self._owned: dict[int, tuple[Tensor, _Note]] = {}
        self.locked: BoolArray = np.zeros(0, dtype=np.bool_)  # [labels] locked by name
        self.where = ""
        self.opaque = False  # inside a module that was not traced through
        self.expands = False  # inside a call whose expanded extents follow what they meet
        self.averages = False  # inside a call whose divisor can be rewritten
        self.extremes = False  # inside a maximum or minimum that can be
        self.measured = False  # inside a call that takes as much as a number says that is data
        self.pads = False  # inside a call whose padding can be rewritten
        self.literal = False  # inside a call whose positions are constants, and can be rewritten
        self.dirty: dict[int, Any] = {}  # memory written to: what is in it does not vanish

    # -- facts --------------------------------------------------------------------------------

    def new(self, n: int) -> IntArray:
        """n fresh labels, [n]."""
        start = self.facts.count
        self.facts.count += n
        return np.arange(start, start + n, dtype=np.int64)

    def union(self, a: IntArray, b: IntArray) -> None:
        """a and b broadcast against each other; labels at the same position become one."""
        x, y = (a, b) if a.shape == b.shape else np.broadcast_arrays(a, b)
        self.facts.unions.append((x.ravel(), y.ravel()))

    def parent(self, p: IntArray, c: IntArray, kind: int = EITHER) -> None:
        """p broadcasts to c; each label of p owns those of c at its positions."""
        self.facts.parents.append((np.broadcast_to(p, c.shape).ravel(), c.ravel()))
        self.facts.kinds.append(kind)
        at = _positions(p, c)
        self.facts.meets.append(np.concatenate([p.reshape(1, -1), at]))
        if kind == EITHER:
            labels, first = np.unique(p, return_index=True)
            at_one = at[:, first]  # children at one position of each parent
            self.facts.probes.append(
                (np.broadcast_to(labels, at_one.shape).ravel(), at_one.ravel())
            )

    def rect(self, f: IntArray, dim: int) -> None:
        """Every row of ``f`` along ``dim`` keeps equally many labels."""
        if 1 < f.shape[dim] < f.size:
            self.facts.rects.append(_block(f, dim))

    def uniform(self, f: IntArray, dim: int) -> None:
        """Positions of ``f`` along ``dim`` are addressed by number."""
        if 1 < f.shape[dim] < f.size:
            self.facts.uniforms.append(_block(f, dim))

    def lock(self, f: IntArray, reason: str) -> None:
        """These labels stay."""
        where = f"{reason} at {self.where}" if self.where else reason
        self.facts.locks.append((np.unique(f), where))
        if self.facts.count > len(self.locked):
            more = np.zeros(2 * self.facts.count - len(self.locked), dtype=np.bool_)
            self.locked = np.concatenate([self.locked, more])
        self.locked[f] = True

    def lock_all(self, tensors: Iterable[Tensor], reason: str) -> None:
        for t in tensors:
            for f in self.of(t):
                self.lock(f, reason)

    # -- fields -------------------------------------------------------------------------------

    def of(self, t: Tensor | None) -> Fields:
        """The fields of a tensor; none when it carries no channels."""
        note = None if t is None else self._known(t)
        return [] if note is None else note.fields

    def _known(self, t: Tensor) -> _Note | None:
        note: _Note | None = t.__dict__.get(_NOTE)
        if note is not None and note.run is self._run:
            return note
        owned = self._owned.get(id(t))
        return None if owned is None else owned[1]

    def _note(self, t: Tensor) -> _Note:
        note = self._known(t)
        if note is None:
            note = t.__dict__[_NOTE] = _Note(self._run, [], [])
        return note

    def put(self, t: Tensor, fields: Fields) -> None:
        """Give ``t`` its fields; those that do not vary or are locked whole say no more."""
        kept = [f for f in fields if f.size > 1 and not self._fixed(f)]
        if kept:
            self._note(t).fields = kept

    def _fixed(self, f: IntArray) -> bool:
        first = int(f.flat[0])
        return first < len(self.locked) and bool(self.locked[first]) and self._all_locked(f)

    def _all_locked(self, f: IntArray) -> bool:
        return int(f.max()) < len(self.locked) and bool(self.locked[f].all())

    def replace(self, t: Tensor, fields: Fields) -> None:
        """Give ``t`` other fields than it had."""
        self.clear(t)
        self.put(t, fields)

    def clear(self, t: Tensor) -> None:
        """Forget the fields of ``t``."""
        if (note := self._known(t)) is not None:
            note.fields = []

    def parameter(self, t: Tensor, vanishing: bool) -> None:
        """One fresh field for each dim of a parameter or buffer.

        vanishing: whether it is masked with its labels, as parameters are
        """
        self._owned[id(t)] = t, _Note(self._run, [], [], vanishing)
        self.created(t)

    def created(self, t: Tensor) -> None:
        """One fresh field for each dim of a tensor that is made in forward."""
        shape = tuple(t.shape)
        at, fields, fresh = 0, [], self.new(sum(n for n in shape if n > 1))
        for d, n in enumerate(shape):
            if n > 1:
                ones = [1] * len(shape)
                ones[d] = n
                fields.append(fresh[at : at + n].reshape(ones))
                at += n
        self.put(t, fields)

    def along(self, t: Tensor, dim: int) -> IntArray:
        """A fresh field along one dim of ``t``."""
        shape = [s if d == dim else 1 for d, s in enumerate(t.shape)]
        return self.new(t.shape[dim]).reshape(shape)

    def vanishes(self, t: Tensor) -> bool:
        """Whether ``t`` is zero at every position whose label is removed."""
        note = self._known(t)
        if note is None or not note.vanishing:
            return False
        return not self.dirty or storage_key(t) not in self.dirty

    def vanish(self, t: Tensor) -> None:
        """``t`` is zero at every position whose label is removed."""
        self._note(t).vanishing = True

    def zeroed(self, t: Tensor) -> IntArray | None:
        """[K] labels of which each, when it is removed, makes ``t`` zero where its children are."""
        note = self._known(t)
        return None if note is None or storage_key(t) in self.dirty else note.zeroed

    def zero(self, t: Tensor, by: IntArray) -> None:
        """``t`` is zero at the children of every label in ``by`` that is removed."""
        self._note(t).zeroed = by

    def children(self, parents: IntArray) -> IntArray:
        """[K] all labels that have been said to have one of ``parents``."""
        own = [c[np.isin(p, parents)] for p, c in self.facts.parents]
        return np.unique(np.concatenate(own)) if own else parents[:0]

    def strided(self, t: Tensor) -> Fields:
        """The fields of the tensor of which ``t`` is a slice with steps."""
        note = self._known(t)
        return [] if note is None else note.strided

    def stride(self, t: Tensor, whole: Fields) -> None:
        """``t`` is a slice with steps of a tensor with the fields ``whole``."""
        self._note(t).strided = whole

    def overwritten(self, t: Tensor) -> None:
        """The memory of ``t``, and of its views, holds something else now.

        The weak reference keeps its identity from being given to other memory.
        """
        self.dirty[storage_key(t)] = StorageWeakRef(t.untyped_storage())

    # -- relations between fields -------------------------------------------------------------

    def merge(self, f: IntArray, dims: Iterable[int]) -> IntArray:
        """Labels along ``dims`` become one; the field that is left has size 1 there."""
        head = f[tuple(slice(0, 1) if d in set(dims) else slice(None) for d in range(f.ndim))]
        self.union(head, f)
        return head

    def mix(self, f: IntArray, dims: Iterable[int], reason: str) -> IntArray | None:
        """An op mixes all positions along ``dims``: merge them, or lock when nothing is left."""
        mixed = varying(f) & frozenset(dims)
        if not mixed:
            return f
        if mixed == varying(f):
            self.lock(f, reason)
            return None
        return self.merge(f, mixed)

    def relate(self, a: IntArray, b: IntArray) -> None:
        """Two aligned fields meet position by position."""
        va, vb = varying(a), varying(b)
        if not va & vb:
            return
        if va == vb:
            self.union(a, b)
        elif va < vb:
            self.parent(a, b)
        elif vb < va:
            self.parent(b, a)
        else:
            self.union(self.merge(a, va - vb), self.merge(b, vb - va))

    def combine(self, fields: Sequence[IntArray]) -> Fields:
        """Fields that meet in one tensor: the finest ones, after all have been related.

        Two of which neither is finer, such as [heads, i] and [heads, j], share the rows.
        """
        finest: Fields = []
        for f in sorted(fields, key=lambda g: -len(varying(g))):
            touching = [g for g in finest if varying(f) & varying(g)]
            finer = [g for g in touching if varying(f) <= varying(g)]
            for g in finer:
                self.relate(f, g)
            for g in touching if not finer else ():
                self._share(f, g)
            if not finer and f.size > 1:
                finest.append(f)
        return finest

    def _share(self, a: IntArray, b: IntArray) -> None:
        """Positions along the dims that two fields have in common are one."""
        va, vb = varying(a), varying(b)
        first, second = self.rows(a, va - vb), self.rows(b, vb - va)
        if first is not None and second is not None:
            self.union(first, second)

    def product(self, a: IntArray, b: IntArray) -> IntArray:
        """Two fields on different dims as one: a fresh label for each pair, child of both.

        The parents are said at the end, in ``settle_products``.
        """
        shape = np.broadcast_shapes(a.shape, b.shape)
        made = self.new(int(np.prod(shape))).reshape(shape)
        self._products[int(made.flat[0])] = _Product(a, b, made)
        return made

    def made_of(self, f: IntArray) -> _Product | None:
        """The product whose labels are those of ``f``, if it is one."""
        found = self._products.get(int(f.min())) if self._products and f.size > 1 else None
        return found if found is not None and int(f.max()) <= int(found.made.flat[-1]) else None

    def _sides(self, f: IntArray) -> Fields:
        """The two fields of which ``f`` is the product; none where it is not one."""
        pair = self.made_of(f)
        if pair is None:
            return []
        at = f - int(pair.made.flat[0])
        sides = [np.broadcast_to(side, pair.made.shape).ravel()[at] for side in (pair.a, pair.b)]
        return [squeezed(side, range(f.ndim)) for side in sides]

    def sides(self, f: IntArray) -> Fields:
        """The fields of which ``f`` is the product, down to those that are none."""
        pair = self._sides(f)
        return [s for side in pair for s in self.sides(side)] if pair else [f]

    def factors(self, f: IntArray) -> Fields:
        """``sides``, as far as each has dims of its own."""
        pair = self._sides(f)
        if not pair or varying(pair[0]) & varying(pair[1]):
            return [f]
        return [*self.factors(pair[0]), *self.factors(pair[1])]

    def settle_products(self, seen: Iterable[IntArray]) -> None:
        """Say of which labels the products are children, where they are known by name.

        Those that came apart again say nothing. seen: the fields of all values that are kept.
        """
        if not self._products:
            return
        facts = self.facts
        self.locked = np.concatenate([self.locked, np.zeros(facts.count, dtype=np.bool_)])
        for p in self._products.values():
            self.locked[p.made] |= bool(self.locked[p.a].all() and self.locked[p.b].all())
        used = np.zeros(facts.count, dtype=np.bool_)
        pairs = [f for pair in [*facts.unions, *facts.parents] for f in pair]
        dims = [d for c in facts.contractions for d in c.dims]
        inputs = [p.inputs for p in facts.products if p.inputs is not None]
        locks = [f for f, _ in facts.locks]
        for f in (*pairs, *facts.rects, *facts.uniforms, *locks, *dims, *inputs, *seen):
            used[f] = True
        for p in reversed(self._products.values()):
            if not used[p.made].any():
                continue
            used[p.a] = used[p.b] = True
            fixed = bool(self.locked[p.a].all()), bool(self.locked[p.b].all())
            if all(fixed):
                self.lock(p.made, "made of channels that stay")
            elif any(fixed):  # kernel positions, say: a pair is what the other side is
                self.union(p.b if fixed[0] else p.a, p.made)
            else:
                self.parent(p.a, p.made)
                self.parent(p.b, p.made)
                self.rect(p.made, max(varying(p.made)))

    def rows(self, f: IntArray, dims: Iterable[int]) -> IntArray | None:
        """Contract ``dims`` away: a fresh label for each row that is left, parent of its labels."""
        gone = varying(f) & frozenset(dims)
        if not gone:
            return f
        if gone == varying(f):
            return None
        head = f[tuple(slice(0, 1) if d in gone else slice(None) for d in range(f.ndim))]
        keys, inverse = np.unique(head, return_inverse=True)
        fresh = self.new(len(keys))[inverse.reshape(head.shape)]
        self.parent(fresh, f, ROW)
        for d in gone:
            self.rect(f, d)
        return fresh
