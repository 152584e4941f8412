"""Evaluation runs: what they write, how they resume, and that batches do not change what is sampled."""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stepkd.data.templates import PromptTemplate, get_template
from stepkd.errors import ConfigError, DataError, MachineError, ModelError, StepkdError
from stepkd.evaluation.config import EvaluateConfig
from stepkd.evaluation.metrics import summarise
from stepkd.evaluation.runner import evaluate
from stepkd.grading.pool import own_grader
from stepkd.models.checkpoint import tokenizer_fingerprint
from stepkd.models.policy import Policy
from stepkd.models.spec import PolicyConfig
from stepkd.runs.job import JobOptions, read_results, read_settings

TASK = "task=modular:terms=3,n=7"  # the data of the `spec` fixture
OUTPUTS = ("settings.json", "results.jsonl", "summary.json")
FOLDER = ["log", "parts", "results.jsonl", "settings.json", "summary.json"]
AGAIN = JobOptions(overwrite=True)


def whole(out: str | Path) -> list[bytes]:
    """What an evaluation leaves, without its parts and its log."""
    return [(Path(out) / name).read_bytes() for name in OUTPUTS]


def names(out: str | Path) -> list[str]:
    return sorted(path.name for path in Path(out).iterdir())


def samples(out: str | Path) -> list[Any]:
    return [row["samples"] for row in read_results(out)]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ---- what a run leaves behind --------------------------------------------------------------------------------------


def changed(spec: EvaluateConfig, **changes: Any) -> EvaluateConfig:
    """The settings with others in place of some, wherever they stand."""
    for part in ("sampling", "grading", "engine"):
        own = {name: changes.pop(name) for name in list(changes) if hasattr(getattr(spec, part), name)}
        spec = replace(spec, **{part: replace(getattr(spec, part), **own)})
    return replace(spec, **changes)


def test_folder(spec: EvaluateConfig, policy: Policy) -> None:
    reports: list[tuple[int, int]] = []

    def report(phase: str, done: int, total: int, figures: Any) -> None:
        assert (phase, set(figures)) == ("problems", {"correct", "tokens/s"})
        reports.append((done, total))

    sampled = changed(spec, n=3, temperature=1.0, limit=5, max_rows=6)
    summary = evaluate(sampled, policy=policy, options=JobOptions(report=report))
    assert names(spec.out) == FOLDER
    assert reports == [(2, 5), (4, 5), (5, 5)]

    rows = read_results(spec.out)
    assert [row["index"] for row in rows] == list(range(5))
    assert list(rows[0]) == ["id", "index", "prompt", "answer", "samples"]
    assert rows[0]["prompt"].endswith("=\n")
    assert all(len(row["samples"]) == 3 for row in rows)
    assert {len({s["completion"] for s in row["samples"]}) for row in rows} == {3}, "samples differ"

    written = json.loads((Path(spec.out) / "summary.json").read_text())
    assert written == {key: value for key, value in summary.items() if key != "settings"}
    again = summarise(rows, [1, 2, 3], seed=0)
    assert {key: written[key] for key in again} == json.loads(json.dumps(again)), "recomputable from the rows"
    assert {"pass@1", "pass@2", "pass@3", "maj@2", "maj@3", "step_accuracy"} <= set(written["metrics"])
    assert (written["benchmark"], written["model"], written["samples"]) == ("task", "tiny-0.1m", 15)


def test_times_and_hosts_stand_in_the_log_only(spec: EvaluateConfig, policy: Policy) -> None:
    evaluate(spec, policy=policy)
    log = [json.loads(line) for line in (Path(spec.out) / "log" / "rank-0.jsonl").read_text().splitlines()]
    assert log[0]["host"]
    assert all(entry["seconds"] > 0 and entry["tokens/s"] > 0 for entry in log[1:])
    for content in whole(spec.out):
        assert not re.search(rb"seconds|_per_second|tokens/s|created|host", content)
        assert log[0]["host"].encode() not in content or len(log[0]["host"]) < 3


