"""phi-Decoding: weights, clusters, both prunings and the last choice, of the paper and of its code."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest

from stepkd.errors import ConfigError, ModelError
from stepkd.search.phi import PhiDecoding, step_weights, text_clusters, word_vectors
from stepkd.search.state import Found, Problem, State, Step, Tools

Variant = Literal["paper", "code"]
VARIANTS: tuple[Variant, ...] = ("paper", "code")


def problems(count: int = 1) -> list[Problem]:
    return [Problem(i, {"id": f"p{i}", "prompt": "?", "answer": "1"}, (7,)) for i in range(count)]


def search(method: PhiDecoding, generator: Any, some: Sequence[Problem] | None = None) -> list[list[Found]]:
    return method.run(some or problems(), Tools(generator, grader=None))  # type: ignore[arg-type]


def softmax(*x: float) -> np.ndarray[Any, Any]:
    return np.exp(x) / np.exp(x).sum()


def test_step_weights_of_the_paper_and_of_its_code() -> None:
    advantages, shares = np.array([0.3, -0.1, 0.0]), np.array([2 / 3, 2 / 3, 1 / 3])
    value = softmax(0.5, -1 / 6, 0) + softmax(10 / 9, 10 / 9, 5 / 9)
    assert step_weights(advantages, shares, "paper") == pytest.approx(softmax(*value / 0.6), rel=1e-12)
    code = (softmax(3, -1, 0) + softmax(2 / 3, 2 / 3, 1 / 3)) / 2
    assert step_weights(advantages, shares, "code") == pytest.approx(code, rel=1e-12)
    assert step_weights(np.array([-800.0, 0.0]), np.array([0.5, 0.5]), "code")[0] == 0.25, "no overflow"


@pytest.mark.parametrize("values", [[0.1318, 0.2002, 0.6680], [0.1401, 0.1850, 0.6749]])
def test_step_values_printed_in_the_paper_are_those_of_its_code(values: Sequence[float]) -> None:
    """Figure 7: two of three paths are alike. Half of softmax(C) leaves advantages that are chances: they sum to 1."""
    alignment = softmax(1 / 3, 2 / 3, 2 / 3) / 2
    rest = np.maximum(2 * (np.array(values) - alignment), 1e-9)
    assert rest.sum() == pytest.approx(1, abs=4e-4)
    weights = step_weights(0.1 * np.log(rest), np.array([1 / 3, 2 / 3, 2 / 3]), "code")
    assert weights == pytest.approx(values, abs=2e-4)


def noise() -> np.random.Generator:
    return np.random.default_rng(0)


def test_texts_cluster_by_their_words() -> None:
    labels = text_clusters(["So x is 12.", "so X is 12", "then y = 7", "Then y = 7!"], 2, noise())
    assert labels[0] == labels[1] != labels[2] == labels[3]
    assert text_clusters(["", " ", "!"], 3, noise()).tolist() == [0, 0, 0]
    assert text_clusters(["a b", "b a", "A, b"], 3, noise()).tolist() == [0, 0, 0], "word order says nothing"
    assert len(set(text_clusters(["1", "2", "3"], 3, noise()).tolist())) == 3, "one digit is a word"
    assert len(set(text_clusters(["1", "2", "2", "1"], 3, noise()).tolist())) == 2
    assert text_clusters(["x", "y"], 1, noise()).tolist() == [0, 0]


def test_rare_words_weigh_more() -> None:
    """In three texts: ln(4 / 4) + 1 for a word of all, ln(4 / 2) + 1 for a word of one; a text that says it twice."""
    rare, vectors = math.log(2) + 1, word_vectors(["Sum 5", "sum", "sum sum 7"])
    assert vectors[0] == pytest.approx(np.array([rare, 0, 1]) / math.hypot(rare, 1), rel=1e-12)
    assert vectors[1] == pytest.approx([0, 0, 1])
    assert vectors[2] == pytest.approx(np.array([0, rare, 2]) / math.hypot(rare, 2), rel=1e-12)
    assert not word_vectors([" ", "."]).any()


TREE = {
    "": [("a\n", 0.5, "step"), ("b\n", 0.3, "step"), ("c\n", 0.19, "step"), ("d\n", 0.01, "step")],
    "a\n": [("one 1", 0.5, "stop"), ("two 2", 0.5, "stop")],
    "b\n": [("one 1", 0.25, "stop"), ("x\n", 0.75, "step")],
    "c\n": [("far 3", 0.8, "stop"), ("two 2", 0.2, "stop")],
    "d\n": [("far 3", 1.0, "stop")],
    "b\nx\n": [("two 2", 1.0, "stop")],
}


def test_a_round_in_numbers(scripted: Any) -> None:
    """Four steps of one token; the fourth is too unlikely; the others look ahead to their first continuations."""
    for variant in VARIANTS:
        ((first, second),) = search(PhiDecoding(variant=variant, beams=2, rollouts=2, max_rounds=1), scripted(TREE))
        pruned, foresight, choice = first.trace
        assert pruned["event"] == "prune"
        assert pruned["scores"] == pytest.approx([math.log(p) for p in (0.5, 0.3, 0.19, 0.01)])
        assert pruned["kept"] == [0, 1, 2]
        assert foresight["steps"] == ["a\n", "b\n", "c\n"]
        assert foresight["advantages"] == pytest.approx([math.log(p) for p in (0.5, 0.25, 0.8)])
        a, b, c = foresight["clusters"]
        assert a == b != c, "three clusters are asked for, two texts differ"
        shares = np.array([2 / 3, 2 / 3, 1 / 3])
        assert foresight["scores"] == pytest.approx(step_weights(np.log([0.5, 0.25, 0.8]), shares, variant), rel=1e-12)
        assert len(set(foresight["kept"])) == 2
        before = [math.log((0.5, 0.25, 0.8)[i]) for i in foresight["kept"]]
        after = [math.log({"a": 0.5, "b": 0.25, "c": 0.8}["abc"[i]]) for i in foresight["kept"]]
        assert choice["advantages"] == pytest.approx(np.subtract(after, before), abs=1e-12)
        assert {first.text[0], second.text[0]} == {"abc"[i] for i in foresight["kept"]}
        assert first.score == choice["scores"][choice["kept"][0]]
        assert sum(choice["scores"]) == pytest.approx(1)


def test_the_code_draws_from_the_larger_of_two_clusters_alone(keyed: Any) -> None:
    script = {"": [("s\n", 1.0, "step")], "s\n": [("same 1", 0.8, "stop"), ("other 22", 0.2, "stop")]}
    method = PhiDecoding(variant="code", beams=5, rollouts=1, max_rounds=1)
    found = search(method, keyed(script), problems(20))
    mixed = [group for group in found if 0 < sum(each.text == "s\nsame 1" for each in group) < 5]
    assert len(mixed) > 5
    for group in mixed:
        texts = [each.text for each in group]
        assert texts.count(texts[0]) >= 3
        assert sum(score == 0 for score in group[0].trace[-1]["scores"]) == 5 - texts.count(texts[0])
    paper = search(replace(method, variant="paper"), keyed(script), problems(20))
    assert all(min(group[0].trace[-1]["scores"]) > 0 for group in paper)


def test_in_width_pruning_of_equal_steps(keyed: Any) -> None:
    """All lie on the bound: the paper keeps them, the code none of them, and then draws as many as there are beams."""
    script = {"": [(f"{i}\n", 1 / 9, "step") for i in range(9)]} | {f"{i}\n": [("7", 1.0, "stop")] for i in range(9)}
    for variant, kept in (("paper", 12), ("code", 4)):
        method = PhiDecoding(variant=variant, beams=4, rollouts=3, max_rounds=1)  # type: ignore[arg-type]
        ((first, *rest),) = search(method, keyed(script))
        assert len(set(first.trace[0]["kept"])) == kept
        assert len(rest) == 3


def test_the_search_stops_where_most_foresight_agrees_and_not_too_early(keyed: Any) -> None:
    def endless(text: str) -> Sequence[tuple[str, float, str]]:
        return [("go\n", 0.5, "step"), ("on\n", 0.5, "step")] if text.count("\n") < 9 else [("1", 1.0, "stop")]

    def rounds(**settings: Any) -> int:
        generator = keyed(endless, longest=20)
        ((first, *_),) = search(PhiDecoding(beams=2, rollouts=2, **settings), generator)
        assert generator.calls[0] == (1, 4)
        assert set(generator.calls[1:]) <= {(2, 2)}
        assert len(generator.temperatures) == len(generator.calls) + 1, "foresight of every round, and the completion"
        assert first.finish == "stop"
        return len(generator.calls)

    assert rounds(clusters=1, min_rounds=3) == 3, "one cluster holds all"
    assert rounds(clusters=1, min_rounds=1) == 1
    assert rounds(clusters=1, min_rounds=3, max_rounds=2) == 2
    assert rounds(clusters=3, min_rounds=1, threshold=1.0, max_rounds=5) == 5


def test_finished_solutions_stay_in_the_race_without_being_looked_ahead_from(keyed: Any) -> None:
    script = {"": [("end 1", 0.5, "stop"), ("a\n", 0.5, "step")]}
    script |= {"a\n" * i: [("a\n", 1.0, "step")] for i in range(1, 4)} | {"a\n" * 4: [("end 2", 1.0, "stop")]}
    generator = keyed(script)
    found = search(PhiDecoding(beams=3, rollouts=2, min_rounds=9), generator, problems(6))
    ended = 0
    for group in found:
        for event in group[0].trace:
            if event["event"] == "foresight" and event["step"]:
                for step, advantage in zip(event["steps"], event["advantages"], strict=True):
                    if step == "end 1":
                        ended += 1
                        assert advantage == pytest.approx(0, abs=1e-12)
        assert {each.text for each in group} <= {"end 1", "a\na\na\na\nend 2"}
        assert all(each.finish == "stop" for each in group)
    assert ended
    assert len(generator.calls) <= 5, "no call where all are finished"


def test_a_completion_is_not_the_foresight_once_more(keyed: Any) -> None:
    """The noise is keyed by the state's path, so the last completions need another one."""
    script = {"": [("s\n", 1.0, "step")], "s\n": [(f"{i}", 1 / 100, "stop") for i in range(100)]}
    seen: list[str] = []

    class Watched(keyed):  # type: ignore[misc]
        def complete(self, states: Sequence[State], n: int, *, temperature: float | None = None) -> list[list[State]]:
            drawn = super().complete(states, n, temperature=temperature)
            seen.extend(group[0].text for group in drawn)
            return drawn  # type: ignore[no-any-return]

    generator = Watched(script)
    method = PhiDecoding(beams=3, rollouts=1, max_rounds=1, foresight_temperature=1.0)
    search(method, generator)
    assert len(set(seen)) == 6
    assert generator.temperatures == [1.0, 1.0]


