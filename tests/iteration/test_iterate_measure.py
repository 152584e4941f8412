"""Metrics of held-out rows against counts by hand, and the divergence against an enumeration."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from stepkd.data.config import parse_spec
from stepkd.data.load import load_rows
from stepkd.data.templates import get_template
from stepkd.errors import DataError
from stepkd.evaluation.metrics import paired_differences, ratio_difference
from stepkd.iteration.measure import (
    divergence,
    model_metrics,
    notes,
    print_summary,
    problem_rows,
)
from stepkd.iteration.stages import fingerprint
from stepkd.labels.job import drawn_records, run_label_job
from stepkd.labels.labellers import TaskChecker
from stepkd.labels.settings import LabelConfig, Sampled
from stepkd.models.checkpoint import save_policy
from stepkd.models.policy import Policy
from stepkd.models.spec import PolicyConfig
from stepkd.sampling.engine import SamplingConfig


def sample(correct: bool, labels: list[bool] | None, *, tokens: int = 4, vote: str = "1", ratio: Any = 0.0) -> Any:
    return {
        "verdict": "correct" if correct else "incorrect",
        "tokens": tokens,
        "finish": "stop",
        "vote": vote,
        "step_labels": labels,
        "log_ratio": ratio,
    }


def row(name: str, *samples: Any) -> dict[str, Any]:
    return {"id": name, "samples": list(samples)}


ROWS = [
    row("a", sample(True, [True, True]), sample(True, [True, False], tokens=6), sample(False, None, vote="2")),
    row("b", sample(False, [False], vote="3"), sample(True, None, tokens=2), sample(False, [True], vote="3")),
]
GREEDY = [row("a", sample(True, None)), row("b", sample(False, None))]


def values(metrics: Any) -> dict[str, float | None]:
    return {name: None if metric is None else metric["value"] for name, metric in metrics.items()}


def test_metrics_by_hand() -> None:
    found = values(model_metrics(ROWS, GREEDY, n_resamples=200))
    assert found == {
        "greedy_pass@1": 0.5,
        "pass@1": pytest.approx(3 / 6),
        "maj@3": 0.5,  # a: two of three votes for the correct answer; b: two votes for 3
        "step_accuracy": pytest.approx(4 / 6),
        "correct_with_incorrect_step": 0.5,  # two correct answers have step labels, one of them an incorrect step
        "mean_tokens": pytest.approx(24 / 6),
        "truncated_rate": 0.0,
        "kl_per_solution": 0.0,
        "kl_per_token": 0.0,
    }


def test_without_step_labels_there_is_no_step_metric() -> None:
    rows = [row("a", sample(True, None), sample(False, None))]
    found = values(model_metrics(rows, GREEDY, n_resamples=50))
    assert (found["step_accuracy"], found["correct_with_incorrect_step"]) == (None, None)


def test_divergence_is_sum_over_solutions_and_tokens() -> None:
    rows = [
        row("a", sample(True, None, ratio=1.5, tokens=3), sample(True, None, ratio=-0.5, tokens=1)),
        row("b", sample(True, None, ratio=0.5, tokens=4), sample(True, None, ratio=0.0, tokens=2)),
    ]
    found = divergence(rows, n_resamples=100)
    assert found["kl_per_solution"]["value"] == pytest.approx(1.5 / 4)
    assert found["kl_per_token"]["value"] == pytest.approx(1.5 / 10)
    unknown = [row("a", sample(True, None, ratio=None))]
    assert divergence(unknown) == {"kl_per_solution": None, "kl_per_token": None}


def test_divergence_estimate_covers_the_enumerated_value() -> None:
    """Samples of a categorical distribution: the interval holds sum p log(p/q) for nearly every draw."""
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    truth = float((p * np.log(p / q)).sum())
    covered = 0
    for seed in range(40):
        drawn = np.random.default_rng(seed).choice(3, p=p, size=(40, 4))
        rows = [
            row(str(i), *(sample(True, None, ratio=math.log(p[x] / q[x]), tokens=1) for x in problem))
            for i, problem in enumerate(drawn)
        ]
        interval = divergence(rows, n_resamples=400)["kl_per_solution"]
        covered += interval["low"] <= truth <= interval["high"]
    assert covered >= 34


def test_differences_pair_the_problems() -> None:
    better = [
        row("b", sample(True, [True]), sample(True, [True]), sample(True, [True])),
        row("a", sample(True, [True]), sample(True, [True, True]), sample(True, [True])),
    ]
    found = values(paired_differences(better, ROWS, n_resamples=100))
    assert found["pass@1"] == pytest.approx(0.5)
    assert found["correct_with_incorrect_step"] == pytest.approx(-0.5)
    assert found["step_accuracy"] == pytest.approx(1 - 4 / 6)
    assert found["mean_tokens"] == pytest.approx(0.0)
    unlabelled = [row(name, sample(True, None)) for name in "ab"]
    assert paired_differences(unlabelled, ROWS, n_resamples=10)["step_accuracy"] is None


def test_ratio_difference_is_narrower_than_unpaired() -> None:
    """Two models that fail on the same problems differ little: pairing shows it."""
    rng = np.random.default_rng(0)
    hard = rng.random(200) < 0.5
    counts = np.stack([hard * 4, np.full(200, 4), hard * 4, np.full(200, 4)], axis=1).astype(float)
    assert ratio_difference(counts, n_resamples=200).to_dict()["high"] == 0.0
    shuffled = counts.copy()
    shuffled[:, 2] = rng.permutation(counts[:, 2])
    assert ratio_difference(shuffled, n_resamples=200).high > 0.05


def test_log_ratios_are_those_of_the_models(tmp_path: Any) -> None:
    """A whole measurement on two tiny models against log-probabilities computed here."""
    for seed in (0, 1):
        save_policy(Policy.load(PolicyConfig(path="tiny-0.1m", init_seed=seed, dtype="float64")), tmp_path / f"m{seed}")
    spec = LabelConfig(
        out=str(tmp_path / "samples"),
        solutions=Sampled(
            problems='task:task="modular:terms=3,modulus=2",n=3,split=test',
            model=str(tmp_path / "m1"),
            sampling=SamplingConfig(n=2, max_new_tokens=8),
            dedupe=False,
        ),
        labeller=TaskChecker(),
        device="cpu",
    )
    run_label_job(spec)
    rows = problem_rows(tmp_path / "samples", tmp_path / "samples", spec, seed_model=str(tmp_path / "m0"))
    own = problem_rows(tmp_path / "samples", None, spec, seed_model=str(tmp_path / "m1"))
    assert {each["log_ratio"] for problem in own for each in problem["samples"]} == {0.0}
    assert all(each["step_labels"] is None for problem in own for each in problem["samples"])
    solutions = spec.solutions
    assert isinstance(solutions, Sampled)
    problems = load_rows(parse_spec(solutions.problems))
    drawn = drawn_records(tmp_path / "samples")
    for model_seed, sign in ((1, 1.0), (0, -1.0)):
        policy = Policy.load(PolicyConfig(path=str(tmp_path / f"m{model_seed}"), dtype="float64"))
        for problem, record, found in zip(problems, drawn, rows, strict=True):
            assert found["id"] == problem["id"] == record["id"]
            for each, stored in zip(found["samples"], record["samples"], strict=True):
                text = get_template("task").render(problem, policy.tokenizer)
                prompt = policy.tokenizer(text)["input_ids"]
                ids = torch.tensor([[*prompt, *stored["token_ids"]]])
                with torch.no_grad():
                    logps = policy.causal_lm(ids).logits[0].log_softmax(-1)
                each["log_ratio"] -= sign * sum(
                    float(logps[len(prompt) - 1 + t, token]) for t, token in enumerate(stored["token_ids"])
                )
    assert max(abs(each["log_ratio"]) for problem in rows for each in problem["samples"]) < 1e-6
    hot = replace(spec, solutions=replace(solutions, sampling=replace(solutions.sampling, temperature=0.5)))
    cold = problem_rows(tmp_path / "samples", None, hot, seed_model=str(tmp_path / "m0"))
    assert cold[0]["samples"][0]["log_ratio"] is None


def test_fingerprints_see_changes(tmp_path: Any) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_bytes(bytes(5_000))
    (folder / "config.json").write_text("{}")
    before = fingerprint(folder)
    assert before == fingerprint(folder)
    (folder / "weights").write_bytes(bytes(4_999) + b"\1")
    assert fingerprint(folder) != before
    assert fingerprint(folder / "weights") != fingerprint(folder / "config.json")
    with pytest.raises(DataError, match="a finished stage made it"):
        fingerprint(tmp_path / "absent")


def test_fingerprints_take_in_the_chat_templates_that_a_tokenizer_keeps_in_a_folder(tmp_path: Any) -> None:
    templates = tmp_path / "model" / "additional_chat_templates"
    templates.mkdir(parents=True)
    (templates / "tools.jinja").write_text("a")
    before = fingerprint(tmp_path / "model")
    (templates / "tools.jinja").write_text("b")
    assert fingerprint(tmp_path / "model") != before


def test_the_table_names_what_was_dropped() -> None:
    metrics = model_metrics(ROWS, GREEDY, n_resamples=20)
    minus = {
        "greedy_pass@1": {"value": 0.1, "low": None, "high": None},
        **paired_differences(ROWS, ROWS, n_resamples=20),
    }
    training = {
        "problems": 2,
        "solutions": 6,
        "labelled": 5,
        "dropped": {"duplicate": 1},
        "correct_answers": 3,
        "incorrect_answers": 2,
        "correct_with_incorrect_step": 1,
        "converted": {"to": "demonstrations", "counts": {"rows": 3, "incorrect_answer": 2}},
        "rows": 3,
    }
    summary = {
        "problems": 2,
        "samples": 3,
        "labeller": "MonteCarlo",
        "models": [
            {"name": "M0", "metrics": metrics, "minus_M0": None, "training": None},
            {"name": "M1", "metrics": metrics | {"kl_per_solution": None}, "minus_M0": minus, "training": training},
        ],
    }
    lines = notes(summary)
    assert any("continuations of M0" in line for line in lines)
    assert any("temperature 1" in line for line in lines)
    console = Console(width=100, record=True)
    print_summary(console, summary)
    text = console.export_text()
    assert "majority of 3" in text
    rows = {words[0].strip(): words[1:] for line in text.splitlines() if len(words := line.strip("│ ").split("│")) == 3}
    assert [cell.strip() for cell in rows["correct answers, greedy,"]] == ["-", "+10.0"]
    assert [cell.strip() for cell in rows["correct answers, sampled,"]] == ["-", "+0.0"]
    assert [cell.strip() for cell in rows["dropped"]] == ["-", "1 duplicate"]
    assert [cell.strip() for cell in rows["converted"]] == ["-", "3 rows"]
    assert [cell.strip() for cell in rows["with an incorrect step"]] == ["-", "1"]
    assert "2 incorrect answer" in text