def test_settings(spec: EvaluateConfig, policy: Policy) -> None:
    settings = evaluate(changed(spec, limit=2, stop=("x",), seed=7), policy=policy)["settings"]
    assert settings == read_settings(spec.out)
    assert settings["model"]["name"] == "tiny-0.1m"
    assert re.fullmatch("[0-9a-f]{16}", settings["model"]["weights"])
    assert settings["prompt"] == get_template("task").prompt_id(policy.tokenizer)
    assert (settings["dtype"], settings["seed"], settings["engine"]["name"], settings["device"]) == (
        "float64", 7, "Transformers", "cpu"
    )  # fmt: skip
    assert settings["sampling"] == {
        "n": 1, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 24, "stop": ["x"]
    }  # fmt: skip
    assert settings["batch_size"] == 2
    assert settings["benchmark"]["source"] == "task:test"
    assert settings["benchmark"]["limit"] == 2
    assert set(settings["versions"]) == {"stepkd", "torch", "transformers", "peft", "math-verify"}
    assert settings["threads"] >= 1
    assert settings["extractors"] == ["hash"]
    assert settings["tokenizer"] == tokenizer_fingerprint(policy.tokenizer)
    assert settings["end_ids"] == [policy.tokenizer.eos_token_id]
    for private in (platform.node(), str(Path.cwd()), str(Path.home())):
        assert len(private) < 3 or private not in json.dumps(settings)


def test_the_data_fingerprint_covers_the_whole_file(spec: EvaluateConfig, policy: Policy, tmp_path: Path) -> None:
    data = write(tmp_path / "p.jsonl", [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(4)])
    found = [
        evaluate(
            changed(spec, benchmark="rows", data=data, limit=limit, out=str(tmp_path / str(limit))), policy=policy
        )["settings"]
        for limit in (1, 2)
    ]
    prints = [settings["benchmark"]["data"] for settings in found]
    assert prints[0] == prints[1]
    write(tmp_path / "p.jsonl", [{"prompt": f"{i}+1=", "answer": str(i + 2)} for i in range(4)])
    with pytest.raises(ConfigError, match=r"benchmark\.data: "):
        evaluate(changed(spec, benchmark="rows", data=data, limit=1, out=str(tmp_path / "1")), policy=policy)


def test_tokenizer_fingerprint_sees_the_vocabulary_and_not_the_last_call(policy: Policy) -> None:
    from stepkd.models.spec import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(policy.tokenizer)
    tokenizer.add_tokens(["##"])
    assert tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(policy.tokenizer)


# ---- resuming ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2])
def test_whatever_is_missing_the_run_ends_with_the_same_bytes(
    spec: EvaluateConfig, policy: Policy, tmp_path: Path, ranks: int
) -> None:
    sampled = changed(spec, n=2, temperature=1.0, max_rows=4, max_new_tokens=12)
    uninterrupted = evaluate(sampled, policy=policy)
    assert len(list((Path(spec.out) / "parts" / "problems").iterdir())) == 4
    for kept in (0, 1, 3):
        out = tmp_path / f"kept {kept}"
        shutil.copytree(spec.out, out, ignore=shutil.ignore_patterns("results.jsonl", "summary.json"))
        for part in sorted((out / "parts" / "problems").iterdir())[kept:]:
            part.unlink()
        summaries = [
            evaluate(changed(sampled, out=str(out)), policy=policy, options=JobOptions(rank=rank, world_size=ranks))
            for rank in range(ranks)
        ]
        assert summaries[-1]["metrics"] == uninterrupted["metrics"]
        assert whole(out) == whole(spec.out)
    # A finished run is not sampled again, only summarised, also for other k.
    before = (Path(spec.out) / "results.jsonl").read_bytes()
    assert set(evaluate(changed(sampled, ks=(2,)), policy=policy)["metrics"]) >= {"pass@1", "pass@2"}
    assert (Path(spec.out) / "results.jsonl").read_bytes() == before


