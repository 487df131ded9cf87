"""``fxprune finetune``: the options, and the work behind them; :mod:`fxprune.cli` prints.

What it is given is a folder that ``fxprune prune`` wrote, whose result.json names the original, or
a model spec. Started by ``accelerate launch -m fxprune finetune ...``, or torchrun, processes
share the batches.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxprune import cli_show, cli_values
from fxprune.cli_values import number, whole
from fxprune.errors import InputError, SpecError

if TYPE_CHECKING:  # --help must not wait for torch
    from torch import Tensor, nn

    from fxprune.export import ExportReport
    from fxprune.tune import TuneResult
    from fxprune.types import PrunePlan

HELP = "fine-tune a pruned model with distillation from its original"
DESCRIPTION = """\
Fine-tune a pruned model: cross-entropy with the labels and distillation from the original. SOURCE
is a folder that fxprune prune wrote, or a model spec (then without a teacher). A run that was
killed goes on when the same command is given again.
"""
OPTIONS = ("model", "weights", "input", "seed")  # that result.json of a folder remembers


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Of ``fxprune finetune``."""
    command.add_argument("source", metavar="SOURCE", help="a folder of fxprune prune, or a model")
    command.add_argument(
        "--data",
        required=True,
        metavar="SPEC",
        help="labelled training data: a data spec, see below",
    )
    command.add_argument("--test", metavar="SPEC", help="default: the test part of --data, if any")
    command.add_argument("--out", required=True, metavar="DIR", help="folder for the results")
    command.add_argument("--overwrite", action="store_true", help="replace an existing --out")
    command.add_argument(
        "--epochs", type=whole(1), default=1, metavar="N", help="default: %(default)s"
    )
    command.add_argument(
        "--batch-size", type=whole(1), default=64, metavar="N", help="of each process; default: 64"
    )
    command.add_argument("--optimizer", default="adamw", help="adamw or sgd; default: %(default)s")
    command.add_argument("--lr", type=number, metavar="RATE", help="default: the optimizer's")
    command.add_argument(
        "--distill",
        type=number,
        default=0.5,
        metavar="SHARE",
        help="of the distillation in the loss, 0 to 1; default: %(default)s",
    )
    command.add_argument(
        "--ema", type=number, metavar="DECAY", help="average the weights, e.g. 0.99"
    )
    command.add_argument(
        "--mixed-precision", default="auto", help="auto, no, bf16 or fp16; default: %(default)s"
    )
    command.add_argument(
        "--checkpoint", metavar="DIR", help="folder to resume from; default: OUT.tuning"
    )
    command.add_argument("--model", metavar="MODEL", help="the original; default: as in SOURCE")
    command.add_argument("--weights", metavar="FILE", help="its weights; default: as in SOURCE")
    command.add_argument("--input", metavar="SHAPE", help="its input; default: as in SOURCE")
    command.add_argument(
        "--seed", type=cli_values.seed, default=0, metavar="N", help="default: %(default)s"
    )
    cli_show.add_onnx_arguments(command)
    command.add_argument("--quiet", action="store_true", help="no progress bar")


@dataclass(frozen=True)
class Source:
    """``original``: None where a whole model is tuned; ``figures``: the folder's result.json."""

    model: nn.Module
    original: nn.Module | None
    inputs: tuple[Tensor, ...]
    plan: PrunePlan
    figures: Mapping[str, Any]


@dataclass(frozen=True)
class Tuned:
    """accuracy: name -> share of the test images; empty where there is no test part."""

    out: Path
    result: TuneResult
    accuracy: Mapping[str, float]
    onnx: ExportReport | None


def run(args: argparse.Namespace) -> Tuned | None:
    """Train, export, save. None in all processes but the first."""
    from fxprune import checkpoint
    from fxprune.data import check_spec, load_data
    from fxprune.export import check_opset
    from fxprune.tune import Tuning, finetune

    checkpoint.check_target(args.out, overwrite=args.overwrite)
    check_opset(args.opset)
    for spec in filter(None, (args.data, args.test)):
        check_spec(spec)
        if spec == "random":
            raise SpecError("fine-tuning needs labelled data; random inputs have no labels")
    options = Tuning(
        optimizer=args.optimizer, lr=args.lr, distill=args.distill, ema=args.ema,
        mixed_precision=args.mixed_precision, seed=args.seed,
    )  # fmt: skip
    source = _source(args)
    given = {"batch_size": args.batch_size, "seed": args.seed}
    data = load_data(args.data, source.inputs, shuffle=True, **given)
    assert data is not None
    tests = _tests(args, source)
    state = Path(args.checkpoint or f"{args.out}.tuning")
    result = finetune(
        source.model, data, args.epochs, teacher=source.original if args.distill else None,
        options=options, checkpoint=state, progress=not args.quiet,
    )  # fmt: skip
    if int(os.environ.get("RANK", "0")):
        return None
    tuned = _saved(args, source, result, tests)
    if args.checkpoint is None:
        shutil.rmtree(state, ignore_errors=True)
    return tuned


