"""Fine-tuning: steps against hand-written ones; a kill at any moment changes nothing."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import random
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from tuning import Shaky, batches, loader, net, same, state, tune

import fxprune
from fxprune.errors import DataError, InputError, ModelError, SpecError
from fxprune.tune import state as files

# --- what it learns -------------------------------------------------------------------------------


def test_it_learns_and_leaves_everything_alone() -> None:
    model, data = net().eval(), loader()
    model.norm.train()
    assert data.generator is not None
    before, order = state(model), data.generator.get_state()

    def accuracy(m: nn.Module) -> float:
        data = Shaky(200)
        x, y = zip(*(data[i] for i in range(200)), strict=True)
        assert not m.training and not torch.is_grad_enabled()
        return float((m(torch.stack(x)).argmax(1) == torch.tensor(y)).double().mean())

    with torch.no_grad():
        start = accuracy(copy.deepcopy(model).eval())
    rng = torch.get_rng_state()
    legacy, python = np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    result = tune(model, data, epochs=6, lr=0.02, evaluate=accuracy)
    assert same(state(model), before) and result.model is not model
    assert not model.training and model.norm.training
    assert not result.model.training and result.model.norm.training
    assert torch.equal(rng, torch.get_rng_state()) and random.getstate() == python
    assert np.array_equal(legacy, np.random.get_state()[1])  # noqa: NPY002
    assert torch.equal(order, data.generator.get_state())
    assert all(p.grad is None for p in result.model.parameters())
    scores = [e.score for e in result.history]
    assert len(scores) == 6 and max(scores) > max(0.95, start)  # type: ignore[type-var]
    assert result.history[-1].loss < 0.5 * result.history[0].loss
    assert result.best == 1 + scores.index(max(scores))  # type: ignore[type-var]


def test_the_best_epoch_is_what_comes_back() -> None:
    seen: list[dict[str, Tensor]] = []

    def evaluate(m: nn.Module) -> float:
        seen.append(state(m))
        return [1.0, 3.0, 2.0, 3.0][len(seen) - 1]

    result = tune(net(), batches(), epochs=4, evaluate=evaluate)
    assert result.best == 2 and [e.score for e in result.history] == [1, 3, 2, 3]
    assert same(state(result.model), seen[1]) and not same(seen[1], seen[2])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_steps_equal_hand_written_ones(optimizer: str) -> None:
    """Warm-up and cosine, clipping, decay of matrices alone, the mixed loss."""
    model, teacher, data = net(drop=0.0, norm=False), net(drop=0.0, norm=False), batches(4)
    with torch.no_grad():
        teacher.two.weight.mul_(-2)
    given = {"optimizer": optimizer, "lr": 0.05, "weight_decay": 0.1, "clip": 0.5}
    result = tune(
        model, data, 1, teacher=teacher, distill=0.3, temperature=3.0, warm_up=0.5, **given
    )
    other = copy.deepcopy(model)
    kinds = {
        "sgd": lambda g: torch.optim.SGD(g, 1.0, 0.9, nesterov=True),
        "adamw": torch.optim.AdamW,
    }
    matrices = [p for p in other.parameters() if p.ndim > 1]
    vectors = [p for p in other.parameters() if p.ndim == 1]
    by_hand = kinds[optimizer](
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    )
    for (x, y), share in zip(data, (1 / 3, 2 / 3, 1.0, 0.5), strict=True):
        for group in by_hand.param_groups:
            group["lr"] = 0.05 * share
        p, q = (teacher(x).detach() / 3).softmax(1), (other(x) / 3).log_softmax(1)
        soft = (p * (p.log() - q)).sum(1).mean() * 9
        loss = 0.7 * F.cross_entropy(other(x), y) + 0.3 * soft
        by_hand.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        by_hand.step()
    for name, value in other.state_dict().items():
        torch.testing.assert_close(result.model.state_dict()[name], value)


def test_the_average_is_what_is_returned(tmp_path: Path) -> None:
    data, path = batches(3), tmp_path / "run"
    steps: list[dict[str, Tensor]] = []

    def source() -> Iterator[Any]:
        for item in data:
            found = files.read(path)
            if found is not None:
                steps.append(found[0]["model"])
            yield item

    class Source:
        def __iter__(self) -> Iterator[Any]:
            return source()

        def __len__(self) -> int:
            return len(data)

    result = tune(net(), Source(), 1, ema=0.75, checkpoint=path, save_every=0)
    found = files.read(path)
    assert found is not None
    one, two, three = *steps, found[0]["model"]
    expected = 0.75 * (0.75 * one["one.weight"] + 0.25 * two["one.weight"])
    expected += 0.25 * three["one.weight"]
    torch.testing.assert_close(result.model.one.weight.detach(), expected)


def test_without_targets_it_learns_from_the_teacher_alone() -> None:
    teacher = net(drop=0.0, norm=False)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student.two.weight.zero_()
    x = [b[0] for b in batches(8)]
    result = tune(student, x, 10, teacher=teacher, lr=0.02, temperature=1.0)
    held = torch.randn(64, 6)
    target = teacher(held).softmax(1)
    start, end = (
        float((m(held).softmax(1) - target).abs().sum().detach()) for m in (student, result.model)
    )
    assert end < 0.2 * start
    assert teacher.training  # it was, and still is


def test_targets_in_dicts() -> None:
    """The labels are found where inputs have no keywords, and beside what is no input."""
    model = net()
    pruned = fxprune.prune(model, torch.zeros(2, 6), 0.9, repair=None, progress=False,
                           data=[batches(1)[0][0]], allocation="uniform")  # fmt: skip
    pairs = batches()
    given = {"teacher": None, "epochs": 1}
    plain = tune(pruned, pairs, **given)
    for names in (("x", "label"), ("targets", "x")):
        items = [dict(zip(names, p if names[0] == "x" else p[::-1], strict=True)) for p in pairs]
        assert same(state(tune(pruned, items, **given).model), state(plain.model))
    items = [{"x": x, "weight": torch.ones(8), "labels": y} for x, y in pairs]
    assert same(state(tune(pruned, items, **given).model), state(plain.model))


def test_frozen_parameters_stay() -> None:
    model = net()
    model.one.weight.requires_grad_(False)
    result = tune(model, batches())
    assert torch.equal(result.model.one.weight, model.one.weight)
    assert not torch.equal(result.model.two.weight, model.two.weight)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision(precision: str) -> None:
    dtypes: set[torch.dtype] = set()
    model = net(drop=0.0)
    model.two.register_forward_hook(lambda m, a, out: dtypes.add(out.dtype))
    whole = tune(model, batches(), mixed_precision="no", lr=1e-2)
    dtypes.clear()
    mixed = tune(model, batches(), mixed_precision=precision, lr=1e-2)
    assert dtypes == {{"bf16": torch.bfloat16, "fp16": torch.float16}[precision]}
    assert mixed.model.one.weight.dtype == torch.float32
    assert mixed.history[-1].loss == pytest.approx(whole.history[-1].loss, rel=0.05)
    assert not torch.equal(mixed.model.one.weight, whole.model.one.weight)


# --- kill and resume ------------------------------------------------------------------------------


class Dies:
    """Raises at the n-th batch that is fetched, counted over all epochs."""

    def __init__(self, data: Any, at: int) -> None:
        self.data, self.left = data, at
        self.generator = data.generator

    def __iter__(self) -> Iterator[Any]:
        for item in self.data:
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            yield item

    def __len__(self) -> int:
        return len(self.data)


WHOLE = {"epochs": 3, "lr": 0.01, "ema": 0.9, "seed": 11, "save_every": 0.0}


def scored(m: nn.Module) -> float:
    torch.rand(3), np.random.rand(), random.random()  # noqa: NPY002 - must not matter
    return float(m.one.weight.sum())


@pytest.mark.parametrize("seed", [7, None], ids=["own generator", "global generator"])
def test_killed_at_any_batch_and_resumed_it_ends_the_same(tmp_path: Path, seed: int | None) -> None:
    whole = tune(net(), loader(seed), evaluate=scored, checkpoint=tmp_path / "whole", **WHOLE)
    assert whole.steps == 15 and whole.resumed == 0
    for at in (0, 1, 4, 5, 6, 12, 14):
        given = {**WHOLE, "evaluate": scored, "checkpoint": tmp_path / f"{at}"}
        with pytest.raises(KeyboardInterrupt):
            tune(net(), Dies(loader(seed), at), **given)
        torch.rand(5)  # whatever the state is in the new process
        again = tune(net(), loader(seed), **given)
        assert again.resumed == at and again.steps == 15
        assert same(state(again.model), state(whole.model)), at
        assert again.history == whole.history and again.best == whole.best
        done = tune(net(), loader(seed), **given)
        assert done.resumed == 15 and same(state(done.model), state(whole.model))


def test_another_seed_or_order_is_another_result() -> None:
    first = tune(net(), loader(), seed=1)
    assert same(state(first.model), state(tune(net(), loader(seed=8), seed=1).model))
    assert not same(state(first.model), state(tune(net(), loader(), seed=2).model))


class Slow(Dies):
    def __init__(self, data: Any) -> None:
        super().__init__(data, -1)

    def __iter__(self) -> Iterator[Any]:
        for item in self.data:
            time.sleep(0.02)
            yield item


def slowly(given: dict[str, Any]) -> None:
    """In a process of its own, a fresh one: autograd's threads do not survive a fork."""
    tune(net(), Slow(loader()), **given)


