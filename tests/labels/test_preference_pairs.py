"""Pairs from outcomes: evenness, determinism, and a count for everything that makes no pair."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from stepkd.data.config import parse_spec
from stepkd.data.load import load_rows
from stepkd.data.rows import PREFERENCE, validate
from stepkd.labels.convert import Preference, convert_rows, even_pairs


def completion(problem: str, sample: int, correct: bool | None, **given: Any) -> dict[str, Any]:
    return {
        "id": f"{problem}/{sample}",
        "problem_id": problem,
        "prompt": f"{problem}?\n",
        "completion": f"{problem} by way {sample}",
        "token_ids": [ord(problem[0]), sample, 1],
        "logprobs": [-1.0] * 3,
        "step_ends": [2, 3],
        "finish": "stop",
        "correct": correct,
        "model": "m",
        "sampling": {"temperature": 1.0},
        "seed": 0,
        "answer": "1",
        "meta": {"n": 1},
    } | given


@pytest.mark.parametrize(("a", "b"), [(1, 1), (1, 5), (4, 6), (3, 3), (7, 2), (5, 4)])
def test_even_pairs_are_all_pairs_in_an_even_order(a: int, b: int) -> None:
    correct, incorrect = list(range(a)), [f"w{i}" for i in range(b)]
    pairs = list(even_pairs(correct, incorrect))
    assert sorted(pairs) == sorted((r, w) for r in correct for w in incorrect)
    for end in range(1, len(pairs) + 1):
        for side, members in ((0, correct), (1, incorrect)):
            used = Counter(pair[side] for pair in pairs[:end])
            times = [used[member] for member in members]  # type: ignore[index]
            assert max(times) - min(times) <= 1


def test_no_side_no_pairs() -> None:
    assert list(even_pairs([], [1])) == list(even_pairs([1], [])) == []


def test_columns_and_sides() -> None:
    rows = [completion("p", 0, True), completion("p", 1, False, finish="length")]
    found = convert_rows(rows, Preference(seed=5))
    (pair,) = found.rows
    validate(pair, PREFERENCE, extra="keep")
    assert pair == {
        "id": "p/pair-0",
        "problem_id": "p",
        "prompt": "p?\n",
        "chosen": rows[0]["completion"],
        "rejected": rows[1]["completion"],
        "chosen_ids": rows[0]["token_ids"],
        "rejected_ids": rows[1]["token_ids"],
        "answer": "1",
        "meta": {"n": 1},
        "pairing": {
            "builder": "outcome",
            "seed": 5,
            "max_pairs": 1,
            "chosen_steps": "any",
            "model": "m",
            "sampling": {"temperature": 1.0},
        },
        "pair_facts": {"chosen": "p/0", "rejected": "p/1"},
    }


def test_the_draw_is_keyed_by_seed_and_problem() -> None:
    rows = [completion(problem, sample, sample < 3) for problem in "pqr" for sample in range(6)]

    def drawn(rows: list[dict[str, Any]], seed: int = 0, n: int = 2) -> dict[str, list[tuple[str, str]]]:
        found = convert_rows(rows, Preference(seed=seed, max_pairs=n))
        pairs: dict[str, list[tuple[str, str]]] = {}
        for row in found.rows:
            pairs.setdefault(row["problem_id"], []).append((row["pair_facts"]["chosen"], row["pair_facts"]["rejected"]))
        return pairs

    whole = drawn(rows)
    assert all(len(pairs) == 2 for pairs in whole.values())
    assert drawn(rows) == whole
    assert drawn(rows[6:12])["q"] == whole["q"], "the other problems do not matter"
    assert any(drawn(rows, seed) != whole for seed in range(1, 4))
    assert {name: pairs[:1] for name, pairs in whole.items()} == drawn(rows, n=1), "more pairs keep the first ones"
    every = drawn(rows, n=100)
    assert [len(set(pairs)) for pairs in every.values()] == [9, 9, 9]


def test_why_there_is_no_pair() -> None:
    clean, slip = {"step_labels": [True, True]}, {"step_labels": [False, True]}
    rows = [
        *[completion("a", i, True) for i in range(2)],
        *[completion("b", i, False) for i in range(2)],
        completion("c", 0, True),
        *[completion("d", i, None) for i in range(2)],
        completion("e", 0, True, finish="length"),
        completion("e", 1, False),
        completion("f", 0, True, completion="same"),
        completion("f", 1, False, completion="same"),
        completion("g", 0, True, **slip),
        completion("g", 1, True, **clean),
        completion("g", 2, False, **slip),
        completion("g", 3, False, **slip, completion="g by way 2"),
        completion("h", 0, True, completion="  "),
        completion("h", 1, False),
        completion("i", 0, True, **slip),
        completion("i", 1, False),
    ]
    expected = {
        "rows": 2,
        "problems": 2,
        "problems_all_correct": 2,
        "problems_all_incorrect": 2,
        "problems_ungraded": 1,
        "problems_without_a_correct_one_to_choose": 1,
        "problems_identical_sides": 1,
        "ungraded_or_empty": 3,
        "duplicates": 1,
        "correct_but_cut_off": 1,
    }
    assert convert_rows(rows, Preference()).counts == expected
    found = convert_rows(rows, Preference(chosen_steps="clean", max_pairs=9))
    assert [row["pair_facts"] for row in found.rows] == [{"chosen": "g/1", "rejected": "g/2"}]
    assert found.counts == expected | {
        "rows": 1,
        "problems": 1,
        "problems_without_a_correct_one_to_choose": 2,
        "correct_but_an_incorrect_step": 2,
    }
    unlabelled = convert_rows([completion("p", i, i < 1) for i in range(2)], Preference(chosen_steps="clean"))
    assert len(unlabelled.rows) == 1, "what has no labels has no incorrect step"


def test_stepwise_rows_have_no_ids_and_the_file_is_read_back(tmp_path: Path) -> None:
    rows = [
        {"id": str(i), "prompt": "p", "completions": [f"way {i}\n", "#### 1"], "labels": [True, True], "outcome": i < 1}
        for i in range(3)
    ]
    found = convert_rows(rows, Preference(max_pairs=5))
    assert len(found.rows) == 2
    assert not any("chosen_ids" in row or "problem_id" in row for row in found.rows)
    assert Preference().write(found.rows, tmp_path / "pairs.jsonl") == 2
    assert load_rows(parse_spec(str(tmp_path)), contract=PREFERENCE) == found.rows, "as a folder of pairs, too"
