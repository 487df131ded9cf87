"""A pruned model on disk: a folder with plan.json, model.safetensors and the caller's own files.

Nothing is pickled. The plan rebuilds the pruned model from a fresh instance of the user's class,
and the state fills it, so the two files are enough.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from fxprune.errors import ModelError, OutputError, PlanError
from fxprune.products import check_module, storage_key
from fxprune.types import PrunePlan

PLAN, STATE, RESULT = "plan.json", "model.safetensors", "result.json"

State: TypeAlias = Mapping[str, Tensor]


def save(
    folder: str | os.PathLike[str],
    model: nn.Module,
    plan: PrunePlan,
    extra: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
    write: Callable[[Path], Mapping[str, Any] | None] | None = None,
) -> Path:
    """Write ``plan.json``, ``model.safetensors`` and, where there is something, ``result.json``.

    ``write(temporary folder)`` may add files of its own; what it returns goes into result.json with
    ``extra``. All files are written to a hidden folder beside ``folder``, which is renamed when
    complete: the folder exists whole or not at all, also when ``write`` raises. Raises OutputError
    where :func:`check_target` does.
    """
    target = check_target(folder, overwrite=overwrite)
    with _draft(target) as draft:
        (draft / PLAN).write_text(plan.to_json() + "\n", encoding="utf-8")
        tensors, aliases = _unshared(model)
        save_file(tensors, draft / STATE, metadata={"format": "pt", **aliases})
        added = write(draft) if write is not None else None
        body = {**(extra or {}), **(added or {})}
        if body:
            text = json.dumps(_plain(body), indent=1, allow_nan=False)
            (draft / RESULT).write_text(text + "\n", encoding="utf-8")
    return target


def read(folder: str | os.PathLike[str]) -> tuple[PrunePlan, dict[str, Tensor]]:
    """The plan and the state (parameters and buffers by name, tied names included).

    Raises PlanError or ModelError, naming the file that is missing or damaged.
    """
    folder = Path(folder)
    try:
        plan = PrunePlan.from_json((folder / PLAN).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        raise PlanError(
            f"{folder} is not a checkpoint: {PLAN} cannot be read ({e}); expected a folder that "
            f"`fxprune prune --out` or checkpoint.save wrote"
        ) from e
    return plan, read_state(folder / STATE)


def read_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensors of a safetensors file, or of a torch file loaded with ``weights_only=True``.

    In a torch file, a nesting under "state_dict", "model" or "model_state_dict" is unwrapped, and
    the prefix "module." (from a parallel wrapper) is removed. Raises ModelError.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"weights file {path} does not exist; give a safetensors or torch file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        body = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        # torch's own advice, to load without weights_only, would run what the file says
        other = type(e).__name__ == "UnpicklingError"
        got = "other content, or whole Python objects" if other else f"{type(e).__name__}: {e}"
        raise ModelError(
            f"weights file {path} cannot be loaded: expected safetensors (with that suffix) or a "
            f"torch file that holds only tensors, as torch.save(model.state_dict(), path) writes; "
            f"got {got.splitlines()[0]}"
        ) from e
    for _ in range(3):
        nested = next(
            (k for k in ("state_dict", "model", "model_state_dict") if _holds(body, k)), ""
        )
        body = body[nested] if nested else body
    if not isinstance(body, Mapping) or not any(isinstance(v, Tensor) for v in body.values()):
        raise ModelError(f"weights file {path} holds no named tensors; save model.state_dict()")
    state = {str(k): v for k, v in body.items() if isinstance(v, Tensor)}
    if all(k.startswith("module.") for k in state):
        state = {k.removeprefix("module."): v for k, v in state.items()}
    return state


def load_state(model: nn.Module, state: State, source: str = "weights") -> None:
    """Fill ``model`` with ``state``; nothing is written unless every key and shape fits.

    Names tied to a given one and BatchNorm's batch counter may be missing. Raises ModelError with
    the first names that are missing, unexpected or of another shape.
    """
    own = model.state_dict()
    given = {storage_key(own[k]) for k in state if k in own and own[k].numel()}
    missing = [
        k
        for k, t in own.items()
        if k not in state
        and not k.endswith("num_batches_tracked")
        and not (t.numel() and storage_key(t) in given)
    ]
    unexpected = [k for k in state if k not in own]
    shapes = [
        f"{k}: {list(state[k].shape)} where the model has {list(t.shape)}"
        for k, t in own.items()
        if k in state and state[k].shape != t.shape
    ]
    problems = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", shapes),
        )
        if names
    ]
    if problems:
        raise ModelError(
            f"{source} do not fit the model: {'; '.join(problems)}; "
            "give the weights of this very model"
        )
    model.load_state_dict(dict(state), strict=False)


def check_values(model: nn.Module) -> None:
    """ModelError unless the model's tensors hold values, all of them finite."""
    check_module(model)
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        if t.is_meta:
            raise ModelError(
                f"{name!r} is on the meta device and has no values to rank and repair; trace, "
                "cost and apply work there, for this give the model with its weights"
            )
    check_finite(model)


