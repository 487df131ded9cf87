"""Code of the user's, named by a short text.

FILE.py:NAME          a function, class or object in a Python file
package.module:NAME   the same in an importable module
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from fxprune.errors import FxpruneError, ModelError, SpecError, unknown

FORMS = "FILE.py:NAME or package.module:NAME"


def found(spec: str, kind: str, hint: str = f"expected {FORMS}") -> Any:
    """What ``spec`` names, as it is. ``kind`` and ``hint`` are for messages.

    Raises SpecError where there is no such file, module or name, ModelError where its code fails.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise SpecError(f"{kind} {spec!r}: {hint}")
    with _importable(_folder(place)):
        module = _load_file(place, spec) if place.endswith(".py") else _module(place, spec, hint)
    if not hasattr(module, name):
        raise unknown(f"{kind} in {place}", name, _callables(module))
    return getattr(module, name)


def made(spec: str, does: str, hint: str = f"expected {FORMS}") -> Any:
    """What the function or class gives that ``spec`` names; ``does``: what it is for.

    Raises SpecError (see :func:`found`; it is not callable, it needs arguments) or ModelError.
    """
    factory = found(spec, "factory", hint)
    name = spec.rpartition(":")[2]
    if not callable(factory):
        raise SpecError(f"{spec}: {name} is a {type(factory).__name__}, not a function or class")
    _check_arguments(spec, factory, does)
    with _importable(_folder(spec.rpartition(":")[0])):
        return call(spec, factory)


def call(spec: str, factory: Callable[[], Any]) -> Any:
    """Run someone else's code; ModelError that says what it raised and where."""
    try:
        return factory()
    except FxpruneError:
        raise
    except Exception as e:
        frame = e.__traceback__
        while frame is not None and frame.tb_next is not None:
            frame = frame.tb_next
        where = f" ({frame.tb_frame.f_code.co_filename}:{frame.tb_lineno})" if frame else ""
        raise ModelError(f"{spec} failed: {type(e).__name__}: {e}{where}") from e


def _folder(place: str) -> Path:
    return Path(place).absolute().parent if place.endswith(".py") else Path.cwd()


def _load_file(place: str, spec: str) -> ModuleType:
    path = Path(place).absolute()
    if not path.is_file():
        raise SpecError(f"{spec}: file {place} does not exist")
    # Registered, so that dataclasses and type hints in the file resolve.
    name = f"_fxprune_spec_{path.stem}"
    made = importlib.util.spec_from_file_location(name, path)
    if made is None or made.loader is None:
        raise SpecError(f"{spec}: {place} is not a Python file")
    module = importlib.util.module_from_spec(made)
    sys.modules[name] = module
    call(spec, lambda: made.loader.exec_module(module))  # type: ignore[union-attr]
    return module


def _module(place: str, spec: str, hint: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as e:
        if e.name is None or not f"{place}.".startswith(f"{e.name}."):
            raise ModelError(f"{spec}: importing {place} failed: {e}") from e
        raise SpecError(f"{spec}: there is no module {place!r}; {hint}") from e
    except Exception as e:
        raise ModelError(f"{spec}: importing {place} failed: {type(e).__name__}: {e}") from e


def _callables(module: ModuleType) -> list[str]:
    """Public names in the module that can be called."""
    return [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]


def _check_arguments(spec: str, factory: Callable[..., Any], does: str) -> None:
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # built in code has no signature; calling it will tell
        return
    required = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if required:
        raise SpecError(
            f"{spec} needs arguments ({', '.join(required)}); give a function without required "
            f"arguments that {does}"
        )


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Imports find modules in ``folder`` first, as they do for a script that lies there."""
    entry = os.fspath(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        if entry in sys.path:
            sys.path.remove(entry)
