"""The search against a simulation by hand, its options, its invariants on random trees, and answers from trees."""

from __future__ import annotations

import random
from typing import Any

import pytest

from stepkd.errors import ConfigError, DataError
from stepkd.search.mcts import MCTS, PairTreeConfig, Reference, TreeConfig, tree_search
from stepkd.search.state import Problem, State, Step, Tools
from stepkd.search.tree import Node, SearchTree

HAND = TreeConfig(iterations=1, root_factor=4, actions=2, depth=2, exploration=4.0)


def numbers(tree: SearchTree) -> list[tuple[str, int, float]]:
    """Text, visits and Q of every node but the root."""
    return [(n.step.text, n.visits, n.q) for n in tree.root.subtree() if n is not tree.root]


def test_by_hand(scripted: Any, known_tree: Any, known_values: Any, grader: Any, problem: Problem) -> None:
    """Four walks at the root and one at ``a``, by hand.

    Priors are 0.5 (a, answers) and 0.25 (b). Values: a 0.6, b 0.5; a's answers 0.9 + 1 and 0.4 - 1, b's 0.3 - 1 and
    0.2 - 1. PUCT with c = 4:
    walk 1: a 2.6, b 1.5 -> a; 1 3.3, 2 0.8 -> 1. V(a) = (1.3 - 1.2) / 2, Q(a) = 0.65.
    walk 2: a 0.65 + 2 sqrt2 / 2 = 2.064, b 0.5 + sqrt2 = 1.914 -> a; 1 2.714, 2 1.628 -> 1. Q(a) = 0.6 + 1.4 / 3.
    walk 3: a 1.0667 + 2 sqrt3 / 3 = 2.2214, b 0.5 + sqrt3 = 2.2321 -> b; 2 0.8, 3 0.7 -> 2. Q(b) = 0.5 - 1.25.
    walk 4: a 1.0667 + 4 / 3 = 2.4, b 0.25 -> a; 1 2.455, 2 2.264 -> 1. Q(a) = 0.6 + 2.7 / 4 = 1.275.
    a is chosen; walk 5 starts there with N(a) = 4: 1 1.3 + 4 / 4 = 2.3, 2 -1.2 + 4 = 2.8 -> 2.
    """
    generator = scripted(known_tree)
    (tree,) = tree_search([problem], generator, known_values.values, HAND, Reference(grader))
    expected = [
        *(("a\n", 4, 1.275), ("#### 1", 3, 1.3), ("#### 2", 1, -1.2)),
        *(("b\n", 1, -0.75), ("#### 2", 1, -1.2), ("#### 3", 0, -1.3)),
    ]
    found = numbers(tree)
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    assert [row[2] for row in found] == pytest.approx([row[2] for row in expected])
    assert tree.root.visits == 4
    assert tree.root.v == pytest.approx((3 * 1.275 - 0.75) / 4)
    first, second = tree.decisions
    assert [(o.visits, o.q) for o in first.options] == [(3, pytest.approx(1.275)), (1, -0.75)], "as decided"
    assert [(o.visits, o.q) for o in second.options] == [(3, pytest.approx(1.3)), (1, pytest.approx(-1.2))]
    assert tree.last.state.text == "a\n#### 1"
    assert tree.last.correct is True
    assert tree.solved
    assert generator.calls == [1, 1, 1], "every node is expanded once"


def test_the_better_branch_wins_against_its_first_value(
    scripted: Any, valued: Any, known_tree: Any, grader: Any, problem: Problem
) -> None:
    """``b`` looks and is worse by likelihood, but only it leads to the correct answer."""
    row = dict(problem.row) | {"answer": "3"}
    values = valued(dict.fromkeys(("a\n", *(t + e for t in ("a\n", "b\n") for e in TAILS)), 0.5) | {"b\n": 0})
    settings = TreeConfig(iterations=8, depth=2)
    (tree,) = tree_search([Problem(0, row, (7,))], scripted(known_tree), values.values, settings, Reference(grader))
    assert tree.last.state.text == "b\n#### 3"


TAILS = ("#### 1", "#### 2", "#### 3")


