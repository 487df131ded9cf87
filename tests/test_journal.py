"""The journal: a search that was killed anywhere ends in the plan of the undisturbed one."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from allocate_fakes import Fake, chain, problem

from fxprune import allocate
from fxprune.allocate.journal import Journal
from fxprune.errors import OutputError
from fxprune.types import PrunePlan

HERE = Path(__file__).parent
STRATEGIES = ("local", "evolution", "random", "greedy")


def model() -> Fake:
    return chain(np.random.default_rng(5), [64, 96, 48, 80])


def loss_of(fake: Fake) -> Callable[[PrunePlan], float]:
    weight = np.random.default_rng(0).gamma(0.7, 1.0, len(fake.groups))

    def loss(plan: PrunePlan) -> float:
        cut = [1 - len(plan.kept.get(g.name, range(g.n))) / g.n for g in fake.groups]
        return float(weight @ np.square(cut) + 0.01 * np.sin(20 * np.sum(cut)))

    return loss


def search(path: Path | None, name: str = "local", **options: Any) -> PrunePlan:
    fake = model()
    loss = options.pop("loss", loss_of(fake))
    options = {"max_evaluations": 24, "identity": "fake", "journal": path} | options
    made = problem(fake, 0.4, fitness=loss, finals=lambda p: 2 * loss(p) - 0.1, **options)
    return allocate.get(name)(made)


def test_every_event_is_on_disk_when_it_happens(tmp_path: Path) -> None:
    path = tmp_path / "search.jsonl"
    fake = model()
    loss = loss_of(fake)
    lines: list[int] = []

    def looking(plan: PrunePlan) -> float:
        lines.append(path.read_text().count('"evaluated"'))
        return loss(plan)

    plan = search(path, loss=looking)
    count = plan.meta["evaluations"]
    assert lines[:count] == list(range(count))
    events = [json.loads(line) for line in path.read_text().splitlines()]
    assert events[0]["allocation"] == "local" and events[0]["groups"] == ["g0", "g1", "g2", "g3"]
    evaluated = [e for e in events if e.get("event") == "evaluated"]
    assert [e["fitness"] for e in evaluated] == [t["fitness"] for t in plan.meta["trace"]]
    accepted = [e["kept"] for e in events if e.get("event") == "accepted"]
    assert len(accepted) == sum(t["accepted"] for t in plan.meta["trace"])
    finals = [e["fitness"] for e in events if e.get("event") == "final"]
    assert finals == [f["final"] for f in plan.meta["finalists"]]


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_journal_that_ends_anywhere_leads_to_the_same_plan(tmp_path: Path, name: str) -> None:
    path = tmp_path / "search.jsonl"
    whole = search(path, name)
    assert search(None, name).to_json() == whole.to_json()
    body = path.read_bytes()
    rng = np.random.default_rng(0)
    for end in [0, 1, len(body) - 1, len(body), *rng.integers(0, len(body), 3).tolist()]:
        path.write_bytes(body[:end])
        asked: list[PrunePlan] = []
        loss = loss_of(model())

        def counted(plan: PrunePlan, asked: list[PrunePlan] = asked, loss: Any = loss) -> float:
            asked.append(plan)
            return loss(plan)

        assert search(path, name, loss=counted).to_json() == whole.to_json()
        done = body[:end].count(b'"evaluated"') - (0 if body[:end].endswith(b"\n") else 1)
        fresh = len(asked) - len(whole.meta["finalists"])
        assert fresh <= whole.meta["evaluations"] - max(0, done - 1)
        again = path.read_bytes()
        assert again.count(b"\n") == body.count(b"\n")


SCRIPT = """
import os, signal, sys
from pathlib import Path
import test_journal as t
fake = t.model()
loss, left = t.loss_of(fake), int(sys.argv[2])
def deadly(plan):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return loss(plan)
t.search(Path(sys.argv[1]), loss=deadly)
"""


def test_a_killed_process(tmp_path: Path) -> None:
    path = tmp_path / "search.jsonl"
    command = [sys.executable, "-c", SCRIPT, str(path), "7"]
    assert subprocess.run(command, check=False, cwd=HERE).returncode == -9
    with path.open("ab") as file:
        file.write(b'{"event": "evaluated", "kept": [8, 1')  # torn
    assert search(path).to_json() == search(None).to_json()


def test_time_that_was_spent_before_counts(tmp_path: Path) -> None:
    path = tmp_path / "search.jsonl"
    first = search(path, max_seconds=1e-6)
    assert first.meta["evaluations"] == 1
    lines = path.read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if "evaluated" in line)
    lines[at] = json.dumps({**json.loads(lines[at]), "seconds": 100.0})
    path.write_text("\n".join(lines) + "\n")
    assert search(path, max_seconds=99).meta["evaluations"] == 1
    assert search(path, max_seconds=1000).meta["evaluations"] > 10


def test_the_best_so_far_is_returned_when_the_time_is_over() -> None:
    loss = loss_of(model())

    def slow(plan: PrunePlan) -> float:
        time.sleep(0.05)
        return loss(plan)

    plan = search(None, loss=slow, max_seconds=0.5)
    assert 2 <= plan.meta["evaluations"] <= 11
    best = min(t["fitness"] for t in plan.meta["trace"] if t["stage"] not in ("whole", "alone"))
    assert min(f["fitness"] for f in plan.meta.get("finalists", [plan.meta])) == best


def test_another_search_and_damage_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "search.jsonl"
    search(path)
    with pytest.raises(OutputError, match="another search"):
        search(path, identity="other data")
    lines = path.read_bytes().splitlines(keepends=True)
    for wrong in (b"nonsense\n", b"[1]\n", b'{"event": "evaluated"}\n'):
        path.write_bytes(b"".join([lines[0], lines[1], wrong, *lines[2:]]))
        with pytest.raises(OutputError, match="line 3"):
            search(path)
    with pytest.raises(OutputError, match="cannot be written"):
        search(tmp_path)


def test_values_come_back_bit_by_bit(tmp_path: Path) -> None:
    values = [0.1, 1 / 3, 5e-324, 1.7e308, float("inf"), -2.5]
    with Journal(tmp_path / "j", {"subject": "s"}) as journal:
        for i, v in enumerate(values):
            journal.add("evaluated", (i,), v, 1.5)
    with Journal(tmp_path / "j", {"subject": "s"}) as journal:
        assert [journal.known("evaluated", (i,)) for i in range(6)] == values
        assert journal.known("final", (0,)) is None and journal.seconds == 1.5
