"""Step beam search and DVTS over scripted steps: what is kept, when it stops, and who has a vote."""

from __future__ import annotations

from typing import Any

import pytest

from stepkd.errors import ConfigError
from stepkd.grading.pool import Grader
from stepkd.search.beam import Beam
from stepkd.search.state import Problem, State, Tools

SCRIPT = {
    "": [("a\n", 0.25, "step"), ("b\n", 0.25, "step"), ("c\n", 0.25, "step"), ("d\n", 0.25, "step")],
    "a\n": [("#### 1", 0.5, "stop"), ("e\n", 0.5, "step")],
    "b\n": [("f\n", 0.5, "step"), ("#### 2", 0.5, "stop")],
    "b\nf\n": [("#### 2", 0.5, "stop"), ("#### 3", 0.5, "stop")],
    "d\n": [("#### 4", 0.5, "stop"), ("#### 4", 0.5, "stop")],
}
SCORES = {"a\n": 0.9, "b\n": 0.8, "c\n": 0.1, "d\n": 0.2}
SCORES |= {"a\n#### 1": 0.5, "a\ne\n": 0.4, "b\nf\n": 0.95, "b\n#### 2": 0.3, "d\n#### 4": 0.7}
SCORES |= {"b\nf\n#### 2": 0.45, "b\nf\n#### 3": 0.2}


def problems(number: int) -> list[Problem]:
    return [Problem(i, {"id": str(i), "prompt": "?", "answer": "1"}, (7,)) for i in range(number)]


@pytest.fixture
def tools(scripted: Any, valued: Any) -> Tools:
    return Tools(scripted(SCRIPT), Grader(extractors=("hash",)), valued(SCORES))


def kept(trace: Any) -> list[Any]:
    return [(event["step"], event["kept"]) for event in trace if event["event"] == "prune"]


def test_beam_keeps_the_best_of_all_and_a_finished_solution_while_it_is_among_them(tools: Tools) -> None:
    (results,) = Beam(n=4, width=2).run(problems(1), tools)
    answer, other = results
    assert (answer.text, answer.score, answer.finish) == ("a\n#### 1", 0.5, "stop")
    assert (other.text, other.score) == ("b\nf\n#### 2", 0.45)
    # Of four first steps a and b; then b f (0.95) before the finished a 1 (0.5); then a 1 is among the best still.
    assert kept(answer.trace) == [(0, [0, 1]), (1, [2, 0]), (2, [2, 0])]
    assert answer.trace[2]["steps"] == ["#### 2", "#### 3", "#### 1"]
    assert answer.trace[2]["scores"] == [0.45, 0.2, 0.5]
    assert answer.trace[-1] == {
        **{"event": "choice", "vote": "weighted", "scores": [0.5, 0.45], "votes": ["1", "2"], "kept": [0]},
        "steps": ["#### 1", "#### 2"],
    }
    assert other.trace == ()


def test_trees_share_nothing_so_that_each_keeps_its_own_best(tools: Tools) -> None:
    (results,) = Beam(n=4, width=2, diverse=True).run(problems(1), tools)
    assert [each.text for each in results] == ["d\n#### 4", "a\n#### 1"], "the weighted vote: 0.7 against 0.5"
    # Tree 0 draws a and b, tree 1 c and d: it keeps d, which is worse than b.
    by_tree = [(event["step"], event["tree"], event["kept"]) for event in results[0].trace[:-1]]
    assert by_tree == [(0, 0, [0]), (0, 1, [1]), (1, 0, [0]), (1, 1, [0])]


def test_all_problems_go_on_together_and_each_as_if_it_were_alone(tools: Tools) -> None:
    together = Beam(n=4, width=2).run(problems(3), tools)
    assert tools.generator.calls == [3, 6, 3], "a call a step, with what goes on of all problems"
    alone = [Beam(n=4, width=2).run([each], tools)[0] for each in problems(3)]
    told = [[(each.text, each.score, each.trace) for each in own] for own in together]
    assert told == [[(each.text, each.score, each.trace) for each in own] for own in alone]


def test_solutions_that_were_cut_off_have_no_vote_while_others_are_whole(tools: Tools) -> None:
    # After two steps b f (0.95) goes on, a 1 (0.5) is whole.
    (results,) = Beam(n=4, width=2, max_steps=2).run(problems(1), tools)
    assert [(each.text, each.finish) for each in results] == [("a\n#### 1", "stop"), ("b\nf\n", "length")]
    (results,) = Beam(n=4, width=2, max_steps=1).run(problems(1), tools)
    assert [(each.text, each.finish) for each in results] == [("a\n", "length"), ("b\n", "length")], "best first"


@pytest.mark.parametrize("missing", [{"a\n": None}, {"a\n": None, "b\n": None, "c\n": None, "d\n": None}])
def test_what_has_no_score_ranks_last_and_in_its_order(scripted: Any, valued: Any, missing: dict[str, None]) -> None:
    tools = Tools(scripted(SCRIPT), Grader(extractors=("hash",)), valued(SCORES | missing))
    (results,) = Beam(n=4, width=2, max_steps=1).run(problems(1), tools)
    assert [each.text for each in results] == (["b\n", "d\n"] if len(missing) == 1 else ["a\n", "b\n"])


def test_a_constant_scorer_makes_it_sampling(scripted: Any, valued: Any) -> None:
    tools = Tools(scripted(SCRIPT), Grader(extractors=("hash",)), valued(dict.fromkeys(SCORES, 0.5)))
    (found,) = Beam(n=2, width=1, vote="max").run(problems(1), tools)
    (samples,) = tools.generator.complete([State(problems(1)[0])], 2)
    assert [each.text for each in found] == [each.text for each in samples]


def test_an_exact_scorer_keeps_a_correct_step_whenever_one_is_among_the_candidates(scripted: Any, valued: Any) -> None:
    exact = {text: float(text.startswith("b") and "2" not in text) for text in SCORES}
    tools = Tools(scripted(SCRIPT), Grader(extractors=("hash",)), valued(exact))
    (results,) = Beam(n=4, width=2).run(problems(1), tools)
    for event in results[0].trace[:-1]:
        assert max(event["scores"]) == 1.0
        assert event["scores"][event["kept"][0]] == 1.0
    assert results[0].text == "b\nf\n#### 3"


def test_a_solution_without_words_is_not_scored(scripted: Any, valued: Any) -> None:
    script = {"": [("\n", 0.5, "stop"), ("a\n", 0.5, "step")], "a\n": [("#### 1", 1.0, "stop")] * 2}
    tools = Tools(scripted(script), Grader(extractors=("hash",)), valued({"a\n": 0.1, "a\n#### 1": 0.1}))
    (results,) = Beam(n=2, width=2).run(problems(1), tools)
    assert [each.text for each in results] == ["a\n#### 1"]
    assert results[0].trace[0]["scores"] == [None, 0.1]


def test_widths_that_do_not_divide_the_beam_are_refused() -> None:
    with pytest.raises(ConfigError, match="n=6 is no multiple of width=4"):
        Beam(n=6, width=4)
    with pytest.raises(ConfigError, match="width=0"):
        Beam(width=0)
    assert Beam(n=8, width=2).name != Beam(n=8, width=2, diverse=True).name