def test_sigkill(tmp_path: Path) -> None:
    """A real kill while it writes all the time: what is on disk is whole, and goes on."""
    given = {**WHOLE, "epochs": 12, "checkpoint": tmp_path}
    child = multiprocessing.get_context("spawn").Process(target=slowly, args=(given,))
    child.start()
    end = time.monotonic() + 120
    while not (tmp_path / files.FILE).exists() and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.3)
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    again = tune(net(), loader(), **given)
    whole = tune(net(), loader(), **{**given, "save_every": 1e9, "checkpoint": None})
    assert 0 < again.resumed < 60 == again.steps
    assert same(state(again.model), state(whole.model))


def test_another_run_does_not_take_the_checkpoint(tmp_path: Path) -> None:
    tune(net(), batches(), 1, checkpoint=tmp_path)
    with pytest.raises(SpecError, match=r"lr was None, now 0\.5"):
        tune(net(), batches(), 1, checkpoint=tmp_path, lr=0.5)
    other = nn.Sequential(nn.Linear(6, 4))
    with pytest.raises(ModelError, match="another model"):
        tune(other, batches(), 1, checkpoint=tmp_path)
    assert tune(other, batches(), 1, checkpoint=tmp_path, resume=False).resumed == 0
    (tmp_path / files.FILE).write_bytes(b"half a file")
    with pytest.raises(ModelError, match="not a whole tuning checkpoint"):
        tune(net(), batches(), 1, checkpoint=tmp_path)


