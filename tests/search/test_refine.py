"""Refine and rerank: what the refiner is shown, what is joined, who wins, with scripted solutions and scores."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from stepkd.errors import ConfigError
from stepkd.grading.pool import Grader, GradingConfig
from stepkd.search.revise import Refine, refine_prompt
from stepkd.search.state import Problem, State, Tools

Make = Any
PROBLEM = Problem(0, {"id": "p0", "prompt": "2*3+1=?\n", "answer": "7"}, (1, 2))
DRAFT = ("2*3=6\n", "6+1=8\n", "#### 8")
GLOBAL = "2*3+1=?\n\nDraft:\n2*3=6\n6+1=8\n#### 8\n"
LOCAL = "2*3+1=?\n\nDraft:\n2*3=6\n[BAD] 6+1=8\n#### 8\n"
SCORES = {"2*3=6\n": 0.9, "6+1=8\n": 0.2, "#### 8": 0.1, "6+1=7\n": 0.8, "#### 7": 0.9, "6+1=9\n": 0.3, "#### 9": 0.4}


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(GradingConfig(extractors=("hash",), workers=1)) as made:
        yield made


def run(
    written: Make, judged: Make, grader: Grader, refiner: Any, *, method: Refine | None = None
) -> tuple[Any, Tools]:
    generator = written({"": [DRAFT]})
    refiner.costs = generator.costs
    tools = Tools(generator, grader, judged(SCORES, generator.costs), generator.costs, generators={"runs/r": refiner})
    (found,) = (method or Refine(refiner="runs/r", reduction="last")).run([PROBLEM], tools)
    return found, tools


def test_prompts_show_the_draft_and_where_to_begin() -> None:
    assert refine_prompt("2*3+1=?\n", DRAFT, None) == GLOBAL
    assert refine_prompt("2*3+1=?\n", DRAFT, 1) == LOCAL


def test_the_best_of_draft_global_and_local_is_taken(written: Make, judged: Make, grader: Grader) -> None:
    refiner = written(
        {("p0", GLOBAL, ""): [("2*3=6\n", "6+1=9\n", "#### 9")], ("p0", LOCAL, ""): [("6+1=7\n", "#### 7")]}
    )
    found, tools = run(written, judged, grader, refiner)
    assert [each.text for each in found] == ["2*3=6\n6+1=7\n#### 7", "".join(DRAFT), "2*3=6\n6+1=9\n#### 9"]
    assert [each.score for each in found] == [0.9, 0.1, 0.4]
    # Both are asked for at once, and are greedy; a local one is joined to what stands before the mark.
    assert refiner.calls == 1
    assert refiner.asked_for == [("", (), 0.0)] * 2
    assert found[0].step_ends.tolist() == [6, 12, 18]
    assert found[0].token_ids.tolist() == list(map(ord, found[0].text))
    assert all(each.row["prompt"] == "2*3+1=?\n" for each in found)
    assert dict(tools.costs[0]) == {
        "continuations": 18 + 18 + 12,
        "scorer_calls": 3,
        "scored_tokens": 3 * (2 + 18),
        "unscored": 0,
    }
    verify, refine, choice = found[0].trace
    assert verify == {"event": "verify", "steps": list(DRAFT), "scores": [0.9, 0.2, 0.1]}
    assert refine["kinds"] == ["draft", "global", "local"]
    assert refine["steps"] == ["".join(DRAFT), "2*3=6\n6+1=9\n#### 9", "2*3=6\n6+1=7\n#### 7"]
    assert (refine["step"], choice["scores"], choice["kept"]) == (1, [0.1, 0.4, 0.9], [2])


def test_without_a_doubtful_step_there_is_no_local_refinement(written: Make, judged: Make, grader: Grader) -> None:
    refiner = written({("p0", GLOBAL, ""): [("6+1=9\n", "#### 9")]})
    method = Refine(refiner="runs/r", theta=0.0, reduction="last")
    found, _ = run(written, judged, grader, refiner, method=method)
    assert [each.score for each in found] == [0.4, 0.1]
    assert found[0].trace[1]["kinds"] == ["draft", "global"]
    assert "step" not in found[0].trace[1]


def test_of_equal_ones_the_draft_is_kept_and_what_has_no_score_comes_last(
    written: Make, judged: Make, grader: Grader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SCORES, "#### 7", math.nan)
    refiner = written({("p0", GLOBAL, ""): [DRAFT], ("p0", LOCAL, ""): [("#### 7",)]})
    found, tools = run(written, judged, grader, refiner)
    assert [each.score for each in found] == [0.1, 0.1, None]
    assert found[0].trace[-1]["kept"] == [0]
    assert tools.costs[0]["unscored"] == 1


def test_what_was_cut_off_does_not_win_over_what_is_whole(written: Make, judged: Make, grader: Grader) -> None:
    refiner = written({("p0", GLOBAL, ""): [("#### 7",)], ("p0", LOCAL, ""): [("#### 9",)]})
    complete = refiner.complete

    def cut_off(states: list[State], n: int, **options: Any) -> list[list[State]]:
        return [[replace(each, end="length") for each in group] for group in complete(states, n, **options)]

    refiner.complete = cut_off
    found, _ = run(written, judged, grader, refiner)
    assert [(each.text, each.finish) for each in found[:1]] == [("".join(DRAFT), "stop")]
    assert [each.score for each in found] == [0.1, 0.9, 0.4]


def test_what_is_joined_is_no_longer_than_a_solution_may_be(written: Make, judged: Make, grader: Grader) -> None:
    """The local refinement, which would win, has 18 tokens: it loses its last step, and is not chosen."""
    refiner = written({("p0", GLOBAL, ""): [("#### 9",)], ("p0", LOCAL, ""): [("6+1=7\n", "#### 7")]}, most=17)
    found, _ = run(written, judged, grader, refiner)
    assert (found[0].text, found[0].finish) == ("#### 9", "stop")
    assert [(each.text, each.finish) for each in found[2:]] == [("2*3=6\n6+1=7\n", "length")]


def test_prompts_without_room_are_left_out_and_counted(written: Make, judged: Make, grader: Grader) -> None:
    refiner = written({("p0", GLOBAL, ""): [("#### 9",)]}, longest=len(GLOBAL))
    found, tools = run(written, judged, grader, refiner)
    assert found[0].trace[1]["kinds"] == ["draft", "global"]
    assert tools.costs[0]["no_room"] == 1
    found, tools = run(written, judged, grader, written({}, longest=1))
    assert [each.text for each in found] == ["".join(DRAFT)]
    assert tools.costs[0]["no_room"] == 2


def test_a_refiner_that_is_not_loaded_or_not_named_is_refused(written: Make, judged: Make, grader: Grader) -> None:
    method = Refine(refiner="runs/other")
    assert method.models == ("runs/other",)
    with pytest.raises(ConfigError, match="runs/other"):
        run(written, judged, grader, written({}), method=method)
    with pytest.raises(ConfigError, match="refiner is empty"):
        Refine(refiner="")


def test_a_refiner_that_writes_nothing_has_refined_nothing(written: Make, judged: Make, grader: Grader) -> None:
    """What stands before the mark would have the highest score."""
    refiner = written({("p0", GLOBAL, ""): [("#### 9",)], ("p0", LOCAL, ""): [("",)]})
    found, _ = run(written, judged, grader, refiner)
    assert [each.text for each in found] == ["#### 9", "".join(DRAFT)]
