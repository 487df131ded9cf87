"""Fine-tuning: cross-entropy and distillation from the original, step by step, resumable."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress, TaskID
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fxprune.checkpoint import check_finite
from fxprune.errors import DataError, InputError, ModelError, SpecError
from fxprune.imitate import Target
from fxprune.inputs import Inputs, samples_of
from fxprune.isolate import rng_kept
from fxprune.pipeline import PruneResult
from fxprune.products import evaluating
from fxprune.progress import bar
from fxprune.tune import state as files
from fxprune.tune.backend import Backend, backend_for
from fxprune.tune.objective import Loss, Objective
from fxprune.tune.options import Tuning
from fxprune.tune.stream import Stream, derived, seed_all

ORIGINAL = "original"
SAVE_EVERY = 300.0  # seconds


@dataclass(frozen=True)
class Epoch:
    """``loss``: mean over the epoch's steps; ``score``: what ``evaluate`` gave after it."""

    epoch: int
    loss: float
    score: float | None = None


@dataclass(frozen=True)
class TuneResult:
    """What :func:`finetune` gives.

    model    a new model, the fine-tuned one, on the device and in the mode of the one given; of a
             PruneResult whose class does not run in training mode, its graph module
    pruned   the PruneResult that was given with the tuned model and graph module in it, else None
    history  one entry for each epoch
    best     the epoch whose state ``model`` has, from 1; None: the last, nothing was evaluated
    steps    of the optimizer in all; resumed: those of them that an earlier call had done
    """

    model: nn.Module
    pruned: PruneResult | None
    history: tuple[Epoch, ...]
    best: int | None
    steps: int
    resumed: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For result.json."""
        kept = {k: getattr(self, k) for k in ("best", "steps", "resumed", "seconds")}
        return {"epochs": [asdict(e) for e in self.history], **kept}


def finetune(
    model: nn.Module | PruneResult,
    train_data: Iterable[Any],
    epochs: int = 1,
    *,
    teacher: nn.Module | str | None = ORIGINAL,
    options: Tuning | None = None,
    loss: Loss | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: float = SAVE_EVERY,
    resume: bool = True,
    steps_per_epoch: int | None = None,
    progress: bool = True,
    accelerator: Any = None,
) -> TuneResult:
    """Train a pruned model to win back accuracy; a new model is returned, the given one stays.

    model       what ``prune`` gave, or any module
    train_data  a DataLoader or another re-iterable of batches: (inputs, targets), or inputs alone
                to learn from the teacher only; several inputs as ((input, input), targets)
    teacher     to distil from, or None; "original": the unpruned model of a PruneResult
    options     optimizer, rates, EMA, precision, seed, ...: see :class:`Tuning`
    loss        ``loss(output, targets)`` in place of the cross-entropy with class numbers
    evaluate    ``evaluate(model) -> float``, higher is better, after each epoch; the best epoch's
                state is returned then
    checkpoint  folder for the state, written after each epoch and every ``save_every`` seconds. A
                call with the same folder and options goes on where it was (``resume``) and ends as
                if it had never been interrupted (see :mod:`fxprune.tune.stream`)
    steps_per_epoch  needed where ``train_data`` has no length
    accelerator  an ``accelerate.Accelerator``; processes started by ``accelerate launch`` make one

    Frozen parameters stay. RNG states and loaders are put back.
    Raises SpecError, DataError, ModelError, OutputError for what cannot be used.
    """
    tuning = options or Tuning()
    pruned = model if isinstance(model, PruneResult) else None
    student, device = _checked(_learner(pruned) if pruned is not None else model, epochs)
    given = pruned.analysis.captured.given if pruned is not None else None
    master = _teacher(teacher, pruned)
    start = time.perf_counter()
    with rng_kept(tuning.seed):
        backend = backend_for(accelerator, device, tuning.mixed_precision)
        stream = Stream(
            train_data, given, tuning.seed, epochs, steps_per_epoch, backend.processes,
            backend.process,
        )  # fmt: skip
        job = _Job(student, master, tuning, backend, stream, Objective(tuning, loss), epochs)
        job.evaluate, job.save_every = evaluate, save_every
        job.folder = Path(checkpoint) if checkpoint is not None else None
        if pruned is not None:
            job.calls(given, student is pruned.graph_module, teacher == ORIGINAL)
        with stream.kept():
            job.begin(resume)
            job.run(progress)
    tuned = job.result(student, device)
    return TuneResult(
        tuned, _with_model(pruned, tuned, student), tuple(job.history), job.best_epoch, job.step,
        job.resumed, round(time.perf_counter() - start, 3),
    )  # fmt: skip


def _learner(pruned: PruneResult) -> nn.Module:
    """The pruned model, or its graph where the class does not run in training mode.

    Parts that only training uses (auxiliary heads) are not in the graph, so they were not cut.
    """
    if pruned.model is pruned.graph_module:
        return pruned.model
    given = pruned.analysis.captured.given
    count = samples_of(given.values)

    def two(t: Tensor) -> Tensor:  # one sample has no variance
        return torch.cat([t, t]) if t.ndim and len(t) == count else t

    inputs = torch.utils._pytree.tree_map_only(Tensor, two, tuple(given.values))
    with rng_kept(), torch.no_grad():
        try:
            given.call(copy.deepcopy(pruned.model).train(), inputs)
        except Exception:  # noqa: BLE001 - any failure means: it cannot be trained like this
            return pruned.graph_module
    return pruned.model


def _checked(student: Any, epochs: int) -> tuple[nn.Module, torch.device]:
    """A model that can be tuned, and its device."""
    if not isinstance(student, nn.Module):
        found = type(student).__name__
        raise ModelError(f"expected a PruneResult or a torch.nn.Module, got {found}")
    if epochs < 1:
        raise SpecError(f"epochs must be at least 1, got {epochs}")
    check_finite(student)
    return student, _device(student) or torch.device("cpu")


def _teacher(teacher: nn.Module | str | None, pruned: PruneResult | None) -> nn.Module | None:
    if teacher is None or isinstance(teacher, nn.Module):
        return teacher
    if teacher != ORIGINAL:
        raise SpecError(f'teacher must be a module, None or "{ORIGINAL}", got {teacher!r}')
    return pruned.traced if pruned is not None else None


def _with_model(
    pruned: PruneResult | None, tuned: nn.Module, student: nn.Module
) -> PruneResult | None:
    """``pruned`` with the tuned model, and a graph module that has its tensors' values."""
    if pruned is None:
        return None
    if student is pruned.graph_module:
        return replace(pruned, model=tuned, graph_module=tuned)  # type: ignore[arg-type]
    graph = copy.deepcopy(pruned.graph_module)
    new = tuned.state_dict()
    with torch.no_grad():
        for name, t in graph.state_dict().items():
            if name in new:
                t.copy_(new[name])
    return replace(pruned, model=tuned, graph_module=graph)