def _source(args: argparse.Namespace) -> Source:
    """Raises InputError where the original of a folder is not known or does not fit."""
    from fxprune.checkpoint import PLAN, RESULT
    from fxprune.models import load_model
    from fxprune.pipeline import load
    from fxprune.types import PrunePlan

    folder = Path(args.source)
    if not folder.is_dir():
        model, inputs = load_model(args.model or args.source, args.weights, args.input, args.seed)
        return Source(model, None, inputs, PrunePlan({}), {})
    if not (folder / PLAN).is_file():
        raise InputError(f"{folder} holds no {PLAN}; give a folder that fxprune prune wrote")
    try:
        figures = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        known = dict(figures.get("options", {}))
    except (OSError, ValueError, AttributeError):
        figures, known = {}, {}
    known |= {k: v for k in OPTIONS if (v := getattr(args, k)) is not None and k != "seed"}
    if not known.get("model"):
        raise InputError(
            f"{folder} does not say which model it was pruned from; give --model (and --weights)"
        )
    original, inputs = load_model(
        known["model"], known.get("weights"), known.get("input"), known.get("seed", args.seed)
    )
    small = load(folder, original, inputs)
    plan = PrunePlan.from_json((folder / PLAN).read_text(encoding="utf-8"))
    return Source(small, original, inputs, plan, figures)


def _saved(
    args: argparse.Namespace, source: Source, result: TuneResult, tests: Iterable[Any]
) -> Tuned:
    from fxprune import checkpoint
    from fxprune.progress import working

    with working("test", not args.quiet):
        accuracy = _accuracy(source, result, tests)
    reports: list[ExportReport | None] = []

    def export(folder: Path) -> Mapping[str, Any]:
        reports.append(cli_show.export(args, result.model, source.inputs, folder))
        known = source.figures
        _report(args, source, result, accuracy, reports[0], folder)
        asked = cli_show.options(args)
        origin = known.get("options", {})
        named = {k: asked.get(k) or origin.get(k) for k in ("model", "weights", "input")}
        named["model"] = named["model"] or (None if source.original else args.source)
        return {
            **{k: known[k] for k in ("before", "after", "share", "versions") if k in known},
            "options": {**asked, **named, "seed": origin.get("seed", args.seed)},
            "tuning": result.to_dict(),
            "accuracy": accuracy,
            "onnx": reports[0].to_dict() if reports[0] else None,
        }

    out = checkpoint.save(
        args.out, result.model, source.plan, overwrite=args.overwrite, write=export
    )
    return Tuned(out, result, accuracy, reports[0])


def _report(
    args: argparse.Namespace,
    source: Source,
    result: TuneResult,
    accuracy: Mapping[str, float],
    onnx: ExportReport | None,
    folder: Path,
) -> None:
    """report.html, where the original is known."""
    from fxprune.data import first_batch, load_data
    from fxprune.pipeline import PruneResult
    from fxprune.report import Figure, write_report
    from fxprune.traced import trace

    if source.original is None:
        return
    traced = trace(source.original, source.inputs)
    graph = traced.graph_module
    pruned = PruneResult(
        result.model, graph, graph, traced, source.plan, traced.cost(), traced.cost(source.plan),
        dict(source.figures.get("pruning", {})),
    )  # fmt: skip
    figures = [Figure("ONNX file", None, onnx.bytes, "bytes")] if onnx else []
    if accuracy:
        names = (("original", "Accuracy, to the original"), ("before", "Accuracy, by tuning"))
        figures += [Figure(n, accuracy[k], accuracy["after"], "share", "more") for k, n in names]
    told = result.to_dict()["epochs"]
    write_report(
        pruned, folder / "report.html", title=f"{args.source}, fine-tuned", figures=figures,
        inputs=first_batch(load_data(args.data, source.inputs), source.inputs),
        notes=[f"Epoch {e['epoch']}: loss {e['loss']:.4f}" for e in told],
    )  # fmt: skip


def _tests(args: argparse.Namespace, source: Source) -> Iterable[Any]:
    """Labelled batches that were not trained on, if there are any."""
    from fxprune.data import from_factory, load_data

    one_part = args.data.startswith("imagefolder") or from_factory(args.data)
    if args.test is None and one_part:
        return ()
    return load_data(args.test or args.data, source.inputs, train=False) or ()


def _accuracy(source: Source, result: TuneResult, tests: Iterable[Any]) -> dict[str, float]:
    """Top-1 on the test part: of the original, before and after.

    Empty where there is none, or where it is not images (or the like) with one class each.
    """
    import torch

    from fxprune.products import evaluating

    models = {"original": source.original, "before": source.model, "after": result.model}
    right = dict.fromkeys((k for k, m in models.items() if m is not None), 0)
    total = 0
    for batch in tests:
        if not _classified(batch):
            return {}
        x, y = batch
        total += len(y)
        for name, model in models.items():
            if model is not None:
                with evaluating(model):
                    output = model(x)
                if not isinstance(output, torch.Tensor) or output.ndim != 2:
                    return {}
                right[name] += int((output.argmax(1) == y).sum())
    return {name: count / total for name, count in right.items() if total}


def _classified(batch: Any) -> bool:
    """Whether it is one input and a class for each sample: [N, ...] and whole numbers [N]."""
    import torch

    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        return False
    x, y = batch
    if not (isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)):
        return False
    return y.ndim == 1 and not y.is_floating_point() and len(x) == len(y)
