from __future__ import annotations

import pytest

from stepkd.errors import DataError
from stepkd.grading.pool import accuracy_reward, completion_text, shared_grader


def test_strings_messages_and_numbers() -> None:
    rewards = accuracy_reward(
        prompts=["q"] * 5,
        completions=[
            "#### 18",
            [{"role": "assistant", "content": "It is \\boxed{18}."}],
            [{"role": "assistant", "content": [{"type": "text", "text": "The answer is "}, {"text": "19"}]}],
            "",
            "18.50",
        ],
        answer=["18", "9 * 2 = <<9*2=18>>18\n#### 18", 18, "18", 18.5],
        completion_ids=[[1]] * 5,
    )
    assert rewards == [1.0, 1.0, 0.0, 0.0, 1.0]


def test_the_grader_is_shared() -> None:
    assert shared_grader() is shared_grader()


def test_completion_text_reads_the_last_message() -> None:
    assert completion_text([{"content": "a"}, {"content": "b"}]) == "b"
    assert completion_text([]) == ""
    assert completion_text(None) == ""
    assert completion_text([{"role": "assistant", "content": None}]) == ""


def test_bad_columns_are_named() -> None:
    with pytest.raises(DataError, match="type int is neither text nor a list of chat messages"):
        accuracy_reward(prompts=["q"], completions=[3], answer=["3"])
    with pytest.raises(DataError, match=r"answers\[0\] is NoneType"):
        accuracy_reward(prompts=["q"], completions=["3"], answer=[None])
    with pytest.raises(DataError, match="1 completions but 2 answers"):
        accuracy_reward(prompts=["q"], completions=["3"], answer=["3", "4"])