def test_a_rank_that_is_done_leaves_the_results_to_the_last_one(spec: EvaluateConfig, policy: Policy) -> None:
    assert evaluate(spec, policy=policy, options=JobOptions(rank=1, world_size=2)) == {}
    assert names(spec.out) == ["log", "parts", "settings.json"]
    assert len(read_results(spec.out)) == 3, "what there is so far can be read"
    assert evaluate(spec, policy=policy, options=JobOptions(rank=0, world_size=2))["problems"] == 7
    assert names(spec.out) == FOLDER


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"seed": 1}, "seed: 0 then, 1 now"),
        ({"max_new_tokens": 8}, "sampling.max_new_tokens: 24 then, 8 now"),
        ({"max_rows": 3}, "batch_size: 2 then, 3 now"),
        ({"limit": 2}, "benchmark.limit: None then, 2 now"),
        ({"data": f"{TASK},limit=2"}, "benchmark.limit: None then, 2 now"),
        ({"data": f"{TASK},offset=1"}, "benchmark.offset: 0 then, 1 now"),
        ({"data": "task=modular:terms=4,n=7"}, "benchmark.data: "),
        ({"extractors": ("last_number",)}, "extractors: "),
        ({"deadline_s": 1.0}, "deadline_s: 2.0 then, 1.0 now"),
        ({"memory_mb": 512}, "memory_mb: 1024 then, 512 now"),
        ({"stop": ("\n",)}, "sampling.stop: "),
        ({"template": get_template("plain")}, "prompt: "),
        ({"model": "other"}, "model.name: 'tiny-0.1m' then, 'other' now"),
        ({"convention": "prm800k"}, "convention: 'stepkd' then, 'prm800k' now"),
    ],
    ids=str,
)
def test_changed_settings_are_refused_by_name(
    spec: EvaluateConfig, policy: Policy, changes: dict[str, Any], key: str
) -> None:
    evaluate(spec, policy=policy)
    before = whole(spec.out)
    with pytest.raises(ConfigError, match=rf"(?s)begun under other settings.*  {re.escape(key)}.*another --out"):
        evaluate(changed(spec, **changes), policy=policy)
    assert whole(spec.out) == before


