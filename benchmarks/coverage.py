"""Prunes every model of a library to half its MACs and holds each result to the oracle.

    python benchmarks/coverage.py --library torchvision --workers 2     all 109 models
    python benchmarks/coverage.py --library timm --timm-modules         the smallest of each module
    python benchmarks/coverage.py --show --onnx                         21 models, ONNX verified
    python benchmarks/coverage.py --table                               docs/coverage.md anew

Each model runs in a process of its own, in one thread, under a limit of time and of memory. Results
are appended to runs/coverage/results.jsonl as they come; a model that is there is not run again
(--again right, wrong, error or all runs those once more). At the end docs/coverage.md is written.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import coverage_table
import zoo

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SHOW = (
    "resnet18,resnet50,densenet121,mobilenet_v2,mobilenet_v3_large,efficientnet_b0,"
    "shufflenet_v2_x1_0,googlenet,inception_v3,squeezenet1_1,resnext50_32x4d,regnet_y_400mf,"
    "vgg11_bn,alexnet,convnext_tiny,vit_b_16,swin_t,swin_v2_t,maxvit_t,deeplabv3_resnet50,"
    "lraspp_mobilenet_v3_large"
)
Row = dict[str, Any]
Key = tuple[str, str, str]


def key(row: Row) -> Key:
    """Library, name and part of the run ("onnx" or "")."""
    return row["library"], row["name"], row.get("part", "")


def read(path: Path) -> dict[Key, Row]:
    """The last row of each model; a line cut short by a crash is left out."""
    rows: dict[Key, Row] = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows[key(row)] = row
    return rows


def commit() -> str:
    """The commit of the working tree, with a plus sign where fxprune/ has changes."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout

    name = git("rev-parse", "--short", "HEAD").strip()
    return name + ("+" if git("status", "--porcelain", "fxprune") else "")


def run_one(library: str, name: str, options: argparse.Namespace) -> Row:
    """One model in a process of its own; a process that dies gives a row that says how."""
    row: Row = {"library": library, "name": name, "status": "stopped"}
    start = time.perf_counter()
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(library, name, options, sender))
    process.start()
    sender.close()
    try:
        if receiver.poll(options.time):
            row |= receiver.recv()
        else:
            row["reason"] = f"not done in {options.time:g} s"
            process.kill()
    except EOFError:
        process.join()
        row["reason"] = f"the process ended with code {process.exitcode}"
    process.join()
    row |= {"seconds": time.perf_counter() - start, "commit": commit()}
    row["part"] = "onnx" if options.onnx else ""
    return row


def child(library: str, name: str, options: argparse.Namespace, sender: Connection) -> None:
    """In the process of one model: set the limit, check it, send the row."""
    import torch
    from coverage_model import check

    limit = int(options.memory * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    torch.set_num_threads(1)
    row = check(
        library,
        name,
        allocation=options.allocation,
        onnx=options.onnx,
        attention_below=options.attention_below,
    )
    row["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    sender.send(json.loads(json.dumps(row, default=str)))


def prepare() -> None:
    """Processes are forked from a server that has imported the libraries already."""
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    multiprocessing.set_forkserver_preload(["__main__", "coverage_model", "torchvision", "timm"])


def run_all(names: list[str], options: argparse.Namespace) -> None:
    """The models that have no result yet, a line of output and of the file for each."""
    options.out.parent.mkdir(parents=True, exist_ok=True)
    known, part = read(options.out), "onnx" if options.onnx else ""
    again = set(options.again.split(",")) if options.again else set()
    todo = []
    for name in names:
        row = known.get((options.library, name, part))
        if row is None or "all" in again or row["status"] in again:
            todo.append(name)
    print(f"{len(todo)} of {len(names)} models to run", flush=True)
    lock, count = threading.Lock(), iter(range(1, len(todo) + 1))

    def one(name: str) -> None:
        this = (options.library, name, part)
        if read(options.out).get(this) != known.get(this):
            return  # another run, on the same file, was faster
        row = run_one(options.library, name, options)
        with lock:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{next(count):4d} {coverage_table.short(row)}", flush=True)

    prepare()
    with ThreadPoolExecutor(options.workers) as pool:
        list(pool.map(one, todo))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--library", choices=("torchvision", "timm"), default="torchvision")
    p.add_argument("--only", default="*", help="shell patterns, separated by commas")
    p.add_argument("--skip", default="", help="shell patterns of models to leave out")
    p.add_argument("--timm-modules", action="store_true", help="the smallest of each timm module")
    p.add_argument("--show", action="store_true", help="the 21 models of the first table")
    p.add_argument("--onnx", action="store_true", help="export and verify each")
    p.add_argument("--allocation", default="uniform")
    p.add_argument("--attention-below", type=float, default=6.0, help="GMACs; above, l2 ranks")
    p.add_argument("--workers", type=int, default=1)
    p.add_argument("--time", type=float, default=300.0, help="seconds for one model")
    p.add_argument("--memory", type=float, default=14.0, help="GiB of address space for one model")
    p.add_argument("--again", default="", help="statuses to run once more, or all")
    p.add_argument("--out", type=Path, default=ROOT / "runs" / "coverage" / "results.jsonl")
    p.add_argument("--table", action="store_true", help="only write docs/coverage.md")
    options = p.parse_args()
    if not options.table:
        only = SHOW if options.show else options.only
        names = zoo.names(options.library, only, options.timm_modules)
        left_out = set(zoo.names(options.library, options.skip)) if options.skip else set()
        if not (options.show or options.onnx):  # the first table's models count in the second
            done = read(options.out)
            left_out |= {n for n in names if (options.library, n, "onnx") in done}
        run_all([n for n in names if n not in left_out], options)
    page = ROOT / "docs" / "coverage.md"
    page.write_text(coverage_table.page(list(read(options.out).values())), encoding="utf-8")
    print(f"wrote {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
