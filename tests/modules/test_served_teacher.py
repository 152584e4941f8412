"""A teacher on a server gives what the same model in this process gives, whatever of it a method reads."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import vllm_standin as standin

from stepkd.data.collate import collate
from stepkd.data.completion import Completion
from stepkd.data.templates import PromptTemplate
from stepkd.errors import ConfigError, ModelError
from stepkd.losses import forward_kl, generalized_jsd, reverse_kl
from stepkd.models.policy import Policy
from stepkd.models.spec import PolicyConfig, tiny_tokenizer
from stepkd.modules.gkd_settings import JSD
from stepkd.modules.kdrl import KDRLModule
from stepkd.modules.kdrl_settings import AsAdvantage, ExactKL, RolloutConfig, SampledKL
from stepkd.sampling.engine import SamplingConfig
from stepkd.sampling.vllm import Scores, ServerEngine
from stepkd.teachers.cache import CachedTeacher, write_cache
from stepkd.teachers.config import Cached, Local, Served, TopK
from stepkd.teachers.local import LocalTeacher
from stepkd.teachers.server import LEAST_TAIL, ServerTeacher

TESTS = Path(__file__).parents[1]
OWN = PromptTemplate(system="You add numbers.", user="Solve {prompt}")


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(Path(name).stem, TESTS / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gkd = script("modules/gkd_worker.py")
kdrl = script("modules/kdrl_worker.py")
LOCAL: Local = gkd.TEACHER


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    """The teacher of the tests of GKD and KDRL."""
    found = standin.StandIn(Policy.load(PolicyConfig(path="tiny-0.5m", dtype="float64")), "teacher")
    yield found
    found.close()


@pytest.fixture
def served(server: Any) -> Served:
    server.requests.clear()
    return Served(server.address, "tiny-0.5m", TopK(4))


@pytest.fixture(scope="module")
def rows() -> list[Any]:
    return list(gkd.examples(4))


def completion(token: int) -> Completion:
    return Completion(np.array([0]), np.array([token]))


def says(monkeypatch: pytest.MonkeyPatch, ids: list[int], probabilities: list[float], own: float) -> ServerTeacher:
    """A teacher whose server says this of one token."""
    said = Scores(np.log(np.array([own])), np.array([ids]), np.log(np.array([probabilities])))
    monkeypatch.setattr(ServerEngine, "score", lambda *_: [said])
    teacher = ServerTeacher(Served("http://x", top_k=TopK(len(ids))))
    teacher.client = SimpleNamespace()  # type: ignore[assignment]
    return teacher


@pytest.mark.parametrize("target", [1, 2])
def test_divergences_by_hand(target: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher has 1/2, 1/4 and two of 1/8, of which one bucket is made; the student a quarter each."""
    teacher = says(monkeypatch, [1, 3], [0.5, 0.25], {1: 0.5, 2: 0.125}[target])
    signals = teacher.signals(collate([completion(target)], 0), temperature=1.0)
    student, other, argmax = signals.compare(torch.full((1, 4), math.log(0.25), dtype=torch.float64), *signals.tensors)
    assert argmax.tolist() == [1]
    assert other.exp()[0].tolist() == pytest.approx([0.5, 0.25, 0.25])
    assert student.exp()[0].tolist() == pytest.approx([0.25, 0.25, 0.5])
    assert float(forward_kl(student, other)) == pytest.approx(0.25 * math.log(2))
    assert float(reverse_kl(student, other)) == pytest.approx(0.25 * math.log(2))
    middle = [0.375, 0.25, 0.375]
    halves = [
        sum(p * math.log(p / m) for p, m in zip(side, middle, strict=True))
        for side in ([0.5, 0.25, 0.25], [0.25, 0.25, 0.5])
    ]
    assert float(generalized_jsd(student, other, beta=0.5)) == pytest.approx(sum(halves) / 2)


