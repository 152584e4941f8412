"""Every module imports, and the light ones stay light."""

from __future__ import annotations

import ast
import functools
import graphlib
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import stepkd

MODULES = sorted(m.name for m in pkgutil.walk_packages(stepkd.__path__, "stepkd.") if m.name != "stepkd.__main__")


@pytest.mark.parametrize("name", MODULES)
def test_module_imports(name: str) -> None:
    assert importlib.import_module(name).__doc__, f"{name} has no docstring"


@pytest.mark.parametrize(
    ("name", "forbidden"),
    [
        ("stepkd", ["torch", "numpy", "lightning", "transformers"]),
        ("stepkd.cli", ["torch", "lightning", "transformers", "datasets"]),
        ("stepkd.losses", ["lightning", "transformers", "trl", "datasets", "peft"]),
        ("stepkd.steps", ["lightning", "transformers", "trl", "datasets", "peft"]),
        ("stepkd.tasks", ["torch", "lightning", "transformers"]),
        ("stepkd.grading", ["torch", "lightning", "transformers", "math_verify"]),
        ("stepkd.runs", ["torch", "lightning", "transformers"]),
    ],
)
def test_light_imports(name: str, forbidden: list[str]) -> None:
    code = f"import sys, {name}; print([m for m in {forbidden!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("package", sorted(p.parent.name for p in Path(stepkd.__path__[0]).glob("*/__init__.py")))
def test_every_name_that_a_package_promises_loads_and_no_other(package: str) -> None:
    loaded = importlib.import_module(f"stepkd.{package}")
    for names in getattr(loaded, "_HOMES", {}).values():
        assert all(getattr(loaded, name) is not None for name in names.split())
    with pytest.raises(AttributeError, match=f"module 'stepkd.{package}' has no attribute 'NoSuchName'"):
        _ = loaded.NoSuchName


ORDER = [
    {"errors"},
    {"lazy", "randomness", "safe", "yaml_files", "statistics"},
    {"settings"},
    {"steps"},
    {"losses", "tasks"},
    {"runs"},
    {"data"},
    {"models"},
    {"grading"},
    {"sampling"},
    {"teachers"},
    {"scorers"},
    {"search"},
    {"labels"},
    {"modules"},
    {"training"},
    {"evaluation"},
    {"iteration"},
    {"report"},
    {"claims"},
    {"quickstart"},
    {"cli", "__main__"},
]
"""Packages in the order in which they may import each other; those of one line do not (the command line's parts do)."""

NOT_YET: dict[str, set[str]] = {}
"""Arrows that still point up."""


@functools.cache
def _imports() -> dict[str, set[str]]:
    """Every module's imports of stepkd: at the top, in functions, and under TYPE_CHECKING."""
    root = Path(stepkd.__path__[0])
    files = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    found: dict[str, set[str]] = {}
    for name, path in files.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "stepkd":
                named = [f"{node.module}.{alias.name}" for alias in node.names]
                found[name] |= {each if each in files else node.module for each in named}
            elif isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names if alias.name in files}
    return found


def test_imports_point_only_to_earlier_packages() -> None:
    level = {package: number for number, packages in enumerate(ORDER) for package in packages}
    incorrect = []
    for name, imported in _imports().items():
        here = name.partition(".")[2].partition(".")[0]
        if not here:
            continue
        assert here in level, f"{here} stands in no package of ORDER"
        for other in imported:
            there = other.partition(".")[2].partition(".")[0]
            if not there or there == here or there in NOT_YET.get(here, ()):
                continue
            if level[there] > level[here] or (level[there] == level[here] and "cli" not in ORDER[level[here]]):
                incorrect.append(f"{name} imports {other}")
    assert not incorrect, "\n".join(sorted(incorrect))


def test_no_import_circles() -> None:
    order = graphlib.TopologicalSorter({name: others - {name, "stepkd"} for name, others in _imports().items()})
    order.prepare()


LONG_FILES = {
    "runs/job.py": 600,  # the one job mechanism, with what a kill at any moment leaves
    "data/rows.py": 520,  # the row contracts, one page
    "tasks/families.py": 440,  # every family of tasks, one class each
    "statistics.py": 620,  # every interval and paired test, a third of it docstrings
    "training/fit.py": 490,
    "runs/rundir.py": 430,  # the run folder, and how a run resumes
    "quickstart.py": 460,
    "settings.py": 500,  # names and types of every setting, in lists of classes too, and what to say of a mistake
    "evaluation/metrics.py": 460,  # every metric of an evaluation, with interval and paired difference
    "modules/base.py": 520,  # the optimiser step that every method shares, and what a method may define
}
"""Lines that these files may have in place of 420; near 300 is what we aim at."""


def test_files_and_functions_stay_short() -> None:
    long: list[str] = []
    root = Path(stepkd.__path__[0])
    for path in root.rglob("*.py"):
        name, text = path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
        if len(text.splitlines()) > LONG_FILES.get(name, 420):
            long.append(f"{name}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
                docstring = node.body[0].end_lineno or 0 if ast.get_docstring(node) else node.lineno
                lines = node.end_lineno - max(docstring, node.body[0].lineno - 1)
                if lines > 60:
                    long.append(f"{name}: {node.name} has {lines} lines")
    assert not long, "split what can be read by itself, or name the file in LONG_FILES with a reason: " + "; ".join(
        long
    )
