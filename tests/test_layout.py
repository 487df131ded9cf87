"""The layout of the package: imports point one way, and nothing is pickled."""

from __future__ import annotations

import ast
import configparser
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fxprune"

ORDER = [
    # the ground
    *("errors", "isolate", "progress", "tables", "types", "inputs", "trees", "products"),
    *("copies", "attention", "leaves", "record", "assembly"),
    # the engine
    *("decisions", "values", "whole", "tracing", "norms", "rephrase", "parametrized", "capture"),
    *(
        "coupling",
        "lifetimes",
        "cost",
        "traced",
        "sizes",
        "rewrite",
        "indexing",
        "reductions",
        "agreement",
        "mirrors",
        "cut",
        "extend",
    ),
    # the stages on top of it
    *(
        "moments",
        "gradients",
        "observe",
        "criteria",
        "renorm",
        "repair",
        "regression",
        "fused",
        "sides",
        "correction",
        "formats",
        "sequential",
        "replay",
        "fitness",
        "workers",
        "imitate",
        "distill",
        "mending",
        "allocate",
    ),
    *("export_job", "export", "latency", "checkpoint"),
    # what the outside gives, and the one place that knows all of them
    *(
        "usercode",
        "batches",
        "data",
        "models",
        "curves",
        "rounds",
        "pipeline",
        "tune",
        "report",
        "demo",
        "cli_values",
        "cli_search",
        "cli_show",
        "cli_tune",
        "cli",
        "__main__",
    ),
]

FILES = sorted(PACKAGE.rglob("*.py"))


def stage(file: Path) -> str:
    """The stage that a file belongs to: its module, or its folder for a package."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of the imported modules and names of fxprune, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write fxprune.x"
            yield from (f"{node.module}.{a.name}" for a in node.names)


def test_every_file_has_a_place() -> None:
    assert {stage(f) for f in FILES} - {*ORDER, "__init__"} == set(), "add it to ORDER"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_upward(file: Path) -> None:
    own = stage(file)
    if own == "__init__":
        return
    for name in imports(ast.parse(file.read_text(encoding="utf-8"))):
        if name == "fxprune.__version__":
            continue
        parts = name.split(".")
        if parts[0] == "fxprune" and len(parts) > 1 and parts[1] != own:
            assert parts[1] in ORDER, (
                f"{file.name}: import from the module, not from fxprune ({name})"
            )
            assert ORDER.index(parts[1]) < ORDER.index(own), f"{file.name} imports {name}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_nothing_is_pickled(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    roots = {name.split(".")[0] for name in imports(tree)}
    banned = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    if stage(file) == "workers":  # sends the model to worker processes, as executors send tasks
        banned -= {"pickle", "cloudpickle"}
    assert not roots & banned
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called != "torch.save", f"line {node.lineno}: tensors go into safetensors"
            if called == "torch.load":
                given = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert given.get("weights_only") == "True", f"line {node.lineno}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_functions_stay_short(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 60, f"{node.name} has {length} lines"


def test_every_imported_package_is_declared() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = [
        p for e in ("timm", "tune", "plot") for p in setup["options.extras_require"][e].split()
    ]
    wanted = [*setup["options"]["install_requires"].split(), *extras]
    names = {re.split("[<>=~!]", w)[0].replace("-", "_") for w in wanted}
    names |= {m for m, n in (("sklearn", "scikit_learn"), ("PIL", "pillow")) if n in names}
    for file in FILES:
        for name in imports(ast.parse(file.read_text(encoding="utf-8"))):
            root = name.split(".")[0]
            if root != "fxprune" and root not in sys.stdlib_module_names:
                assert root in names, f"{file.name} imports {root}, which setup.cfg does not name"


def test_one_version_everywhere() -> None:
    setup = re.search(r"^version *= *(.+)$", (ROOT / "setup.cfg").read_text(), re.M)
    changelog = re.search(r"^## *(\d\S*)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    package = re.search(r'^__version__ = "(.+)"$', (PACKAGE / "__init__.py").read_text(), re.M)
    assert setup is not None
    assert changelog is not None
    assert package is not None
    assert setup[1] == changelog[1] == package[1]
