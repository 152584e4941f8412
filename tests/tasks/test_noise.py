"""Slips come at the set rate, systematic ones hang on the operands alone, recovered ones end correct."""

from __future__ import annotations

import math
import re
from collections import defaultdict

import pytest

from stepkd.errors import ConfigError
from stepkd.tasks.base import keyed_rng
from stepkd.tasks.families import get_task
from stepkd.tasks.rows import Noise, demonstration

SPECS = [
    "arithmetic:terms=2-5",
    "modular",
    "addition:digits=1-4",
    "star_graph:arms=3-4,length=2-4,nodes=30",
    "cellular:steps=2-4",
    "independent",
]


@pytest.mark.parametrize("spec", SPECS)
def test_clean_demonstrations_are_all_correct(spec: str) -> None:
    task = get_task(spec)
    for index in range(50):
        problem = task.problem(keyed_rng("clean", index))
        for noise in (None, Noise(0.0)):
            steps, labels = demonstration(task, problem, keyed_rng(index), noise)
            assert steps == task.solution(problem)
            assert labels == [True] * len(steps)


@pytest.mark.parametrize("spec", SPECS)
def test_random_slips_come_at_the_rate_and_all_recovered_ones_end_correct(spec: str) -> None:
    task, noise = get_task(spec), Noise(0.2, recover=1.0)
    lines = slips = 0
    for index in range(400):
        problem = task.problem(keyed_rng("rate", index))
        steps, labels = demonstration(task, problem, keyed_rng("slips", index), noise)
        assert labels == task.check_solution(problem, steps)
        assert labels[-1]
        assert steps[-1] == f"#### {problem.answer}"
        lines += len(steps) - 1
        slips += labels.count(False)  # when each slip is recovered at once, an incorrect line is a slip
    assert abs(slips / lines - 0.2) < 4 * math.sqrt(0.2 * 0.8 / lines)


@pytest.mark.parametrize("spec", SPECS)
def test_propagated_slips_follow_from_the_claims(spec: str) -> None:
    task, noise = get_task(spec), Noise(0.2, recover=0.0)
    lines = slips = incorrect = 0
    for index in range(400):
        problem = task.problem(keyed_rng("rate", index))
        steps, labels = demonstration(task, problem, keyed_rng("slips", index), noise)
        followed = task.check_solution(problem, steps, given="claims")
        lines += len(steps) - 1
        slips += followed.count(False)
        incorrect += labels.count(False)
        assert followed[-1]  # the answer line copies what was claimed
    assert abs(slips / lines - 0.2) < 4 * math.sqrt(0.2 * 0.8 / lines)
    assert incorrect > slips


def test_half_of_the_slips_recover() -> None:
    task, noise = get_task("modular:modulus=97,operators=+-"), Noise(0.1, recover=0.5)
    recovered = carried = 0
    for index in range(1500):
        problem = task.problem(keyed_rng("half", index))
        _, labels = demonstration(task, problem, keyed_rng("slips", index), noise)
        if False in labels[:-1]:
            # Modulo a prime and without products a carried slip stays incorrect unless a second one lands on the truth.
            if labels[labels.index(False) + 1]:
                recovered += 1
            else:
                carried += 1
    share, total = recovered / (recovered + carried), recovered + carried
    # A recovered slip is followed by another slip one time in ten.
    assert abs(share - 0.45) < 4 * math.sqrt(0.25 / total)


def test_incorrect_steps_in_correct_answers_exist_at_the_measured_setting() -> None:
    task, noise = get_task("modular"), Noise(0.15)
    correct = flawed = 0
    for index in range(1000):
        problem = task.problem(keyed_rng("measured", index))
        steps, labels = demonstration(task, problem, keyed_rng("slips", index), noise)
        if steps[-1] == f"#### {problem.answer}":
            correct += 1
            flawed += not all(labels)
    assert 0.6 < correct / 1000 < 0.8
    assert 0.2 < flawed / correct < 0.45


@pytest.mark.parametrize("spec", ["modular:terms=4", "arithmetic:terms=3,maximum=5", "addition:digits=2-3"])
def test_systematic_slips_are_a_function_of_the_operands(spec: str) -> None:
    task, noise = get_task(spec), Noise(0.3, kind="systematic", recover=0.0, seed=5)
    written: dict[str, set[str]] = defaultdict(set)
    for index in range(2000):
        problem = task.problem(keyed_rng("system", index))
        # The generator differs each time: it must not matter.
        steps, _ = demonstration(task, problem, keyed_rng("any", index), noise)
        for step in steps[:-1]:
            operands, result = step.split("=")
            written[operands].add(result)
    assert all(len(results) == 1 for results in written.values())

    def is_incorrect(operands: str, result: str) -> bool:
        value = eval(operands)  # digits and operators of our own lines
        return (value % 10 if task.name == "modular" else value) != int(result)

    mislearnt = sum(is_incorrect(operands, min(results)) for operands, results in written.items())
    assert abs(mislearnt / len(written) - 0.3) < 4 * math.sqrt(0.3 * 0.7 / len(written))


