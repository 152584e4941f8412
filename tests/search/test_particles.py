"""The particle filter: closed-form weights, who goes on, and what it is equal to."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from stepkd.errors import ConfigError
from stepkd.scorers.scorer import Solutions
from stepkd.search.beam import ParticleFilter, particle_weights
from stepkd.search.generate import ScorerValue
from stepkd.search.state import Costs, Found, Problem, State, Step, Tools

LETTERS = {
    "": [("a ", 0.75, "step"), ("b ", 0.25, "step")],
    "a ": [("1", 0.5, "stop"), ("x ", 0.5, "step")],
    "b ": [("2", 1.0, "stop")],
    "a x ": [("3", 0.4, "stop"), ("4", 0.6, "stop")],
}
ANSWERS = {"a 1": 0.375, "a x 3": 0.15, "a x 4": 0.225, "b 2": 0.25}


class ByText:
    """Scores by a function of the text; None is no score."""

    def __init__(self, score: Callable[[str], float | None]) -> None:
        self.score = score

    def values(self, states: Sequence[State], reduction: str | None = None) -> list[float | None]:
        return [self.score(state.text) for state in states]

    def provenance(self) -> dict[str, Any]:
        return {}


class PlainAnswers:
    """A grader without processes: answers are equal if they are spelled alike."""

    extractors = ("last_number",)

    def same(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        return [first == second for first, second in pairs]


class Dice:
    """One run through chance nodes: takes given outcomes, then first ones, and notes what else could come."""

    def __init__(self, outcomes: Sequence[int]) -> None:
        self.outcomes, self.taken, self.chance, self.others = outcomes, [], 1.0, []  # type: ignore[var-annotated]

    def roll(self, chances: Sequence[float]) -> int:
        possible = [i for i, chance in enumerate(chances) if chance > 0]
        number = len(self.taken)
        if number < len(self.outcomes):
            outcome = self.outcomes[number]
        else:
            outcome = possible[0]
            self.others += [[*self.taken, other] for other in possible[1:]]
        self.taken.append(outcome)
        self.chance *= chances[outcome]
        return outcome

    def choice(self, n: int, size: int, p: Sequence[float]) -> Any:
        return np.array([self.roll(p) for _ in range(size)])

    def propose(self, states: Sequence[State], n: int, *, temperature: float | None = None) -> list[list[Step]]:
        return [[self._step(LETTERS[state.text], j) for j in range(n)] for state in states]

    def _step(self, options: Sequence[tuple[str, float, str]], j: int) -> Step:
        text, probability, end = options[self.roll([each[1] for each in options])]
        return Step(text, (1,), math.log(probability), end, j)  # type: ignore[arg-type]


def every_run(run: Callable[[Dice], str]) -> Counter[str]:
    """Probabilities of what can come of a run, over all outcomes of its chance nodes."""
    result: Counter[str] = Counter()
    waiting: list[list[int]] = [[]]
    while waiting:
        dice = Dice(waiting.pop())
        result[run(dice)] += dice.chance  # type: ignore[assignment]
        waiting += dice.others
    return result


def problems(count: int = 1) -> list[Problem]:
    return [Problem(i, {"id": f"p{i}", "prompt": "?", "answer": "1"}, (7,)) for i in range(count)]


def search(
    method: ParticleFilter, generator: Any, score: Callable[[str], float | None], some: Sequence[Problem] | None = None
) -> list[list[Found]]:
    return method.run(some or problems(), Tools(generator, PlainAnswers(), ByText(score)))  # type: ignore[arg-type]


def test_weights_are_odds_to_the_power_of_the_inverse_temperature() -> None:
    odds = np.array([0.25, 1.0, 4.0])
    assert particle_weights([0.2, 0.5, 0.8], 1.0) == pytest.approx(odds / odds.sum(), rel=1e-12)
    assert particle_weights([0.2, 0.5, 0.8], 2.0) == pytest.approx(odds**0.5 / (odds**0.5).sum(), rel=1e-12)
    assert particle_weights([0.8, None, float("nan")], 1.0).tolist() == [1.0, 0.0, 0.0]
    assert particle_weights([None, None], 1.0).tolist() == [0.5, 0.5]
    assert particle_weights([0.0, 0.0, 0.0, 0.0], 1.0).tolist() == [0.25] * 4
    assert particle_weights([1.0, 1.0, 0.5], 0.01).tolist() == [0.5, 0.5, 0.0], "no overflow"
    checker = particle_weights([1.0, 0.0], 1.0)
    assert checker[1] == pytest.approx(2.0**-104, rel=1e-6)
    assert checker[0] == 1.0


def test_with_a_constant_score_the_answer_is_a_sample_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly: summed over all draws of steps and of particles, with solutions of different length."""

    def run(dice: Dice) -> str:
        monkeypatch.setattr("stepkd.search.beam.generator", lambda *_: dice)
        return search(ParticleFilter(n=2), dice, lambda _: 0.7)[0][0].text

    law = every_run(run)
    assert law == pytest.approx(ANSWERS, rel=1e-12)


