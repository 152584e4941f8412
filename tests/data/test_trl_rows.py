"""TRL's and the hub's row types are read as they are, and equal what TRL's own helpers make of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stepkd.data.config import DataConfig
from stepkd.data.load import load_rows
from stepkd.errors import DataError


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """What a file of one row is read as."""

    def reads(row: dict[str, Any], **settings: Any) -> dict[str, Any]:
        (tmp_path / "rows.jsonl").write_text(json.dumps(row))
        [found] = load_rows(DataConfig(path=str(tmp_path / "rows.jsonl"), **settings))
        return found

    return reads


@pytest.mark.parametrize(
    ("row", "prompt", "solution"),
    [
        ({"messages": [SYSTEM, user("1+1?"), assistant("2")]}, [SYSTEM, user("1+1?")], "2"),
        (
            {"messages": [user("a"), assistant("b"), user("c"), assistant("d")]},
            [user("a"), assistant("b"), user("c")],
            "d",
        ),
        ({"prompt": "1+1?", "messages": [SYSTEM, user("1+1?"), assistant("2")]}, [SYSTEM, user("1+1?")], "2"),
        (
            {"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]},
            [user("1+1?")],
            "2",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}]},
                    {"role": "assistant", "content": "2", "tool_calls": None},
                ]
            },
            [user("1+1?")],
            "2",
        ),
        ({"prompt": "1+1=", "completion": " 2"}, "1+1=", " 2"),
        ({"prompt": [user("1+1?")], "completion": [assistant("2")]}, [user("1+1?")], "2"),
        (
            {"prompt": [user("a")], "completion": [assistant("b"), user("c"), assistant("d")]},
            [user("a"), assistant("b"), user("c")],
            "d",
        ),
        ({"prompt": "1+1?", "completion": [assistant("2")]}, "1+1?", "2"),
        ({"instruction": "Add.", "input": "1+1", "output": "2"}, "Add.\n\n1+1", "2"),
        ({"instruction": "Add 1+1.", "input": "", "output": "2"}, "Add 1+1.", "2"),
    ],
)
def test_rows_of_trl_and_the_hub_are_read_as_demonstrations(
    row: dict[str, Any], prompt: Any, solution: str, read: Any
) -> None:
    found = read(row)
    assert (found["prompt"], found["solution"]) == (prompt, solution)


def test_alpaca_by_mapping_keeps_its_input(read: Any) -> None:
    row = {"instruction": "Add.", "input": "1+1", "output": "2"}
    found = read(row, columns={"prompt": "instruction", "solution": "output"})
    assert (found["prompt"], found["solution"]) == ("Add.\n\n1+1", "2")
    assert read({"prompt": "p", "answer": "1", "input": "of its own"})["prompt"] == "p"


def test_prompts_without_an_answer_of_theirs(read: Any) -> None:
    found = read({"messages": [SYSTEM, user("1+1?")], "answer": 2})
    assert (found["prompt"], found["answer"]) == ([SYSTEM, user("1+1?")], "2")
    assert "solution" not in found


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
        {"prompt": "q", "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
        {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
        {
            "chosen": [SYSTEM, user("q"), assistant("x"), user("r"), assistant("a")],
            "rejected": [SYSTEM, user("q"), assistant("x"), user("r"), assistant("b")],
        },
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        {"chosen": "Human: q\n\nAssistant: abc", "rejected": "Human: q\n\nAssistant: abd"},
    ],
)
def test_pairs_have_the_prompt_that_trl_extracts(row: dict[str, Any], read: Any) -> None:
    from trl.data_utils import maybe_extract_prompt

    def text(side: Any) -> str:
        return side if isinstance(side, str) else side[0]["content"]

    found, theirs = read(row), maybe_extract_prompt(dict(row))
    assert found["prompt"] == theirs["prompt"]
    assert (found["chosen"], found["rejected"]) == (text(theirs["chosen"]), text(theirs["rejected"]))


def test_a_labelled_completion_is_no_demonstration(read: Any) -> None:
    found = read({"prompt": [user("q")], "completion": [assistant("a")], "label": True})
    assert (found["prompt"], found["completion"], found["label"]) == ([user("q")], "a", True)
    assert "solution" not in found, "a labelled completion is no demonstration"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [user("q"), {"role": "assistant"}]}, "column 'messages': message 2 of 2 must be an object with"),
        ({"messages": []}, "column 'messages': must not be an empty list"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "message 1 of 1 has role 'robot'"),
        ({"prompt": [user("q")], "completion": [user("a")]}, "column 'completion': ends with the role 'user'"),
        ({"prompt": "q", "completion": [user("a"), assistant("b")]}, "several messages and the prompt is text"),
        (
            {"chosen": [user("q"), assistant("a"), user("r"), assistant("b")], "rejected": [user("q"), assistant("c")]},
            "column 'chosen': has 3 messages behind the prompt; one assistant turn is read",
        ),
        ({"chosen": [user("q"), assistant("a")], "rejected": [user("r"), assistant("b")]}, "has 2 messages behind"),
        ({"chosen": [assistant("a")], "rejected": [assistant("a")]}, "has 0 messages behind the prompt"),
        ({"chosen": "abc", "rejected": "xyz"}, "column 'prompt': must not be empty"),
        ({"prompt": "q", "chosen": 3, "rejected": None}, "column 'chosen': must be text"),
        (
            {"messages": [user("q"), {"role": "assistant", "content": [{"type": "image"}]}]},
            "message 2 of 2 has a content that is invalid: must be text, found list",
        ),
    ],
)
def test_what_cannot_be_read_is_told_with_row_and_column(row: dict[str, Any], message: str, read: Any) -> None:
    with pytest.raises(DataError, match=rf"rows\.jsonl, line 1, .*{message}"):
        read(row)


def test_parquet_and_saved_datasets_hold_messages_too(tmp_path: Path) -> None:
    """Arrow fills the keys that only some messages have with nulls."""
    import datasets

    from stepkd.data.config import RowsInMemory

    rows = [{"messages": [{**user("q"), "name": "Ann"}, assistant("a")]}] * 2
    made = datasets.Dataset.from_list(rows)
    made.to_parquet(str(tmp_path / "rows.parquet"))
    made.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for spec in (
        *(DataConfig(path=str(tmp_path / name)) for name in ("rows.parquet", "saved", "rows.jsonl")),
        RowsInMemory(rows=made),
        RowsInMemory(rows=made.to_iterable_dataset()),
    ):
        found = load_rows(spec)
        assert [row["prompt"] for row in found] == [[{**user("q"), "name": "Ann"}]] * 2
        assert [row["solution"] for row in found] == ["a", "a"]
    assert "solution" not in rows[0], "the rows that were given stay as they were"
