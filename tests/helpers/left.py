"""Rows and settings as commands leave them, for tests of what reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stepkd.runs.files import write_json

HOSTILE = (
    '</script><script>document.title="owned"</script><img src=x onerror="document.title=\'owned\'">',
    "<!--<script>",
    "{{ 7 * 7 }} {% raw %} &amp; &lt;b&gt; 'single' \"double\"",
    "right\u202eleft \u2066isolate\u2069 bell\x07 half\ud800",
    "javascript:document.title='owned'",
)
"""Texts that must be shown as they are, and do nothing."""


def begin(folder: Path, kind: str, minute: int, **settings: Any) -> None:
    """A job's settings and the first line of its log."""
    (folder / "log").mkdir(parents=True, exist_ok=True)
    write_json(folder / "settings.json", {"kind": kind, **settings})
    (folder / "log" / "rank-0.jsonl").write_text(json.dumps({"time": f"2026-01-01T00:{minute:02d}:00+00:00"}) + "\n")


def evaluation_rows(answers: str, *, labels: bool = True, prompt: str = "1+2") -> list[dict[str, Any]]:
    """A problem per character, with two samples: ``c`` correct, ``f`` flawed (a correct answer with an incorrect step),
    ``i`` incorrect, ``l`` cut off; the second sample is always correct."""
    rows = []
    for number, kind in enumerate(answers):
        samples = []
        for each in (kind, "c"):
            marks = {"c": [True, True], "f": [False, True], "i": [True, False], "l": [True, False]}[each]
            samples.append(
                {
                    "completion": f"step of {number}\n#### {3 if each in 'cf' else 4}",
                    "extracted": "3" if each in "cf" else "4",
                    "verdict": "correct" if each in "cf" else "incorrect",
                    "tokens": 90 if each == "l" else 10 + number,
                    "finish": "length" if each == "l" else "stop",
                    "vote": "3" if each in "cf" else "4",
                    "logprob": -1.0,
                    "step_labels": marks if labels else None,
                }
            )
        rows.append({"id": f"p{number}", "index": number, "prompt": prompt, "answer": "3", "samples": samples})
    return rows


def scored_rows(*, model: str = "student", scores: bool = True) -> list[dict[str, Any]]:
    """Four problems with two labelled completions each, some scores on the wrong side of a half."""
    rows = []
    for number in range(8):
        flawed = number % 3 == 0
        rows.append(
            {
                "id": f"q{number // 2}/{number % 2}",
                "problem_id": f"q{number // 2}",
                "prompt": [{"role": "user", "content": "2+3"}],
                "answer": "5",
                "completion": f"a{number}\nb\n#### 5",
                "steps": [f"a{number}\n", "b\n", "#### 5"],
                "token_ids": list(range(5 + number)),
                "finish": "stop",
                "model": model,
                "correct": number % 4 != 1,
                "step_labels": [not flawed, True, True],
                "labelling": {"labeller": "checker"},
            }
        )
        if scores:
            own = {"step_scores": [0.9 if number == 3 else 0.2 if flawed else 0.8, 0.7, 0.95 - number / 20]}
            rows[-1] |= own | {"score": 0.5 - number / 50, "scorer": {"reduction": "product", "temperature": None}}
    return rows
