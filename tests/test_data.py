"""Calibration data and the data specs."""

from __future__ import annotations

import gzip
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from fxprune import data as module
from fxprune.data import calibration_batches, check_spec, load_data, read_idx
from fxprune.errors import DataError, SpecError

EXAMPLE = torch.zeros(1, 3, 4, 4)


def images(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def joined(made: module.Calibration) -> Tensor:
    return torch.cat([b[0] for b in made.batches])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: x.numpy(),
        lambda x: [x[:4], x[4:]],
        lambda x: ((part, None) for part in (x[:4], x[4:])),
        lambda x: [[x, torch.zeros(10)]],
        lambda x: [{"label": torch.zeros(10), "image": x}],
        lambda x: [x.double()],
    ],
)
def test_every_shape_of_data(wrap: Any) -> None:
    x = images(10)
    made = calibration_batches(wrap(x), EXAMPLE, batch_size=3)
    assert made.samples == 10
    assert not made.random
    assert max(len(b[0]) for b in made.batches) == 3
    assert torch.equal(joined(made), x)


def test_several_inputs() -> None:
    a, b, y = torch.randn(4, 2), torch.randn(4, 5), torch.zeros(4)
    examples = (torch.zeros(1, 2), torch.zeros(1, 5))
    for item in ((a, b), (a, b, y), ((a, b), y), {"y": y, "b": b, "a": a}):
        (batch,) = calibration_batches([item], examples).batches
        assert torch.equal(batch[0], a)
        assert torch.equal(batch[1], b)
    with pytest.raises(DataError, match="batch 0 has 1 values, the model takes 2 inputs"):
        calibration_batches([(a,)], examples)
    with pytest.raises(DataError, match=r"\[3, 4\] samples"):
        calibration_batches([(a, b[:3])], examples)


def test_iterated_once_and_no_further_than_needed() -> None:
    class Counting:
        starts = items = 0

        def __iter__(self) -> Iterator[Tensor]:
            self.starts += 1
            while True:
                self.items += 1
                yield images(4)

    endless = Counting()
    made = calibration_batches(endless, EXAMPLE, limit=10)
    assert (made.samples, endless.starts, endless.items) == (10, 1, 3)


def test_memory_that_the_loader_reuses_is_copied() -> None:
    buffer = torch.zeros(2, 3, 4, 4)

    def reuse() -> Iterator[Tensor]:
        for i in range(3):
            yield buffer.fill_(i)

    made = calibration_batches(reuse(), EXAMPLE)
    assert [float(b[0].mean()) for b in made.batches] == [0, 1, 2]


@pytest.mark.parametrize("own_generator", [False, True])
def test_a_shuffling_loader_gives_the_same_and_every_rng_is_put_back(own_generator: bool) -> None:
    generator = torch.Generator().manual_seed(3) if own_generator else None
    loader = DataLoader(TensorDataset(images(20)), 4, shuffle=True, generator=generator)
    torch.manual_seed(1)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    own = generator.get_state() if generator else None
    first = joined(calibration_batches(loader, EXAMPLE, limit=8))
    second = joined(calibration_batches(loader, EXAMPLE, limit=8))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()  # noqa: NPY002
    if generator is not None:
        assert own is not None
        assert torch.equal(generator.get_state(), own)


def test_rng_is_put_back_after_an_error() -> None:
    def bad() -> Iterator[Tensor]:
        torch.rand(1)
        raise KeyError("lost")
        yield

    rng = torch.get_rng_state()
    with pytest.raises(DataError, match="the data raised KeyError while iterated: 'lost'"):
        calibration_batches(bad(), EXAMPLE)
    assert torch.equal(torch.get_rng_state(), rng)


def test_no_data_is_random_and_says_so() -> None:
    rng = torch.get_rng_state()
    example = (torch.zeros(2, 3, 8, 8), torch.tensor([[1, 7], [2, 2]]))
    made = calibration_batches(None, example, limit=100)
    assert torch.equal(torch.get_rng_state(), rng)
    assert made.random
    assert made.note == "100 random inputs (no data was given)"
    x, tokens = (torch.cat([b[i] for b in made.batches]) for i in (0, 1))
    assert x.shape == (100, 3, 8, 8)
    assert abs(float(x.mean())) < 0.02
    assert abs(float(x.std()) - 1) < 0.02
    assert tokens.dtype == torch.int64
    assert set(tokens.flatten().tolist()) == set(range(1, 8))
    again = calibration_batches(None, example, limit=100)
    assert torch.equal(again.batches[1][0], made.batches[1][0])


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ([], "yields no samples"),
        (iter(()), "yields no samples"),
        ([images(0)], "yields no samples"),
        (3, "cannot be iterated"),
        ([images(2), images(2) / 0], "batch 1 holds NaN or Inf"),
        ([torch.zeros(2, 1, 4, 4)], r"shape \[2, 1, 4, 4\], expected \[N, 3, 4, 4\]"),
        ([torch.zeros(3, 4, 4)], "wrap the data set in a DataLoader"),
        ([torch.zeros(2, 3, 4, 4, dtype=torch.uint8)], "is torch.uint8"),
        (["a.jpg"], "holds str where a tensor is expected"),
        ([{"a": torch.zeros(2)}], r"no value like Tensor \[1, 3, 4, 4\]; it has a: Tensor \[2\]"),
        ([()], "has 0 values"),
    ],
)
def test_bad_data(data: Any, text: str) -> None:
    with pytest.raises(DataError, match=text):
        calibration_batches(data, EXAMPLE)


