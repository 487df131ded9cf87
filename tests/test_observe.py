"""Streaming statistics against direct computation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from fxprune import moments, observe
from fxprune.errors import DataError
from fxprune.moments import InputAccumulator, Layout, RunningMoments
from fxprune.traced import trace
from fxprune.types import Consumer


def consumer(kind: str, classes: object, groups: int = 1, **kw: object) -> Consumer:
    base = {"in_dim": 1, "out_dim": 0, "transposed": False, "bias": None, **kw}
    return Consumer("k:0", "k", kind, "w", groups=groups, classes=np.asarray(classes), **base)


def accumulate(c: Consumer, batches: list[torch.Tensor], **kw: object) -> moments.InputStatistics:
    options = {"gamma": 1.0, "p": 2.0, "displacement": True, "units": {}, **kw}
    made = InputAccumulator(c, **options)
    for x in batches:
        made.add(x, len(x))
    return made.result()


def direct_moments(
    x: np.ndarray, gamma: float, p: float, normalise: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """``x`` [B, P, V], position by position."""
    total, first, second = 0.0, 0.0, 0.0
    for sample in x:
        attention = (np.abs(sample) ** p).sum(1)
        attention = attention / attention.mean() if normalise else attention
        for f, row in zip(attention, sample, strict=True):
            total += f**gamma
            first = first + f**gamma * row
            second = second + f**gamma * np.outer(row, row)
    mean = first / total
    return mean, second / total - np.outer(mean, mean)


def direct_displacement(a: np.ndarray) -> np.ndarray:
    """``a`` [B, P, V] -> [V], by making each map."""
    out = np.zeros(a.shape[2])
    for sample in a:
        f = sample.sum(1)
        for c in range(a.shape[2]):
            left = f - sample[:, c]
            moved = f / np.linalg.norm(f) - left / np.linalg.norm(left)
            out[c] += np.linalg.norm(moved) / len(a)
    return out


@pytest.mark.parametrize(("gamma", "p"), [(1.0, 2.0), (0.5, 2.0), (1.0, 1.0), (0.0, 2.0)])
def test_convolution_moments_and_displacement(gamma: float, p: float) -> None:
    x = torch.randn(6, 5, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 1
    seen = accumulate(consumer("conv", range(5)), [x], gamma=gamma, p=p)
    rows = x.flatten(2).transpose(1, 2).numpy()
    mean, cov = direct_moments(rows, gamma, p)
    assert np.allclose(seen.attention.mean, mean, rtol=1e-12, atol=1e-12)
    assert np.allclose(seen.attention.cov[0], cov, rtol=1e-11, atol=1e-12)
    flat = rows.reshape(-1, 5)
    assert np.allclose(seen.plain.cov[0], np.cov(flat.T, bias=True), rtol=1e-11, atol=1e-12)
    assert (seen.attention is seen.plain) == (gamma == 0)
    assert seen.displacement is not None
    assert np.allclose(seen.displacement, direct_displacement(np.abs(rows) ** p), rtol=1e-9)


def test_displacement_of_blocks() -> None:
    x = torch.randn(4, 6, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    units = np.array([[0, 4], [1, 2], [3, 5]])
    seen = accumulate(consumer("conv", range(6)), [x], units={"heads": units})
    a = x.flatten(2).transpose(1, 2).numpy() ** 2
    assert np.allclose(seen.blocks["heads"], direct_displacement(a[..., units].sum(-1)), rtol=1e-9)


def test_displacement_of_tiny_and_whole_channels() -> None:
    """A channel of 1e-9 of the map moves it by 1e-9; the cosine would be lost to rounding."""
    f = torch.tensor([1.0, 0.0], dtype=torch.float64)
    a = torch.tensor([0.0, 1e-9], dtype=torch.float64)
    both = f + a
    moved = moments.displacements(both @ a, a @ a, both @ both)
    assert float(moved) == pytest.approx(1e-9, rel=1e-6)
    whole = moments.displacements(f @ f, f @ f, f @ f)
    assert float(whole) == pytest.approx(math.sqrt(2))
    assert float(moments.displacements(*torch.zeros(3))) == 0.0


def test_samples_are_the_positions_of_a_plain_layer() -> None:
    x = torch.randn(40, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    seen = accumulate(consumer("linear", range(4)), list(x.split(8)))
    mean, cov = direct_moments(x.numpy()[None], 1.0, 2.0, normalise=False)
    assert np.allclose(seen.attention.mean, mean, rtol=1e-11)
    assert np.allclose(seen.attention.cov[0], cov, rtol=1e-11)
    assert np.allclose(seen.displacement, direct_displacement(x.numpy()[None] ** 2), rtol=1e-9)


def test_tokens_are_the_positions_of_a_transformer_layer() -> None:
    x = torch.randn(3, 7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    made = InputAccumulator(consumer("linear", range(4)), 1.0, 2.0, False, {})
    made.add(x.reshape(21, 4), 3)
    mean, cov = direct_moments(x.numpy(), 1.0, 2.0)
    assert np.allclose(made.result().attention.cov[0], cov, rtol=1e-11)
    assert np.allclose(made.result().attention.mean, mean, rtol=1e-11)


@pytest.mark.parametrize("tiled", [False, True])
def test_flattened_taps_are_positions(tiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    if tiled:
        monkeypatch.setattr(moments, "MAX_VARIABLES", 20)
    classes = np.tile(range(6), 4) if tiled else np.repeat(range(6), 4)
    c = consumer("linear", classes)
    flat = x.transpose(1, 2).reshape(5, 24) if tiled else x.reshape(5, 24)
    seen = accumulate(c, [flat])
    assert seen.layout == Layout(6, 4, tiled)
    assert (classes[seen.layout.columns] == np.arange(6)[:, None]).all()
    _, cov = direct_moments(x.transpose(1, 2).numpy(), 1.0, 2.0)
    assert np.allclose(seen.attention.cov[0], cov, rtol=1e-10)


def test_tied_columns_are_not_folded() -> None:
    """Rows that are pruned together are different features, not taps of one."""
    assert Layout.of(consumer("linear", np.tile(range(6), 4))) == Layout(24)
    assert Layout.of(consumer("linear", [-1, 0, 0, 1, 1])) == Layout(5)
    assert Layout.of(consumer("linear", [0, 0, 1])) == Layout(3)


@pytest.mark.parametrize(
    ("c", "shape"),
    [
        (consumer("conv", range(6), groups=2), (4, 3, 5)),
        (consumer("conv", range(6), groups=2, transposed=True, in_dim=0, out_dim=1), (6, 2, 5)),
        (consumer("linear", range(6)), (4, 6)),
        (consumer("linear", range(6), in_dim=0, out_dim=1), (6, 4)),
        (consumer("linear", [0, 0, 1, 1, 2, 2]), (4, 6)),
    ],
)
def test_weight_layout_round_trip(c: Consumer, shape: tuple[int, ...]) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(6))
    layout = Layout.of(c)
    blocks = moments.split_weight(c, w, layout)
    assert blocks.shape[2] * c.groups == layout.variables
    back = moments.join_weight(c, blocks, w.shape[2:], layout)
    assert torch.equal(back, w)


def test_convolution_groups_are_blocks() -> None:
    x = torch.randn(5, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    seen = accumulate(consumer("conv", range(6), groups=2), [x], gamma=0.0)
    full = np.cov(x.transpose(0, 1).flatten(1).numpy(), bias=True)
    assert np.allclose(seen.plain.cov, [full[:3, :3], full[3:, 3:]], rtol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batches_do_not_matter(dtype: torch.dtype) -> None:
    x = torch.randn(20, 5, 4, 4, generator=torch.Generator().manual_seed(8), dtype=dtype) + 3
    one = accumulate(consumer("conv", range(5)), [x])
    five = accumulate(consumer("conv", range(5)), list(x.split(4)))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for a, b in ((one.plain, five.plain), (one.attention, five.attention)):
        assert np.allclose(a.cov, b.cov, rtol=tolerance, atol=tolerance)
        assert np.allclose(a.mean, b.mean, rtol=tolerance)
        assert a.total == pytest.approx(b.total, rel=1e-6)
    assert np.allclose(one.displacement, five.displacement, rtol=1e-4)


def test_float32_survives_a_large_mean() -> None:
    """The point near the mean: raw float32 second moments would be off by the mean squared."""
    x = torch.randn(4000, 3, generator=torch.Generator().manual_seed(9)) + 1000
    seen = accumulate(consumer("linear", range(3)), list(x.split(500)), gamma=0.0)
    assert np.allclose(seen.plain.cov[0], np.cov(x.double().T.numpy(), bias=True), atol=1e-4)


def test_wide_inputs_keep_variances_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "MAX_VARIABLES", 4)
    x = torch.randn(30, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(10))
    seen = accumulate(consumer("linear", range(6)), [x], gamma=0.0)
    assert np.allclose(seen.plain.cov, x.var(0, correction=0).numpy())


def test_memory_does_not_grow() -> None:
    made = InputAccumulator(consumer("linear", range(6)), 1.0, 2.0, True, {})

    def held() -> int:
        made._flush()
        tensors = [made.plain.first, made.plain.second, made.weighted.second]
        tensors += [t for m in made.moved.values() for t in m.sums]
        return sum(t.numel() for t in tensors)

    made.add(torch.randn(9, 6), 9)
    first = held()
    for _ in range(5):
        made.add(torch.randn(9, 6), 9)
    assert held() == first


@pytest.mark.parametrize("kw", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": 2}])
def test_tap_coverage_is_a_convolution_of_ones(kw: dict[str, int]) -> None:
    """One output channel for each tap, and an input of ones: its mean is the coverage."""
    ones, taps = torch.ones(1, 1, 5, 6).double(), torch.eye(9).double().reshape(9, 1, 3, 3)
    out = nn.functional.conv2d(ones, taps, **kw)
    rest = (kw.get("stride", 1), kw.get("dilation", 1), kw.get("padding", 0))
    dims = [(i, o, 3, *rest) for i, o in zip((5, 6), out.shape[2:], strict=True)]
    assert torch.allclose(moments.tap_coverage(dims), out[0].mean((1, 2)))


def test_upper_part_is_mirrored() -> None:
    x = torch.randn(500, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(12))
    seen = accumulate(consumer("linear", range(300)), list(x.split(90)))
    assert np.allclose(seen.plain.cov[0], np.cov(x.T.numpy(), bias=True))
    assert np.array_equal(seen.plain.cov[0], seen.plain.cov[0].T)


def test_running_moments_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "CHUNK", 7)
    x = torch.randn(40, 1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(11))
    running = RunningMoments(1, torch.zeros(3, dtype=torch.float64))
    running.add(x)
    assert np.allclose(running.result().cov[0], np.cov(x[:, 0].T.numpy(), bias=True))


def test_chosen_positions_are_distinct_and_meet_every_line() -> None:
    assert moments.chosen_positions(moments.MAX_POSITIONS) is None
    before = torch.get_rng_state()
    chosen = moments.chosen_positions(128 * 128)
    assert torch.equal(before, torch.get_rng_state())
    assert chosen is not None
    assert len(chosen.unique()) == moments.MAX_POSITIONS
    for line in (chosen % 128, chosen // 128):
        assert int(torch.bincount(line // 16, minlength=8).min()) >= 6


# -- with a model -----------------------------------------------------------------------------


class Shortcut(nn.Module):
    """Two consumers of one input, a depthwise convolution, a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.wide = nn.Conv2d(8, 16, 1)
        self.side = nn.Conv2d(8, 16, 1)
        self.depth = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.head = nn.Linear(16 * 9, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).relu()
        x = self.wide(x).relu() + self.side(x)
        return self.head(self.depth(x).relu().flatten(1))


