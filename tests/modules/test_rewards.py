"""Reward functions are called as TRL calls them: its own, those of others, sync and async; where they fail is told."""

from __future__ import annotations

import asyncio
import functools
import sys
import textwrap
from pathlib import Path
from typing import Any

import forked
import pytest

from stepkd.errors import ConfigError, TrainingError
from stepkd.grading.pool import Grader, GradingConfig
from stepkd.modules.rewards import RewardConfig, Rewards

TEXTS = [r"<think>a</think> \boxed{\frac{1}{2}}", r"\boxed{3}", "nothing"]
IDS = [[1, 2, 3, 4], [5, 5, 5, 5, 5, 5], [7] * 20]
NAMES = ["a/0", "a/1", "a/2"]


def columns(*, chat: bool = False, **more: Any) -> dict[str, list[Any]]:
    prompt: Any = [{"role": "user", "content": "q"}] if chat else "q"
    return {"prompts": [prompt] * 3, "completions": TEXTS, "completion_ids": IDS, "meta": [0, 1, 2], **more}


def given(*specs: Any, **more: Any) -> dict[str, list[float | None]]:
    made = [each if isinstance(each, RewardConfig) else RewardConfig(each) for each in specs]
    return Rewards(made, Grader())(columns(**more), NAMES)[1]


def test_accuracy_is_what_the_grader_of_the_run_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "says_no.py").write_text("def judge(text, reference, row):\n    return text == row['wanted']\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = [{"wanted": "nothing"}] * 3
    with Grader(GradingConfig(grader="says_no.judge")) as grader:
        _, parts = Rewards([RewardConfig()], grader)(columns(answer=["3"] * 3, rows=rows), NAMES)
    assert parts == {"accuracy": [0.0, 0.0, 1.0]}


# ---- TRL's own ------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "get_soft_overlong_punishment": {"max_completion_len": 8, "soft_punish_cache": 4},
    "get_cosine_scaled_reward": {"max_len": 10, "min_value_wrong": -2.0},
    "get_repetition_penalty_reward": {"ngram_size": 2},
    "reasoning_accuracy_reward": {"reasoning_delimiters": ["</think>"]},
}


def trl_names() -> list[str]:
    import trl.rewards

    return sorted(name for name in dir(trl.rewards) if name.endswith("_reward") or name.startswith("get_"))


@pytest.mark.parametrize("mark", [":", "."])
@pytest.mark.parametrize("name", trl_names())
def test_every_reward_of_trl_gives_what_it_gives_in_trl(name: str, mark: str) -> None:
    import trl.rewards

    options, function = OPTIONS.get(name, {}), getattr(trl.rewards, name)
    spec = RewardConfig(f"trl.rewards{mark}{name}", options=options)
    if name.startswith("get_"):
        function, options = function(**options), {}
    messages = [[{"role": "assistant", "content": text}] for text in TEXTS]
    golds = [r"$\frac{1}{2}$", "4", "5"]
    expected = function(completions=messages, completion_ids=IDS, prompts=None, solution=golds, **options)
    for form in ({"answer": golds, "solution": ["long", "worked", "texts"]}, {"answer": golds}, {"solution": golds}):
        for chat in (False, True):
            assert given(spec, chat=chat, **form)[spec.name] == expected
    assert len(set(expected)) > 1, "it tells them apart"


def test_the_list_of_trls_rewards_is_not_empty() -> None:
    assert len(trl_names()) >= 6


def test_trl_is_imported_only_when_something_of_it_is_named(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, stepkd.modules; from stepkd.modules import RewardConfig; RewardConfig('accuracy').own; "
        "print('trl' in sys.modules)"
    )
    assert forked.run([], script=script).stdout == "False\n"


# ---- those of others ------------------------------------------------------------------------------------------------


def test_a_function_is_given_no_more_than_it_takes_and_chat_as_messages() -> None:
    seen: dict[str, Any] = {}

    def narrow(prompts: list[Any], completions: list[Any], solution: list[str]) -> list[float]:
        seen.update(prompts=prompts, completions=completions, solution=solution)
        return [0.0] * 3

    given(narrow, answer=["1", "2", "3"])
    assert seen == {"prompts": ["q"] * 3, "completions": TEXTS, "solution": ["1", "2", "3"]}
    given(narrow, chat=True, answer=["1", "2", "3"], solution=["x", "y", "z"])
    assert seen["prompts"] == [[{"role": "user", "content": "q"}]] * 3
    assert seen["completions"] == [[{"role": "assistant", "content": text}] for text in TEXTS]
    assert seen["solution"] == ["x", "y", "z"], "the rows' own column"


