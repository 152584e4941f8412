"""The page: one HTML file that loads nothing and runs no script but its own.

Texts of models, data and settings are data. The template escapes all of them, the solutions travel as JSON whose ``<``
are escaped and become text nodes, control characters are written out, and a content security policy allows the one
script and the one style sheet of the page by their hashes, and no connection.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import stepkd
from stepkd.report.content import content
from stepkd.report.folders import Folder, find_folders
from stepkd.report.solutions import FILTERS, Solution, merged, pick, tags_of, visible
from stepkd.runs.files import write_file
from stepkd.runs.job import REPORT_NAME
from stepkd.statistics import shown

TEXT_BYTES = 3_000_000
"""Bytes of all solutions' texts and decisions; of a longer solution the page has the beginning."""
CANDIDATE_BYTES = 400
"""Bytes of a candidate's text among the decisions."""


def write_report(paths: Sequence[str | Path], out: str | Path | None = None, *, solutions: int = 500) -> Path:
    """Write the report of one or more folders.

    Args:
        paths: folders that commands left, or that hold some.
        out: the file; None: ``report.html`` in the first folder.
        solutions: most solutions to browse, 0 or more.

    Returns:
        The file.

    Raises:
        ConfigError: a path that does not exist or holds nothing of stepkd's.
        DataError: a damaged file.
        MachineError: the file cannot be written.
    """
    first = Path(paths[0])
    path = Path(out) if out else (first if first.is_dir() else first.parent) / REPORT_NAME
    title = ", ".join(dict.fromkeys(Path(each).resolve().name for each in paths))
    write_file(path, page_html(title, find_folders(paths), solutions).encode())
    return path


def page_html(title: str, folders: Sequence[Folder], most: int) -> str:
    """The page of some folders, with at most so many solutions; the same ones give the same text."""
    solutions = merged(each for folder in folders for each in folder.solutions)
    tags = tags_of(solutions)
    chosen = pick(solutions, tags, most)
    counted = Counter(name for own in tags for name in own)
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_file),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    return environment.get_template("report.html.j2").render(
        title=title,
        folders=folders,
        **content(folders),
        shown=shown,
        files={name: Markup(_file(name)) for name in ("report.css", "report.js")},
        hashes={name: _hash(_file(name)) for name in ("report.css", "report.js")},
        data=Markup(_json(_problems([(solutions[i], tags[i]) for i in chosen]))),
        listed=len(chosen),
        filters=[(name, each, counted[name]) for name, (each, _) in FILTERS.items() if counted[name]],
        total=len(solutions),
        version=stepkd.__version__,
    )


def _file(name: str) -> str:
    return (resources.files("stepkd.report") / name).read_text("utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _json(value: Any) -> str:
    """JSON that no HTML parser takes for markup."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("&", "\\u0026")


def _problems(solutions: Sequence[tuple[Solution, Sequence[str]]]) -> list[dict[str, Any]]:
    """What the page's script shows: problems with their solutions, each under an anchor of its own."""
    room = TEXT_BYTES // max(len(solutions), 1)
    problems: dict[tuple[str, str | None], dict[str, Any]] = {}
    for each, tags in solutions:
        if each.problem_key not in problems:
            anchor = f"problem-{re.sub(r'[^A-Za-z0-9_-]+', '-', each.problem)[:80]}"
            while any(anchor == other["anchor"] for other in problems.values()):
                anchor += "-"
            head = {"id": each.problem, "anchor": anchor, "prompt": _cut(each.prompt, room // 4), "answer": each.answer}
            problems[each.problem_key] = head | {"solutions": []}
        names = ("run", "sample", "scored_by", "correct", "found", "cut_off", "tokens", "values")
        own, steps = {name: getattr(each, name) for name in names}, _beginning(each.steps, room)
        kept, missing = len(steps), len(each.steps) - len(steps)
        own |= {"labels": each.labels[:kept], "scores": each.scores[:kept]}
        own |= {"disagrees": [i for i in each.disagrees if i < kept], "tags": tags, "steps": steps}
        own["more"] = f"… {missing:,} more steps" if missing else ""
        left = room - sum(len(step.encode()) for step in steps)
        own["trace"], own["untold"] = _first_rounds(each.trace, left)
        problems[each.problem_key]["solutions"].append(own)
    return list(problems.values())


def _beginning(steps: Sequence[str], room: int) -> list[str]:
    """The first steps, as far as there is room for them in bytes."""
    kept = list[str]()
    for step in steps:
        kept.append(_cut(step.strip("\n"), room))
        room -= len(step.encode()) + 64
        if room <= 0:
            break
    return kept


def _first_rounds(trace: Sequence[Mapping[str, Any]], room: int) -> tuple[list[dict[str, Any]], str]:
    """The first rounds of decisions, as far as there is room for them in bytes, and how many are missing."""
    kept = list[dict[str, Any]]()
    for each in trace:
        cut = {**each, "candidates": [(_cut(text, CANDIDATE_BYTES), *more) for text, *more in each["candidates"]]}
        if (room := room - len(_json(cut).encode())) < 0:
            break
        kept.append(cut)
    missing = len(trace) - len(kept)
    return kept, f"… {missing:,} more rounds" if missing else ""


def _cut(text: str, room: int) -> str:
    """The beginning of a text, and how much is missing."""
    kept = text.encode()[: max(room, 0)].decode(errors="ignore")
    return text if kept == text else f"{kept} … {len(text) - len(kept):,} more characters"
