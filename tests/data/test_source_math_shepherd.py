"""Math-Shepherd: labels stand where the input has its tags, and whatever does not fit is named."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from stepkd.data.config import DataConfig, check_training_use
from stepkd.data.load import load_rows
from stepkd.data.sources import get_source
from stepkd.data.sources.math_shepherd import write_math_shepherd
from stepkd.errors import ConfigError, DataError

QUESTION = "Ann has 3+4 pens, loses 2 - 1. How many?"
INPUT = f"{QUESTION} Step 1: 3+4=<<3+4=7>>7. ки\nStep 2: 2-1=1, +1. ки\nStep 3: 7 - 1 = 5. The answer is: 5 ки"
LABEL = f"{QUESTION} Step 1: 3+4=<<3+4=7>>7. +\nStep 2: 2-1=1, +1. +\nStep 3: 7 - 1 = 5. The answer is: 5 -"


def load(tmp_path: Path, *rows: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    path = tmp_path / "math-shepherd.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_rows(DataConfig(source="math_shepherd", path=str(path), options=options))


def pair(text: str, signs: str) -> dict[str, str]:
    """A row whose label has the given signs in place of the tags."""
    marks = iter(signs)
    pieces = text.split("ки")
    return {"input": text, "label": pieces[0] + "".join(next(marks) + piece for piece in pieces[1:]), "task": "GSM8K"}


def test_released_row(tmp_path: Path) -> None:
    assert load(tmp_path, {"input": INPUT, "label": LABEL, "task": "GSM8K"}) == [
        {
            "prompt": QUESTION,
            "completions": ["Step 1: 3+4=<<3+4=7>>7.", "Step 2: 2-1=1, +1.", "Step 3: 7 - 1 = 5. The answer is: 5"],
            "labels": [True, True, False],
            "final_answer": "5",
            "subset": "GSM8K",
            "id": "math_shepherd/train/0",
        }
    ]
    assert pair(INPUT, "++-") == {"input": INPUT, "label": LABEL, "task": "GSM8K"}


def test_random_rows_against_their_parts(tmp_path: Path) -> None:
    """Rows put together from parts full of signs come back as these parts."""
    draw = random.Random(0)
    rows, wanted = [], []
    for _ in range(200):
        words = [
            "".join(draw.choice("+- a\n7$.?") for _ in range(draw.randint(0, 12))) for _ in range(draw.randint(2, 6))
        ]
        steps = [f"Step {k}: x{word}y" for k, word in enumerate(words[1:], start=1)]
        labels = [draw.random() < 0.5 for _ in steps]
        question = f"q{words[0]}q"
        glue = draw.choice(["", " ", "\n"])
        rows.append(
            {
                "input": question + glue + "\n".join(f"{step} ки" for step in steps),
                "label": question + glue + "\n".join(f"{s} {'-+'[v]}" for s, v in zip(steps, labels, strict=True)),
            }
        )
        wanted.append((question, steps, labels))
    assert [(row["prompt"], row["completions"], row["labels"]) for row in load(tmp_path, *rows)] == wanted


@pytest.mark.parametrize(
    ("text", "signs", "prompt", "completions", "labels"),
    [
        ("Find $x$.Step 1: a ки\nStep 2: b ки", "+-", "Find $x$.", ["Step 1: a", "Step 2: b"], [True, False]),
        ("Find x. step 1: a ки\nb ки", "++", "Find x.", ["step 1: a", "b"], [True, True]),
        ("Find x. ки\nStep 1: a ки\nStep 2: b ки", "-+-", "Find x.", ["Step 1: a", "Step 2: b"], [True, False]),
        ("How many? First a ки\nthen b ки", "+-", "How many?", ["First a", "then b"], [True, False]),
        ("q Step 1: a ки\nStep 2: cut", "-", "q", ["Step 1: a", "Step 2: cut"], [False, None]),
        ("q Step 1: a ки \n", "+", "q", ["Step 1: a"], [True]),
    ],
)
def test_other_ways_to_write_a_row(
    tmp_path: Path, text: str, signs: str, prompt: str, completions: list[str], labels: list[bool | None]
) -> None:
    [row] = load(tmp_path, pair(text, signs))
    assert (row["prompt"], row["completions"], row["labels"]) == (prompt, completions, labels)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input": "q Step 1: a", "label": "q Step 1: a"}, "column 'input': the input has no step tag 'ки'"),
        (
            {"input": INPUT, "label": INPUT},
            f"each of its 3 tags; at character {INPUT.index('ки') + 1} it has 'ки.*, and the input 'ки'",
        ),
        ({"input": "q Step 1: a ки", "label": "q Step 1: a"}, "at character 12 it has '', and the input ' ки'"),
        (
            {"input": "q Step 1: a ки\nb ки", "label": "q Step 1: a +\nb "},
            "at character 16 it has '', and the input ' ки'",
        ),
        (
            {"input": "q Step 1: a ки", "label": "q Step 1: a +\nb -"},
            r"at character 14 it has '\\nb -', and the input ''",
        ),
        ({"input": "q Step 1: a ки", "label": "q Step 1: b +"}, "at character 11 it has 'b [+]', and the input 'a ки'"),
        ({"input": "q Step 1: a ки", "label": "q Step 1: a ?"}, r"at character 13 it has '\?', and the input 'ки'"),
        ({"input": "q Step 1: aки", "label": "q Step 1: a"}, "at character 12 it has '', and the input 'ки'"),
        ({"input": "q Step 1: a ки cut", "label": "q Step 1: a + cot"}, "it has 'ot', and the input 'ut'"),
        ({"input": "q Step 1: a ки", "label": None}, "column 'label': must be text, found NoneType"),
        (pair("q Step 1: a Step 1: b ки", "+"), "'Step 1:' stands twice before the first tag"),
        (pair("no mark a ки", "+"), "cannot tell the question from the first step.*malformed: drop"),
        (pair("a? b? c ки", "+"), "not exactly one question mark"),
        (pair("q Step 1: a ки ки\nb ки", "+++"), "step 2 of 3 is empty: two tags without text"),
        (pair("Step 1: a ки", "+"), "no question stands before 'Step 1:'"),
        (pair("q ки Step 1: a", "+"), "no step has a tag; drop the row"),
        ({"input": "q Step 1: a ки"}, "missing column 'label' of source 'math_shepherd'"),
    ],
)
def test_bad_rows(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path, pair(INPUT, "+++"), row)
    assert caught.value.line == 2


def test_malformed_rows_can_be_left_out(tmp_path: Path) -> None:
    bad = pair("no mark a ки", "+")
    rows = load(tmp_path, bad, pair(INPUT, "+++"), bad, malformed="drop")
    assert [row["id"] for row in rows] == ["math_shepherd/train/1"]


def test_options_and_source() -> None:
    source = get_source("math_shepherd")
    assert source.hub == "peiyi9979/Math-Shepherd"
    check_training_use(DataConfig(source="math_shepherd"))


@pytest.mark.parametrize("options", [{"malformed": "cut"}, {"malformed": None}])
def test_bad_options(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"option {next(iter(options))} of source 'math_shepherd'"):
        load(tmp_path, pair(INPUT, "+++"), **options)


@pytest.mark.parametrize("labels", [[1, -1], [True, None], [0.5, 1.0]])
def test_only_booleans_can_be_written(tmp_path: Path, labels: list[Any]) -> None:
    row = {"id": "a", "prompt": "q", "completions": ["x", "y"], "labels": labels}
    with pytest.raises(DataError, match=r"line 1, column 'labels': must be true or false at every step, found"):
        write_math_shepherd([row], tmp_path / "out.jsonl")