def random_script(seed: int) -> tuple[dict[str, Any], dict[str, float | None]]:
    """A tree of up to four levels with one to three steps at each node, and values."""
    drawn = random.Random(seed)
    script: dict[str, Any] = {}
    values: dict[str, float | None] = {}
    waiting = [("", 0)]
    while waiting:
        text, depth = waiting.pop()
        script[text] = []
        for j in range(drawn.randint(1, 3)):
            over = depth == 3 or drawn.random() < 0.2
            step = f"#### {drawn.randint(0, 3)}{' ' * j}" if over else f"{'abc'[j]}\n"
            script[text].append((step, drawn.uniform(0.05, 0.9), "stop" if over else "step"))
            values[text + step] = None if drawn.random() < 0.1 else drawn.random()
            if not over:
                waiting.append((text + step, depth + 1))
    return script, values


@pytest.mark.parametrize("seed", range(8))
def test_invariants(scripted: Any, valued: Any, seed: int, grader: Any, problem: Problem) -> None:
    script, known_values = random_script(seed)
    values = valued(known_values)
    settings = TreeConfig(iterations=5, actions=3, depth=2, gamma=0.9, damp_after=1)
    (tree,) = tree_search([problem], scripted(script), values.values, settings, Reference(grader))
    decided = {id(decision.node): decision.options for decision in tree.decisions}
    for node in tree.root.subtree():
        if node.terminal:
            assert node.correct is (node.state.text.split()[-1] == "1")
        if node.children:
            # A decided node is left as it was then, while walks from its child go on to count that one's visits.
            seen: Any = decided.get(id(node), node.children)
            weights = [max(1, c.visits) for c in seen]
            mean = sum(w * c.q for w, c in zip(weights, seen, strict=True)) / sum(weights)
            if node.visits:
                assert node.v == pytest.approx(mean)
                if id(node) not in decided:
                    assert node.q == pytest.approx(node.reward + 0.9 * mean)
        if node is not tree.root:
            known = known_values[node.state.text]
            plain = node.value - (0 if node.correct is None else 1 if node.correct else -1)
            assert node.parent is not None
            expected = node.parent.value if known is None else known / max(1, node.parent.depth - 1)
            assert plain == pytest.approx(expected)
    assert tree.root.visits == 20
    for decision in tree.decisions:
        assert max((o.q, o.visits) for o in decision.options) == next(
            (o.q, o.visits) for o in decision.options if o.node is decision.chosen
        )


def same(a: Node, b: Node) -> bool:
    return (a.visits, a.q, a.value, a.correct, a.step) == (b.visits, b.q, b.value, b.correct, b.step) and all(
        same(x, y) for x, y in zip(a.children, b.children, strict=True)
    )


def test_together_or_alone(scripted: Any, known_tree: Any, known_values: Any, grader: Any) -> None:
    """Trees that need different numbers of expansions share their calls and nothing else."""
    problems = [Problem(i, {"id": str(i), "prompt": "?", "answer": str(i + 1)}, (7,)) for i in range(3)]
    generator = scripted(known_tree)
    together = tree_search(problems, generator, known_values.values, HAND, Reference(grader))
    assert generator.calls[:2] == [3, 3]
    for problem, tree in zip(problems, together, strict=True):
        (alone,) = tree_search([problem], scripted(known_tree), known_values.values, HAND, Reference(grader))
        assert same(tree.root, alone.root)
    assert not same(together[0].root, together[1].root)


def test_equal_steps_are_merged(scripted: Any, known_values: Any, grader: Any, problem: Problem) -> None:
    steps = [("a\n", 0.5, "step"), ("a\n", 0.5, "step"), ("b\n", 0.5, "step"), ("a\n", 0.5, "stop")]
    script = {"": steps, "a\n": [("#### 1", 0.5, "stop")], "b\n": [("#### 2", 0.5, "stop")]}
    settings = TreeConfig(iterations=1, actions=4, depth=2)
    (tree,) = tree_search([problem], scripted(script), known_values.values, settings, Reference(grader))
    found = [(n.step.text, n.step.end) for n in tree.root.children]
    assert found == [("a\n", "step"), ("b\n", "step"), ("a\n", "stop")]


def test_a_solution_that_was_cut_off_is_not_correct(scripted: Any, valued: Any, grader: Any, problem: Problem) -> None:
    """Its last number may be the beginning of another one."""
    script = {"": [("so 1", 0.5, "length"), ("so 2", 0.5, "stop")]}
    even = valued({"so 1": 0.5, "so 2": 0.5})
    (tree,) = tree_search([problem], scripted(script), even.values, TreeConfig(iterations=2), Reference(grader))
    assert [(node.correct, node.q) for node in tree.root.children] == [(False, -0.5), (False, -0.5)]
    assert not tree.solved


