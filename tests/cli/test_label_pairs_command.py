"""Preference data from the command line: ``stepkd pairs step`` and ``stepkd convert``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stepkd.cli import main

SMALL = ["--device", "cpu", "--dtype", "float64", "--grading.extractors", "last_number"]
CUT = "regex:[^0-9]"  # an untrained model writes few lines


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Solutions of an untrained model, labelled by the exact checker."""
    out = tmp_path_factory.mktemp("labels") / "job"
    problems = 'task:task="modular:terms=3,modulus=2",n=4'
    words = ["--solutions", "Sampled", "--solutions.problems", problems, "--solutions.model", "tiny-0.1m"]
    words += ["--solutions.sampling.n", "4", "--solutions.sampling.max_new_tokens", "48"]
    words += ["--steps", "Cut", "--steps.segmenter", CUT, "--labeller", "TaskChecker", *SMALL]
    assert main(["label", *words, "--out", str(out)]) == 0
    return out


def test_step_preference(labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["pairs", "step", "--completions", str(labelled), "--sampling.n", "24", *SMALL]
    command += ["--sampling.max_new_tokens", "48", "--out", str(tmp_path / "job")]
    assert main([*command, "--max-pairs", "2"]) == 0
    shown = capsys.readouterr().out
    summary = json.loads((tmp_path / "job" / "summary.json").read_text())
    pairs = lines(tmp_path / "job" / "pairs.jsonl")
    assert f"{len(pairs)} pairs of {summary['problems']} problems, from" in shown
    assert "tokens generated" in shown
    assert f"building pairs of {summary['items']}/{summary['items']}" in shown
    assert f"pairs, summary and settings: {tmp_path / 'job'}" in shown
    assert sorted(path.name for path in (tmp_path / "job").iterdir()) == [
        "config.yaml",
        "log",
        "pairs.jsonl",
        "parts",
        "settings.json",
        "summary.json",
    ]
    solutions = {row["id"]: row for row in lines(labelled / "labels.jsonl")}
    for pair in pairs:
        source = solutions[pair["pair_facts"]["solution_id"]]
        assert [*pair["prefix"], pair["rejected"]] == source["steps"][: len(pair["prefix"]) + 1]
        assert (pair["pairing"]["temperature"], pair["pairing"]["top_p"]) == (0.8, 0.95), "the paper's by default"
    before = (tmp_path / "job" / "pairs.jsonl").read_bytes()
    assert main([*command, "--max-pairs", "2"]) == 0
    assert (tmp_path / "job" / "pairs.jsonl").read_bytes() == before
    assert main([*command, "--sampling.temperature", "1", "--overwrite"]) == 0
    assert lines(tmp_path / "job" / "pairs.jsonl")[0]["pairing"]["temperature"] == 1


def test_converters(labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = lines(labelled / "labels.jsonl")
    assert main(["convert", str(labelled), "--to", "Unpaired", "--out", str(tmp_path / "unpaired.jsonl")]) == 0
    assert [row["label"] for row in lines(tmp_path / "unpaired.jsonl")] == [row["correct"] for row in rows]
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(
        "".join(json.dumps(row | {"correct": i % 2 == 0, "finish": "stop"}) + "\n" for i, row in enumerate(rows))
    )
    out = tmp_path / "pairs.jsonl"
    command = ["convert", str(mixed), "--to", "Preference", "--out", str(out)]
    assert main([*command, "--to.max-pairs", "3"]) == 0
    assert len(lines(out)) == 12
    assert "4 problems" in capsys.readouterr().out
    assert main([*command, "--to.chosen-steps", "clean"]) == 2, "every solution has an incorrect step"
    assert "4 problems_without_a_correct_one_to_choose" in capsys.readouterr().err
    assert len(lines(out)) == 12, "what was there stays"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pairs", "step"], "give --completions"),
        (["pairs", "step", "--completions", "nothing.jsonl"], "no such file"),
        (["pairs", "step", "--completions", "r", "--check_step"], "check_step"),
        (["pairs", "step", "--completions", "r", "--take", "correct"], "take"),
        (["pairs", "steps", "--completions", "r"], "'steps' is none of step, tree. Did you mean 'step'"),
        (["convert", "c.jsonl"], "give --to"),
        (["convert", "c.jsonl", "--to", "Preferences"], "Preferences"),
        (["convert", "c.jsonl", "--to", "Unpaired", "--to.max_pairs", "2"], "max_pairs"),
        (["convert", "c.jsonl", "--to", "Unpaired"], "no such file"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([*arguments, "--out", str(tmp_path / "x")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
