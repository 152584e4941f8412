"""Evaluation runs: what they write, how they resume, and that batches do not change what is sampled."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import stepkd.evaluation.disk as disk
import stepkd.evaluation.store as store
from stepkd.data.templates import PromptTemplate, get_template
from stepkd.errors import ConfigError, DataError, ModelError, StepkdError
from stepkd.evaluation import runner
from stepkd.evaluation.manifest import read_manifest
from stepkd.evaluation.metrics import summarise
from stepkd.evaluation.runner import EvaluationSpec, evaluate
from stepkd.evaluation.store import read_rows
from stepkd.models import Policy, PolicySpec
from stepkd.models.checkpoint import tokenizer_fingerprint
from stepkd.runs.files import write_json

TASK = "task=modular:terms=3,n=7"  # the data of the `spec` fixture
FILES = ["manifest.json", "results.jsonl", "summary.json"]


def results(out: str | Path) -> list[dict[str, Any]]:
    """Rows without their wall time."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in read_rows(Path(out) / FILES[1])]


def samples(out: str | Path) -> list[Any]:
    return [row["samples"] for row in results(out)]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ---- what a run leaves behind --------------------------------------------------------------------------------------


def test_folder(spec: EvaluationSpec, policy: Policy) -> None:
    reports: list[tuple[int, int]] = []

    def report(done: int, total: int, figures: dict[str, float]) -> None:
        assert set(figures) == {"accuracy", "tokens_per_second"}
        reports.append((done, total))

    sampled = replace(spec, samples=3, temperature=1.0, limit=5, max_rows=6)
    summary = evaluate(sampled, policy=policy, report=report)
    assert sorted(path.name for path in Path(spec.out).iterdir()) == FILES
    assert reports == [(2, 5), (4, 5), (5, 5)]

    rows = read_rows(Path(spec.out) / "results.jsonl")
    assert [row["index"] for row in rows] == list(range(5))
    assert list(rows[0]) == ["batch", "batch_rows", "id", "index", "prompt", "answer", "samples", "seconds"]
    assert rows[0]["prompt"].endswith("=\n")
    assert all(len(row["samples"]) == 3 for row in rows)
    assert {len({s["completion"] for s in row["samples"]}) for row in rows} == {3}, "samples differ"

    written = json.loads((Path(spec.out) / "summary.json").read_text())
    assert written == {key: value for key, value in summary.items() if key != "manifest"}
    again = summarise(rows, [1, 2, 3], seed=0)
    assert {key: written[key] for key in again} == json.loads(json.dumps(again)), "recomputable from the rows"
    assert {"pass@1", "pass@2", "pass@3", "maj@2", "maj@3", "step_accuracy"} <= set(written["metrics"])
    assert written["tokens_per_second"] == pytest.approx(written["total_tokens"] / sum(row["seconds"] for row in rows))
    assert (written["benchmark"], written["model"], written["samples"]) == ("task", "tiny-0.1m", 15)


def test_manifest(spec: EvaluationSpec, policy: Policy) -> None:
    manifest = evaluate(replace(spec, limit=2, stop=("x",), seed=7), policy=policy)["manifest"]
    assert manifest == read_manifest(spec.out)
    assert manifest["model"]["name"] == "tiny-0.1m"
    assert re.fullmatch("[0-9a-f]{16}", manifest["model"]["weights"])
    assert manifest["prompt"] == get_template("task").prompt_id(policy.tokenizer)
    assert (manifest["dtype"], manifest["seed"], manifest["backend"], manifest["device"]) == (
        "float64", 7, "transformers", "cpu"
    )  # fmt: skip
    assert manifest["sampling"] == {
        "n": 1, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 24, "stop": ["x"]
    }  # fmt: skip
    assert manifest["batch_size"] == 2
    assert manifest["benchmark"]["source"] == "task:test"
    assert manifest["benchmark"]["limit"] == 2
    assert {"stepkd", "torch", "transformers", "math-verify"} <= set(manifest["versions"])
    assert manifest["extra"]["extractors"] == ["hash"]
    assert manifest["extra"]["tokenizer"] == tokenizer_fingerprint(policy.tokenizer)
    assert manifest["extra"]["end_ids"] == [policy.tokenizer.eos_token_id]
    assert str(Path.home()) not in json.dumps(manifest)