class Scaled:
    """A callable object, made with options."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def __call__(self, completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [self.scale * len(ids) for ids in completion_ids]


def made(scale: float) -> Any:
    return Scaled(scale)


async def slow(completion_ids: list[list[int]], plus: float = 0.0, **_: Any) -> list[float]:
    await asyncio.sleep(0.01)
    return [len(ids) + plus for ids in completion_ids]


class Judge:
    """An async callable whose lock belongs to one event loop, as a client's does."""

    lock: asyncio.Lock | None = None

    async def __call__(self, completion_ids: list[list[int]], **_: Any) -> list[float]:
        self.lock = self.lock or asyncio.Lock()
        async with self.lock:
            await asyncio.sleep(0)
        assert self.lock._loop in (None, asyncio.get_running_loop())  # type: ignore[attr-defined]
        return [float(len(ids)) for ids in completion_ids]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(sys.modules, "others", sys.modules[__name__])
    return "others"


def test_factories_objects_partials_lambdas_and_async_functions(here: str) -> None:
    lengths = [4.0, 6.0, 20.0]
    doubled = [2 * each for each in lengths]
    named = [RewardConfig(f"{here}.{name}", options={"scale": 2.0}) for name in ("made", "Scaled")]
    assert list(given(*named).values()) == [doubled, doubled]
    assert given(Scaled(2.0))["Scaled"] == doubled
    assert given(functools.partial(Scaled(2.0)))["partial"] == doubled
    assert given(lambda completion_ids, **_: map(len, completion_ids))["<lambda>"] == lengths
    judge, partly = Judge(), functools.partial(slow, plus=1.0)
    for _ in range(2):
        assert given(slow, judge) == {"slow": lengths, "Judge": lengths}
        assert given(partly)["partial"] == [each + 1 for each in lengths]
    assert given(RewardConfig(f"{here}:slow", options={"plus": 1.0}))[f"{here}:slow"] == [5.0, 7.0, 21.0]

    async def notebook() -> Any:
        return given(slow)

    assert asyncio.run(notebook()) == {"slow": lengths}, "also where a loop runs already"


def test_none_is_left_out_of_the_sum() -> None:
    some = RewardConfig(lambda completions: [1.0, None, None], weight=2.0)  # type: ignore[arg-type]
    more = RewardConfig(lambda completions: [None, 5.0, None])  # type: ignore[arg-type]
    totals, _ = Rewards([some, more], Grader())(columns(), NAMES)
    assert totals[:2] == [2.0, 5.0]
    assert totals[2] != totals[2], "nobody has judged it"


def test_the_failing_line_of_the_function_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text(
        textwrap.dedent(
            """
            import json

            def helper(text):
                return json.loads(text)["x"]

            def parsed(completions, **_):
                return [helper(text) for text in completions]

            async def later(completions, **_):
                raise KeyError("price")

            def nothing(completions, **_):
                pass
            """
        )
    )
    (tmp_path / "broken_rewards.py").write_text("import json\n1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TrainingError, match=r"'my_rewards\.parsed' failed .*JSONDecodeError.*my_rewards\.py, line 5\)"):
        given("my_rewards.parsed")
    with pytest.raises(
        TrainingError, match=r"'my_rewards:later' failed .*KeyError: 'price' \(.*my_rewards\.py, line 11"
    ):
        given("my_rewards:later")
    with pytest.raises(TrainingError, match=r"'my_rewards:nothing' failed .*'NoneType' object is not iterable$"):
        given("my_rewards:nothing")
    with pytest.raises(ConfigError, match="cannot be imported: ZeroDivisionError: division by zero"):
        given("broken_rewards.x")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RewardConfig("trl.rewards.accuracy").own, "cannot be imported: AttributeError"),
        (
            lambda: RewardConfig("trl.rewards.get_soft_overlong_punishment").own,
            "does not take its options: .*missing 2",
        ),
        (
            lambda: RewardConfig("trl.rewards.get_soft_overlong_punishment", options={"max_len": 3}).own,
            "does not take its options: .*max_len",
        ),
        (lambda: RewardConfig("math.pi").own, "is not a callable object"),
        (lambda: RewardConfig("os.getcwd").own, "is not a callable object"),
    ],
)
def test_names_that_are_no_rewards(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_function_may_not_hide_a_built_in_reward() -> None:
    def accuracy(completions: list[str], **_: Any) -> list[float]:
        return [1.0] * len(completions)

    with pytest.raises(ConfigError, match="a function named 'accuracy', like a built-in reward: rename it"):
        RewardConfig(accuracy)  # type: ignore[arg-type]


def test_safe_mode_refuses_functions_with_a_dot_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPKD_SAFE", "1")
    for name in ("trl.rewards.think_format_reward", "os.path.join", "os:getcwd"):
        with pytest.raises(ConfigError, match="--safe allows only"):
            assert RewardConfig(name).own


# ---- completions that were cut off -----------------------------------------------------------------------------------


def test_a_completion_that_was_cut_off_earns_its_reward_by_a_finished_answer_only() -> None:
    rewards = Rewards([RewardConfig("accuracy")], Grader())
    texts = ["so it is 3", r"\boxed{3}", "so it is 3"]
    given_columns = columns(answer=["3"] * 3) | {"completions": texts, "cut_off": [False, True, True]}
    assert rewards(given_columns, NAMES)[1]["accuracy"] == [1.0, 1.0, 0.0]
    assert rewards.correct(given_columns) == [True, True, False]
