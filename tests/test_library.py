"""``import stepkd``: what it promises, what it does not load, and what a script does with it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import stepkd
from stepkd.errors import ConfigError, DataError
from stepkd.grading.judge import solution_steps

NAMES = sorted(" ".join(stepkd._HOMES.values()).split())
HEAVY = ["torch", "numpy", "lightning", "transformers", "datasets", "peft", "trl", "scipy", "pydantic", "rich", "yaml"]


def test_importing_and_listing_load_nothing_heavy() -> None:
    code = f"import sys, stepkd; dir(stepkd); print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_name_loads_and_is_listed() -> None:
    assert all(getattr(stepkd, name).__name__ == name for name in NAMES)
    assert {*NAMES, "__version__"} <= set(dir(stepkd))
    with pytest.raises(AttributeError, match="module 'stepkd' has no attribute 'SFTModul'"):
        _ = stepkd.SFTModul  # type: ignore[attr-defined]


def test_type_checkers_see_the_same_names_at_their_homes() -> None:
    tree = ast.parse(Path(stepkd.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.asname: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert sorted(map(str, seen)) == NAMES
    assert {name: getattr(stepkd, str(name)).__module__ for name in seen} == seen


@pytest.fixture(scope="module")
def policy() -> Any:
    return stepkd.load_policy(stepkd.PolicyConfig("tiny-0.1m"))


SHORT = stepkd.SamplingConfig(n=3, max_new_tokens=12)


def test_sample_takes_texts_chats_and_rows(policy: Any) -> None:
    chat = [{"role": "user", "content": "4+8="}]
    row = {"id": "a", "prompt": "4+8=", "answer": "2"}
    drawn = stepkd.sample(policy, ["4+8=", chat, row], SHORT)
    rendered = [policy.tokenizer.decode(each[0].prompt_ids) for each in drawn]
    assert rendered == ["user: 4+8=\nassistant: "] * 3
    assert [[each.id for each in completions] for completions in drawn] == [["0"] * 3, ["1"] * 3, ["a"] * 3]
    assert drawn[2][1].row == row
    for each in (each for completions in drawn for each in completions):
        assert each.step_ends[-1] == len(each.token_ids) <= 12
        assert len(each.logprobs) == len(each.token_ids)


def test_sample_is_what_the_sampler_draws_under_the_template(policy: Any) -> None:
    from stepkd.sampling import TransformersEngine

    (drawn,) = stepkd.sample(policy, ["4+8="], SHORT, template="task")
    ids = policy.tokenizer("4+8=").input_ids
    (expected,) = TransformersEngine(policy).generate([ids], SHORT, purpose="script")
    assert [each.token_ids.tolist() for each in drawn] == [each.token_ids.tolist() for each in expected]
    assert drawn[0].prompt_ids.tolist() == ids
    assert len({each.text for each in drawn}) == 3
    again = stepkd.sample(policy, ["4+8="], SHORT, template="task", max_rows=1)
    assert [each.text for each in again[0]] == [each.text for each in drawn]


def test_sample_asks_a_policy_under_the_template_it_was_trained_with(policy: Any, tmp_path: Path) -> None:
    from stepkd.data.templates import get_template
    from stepkd.models.checkpoint import save_policy
    from stepkd.models.source import save_template

    save_policy(policy, tmp_path)
    save_template(get_template("gsm8k"), tmp_path)
    trained = stepkd.load_policy(stepkd.PolicyConfig(str(tmp_path)))
    (drawn,) = stepkd.sample(trained, ["4+8="], SHORT)
    assert "Solve this step by step" in trained.tokenizer.decode(drawn[0].prompt_ids)


@pytest.mark.parametrize("prompts", ["4+8=", []])
def test_sample_refuses_what_is_no_list_of_prompts(policy: Any, prompts: Any) -> None:
    with pytest.raises(DataError, match="give a list of texts, of lists of chat messages, or of rows"):
        stepkd.sample(policy, prompts)


def test_sample_names_the_row_and_the_template_that_do_not_work(policy: Any) -> None:
    with pytest.raises(DataError, match="must be text or chat messages"):
        stepkd.sample(policy, [{"question": "4+8="}])
    with pytest.raises(ConfigError, match="no prompt template named 'tusk'"):
        stepkd.sample(policy, ["4+8="], template="tusk")


def test_the_page_from_python_runs_word_for_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repo_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (repo_root / "docs" / "python.md").read_text(encoding="utf-8")
    script, *others = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(script.splitlines()) <= 25
    assert len(others) == 6
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {"__name__": "page"}
    exec(compile(script, "python.md", "exec"), scope)
    assert len(scope["drawn"]) == len(scope["grades"]) == 4
    assert [len(each) for each in scope["scores"]] == [len(solution_steps(each.text)) for each in scope["drawn"]]
    assert scope["loss"].requires_grad
    assert scope["student"].global_step == 2
    for block in others:
        exec(compile(block, "python.md", "exec"), scope)
    assert len(scope["ranked"]) == 4
    assert scope["row"]["labels"] == [True, False]
    assert scope["ratios_S"].grad.tolist() != [0.0, 0.0, 0.0]
    assert "unparsed" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
