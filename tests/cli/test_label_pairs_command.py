"""Preference data from the command line: ``stepkd label --to``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stepkd.cli import main

PROBLEMS = ["--problems", 'task:task="modular:terms=3,modulus=2",n=4', "--model", "tiny-0.1m", "--samples", "4"]
SMALL = [
    *("--max-new-tokens", "48", "--device", "cpu", "--dtype", "float64", "--extractors", "last_number"),
    *("--segmenter", "regex:[^0-9]"),  # an untrained model writes few lines
]


def run(*arguments: str) -> int:
    return main(["label", *arguments])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Solutions of an untrained model, labelled by the exact checker."""
    out = tmp_path_factory.mktemp("labels") / "job"
    assert run(*PROBLEMS, *SMALL, "--labeller", "checker", "--out", str(out)) == 0
    return out


def test_step_preference(labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--rollouts", str(labelled), "--to", "step_preference", "--continuations", "40", *SMALL]
    assert run(*command, "--out", str(tmp_path / "job"), "--max-pairs", "2") == 0
    shown = capsys.readouterr().out
    summary = json.loads((tmp_path / "job" / "summary.json").read_text())
    pairs = lines(tmp_path / "job" / "pairs.jsonl")
    assert f"{len(pairs)} pairs of {summary['problems']} problems, from" in shown
    assert "tokens generated" in shown
    assert f"building pairs of {summary['items']}/{summary['items']}" in shown
    assert f"pairs, summary and settings: {tmp_path / 'job'}" in shown
    assert sorted(path.name for path in (tmp_path / "job").iterdir()) == [
        "log",
        "pairs.jsonl",
        "parts",
        "settings.json",
        "summary.json",
    ]
    solutions = {row["id"]: row for row in lines(labelled / "labels.jsonl")}
    for pair in pairs:
        source = solutions[pair["pair_facts"]["rollout"]]
        assert [*pair["prefix"], pair["rejected"]] == source["steps"][: len(pair["prefix"]) + 1]
        assert (pair["pairing"]["temperature"], pair["pairing"]["top_p"]) == (0.8, 0.95), "the paper's by default"
    before = (tmp_path / "job" / "pairs.jsonl").read_bytes()
    assert run(*command, "--out", str(tmp_path / "job"), "--max-pairs", "2") == 0
    assert (tmp_path / "job" / "pairs.jsonl").read_bytes() == before
    assert run(*command, "--out", str(tmp_path / "job"), "--temperature", "1", "--overwrite") == 0
    assert lines(tmp_path / "job" / "pairs.jsonl")[0]["pairing"]["temperature"] == 1


def test_converters(labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = lines(labelled / "labels.jsonl")
    assert run("--convert", str(labelled), "--to", "binary", "--out", str(tmp_path / "binary.jsonl")) == 0
    assert lines(tmp_path / "binary.jsonl") == rows
    assert "0 right steps" in capsys.readouterr().out
    assert run("--convert", str(labelled), "--to", "unpaired", "--out", str(tmp_path / "unpaired.jsonl")) == 0
    assert [row["label"] for row in lines(tmp_path / "unpaired.jsonl")] == [row["correct"] for row in rows]
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(
        "".join(json.dumps(row | {"correct": i % 2 == 0, "finish": "stop"}) + "\n" for i, row in enumerate(rows))
    )
    out = tmp_path / "pairs.jsonl"
    assert run("--convert", str(mixed), "--to", "preference", "--max-pairs", "3", "--out", str(out)) == 0
    assert len(lines(out)) == 12
    assert "4 problems" in capsys.readouterr().out
    clean = ["--convert", str(mixed), "--to", "preference", "--chosen-steps", "clean", "--out", str(out)]
    assert run(*clean) == 2, "every solution has a wrong step"
    assert "4 problems_without_a_right_one_to_choose" in capsys.readouterr().err
    assert len(lines(out)) == 12, "what was there stays"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "step_preference", "--convert", "c"], "give the rows as --rollouts, not as --convert"),
        (["--to", "step_preference"], "needs labelled rollouts: --rollouts FOLDER"),
        (["--to", "step_preference", "--rollouts", "nothing.jsonl"], "no such file"),
        (["--to", "step_preference", "--rollouts", "r", "--judge", "m"], "--judge goes with --check-step"),
        (["--to", "step_preference", "--rollouts", "r", "--from", "right"], "unknown --from 'right'"),
        (["--to", "step_preference", "--rollouts", "r", "--problems", "task"], "label --problems first"),
        (
            ["--to", "preference"],
            "--convert FILE and --to KIND go together (--to step_preference and tree_preference stand alone",
        ),
        (["--to", "preferences", "--convert", "c.jsonl"], "no such file"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(*arguments, "--out", str(tmp_path / "x")) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
