"""What jobs of a claim measure: the same numbers as the commands they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stepkd.claims.claim_file import load_claim
from stepkd.claims.jobs import problem_columns, run_job
from stepkd.cli import main
from stepkd.errors import DataError
from stepkd.runs.files import write_jsonl
from stepkd.runs.job import read_results

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "claims"


def test_problem_columns() -> None:
    def sample(verdict: str, labels: list[bool | None] | None, vote: str) -> dict[str, object]:
        finish = {"finish": "stop", "completion": vote}
        return {"verdict": verdict, "step_labels": labels, "vote": vote, "tokens": 10 * len(labels or ()), **finish}

    rows = [
        {"id": "a", "samples": [sample("correct", [True, True], "5"), sample("correct", [False, True], "5")]},
        {"id": "b", "samples": [sample("incorrect", [False, False, True], "4"), sample("correct", [True], "3")]},
        {"id": "c", "samples": [sample("correct", None, "5"), sample("correct", [True, None], "5")]},
    ]
    assert problem_columns(rows) == {
        "pass@1": [1.0, 0.5, 1.0],
        "mean_tokens": [20.0, 20.0, 10.0],
        "step_accuracy": [[3, 4], [2, 4], [1, 1]],
        "correct_with_incorrect_step": [[1, 2], [0, 1], [0, 0]],
        "clean@1": [0.5, 0.5, 1.0],
        "distinct": [0.5, 1.0, 0.5],
    }


def test_a_claim_measures_what_its_evaluations_say(tmp_path: Path) -> None:
    small = {"model": "tiny-0.1m", "task": "modular:terms=3,modulus=10", "demonstrations": 500}
    small |= {"teacher_steps": 2, "student_steps": 2, "problems": 8, "samples": 2}
    path = tmp_path / "small.yaml"
    own = {"claim": "x", "source": "y", "base": str(RECIPES / "base" / "student")}
    own |= {"statements": [{"metric": "greedy", "arm": "student", "bound": 0.5}]}
    path.write_text(json.dumps(own | {"quick": {"seeds": [0], "settings": small}}))
    assert main(["claims", "quick", str(path), "--out", str(tmp_path / "runs")]) == 0
    rows = {row["arm"]: row for row in read_results(tmp_path / "runs" / "small-quick")}
    unit = tmp_path / "runs" / "small-quick" / "units" / "main" / "seed-0"
    summaries = {each: sorted(unit.glob(f"{each}-*/summary.json")) for each in ("sampled", "greedy")}
    assert {name: len(found) for name, found in summaries.items()} == {"sampled": 2, "greedy": 2}
    found = {name: [json.loads(each.read_text())["metrics"] for each in files] for name, files in summaries.items()}
    for row in rows.values():
        pass_at_1, greedy = (sum(row["metrics"][name]) / 8 for name in ("pass@1", "greedy"))
        correct, steps = map(sum, zip(*row["metrics"]["step_accuracy"], strict=True))
        assert any(
            pass_at_1 == pytest.approx(each["pass@1"]["value"])
            and correct / steps == pytest.approx(each["step_accuracy"]["value"])
            for each in found["sampled"]
        )
        assert any(greedy == pytest.approx(each["pass@1"]["value"]) for each in found["greedy"])
    claim = load_claim(path, quick=True)
    assert list(claim.metrics) == list(rows["student"]["metrics"])
    teachers = [json.loads(each.read_text())["columns"] for each in unit.glob("teacher-*.json")]
    assert [(each["steps"], each["completions"]) for each in teachers] == [(2, 128)]
    assert teachers[0]["last.loss"] == teachers[0]["loss"], "of a run of no more steps than the last 20"


def test_rows_are_converted_as_the_command_does(tmp_path: Path) -> None:
    rows = [
        {"id": f"{n}", "prompt": "1+1", "completions": [f"{n}"], "labels": [n < 2], "outcome": n < 2} for n in range(4)
    ]
    write_jsonl(tmp_path / "all.jsonl", rows)
    to = {"class_path": "Preference", "init_args": {"max_pairs": 1, "seed": 3}}
    settings = {"rows": str(tmp_path / "all.jsonl"), "to": to}
    measured = run_job("convert", settings, tmp_path / "out")
    assert measured.columns["rows"] == 1
    words = ["--to", "Preference", "--to.max_pairs", "1", "--to.seed", "3", "--out", str(tmp_path / "pairs.jsonl")]
    assert main(["convert", settings["rows"], *words]) == 0
    assert (tmp_path / "out" / "rows.jsonl").read_bytes() == (tmp_path / "pairs.jsonl").read_bytes()


def test_rows_are_drawn_by_seed_and_key(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "all.jsonl", [{"n": n, "correct": n % 4 == 0} for n in range(20)])
    settings = {"rows": str(tmp_path / "all.jsonl"), "count": 5, "seed": 0}

    def drawn(place: str, **changes: object) -> str:
        measured = run_job("draw", settings | {"key": "a"} | changes, tmp_path / place)
        assert measured.columns == {"rows": 5, "available": 20}
        return (tmp_path / place / "rows.jsonl").read_text()

    assert drawn("one") == drawn("two")
    assert len({drawn("one"), drawn("three", key="b"), drawn("four", seed=1)}) == 3
    with pytest.raises(DataError, match="21 rows are wanted, and there are 20"):
        run_job("draw", settings | {"key": "a", "count": 21}, tmp_path / "five")
    wrong = run_job("draw", settings | {"key": "a", "count": 15, "correct": False}, tmp_path / "six")
    assert wrong.columns == {"rows": 15, "available": 15}
    assert "true" not in (tmp_path / "six" / "rows.jsonl").read_text()
