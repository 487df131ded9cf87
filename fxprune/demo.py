"""``fxprune demo``: train a small residual network on digits, prune it, export it, compare.

Needs no download: the images are scikit-learn's ``load_digits`` (1,797 of 8x8 pixels).

Legend for shapes: N images.
"""

from __future__ import annotations

import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import onnxruntime
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune.checkpoint import check_target, save
from fxprune.export import export_onnx
from fxprune.pipeline import prune
from fxprune.report import Figure, write_report
from fxprune.types import Budget, Cost, PrunePlan

EPOCHS = 24
BATCH = 64
LEARNING_RATE = 0.1
WEIGHT_DECAY = 5e-4
CALIBRATION = 512  # training images, without their labels, that pruning sees
SHARE = 0.4  # of the MACs that may stay
RUNS = {1: 400, 64: 60}  # timed runs for each batch size
FILES = (
    *("original.onnx", "pruned.onnx", "plan.json", "model.safetensors", "result.json"),
    "report.html",
)


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class DigitsNet(nn.Module):
    """Stem, three stages, linear head: [N, 1, 8, 8] -> [N, 10] logits; 308,074 parameters."""

    def __init__(self, widths: tuple[int, int, int] = (32, 64, 128)) -> None:
        super().__init__()
        first, second, third = widths
        self.stem = nn.Sequential(
            nn.Conv2d(1, first, 3, 1, 1, bias=False), nn.BatchNorm2d(first), nn.ReLU()
        )
        self.stage1 = Block(first, first, 1)
        self.stage2 = Block(first, second, 2)
        self.stage3 = Block(second, third, 2)
        self.head = nn.Linear(third, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.stage3(self.stage2(self.stage1(self.stem(x))))
        logits: Tensor = self.head(y.mean((2, 3)))
        return logits


@dataclass(frozen=True)
class Digits:
    """Images [N, 1, 8, 8] in [0, 1] and labels [N]; a quarter of each class is for testing."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def digits(seed: int = 0) -> Digits:
    """A stratified, seeded split of scikit-learn's digits."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    parts = train_test_split(x, y, test_size=0.25, stratify=y, random_state=seed)
    train_x, test_x, train_y, test_y = (torch.from_numpy(p) for p in parts)
    return Digits(train_x, train_y, test_x, test_y)


def train_digits_net(epochs: int = EPOCHS, seed: int = 0, progress: bool = False) -> DigitsNet:
    """A network trained on :func:`digits` of the same seed, in eval mode.

    Deterministic for a seed. Runs on one thread (the net is too small for more); the global random
    state and the number of threads are as before when it returns.
    """
    data = digits(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(seed)
        net = DigitsNet()
        optimizer = torch.optim.SGD(
            net.parameters(), LEARNING_RATE, 0.9, weight_decay=WEIGHT_DECAY, nesterov=True
        )
        steps = epochs * -(-len(data.train_x) // BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
        with _bar(progress) as bar:
            task = bar.add_task("training", total=epochs, note="")
            for _ in range(epochs):
                net.train()
                for rows in torch.randperm(len(data.train_x), generator=generator).split(BATCH):
                    x = shifted(data.train_x[rows], generator)
                    loss = F.cross_entropy(net(x), data.train_y[rows], label_smoothing=0.1)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                bar.update(task, advance=1, note=f"loss {loss.item():.3f}")
    return net.eval()


def shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """[N, 1, H, W] -> the same, each image moved by up to one pixel in both directions."""
    n, _, height, width = x.shape
    padded = F.pad(x, (1, 1, 1, 1))[:, 0]
    move = torch.randint(0, 3, (2, n, 1, 1), generator=generator)
    rows = move[0] + torch.arange(height)[:, None]
    columns = move[1] + torch.arange(width)
    return padded[torch.arange(n)[:, None, None], rows, columns][:, None]


def accuracy(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> float:
    """Share of images [N, 1, 8, 8] whose label [N] is the largest logit."""
    with torch.no_grad():
        return float((model(x).argmax(dim=1) == y).double().mean())


class Pruned(Protocol):
    """What the demo needs of a pruning's result."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def graph_module(self) -> nn.Module: ...
    @property
    def plan(self) -> PrunePlan: ...
    @property
    def before(self) -> Cost: ...
    @property
    def after(self) -> Cost: ...


@dataclass(frozen=True)
class Figures:
    """What the table shows of one model; latency: median milliseconds for each batch size."""

    accuracy: float
    macs: int
    params: int
    file_bytes: int
    latency_ms: dict[int, float]


def main(
    out: Path | str = "runs/demo",
    *,
    epochs: int = EPOCHS,
    seed: int = 0,
    overwrite: bool = True,
    progress: bool = True,
) -> int:
    """Train, prune to 40% of the MACs, export, verify, compare; returns the exit code 0.

    ``out`` gets original.onnx, pruned.onnx, plan.json, model.safetensors and result.json, once
    everything is done. Raises OutputError, before any work, where it cannot be written or, without
    ``overwrite``, is there already.
    """
    check_target(out, overwrite=overwrite)
    clock = {"start": time.perf_counter()}
    net = train_digits_net(epochs, seed, progress)
    clock["train"] = time.perf_counter()
    data = digits(seed)
    with _one_thread():
        result = prune(
            net,
            data.train_x[:1],
            budget=Budget(macs=SHARE),
            data=list(data.train_x[:CALIBRATION].split(BATCH)),
            criterion="attention",
            allocation="local",
            repair="lstsq",
            seed=seed,
            progress=progress,
        )
    clock["prune"] = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        before, after = measure(net, result, data, Path(scratch), progress)
        clock["export and measure"] = time.perf_counter()
        seconds = dict(zip(list(clock)[1:], np.diff(list(clock.values())).tolist(), strict=True))
        figures = {
            "before": asdict(before),
            "after": asdict(after),
            "made by": {"seed": seed, "epochs": epochs, "macs share": SHARE},
            "seconds": seconds,
            **surroundings(),
        }

        def add_onnx(folder: Path) -> None:
            shutil.copytree(scratch, folder, dirs_exist_ok=True)
            write_report(
                result, folder / "report.html", title=f"Digits at {SHARE:.0%} of the MACs",
                figures=rows(before, after), inputs=(data.test_x[:1],),
            )  # fmt: skip

        module, plan = result.graph_module, result.plan
        save(out, module, plan, figures, overwrite=overwrite, write=add_onnx)
    show(before, after, Path(out), seconds)
    return 0


def rows(before: Figures, after: Figures) -> list[Figure]:
    """What the report shows besides the costs."""
    found = [Figure("Test accuracy", before.accuracy, after.accuracy, "share", "more")]
    for size, ms in before.latency_ms.items():
        found.append(Figure(f"Latency, batch {size}", ms, after.latency_ms[size], "ms"))
    return [*found, Figure("ONNX file", before.file_bytes, after.file_bytes, "bytes")]


def surroundings() -> dict[str, object]:
    """What the figures depend on besides the code."""
    return {
        "latency": "median ms in onnxruntime on the CPU, one thread",
        "versions": {m.__name__: m.__version__ for m in (torch, onnxruntime, np)},
        "device": platform.processor() or platform.machine(),
    }


def measure(
    net: nn.Module, result: Pruned, data: Digits, folder: Path, progress: bool
) -> tuple[Figures, Figures]:
    """Export both models into ``folder``, checked in onnxruntime, and take their figures."""
    models = (net, result.model)
    files = (folder / "original.onnx", folder / "pruned.onnx")
    with _bar(progress) as bar:
        task = bar.add_task("exporting, checking", total=len(files), note="")
        for model, file in zip(models, files, strict=True):
            report = export_onnx(model, data.train_x[:1], file)
            bar.update(task, advance=1, note=f"{file.name}: error {report.max_error:.1e}")
    times = latencies(files, data.test_x, progress)
    before, after = (
        Figures(
            accuracy=accuracy(model, data.test_x, data.test_y),
            macs=cost.macs,
            params=cost.params,
            file_bytes=file.stat().st_size,
            latency_ms=ms,
        )
        for model, cost, file, ms in zip(
            models, (result.before, result.after), files, times, strict=True
        )
    )
    return before, after


def latencies(files: Sequence[Path], x: Tensor, progress: bool) -> list[dict[int, float]]:
    """Median milliseconds in onnxruntime on one thread, for each file and batch size of RUNS.

    The files take turns, so that a change in the machine's speed meets all of them.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    sessions = [
        onnxruntime.InferenceSession(str(f), options, providers=["CPUExecutionProvider"])
        for f in files
    ]
    medians: list[dict[int, float]] = [{} for _ in files]
    with _bar(progress) as bar:
        task = bar.add_task("timing in onnxruntime", total=sum(RUNS.values()), note="")
        for size, runs in RUNS.items():
            feed = {sessions[0].get_inputs()[0].name: x[:size].numpy()}
            taken: list[list[float]] = [[] for _ in files]
            for _ in range(runs):
                for session, times in zip(sessions, taken, strict=True):
                    start = time.perf_counter()
                    session.run(None, feed)
                    times.append((time.perf_counter() - start) * 1e3)
                bar.update(task, advance=1)
            for median, times in zip(medians, taken, strict=True):
                median[size] = statistics.median(times)
    return medians


def show(before: Figures, after: Figures, out: Path, seconds: dict[str, float]) -> None:
    """The table, and where everything lies, on stdout."""
    table = Table(title=f"Digits, pruned to at most {SHARE:.0%} of the MACs, not fine-tuned")
    table.add_column("")
    for head in ("before", "after", "after / before"):
        table.add_column(head, justify="right")
    lost = (after.accuracy - before.accuracy) * 100
    table.add_row(
        "test accuracy", f"{before.accuracy:.2%}", f"{after.accuracy:.2%}", f"{lost:+.2f} points"
    )
    rows: list[tuple[str, str, float, float]] = [
        ("MACs", ",.0f", before.macs, after.macs),
        ("parameters", ",.0f", before.params, after.params),
        ("ONNX file, KiB", ",.0f", before.file_bytes / 1024, after.file_bytes / 1024),
    ]
    for size in RUNS:
        name = f"latency at batch {size}, ms"
        rows.append((name, ".3f", before.latency_ms[size], after.latency_ms[size]))
    for name, form, old, new in rows:
        table.add_row(name, format(old, form), format(new, form), f"{new / old:.2f}")
    table.caption = "latency: onnxruntime, CPU, one thread, median"
    console = Console()
    console.print(table)
    console.print("ONNX checked: onnxruntime computes what the models compute.")
    console.print(", ".join(f"{k} {v:.1f} s" for k, v in seconds.items()))
    console.print(f"Everything lies in {out}: {', '.join(FILES)}", soft_wrap=True)


@contextmanager
def _one_thread() -> Iterator[None]:
    """The nets are so small that a second thread waits more than it works."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _bar(shown: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        disable=not shown,
    )
