"""``stepkd label`` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stepkd.cli import main

PROBLEMS = ["--problems", 'task:task="modular:terms=3,modulus=2",n=3', "--model", "tiny-0.1m", "--samples", "2"]
SMALL = [
    *("--rollouts-per-step", "2", "--max-new-tokens", "8", "--batch-size", "4", "--device", "cpu"),
    *("--dtype", "float64", "--extractors", "last_number"),
]


def run(*arguments: str) -> int:
    return main(["label", *arguments])


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_label_consensus_and_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "an [odd] name"
    assert run(*PROBLEMS, *SMALL, "--out", str(out), "--seed", "3", "--segmenter", "sentence") == 0
    shown = capsys.readouterr().out
    for text in ("preparing solutions 3/3", "labelling 6/6", "6 of 6 solutions of 3 problems labelled", "share right"):
        assert text in shown
    assert "sampling: 6 solutions" in shown
    assert "rollouts" in shown
    assert f"labels, summary and settings: {out}" in shown
    before = (out / "labels.jsonl").read_bytes()
    assert run(*PROBLEMS, *SMALL, "--out", str(out), "--seed", "3", "--segmenter", "sentence") == 0
    assert (out / "labels.jsonl").read_bytes() == before

    checked = tmp_path / "checked"
    assert run("--labeller", "checker", "--rollouts", str(out), "--device", "cpu", "--out", str(checked)) == 0
    capsys.readouterr()
    agreed = tmp_path / "agreed.jsonl"
    assert run("--consensus", str(checked), str(checked), "--truth", str(checked), "--out", str(agreed)) == 0
    shown = capsys.readouterr().out
    assert "6 kept, 0 disagree" in shown
    assert "agreed: precision" in shown
    assert f"6 rows in {agreed}" in shown
    trl = tmp_path / "trl.jsonl"
    assert run("--convert", str(agreed), "--to", "trl", "--out", str(trl)) == 0
    assert sorted(lines(trl)[0]) == ["completions", "labels", "prompt"]
    assert "6 rows" in capsys.readouterr().out


def test_scorer_as_labeller(tmp_path: Path) -> None:
    assert run(*PROBLEMS, *SMALL, "--labeller", "checker", "--out", str(tmp_path / "a")) == 0
    assert (
        run(
            *("--labeller", "prm", "--judge", "checker", "--rollouts", str(tmp_path / "a"), "--device", "cpu"),
            *("--out", str(tmp_path / "b")),
        )
        == 0
    )
    rows = [lines(tmp_path / name / "labels.jsonl") for name in "ab"]
    assert [row["step_labels"] for row in rows[0]] == [row["step_labels"] for row in rows[1]]
    assert rows[1][0]["labelling"]["scorer"]["scorer"] == "checker"  # type: ignore[index]


def test_another_prompt_is_not_taken_up_silently(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rollouts sampled under one template are not continued under another just because a file names none."""
    assert run(*PROBLEMS, *SMALL, "--labeller", "checker", "--out", str(tmp_path / "a")) == 0
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({name: value for name, value in row.items() if name not in ("task", "meta")}) + "\n"
            for row in lines(tmp_path / "a" / "labels.jsonl")
        )
    )
    again = ["--rollouts", str(rows), "--model", "tiny-0.1m", *SMALL]
    capsys.readouterr()
    assert run(*again, "--out", str(tmp_path / "b")) == 2
    assert "give the template that it was sampled with, --template NAME" in capsys.readouterr().err
    assert run(*again, "--template", "task", "--out", str(tmp_path / "c")) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--problems", "task"], "give --out"),
        (["--out", "x"], "either --problems (to sample solutions of) or --rollouts"),
        (["--problems", "task", "--out", "x"], "needs --model"),
        (["--problems", "task", "--model", "m", "--labeller", "chekcer", "--out", "x"], "did you mean 'checker'"),
        (["--consensus", "a", "b", "--convert", "c", "--to", "trl", "--out", "x"], "give one of them"),
        (["--convert", "c", "--out", "x"], "--convert FILE and --to KIND go together"),
        (["--to", "trl", "--out", "x"], "--convert FILE and --to KIND go together"),
        (["--truth", "t", "--out", "x"], "--truth goes with --consensus"),
        (["--consensus", "a.jsonl", "b.jsonl", "--out", "x"], "no such file"),
        (["--rollouts", "nothing.jsonl", "--model", "tiny-0.1m", "--out", "x"], "no such file"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = [str(tmp_path / "x") if argument == "x" else argument for argument in arguments]
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
