"""Random networks under random plans, as many as you like.

    python benchmarks/property.py --graphs 5000 --seed 0 --workers 2

Each failure is made smaller and printed as a program; a wrong result without an error is marked
SILENT. Exit code 0 when none failed, 1 otherwise.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / d) for d in ("tests", "")]

import torch  # noqa: E402
from graphs import Program, Seeded  # noqa: E402
from graphs_check import check_program, random_program, smaller  # noqa: E402


def failure_of(program: Program) -> str | None:
    """What goes wrong with a program: kind, message and place, or None."""
    try:
        with redirect_stderr(StringIO()):  # fx prints the code of a failing graph
            check_program(program)
    except Exception as error:  # noqa: BLE001 - every failure is a finding
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = str(error).split("\n")[0][:200]
        silent = "SILENT " if text.startswith("relative error") else ""
        return (
            f"{silent}{type(error).__name__}: {text} ({Path(where.filename).name}:{where.lineno})"
        )
    return None


def _builds(program: Program) -> bool:
    try:
        with torch.no_grad():
            program.build()(*program.example())
    except Exception:  # noqa: BLE001 - blocks that no longer fit: not a smaller program
        return False
    return True


def _kind(failure: str | None) -> str | None:
    """The part of a failure that has to stay while it is made smaller."""
    return None if failure is None else failure.split(":")[0]


def one(seed: int) -> tuple[int, str | None]:
    """Check the network of one seed."""
    torch.set_num_threads(1)
    program = random_program(Seeded(seed))
    failure = failure_of(program)
    if failure is None:
        return seed, None
    kind = _kind(failure)
    small = smaller(program, lambda p: _builds(p) and _kind(failure_of(p)) == kind)
    failure = failure_of(small) or failure
    blocks = "".join(f"\n    {len(small.inputs) + i}: {s}" for i, s in enumerate(small.steps))
    return seed, f"{failure}\n    inputs {small.inputs} heads {small.heads}{blocks}"


def results(seeds: range, workers: int) -> Iterator[tuple[int, str | None]]:
    if workers <= 1:
        yield from map(one, seeds)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(one, seeds, chunksize=4)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--graphs", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first graph")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    start, failures = time.perf_counter(), 0
    seeds = range(args.seed, args.seed + args.graphs)
    for done, (seed, failure) in enumerate(results(seeds, args.workers), 1):
        if failure is not None:
            failures += 1
            print(f"seed {seed}: {failure}", flush=True)
        if done % 100 == 0 or done == args.graphs:
            seconds = time.perf_counter() - start
            print(f"{done}/{args.graphs} graphs, {failures} failed, {seconds:.0f} s", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
