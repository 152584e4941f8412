"""``stepkd score`` from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stepkd.cli import main
from stepkd.models.checkpoint import save_policy
from stepkd.models.policy import Policy
from stepkd.models.spec import LabelTokens, build_tiny
from stepkd.runs.files import write_jsonl
from stepkd.runs.launcher import LaunchInfo
from stepkd.tasks.rows import Noise, make_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported reward model and noisy solutions: twelve to score, twelve held out."""
    folder = tmp_path_factory.mktemp("score")
    model, tokenizer = build_tiny("tiny-0.1m", seed=0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(6 if weight.ndim > 1 else 1)
    policy = Policy(model, tokenizer)
    policy.attach_step_head(LabelTokens())
    save_policy(policy, folder / "prm")
    for name, seed in (("rows", 0), ("held", 1)):
        rows = [
            {key: row[key] for key in ("id", "prompt", "answer", "task", "meta")}
            | {"completions": row["steps"], "labels": row["step_labels"], "outcome": all(row["step_labels"])}
            for row in make_rows("modular:terms=3", 12, seed=seed, noise=Noise(rate=0.4))
        ]
        write_jsonl(folder / f"{name}.jsonl", rows)
    return folder


def run(folder: Path, out: Path, *arguments: str, scorer: str | None = None) -> int:
    rows = str(folder / "rows.jsonl")
    chosen = ["--scorer", scorer] if scorer else ["--scorer", "PRM", "--scorer.path", str(folder / "prm")]
    return main(["score", *chosen, "--completions", rows, "--out", str(out), *arguments])


def read(out: Path) -> list[dict[str, Any]]:
    return read_lines(out / "results.jsonl")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_reward_model(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "an [odd] name"
    settings = ("--scorer.template", "task", "--max_rows", "5", "--scorer.dtype", "float32", "--device", "cpu")
    assert run(folder, out, *settings, "--scorer.attention", "eager") == 0
    shown = capsys.readouterr().out
    for text in ("scoring solutions 12/12", "12 solutions of 12 problems, 36 steps", "mean score (product): 0."):
        assert text in shown
    assert "of correct solutions 0." in shown
    assert f"scored rows: {out / 'results.jsonl'}" in shown
    assert "not scored" not in shown
    rows = read(out)
    assert all(0 <= value <= 1 for row in rows for value in row["step_scores"])
    found = json.loads((out / "settings.json").read_text())
    assert (found["batch_size"], found["attention"], found["scorer"]["dtype"]) == (5, "eager", "float32")
    before = (out / "results.jsonl").read_bytes()
    assert run(folder, out, *settings, "--scorer.attention", "eager") == 0
    assert (out / "results.jsonl").read_bytes() == before
    assert run(folder, out, *settings, "--reduction", "min") == 2
    assert "reduction: 'product' then, 'min' now" in capsys.readouterr().err
    assert run(folder, out, *settings, "--reduction", "min", "--overwrite") == 0
    for row, old in zip(read(out), rows, strict=True):
        assert row["step_scores"] == pytest.approx(old["step_scores"], abs=1e-6)
        assert row["score"] == min(row["step_scores"])


def test_steps_that_do_not_fit_are_counted(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, tmp_path / "o", "--scorer.template", "task", "--scorer.max_length", "22") == 0
    shown = capsys.readouterr().out
    rows = read(tmp_path / "o")
    unscored = [row for row in rows if None in row["step_scores"]]
    assert unscored
    assert all(row["score"] is None for row in unscored)
    assert f"not scored: {len(unscored)} solutions that do not fit" in shown


def test_solutions_that_cannot_be_read_are_counted(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = read_lines(folder / "rows.jsonl")
    rows[3]["completions"][1] = "the marker ~ itself"
    write_jsonl(tmp_path / "rows.jsonl", rows)
    (tmp_path / "prm").symlink_to(folder / "prm")
    assert run(tmp_path, tmp_path / "o", "--scorer.template", "task") == 0
    shown = capsys.readouterr().out
    assert "not scored: 1 solutions that could not be read (score null, see score_error), for instance: " in shown
    assert "the step marker '~'" in shown
    assert [row["score"] is None for row in read(tmp_path / "o")] == [i == 3 for i in range(12)]


def test_temperatures(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = ("--fit-temperature", str(folder / "held.jsonl"))
    assert run(folder, tmp_path / "fit", "--scorer.template", "task", *held) == 0
    assert "temperature: " in capsys.readouterr().out
    saved = str(json.loads((tmp_path / "fit" / "summary.json").read_text())["temperature"])
    assert run(folder, tmp_path / "given", "--scorer.template", "task", "--scorer.temperature", saved) == 0
    assert "temperature: " in capsys.readouterr().out
    fitted, given = read(tmp_path / "fit"), read(tmp_path / "given")
    for one, other in zip(fitted, given, strict=True):
        assert one["step_scores"] == pytest.approx(other["step_scores"], abs=1e-6)
        assert one["scorer"] == other["scorer"]
    assert run(folder, tmp_path / "x", "--scorer.template", "task", "--scorer.temperature", saved, *held) == 2
    assert "contradict each other" in capsys.readouterr().err


def test_checker_judge_and_head(folder: Path, tmp_path: Path) -> None:
    assert run(folder, tmp_path / "c", scorer="checker") == 0
    for row in read(tmp_path / "c"):
        assert row["step_scores"] == [float(label) for label in row["labels"]]
    judge = ("--scorer.path", "tiny-0.1m", "--scorer.answers", "Y", "N", "--scorer.reference", "--device", "cpu")
    assert run(folder, tmp_path / "j", *judge, scorer="Judge") == 0
    assert json.loads((tmp_path / "j" / "settings.json").read_text())["scorer"]["reference"] is True
    settings = {"labels": ["b", "a"], "meaning": "value", "format": {"marker": "~"}}
    head = json.dumps({"class_path": "LabelTokens", "init_args": settings})
    plain = ("--scorer.path", "tiny-0.1m", "--scorer.head", head, "--scorer.template", "task")
    assert run(folder, tmp_path / "h", *plain, scorer="PRM") == 0
    assert read(tmp_path / "h")[0]["scorer"]["reduction"] == "last"
    assert json.loads((tmp_path / "h" / "settings.json").read_text())["scorer"]["head"]["format"]["marker"] == "~"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "does not say which prompt template"),
        (["--scorer.template", "tusk"], "no prompt template named 'tusk'"),
        (["--scorer.template", "task", "--reduction", "median"], "reduction: expected"),
        (["--scorer.template", "task", "--max_rows", "0"], "max_rows=0"),
        (["--scorer.template", "task", "--scorer.max_length", "1"], "max_length=1"),
        (["--scorer.template", "task", "--device", "gpu"], "device='gpu'"),
        (["--scorer.template", "task", "--scorer.separator", "x"], "'separator' is not a setting of scorer"),
        (["--scorer.template", "task", "--scorer.temperature", "0"], "scorer.temperature=0.0: must lie in [0.01, 100]"),
        (["--scorer.template", "task", "--fit-temperature", "absent.jsonl"], "absent.jsonl"),
        (["--scorer.template", "task", "--scorer.head", "{"], "scorer.head"),
        (
            ["--scorer", "runs/prm", "--scorer.dtype", "float32"],
            "name a class that has it: --scorer PRM or Judge",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(folder, tmp_path / "o", *arguments) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("stepkd score: ")
    assert message in errors
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_ranks_of_a_launcher_share_the_solutions(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--scorer.template", "task", "--max_rows", "2", "--device", "cpu")
    assert run(folder, tmp_path / "alone", *words) == 0
    capsys.readouterr()
    for rank, said in enumerate(("rank 0 has done its share; the last rank to finish writes the scored rows", "mean")):
        info = LaunchInfo(launcher="elastic", rank=rank, local_rank=rank, world_size=2, local_world_size=2)
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
        monkeypatch.setattr("stepkd.runs.job.check_launch", lambda info=info: info)
        assert run(folder, tmp_path / "shared", *words) == 0
        assert said in capsys.readouterr().out
    assert read(tmp_path / "shared") == read(tmp_path / "alone")