# --- what cannot be used --------------------------------------------------------------------------


def forever() -> Iterator[Any]:
    while True:
        yield batches(1)[0]


@pytest.mark.parametrize(
    ("data", "given", "error", "text"),
    [
        ([], {}, DataError, "0 batches"),
        (forever(), {"epochs": 2}, DataError, "empty after one epoch"),
        (forever(), {"epochs": 1}, SpecError, "steps_per_epoch"),
        (torch.zeros(3, 6), {}, DataError, "iterable of batches"),
        ([{"x": torch.zeros(3, 6)}], {}, DataError, "dict"),
        ([torch.zeros(3, 6)], {}, DataError, "nothing to learn"),
        ([(torch.zeros(3, 6), torch.zeros(3, 4))], {}, DataError, "loss="),
        (batches(), {"epochs": 0}, SpecError, "epochs"),
        (batches(), {"optimizer": "adam"}, SpecError, "adamw"),
        (batches(), {"lr": -1}, SpecError, "lr"),
        (batches(), {"lr": float("nan")}, SpecError, "lr"),
        (batches(), {"distill": 2}, SpecError, "distill"),
        (batches(), {"teacher": "orignal"}, SpecError, "teacher"),
        (batches(), {"teacher": nn.Linear(6, 5)}, ModelError, "outputs to compare"),
        (batches(), {"evaluate": lambda m: None}, InputError, "one number"),
        (batches(), {"loss": lambda o, t: o}, InputError, "one number"),
        ([(torch.full((3, 6), torch.nan), torch.zeros(3).long())], {}, ModelError, "step 1"),
    ],
)
def test_what_cannot_be_used_is_named(
    data: Any, given: dict[str, Any], error: type, text: str
) -> None:
    with pytest.raises(error, match=text):
        tune(net(), data, **given)