def test_digits_are_split_and_shaped() -> None:
    example = torch.zeros(1, 3, 16, 16)
    train, test = (
        [torch.cat(part) for part in zip(*load_data("digits", example, train=t) or (), strict=True)]
        for t in (True, False)
    )
    assert [len(train[1]), len(test[1])] == [1437, 360]
    counts = np.bincount(load_digits().target)
    assert (torch.bincount(torch.cat([train[1], test[1]])).numpy() == counts).all()
    assert train[0].shape[1:] == (3, 16, 16)
    assert torch.equal(train[0][:, 0], train[0][:, 2])
    assert abs(float(train[0].mean())) < 0.05
    flat = next(iter(load_data("digits", torch.zeros(1, 64)) or ()))[0]
    assert abs(float(flat.std()) - 1) < 0.05
    made = calibration_batches(load_data("digits", example), example, limit=100)
    assert torch.equal(joined(made), train[0][:100])


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.mark.parametrize("place", ["folder", "standard"])
def test_fashion_mnist_from_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    folder = tmp_path / "datasets" / "fashion-mnist"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 28, 28))
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(pixels)))
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(np.arange(6)))
    monkeypatch.setenv("XDG_DATA_DIRS", str(tmp_path))
    spec = f"fashion-mnist:{folder}" if place == "folder" else "fashion-mnist"
    ((x, y),) = load_data(spec, torch.zeros(1, 1, 28, 28), train=False) or ()
    expected = (pixels[y.numpy()] / 255 - 0.2860) / 0.3530
    np.testing.assert_allclose(x[:, 0].numpy(), expected, atol=1e-5)
    assert sorted(y.tolist()) == list(range(6))
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(np.arange(5)))
    with pytest.raises(DataError, match="expected images"):
        load_data(spec, EXAMPLE, train=False)
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(np.arange(6))[:-1])
    with pytest.raises(DataError, match="not a whole idx file"):
        load_data(spec, EXAMPLE, train=False)


def test_fashion_mnist_that_is_nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="give the folder that holds them"):
        load_data(f"fashion-mnist:{tmp_path}", EXAMPLE)

    def offline(*_: Any, **__: Any) -> None:
        raise RuntimeError("no network")

    monkeypatch.setattr("torchvision.datasets.FashionMNIST", offline)
    monkeypatch.setattr(module, "_find", lambda *_: None)
    with pytest.raises(DataError, match=r"cannot be downloaded \(no network\)"):
        load_data("fashion-mnist", EXAMPLE)


def test_read_idx(tmp_path: Path) -> None:
    array = np.arange(24).reshape(2, 3, 4)
    (tmp_path / "a").write_bytes(idx(array))
    assert (read_idx(tmp_path / "a") == array).all()
    for body in (b"", b"\x1f\x8b", b"\0\0\x0d\1\0\0\0\0"):
        (tmp_path / "a").write_bytes(body)
        with pytest.raises(DataError, match="not a whole idx file"):
            read_idx(tmp_path / "a")


def test_image_folder(tmp_path: Path) -> None:
    for i, colour in enumerate([(255, 0, 0), (0, 255, 0)]):
        (tmp_path / f"class{i}").mkdir()
        Image.new("RGB", (20, 10), colour).save(tmp_path / f"class{i}" / "a.png")
    rng = torch.get_rng_state()
    example = torch.zeros(1, 3, 8, 8)
    made = calibration_batches(load_data(f"imagefolder:{tmp_path}", example), example)
    assert torch.equal(torch.get_rng_state(), rng)
    assert made.samples == 2
    red = (1 - 0.485) / 0.229, -0.456 / 0.224
    found = {tuple(round(float(v), 3) for v in x[:2, 0, 0]) for x in joined(made)}
    assert (round(red[0], 3), round(red[1], 3)) in found
    ((grey, labels),) = load_data(f"imagefolder:{tmp_path}", torch.zeros(1, 1, 8, 8)) or ()
    assert grey.shape == (2, 1, 8, 8)
    assert sorted(labels.tolist()) == [0, 1]
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "none", tmp_path / "empty"):
        with pytest.raises(DataError, match="has no images"):
            load_data(f"imagefolder:{folder}", example)


