"""Folders as commands leave them, written by hand: small, quick, with texts that try to be more than text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from left import begin, evaluation_rows, scored_rows, search_rows

from stepkd.evaluation.metrics import summarise
from stepkd.evaluation.process import summarise_process
from stepkd.evaluation.search_summary import summarise_search
from stepkd.labels.quality import summarise_labels
from stepkd.runs.files import write_json, write_jsonl


@pytest.fixture
def evaluation(tmp_path: Path) -> Callable[..., Path]:
    """Writes the folder of an evaluation."""

    def make(name: str, answers: str = "cfil", minute: int = 10, *, finished: bool = True, **more: Any) -> Path:
        rows = more.pop("rows", None) or evaluation_rows(answers)
        folder = tmp_path / name
        benchmark = {"name": "task", "data": more.pop("data", "same"), "options": {"task": "modular"}}
        sampling = {"n": 2, "temperature": more.pop("temperature", 1.0)}
        begin(
            folder,
            "evaluation",
            minute,
            benchmark=benchmark,
            model={"name": f"{tmp_path}/m"},
            sampling=sampling,
            **more,
        )
        if finished:
            write_jsonl(folder / "results.jsonl", rows)
            write_json(folder / "summary.json", {**summarise(rows, (1, 2)), "benchmark": "task", "model": "m"})
        else:
            (folder / "parts" / "problems").mkdir(parents=True)
            write_jsonl(folder / "parts" / "problems" / "000000.jsonl", rows)
        return folder

    return make


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    """The folder of a scoring job."""
    begin(tmp_path / "scores", "scoring job", 20, scorer={"scorer": "prm", "model": "runs/prm"}, reduction="product")
    write_jsonl(tmp_path / "scores" / "results.jsonl", scored_rows())
    write_json(tmp_path / "scores" / "summary.json", {"rows": 8})
    return tmp_path / "scores"


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    """The folder of a labelling job, of the solutions that ``scores`` scored."""
    begin(tmp_path / "labels", "labelling job", 15, labeller={"labeller": "checker"}, model={"name": "student"})
    rows = scored_rows(scores=False)
    write_jsonl(tmp_path / "labels" / "labels.jsonl", rows)
    write_json(tmp_path / "labels" / "summary.json", summarise_labels([{"row": row} for row in rows], 8, 0, []))
    return tmp_path / "labels"


@pytest.fixture
def judgement(tmp_path: Path) -> Path:
    """The folder of ``stepkd evaluate-prm``."""
    rows = [
        {
            "id": f"gsm8k/{number}",
            "index": number,
            "set": "gsm8k",
            "prompt": f"2+{number}",
            "completions": ["a", f"b{number}"],
            "scores": [0.9, 0.3 + number / 10],
            "labels": [True, number > 2],
            "first_error": -1 if number > 2 else 1,
        }
        for number in range(6)
    ]
    begin(
        tmp_path / "judged",
        "judgement of a step scorer",
        25,
        scorer={"scorer": "prm"},
        benchmark={"name": "processbench"},
    )
    write_jsonl(tmp_path / "judged" / "results.jsonl", rows)
    write_json(tmp_path / "judged" / "summary.json", summarise_process(rows))
    return tmp_path / "judged"


@pytest.fixture
def search(tmp_path: Path) -> Path:
    """The folder of ``stepkd search``."""
    names = ("greedy", "self_consistency@4", "best_of_n@4", "beam@4x2")
    kinds = dict(zip(names, ("Greedy", "BestOfN", "BestOfN", "Beam"), strict=True))
    methods = {name: {"class_path": f"stepkd.search.{kind}", "init_args": {}} for name, kind in kinds.items()}
    engine = {"engine": {"name": "Transformers"}, "versions": {"transformers": "5.0.0"}, "samples": 4}
    begin(tmp_path / "search", "search", 28, methods=methods, benchmark={"name": "task"}, **engine)
    rows = search_rows()
    write_jsonl(tmp_path / "search" / "results.jsonl", rows)
    summary = summarise_search(rows, names, (1, 2, 4), reduction="product", n_resamples=100)
    write_json(tmp_path / "search" / "summary.json", {"benchmark": "task", "model": "m", **summary})
    return tmp_path / "search"


@pytest.fixture
def training(tmp_path: Path) -> Callable[..., Path]:
    """Writes a run folder with curves, and rollouts where it is told."""

    def make(name: str, method: str = "SFTModule", *, rollouts: bool = False) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        marker = {"kind": "fit", "created": "2026-01-01T00:05:00+00:00", "status": "finished", "stepkd": "0.2.0"}
        write_json(folder / "run.json", marker)
        settings: dict[str, Any] = {"trainer": {"max_steps": 40}, "data": {"init_args": {"global_batch_size": 8}}}
        own = {"policy": {"path": f"{tmp_path}/labels/x"}, "hub": {"token": "hf_secret"}, "optimizer": {"lr": 0.001}}
        settings["model"] = {"class_path": f"stepkd.modules.{method}", "init_args": own}
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
        lines = [
            {"run": 1, "step": at, "seconds": at, "train/loss": 4.0 - at / 20, "train/lr": 1.0} for at in range(40)
        ]
        lines.append({"run": 1, "step": 39, "seconds": 40, "val/loss": 2.5})
        lines.append({"run": 1, "step": 20, "seconds": 40, "val/loss": 3.5})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if rollouts:
            samples = [
                {
                    "id": "r0",
                    "prompt": "3+4",
                    "answer": "7",
                    "steps": ["3+4=7\n", "#### 7"],
                    "step_scores": [0.25, 0.75],
                    "reward": 0.5,
                    "rewards": {"accuracy": 0.5},
                    "correct": True,
                    "cut_off": False,
                    "tokens": 9,
                }
            ]
            entries = [{"step": at, "lengths": {"edges": [0, 1], "counts": [1]}, "samples": samples} for at in (0, 20)]
            (folder / "samples.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        return folder

    return make


@pytest.fixture
def claim(tmp_path: Path) -> Path:
    """The folder of a claim's run, with a job below that is not looked into."""
    folder = tmp_path / "claim"
    begin(folder, "claim", 30)
    begin(folder / "units" / "main" / "seed-0" / "sampled", "evaluation", 31)
    number = {"value": 0.25, "low": 0.125, "high": 0.375, "per_seed": [0.2, 0.3]}
    statement = number | {"text": "pass@1: b > a", "metric": "pass@1", "paper": "+3.0", "verdict": "reproduced"}
    found = {"claim": "B beats A.", "source": "arXiv 0000.00000", "verdict": "reproduced", "statements": [statement]}
    found |= {"metrics": {"main": {"a": {"pass@1": number}, "b": {"pass@1": number}}}, "seeds": [0, 1], "quick": True}
    write_json(folder / "summary.json", {"b_beats_a": found})
    return folder


