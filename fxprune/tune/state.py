"""Where a fine-tuning stands, in one safetensors file: tensors, and JSON in its header.

The file is written beside the old one and takes its place when whole, so a kill at any moment
leaves the old or the new one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from fxprune.errors import ModelError, OutputError, SpecError

FILE = "tuning.safetensors"
_HEADER = "fxprune tuning"

State = dict[str, Tensor]


def tensors_of(model: nn.Module) -> State:
    """Parameters and buffers by name, tied ones once; not copies."""
    return {**dict(model.named_buffers()), **dict(model.named_parameters())}


def copied(state: Mapping[str, Tensor]) -> State:
    return {k: t.detach().clone() for k, t in state.items()}


def put(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Write ``state`` into the tensors of ``model``. Raises ModelError where they do not fit."""
    own = tensors_of(model)
    odd = list(own.keys() ^ state.keys())
    odd += [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
    if odd:
        raise ModelError(
            f"the tuning checkpoint is of another model: {', '.join(sorted(odd)[:3])} differ(s); "
            "give the model that it was made with, or another checkpoint folder"
        )
    with torch.no_grad():
        for k, t in own.items():
            t.copy_(state[k])


def optimizer_tensors(optimizer: Optimizer, model: nn.Module) -> State:
    """ "PARAMETER/KEY" -> the optimizer's tensors for it."""
    names = {id(p): k for k, p in model.named_parameters()}
    return {
        f"{names[id(p)]}/{key}": value
        for p, found in optimizer.state.items()
        for key, value in found.items()
        if isinstance(value, Tensor)
    }


def put_optimizer(optimizer: Optimizer, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Inverse of :func:`optimizer_tensors`. A count of steps (one number) stays on the CPU."""
    parameters = dict(model.named_parameters())
    for name, value in state.items():
        path, _, key = name.rpartition("/")
        p = parameters[path]
        optimizer.state[p][key] = value.to(p.device) if value.ndim or not p.ndim else value


def save(folder: Path, parts: Mapping[str, Mapping[str, Tensor]], body: Mapping[str, Any]) -> None:
    """``parts``: tensors of each part by name. Raises OutputError where it cannot be written."""
    tensors = {
        f"{part}/{name}": t.detach().cpu().contiguous()
        for part, state in parts.items()
        for name, t in state.items()
    }
    target, draft = folder / FILE, folder / f".{FILE}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, draft, metadata={_HEADER: json.dumps(dict(body))})
        with draft.open("rb") as f:
            os.fsync(f.fileno())
        draft.replace(target)
    except (OSError, SafetensorError) as e:
        raise OutputError(f"{target} cannot be written: {e}") from e
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def read(folder: Path) -> tuple[dict[str, State], dict[str, Any]] | None:
    """(parts, body) as they were saved; None where there is no checkpoint.

    Raises ModelError where the file is damaged or not one of ours, OutputError for no folder.
    """
    path = folder / FILE
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; a tuning checkpoint is a folder, give another name")
    if not path.is_file():
        return None
    parts: dict[str, State] = {}
    try:
        with safe_open(path, framework="pt") as f:
            body = json.loads((f.metadata() or {})[_HEADER])
            for key in f.keys():  # noqa: SIM118 - not a mapping
                part, _, name = key.partition("/")
                parts.setdefault(part, {})[name] = f.get_tensor(key)
    except (SafetensorError, OSError, KeyError, ValueError) as e:
        raise ModelError(
            f"{path} is not a whole tuning checkpoint ({type(e).__name__}: {e}); remove it to "
            "start again"
        ) from e
    return parts, body


def check_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """SpecError that names the options in which a checkpoint differs from this call."""
    odd = [k for k in now if before.get(k) != now[k]]
    if odd:
        told = "; ".join(f"{k} was {before.get(k)!r}, now {now[k]!r}" for k in odd[:3])
        raise SpecError(
            f"{folder} holds a checkpoint made with other options ({told}); give the same, another "
            "folder, or resume=False to start again"
        )
