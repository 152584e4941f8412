"""Every package reads step labels by one rule, and counts correct answers with an incorrect step by one tally."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from stepkd.claims.jobs import problem_columns
from stepkd.data.collate import Batch, collate
from stepkd.data.completion import Completion
from stepkd.data.encode import LabelRule, step_targets
from stepkd.data.feedback import feedback_counts
from stepkd.data.sources.contract_rows import trl_row
from stepkd.errors import DataError
from stepkd.evaluation.config import EvaluatePRMConfig
from stepkd.evaluation.first_error import predicted_first_error
from stepkd.evaluation.metrics import paired_differences, summarise
from stepkd.evaluation.score_rows import evaluate_process
from stepkd.evaluation.step_metrics import labelled_steps, step_metrics
from stepkd.labels.convert import Preference, TRLStepwise, consensus_filter, convert_rows
from stepkd.labels.labellers import ScorerLabeller, Solution
from stepkd.labels.quality import label_quality, summarise_labels
from stepkd.labels.settings import StepPairConfig
from stepkd.labels.step_pairs import first_incorrect_step
from stepkd.losses import step_kto
from stepkd.modules.step_scores import FocusConfig
from stepkd.modules.validation import MOST_SHOWN, SampledAccuracy
from stepkd.runs.files import write_jsonl
from stepkd.runs.job import read_results
from stepkd.scorers.scorer import Meaning, Solutions
from stepkd.steps.labels import tally

Rule = Callable[[list[float], float], list[bool]]
"""Step labels (or scores) and a threshold to which steps a package takes for correct."""


class Says:
    """A scorer whose score of a step is the step's text."""

    meaning: Meaning = "correctness"

    def score(self, problems: Sequence[Solutions]) -> list[list[list[float]]]:
        return [[[float(step) for step in steps] for steps in problem.solutions] for problem in problems]

    def provenance(self) -> dict[str, Any]:
        return {}


def stepwise(*labels: Any) -> dict[str, Any]:
    return {"id": "r", "prompt": "?", "completions": [str(label) for label in labels], "labels": list(labels)}


def true(label: float) -> dict[str, Any]:
    return stepwise(label) | {"labels": [True]}


def completion(*labels: float, **given: Any) -> dict[str, Any]:
    steps = [f"{label}\n" for label in labels]
    row = {"id": "p/0", "problem_id": "p", "prompt": "?", "completion": "".join(steps), "steps": steps, "model": "m"}
    row |= {"token_ids": [*range(len(steps))], "logprobs": [-1.0] * len(steps), "correct": False, "finish": "stop"}
    row |= {"step_ends": [*range(1, len(steps) + 1)], "step_labels": list(labels), "sampling": {}, "seed": 0}
    return row | given


def each(correct: Callable[[float, float], bool]) -> Rule:
    """A package that is asked about one label at a time."""
    return lambda labels, threshold: [correct(label, threshold) for label in labels]


def to(kind: Any, column: str, make: Callable[..., dict[str, Any]]) -> Rule:
    return lambda labels, t: convert_rows([make(*labels)], kind(threshold=t)).rows[0][column]


def hardened(num_classes: int) -> Rule:
    def rule(labels: list[float], threshold: float) -> list[bool]:
        targets = step_targets(
            stepwise(*labels), len(labels), num_classes, LabelRule(harden=threshold, after_error="keep")
        )
        return [target is not None and target[-1] == 1 for target in targets]

    return rule


def kept_behind(label: float, threshold: float) -> bool:
    """Whether hardened training keeps the step behind a label."""
    return step_targets(stepwise(label, 1.0), 2, 2, LabelRule(harden=threshold))[1] is not None


def clean(label: float) -> bool:
    rows = [completion(label, correct=True), completion(1.0, id="p/1", completion="other", correct=False)]
    try:
        return bool(convert_rows(rows, Preference(chosen_steps="clean")).rows)
    except DataError:  # none is left
        return False


