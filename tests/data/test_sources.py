"""Sources: from every public layout to contract rows, and the messages when that fails."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from stepkd.data.config import DataConfig, parse_spec
from stepkd.data.load import load_rows
from stepkd.data.rows import PROBLEM, STEPWISE, check_unique_ids, validate
from stepkd.data.sources import SOURCES
from stepkd.data.sources.generated import GENERATED_SPLITS, stream_seed
from stepkd.data.sources.problems import final_answer, last_boxed, whole_answer
from stepkd.data.sources.source import RawRow, Source
from stepkd.errors import ConfigError, DataError

GSM = {"question": "How many?", "answer": "She has 2*600=<<2*600=1200>>1200.\nSo 1,200.\n#### 1,200"}


def write(path: Path, *rows: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(source: str, path: Path, *rows: Any, **settings: Any) -> list[dict[str, Any]]:
    return load_rows(DataConfig(source=source, path=write(path, *rows), **settings))


# --- layouts ---------------------------------------------------------------------------------------------------------


def test_gsm8k_strips_calculator_marks(tmp_path: Path) -> None:
    [row] = load("gsm8k", tmp_path / "test.jsonl", GSM)
    assert row == {
        "prompt": "How many?",
        "answer": "1200",
        "solution": "She has 2*600=1200.\nSo 1,200.\n#### 1,200",
        "id": "gsm8k/test/0",
    }
    [numbered] = load("gsm8k", tmp_path / "test.jsonl", GSM | {"id": 7})
    assert numbered["id"] == "7"


@pytest.mark.parametrize(
    ("text", "answer"),
    [("#### 5", "5"), ("a #### 1\nb #### -1,234.5 \n", "-1234.5"), ("no mark", None), ("####  ", None)],
)
def test_gsm8k_final_answer(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


def test_gsm8k_bad_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl, line 2, column 'answer': the solution has no '#### <answer>'"):
        load("gsm8k", tmp_path / "train.jsonl", GSM, {"question": "q", "answer": "42"})
    with pytest.raises(DataError, match="line 1, column 'solution': must be text, found int"):
        load("gsm8k", tmp_path / "train.jsonl", {"question": "q", "answer": 42})
    with pytest.raises(DataError, match="line 1, column 'question': missing column 'question' of source 'gsm8k'"):
        load("gsm8k", tmp_path / "train.jsonl", {"problem": "q", "answer": "#### 2"})


def test_columns_give_the_files_names(tmp_path: Path) -> None:
    raw = {"q": "How many?", "sol": "#### 2"}
    [row] = load("gsm8k", tmp_path / "a.jsonl", raw, columns={"prompt": "q", "solution": "sol"})
    assert row == {"prompt": "How many?", "answer": "2", "solution": "#### 2", "id": "gsm8k/train/0"}
    with pytest.raises(DataError, match=r"columns maps 'prompt' to 'Q', which is not there \(the row has 'q', 'sol'\)"):
        load("gsm8k", tmp_path / "a.jsonl", raw, columns={"prompt": "Q", "solution": "sol"})
    with pytest.raises(ConfigError, match=r"unknown column \(source gsm8k\) 'promt': did you mean 'prompt'"):
        DataConfig(source="gsm8k", columns={"promt": "q"})


def test_math_layouts(tmp_path: Path) -> None:
    full = {
        "problem": "p",
        "solution": "s \\boxed{1}",
        "answer": "2",
        "subject": "Algebra",
        "level": 3,
        "unique_id": "u/1",
    }
    [row] = load("math500", tmp_path / "test.jsonl", full)
    assert row == {
        "prompt": "p",
        "answer": "2",
        "solution": "s \\boxed{1}",
        "subject": "Algebra",
        "level": 3,
        "id": "u/1",
    }
    original = {"problem": "p", "solution": "so $\\boxed{\\frac{1}{2}}$.", "level": "Level 5", "type": "Geometry"}
    [row] = load("math", tmp_path / "train.jsonl", original)
    assert (row["answer"], row["subject"], row["level"], row["id"]) == (
        "\\frac{1}{2}",
        "Geometry",
        "Level 5",
        "math/train/0",
    )
    with pytest.raises(DataError, match=r"line 1, column 'answer': no 'answer' column and no \\boxed"):
        load("math", tmp_path / "train.jsonl", {"problem": "p", "solution": "nothing"})


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("\\boxed{1} then \\boxed{ {a}{b} }", "{a}{b}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{1", None),
        ("\\boxed{}", None),
        ("none", None),
        ("\\boxed{a\\", None),
    ],
)
def test_last_boxed(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


def test_word_problem_layouts(tmp_path: Path) -> None:
    hub = {"ID": "chal-1", "Body": "Ann has 3.", "Question": "How many?", "Equation": "( 3.0 )", "Answer": "3.0"}
    [row] = load("svamp", tmp_path / "test.jsonl", hub)
    assert row == {"prompt": "Ann has 3. How many?", "answer": "3", "id": "chal-1", "equation": "( 3.0 )"}
    [row] = load("svamp", tmp_path / "all.jsonl", {"question": "q", "answer": 1.5})
    assert row == {"prompt": "q", "answer": "1.5", "id": "svamp/test/0"}
    with pytest.raises(DataError, match="column 'prompt': needs 'question', or 'Body' and 'Question'"):
        load("svamp", tmp_path / "test.jsonl", {"Body": "b", "answer": "1"})
    [row] = load("multiarith", tmp_path / "train.jsonl", {"question": "q", "final_ans": "1,000.00"})
    assert row == {"prompt": "q", "answer": "1000", "id": "multiarith/train/0"}


def test_a_perturbed_problem_without_an_answer_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    raw = {"question": "q", "solution": "s\n#### 4.33", "answer": "4.33", "perturbation_type": "numerical substitution"}
    rows = load("gsm_plus", tmp_path / "testmini.jsonl", raw, raw | {"answer": "None"}, raw | {"answer": "1,200"})
    assert [(row["id"], row["answer"]) for row in rows] == [
        ("gsm_plus/testmini/0", "4.33"),
        ("gsm_plus/testmini/2", "1200"),
    ]
    assert rows[0]["subject"] == "numerical substitution"
    assert "testmini.jsonl: 1 rows are left out by the rules of source 'gsm_plus'" in caplog.text


def test_platinum_has_the_layout_of_gsm8k(tmp_path: Path) -> None:
    [row] = load("gsm8k_platinum", tmp_path / "test.jsonl", GSM | {"cleaning_status": "revised"})
    assert (row["answer"], row["id"]) == ("1200", "gsm8k_platinum/test/0")


def test_olympiad_layout(tmp_path: Path) -> None:
    raw = {"id": 7, "question": "q", "solution": ["s", "t"], "final_answer": ["$69$,$84$."], "subfield": "Algebra"}
    [row] = load("olympiad_bench", tmp_path / "test.jsonl", raw)
    assert row == {"prompt": "q", "answer": "69,84", "solution": "s", "subject": "Algebra", "id": "7"}
    rows = load(
        "olympiad_bench", tmp_path / "b.jsonl", raw | {"final_answer": ["1", "$x^2$"]}, {"problem": "q", "answer": "2"}
    )
    assert [row["answer"] for row in rows] == ["1, x^2", "2"]
    with pytest.raises(DataError, match="line 1, column 'final_answer': must be a list of texts, found"):
        load("olympiad_bench", tmp_path / "c.jsonl", raw | {"final_answer": [1]})


@pytest.mark.parametrize(
    "raw",
    [
        {"ID": "2024-I-1", "Problem": "p", "Solution": "s", "Answer": 73},
        {"id": "2024-I-1", "problem": "p", "solution": "s", "answer": "073", "url": "u"},
        {"id": "2024-I-1", "question": "p", "answer": 73.0},
        {"problem_idx": "2024-I-1", "problem": "p", "solution": "", "answer": "$73$"},
    ],
)
@pytest.mark.parametrize("source", ["aime24", "aime25", "amc23"])
def test_contest_layouts(tmp_path: Path, source: str, raw: dict[str, Any]) -> None:
    [row] = load(source, tmp_path / "x.jsonl", raw)
    assert (row["prompt"], row["answer"], row["id"]) == ("p", "73", "2024-I-1")
    assert row.get("solution") == ("s" if "s" in raw.values() else None)


@pytest.mark.parametrize(
    ("value", "text"),
    [("000", "0"), ("-007", "-7"), ("1,234", "1234"), ("\\frac{1}{2}", "\\frac{1}{2}"), ("3.5", "3.5"), (True, True)],
)
def test_whole_answers(value: object, text: object) -> None:
    assert whole_answer(value) == text
    assert type(whole_answer(value)) is type(text)


# --- generated sources -----------------------------------------------------------------------------------------------


def test_reasoning_gym_gives_solutions_where_the_set_has_them() -> None:
    pytest.importorskip("reasoning_gym")
    rows = load_rows(DataConfig(source="reasoning_gym", split="test", options={"size": 6, "seed": 3}))
    assert len(rows) == 6
    for index, row in enumerate(rows):
        assert row["id"] == f"gsm_symbolic/test/{index}"
        assert final_answer(row["solution"]) == row["answer"]
    assert rows == load_rows(DataConfig(source="reasoning_gym", split="test", options={"size": 6, "seed": 3}))
    plain = load_rows(DataConfig(source="reasoning_gym", options={"dataset": "chain_sum", "size": 2}))
    assert all("solution" not in row for row in plain)


def test_reasoning_gym_splits_and_seeds_share_no_problem() -> None:
    """chain_sum draws item i from the stream seed + i, so neighbouring seeds would repeat each other."""
    pytest.importorskip("reasoning_gym")
    config = {"min_digits": 6, "max_digits": 6}
    seen: list[str] = []
    for split in GENERATED_SPLITS:
        for seed in (0, 1):
            options = {"dataset": "chain_sum", "size": 20, "seed": seed, "config": config}
            seen += [
                row["prompt"] for row in load_rows(DataConfig(source="reasoning_gym", split=split, options=options))
            ]
    assert len(set(seen)) == len(seen) == 120


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"dataset": "gsm_simbolic"},
            "unknown dataset of .*'gsm_simbolic': did you mean 'gsm_symbolic'",
        ),
        ({"size": 0}, "size=0 of source 'reasoning_gym': must lie between 1 and"),
        ({"seed": -1}, "seed=-1 of source 'reasoning_gym': must be 0 or more"),
        ({"config": {"no_such": 1}}, "reasoning_gym refused config=.*no_such"),
    ],
)
def test_reasoning_gym_bad_options(options: dict[str, Any], message: str) -> None:
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ConfigError, match=message):
        load_rows(DataConfig(source="reasoning_gym", options=options))


def test_reasoning_gym_set_without_a_gold_answer() -> None:
    pytest.importorskip("reasoning_gym")
    with pytest.raises(DataError, match="'graph_color' has no single gold answer"):
        load_rows(DataConfig(source="reasoning_gym", options={"dataset": "graph_color", "size": 1}))


def test_stream_seeds_are_distinct_and_far_apart() -> None:
    seeds = sorted(stream_seed(seed, split) for seed in range(5) for split in GENERATED_SPLITS)
    assert min(b - a for a, b in itertools.pairwise(seeds)) == 2**20
    with pytest.raises(ConfigError, match="unknown split of source 'reasoning_gym' 'tests': did you mean 'test'"):
        stream_seed(0, "tests")


def test_task_rows() -> None:
    pytest.importorskip("stepkd.tasks")
    clean = load_rows(parse_spec("task:task='modular:terms=4,modulus=10',n=8,seed=2,split=validation"))
    noisy = load_rows(DataConfig(source="task", options={"task": "modular:terms=4,modulus=10", "n": 8, "seed": 2,
                                                       "noise": {"rate": 0.9}}, split="validation"))  # fmt: skip
    assert [row["prompt"] for row in clean] == [row["prompt"] for row in noisy]
    assert [row["solution"] for row in clean] != [row["solution"] for row in noisy]
    check_unique_ids(clean)
    with pytest.raises(ConfigError, match="noise of source 'task': 'rates' is not a setting; did you mean 'rate'"):
        load_rows(parse_spec("task:noise.rates=0.1"))
    with pytest.raises(ConfigError, match=r"noise of source 'task': .* required: rate"):
        load_rows(parse_spec("task:noise.seed=1"))


# --- the table -------------------------------------------------------------------------------------------------------


def test_a_source_of_ones_own_may_give_several_rows_per_raw_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def map_row(raw: RawRow, options: Any) -> list[dict[str, Any]]:
        if raw["labels"] == "skip":
            return []
        labels = raw["labels"]
        return [
            {"prompt": raw["prompt"], "completions": raw["completions"][: k + 1], "labels": labels[: k + 1]}
            for k in range(len(labels) if options["prefixes"] else 1)
        ]

    mine = Source(
        name="mine",
        help="a test",
        contract=STEPWISE,
        map_row=map_row,
        reads={"prompt": ("problem",), "completions": ("steps",), "labels": ("labels",)},
        options={"prefixes": False},
    )
    monkeypatch.setitem(SOURCES, "mine", mine)
    raw = {"problem": "p", "steps": ["a", "b"], "labels": [1, -1]}
    rows = load("mine", tmp_path / "a.jsonl", raw | {"labels": "skip"}, raw, options={"prefixes": True})
    assert [row["id"] for row in rows] == ["mine/train/1/0", "mine/train/1/1"]
    assert [row["labels"] for row in rows] == [[1], [1, -1]]


def test_every_listed_source_is_complete() -> None:
    names = ["gsm8k", "math500", "math", "svamp", "multiarith", "reasoning_gym", "task", "rows"]
    names += ["gsm8k_platinum", "gsm_plus", "minerva_math", "olympiad_bench", "amc23", "aime24", "aime25"]
    assert {*names, "prm800k", "math_shepherd", "processbench", "bigbench_mistake", "mr_gsm8k", "prmbench"} == set(
        SOURCES
    )
    for name, source in SOURCES.items():
        assert source.name == name
        assert source.help
        assert set(source.requires) <= set(source.reads) or not source.reads
        assert source.default_split in source.splits
        assert set(source.evaluation_only) <= {"*", *source.splits}
        assert callable(source.map_row)
        assert source.settings({}).keys() == source.options.keys()


def test_test_splits_that_models_are_judged_by_are_not_for_training() -> None:
    kept = {name: set(source.evaluation_only) for name, source in SOURCES.items() if source.evaluation_only}
    assert {name for name, splits in kept.items() if splits == {"*"}} == {
        *("math500", "amc23", "aime24", "aime25", "minerva_math", "olympiad_bench", "gsm8k_platinum", "gsm_plus"),
        *("processbench", "bigbench_mistake", "mr_gsm8k", "prmbench"),
    }
    assert {name for name, splits in kept.items() if splits == {"test"}} == {"gsm8k", "svamp", "multiarith", "math"}
    assert kept["prm800k"] == {"test", "phase1_test", "phase2_test"}


# --- the real files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "folder", "split", "count"),
    [
        ("gsm8k", "gsm8k", "train", 7473),
        ("gsm8k", "gsm8k", "test", 1319),
        ("math500", "math500", None, 500),
        ("svamp", "svamp", None, 1000),
        ("multiarith", "multiarith", None, 600),
    ],
)
def test_real_files(data_dir: Path, source: str, folder: str, split: str | None, count: int) -> None:
    rows = load_rows(DataConfig(source=source, path=str(data_dir / folder), split=split))
    assert len(rows) == count
    check_unique_ids(rows)
    for row in rows:
        validate(row, PROBLEM)
        assert "<<" not in row.get("solution", "") or source != "gsm8k"
        if source in ("gsm8k", "svamp", "multiarith"):
            float(row["answer"])