def test_one_particle_is_one_sample(keyed: Any) -> None:
    found = search(ParticleFilter(n=1), keyed(LETTERS), lambda _: 0.1, problems(400))
    shares = Counter(group[0].text for group in found)
    for text, chance in ANSWERS.items():
        assert abs(shares[text] / 400 - chance) < 4 * math.sqrt(chance * (1 - chance) / 400)
    assert all(len(group) == 1 for group in found)


def branches(text: str) -> Sequence[tuple[str, float, str]]:
    """Three steps, each correct (``+``) with probability 0.3, then an answer."""
    steps = text.count("\n")
    return [("+\n", 0.3, "step"), ("-\n", 0.7, "step")] if steps < 3 else [("7", 1.0, "stop")]


def test_with_an_exact_checker_no_incorrect_particle_survives_a_correct_one(keyed: Any) -> None:
    """Its weight beside a correct one is 2^-104, and a draw is a multiple of 2^-53: it could only be taken for 0."""
    found = search(ParticleFilter(n=4), keyed(branches), lambda text: float("-" not in text), problems(60))
    lost = 0
    for group in found:
        for event in group[0].trace[:-1]:
            correct = {i for i, score in enumerate(event["scores"]) if score == 1.0}
            assert not correct or set(event["kept"]) <= correct
            lost += not correct
        assert max(each.score for each in group) == group[0].score  # type: ignore[type-var]
    assert lost, "where all are incorrect, incorrect ones go on"
    share = (1 - 0.7**4) ** 3
    spread = math.sqrt(share * (1 - share) / len(found))
    assert abs(sum("-" not in group[0].text for group in found) / len(found) - share) < 4 * spread


def test_copies_of_a_particle_take_different_steps(keyed: Any) -> None:
    """One that alone has weight is copied n times; each copy is another sample of its next step, in one call."""
    generator = keyed(lambda text: [(f"{i} ", 1 / 1000, "step") for i in range(1000)])
    best: list[str] = []

    def score(text: str) -> float | None:
        if text.count(" ") == 1 and not best:
            best.append(text)
        return 1.0 if best and text.startswith(best[0]) else None

    ((first, *rest),) = search(ParticleFilter(n=5, max_steps=2), generator, score)
    assert generator.calls == [(1, 5), (1, 5)]
    assert len({each.text for each in (first, *rest)}) == 5
    assert all(each.text.startswith(best[0]) for each in (first, *rest))
    assert first.trace[0]["weights"] == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert first.trace[0]["kept"] == [0] * 5


@dataclass
class TwoOfThree:
    """Three particles that are kept as 0, 0, 2 after the first step."""

    calls: list[tuple[tuple[str, ...], int]] = field(default_factory=list)

    def choice(self, n: int, size: int, p: Any) -> Any:
        return np.array([0, 2, 0]) if len(self.calls) == 1 else np.arange(n)

    def propose(self, states: Sequence[State], n: int, *, temperature: float | None = None) -> list[list[Step]]:
        self.calls.append((tuple(state.text for state in states), n))
        ends = "stop" if states[0].text else "step"
        return [[Step(f"{j}.", (j,), -1.0, ends, j) for j in range(n)] for _ in states]  # type: ignore[arg-type]


