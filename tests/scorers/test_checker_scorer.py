"""The exact checker as a scorer."""

from __future__ import annotations

import pytest

from stepkd.errors import ConfigError, DataError
from stepkd.scorers import CheckerScorer, Solutions
from stepkd.tasks import check_row, make_rows
from stepkd.tasks.rows import Noise


def test_scores_are_the_labels_of_noisy_solutions() -> None:
    rows = make_rows("modular:terms=4", 40, seed=3, noise=Noise(rate=0.3))
    scorer = CheckerScorer()
    scores = scorer.score([Solutions(row, [row["steps"], row["steps"][:2]]) for row in rows])
    for row, (whole, start) in zip(rows, scores, strict=True):
        assert whole == [float(label) for label in row["step_labels"]]
        assert start == whole[:2]
    assert {value for pair in scores for value in pair[0]} == {0.0, 1.0}
    assert scorer.meaning == "correctness"
    assert scorer.provenance() == {"scorer": "checker", "given": "truth", "meaning": "correctness"}


def test_given_the_claims_a_step_is_judged_by_the_steps_before_it() -> None:
    rows = make_rows("modular:terms=4", 40, seed=3, noise=Noise(rate=0.3))
    problems = [Solutions(row, [row["steps"]]) for row in rows]
    truth, claims = (CheckerScorer(given=given).score(problems) for given in ("truth", "claims"))
    for row, (scores,) in zip(rows, claims, strict=True):
        assert scores == [float(right) for right in check_row(row, row["steps"], given="claims")]
    assert truth != claims


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match="unknown given 'trut': did you mean 'truth'"):
        CheckerScorer(given="trut")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="row x, column 'answer': missing"):
        CheckerScorer().score([Solutions({"id": "x", "prompt": "1"}, [["a"]])])
