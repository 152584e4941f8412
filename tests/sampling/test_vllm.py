"""Continuations and teachers on a server: TRL's client, and a stand-in that speaks the protocol."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from stepkd.errors import ConfigError, DataError, ModelError
from stepkd.models.policy import Policy
from stepkd.models.spec import LoRAConfig, PolicyConfig
from stepkd.modules.fidelity import FidelityConfig
from stepkd.modules.gkd_settings import JSD, NKD, SourceConfig
from stepkd.sampling.config import VLLM, VLLMServer
from stepkd.sampling.engine import SamplingConfig
from stepkd.sampling.vllm import (
    ServerEngine,
    connect,
    merged_weights,
    weight_facts,
)
from stepkd.teachers.config import Local, Served, TopK
from stepkd.teachers.server import ServerTeacher
from stepkd.teachers.signals import HiddenSignals

_FILE = Path(__file__).with_name("vllm_standin.py")
_SPEC = importlib.util.spec_from_file_location("vllm_standin", _FILE)
assert _SPEC is not None
assert _SPEC.loader is not None
standin = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(standin)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """A tiny model in a folder, so that its server can name a tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    policy = Policy.load(PolicyConfig(path="tiny-0.1m", init_seed=1))
    with torch.no_grad():
        for weight in policy.parameters():
            weight.mul_(3)
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return Policy.load(PolicyConfig(path=str(folder)))


@pytest.fixture
def server(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr("trl.generation.vllm_client.is_vllm_available", lambda: True)
    found = standin.StandIn(policy, policy.spec.path)
    yield found
    found.close()


def engine(policy: Policy, server: Any, **settings: Any) -> ServerEngine:
    return ServerEngine(policy, connect(server.address), **settings)


def prompts(policy: Policy) -> list[tuple[int, ...]]:
    return [tuple(policy.tokenizer(text).input_ids) for text in ("1+2=", "3*4-5=", "7=")]


def test_completions_are_the_servers_own(policy: Policy, server: Any) -> None:
    spec = SamplingConfig(n=2, max_new_tokens=12, seed=3)
    done: list[int] = []
    found = engine(policy, server).generate(prompts(policy), spec, step=4, on_progress=done.append)
    assert [[(tuple(r.prompt_ids), r.sample) for r in row] for row in found] == [
        [(prompt, j) for j in range(2)] for prompt in prompts(policy)
    ]
    assert sum(done) == 6
    for prompt, row in zip(prompts(policy), found, strict=True):
        for each in row:
            ids = torch.tensor([[*prompt, *each.token_ids]])
            with torch.no_grad():
                logps = torch.log_softmax(policy.head(policy.hidden(ids, torch.ones_like(ids)))[0], -1)
            own = [float(logps[len(prompt) - 1 + t, token]) for t, token in enumerate(each.token_ids)]
            assert each.logprobs == pytest.approx(own, abs=1e-4)
            assert each.raw_logprobs.tolist() == each.logprobs.tolist()
            assert each.finish == ("stop" if each.token_ids[-1] in policy.eos_ids else "length")
            assert each.text == policy.tokenizer.decode(each.token_ids, skip_special_tokens=True)


def test_noise_is_keyed_by_prompt_and_step(policy: Policy, server: Any) -> None:
    """The same in another order and another company; other noise at another step."""
    spec, texts = SamplingConfig(n=2, max_new_tokens=12), prompts(policy)
    ours = engine(policy, server)
    whole = ours.generate(texts, spec, step=1)
    turned = ours.generate(texts[::-1], spec, step=1, indices=[2, 1, 0])
    assert [[r.key for r in row] for row in turned[::-1]] == [[r.key for r in row] for row in whole]
    again = ours.generate(texts, spec, step=2)
    assert [[r.key for r in row] for row in again] != [[r.key for r in row] for row in whole]
    assert len({body["seed"] for body in server.requests}) == 6
    assert all(body["stop_token_ids"] == sorted(policy.eos_ids) for body in server.requests)


def test_other_temperatures_need_the_correct_log_probabilities(policy: Policy, server: Any) -> None:
    spec = SamplingConfig(temperature=0.7, max_new_tokens=4)
    found = engine(policy, server).generate(prompts(policy)[:1], spec)[0][0]
    assert all(value != value for value in found.raw_logprobs)
    server.mode = "raw_logprobs"
    with pytest.raises(ConfigError, match=r"gives raw_logprobs.*--logprobs-mode processed_logprobs"):
        engine(policy, server).generate(prompts(policy)[:1], spec)
    assert engine(policy, server).generate(prompts(policy)[:1], SamplingConfig(max_new_tokens=2))


def test_stop_strings_and_greedy(policy: Policy, server: Any) -> None:
    greedy = engine(policy, server).generate(prompts(policy)[:1], SamplingConfig(temperature=0, max_new_tokens=8))[0][0]
    assert set(greedy.logprobs) == {0.0}
    stop = greedy.text[2]
    cut = engine(policy, server).generate(
        prompts(policy)[:1], SamplingConfig(temperature=0, max_new_tokens=8, stop=(stop,))
    )[0][0]
    assert cut.finish == "stop"
    assert cut.text == greedy.text[: greedy.text.index(stop)]
    assert server.requests[-1]["include_stop_str_in_output"] is True


def test_a_request_to_stop_ends_the_rest_at_once(policy: Policy, server: Any) -> None:
    found = engine(policy, server, breaks_off=lambda: True).generate(prompts(policy), SamplingConfig(max_new_tokens=20))
    assert [len(row[0].token_ids) for row in found] == [1, 1, 1]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: c.update(token_ids=[]), "gave prompt 0 0 tokens"),
        (lambda c: c.update(token_ids=[5] * 40), "gave prompt 0 40 tokens with 4 log-prob"),
        (lambda c: c.update(prompt_token_ids=[1]), "those of another prompt"),
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


