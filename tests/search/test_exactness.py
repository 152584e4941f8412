"""What search must do exactly: keep what is correct, sample where nothing is known, stay bounded, take bad scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

from stepkd.grading.pool import Grader, GradingConfig
from stepkd.scorers.rules import Checker
from stepkd.scorers.scorer import Solutions
from stepkd.search.beam import Beam, ParticleFilter
from stepkd.search.best_of_n import BestOfN, Greedy, choice, soft_choice
from stepkd.search.generate import ScorerValue
from stepkd.search.mcts import MCTS
from stepkd.search.phi import PhiDecoding
from stepkd.search.revise import VerifyRevise
from stepkd.search.state import Costs, Found, Problem, Search, State, Step, Tools
from stepkd.tasks.base import is_answer, keyed_fraction
from stepkd.tasks.rows import check_row, make_rows, row_problem


class Keyed:
    """A generator whose steps are keyed by where they are drawn: the base of those below."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def step(self, state: State, sample: int, draw: float) -> Step:
        """The step, by a number in [0, 1)."""
        raise NotImplementedError

    def propose(self, states: Sequence[State], n: int, *, temperature: float | None = None) -> list[list[Step]]:
        self.calls.append(len(states))
        return [
            [self.step(s, j, keyed_fraction("draw", s.problem.index, *s.path, j)) for j in range(n)] for s in states
        ]

    def complete(self, states: Sequence[State], n: int, *, temperature: float | None = None) -> list[list[State]]:
        """Every continuation takes the ``j``-th step first and then always the first one."""
        return [[self._rest(state, j) for j in range(n)] for state in states]

    def _rest(self, state: State, sample: int) -> State:
        while state.end == "step":
            draw = keyed_fraction("draw", state.problem.index, *state.path, sample)
            state, sample = state.then(self.step(state, sample, draw)), 0
        return state

    def provenance(self) -> dict[str, Any]:
        return {}


class World(Keyed):
    """Lines of the tiny world: what follows from the lines before, or with the given chance a slip."""

    def __init__(self, slips: float) -> None:
        super().__init__()
        self.slips = slips

    def step(self, state: State, sample: int, draw: float) -> Step:
        task, problem = row_problem(state.problem.row)
        line = task.next_step(problem, state.steps)
        assert line is not None
        others = task.slips(problem, state.steps, line)
        if others and draw < self.slips:
            line = others[int(draw * 1e6) % len(others)]
        return Step(line, (len(line), sample), -1.0, "stop" if is_answer(line) else "step", sample)


class Coins(Keyed):
    """Letters, and with the given chance an answer."""

    def __init__(self, ends: float) -> None:
        super().__init__()
        self.ends = ends

    def step(self, state: State, sample: int, draw: float) -> Step:
        digit = int(draw * 1e6) % 3
        text = f"#### {digit}" if draw < self.ends else f"{'abc'[digit]}\n"
        return Step(text, (digit, sample), -1.0, "stop" if draw < self.ends else "step", sample)