@pytest.fixture
def iterated(tmp_path: Path) -> Path:
    """The folder of ``stepkd iterate``."""
    begin(tmp_path / "iterated", "iterated training", 35, settings={"iterations": 1})
    metric = {"value": 0.5, "low": 0.4, "high": 0.6, "method": "wilson"}
    names = ("greedy_pass@1", "pass@1", "maj@4", "step_accuracy", "correct_with_incorrect_step", "mean_tokens")
    metrics = dict.fromkeys(names, metric) | {"kl_per_solution": None}
    minus = {name: {"value": 0.0625, "low": 0.03, "high": 0.09} for name in names}
    models = [
        {"name": "M0", "metrics": metrics, "minus_M0": None},
        {"name": "M1", "metrics": metrics, "minus_M0": minus},
    ]
    write_json(tmp_path / "iterated" / "summary.json", {"models": models, "problems": 64, "samples": 4})
    return tmp_path / "iterated"


@pytest.fixture
def write() -> Callable[..., None]:
    """Writes a value as JSON, and its folder."""

    def make(path: Path, value: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))

    return make


@pytest.fixture
def quickstart(
    tmp_path: Path, evaluation: Callable[..., Path], scores: Path, labels: Path, training: Callable[..., Path]
) -> Path:
    """The folder of a quick start, with what its stages left."""
    curve = {"ks": [1, 2], "problems": 9, "curves": {"pass": [{"value": 0.5, "low": 0.4, "high": 0.6}] * 2}}
    begin(tmp_path, "quick start", 0, task="modular:terms=4", scale=0.05)
    write_json(tmp_path / "summary.json", {"stages": {"teacher": {"steps": 2}, "prm": {"best_of_n": curve}}})
    evaluation("evaluations/teacher-sampled", "cccc", minute=11)
    evaluation("evaluations/student-sampled", "cfil", minute=12)
    training("student", rollouts=True)
    return tmp_path
