"""Replayed candidates against the plain loop: cut, repair both ways, run."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import patterns_attention  # noqa: F401  each adds its cases
import patterns_flow  # noqa: F401
import patterns_shared  # noqa: F401
import pytest
import torch
from oracle import random_plan, randomise
from test_patterns import CASES  # every file of patterns has registered its own
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fxprune.cut import cut
from fxprune.fitness import FinalFitness, final_rounds
from fxprune.observe import observe
from fxprune.repair import LeastSquares
from fxprune.replay import Replay, Snapshot, Snapshots, affordable
from fxprune.sequential import repair_sequential
from fxprune.traced import Traced, trace
from fxprune.types import PrunePlan

# A sample's output depends on the others in its batch: no part of a batch can be run alone.
MIXED = (
    *("Order-roll all", "Order-of data", "NotZero-error"),
    *("PartsFromData-number", "PartsFromData-tensor"),
)
NAMES = [n for n, c in CASES.items() if c.batch and c.free and n not in MIXED][3::16]
NAMES += sorted({"Mixer", "PointwiseTokens", "PackedSentences"} - {*NAMES})  # each was wrong once


def part(plan: PrunePlan, share: float) -> PrunePlan:
    """The same cut of the first groups alone."""
    return PrunePlan(dict(list(plan.kept.items())[: round(share * len(plan.kept))]))


def plain(
    traced: Traced, once: LeastSquares, plan: PrunePlan, seen: Any, held: Any
) -> list[Tensor]:
    module = cut(traced, plan)
    once.apply(plan, module)
    repair_sequential(traced, plan, module, seen, correct=False)
    with torch.no_grad():
        return [t for batch in held for t in tree_leaves(module(*batch)) if isinstance(t, Tensor)]


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_plain_loop(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    traced = trace(randomise(case.build().double()).eval(), case.example())
    seen, held = [case.example(1, 6), case.example(2, 6)], [case.example(3, 4)]
    once = LeastSquares(traced, observe(traced, seen))
    replay = Replay(traced, seen, held, once.only)
    plans = [random_plan(traced, seed) for seed in range(3)]
    plans += [part(plans[0], 0.5), part(plans[0], 0.8)]
    wanted = [plain(traced, once, p, seen, held) for p in plans]
    for plan, want in zip(plans + plans[::-1], wanted + wanted[::-1], strict=True):
        given = [t for t in tree_leaves(replay.outputs(plan)) if isinstance(t, Tensor)]
        assert len(given) == len(want) > 0
        for a, b in zip(given, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, equal_nan=True)


class Net(nn.Module):
    """Writes in place, and normalises after the next convolution has run."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 10, 3), nn.Conv2d(10, 8, 1)
        self.na, self.nb = nn.BatchNorm2d(12), nn.BatchNorm2d(10)
        self.side, self.out = nn.Conv2d(12, 10, 3, bias=False), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.na(self.a(x)))
        y, z = self.side(x), self.b(x)
        y, z = self.nb(y), torch.relu_(z)
        z = self.c(y.add_(z)).relu_()
        return self.out(z.mean((2, 3)))


def made(max_bytes: int = 1 << 30) -> tuple[Traced, LeastSquares, Replay, Any, Any]:
    torch.manual_seed(0)
    traced = trace(randomise(Net().double()).eval(), torch.zeros(2, 3, 8, 8, dtype=torch.float64))
    g = torch.Generator().manual_seed(1)
    seen, held = torch.randn(2, 20, 3, 8, 8, generator=g, dtype=torch.float64).unbind()
    once = LeastSquares(traced, observe(traced, [seen]))
    return traced, once, Replay(traced, [seen], [held], once.only, max_bytes=max_bytes), seen, held


def test_what_lies_in_front_of_the_first_change_does_not_run_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    traced, _, replay, _, _ = made()
    calls: list[int] = []
    real = torch.nn.functional.conv2d

    def counted(x: Tensor, w: Tensor, *rest: Any) -> Tensor:
        calls.append(len(w))
        return real(x, w, *rest)

    monkeypatch.setattr(torch.nn.functional, "conv2d", counted)
    first, last = (next(g for g in traced.groups if g.n == n) for n in (12, 8))
    plans = [PrunePlan({g.name: tuple(range(4))}) for g in (first, last)]
    both = PrunePlan({**plans[0].kept, **plans[1].kept})
    seen = []
    for plan in [plans[1], plans[0], both]:
        calls.clear()
        replay.outputs(plan)
        seen.append(set(calls))
    assert seen[0] == {4} and 10 in seen[1] and seen[2] == {4}


