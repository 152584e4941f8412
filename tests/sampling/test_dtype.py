"""``dtype: auto``: what it decides, that it is decided once for a job, and where it is refused."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stepkd.cli.parser import parse
from stepkd.errors import ConfigError, StepkdError
from stepkd.evaluation.config import EvaluateConfig, ScoreConfig
from stepkd.evaluation.runner import evaluate
from stepkd.labels.job import run_label_job
from stepkd.labels.labellers import TaskChecker
from stepkd.labels.settings import LabelConfig, Sampled
from stepkd.models.checkpoint import load_trained
from stepkd.models.packed import PACKED_FROM
from stepkd.models.spec import PolicyConfig
from stepkd.runs.job import Job, JobOptions, read_settings
from stepkd.sampling import decode
from stepkd.sampling import dtype as dtypes
from stepkd.sampling.config import Transformers, VLLMServer
from stepkd.sampling.dtype import faster_dtype, measured_dtype
from stepkd.sampling.engine import SamplingConfig

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("bfloat16", "float32", "taken"),
    [(1.0, 2.0, "bfloat16"), (0.89, 1.0, "bfloat16"), (0.91, 1.0, "float32"), (1.0, 1.0, "float32"), (9, 1, "float32")],
)
def test_bfloat16_must_save_a_tenth(bfloat16: float, float32: float, taken: str) -> None:
    assert faster_dtype({"bfloat16": bfloat16, "float32": float32}) == taken


@pytest.mark.parametrize("has", [True, False])
def test_a_gpu_is_asked_and_not_timed(has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: has)
    assert measured_dtype(pytest.fail, torch.device("cuda"), 64) == ("bfloat16" if has else "float32")


def test_a_cpu_without_bfloat16_takes_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dtypes, "fast_bfloat16", lambda: False)
    assert measured_dtype(pytest.fail, CPU, 64) == "float32"


def test_another_cpu_times_both(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, timed, limits = [], {}, list[int]()
    packed = decode.packed_weights

    def load(*, dtype: str) -> Any:
        loaded.append(dtype)
        return load_trained("tiny-0.1m", dtype=dtype)

    monkeypatch.setattr(dtypes, "fast_bfloat16", lambda: True)
    monkeypatch.setattr(dtypes, "faster_dtype", lambda seconds: timed.update(seconds) or "float32")
    monkeypatch.setattr(decode, "packed_weights", lambda *given: limits.append(given[2]) or packed(*given))
    assert measured_dtype(load, CPU, 3) == "float32"
    assert loaded == ["bfloat16", "float32"]
    assert set(timed) == {*loaded}
    assert [limit >= PACKED_FROM for limit in limits] == [False, True] * 2, "weights are packed as in jobs, once warm"
    assert all(each > 0 for each in timed.values())


def test_rank_0_measures_and_others_and_later_starts_are_told(tmp_path: Path) -> None:
    def job(rank: int, world_size: int = 2, **more: Any) -> Job:
        return Job(tmp_path / "out", "test", options=JobOptions(rank=rank, world_size=world_size, **more))

    told = []
    waits = threading.Thread(target=lambda: told.append(job(1).settled("model.dtype", pytest.fail)))
    waits.start()
    first = job(0)
    assert first.settled("model.dtype", lambda: "bfloat16") == "bfloat16"
    assert not told
    first.begin({"model": {"dtype": "bfloat16"}})
    waits.join(timeout=60)
    assert told == ["bfloat16"]
    assert job(0).settled("model.dtype", pytest.fail) == "bfloat16"
    assert job(0, 1, overwrite=True).settled("model.dtype", lambda: "float32") == "float32"
    with pytest.raises(StepkdError, match="rank 1 waits for what rank 0 measures"):
        Job(tmp_path / "none", "test", options=JobOptions(rank=1, world_size=2, wait_s=0)).settled("dtype", pytest.fail)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a measurement says; it fails where it says nothing."""
    said: list[str] = []
    monkeypatch.setattr(dtypes, "measured_dtype", lambda *_: said.pop())
    return said


def test_an_evaluation_keeps_what_was_measured(tmp_path: Path, taken: list[str]) -> None:
    config = EvaluateConfig(
        model="tiny-0.1m",
        benchmark="task",
        data="task=modular:terms=3,n=4",
        out=str(tmp_path / "out"),
        sampling=SamplingConfig(temperature=0.0, max_new_tokens=4),
        engine=Transformers(1),
        dtype="auto",
        device="cpu",
    )
    taken.append("bfloat16")
    assert evaluate(config, options=JobOptions(rank=0, world_size=2)) == {}
    summary = evaluate(config, options=JobOptions(rank=1, world_size=2))  # on a machine that would say something else
    assert summary["settings"]["dtype"] == "bfloat16"
    named = evaluate(replace(config, out=str(tmp_path / "named"), dtype="bfloat16"))
    assert named["metrics"] == summary["metrics"]
    with pytest.raises(ConfigError, match="dtype: 'bfloat16' then, 'float32' now"):
        evaluate(replace(config, dtype="float32"))
    with pytest.raises(ConfigError, match="a server samples in its own type"):
        evaluate(replace(config, out=str(tmp_path / "other"), engine=VLLMServer("http://localhost:1")))


def test_a_labelling_job_keeps_what_was_measured(tmp_path: Path, taken: list[str]) -> None:
    config = LabelConfig(
        solutions=Sampled(
            problems="task:task=modular:terms=3,n=2",
            model="tiny-0.1m",
            sampling=SamplingConfig(n=1, max_new_tokens=8),
        ),
        labeller=TaskChecker(),
        out=str(tmp_path / "out"),
        dtype="auto",
        device="cpu",
    )
    taken.append("bfloat16")
    run_label_job(config)
    assert read_settings(tmp_path / "out")["model"]["dtype"] == "bfloat16"
    run_label_job(config)
    with pytest.raises(ConfigError, match=r"model\.dtype: 'bfloat16' then, 'float32' now"):
        run_label_job(replace(config, dtype="float32"))
    with pytest.raises(ConfigError, match="dtype=auto is measured for a model that the job loads"):
        run_label_job(replace(config, out=str(tmp_path / "given")), policy=load_trained("tiny-0.1m"))


def test_it_is_refused_with_the_reason_for_training_and_scores() -> None:
    reason = "auto is measured, for jobs that sample .* the numbers would depend on the machine"
    with pytest.raises(ConfigError, match=rf"policy\.dtype=auto: {reason}"):
        PolicyConfig(dtype="auto")  # type: ignore[arg-type]
    words = ["--scorer", "PRM", "--scorer.path", "x", "--scorer.dtype", "auto", "--completions", "x", "--out", "x"]
    with pytest.raises(ConfigError, match=rf"scorer\.dtype: {reason}"):
        parse(ScoreConfig, words, command="score")
