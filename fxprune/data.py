"""Calibration data and labelled sets.

:func:`calibration_batches` turns whatever the caller has into a finite, checked list of batches.
:func:`load_data` reads the data specs of the command line:

    digits                  scikit-learn's 1,797 images of 8 x 8, which it ships
    fashion-mnist[:DIR]     the four idx files (plain or .gz) in DIR, in a standard data folder, or
                            downloaded by torchvision
    imagefolder:DIR         DIR/CLASS/IMAGE files
    random                  nothing: random inputs

Legend for shapes: N samples of a batch, C channels, H x W pixels.
"""

from __future__ import annotations

import gzip
import os
import struct
import sys
import urllib.error
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fxprune.errors import DataError, FxpruneError, SpecError, unknown
from fxprune.isolate import rng_kept

SPECS = ("digits", "fashion-mnist", "imagefolder", "random")

Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Calibration:
    """Checked calibration batches.

    batches   tuples of the model's positional inputs, each [N, ...] as the example inputs
    samples   sum of N
    random    True: no data was given, these are standard normal inputs
    """

    batches: tuple[Batch, ...]
    samples: int
    random: bool = False

    @property
    def note(self) -> str:
        """One line for the report."""
        kind = "random inputs (no data was given)" if self.random else "calibration samples"
        return f"{self.samples} {kind}"


# --- what the caller gives --------------------------------------------------------------------


def calibration_batches(
    data: Iterable[Any] | Tensor | None,
    example_inputs: Tensor | tuple[Any, ...],
    *,
    limit: int = 256,
    batch_size: int = 64,
    seed: int = 0,
) -> Calibration:
    """At most ``limit`` samples of ``data`` in batches of at most ``batch_size``.

    data: an iterable of inputs, (inputs, targets), tuples or dicts of inputs; one array or tensor
    [N, ...]; or None for standard normal inputs. It is iterated once, and no further than needed.
    From a dict, each example input takes the first value of its shape that is not yet taken.
    The batches are copies on the example inputs' device and in their dtype. RNG states (torch,
    numpy, random, and the loader's own generator) are as they were; in between they are seeded, so
    that a shuffling loader gives the same samples each time.

    Raises DataError: no samples, NaN or Inf, another shape than the example inputs (but for the
    first dim), something that is no tensor, or an error of the loader itself.
    """
    examples = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    if limit < 1 or batch_size < 1:
        raise SpecError(f"at least one calibration sample is needed, got {limit}")
    if data is None:
        odd = [_describe(x) for x in examples if not isinstance(x, Tensor)]
        if odd:
            raise DataError(
                f"random calibration inputs can only be made like tensors; the example inputs hold "
                f"{', '.join(odd[:3])}: give data=, or use trace() and a plan of your own"
            )
        return Calibration(_random(examples, limit, batch_size, seed), limit, random=True)
    if isinstance(data, (Tensor, np.ndarray)):
        data = [data]
    batches: list[Batch] = []
    samples = 0
    with _untouched(data, seed):
        for i, item in enumerate(guarded(data)):
            batch = _check(_select(item, examples, i), examples, i)
            for part in _split(batch, examples, min(batch_size, limit - samples), limit - samples):
                batches.append(part)
                samples += len(part[0])
            if samples >= limit:
                break
    if not samples:
        raise DataError(
            "the data yields no samples; give an iterable with at least one batch (a generator "
            "that was used before is empty)"
        )
    return Calibration(tuple(batches), samples)


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


def _select(item: Any, examples: Sequence[Any], i: int) -> list[Any]:
    """The model's inputs out of one item of the data."""
    if isinstance(item, Mapping):
        left = list(item.values())
        chosen = []
        for example in examples:
            fits = [k for k, v in enumerate(left) if _tail(v) == tuple(example.shape[1:])]
            if not fits:
                found = ", ".join(f"{k}: {_describe(v)}" for k, v in item.items())
                raise DataError(f"batch {i} has no value like {_describe(example)}; it has {found}")
            chosen.append(left.pop(fits[0]))
        return chosen
    if not isinstance(item, (tuple, list)):
        return [item]
    if len(item) and isinstance(item[0], (tuple, list)) and len(examples) > 1:
        item = item[0]  # ((a, b), targets)
    if len(item) < len(examples):
        raise DataError(
            f"batch {i} has {len(item)} values, the model takes {len(examples)} inputs; give "
            "(inputs, targets), or a tuple of all inputs"
        )
    return list(item[: len(examples)])