@pytest.mark.parametrize(("own", "tail"), [(0.9, LEAST_TAIL), (1e-6, 1e-6), (1e-9, LEAST_TAIL)])
def test_the_others_have_no_less_than_the_target_among_them(
    own: float, tail: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the k most likely sum to one but for rounding."""
    teacher = says(monkeypatch, [1, 3], [0.9, 0.1], own)
    batch = collate([completion(1 if own == 0.9 else 2)], 0)
    _, _, tail_N = teacher.signals(batch, temperature=1.0).tensors
    assert float(tail_N.exp()) == pytest.approx(tail, rel=1e-5)


def test_a_step_of_gkd_is_the_local_teachers(served: Served, rows: list[Any], distance: Callable[..., float]) -> None:
    settings = {"divergence": JSD(beta=0.3), "micro_batch_tokens": 120, "chunk_size": 7}
    local = gkd.run(rows, teacher=replace(LOCAL, top_k=served.top_k), **settings)
    assert distance(gkd.run(rows, teacher=served, **settings).gradients, local.gradients) < 1e-5


@pytest.mark.parametrize(
    "kd", [*(SampledKL(beta=0.3, estimator=name) for name in ("k1", "k2", "k3")), AsAdvantage(beta=0.3)]
)
def test_a_step_of_kdrl_is_the_local_teachers(
    kd: Any, served: Served, server: Any, rows: list[Any], distance: Callable[..., float]
) -> None:
    """The server is asked for the sampled tokens' log-probabilities and no other token's."""
    settings: dict[str, Any] = {"kd": kd, "micro_batch_tokens": 120, "chunk_size": 7}
    settings["rollout"] = RolloutConfig(SamplingConfig(n=2, max_new_tokens=12))
    local, ours = (kdrl.run(rows, teacher=each, **settings) for each in (LOCAL, served))
    assert distance(ours.gradients[0], local.gradients[0]) < 1e-5
    names = ("loss", "pg", "kd", "kl_to_teacher")
    assert [ours.logged[0][name] for name in names] == pytest.approx(
        [local.logged[0][name] for name in names], abs=1e-5
    )
    assert {body["prompt_logprobs"] for body in server.requests} == {0}
    assert distance(local.gradients[0], kdrl.run(rows, **{**settings, "teacher": None}).gradients[0]) > 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"kd": ExactKL()},
            "kd: ExactKL sums over the teacher's whole distribution .*, and the teacher Served gives its most likely",
        ),
        (
            {"rollout": RolloutConfig(SamplingConfig(n=2, temperature=0.7))},
            "rollout.sampling.temperature=0.7 tempers the teacher, too, .* vLLM ignores temperatures .* set the temper",
        ),
    ],
)
def test_what_kdrl_cannot_ask_a_server(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        KDRLModule(PolicyConfig(path="tiny-0.1m"), teacher=Served("http://x"), **settings)
    with pytest.raises(ConfigError, match="set the temperature to 1"):
        ServerTeacher(Served("http://x")).signals(collate([completion(1)], 0), temperature=0.5)


def test_most_likely_tokens_are_no_setting_of_a_method_that_reads_one() -> None:
    with pytest.raises(ConfigError, match=r"teacher Local is compared in its most likely .* teacher\.top_k to null"):
        KDRLModule(PolicyConfig(path="tiny-0.1m"), teacher=Local("tiny-0.1m", top_k=TopK(4)))


# ---- a prompt of its own ---------------------------------------------------------------------------------------------


def logps(policy: Policy, prompt: list[int], own: list[int]) -> torch.Tensor:
    """(T, V) from plain logits."""
    with torch.no_grad():
        logits: torch.Tensor = policy.model(input_ids=torch.tensor([[*prompt, *own]])).logits
    return logits[0, len(prompt) - 1 : -1].log_softmax(-1)


def test_a_teacher_reads_the_tokens_behind_a_prompt_of_its_own(
    served: Served, server: Any, rows: list[Any], tmp_path: Path
) -> None:
    """Local, served and cached: its chat template and system text, the student's tokens."""
    batch = collate(rows, 0)
    local = LocalTeacher(replace(LOCAL, top_k=TopK(4), template=OWN))
    local.bind(tiny_tokenizer())
    remote = ServerTeacher(replace(served, template=OWN))
    remote.bind(tiny_tokenizer())
    write_cache(tmp_path / "cache", local, rows, top_k=4)
    cached = CachedTeacher(Cached(str(tmp_path / "cache")))
    cached.bind(tiny_tokenizer())
    tokenizer = tiny_tokenizer()
    texts = [OWN.render(row.row, tokenizer) for row in rows]
    assert all("You add numbers." in text and row.row["prompt"] in text for text, row in zip(texts, rows, strict=True))
    prompts = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    expected = torch.cat(
        [logps(server.policy, prompt, row.token_ids.tolist()) for prompt, row in zip(prompts, rows, strict=True)]
    )
    of_targets = expected.gather(-1, batch.targets_N[:, None])[:, 0]
    assert torch.allclose(local.target_logps(batch, temperature=1.0, chunk_size=7), of_targets, atol=1e-9)
    assert torch.allclose(remote.target_logps(batch, temperature=1.0), of_targets, atol=1e-9)
    student = torch.randn(len(batch.targets_N), expected.shape[-1], dtype=torch.float64).log_softmax(-1)
    for teacher in (local, remote, cached):
        signals = teacher.signals(batch, temperature=1.0)
        _, other, _ = signals.compare(student, *signals.tensors)
        assert torch.allclose(other[:, :4], expected.topk(4).values, atol=1e-5)
    asked = [body["prompt"] for body in server.requests[-len(rows) :]]
    wanted = [[*prompt, *row.token_ids.tolist()] for prompt, row in zip(prompts, rows, strict=True)]
    assert sorted(asked) == sorted(wanted)


def test_caches_of_different_prompts_are_different_teachers(rows: list[Any], tmp_path: Path) -> None:
    found = []
    for name, template in (("a", None), ("b", OWN), ("c", replace(OWN, system="1"))):
        teacher = LocalTeacher(replace(LOCAL, template=template))
        teacher.bind(tiny_tokenizer())
        write_cache(tmp_path / name, teacher, rows, top_k=2)
        found.append(CachedTeacher(Cached(str(tmp_path / name))).identity())
    assert len(set(found)) == 3


def test_a_server_of_another_vocabulary_is_refused(served: Served, tmp_path: Path) -> None:
    other = tiny_tokenizer()
    other.add_tokens(["<more>"])
    other.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"the teacher's vocabulary is not the model's \(101 and 100 tokens; '<more>'"):
        ServerTeacher(replace(served, tokenizer=str(tmp_path))).bind(tiny_tokenizer())
