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


def search_rows(problems: int = 6) -> list[dict[str, Any]]:
    """Rows of a search under four methods, with a pool of four samples and as many that tell the difficulty. Greedy
    solves every third problem, majority every second one, best-of-N and the beam all but the first."""
    rows = []
    for number in range(problems):
        shared = {"id": f"s{number}", "index": number, "prompt": "1+2", "answer": "3", "unscored": 0}

        def sample(correct: bool, name: str, **more: Any) -> dict[str, Any]:
            answer = "3" if correct else "4"
            text = {"completion": f"{name}\n#### {answer}", "extracted": answer, "vote": answer}
            verdict = {"verdict": "correct" if correct else "incorrect", "tokens": 10, "finish": "stop"}
            return {**text, **verdict, "logprob": -1.0, "step_labels": [correct, correct], **more}

        def row(
            method: str, samples: list[Any], drawn: int, calls: int = 0, trace: Any = (), shared: Any = shared
        ) -> None:
            cost = {"tokens": {"generated": drawn, "scored": 20 * calls}, "scorer_calls": calls}
            rows.append({**shared, "method": method, "samples": samples, **cost, "trace": [*trace]})

        correct = [(number > 0 and at == 2) or number % 2 == 1 for at in range(4)]
        pool = [sample(good, f"pool {at}") for at, good in enumerate(correct)]
        for at, each in enumerate(pool):
            score = 0.9 if at == 2 else 0.25
            length = len(each["completion"])
            each |= {"step_chars": [7, length], "step_scores": [score, None]}
            each |= {"scores": dict.fromkeys(("product", "min", "mean", "last"), score)}
        scores, votes = [each["scores"]["min"] for each in pool], [each["vote"] for each in pool]
        choice = {"event": "choice", "scores": scores, "votes": votes}
        most = choice | {"vote": "majority", "scores": [None] * 4, "kept": [0]}
        row("pool", pool, 40, 4)
        row("difficulty", [sample(number > at, "other") for at in range(4)], 40)
        row("greedy", [sample(number % 3 == 0, "greedy", score=None)], 10)
        row("self_consistency@4", [{**sample(correct[0], "pool 0"), "score": None}], 40, trace=[most])
        best = {**sample(correct[2], "pool 2"), "score": 0.9}
        row("best_of_n@4", [best], 40, 4, [choice | {"vote": "max", "kept": [2]}])
        steps = ["first\n", "second\n", "<b>third</b>\n", "\u202efourth\n"]
        prune = {"event": "prune", "step": 0, "steps": steps, "scores": [0.9, -0.7, 0.1, None], "kept": [0, 1]}
        last = {"event": "choice", "vote": "weighted", "scores": [0.9, 0.2], "votes": ["3", None], "kept": [0]}
        ends = [sample(number > 0, "beam", score=0.9), sample(False, "other", score=0.2)]
        row("beam@4x2", ends, 60, 8, [prune, last])
    return rows