def test_prompts_that_leave_no_room(policy: Policy, server: Any) -> None:
    with pytest.raises(DataError, match="the model's context is"):
        engine(policy, server).generate([(5,) * int(policy.max_length or 0)], SamplingConfig())


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
    facts = weight_facts(trained.model)
    assert facts == [(name, "float32", list(value.shape)) for name, value in sent.items()]
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
    weight_facts(model)
    sent = {name: value.clone() for name, value in merged_weights(model)}
    before = model.get_base_model().get_input_embeddings().weight.detach().clone()
    expected = dict(model.merge_and_unload().named_parameters())
    assert sent.keys() == expected.keys()
    assert all(torch.allclose(sent[name], value, atol=1e-6) for name, value in expected.items())
    assert not torch.allclose(sent["model.embed_tokens.weight"], before, atol=1e-2)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}])
def test_adapters_that_are_more_than_a_sum_are_merged(settings: dict[str, Any], policy: Policy) -> None:
    model = adapted(policy, target_modules=["q_proj"], biases=True, **settings)
    facts = weight_facts(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sent = {name: value.clone() for name, value in merged_weights(model)}
    assert [name for name, _, _ in facts] == list(sent)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    expected = dict(model.merge_and_unload().named_parameters())
    assert sent.keys() == expected.keys()
    assert all(torch.allclose(sent[name], value, atol=1e-6) for name, value in expected.items())


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_adapter_on_one_of_two_tied_weights_is_not_sent(target: str, policy: Policy) -> None:
    with pytest.raises(ConfigError, match="embeddings and vocabulary head share a weight"):
        weight_facts(adapted(policy, target_modules=[target]))


def test_quantised_weights_are_not_sent(policy: Policy) -> None:
    model = adapted(policy, target_modules=["q_proj"])
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(torch.zeros(4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match=r"up_proj.weight is quantised \(torch.int8\)"):
        weight_facts(model)


def test_memory_that_runs_out_is_not_a_mistake_in_the_recipe(policy: Policy, server: Any) -> None:
    ours = engine(policy, server)

    def full(**_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    ours.client.init_communicator = full
    with pytest.raises(torch.OutOfMemoryError):
        ours.update(0)


def test_weights_are_sent_once_a_version(policy: Policy, server: Any) -> None:
    ours = engine(policy, server)
    sent: list[list[str]] = []

    def update(facts: Any, weights: Any) -> None:
        sent.append([name for name, _ in weights])
        assert [fact[0] for fact in facts] == sent[-1]
        assert facts[0][1:] == ("float32", list(dict(policy.model.named_parameters())[facts[0][0]].shape))

    ours.client.communicator = SimpleNamespace()
    ours.client.update_named_params = update
    for version in (0, 0, 1):
        ours.update(version)
    assert len(sent) == 2
    ours.client.communicator = None
    with pytest.raises(ConfigError, match=r"cannot be sent to the vLLM server: .*weight-transfer"):
        ours.update(2)


def test_what_is_missing_is_said(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl.generation.vllm_client.is_vllm_available", lambda: True)
    with pytest.raises(ConfigError, match=r"no vLLM server answers at http://127.0.0.1:9 within 0.1 s: start it"):
        connect("http://127.0.0.1:9", timeout_s=0.1)
    if importlib.util.find_spec("vllm") is None:
        with pytest.raises(ConfigError, match=r"pip install 'stepkd\[vllm\]'"):
            VLLM().build(policy, SamplingConfig(), lambda: False)
    with pytest.raises(ConfigError, match=r"engine.gpu_memory=2: must lie in \(0, 1\)"):
        VLLM(gpu_memory=2)
    with pytest.raises(ConfigError, match=r"engine.requests=0: must be at least 1"):
        VLLMServer("http://x", requests=0)
    with pytest.raises(ConfigError, match="knows no stop strings"):
        VLLM().build(policy, SamplingConfig(stop=("x",)), lambda: False)


def test_the_engine_on_the_training_gpu(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """What TRL's class is given fits its signature, and what it gives becomes completions; the engine is a
    stand-in."""
    from trl.generation.vllm_generation import VLLMGeneration

    made: dict[str, Any] = {}
    signature = inspect.signature(VLLMGeneration.__init__)
    loaded: list[str] = []
    model = SimpleNamespace(load_weights=lambda pairs: loaded.extend(name for name, _ in pairs))
    worker = SimpleNamespace(model_runner=SimpleNamespace(model=model))
    executor = SimpleNamespace(driver_worker=worker)

    class Engine:
        def __init__(self, **settings: Any) -> None:
            signature.bind(self, **settings)
            made.update(settings)
            self.llm = SimpleNamespace(
                llm_engine=SimpleNamespace(model_executor=executor), reset_prefix_cache=lambda: loaded.append("reset")
            )

        def generate(self, prompts: list[list[int]], images: Any, n: int) -> tuple[Any, ...]:
            return prompts, [[7, 8 + i] for i in range(len(prompts))], [[[-0.5], [-1.0]] for _ in prompts], None

    monkeypatch.setattr("trl.generation.vllm_generation.VLLMGeneration", Engine)
    monkeypatch.setitem(sys.modules, "accelerate", SimpleNamespace(Accelerator=SimpleNamespace))
    spec = SamplingConfig(n=2, max_new_tokens=2)
    ours = cast(Any, VLLM(gpu_memory=0.4).build(policy, spec, lambda: False))
    assert made["mode"] == "colocate"
    assert made["gpu_memory_utilization"] == 0.4
    ours.update(1)
    ours.update(1)
    assert loaded == [*dict(policy.model.named_parameters()), "reset"]
    found = ours.generate(prompts(policy), spec)
    assert [[tuple(r.token_ids) for r in row] for row in found] == [
        [(7, 8), (7, 9)],
        [(7, 10), (7, 11)],
        [(7, 12), (7, 13)],
    ]
    assert found[1][1].logprobs.tolist() == [-0.5, -1.0]


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
    groups = GroupSampler(spec, VLLMServer(server.address), policy, rewards, PhaseTracker(), 0)
    assert isinstance(groups._engine, ServerEngine)
    nothing: Any = SimpleNamespace(examples=(), indices=())
    assert groups(nothing, 3, 0) == groups(nothing, 4, 0) == []
    assert given == [3, 4]
    engine = VLLMServer(server.address)
    module = GKDModule(PolicyConfig(path="tiny-0.1m"), Local("tiny-0.1m"), engine=engine)
    module.policy = policy
    monkeypatch.setattr(GKDModule, "global_step", 5)
    module.teacher.bind(policy.tokenizer)
    assert module.sample(nothing, "student") == []
    assert isinstance(module._engine, ServerEngine)
    assert module.sample(nothing, "teacher") == []
    assert given == [3, 4, 5], "the teacher samples itself"


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