def test_a_grader_of_ones_own_decides_and_another_is_refused(
    spec: EvaluateConfig, policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "grades_all.py"
    file.write_text("def judge(text, reference, row):\n    return row['answer'] == reference and 'task' in row\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = changed(spec, grader="grades_all.judge", limit=2)
    summary = evaluate(spec, policy=policy)
    assert summary["metrics"]["pass@1"]["value"] == 1.0
    assert summary["settings"]["grader"]["name"] == "grades_all.judge"
    file.write_text(file.read_text() + "# another\n")
    own_grader.cache_clear()
    with pytest.raises(ConfigError, match=r"(?s)begun under other settings.*  grader\.sha256: "):
        evaluate(spec, policy=policy)
    with pytest.raises(ConfigError, match=r"(?s)begun under other settings.*  grader\.name: 'grades_all\.judge' then"):
        evaluate(changed(spec, grader=None), policy=policy)


def test_changed_weights_are_refused(spec: EvaluateConfig, policy: Policy) -> None:
    evaluate(spec, policy=policy)
    other = Policy.load(PolicyConfig(path="tiny-0.1m", dtype="float64", init_seed=1))
    with pytest.raises(ConfigError, match=r"model\.weights: "):
        evaluate(spec, policy=other)


# ---- what does not change the results ------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [{}, {"n": 3, "temperature": 1.0, "top_p": 0.95}], ids=["greedy", "sampled"])
def test_rows_do_not_depend_on_the_batch_size(
    spec: EvaluateConfig, policy: Policy, sampling: dict[str, Any], tmp_path: Path
) -> None:
    data = "task=modular:terms=2-6,n=9"  # prompts of different lengths, so that batches are padded
    found, logprobs = [], []
    for rows in (1, 2, 5, 64):
        out = str(tmp_path / str(rows))
        evaluate(changed(spec, **sampling, data=data, max_rows=rows, max_new_tokens=12, out=out), policy=policy)
        records = [sample for row in read_results(out) for sample in row["samples"]]
        logprobs.append([record.pop("logprob") for record in records])
        found.append(records)
    assert all(records == found[0] for records in found)
    assert all(values == pytest.approx(logprobs[0], abs=1e-9) for values in logprobs)


def test_rows_do_not_depend_on_the_limit(spec: EvaluateConfig, policy: Policy, tmp_path: Path) -> None:
    sampled = changed(spec, n=2, temperature=1.0)
    evaluate(sampled, policy=policy)
    evaluate(changed(sampled, limit=3, out=str(tmp_path / "three")), policy=policy)
    assert [[s["completion"] for s in row] for row in samples(tmp_path / "three")] == [
        [s["completion"] for s in row] for row in samples(spec.out)[:3]
    ]


def test_loads_the_model_it_is_given(spec: EvaluateConfig, policy: Policy, tmp_path: Path) -> None:
    evaluate(changed(spec, limit=2), policy=policy)
    evaluate(changed(spec, limit=2, out=str(tmp_path / "loaded")))
    assert whole(tmp_path / "loaded") == whole(spec.out)
    settings = evaluate(changed(spec, limit=1, dtype="float32", out=str(tmp_path / "single")))["settings"]
    assert settings["dtype"] == "float32"


# ---- prompts and data ----------------------------------------------------------------------------------------------


def test_template_overrides_change_prompt_and_id(spec: EvaluateConfig, policy: Policy, tmp_path: Path) -> None:
    base = PromptTemplate(style="plain", plain="Q: {prompt}\nA: ")
    templates = [base, replace(base, few_shot=1), replace(base, system="Be brief."), replace(base, style="chat")]
    ids, prompts = set(), set()
    for number, template in enumerate(templates):
        out = str(tmp_path / str(number))
        ids.add(evaluate(changed(spec, limit=1, template=template, out=out), policy=policy)["settings"]["prompt"])
        prompts.add(read_results(out)[0]["prompt"])
    assert len(ids) == len(prompts) == len(templates)


@pytest.mark.parametrize("name", ["gsm8k", "math500"])
def test_real_problems(name: str, spec: EvaluateConfig, policy: Policy, data_dir: Path) -> None:
    summary = evaluate(
        changed(spec, benchmark=name, data=str(data_dir / name), limit=2, max_new_tokens=8), policy=policy
    )
    assert (summary["problems"], summary["metrics"]["mean_tokens"]["value"] <= 8) == (2, True)
    assert "step_accuracy" not in summary["metrics"]
    rows = read_results(spec.out)
    assert [row["index"] for row in rows] == [0, 1]
    assert all(row["answer"] for row in rows)


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 2}, "2 samples at temperature 0 would all be the same: set sampling.temperature"),
        ({"limit": 0}, "limit=0: must be at least 1"),
        ({"max_rows": 0}, "max_rows=0"),
        ({"benchmark": "aime24", "benchmark_samples": True}, "64 samples at temperature 0 would all be the same"),
        ({"ks": (2,)}, r"k=2 of pass@k: must lie between 1 and the number of samples per problem, 1"),
        ({"ks": (0,)}, "k=0 of pass@k"),
    ],
    ids=str,
)
def test_contradicting_settings(spec: EvaluateConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        changed(spec, **changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"benchmark": "gms8k"}, ConfigError, "unknown benchmark 'gms8k'. Did you mean 'gsm8k'?"),
        ({"extractors": ("hahs",)}, ConfigError, "hahs"),
        ({"deadline_s": 0.0}, ConfigError, "grading.deadline_s=0.0: must be positive"),
        ({"convention": "prm"}, ConfigError, "unknown grading.convention 'prm'"),
        ({"max_new_tokens": 0}, ConfigError, "max_new_tokens=0: must be at least 1"),
        ({"temperature": -1.0}, ConfigError, "temperature=-1.0"),
        ({"n": 0}, ConfigError, "n=0: must be at least 1"),
        ({"template": "gsm"}, ConfigError, "no prompt template named 'gsm'"),
        ({"device": "gpu"}, ConfigError, "device='gpu': must be auto, cpu, cuda or cuda:N"),
        ({"data": "nowhere.jsonl", "benchmark": "rows"}, DataError, "nowhere.jsonl: no such file"),
        ({"model": "tiny-0.2m"}, ModelError, "Did you mean 'tiny-0.5m'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_settings_leave_nothing_behind(
    spec: EvaluateConfig, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        evaluate(changed(spec, **changes))
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
            "long: the prompt has 1242 tokens and the model's context is 1024",
        ),
    ],
    ids=["empty", "corrupt", "missing", "type", "id", "long"],
)
def test_bad_files(spec: EvaluateConfig, policy: Policy, tmp_path: Path, lines: list[str], message: str) -> None:
    (tmp_path / "p.jsonl").write_text("".join(line + "\n" for line in lines))
    with pytest.raises(DataError, match=re.escape(message)):
        evaluate(changed(spec, benchmark="rows", data=str(tmp_path / "p.jsonl")), policy=policy)
    assert not Path(spec.out).exists()


