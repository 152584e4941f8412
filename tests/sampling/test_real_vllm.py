"""Against vLLM itself: two servers of tiny float32 models, started with the Python that STEPKD_VLLM names.

One has a head of its own and takes adapters, the other's head is its embeddings. Without the variable the tests are
skipped; with it they fail where vLLM does not start. The variable is ``.ci/run``'s business.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_contract import LONG, SAMPLES, SCORES, every_version_is_sampled_from, flat, move, prompts

from stepkd.data.collate import collate
from stepkd.data.completion import Completion
from stepkd.data.templates import PromptTemplate
from stepkd.errors import ModelError
from stepkd.models.policy import Policy
from stepkd.models.spec import LoRAConfig, PolicyConfig
from stepkd.runs.logger import read_metrics
from stepkd.sampling.client import Client
from stepkd.sampling.config import VLLMServer
from stepkd.sampling.engine import SamplingConfig
from stepkd.sampling.vllm import ServerEngine
from stepkd.sampling.weights import WeightSender
from stepkd.scorers.load import Judge, load_scorer
from stepkd.scorers.scorer import Solutions
from stepkd.teachers.config import Local, Served, TopK
from stepkd.training.fit import fit

PYTHON = os.environ.get("STEPKD_VLLM", "")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not PYTHON, reason="STEPKD_VLLM names no Python that has vLLM")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model whose head is its own, and one whose head is its embeddings."""
    found = {}
    for name in ("untied", "tied"):
        policy = Policy.load(PolicyConfig(path="tiny-0.1m", init_seed=1))
        with torch.no_grad():
            for weight in policy.parameters():
                weight.mul_(3)
        if name == "untied":
            policy.model.config.tie_word_embeddings = False
            policy.model.lm_head.weight = torch.nn.Parameter(policy.model.lm_head.weight.detach().clone())
        found[name] = tmp_path_factory.mktemp(name)
        policy.model.save_pretrained(found[name])
        policy.tokenizer.save_pretrained(found[name])
    return found


