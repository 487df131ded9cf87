"""Workers: the same plan with any number of them, also when one is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cloudpickle
import distributed
import pytest
import torch
from torch import Tensor, nn

from fxprune import workers
from fxprune.errors import InternalError, ModelError, SpecError
from fxprune.inputs import Inputs
from fxprune.models import load_model
from fxprune.observe import observe
from fxprune.pipeline import PruneResult, prune
from fxprune.repair import LeastSquares
from fxprune.traced import trace
from fxprune.types import PrunePlan
from fxprune.workers import Received, Recipe, Shipped, local_workers


def net() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in [(3, 24), (24, 32), (32, 40)]:
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 5)).eval()


def images(n: int = 48) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def pruned(**options: Any) -> PruneResult:
    options = {"progress": False, "max_evaluations": 9, "seed": 1} | options
    return prune(net(), images(2), 0.5, images(), **options)


def recipe(model: nn.Module) -> Recipe:
    return Recipe(model, Inputs((images(2),)), [images()], [images(8)], "lstsq")


def same(a: PruneResult, b: PruneResult) -> bool:
    return a.plan.to_json() == b.plan.to_json() and all(
        torch.equal(x, y)
        for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True)
    )


@pytest.fixture(scope="module")
def alone() -> PruneResult:
    return pruned()


def test_one_and_two_workers_give_what_none_gives(alone: PruneResult) -> None:
    with ProcessPoolExecutor(1, get_context("fork")) as pool:
        assert same(pruned(executor=pool), alone)
    assert same(pruned(workers=2), alone)


def test_threads_send_nothing(alone: PruneResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_packed", pytest.fail)
    with ThreadPoolExecutor(2) as pool:
        assert same(pruned(executor=pool), alone)


def test_a_dask_worker_may_die(alone: PruneResult) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the cluster's own making, on ports and heartbeats
        with (
            distributed.LocalCluster(
                n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
            ) as cluster,
            distributed.Client(cluster) as client,
        ):
            executor = client.get_executor()
            victim = executor.submit(os.getpid).result()
            calls = []
            real = executor.map

            def killing(*args: Any) -> Any:
                calls.append(len(calls))
                if len(calls) == 2:
                    os.kill(victim, signal.SIGKILL)
                return real(*args)

            executor.map = killing
            assert same(pruned(executor=executor), alone)
    assert len(calls) > 2


def test_a_broken_pool_is_replaced_by_this_process(alone: PruneResult) -> None:
    with ProcessPoolExecutor(1, get_context("fork")) as pool:
        victim = pool.submit(os.getpid).result()
        os.kill(victim, signal.SIGKILL)
        with pytest.warns(UserWarning, match="goes on in this process"):
            assert same(pruned(executor=pool), alone)


def test_the_file_is_private_checked_and_removed(tmp_path: Path) -> None:
    model = net()
    made = recipe(model)
    traced = trace(model, made.inputs)
    plan = PrunePlan({traced.groups[0].name: tuple(range(8))})
    with Shipped(made, traced) as shipped:
        path, digest = shipped.file()
        assert shipped.file() == (path, digest) and Path(path).name == digest
        assert Path(path).parent.stat().st_mode & 0o077 == 0
        there = Received(path, digest)
        assert shipped.__reduce__() == (Received, (path, digest))
        assert there(plan) == shipped(plan)
        built = workers._known[digest]
        assert there(plan) == shipped(plan) and workers._known[digest] is built
        Path(path).write_bytes(b"something else")
        workers._known.clear()
        with pytest.raises(InternalError, match="not what it was"):
            there(plan)
    assert not Path(path).parent.exists()
    with pytest.raises(SpecError, match="TMPDIR"):
        there(plan)


def test_classes_that_cannot_be_imported_travel_by_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from torch import nn\n"
        "class Mine(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 3)\n"
        "    def forward(self, x):\n"
        "        return self.b(self.a(x).relu()).mean((2, 3))\n"
    )
    model, _ = load_model(f"{file}:Mine", None, "2x3x8x8")
    body = workers._packed((recipe(model), []))
    monkeypatch.delitem(sys.modules, type(model).__module__)
    sent, _ = cloudpickle.loads(body)
    assert torch.equal(sent.model(images(4)), model(images(4)))


def test_a_model_that_cannot_be_sent_is_named() -> None:
    model = net()
    model.register_forward_hook(lambda *_: None)
    model.file = open(os.devnull, "rb")  # noqa: SIM115
    try:
        with pytest.raises(ModelError, match="cannot be sent"):
            workers._packed((recipe(model), []))
    finally:
        model.file.close()


def test_what_cannot_be_asked_for() -> None:
    with pytest.raises(SpecError, match="workers must be a whole number from 0, got -1"):
        pruned(workers=-1)
    with ThreadPoolExecutor(1) as pool, pytest.raises(SpecError, match="or an executor"):
        pruned(workers=2, executor=pool)
    with local_workers(0) as none:
        assert none is None


def test_an_interrupt_is_left_to_the_main_process() -> None:
    before = signal.getsignal(signal.SIGINT)  # ignored already where a shell runs this behind
    with local_workers(1) as pool:
        assert pool is not None
        assert pool.submit(signal.getsignal, signal.SIGINT).result() == signal.SIG_IGN
    assert signal.getsignal(signal.SIGINT) == before


LONELY = """
import os, signal
from fxprune.workers import local_workers
if __name__ == "__main__":
    with local_workers(1) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_a_process_that_was_killed(tmp_path: Path) -> None:
    (tmp_path / "lonely.py").write_text(LONELY)
    command = [sys.executable, str(tmp_path / "lonely.py")]
    # the worker has the other end of the pipe too: the call returns when both are gone
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == -signal.SIGKILL and int(done.stdout) > 0


