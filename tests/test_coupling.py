"""Groups of hand-made nets, known beforehand."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
import torch
from patterns import CASES
from torch import Tensor, nn

from fxprune.traced import Traced, trace
from fxprune.types import ChannelGroup


class Residual(nn.Module):
    """stem 8 -> two residual blocks with inner widths 6 and 4 -> classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.n = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.p1, self.q1 = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 1)
        self.p2, self.q2 = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.n(self.stem(x)).relu()
        y = y + self.q1(self.p1(y).relu())
        y = y + self.q2(self.p2(y).relu())
        return self.fc(y.mean((2, 3)))


IMAGE = torch.zeros(2, 3, 8, 8)


def free(traced: Traced) -> list[ChannelGroup]:
    return [g for g in traced.groups if g.locked is None]


def members(group: ChannelGroup) -> set[tuple[str, int]]:
    return {(m.param, m.dim) for m in group.members}


def index(group: ChannelGroup, param: str, dim: int) -> np.ndarray:
    (found,) = [m.index for m in group.members if (m.param, m.dim) == (param, dim)]
    return found


def test_residual_net() -> None:
    traced = trace(Residual(), IMAGE)
    by_size = {g.n: g for g in free(traced)}
    assert sorted(by_size) == [4, 6, 8]
    norm = {(f"n.{p}", 0) for p in ("weight", "bias", "running_mean", "running_var")}
    assert members(by_size[8]) == norm | {
        ("stem.weight", 0), ("stem.bias", 0), ("p1.weight", 1), ("q1.weight", 0), ("q1.bias", 0),
        ("p2.weight", 1), ("q2.weight", 0), ("q2.bias", 0), ("fc.weight", 1),
    }  # fmt: skip
    assert members(by_size[6]) == {("p1.weight", 0), ("p1.bias", 0), ("q1.weight", 1)}
    assert members(by_size[4]) == {("p2.weight", 0), ("p2.bias", 0), ("q2.weight", 1)}
    for g in by_size.values():
        assert g.rows == 1 and g.overlaps == ()
        for m in g.members:
            assert np.array_equal(m.index, np.arange(g.n)[:, None])


def test_locks_say_why() -> None:
    traced = trace(Residual(), IMAGE)
    reasons = {frozenset(members(g)): g.locked for g in traced.groups if g.locked}
    assert reasons[frozenset({("fc.weight", 0), ("fc.bias", 0)})] == "model output"
    assert "fixed" in (reasons[frozenset({("stem.weight", 1)})] or "")
    assert set(traced.locked) == {g.name for g in traced.groups if g.locked}


def test_consumers_in_execution_order() -> None:
    traced = trace(Residual(), IMAGE)
    assert [c.weight for c in traced.consumers] == [
        f"{n}.weight" for n in ("stem", "p1", "q1", "p2", "q2", "fc")
    ]
    assert [c.kind for c in traced.consumers] == ["conv"] * 5 + ["linear"]
    assert traced.consumers[0].bias == "stem.bias"
    assert traced.consumers[0].norm == "n" and traced.consumers[1].norm is None
    by_size = {g.n: g for g in free(traced)}
    keys = {c.weight: c.key for c in traced.consumers}
    assert {u.consumer for u in by_size[8].uses} == {
        keys["p1.weight"], keys["p2.weight"], keys["fc.weight"],
    }  # fmt: skip
    (use,) = by_size[6].uses
    assert use.consumer == keys["q1.weight"] and use.index.shape == (6, 1)


def test_flatten_gives_each_channel_its_positions() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 5, 3, padding=1), nn.Linear(5 * 64, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).flatten(1))

    (group,) = free(trace(Flat(), IMAGE))
    expected = np.arange(5 * 64).reshape(5, 64)
    assert np.array_equal(np.sort(index(group, "b.weight", 1), 1), expected)


def test_concat_puts_parts_side_by_side() -> None:
    class Cat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1)
            self.b = nn.Conv2d(13, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.cat([self.a(x), x, self.c(x)], 1))

    by_size = {g.n: g for g in free(trace(Cat(), IMAGE))}
    assert index(by_size[4], "b.weight", 1).ravel().tolist() == [0, 1, 2, 3]
    assert index(by_size[6], "b.weight", 1).ravel().tolist() == [7, 8, 9, 10, 11, 12]


def test_concat_with_itself_takes_both_positions() -> None:
    (group,) = free(trace(CASES["ConcatItself"].build(), IMAGE))
    assert index(group, "b.weight", 1).tolist() == [[i, i + 8] for i in range(8)]


