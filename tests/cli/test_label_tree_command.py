"""``stepkd pairs tree`` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stepkd.cli import main
from stepkd.data.config import parse_spec
from stepkd.data.load import load_rows
from stepkd.data.rows import STEP_PREFERENCE

PROBLEMS = ["--problems", 'task:task="modular:terms=3,modulus=2",n=3', "--model", "tiny-0.1m"]
SMALL = [
    *("--search.iterations", "1", "--search.actions", "3", "--search.depth", "2", "--search.max-steps", "2"),
    *(
        "--max-step-tokens",
        "8",
        "--sampling.max-new-tokens",
        "8",
        "--segmenter",
        "regex:[a-m]",
        "--engine.max-rows",
        "6",
    ),
    *("--device", "cpu", "--dtype", "float64", "--grading.extractors", "last_number", "--pairs.require", "none"),
]
SHARE = ["--value.continuations", "2"]


def run(*arguments: str) -> int:
    return main(["pairs", "tree", *arguments])


def test_search_and_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "an [odd] name"
    assert run(*PROBLEMS, *SMALL, *SHARE, "--out", str(out)) == 0
    shown = capsys.readouterr().out
    for text in ("building pairs of 3/3", "of 3 items", "nodes", "tokens of steps"):
        assert text in shown
    assert f"pairs, summary and settings: {out}" in shown
    rows = load_rows(parse_spec(str(out)), contract=STEP_PREFERENCE)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["pairs"] == len(rows) > 0
    assert rows[0]["pairing"]["search"]["iterations"] == 1
    assert rows[0]["pairing"]["max_pairs"] == 8
    before = (out / "pairs.jsonl").read_bytes()
    assert run(*PROBLEMS, *SMALL, *SHARE, "--out", str(out)) == 0
    assert (out / "pairs.jsonl").read_bytes() == before
    capsys.readouterr()
    assert run(*PROBLEMS, *SMALL, *SHARE, "--out", str(out), "--pairs.max-pairs", "1") == 2
    assert "max_pairs" in capsys.readouterr().err, "other settings, the same folder"


def test_a_checker_as_value(tmp_path: Path) -> None:
    out = tmp_path / "checked"
    words = ["--value", "StepScore", "--value.scorer", "checker"]
    assert run(*PROBLEMS, *SMALL, *words, "--out", str(out)) == 0
    (row, *_) = load_rows(parse_spec(str(out)))
    assert row["pairing"]["value"]["scorer"]["scorer"] == "checker"
    assert row["pairing"]["value"]["reduction"] == "product"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--problems", "x.jsonl"], "give --model"),
        (["--completions", "x.jsonl"], "completions"),
        ([*PROBLEMS, *SMALL, "--search.iterations", "0"], "iterations=0"),
        ([*PROBLEMS, *SMALL, "--search.actions", "1"], "actions"),
        ([*PROBLEMS, *SMALL, "--search.depth", "5"], "look-ahead"),
        ([*PROBLEMS, *SMALL, "--sampling.temperature", "0"], "temperature"),
        ([*PROBLEMS, *SMALL, "--value", "Judge"], "Judge"),
        ([*PROBLEMS, *SMALL, "--value", "StepScore"], "give --value.scorer"),
        (
            [*PROBLEMS, *SMALL, "--value", "ContinuationShare", "--value.reduction", "min"],
            "is not a setting of value",
        ),
        ([*PROBLEMS, *SMALL, "--pairs.max_pairs", "0"], "pairs.max_pairs=0"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments, "--out", str(tmp_path / "out")) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
