"""States, their names, the shared pool, and a method of one's own as the docs show it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from stepkd.grading.pool import Grader
from stepkd.search.state import Problem, Search, State, Step, Tools, found, ranked

PAGE = Path(__file__).resolve().parents[2] / "docs" / "search.md"


def test_a_state_grows_by_steps_and_is_cut_back_under_another_name(problem: Problem) -> None:
    steps = [Step("a\n", (1, 2), -0.5, "step", 3), Step("b", (4,), -0.25, "stop", 1)]
    state = State(problem).then(steps[0]).then(steps[1])
    assert (state.text, state.token_ids, state.step_ends, state.path) == ("a\nb", (1, 2, 4), (2, 3), (3, 1))
    assert (state.end, state.logprob) == ("stop", -0.75)
    again = state.first(1, 7)
    assert (again.text, again.token_ids, again.step_ends, again.path) == ("a\n", (1, 2), (2,), (3, 7))
    assert (again.end, again.logprob) == ("step", None)
    assert state.first(0, 5).path == (5,)
    assert State(problem).then(Step("a", (1,), None, "step")).logprob is None


def test_what_goes_on_counts_as_cut_off_as_a_completion(problem: Problem) -> None:
    state = State(problem).then(Step("a\n", (1, 2), -0.5, "step"))
    completion = found(state, score=0.5)
    assert (completion.finish, completion.text, completion.score) == ("length", "a\n", 0.5)
    assert completion.step_ends.tolist() == [2]


def test_ranks_go_down_from_the_highest_score_and_missing_ones_are_last() -> None:
    assert ranked([0.1, None, 0.3, 0.1, None]) == [2, 0, 3, 1, 4]


def test_a_pool_that_is_too_small_is_drawn_again_and_keeps_its_first_samples(
    scripted: Any, known_tree: Any, problem: Problem
) -> None:
    tools = Tools(scripted(known_tree), Grader(extractors=("hash",)))
    (first,) = tools.samples([problem], 1)
    (both,) = tools.samples([problem], 2)
    assert both[0].text == first[0].text
    assert len(both) == 2
    assert tools.costs.generated(0) == sum(len(state.token_ids) for state in (*first, *both))


def test_the_method_of_the_page_works(scripted: Any, valued: Any, known_tree: Any, known_values: Any) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    scope: dict[str, Any] = {"__name__": "page"}
    exec(compile(block, "search.md", "exec", dont_inherit=True), scope)
    method = scope["FirstStepBestOf"](n=2)
    assert isinstance(method, Search)
    assert (method.name, method.at_once, method.needs_scorer) == ("first_step_best_of", 2, True)
    tools = Tools(scripted(known_tree), Grader(extractors=("hash",)), known_values)
    results = method.run([Problem(i, {"id": str(i)}, (7,)) for i in range(2)], tools)
    assert [[each.text for each in own] for own in results] == [["a\n#### 1"]] * 2
