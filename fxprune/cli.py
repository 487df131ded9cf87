"""The command line: a thin shell over the library.

Exit codes: 0 done; 2 the input cannot be used (one line on stderr says what and the cure); 1 any
other failure; 130 interrupted; 143 terminated. Figures go to stdout, progress and errors to stderr.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxprune import __version__, cli_search, cli_show, cli_tune, cli_values
from fxprune.cli_values import whole
from fxprune.errors import FxpruneError, InputError

if TYPE_CHECKING:  # --help must not wait for torch
    from fxprune.export import ExportReport

_DEMO_OUT = "runs/demo"

_SPECS = """\
model specs:  torchvision:NAME | timm:NAME | FILE.py:FACTORY | package.module:FACTORY
data specs:   digits | fashion-mnist[:DIR] | imagefolder:DIR | random | FILE.py:FACTORY, which
              returns a DataLoader or a list of batches
weights:      a safetensors file, a torch file with tensors only, or "default" for the model
              library's own (may download)
"""


_BUDGETS = {
    "macs": 'multiply-adds that may stay: a share in (0, 1], or an amount like "300 MMACs"',
    "params": 'parameters that may stay: a share, or an amount like "5M"',
    "bytes": 'bytes of weights that may stay: a share, or an amount like "2.5 MB"',
    "memory": 'peak activation bytes at the batch of --input: a share, or an amount like "2.5 MB"',
    "latency": 'measured time of one run on --target: a share, or an amount like "4 ms"',
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; ``argv`` without the program's name."""
    args = argparse.Namespace(again="")
    try:
        with _ended_by_sigterm():
            args = _parser().parse_args(argv)
            command: Callable[[argparse.Namespace], None] = args.command
            command(args)
    except InputError as e:
        return _fail(e, 2)
    except FxpruneError as e:
        return _fail(e, 1)
    except _Terminated:
        sys.stderr.write(f"fxprune: terminated{args.again}\n")
        return 143
    except KeyboardInterrupt:
        sys.stderr.write(f"fxprune: interrupted{args.again}\n")
        return 130
    return 0


class _Terminated(KeyboardInterrupt):
    """SIGTERM, as schedulers send it: what a command has begun is cleared away as by Ctrl-C."""


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    def end(*_: object) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(error: Exception, code: int) -> int:
    sys.stderr.write(f"fxprune: error: {' '.join(str(error).split())}\n")
    return code


# --- arguments --------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = cli_values.Parser(
        prog="fxprune",
        description="Structured pruning of PyTorch models: smaller, faster, verified.",
        epilog=_SPECS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(again="")
    parser.add_argument("--version", action="version", version=f"fxprune {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _demo_parser(commands)
    _inspect_parser(commands)
    _prune_parser(commands)
    _sensitivity_parser(commands)
    _finetune_parser(commands)
    _latency_parser(commands)
    return parser


def _demo_parser(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="train, prune, export and compare a small network; nothing is downloaded",
        description="Train a small network on scikit-learn's digits, prune it, compare.",
    )
    demo.add_argument("--out", default=_DEMO_OUT, metavar="DIR", help="default: %(default)s")
    demo.add_argument("--overwrite", action="store_true", help="replace an existing --out")
    demo.add_argument(
        "--seed", type=cli_values.seed, default=0, metavar="N", help="default: %(default)s"
    )
    demo.add_argument("--quiet", action="store_true", help="no progress bars")
    demo.set_defaults(command=_demo)


def _model_arguments(command: Any) -> None:
    command.add_argument("model", metavar="MODEL", help="a model spec, see below")
    command.add_argument("--weights", metavar="FILE", help='weights file, or "default"')
    command.add_argument(
        "--input", metavar="SHAPE", help="shape of the input, batch first, like 1x3x224x224"
    )
    command.add_argument(
        "--seed", type=cli_values.seed, default=0, metavar="N", help="default: %(default)s"
    )
    command.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="keep these modules as they are (shell-style, may be repeated)",
    )


def _target_arguments(command: Any, default: str | None = None) -> None:
    names = "onnxruntime-cpu, torch-cpu, torch-compile or cuda"
    command.add_argument(
        "--target", default=default, metavar="NAME", help=f"where the model will run: {names}"
    )
    command.add_argument(
        "--threads",
        type=whole(1),
        default=None if default is None else 1,
        metavar="N",
        help="of the target; default: 1",
    )


def _inspect_parser(commands: Any) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="show the channel groups of a model, what is locked and why, and its cost",
        description="Show the channel groups of a model, what is locked and why, and its cost.",
        epilog=_SPECS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _model_arguments(inspect)
    inspect.add_argument("--json", action="store_true", help="for programs: one object on stdout")
    inspect.set_defaults(command=_inspect)