def no_pair(label: float, threshold: float) -> bool:
    spec = StepPairConfig(out="unused", completions="unused", threshold=threshold)
    return first_incorrect_step(completion(label, 1.0), spec) == "no_incorrect_step"


def judged(labels: list[float], threshold: float) -> list[bool]:
    solution = Solution(np.empty(0), np.empty(0), id="r", index=0, correct=None, steps=tuple(map(str, labels)))
    return list(ScorerLabeller(Says(), threshold=threshold).label([solution])[0].labels)  # type: ignore[arg-type]


PACKAGES: dict[str, Rule] = {
    "--to trl": to(TRLStepwise, "labels", stepwise),
    "trl_row": lambda labels, t: (trl_row(stepwise(*labels), threshold=t) or {})["labels"],
    "hardened PRM": hardened(2),
    "hardened PRM of three classes": hardened(3),
    "hardened PRM, cut at the first error": each(kept_behind),
    "Step-DPO": each(no_pair),
    "judge": judged,
    "focus": lambda labels, t: [weight == 0 for weight in FocusConfig("checker", threshold=t).weights(labels)],
    "ProcessBench": each(lambda label, t: predicted_first_error([label], t) == -1),
    "step accuracy": each(
        lambda label, t: bool(step_metrics(labelled_steps([[label]], [[True]]), threshold=t).accuracy.value)
    ),
}


def batched(label: float) -> tuple[Completion, Batch]:
    """A completion of one step with this label, and its batch."""
    ids: Any = (np.array([1]), np.array([2]), np.array([1]))
    completion = Completion(*ids, targets=tuple(step_targets(stepwise(label), 1, 2, LabelRule())), read_at=(0,))
    return completion, collate([completion], 0)


AT_A_HALF: dict[str, Callable[[float], bool]] = {
    "--to preference": clean,
    "summary": lambda label: bool(summarise_labels([{"row": stepwise(label)}], 1, 0, [])["balance"]["correct"]),
    "quality": lambda label: bool(label_quality([stepwise(label)], [true(label)]).accuracy.value),
    "training, step labels": lambda label: batched(label)[0].step_labels == (1,),
    "training, steps": lambda label: batched(label)[1].label_S.tolist() == [1],
    "training, labelled steps": lambda label: batched(label)[1].correct_L.all().item(),
    "training, tokens": lambda label: batched(label)[1].correct_N.all().item(),
    "consensus": lambda label: bool(consensus_filter([stepwise(label)], [true(label)]).counts["kept"]),
}


@pytest.mark.parametrize("package", PACKAGES)
def test_at_least_the_threshold_is_correct_in_every_package(package: str) -> None:
    for labels, threshold in (([1.0, 0.5, 0.25], 0.5), ([1.0, 0.25, 0.5, 0.75], 0.75), ([0.125, 0.0], 0.125)):
        assert PACKAGES[package](labels, threshold) == [label >= threshold for label in labels]


@pytest.mark.parametrize("package", AT_A_HALF)
def test_a_half_is_correct_where_no_threshold_is_given(package: str) -> None:
    assert [AT_A_HALF[package](label) for label in (1.0, 0.5, 0.25)] == [True, True, False]


def test_evaluation_writes_the_same_verdicts(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [stepwise(1.0, 0.5, 0.25)])
    spec = EvaluatePRMConfig(
        scorer="says", sets=(f"rows:path={tmp_path}/rows.jsonl",), out=str(tmp_path / "out"), max_rows=8
    )
    evaluate_process(spec, Says())
    (result,) = read_results(tmp_path / "out")
    assert (result["labels"], result["first_error"]) == ([True, True, False], 2)


Judged = tuple[bool, list[bool | None] | None]
"""Whether the answer is correct, and what the labels say of the steps."""
CORRECT: list[Judged] = [
    *[(True, [True, True, True]), (True, [True, False, True]), (True, [False, None, None])],  # labelled
    *[(True, None), (True, [True, None, None])],  # a step may still be incorrect
]
JUDGED = [*CORRECT, (False, [False]), (False, None)]


