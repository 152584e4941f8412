"""The notebooks are clean: no outputs, nothing of one machine, and every cell compiles. `.ci/run` executes them."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SKIPPED = {"tags": ["skip-execution"]}
"""Of a cell that `jupyter execute` passes over: it needs a hub or a GPU."""


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(request.param.read_text(encoding="utf-8"))
    return found


def source(notebook: dict[str, Any], kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def code(notebook: dict[str, Any]) -> list[str]:
    """Python of the code cells, that of files which a cell writes included."""
    cells = [cell.partition("\n") for cell in source(notebook, "code")]
    python = [(first, rest) for first, _, rest in cells if not first.startswith("%%writefile") or first.endswith(".py")]
    return [rest if first.startswith("%%writefile") else f"{first}\n{rest}" for first, rest in python]


def test_there_are_notebooks() -> None:
    names = {path.stem for path in NOTEBOOKS}
    assert {"tour", "inside_a_prm", "divergences", "step_credit", "write_your_own_method", "real_models"} <= names
    page, readme = (ROOT / "docs" / "notebooks.md", ROOT / "README.md")
    for name in names:
        assert f"notebooks/{name}.ipynb" in page.read_text(encoding="utf-8"), name
        assert f"notebooks/{name}.ipynb" in readme.read_text(encoding="utf-8"), name


def test_outputs_are_stripped(notebook: dict[str, Any]) -> None:
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
        assert cell["metadata"] in ({}, SKIPPED) if cell["cell_type"] == "code" else cell["metadata"] == {}
    assert set(notebook["metadata"]) <= {"kernelspec", "language_info"}
    assert set(notebook["metadata"]["language_info"]) == {"name"}, "no version of one machine"


def test_cells_compile_and_import_what_exists(notebook: dict[str, Any]) -> None:
    import importlib

    for cell in code(notebook):
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
        assert not re.search(r"\d+\.\d+%|\b\d{2,}\.\d", re.sub(r"arXiv \d{4}\.\d{5}", "", text)), text


def test_it_begins_with_what_is_learnt(notebook: dict[str, Any]) -> None:
    first = notebook["cells"][0]
    assert first["cell_type"] == "markdown"
    assert first["source"][0].startswith("# ")
    assert "minute" in "".join(first["source"]), "how long it takes"


def test_there_are_pictures(notebook: dict[str, Any]) -> None:
    shows = ("plt.show()", "Image(", "picture(", "display(HTML(")
    drawn = [text for text in source(notebook, "code") if any(each in text for each in shows)]
    assert len(drawn) >= 3
