"""Rows beside a stage's own: how many of an earlier task, and which problems to think about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stepkd.cli import main
from stepkd.data.config import DataConfig
from stepkd.data.load import load_rows
from stepkd.errors import ConfigError, DataError
from stepkd.labels.convert import convert_rows
from stepkd.labels.curriculum import Replay, ThinkMode
from stepkd.runs.files import write_jsonl


def problems(name: str, count: int) -> list[dict[str, Any]]:
    return [
        {"id": f"{name}/{i}", "prompt": f"{name} {i}", "solution": f"#### {i}", "answer": str(i)} for i in range(count)
    ]


@pytest.fixture
def earlier(tmp_path: Path) -> str:
    write_jsonl(tmp_path / "earlier.jsonl", problems("old", 30))
    return str(tmp_path / "earlier.jsonl")


@pytest.mark.parametrize(("share", "count"), [(0.2, 10), (0.25, 13), (0.01, 0), (0.4, 27)])
def test_the_share_is_exact(share: float, count: int, earlier: str) -> None:
    new = problems("new", 40)
    converted = convert_rows(new, Replay(earlier=earlier, share=share))
    assert converted.rows[:40] == new
    old = [row["id"] for row in converted.rows[40:]]
    assert len(old) == len(set(old)) == count == converted.counts["earlier"]
    assert set(old) <= {row["id"] for row in problems("old", 30)}
    assert old == [row["id"] for row in convert_rows(new, Replay(earlier=earlier, share=0.4)).rows[40:]][:count]


def test_no_share_is_the_rows_themselves_and_seeds_take_others(earlier: str) -> None:
    new = problems("new", 40)
    assert convert_rows(new, Replay(earlier=earlier, share=0.0)).rows == new
    ways = [convert_rows(new, Replay(earlier=earlier, seed=seed)).rows for seed in (0, 1)]
    assert ways[0] != ways[1]


def test_replay_refuses_what_cannot_be_mixed(earlier: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"share of 0\.5 beside 40 rows is 40 earlier rows, and there are 30: lower"):
        convert_rows(problems("new", 40), Replay(earlier=earlier, share=0.5))
    with pytest.raises(ConfigError, match=r"share=1\.0"):
        Replay(earlier=earlier, share=1.0)
    with pytest.raises(DataError, match=r"none\.jsonl"):
        convert_rows(problems("new", 2), Replay(earlier=str(tmp_path / "none.jsonl")))


def sample(problem: str, correct: bool | None, number: int) -> dict[str, Any]:
    row = {"id": f"{problem}/{number}", "problem_id": problem, "prompt": f"what is {problem}?", "answer": "2"}
    return row | {
        "completion": "#### 2",
        "token_ids": [5],
        "logprobs": [-0.1],
        "step_ends": [1],
        "finish": "stop",
        "correct": correct,
    }


OUTCOMES = {
    "always": [True, True],
    "half": [True, False],
    "third": [True, False, False],
    "never": [False, False],
    "once graded": [None, True],
    "ungraded": [None, None],
}
ROWS = [sample(name, correct, i) for name, outcomes in OUTCOMES.items() for i, correct in enumerate(outcomes)]


@pytest.mark.parametrize(
    ("threshold", "think"),
    [(0.5, ["third", "never"]), (0.51, ["half", "third", "never"]), (0.3, ["never"])],
)
def test_modes_by_pass_rate(threshold: float, think: list[str]) -> None:
    converted = convert_rows(ROWS, ThinkMode(threshold=threshold))
    assert [row["id"] for row in converted.rows if row["mode"] == "think"] == think
    rates = {row["id"]: (row["pass_rate"], row["samples"]) for row in converted.rows}
    assert rates == {"always": (1, 2), "half": (0.5, 2), "third": (1 / 3, 3), "never": (0, 2), "once graded": (1, 1)}
    assert converted.counts == {"rows": 5, "think": len(think), "no_think": 5 - len(think), "ungraded": 1}
    assert converted.rows[0]["prompt"] == "what is always?"
    assert converted.rows[0]["answer"] == "2"
    assert "solution" not in converted.rows[0]


def test_modes_that_no_threshold_or_no_grade_gives() -> None:
    with pytest.raises(ConfigError, match=r"threshold=1\.0: must lie between 0 and 1"):
        ThinkMode(threshold=1.0)
    with pytest.raises(DataError, match=r"none of 2 rows is left \(1 ungraded\)"):
        convert_rows(ROWS[-2:], ThinkMode())


def test_on_the_command_line(tmp_path: Path, earlier: str) -> None:
    """Modes are read back as the solutions of a fit."""
    kept = ("id", "problem_id", "prompt", "answer")
    steps = [{name: row[name] for name in kept} | {"completions": ["#### 2"], "labels": [True]} for row in ROWS]
    rows = [row | {"outcome": each["correct"]} for row, each in zip(steps, ROWS, strict=True)]
    write_jsonl(tmp_path / "samples.jsonl", [row for row in rows if row["outcome"] is not None])
    assert (
        main(["convert", str(tmp_path / "samples.jsonl"), "--to", "ThinkMode", "--out", str(tmp_path / "m.jsonl")]) == 0
    )
    modes = load_rows(DataConfig(path=str(tmp_path / "m.jsonl"), columns={"solution": "mode"}))
    assert [row["solution"] for row in modes] == ["no_think", "no_think", "think", "think", "no_think"]
    words = ["--to", "Replay", "--to.earlier", earlier, "--to.share", "0.5", "--out", str(tmp_path / "mixed.jsonl")]
    assert main(["convert", earlier, *words]) == 0
    assert len(load_rows(DataConfig(path=str(tmp_path / "mixed.jsonl")))) == 60
