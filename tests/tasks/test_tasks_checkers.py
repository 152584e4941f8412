"""Every checker against a solver written here from the prompt alone, and against hostile text."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import re
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepkd.errors import ConfigError
from stepkd.tasks.base import Given, Task, TaskProblem, keyed_rng
from stepkd.tasks.families import TASKS, get_task

SPECS = [
    "arithmetic:terms=2-5,maximum=20",
    "modular",
    "modular:terms=3-6,modulus=7,operators=+*",
    "addition:digits=1-4",
    "star_graph:arms=2-4,length=2-4,nodes=30",
    "cellular:rule=30,width=9,steps=1-4",
    "independent:terms=2-5,modulus=7",
]


def solve_chain(prompt: str) -> list[str]:
    chain, _, modulus = prompt.rstrip("=\n").partition("%")
    numbers = re.findall(r"[0-9]+", chain)
    operators = re.findall(r"[-+*]", chain)
    steps, value = [], int(numbers[0])
    for op, number in zip(operators, numbers[1:], strict=True):
        result = eval(f"({value}){op}{number}")  # digits and one operator, matched above
        result = result % int(modulus) if modulus else result
        steps.append(f"{value}{op}{number}={result}\n")
        value = result
    return [*steps, f"#### {value}"]


def solve_addition(prompt: str) -> list[str]:
    left, right = (int(number) for number in prompt.rstrip("=\n").split("+"))
    steps, place = [], 1
    while place <= max(left, right, 1):
        carry = (left % place + right % place) // place
        a, b = left // place % 10, right // place % 10
        steps.append(f"{a}+{b}+{carry}={a + b + carry}\n")
        place *= 10
    return [*steps, f"#### {left + right}"]


def solve_star(prompt: str) -> list[str]:
    edges, question = prompt.rstrip("=\n").split(":")
    parent = {end: start for start, end in (edge.split(">") for edge in edges.split(","))}
    start, node = question.split(">")
    path = []
    while node != start:  # back from the goal: every node but the centre has one parent
        path.insert(0, node)
        node = parent[node]
    return [f"{node}\n" for node in path] + [f"#### {path[0]}"]


def solve_cellular(prompt: str) -> list[str]:
    rule, rest = prompt.rstrip("=\n").split(":")
    row, count = rest.split("*")
    table = dict(zip(["111", "110", "101", "100", "011", "010", "001", "000"], f"{int(rule):08b}", strict=True))
    steps = []
    for _ in range(int(count)):
        ring = row[-1] + row + row[0]
        row = "".join(table[ring[i : i + 3]] for i in range(len(row)))
        steps.append(row + "\n")
    return [*steps, f"#### {row}"]


def solve_independent(prompt: str) -> list[str]:
    expressions, _, modulus = prompt.rstrip("=\n").partition("%")
    lines = {}
    for number, text in enumerate(expressions.split(",")):
        lines[number] = (text, eval(text) % int(modulus))  # digits and one operator
    steps = [f"{text}={result}\n" for text, result in lines.values()]
    return [*steps, f"#### {sum(result for _, result in lines.values()) % int(modulus)}"]


SOLVERS: dict[str, Callable[[str], list[str]]] = {
    "arithmetic": solve_chain,
    "modular": solve_chain,
    "addition": solve_addition,
    "star_graph": solve_star,
    "cellular": solve_cellular,
    "independent": solve_independent,
}


def draw(spec: str, index: int) -> tuple[Task, TaskProblem]:
    task = get_task(spec)
    return task, task.problem(keyed_rng("test", index))


def check_step(task: Task, problem: TaskProblem, before: list[str], step: str, given: Given = "truth") -> bool:
    return task.check_solution(problem, [*before, step], given=given)[-1]


def incorrect_line(task: Task, problem: TaskProblem, before: list[str], step: str) -> str:
    truth = task.solution(problem)
    return next(line for line in task.slips(problem, before, step) if line != truth[len(before)])


@pytest.mark.parametrize("spec", SPECS)
def test_solution_equals_an_independent_solver(spec: str) -> None:
    for index in range(200):
        task, problem = draw(spec, index)
        steps = task.solution(problem)
        assert steps == SOLVERS[task.name](problem.prompt)
        assert steps[-1] == f"#### {problem.answer}"
        assert all(step.endswith("\n") and step.count("\n") == 1 for step in steps[:-1])
        assert problem.prompt.endswith("=\n")
        assert problem.prompt.count("\n") == 1
        assert json.loads(json.dumps(problem.meta)) == problem.meta


@pytest.mark.parametrize("spec", SPECS)
def test_clean_steps_are_correct_under_both_meanings(spec: str) -> None:
    for index in range(50):
        task, problem = draw(spec, index)
        steps = task.solution(problem)
        assert all(task.check_solution(problem, steps))
        assert all(task.check_solution(problem, steps, given="claims"))
        assert task.check_solution(problem, [step.rstrip() + " \n\n " for step in steps]) == [True] * len(steps)


@pytest.mark.parametrize("spec", SPECS)
def test_every_other_line_of_the_same_form_is_incorrect(spec: str) -> None:
    for index in range(30):
        task, problem = draw(spec, index)
        steps = task.solution(problem)
        for at, step in enumerate(steps):
            incorrect = task.slips(problem, steps[:at], step)
            assert (len(incorrect) > 0) == (at < len(steps) - 1)
            assert len(set(incorrect)) == len(incorrect)
            for line in [*incorrect, " " + step, step.replace("\n", "") + "\r", step.replace("\n", "") + "0", "", "\n"]:
                assert not check_step(task, problem, steps[:at], line)
                assert not check_step(task, problem, steps[:at], line, given="claims")
        assert not check_step(task, problem, steps, steps[-1])
        assert not check_step(task, problem, steps, steps[-1], given="claims")


@pytest.mark.parametrize("spec", SPECS[:-1])  # of independent lines none carries on a slip, see below
def test_truth_and_claims_differ_after_a_slip(spec: str) -> None:
    carried_incorrect = 0
    for index in range(30):
        task, problem = draw(spec, index)
        truth = task.solution(problem)
        steps = [incorrect_line(task, problem, [], truth[0])]
        carried = task.next_step(problem, steps)
        assert carried is not None
        assert check_step(task, problem, steps, carried, given="claims")
        # A silent recovery is correct by the truth, whatever stands before it.
        assert check_step(task, problem, steps, truth[1])
        # After some slips the truth and the claims go on alike: the carry was correct, or a factor is 0.
        if carried != truth[1]:
            carried_incorrect += 1
            assert not check_step(task, problem, steps, carried)
            assert not check_step(task, problem, steps, truth[1], given="claims")
    assert carried_incorrect >= 8


def test_steps_by_hand() -> None:
    task = get_task("modular:terms=4,modulus=10")
    problem = TaskProblem("3+4*2-5%10=\n", "9", {"numbers": [3, 4, 2, 5], "operators": "+*-"})
    assert task.solution(problem) == ["3+4=7\n", "7*2=4\n", "4-5=9\n", "#### 9"]
    assert task.check_solution(problem, ["3+4=2\n", "2*2=4\n", "4-5=9\n", "#### 9"]) == [False, False, True, True]
    claims = task.check_solution(problem, ["3+4=2\n", "2*2=4\n", "4-5=9\n", "#### 9"], given="claims")
    assert claims == [False, True, True, True]
    assert task.check_solution(problem, ["3+4=2", "7*2=4", "4-5=8", "#### 9"], given="claims") == [False] * 4
    assert not check_step(task, problem, ["three and four\n"], "7*2=4\n", given="claims")
    assert check_step(task, problem, ["three and four\n"], "7*2=4\n")
    assert not check_step(task, problem, ["3+4=07\n"], "7*2=4\n", given="claims")

    addition = get_task("addition:digits=2")
    problem = TaskProblem("58+67=\n", "125", {"numbers": [58, 67]})
    assert addition.solution(problem) == ["8+7+0=15\n", "5+6+1=12\n", "#### 125"]
    assert addition.check_solution(problem, ["8+7+0=5\n", "5+6+0=11\n", "#### 115"]) == [False] * 3
    assert addition.check_solution(problem, ["8+7+0=5\n", "5+6+0=11\n", "#### 115"], given="claims") == [
        False,
        True,
        True,
    ]

    star = get_task("star_graph")
    meta = {"centre": 4, "goal": 2, "arms": [[7, 2], [1, 3]]}
    problem = TaskProblem("4>7,1>3,7>2,4>1:4>2=\n", "7", meta)
    assert star.solution(problem) == ["7\n", "2\n", "#### 7"]
    assert star.check_solution(problem, ["1\n", "3\n", "#### 1"], given="claims") == [False, True, True]
    assert star.check_solution(problem, ["7\n", "3\n", "#### 7"]) == [True, False, True]
    assert star.next_step(problem, ["4\n"]) == "7\n"
    assert star.next_step(problem, ["9\n"]) is None


def test_independent_lines_stand_in_any_order_each_once() -> None:
    task = get_task("independent:terms=3")
    problem = TaskProblem("3+4,7*2,3+4%10=\n", "8", {"parts": [[3, "+", 4], [7, "*", 2], [3, "+", 4]]})
    steps = ["3+4=7\n", "7*2=4\n", "3+4=7\n", "#### 8"]
    assert task.solution(problem) == steps
    meanings: tuple[Given, ...] = ("truth", "claims")
    for meaning in meanings:
        for order in itertools.permutations(steps[:3]):
            assert task.check_solution(problem, [*order, steps[3]], given=meaning) == [True] * 4
        early = task.check_solution(problem, [steps[0], steps[3], steps[1], steps[2]], given=meaning)
        assert early[:2] == [True, False]
    twice = ["7*2=4", "7*2=4", "3+4=7", "3+4=7", "#### 8"]
    assert task.check_solution(problem, twice) == [True, False, True, False, False]
    assert task.check_solution(problem, twice, given="claims") == [True, False, False, False, False]
    slip = ["3+4=9", "7*2=4", "3+4=7", "#### 8"]  # no other line is incorrect for it; the answer copies it
    assert task.check_solution(problem, slip) == [False, True, True, True]
    assert task.check_solution(problem, slip, given="claims") == [False, True, True, False]
    assert task.check_solution(problem, [*slip[:3], "#### 0"], given="claims") == [False, True, True, True]


def test_rule_90_by_hand() -> None:
    task = get_task("cellular:rule=90,width=5,steps=2")
    problem = TaskProblem("90:00100*2=\n", "10001", {"row": "00100", "steps": 2})
    assert task.solution(problem) == ["01010\n", "10001\n", "#### 10001"]


def test_long_chains_of_products_stay_checkable() -> None:
    task = get_task("arithmetic:terms=100,maximum=999,operators=*")
    problem = task.problem(random.Random(0))
    assert all(task.check_solution(problem, task.solution(problem), given="claims"))


@settings(max_examples=150, deadline=None)
@given(
    spec=st.sampled_from(SPECS),
    index=st.integers(0, 20),
    before=st.lists(st.text(max_size=20) | st.text("0123456789+-*=#> \n", max_size=12), max_size=6),
    step=st.text(max_size=20) | st.text("0123456789+-*=#> \n", max_size=12),
)
def test_any_text_gets_a_verdict(spec: str, index: int, before: list[str], step: str) -> None:
    task, problem = draw(spec, index)
    truth = task.solution(problem)
    expected = len(before) < len(truth) and step.rstrip("\n ") == truth[len(before)].rstrip("\n")
    assert check_step(task, problem, before, step) is expected
    following = task.next_step(problem, before)
    assert check_step(task, problem, before, step, given="claims") is (
        following is not None and step.rstrip("\n ") == following.rstrip("\n")
    )


@pytest.mark.parametrize("text", ["9" * 100_000, "1+1=" + "9" * 10_000, "٣+٤=٧", "1" * 401, "\x00", "\ud800", "4\n\n7"])
@pytest.mark.parametrize("spec", SPECS)
def test_hostile_text_is_incorrect(spec: str, text: str) -> None:
    task, problem = draw(spec, 0)
    for how in ("truth", "claims"):
        assert not check_step(task, problem, [], text, given=how)  # type: ignore[arg-type]
    assert not check_step(task, problem, [text], task.solution(problem)[1], given="claims")


def test_prompts_of_the_measured_setting() -> None:
    task = get_task("modular")
    lengths = {len(task.solution(task.problem(random.Random(seed)))) for seed in range(50)}
    assert lengths == {6}  # five lines and the answer
    used = {op for seed in range(50) for op in task.problem(random.Random(seed)).meta["operators"]}
    assert used == set("+-*")


@pytest.mark.parametrize("spec", [spec for spec in SPECS if "-" in spec.split(":")[-1].split(",")[0]])
def test_ranges_vary_the_length(spec: str) -> None:
    task = get_task(spec)
    lengths = {len(task.solution(task.problem(keyed_rng("length", index)))) for index in range(200)}
    assert len(lengths) >= 3


def test_specs_round_trip_and_equal_settings_are_equal() -> None:
    for name in TASKS:
        assert get_task(get_task(name).spec) == get_task(name)
    assert (
        get_task("modular:terms=5-5")
        == get_task("modular:terms=5")
        == get_task(" modular : terms = 5 ".replace(" :", ":"))
    )
    assert get_task("modular:operators=+-,terms=3-6").spec == "modular:terms=3-6,modulus=10,operators=+-"


def test_tasks_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_task("modular").modulus = 3  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("modulr", "unknown task 'modulr': did you mean 'modular'?"),
        ("chess", "choose from arithmetic, modular, addition, star_graph, cellular"),
        ("modular:modulos=3", "unknown setting of task 'modular' 'modulos': did you mean 'modulus'?"),
        ("modular:terms", "'terms' is not key=value"),
        ("modular:", "is not key=value"),
        ("modular:modulus=", "'modulus=' is not key=value"),
        ("modular:modulus=3,modulus=4", "'modulus=4' is not key=value, every key once"),
        ("modular:modulus=ten", "modular: modulus='ten' is not a whole number"),
        ("modular:modulus=1", "modular: modulus=1: must lie in [2, 1000]"),
        ("modular:terms=6-3", "terms=6-3 is out of range: 2 to 100, the smaller number first"),
        ("modular:terms=1", "modular: terms=1 is out of range: 2 to 100"),
        ("arithmetic:terms=2-101", "arithmetic: terms=2-101 is out of range"),
        ("modular:terms=a-b", "terms='a-b' is neither a number such as 5 nor a range such as 3-6"),
        ("arithmetic:operators=+/", "operators='+/' must be one or more of +-*, once each"),
        ("arithmetic:operators=++", "operators='++' must be one or more of"),
        ("arithmetic:maximum=0", "arithmetic: maximum=0: must lie in [1, 999]"),
        ("star_graph:arms=4", "make up to 13 nodes but only nodes=10 labels exist; set nodes=13 or more"),
        ("cellular:rule=256", "cellular: rule=256: must lie in [0, 255]"),
        ("cellular:width=2", "cellular: width=2: must lie in [3, 64]"),
        ("addition:digits=0", "addition: digits=0 is out of range"),
    ],
)
def test_bad_specs(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        get_task(spec)


def test_bad_given() -> None:
    task = get_task("modular")
    problem = task.problem(random.Random(0))
    with pytest.raises(ConfigError, match="unknown given 'thruth': did you mean 'truth'"):
        task.check_solution(problem, ["3+4=7\n"], given="thruth")  # type: ignore[arg-type]