def test_the_data_fingerprint_covers_the_whole_file(spec: EvaluationSpec, policy: Policy, tmp_path: Path) -> None:
    data = write(tmp_path / "p.jsonl", [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(4)])
    manifests = [
        evaluate(
            replace(spec, benchmark="rows", data=data, limit=limit, out=str(tmp_path / str(limit))), policy=policy
        )["manifest"]
        for limit in (1, 2)
    ]
    prints = [manifest["benchmark"]["data"] for manifest in manifests]
    assert prints[0] == prints[1]
    write(tmp_path / "p.jsonl", [{"prompt": f"{i}+1=", "answer": str(i + 2)} for i in range(4)])
    with pytest.raises(ConfigError, match=r"benchmark\.data: "):
        evaluate(replace(spec, benchmark="rows", data=data, limit=1, out=str(tmp_path / "1")), policy=policy)


def test_tokenizer_fingerprint_sees_the_vocabulary_and_not_the_last_call(policy: Policy) -> None:
    from stepkd.models.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(policy.tokenizer)
    tokenizer.add_tokens(["##"])
    assert tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(policy.tokenizer)


# ---- resuming ------------------------------------------------------------------------------------------------------


def test_cut_anywhere_the_run_ends_with_the_same_rows(spec: EvaluationSpec, policy: Policy, tmp_path: Path) -> None:
    sampled = replace(spec, samples=2, temperature=1.0, max_rows=4, max_new_tokens=12)
    whole = evaluate(sampled, policy=policy)
    expected, content = results(spec.out), (Path(spec.out) / "results.jsonl").read_bytes()
    for share in (0.0, 0.1, 0.35, 0.6, 0.99):
        out = tmp_path / f"cut {share}"
        out.mkdir()
        (out / "manifest.json").write_bytes((Path(spec.out) / "manifest.json").read_bytes())
        (out / "results.jsonl").write_bytes(content[: int(share * len(content))])
        summary = evaluate(replace(sampled, out=str(out)), policy=policy)
        assert results(out) == expected
        assert summary["metrics"] == whole["metrics"]
    # A finished run is not sampled again, only summarised, also for other k.
    before = (Path(spec.out) / "results.jsonl").read_bytes()
    assert set(evaluate(replace(sampled, ks=(2,)), policy=policy)["metrics"]) >= {"pass@1", "pass@2"}
    assert (Path(spec.out) / "results.jsonl").read_bytes() == before


