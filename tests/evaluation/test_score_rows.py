"""``stepkd score``'s job: rows out as they came in, resuming after a kill, temperatures, what is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stepkd.errors import ConfigError, DataError, StepkdError
from stepkd.evaluation.config import ScoreConfig
from stepkd.evaluation.score_rows import labelled_scores, score_file
from stepkd.runs.files import write_jsonl
from stepkd.runs.job import JobOptions
from stepkd.scorers.calibration import fit_temperature, scaled
from stepkd.scorers.load import PRM
from stepkd.scorers.scorer import Judged, Solutions


class Toy:
    """Scores a step by its first number in percent, -1 being no score; may die, and counts what it was asked."""

    def __init__(self, meaning: str = "correctness", *, dies_after: int = 10**9, name: str = "toy") -> None:
        self.meaning: Any = meaning
        self.left = dies_after
        self.asked: list[str] = []
        self.name = name

    def score(self, problems: Sequence[Solutions]) -> list[list[list[float]]]:
        if self.left <= 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.asked += [p.row["prompt"] for p in problems]
        values = [[[float(t.split()[0]) / 100 for t in s] for s in p.solutions] for p in problems]
        return [[[math.nan if v < 0 else v for v in s] for s in p] for p in values]

    def provenance(self) -> dict[str, Any]:
        return {"scorer": "toy", "model": self.name, "meaning": self.meaning}


def row(name: str, prompt: str, scores: list[int], **more: Any) -> dict[str, Any]:
    steps = [f"{score} percent\n" for score in scores]
    return {"id": name, "prompt": prompt, "completions": steps, "labels": [s > 50 for s in scores], **more}


ROWS = [
    row("a", "p", [90, 80], outcome=True),
    row("b", "q", [50], outcome=False, note="kept"),
    row("c", "p", [90, 40, 20], outcome=False),
    row("d", "r", [100, -1]),
    row("e", "s", [0, 60]),
    row("f", "q", [70], step_values=[0.1]),
]


@pytest.fixture
def job(tmp_path: Path) -> ScoreConfig:
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    return ScoreConfig(scorer="toy", completions=str(tmp_path / "rows.jsonl"), out=str(tmp_path / "out"), max_rows=2)


def results(job: ScoreConfig) -> Path:
    return Path(job.out) / "results.jsonl"


def read(job: ScoreConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results(job).read_text().splitlines()]


def test_rows_come_out_in_order_with_scores(job: ScoreConfig, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    toy = Toy()
    report = JobOptions(report=lambda phase, done, total, figures: seen.append((done, total)))
    summary = score_file(job, scorer=toy, options=report)
    out = read(job)
    assert [{k: v for k, v in r.items() if k not in ("step_scores", "score", "scorer")} for r in out] == [
        dict(r) for r in ROWS
    ]
    assert [r["step_scores"] for r in out] == [[0.9, 0.8], [0.5], [0.9, 0.4, 0.2], [1.0, None], [0.0, 0.6], [0.7]]
    assert [r["score"] for r in out] == [pytest.approx(0.72), 0.5, pytest.approx(0.072), None, 0.0, 0.7]
    assert out[0]["scorer"] == {
        "scorer": "toy", "model": "toy", "weights": None, "meaning": "correctness", "reduction": "product",
        "temperature": None,
    }  # fmt: skip
    assert sorted(toy.asked) == ["p", "q", "r", "s"], "every problem once"
    assert seen[-1] == (6, 6)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert summary == {
        "rows": 6, "problems": 4, "steps": 11, "unscored_rows": 1,
        "unreadable_rows": 0, "unreadable_reason": None,
        "temperature_fit": None, "reduction": "product", "temperature": None,
        "mean_score": pytest.approx((0.72 + 0.5 + 0.072 + 0 + 0.7) / 5),
        "mean_score_correct": pytest.approx(0.72), "mean_score_incorrect": pytest.approx((0.5 + 0.072) / 2),
    }  # fmt: skip
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"results.jsonl", "settings.json", "summary.json", "parts"}
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary


def test_reductions_and_meanings(job: ScoreConfig, tmp_path: Path) -> None:
    expected = {
        ("correctness", "min"): [0.8, 0.5, 0.2, None, 0.0, 0.7],
        ("correctness", "mean"): [0.85, 0.5, 0.5, None, 0.3, 0.7],
        ("value", None): [0.8, 0.5, 0.2, None, 0.6, 0.7],
    }
    for number, ((meaning, reduction), scores) in enumerate(expected.items()):
        this = replace(job, out=str(tmp_path / str(number)), reduction=reduction)  # type: ignore[arg-type]
        score_file(this, scorer=Toy(meaning))
        assert [r["score"] for r in read(this)] == [None if s is None else pytest.approx(s) for s in scores]


def test_an_outcome_scorer_owes_only_the_last_step(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [row("a", "p", [-1, -1, 30]), row("b", "q", [-1, -1])])
    job = ScoreConfig(scorer="toy", completions=str(tmp_path / "rows.jsonl"), out=str(tmp_path / "out"))
    summary = score_file(job, scorer=Toy("outcome"))
    assert [r["score"] for r in read(job)] == [0.3, None]
    assert summary["unscored_rows"] == 1


@pytest.mark.parametrize("batches", [0, 1, 2, 3])
def test_a_killed_job_goes_on_where_it_stood(job: ScoreConfig, tmp_path: Path, batches: int) -> None:
    whole = replace(job, out=str(tmp_path / "whole"))
    score_file(whole, scorer=Toy())
    dying = Toy(dies_after=batches)
    if batches < 3:  # problems p and q, of two rows each, have a batch of their own
        with pytest.raises(KeyboardInterrupt):
            score_file(job, scorer=dying)
        assert not results(job).exists()
    else:
        score_file(job, scorer=dying)
    again = Toy()
    score_file(job, scorer=again)
    assert results(job).read_bytes() == results(whole).read_bytes()
    assert sorted(dying.asked + again.asked) == ["p", "q", "r", "s"], "nothing twice"


def test_a_kill_between_the_last_writes(job: ScoreConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise StepkdError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("stepkd.runs.job.Job.finish", full)
        with pytest.raises(StepkdError, match="disk full"):
            score_file(job, scorer=Toy())
    again = Toy()
    score_file(job, scorer=again)
    assert again.asked == []


class Picky(Toy):
    """Cannot read a problem with a step of 13 percent."""

    def score(self, problems: Sequence[Solutions]) -> list[list[list[float]]]:
        for problem in problems:
            if any(step.startswith("13 ") for steps in problem.solutions for step in steps):
                raise DataError("13 is no number", path=problem.row["id"])
        return super().score(problems)


def test_rows_that_cannot_be_read_are_counted_not_hidden(tmp_path: Path) -> None:
    rows = [row("a", "p", [90, 80]), row("b", "p", [13, 50]), row("c", "q", [13]), row("d", "r", [70])]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    job = ScoreConfig(scorer="toy", completions=str(tmp_path / "rows.jsonl"), out=str(tmp_path / "out"), max_rows=2)
    summary = score_file(job, scorer=Picky())
    out = read(job)
    assert [r["step_scores"] for r in out] == [[0.9, 0.8], [None, None], [None], [0.7]]
    assert [r["score"] for r in out] == [pytest.approx(0.72), None, None, 0.7]
    assert ["score_error" in r for r in out] == [False, True, True, False]
    assert out[2]["score_error"] == "c: 13 is no number"
    assert (summary["unscored_rows"], summary["unreadable_rows"]) == (2, 2)
    assert summary["unreadable_reason"] == "b: 13 is no number"
    assert score_file(job, scorer=Picky()) == summary


@pytest.mark.parametrize("scores", [[[13]], [[13], [13, 1]]])
def test_when_no_row_of_the_first_batch_can_be_read_the_job_stops(tmp_path: Path, scores: list[list[int]]) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [row(str(i), "p", values) for i, values in enumerate(scores)])
    job = ScoreConfig(scorer="toy", completions=str(tmp_path / "rows.jsonl"), out=str(tmp_path / "out"))
    with pytest.raises(DataError, match="0: 13 is no number"):
        score_file(job, scorer=Picky())
    assert not results(job).exists()
    write_jsonl(tmp_path / "rows.jsonl", [row("a", "p", [12])])
    score_file(job, scorer=Picky())
    assert len(read(job)) == 1, "a mended file is another job, and nothing had been scored"


def test_other_settings_are_taken_while_nothing_is_scored(job: ScoreConfig) -> None:
    with pytest.raises(KeyboardInterrupt):
        score_file(job, scorer=Toy(dies_after=0))
    smaller = replace(job, max_rows=1)
    assert score_file(smaller, scorer=Toy())["rows"] == len(ROWS)


def test_the_same_job_again_changes_nothing(job: ScoreConfig) -> None:
    first = score_file(job, scorer=Toy())
    before = results(job).read_bytes()
    again = Toy(dies_after=0)
    assert score_file(job, scorer=again) == first
    assert results(job).read_bytes() == before


def test_a_finished_job_without_its_parts_keeps_its_settings(job: ScoreConfig) -> None:
    first = score_file(job, scorer=Toy())
    before = {path.name: path.read_bytes() for path in Path(job.out).iterdir() if path.is_file()}
    shutil.rmtree(Path(job.out) / "parts")
    assert score_file(job, scorer=Toy()) == first
    assert {path.name: path.read_bytes() for path in Path(job.out).iterdir() if path.is_file()} == before


def test_another_job_is_refused_and_overwrite_replaces(job: ScoreConfig, tmp_path: Path) -> None:
    score_file(job, scorer=Toy())
    with pytest.raises(ConfigError, match=r"(?s)scorer.model: 'toy' then, 'other' now.*or --overwrite"):
        score_file(job, scorer=Toy(name="other"))
    with pytest.raises(ConfigError, match="reduction: 'product' then, 'min' now"):
        score_file(replace(job, reduction="min"), scorer=Toy())
    score_file(job, scorer=Toy(name="other"), options=JobOptions(overwrite=True))
    assert read(job)[0]["scorer"]["model"] == "other"
    with pytest.raises(KeyboardInterrupt):
        score_file(job, scorer=Toy(dies_after=1), options=JobOptions(overwrite=True))
    with pytest.raises(ConfigError, match=r"scorer.model: 'toy' then, 'other' now"):
        score_file(job, scorer=Toy(name="other"))
    write_jsonl(tmp_path / "rows.jsonl", ROWS[:-1])
    with pytest.raises(ConfigError, match="rows: "):
        score_file(job, scorer=Toy())


def test_ranks_share_the_solutions_and_the_last_one_writes_them(job: ScoreConfig, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "held.jsonl", [row(f"h{i}", f"h{i}", [98, 97, 3]) for i in range(9)])
    alone = replace(job, out=str(tmp_path / "alone"), fit_temperature=str(tmp_path / "held.jsonl"))
    summary = score_file(alone, scorer=Toy())
    shared = replace(alone, out=str(tmp_path / "shared"))
    toys = [Toy(), Toy()]
    found = [score_file(shared, scorer=toys[rank], options=JobOptions(rank=rank, world_size=2)) for rank in (0, 1)]
    assert found == [{}, summary]
    asked = [sorted(name for name in toy.asked if not name.startswith("h")) for toy in toys]
    assert sorted(asked[0] + asked[1]) == ["p", "q", "r", "s"]
    assert [len(set(toy.asked)) for toy in toys] == [11, 2], "rank 0 fits the temperature"
    for name in ("results.jsonl", "settings.json", "summary.json"):
        assert (tmp_path / "shared" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    assert score_file(shared, scorer=Toy(dies_after=0)) == summary


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_something_else_is_left_alone(job: ScoreConfig, tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds no scoring job"):
        score_file(job, scorer=Toy(), options=JobOptions(overwrite=overwrite))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_temperature_is_fitted_once_saved_and_applied(job: ScoreConfig, tmp_path: Path) -> None:
    held_out = [row(f"h{i}", f"h{i}", [98, 97, 3]) for i in range(9)] + [
        row("h", "h", [90, 95]) | {"labels": [False, None]}
    ]
    write_jsonl(tmp_path / "held.jsonl", held_out)
    fitting = replace(job, fit_temperature=str(tmp_path / "held.jsonl"))
    scores, labels = labelled_scores(Toy(), held_out)
    assert (len(scores), sum(labels)) == (28, 18)
    dying = Toy(dies_after=2)
    with pytest.raises(KeyboardInterrupt):
        score_file(fitting, scorer=dying)
    again = Toy()
    summary = score_file(fitting, scorer=again)
    assert "h" in dying.asked
    assert "h" not in again.asked, "fitted before the kill"
    temperature = summary["temperature"]
    assert summary["temperature_fit"] == fit_temperature(scores, labels)
    assert temperature == summary["temperature_fit"]["temperature"] != 1
    out = read(job)
    assert out[0]["step_scores"] == pytest.approx(scaled([0.9, 0.8], temperature).tolist())
    assert out[3]["step_scores"][1] is None
    assert out[0]["score"] == pytest.approx(math.prod(scaled([0.9, 0.8], temperature)))
    assert out[0]["scorer"]["temperature"] == temperature


def test_labels_for_a_temperature() -> None:
    rated = row("a", "p", [10, 20, 30, 40]) | {"labels": [1, 0, -1, None]}
    assert labelled_scores(Toy(), [rated]) == ([0.1, 0.2, 0.3], [1.0, 1.0, 0.0])
    cut = row("a", "p", [60, -1])
    assert labelled_scores(Toy(), [cut]) == ([0.6], [1.0])
    incorrect_twice = row("a", "p", [10, 20, 90])
    assert labelled_scores(Toy(), [incorrect_twice]) == ([0.1], [0.0]), "as in judging, nothing after the first error"
    outcome = [row("a", "p", [-1, 80], outcome=True), row("b", "p", [-1, 30], outcome=False)]
    assert labelled_scores(Toy("outcome"), outcome) == ([0.8, 0.3], [1.0, 0.0])
    with pytest.raises(DataError, match=r"a, column 'labels': label 0.4 is neither correct nor incorrect"):
        labelled_scores(Toy(), [row("a", "p", [10]) | {"labels": [0.4]}])


def test_solutions_in_one_text_are_cut_as_asked(job: ScoreConfig) -> None:
    text = "10\n20\n\n30"
    texts = [
        {"id": "a", "prompt": "p", "completion": text, "answer": "1"},
        {"id": "b", "prompt": "p", "completion": text, "answer": "1", "segmenter": "newline"},
        {"id": "c", "prompt": "p", "completion": text, "answer": "1", "steps": ["10\n20\n\n30"]},
    ]
    write_jsonl(Path(job.completions), texts)
    score_file(replace(job, segmenter="blank_line"), scorer=Toy())
    assert [len(found["step_scores"]) for found in read(job)] == [2, 3, 1]
    with pytest.raises(ConfigError, match="unknown segmenter 'blank_lin': did you mean 'blank_line'"):
        replace(job, segmenter="blank_lin")


def test_mistakes(job: ScoreConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="contradict each other"):
        replace(job, fit_temperature="x", scorer=PRM("m", temperature=2.0))
    with pytest.raises(ConfigError, match="are the rows to score: give held-out ones"):
        score_file(replace(job, fit_temperature=job.completions), scorer=Toy())
    write_jsonl(tmp_path / "bad.jsonl", [row("a", "p", [1]) | {"completions": []}])
    with pytest.raises(DataError, match="column 'completions'"):
        score_file(replace(job, completions=str(tmp_path / "bad.jsonl")), scorer=Toy())
    assert not results(job).exists()


class Three(Toy):
    """Says beside its scores what three members say, of which the first says the half."""

    def score(self, problems: Sequence[Solutions]) -> list[list[list[float]]]:
        def judged(each: list[float]) -> Judged:
            own = [None if math.isnan(value) else value for value in each]
            half = [None if value is None else value / 2 for value in own]
            return Judged(each, facts={"members": [half, own, own]}, prediction=None)

        return [[judged(each) for each in found] for found in super().score(problems)]


def test_members_are_kept_as_steps_are_and_leave_with_their_scorer(job: ScoreConfig, tmp_path: Path) -> None:
    """Scaled by a fitted temperature as the score is, with a null for a last step of nothing but the end token."""
    ended = {"id": "g", "problem_id": "g", "prompt": "t", "completion": "80 percent", "step_ends": [1, 2], "seed": 0}
    ended |= {"token_ids": [1, 2], "logprobs": [0, 0], "correct": None, "model": "m", "sampling": {}, "finish": "stop"}
    ended |= {"steps": ["80 percent"]}
    write_jsonl(tmp_path / "sampled.jsonl", [ended])
    sampled = replace(job, completions=str(tmp_path / "sampled.jsonl"), out=str(tmp_path / "sampled"))
    score_file(sampled, scorer=Three())
    assert read(sampled)[0]["step_scores"] == [0.8, None]
    assert read(sampled)[0]["score_facts"] == {"members": [[0.4, None], [0.8, None], [0.8, None]]}
    score_file(job, scorer=Three())
    assert read(job)[3]["score_facts"]["members"] == [[0.5, None], [1.0, None], [1.0, None]]
    assert "prediction" not in read(job)[3]
    fitted = replace(job, out=str(tmp_path / "scaled"), fit_temperature=str(tmp_path / "held_out.jsonl"))
    write_jsonl(tmp_path / "held_out.jsonl", ROWS[:3])
    score_file(fitted, scorer=Three())
    temperature = read(fitted)[0]["scorer"]["temperature"]
    assert abs(math.log(temperature)) > 0.1
    assert read(fitted)[0]["score_facts"]["members"][1] == read(fitted)[0]["step_scores"]
    assert read(fitted)[0]["score_facts"]["members"][0] == pytest.approx(scaled([0.45, 0.4], temperature))
    told = {"prediction": 1, "score_error": "too long"}
    write_jsonl(tmp_path / "told.jsonl", [*(each | told for each in read(job)), row("h", "u", [90], prediction="mine")])
    again = ScoreConfig(scorer="toy", completions=str(tmp_path / "told.jsonl"), out=str(tmp_path / "again"))
    score_file(again, scorer=Toy())
    assert not any({"score_facts", *told} & set(each) for each in read(again)[:-1]), "what another scorer said"
    assert read(again)[-1]["prediction"] == "mine", "a column of one's own"