def _latency_parser(commands: Any) -> None:
    latency = commands.add_parser(
        "latency",
        help="measure a model on a target: slowest layers, fast widths, what pruning would save",
        description="Measure a model and its layers on a target; measured times are kept in the "
        "user's cache folder, or in $FXPRUNE_CACHE.",
        epilog=_SPECS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _model_arguments(latency)
    _target_arguments(latency, "onnxruntime-cpu")
    latency.add_argument("--quiet", action="store_true", help="no progress bar")
    latency.set_defaults(command=_latency)


def _prune_parser(commands: Any) -> None:
    prune = commands.add_parser(
        "prune",
        help="prune a model to a budget and export it as checked ONNX",
        description="Prune a model to a budget and export it as checked ONNX.",
        epilog=_SPECS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _model_arguments(prune)
    for what, text in _BUDGETS.items():
        prune.add_argument(f"--{what}", metavar="LIMIT", help=text)
    prune.add_argument("--data", default="random", metavar="SPEC", help="default: %(default)s")
    prune.add_argument("--out", required=True, metavar="DIR", help="folder for the results")
    prune.add_argument("--overwrite", action="store_true", help="replace an existing --out")
    cli_search.add_criterion_argument(prune)
    prune.add_argument(
        "--allocation", default="local", help="a name, or FILE.py:NAME; default: %(default)s"
    )
    prune.add_argument(
        "--evaluate", metavar="FILE.py:NAME",
        help="a function of the model, higher is better, that guides the search",
    )  # fmt: skip
    prune.add_argument(
        "--repair", default="lstsq", help="lstsq, distill, bn or none; default: %(default)s"
    )
    prune.add_argument(
        "--distill-steps",
        type=whole(1),
        metavar="N",
        help="of --repair distill; default: some minutes",
    )
    prune.add_argument(
        "--distill-samples", type=whole(), default=0, metavar="N",
        help="of --repair distill, where more than --calibration-samples",
    )  # fmt: skip
    prune.add_argument("--steps", type=whole(1), default=1, metavar="N", help="rounds of pruning")
    prune.add_argument(
        "--round-to",
        type=cli_values.rounding,
        metavar="N",
        help='step of widths, or "auto": those that are fast on --target; default: auto with '
        "--latency or --target, else 8",
    )
    _target_arguments(prune)
    cli_search.add_calibration_argument(prune)
    cli_search.add_search_arguments(prune)
    cli_show.add_onnx_arguments(prune)
    prune.add_argument("--quiet", action="store_true", help="no progress bars")
    again = "; the same command with --resume goes on with the search"
    prune.set_defaults(command=_prune, again=again)


def _sensitivity_parser(commands: Any) -> None:
    command = commands.add_parser(
        "sensitivity",
        help="cut each channel group alone and show what that costs",
        description="Cut each channel group alone, repair, and show what that costs.",
        epilog=_SPECS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _model_arguments(command)
    cli_search.add_sensitivity_arguments(command)


def _finetune_parser(commands: Any) -> None:
    command = commands.add_parser(
        "finetune",
        help=cli_tune.HELP,
        description=cli_tune.DESCRIPTION,
        epilog=_SPECS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cli_tune.add_arguments(command)
    command.set_defaults(
        command=_finetune, again="; the same command goes on from its last checkpoint"
    )


# --- commands ---------------------------------------------------------------------------------


def _demo(args: argparse.Namespace) -> None:
    from fxprune import demo

    # The default folder belongs to the demo; any other is replaced only on demand.
    overwrite = args.overwrite or args.out == _DEMO_OUT
    demo.main(args.out, seed=args.seed, overwrite=overwrite, progress=not args.quiet)


def _inspect(args: argparse.Namespace) -> None:
    from fxprune.models import load_model
    from fxprune.progress import working
    from fxprune.traced import trace

    model, inputs = load_model(args.model, args.weights, args.input, args.seed)
    with working("trace", True):
        traced = trace(model, inputs).excluding(args.exclude)
    if args.json:
        sys.stdout.write(f"{json.dumps(cli_show.inspected(args.model, traced), indent=1)}\n")
        return
    console = cli_show.console()
    console.print(cli_show.groups_table(args.model, traced))
    for line in (*cli_show.locked_lines(traced), cli_show.cost_line(traced)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _latency(args: argparse.Namespace) -> None:
    from fxprune.latency import Target, latency_model, tables
    from fxprune.models import load_model
    from fxprune.traced import trace

    target = Target(args.target, args.threads)
    model, inputs = load_model(args.model, args.weights, args.input, args.seed)
    traced = trace(model, inputs).excluding(args.exclude)
    found = latency_model(traced, target, progress=not args.quiet)
    console = cli_show.console()
    for part in tables(args.model, traced, found):
        console.print(part, highlight=False)


def _prune(args: argparse.Namespace) -> None:
    from time import perf_counter

    from fxprune import checkpoint
    from fxprune.data import check_spec, first_batch, load_data
    from fxprune.export import check_opset
    from fxprune.latency import latency_text
    from fxprune.models import load_model
    from fxprune.pipeline import prune
    from fxprune.report import Figure, write_report

    start = perf_counter()
    # Everything that can be known to fail is asked before the long work.
    options = _options(args)
    checkpoint.check_target(args.out, overwrite=args.overwrite)
    options["journal"] = cli_search.open_journal(args)
    check_opset(args.opset)
    check_spec(args.data)
    model, inputs = load_model(args.model, args.weights, args.input, args.seed)
    data = load_data(args.data, inputs, seed=args.seed)
    with warnings.catch_warnings():
        # Said below, in the summary.
        warnings.filterwarnings("ignore", "no calibration data", UserWarning)
        result = prune(model, inputs, data=data, **options)
    pruned = perf_counter()
    reports: list[ExportReport | None] = []

    def export(folder: Path) -> Mapping[str, Any]:
        report = cli_show.export(args, result.model, inputs, folder)
        reports.append(report)
        write_report(
            result, folder / "report.html", title=f"{args.model}, pruned",
            inputs=first_batch(data, inputs),
            figures=[Figure("ONNX file", None, report.bytes, "bytes")] if report else [],
        )  # fmt: skip
        cli_search.keep_journal(options["journal"], folder)
        seconds = {"prune": pruned - start, "export": perf_counter() - pruned}
        return cli_show.figures(args, result, report, seconds)

    out = checkpoint.save(
        args.out, result.graph_module, result.plan, overwrite=args.overwrite, write=export
    )
    cli_search.drop_journal(args, options["journal"])
    console = cli_show.console()
    console.print(cli_show.cost_table(args.model, result.before, result.after))
    if "latency" in result.report:
        told = latency_text(result.report["latency"])
        console.print(told, markup=False, highlight=False, soft_wrap=True)
    cli_show.tell(console, reports[0], out, f"calibrated on {result.report['calibration']}")


def _finetune(args: argparse.Namespace) -> None:
    from rich.table import Table

    tuned = cli_tune.run(args)
    if tuned is None:
        return
    console = cli_show.console()
    if tuned.accuracy:
        table = Table("", "test accuracy", title="Fine-tuned")
        for name, value in tuned.accuracy.items():
            table.add_row(name, f"{value:.2%}")
        console.print(table)
    last = tuned.result.history[-1]
    told = f"{len(tuned.result.history)} epochs, {tuned.result.steps} steps, loss {last.loss:.4f}"
    if tuned.result.resumed:
        told += f"; resumed after {tuned.result.resumed} steps"
    cli_show.tell(console, tuned.onnx, tuned.out, told)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of ``prune``; InputError for what argparse lets pass."""
    from fxprune import usercode
    from fxprune.allocate import bounds
    from fxprune.distill import Distillation
    from fxprune.types import Budget

    budget = {m: getattr(args, m) for m in _BUDGETS}
    if all(limit is None for limit in budget.values()):
        flags = ", ".join(f"--{m}" for m in _BUDGETS)
        raise InputError(f"no budget; give one of {flags}, for example --macs 0.5")
    bounds(Budget(**budget))
    if args.repair != "distill" and (args.distill_steps or args.distill_samples):
        raise InputError("--distill-steps and --distill-samples belong to --repair distill")
    if args.threads is not None and not (args.target or args.latency):
        raise InputError("--threads are those of the target; give --target or --latency too")
    distillation = Distillation(steps=args.distill_steps, samples=args.distill_samples)
    return {
        "budget": Budget(**budget),
        "criterion": cli_values.named(args.criterion, "criterion"),
        "allocation": cli_values.named(args.allocation, "allocation"),
        "evaluate": args.evaluate and usercode.found(args.evaluate, "function"),
        "repair": {"none": None, "distill": distillation}.get(args.repair, args.repair),
        "steps": args.steps,
        "exclude": tuple(args.exclude),
        "round_to": args.round_to,
        "target": args.target,
        "threads": args.threads or 1,
        "seed": args.seed,
        "progress": not args.quiet,
        "calibration_samples": args.calibration_samples,
        **cli_search.search_options(args),
    }