def test_mislearnt_operands_slip_as_often_as_is_set_and_always_to_the_same_result() -> None:
    task = get_task("modular:terms=4-8,operators=+-")
    always, often = (Noise(0.2, kind="systematic", often=share, recover=0.0, seed=5) for share in (1.0, 0.3))
    slips: dict[str, str] = {}
    seen: dict[str, list[str]] = defaultdict(list)
    for index in range(1500):
        problem = task.problem(keyed_rng("often", index))
        for noise in (always, often):
            for step in demonstration(task, problem, keyed_rng("any", index), noise)[0][:-1]:
                operands, result = step.split("=")
                true = eval(operands) % 10 == int(result)  # digits and operators of our own lines
                if noise is always and not true:
                    slips[operands] = result
                elif noise is often:
                    seen[operands].append("" if true else result)
    assert all(set(results) <= {"", slips.get(operands)} for operands, results in seen.items())
    results = [result for operands in slips for result in seen[operands]]
    share = sum(map(bool, results)) / len(results)
    assert abs(share - 0.3) < 4 * math.sqrt(0.3 * 0.7 / len(results))


def test_systematic_slips_of_a_row_are_a_function_of_the_row_before() -> None:
    task, noise = get_task("cellular:width=6,steps=1-4"), Noise(0.4, kind="systematic", recover=0.0)
    follows: dict[str, set[str]] = defaultdict(set)
    for index in range(500):
        problem = task.problem(keyed_rng("system", index))
        steps, _ = demonstration(task, problem, keyed_rng("any", index), noise)
        for before, after in zip([problem.meta["row"] + "\n", *steps], steps[:-1], strict=False):
            follows[before].add(after)
    assert len(follows) > 50
    assert all(len(after) == 1 for after in follows.values())


@pytest.mark.parametrize("spec", ["star_graph:arms=3,length=2,nodes=7", "cellular:width=6,steps=2"])
def test_systematic_slips_of_the_other_tasks(spec: str) -> None:
    task, noise = get_task(spec), Noise(0.3, kind="systematic", recover=1.0, seed=1)
    slipped: dict[str, set[bool]] = defaultdict(set)
    for index in range(400):
        problem = task.problem(keyed_rng("system", index))
        truth = task.solution(problem)
        _, labels = demonstration(task, problem, keyed_rng("any", index), noise)
        for at, label in enumerate(labels[:-1]):
            slipped[task.operands(problem, truth[:at], truth[at])].add(label)
    assert all(len(labels) == 1 for labels in slipped.values())
    share = sum(labels == {False} for labels in slipped.values()) / len(slipped)
    assert abs(share - 0.3) < 4 * math.sqrt(0.3 * 0.7 / len(slipped))


def test_seeds_choose_other_slips() -> None:
    task = get_task("modular")
    problems = [task.problem(keyed_rng("seed", index)) for index in range(50)]
    for kind in ("random", "systematic"):
        one, same, other = (
            [demonstration(task, p, keyed_rng(0), Noise(0.3, kind=kind, seed=seed))[0] for p in problems]  # type: ignore[arg-type]
            for seed in (0, 0, 1)
        )
        assert one == same
        assert one != other


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rate": 1.5}, "noise rate=1.5: must lie in [0, 1]"),
        ({"rate": float("nan")}, "noise rate=nan: must lie in [0, 1]"),
        ({"rate": 0.1, "recover": -1}, "noise recover=-1: must lie in [0, 1]"),
        ({"rate": 0.1, "kind": "sistematic"}, "unknown noise kind 'sistematic': did you mean 'systematic'?"),
        ({"rate": 0.1, "often": 1.1}, "noise often=1.1: must lie in [0, 1]"),
        ({"rate": 0.1, "often": 0.5}, "give the probability of a random slip as rate"),
        ({"rate": 0.1, "seed": -1}, "noise seed=-1: must be 0 or positive"),
    ],
)
def test_bad_noise(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        Noise(**settings)