def test_depthwise_goes_with_its_input() -> None:
    group = next(g for g in free(trace(CASES["DepthwiseMultiplier"].build(), IMAGE)) if g.n == 6)
    assert {("a.weight", 0), ("d.weight", 0), ("e.weight", 0)} <= members(group)
    assert index(group, "e.weight", 0).tolist() == [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(6)]


def test_grouped_convolution_is_a_balanced_block() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.g = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 20, 3, groups=4)
            self.b = nn.Conv2d(20, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.g(self.a(x)))

    traced = trace(Grouped(), IMAGE)
    outputs = next(g for g in free(traced) if g.n == 20)
    assert (outputs.rows, outputs.width) == (4, 5)
    inputs = next(g for g in free(traced) if ("a.weight", 0) in members(g) and g is not outputs)
    assert inputs.n // inputs.rows == 3 or inputs.n == 3, "3 inputs of each convolution group"
    whole = [g for g in free(traced) if g.n == 4 and set(g.overlaps) >= {outputs.name}]
    assert whole, "whole convolution groups may go too"


def test_heads_and_head_dims_overlap() -> None:
    traced = trace(CASES["Separate"].build(), torch.zeros(2, 9, 16))
    heads = next(g for g in free(traced) if g.n == 4 and g.overlaps)
    dims = [traced.group(n) for n in heads.overlaps]
    assert all(heads.name in d.overlaps and d.rows == 4 and d.n == 16 for d in dims)
    qk = next(d for d in dims if ("q.weight", 0) in members(d))
    assert ("k.weight", 0) in members(qk)
    v = next(d for d in dims if ("v.weight", 0) in members(d))
    assert ("proj.weight", 1) in members(v)


def test_masks_follow_rows_and_columns() -> None:
    traced = trace(CASES["Separate"].build(), torch.zeros(2, 9, 16))
    heads = next(g for g in free(traced) if g.n == 4 and g.overlaps)
    mask = traced.masks(traced.plan({heads.name: (0, 3)}))
    assert mask[-1] and len(mask) == traced.n_classes + 1
    kept = mask[traced.param_classes["q.weight", 0]]
    assert np.flatnonzero(kept).tolist() == [0, 1, 2, 3, 12, 13, 14, 15]


def test_channels_of_the_residual_stream_are_seen_at_its_nodes() -> None:
    traced = trace(Residual(), IMAGE)
    stream = next(g for g in free(traced) if g.n == 8)
    inner = next(g for g in free(traced) if g.n == 6)
    assert {"stem", "n", "q1", "q2"} <= set(stream.nodes)
    assert "p1" in inner.nodes and "p1" not in stream.nodes


def test_networkx_view() -> None:
    traced = trace(Residual(), IMAGE)
    graph = traced.to_networkx()
    assert isinstance(graph, nx.Graph) and nx.is_bipartite(graph)
    stream = next(g for g in free(traced) if g.n == 8)
    assert graph.nodes[stream.name]["n"] == 8 and graph.nodes[stream.name]["locked"] is None
    assert "param:fc.weight" in graph[stream.name]


def test_group_names_are_unique_and_stable() -> None:
    first, second = trace(Residual(), IMAGE), trace(Residual(), IMAGE)
    names = [g.name for g in first.groups]
    assert len(set(names)) == len(names)
    assert names == [g.name for g in second.groups]
    assert {"stem", "p1", "p2"} <= {g.name for g in free(first)}


def test_groups_do_not_depend_on_the_batch() -> None:
    one, many = trace(Residual(), IMAGE[:1]), trace(Residual(), torch.zeros(5, 3, 8, 8))
    assert [(g.name, g.n, members(g), g.locked) for g in one.groups] == [
        (g.name, g.n, members(g), g.locked) for g in many.groups
    ]


def test_unknown_op_locks_with_its_name() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m, self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.fft.fft(self.a(self.m(x).relu())).real)

    traced = trace(Odd(), torch.randn(2, 4))
    assert [g.name for g in free(traced)] == ["m"]
    assert "fft" in (traced.group("a").locked or "")


@pytest.mark.parametrize("round_to", [1, 8, 16])
def test_steps_leave_at_least_four(round_to: int) -> None:
    for g in free(trace(Residual(), IMAGE)):
        choices = g.choices(round_to)
        assert choices[-1] == g.width and len(choices) >= min(4, g.width)
        assert (np.diff(choices) > 0).all()
