"""Training data whose order can be repeated: the same batches for a seed, epoch and position.

Everything random that happens while a batch is fetched (shuffling, augmentation in this process)
draws from a random stream of its own, which starts anew in each epoch; so what the model draws
does not change it, and reading up to a position brings it to the state that it had there. (Not so
for data sets with random states of their own, and loader workers that outlive an epoch.)
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fxprune.batches import positional, select, targets_of
from fxprune.data import guarded
from fxprune.errors import DataError, SpecError
from fxprune.inputs import Inputs

_END = object()


def derived(*numbers: int) -> int:
    """A 32-bit seed that depends on all of ``numbers``."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seed_all(seed: int) -> None:
    """The global generators of torch (all devices), random and numpy."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - user code may use it


class Stream:
    """Batches of one process of ``processes``: (inputs, targets or None) in the same order again.

    data             re-iterable; see :func:`fxprune.finetune`
    given            example inputs: how many there are, and their keywords; None: one input
    steps_per_epoch  at most so many batches of each epoch for each process; needed where ``data``
                     has no length

    Batches are dealt out in turn; a last round that does not give each process one is left out.
    Raises DataError where there is no batch, or an iterator that can be read only once is to be
    read several times; SpecError where the number of steps cannot be known.
    """

    def __init__(
        self,
        data: Any,
        given: Inputs | None,
        seed: int,
        epochs: int,
        steps_per_epoch: int | None = None,
        processes: int = 1,
        process: int = 0,
    ) -> None:
        if isinstance(data, (Tensor, str, bytes)) or not hasattr(data, "__iter__"):
            raise DataError(
                f"train_data is a {type(data).__name__}; expected an iterable of batches, "
                "(inputs, targets) or inputs, such as a DataLoader"
            )
        if epochs > 1 and hasattr(data, "__next__"):
            raise DataError(
                f"train_data is an iterator, which is empty after one epoch, and {epochs} are "
                "asked for; give a DataLoader or a list of batches"
            )
        self.given, self.seed = given, seed
        self.processes, self.process = processes, process
        self.data = data
        self.generators = _generators(data)
        self.steps = self._steps(steps_per_epoch)
        self._dealt = self._deal()

    def _steps(self, wanted: int | None) -> int:
        if wanted is not None and wanted < 1:
            raise SpecError(f"steps_per_epoch must be at least 1, got {wanted}")
        length = _length(self.data)
        if length is None:
            if wanted is None:
                raise SpecError(
                    f"train_data ({type(self.data).__name__}) has no length; give steps_per_epoch="
                )
            return wanted
        found = length // self.processes
        if found < 1:
            raise DataError(
                f"train_data has {length} batches for {self.processes} process(es); at least one "
                "for each is needed"
            )
        return found if wanted is None else min(found, wanted)

    def _deal(self) -> Any:
        """This process's part of the data; a loader reads only its own samples."""
        if self.processes == 1:
            return self.data
        loader = self.data
        if not isinstance(loader, DataLoader) or loader.batch_sampler is None:
            return _Dealt(loader, self.processes, self.process)
        mine: Any = _Dealt(loader.batch_sampler, self.processes, self.process)
        return DataLoader(
            loader.dataset,
            batch_sampler=mine,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            generator=loader.generator,
            prefetch_factor=loader.prefetch_factor,
        )

    @contextmanager
    def kept(self) -> Iterator[None]:
        """The loader's own generators are as they were after the block."""
        states = [g.get_state() for g in self.generators]
        try:
            yield
        finally:
            for g, state in zip(self.generators, states, strict=True):
                g.set_state(state)

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[tuple[tuple[Any, ...], Any]]:
        """Batches of one epoch without the first ``skip``, at most ``steps`` in all."""
        apart = _Apart(derived(self.seed, epoch))
        for i, g in enumerate(self.generators):
            g.manual_seed(derived(self.seed, epoch, i))
        source = iter(islice(guarded(self._dealt), self.steps))
        for i in range(self.steps):
            with apart.active():
                item = next(source, _END)
            if item is _END:
                return
            if i >= skip:
                yield self._parts(item, i)

    def _parts(self, item: Any, i: int) -> tuple[tuple[Any, ...], Any]:
        """(inputs, targets or None) of one item."""
        given = self.given
        n = len(given.values) if given is not None else 1
        if isinstance(item, (Tensor, np.ndarray)):
            item = (item,)
        if given is not None and isinstance(item, Mapping):
            inputs = select(item, given, i)
            return tuple(inputs), targets_of(item, inputs)
        named = n > 1 and isinstance(item, (tuple, list)) and len(item) in (1, 2)
        if given is not None and named and isinstance(item[0], Mapping):
            return tuple(select(item[0], given, i)), item[1] if len(item) == 2 else None
        if isinstance(item, (tuple, list)) and len(item):
            if isinstance(item[0], (tuple, list)) and len(item[0]) == n and len(item) <= 2:
                return tuple(item[0]), item[1] if len(item) == 2 else None
            chosen, rest = positional(item, given.values if given is not None else (item[0],))
            if chosen is not None and len(rest) < 2:
                return tuple(chosen), rest[0] if rest else None
        found = f"{len(item)} values" if isinstance(item, (tuple, list)) else type(item).__name__
        raise DataError(
            f"batch {i} of train_data is {found}; the model takes {n} input(s): give (inputs, "
            "targets), or ((input, input, ...), targets)"
        )


class _Dealt:
    """Of every full round of ``count`` items the one at ``place``."""

    def __init__(self, source: Iterable[Any], count: int, place: int) -> None:
        self.source, self.count, self.place = source, count, place

    def __iter__(self) -> Iterator[Any]:
        held: list[Any] = []
        for item in self.source:
            held.append(item)
            if len(held) == self.count:
                yield held[self.place]
                held = []

    def __len__(self) -> int:
        return (_length(self.source) or 0) // self.count


class _Apart:
    """Random states of its own, in place of the global ones while ``active``."""

    def __init__(self, seed: int) -> None:
        outer = _states()
        seed_all(seed)
        self.states = _states()
        _set(outer)

    @contextmanager
    def active(self) -> Iterator[None]:
        outer = _states()
        _set(self.states)
        try:
            yield
        finally:
            self.states = _states()
            _set(outer)


def _states() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002


def _set(states: tuple[Any, ...]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.set_rng_state(states[2])


def _length(data: Any) -> int | None:
    if not isinstance(data, Sized):
        return None
    try:
        return len(data)
    except TypeError:  # a DataLoader over a data set without a length
        return None


def _generators(data: Any) -> list[torch.Generator]:
    """Of a loader and its samplers, each once."""
    owners = [data, getattr(data, "sampler", None), getattr(data, "batch_sampler", None)]
    owners.append(getattr(owners[2], "sampler", None))
    found = [getattr(owner, "generator", None) for owner in owners]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())
