"""Model + example inputs -> an ONNX file that was compared with the model in onnxruntime.

Every way of exporting is an *attempt*; the first one whose file passes the comparison is kept:

1. torch.export based exporter, dynamic batch
2. TorchScript based exporter, dynamic batch
3. torch.export based exporter, batch size of the example inputs
4. TorchScript based exporter, batch size of the example inputs

A file that differs from the model at the example's own batch size ends the search with an
ExportError: another exporter would hide a wrong model, not repair it. A failure at other batch
sizes means that the batch is not dynamic after all, and the next attempt follows. The report says
which attempt was taken, and why the earlier ones were not.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils import _pytree as pytree

from fxprune.errors import ExportError, OutputError, SpecError
from fxprune.export_job import Job, as_numpy, by_position, one_line, prepare
from fxprune.isolate import exact_arithmetic, quiet_exporters, rng_kept
from fxprune.products import check_module, evaluating

OPSETS = range(18, 24)
"""Opsets that can be asked for: 18 is the oldest that the torch.export based exporter writes."""

_TORCHSCRIPT_OPSETS = range(18, 21)
TOLERANCE, HALF_TOLERANCE = 1e-4, 1e-2
"""Largest relative error that is accepted: of float32 and above, and of 16 bits."""
_EMBED_LIMIT = 2_000_000_000
"""Bytes; one protobuf file holds at most 2 GiB, so larger weights go into a second file."""


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how far it is from the model.

    path            the ONNX file
    bytes           its size, with that of ``path + ".data"`` where the weights needed one
    opset           opset of the default ONNX domain in the file
    dynamic_batch   True: any batch size runs; False: only ``batch_sizes[0]``; ``notes`` say why
    exporter        "torch.export" or "torchscript"
    batch_sizes     the sizes that were compared in onnxruntime
    errors          relative error at each of these sizes: max |a - b| / max |a|, worst output
    tolerance       the largest relative error that was accepted
    notes           attempts that were given up and why, and outputs that are zero everywhere
    inputs, outputs names in the file, in order
    """

    path: Path
    bytes: int
    opset: int
    dynamic_batch: bool
    exporter: str
    batch_sizes: tuple[int, ...]
    errors: tuple[float, ...]
    tolerance: float
    notes: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()

    @property
    def max_error(self) -> float:
        """Worst relative error over the compared batch sizes."""
        return max(self.errors)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for result.json."""
        body = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**body, "path": self.path.name, "max_error": self.max_error}


@dataclass(frozen=True)
class _Attempt:
    exporter: str
    dynamic: bool

    def __str__(self) -> str:
        return f"{self.exporter} with {'a dynamic' if self.dynamic else 'a fixed'} batch"


class _Mismatch(Exception):
    """The file runs but computes something else, or does not run, at one batch size."""

    def __init__(self, batch: int, text: str) -> None:
        super().__init__(text)
        self.batch = batch


@dataclass(frozen=True)
class _Result:
    errors: Mapping[int, float]
    opset: int


def export_onnx(
    model: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    opset: int | None = None,
    dynamic_batch: bool = True,
    tolerance: float | None = None,
) -> ExportReport:
    """Export ``model`` to ONNX at ``path`` and compare it with the model in onnxruntime.

    example_inputs: a tensor [N, ...], a tuple of the model's positional arguments or a mapping of
    keyword arguments (tensors, also nested in tuples, lists and dicts; what is no tensor stays as
    it is); all tensors whose first dim is N share one batch dim. Keywords name the file's inputs.
    Outputs may be nested; they are flattened in order, a dict's by its keys.

    An existing file is replaced only by a checked one. Model modes, RNG state and the example
    inputs are as they were. Raises SpecError (opset), ModelError (the model does not run),
    OutputError (path), ExportError (cannot be exported, or the outputs differ by more than
    ``tolerance``: 1e-4 if not given, 1e-2 in half precision); after an error no file is left.
    """
    check_module(model)
    target = _writable(Path(path))
    check_opset(opset)
    if tolerance is None:
        tolerance = TOLERANCE if _precision(model) > 16 else HALF_TOLERANCE
    model, inputs, names = by_position(model, example_inputs)
    with evaluating(model), rng_kept(), exact_arithmetic(), quiet_exporters():
        job, notes = prepare(model, inputs, names, opset, tolerance, dynamic_batch)
        attempts = [_Attempt(e, d) for d in (True, False) for e in ("torch.export", "torchscript")]
        for attempt in attempts:
            if attempt.dynamic and len(job.samples) == 1:
                continue
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fxprune-") as folder:
                draft = Path(folder) / target.name
                try:
                    result = _try(job, attempt, draft)
                except _Mismatch as e:
                    if e.batch == job.batch:
                        raise ExportError(f"{attempt}: {e}; nothing was written") from e
                    notes.append(f"{attempt}: {e}")
                    continue
                except Exception as e:  # noqa: BLE001  exporters raise anything; kept as a note
                    notes.append(f"{attempt}: {one_line(e)}")
                    continue
                size = _move(draft, target)
            return _report(job, attempt, result, target, size, notes)
    bits = _precision(model)
    cure = f"; its weights have {bits} bits: try model.float()" if bits != 32 else ""
    raise ExportError(
        f"the model cannot be exported to ONNX{cure}; nothing was written. Tried:\n  "
        + "\n  ".join(notes)
    )


def check_opset(opset: int | None) -> None:
    """SpecError unless ``opset`` is None or can be exported; call it before long work."""
    if opset is not None and opset not in OPSETS:
        raise SpecError(
            f"ONNX opset {opset} is not supported; "
            f"choose from {OPSETS[0]} to {OPSETS[-1]}, or leave it out"
        )


def _precision(model: nn.Module) -> int:
    """Bits of the least exact floating-point parameter; 32 where there is none."""
    found = (p.element_size() * 8 for p in model.parameters() if p.is_floating_point())
    return min(found, default=32)


def _report(
    job: Job, attempt: _Attempt, result: _Result, target: Path, size: int, notes: Sequence[str]
) -> ExportReport:
    sizes = tuple(sorted(result.errors))
    return ExportReport(
        path=target,
        bytes=size,
        opset=result.opset,
        dynamic_batch=attempt.dynamic,
        exporter=attempt.exporter,
        batch_sizes=sizes,
        errors=tuple(result.errors[n] for n in sizes),
        tolerance=job.tolerance,
        notes=tuple(notes),
        inputs=job.names_in,
        outputs=job.names_out,
    )


# --- one attempt ----------------------------------------------------------------------------


def _try(job: Job, attempt: _Attempt, draft: Path) -> _Result:
    """Export to ``draft`` and compare it. Raises _Mismatch, or whatever the exporter raises."""
    if attempt.exporter == "torch.export":
        _torch_export(job, attempt.dynamic, draft)
    else:
        _torchscript(job, attempt.dynamic, draft)
    import onnx

    onnx.checker.check_model(str(draft))
    header = onnx.load(str(draft), load_external_data=False)
    opset = max(o.version for o in header.opset_import if o.domain in ("", "ai.onnx"))
    if job.opset is not None and opset != job.opset:
        raise RuntimeError(f"the exporter wrote opset {opset} where {job.opset} was asked for")
    session = _session(draft)
    names = [i.name for i in session.get_inputs()]
    sizes = list(job.samples) if attempt.dynamic else [job.batch]
    return _Result({n: _compare(job, n, session, names) for n in sizes}, opset)


def _torch_export(job: Job, dynamic: bool, draft: Path) -> None:
    # Sizes 0 and 1 are taken as constants by torch.export, so a dynamic batch is traced at 2 or 3.
    n = min(k for k in job.samples if k > 1) if dynamic else job.batch
    args = job.samples[n]
    shapes = None
    if dynamic:
        dim, shapes = torch.export.Dim("batch"), torch.export.ShapesCollection()
        for x, is_batched in zip(pytree.tree_leaves(args), job.batched, strict=True):
            if is_batched:
                shapes[x] = {0: dim}
    traced = torch.export.export(job.model, args, dynamic_shapes=shapes, strict=False)
    program = torch.onnx.export(
        traced,
        args,
        input_names=list(job.names_in),
        output_names=list(job.names_out),
        opset_version=job.opset,
        dynamo=True,
        verbose=False,
    )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    if dynamic:
        _name_batch_dim(program, job.batched.index(True))
    state = [*job.model.parameters(), *job.model.buffers()]
    large = sum(t.numel() * t.element_size() for t in state) >= _EMBED_LIMIT
    program.save(str(draft), external_data=large)


def _name_batch_dim(program: Any, position: int) -> None:
    """The exporter numbers its dims ("s77"); a reader of the file should see "batch"."""
    rename = getattr(program, "rename_axes", None)  # newer than torch 2.6
    symbol = str(program.model.graph.inputs[position].shape[0])
    if rename is not None and not symbol.isdigit():
        rename({symbol: "batch"})


def _torchscript(job: Job, dynamic: bool, draft: Path) -> None:
    if job.opset is not None and job.opset not in _TORCHSCRIPT_OPSETS:
        raise RuntimeError(f"this exporter ends at opset {_TORCHSCRIPT_OPSETS[-1]}")
    pairs = [
        *zip(job.names_in, job.batched, strict=True),
        *((name, True) for name in job.names_out),
    ]
    axes = {name: {0: "batch"} for name, is_batched in pairs if is_batched} if dynamic else None
    n = max(job.samples) if dynamic else job.batch
    torch.onnx.export(
        job.model,
        job.samples[n],
        str(draft),
        input_names=list(job.names_in),
        output_names=list(job.names_out),
        opset_version=job.opset or _TORCHSCRIPT_OPSETS[-1],
        dynamic_axes=axes,
        dynamo=False,
        verbose=False,
    )


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _compare(job: Job, n: int, session: Any, names: Sequence[str]) -> float:
    """Relative error at batch size n; raises _Mismatch above the tolerance."""
    leaves = pytree.tree_leaves(job.samples[n])
    if len(names) != len(leaves):
        raise RuntimeError(f"the file has {len(names)} inputs where the model has {len(leaves)}")
    feed = {name: as_numpy(x) for name, x in zip(names, leaves, strict=True)}
    try:
        outputs = session.run(None, feed)
    except Exception as e:
        raise RuntimeError(f"onnxruntime fails at batch {n}: {one_line(e)}") from e
    expected = job.expected[n]
    if len(outputs) != len(expected):
        raise RuntimeError(f"{len(outputs)} outputs in onnxruntime, {len(expected)} in torch")
    worst = 0.0
    for name, a, b in zip(job.names_out, expected, outputs, strict=True):
        error = relative_error(a, np.asarray(b))
        if not error <= job.tolerance:
            raise _Mismatch(
                n,
                f"output {name!r} differs in onnxruntime at batch {n}: relative error {error:.2e}, "
                f"tolerance {job.tolerance:.0e}",
            )
        worst = max(worst, error)
    return worst


def relative_error(expected: NDArray[Any], got: NDArray[Any]) -> float:
    """max |expected - got| / max |expected|, in float64; inf for another shape or NaN.

    Where ``expected`` is zero everywhere: max |got|.
    """
    if expected.shape != got.shape:
        return float("inf")
    if expected.size == 0:
        return 0.0
    a, b = expected.astype(np.float64), got.astype(np.float64)
    error = float(np.abs(a - b).max()) / (float(np.abs(a).max()) or 1.0)
    return error if np.isfinite(error) else float("inf")


# --- surroundings ---------------------------------------------------------------------------


def _writable(path: Path) -> Path:
    if path.is_dir():
        raise OutputError(f"{path} is a folder; give the name of an ONNX file")
    if not path.parent.is_dir():
        raise OutputError(f"folder {path.parent} does not exist; create it first")
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"folder {path.parent} cannot be written")
    return path


def _move(draft: Path, target: Path) -> int:
    """Put the checked file (and its external weights, first) in place; the total size in bytes."""
    size = 0
    for part in sorted(draft.parent.iterdir(), key=lambda p: p.name == draft.name):
        size += part.stat().st_size
        os.replace(part, target.parent / part.name)
    return size