def test_particles_of_one_count_go_on_together(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = TwoOfThree()
    monkeypatch.setattr("stepkd.search.beam.generator", lambda *_: generator)
    ((first, *rest),) = search(ParticleFilter(n=3), generator, lambda text: 0.9 if text.startswith("2") else 0.5)
    assert generator.calls == [(("",), 3), (("2.",), 1), (("0.",), 2)]
    assert [first.text, *(each.text for each in rest)] == ["2.0.", "0.0.", "0.1."]
    assert [first.score, first.token_ids.tolist()] == [0.9, [2, 0]]
    resampled, choice = first.trace
    assert resampled == {
        **{"event": "resample", "step": 0, "weights": [1 / 11, 1 / 11, 9 / 11], "kept": [0, 2, 0]},
        **{"steps": ["0.", "1.", "2."], "scores": [0.5, 0.5, 0.9]},
    } | {"weights": pytest.approx([1 / 11, 1 / 11, 9 / 11])}
    assert (choice["event"], choice["kept"]) == ("choice", [1])


def test_finished_particles_are_drawn_again(keyed: Any) -> None:
    """Of two solutions a short one with a high score takes the place of the other."""
    script = {"": [("1", 0.5, "stop"), ("a ", 0.5, "step")], "a ": [("2", 1.0, "stop")]}
    method = ParticleFilter(n=2, temperature=0.05)
    found = search(method, keyed(script), lambda text: 0.9 if text == "1" else 0.5, problems(40))
    assert {tuple(sorted(each.text for each in group)) for group in found} == {("1", "1"), ("a 2", "a 2")}


class Silent:
    """A scorer that has no score for anything."""

    meaning = "correctness"

    def score(self, solutions: Sequence[Solutions]) -> list[list[list[float]]]:
        return [[[math.nan] * len(steps) for steps in each.solutions] for each in solutions]


def test_particles_without_scores_go_on_all_alike_and_are_counted(keyed: Any) -> None:
    costs = Costs()
    value: Any = ScorerValue(Silent(), costs=costs)  # type: ignore[arg-type]
    tools = Tools(keyed(LETTERS), PlainAnswers(), value, costs)  # type: ignore[arg-type]
    ((first, *rest),) = ParticleFilter(n=4, vote="weighted").run(problems(), tools)
    assert first.trace[0]["weights"] == [0.25] * 4
    assert first.finish == "stop"
    assert [each.score for each in (first, *rest)] == [None] * 4
    assert costs[0]["unscored"] == costs[0]["scorer_calls"] >= 8


def test_a_generator_that_never_ends_is_bounded(keyed: Any) -> None:
    generator = keyed(lambda _: [("again ", 1.0, "step")])
    ((first, *_),) = search(ParticleFilter(n=3, max_steps=4), generator, lambda _: 0.5)
    assert sum(calls for calls, _ in generator.calls) >= 4
    assert first.finish == "length"
    assert first.step_ends.tolist() == [6, 12, 18, 24]
    assert [event["event"] for event in first.trace] == ["resample"] * 3 + ["choice"]


def test_a_particle_that_fills_the_context_stays_and_loses_to_whole_ones(keyed: Any) -> None:
    script = {"": [("full", 0.5, "length"), ("a ", 0.5, "step")], "a ": [("2", 1.0, "stop")]}
    found = search(
        ParticleFilter(n=6, temperature=50), keyed(script), lambda t: 0.9 if t == "full" else 0.2, problems(9)
    )
    mixed = [group for group in found if len({each.finish for each in group}) == 2]
    assert mixed
    for group in mixed:
        assert (group[0].text, group[0].finish) == ("a 2", "stop")


def test_what_is_found_for_a_problem_does_not_depend_on_the_others(keyed: Any) -> None:
    def score(text: str) -> float:
        return (len(text) * 37 % 11 + 1) / 13

    some = problems(5)
    together = search(ParticleFilter(n=4), keyed(LETTERS), score, some)
    for problem, group in zip(some, together, strict=True):
        (alone,) = search(ParticleFilter(n=4), keyed(LETTERS), score, [problem])
        assert [(each.text, each.trace) for each in alone] == [(each.text, each.trace) for each in group]
    other = search(ParticleFilter(n=4), keyed(LETTERS), score, [replace(each, seed=1) for each in some])
    assert [group[0].trace for group in other] != [group[0].trace for group in together]
    again = search(ParticleFilter(n=4), keyed(LETTERS), score, some[::-1])[::-1]
    assert [group[0].trace for group in again] == [group[0].trace for group in together]


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"n": 0}, {"max_steps": 0}])
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ParticleFilter(**wrong)
