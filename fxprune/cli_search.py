"""``fxprune sensitivity``, and the options of the search of ``fxprune prune``."""

from __future__ import annotations

import argparse
import shutil
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxprune.cli_values import check_file, named, seconds, whole
from fxprune.errors import OutputError

if TYPE_CHECKING:
    from rich.table import Table

    from fxprune.curves import Sensitivity

JOURNAL = "search.jsonl"


def add_search_arguments(command: Any) -> None:
    """Limits, journal and workers."""
    command.add_argument(
        "--evals", type=whole(1), default=60, metavar="N", help="states that the search may try"
    )
    command.add_argument(
        "--max-seconds",
        type=seconds,
        metavar="S",
        help="of the search; then its best is taken",
    )
    command.add_argument(
        "--journal", metavar="FILE",
        help="what the search finds out, for --resume; default: a hidden file beside --out, in the "
        f"end {JOURNAL} in it",
    )  # fmt: skip
    command.add_argument(
        "--resume", action="store_true", help="go on with a search that was broken off"
    )
    add_workers_argument(command)


def add_calibration_argument(command: Any) -> None:
    command.add_argument(
        "--calibration-samples",
        type=whole(1),
        default=256,
        metavar="N",
        help="default: %(default)s",
    )


def add_criterion_argument(command: Any) -> None:
    command.add_argument(
        "--criterion", default="attention", help="a name, or FILE.py:NAME; default: %(default)s"
    )


def add_workers_argument(command: Any) -> None:
    command.add_argument(
        "--workers",
        type=whole(),
        default=0,
        metavar="N",
        help="processes that try states side by side",
    )


def search_options(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of ``prune``."""
    return {
        "max_evaluations": args.evals,
        "max_seconds": args.max_seconds,
        "workers": args.workers,
    }


def open_journal(args: argparse.Namespace) -> Path:
    """Where the search writes. Raises OutputError where an old journal is in the way."""
    out = Path(args.out)
    path = Path(args.journal) if args.journal else out.parent / f".{out.name}.{JOURNAL}"
    old = _files(path)
    if old and not args.resume:
        if args.journal or not args.overwrite:
            raise OutputError(
                f"{old[0]} is the journal of a search that was broken off; say --resume to go on "
                "with it, or delete it"
            )
        for file in old:
            file.unlink()
    return path


def _files(path: Path) -> list[Path]:
    """The journal, or one for each round where there are several."""
    rounds = sorted(path.parent.glob(f"[0-9]*-{path.name}"))
    return [p for p in (path, *rounds) if p.is_file()]


def keep_journal(path: Path, folder: Path) -> None:
    """Copy the journal into the folder of the results."""
    for file in _files(path):
        number = file.name.removesuffix(path.name)
        shutil.copyfile(file, folder / f"{number}{JOURNAL}")


def drop_journal(args: argparse.Namespace, path: Path) -> None:
    """The results are complete: the default journal is not needed beside them any more."""
    if not args.journal:
        for file in _files(path):
            file.unlink()


# --- fxprune sensitivity ----------------------------------------------------------------------


def add_sensitivity_arguments(command: Any) -> None:
    command.add_argument("--data", default="random", metavar="SPEC", help="default: %(default)s")
    add_criterion_argument(command)
    command.add_argument(
        "--repair", default="lstsq", choices=("lstsq", "bn", "none"), help="default: %(default)s"
    )
    command.add_argument("--round-to", type=whole(1), default=1, metavar="N", help="step of widths")
    add_calibration_argument(command)
    command.add_argument("--plot", metavar="FILE", help="draw the curves (.svg, .png or .pdf)")
    command.add_argument("--csv", metavar="FILE", help="write the figures")
    add_workers_argument(command)
    command.add_argument("--quiet", action="store_true", help="no progress bar")
    command.set_defaults(command=run_sensitivity)


def run_sensitivity(args: argparse.Namespace) -> None:
    """The command."""
    import csv

    from rich.console import Console

    from fxprune.curves import check_plot, sensitivity
    from fxprune.data import check_spec, load_data
    from fxprune.models import load_model

    check_spec(args.data)
    for file in (args.plot, args.csv):
        check_file(file)
    if args.plot:
        check_plot(args.plot)
    model, inputs = load_model(args.model, args.weights, args.input, args.seed)
    data = load_data(args.data, inputs, seed=args.seed)
    with warnings.catch_warnings():
        # Said below the table.
        warnings.filterwarnings("ignore", "no calibration data", UserWarning)
        curves = sensitivity(
            model, inputs, data, criterion=named(args.criterion, "criterion"),
            repair=None if args.repair == "none" else args.repair, exclude=tuple(args.exclude),
            round_to=args.round_to, seed=args.seed, progress=not args.quiet,
            calibration_samples=args.calibration_samples, workers=args.workers,
        )  # fmt: skip
    console = Console() if sys.stdout.isatty() else Console(width=140)
    console.print(_table(args.model, curves))
    if data is None:
        console.print(
            "Measured on random inputs: --data SPEC gives the real ones.", highlight=False
        )
    if args.csv:
        rows = curves.rows()
        with open(args.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]) if rows else ["group"])
            writer.writeheader()
            writer.writerows(rows)
    if args.plot:
        curves.plot(args.plot)


def _table(title: str, curves: Sensitivity) -> Table:
    """Most sensitive groups per saved multiply-add first."""
    import numpy as np
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=f"Sensitivity of {escape(title)}: divergence of the outputs (MACs saved) with one "
        "group cut alone and repaired, most per MAC first",
        caption="Kullback-Leibler divergence in nats for class scores, else the squared error "
        "relative to the output",
    )
    table.add_column("group", overflow="fold")
    table.add_column("channels", justify="right")
    kept = curves.kept / curves.channels[:, None]
    for share in np.median(kept, axis=0).tolist() if len(kept) else ():
        table.add_column(f"{share:.0%} kept", justify="right")
    price = (curves.loss[:, -1] - curves.whole) / np.maximum(curves.saved[:, -1], 1e-12)
    for f in np.argsort(-price, kind="stable"):
        cells = [f"{v:.2g} ({s:.1%})" for v, s in zip(curves.loss[f], curves.saved[f], strict=True)]
        table.add_row(escape(curves.groups[f]), str(curves.channels[f]), *cells)
    return table
