"""The one experiment of the foundation, at its smallest, through the command line; and what it counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from stepkd.claims.tiny import tiny_sft, train_tiny
from stepkd.claims.tiny_samples import align_scores, problem_metrics
from stepkd.cli import main
from stepkd.runs.job import read_results

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "claims" / "noisy_student.yaml"


def test_problem_metrics() -> None:
    def sample(verdict: str, labels: list[bool | None] | None, vote: str) -> dict[str, object]:
        return {"verdict": verdict, "step_labels": labels, "vote": vote, "tokens": 10 * len(labels or ())}

    rows = [
        {"id": "a", "samples": [sample("correct", [True, True], "5"), sample("correct", [False, True], "5")]},
        {"id": "b", "samples": [sample("wrong", [False, False, True], "4"), sample("correct", [True], "3")]},
        {"id": "c", "samples": [sample("correct", None, "5"), sample("correct", [True, None], "5")]},
    ]
    assert problem_metrics(rows) == {
        "pass@1": [1.0, 0.5, 1.0],
        "mean_tokens": [20.0, 20.0, 10.0],
        "step_accuracy": [[3, 4], [2, 4], [1, 1]],
        "correct_with_wrong_step": [[1, 2], [0, 1], [0, 0]],
        "clean@1": [0.5, 0.5, 1.0],
    }


def test_the_metrics_agree_with_the_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    recipe["quick"] = {
        "seeds": [0],
        "settings": {
            **{"model": "tiny-0.1m", "task": "modular:terms=3,modulus=10", "demonstrations": 500},
            **{"teacher_steps": 2, "student_steps": 2, "problems": 8, "samples": 2},
        },
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert main(["claims", "quick", str(path), "--out", str(tmp_path / "runs")]) == 0
    out = tmp_path / "runs" / "small-quick"
    rows = {row["arm"]: row for row in read_results(out)}
    assert rows["teacher"]["facts"] == {"train_solutions": 128.0}
    assert rows["student"]["facts"] == {"train_solutions": 256.0}
    for arm, row in rows.items():
        unit = out / "units" / "main" / "seed-0"
        sampled = json.loads((unit / f"{arm}-sampled" / "summary.json").read_text())["metrics"]
        greedy = json.loads((unit / f"{arm}-greedy" / "summary.json").read_text())["metrics"]
        assert sum(row["metrics"]["pass@1"]) / 8 == pytest.approx(sampled["pass@1"]["value"])
        assert sum(row["metrics"]["greedy"]) / 8 == pytest.approx(greedy["pass@1"]["value"])
        right, steps = map(sum, zip(*row["metrics"]["step_accuracy"], strict=True))
        assert right / steps == pytest.approx(sampled["step_accuracy"]["value"])
    weights = out / "units" / "main" / "seed-0" / "teacher" / "model" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    train_tiny(weights.parents[1], tiny_sft, steps=1, start="tiny-0.1m", task="modular", lr=1e-3, seed=0)
    assert weights.stat().st_mtime_ns == before  # an interrupted seed does not train the same model again


def test_scores_follow_their_rollouts_when_one_was_dropped() -> None:
    """Another cut of the same rollouts may lack one; the others keep their own scores."""
    whole = [{"id": f"{p}/{j}", "problem_id": p} for p in "ab" for j in range(3)]
    fewer = [row for row in whole if row["id"] != "a/1"][::-1]  # another order of problems too
    scores = [[0.2, 0.1, 0.0], [0.9, 0.7]]  # b/2, b/1, b/0 and a/2, a/0
    assert align_scores(fewer, scores, whole) == [[0.7, None, 0.9], [0.0, 0.1, 0.2]]
