"""Best-of-k and votes against the enumeration of all subsets; curves, differences and growth; curves from files."""

from __future__ import annotations

import itertools
import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepkd.errors import ConfigError, DataError
from stepkd.evaluation.best_of_n import ProblemSamples, best_of_n_from_files, bon_curve
from stepkd.search import best_of_n
from stepkd.search.best_of_n import best_of_k, maj_at_k, pass_at_k, weighted_vote_at_k

FAST: dict[str, Any] = {"n_resamples": 300}
Scores = list[float | None]


def enumerated_best(scores: Scores, correct: list[bool], k: int) -> float:
    total, subsets = Fraction(0), 0
    for subset in itertools.combinations(range(len(scores)), k):
        subsets += 1
        ranks = [-math.inf if scores[i] is None else scores[i] for i in subset]
        tied = [i for i, rank in zip(subset, ranks, strict=True) if rank == max(ranks)]
        total += Fraction(sum(correct[i] for i in tied), len(tied))
    return float(total / subsets)


def enumerated_vote(scores: Scores, votes: list[str | None], correct: list[bool], k: int) -> float:
    """With exact fractions; an answer counts by the share of all its samples that are correct."""
    total, subsets = Fraction(0), 0
    for subset in itertools.combinations(range(len(scores)), k):
        subsets += 1
        sums: dict[str, Fraction] = {}
        for i in subset:
            vote = votes[i]
            if vote is not None:
                sums[vote] = sums.get(vote, Fraction(0)) + Fraction(scores[i] or 0)
        tied = [vote for vote in sums if sums[vote] == max(sums.values())]
        for vote in tied:
            members = [good for good, other in zip(correct, votes, strict=True) if other == vote]
            total += Fraction(sum(members), len(members) * len(tied))
    return float(total / subsets)


def sample(rng: np.random.Generator, n: int) -> tuple[Scores, list[str | None], list[bool]]:
    """Scores on a coarse binary grid (many ties, sums exact), some missing; votes, some missing."""
    scores: Scores = [None if rng.random() < 0.15 else float(rng.integers(0, 5)) / 4 for _ in range(n)]
    votes = [None if rng.random() < 0.2 else str(rng.integers(0, 3)) for _ in range(n)]
    return scores, votes, [vote == "0" for vote in votes]


def test_best_of_k_and_weighted_vote_equal_enumeration() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        n = int(rng.integers(1, 9))
        scores, votes, correct = sample(rng, n)
        noisy = [bool(rng.integers(0, 2)) for _ in range(n)]
        for k in range(1, n + 1):
            for hits in (correct, noisy):
                assert best_of_k(scores, hits, k) == pytest.approx(enumerated_best(scores, hits, k), abs=1e-12)
                expected = enumerated_vote(scores, votes, hits, k)
                assert weighted_vote_at_k(scores, votes, hits, k) == pytest.approx(expected, abs=1e-12)


def test_best_of_k_ends_and_invariances() -> None:
    rng = np.random.default_rng(1)
    scores, _, correct = sample(rng, 12)
    assert best_of_k(scores, correct, 1) == pytest.approx(np.mean(correct))
    perfect: Scores = [float(good) for good in correct]
    for k in (1, 3, 12):
        assert best_of_k(perfect, correct, k) == pytest.approx(float(pass_at_k(12, sum(correct), k)))
        shuffled = rng.permutation(12)
        again = best_of_k([scores[i] for i in shuffled], [correct[i] for i in shuffled], k)
        assert again == pytest.approx(best_of_k(scores, correct, k))
        logs: Scores = [None if s is None else 3 * s - 1000 for s in scores]  # any scale, also below 0
        assert best_of_k(logs, correct, k) == pytest.approx(best_of_k(scores, correct, k))
        assert best_of_k([None] * 12, correct, k) == pytest.approx(np.mean(correct))
    assert best_of_k([None, 0.0], [True, False], 2) == 0.0  # unscored ranks below the lowest score