def test_cuda_that_is_not_there(spec: EvaluateConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="device='cuda', but no CUDA device is available: use cpu"):
        evaluate(changed(spec, device="cuda"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"device='cuda:3', but this machine has 1 CUDA device\(s\)"):
        evaluate(changed(spec, device="cuda:3"))


@pytest.mark.parametrize("failing", ["problems/000002.jsonl", "results.jsonl", "summary.json"])
def test_a_full_disk_keeps_what_is_done(
    spec: EvaluateConfig, policy: Policy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failing: str
) -> None:
    evaluate(changed(spec, out=str(tmp_path / "whole")), policy=policy)

    def full(source: Path, target: Path) -> None:
        if str(target).endswith(failing):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    real = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(MachineError, match=rf"{failing}: No space left on device"):
            evaluate(spec, policy=policy)
    assert len(read_results(spec.out)) == (4 if "problems" in failing else 7)
    evaluate(spec, policy=policy)
    assert whole(spec.out) == whole(tmp_path / "whole")


# ---- the folder: never anything of somebody else's, never silently overwritten ------------------------------------


def test_killed_while_the_settings_were_written(spec: EvaluateConfig, policy: Policy) -> None:
    out = Path(spec.out)
    out.mkdir()
    (out / ".settings.json.4711.tmp").write_text('{"form')
    assert evaluate(changed(spec, limit=1), policy=policy)["problems"] == 1


@pytest.mark.parametrize("name", ["notes.txt", "results.jsonl", "summary.json"])
def test_folder_of_something_else(spec: EvaluateConfig, policy: Policy, name: str) -> None:
    out = Path(spec.out)
    out.mkdir()
    (out / name).write_text("mine")
    for options in (JobOptions(), AGAIN):
        with pytest.raises(ConfigError, match=rf"is not empty \({name}\) and holds no evaluation .*give another --out"):
            evaluate(spec, policy=policy, options=options)
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [(name, "mine")]


def test_out_is_no_folder(spec: EvaluateConfig, policy: Policy, tmp_path: Path) -> None:
    Path(spec.out).write_text("mine")
    with pytest.raises(ConfigError, match="out is a file: give a folder"):
        evaluate(spec, policy=policy)
    with pytest.raises(StepkdError, match=r"cannot write .*settings\.json: Not a directory"):
        evaluate(changed(spec, out=f"{spec.out}/out"), policy=policy)


def test_overwrite(spec: EvaluateConfig, policy: Policy, tmp_path: Path) -> None:
    assert evaluate(spec, policy=policy, options=AGAIN)["problems"] == 7, "of a new folder"
    summary = evaluate(changed(spec, max_new_tokens=5), policy=policy, options=AGAIN)
    assert summary["total_tokens"] <= 7 * 5
    assert read_settings(spec.out)["sampling"]["max_new_tokens"] == 5
    assert names(spec.out) == FOLDER


def test_overwrite_touches_nothing_when_the_new_run_is_in_error(spec: EvaluateConfig, policy: Policy) -> None:
    evaluate(spec, policy=policy)
    before = whole(spec.out)
    for changes in ({"benchmark": "tusk"}, {"data": "n=0"}, {"template": "gsm"}):
        with pytest.raises(StepkdError):
            evaluate(changed(spec, **changes), policy=policy, options=AGAIN)
    with pytest.raises(ModelError):
        evaluate(changed(spec, model="tiny-0.2m"), options=AGAIN)
    assert whole(spec.out) == before


def test_overwrite_refuses_a_folder_with_other_files(spec: EvaluateConfig, policy: Policy) -> None:
    evaluate(spec, policy=policy)
    before = whole(spec.out)
    checkpoints = Path(spec.out) / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "last.ckpt").write_text("weeks of work")
    with pytest.raises(ConfigError, match=r"holds more than an evaluation \(checkpoints\), so --overwrite does not"):
        evaluate(changed(spec, seed=1), policy=policy, options=AGAIN)
    assert (checkpoints / "last.ckpt").read_text() == "weeks of work"
    assert whole(spec.out) == before
    (Path(spec.out) / "settings.json").write_text('{"name": "my web app"}')
    with pytest.raises(DataError, match="not the settings of a job"):
        evaluate(spec, policy=policy, options=AGAIN)
