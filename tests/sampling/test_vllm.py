"""Samples, weights and teachers on servers, against a stand-in that speaks vLLM's endpoints and fails as servers do."""

from __future__ import annotations

import json
import math
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from stepkd.data.completion import Completion
from stepkd.data.config import LABELS_NAME
from stepkd.errors import ConfigError, ModelError
from stepkd.evaluation.config import EvaluateConfig
from stepkd.evaluation.runner import evaluate
from stepkd.labels.job import run_label_job, run_pair_job
from stepkd.labels.labellers import TaskChecker
from stepkd.labels.settings import ContinuationShare, LabelConfig, Sampled, TreePairConfig
from stepkd.models.checkpoint import load_trained
from stepkd.models.policy import Policy
from stepkd.models.spec import LoRAConfig, PolicyConfig
from stepkd.modules.fidelity import FidelityConfig
from stepkd.modules.gkd_settings import JSD, NKD, SourceConfig
from stepkd.runs.logger import read_metrics
from stepkd.runs.process import STOP_REQUEST
from stepkd.sampling import vllm_engine
from stepkd.sampling.client import Client
from stepkd.sampling.config import VLLM, Transformers, VLLMServer
from stepkd.sampling.engine import SamplingConfig, is_stand_in
from stepkd.sampling.transformers_engine import TransformersEngine
from stepkd.sampling.vllm import ServerEngine
from stepkd.sampling.weights import WeightSender, check_mergeable, merged_weights
from stepkd.teachers.config import Local, Served, TopK
from stepkd.teachers.server import ServerTeacher
from stepkd.teachers.signals import HiddenSignals
from stepkd.training.fit import fit


def engine(policy: Policy, server: Any, **settings: Any) -> ServerEngine:
    return ServerEngine(policy, Client([server.address], 4, 30.0), **settings)


def prompts(policy: Policy) -> list[tuple[int, ...]]:
    return [tuple(policy.tokenizer(text).input_ids) for text in ("1+2=", "3*4-5=", "7=")]


def test_other_temperatures_need_the_correct_log_probabilities(policy: Policy, server: Any) -> None:
    spec = SamplingConfig(temperature=0.7, max_new_tokens=4)
    found = engine(policy, server).generate(prompts(policy)[:1], spec)[0][0]
    assert found.raw_logprobs is None
    server.config["model_config"]["logprobs_mode"] = "raw_logprobs"
    with pytest.raises(ConfigError, match=r"gives raw_logprobs.*--logprobs-mode processed_logprobs"):
        engine(policy, server).generate(prompts(policy)[:1], spec)
    assert engine(policy, server).generate(prompts(policy)[:1], SamplingConfig(max_new_tokens=2))


def test_requests_say_what_a_server_would_take_from_elsewhere(policy: Policy, server: Any) -> None:
    server.context = 20
    ours = engine(policy, server)
    found = ours.generate(prompts(policy), SamplingConfig(n=2, max_new_tokens=50, stop=("1",)))
    assert all(each.length <= 20 for row in found for each in row)
    assert len({body["seed"] for body in server.requests}) == 6
    expected = {"repetition_penalty": 1.0, "min_p": 0.0, "include_stop_str_in_output": True}
    expected |= {"stop_token_ids": sorted(policy.eos_ids)}
    assert all(expected.items() <= body.items() for body in server.requests)