@pytest.mark.slow
def test_sigkill_and_the_same_command(tmp_path: Path) -> None:
    task = "task=modular:terms=3,n=12"
    command = [
        sys.executable, "-m", "stepkd", "evaluate", "--model", "tiny-0.1m", "--benchmark", "task", "--data", task,
        "--max-new-tokens", "200", "--batch-size", "2", "--samples", "2", "--temperature", "1", "--dtype", "float64",
        "--device", "cpu", "--out",
    ]  # fmt: skip
    out, one_thread = tmp_path / "killed", os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, str(out)], env=one_thread, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if (out / "results.jsonl").is_file() and (out / "results.jsonl").stat().st_size > 0:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL, errors.decode()
    begun = results(out)
    assert 0 < len(begun) < 12
    assert not (out / "summary.json").exists()

    subprocess.run([*command, str(out)], env=one_thread, check=True, capture_output=True, timeout=120)
    subprocess.run([*command, str(tmp_path / "whole")], env=one_thread, check=True, capture_output=True, timeout=120)
    assert results(out) == results(tmp_path / "whole")
    assert {row["batch"]: row for row in begun}.items() <= {row["batch"]: row for row in results(out)}.items()
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (out, tmp_path / "whole")]
    for summary in summaries:
        del summary["tokens_per_second"]
    assert summaries[0] == summaries[1]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"seed": 1}, "seed: 0 then, 1 now"),
        ({"max_new_tokens": 8}, "sampling.max_new_tokens: 24 then, 8 now"),
        ({"max_rows": 3}, "batch_size: 2 then, 3 now"),
        ({"limit": 2}, "benchmark.limit: None then, 2 now"),
        ({"data": f"{TASK},limit=2"}, "benchmark.limit: None then, 2 now"),
        ({"data": f"{TASK},offset=1"}, "extra.offset: 0 then, 1 now"),
        ({"data": "task=modular:terms=4,n=7"}, "benchmark.data: "),
        ({"extractors": ("last_number",)}, "extra.extractors: "),
        ({"deadline_s": 1.0}, "extra.deadline_s: 2.0 then, 1.0 now"),
        ({"stop": ("\n",)}, "sampling.stop: "),
        ({"template": get_template("plain")}, "prompt: "),
        ({"model": "other"}, "model.name: 'tiny-0.1m' then, 'other' now"),
        ({"convention": "prm800k"}, "extra.convention: 'stepkd' then, 'prm800k' now"),
    ],
    ids=str,
)
def test_changed_settings_are_refused_by_name(
    spec: EvaluationSpec, policy: Policy, changes: dict[str, Any], key: str
) -> None:
    if not (Path(spec.out) / "manifest.json").exists():
        evaluate(spec, policy=policy)
    before = (Path(spec.out) / "results.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=rf"(?s)begun under other settings.*  {re.escape(key)}.*another --out"):
        evaluate(replace(spec, **changes), policy=policy)
    assert (Path(spec.out) / "results.jsonl").read_bytes() == before


def test_changed_weights_are_refused(spec: EvaluationSpec, policy: Policy) -> None:
    evaluate(spec, policy=policy)
    other = Policy.load(PolicySpec(path="tiny-0.1m", dtype="float64", init_seed=1))
    with pytest.raises(ConfigError, match=r"model\.weights: "):
        evaluate(spec, policy=other)


# ---- what does not change the results ------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [{}, {"samples": 3, "temperature": 1.0, "top_p": 0.95}], ids=["greedy", "sampled"])
def test_rows_do_not_depend_on_the_batch_size(
    spec: EvaluationSpec, policy: Policy, sampling: dict[str, Any], tmp_path: Path
) -> None:
    data = "task=modular:terms=2-6,n=9"  # prompts of different lengths, so that batches are padded
    found, logprobs = [], []
    for rows in (1, 2, 5, 64):
        out = str(tmp_path / str(rows))
        evaluate(replace(spec, **sampling, data=data, max_rows=rows, max_new_tokens=12, out=out), policy=policy)
        records = [sample for row in results(out) for sample in row["samples"]]
        logprobs.append([record.pop("logprob") for record in records])
        found.append(records)
    assert all(records == found[0] for records in found)
    assert all(values == pytest.approx(logprobs[0], abs=1e-9) for values in logprobs)


def test_rows_do_not_depend_on_the_limit(spec: EvaluationSpec, policy: Policy, tmp_path: Path) -> None:
    sampled = replace(spec, samples=2, temperature=1.0)
    evaluate(sampled, policy=policy)
    evaluate(replace(sampled, limit=3, out=str(tmp_path / "three")), policy=policy)
    assert [[s["completion"] for s in row] for row in samples(tmp_path / "three")] == [
        [s["completion"] for s in row] for row in samples(spec.out)[:3]
    ]


def test_loads_the_model_it_is_given(spec: EvaluationSpec, policy: Policy, tmp_path: Path) -> None:
    evaluate(replace(spec, limit=2), policy=policy)
    evaluate(replace(spec, limit=2, out=str(tmp_path / "loaded")))
    assert results(tmp_path / "loaded") == results(spec.out)
    manifest = evaluate(replace(spec, limit=1, dtype="float32", out=str(tmp_path / "single")))["manifest"]
    assert manifest["dtype"] == "float32"


# ---- prompts and data ----------------------------------------------------------------------------------------------


def test_template_overrides_change_prompt_and_id(spec: EvaluationSpec, policy: Policy, tmp_path: Path) -> None:
    base = PromptTemplate(style="plain", plain="Q: {prompt}\nA: ")
    templates = [base, replace(base, few_shot=1), replace(base, system="Be brief."), replace(base, style="chat")]
    ids, prompts = set(), set()
    for number, template in enumerate(templates):
        out = str(tmp_path / str(number))
        ids.add(evaluate(replace(spec, limit=1, template=template, out=out), policy=policy)["manifest"]["prompt"])
        prompts.add(results(out)[0]["prompt"])
    assert len(ids) == len(prompts) == len(templates)


@pytest.mark.parametrize("name", ["gsm8k", "math500"])
def test_real_problems(name: str, spec: EvaluationSpec, policy: Policy, data_dir: Path) -> None:
    summary = evaluate(
        replace(spec, benchmark=name, data=str(data_dir / name), limit=2, max_new_tokens=8), policy=policy
    )
    assert (summary["problems"], summary["metrics"]["mean_tokens"]["value"] <= 8) == (2, True)
    assert "step_accuracy" not in summary["metrics"]
    rows = results(spec.out)
    assert [row["index"] for row in rows] == [0, 1]
    assert all(row["answer"] for row in rows)


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 2}, "2 samples at temperature 0 would all be the same: set --temperature"),
        ({"limit": 0}, "limit=0: at least one problem"),
        ({"max_rows": 0}, "max_rows=0"),
        ({"ks": (2,)}, r"k=2 of pass@k: must lie between 1 and the number of samples per problem, 1"),
        ({"ks": (0,)}, "k=0 of pass@k"),
    ],
    ids=str,
)
def test_contradicting_settings(spec: EvaluationSpec, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(spec, **changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"benchmark": "gms8k"}, ConfigError, "unknown benchmark 'gms8k'. Did you mean 'gsm8k'?"),
        ({"extractors": ("hahs",)}, ConfigError, "hahs"),
        ({"deadline_s": 0.0}, ConfigError, "deadline_s is 0.0"),
        ({"convention": "prm"}, ConfigError, "convention is 'prm'; known: stepkd, prm800k"),
        ({"max_new_tokens": 0}, ConfigError, "max_new_tokens=0: must be at least 1"),
        ({"temperature": -1.0}, ConfigError, "temperature=-1.0"),
        ({"samples": 0}, ConfigError, "n=0: at least one sample per prompt"),
        ({"template": "gsm"}, ConfigError, "no prompt template named 'gsm'"),
        ({"device": "gpu"}, ConfigError, "device='gpu': must be auto, cpu, cuda or cuda:N"),
        ({"data": "nowhere.jsonl", "benchmark": "rows"}, DataError, "nowhere.jsonl: no such file"),
        ({"model": "tiny-0.2m"}, ModelError, "Did you mean 'tiny-0.5m'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_settings_leave_nothing_behind(
    spec: EvaluationSpec, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        evaluate(replace(spec, **changes))
    assert not Path(spec.out).exists()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "p.jsonl: the file holds no rows"),
        (['{"prompt": "1", "answer": "2"}', '{"prompt": "1"'], "p.jsonl, line 2"),
        (['{"prompt": "1"}'], "p.jsonl, line 1, column 'answer': missing column 'answer'"),
        (['{"prompt": 1, "answer": "2"}'], "p.jsonl, line 1, column 'prompt': must be text"),
        (['{"id": "a", "prompt": "1", "answer": "2"}'] * 2, "p.jsonl, column 'id': rows 1 and 2 share the id 'a'"),
        (
            ['{"id": "long", "prompt": "' + "1" * 1100 + '", "answer": "2"}'],
            "long, column 'prompt': the prompt has 1242 tokens and the model's context is 1024",
        ),
    ],
    ids=["empty", "corrupt", "missing", "type", "id", "long"],
)
def test_bad_files(spec: EvaluationSpec, policy: Policy, tmp_path: Path, lines: list[str], message: str) -> None:
    (tmp_path / "p.jsonl").write_text("".join(line + "\n" for line in lines))
    with pytest.raises(DataError, match=re.escape(message)):
        evaluate(replace(spec, benchmark="rows", data=str(tmp_path / "p.jsonl")), policy=policy)
    assert not Path(spec.out).exists()