class _Job:
    """One fine-tuning: the copy that learns, where it stands, and what is kept of it."""

    folder: Path | None = None
    evaluate: Callable[[nn.Module], float] | None = None
    save_every = SAVE_EVERY
    given: Inputs | None = None  # how the model is called; None: by position
    given_teacher: Inputs | None = None

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        tuning: Tuning,
        backend: Backend,
        stream: Stream,
        objective: Objective,
        epochs: int,
    ) -> None:
        self.tuning, self.backend, self.stream = tuning, backend, stream
        self.objective, self.epochs = objective, epochs
        self.model = copy.deepcopy(student).to(backend.device).train()
        self.teacher = teacher
        if teacher is not None and _device(teacher) != backend.device:
            self.teacher = copy.deepcopy(teacher).to(backend.device)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        if not self.parameters:
            raise ModelError("no parameter of the model requires a gradient; nothing can be tuned")
        self.optimizer = _optimizer(self.parameters, tuning)
        self.ema = _average(self.model, tuning.ema)
        self.called = backend.prepare(self.model, self.optimizer)
        self.total = epochs * stream.steps
        self.epoch, self.batch, self.step, self.resumed = 0, 0, 0, 0
        self.losses = 0.0
        self.history: list[Epoch] = []
        self.best_epoch: int | None = None
        self.best: files.State = {}
        self.saved = time.perf_counter()

    def calls(self, given: Inputs | None, graph: bool, original: bool) -> None:
        """Graph modules (the model, the original) are called by position, classes as ``given``."""
        self.given = None if graph else given
        self.given_teacher = None if original else given

    # -- where it stands ----------------------------------------------------------------------

    def options(self) -> dict[str, Any]:
        """What must not change between a call and the one that resumes it."""
        return {
            **self.tuning.to_dict(),
            "epochs": self.epochs,
            "steps_per_epoch": self.stream.steps,
            "processes": self.backend.processes,
            "distillation": self.teacher is not None,
        }

    def begin(self, resume: bool) -> None:
        """Take up the checkpoint, if there is one and it is wanted."""
        found = files.read(self.folder) if self.folder is not None and resume else None
        if found is None:
            return
        assert self.folder is not None
        parts, body = found
        files.check_same(self.folder, body["options"], self.options())
        files.put(self.model, parts["model"])
        files.put_optimizer(self.optimizer, self.model, parts.get("optimizer", {}))
        if self.ema is not None:
            files.put(self.ema.module, parts["ema"])
            self.ema.n_averaged.fill_(body["averaged"])
        self.best = {k: t.to(self.backend.device) for k, t in parts.get("best", {}).items()}
        self.best_epoch = body["best"]
        self.history = [Epoch(**e) for e in body["history"]]
        self.epoch, self.batch, self.losses = body["epoch"], body["batch"], body["losses"]
        self.step = self.resumed = body["step"]
        self.backend.set_scale(body["scale"])

    def save(self) -> None:
        """By process 0."""
        self.saved = time.perf_counter()
        if self.folder is None or self.backend.process:
            return
        parts = {
            "model": files.tensors_of(self.model),
            "optimizer": files.optimizer_tensors(self.optimizer, self.model),
            "best": self.best,
        }
        if self.ema is not None:
            parts["ema"] = files.tensors_of(self.ema.module)
        body = {
            "options": self.options(),
            "epoch": self.epoch,
            "batch": self.batch,
            "step": self.step,
            "losses": self.losses,
            "history": [asdict(e) for e in self.history],
            "best": self.best_epoch,
            "averaged": int(self.ema.n_averaged) if self.ema is not None else 0,
            "scale": self.backend.scale(),
        }
        files.save(self.folder, parts, body)

    # -- the loop -----------------------------------------------------------------------------

    def run(self, progress: bool) -> None:
        with bar(progress and self.backend.process == 0) as shown, _teaching(self.teacher):
            task = shown.add_task("fine-tune", total=self.total, completed=self.at(), note="")
            while self.epoch < self.epochs:
                for inputs, targets in self.stream.epoch(self.epoch, self.batch):
                    self.one(inputs, targets, shown, task)
                self.end_epoch()

    def at(self) -> int:
        """Steps by the calendar: a short epoch counts as a full one."""
        return self.epoch * self.stream.steps + self.batch

    def one(self, inputs: tuple[Any, ...], targets: Any, shown: Progress, task: TaskID) -> None:
        """One step."""
        seed_all(derived(self.tuning.seed, self.at(), self.backend.process + 1))
        rate = self.tuning.rate * self.tuning.share(self.at(), self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self.loss(self.here(inputs), self.here(targets))
        value = self.backend.mean(float(loss.detach()))
        if not math.isfinite(value):
            raise ModelError(
                f"the loss is {value} at step {self.at() + 1}; lower the learning rate ({rate:.2g} "
                "there), or look at the data of that batch"
            )
        self.backend.step(loss, self.parameters, self.tuning.clip)
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        self.batch, self.step, self.losses = self.batch + 1, self.step + 1, self.losses + value
        note = f"epoch {self.epoch + 1}/{self.epochs} loss {value:.4f}"
        shown.update(task, completed=self.at(), note=note)
        if self.folder is not None and time.perf_counter() - self.saved >= self.save_every:
            self.save()

    def loss(self, inputs: tuple[Any, ...], targets: Any) -> Tensor:
        target = None
        with self.backend.autocast():
            if self.teacher is not None:
                with torch.no_grad():
                    target = Target.of(_call(self.teacher, self.given_teacher, inputs))
            output = _call(self.called, self.given, inputs)
        return self.objective(output, targets, target)

    def here(self, value: Any) -> Any:
        """Tensors on the device; floating ones in the model's dtype."""
        dtype = next((p.dtype for p in self.parameters), torch.float32)

        def one(t: Tensor) -> Tensor:
            return t.to(self.backend.device, dtype if t.is_floating_point() else t.dtype)

        value = torch.utils._pytree.tree_map(_as_tensor, value)
        return torch.utils._pytree.tree_map_only(Tensor, one, value)

    def end_epoch(self) -> None:
        """Evaluate, remember, save. Raises DataError where the epoch had no batch."""
        if not self.batch:
            raise DataError(
                f"train_data gave no batch in epoch {self.epoch + 1}; give data that can be "
                "iterated once for each epoch"
            )
        self.backend.align(self.model)
        score = self.score()
        if score is not None and score > self.best_score():
            self.best_epoch = self.epoch + 1
            self.best = files.copied(files.tensors_of(self.final()))
        self.history.append(Epoch(self.epoch + 1, self.losses / self.batch, score))
        self.epoch, self.batch, self.losses = self.epoch + 1, 0, 0.0
        self.save()

    def best_score(self) -> float:
        scores = [e.score for e in self.history if e.score is not None]
        return max(scores, default=-math.inf)

    def score(self) -> float | None:
        """Of process 0, for all. Raises InputError where it is no number."""
        if self.evaluate is None:
            return None
        value: Any = None
        if self.backend.process == 0:
            with rng_kept(), evaluating(self.final()):
                value = self.evaluate(self.final())
        value = self.backend.share(value)
        try:
            return float(value)
        except (TypeError, ValueError) as e:
            raise InputError(f"evaluate(model) must return one number, got {value!r}") from e

    def final(self) -> nn.Module:
        """The model that counts: the average where there is one."""
        return self.model if self.ema is None else self.ema.module

    def result(self, student: nn.Module, device: torch.device) -> nn.Module:
        """The tuned model, as the given one in device and modes."""
        self.backend.unwrap(self.model)
        if self.best:
            files.put(self.final(), self.best)
        tuned = self.final().to(device)
        tuned.zero_grad()
        for new, old in zip(tuned.modules(), student.modules(), strict=True):
            new.training = old.training
        return tuned


def _call(model: nn.Module, given: Inputs | None, inputs: tuple[Any, ...]) -> Any:
    return model(*inputs) if given is None else given.call(model, inputs)


@contextmanager
def _teaching(teacher: nn.Module | None) -> Iterator[None]:
    """The teacher in eval mode inside the block, as it was after it."""
    modes = [(m, m.training) for m in teacher.modules()] if teacher is not None else []
    try:
        for m, _ in modes:
            m.training = False
        yield
    finally:
        for m, mode in modes:
            m.training = mode


def _optimizer(parameters: Sequence[nn.Parameter], tuning: Tuning) -> torch.optim.Optimizer:
    """Biases, norms and other vectors are not decayed."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": tuning.decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if tuning.optimizer == "sgd":
        return torch.optim.SGD(groups, tuning.rate, 0.9, nesterov=True)
    return torch.optim.AdamW(groups, tuning.rate)


def _average(model: nn.Module, decay: float | None) -> AveragedModel | None:
    if decay is None:
        return None
    rule = get_ema_multi_avg_fn(decay)
    return AveragedModel(model, multi_avg_fn=rule, use_buffers=True)


def _device(model: nn.Module) -> torch.device | None:
    return next((t.device for t in files.tensors_of(model).values()), None)


def _as_tensor(value: Any) -> Any:
    return torch.as_tensor(value) if hasattr(value, "__array__") else value