def test_specs() -> None:
    assert load_data("random", EXAMPLE) is None
    with pytest.raises(SpecError, match="did you mean 'digits'"):
        load_data("digit", EXAMPLE)
    with pytest.raises(SpecError, match="imagefolder:DIR"):
        check_spec("imagefolder")
    with pytest.raises(SpecError, match="takes no folder"):
        check_spec("digits:here")
    with pytest.raises(DataError, match=r"do not fit the example input \[1, 7\]"):
        next(iter(load_data("digits", torch.zeros(1, 7)) or ()))
    with pytest.raises(SpecError, match="calibration_samples must be a whole number from 1"):
        calibration_batches(None, EXAMPLE, limit=0)


def test_random_inputs_are_like_the_example() -> None:
    """Images in [0, 1], a mask, tokens, options that are no tensors; lists keep their length."""
    image = torch.rand(3, 8, 8)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    given = {"ids": torch.tensor([[5, 9, 7], [5, 5, 6]]), "mask": mask, "cache": False}
    made = calibration_batches(None, given, limit=5, batch_size=4).batches
    assert [len(b[0]) for b in made] == [4, 1]
    assert set(torch.cat([b[0] for b in made]).flatten().tolist()) <= set(range(5, 10))
    assert torch.equal(made[0][1], torch.cat([mask, mask]))
    assert all(b[2] is False for b in made)
    lists = calibration_batches(None, ([image, image[:, :4]],), limit=4).batches
    assert [[tuple(t.shape) for t in b[0]] for b in lists] == [[(3, 8, 8), (3, 4, 8)]] * 2
    drawn = torch.cat([t.flatten() for b in lists for t in b[0]])
    assert 0 <= float(drawn.min()) < 0.1 and 0.9 < float(drawn.max()) <= 1
    assert not torch.equal(lists[0][0][0], lists[1][0][0])


def test_inputs_by_name() -> None:
    given = {"ids": torch.ones(1, 4, dtype=torch.long), "mask": torch.ones(1, 4), "cache": False}
    ids, mask = torch.arange(12).view(3, 4), torch.rand(3, 4)
    item = {"labels": torch.zeros(3), "mask": mask, "ids": ids}
    for data in ([item], [(item, torch.zeros(3))], [(ids, mask)]):
        (batch,) = calibration_batches(data, given).batches
        assert torch.equal(batch[0], ids) and torch.equal(batch[1], mask) and batch[2] is False
    with pytest.raises(DataError, match="no input 'mask'; it has ids"):
        calibration_batches([{"ids": ids}], given)


def test_an_input_that_is_no_tensor_is_not_taken_from_the_targets() -> None:
    x, targets = images(3), torch.zeros(3)
    for given in ((EXAMPLE, 2.0), {"x": EXAMPLE, "scale": 2.0}):
        for item in (x, (x, targets), (x, 3.0), x.numpy(), [x]):
            (batch,) = calibration_batches([item], given).batches
            assert torch.equal(batch[0], x)
            assert batch[1] == (3.0 if isinstance(item, tuple) and item[1] is not targets else 2.0)


def test_lists_of_images_of_any_size() -> None:
    given = ([torch.rand(3, 8, 8), torch.rand(3, 8, 8)],)
    images = [torch.rand(3, 8, 6), torch.rand(3, 5, 9)]
    for data in ([images], [(images, [{"boxes": torch.zeros(1, 4)}] * 2)]):
        made = calibration_batches(data, given)
        assert made.samples == 2
        assert all(torch.equal(a, b) for a, b in zip(made.batches[0][0], images, strict=True))
    with pytest.raises(DataError, match="list of 1 where the example inputs hold 2"):
        calibration_batches([(images[:1], [])], given)


def test_nested_batches_are_divided_together() -> None:
    given = ({"a": torch.zeros(1, 3), "b": torch.zeros(1, 2)}, torch.zeros(1, 4))
    a, b, c = torch.rand(5, 3), torch.rand(5, 2), torch.rand(5, 4)
    first, second = calibration_batches([({"a": a, "b": b}, c)], given, batch_size=3).batches
    assert torch.equal(torch.cat([first[0]["b"], second[0]["b"]]), b)
    assert torch.equal(second[1], c[3:])
    with pytest.raises(DataError, match="give equally many"):
        calibration_batches([({"a": a, "b": b[:2]}, c)], given)


@pytest.mark.parametrize("batch", [5, 16, 40])
def test_further_samples_follow_the_first(batch: int) -> None:
    x = images(40)
    made = calibration_batches(x.split(batch), EXAMPLE, limit=12, batch_size=8, more=20)
    assert made.samples == 12 and torch.equal(joined(made), x[:12])
    assert torch.equal(torch.cat([b[0] for b in made.more]), x[12:32])
    assert max(len(b[0]) for b in (*made.batches, *made.more)) <= 8
    assert calibration_batches(x, EXAMPLE, limit=50, more=20).more == ()