def test_cuda_that_is_not_there(spec: EvaluationSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="device='cuda', but no CUDA device is available: use --device cpu"):
        evaluate(replace(spec, device="cuda"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"device='cuda:3', but this machine has 1 CUDA device\(s\)"):
        evaluate(replace(spec, device="cuda:3"))


def test_disk_full_while_writing_results(
    spec: EvaluationSpec, policy: Policy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    evaluate(replace(spec, out=str(tmp_path / "whole")), policy=policy)
    calls = 0

    def full(fd: int, data: bytes) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            os.write(fd, data[:40])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        disk.write_all(fd, data)

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_all", full)
        message = r"results\.jsonl: No space left on device .*Earlier results are intact \(4 problems\); make room"
        with pytest.raises(StepkdError, match=message):
            evaluate(spec, policy=policy)
    assert len(results(spec.out)) == 4
    evaluate(spec, policy=policy)
    assert results(spec.out) == results(tmp_path / "whole")


def _no_space(fd: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_disk_full_while_writing_the_summary(
    spec: EvaluationSpec, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, summary: dict[str, Any]) -> None:
        patch.setattr(os, "fsync", _no_space)
        write_json(path, summary)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "write_json", full)
        with pytest.raises(StepkdError, match=r"summary\.json: No space left on device"):
            evaluate(spec, policy=policy)
    assert len(results(spec.out)) == 7
    assert sorted(path.name for path in Path(spec.out).iterdir()) == FILES[:2]
    assert evaluate(spec, policy=policy)["problems"] == 7
