"""The first error by binary search and by early stopping: labelling every prefix, the exact checker, and noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from continuations import SPEC, Scripted, lively_policy, solution, some_solutions
from hypothesis import given, settings
from hypothesis import strategies as st

from stepkd.errors import ConfigError
from stepkd.grading.pool import Grader, GradingConfig
from stepkd.labels.labellers import Solution, StepLabels, TaskChecker
from stepkd.labels.monte_carlo import MonteCarlo, MonteCarloLabeller, Order, bracket, next_steps
from stepkd.labels.settings import LabelConfig
from stepkd.models.policy import Policy
from stepkd.sampling.engine import SamplingConfig
from stepkd.sampling.transformers_engine import TransformersEngine
from stepkd.steps.labels import first_incorrect
from stepkd.tasks.rows import Noise, check_row, make_rows


@pytest.fixture(scope="module")
def grader() -> Grader:
    return Grader(GradingConfig(extractors=("hash", "last_number"), workers=1))


def search(values: Sequence[float], order: Order, *, known: int) -> tuple[int, list[int]]:
    """The first error, and the steps asked about; ``known`` of the last values are known before."""
    found: list[float | None] = [*[None] * (len(values) - known), *values[len(values) - known :]]
    asked = []
    while steps := next_steps(found, order):
        asked += steps
        for step in steps:
            assert found[step] is None, "nothing is drawn twice"
            found[step] = values[step]
    low, high = bracket(found, order)
    assert high == low + 1
    return high, asked


@settings(max_examples=80, deadline=None)
@given(values=st.lists(st.sampled_from([0.25, 1.0]), min_size=1, max_size=20), data=st.data())
def test_every_order_finds_the_same_first_error_where_values_are_monotone(
    values: list[float], data: st.DataObject
) -> None:
    first, known = data.draw(st.integers(0, len(values))), data.draw(st.integers(0, 1))
    values[first:] = [0.0] * (len(values) - first)
    left = len(values) - known
    found = {order: search(values, order, known=known) for order in ("all", "forward", "binary")}
    assert {error for error, _ in found.values()} == {first}
    assert found["all"][1] == list(range(left))
    assert found["forward"][1] == list(range(min(first + 1, left)))
    ends_well = known and first == len(values)
    assert len(found["binary"][1]) <= (0 if ends_well else math.ceil(math.log2(left + 1)))


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.sampled_from([0.0, 0.5]), min_size=1, max_size=20))
def test_where_values_are_not_monotone_binary_search_finds_a_step_that_fails_behind_one_that_succeeds(
    values: list[float],
) -> None:
    every = [*map(bool, values), False].index(False)
    assert search(values, "forward", known=0)[0] == search(values, "all", known=0)[0] == every
    first, asked = search(values, "binary", known=0)
    assert first >= every
    assert first == len(values) or values[first] == 0
    assert first == 0 or (values[first - 1] and first - 1 in asked)


def noisy_solutions(task: str) -> list[Solution]:
    """Solutions whose answer is correct just where all their steps are: a slip is carried on to the end."""
    found = []
    for index, row in enumerate(make_rows(task, 12, seed=2, noise=Noise(0.12, recover=0.0))):
        if row["outcome"] is all(row["step_labels"]):
            steps = [*row["steps"][:-1], row["steps"][-1] + "<eos>"]
            given = {"prompt": row["prompt"], "row": row, "correct": row["outcome"]}
            made = solution(steps, row["answer"], index=index, **given)
            found.append(replace(made, steps=tuple(row["steps"])))
    assert sum(not each.correct for each in found) >= 4
    assert any(each.correct for each in found)
    return found


class Checked(Scripted):
    """Continues a prefix to the answer, in one of its continuations, just where the exact checker faults no step."""

    def __init__(self, solutions: Sequence[Solution]) -> None:
        super().__init__(self.answer)
        self.rounds: list[list[int]] = []
        self.rows = {}
        for each in solutions:
            for i in range(len(each.steps)):
                begun = each.steps[: i + 1]
                self.rows[each.row["prompt"] + "".join(begun)] = (each.row["answer"], check_row(each.row, begun))

    def answer(self, prefix: str, j: int) -> str:
        answer, correct = self.rows[prefix]
        return f"#### {answer if all(correct) and j == 1 else 'x'}"

    def continue_branches(self, branches: Sequence[Any], spec: SamplingConfig, **given: Any) -> Any:
        self.rounds.append([branch.index for branch in branches])
        return super().continue_branches(branches, spec, **given)


@pytest.mark.parametrize("task", ["modular:terms=12,modulus=10", "arithmetic:terms=9", "addition:digits=9"])
def test_with_the_exact_checkers_values_binary_search_gives_the_true_labels(
    policy: Policy, grader: Grader, task: str
) -> None:
    solutions = noisy_solutions(task)
    truth = TaskChecker().label(solutions)
    found: dict[str, list[StepLabels]] = {}
    rounds = {}
    for order in ("all", "forward", "binary"):
        engine = Checked(solutions)
        labeller = MonteCarloLabeller(
            engine,
            policy,
            grader,
            SamplingConfig(n=2),
            reduce="first_error",
            order=order,  # type: ignore[arg-type]
        )
        found[order], rounds[order] = labeller.label(solutions), engine.rounds
    for each, true, every, *others in zip(solutions, truth, *found.values(), strict=True):
        assert first_incorrect(every.labels) == first_incorrect(true.labels)
        assert all(other.labels == every.labels for other in others)
        asked = np.count_nonzero(others[1].facts["trials"])
        assert asked <= (0 if each.correct else math.ceil(math.log2(len(each.steps))))
    longest = max(len(each.steps) for each in solutions)
    assert len(rounds["all"]) == 1
    assert len(rounds["binary"]) <= math.ceil(math.log2(longest)), "all solutions go in lockstep"
    assert rounds["binary"][0] == [each.index for each in solutions if not each.correct]
    assert all(set(later) <= set(before) for before, later in pairwise(rounds["binary"]))
    costs = [sum(sum(each.facts["trials"]) for each in found[order]) for order in ("binary", "forward", "all")]
    assert costs == sorted(costs)
    assert costs[0] < 0.45 * costs[2]


def test_a_prefix_gets_the_same_continuations_in_every_order(grader: Grader) -> None:
    lively = lively_policy()

    def labels(order: Order) -> list[StepLabels]:
        engine = TransformersEngine(lively)
        return MonteCarloLabeller(engine, lively, grader, SPEC, reduce="first_error", order=order).label(
            some_solutions()
        )

    every, forward, binary = labels("all"), labels("forward"), labels("binary")
    passed_over = 0
    for a, f, b in zip(every, forward, binary, strict=True):
        assert f.labels == a.labels
        for other in (f, b):
            assert a.values is not None
            assert other.values is not None
            assert len(other.labels) == len(a.labels)
            for i, value in enumerate(other.values):
                passed_over += value is None
                assert value in (None, a.values[i])
                if other.facts["trials"][i]:
                    assert other.facts["successes"][i] == a.facts["successes"][i]
            assert other.facts["generated_tokens"] <= a.facts["generated_tokens"]
    assert passed_over >= 3


@pytest.mark.parametrize("order", ["all", "binary"])
def test_solutions_of_a_problem_share_what_they_begin_with(grader: Grader, order: Order) -> None:
    """A shared prefix is drawn once, whoever asks first; what a solution is told does not depend on it."""
    texts = [["1+1=2\n", "2+2=4\n", "4+3=7\n", "#### 7<eos>"], ["1+1=2\n", "2+2=4\n", "4+1=5\n", "#### 5<eos>"]]
    solutions = [solution(steps, "3", index=i) for i, steps in enumerate([*texts, texts[1]])]
    solutions.append(solution(texts[0], "3", index=7, prompt="other\n"))
    lively = lively_policy()
    labeller = MonteCarloLabeller(
        TransformersEngine(lively), lively, grader, SPEC, reduce="first_error", order=order, share=True
    )
    together, alone = labeller.label(solutions), [labeller.label([each])[0] for each in solutions]
    for each, own in zip(together, alone, strict=True):
        assert (each.labels, each.values) == (own.labels, own.values)
        assert each.facts["trials"] == own.facts["trials"]
        assert own.facts["reused"] == 0
    asked = {
        (str(s.row["prompt"]), s.steps[: i + 1])
        for s, each in zip(solutions, alone, strict=True)
        for i, n in enumerate(each.facts["trials"])
        if n
    }
    drawn = [sum(each.facts["trials"]) - each.facts["reused"] for each in together]
    assert sum(drawn) == SPEC.n * len(asked) < sum(sum(each.facts["trials"]) for each in alone)
    assert drawn[2] == together[2].facts["generated_tokens"] == 0, "the same solution again is free"
    assert together[3].facts["reused"] == 0, "of another problem"
    assert labeller.provenance()["share"] is True


def test_continuations_are_shared_only_where_the_answer_is_the_same_and_noise_only_where_the_prefix_is(
    policy: Policy, grader: Grader
) -> None:
    """All continuations say 3: wrong for a row with the same prompt and answer 4. Prefixes of one length differ in
    their keys."""
    indices: dict[int, str] = {}

    class Asked(Scripted):
        def continue_branches(self, branches: Sequence[Any], spec: SamplingConfig, **given: Any) -> Any:
            for branch in branches:
                (cut,) = branch.cuts
                indices.setdefault(branch.index, str(branch.token_ids[:cut]))
                assert indices[branch.index] == str(branch.token_ids[:cut])
            return super().continue_branches(branches, spec, **given)

    engine = Asked(lambda prefix, j: "#### 3")
    labeller = MonteCarloLabeller(engine, policy, grader, SamplingConfig(n=2), share=True)
    steps = (["1+1=2\n", "2+1=3\n"], ["1+1=4\n", "4+1=5\n"])
    found = labeller.label([solution(own, answer, finish="length") for answer in "34" for own in steps])
    assert [each.values for each in found] == [(1.0, 1.0)] * 2 + [(0.0, 0.0)] * 2
    assert len(indices) == 4, "four prefixes, two of one length each"


def test_what_is_known_at_the_end_costs_nothing(policy: Policy, grader: Grader) -> None:
    """A correct answer settles a binary search, an incorrect one is a prefix that fails; a cut-off end is open."""
    each = solution(["a\n", "b\n", "c\n", "#### 3<eos>"], "3", correct=True)

    def labelled(given: Solution) -> tuple[StepLabels, list[str]]:
        engine = Scripted(lambda prefix, j: "#### 3" if "b" not in prefix else "#### 4")
        spec = SamplingConfig(n=2)
        labeller = MonteCarloLabeller(engine, policy, grader, spec, reduce="first_error", order="binary")
        return labeller.label([given])[0], engine.prefixes

    labels, asked = labelled(each)
    assert (labels.labels, labels.values, asked) == ((True,) * 4, (None, None, None, 1.0), [])
    labels, asked = labelled(replace(each, correct=False))
    assert labels.labels == (True, False, None, None)
    assert labels.values == (1.0, 0.0, None, 0.0)
    assert asked == ["Q\na\nb\n", "Q\na\n"]
    assert labels.facts["trials"] == [2, 2, 0, 0]
    cut_off = solution(["a\n", "b\n", "c\n", "#### "], "3", finish="length", correct=None)
    assert labelled(cut_off)[1][0] == "Q\na\nb\n"


def noisy_search(samples: int, recovered: float) -> dict[str, float]:
    """Binary search under noise, over 300 solutions of 8 to 16 steps with an incorrect answer.

    A prefix without an error succeeds with a chance that grows from 0.4 to 0.95 along the solution, one with an error
    with chance ``recovered``.
    """
    draws = np.random.default_rng(0)
    counts: dict[str, float] = dict.fromkeys(("same", "binary_true", "every_true", "binary", "forward", "every"), 0)
    for _ in range(300):
        steps = int(draws.integers(8, 17))
        error = int(draws.integers(0, steps - 1))
        chances = np.where(np.arange(steps) < error, np.linspace(0.4, 0.95, steps), recovered)
        values = [*(draws.binomial(samples, chances[:-1]) / samples), 0.0]
        (binary, asked), (every, stopped) = search(values, "binary", known=1), search(values, "forward", known=1)
        found = (binary == every, binary == error, every == error, len(asked), len(stopped), steps - 1)
        counts = {name: count + value for (name, count), value in zip(counts.items(), found, strict=True)}
    shares = [counts[name] / 300 for name in ("same", "binary_true", "every_true")]
    return dict(
        zip(counts, [*shares, *(counts[name] / counts["every"] for name in ("binary", "forward"))], strict=False)
    )


def test_noise_moves_the_first_error_of_a_binary_search_less_than_that_of_labelling_every_prefix() -> None:
    """Every prefix before the error is a chance to fail by noise; the search gives but few of them that chance."""
    found = [noisy_search(samples, 0.0) for samples in (1, 2, 4, 8)]
    assert [round(each["same"], 2) for each in found] == [0.49, 0.54, 0.81, 0.97]
    assert [round(each["binary_true"], 2) for each in found] == [0.51, 0.74, 0.93, 0.99]
    assert [round(each["every_true"], 2) for each in found] == [0.16, 0.35, 0.75, 0.96]
    assert all(0.3 < each["binary"] < 0.33 for each in found), "of the continuations of labelling every prefix"
    assert found[3]["forward"] > 0.5
    # Where one prefix in twenty recovers, values are not monotone: the two part, and the search is the one misled.
    misled = noisy_search(8, 0.05)
    assert [round(misled[name], 2) for name in ("same", "binary_true", "every_true")] == [0.76, 0.54, 0.71]


def test_orders_that_stop_early_want_labels_up_to_the_first_error() -> None:
    with pytest.raises(
        ConfigError, match=r"order=binary looks for the first error.*reduce=any.*set reduce to first_error"
    ):
        MonteCarlo(order="binary")
    with pytest.raises(ConfigError, match="unknown order"):
        MonteCarlo(order="backward", reduce="first_error")  # type: ignore[arg-type]
    assert MonteCarlo(order="forward", reduce="first_error").order == "forward"


@pytest.mark.slow
def test_a_job_counts_what_its_order_costs(
    spec: LabelConfig, run: Callable[..., dict[str, Any]], tmp_path: Any
) -> None:
    assert isinstance(spec.labeller, MonteCarlo)
    found = {}
    for order in ("all", "binary"):
        labeller = replace(spec.labeller, reduce="first_error", order=order)
        found[order] = run(replace(spec, labeller=labeller, out=str(tmp_path / order)))["labelling"]
    for name in ("continuations", "generated_tokens"):
        assert found["binary"][name] < found["all"][name], name
    assert run(replace(spec, labeller=TaskChecker(), out=str(tmp_path / "true")))["labelling"] == {
        "generated_tokens": 0
    }
