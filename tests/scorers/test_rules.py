"""Scorers that need no model: sums done again, what a step adds, the exact checker."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest

from stepkd.data.io import read_rows
from stepkd.errors import DataError
from stepkd.grading.pool import GradingConfig
from stepkd.labels.job import run_label_job
from stepkd.labels.labellers import Sums
from stepkd.labels.quality import row_labels
from stepkd.labels.settings import Existing, LabelConfig
from stepkd.modules.step_scores import FocusConfig
from stepkd.runs.files import write_jsonl
from stepkd.scorers.load import load_scorer
from stepkd.scorers.rules import Arithmetic, Checker, Gain, equations
from stepkd.scorers.scorer import Solutions, score_one
from stepkd.tasks.rows import Noise, make_rows

# --- arithmetic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "48/2 = 24 clips",
        "She sold 48 / 2 = $24.",
        "$1,200 x 3 = $3,600.",
        "so 2(3+4) = 14",
        "(3 + 4 = 7)",
        r"$\frac{10}{4} \times 2 = 5$",
        r"20 \div 4 \cdot 3 = 15",
        "7 × 6 = 42 and 42 − 2 = 40",
        ".25*12 = 3",
        "20 x .05 = 1",
        "0.05*100=5",
        "06 + 1 = 7",
        "2^3 = 8",
        "2**3 = 8",
        "2 - -1 = 3",
        "3 + 4 = 14 / 2",
        "x = 3 + 4 = 7",
        "It costs 5. 3 + 4 = 7 more.",
        "10/3 = 3.33",  # cut off
        "10/3 = 3.333",
        "20/3 = 6.67",  # rounded
        "10/4 = 3",
        "10/4 = 2",
        "50*20% = 10",
        "30% + 20% = 50%",
        "100 - 25 = 75%",
        "15/60 = 25%",
        "1/3 = 33.3%",
        "10 * 2 = 20 - 5 = 15",  # what one writes in a hurry
        "<<48/2=24>>",
        r"12 \div \frac{2}{3} = 18",
        r"1/2 + 1/3 = \frac{5}{6}",
        "x = -2 + 5 = 4 - 1",
        "45 + 30 = 75 minutes",
        "a total of 5 + 3 = 8",
        "5 + 3 = 8. 9 * 2 = 18.",
        "3 + 4 = 7kg",
        "3 + 4 = 7 (since 2 + 5 = 7)",
    ],
)
def test_correct_sums(text: str) -> None:
    found = equations(text)
    assert found, "no sum was found"
    assert all(each.holds for each in found), found


@pytest.mark.parametrize(
    "text",
    [
        "5 + 3 = 9 apples",
        "48/2 = 25",
        "2.5*2 = 5.1",  # exact at this digit: no rounding
        "10/3 = 3.35",
        "10/3 = 5",
        "7 - 10 = 3",
        "5/0 = 5",
        "50*20% = 11",
        "1/3 = 35%",
        "$1,200 x 3 = $3,700",
        "3 + 4 = 7, then 7 * 2 = 15",
        "3 + 4 = 16 / 2",
        "she has <<3+4=8>>8",
        "5 + 3 = 9. 9 * 2 = 18.",
        "3 + 4 = 8 (since 2 + 5 = 7)",
        "10 * 2 = 20/4",
        "1/10 * 1 = 1",
        "5 x 20 = 90 apples",
    ],
)
def test_incorrect_sums(text: str) -> None:
    assert [each.holds for each in equations(text)].count(False) == 1, equations(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "#### 24",
        "x = 5",
        "20% of 50 = 11",
        "2 apples + 3 = 6",
        "10 apples - 2 * 3 = 5",
        "half of 10 + 4 = 9",
        "3 more than 3 * 2 = 9",
        "200 basketballs x (20 / 100) = 40",
        "2x + 3 = 8",
        "3 + 4 = 8x",
        "3 + 2x = 8",
        "3 * 30 = 30 + M",
        "7/2 = 3 1/2",
        "500/ 2/5 = 1250",
        "$1 / 2 = 50 cents",
        "3:30 + 2 = 5:30",
        "3 + 4 >= 8 and 3 + 4 == 8",
        "9**9**9 = 1",
        "((9^60)^60)^60 = 1",
        r"2\frac{1}{2} \times 4 = 10",
        "√(9 + 16) = 5",
        "3 ⋅ 4 + 1 = 13",
        r"17 \bmod 5 + 1 = 3",
        "log 100 + 1 = 3",
        "1/2 of 20 + 5 = 15",
        "one tenth of 50 + 2 = 7",
        "the square root of 16 + 2 = 6",
        "the sum of 12 and 8 / 2 = 10",
        "If 25% = 10 apples",
        "100% = 80 students",
        "3/5 = 12 girls",
        "15/60 = 25 percent",
        "500,000 x 6 = $3 million",
        "45 + 15 = 1 hour",
        "7 + 8 = 3 mod 12",
        "49 - 6 = 3ab",
        "$80 - 20% = $64",
        "Step 2 - 5 + 3 = 8",
        "subtract 5 from 10 + 2 = 7",
        "2^-1^-1^(1/2) = 3",
        "1" + "+1" * 200 + " = 7",
    ],
)
def test_what_cannot_be_read_is_passed_over(text: str) -> None:
    assert equations(text) == []


def test_long_lines_take_no_time() -> None:
    start = time.perf_counter()
    for text in ("1 " * 50_000 + "x = 3", "= 1 + " * 20_000, "(" * 50_000 + "= 7", "9" * 100_000 + " + 1 = 2"):
        equations(text)
    assert time.perf_counter() - start < 20


def test_the_scorer() -> None:
    solution = ["3 + 4 = 7\n", "7 * 2 = 15\n", "so she has many\n", "#### 15"]
    asked = [Solutions({"id": "0", "prompt": "?"}, [solution, solution[:1]])]
    assert Arithmetic().score(asked) == [[[1.0, 0.0, 1.0, 1.0], [1.0]]]
    ((first, _),) = Arithmetic(unchecked=math.nan).score(asked)
    assert first[:2] == [1.0, 0.0]
    assert all(map(math.isnan, first[2:]))
    facts = {"scorer": "arithmetic", "unchecked": 1.0, "meaning": "correctness"}
    assert load_scorer("arithmetic").provenance() == facts
    assert Arithmetic(unchecked=math.nan).provenance() == facts | {"unchecked": None}
    assert FocusConfig("arithmetic").weights(first) == (0.0, 1.0, 0.0, 0.0)


def test_as_a_labeller(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "prompt": "p", "answer": "15", "solution": "3 + 4 = 7\n7 * 2 = 15\n#### 15"},
        {"id": "b", "prompt": "q", "answer": "7", "solution": "She has them all.\n3 + 4 = 7\n#### 7"},
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    out = tmp_path / "labels"
    run_label_job(
        LabelConfig(
            solutions=Existing(completions=str(tmp_path / "rows.jsonl"), model="tiny-0.1m"),
            labeller=Sums(),
            template="gsm8k",
            grading=GradingConfig(extractors=("hash",)),
            out=str(out),
        )
    )
    labelled = {row["id"]: row for row, _ in read_rows(out / "labels.jsonl")}
    assert row_labels(labelled["a"]) == [True, False, None]
    assert row_labels(labelled["b"]) == [None, True, None]
    assert labelled["a"]["labelling"]["scorer"]["scorer"] == "arithmetic"


# --- gain -------------------------------------------------------------------------------------------------------------


ROW = {"id": "p1", "prompt": "?", "solution": "He buys 3 apples for 6\nShe sells 4 pears for 8\n#### 14"}


def of(*steps: str) -> list[float]:
    return Gain().score([Solutions(ROW, [steps])])[0][0]


def test_the_solution_itself_covers_everything() -> None:
    scores = of("He buys 3 apples for 6\n", "She sells 4 pears for 8\n", "#### 14")
    # "for" stands in two lines, so the first step has a part of the second already.
    assert math.fsum(2 * score - 1 for score in scores) == pytest.approx(1.0)
    assert scores[0] > 0.5 + 1 / 6 - 1e-12
    assert scores[1] < 0.5 + 1 / 6


def test_written_out() -> None:
    """Two units with one word in common: log(1 + 2/1) for the others, log(1 + 2/2) for it."""
    row = {"id": "q", "prompt": "?", "solution": "a b\nb c"}
    rare, common = math.log(3), math.log(2)
    norm = math.hypot(rare, common)
    found = Gain().score([Solutions(row, [["a b", "b", "d"]])])[0][0]
    other = common**2 / norm**2  # of "a b" to "b c"
    first = (1 + other) / 2
    second = (max(common / norm - 1, 0) + max(common / norm - other, 0)) / 2
    assert found == pytest.approx([(1 + first) / 2, (1 + second) / 2, 0.5])


def test_repetition_costs() -> None:
    step = "He buys 3 apples for 6"
    first, again, once_more = of(step, "\n" + step.upper(), "So " + step)
    assert first > 0.5
    assert again == 0.0
    assert once_more == pytest.approx(0.5 * (1 - 3 / 4))  # three of its four runs of words were there
    assert of("something else altogether") == [0.5]


def test_no_score_is_above_one() -> None:
    """The weights of a long line, squared, sum to a little more than 1 now and then."""
    for words in range(10, 61):
        line = " ".join(f"{chr(97 + i % 26)}{chr(97 + i % 7)}" * (1 + i % 3) for i in range(words))
        assert (
            1 - 1e-12 < Gain().score([Solutions({"id": "r", "prompt": "?", "solution": line}, [[line]])])[0][0][0] <= 1
        )


def test_order_and_companions() -> None:
    """A step's worth depends on those before it only, and solutions of one problem know nothing of each other."""
    steps = ["He buys 3 apples", "nothing at all", "She sells 4 pears for 8"]
    whole = of(*steps)
    assert of(*steps[:2]) == whole[:2]
    assert Gain().score([Solutions(ROW, [steps, steps])])[0] == [whole, whole]
    assert all(0 <= score <= 1 for score in whole)


def test_rows_without_a_solution() -> None:
    with pytest.raises(DataError, match="row '0' has no 'solution'"):
        score_one(load_scorer("gain"), "1+1=", ["2"])


# --- the exact checker ------------------------------------------------------------------------------------------------


def test_scores_are_the_labels_of_noisy_solutions() -> None:
    rows = make_rows("modular:terms=4", 40, seed=3, noise=Noise(rate=0.3))
    scorer = Checker()
    scores = scorer.score([Solutions(row, [row["steps"], row["steps"][:2]]) for row in rows])
    for row, (whole, start) in zip(rows, scores, strict=True):
        assert whole == [float(label) for label in row["step_labels"]]
        assert start == whole[:2]
    assert {value for pair in scores for value in pair[0]} == {0.0, 1.0}
    assert scorer.meaning == "correctness"
    assert scorer.provenance() == {"scorer": "checker", "given": "truth", "meaning": "correctness"}


def test_the_checker_refuses_rows_of_other_worlds() -> None:
    with pytest.raises(DataError, match="row x: not a problem of the tiny world"):
        Checker().score([Solutions({"id": "x", "prompt": "1"}, [["a"]])])
