"""PRM800K: both layouts give the same rows, incorrect steps come from the alternatives, the test split is kept
apart."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from stepkd.data.config import DataConfig, check_training_use
from stepkd.data.load import load_rows
from stepkd.data.rows import check_unique_ids
from stepkd.errors import ConfigError, DataError

TAIL = "\n\n# Answer\n\n"


def rated(text: str, rating: Any, **more: Any) -> dict[str, Any]:
    return {"text": text, "rating": rating, "flagged": False, **more}


def position(*completions: dict[str, Any], chosen: int | None = 0, human: Any = None) -> dict[str, Any]:
    return {"completions": list(completions), "chosen_completion": chosen, "human_completion": human}


RELEASED: dict[str, Any] = {
    "labeler": "L",
    "timestamp": "T",
    "generation": None,
    "is_quality_control_question": False,
    "is_initial_screening_question": False,
    "question": {"problem": "2+3*4?", "ground_truth_solution": "s", "ground_truth_answer": "14"},
    "label": {
        "steps": [
            position(rated("3*4=12", 1)),
            position(rated("2+3=5", -1), rated("hm", None), rated("skip", 1, flagged=True), human=rated("2+12", None),
                     chosen=None),
            position(rated("look", 0), rated(f"so 14{TAIL}14", 1), rated(f"so 15{TAIL}15", -1), chosen=1),
        ],
        "finish_reason": "solution",
    },
}  # fmt: skip
TRAJECTORY: dict[str, Any] = {
    "id": "L/T",
    "problem": "2+3*4?",
    "steps": ["3*4=12", "2+12", "so 14"],
    "labels": [1, None, 1],
    "step_source": ["model", "human", "model"],
    "final_answer": "14",
    "alternatives": [
        [],
        [{"text": "2+3=5", "rating": -1}, {"text": "hm", "rating": None}],
        [{"text": "look", "rating": 0}, {"text": "so 15", "rating": -1, "answer": "15"}],
    ],
}


def load(
    tmp_path: Path, *rows: dict[str, Any], name: str = "phase1_train.jsonl", **options: Any
) -> list[dict[str, Any]]:
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_rows(DataConfig(source="prm800k", path=str(path), options=options))


def changed(row: dict[str, Any], **label: Any) -> dict[str, Any]:
    row = copy.deepcopy(row)
    row["label"] |= label
    return row


def brief(rows: list[dict[str, Any]]) -> list[tuple[list[str], list[int | None]]]:
    return [(row["completions"], row["labels"]) for row in rows]


# --- the rows --------------------------------------------------------------------------------------------------------


def test_released_line(tmp_path: Path) -> None:
    rows = load(tmp_path, RELEASED)
    common = {"prompt": "2+3*4?", "answer": "14"}
    assert rows == [
        common
        | {
            "completions": ["3*4=12", "2+12", "so 14"],
            "labels": [1, None, 1],
            "final_answer": "14",
            "outcome": True,
            "id": "L/T/chosen",
            "kind": "chosen",
        },
        common
        | {"completions": ["3*4=12", "2+3=5"], "labels": [None, -1], "id": "L/T/1-0", "kind": "alternative"},
        common
        | {
            "completions": ["3*4=12", "2+12", "look"],
            "labels": [None, None, 0],
            "id": "L/T/2-0",
            "kind": "alternative",
        },
        common
        | {
            "completions": ["3*4=12", "2+12", "so 15"],
            "labels": [None, None, -1],
            "final_answer": "15",
            "id": "L/T/2-1",
            "kind": "alternative",
        },
    ]  # fmt: skip


def test_both_layouts_agree(tmp_path: Path) -> None:
    """The trajectory layout lacks the gold answer, the finish reason and flags; all else is the same."""
    released, trajectory = load(tmp_path, RELEASED), load(tmp_path, TRAJECTORY)
    lost = {"answer", "outcome", "id"}
    plain = [{name: row[name] for name in row if name not in lost} for row in released]
    assert plain == [{name: row[name] for name in row if name != "id"} for row in trajectory]


def test_layouts_may_stand_in_one_file(tmp_path: Path) -> None:
    rows = load(tmp_path, RELEASED, TRAJECTORY | {"id": "other"})
    assert len(rows) == 8
    check_unique_ids(rows)


def test_a_tail_is_an_answer_only_behind_a_step(tmp_path: Path) -> None:
    bare = changed(RELEASED, steps=[position(rated("# Answer\n\n7", 1)), position(rated("see # Answer above", 1))])
    [row] = load(tmp_path, bare)
    assert row["completions"] == ["# Answer\n\n7", "see # Answer above"]
    assert "final_answer" not in row


def test_masked_prefixes_count_every_rating_once(tmp_path: Path, data_dir: Path) -> None:
    """Over a record, the labels with masked prefixes are exactly the chosen ratings and one per alternative."""
    path = data_dir / "prm800k" / "phase1_test.jsonl"
    rows = load_rows(DataConfig(source="prm800k", path=str(path)))
    labels = Counter(label for row in rows for label in row["labels"])
    assert labels[-1] + labels[0] + labels[1] == 1603 + sum(row["kind"] == "alternative" for row in rows)


def test_repeats_and_disagreements(tmp_path: Path) -> None:
    """The chosen text again is no alternative; a repeat counts once; a text rated in two ways not at all."""
    beside = [{"text": text, "rating": rating} for text, rating in
              [("a", -1), ("b", 0), ("b", 0), ("c", 1), ("c", -1), ("d", None), ("d", 1), (" ", 1)]]  # fmt: skip
    rows = load(tmp_path, {"problem": "p", "steps": ["a"], "labels": [1], "alternatives": [beside], "id": "r"})
    assert brief(rows) == [(["a"], [1]), (["b"], [0]), (["d"], [1])]
    assert [row["id"] for row in rows] == ["r/chosen", "r/0-1", "r/0-6"]


def test_phase_2_ends_at_the_error(tmp_path: Path) -> None:
    """Labelling stopped at the first error: nothing is chosen there, and the incorrect step is an alternative."""
    steps = [position(rated("a", 0)), position(rated("incorrect", -1), rated("mended", 1), chosen=None)]
    rows = load(tmp_path, changed(RELEASED, steps=steps, finish_reason="found_error"))
    assert brief(rows) == [(["a"], [0]), (["a", "incorrect"], [None, -1]), (["a", "mended"], [None, 1])]
    assert not any("outcome" in row for row in rows)


def test_path_stops_where_nothing_can_follow(tmp_path: Path) -> None:
    """After a position without a chosen step, or with an empty one, later positions have no prefix."""
    none: dict[str, Any] = {"completions": None, "chosen_completion": None, "human_completion": None}
    for gap in (none, position(rated(" ", 1))):
        rows = load(tmp_path, changed(RELEASED, steps=[position(rated("a", 1)), gap, position(rated("b", 1))]))
        assert brief(rows) == [(["a"], [1])]


def test_flagged_step_on_the_path_stays_without_label(tmp_path: Path) -> None:
    steps = [position(rated("a", 1, flagged=True)), position(rated("b", 1), human=None)]
    assert brief(load(tmp_path, changed(RELEASED, steps=steps))) == [(["a", "b"], [None, 1])]


def test_human_completion_may_be_a_text(tmp_path: Path) -> None:
    steps = [position(rated("a", 1)), position(rated("b", -1), chosen=None, human="by hand")]
    rows = load(tmp_path, changed(RELEASED, steps=steps))
    assert brief(rows) == [(["a", "by hand"], [1, None]), (["a", "b"], [None, -1])]


def test_rows_left_out(tmp_path: Path) -> None:
    keep = RELEASED | {"labeler": "K"}
    left_out = [
        RELEASED | {"is_quality_control_question": True},
        RELEASED | {"is_initial_screening_question": True},
        changed(RELEASED, finish_reason="give_up"),
        changed(RELEASED, finish_reason="bad_problem"),
        changed(RELEASED, steps=[position(chosen=None, human=rated("never rated", None))]),
    ]
    rows = load(tmp_path, *left_out, keep)
    assert {row["id"].partition("/")[0] for row in rows} == {"K"}
    with pytest.raises(DataError, match="no rows are left: 0 found"):
        load(tmp_path, *left_out)


# --- per_record ------------------------------------------------------------------------------------------------------


def many(num_incorrect: int, num_correct: int, identity: str = "r") -> dict[str, Any]:
    beside = [{"text": f"{rating}/{i}", "rating": rating} for rating, num in ((-1, num_incorrect), (1, num_correct))
              for i in range(num)]  # fmt: skip
    return {"id": identity, "problem": "p", "steps": ["a"], "labels": [1], "alternatives": [beside]}


@pytest.mark.parametrize(
    ("num_incorrect", "num_correct", "most", "incorrect", "correct"),
    [
        (9, 9, 4, 2, 2),
        (9, 9, 5, 3, 2),
        (9, 9, 1, 1, 0),
        (1, 9, 4, 1, 3),
        (9, 1, 4, 3, 1),
        (0, 9, 4, 0, 4),
        (2, 1, 4, 2, 1),
        (3, 3, 0, 3, 3),
    ],
)
def test_per_record_prefers_half_incorrect(
    tmp_path: Path, num_incorrect: int, num_correct: int, most: int, incorrect: int, correct: int
) -> None:
    rows = load(tmp_path, many(num_incorrect, num_correct), per_record=most)
    assert Counter(row["labels"][-1] for row in rows if row["kind"] == "alternative") == Counter(
        {-1: incorrect, 1: correct}
    )
    assert [row["id"] for row in rows] == [
        row["id"] for row in load(tmp_path, many(num_incorrect, num_correct)) if row in rows
    ]


def test_per_record_choice_hangs_on_seed_and_record_only(tmp_path: Path) -> None:
    def ids(*records: dict[str, Any], seed: int = 0) -> list[str]:
        return [row["id"] for row in load(tmp_path, *records, per_record=6, seed=seed)]

    first, second = many(20, 20, "one"), many(20, 20, "two")
    assert ids(first) + ids(second) == ids(first, second)
    assert set(ids(first, second)) == set(ids(second, first))
    assert ids(first) != ids(first, seed=1)
    assert [i.partition("/")[2] for i in ids(first)] != [i.partition("/")[2] for i in ids(second)]


# --- splits ----------------------------------------------------------------------------------------------------------


def test_test_files_are_for_evaluation(tmp_path: Path) -> None:
    for name in ("phase1_test.jsonl", "phase2_test.jsonl", "test.jsonl"):
        with pytest.raises(ConfigError, match="is kept for evaluation"):
            check_training_use(DataConfig(source="prm800k", path=str(tmp_path / name)))
    for name in ("phase1_train.jsonl", "phase1_train_head.jsonl", "train.jsonl"):
        check_training_use(DataConfig(source="prm800k", path=str(tmp_path / name)))
    with pytest.raises(ConfigError, match="has no hub dataset of its own; give path"):
        DataConfig(source="prm800k")


def test_folder_of_the_released_files(tmp_path: Path) -> None:
    for name in ("phase1_train", "phase1_test"):
        load(tmp_path, RELEASED | {"labeler": name}, name=f"{name}.jsonl")
    spec = DataConfig(source="prm800k", path=str(tmp_path), split="phase1_test")
    assert {row["id"].partition("/")[0] for row in load_rows(spec)} == {"phase1_test"}
    with pytest.raises(DataError, match=r"no file for split 'train'.*phase1_test\.jsonl, phase1_train\.jsonl"):
        load_rows(DataConfig(source="prm800k", path=str(tmp_path)))


def test_parquet_of_released_lines(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "phase1_train.parquet"
    datasets.Dataset.from_list([RELEASED]).to_parquet(str(path))
    assert load_rows(DataConfig(source="prm800k", path=str(path))) == load(tmp_path, RELEASED)


def test_real_train_head(data_dir: Path) -> None:
    """667 records; 7 have no chosen step. 28,170 alternatives, fewer after repeats and disagreements."""
    path = data_dir / "prm800k" / "phase1_train_head.jsonl"
    if not path.is_file():
        pytest.skip("no prm800k train head in the data folder")
    rows = load_rows(DataConfig(source="prm800k", path=str(path)))
    check_unique_ids(rows)
    chosen = [row for row in rows if row["kind"] == "chosen"]
    assert len(chosen) == 660
    assert Counter(label for row in chosen for label in row["labels"]) == {1: 9236, None: 1788}
    last = Counter(row["labels"][-1] for row in rows if row["kind"] == "alternative")
    assert last == {-1: 14472, 0: 7455, 1: 3970}
    assert last[-1] < 15335
    assert last[0] < 7894
    assert last[1] < 4389


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "completions": ["a"], "labels": [True]}, "line 1: fits neither layout of PRM800K"),
        (
            RELEASED | {"question": "2+3?"},
            "column 'question': question: Input should be a valid dictionary, found str '2\\+3\\?'",
        ),
        (RELEASED | {"label": [1]}, "column 'label': label: Input should be .*, found list"),
        (changed(RELEASED, steps=None), "label.steps: Input should be a valid list, found NoneType None"),
        (changed(RELEASED, steps=[3]), r"label.steps\[0\]: Input should be .*, found int 3"),
        (changed(RELEASED, steps=[position("a")]), r"label.steps\[0\].completions\[0\]: Input should be .*, found str"),
        (
            changed(RELEASED, steps=[position(rated("a", 1), chosen=1)]),
            r"chosen_completion is int 1, with 1 completions",
        ),
        (changed(RELEASED, steps=[position(rated("a", 1), chosen=True)]), "chosen_completion is bool True"),
        (
            changed(RELEASED, steps=[position(rated("a", 2))]),
            r"completions\[0\].rating: Input should be less than or equal to 1, found int 2",
        ),
        (
            changed(RELEASED, steps=[position(rated("a", True))]),
            "rating: Input should be a valid integer, found bool True",
        ),
        (
            changed(RELEASED, steps=[position(rated("a", 1.0))]),
            "rating: Input should be a valid integer, found float 1.0",
        ),
        (changed(RELEASED, steps=[position(rated(None, 1))]), "text: Input should be a valid string, found NoneType"),
        (TRAJECTORY | {"labels": [1, 1]}, "column 'labels': has 2 entries for 3 steps"),
        (TRAJECTORY | {"labels": [1, 1, "1"]}, r"labels\[2\]: Input should be a valid integer, found str"),
        (TRAJECTORY | {"steps": "abc"}, "column 'steps': steps: Input should be a valid list, found str"),
        (TRAJECTORY | {"steps": ["a", " ", "c"]}, r"column 'steps': steps\[1\] is empty"),
        (TRAJECTORY | {"alternatives": [[]] * 5}, "has 5 positions for 3 steps"),
        (TRAJECTORY | {"alternatives": [["a"]]}, r"alternatives\[0\]\[0\]: Input should be .*, found str"),
        (RELEASED | {"question": {"problem": None}}, "column 'prompt': must be text or a list of chat messages"),
    ],
)
def test_bad_rows(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path, row)
    assert (caught.value.line, Path(caught.value.path or "").name) == (1, "phase1_train.jsonl")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_record": -1}, "option per_record=-1 of source 'prm800k': must be 0"),
        ({"per_record": None}, "option per_record of source 'prm800k' must be int, found NoneType"),
        ({"per_record": "4"}, "option per_record of source 'prm800k' must be int, found str"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, RELEASED, **options)