def problem(judged: Sequence[Judged]) -> list[dict[str, Any]]:
    samples = [
        {
            "verdict": "correct" if good else "incorrect",
            "finish": "stop",
            "tokens": 3,
            "vote": "1",
            "step_labels": labels,
        }
        for good, labels in judged
    ]
    return [{"id": "p", "samples": samples}]


def labelled(judged: Sequence[Judged]) -> list[dict[str, Any]]:
    return [
        completion(*(labels or [None] * 3), id=f"p/{i}", completion=f"{i}", correct=good)  # type: ignore[arg-type]
        for i, (good, labels) in enumerate(judged)
    ]


def evaluation(judged: Sequence[Judged]) -> float | None:
    share: float | None = summarise(problem(judged), n_resamples=10)["metrics"]["correct_with_incorrect_step"]["value"]
    return share


def iteration(judged: Sequence[Judged]) -> float | None:
    base = problem([(True, [True])])
    found = paired_differences(problem(judged), base, n_resamples=10)["correct_with_incorrect_step"]
    return None if found is None else float(found["value"])


def claims(judged: Sequence[Judged]) -> float | None:
    ((flawed, among),) = problem_columns(problem(judged))["correct_with_incorrect_step"]
    return flawed / among if among else None


def validation(judged: Sequence[Judged]) -> float | None:
    sampled = SimpleNamespace(_judged=lambda *_: (None, [problem(judged)[0]["samples"]]), shown=[None] * MOST_SHOWN)
    sums = SampledAccuracy.__call__(sampled, SimpleNamespace(examples=[None]), None, None)  # type: ignore[arg-type]
    return SampledAccuracy.rates(sums).get("correct_with_incorrect_step")


def signs(labels: list[bool | None] | None) -> tuple[int, ...]:
    return tuple(-1 if label is None else int(label) for label in labels or [None] * 3)


def training(judged: Sequence[Judged]) -> float | None:
    steps = [(number, label) for number, (_, labels) in enumerate(judged) for label in signs(labels)]
    numbers, labels = (torch.tensor(each) for each in zip(*steps, strict=True))
    outcomes = torch.tensor([int(good) for good, _ in judged])
    flawed, among = step_kto(torch.zeros(len(steps)), labels, numbers, outcomes, beta=0.1).metrics[
        "labels/correct_with_incorrect_step"
    ]
    return float(flawed / among) if among else None


@pytest.mark.parametrize("package", [evaluation, iteration, claims, validation, training])
def test_every_package_takes_the_share_of_the_labelled_correct_answers(
    package: Callable[[Sequence[Judged]], float | None],
) -> None:
    assert package(JUDGED) == pytest.approx(2 / 3)
    assert package([(True, [True, None]), (False, [False])]) is None, "no correct answer whose steps are labelled"
    assert tally(*zip(*JUDGED, strict=True)).share == pytest.approx(2 / 3)


NO_IDS = np.zeros(0)


def as_targets(labels: Sequence[int]) -> tuple[tuple[float, ...] | None, ...]:
    """Signs of steps as what a completion has of them."""
    return tuple(None if label < 0 else (1.0 - label, float(label)) for label in labels)


@pytest.mark.parametrize(
    "count",
    [
        lambda judged: summarise_labels([{"row": row} for row in labelled(judged)], 7, 0, [])[
            "correct_with_incorrect_step"
        ],
        lambda judged: feedback_counts(
            [Completion(NO_IDS, NO_IDS, outcome=int(good), targets=as_targets(signs(s))) for good, s in judged]
        )["correct_with_incorrect_step"],
    ],
    ids=["labelling", "Step-KTO's data"],
)
def test_every_package_counts_the_same_correct_answers_with_an_incorrect_step(
    count: Callable[[Sequence[Judged]], int],
) -> None:
    assert count(JUDGED) == 2
