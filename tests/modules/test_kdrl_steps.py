"""Step credit, and what is kept of rollouts to look at."""

from __future__ import annotations

import importlib.util
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from stepkd.cli import main
from stepkd.data.io import read_samples
from stepkd.errors import ConfigError, DataError, TrainingError
from stepkd.modules.kdrl_settings import PolicyLossConfig, SampleLogConfig, StepCreditConfig
from stepkd.modules.rewards import RewardConfig
from stepkd.modules.rollouts import SampleLog

WORKER = Path(__file__).with_name("kdrl_worker.py")
_SPEC = importlib.util.spec_from_file_location("kdrl_worker", WORKER)
assert _SPEC is not None
worker = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(worker)  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def rows() -> list[Any]:
    return list(worker.examples())


class ByLength:
    """A scorer that tells the steps of a random model apart."""

    meaning = "correctness"

    def score(self, problems: Any) -> list[list[list[float]]]:
        return [[[len(step) % 4 / 3 for step in steps] for steps in problem.solutions] for problem in problems]


@pytest.mark.parametrize("discount", [1.0, 0.5, 0.0])
def test_step_credit(discount: float, rows: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewards of steps: a token has the sum of those of its step and of later ones, normalised in its group."""
    monkeypatch.setattr("stepkd.modules.step_scores.load_scorer", lambda *_, **__: ByLength())
    same = [RewardConfig("format", options={"pattern": "never"})]
    settings = {
        "teacher": None,
        "step_credit": StepCreditConfig("checker", outcome_weight=0.0, discount=discount),
        "rewards": same,
    }
    module = worker.run(rows, policy_loss=PolicyLossConfig(equal_groups="drop"), **settings)
    rollouts = module.kept[0]
    rewards = [[len(step) % 4 / 3 for step in rollout.steps] for rollout in rollouts]
    assert max(map(len, rewards)) > 1
    of_group: dict[int, list[float]] = {}
    for rollout, own in zip(rollouts, rewards, strict=True):
        of_group.setdefault(rollout.group, []).extend(own)
    for rollout, own in zip(rollouts, rewards, strict=True):
        every = torch.tensor(of_group[rollout.group], dtype=torch.float64)
        spread = every.std() + 1e-4 if len(every) > 1 else torch.tensor(1.0)
        normal = [float((value - every.mean()) / spread) for value in own]
        ends = [end for _, end in rollout.spans[: len(own)]]
        wanted = []
        for t in range(len(rollout.token_ids)):
            later = [n for n, end in zip(normal, ends, strict=True) if end > t]
            wanted.append(sum(n * discount**away for away, n in enumerate(later)))
        assert list(rollout.advantages) == pytest.approx(wanted, abs=1e-9)
    # Answers that are all incorrect have nothing to say, their steps do: none of these groups is dropped.
    assert any(rollout.advantages.any() for rollout in rollouts)
    assert all(rollout.pg_count > 0 for rollout in rollouts if rollout.advantages.any())


def test_a_scorer_of_whole_solutions_credits_no_steps(rows: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ByLength, "meaning", "outcome")
    monkeypatch.setattr("stepkd.modules.step_scores.load_scorer", lambda *_, **__: ByLength())
    with pytest.raises(ConfigError, match=r"step_credit\.scorer=orm scores whole solutions"):
        worker.run(rows, teacher=None, step_credit=StepCreditConfig("orm"))


def test_steps_may_be_worth_what_they_add(rows: list[Any]) -> None:
    """The scorer ``gain`` reads the rows' solutions."""
    module = worker.run(rows, teacher=None, step_credit=StepCreditConfig("gain"))
    scores = [score for rollout in module.kept[0] for score in rollout.step_scores]
    assert len(set(scores)) > 3
    assert all(0 <= score <= 1 for score in scores)


# ---- samples ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def logged(rows: list[Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A run of three steps that keeps samples of the first and the third."""
    folder = tmp_path_factory.mktemp("run")
    settings = {"step_credit": StepCreditConfig("gain"), "samples": SampleLogConfig(every=2, number=6)}
    return worker.run(rows, steps=3, teacher=None, folder=folder, **settings), folder


def test_entries_are_what_was_sampled(logged: tuple[Any, Path], rows: list[Any]) -> None:
    module, folder = logged
    entries = read_samples(folder)
    assert [entry["step"] for entry in entries] == [0, 2]
    for entry, rollouts in zip(entries, module.kept[::2], strict=True):
        lengths = [len(rollout.token_ids) for rollout in rollouts]
        edges, counts = entry["lengths"]["edges"], entry["lengths"]["counts"]
        assert counts == [sum(low < n <= high for n in lengths) for low, high in pairwise(edges)]
        assert sum(counts) == len(rollouts)
        assert edges[-1] == worker.ROLLOUT.sampling.max_new_tokens
        # One of every prompt, then second ones.
        groups = {rollout.id for rollout in rollouts}
        assert {sample["id"] for sample in entry["samples"][: len(groups)]} == groups
        assert len(entry["samples"]) == 6
        written = {(r.id, "".join(r.steps)): r for r in rollouts}
        for sample in entry["samples"]:
            rollout = written[sample["id"], "".join(sample["steps"])]
            assert sample["tokens"] == len(rollout.token_ids)
            assert sample["step_scores"] == list(rollout.step_scores)
            assert len(sample["step_scores"]) == len(sample["steps"])
            assert sample["reward"] == rollout.reward
            assert (sample["correct"], sample["cut_off"]) == (rollout.correct, rollout.cut_off)


def test_a_torn_line_and_a_step_taken_again(logged: tuple[Any, Path], tmp_path: Path) -> None:
    """A crash in the middle of a line costs that line; what comes after it stands on its own."""
    module, folder = logged
    path = tmp_path / "samples.jsonl"
    whole = (folder / "samples.jsonl").read_text()
    path.write_text(whole + whole.splitlines()[1][:50])
    log = SampleLog(SampleLogConfig(every=1, number=1), tmp_path, 40)
    log(2, module.kept[0], torch.device("cpu"), writes=True)
    log(3, module.kept[0], torch.device("cpu"), writes=False)
    entries = read_samples(path)
    assert [(entry["step"], len(entry["samples"])) for entry in entries] == [(0, 6), (2, 1)]


def test_a_file_that_cannot_be_written(logged: tuple[Any, Path], tmp_path: Path) -> None:
    module, _ = logged
    (tmp_path / "samples.jsonl").mkdir()
    log = SampleLog(SampleLogConfig(every=1), tmp_path, 40)
    with pytest.raises(TrainingError, match=r"samples\.jsonl: Is a directory\. The samples before are intact"):
        log(0, module.kept[0], torch.device("cpu"), writes=True)


def test_the_command_shows_them(
    logged: tuple[Any, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    _, folder = logged
    entries = read_samples(folder)
    assert main(["samples", str(folder), "--number", "1"]) == 0
    shown = capsys.readouterr().out
    assert "step 2, 0" in shown
    assert "step 0" not in shown
    sample = entries[1]["samples"][0]
    assert f"{sample['tokens']} tokens" in shown
    assert f"{sample['step_scores'][0]:.2f}" in shown
    assert main(["report", str(folder), "--out", str(tmp_path / "report.html")]) == 0
    assert "step 0, 0" in (tmp_path / "report.html").read_text()
    assert main(["samples", str(folder), "--step", "1"]) == 2
    assert "of [0, 2]" in capsys.readouterr().err


def test_runs_without_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["samples", str(tmp_path)]) == 2
    assert "holds nothing that a command left" in capsys.readouterr().err
    (tmp_path / "samples.jsonl").write_text(json.dumps({"step": 0})[:-3])
    with pytest.raises(DataError, match="not one whole entry"):
        read_samples(tmp_path)