def test_no_module_and_nothing_to_tune() -> None:
    with pytest.raises(ModelError, match="PruneResult"):
        tune("net", batches())
    with pytest.raises(ModelError, match="requires a gradient"):
        tune(net().requires_grad_(False), batches())


# --- several processes ----------------------------------------------------------------------------


def worker(rank: int, port: int, folder: str, precision: str) -> None:
    """One of two processes, started as ``accelerate launch`` does it."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": str(port),
        "MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true", "LOCAL_WORLD_SIZE": "2",
    }  # fmt: skip
    torch.set_num_threads(1)
    data = loader_of_pairs(batches(7))  # the seventh is left out: not one for each
    given = {"lr": 0.05, "optimizer": "sgd", "mixed_precision": precision}
    result = tune(
        net(drop=0.0, norm=False), data, 2, evaluate=scored, checkpoint=f"{folder}/run", **given
    )
    save_file(state(result.model), f"{folder}/{rank}.safetensors")
    own = [[e.loss, e.score] for e in result.history]
    Path(f"{folder}/{rank}.json").write_text(json.dumps([own, "forward" in vars(result.model)]))


def loader_of_pairs(data: list[tuple[Tensor, Tensor]]) -> DataLoader[Any]:
    x, y = (torch.cat(t) for t in zip(*data, strict=True))
    return DataLoader(TensorDataset(x, y), batch_size=8)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_two_processes_equal_one_with_the_batches_together(tmp_path: Path, precision: str) -> None:
    """Averaged gradients of two batches of 8 are the gradient of one of 16."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    given = (port, str(tmp_path), precision)
    workers = [context.Process(target=worker, args=(rank, *given)) for rank in (0, 1)]
    for w in workers:
        w.start()
    for w in workers:
        w.join(180)
        assert w.exitcode == 0
    first, second = (load_file(tmp_path / f"{r}.safetensors") for r in (0, 1))
    assert same(first, second)
    told = [json.loads((tmp_path / f"{r}.json").read_text()) for r in (0, 1)]
    assert told[0] == told[1] and told[0][1] is False
    data = batches(6)
    pairs = [tuple(map(torch.cat, zip(*data[i : i + 2], strict=True))) for i in (0, 2, 4)]
    one = tune(net(drop=0.0, norm=False), pairs, 2, lr=0.05, optimizer="sgd", evaluate=scored)
    exact = precision == "no"
    close = {"rtol": 1e-5, "atol": 1e-6} if exact else {"rtol": 0.05, "atol": 0.01}
    for name, value in state(one.model).items():
        torch.testing.assert_close(first[name], value, **close)
    losses = [e[0] for e in told[0][0]]
    assert losses == pytest.approx([e.loss for e in one.history], rel=1e-5 if exact else 0.02)
