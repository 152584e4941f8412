"""States, their names, the shared pool, and a method of one's own as the docs show it."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from stepkd import search
from stepkd.errors import ConfigError
from stepkd.grading.pool import Grader
from stepkd.search import (
    MCTS,
    Beam,
    BestOfN,
    EntropyBranching,
    ParticleFilter,
    PhiDecoding,
    Refine,
    Speculative,
    ValueGuided,
)
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


def test_names_tell_methods_of_one_class_apart() -> None:
    pairs: list[tuple[Search, Search]] = [
        (ValueGuided(threshold=0.3), ValueGuided(threshold=0.4)),
        (EntropyBranching(low=0.2), EntropyBranching(high=2.0)),
        (ParticleFilter(temperature=0.5), ParticleFilter(reduction="min")),
        (Beam(reduction="min"), Beam(vote="max")),
        (MCTS(force_end=True), MCTS(exploration=2.0)),
        (PhiDecoding(clusters=1), PhiDecoding()),
        (Speculative(draft="a/b", length=3), Speculative(draft="a/b")),
        (Refine(refiner="runs/a"), Refine(refiner="runs/b")),
        (BestOfN(vote="soft", temperature=0.5), BestOfN(vote="soft")),
    ]
    names = [method.name for pair in pairs for method in pair]
    assert len(set(names)) == 2 * len(pairs)
    assert all(re.fullmatch(r"[\w@.+-]+", name) for name in names)
    assert names[:2] == ["value_guided@8_threshold-0.3", "value_guided@8_threshold-0.4"]
    assert names[4:8] == [
        "particle_filter@16_temperature-0.5",
        "particle_filter@16_min",
        "beam@16x4_min",
        "beam@16x4_max",
    ]


def test_another_model_that_is_not_loaded_is_named(problem: Problem) -> None:
    tools = Tools(None, None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="works with runs/small, which is not loaded"):
        Speculative(draft="runs/small").run([problem], tools)


def test_everything_that_a_script_needs_is_exported() -> None:
    """Of the modules that define methods everything with ``run``; of ``state`` what methods are written with."""
    modules = {each.stem for each in Path(search.__file__).parent.glob("*.py")} - {"__init__"}
    methods = set()
    for module in modules:
        own = vars(importlib.import_module(f"stepkd.search.{module}"))
        methods |= {name for name, kind in own.items() if isinstance(kind, type) and "run" in vars(kind)}
    for name in (methods - {"Search", "Population"}) | {"Search", "State", "Tools", "found", "ranked"}:
        assert getattr(search, name).__name__ == name


def test_the_method_of_the_page_works(scripted: Any, valued: Any, known_tree: Any, known_values: Any) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    scope: dict[str, Any] = {"__name__": "page"}
    exec(compile(block, "search.md", "exec", dont_inherit=True), scope)
    method = scope["FirstStepBestOf"](n=2)
    assert isinstance(method, Search)
    assert (method.name, method.at_once, method.needs_scorer) == ("first_step_best_of_n-2", 2, True)
    tools = Tools(scripted(known_tree), Grader(extractors=("hash",)), known_values)
    results = method.run([Problem(i, {"id": str(i)}, (7,)) for i in range(2)], tools)
    assert [[each.text for each in own] for own in results] == [["a\n#### 1"]] * 2
