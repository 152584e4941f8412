"""Active selection: by hand, against brute force and ActPRM's rule, budgets beyond the pool, unusable rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepkd.claims.jobs import run_job
from stepkd.cli import main
from stepkd.errors import ConfigError, DataError
from stepkd.labels.convert import convert_rows
from stepkd.labels.selection import Selected, WithinBudget, _candidate, k_centres, uncertainty

Row = dict[str, Any]


def scored(name: str, scores: list[float | None], *, score: float | None = 0.5, **given: Any) -> Row:
    """A step-labelled row of one's own with scores; ``p1/2`` is a solution of problem p1."""
    steps = [f"{name} line {i}\n" for i in range(len(scores))]
    row = {"id": name, "problem_id": name.partition("/")[0], "prompt": "Q", "completions": steps, "outcome": False}
    labels = [*[None] * (len(scores) - 1), False]
    return row | {"labels": labels, "step_scores": scores, "score": score} | given


def ids(rows: list[Row], settings: Selected) -> list[str]:
    return [row["id"] for row in convert_rows(rows, settings).rows]


def write(path: Path, rows: list[Row]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_k_centres_of_four_points_by_hand() -> None:
    line = [np.array([x, 0.0]) for x in (0.0, 1.0, 4.0, 10.0)]
    assert k_centres(line, [line[0]], 3) == [3, 2, 1], "10 is farthest from 0; then 4 (4 from 0), then 1"
    assert k_centres(line, [], 2) == [2, 3], "the first choice is the nearest to the mean, 3.75"
    assert k_centres(line, [line[3]], 9) == [0, 2, 1, 3], "what is covered already comes last, and once"
    assert k_centres([line[1]] * 3, [], 2) == [0, 1], "equal points in their order"
    assert k_centres([], line, 2) == []


POINTS = st.lists(st.tuples(*[st.integers(0, 6)] * 2), min_size=1, max_size=9)


@settings(max_examples=50, deadline=None)
@given(
    points=POINTS,
    centres=st.lists(st.tuples(*[st.integers(0, 6)] * 2), min_size=1, max_size=3),
    count=st.integers(1, 9),
)
def test_every_choice_is_farthest_from_all_before_it(
    points: list[tuple[int, int]], centres: list[tuple[int, int]], count: int
) -> None:
    arrays = [np.array(point, dtype=float) for point in points]
    chosen = k_centres(arrays, [np.array(each, dtype=float) for each in centres], count)
    assert len(chosen) == len(set(chosen)) == min(count, len(points))
    for k, number in enumerate(chosen):
        covered = [*centres, *(points[i] for i in chosen[:k])]
        nearest = [min((x - a) ** 2 + (y - b) ** 2 for a, b in covered) for x, y in points]
        assert nearest[number] == max(value for i, value in enumerate(nearest) if i not in chosen[:k])


def test_profiles_compare_solutions_of_different_lengths() -> None:
    """Scores that fall evenly are one profile, however many steps they fall over."""
    pool = [
        scored("a/0", [1.0, 0.0]),
        scored("b/0", [1.0, 0.5, 0.0]),
        scored("c/0", [0.0, 0.5, 1.0]),
        scored("d/0", [1.0]),
    ]
    assert ids(pool, Selected(count=4, by="k_center")) == ["a/0", "c/0", "d/0", "b/0"], "b is where a is"


def test_uncertainty_by_hand() -> None:
    none = np.zeros(3)
    assert uncertainty(np.array([0.98, 0.7]), none[:2]) == pytest.approx(3.0), "1 - 0.7 over 0.1"
    assert uncertainty(np.array([0.98, 0.2, 0.5]), none) == pytest.approx(2.0), (
        "nothing behind the first incorrect step"
    )
    assert uncertainty(np.array([0.98, 0.95]), np.array([0.014, 0.0])) == pytest.approx(1.4), "0.014 over 0.01"
    spread = _candidate([scored("a/0", [0.99, 0.95]), scored("a/0", [0.97, 0.95])])
    assert spread.deviations_S == pytest.approx([np.sqrt(2) * 0.01, 0.0]), "over n - 1"


SCORES = st.lists(
    st.lists(st.sampled_from([0.0, 0.03, 0.06, 0.5, 0.93, 0.95, 1.0]), min_size=3, max_size=3), min_size=2, max_size=4
)


@settings(max_examples=80, deadline=None)
@given(scores=SCORES)
def test_uncertain_is_what_the_released_rule_does_not_trust(scores: list[list[float]]) -> None:
    """ActPRM trusts a row whose steps, up to the first that is called incorrect, are all sure and agreed upon."""
    trusted = True
    for values in zip(*scores, strict=True):
        mean = sum(values) / len(values)
        deviation = (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5
        trusted &= deviation <= 0.01 and (mean >= 0.9 or mean <= 1 - 0.9)
        if mean < 0.5:
            break
    found = _candidate([scored("a/0", list(each)) for each in scores])
    assert (uncertainty(found.means_S, found.deviations_S) > 1 + 1e-9) is not trusted


def test_an_ensemble_of_runs_selects_where_they_differ(tmp_path: Path) -> None:
    pool = [scored("a/0", [0.9, 0.6]), scored("b/0", [0.9, 0.9]), scored("c/0", [0.99, 0.99])]
    other = write(tmp_path / "other.jsonl", [pool[0], scored("b/0", [0.9, 0.7]), pool[2]])
    assert ids(pool, Selected(count=2, by="uncertainty")) == ["a/0", "b/0"]
    found = convert_rows(pool, Selected(count=2, by="uncertainty", members=(other,)))
    assert [row["id"] for row in found.rows] == ["b/0", "a/0"]
    assert found.counts == {"rows": 2, "uncertain": 2, "less_worth": 1}
    assert found.rows[0] == pool[1], "as the first member scored it"


def test_members_of_one_reward_model_select_where_they_differ() -> None:
    """As ``stepkd score`` keeps them of a head with ``members``; a step that none scored is passed over."""
    differ = {"score_facts": {"members": [[0.995, None], [0.985, None], [0.99, None]]}}
    agree = {"score_facts": {"members": [[0.98, 0.97]] * 3}}
    pool = [scored("a/0", [0.99, None]) | differ, scored("b/0", [0.98, 0.97]) | agree]
    found = convert_rows(pool, Selected(count=1, by="uncertainty"))
    assert [row["id"] for row in found.rows] == ["a/0"], "0.005 over 0.01, against 0.03 over 0.1"
    assert "uncertain" not in found.counts, "nothing is beyond a threshold"
    both = _candidate([pool[0], scored("a/0", [0.95, 0.5])])
    assert both.means_S == pytest.approx([0.97]), "files count alike"
    assert both.deviations_S == pytest.approx([np.std([0.995, 0.985, 0.99, 0.95], ddof=1)]), "and so do members"


def test_convincing_rows_by_hand() -> None:
    """Four in five have incorrect answers, problems take turns, and what is left convinces most."""
    pool = [
        scored("p/0", [0.9], score=0.9),
        scored("p/1", [0.8], score=0.8),
        scored("p/2", [0.99], score=0.99, outcome=True),
        scored("q/0", [0.3], score=0.3),
        scored("q/1", [0.1], score=0.1),
        scored("q/2", [0.2], score=0.2, outcome=True),
    ]
    assert ids(pool, Selected(count=5, by="convincing")) == ["p/0", "q/0", "p/1", "q/1", "p/2"]
    assert ids(pool, Selected(count=2, by="convincing")) == ["p/0", "q/0"], "0.8 of 2 is rounded"
    assert ids(pool, Selected(count=1, by="convincing")) == ["p/0"]
    assert ids(pool, Selected(count=100, by="convincing")) == ["p/0", "q/0", "p/1", "q/1", "p/2", "q/2"]


def test_rows_that_cannot_be_selected_are_counted(tmp_path: Path) -> None:
    pool = [
        scored("a/0", [0.9, None]),
        scored("b/0", [None], score=None),
        scored("c/0", [0.5], outcome=None),
        scored("d/0", [0.4], score=None),
    ]
    found = convert_rows(pool, Selected(count=9, by="convincing"))
    assert found.counts == {"rows": 1, "unscored": 2, "ungraded": 1, "short_of_count": 8}
    assert ids(pool, Selected(count=9, by="uncertainty")) == ["c/0", "d/0", "a/0"], (
        "steps without a score are passed over"
    )
    known = write(tmp_path / "known.jsonl", [pool[2]])
    found = convert_rows(pool, Selected(count=1, by="k_center", labelled=known))
    assert [row["id"] for row in found.rows] == ["a/0"], "0.4 from what is labelled, not 0.1"
    assert found.counts == {"rows": 1, "unscored": 1, "labelled_already": 1, "less_worth": 1}
    by = [{"scorer": {"scorer": "prm", "weights": name}} for name in "ab"]
    other = write(tmp_path / "other.jsonl", [pool[2] | by[1]])
    with pytest.raises(DataError, match=r"other\.jsonl.*pool and labelled rows have 2 scorers: score all with one"):
        convert_rows([pool[3] | by[0]], Selected(count=1, by="k_center", labelled=other))
    with pytest.raises(DataError, match=r"none of 1 rows is left \(1 unscored, 1 short_of_count\)"):
        convert_rows(pool[1:2], Selected(count=1, by="uncertainty"))


def test_pools_and_members_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    bare = {name: value for name, value in scored("a/0", [0.5]).items() if name != "step_scores"}
    with pytest.raises(DataError, match="a/0, column 'step_scores': no step scores: score it first"):
        convert_rows([bare], Selected(count=1, by="k_center"))
    known = write(tmp_path / "bare.jsonl", [bare])
    with pytest.raises(DataError, match=r"bare\.jsonl: a/0, column 'step_scores': no step scores: score it first"):
        convert_rows([scored("b/0", [0.5])], Selected(count=1, by="k_center", labelled=known))
    for value in (1.5, float("nan")):
        with pytest.raises(DataError, match=r"a/0.*numbers in \[0, 1\] or null"):
            convert_rows([scored("a/0", [0.5, value])], Selected(count=1, by="uncertainty"))
    pool = [scored("a/0", [0.5]), scored("b/0", [0.5])]
    with pytest.raises(DataError, match=r"the pool.*a/0"):
        convert_rows(pool[:1] * 2, Selected(count=1, by="k_center"))
    for other, message in (
        (pool[:1], r"other.jsonl: lacks row 'b/0' of the pool"),
        (
            [pool[0], scored("b/0", [0.5]) | {"completions": ["else\n"]}],
            "holds another solution under the id of row 'b/0'",
        ),
        ([pool[0], pool[1] | {"step_scores": [0.5, 0.5]}], r"b/0.*members score \[1, 2\] steps"),
    ):
        path = write(tmp_path / "other.jsonl", other)
        with pytest.raises(DataError, match=message):
            convert_rows(pool, Selected(count=1, by="uncertainty", members=(path,)))
    with pytest.raises(ConfigError, match="count=0"):
        Selected(count=0, by="k_center")
    with pytest.raises(ConfigError, match="unknown by 'random'"):
        Selected(count=1, by="random")  # type: ignore[arg-type]


def test_a_budget_of_tokens_keeps_the_first_labels() -> None:
    rows = [scored(f"a/{i}", [0.5], label_facts={"generated_tokens": cost}) for i, cost in enumerate((3, 0, 5, 1))]
    for tokens, kept, spent in ((3, 2, 3), (7, 2, 3), (8, 3, 8), (99, 4, 9)):
        found = WithinBudget(tokens=tokens).convert(rows)
        assert found.rows == rows[:kept]
        assert found.counts == {"rows": kept, "generated_tokens": spent, "beyond_the_budget": 4 - kept}
    with pytest.raises(DataError, match=r"rows\.jsonl: .* \(a/0\) cost 3 tokens: tokens=2 has to be at least that"):
        convert_rows(rows, WithinBudget(tokens=2), path="rows.jsonl")
    free = [scored("b/0", [0.5]), scored("b/1", [0.5], label_facts={"scores": [0.5]})]
    assert WithinBudget(tokens=0).convert(free).rows == free, "an exact checker generates nothing"


def test_from_the_command_line_and_in_a_claim(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool = write(tmp_path / "results.jsonl", [scored("a/0", [0.9]), scored("b/0", [0.5]), scored("c/0", [0.7])])
    out = tmp_path / "picked.jsonl"
    words = ["convert", pool, "--to", "Selected", "--to.by", "uncertainty", "--to.count", "2", "--out", str(out)]
    assert main(words) == 0
    assert "2 rows, 2 uncertain, 1 less worth" in capsys.readouterr().out
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == ["b/0", "c/0"]
    to = {"class_path": "Selected", "init_args": {"by": "uncertainty", "count": 2, "members": [pool]}}
    assert run_job("convert", {"rows": pool, "to": to}, tmp_path / "job").columns["uncertain"] == 2
    assert (tmp_path / "job" / "rows.jsonl").read_text() == out.read_text()
    assert main(["convert", pool, "--to", "Demonstrations", "--out", str(out)]) == 2
    assert "results.jsonl: none of 3 rows is left (3 incorrect_answer)" in " ".join(capsys.readouterr().err.split())