class Value:
    """A value by a function of the text."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def values(self, states: Sequence[State], reduction: str | None = None) -> list[float | None]:
        return [self.function(state.text) for state in states]

    def provenance(self) -> dict[str, Any]:
        return {}


CONSTANT = Value(lambda text: 0.5)


@pytest.fixture(scope="module")
def grader() -> Grader:
    return Grader(GradingConfig(extractors=("hash",)))


@pytest.fixture(scope="module")
def world() -> list[Problem]:
    """Problems of three to six lines."""
    rows = [row for terms in (3, 5) for row in make_rows(f"modular:terms={terms},modulus=7", 8, seed=terms)]
    return [Problem(index, row, (1,)) for index, row in enumerate(rows)]


def coins(n: int) -> list[Problem]:
    return [Problem(index, {"id": str(index), "prompt": "?"}, (1,)) for index in range(n)]


BEAMS = [
    Beam(n=3, width=3),
    Beam(n=4, width=2),
    Beam(n=6, width=1),
    Beam(n=6, width=3, diverse=True),
    Beam(n=4, width=1, diverse=True),
]


def prunes(found: Found) -> dict[int, list[Any]]:
    """Events of each tree."""
    trees: dict[int, list[Any]] = {}
    for event in found.trace:
        if event["event"] == "prune":
            trees.setdefault(event.get("tree", 0), []).append(event)
    return trees


@pytest.mark.parametrize("search", BEAMS, ids=lambda search: search.name)
def test_with_the_exact_checker_a_correct_step_is_kept_whenever_there_is_one(
    search: Beam, world: list[Problem], grader: Grader
) -> None:
    costs = Costs()
    found = search.run(world, Tools(World(0.7), grader, ScorerValue(Checker(), costs=costs), costs))
    solved = []
    for problem, (answer, *others) in zip(world, found, strict=True):
        trees = prunes(answer)
        for event in (event for events in trees.values() for event in events):
            assert [event["scores"][i] for i in event["kept"]] == sorted(event["scores"])[::-1][: len(event["kept"])]
        able = any(all(1.0 in event["scores"] for event in events) for events in trees.values())
        assert all(check_row(problem.row, answer.text.splitlines())) is able
        assert any(all(check_row(problem.row, each.text.splitlines())) for each in [answer, *others]) is able
        solved.append(able)
    assert 0 < sum(solved) < len(solved), "some problems were there to be lost"
    assert all(costs[p.index]["scorer_calls"] and not costs[p.index]["unscored"] for p in world)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_with_the_exact_checker_a_particle_that_is_correct_crowds_out_the_others(
    temperature: float, world: list[Problem], grader: Grader
) -> None:
    tools = Tools(World(0.6), grader, ScorerValue(Checker()))
    solved = []
    for problem, (answer, *_) in zip(
        world, ParticleFilter(n=4, temperature=temperature).run(world, tools), strict=True
    ):
        events = [event for event in answer.trace if event["event"] == "resample"]
        assert all({e["scores"][i] for i in e["kept"]} == {max(e["scores"])} for e in events)
        able = all(1.0 in event["scores"] for event in [*events, answer.trace[-1]])
        assert all(check_row(problem.row, answer.text.splitlines())) is able
        solved.append(able)
    assert 0 < sum(solved) < len(solved)


@pytest.mark.parametrize("actions", [2, 3])
def test_with_the_exact_checker_tree_search_decides_for_a_correct_step(
    actions: int, world: list[Problem], grader: Grader
) -> None:
    search = MCTS(iterations=4, root_factor=1, actions=actions, depth=2)
    lost = kept = 0
    for problem, (answer, *_) in zip(
        world, search.run(world, Tools(World(0.6), grader, ScorerValue(Checker()))), strict=True
    ):
        before: list[str] = []
        for event in answer.trace:
            good = [all(check_row(problem.row, [*before, step])) for step in event["steps"]]
            (taken,) = event["kept"]
            assert good[taken] is any(good)
            before.append(event["steps"][taken])
            lost, kept = lost + (not any(good)), kept + (any(good) and not all(good))
        assert answer.text == "".join(before)
    assert lost
    assert kept


@pytest.mark.parametrize("vote", ["max", "weighted"])
def test_with_the_exact_checker_best_of_n_finds_a_correct_sample(
    vote: Any, world: list[Problem], grader: Grader
) -> None:
    generator = World(0.4)
    found = BestOfN(n=4, vote=vote).run(world, Tools(generator, grader, ScorerValue(Checker())))
    samples = generator.complete([State(problem) for problem in world], 4)
    able = [any(all(check_row(p.row, s.steps)) for s in own) for p, own in zip(world, samples, strict=True)]
    assert [all(check_row(p.row, f[0].text.splitlines())) for p, f in zip(world, found, strict=True)] == able
    assert 0 < sum(able) < len(able)


@pytest.mark.parametrize("search", [Beam(n=n, width=w, vote="max") for n, w in ((1, 1), (3, 3), (6, 2), (4, 1))])
def test_with_a_constant_scorer_beam_is_sampling(search: Beam, grader: Grader) -> None:
    """The answer is the sample that was drawn first at every step, whether or not others have ended before it."""
    generator = Coins(0.3)
    found = search.run(coins(40), Tools(generator, grader, CONSTANT))
    samples = generator.complete([State(problem) for problem in coins(40)], 1)
    assert [(f[0].text, f[0].token_ids.tolist()) for f in found] == [(s.text, [*s.token_ids]) for (s,) in samples]
    assert len({len(s.steps) for (s,) in samples}) > 4


def test_with_a_constant_scorer_dvts_is_self_consistency(grader: Grader) -> None:
    """Every tree is a sample, and the vote is over them."""
    generator = Coins(0.3)
    for vote in ("majority", "weighted"):
        found = Beam(n=15, width=3, diverse=True, vote=vote).run(coins(20), Tools(generator, grader, CONSTANT))
        drawn = generator.complete([State(problem) for problem in coins(20)], 15)
        for own, samples in zip(found, drawn, strict=True):
            trees = samples[::3]
            assert sorted(each.text for each in own) == sorted(state.text for state in trees)
            (keys,) = Tools(generator, grader).votes([trees])
            assert own[0].text == trees[choice([0.5] * 5, keys, "majority")].text


@pytest.mark.parametrize("vote", ["max", "majority", "weighted", "soft"])
def test_best_of_one_is_the_first_sample(vote: Any, grader: Grader) -> None:
    """Of a pool that it shares with others, or of its own; each method pays for what it takes."""
    tools = Tools(Coins(0.3), grader, Value(lambda text: len(text) % 7 / 7))
    more = BestOfN(n=5, vote=vote).run(coins(9), tools)
    pool = {index: [state.text for state in states] for index, states in tools.pool.items()}
    tools.costs.clear()
    shared = BestOfN(n=1, vote=vote).run(coins(9), tools)
    alone = BestOfN(n=1, vote=vote).run(coins(9), Tools(Coins(0.3), grader, tools.value))
    assert [[f.text for f in own] for own in shared] == [[f.text for f in own] for own in alone]
    assert [[f.text for f in own] for own in shared] == [[texts[0]] for texts in pool.values()]
    assert [tools.costs.generated(i) for i in range(9)] == [len(own[0].token_ids) for own in shared]
    assert all(sorted(f.text for f in own) == sorted(pool[i]) for i, own in enumerate(more))


def test_one_who_never_ends_a_solution_is_stopped(grader: Grader) -> None:
    generator = Coins(0.0)
    for search in (Beam(n=4, width=2, max_steps=5), Beam(n=4, width=2, max_steps=5, diverse=True)):
        generator.calls.clear()
        for own in search.run(coins(3), Tools(generator, grader, CONSTANT)):
            assert [(each.finish, len(each.step_ends)) for each in own] == [("length", 5)] * 2
        assert len(generator.calls) == 5


class Sick:
    """Scores of steps that are not numbers where a step has the letter."""

    meaning = "correctness"

    def __init__(self, letters: str) -> None:
        self.letters = letters

    def score(self, problems: Sequence[Solutions]) -> list[list[list[float]]]:
        return [
            [[math.nan if set(step) & set(self.letters) else 0.5 for step in steps] for steps in each.solutions]
            for each in problems
        ]

    def provenance(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize("search", [*BEAMS, BestOfN(n=4, vote="max"), BestOfN(n=4), BestOfN(n=4, vote="soft")])
def test_scores_that_are_not_numbers_rank_last_and_are_counted(search: Search, grader: Grader) -> None:
    costs = Costs()
    tools = Tools(Coins(0.3), grader, ScorerValue(Sick("b"), costs=costs), costs)
    for own in search.run(coins(30), tools):
        assert own[0].score is not None or all(each.score is None for each in own)
        for event in own[0].trace:
            kept = [event["scores"][i] is None for i in event["kept"]]
            missing = [score is None for score in event["scores"]]
            if event["event"] == "prune":
                assert sum(kept) == max(0, len(kept) - missing.count(False))
            elif event["vote"] in ("max", "soft"):
                assert kept == [all(missing)]
    assert sum(costs[i]["unscored"] for i in range(30)) > 10
    nothing = search.run(coins(5), Tools(Coins(0.3), grader, ScorerValue(Sick("abc#"))))
    assert [own[0].score for own in nothing] == [None] * 5
    assert all(own[0].text for own in nothing), "an answer all the same"


OTHERS = [
    ParticleFilter(n=3),
    MCTS(iterations=4, root_factor=1, actions=2, depth=2),
    MCTS(iterations=4, root_factor=1, actions=2, depth=2, vote="weighted", force_end=True),
    PhiDecoding(beams=2, rollouts=2),
    PhiDecoding(beams=2, rollouts=2, variant="code"),
    VerifyRevise(),
    VerifyRevise(draft="sampled"),
]


@pytest.mark.parametrize("search", OTHERS, ids=lambda search: search.name)
def test_every_method_answers_where_the_scorer_says_little_or_nothing(search: Search, grader: Grader) -> None:
    for letters in ("b", "abc#"):
        costs = Costs()
        found = search.run(coins(12), Tools(Coins(0.3), grader, ScorerValue(Sick(letters), costs=costs), costs))
        assert all(own[0].text for own in found)
        if search.needs_scorer:
            assert sum(costs[i]["unscored"] for i in range(12)) > 0
            assert letters == "b" or all(own[0].score is None for own in found) or isinstance(search, MCTS)


class Silent(Keyed):
    """Ends every solution without a word."""

    def step(self, state: State, sample: int, draw: float) -> Step:
        return Step("", (9,), -1.0, "stop", sample)


@pytest.mark.parametrize("search", [*BEAMS, *OTHERS, BestOfN(n=3), Greedy()])
def test_solutions_without_words_are_solutions(search: Search, grader: Grader) -> None:
    """Nothing can judge them, and nothing is left of a beam that has only such; no problems are no error either."""
    costs = Costs()
    tools = Tools(Silent(), grader, ScorerValue(Sick(""), costs=costs), costs)
    for own in search.run(coins(2), tools):
        assert {(each.text, each.finish) for each in own} == {("", "stop")}
    assert not any(costs[i]["scorer_calls"] for i in range(2))
    assert search.run([], tools) == []


def test_votes_without_scores_answers_or_a_majority() -> None:
    for nothing in ([None] * 4, [0.0] * 4, [None, 0.0, 0.0, None]):
        assert choice(nothing, ["a", "b", "b", "a"], "weighted") == 0, "no answer has any weight: the first one"
    assert choice([None, 0.2, 0.1], ["a", "b", "b"], "weighted") == 1
    for vote in ("majority", "weighted"):
        assert choice([0.1, None, 0.3], [None, None, None], vote) == 2, "no answer: the best score"
        assert choice([None, None], [None, None], vote) == 0
        assert choice([0.9, 0.1, 0.1], [None, "b", "c"], vote) == 1, "no answer wins nothing"
    assert choice([0.1, 0.2, 0.9, 0.3], ["a", "b", "a", "b"], "majority") == 2, "a tie: the first answer's best"
    assert choice([0.3, 0.1, 0.2], ["a", "b", "b"], "weighted") == 0, "0.1 + 0.2 is 0.3 up to rounding: a tie"
    assert choice([0.5, 0.5], ["a", "b"], "max") == 0
    assert {soft_choice([None, 0.0, None], 1.0, 0, i) for i in range(9)} == {1}
    assert {soft_choice([None, None, None], 1.0, 0, i) for i in range(30)} == {0, 1, 2}
