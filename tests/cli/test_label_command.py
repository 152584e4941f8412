"""``stepkd label`` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stepkd.cli import main

SMALL = ["--engine.max-rows", "4", "--device", "cpu", "--dtype", "float64", "--grading.extractors", "last_number"]
PROBLEMS = [
    *("--solutions", "Sampled", "--solutions.problems", 'task:task="modular:terms=3,modulus=2",n=3'),
    *("--solutions.model", "tiny-0.1m", "--solutions.sampling.n", "2", "--solutions.sampling.max_new_tokens", "8"),
    *SMALL,
]
SEED_3 = ["--solutions.sampling.seed", "3", "--steps", "Cut", "--steps.segmenter", "sentence"]
CONTINUED = ["--labeller", "MonteCarlo", "--labeller.sampling.n", "2", "--labeller.sampling.max_new_tokens", "8"]
CHECKED = ["--labeller", "TaskChecker"]


def run(*arguments: str) -> int:
    return main(["label", *arguments])


def existing(folder: Path) -> list[str]:
    return ["--solutions", "Existing", "--solutions.completions", str(folder), "--device", "cpu"]


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_label_consensus_and_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "an [odd] name"
    assert run(*PROBLEMS, *CONTINUED, *SEED_3, "--out", str(out)) == 0
    shown = capsys.readouterr().out
    for text in ("preparing solutions 3/3", "labelling 6/6", "6 of 6 solutions of 3 problems", "share correct"):
        assert text in shown
    assert "sampling: 6 solutions" in shown
    assert "continuations" in shown
    assert f"labels, summary and settings: {out}" in shown
    before = (out / "labels.jsonl").read_bytes()
    assert run(*PROBLEMS, *CONTINUED, *SEED_3, "--out", str(out)) == 0
    assert (out / "labels.jsonl").read_bytes() == before

    checked = tmp_path / "checked"
    assert run(*CHECKED, *existing(out), "--out", str(checked)) == 0
    capsys.readouterr()
    agreed = tmp_path / "agreed.jsonl"
    assert main(["consensus", str(checked), str(checked), "--truth", str(checked), "--out", str(agreed)]) == 0
    shown = capsys.readouterr().out
    assert "6 kept, 0 disagree" in shown
    assert "agreed: balanced accuracy" in shown
    assert f"6 rows in {agreed}" in shown
    trl = tmp_path / "trl.jsonl"
    assert main(["convert", str(agreed), "--to", "TRLStepwise", "--out", str(trl)]) == 0
    assert sorted(lines(trl)[0]) == ["completions", "labels", "prompt"]
    assert "6 rows" in capsys.readouterr().out


def test_scorer_as_labeller(tmp_path: Path) -> None:
    assert run(*PROBLEMS, *CHECKED, "--out", str(tmp_path / "a")) == 0
    for name, scorer in (("b", "checker"), ("c", "Checker")):
        words = ["--labeller", "Scored", "--labeller.scorer", scorer, "--out", str(tmp_path / name)]
        assert run(*existing(tmp_path / "a"), *words) == 0
    rows = [lines(tmp_path / name / "labels.jsonl") for name in "abc"]
    assert [row["step_labels"] for row in rows[0]] == [row["step_labels"] for row in rows[1]]
    assert rows[1] == rows[2], "a word, or a class of settings"
    assert rows[1][0]["labelling"]["scorer"]["scorer"] == "checker"  # type: ignore[index]


def test_another_prompt_is_not_taken_up_silently(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Completions sampled under one template are not continued under another just because a file names none."""
    assert run(*PROBLEMS, *CHECKED, "--out", str(tmp_path / "a")) == 0
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({name: value for name, value in row.items() if name not in ("task", "meta")}) + "\n"
            for row in lines(tmp_path / "a" / "labels.jsonl")
        )
    )
    again = [*existing(rows), "--solutions.model", "tiny-0.1m", *SMALL, *CONTINUED]
    capsys.readouterr()
    assert run(*again, "--out", str(tmp_path / "b")) == 2
    assert "give the template that it was sampled with, --template NAME" in capsys.readouterr().err
    assert run(*again, "--template", "task", "--out", str(tmp_path / "c")) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (PROBLEMS, "give --out"),
        (["--out", "x"], "give --solutions"),
        (["--solutions", "Sampled", "--solutions.model", "m", "--out", "x"], "give --solutions.problems"),
        (["--solutions", "Sampled", "--solutions.problems", "task", "--out", "x"], "give --solutions.model"),
        ([*PROBLEMS, "--labeller", "TaskChecker", "--labeller.reduce", "mean", "--out", "x"], "reduce"),
        ([*PROBLEMS, "--labeller", "Outcome", "--labeller.sampling.n", "2", "--out", "x"], "not a setting of labeller"),
        ([*PROBLEMS, "--solutions.completions", "y", "--out", "x"], "not a setting of solutions"),
        ([*PROBLEMS, "--labeller", "TaskCheker", "--out", "x"], "TaskCheker"),
        (["--solutions", "Existing", "--solutions.completions", "nothing.jsonl", "--out", "x"], "no such file"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = [str(tmp_path / "x") if argument == "x" else argument for argument in arguments]
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_the_base_of_a_choice_is_no_choice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--solutions", "SolutionsConfig", "--out", str(tmp_path / "x")) == 2
    assert "SolutionsConfig is abstract" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_consensus_of_files_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["consensus", "a.jsonl", "b.jsonl", "--out", str(tmp_path / "x")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_a_job_is_given_again_by_what_it_leaves(tmp_path: Path) -> None:
    """``config.yaml`` beside the labels is the command's settings: as ``--config`` it gives the same labels."""
    assert run(*PROBLEMS, *CHECKED, *SEED_3, "--out", str(tmp_path / "a")) == 0
    assert run("--config", str(tmp_path / "a" / "config.yaml"), "--out", str(tmp_path / "b")) == 0
    assert lines(tmp_path / "a" / "labels.jsonl") == lines(tmp_path / "b" / "labels.jsonl")