def test_an_endless_generator_and_a_full_context_are_bounded(keyed: Any) -> None:
    ((first, *rest),) = search(
        PhiDecoding(beams=2, max_rounds=3), keyed(lambda _: [("again\n", 1.0, "step")], longest=6)
    )
    assert [each.finish for each in (first, *rest)] == ["length", "length"]
    assert len(first.step_ends) == 6
    script = {"": [("full", 0.5, "length"), ("a\n", 0.5, "step")], "a\n": [("2", 1.0, "stop")]}
    for group in search(PhiDecoding(beams=2, rollouts=2), keyed(script), problems(4)):
        assert {(each.text, each.finish) for each in group} <= {("full", "length"), ("a\n2", "stop")}


@pytest.mark.parametrize(
    ("told", "error", "message"),
    [(None, ConfigError, r"phi-decoding .*temperature 1"), (-math.inf, ModelError, r"log-probability -inf: take")],
)
def test_an_engine_without_log_probabilities_is_refused(
    scripted: Any, told: float | None, error: type[Exception], message: str
) -> None:
    class Blind(scripted):  # type: ignore[misc]
        def propose(self, states: Sequence[State], n: int, *, temperature: float | None = None) -> list[list[Step]]:
            return [[replace(step, logprob=told) for step in steps] for steps in super().propose(states, n)]

    with pytest.raises(error, match=message):
        search(PhiDecoding(beams=2, rollouts=2), Blind(TREE))


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_found_for_a_problem_does_not_depend_on_the_others(variant: Variant, keyed: Any) -> None:
    method, some = PhiDecoding(variant=variant, beams=2, rollouts=2, min_rounds=1), problems(4)
    together = search(method, keyed(TREE), some)
    for problem, group in zip(some, together, strict=True):
        (alone,) = search(method, keyed(TREE), [problem])
        assert [(each.text, each.trace) for each in alone] == [(each.text, each.trace) for each in group]
    backwards = search(method, keyed(TREE), some[::-1])[::-1]
    assert [group[0].trace for group in backwards] == [group[0].trace for group in together]
    other = search(method, keyed(TREE), [replace(each, seed=1) for each in some])
    assert [group[0].trace for group in other] != [group[0].trace for group in together]


@pytest.mark.parametrize("wrong", [{"beams": 0}, {"threshold": 1.2}, {"variant": "mine"}, {"rollouts": 0}])
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        PhiDecoding(**wrong)