def check_finite(model: nn.Module) -> None:
    """ModelError that names the parameters or buffers that hold NaN or Inf.

    Inf may stand in buffers that are no statistics: masks of attention, bounds of a clamp.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    lazy = [k for k, t in tensors if is_lazy(t)]
    if lazy:
        raise ModelError(
            f"{lazy[0]!r} has no shape yet (a lazy module); call the model once on example inputs"
        )
    statistics = [t for m in model.modules() if isinstance(m, _NormBase) for t in m.buffers(False)]
    finite = {id(t) for t in (*model.parameters(), *statistics)}
    with torch.no_grad():
        values = [(k, t) for k, t in tensors if t.is_floating_point() and not t.is_meta]
        wrong = [(k, ~t.isfinite() if id(t) in finite else t.isnan()) for k, t in values]
        bad = [k for k, w in wrong if bool(w.any())]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise ModelError(
            f"NaN or Inf in {', '.join(repr(k) for k in bad[:3])}{more}; "
            "give weights that are finite (a diverged training run leaves such values)"
        )


def check_target(folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """The folder to write, as a path, if it can be written; call it before long work.

    Raises OutputError: it exists (and ``overwrite`` is off, or it is not a checkpoint of ours), or
    its parent cannot be made or written.
    """
    target = Path(folder)
    if target.exists() or target.is_symlink():
        if not target.is_dir():
            raise OutputError(f"{target} exists and is not a folder; choose another name")
        if not overwrite and any(target.iterdir()):
            raise OutputError(f"{target} exists; choose another folder, or say --overwrite")
        if any(target.iterdir()) and not (target / PLAN).is_file():
            # A slip of the finger must not cost someone a home folder.
            raise OutputError(
                f"{target} exists and holds no {PLAN}, so it was not written by fxprune; "
                "it is not overwritten: choose another folder"
            )
    parent = next(p for p in target.absolute().parents if p.exists())
    if not parent.is_dir():
        raise OutputError(f"{target} cannot be written: {parent} is not a folder")
    try:
        os.rmdir(tempfile.mkdtemp(dir=parent, prefix=f".{target.name}-"))
    except OSError as e:
        raise OutputError(f"{target} cannot be written: {e.strerror or e} in {parent}") from e
    return target


# --- details --------------------------------------------------------------------------------------


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import safe_open

    try:
        state: dict[str, Tensor] = load_file(path)
        with safe_open(path, framework="pt") as f:
            metadata = f.metadata() or {}
    except (SafetensorError, OSError) as e:
        raise ModelError(f"{path} is not a whole safetensors file ({e})") from e
    for name, kept in metadata.items():
        if kept in state and name not in state and name != "format":
            state[name] = state[kept]
    return state


def _holds(body: Any, key: str) -> bool:
    return isinstance(body, Mapping) and isinstance(body.get(key), Mapping)


def _unshared(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """State on the CPU without the second names of tied tensors, and {second name: first name}.

    safetensors refuses tensors that share memory. Equal views are tied; other views of one memory
    are copied, so that each name has its own values.
    """
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, t in model.state_dict().items():
        key = (storage_key(t), t.storage_offset(), tuple(t.shape), t.stride(), t.dtype)
        if t.numel() and key in first:
            aliases[name] = first[key]
            continue
        first[key] = name
        tensors[name] = t.detach().cpu().contiguous().clone()
    return tensors, aliases


@contextmanager
def _draft(target: Path) -> Iterator[Path]:
    """A temporary sibling that takes the target's place when the block ends without an error."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    except OSError as e:
        raise OutputError(f"{target} cannot be written: {e.strerror or e}") from e
    try:
        yield draft
        _share(draft)
        _swap(draft, target)
    except OSError as e:
        raise OutputError(f"{target} cannot be written: {e.strerror or e}") from e
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _share(draft: Path) -> None:
    """Usual permissions: mkdtemp and safetensors make what only the owner can read."""
    mask = os.umask(0)
    os.umask(mask)
    draft.chmod(0o777 & ~mask)
    for file in draft.iterdir():
        if file.is_file():
            file.chmod(0o666 & ~mask)


def _swap(draft: Path, target: Path) -> None:
    """Rename ``draft`` to ``target``; what stood there is removed after that."""
    if not target.exists():
        draft.rename(target)
        return
    old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-old-"))
    target.rename(old / "it")
    try:
        draft.rename(target)
    except OSError:
        (old / "it").rename(target)
        raise
    finally:
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


def _plain(value: Any) -> Any:
    """JSON for what figures are made of: numpy and torch values, paths, sets; NaN and Inf: null."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        value = sorted(value)
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int)) else str(value)
