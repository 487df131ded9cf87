"""Calibration data and labelled sets.

:func:`calibration_batches` turns whatever the caller has into a finite, checked list of batches.
:func:`load_data` reads the data specs of the command line:

    digits                  scikit-learn's 1,797 images of 8 x 8, which it ships
    fashion-mnist[:DIR]     the four idx files (plain or .gz) in DIR, in a standard data folder, or
                            downloaded by torchvision
    imagefolder:DIR         DIR/CLASS/IMAGE files
    random                  nothing: random inputs
    FILE.py:FACTORY         what a function without required arguments gives: a DataLoader, a list
                            of batches; or package.module:FACTORY

Legend for shapes: N samples of a batch, C channels, H x W pixels.
"""

from __future__ import annotations

import gzip
import os
import struct
import sys
import urllib.error
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from fxprune import usercode
from fxprune.batches import Batch, check_batch, random_batches, select
from fxprune.errors import DataError, FxpruneError, SpecError, unknown, whole
from fxprune.inputs import Inputs, divisible, part_of, samples_of
from fxprune.isolate import rng_kept

SPECS = ("digits", "fashion-mnist", "imagefolder", "random")
_FORMS = f"expected {', '.join(SPECS)}, or your own batches: {usercode.FORMS}"


@dataclass(frozen=True)
class Calibration:
    """Checked calibration batches.

    batches   tuples with the model's inputs, each [N, ...] as the example inputs
    samples   sum of N
    random    True: no data was given, these are random inputs
    more      batches with further samples, where those were asked for
    """

    batches: tuple[Batch, ...]
    samples: int
    random: bool = False
    more: tuple[Batch, ...] = ()

    @property
    def note(self) -> str:
        """One line for the report."""
        kind = "random inputs (no data was given)" if self.random else "calibration samples"
        return f"{self.samples} {kind}"


# --- what the caller gives --------------------------------------------------------------------


def calibration_batches(
    data: Iterable[Any] | Tensor | None,
    example_inputs: Any,
    *,
    limit: int = 256,
    batch_size: int = 64,
    seed: int = 0,
    more: int = 0,
) -> Calibration:
    """At most ``limit`` samples of ``data`` in batches of at most ``batch_size``.

    more: how many further samples to read, where there are so many.

    data: an iterable of inputs, (inputs, targets), tuples or dicts of inputs; one array or tensor
    [N, ...]; or None for random inputs. It is iterated once, and no further than needed.
    example_inputs: as for ``trace``, or an ``Inputs``; an input may be nested. Where a list holds
    the samples (a detector's images), every batch has as many as the example, of any size.
    From a dict, keyword inputs are taken by name; else each example input takes the first value of
    its shape that is not yet taken. Inputs that are no tensors are those of the example.
    The batches are copies on the example inputs' device and in their dtype. RNG states (torch,
    numpy, random, and the loader's own generator) are as they were; in between they are seeded, so
    that a shuffling loader gives the same samples each time.

    Raises DataError: no samples, NaN or Inf, another shape than the example inputs (but for the
    first dim), something that is no tensor, or an error of the loader itself.
    """
    given = Inputs.of(example_inputs)
    whole("calibration_samples", limit, 1)
    whole("batch_size", batch_size, 1)
    if data is None:
        batches = random_batches(given, limit, batch_size, seed)
        return Calibration(batches, sum(samples_of(b) for b in batches), random=True)
    if isinstance(data, str):
        raise DataError(
            f"data is the text {data!r}; give batches: fxprune.data.load_data({data!r}, inputs) "
            "reads the command line's"
        )
    if isinstance(data, (Tensor, np.ndarray)):
        data = [data]
    found: list[Batch] = []
    samples, within, end = 0, 0, limit + more
    with _untouched(data, seed):
        for i, item in enumerate(guarded(data)):
            batch = check_batch(select(item, given, i), given.values, i)
            for part in _split(batch, batch_size, samples, (limit, end)):
                found.append(part)
                within += samples < limit
                samples += samples_of(part)
            if samples >= end:
                break
    if not samples:
        raise DataError(
            "the data yields no samples; give an iterable with at least one batch (a generator "
            "that was used before is empty)"
        )
    first = tuple(found[:within])
    return Calibration(first, sum(samples_of(b) for b in first), more=tuple(found[within:]))


def _split(batch: Batch, size: int, before: int, ends: tuple[int, int]) -> Iterator[Batch]:
    """Parts of at most ``size`` samples; copies, since loaders reuse memory.

    ``before`` samples are there already; no part goes over one of the ``ends``, the last of which
    is the end of all.
    """
    if not divisible(batch):
        yield tree_map_only(Tensor, torch.clone, batch)
        return
    n, start = min(samples_of(batch), ends[-1] - before), 0
    while start < n:
        end = next(e for e in ends if e > before + start)
        stop = min(start + size, n, end - before)
        part = part_of(batch, slice(start, stop))
        yield tree_map_only(Tensor, torch.clone, part)
        start = stop