def test_the_look_ahead_and_the_longest_solution_are_kept(
    scripted: Any, valued: Any, grader: Any, problem: Problem
) -> None:
    script = {"ab\n" * k: [("ab\n", 0.5, "step"), ("#### 1", 0.4, "step")] for k in range(8)}
    script |= {text + "#### 1": [("", 0.5, "stop")] for text in script}
    values = valued({t: 0.1 if "#" in t else 0.9 for t in script})

    class Deepest(scripted):
        def propose(self, states: Any, n: int) -> Any:
            deepest.append(max(len(state.steps) for state in states))
            return super().propose(states, n)

    deepest: list[int] = []
    short = TreeConfig(iterations=2, depth=2, max_steps=2)
    tree_search([problem], Deepest(script), values.values, short, Reference(grader))
    assert max(deepest) == 1
    longer = TreeConfig(iterations=2, depth=1, max_steps=5)
    (tree,) = tree_search([problem], Deepest(script), values.values, longer, Reference(grader))
    assert max(deepest) == 4
    assert len(tree.decisions) == 5
    assert tree.last.correct is None, "unfinished"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"iterations": 0}, "iterations=0"),
        ({"root_factor": 0}, "root_factor=0"),
        ({"actions": 1}, "actions=1: must be at least 2"),
        ({"depth": 9, "max_steps": 8}, "below the look-ahead"),
        ({"gamma": 1.5}, "gamma=1.5"),
        ({"exploration": -1.0}, "exploration=-1.0"),
        ({"outcome": float("nan")}, "outcome=nan"),
        ({"damp_after": -1}, "damp_after=-1"),
    ],
)
def test_bad_settings(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PairTreeConfig(**change)


def test_a_problem_without_answer(scripted: Any, known_tree: Any, known_values: Any, grader: Any) -> None:
    bare = [Problem(0, {"id": "p9", "prompt": "?"}, (1,))]
    with pytest.raises(DataError, match=r"p9.*no answer"):
        tree_search(bare, scripted(known_tree), known_values.values, HAND, Reference(grader))


# --- options of the released code -------------------------------------------------------------------------------------


@pytest.fixture
def long_tree() -> dict[str, Any]:
    """Two steps at the start, then one line after the other; the answer, a line of its own, says which was taken."""
    script: dict[str, Any] = {"": [("a\n", 0.5, "step"), ("b\n", 0.5, "step")]}
    for first, answer in (("a\n", "#### 1"), ("b\n", "#### 2")):
        script[first] = [("c\n", 0.5, "step"), ("d\n", 0.5, "step")]
        for second in ("c\n", "d\n"):
            script[first + second] = [("e\n", 0.5, "step")]
            script[first + second + "e\n"] = [(answer, 0.25, "stop")]
    return script


def test_forced_ends_lead_every_walk_to_an_outcome(scripted: Any, long_tree: Any, grader: Any) -> None:
    """Estimates say nothing: only a walk to the end tells a, to which the first one goes, from b, which is correct."""
    problem = Problem(0, {"id": "p", "prompt": "?", "answer": "2"}, (7,))
    seen: list[State] = []

    def even(states: Any) -> list[float]:
        seen.extend(states)
        return [0.5] * len(states)

    plain = TreeConfig(iterations=4, root_factor=1, depth=1)
    (tree,) = tree_search([problem], scripted(long_tree), even, plain, Reference(grader))
    assert [option.q for option in tree.decisions[0].options] == [0.5, 0.5]
    seen.clear()
    forced = TreeConfig(iterations=4, root_factor=1, depth=1, force_end=True)
    generator = scripted(long_tree)
    (tree,) = tree_search([problem], generator, even, forced, Reference(grader))
    first, second = tree.decisions
    assert [option.q for option in first.options] == [0.5 - 1.0, 0.5 + 1.0]
    assert [node.step.text for node in (first.chosen, second.chosen)] == ["b\n", "c\ne\n#### 2"], "one rest, one action"
    assert (second.chosen.step.token_ids, second.chosen.step.end) == ((2, 2, 6), "stop")
    assert second.chosen.prior == pytest.approx((0.5 * 0.5 * 0.25) ** (3**-1.25))
    assert tree.last.state.steps == ("b\n", "c\n", "e\n", "#### 2"), "the scorer reads its steps"
    assert tree.last.state.text in [state.text for state in seen]
    assert generator.calls == [1], "steps are drawn at the root only"


def test_gold_steps_come_first_where_the_solution_is_followed(
    scripted: Any, valued: Any, known_tree: Any, grader: Any, problem: Problem
) -> None:
    """The reference goes by ``g``, which is no sample, and by ``#### 1``, which is one behind a and none behind g."""
    gold = ["g\n", "#### 1"]
    script = dict(known_tree) | {"g\n": [("#### 2", 0.5, "stop"), ("#### 3", 0.5, "stop")]}
    values = valued({text + step: 0.5 for text in ("", *script) for step in ("a\n", "b\n", "g\n", *TAILS)})
    asked: list[str] = []

    def follow(states: Any) -> list[list[Step]]:
        asked.extend(state.text for state in states)
        told = {"": gold, "g\n": gold[1:], "a\n": gold[1:]}
        return [
            [Step(text, (9,), -1.0, "stop" if "#" in text else "step") for text in told.get(state.text, [])]
            for state in states
        ]

    settings = TreeConfig(iterations=8, root_factor=1, depth=2, exploration=50.0)
    (tree,) = tree_search([problem], scripted(script), values.values, settings, Reference(grader, follow=follow))
    assert [(node.step.text, node.step.sample) for node in tree.root.children] == [("g\n", 2), ("a\n", 0), ("b\n", 1)]
    below = {
        node.step.text: [(child.step.text, child.step.sample) for child in node.children] for node in tree.root.children
    }
    assert below["g\n"] == [("#### 1", 2), ("#### 2", 0), ("#### 3", 1)]
    assert below["a\n"] == [("#### 1", 0), ("#### 2", 1)], "it was drawn: the sample stays where it is"
    assert below["b\n"] == [("#### 2", 0), ("#### 3", 1)]
    assert set(asked) >= {"", "g\n", "a\n", "b\n"}
    # Where the end is forced the whole rest of the reference is one candidate, before the one that is drawn.
    forced = TreeConfig(iterations=8, root_factor=1, depth=1, exploration=50.0, force_end=True)
    (tree,) = tree_search([problem], scripted(script), values.values, forced, Reference(grader, follow=follow))
    first = tree.root.children[0]
    assert [(node.step.text, node.step.sample, node.correct) for node in first.children] == [
        ("#### 1", 2, True),
        ("#### 2", 0, False),
    ]


@pytest.mark.parametrize(("choose", "first"), [("value", "a\n"), ("visits", "b\n")])
def test_decisions_by_value_or_visits(
    scripted: Any, known_tree: Any, known_values: Any, grader: Any, problem: Problem, choose: Any, first: str
) -> None:
    """Without look-ahead Q is 0.6 (a) and 0.5 (b), and all of three walks go to the likelier b: 0.5 + 0.9 sqrt3 / 3."""
    script = dict(known_tree) | {"": [("a\n", 0.01, "step"), ("b\n", 0.9, "step")]}
    settings = TreeConfig(iterations=3, root_factor=1, depth=1, choose=choose)
    (tree,) = tree_search([problem], scripted(script), known_values.values, settings, Reference(grader))
    assert [(option.q, option.visits) for option in tree.decisions[0].options] == [(0.6, 0), (0.5, 3)]
    assert tree.decisions[0].chosen.step.text == first


# --- an answer from a tree --------------------------------------------------------------------------------------------


class LastWordTools(Tools):
    """Votes by the last word."""

    def votes(self, groups: Any) -> Any:
        return [[state.text.split()[-1] for state in group] for group in groups]


def tools(generator: Any, value: Any, grader: Any) -> Tools:
    return LastWordTools(generator, grader, value)


FIELDS = {"iterations": 1, "root_factor": 4, "actions": 2, "depth": 2, "exploration": 4.0}


def test_an_answer_by_hand(scripted: Any, known_tree: Any, known_values: Any, grader: Any) -> None:
    """The tree of test_by_hand without outcomes, for a problem whose answer nobody knows.

    walk 1: a 2.6, b 1.5 -> a; 1 0.3 + 2, 2 -0.2 + 2 -> 1. V(a) = 0.05, Q(a) = 0.65.
    walk 2: a 0.65 + sqrt2, b 0.5 + sqrt2 -> a; 1 0.3 + sqrt2, 2 -0.2 + 2 sqrt2 -> 2. Q(a) = 0.65.
    walk 3: a 0.65 + 2 sqrt3 / 3 = 1.80, b 0.5 + sqrt3 = 2.23 -> b; 2 -0.2 + 2, 3 -0.3 + 2 -> 2. Q(b) = 0.25.
    walk 4: a 0.65 + 4 / 3, b 0.25 + 1 -> a; 1 0.3 + sqrt3, 2 -0.2 + sqrt3 -> 1. Q(a) = 0.6 + (2 * 0.3 - 0.2) / 3.
    walk 5, from a: 1 0.3 + 4 / 3, 2 -0.2 + 4 / 2 -> 2.
    """
    unknown = Problem(0, {"id": "p", "prompt": "?"}, (7,))
    ((answer, *others),) = MCTS(**FIELDS).run([unknown], tools(scripted(known_tree), known_values, grader))  # type: ignore[arg-type]
    assert (answer.text, answer.score, answer.finish) == ("a\n#### 1", 0.9, "stop")
    first, second = answer.trace
    assert first == {
        **{"event": "decide", "step": 0, "steps": ["a\n", "b\n"], "visits": [3, 1], "kept": [0]},
        "scores": [pytest.approx(0.6 + 0.4 / 3), pytest.approx(0.25)],
    }
    assert (second["step"], second["steps"], second["visits"]) == (1, ["#### 1", "#### 2"], [2, 2])
    assert second["scores"] == pytest.approx([0.3, -0.2])
    assert [other.text for other in others] == ["a\n#### 2", "b\n#### 2", "b\n#### 3"]
    assert not any(other.trace for other in others)


@pytest.mark.parametrize(("vote", "text"), [("max", "a\n#### 1"), ("majority", "a\n#### 2"), ("weighted", "b\n#### 2")])
def test_an_answer_by_vote(
    scripted: Any, valued: Any, known_tree: Any, known_values: Any, grader: Any, problem: Problem, vote: Any, text: str
) -> None:
    """Of four ends two say 2: together they weigh 0.4 + 0.5 against 0.8, and by majority the better of them stands."""
    values = dict(known_values.known) | {"a\n#### 1": 0.8, "b\n#### 2": 0.5 if vote == "weighted" else 0.3}
    method = MCTS(vote=vote, **FIELDS)  # type: ignore[arg-type]
    ((answer, *others),) = method.run([problem], tools(scripted(known_tree), valued(values), grader))
    assert answer.text == text
    assert len(others) == 3
    assert answer.trace[-1]["event"] == "choice"
    assert answer.trace[-1]["votes"] == ([None] * 4 if vote == "max" else ["1", "2", "2", "3"])
    assert [len(each) for each in (answer.trace[-1]["scores"], answer.trace[-1]["kept"])] == [4, 1]
    assert method.name == f"mcts@1x2_depth-2_exploration-4.0_{vote}"


@pytest.mark.parametrize("vote", ["path", "max"])
def test_what_has_no_score_ranks_last(
    scripted: Any, valued: Any, known_tree: Any, grader: Any, problem: Problem, vote: Any
) -> None:
    """``a`` is better than ``b``, but its ends have no score; and one of two siblings has none."""
    ends = {"a\n#### 1": None, "a\n#### 2": 0.2, "b\n#### 2": 0.9, "b\n#### 3": None}
    values = valued({"a\n": 0.95, "b\n": 0.9} | (ends if vote == "max" else ends | {"b\n#### 2": 0.1}))
    ((answer, *others),) = MCTS(vote=vote, **FIELDS).run([problem], tools(scripted(known_tree), values, grader))  # type: ignore[arg-type]
    scores = {each.text: each.score for each in (answer, *others)}
    assert scores == {text: values.known[text] for text in scores}, "what the scorer said, or nothing"
    assert (answer.text, answer.score) == (("b\n#### 2", 0.9) if vote == "max" else ("a\n#### 2", 0.2))
    assert len(scores) == 4


@pytest.mark.parametrize(("vote", "text"), [("path", "a\nb\n"), ("max", "a\n2"), ("weighted", "a\n2")])
def test_a_path_without_an_end_has_no_vote_beside_solutions_that_were_cut_off(
    scripted: Any, valued: Any, grader: Any, problem: Problem, vote: Any, text: str
) -> None:
    script = {"": [("1", 0.5, "length"), ("a\n", 0.5, "step")], "a\n": [("2", 0.5, "length"), ("b\n", 0.5, "step")]}
    values = valued({"1": 0.2, "a\n": 0.9, "a\n2": 0.4, "a\nb\n": 0.95})
    method = MCTS(iterations=2, root_factor=1, depth=2, max_steps=2, vote=vote)
    ((answer, *_),) = method.run([problem], tools(scripted(script), values, grader))
    assert (answer.text, answer.finish) == (text, "length")


def test_votes_are_over_scores_and_not_over_estimates_divided_by_depth(
    scripted: Any, valued: Any, grader: Any, problem: Problem
) -> None:
    script = {"": [("#### 1", 0.5, "stop"), ("a\n", 0.5, "step")], "a\n": [("b\n", 0.5, "step")]}
    script |= {"a\nb\n": [("#### 2", 0.5, "stop")]}
    values = valued({"#### 1": 0.5, "a\n": 0.9, "a\nb\n": 0.9, "a\nb\n#### 2": 0.95})
    method = MCTS(iterations=4, root_factor=1, depth=3, damp_after=0, vote="max")
    ((answer, other),) = method.run([problem], tools(scripted(script), values, grader))
    assert (answer.text, answer.score, other.score) == ("a\nb\n#### 2", 0.95, 0.5)


def test_answers_do_not_depend_on_the_other_problems(
    scripted: Any, valued: Any, known_tree: Any, known_values: Any, grader: Any
) -> None:
    problems = [Problem(i, {"id": str(i), "prompt": "?"}, (7,)) for i in range(3)]

    class Differing(valued):
        def values(self, states: Any, reduction: Any = None) -> Any:
            return [abs(self.known[state.text] - 0.4 * state.problem.index) for state in states]

    values, method = Differing(known_values.known), MCTS(**FIELDS)  # type: ignore[arg-type]
    together = method.run(problems, tools(scripted(known_tree), values, grader))
    for problem, expected in zip(problems, together, strict=True):
        (alone,) = method.run([problem], tools(scripted(known_tree), values, grader))
        assert [(each.text, each.trace) for each in alone] == [(each.text, each.trace) for each in expected]
    assert len({found[0].text for found in together}) > 1


def test_a_solution_that_never_ends_is_cut_off(scripted: Any, grader: Any, problem: Problem) -> None:
    script = {"ab\n" * k: [("ab\n", 0.5, "step"), ("ab\n", 0.5, "step")] for k in range(5)}
    method = MCTS(iterations=2, root_factor=1, depth=2, max_steps=4)

    class Lost:
        def values(self, states: Any, reduction: Any = None) -> Any:
            return [None for _ in states]

    ((answer, *others),) = method.run([problem], tools(scripted(script), Lost(), grader))
    assert (answer.text, answer.finish, others) == ("ab\n" * 4, "length", [])
    assert [event["kept"] for event in answer.trace] == [[0]] * 4


@pytest.mark.parametrize("seed", range(20))
def test_a_correct_step_is_kept_where_there_is_one(scripted: Any, valued: Any, grader: Any, seed: int) -> None:
    """With an exact checker as the value: steps behind an incorrect one are incorrect, whatever they say, and a correct
    step that leads to no other is worth as little as an incorrect one by Q."""
    drawn = random.Random(seed)
    script: dict[str, Any] = {}
    waiting = [("", 0)]
    while waiting:
        text, depth = waiting.pop()
        words = [f"{'good' if drawn.random() < 0.4 else 'bad'}{j}" for j in range(3)]
        script[text] = [(f"{word}\n", drawn.uniform(0.05, 0.95), "stop" if depth == 4 else "step") for word in words]
        waiting += [(text + step, depth + 1) for step, _, end in script[text] if end == "step"]
    exact = valued(
        {text + step: float("bad" not in text + step) for text, steps in script.items() for step, *_ in steps}
    )
    problem = Problem(0, {"id": "p", "prompt": "?"}, (7,))
    for settings in ({}, {"force_end": True}, {"gamma": 0.9}):
        method = MCTS(iterations=4, root_factor=2, actions=3, depth=2, **settings)  # type: ignore[arg-type]
        ((answer, *_),) = method.run([problem], tools(scripted(script), exact, grader))
        decided = [event for event in answer.trace if len(event["steps"]) > 1]
        assert len(decided) >= 2
        correct = True
        for event in decided:
            kept = event["steps"][event["kept"][0]]
            if correct and any("bad" not in step for step in event["steps"]):
                assert "bad" not in kept
            correct = correct and "bad" not in kept
