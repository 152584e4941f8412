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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stepkd.data.completion import Completion
from stepkd.errors import ModelError
from stepkd.models.policy import Policy
from stepkd.models.spec import LoRAConfig, PolicyConfig
from stepkd.runs.logger import read_metrics
from stepkd.sampling.annotate import sampled_logps
from stepkd.sampling.client import Client
from stepkd.sampling.engine import SamplingConfig
from stepkd.sampling.transformers_engine import TransformersEngine
from stepkd.sampling.vllm import ServerEngine
from stepkd.sampling.weights import WeightSender
from stepkd.training.fit import fit

PYTHON = os.environ.get("STEPKD_VLLM", "")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not PYTHON, reason="STEPKD_VLLM names no Python that has vLLM")]

LONG = "1+2*3-4=" * 20
"""More than a block of a CPU's prefix cache (128 tokens)."""


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


def prompts(policy: Policy) -> list[tuple[int, ...]]:
    return [tuple(policy.tokenizer(text).input_ids) for text in ("1+2=", "3*4-5=", LONG)]


def draw(ours: ServerEngine, **settings: Any) -> list[Completion]:
    spec = SamplingConfig(**{"n": 3, "max_new_tokens": 16, **settings})
    return [each for row in ours.generate(prompts(ours.policy), spec) for each in row]


def gap(policy: Policy, drawn: list[Completion], temperature: float = 1.0) -> float:
    """Largest distance of the samples' log-probabilities from the policy's, in nats."""
    theirs = np.concatenate([each.logprobs for each in drawn])
    return float(np.abs(theirs - sampled_logps(policy, drawn, temperature)).max())


def move(policy: Policy, seed: int) -> None:
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
                parameter.add_(noise * 0.05)


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_samples_and_scores_are_the_models_own(name: str, folders: dict[str, Path], addresses: dict[str, str]) -> None:
    policy = policy_of(folders[name])
    ours = engine(policy, addresses[name])
    for temperature in (1.0, 0.7):
        drawn = draw(ours, temperature=temperature)
        assert [each.sample for each in drawn] == [0, 1, 2] * 3
        assert gap(policy, drawn, temperature) < 1e-4
        assert [each.key for each in draw(ours, temperature=temperature)] == [each.key for each in drawn]
    greedy = [SamplingConfig(temperature=0, max_new_tokens=16)]
    own = TransformersEngine(policy)
    whole = own.generate(prompts(policy), greedy[0])
    greedy += [SamplingConfig(temperature=0, max_new_tokens=16, stop=(whole[i][0].text[3:5],)) for i in range(3)]
    for spec in greedy:
        expected = own.generate(prompts(policy), spec)
        for (a,), (b,) in zip(ours.generate(prompts(policy), spec), expected, strict=True):
            assert (a.token_ids.tolist(), a.text, a.finish) == (b.token_ids.tolist(), b.text, b.finish)
    if name == "tied":  # vLLM fails at the scores of several texts where it takes adapters
        for each, scores in zip(drawn, ours.score(drawn, 5), strict=True):
            assert scores.logps_T == pytest.approx(sampled_logps(policy, [each], 1.0), abs=1e-4)
            assert scores.ids_Tk.shape == (len(each.token_ids), 5)


@pytest.mark.parametrize("lora", [True, False])
def test_versions_reach_the_server(lora: bool, folders: dict[str, Path], addresses: dict[str, str]) -> None:
    policy = policy_of(folders["untied"], lora=lora)
    ours = engine(policy, addresses["untied"])
    for version in range(3):
        ours.update(version)
        drawn = draw(ours, temperature=0.7)
        assert gap(policy, drawn, 0.7) < 1e-4
        move(policy, version)
        assert gap(policy, drawn, 0.7) > 0.1
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
    ask = Client.ask
    if sabotage == "stale cache":  # pausing empties it, too
        left_out: tuple[str, ...] = ("/reset_prefix_cache", "/pause", "/resume")
    else:
        left_out = {"skipped": ("/collective_rpc",), "old adapter": ("/v1/",)}.get(sabotage, ())

    def partly(self: Client, path: str, body: Any = None, *, at: str | None = None) -> Any:
        return {} if at and path.startswith(left_out) else ask(self, path, body, at=at)

    if left_out:
        monkeypatch.setattr(Client, "ask", partly)
    if sabotage == "old adapter":
        monkeypatch.setattr(WeightSender, "adopt", lambda *_: None)
    ours.update(1)
    with pytest.raises(ModelError, match="does not sample from the weights of version 1"):
        draw(ours)
    monkeypatch.undo()
    monkeypatch.setattr(WeightSender, "_check_tied", lambda _: None)
    engine(policy_of(folders[name]), addresses[name]).update(0)


@pytest.mark.parametrize("method", ["kdrl", "gkd"])
def test_training_samples_from_its_own_weights(
    method: str, folders: dict[str, Path], addresses: dict[str, str], tmp_path: Path
) -> None:
    """Three versions; the check of every step is in the run itself. GKD's teacher is the other server."""
    engine_of = {"class_path": "VLLMServer", "init_args": {"urls": addresses["untied"]}}
    teacher = {"class_path": "Local", "init_args": {"path": str(folders["tied"])}}
    if method == "gkd":
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
    """Three versions, keyed noise, prefixes, stop texts, a job's own model, and a sync that fails in silence."""
    worker = Path(__file__).with_name("vllm_worker.py")
    quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [PYTHON, str(worker), str(folders[name])],
        env={**os.environ, **quiet, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert max(found.pop("gaps")) < 1e-4
    assert found.pop("caught").startswith("the engine does not sample from the weights of version 4")
    assert found.pop("facts") == {"vllm": "0.30.0"}
    assert found == {"greedy": [True] * 3, "keyed": True, "branches": True, "stop": True, "job": True}