def guarded(data: Iterable[Any]) -> Iterator[Any]:
    """Iterate; what the loader raises becomes a DataError."""
    try:
        yield from data
    except FxpruneError:
        raise
    except TypeError as e:
        raise DataError(
            f"the data ({type(data).__name__}) cannot be iterated: {e}; give an iterable of "
            "inputs or (inputs, targets), such as a DataLoader"
        ) from e
    except Exception as e:
        raise DataError(f"the data raised {type(e).__name__} while iterated: {e}") from e


@contextmanager
def _untouched(data: Any, seed: int) -> Iterator[None]:
    """Seed every global RNG, and put back those and the loader's own afterwards."""
    owners = (data, getattr(data, "sampler", None), getattr(data, "batch_sampler", None))
    found = (getattr(owner, "generator", None) for owner in owners)
    own = [(g, g.get_state()) for g in found if isinstance(g, torch.Generator)]
    try:
        with rng_kept(seed):
            yield
    finally:
        for generator, state in own:
            generator.set_state(state)


def first_batch(data: Iterable[Any] | None, example_inputs: Any) -> Batch | None:
    """Some inputs, to look at; None without data."""
    return None if data is None else calibration_batches(data, example_inputs, limit=64).batches[0]


# --- data specs -------------------------------------------------------------------------------


def load_data(
    spec: str,
    example_inputs: Any,
    *,
    train: bool = True,
    batch_size: int = 64,
    seed: int = 0,
    shuffle: bool = False,
) -> Iterable[Any] | None:
    """Batches (inputs [N, C, H, W], labels [N]) in the example input's shape, normalised.

    Samples are in a seeded random order; with ``shuffle`` in another one each time, which torch's
    global generator says. ``train`` picks the part of ``digits`` (a fixed split, 4
    to 1) and ``fashion-mnist``; an image folder has one part. None for the spec "random". A
    factory's batches are as it gives them: any inputs, in its order and batch size.
    Raises SpecError (an unknown spec), DataError (files missing or damaged, a shape that no
    image fits, nothing that can be iterated) or ModelError (the factory's own error).
    """
    check_spec(spec)
    name, _, folder = spec.partition(":")
    if name not in SPECS:
        with rng_kept(seed):
            return _batches(spec, usercode.made(spec, "gives batches", _FORMS))
    if name == "random":
        return None
    example = Inputs.of(example_inputs).values[0]
    if name == "imagefolder":
        return _image_folder(folder, example, batch_size, seed)
    if name == "digits":
        images, labels, mean, std = _digits(train)
    else:
        images, labels, mean, std = _fashion_mnist(folder, train)
    order = np.random.default_rng(seed).permutation(len(images))
    return _Arrays(images[order], labels[order], mean, std, example, batch_size, shuffle)


def check_spec(spec: str) -> None:
    """SpecError unless ``spec`` has the form of a data spec; reads nothing."""
    name, colon, folder = spec.partition(":")
    if name not in SPECS and not colon:
        raise SpecError(f"{unknown('data spec', name, SPECS)} Your own batches: {usercode.FORMS}")
    if name in ("digits", "random") and colon:
        raise SpecError(f"data spec {spec!r}: {name} takes no folder")
    if name == "imagefolder" and not folder:
        raise SpecError("data spec imagefolder needs a folder: imagefolder:DIR")


def from_factory(spec: str) -> bool:
    """Whether a spec names code of the user's."""
    return ":" in spec and spec.partition(":")[0] not in SPECS


def _batches(spec: str, given: Any) -> Iterable[Any]:
    """What a factory gave, if it can be iterated again and again."""
    if isinstance(given, (str, Iterator)) or not isinstance(given, Iterable):
        raise DataError(
            f"{spec} returned {type(given).__name__}; expected batches that can be iterated more "
            "than once, such as a DataLoader or a list"
        )
    return given


@dataclass(frozen=True)
class _Arrays:
    """Grey images [N, H, W] uint8-like in 0..1, shaped batch by batch as they are asked for."""

    images: NDArray[np.float32]
    labels: NDArray[np.int64]
    mean: float
    std: float
    example: Tensor
    batch_size: int
    shuffle: bool = False

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = np.arange(len(self.images))
        if self.shuffle:
            order = torch.randperm(len(order)).numpy()
        for start in range(0, len(self.images), self.batch_size):
            part = order[start : start + self.batch_size]
            x = torch.from_numpy((self.images[part] - self.mean) / self.std)
            yield _shaped(x, self.example), torch.from_numpy(self.labels[part])

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)


def _shaped(x: Tensor, example: Tensor) -> Tensor:
    """Grey images [N, H, W] as [N, C, H', W'] or [N, H * W], whichever the example has."""
    if example.dim() == 4:
        size = [int(n) for n in example.shape[2:]]
        y = x[:, None]
        if list(y.shape[2:]) != size:
            y = functional.interpolate(y, size, mode="bilinear", antialias=True)
        y = y.expand(-1, int(example.shape[1]), -1, -1)
    elif example.dim() == 2 and example.shape[1] == x[0].numel():
        y = x.flatten(1)
    else:
        raise DataError(
            f"images do not fit the example input {list(example.shape)}; expected [N, C, H, W] "
            f"or [N, {x[0].numel()}]"
        )
    return y.to(example.dtype).contiguous()