def _check(values: Sequence[Any], examples: Sequence[Any], i: int) -> Batch:
    """Values as tensors in the examples' dtype and device. Raises DataError."""
    batch = []
    for value, example in zip(values, examples, strict=True):
        if not isinstance(value, (Tensor, np.ndarray)):
            raise DataError(
                f"batch {i} holds {_describe(value)} where a tensor is expected; give inputs, "
                "(inputs, targets) or a dict of inputs"
            )
        x = torch.as_tensor(value).detach()
        if _tail(x) != tuple(example.shape[1:]):
            raise DataError(_other_shape(x, example, i))
        if x.is_floating_point() != example.is_floating_point():
            raise DataError(
                f"batch {i} is {x.dtype}, the example inputs are {example.dtype}; convert the data "
                "in the loader, scaled as in training"
            )
        if x.is_floating_point() and not bool(x.isfinite().all()):
            raise DataError(f"batch {i} holds NaN or Inf; remove such samples from the data")
        batch.append(x.to(device=example.device, dtype=example.dtype))
    return tuple(batch)


def _other_shape(x: Tensor, example: Tensor, i: int) -> str:
    expected = f"[N, {', '.join(map(str, example.shape[1:]))}]"
    cure = "give data of that shape, or example inputs of the data's shape"
    if x.shape == example.shape[1:]:
        cure = "single samples need a batch dim: wrap the data set in a DataLoader"
    return f"batch {i} has shape {list(x.shape)}, expected {expected} as the example inputs; {cure}"


def _split(batch: Batch, examples: Sequence[Any], size: int, left: int) -> Iterator[Batch]:
    """Parts of at most ``size`` samples, ``left`` in all; copies, since loaders reuse memory."""
    lengths = {len(x) for x in batch if x.dim()}
    if len(lengths) != 1:
        raise DataError(
            f"the inputs of one batch have {sorted(lengths)} samples; give equally many"
        )
    n = min(lengths.pop(), left)
    for start in range(0, n, size):
        yield tuple(x[start : min(start + size, n)].clone() for x in batch)


def _tail(value: Any) -> tuple[int, ...] | None:
    shape = getattr(value, "shape", None)
    return tuple(int(n) for n in shape[1:]) if shape is not None and len(shape) else None


def _describe(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"{type(value).__name__} {list(shape)}"


def _random(examples: Sequence[Any], samples: int, batch_size: int, seed: int) -> tuple[Batch, ...]:
    """Standard normal inputs; integers are uniform over the range of the example's own."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for start in range(0, samples, batch_size):
        batch = []
        for x in examples:
            shape = (min(batch_size, samples - start), *x.shape[1:])
            if x.is_floating_point():
                y = torch.randn(shape, generator=generator)
            else:
                low, high = (int(x.min()), int(x.max())) if x.numel() else (0, 0)
                y = torch.randint(low, high + 1, shape, generator=generator)
            batch.append(y.to(device=x.device, dtype=x.dtype))
        batches.append(tuple(batch))
    return tuple(batches)


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


# --- data specs -------------------------------------------------------------------------------


def load_data(
    spec: str,
    example_inputs: Tensor | tuple[Any, ...],
    *,
    train: bool = True,
    batch_size: int = 64,
    seed: int = 0,
) -> Iterable[tuple[Tensor, Tensor]] | None:
    """Batches (inputs [N, C, H, W], labels [N]) in the example input's shape, normalised.

    Samples are in a seeded random order. ``train`` picks the part of ``digits`` (a fixed split, 4
    to 1) and ``fashion-mnist``; an image folder has one part. None for the spec "random".
    Raises SpecError (an unknown spec) or DataError (files missing or damaged, a shape that no
    image fits).
    """
    check_spec(spec)
    name, _, folder = spec.partition(":")
    if name == "random":
        return None
    example = example_inputs[0] if isinstance(example_inputs, tuple) else example_inputs
    if name == "imagefolder":
        return _image_folder(folder, example, batch_size, seed)
    if name == "digits":
        images, labels, mean, std = _digits(train)
    else:
        images, labels, mean, std = _fashion_mnist(folder, train)
    order = np.random.default_rng(seed).permutation(len(images))
    return _Arrays(images[order], labels[order], mean, std, example, batch_size)


def check_spec(spec: str) -> None:
    """SpecError unless ``spec`` has the form of a data spec; reads nothing."""
    name, colon, folder = spec.partition(":")
    if name not in SPECS:
        raise unknown("data spec", name, SPECS)
    if name in ("digits", "random") and colon:
        raise SpecError(f"data spec {spec!r}: {name} takes no folder")
    if name == "imagefolder" and not folder:
        raise SpecError("data spec imagefolder needs a folder: imagefolder:DIR")


@dataclass(frozen=True)
class _Arrays:
    """Grey images [N, H, W] uint8-like in 0..1, shaped batch by batch as they are asked for."""

    images: NDArray[np.float32]
    labels: NDArray[np.int64]
    mean: float
    std: float
    example: Tensor
    batch_size: int

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self.images), self.batch_size):
            part = slice(start, start + self.batch_size)
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
