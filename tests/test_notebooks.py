"""The notebooks are clean: no outputs, nothing of one machine, and every cell compiles. `.ci/run` executes them."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(request.param.read_text(encoding="utf-8"))
    return found


def source(notebook: dict[str, Any], kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_there_are_notebooks() -> None:
    assert {"tour", "inside_a_prm"} <= {path.stem for path in NOTEBOOKS}


def test_outputs_are_stripped(notebook: dict[str, Any]) -> None:
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
        assert cell["metadata"] == {}
    assert set(notebook["metadata"]) <= {"kernelspec", "language_info"}
    assert set(notebook["metadata"]["language_info"]) == {"name"}, "no version of one machine"


def test_cells_compile_and_import_what_exists(notebook: dict[str, Any]) -> None:
    import importlib

    for cell in source(notebook, "code"):
        for node in ast.walk(ast.parse(cell)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("stepkd"):
                module = importlib.import_module(str(node.module))
                assert not [alias.name for alias in node.names if not hasattr(module, alias.name)]


def test_no_absolute_paths(notebook: dict[str, Any]) -> None:
    for text in source(notebook, "code") + source(notebook, "markdown"):
        assert not re.search(r"(?<![\w.<*])/(?:home|root|tmp|work|usr|mnt|opt|Users)\b", text)
        assert not re.search(r"\b[A-Z]:\\", text)


def test_prose_holds_no_results(notebook: dict[str, Any]) -> None:
    """What a cell explains is true whatever the numbers are."""
    for text in source(notebook, "markdown"):
        assert not re.search(r"\d+\.\d+%|\b\d{2,}\.\d", text), text


def test_there_are_pictures(notebook: dict[str, Any]) -> None:
    drawn = [text for text in source(notebook, "code") if "plt.show()" in text or "Image(" in text]
    assert len(drawn) >= 3
