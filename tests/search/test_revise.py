"""Verify, then revise: every decision, count and stop, with scripted solutions and scores."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from stepkd.errors import ConfigError
from stepkd.grading.pool import Grader, GradingConfig
from stepkd.search.revise import VerifyRevise, rewrite_prompt, with_draft
from stepkd.search.state import Problem, State, Tools

Make = Any
DRAFT = ("2*3=6\n", "6+1=8\n", "#### 8")
GOOD = {"2*3=6\n": 0.9, "6+1=7\n": 0.8, "#### 7": 0.9}
SCORES = GOOD | {"6+1=8\n": 0.2, "#### 8": 0.1, "6+1=9\n": 0.3, "#### 9": 0.1}


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(GradingConfig(extractors=("hash",), workers=1)) as made:
        yield made


def problem(index: int = 0) -> Problem:
    return Problem(index, {"id": f"p{index}", "prompt": "2*3+1=?", "answer": "7"}, (1, 2))


def tools_of(generator: Any, grader: Grader, value: Any) -> Tools:
    """Tools of which all count into one place."""
    value.costs = generator.costs
    return Tools(generator, grader, value, generator.costs)


def only(results: Sequence[Sequence[Any]]) -> Any:
    (found,) = results
    return found


def test_an_accepted_draft_is_the_answer(written: Make, judged: Make, grader: Grader) -> None:
    generator = written({"": [("2*3=6\n", "6+1=7\n", "#### 7")]})
    tools = tools_of(generator, grader, judged(GOOD))
    (best,) = only(VerifyRevise(reduction="last").run([problem()], tools))
    assert best.text == "2*3=6\n6+1=7\n#### 7"
    assert best.score == 0.9
    steps, scores = list(GOOD), list(GOOD.values())
    event = {"event": "verify", "round": 0, "score": 0.9, "then": "accepted", "steps": steps, "scores": scores}
    assert list(best.trace) == [event]
    assert generator.asked_for == [("", (), 0.0)]
    assert tools.costs[0]["scorer_calls"] == 1


def test_it_is_cut_before_the_first_doubtful_step_and_continued(written: Make, judged: Make, grader: Grader) -> None:
    generator = written({"": [DRAFT], "2*3=6\n": [("6+1=7\n", "#### 7")]})
    tools = tools_of(generator, grader, judged(SCORES))
    best, draft = only(VerifyRevise(reduction="min").run([problem()], tools))
    assert (best.text, draft.text) == ("2*3=6\n6+1=7\n#### 7", "".join(DRAFT))
    assert (best.score, draft.score) == (0.8, 0.1)
    assert generator.asked_for == [("", (), 0.0), ("2*3=6\n", (0, 1), None)]  # 1: new noise, of the first round
    assert [(each["then"], each.get("step")) for each in best.trace] == [("resample", 1), ("accepted", None)]
    assert draft.trace == ()
    assert best.step_ends.tolist() == [6, 12, 18]
    # The draft, and what was drawn behind the cut; each version is read once, prompt included.
    spent = {"continuations": 18 + 12, "scorer_calls": 2, "scored_tokens": 20 + 20, "unscored": 0}
    assert dict(tools.costs[0]) == spent


def test_a_doubtful_first_step_leaves_nothing_to_keep(written: Make, judged: Make, grader: Grader) -> None:
    generator = written({"": [DRAFT, ("2*3=6\n", "6+1=7\n", "#### 7")]})
    scores = SCORES | {"2*3=6\n": 0.4}
    best = only(VerifyRevise(reduction="last").run([problem()], tools_of(generator, grader, judged(scores))))[0]
    assert best.text == "2*3=6\n6+1=7\n#### 7"
    assert generator.asked_for == [("", (), 0.0), ("", (1,), None)]
    assert best.trace[0]["step"] == 0


def test_rounds_are_bounded_and_their_noise_is_new(written: Make, judged: Make, grader: Grader) -> None:
    tails = [("6+1=9\n", "#### 9"), ("6+1=8\n", "#### 8"), ("6+1=9\n", "#### 9")]
    generator = written({"": [DRAFT], "2*3=6\n": tails})
    tools = tools_of(generator, grader, judged(SCORES))
    versions = only(VerifyRevise(rounds=3, reduction="mean").run([problem()], tools))
    assert len(versions) == 4
    assert [path for _, path, _ in generator.asked_for] == [(), (0, 1), (0, 2), (0, 3)]
    assert [each["then"] for each in versions[0].trace] == ["resample"] * 3 + ["last_round"]
    assert versions[0].text.endswith("9")
    assert [each.text[-1] for each in versions] == list("9898"), "the last one first"
    assert tools.costs[0]["continuations"] == 18 + 3 * 12


def test_the_last_version_is_the_answer_also_where_it_was_cut_off(written: Make, judged: Make, grader: Grader) -> None:
    generator = written({"": [DRAFT], "2*3=6\n": [("6+1=9\n", "#### 9")]})
    complete, ends = generator.complete, iter(["stop", "length"])

    def cut_off(states: Sequence[State], n: int, **options: Any) -> list[list[State]]:
        end: Any = next(ends)
        return [[replace(each, end=end) for each in group] for group in complete(states, n, **options)]

    generator.complete = cut_off
    best = only(VerifyRevise(rounds=1, reduction="mean").run([problem()], tools_of(generator, grader, judged(SCORES))))[
        0
    ]
    assert (best.text[-1], best.finish) == ("9", "length")


def test_two_successive_answers_that_agree_end_it(written: Make, judged: Make, grader: Grader) -> None:
    generator = written({"": [DRAFT], "2*3=6\n": [("6+1=9\n", "#### 8.0")]})
    scores = SCORES | {"#### 8.0": 0.2}
    best, _ = only(VerifyRevise(reduction="last").run([problem()], tools_of(generator, grader, judged(scores))))
    assert best.text.endswith("8.0")
    assert [each["then"] for each in best.trace] == ["resample", "agreed"]


def test_solutions_without_an_answer_do_not_agree(written: Make, judged: Make, grader: Grader) -> None:
    generator = written({"": [("hm\n", "ah\n")], "hm\n": [("oh\n",), ("ah\n",)]})
    scores = {"hm\n": 0.9, "ah\n": 0.1, "oh\n": 0.2}
    method = VerifyRevise(rounds=2, reduction="last")
    best = only(method.run([problem()], tools_of(generator, grader, judged(scores))))[0]
    assert [each["then"] for each in best.trace] == ["resample", "resample", "last_round"]


def test_no_doubtful_step_ends_it(written: Make, judged: Make, grader: Grader) -> None:
    """A product below theta of steps that are all above it."""
    generator = written({"": [("2*3=6\n", "6+1=8\n")]})
    scores = {"2*3=6\n": 0.6, "6+1=8\n": 0.6}
    (best,) = only(VerifyRevise(reduction="product").run([problem()], tools_of(generator, grader, judged(scores))))
    assert best.score == pytest.approx(0.36)
    assert best.trace[0]["then"] == "no_doubtful_step"


@pytest.mark.parametrize("scores", [SCORES, dict.fromkeys(SCORES, 0.0), dict.fromkeys(SCORES, math.nan)])
def test_theta_0_is_the_draft(scores: Mapping[str, float], written: Make, judged: Make, grader: Grader) -> None:
    generator = written({"": [DRAFT]})
    (best,) = only(VerifyRevise(theta=0.0).run([problem()], tools_of(generator, grader, judged(scores))))
    assert best.text == "".join(DRAFT)
    assert len(generator.asked_for) == 1


def test_missing_scores_are_counted_and_doubt_nothing(written: Make, judged: Make, grader: Grader) -> None:
    """The second step has no score: neither has the solution, and it is cut at the step that is known to be bad."""
    generator = written({"": [DRAFT], "2*3=6\n6+1=8\n": [("#### 7",)]})
    scores = SCORES | {"6+1=8\n": math.nan, "#### 7": math.nan}
    tools = tools_of(generator, grader, judged(scores))
    best, _ = only(VerifyRevise(reduction="min").run([problem()], tools))
    assert best.text.endswith("#### 7")
    assert [each["score"] for each in best.trace] == [None, None]
    assert [each["then"] for each in best.trace] == ["resample", "no_doubtful_step"]
    assert best.trace[0]["scores"] == [0.9, None, 0.1]
    assert tools.costs[0]["unscored"] == 2


def test_a_revision_without_words_is_none_and_is_tried_again(written: Make, judged: Make, grader: Grader) -> None:
    """What stands before the cut would be accepted."""
    generator = written({"": [DRAFT], "2*3=6\n": [("",), ("6+1=7\n", "#### 7")]})
    best, _ = only(VerifyRevise(reduction="last").run([problem()], tools_of(generator, grader, judged(SCORES))))
    assert best.text.endswith("#### 7")
    assert [path for _, path, _ in generator.asked_for] == [(), (0, 1), (0, 2)]
    assert best.trace[1] == {"event": "nothing_written", "round": 1}
    generator = written({"": [DRAFT], "2*3=6\n": [("",)]})
    (draft,) = only(VerifyRevise(rounds=3).run([problem()], tools_of(generator, grader, judged(SCORES))))
    assert draft.text == "".join(DRAFT)
    assert len(generator.asked_for) == 1 + 3


def test_a_solution_without_words_is_left_alone(written: Make, judged: Make, grader: Grader) -> None:
    tools = tools_of(written({"": [("",)]}), grader, judged({}))
    (best,) = only(VerifyRevise().run([problem()], tools))
    assert (best.text, best.score, best.trace[0]["then"]) == ("", None, "no_doubtful_step")


def test_problems_do_not_depend_on_each_other(written: Make, judged: Make, grader: Grader) -> None:
    def results(*indices: int) -> dict[str, list[tuple[str, Any]]]:
        generator = written(
            {
                ("p0", ""): [DRAFT],
                ("p0", "2*3=6\n"): [("6+1=9\n", "#### 9"), ("6+1=7\n", "#### 7")],
                ("p1", ""): [("2*3=6\n", "6+1=7\n", "#### 7")],
                ("p2", ""): [DRAFT],
                ("p2", "2*3=6\n"): [("6+1=9\n", "#### 8")],
            }
        )
        tools = tools_of(generator, grader, judged(SCORES))
        found = VerifyRevise(reduction="last").run([problem(i) for i in indices], tools)
        assert generator.calls <= 3  # the problems go on together
        return {each[0].id: [(version.text, version.trace) for version in each] for each in found}

    together = results(0, 1, 2)
    assert together == results(0) | results(1) | results(2)
    assert [len(versions) for versions in together.values()] == [3, 1, 2]


def test_a_sampled_draft_is_the_first_of_the_shared_samples(written: Make, judged: Make, grader: Grader) -> None:
    generator = written({"": [DRAFT], "2*3=6\n": [("6+1=7\n", "#### 7")]})
    tools = tools_of(generator, grader, judged(SCORES))
    method = VerifyRevise(draft="sampled", reduction="last")
    for _ in range(2):
        best = only(method.run([problem()], tools))[0]
        assert best.text.endswith("7")
    # It was drawn once and counts twice; the second method's revision is the first one's.
    assert [temperature for _, _, temperature in generator.asked_for] == [None, None, None]
    assert tools.costs[0]["continuations"] == 2 * (18 + 12)


def test_the_model_rewrites_what_it_is_shown(written: Make, judged: Make, grader: Grader) -> None:
    prompt = rewrite_prompt("2*3+1=?", DRAFT, 1, 0.2)
    assert "(2) 6+1=8\n" in prompt
    assert "step (2) a probability of 20% of being correct" in prompt
    generator = written({"": [DRAFT], ("p0", prompt, ""): [("2*3=6\n", "6+1=7\n", "#### 7")]})
    tools = tools_of(generator, grader, judged(SCORES))
    best, _ = only(VerifyRevise(revision="rewrite", reduction="last").run([problem()], tools))
    assert best.text == "2*3=6\n6+1=7\n#### 7"
    assert best.row["prompt"] == "2*3+1=?"
    assert best.prompt_ids.tolist() == [1, 2]
    assert generator.asked_for[1] == ("", (1,), None)
    assert best.trace[0]["then"] == "rewrite"
    assert tools.costs[0]["continuations"] == 36


def test_a_prompt_without_room_ends_it_and_is_counted(written: Make, judged: Make, grader: Grader) -> None:
    generator = written({"": [DRAFT]}, longest=40)
    tools = tools_of(generator, grader, judged(SCORES))
    (best,) = only(VerifyRevise(revision="rewrite").run([problem()], tools))
    assert best.text == "".join(DRAFT)
    assert best.trace[1] == {"event": "no_room", "round": 1}
    assert tools.costs[0]["no_room"] == 1


def test_what_is_added_to_chat_messages_stands_in_the_last_one() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?\n"}]
    assert with_draft(messages, "Draft:\n3") == [messages[0], {"role": "user", "content": "1+1?\n\nDraft:\n3"}]
    assert messages[1]["content"] == "1+1?\n"
    assert with_draft("1+1?\n", "Draft:\n3") == "1+1?\n\nDraft:\n3\n"


def test_names_tell_settings_apart() -> None:
    assert VerifyRevise().name == "verify_revise@5"
    assert VerifyRevise(theta=0.3, rounds=2, revision="rewrite").name == "verify_revise@2_theta-0.3_rewrite"


def test_settings_and_tools_that_cannot_be_used_are_refused(written: Make, valued: Make, grader: Grader) -> None:
    with pytest.raises(ConfigError, match=r"theta=1\.5"):
        VerifyRevise(theta=1.5)
    with pytest.raises(ConfigError, match="rounds=0"):
        VerifyRevise(rounds=0)
    for value in (None, valued({})):
        with pytest.raises(ConfigError, match="scores of single steps"):
            VerifyRevise().run([problem()], Tools(written({"": [DRAFT]}), grader, value))