def test_best_of_k_with_many_samples() -> None:
    # One correct sample on top of 1860: it is drawn with probability k/n.
    correct = [True] + [False] * 1859
    assert best_of_k([1.0] + [0.5] * 1859, correct, 93) == pytest.approx(93 / 1860)


def test_equal_weights_give_the_majority_vote() -> None:
    rng = np.random.default_rng(2)
    for _ in range(20):
        _, votes, correct = sample(rng, 8)
        for k in (1, 3, 8):
            for weight in (0.3, 1.0):  # 0.3: sums in another order differ by rounding
                vote = weighted_vote_at_k([weight] * 8, votes, correct, k)
                assert vote == pytest.approx(maj_at_k(votes, correct, k), abs=1e-12)


def test_unparsed_answers_never_win() -> None:
    assert weighted_vote_at_k([1.0, 1.0, 0.01], [None, None, "7"], [False, False, True], 3) == 1.0
    assert weighted_vote_at_k([1.0, 1.0], [None, None], [False, False], 2) == 0.0
    assert weighted_vote_at_k([None, 0.1], ["7", "8"], [True, False], 2) == 0.0
    assert weighted_vote_at_k([None, None], ["7", "8"], [True, False], 2) == 0.5


def test_drawn_subsets_are_keyed_and_near_the_exact_value(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    scores, votes, correct = sample(rng, 14)  # C(14, 7) = 3432 > 2000
    drawn = weighted_vote_at_k(scores, votes, correct, 7, seed=1, key="a")
    assert drawn == weighted_vote_at_k(scores, votes, correct, 7, seed=1, key="a")
    several = [weighted_vote_at_k(scores, votes, correct, 7, seed=1, key=str(i)) for i in range(40)]
    assert len(set(several)) > 1
    monkeypatch.setattr(best_of_n, "MAX_EXACT_SUBSETS", 3432)
    exact = weighted_vote_at_k(scores, votes, correct, 7)
    assert exact == pytest.approx(enumerated_vote(scores, votes, correct, 7))
    # 40 means of 400 draws of a 0..1 quantity: standard error at most 0.5 / sqrt(16000) = 0.004.
    assert np.mean(several) == pytest.approx(exact, abs=0.02)


# --- curves ---------------------------------------------------------------------------------------------------------


def world(n_problems: int = 60, n: int = 16) -> tuple[list[ProblemSamples], dict[str, list[Scores]]]:
    """Correct with probability 0.4, incorrect answers spread over three; a good scorer and a poor one."""
    rng = np.random.default_rng(7)
    problems, good, poor = [], [], []
    for i in range(n_problems):
        correct = (rng.random(n) < 0.4).tolist()
        votes = ["correct" if hit else f"incorrect {rng.integers(3)}" for hit in correct]
        problems.append(ProblemSamples(f"p{i}", correct, votes))
        good.append([float(np.clip(0.35 + 0.3 * hit + 0.15 * rng.normal(), 0, 1)) for hit in correct])
        poor.append([float(np.clip(0.45 + 0.05 * hit + 0.15 * rng.normal(), 0, 1)) for hit in correct])
    return problems, {"prm": good, "orm": poor}


def test_curve_against_the_single_functions() -> None:
    problems, scores = world()
    result = bon_curve(problems, [16, 1, 4], scores, **FAST)
    assert result.ks == (1, 4, 16)
    assert list(result.curves) == ["pass", "majority", "prm", "prm_vote", "orm", "orm_vote"]
    for name, curve in result.curves.items():
        assert curve[0].value == pytest.approx(np.mean([np.mean(p.correct) for p in problems])), name
    at4 = {name: curve[1] for name, curve in result.curves.items()}
    rows = list(zip(problems, scores["prm"], strict=True))
    assert at4["prm"].value == pytest.approx(np.mean([best_of_k(own, p.correct, 4) for p, own in rows]))
    assert at4["majority"].value == pytest.approx(np.mean([maj_at_k(p.votes, p.correct, 4) for p in problems]))
    assert at4["pass"].value >= max(each.value for each in at4.values())
    assert all(each.low < each.value < each.high for each in at4.values())
    assert result.unscored == {"prm": 0, "orm": 0}
    assert result.per_problem["prm"].shape == (60, 3)
    json.dumps(result.to_dict(), allow_nan=False)
    assert bon_curve(problems, [16, 1, 4], scores, **FAST).to_dict() == result.to_dict()


def test_differences_and_growth_are_paired() -> None:
    problems, scores = world()
    result = bon_curve(problems, [1, 2, 16], scores, **FAST)
    values = {name: [point.value for point in curve] for name, curve in result.curves.items()}
    assert len(result.differences) == 10 * 3
    for each in result.differences:
        i = result.ks.index(each.k)
        assert each.difference.value == pytest.approx(values[each.b][i] - values[each.a][i])
    prm_orm = next(d for d in result.differences if (d.a, d.b, d.k) == ("prm", "orm", 16))
    assert prm_orm.difference.high < 0  # the good scorer beats the poor one
    # From the smallest k above 1: at k = 1 all methods are equal.
    growth = next(g for g in result.growth if (g.a, g.b) == ("prm", "orm"))
    expected = (values["orm"][2] - values["prm"][2]) - (values["orm"][1] - values["prm"][1])
    assert growth.difference.value == pytest.approx(expected)
    assert growth.k == 16
    assert growth.difference.high < 0
    assert bon_curve(problems, [1, 2], scores, **FAST).growth == ()


def test_over_optimisation_shows() -> None:
    # The one highest-scored sample is incorrect, the next ones correct: best at a small k.
    problems = [
        ProblemSamples(f"p{i}", [False, *[True] * 4, *[False] * 11], ["w", *["r"] * 4, *["v"] * 11]) for i in range(9)
    ]
    scores: dict[str, list[Scores]] = {"prm": [[1.0, *[0.9] * 4, *[0.1] * 11]] * 9}
    result = bon_curve(problems, [1, 2, 4, 8, 16], scores, **FAST)
    values = [point.value for point in result.curves["prm"]]
    assert result.ks[int(np.argmax(values))] == 4
    assert values[-1] == 0.0


def test_unequal_numbers_of_samples() -> None:
    problems = [ProblemSamples("a", [True] * 4, ["1"] * 4), ProblemSamples("b", [False] * 6, ["1"] * 6)]
    scores: dict[str, list[Scores]] = {"prm": [[0.5, None, 0.5, 0.5], [0.5] * 6]}
    assert bon_curve(problems, [4], scores, **FAST).unscored == {"prm": 1}
    with pytest.raises(ConfigError, match=r"the samples of every problem, and 'a' has 4"):
        bon_curve(problems, [2, 5], scores)


def test_bad_input() -> None:
    one = [ProblemSamples("a", [True, False], ["1", "2"])]
    for problems, ks, scores, error, message in [
        ([], [1], {}, ConfigError, "found 0 problems"),
        (one, [], {}, ConfigError, r"found 1 problems, ks=\[\]"),
        (one, [0], {}, ConfigError, r"ks=\[0\]"),
        (one, [1], {"majority": [[0.1, 0.2]]}, ConfigError, "would share a name"),
        (one, [1], {"x": [[0.1, 0.2]], "x_vote": [[0.1, 0.2]]}, ConfigError, "would share a name"),
        (one, [1], {"x": [[0.1]]}, DataError, "problem 'a', score 'x': 2 samples need a finite score each"),
        (one, [1], {"x": [[0.1, math.nan]]}, DataError, "problem 'a', score 'x': 2 samples need a finite score"),
        (one, [1], {"x": [[0.1, -1.0]]}, DataError, r"problem 'a', score 'x': score -1\.0 is negative"),
    ]:
        with pytest.raises(error, match=message):
            bon_curve(problems, ks, scores)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="k=3 samples of 2"):
        best_of_k([0.1, 0.2], [True, False], 3)
    with pytest.raises(DataError, match="2 samples need a finite score each"):
        best_of_k([0.1], [True, False], 1)