@pytest.fixture(scope="module")
def addresses(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Both servers, up."""
    adapters = ["--enable-lora", "--max-lora-rank", "16"]
    started, found = {}, {}
    for name, more in (("untied", adapters), ("tied", [])):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        found[name] = f"http://127.0.0.1:{port}"
        words = ["--model", str(folders[name]), "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
        words += ["--max-model-len", "512", "--enforce-eager", "--no-enable-chunked-prefill", *more]
        words += ["--logprobs-mode", "processed_logprobs", "--max-logprobs", "20"]
        variables = {
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
        }
        variables |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        variables |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        log = tmp_path_factory.mktemp("log") / "server.log"
        with log.open("w") as stream:
            command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", *words]
            own = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
            process = subprocess.Popen(
                command, stdout=stream, stderr=stream, env={**own, **variables}, cwd=log.parent, start_new_session=True
            )
        started[name] = process, log
    try:
        for name, (process, log) in started.items():
            until = time.monotonic() + 400
            while not _answers(found[name]):
                if process.poll() is not None or time.monotonic() > until:
                    pytest.fail(f"vLLM did not start:\n{log.read_text()[-4000:]}")
                time.sleep(1)
        yield found
    finally:
        for process, _ in started.values():
            os.killpg(process.pid, signal.SIGTERM)
        for process, _ in started.values():
            process.wait(60)


def _answers(address: str) -> bool:
    try:
        Client([address], timeout_s=0.1)
    except Exception:
        return False
    return True


def policy_of(folder: Path, *, lora: bool = False) -> Policy:
    return Policy.load(PolicyConfig(path=str(folder), lora=LoRAConfig(r=4) if lora else None))


def engine(policy: Policy, address: str) -> ServerEngine:
    return ServerEngine(policy, Client([address], 8, 120.0))


def draw(ours: ServerEngine) -> list[Completion]:
    return flat(ours.generate(prompts(ours.policy), SamplingConfig(n=3, max_new_tokens=16)))


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_servers_keep_to_the_contract(name: str, folders: dict[str, Path], addresses: dict[str, str]) -> None:
    policy = policy_of(folders[name])
    ours = engine(policy, addresses[name])
    # Not with adapters: vLLM fails there at the scores of several texts.
    for rule in [*SAMPLES, *(SCORES if name == "tied" else [])]:
        rule(ours, policy)


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_a_judge_on_a_server_says_what_it_says_here(
    name: str, folders: dict[str, Path], addresses: dict[str, str]
) -> None:
    """Verdicts on solutions of several blocks of the prefix cache, which reads the most of them once."""

    def hits() -> float:
        with urllib.request.urlopen(f"{addresses[name]}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:prefix_cache_hits_total"))

    steps = [f"{LONG}{number}" for number in range(2)]
    solutions = [Solutions({"id": name, "prompt": "1+2=?"}, [steps, ["3", *steps[:1]]])]
    asked = Judge(str(folders[name]), answers=("1", "2"))
    here = load_scorer(asked, device="cpu").score(solutions)
    before = hits()
    there = load_scorer(replace(asked, engine=VLLMServer(addresses[name]))).score(solutions)
    for a, b in zip(here[0], there[0], strict=True):
        assert b == pytest.approx(a, abs=1e-4)
    assert hits() - before >= 128


@pytest.mark.parametrize("lora", [True, False])
def test_versions_reach_the_server(lora: bool, folders: dict[str, Path], addresses: dict[str, str]) -> None:
    policy = policy_of(folders["untied"], lora=lora)
    every_version_is_sampled_from(engine(policy, addresses["untied"]), policy)
    ours = engine(policy_of(folders["untied"]), addresses["untied"])
    ours.update(0)  # the server as it was


@pytest.mark.parametrize("sabotage", ["skipped", "old adapter", "stale cache", "tied head"])
def test_a_sync_that_fails_in_silence_stops_the_run(
    sabotage: str, folders: dict[str, Path], addresses: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "tied" if sabotage == "tied head" else "untied"
    policy = policy_of(folders[name], lora=sabotage == "old adapter")
    ours = engine(policy, addresses[name])
    if sabotage == "tied head":
        monkeypatch.setattr(WeightSender, "_check_tied", lambda _: None)
    ours.update(0)
    draw(ours)
    move(policy, 1)
    once = Client.once
    if sabotage == "stale cache":  # pausing empties it, too
        left_out: tuple[str, ...] = ("/reset_prefix_cache", "/pause", "/resume")
    else:
        left_out = {"skipped": ("/collective_rpc",), "old adapter": ("/v1/load", "/v1/unload")}.get(sabotage, ())

    def partly(self: Client, url: str, path: str, *arguments: Any, **named: Any) -> Any:
        return {} if path.startswith(left_out) else once(self, url, path, *arguments, **named)

    if left_out:
        monkeypatch.setattr(Client, "once", partly)
    if sabotage == "old adapter":
        monkeypatch.setattr(WeightSender, "adopt", lambda *_: None)
    ours.update(1)
    draw(ours)
    draw(ours)
    with pytest.raises(ModelError, match="does not sample from the weights of version 1"):
        draw(ours)
    monkeypatch.undo()
    monkeypatch.setattr(WeightSender, "_check_tied", lambda _: None)
    engine(policy_of(folders[name]), addresses[name]).update(0)


def test_a_served_teacher_is_the_local_one(folders: dict[str, Path], addresses: dict[str, str]) -> None:
    """Its tokens' log-probabilities alone and its most likely ones, also behind a prompt of its own."""
    policy = policy_of(folders["tied"])
    drawn = [replace(each, row={"prompt": "1+2="}) for each in draw(engine(policy, addresses["tied"]))]
    batch = collate(drawn, 0)
    student_NV = torch.randn(len(batch.targets_N), policy.vocab_size).log_softmax(-1)
    for template in (None, PromptTemplate(system="You add numbers.")):
        common: dict[str, Any] = {"template": template, "top_k": TopK(10)}
        found = []
        for spec in (Local(str(folders["tied"]), **common), Served(addresses["tied"], **common)):
            teacher = spec.build()
            teacher.bind(policy.tokenizer)
            signals = teacher.signals(batch, temperature=1.0)
            both = signals.compare(student_NV, *signals.tensors)
            found.append((teacher.target_logps(batch, temperature=1.0), *map(torch.exp, both[:2]), both[2]))
        for ours, theirs in zip(*found, strict=True):
            assert torch.allclose(ours.double(), theirs.double(), atol=1e-4)


@pytest.mark.parametrize("method", ["kdrl", "gkd"])
def test_training_samples_from_its_own_weights(
    method: str, folders: dict[str, Path], addresses: dict[str, str], tmp_path: Path
) -> None:
    """Three versions; the check of every step is in the run itself. The teacher is the other server."""
    engine_of = {"class_path": "VLLMServer", "init_args": {"urls": addresses["untied"]}}
    teacher = {"class_path": "Served", "init_args": {"urls": addresses["tied"], "top_k": {"k": 10}}}
    settings: dict[str, Any] = {
        "trainer.max_steps": 3,
        "trainer.val_check_interval": 3,
        "model.init_args.policy.path": str(folders["untied"]),
        "model.init_args.policy.lora": {"r": 4},
        "model.init_args.engine": engine_of,
        "model.init_args.teacher": teacher,
        "model.init_args.optimizer.lr": 0.01,
        "model.init_args.optimizer.warmup": 0,
        "model.init_args.validation.sampling.n": 1,
        "data.init_args.train.options.n": 64,
        "data.init_args.validation.options.n": 4,
        "data.init_args.global_batch_size": 8,
    }
    if method == "gkd":
        settings |= {"model.init_args.source.lmbda": 1.0, "model.init_args.source.sampling.max_new_tokens": 16}
    else:
        settings |= {"model.init_args.rollout.sampling": {"n": 2, "max_new_tokens": 16}}
    result = fit([f"tiny/{method}"], settings, out=tmp_path / "run")
    assert result.steps == 3
    if method == "kdrl":
        rows = [row for row in read_metrics(tmp_path / "run") if "train/sampler_mismatch_max" in row]
        assert [row["train/sampler_mismatch_max"] < 1e-4 for row in rows] == [True] * len(rows)
        assert rows


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_the_engine_in_one_process(name: str, folders: dict[str, Path]) -> None:
    """The contract in training and in a job, and a sync that fails in silence."""
    worker, tests = Path(__file__).with_name("vllm_worker.py"), Path(__file__).parents[1]
    quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [PYTHON, str(worker), str(folders[name])],
        env={**os.environ, **quiet, "PYTHONPATH": os.pathsep.join(map(str, (tests.parent, tests / "helpers")))},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("caught").startswith("the engine does not sample from the weights of version 9")
    assert found == {"facts": {"vllm": "0.30.0"}}