@pytest.mark.parametrize(("ids", "kept"), [([5, 6, 100, 7], [5, 6]), ([100, 7], [1])])
def test_an_id_that_no_token_has_ends_a_completion(
    ids: list[int], kept: list[int], policy: Policy, server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A padded row of the head, which vLLM draws from too."""
    assert (policy.vocab_size, sorted(policy.eos_ids)) == (100, [1])

    def padded(answer: Any) -> Any:
        answer["choices"][0] |= {"token_ids": ids, "logprobs": {"token_logprobs": [-1.0, -2.0, -3.0, -4.0][: len(ids)]}}
        return answer

    server.spoil = padded
    ours = engine(policy, server)
    for _ in range(3):
        found = ours.generate(prompts(policy)[:1], SamplingConfig(max_new_tokens=9))[0][0]
    assert (found.token_ids.tolist(), found.finish, ours.cut_off) == (kept, "length", 3)
    assert found.logprobs.tolist() == [-1.0, -2.0][: len(kept)]
    assert is_stand_in(found, policy.eos_ids) == (kept == [1])
    assert not is_stand_in(Completion(found.prompt_ids, np.array([5, 1]), finish="length"), policy.eos_ids), (
        "an end token that was drawn"
    )
    assert "end before it: 2 so far" in caplog.text
    assert "3 so far" not in caplog.text


def test_a_request_to_stop_ends_the_rest_at_once(policy: Policy, server: Any) -> None:
    found = engine(policy, server, breaks_off=lambda: True).generate(prompts(policy), SamplingConfig(max_new_tokens=20))
    assert [len(row[0].token_ids) for row in found] == [1, 1, 1]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: c.update(token_ids=[]), "gave prompt 0 0 tokens"),
        (lambda c: c.update(token_ids=[5] * 40), "gave prompt 0 40 tokens with 4 log-prob"),
        (
            lambda c: c.update(prompt_token_ids=[1]),
            r"at http\S+ does not .* as vLLM does \(choices of another prompt\)",
        ),
        (
            lambda c: c.pop("token_ids"),
            r"does not answer /v1/completions as vLLM does \('token_ids' is missing\); it says",
        ),
        (lambda c: c.update(logprobs=None), "does not answer /v1/completions as vLLM does"),
    ],
)
def test_answers_that_are_no_completions(spoil: Any, message: str, policy: Policy, server: Any) -> None:
    def spoiled(answer: Any) -> Any:
        for choice in answer["choices"]:
            spoil(choice)
        return answer

    server.spoil = spoiled
    with pytest.raises(ModelError, match=message):
        engine(policy, server).generate(prompts(policy)[:1], SamplingConfig(max_new_tokens=4, seed=1))


@pytest.mark.parametrize(
    "lora",
    [
        None,
        LoRAConfig(r=4),
        LoRAConfig(r=4, modules_to_save=["lm_head"]),
        LoRAConfig(r=4, target_modules=["q_proj", "down_proj"]),
    ],
)
def test_weights_that_are_sent(lora: LoRAConfig | None, policy: Policy) -> None:
    """Those of the merged model under the plain names; the model itself is not touched."""
    assert policy.spec is not None
    trained = Policy.load(PolicyConfig(path=policy.spec.path, lora=lora))
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    before = {name: value.clone() for name, value in trained.model.state_dict().items()}
    sent = dict(merged_weights(trained.model))
    check_mergeable(trained.model)
    assert all(torch.equal(value, before[name]) for name, value in trained.model.state_dict().items())
    plain = trained.model if lora is None else trained.model.merge_and_unload()
    expected = dict(plain.named_parameters())
    assert sent.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(sent[name], value, atol=1e-6), name


def adapted(policy: Policy, **settings: Any) -> Any:
    """The tiny model under peft's own settings, with adapters that do something."""
    from peft import LoraConfig, get_peft_model

    assert policy.spec is not None
    plain = Policy.load(PolicyConfig(path=policy.spec.path)).model
    if settings.pop("untied", False):
        plain.config.tie_word_embeddings = False
        plain.lm_head.weight = torch.nn.Parameter(plain.lm_head.weight.detach().clone())
    if settings.pop("biases", False):
        for layer in plain.model.layers:
            layer.self_attn.q_proj.bias = torch.nn.Parameter(torch.ones(layer.self_attn.q_proj.out_features))
    model = get_peft_model(plain, LoraConfig(r=2, **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(2))
    return model


def test_an_adapted_embedding_is_merged(policy: Policy) -> None:
    model = adapted(policy, target_modules=["embed_tokens", "q_proj"], untied=True)
    check_mergeable(model)
    sent = {name: value.clone() for name, value in merged_weights(model)}
    before = model.get_base_model().get_input_embeddings().weight.detach().clone()
    expected = dict(model.merge_and_unload().named_parameters())
    assert sent.keys() == expected.keys()
    assert all(torch.allclose(sent[name], value, atol=1e-6) for name, value in expected.items())
    assert not torch.allclose(sent["model.embed_tokens.weight"], before, atol=1e-2)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}])