def _digits(train: bool) -> tuple[NDArray[np.float32], NDArray[np.int64], float, float]:
    from sklearn.datasets import load_digits

    body = load_digits()
    order = np.random.default_rng(0).permutation(len(body.target))
    cut = len(order) * 4 // 5
    part = order[:cut] if train else order[cut:]
    images = (body.images[part] / 16).astype(np.float32)
    return images, body.target[part].astype(np.int64), 0.3053, 0.3763


# --- Fashion-MNIST ----------------------------------------------------------------------------


def _fashion_mnist(
    folder: str, train: bool
) -> tuple[NDArray[np.float32], NDArray[np.int64], float, float]:
    prefix = "train" if train else "t10k"
    names = (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
    paths = _find(names, folder) or (None if folder else _find(names, _download()))
    if paths is None:
        raise DataError(
            f"fashion-mnist: {names[0]}[.gz] and {names[1]}[.gz] are not in "
            f"{folder or 'any data folder'}; give the folder that holds them: fashion-mnist:DIR"
        )
    images, labels = (read_idx(p) for p in paths)
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise DataError(
            f"fashion-mnist: {paths[0]} holds {list(images.shape)} and {paths[1]} "
            f"{list(labels.shape)}; expected images [N, H, W] and labels [N]"
        )
    return (images / np.float32(255)).astype(np.float32), labels.astype(np.int64), 0.2860, 0.3530


def _find(names: Sequence[str], folder: str) -> list[Path] | None:
    """The files, plain or .gz, in ``folder`` or (if empty) the standard data folders."""
    if folder:
        roots = [Path(folder), Path(folder) / "FashionMNIST" / "raw"]
    else:
        shares = os.environ.get("XDG_DATA_DIRS", "").split(os.pathsep)
        shares += [os.path.join(sys.prefix, "share"), "/usr/local/share", "/usr/share"]
        roots = [Path(s) / "datasets" / "fashion-mnist" for s in shares if s]
    for root in roots:
        found = [
            next((p for p in (root / n, root / f"{n}.gz") if p.is_file()), None) for n in names
        ]
        paths = [p for p in found if p is not None]
        if len(paths) == len(names):
            return paths
    return None


def _download() -> str:
    """Fetch Fashion-MNIST with torchvision; the folder. Raises DataError without a network."""
    from torchvision.datasets import FashionMNIST

    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    root = os.path.join(cache, "fxprune")
    try:
        FashionMNIST(root, download=True)
    except (OSError, RuntimeError, urllib.error.URLError) as e:
        raise DataError(
            f"fashion-mnist is not in a standard data folder and cannot be downloaded ({e}); "
            "install Debian's package dataset-fashion-mnist, or give its folder: fashion-mnist:DIR"
        ) from e
    return root


def read_idx(path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """An array of bytes in the idx format of MNIST, plain or gzipped. Raises DataError.

    Two zero bytes, the type (8: unsigned bytes), the number of dims, each size as a big-endian
    32-bit integer, the values.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
        body = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        zeros, kind, dims = struct.unpack_from(">HBB", body)
        shape = struct.unpack_from(f">{dims}I", body, 4)
        values = np.frombuffer(body, np.uint8, offset=4 + 4 * dims)
        if (zeros, kind) != (0, 8):
            raise ValueError("not an idx file of unsigned bytes")
        return values.reshape(shape)
    except (OSError, EOFError, ValueError, struct.error) as e:
        raise DataError(f"{path} is not a whole idx file ({e}); fetch it again") from e


# --- image folders ----------------------------------------------------------------------------


def _image_folder(
    folder: str, example: Tensor, batch_size: int, seed: int
) -> Iterable[tuple[Tensor, Tensor]]:
    """A seeded, shuffling DataLoader with ImageNet's usual preparation."""
    from torchvision import datasets, transforms

    if example.dim() != 4 or example.shape[1] not in (1, 3):
        raise DataError(
            f"images do not fit the example input {list(example.shape)}; expected [N, 1 or 3, H, W]"
        )
    channels, height, width = (int(n) for n in example.shape[1:])
    mean, std = (
        ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]) if channels == 3 else ([0.45], [0.23])
    )
    steps = [
        transforms.Grayscale(channels) if channels == 1 else transforms.Lambda(_rgb),
        transforms.Resize(max(height, width) * 8 // 7),
        transforms.CenterCrop((height, width)),
        transforms.ToTensor(),
        transforms.Normalize(mean, std),
    ]
    try:
        images = datasets.ImageFolder(folder, transforms.Compose(steps))
    except OSError as e:
        raise DataError(
            f"imagefolder: {folder} has no images ({e}); expected DIR/CLASS/IMAGE, with at least "
            "one class folder"
        ) from e
    loader: torch.utils.data.DataLoader[tuple[Tensor, Tensor]] = torch.utils.data.DataLoader(
        images, batch_size, shuffle=True, generator=torch.Generator().manual_seed(seed)
    )
    return loader


def _rgb(image: Any) -> Any:
    return image.convert("RGB")
