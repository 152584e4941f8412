"""``stepkd report`` and ``stepkd samples``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from stepkd.cli import main


def test_report_writes_into_the_first_folder_or_where_it_is_told(
    quickstart: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["report", str(quickstart / "scores"), str(quickstart / "labels")]) == 0
    path = quickstart / "scores" / "report.html"
    assert capsys.readouterr().out == f"report: {path}\n"
    assert "<title>scores, labels · stepkd report</title>" in path.read_text()
    assert main(["report", str(quickstart), "--out", str(tmp_path / "deep" / "page.html"), "--solutions", "3"]) == 0
    assert (tmp_path / "deep" / "page.html").is_file()


@pytest.mark.parametrize("command", ["report", "samples"])
def test_no_path_and_a_path_without_anything_are_refused(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command]) == 2
    assert "name at least one folder" in capsys.readouterr().err
    assert main([command, str(tmp_path)]) == 2
    assert "holds nothing that a command left" in capsys.readouterr().err


def test_samples_shows_steps_with_marks_scores_and_disagreement(
    scores: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["samples", str(scores), "--show", "disagrees", "--number", "1"]) == 0
    shown = capsys.readouterr().out
    assert "2+3  (answer 5)" in shown
    assert "scores, 1, ✓ correct, 8 tokens, score 0.44" in shown
    assert "  ✗ a3  0.90 ≠\n  ✓ b  0.70\n" in shown
    assert "1 of 1 (of 8 solutions)" in shown


def test_samples_of_a_search_are_every_methods_answers(search: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["samples", str(search), "--number", "4"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "search, best_of_n@4, answer, ✗ incorrect: 4, 10 tokens, score 0.9, tokens drawn 40, scorer calls 4" in shown
    assert "4 of 24 (of 24 solutions)" in shown


def test_samples_says_which_kinds_there_are_where_one_has_none(
    scores: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["samples", str(scores), "--show", "cut-off"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("none of 8 solutions is cut-off; they are: ")
    assert "disagrees 1" in shown


def test_samples_shows_the_last_rollouts_one_step_or_all(
    training: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(training("run", rollouts=True))
    for words, steps in (([], [20]), (["--step", "0"], [0]), (["--step", "all"], [0, 20])):
        assert main(["samples", run, *words]) == 0
        shown = capsys.readouterr().out
        assert [f"step {step}, 0" in shown for step in (0, 20)] == [step in steps for step in (0, 20)]
    assert "  · 3+4=7  0.25" in shown
    assert main(["samples", run, "--step", "3"]) == 2
    assert "--step 3: there are no rollouts of it, but of [0, 20]" in capsys.readouterr().err


def test_samples_of_a_run_without_rollouts_says_so(
    training: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["samples", str(training("run"))]) == 2
    assert "no solutions there" in capsys.readouterr().err


def test_samples_shows_the_last_rollouts_of_each_of_several_trainings(
    training: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    short, long = (training(name, rollouts=True) for name in ("short", "long"))
    text = (short / "samples.jsonl").read_text()
    (short / "samples.jsonl").write_text(text.splitlines()[0] + "\n")
    assert main(["samples", str(short), str(long)]) == 0
    shown = capsys.readouterr().out
    assert [f"{name}, step {step}, 0" in shown for name, step in (("short", 0), ("long", 0), ("long", 20))] == [
        True,
        False,
        True,
    ]