def test_adapters_that_are_more_than_a_sum_are_merged(settings: dict[str, Any], policy: Policy) -> None:
    model = adapted(policy, target_modules=["q_proj"], biases=True, **settings)
    check_mergeable(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sent = {name: value.clone() for name, value in merged_weights(model)}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    expected = dict(model.merge_and_unload().named_parameters())
    assert sent.keys() == expected.keys()
    assert all(torch.allclose(sent[name], value, atol=1e-6) for name, value in expected.items())


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_adapter_on_one_of_two_tied_weights_is_not_sent(target: str, policy: Policy) -> None:
    with pytest.raises(ConfigError, match="embeddings and vocabulary head share a weight"):
        check_mergeable(adapted(policy, target_modules=[target]))


def test_quantised_weights_are_not_sent(policy: Policy) -> None:
    model = adapted(policy, target_modules=["q_proj"])
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(torch.zeros(4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match=r"up_proj.weight is quantised \(torch.int8\)"):
        check_mergeable(model)


# ---- weights -------------------------------------------------------------------------------------------------------


def trained(policy: Policy, *, lora: bool, untied: bool = True) -> Policy:
    """A policy that can be moved."""
    assert policy.spec is not None
    found = Policy.load(PolicyConfig(path=policy.spec.path, lora=LoRAConfig(r=4) if lora else None))
    if untied:
        plain = found.causal_lm
        plain.config.tie_word_embeddings = False
        plain.lm_head.weight = torch.nn.Parameter(plain.lm_head.weight.detach().clone())
    return found


def move(policy: Policy, seed: int, by: float = 0.05) -> None:
    """What an optimiser does."""
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if parameter.requires_grad and "lm_head" not in name:
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
                parameter.add_(noise * by)


def draw(ours: ServerEngine, step: int) -> list[Any]:
    spec = SamplingConfig(n=3, max_new_tokens=10, temperature=0.8)
    return [each for row in ours.generate(prompts(ours.policy), spec, step=step) for each in row]


@pytest.mark.parametrize("lora", [True, False])
def test_servers_sample_from_every_version(lora: bool, policy: Policy, server: Any, tmp_path: Path) -> None:
    """By an adapter of a new name and folder, or by merged weights from a new folder and an empty prefix cache."""
    ours = engine(trained(policy, lora=lora), server, weights=str(tmp_path))
    server.stale = True
    names, seen = [], []
    for version in range(3):
        ours.update(version)
        ours.update(version)
        names.append(ours.client.name)
        seen.append(draw(ours, 0))
        move(ours.policy, version)
    assert len(set(names)) == (3 if lora else 1)
    paths = [path for path, _ in server.posts if path != "/v1/completions"]
    assert paths == (
        ["/v1/load_lora_adapter", *["/v1/load_lora_adapter", "/v1/unload_lora_adapter"] * 2]
        if lora
        else ["/pause?mode=wait", "/collective_rpc", "/reset_prefix_cache", "/resume"] * 3
    )
    bodies = [body for path, body in server.posts if path in ("/v1/load_lora_adapter", "/collective_rpc")]
    folders = [body.get("lora_path") or body["kwargs"]["weights_path"] for body in bodies]
    assert [Path(each).exists() for each in folders] == [False, False, True], "old versions go"
    before, after = ([each.logprobs.tolist() for each in seen[i]] for i in (0, 2))
    assert before != after


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("sabotage", ["skipped", "same path", "stale cache", "not sent"])
def test_an_engine_that_does_not_follow_stops_the_run(
    sabotage: str, lora: bool, policy: Policy, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (sabotage, lora) == ("stale cache", True):
        return  # an adapter of another name shares no cache
    ours = engine(trained(policy, lora=lora), server)
    if sabotage == "same path":
        write = WeightSender._write
        monkeypatch.setattr(WeightSender, "_write", lambda sender, _: write(sender, "same"))
        monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)
        server.by_path = {}
    ours.update(0)
    draw(ours, 0)
    move(ours.policy, 1)
    if sabotage == "skipped":
        server.deaf = True
    if sabotage == "not sent":
        monkeypatch.setattr(WeightSender, "send", lambda sender, _: (sender.version, []))
    if sabotage == "stale cache":
        server.stale, server._seen = True, {(server.name, *each): server.policy for each in prompts(policy)}
        once = Client.once
        monkeypatch.setattr(
            Client, "once", lambda self, url, path, *a, **k: {} if "reset" in path else once(self, url, path, *a, **k)
        )
    ours.update(1)
    draw(ours, 1)
    draw(ours, 2)
    with pytest.raises(ModelError, match=r"does not sample from the weights of version 1 \(.*the trainer's moved by"):
        draw(ours, 3)


def test_small_steps_add_up_until_a_deaf_engine_is_found(policy: Policy, server: Any) -> None:
    ours = engine(trained(policy, lora=True), server)
    ours.update(0)
    draw(ours, 0)
    server.deaf = True

    def train() -> None:
        for version in range(1, 100):
            move(ours.policy, version, by=2e-4)
            ours.update(version)
            draw(ours, version)

    with pytest.raises(ModelError, match="does not sample from the weights of version"):
        train()


def test_another_model_is_found_at_the_first_samples(policy: Policy, server: Any) -> None:
    ours = engine(trained(policy, lora=True), server)
    move(ours.policy, 1, by=0.3)
    server.deaf = True
    ours.update(7)
    with pytest.raises(ModelError, match=r"weights of version 7 .*the most that rounding explains"):
        draw(ours, 0)


def test_a_tied_head_is_not_given_to_a_server_on_a_cpu(policy: Policy, server: Any) -> None:
    ours = engine(trained(policy, lora=False, untied=False), server)
    with pytest.raises(ConfigError, match=r"keeps the old head .* train an adapter \(policy.lora\)"):
        ours.update(0)
    engine(trained(policy, lora=True, untied=False), server).update(0)
    server.device = "cuda"
    engine(trained(policy, lora=False, untied=False), server).update(0)


def test_a_server_that_takes_no_weights_says_how_it_is_started(policy: Policy, server: Any) -> None:
    server.answer = lambda path, _: (404, {"detail": "Not Found"})
    with pytest.raises(ConfigError, match=r"404 at /v1/load_lora_adapter: .*engine.weights.*--enable-lora"):
        engine(trained(policy, lora=True), server).update(0)
    with pytest.raises(ConfigError, match=r"engine.weights=/dev/null/x: cannot write there"):
        engine(trained(policy, lora=True), server, weights="/dev/null/x").update(0)


def test_keys_come_from_the_environment_alone(policy: Policy, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine(policy, server)
    monkeypatch.setenv("VLLM_API_KEY", "of-the-server")
    engine(policy, server)
    assert server.keys[0] is None
    assert server.keys[-1] == "Bearer of-the-server"


def test_a_server_that_takes_adapters_scores_nothing(policy: Policy, server: Any) -> None:
    server.config["lora_config"] = {"max_loras": 1}
    with pytest.raises(ConfigError, match=r"started with --enable-lora, .* start one without it to score"):
        engine(policy, server).score([Completion(np.array([5]), np.array([6]))], 3)


def test_what_is_missing_is_said(policy: Policy) -> None:
    with pytest.raises(ConfigError, match=r"no answer from the vLLM server at http://127.0.0.1:9 .* Start one with"):
        Client(["http://127.0.0.1:9"], timeout_s=0.1)
    if find_spec("vllm") is None:
        with pytest.raises(ConfigError, match=r"pip install 'stepkd\[vllm\]'"):
            VLLM().build(policy, lambda: False)
    with pytest.raises(ConfigError, match=r"engine.gpu_memory=2: must lie in \(0, 1\)"):
        VLLM(gpu_memory=2)
    with pytest.raises(ConfigError, match=r"engine.requests=0: must be at least 1"):
        VLLMServer("http://x", requests=0)


SPEC = SamplingConfig(n=2, max_new_tokens=8, seed=1)


class InProcess:
    """In place of the module ``vllm``: an engine that samples from a policy, once it has been given weights."""

    __version__ = "0.0"
    SamplingParams = SimpleNamespace

    def __init__(self, policy: Policy, made: dict[str, Any]) -> None:
        self.policy, self.made = policy, made
        self.loaded: list[str] = []

    def LLM(self, **settings: Any) -> Any:
        self.made |= settings | {"files": sorted(path.name for path in Path(settings["model"]).iterdir())}
        return self

    def collective_rpc(self, method: str, kwargs: Any) -> None:
        assert method == "reload_weights"
        self.loaded += [name for name, _ in kwargs["weights_iterator"]]

    def reset_prefix_cache(self) -> None:
        self.loaded.append("reset")

    def generate(self, prompts: list[dict[str, Any]], how: list[Any], use_tqdm: bool) -> list[Any]:
        return [self.answer(each["prompt_token_ids"], own) for each, own in zip(prompts, how, strict=True)]

    def answer(self, prompt: list[int], how: Any) -> Any:
        spec = SamplingConfig(
            how.n, how.temperature, how.top_p, how.top_k, how.max_tokens, tuple(how.stop), how.seed or 0
        )
        (drawn,) = TransformersEngine(self.policy).generate([prompt], spec)
        said = [zip(each.token_ids.tolist(), each.logprobs.tolist(), strict=True) for each in drawn]
        return SimpleNamespace(
            outputs=[
                SimpleNamespace(
                    index=j,
                    token_ids=drawn[j].token_ids.tolist(),
                    logprobs=[{i: SimpleNamespace(logprob=value)} for i, value in own],
                )
                for j, own in reversed(list(enumerate(said)))
            ]
        )


class CPUSampler:
    """vLLM's sampler for CPUs, which is told which log-probabilities are wanted."""

    logprobs_mode = "processed_logprobs"

    def forward_cpu(self, logits: Any, generators: Any, k: Any, p: Any) -> Any:
        return "its own"


def test_vllms_sampler_for_cpus_draws_with_one_number_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """In proportion to the probabilities that are left, whatever the other rows are."""

    def cut(logits: torch.Tensor, k: Any, p: Any) -> torch.Tensor:
        return logits.masked_fill(logits < 0, -torch.inf)

    where, name = CPUSampler.__module__, "vllm.v1.sample.ops.topk_topp_sampler"
    sampler = type("CPUSampler", (CPUSampler,), {})
    module = SimpleNamespace(__name__=where, TopKTopPSampler=sampler, apply_top_k_top_p=cut)
    monkeypatch.setattr(vllm_engine, "import_module", {name: module}.__getitem__)
    vllm_engine._patch_cpu_sampler()
    logits = torch.tensor([-1.0, 0.0, math.log(3)])

    def drawn(rows: int, seeded: range) -> list[int]:
        generators = {row: torch.Generator().manual_seed(row) for row in seeded}
        tokens, logprobs = sampler().forward_cpu(logits.expand(rows, -1), generators, None, None)
        assert logprobs[0].exp().tolist() == pytest.approx([0, 0.25, 0.75])
        return list(tokens.tolist())

    found = drawn(2000, range(2000))
    assert set(found) == {1, 2}
    assert found.count(2) / 2000 == pytest.approx(0.75, abs=0.04)
    assert drawn(9, range(5))[:5] == found[:5]
    monkeypatch.setattr(sampler, "logprobs_mode", "raw_logprobs")
    assert sampler().forward_cpu(logits, {}, None, None) == "its own"


def test_a_vllm_that_is_built_otherwise_keeps_its_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (SimpleNamespace(TopKTopPSampler=CPUSampler), None):

        def found(_: str, module: Any = module) -> Any:
            if module is None:
                raise ModuleNotFoundError
            return module

        own = CPUSampler.forward_cpu
        monkeypatch.setattr(vllm_engine, "import_module", found)
        vllm_engine._patch_cpu_sampler()
        assert CPUSampler.forward_cpu is own


def test_servers_without_seeds_need_different_ones(
    policy: Policy, server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    ServerEngine(policy, Client([server.address]), seeded=False)
    assert not caplog.records
    ServerEngine(policy, Client([server.address] * 2), seeded=False)
    assert "start each with another --seed" in caplog.text


@pytest.mark.parametrize("trains", [True, False])
def test_the_engine_in_this_process(policy: Policy, trains: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training it begins with settings and tokenizer, and is given every version; in a job it loads the model."""
    assert policy.spec is not None
    vllm = InProcess(policy, {})
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    ours = VLLM(gpu_memory=0.4).build(policy if trains else load_trained(policy.spec.path, weights=False))
    assert (vllm.made["gpu_memory_utilization"], vllm.made["max_model_len"]) == (0.4, policy.max_length)
    assert ("load_format" in vllm.made, "model.safetensors" in vllm.made["files"]) == (trains, not trains)
    assert {"config.json", "tokenizer.json"} <= set(vllm.made["files"])
    if trains:
        ours.update(1)
        ours.update(1)
        tied = [] if "lm_head.weight" in dict(policy.model.named_parameters()) else ["lm_head.weight"]
        assert vllm.loaded == [*dict(policy.model.named_parameters()), *tied, "reset"]
    found = ours.generate(prompts(policy), SPEC)
    assert [[each.sample for each in row] for row in found] == [[0, 1]] * 3
    greedy = SamplingConfig(temperature=0.0, max_new_tokens=8)
    expected = TransformersEngine(policy).generate(prompts(policy), greedy)
    for row, own in zip(ours.generate(prompts(policy), greedy), expected, strict=True):
        assert [each.key for each in row] == [each.key for each in own]
    assert len(ours.generate(prompts(policy), SPEC, purpose="other")[0][0].token_ids) > 0
    ended = VLLM().build(policy, lambda: True).generate(prompts(policy), SPEC)
    assert {len(each.token_ids) for row in ended for each in row} == {1}


def test_a_job_at_the_fields_temperature(policy: Policy, server: Any, tmp_path: Path) -> None:
    """A server's log-probabilities are then not the model's: they are left open, and nothing fails at them."""
    assert policy.spec is not None
    engine, path = VLLMServer(server.address, requests=4), policy.spec.path
    drawn = SamplingConfig(n=2, temperature=0.6, top_p=0.95, max_new_tokens=8)
    data = "task:task=modular:terms=3,n=3"
    evaluated = EvaluateConfig(
        model=path,
        benchmark="task",
        data=data[5:],
        device="cpu",
        sampling=drawn,
        engine=engine,
        out=str(tmp_path / "a"),
    )
    assert evaluate(evaluated)["samples"] == 6
    row = json.loads((tmp_path / "a" / "results.jsonl").read_text().splitlines()[0])
    assert [each["logprob"] for each in row["samples"]] == [None, None]
    solutions = Sampled(problems=data, model=path, sampling=drawn, dedupe=False)
    labels = LabelConfig(
        out=str(tmp_path / "b"), solutions=solutions, labeller=TaskChecker(), engine=engine, device="cpu"
    )
    assert run_label_job(labels)
    rows = [json.loads(line) for line in (tmp_path / "b" / LABELS_NAME).read_text().splitlines()]
    assert [each["raw_logprobs"] for each in rows] == [None] * 6
    tree = TreePairConfig(
        out=str(tmp_path / "c"),
        problems=data,
        model=path,
        value=ContinuationShare(),
        sampling=drawn,
        engine=engine,
        device="cpu",
    )
    with pytest.raises(ConfigError, match=r"tree search reads the model's own log-probabilities, .* take these"):
        run_pair_job(tree)


def test_a_job_of_another_model_than_the_servers_is_refused(policy: Policy, server: Any, tmp_path: Path) -> None:
    policy.model.save_pretrained(tmp_path / "other")
    policy.tokenizer.save_pretrained(tmp_path / "other")
    outline = load_trained(str(tmp_path / "other"), weights=False)
    with pytest.raises(
        ConfigError, match=r"serves '.*', and this job is of '.*other': start the server with that model"
    ):
        VLLMServer(server.address).build(outline)
    server.context = 64
    assert policy.spec is not None
    engine = VLLMServer(server.address).build(load_trained(policy.spec.path, weights=False))
    assert (engine.max_length, engine.policy.max_length) == (64, 64)


def test_an_evaluation_through_a_server_reads_no_weights(policy: Policy, server: Any, tmp_path: Path) -> None:
    """Its rows are those of this process; settings name the server's build, and a killed one goes on."""
    assert policy.spec is not None
    how: dict[str, Any] = {
        "model": policy.spec.path, "benchmark": "task", "data": "task=modular:terms=3,n=5", "device": "cpu",
        "sampling": SamplingConfig(temperature=0.0, max_new_tokens=12),
    }  # fmt: skip
    engines = {"here": Transformers(2), "there": VLLMServer(server.address, requests=2)}
    summaries, rows = {}, {}
    for name, chosen in engines.items():
        config = EvaluateConfig(**how, engine=chosen, out=str(tmp_path / name))
        summaries[name] = evaluate(config)
        rows[name] = (tmp_path / name / "results.jsonl").read_text()
    assert summaries["here"]["metrics"] == summaries["there"]["metrics"]
    samples = {name: [json.loads(line)["samples"] for line in text.splitlines()] for name, text in rows.items()}
    assert [[each["completion"] for each in row] for row in samples["here"]] == [
        [each["completion"] for each in row] for row in samples["there"]
    ]
    engine = summaries["there"]["settings"]["engine"]
    assert (engine["name"], engine["vllm"]) == ("VLLMServer", "0.0")


def test_recipes_sample_through_it(policy: Policy, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """GRPO's groups and GKD's students come from the server, which is given the weights before every step."""
    from stepkd.modules.gkd import GKDModule
    from stepkd.modules.kdrl_settings import RolloutConfig
    from stepkd.modules.rollouts import GroupSampler
    from stepkd.runs.progress import PhaseTracker

    given: list[int] = []
    monkeypatch.setattr(ServerEngine, "update", lambda _, version: given.append(version))
    rewards: Any = None
    spec = RolloutConfig(SamplingConfig(n=2, max_new_tokens=4))
    groups = GroupSampler(spec, VLLMServer(server.address).build(policy), policy, rewards, PhaseTracker(), 0)
    nothing: Any = SimpleNamespace(examples=(), indices=())
    assert groups(nothing, 3, 0) == groups(nothing, 4, 0) == []
    assert given == [3, 4]
    engine = VLLMServer(server.address)
    module = GKDModule(PolicyConfig(path="tiny-0.1m"), Local("tiny-0.1m"), engine=engine)
    module.policy = policy
    monkeypatch.setattr(GKDModule, "global_step", 5)
    module.teacher.bind(policy.tokenizer)
    assert module.sample(nothing, "student") == []
    assert isinstance(module.sampling_engine, ServerEngine)
    assert module.sampling_engine.breaks_off is not None
    monkeypatch.setattr(STOP_REQUEST, "name", "SIGTERM")
    for training in (True, False):  # what is learnt from is cut off, what is measured is not
        monkeypatch.setattr(GKDModule, "trainer", SimpleNamespace(training=training))
        assert module.sampling_engine.breaks_off() == training
    monkeypatch.undo()
    monkeypatch.setattr(ServerEngine, "update", lambda _, version: given.append(version))
    monkeypatch.setattr(GKDModule, "global_step", 5)
    assert module.sample(nothing, "teacher") == []
    assert given == [3, 4, 5], "the teacher samples itself"


def test_validation_samples_from_the_weights_of_its_step(policy: Policy, server: Any, tmp_path: Path) -> None:
    """A training that does not sample itself gives its server every version that is validated; greedy answers are those
    of this process."""
    assert policy.spec is not None
    server.device = "cuda"
    settings: dict[str, Any] = {
        "trainer": {"max_steps": 2, "val_check_interval": 1, "enable_progress_bar": False},
        "model.init_args.policy.path": policy.spec.path,
        "model.init_args.teacher": {"class_path": "Local", "init_args": {"path": policy.spec.path}},
        "model.init_args.source.lmbda": 0.0,
        "model.init_args.optimizer.lr": 0.01,
        "model.init_args.validation.sampling": {"temperature": 0, "max_new_tokens": 8},
        "model.init_args.fidelity": {"answers": False, "sampling": {"max_new_tokens": 8}},
        "data.init_args.train.options.n": 16,
        "data.init_args.validation.options.n": 4,
        "data.init_args.global_batch_size": 8,
    }
    there = {"model.init_args.engine": {"class_path": "VLLMServer", "init_args": {"urls": server.address}}}
    found = {}
    for name, engine in (("here", {}), ("there", there)):
        fit(["tiny/gkd"], settings | engine, out=tmp_path / name)
        rows = [row for row in read_metrics(tmp_path / name) if "val/loss" in row]
        found[name] = [{k: v for k, v in row.items() if k[:4] == "val/" and "fidelity" not in k} for row in rows]
    assert len(found["there"]) == 2
    assert "val/accuracy" in found["there"][0]
    for a, b in zip(found["here"], found["there"], strict=True):
        assert b == pytest.approx(a, abs=1e-4)
    sent = [i for i, (path, _) in enumerate(server.posts) if path == "/collective_rpc"]
    asked = [i for i, (path, _) in enumerate(server.posts) if path == "/v1/completions"]
    between = [sum(a < i < b for i in asked) for a, b in zip(sent, [*sent[1:], len(server.posts)], strict=True)]
    assert between == [8, 8], "four greedy answers and four samples of every version"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"divergence": NKD()}, "divergence NKD reads the whole distribution, .* gives its most likely tokens only"),
        (
            {"source": SourceConfig(lmbda=0.0, teacher=0.5)},
            "source.teacher=0.5 samples from the teacher, .* beforehand",
        ),
        ({"divergence": JSD(temperature=2.0)}, "divergence.temperature divides the logits .* set the temperature to 1"),
        ({"fidelity": FidelityConfig()}, "fidelity.answers compares the answers of two models"),
    ],
)
def test_what_a_served_teacher_cannot_do(settings: dict[str, Any], message: str) -> None:
    from stepkd.modules.gkd import GKDModule

    with pytest.raises(ConfigError, match=message):
        GKDModule(PolicyConfig(path="tiny-0.1m"), Served("http://x"), **settings)


# ---- the teacher ---------------------------------------------------------------------------------------------------


def batch_of(policy: Policy) -> Any:
    from stepkd.data.collate import collate
    from stepkd.data.completion import Completion

    texts = (("1+2=", "3\n"), ("7=", ""), ("3*4-5=", "12-5=7\n"))
    examples = [
        Completion(policy.tokenizer(p).input_ids, policy.tokenizer(c).input_ids if c else (), id=str(i))
        for i, (p, c) in enumerate(texts)
    ]
    return collate(examples, 0)


@pytest.mark.parametrize("tail", [True, False])
def test_a_teacher_on_a_server_equals_one_in_this_process(tail: bool, policy: Policy, server: Any) -> None:
    temperature = 1.0
    teacher = ServerTeacher(Served(server.address, top_k=TopK(5, tail)))
    teacher.bind(policy.tokenizer, policy.vocab_size)
    assert teacher.identity() == f"server: {policy.spec.path}"  # type: ignore[union-attr]
    batch = batch_of(policy)
    signals = teacher.signals(batch, temperature=temperature)
    with torch.no_grad():
        hidden_NH = policy.hidden(batch.input_ids_BT, batch.attention_mask_BT).flatten(0, 1)[batch.needed_N]
    local = HiddenSignals(policy.head, hidden_NH, temperature, TopK(5, tail))
    student = torch.log_softmax(torch.randn(len(batch.targets_N), policy.vocab_size), -1)
    ours, theirs = signals.compare(student, *signals.tensors), local.compare(student, *local.tensors)
    assert torch.equal(ours.argmax_C, theirs.argmax_C)
    assert torch.allclose(ours.log_student_CW, theirs.log_student_CW, atol=1e-5)
    assert torch.allclose(ours.log_teacher_CW, theirs.log_teacher_CW, atol=2e-4)
    assert len(signals.tensors[0]) == len(batch.targets_N)


def test_a_batch_without_completions(policy: Policy, server: Any) -> None:
    from stepkd.data.collate import collate
    from stepkd.data.completion import Completion

    teacher = ServerTeacher(Served(server.address, top_k=TopK(5)))
    teacher.bind(policy.tokenizer)
    empty = collate([Completion(prompts(policy)[0], (), id="x")], 0)
    assert teacher.signals(empty, temperature=1.0).tensors[0].shape == (0, 5)


def test_teachers_that_do_not_fit(policy: Policy, server: Any, tmp_path: Path) -> None:
    server.name = str(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"cannot be loaded from .*name its folder or hub id in teacher.tokenizer"):
        ServerTeacher(Served(server.address, top_k=TopK(5))).bind(policy.tokenizer)
    assert policy.spec is not None
    teacher = ServerTeacher(Served(server.address, policy.spec.path, TopK(5)))
    teacher.bind(policy.tokenizer)

    def shorter(answer: Any) -> Any:
        for choice in answer["choices"]:
            choice["prompt_logprobs"].pop()
        return answer

    server.spoil = shorter
    with pytest.raises(ModelError, match=r"scored 1 tokens of row '0', which has 2"):
        teacher.signals(batch_of(policy), temperature=1.0)


def test_rows_beyond_the_servers_context(policy: Policy, server: Any) -> None:
    batch = batch_of(policy)
    longest = max(example.length for example in batch.examples)
    server.context = longest  # which has to hold the token that a server writes behind them
    teacher = ServerTeacher(Served(server.address, top_k=TopK(5)))
    teacher.bind(policy.tokenizer)
    assert teacher.max_length == longest - 1
    with pytest.raises(ConfigError, match=rf"has {longest} tokens and the teacher's context is {longest - 1}: lower"):
        teacher.signals(batch, temperature=1.0)
