"""Every module imports, and the light ones stay light."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys

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
        ("stepkd.launch", ["torch", "lightning", "transformers"]),
    ],
)
def test_light_imports(name: str, forbidden: list[str]) -> None:
    code = f"import sys, {name}; print([m for m in {forbidden!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


LAYERS = [
    {"errors", "files", "randomness", "safe", "yaml_files"},
    {"steps", "losses"},
    {"data", "grading", "tasks"},
    {"models", "launch"},
    {"rollout"},
    {"teachers"},
    {"scorers"},
    {"search"},
    {"evaluation"},
    {"labels"},
    {"modules"},
    {"doctor"},
    {"claims", "quickstart", "iteration", "trainer_cli", "commands", "cli"},
]


def test_imports_go_one_way() -> None:
    """Nothing below imports something above (DESIGN section 2)."""
    import ast
    from pathlib import Path

    level = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    root = Path(stepkd.__path__[0])
    wrong = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        here = parts[0]
        if here in ("__init__", "__main__"):
            continue
        assert here in level, f"{here} belongs to no layer: add it to LAYERS"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                if name.startswith("stepkd.") and name.split(".")[1] in level:
                    there = name.split(".")[1]
                    if level[there] > level[here]:
                        wrong.append(f"{path.relative_to(root)} imports {name}")
    assert not wrong, "\n".join(wrong)
