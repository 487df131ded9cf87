"""Leave the process as it was: RNG states, arithmetic modes, loggers and warnings."""

from __future__ import annotations

import ctypes
import logging
import os
import random
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

_EXPORTERS = ("torch.onnx", "torch.export", "torch._dynamo", "onnxscript", "onnx_ir")


@contextmanager
def rng_kept(seed: int | None = None) -> Iterator[None]:
    """Put back the global RNG states of torch (all devices), numpy and random.

    With ``seed`` they all start from it inside the block.
    """
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002  user code may use it
    try:
        with torch.random.fork_rng():
            if seed is not None:
                torch.manual_seed(seed)
                random.seed(seed)
                np.random.seed(seed % 2**32)  # noqa: NPY002
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002


@contextmanager
def uncompiled() -> Iterator[None]:
    """What the user has compiled runs as it was written inside the block.

    Where nothing can have been compiled, the compiler is not loaded, which takes seconds.
    """
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """No TensorFloat-32 on a GPU inside the block."""
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, conv.allow_tf32
    matmul.allow_tf32 = conv.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, conv.allow_tf32 = before


_stdout = threading.Lock()


@contextmanager
def native_prints_dropped() -> Iterator[None]:
    """What compiled code prints to the standard output inside the block goes nowhere.

    For libraries whose own switches do not silence them. In a process without a standard output
    there is nothing to do.
    """
    with _stdout:
        try:
            kept = os.dup(1)
        except OSError:
            yield
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            _flush()
            os.dup2(nowhere, 1)
            yield
        finally:
            _flush()
            os.dup2(kept, 1)
            os.close(kept)
            os.close(nowhere)


def _flush() -> None:
    """Write out what C libraries hold back."""
    if os.name == "posix":
        ctypes.CDLL(None).fflush(None)


@contextmanager
def quiet_exporters() -> Iterator[None]:
    """Silence the exporters' progress and advice, and warnings, inside the block."""
    loggers = [logging.getLogger(name) for name in _EXPORTERS]
    levels = [logger.level for logger in loggers]
    printing: Any = getattr(torch._C, "_jit_onnx_log", None)
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        if printing is not None:  # whole graphs, to stdout, when an export fails
            torch._C._jit_onnx_log = lambda *_: None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if printing is not None:
            torch._C._jit_onnx_log = printing
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
