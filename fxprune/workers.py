"""The search's fitness in other processes: through any executor, and on workers of our own.

A task is a plan and the name of a file. The file holds all that the fitness is made of (model,
samples, options); it is named by the hash of its content, written when the first task leaves this
process, and removed when the search is over. A worker reads it once, checks the hash, builds the
fitness and keeps it. On a cluster the temporary folder (TMPDIR) has to be one that all workers see.

Nothing that is pickled is left to the user: what executors do with every task, they do here with
the file too. Classes that a fresh interpreter cannot import travel by value (cloudpickle).
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, TypeAlias

import cloudpickle
import torch
from torch import Tensor, fx, nn

from fxprune.errors import InternalError, ModelError, SpecError
from fxprune.fitness import EvaluateFitness, KLFitness, Repair, ReplayFitness
from fxprune.inputs import Inputs
from fxprune.isolate import rng_kept
from fxprune.observe import observe
from fxprune.renorm import some
from fxprune.repair import LeastSquares, repair_bn
from fxprune.replay import Once, Replay, affordable, comparing
from fxprune.traced import Traced, trace
from fxprune.types import PrunePlan

Fitness: TypeAlias = Callable[[PrunePlan], float]


@dataclass(frozen=True)
class Recipe:
    """All that the fitness of a candidate depends on.

    model, inputs     what was traced
    seen, held_out    batches for the repair and for the comparison of outputs
    repair            lstsq (sequential) | once (one-shot least squares) | bn | None
    evaluate          the user's model -> float, or None for the divergence of outputs
    """

    model: nn.Module
    inputs: Inputs
    seen: Sequence[Any]
    held_out: Sequence[Any]
    repair: str | None
    evaluate: Callable[[Any], float] | None = None

    def fitness(self, traced: Traced, mend: LeastSquares | None = None) -> Fitness:
        """The fitness, for the traced model; ``mend``: the one-shot form, where it is at hand."""
        if self.repair == "lstsq":
            replay = _Lazy(
                lambda: Replay(traced, self.seen, self.held_out, self._once(traced, mend))
            )
            if self.evaluate is None:
                return ReplayFitness(replay)
            return EvaluateFitness(traced, lambda p, m: replay().mend(p, m), self.evaluate)
        repair: Repair | None = None
        if self.repair == "bn":
            repair = self._renew(traced)
        if self.repair == "once":
            repair = mend or self._least_squares(traced)
        if self.evaluate is not None:
            return EvaluateFitness(traced, repair, self.evaluate)
        return KLFitness(traced, repair, some(self.held_out, comparing(affordable(traced))))

    def settled(
        self, traced: Traced, mend: LeastSquares | None, probe: PrunePlan
    ) -> tuple[Recipe, Fitness]:
        """With the form of least squares that leaves ``probe`` nearer to the original.

        The sequential form is ahead where errors add up along a deep net that was cut hard; the
        one-shot form, which is cheaper and knows more samples, where layers are wide for them.
        """
        sequential = self.fitness(traced, mend)
        if self.repair != "lstsq" or self.evaluate is not None or mend is None:
            return self, sequential
        other = replace(self, repair="once")
        once = other.fitness(traced, mend)
        return (other, once) if once(probe) <= sequential(probe) else (self, sequential)

    def identity(self) -> str:
        """Hash of the weights, the samples and the options (of ``evaluate``, its name alone)."""
        found = hashlib.sha256(f"{type(self.model).__qualname__} {self.repair}".encode())
        found.update(str(getattr(self.evaluate, "__qualname__", self.evaluate is None)).encode())
        tensors = list(self.model.state_dict().items())
        every = [*tensors, *((str(i), b) for i, b in enumerate([self.seen, self.held_out]))]
        for name, value in every:
            found.update(name.encode())
            for t in torch.utils._pytree.tree_leaves(value):
                if isinstance(t, Tensor):
                    found.update(f"{t.dtype}{tuple(t.shape)}".encode())
                    flat = t.detach().cpu().contiguous().reshape(-1)
                    found.update(flat.view(torch.uint8).numpy().tobytes())
                else:
                    found.update(repr(t).encode())
        return found.hexdigest()

    def _once(self, traced: Traced, mend: LeastSquares | None) -> Once:
        return lambda consumers: (mend or self._least_squares(traced)).only(consumers)

    def _least_squares(self, traced: Traced) -> LeastSquares:
        seen = observe(traced, self.seen, displacement=False, gamma=0.0, progress=False)
        return LeastSquares(traced, seen)

    def _renew(self, traced: Traced) -> Repair:
        def mend(plan: PrunePlan, module: fx.GraphModule) -> object:
            return repair_bn(traced, plan, module, self.seen)

        return mend


class _Lazy:
    """Makes a replay when it is first asked for; several threads get the same one."""

    def __init__(self, make: Callable[[], Replay]) -> None:
        self._make, self._lock = make, threading.Lock()
        self._made: Replay | None = None

    def __call__(self) -> Replay:
        with self._lock:
            if self._made is None:
                self._made = self._make()
            return self._made


class Shipped:
    """A fitness that can go to other processes; in this one it is what it was made from.

    Use as a context manager: the file is removed at the end. ``mend``: the one-shot form, where it
    is at hand; ``probe``: a plan that decides on the form of least squares when the fitness is
    first needed (:meth:`Recipe.settled`).
    """

    def __init__(
        self,
        recipe: Recipe,
        traced: Traced,
        mend: LeastSquares | None = None,
        probe: PrunePlan | None = None,
    ) -> None:
        self._recipe, self._traced, self._mend, self._probe = recipe, traced, mend, probe
        self._fitness: Fitness | None = None
        self._groups = [(g.name, g.n) for g in traced.groups]
        self._folder: Path | None = None
        self._file: tuple[str, str] | None = None
        self._lock = threading.RLock()

    def __call__(self, plan: PrunePlan) -> float:
        return self._settled()(plan)

    def _settled(self) -> Fitness:
        with self._lock:
            if self._fitness is None and self._probe is not None:
                found = self._recipe.settled(self._traced, self._mend, self._probe)
                self._recipe, self._fitness = found
            elif self._fitness is None:
                self._fitness = self._recipe.fitness(self._traced, self._mend)
            return self._fitness

    def identity(self) -> str:
        """Of all that the fitness depends on; see :meth:`Recipe.identity`."""
        self._settled()
        return self._recipe.identity()

    @property
    def form(self) -> str | None:
        """The repair inside the search, as :class:`Recipe` names it."""
        return self._recipe.repair

    def __enter__(self) -> Shipped:
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def __reduce__(self) -> tuple[type[Received], tuple[str, str]]:
        return Received, self.file()

    def file(self) -> tuple[str, str]:
        """(path, sha256) of the file, which is written if it is not there yet.

        Raises ModelError where the model cannot be sent.
        """
        with self._lock:
            if self._file is None:
                self._settled()
                body = _packed((self._recipe, self._groups))
                digest = hashlib.sha256(body).hexdigest()
                self._folder = Path(tempfile.mkdtemp(prefix="fxprune-"))  # for the owner alone
                path = self._folder / digest
                path.write_bytes(body)
                self._file = os.fspath(path), digest
            return self._file


def _packed(content: tuple[Recipe, list[tuple[str, int]]]) -> bytes:
    recipe, groups = content
    modules = [m for m in list(sys.modules.values()) if _homeless(m)]
    for m in modules:
        cloudpickle.register_pickle_by_value(m)
    try:
        with torch.no_grad():
            return bytes(cloudpickle.dumps((recipe, groups)))
    except Exception as e:
        raise ModelError(
            f"the model cannot be sent to other processes ({type(e).__name__}: {e}); search in "
            "this one, with workers=0, or with threads"
        ) from e
    finally:
        for m in modules:
            cloudpickle.unregister_pickle_by_value(m)


def _homeless(module: Any) -> bool:
    """Whether a fresh interpreter with this path would not find the module."""
    name, file = getattr(module, "__name__", ""), getattr(module, "__file__", None)
    if not isinstance(name, str) or not isinstance(file, str) or name in ("", "__main__"):
        return False
    top = name.partition(".")[0]
    return name in sys.modules and top not in sys.stdlib_module_names and not _findable(top)


def _findable(top: str) -> bool:
    try:
        return PathFinder.find_spec(top) is not None
    except (ImportError, ValueError):
        return False


@dataclass(frozen=True)
class Received:
    """A shipped fitness where it arrives: the name of its file, until it is called."""

    path: str
    digest: str

    def __call__(self, plan: PrunePlan) -> float:
        return _built(self.path, self.digest)(plan)


_known: dict[str, Fitness] = {}
_reading = threading.Lock()


def _built(path: str, digest: str) -> Fitness:
    """The fitness of a file, built once in each process."""
    with _reading:
        if digest not in _known:
            try:
                body = Path(path).read_bytes()
            except OSError as e:
                raise SpecError(
                    f"a worker cannot read {path} ({e.strerror}); set TMPDIR to a folder that "
                    "all workers see"
                ) from e
            if hashlib.sha256(body).hexdigest() != digest:
                raise InternalError(f"{path} is not what it was when it was written")
            recipe, groups = pickle.loads(body)  # noqa: S301  our own file, its hash was checked
            with rng_kept():
                traced = trace(recipe.model, recipe.inputs)
            if [(g.name, g.n) for g in traced.groups] != groups:
                raise InternalError("a worker traced the model in another way")
            _known.clear()  # one search at a time: memory
            _known[digest] = recipe.fitness(traced)
        return _known[digest]


def _begin(threads: int) -> None:
    """In a new worker. Ctrl-C is for the process that waits for it; it ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)


def _end_with_parent() -> None:
    """A killed process ends its workers no more; each would wait for work, and hold the model."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def local_workers(count: int) -> Iterator[Executor | None]:
    """``count`` worker processes on this machine; None for 0.

    They share the threads that torch may use here. Raises SpecError in a process that is a worker
    itself.
    """
    if count == 0:
        yield None
        return
    if multiprocessing.parent_process() is not None:
        raise SpecError(
            "workers cannot be started from a worker process; put the code of a script under "
            'if __name__ == "__main__":'
        )
    threads = max(1, torch.get_num_threads() // count)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, context, _begin, (threads,))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