@pytest.fixture
def shortcut() -> Shortcut:
    torch.manual_seed(0)
    return Shortcut().eval()


def test_observe_a_model(shortcut: Shortcut) -> None:
    traced = trace(shortcut, torch.zeros(1, 1, 3, 3))
    x = torch.randn(12, 1, 3, 3, generator=torch.Generator().manual_seed(1))
    before = torch.get_rng_state()
    one = observe.observe(traced, [x])
    five = observe.observe(traced, [(part,) for part in x.split(5)])
    assert torch.equal(before, torch.get_rng_state())
    weights = {c.weight: c for c in traced.consumers}
    wide, side, head = (weights[f"{n}.weight"] for n in ("wide", "side", "head"))
    assert one.consumers[wide.key].input == one.consumers[side.key].input
    assert weights["depth.weight"].key not in one.consumers
    assert one.samples == five.samples == 12
    assert len(one.inputs) == 2
    assert one.input_of(head.key).plain.cov.shape == (1, 16, 16)
    with torch.no_grad():
        inner = shortcut.norm(shortcut.stem(x)).relu()
        out = shortcut.wide(inner)
    flat = inner.transpose(0, 1).flatten(1).double().numpy()
    assert np.allclose(one.input_of(wide.key).plain.cov[0], np.cov(flat, bias=True), atol=1e-6)
    energy = float(out.transpose(0, 1).flatten(1).double().var(1, correction=0).sum())
    assert one.consumers[wide.key].energy == pytest.approx(energy, rel=1e-5)
    assert five.consumers[wide.key].energy == pytest.approx(energy, rel=1e-5)


def test_data_that_cannot_be_used(shortcut: Shortcut) -> None:
    traced = trace(shortcut, torch.zeros(1, 1, 3, 3))
    bad = torch.zeros(2, 1, 3, 3)
    bad[1, 0, 1, 1] = math.nan
    with pytest.raises(DataError, match="node 'wide'"):
        observe.observe(traced, [bad])
    with pytest.raises(DataError, match="no sample"):
        observe.observe(traced, [])