@pytest.mark.parametrize("max_bytes", [1 << 30, 200_000, 0])
def test_in_place_writes_and_a_full_store_do_no_harm(max_bytes: int) -> None:
    traced, once, replay, seen, held = made(max_bytes)
    for plan in [random_plan(traced, seed) for seed in (0, 1, 2, 1, 0)]:
        (want,) = plain(traced, once, plan, [seen], [(held,)])
        torch.testing.assert_close(replay.outputs(plan)[0], want, rtol=1e-9, atol=1e-11)
        assert replay.kept.bytes <= max_bytes


def test_threads_agree_and_the_model_stays_as_it_is() -> None:
    traced, _, replay, _, _ = made()
    before = {k: t.clone() for k, t in traced.graph_module.state_dict().items()}
    plans = [random_plan(traced, seed) for seed in range(4)] * 2
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(replay.outputs, plans))
    for plan, found in zip(plans, together, strict=True):
        assert torch.equal(found[0], replay.outputs(plan)[0])
    assert all(torch.equal(t, before[k]) for k, t in traced.graph_module.state_dict().items())


def test_mending_gives_the_module_whose_outputs_were_replayed() -> None:
    traced, _, replay, _, held = made()
    plan = random_plan(traced, 5)
    module = cut(traced, plan)
    replay.mend(plan, module)
    torch.testing.assert_close(module(held), replay.outputs(plan)[0], rtol=1e-9, atol=1e-11)


def test_large_samples_are_fewer() -> None:
    traced, once, replay, *_ = made()
    assert sum(replay.original.sizes) == 20 and len(replay.outputs(PrunePlan({}))[0]) == 20
    x = torch.randn(60, 3, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for sample_bytes, repair, compared in ((1, 60, 60), (1 << 20, 16, 16)):
        few = Replay(traced, [x], [x], once.only, max_live=(1 << 20) * 40 // sample_bytes)
        assert sum(few.original.sizes) == repair
        assert len(few.outputs(PrunePlan({}))[0]) == compared


def test_samples_count_with_their_own_memory_not_with_that_of_the_data_they_are_cut_from() -> None:
    _, once, replay, *_ = made()
    x = torch.randn(60, 3, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    much = torch.cat([x, x.new_zeros(3000, 3, 8, 8)])[:60]
    for given in (x, much):
        few = Replay(replay.traced, [given], [given], once.only, max_live=4 << 20)
        assert sum(few.original.sizes) == len(few.outputs(PrunePlan({}))[0]) == 60


def test_snapshots_that_served_stay_longest() -> None:
    store = Snapshots(100)
    for name in "abcd":
        store.put((name, ()), Snapshot([], {}, 25))
    assert store.get(("a", ())) is not None
    store.put(("e", ()), Snapshot([], {}, 25))
    store.put(("f", ()), Snapshot([], {}, 10))
    store.put(("too large", ()), Snapshot([], {}, 26))
    assert {k[0] for k in store.held} == {"a", "d", "e", "f"} and store.bytes == 85


def test_dear_samples_are_fewer_and_comparisons_at_the_end_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(800, 5))
    traced = trace(net.eval(), torch.zeros(2, 3, 10, 10))
    one = 3 * 9 * 8 * 100 + 800 * 5
    monkeypatch.setattr("fxprune.replay.MAX_MACS", 100 * one)
    assert affordable(traced) == 100
    seen = [torch.randn(50, 3, 10, 10), torch.randn(150, 3, 10, 10)]
    held_out = [torch.randn(90, 3, 10, 10)]
    once = LeastSquares(traced, observe(traced, seen))
    final = FinalFitness(traced, once, seen, held_out, lambda _: 0.0)

    def counted(batches: Any) -> int:
        return sum(len(tree_leaves(b)[0]) for b in batches)

    for limit, samples, rough, whole in (
        (10**6, (128, 90), (64, 90), (200, 90)),
        (150, (100, 50), (64, 50), (200, 90)),
        (100, (67, 33), None, (64, 33)),
        (3, (16, 16), None, (16, 16)),
    ):
        monkeypatch.setattr("fxprune.replay.MAX_MACS", limit * one)
        replay = Replay(traced, seen, held_out, once.only)
        inputs, held = replay.inputs, replay.held_out
        assert (counted(inputs[:-held]), counted(inputs[-held:])) == samples
        first, last = final_rounds(final, divergence=True)
        found = [(counted(f.seen), counted(f.held_out)) for f in (first, last) if f is not None]
        assert found == [r for r in (rough, whole) if r is not None]
        assert final_rounds(final, divergence=False)[0] is None
