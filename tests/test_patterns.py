"""Patterns that break other tools: each pruned at random and held to the oracle in float64."""

from __future__ import annotations

import numpy as np
import patterns_attention  # noqa: F401 - registers its cases
import patterns_fields  # noqa: F401 - registers its cases
import patterns_flow  # noqa: F401 - registers its cases
import patterns_foreign  # noqa: F401 - registers its cases
import patterns_fused  # noqa: F401 - registers its cases
import patterns_handmade  # noqa: F401 - registers its cases
import patterns_numbers  # noqa: F401 - registers its cases
import patterns_order  # noqa: F401 - registers its cases
import patterns_recurrent  # noqa: F401 - registers its cases
import patterns_rules  # noqa: F401 - registers its cases
import patterns_shared  # noqa: F401 - registers its cases
import patterns_spans  # noqa: F401 - registers its cases
import patterns_sums  # noqa: F401 - registers its cases
import pytest
import torch
from checks import assert_right, prunable
from oracle import random_plan, randomise
from patterns import CASES, Case
from torch.utils._pytree import tree_leaves

from fxprune.cut import cut
from fxprune.traced import Traced, trace
from fxprune.types import ChannelGroup


def traced_case(case: Case) -> Traced:
    torch.manual_seed(0)
    return trace(randomise(case.build().double()), case.example())


@pytest.mark.parametrize("name", CASES)
def test_pruned_equals_masked_original(name: str) -> None:
    case = CASES[name]
    traced = traced_case(case)
    inputs = [case.example(1), case.example(2, batch=3)] if case.batch else [case.example(1)]
    for seed in range(3):
        plan = random_plan(traced, seed)
        exact = "Einsum" not in name or int(traced.counts(plan).min()) > 1
        assert_right(traced, plan, cut(traced, plan), inputs, exact_macs=exact)


@pytest.mark.parametrize("name", CASES)
def test_what_can_be_pruned(name: str) -> None:
    case = CASES[name]
    traced = traced_case(case)
    missing = set(case.free) - prunable(traced)
    assert not missing, traced.locked
    assert not set(case.locked) & prunable(traced)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_keeping_all_changes_nothing(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model = randomise(case.build().double())
    traced = trace(model, case.example())
    whole, graph, users = (
        tree_leaves(m(*case.example(1)))
        for m in (cut(traced, traced.full_plan()), traced.graph_module, model)
    )
    for a, b, c in zip(whole, graph, users, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-10, atol=1e-10)


# -- heads and head dims -------------------------------------------------------------------------

HEADED = [
    "FusedReshape", "FusedChunk", "Separate", "PackedAttention", "EinsumAttention", "Window",
    "SharedBias",
]  # fmt: skip


def heads_and_dims(traced: Traced, heads: int) -> tuple[ChannelGroup, ChannelGroup]:
    """The group of whole heads, and one of head dims that overlaps it."""
    whole = next(g for g in traced.groups if g.n == heads and g.overlaps and g.locked is None)
    dims = next(g for name in whole.overlaps if (g := traced.group(name)).locked is None)
    return whole, dims


@pytest.mark.parametrize("name", HEADED)
def test_whole_heads_can_go(name: str) -> None:
    case = CASES[name]
    traced = traced_case(case)
    whole, _ = heads_and_dims(traced, 4)
    plan = traced.plan({whole.name: (0, 2, 3)})
    pruned = cut(traced, plan)
    assert_right(traced, plan, pruned, [case.example(1)])
    assert traced.cost(plan).macs < traced.cost().macs


@pytest.mark.parametrize("name", HEADED)
def test_head_dims_can_go(name: str) -> None:
    case = CASES[name]
    traced = traced_case(case)
    whole, dims = heads_and_dims(traced, 4)
    rng = np.random.default_rng(0)
    columns = rng.random((dims.rows, dims.width)).argsort(1)[:, : dims.width // 2]
    rows = np.arange(dims.rows)[:, None] * dims.width
    plan = traced.plan({dims.name: (columns + rows).ravel()})
    assert_right(traced, plan, cut(traced, plan), [case.example(1)])
    assert traced.cost(plan).macs < traced.cost().macs
    both = traced.plan({dims.name: (columns + rows).ravel(), whole.name: (1, 3)})
    assert_right(traced, both, cut(traced, both), [case.example(1)])


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("LinearHeads-matmul", [12, 15]),
        ("LinearHeads-einsum", [12, 15]),
        ("ChannelHeads", [12]),
    ],
)
def test_columns_of_heads_go_apart(name: str, sizes: list[int]) -> None:
    """Dims of queries and keys, and those of values, are groups of their own in the same heads."""
    traced = traced_case(CASES[name])
    (rows,) = (g for g in traced.groups if g.n == 3 and g.locked is None)
    blocks = {g.name: g.n for g in traced.groups if g.rows == 3 and g.locked is None}
    assert sorted(blocks.values()) == sizes
    assert set(rows.overlaps) == set(blocks)


def test_columns_of_a_state_go_apart() -> None:
    """The state that zeros begin has the same columns in all heads."""
    traced = traced_case(CASES["FastWeights"])
    assert sorted(g.n for g in traced.groups if g.locked is None) == [3, 4, 5]
