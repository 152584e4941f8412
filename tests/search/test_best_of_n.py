"""Best-of-N over scripted samples: which one each vote takes, what is drawn and counted, and what a trace says."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from stepkd.errors import ConfigError
from stepkd.grading.pool import Grader
from stepkd.search.best_of_n import BestOfN, Greedy, Vote, answered, choice, eligible, soft_choice
from stepkd.search.state import Problem, State, Step, Tools

SCORES = {"a\n#### 1": 0.6, "b\n#### 2": 0.5, "c\n#### 2": 0.3, "d\n": None}


@pytest.fixture
def tools(scripted: Any, valued: Any) -> Tools:
    """Four samples: the best score says 1, two others say 2, and one is cut off without a score."""
    script = {"": [(f"{name}\n", 0.25, "step") for name in "abcd"], "d\n": [("", 1.0, "length")]}
    script |= {f"{name}\n": [(f"#### {answer}", 1.0, "stop")] for name, answer in zip("abc", "122", strict=True)}
    return Tools(scripted(script), Grader(extractors=("hash",)), valued(SCORES))


def answers(tools: Tools, problem: Problem, **settings: Any) -> list[str]:
    """Texts that a vote gives, its answer first."""
    (results,) = BestOfN(**{"n": 4, **settings}).run([problem], tools)
    return [each.text for each in results]


@pytest.mark.parametrize(
    ("vote", "n", "wins"),
    [
        ("max", 4, "a\n#### 1"),
        ("majority", 4, "b\n#### 2"),  # of two samples with the answer the first, since it asks no scores
        ("weighted", 4, "b\n#### 2"),  # 0.5 + 0.3 > 0.6
        ("weighted", 2, "a\n#### 1"),
        ("majority", 2, "a\n#### 1"),  # a tie goes to the answer that came first
        ("max", 1, "a\n#### 1"),
    ],
)
def test_a_vote_takes_the_sample_that_its_rule_says(
    tools: Tools, problem: Problem, vote: Vote, n: int, wins: str
) -> None:
    found = answers(tools, problem, vote=vote, n=n)
    assert found[0] == wins
    assert len(found) == n
    assert Counter(found) == Counter(each.text for each in tools.pool[0][:n]), "the others stand behind it"


def test_a_trace_tells_scores_votes_and_what_was_kept(tools: Tools, problem: Problem) -> None:
    ((first, *others),) = BestOfN(n=4, vote="weighted").run([problem], tools)
    (event,) = first.trace
    assert event == {
        "event": "choice",
        "vote": "weighted",
        "steps": ["#### 1", "#### 2", "#### 2", ""],
        "scores": [0.6, 0.5, 0.3, None],
        "votes": ["1", "2", "2", None],
        "kept": [1],
    }
    assert first.score == 0.5
    assert [each.trace for each in others] == [(), (), ()]
    assert [each.finish for each in others] == ["stop", "stop", "length"]


def test_methods_share_samples_that_are_drawn_once_and_each_is_charged_for_its_own(
    tools: Tools, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    draw = tools.generator.complete

    def complete(states: Sequence[State], n: int, **options: Any) -> list[list[State]]:
        calls.append(n)
        return draw(states, n, **options)

    monkeypatch.setattr(tools.generator, "complete", complete)
    spent = {}
    for n in (4, 2, 3):
        tools.costs.clear()
        answers(tools, problem, n=n, vote="majority")
        spent[n] = tools.costs.generated(0)
    assert calls == [4]
    assert spent == {n: sum(len(state.token_ids) for state in tools.pool[0][:n]) for n in (4, 2, 3)}
    assert spent[2] < spent[3] < spent[4]


def test_greedy_draws_one_solution_at_temperature_zero(
    tools: Tools, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, float | None]] = []
    draw = tools.generator.complete

    def complete(states: Sequence[State], n: int, *, temperature: float | None = None) -> list[list[State]]:
        asked.append((n, temperature))
        return draw(states, n)

    monkeypatch.setattr(tools.generator, "complete", complete)
    (found,) = Greedy().run([problem], tools)
    assert ([each.text for each in found], asked) == (["a\n#### 1"], [(1, 0.0)])
    assert not Greedy().needs_scorer


def test_choice_of_no_answers_is_the_highest_score_and_of_no_scores_the_first() -> None:
    assert choice([0.1, None, 0.3], [None, None, None], "majority") == 2
    assert choice([None, None], ["1", "1"], "weighted") == 0
    assert choice([0.2, 0.9, 0.4], ["1", "2", "1"], "majority") == 2, "of the winning answer the highest score"
    # Two answers whose weights differ by rounding alone are tied.
    assert choice([0.3, 0.1, 0.2], ["2", "1", "1"], "weighted") == 0


def test_soft_choice_draws_by_softmax_and_tends_to_the_best_and_to_any() -> None:
    drawn = Counter(soft_choice([1.0, 0.0, None], 1.0, 0, key) for key in range(4000))
    share = math.e / (1 + math.e)
    assert drawn[0] / 4000 == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 4000))
    assert drawn[2] == 0, "what has no score is not drawn while others have one"
    assert {soft_choice([0.5, 0.6], 1e-3, 0, key) for key in range(50)} == {1}
    assert {soft_choice([None, None], 0.1, 0, key) for key in range(50)} == {0, 1}
    assert soft_choice([0.5, 0.5], 1.0, 3, 7) == soft_choice([0.5, 0.5], 1.0, 3, 7)


def test_impossible_settings_are_refused_and_names_tell_methods_apart() -> None:
    with pytest.raises(ConfigError, match="n=0"):
        BestOfN(n=0)
    with pytest.raises(ConfigError, match="temperature=0"):
        BestOfN(vote="soft", temperature=0)
    with pytest.raises(ConfigError, match=r"temperature=0\.5: only vote soft draws by it, and vote is max; drop it"):
        BestOfN(vote="max", temperature=0.5)
    with pytest.raises(ConfigError, match="a majority vote has no scores to reduce"):
        BestOfN(vote="majority", reduction="min")
    methods = [BestOfN(), BestOfN(vote="max"), BestOfN(vote="majority"), BestOfN(reduction="min"), BestOfN(n=4)]
    assert len({each.name for each in methods}) == 5
    assert [each.needs_scorer for each in methods] == [True, True, False, True, True]


def test_a_scorer_that_is_missing_is_named(tools: Tools, problem: Problem) -> None:
    tools.value = None
    with pytest.raises(ConfigError, match="give --scorer"):
        answers(tools, problem, vote="max")
    assert answers(tools, problem, vote="majority")[0] == "b\n#### 2"


def test_answers_are_taken_from_what_was_not_cut_off_and_come_first(problem: Problem) -> None:
    cut, done, other = (State(problem).then(Step(text, (1,), 0.0, end)) for text, end in ENDS)
    assert list(eligible([cut, done, other])) == [1, 2]
    assert list(eligible([cut])) == [0]
    completions = answered([cut, done, other], [0.1, None, 0.3], 1, [{"event": "choice"}])
    assert [(each.text, each.score, len(each.trace)) for each in completions] == [
        *(("b", None, 1), ("a", 0.1, 0), ("c", 0.3, 0))
    ]


ENDS: Any = (("a", "length"), ("b", "stop"), ("c", "stop"))


def test_solutions_have_their_number_whatever_path_led_to_them(problem: Problem) -> None:
    states = [State(problem, ("a\n",), (1,), (-1, 7), end="stop") for _ in range(3)]
    assert [each.sample for each in answered(states, [0.1, 0.9, 0.2], 1, [])] == [1, 0, 2]
