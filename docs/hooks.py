"""Pages that mkdocs makes from the code: the API reference, one page a package, and the page of commands."""

from __future__ import annotations

import ast
import itertools
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "stepkd"


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that no file of docs/ holds."""
    from mkdocs.structure.files import File  # the tests read this file without mkdocs

    pages = {"commands.md": _commands(), "recipes.md": _recipes(), "claims.md": _claims(), **_reference()}
    for uri, text in pages.items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_config(config: Any) -> Any:
    """Every package's page of the API reference in the navigation."""
    packages = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py") if path.parent.name != "cli")
    pages = [{"stepkd": "api/stepkd.md"}, *({f"stepkd.{package}": f"api/{package}.md"} for package in packages)]
    config.nav[-1] = {"API reference": ["api/index.md", *pages]}
    return config


def on_page_content(html: str, **kwargs: Any) -> str:
    """Docstrings' roles, such as :func:`x`, as plain code."""
    html = re.sub(r":(?:func|class|meth|mod|attr|data|exc):\s*(?=<code)", "", html)
    return re.sub(r"(<code[^>]*>)~(?:\w+\.)+", r"\1", html)


def _recipes() -> str:
    """The index of recipes/, and the header of every recipe: what, command, hardware, expected metric, what differs."""
    folder = ROOT / "recipes"
    texts = [(folder / "README.md").read_text(encoding="utf-8").replace("(claims/README.md)", "(claims.md)")]
    texts.append("## What every file says")
    for path in sorted(folder.rglob("*.yaml")):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if not name.startswith("claims/"):
            header = itertools.takewhile(
                lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines()
            )
            texts.append(f"### {name}\n\n{_as_blocks(chr(10).join(line[2:] for line in header))}")
    return "\n\n".join(texts) + "\n"


def _claims() -> str:
    """The index of claims with the verdict of every committed result."""
    folder = ROOT / "recipes" / "claims"
    text = (folder / "README.md").read_text(encoding="utf-8")
    lines = ["## Verdicts", "| claim | statement | verdict |\n| --- | --- | --- |"]
    for path in sorted((folder / "results").glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        stale = " (stale)" if result.get("stale") else ""
        lines[-1] += f"\n| `{path.stem}` | {result['claim']} | {result['verdict']}{stale} |"
    intro, mark, rest = text.partition("## ")
    return intro + "\n\n".join(lines) + "\n\n" + mark + rest


def _docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def _commands() -> str:
    """A section a command: what its module says, and its settings."""
    texts = [
        "# Commands",
        "Every command takes `--config FILE` and any setting by its dotted name; `--help` shows them.",
    ]
    for path in sorted((PACKAGE / "cli").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        runs = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "run"]
        if not runs:
            continue
        settings = runs[0].args.args[0].annotation
        summary, _, rest = (ast.get_docstring(tree, clean=False) or "").partition("\n")
        name = path.stem.replace("_", "-")
        texts += [f"## stepkd {name}", summary, _as_blocks(rest)]
        home = _home(tree, settings.id) if isinstance(settings, ast.Name) else None
        if isinstance(settings, ast.Name):
            entry = _entry(f"{home or f'stepkd.cli.{path.stem}'}.{settings.id}", 3)
            texts.append(
                entry + ("      skip_local_inventory: true\n" if home else "")
            )  # its own page is the package's
    texts += [
        "## stepkd fit, validate, test, predict",
        "Lightning's command line: the settings are those of a module (`fit --model.help GKDModule`), of the data "
        "([`StepData`](api/data.md)) and of Lightning's Trainer; [Training runs](training.md) has what stepkd adds.",
    ]
    return "\n\n".join(texts) + "\n"


def _home(tree: ast.Module, name: str) -> str | None:
    """The module that a name is imported from; None: it is defined here."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and any((alias.asname or alias.name) == name for alias in node.names):
            return node.module
    return None


def _as_blocks(text: str) -> str:
    """Indented command lines as blocks of code."""
    lines, block = [], False
    for line in text.splitlines():
        code = line.startswith(("  ", "stepkd ", "accelerate ", "torchrun "))
        if code != block and line.strip():
            lines.append("```")
            block = code
        lines.append(line.removeprefix("  ") if code else line)
    return "\n".join([*lines, *(["```"] if block else [])])


def _entry(name: str, level: int = 2) -> str:
    return f"::: {name}\n    options:\n      heading_level: {level}\n"


def _reference() -> dict[str, str]:
    """A page a package with all of its modules, and the single files of the package on one."""
    pages, index = {}, ["# API reference", "What a script needs is in `stepkd` itself: [From Python](../python.md)."]
    packages: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        inside = path.relative_to(PACKAGE)
        if path.name in ("__main__.py",) or inside.parts[0] == "cli":
            continue
        packages.setdefault(inside.parts[0] if len(inside.parts) > 1 else "stepkd", []).append(path)
    for package, paths in sorted(packages.items()):
        uri = f"api/{package}.md"
        front = PACKAGE / package / "__init__.py" if package != "stepkd" else PACKAGE / "__init__.py"
        title = "stepkd" if package == "stepkd" else f"stepkd.{package}"
        modules = [path.relative_to(ROOT).with_suffix("") for path in paths if path != front]
        names = [".".join(path.parts).removesuffix(".__init__") for path in modules]
        pages[uri] = "\n\n".join([f"# {title}", _docstring(front), *map(_entry, names)]) + "\n"
        index.append(f"* [`{title}`]({package}.md): {_docstring(front).partition(chr(10))[0]}")
    pages["api/index.md"] = "\n\n".join(index[:2]) + "\n\n" + "\n".join(index[2:]) + "\n"
    return pages