# --- curves from files ------------------------------------------------------------------------------------------------


def row(problem: str, sample: int, correct: bool, score: float | None, answer: str = "4") -> dict[str, Any]:
    completion = f"2+2={answer}\n#### {answer}" if correct else "2+2=5\n#### 5"
    return {
        "problem_id": problem, "sample": sample, "completion": completion, "answer": answer, "correct": correct,
        "score": score,
    }  # fmt: skip


ROWS = [row("p", 0, True, 0.9), row("p", 1, False, 0.2), row("q", 0, False, 0.8), row("q", 1, True, 0.1)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


def test_curves_by_hand(tmp_path: Path) -> None:
    good = [dict(each, score=float(each["correct"])) for each in ROWS]
    files = {"prm": write(tmp_path / "a.jsonl", ROWS), "oracle": write(tmp_path / "b.jsonl", good[::-1])}
    result = best_of_n_from_files(files)
    assert result.ks == (1, 2)
    assert result.problems == 2
    assert [each.value for each in result.curves["pass"]] == [0.5, 1.0]
    assert [each.value for each in result.curves["prm"]] == [0.5, 0.5]  # correct on p, incorrect on q
    assert [each.value for each in result.curves["oracle"]] == [0.5, 1.0]
    assert [each.value for each in result.curves["majority"]] == pytest.approx([0.5, 0.5])


def test_spellings_of_an_incorrect_answer_are_not_outvoted_by_fewer_correct_ones(tmp_path: Path) -> None:
    """Two spellings of a correct answer against three of an incorrect one: the incorrect one has the majority."""
    texts = [(r"\frac{1}{2}", True), ("0.5", True), (r"\frac{1}{3}", False), ("2/6", False), (r"\frac{2}{6}", False)]
    rows = [
        {**row("p", i, correct, 0.5), "completion": f"#### {text}", "answer": "1/2"}
        for i, (text, correct) in enumerate(texts)
    ]
    result = best_of_n_from_files({"prm": write(tmp_path / "a.jsonl", rows)}, ks=[5])
    assert result.curves["majority"][0].value == 0.0
    assert result.curves["pass"][0].value == 1.0


def test_what_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(ConfigError, match="needs at least one file"):
        best_of_n_from_files({})
    with pytest.raises(ConfigError, match="would share a name: rename the scores, 'pass' and 'majority' are taken"):
        best_of_n_from_files({"majority": path})
    with pytest.raises(ConfigError, match=r"scored different completions \(1 are in one only\)"):
        best_of_n_from_files({"a": path, "b": write(tmp_path / "b.jsonl", ROWS[:-1])})
    with pytest.raises(DataError, match=r"line 2.*'score'.*stepkd score"):
        best_of_n_from_files({"a": write(tmp_path / "c.jsonl", [ROWS[0], {"problem_id": "p", "correct": True}])})
    for value in (float("nan"), float("inf"), "0.5", True):
        with pytest.raises(
            DataError, match=r"e\.jsonl, line 2, column 'score': .* is no score: a finite number, or null"
        ):
            best_of_n_from_files({"a": write(tmp_path / "e.jsonl", [ROWS[0], ROWS[1] | {"score": value}])})
    other = [dict(ROWS[0], completion="1+3=4\n#### 4"), *ROWS[1:]]
    with pytest.raises(ConfigError, match=r"different solutions under one id \(sample 0 of problem 'p'\)"):
        best_of_n_from_files({"a": path, "b": write(tmp_path / "f.jsonl", other)})
    with pytest.raises(DataError, match=r"--solutions\.dedupe false"):
        best_of_n_from_files({"a": write(tmp_path / "g.jsonl", [{**ROWS[0], "labelling": {"dedupe": True}}])})
    with pytest.raises(DataError, match="give graded completions"):
        best_of_n_from_files({"a": write(tmp_path / "d.jsonl", [{**ROWS[0], "correct": None}])})
    with pytest.raises(DataError, match=r"sample 0 of problem 'p' occurs twice"):
        best_of_n_from_files({"a": write(tmp_path / "e.jsonl", [ROWS[0], ROWS[0]])})