def test_the_form_that_repairs_the_probe_better_is_the_one_of_the_search() -> None:
    made = recipe(net())
    traced = trace(made.model, made.inputs)
    plan = PrunePlan({g.name: range(g.n // 2) for g in traced.groups if g.locked is None})
    mend = LeastSquares(traced, observe(traced, made.seen))
    sequential, once = (replace(made, repair=r).fitness(traced, mend) for r in ("lstsq", "once"))
    better = "once" if once(plan) <= sequential(plan) else "lstsq"
    with Shipped(made, traced, mend, plan) as shipped:
        assert shipped.form == "lstsq"  # nothing was asked yet
        assert shipped(plan) == min(once(plan), sequential(plan))
        assert shipped.form == better
        assert shipped.identity() == replace(made, repair=better).identity()
        assert Received(*shipped.file())(plan) == pytest.approx(shipped(plan), rel=1e-6)
    # The one-shot form of moments that are noise cannot be the better one.
    noise = LeastSquares(traced, observe(traced, [torch.randn(2, 3, 8, 8)]))
    assert made.settled(traced, noise, plan)[0].repair == "lstsq"
    other = replace(made, repair="bn")
    assert other.settled(traced, None, plan)[0] is other


def test_identity_tells_weights_samples_and_options_apart() -> None:
    base, changed = recipe(net()), net()
    with torch.no_grad():
        next(changed.parameters())[0, 0, 0, 0] += 1e-6
    others = [
        recipe(changed),
        Recipe(base.model, base.inputs, [images() + 1], base.held_out, "lstsq"),
        Recipe(base.model, base.inputs, base.seen, [images(9)], "lstsq"),
        Recipe(base.model, base.inputs, base.seen, base.held_out, "bn"),
        Recipe(base.model, base.inputs, base.seen, base.held_out, "lstsq", len),  # type: ignore[arg-type]
    ]
    assert recipe(net()).identity() == base.identity()
    assert len({r.identity() for r in [base, *others]}) == 6
