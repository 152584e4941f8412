"""KDRL is what plain logits of its own samples give, in every form; failing rewards stop a run and name the sample."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked
import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from stepkd.cli import main
from stepkd.data.batching import BatchPlan, StepLoader
from stepkd.errors import ConfigError, TrainingError
from stepkd.losses import group_advantages, kl_estimate, reverse_kl
from stepkd.models.policy import Policy
from stepkd.models.spec import PolicyConfig
from stepkd.modules.kdrl import KDRLModule
from stepkd.modules.kdrl_settings import (
    AsAdvantage,
    ExactKL,
    Linear,
    PolicyLossConfig,
    RolloutConfig,
    SampledKL,
    SampleLogConfig,
    StepCreditConfig,
    Switch,
)
from stepkd.modules.rewards import RewardConfig, Rewards
from stepkd.runs.logger import JsonlLogger
from stepkd.sampling.engine import SamplingConfig
from stepkd.sampling.transformers_engine import TransformersEngine
from stepkd.teachers.config import SelfAverage, TopK

WORKER = Path(__file__).with_name("kdrl_worker.py")
_SPEC = importlib.util.spec_from_file_location("kdrl_worker", WORKER)
assert _SPEC is not None
worker = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(worker)  # type: ignore[union-attr]

TOLERANCE = 1e-10


def rollout_of(n: int, max_new_tokens: int, *, temperature: float = 1.0, top_p: float = 1.0, **settings: Any) -> Any:
    """Settings of short groups."""
    sampling = SamplingConfig(n=n, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
    return RolloutConfig(sampling, **settings)


@pytest.fixture(scope="module", autouse=True)
def norms_in_full_precision() -> Iterator[None]:
    """See :func:`worker.full_precision_norm`."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaRMSNorm, "forward", worker.full_precision_norm)
        yield


@pytest.fixture(scope="module")
def rows() -> list[Any]:
    return list(worker.examples())


@pytest.fixture(scope="module")
def views() -> tuple[Policy, Policy]:
    """Policy as it starts, and teacher."""
    teacher = Policy.load(PolicyConfig(path="tiny-0.5m", dtype="float64"))
    return Policy.load(PolicyConfig(**worker.POLICY)), teacher


def token_values(
    views: tuple[Policy, Policy], rollout: Any, *, temperature: float = 1.0, buckets: tuple[int, bool] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of a rollout's tokens, the teacher's, and the exact reverse KL, from plain logits.

    With ``buckets`` the KL is over the teacher's k likeliest tokens, and over the rest as one or not at all.
    """
    ids, start = torch.tensor([[*rollout.prompt_ids, *rollout.token_ids]]), len(rollout.prompt_ids)
    own, other = ((v.model(input_ids=ids).logits[0, start - 1 : -1] / temperature).log_softmax(-1) for v in views)
    targets = ids[0, start:, None]
    if buckets is not None:
        chosen = other.topk(buckets[0], dim=-1).indices
        parts = []
        for log in (own, other.detach()):
            kept = log.exp().gather(-1, chosen)
            rest = 1 - kept.sum(-1, keepdim=True)
            parts.append((torch.cat([kept, rest], -1) if buckets[1] else kept / kept.sum(-1, keepdim=True)).log())
        exact = (parts[0].exp() * (parts[0] - parts[1])).sum(-1)
        return own.gather(-1, targets)[:, 0], other.detach().gather(-1, targets)[:, 0], exact
    return own.gather(-1, targets)[:, 0], other.detach().gather(-1, targets)[:, 0], reverse_kl(own, other.detach())


def divided(kind: str, parts: list[Tensor], rollouts: list[Any], kept: list[bool] | None = None) -> Tensor:
    """A normalisation written out with loops."""
    kept = [True] * len(parts) if kept is None else kept
    lengths = [len(part) for part in parts]
    if kind == "dapo":
        return torch.stack([part.sum() for part in parts]).sum() / sum(
            n for n, k in zip(lengths, kept, strict=True) if k
        )
    if kind == "grpo":
        return torch.stack([part.mean() for part in parts]).sum() / sum(kept)
    if kind == "dr_grpo":
        return torch.stack([part.sum() for part in parts]).sum() / (worker.ROLLOUT.sampling.max_new_tokens * sum(kept))
    groups = sorted({r.group for r, k in zip(rollouts, kept, strict=True) if k})
    means = []
    for group in groups:
        inside = [i for i, rollout in enumerate(rollouts) if rollout.group == group and kept[i]]
        total = torch.stack([part.sum() for i, part in enumerate(parts) if rollouts[i].group == group]).sum()
        means.append(total / sum(lengths[i] for i in inside))
    return torch.stack(means).mean()


def expected(
    views: tuple[Policy, Policy], rollouts: list[Any], *, kind: str = "group_token_mean", beta: float = 0.0, **how: Any
) -> dict[str, Tensor]:
    """Gradients of policy gradient and distillation, one unpadded row at a time."""
    policy = views[0]
    policy.zero_grad()
    rewards = torch.tensor([rollout.reward for rollout in rollouts], dtype=torch.float64)
    advantages = group_advantages(rewards, torch.tensor([rollout.group for rollout in rollouts]))
    policy_parts, kd_parts = [], []
    for rollout, advantage in zip(rollouts, advantages, strict=True):
        asked = how.get("exact")
        buckets = asked if isinstance(asked, tuple) else None
        own, other, exact = token_values(views, rollout, temperature=how.get("temperature", 1.0), buckets=buckets)
        policy_parts.append(-advantage * (own - own.detach()).exp())
        kd = exact if asked else kl_estimate(how.get("estimator", "k2"), own, other)
        kd_parts.append(kd * (how["masked"](rollout, rollouts) if "masked" in how else 1.0))
    loss = how.get("weight", 1.0) * divided(kind, policy_parts, rollouts)
    if beta:
        loss = loss + beta * divided(kind, kd_parts, rollouts)
    loss.backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["group_token_mean", "dapo", "grpo", "dr_grpo"])
@pytest.mark.parametrize("layout", [{}, {"micro_batch_tokens": 60, "chunk_size": 3}])
def test_gradients_of_both_terms(
    kind: Any, layout: dict[str, Any], views: Any, rows: list[Any], distance: Callable[..., float]
) -> None:
    module = worker.run(rows, policy_loss=PolicyLossConfig(normalisation=kind), kd=SampledKL(beta=0.3), **layout)
    found = expected(views, module.kept[0], kind=kind, beta=0.3)
    assert distance(module.gradients[0], found) < TOLERANCE
    assert len({len(rollout.token_ids) for rollout in module.kept[0]}) > 3
    assert any(rollout.advantages.any() for rollout in module.kept[0])


@pytest.mark.parametrize(
    ("settings", "how"),
    [
        ({"teacher": None}, {}),
        ({"kd": SampledKL(beta=0.3), "policy_loss": PolicyLossConfig(weight=0.0)}, {"beta": 0.3, "weight": 0.0}),
        ({"kd": SampledKL(beta=0.3, estimator="k3")}, {"beta": 0.3, "estimator": "k3"}),
        ({"kd": ExactKL(beta=0.3)}, {"beta": 0.3, "exact": True}),
        ({"kd": ExactKL(beta=0.3, top_k=TopK(4))}, {"beta": 0.3, "exact": (4, True)}),
        ({"kd": ExactKL(beta=0.3, top_k=TopK(4, tail=False))}, {"beta": 0.3, "exact": (4, False)}),
        ({"kd": ExactKL(beta=0.3, top_k=TopK(10**6))}, {"beta": 0.3, "exact": True}),
        (
            {"kd": SampledKL(beta=0.3), "rollout": rollout_of(3, 40, temperature=1.7)},
            {"beta": 0.3, "temperature": 1.7},
        ),
    ],
    ids=[
        "grpo",
        "kd-rkl",
        "k3",
        "full",
        "top-k",
        "no-tail",
        "k-is-all",
        "temperature",
    ],
)
def test_special_cases(
    settings: dict[str, Any], how: dict[str, Any], views: Any, rows: list[Any], distance: Callable[..., float]
) -> None:
    module = worker.run(rows, micro_batch_tokens=90, **settings)
    assert distance(module.gradients[0], expected(views, module.kept[0], **how)) < TOLERANCE


def test_joint_and_advantage_form_are_one_on_policy(rows: list[Any], distance: Callable[..., float]) -> None:
    joint, shaped = (worker.run(rows, kd=form(beta=0.3)).gradients[0] for form in (SampledKL, AsAdvantage))
    assert distance(shaped, joint) < TOLERANCE


@pytest.mark.parametrize("mask", ["response", "group"])
def test_masks(mask: Any, views: Any, rows: list[Any], distance: Callable[..., float], monkeypatch: Any) -> None:
    def correct(self: Any, columns: Any) -> list[bool]:  # a random model has no correct answers
        written = zip(columns["completion_ids"], columns["rows"], strict=True)
        return [sum(ids) % 2 == 0 and row["id"] != rows[0].id for ids, row in written]

    monkeypatch.setattr(Rewards, "correct", correct)
    module = worker.run(rows, kd=SampledKL(beta=0.3, mask=mask))
    rollouts = module.kept[0]

    def masked(rollout: Any, every: list[Any]) -> float:
        if mask == "response":
            return float(not rollout.correct)
        return float(not any(other.correct for other in every if other.group == rollout.group))

    share = [masked(rollout, rollouts) for rollout in rollouts]
    assert 0 < sum(share) < len(share)
    how = {"beta": 0.3, "masked": masked}
    assert distance(module.gradients[0], expected(views, rollouts, **how)) < TOLERANCE
    assert module.logged[0]["distilled"] == pytest.approx(sum(share) / len(share))


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path, distance: Callable[..., float]) -> None:
    done = forked.run([str(tmp_path / "out"), "5"], ranks=2, script=WORKER)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(f"{tmp_path / 'out'}.{rank}", weights_only=True) for rank in range(2)]
    rows = worker.examples(5)
    for name, settings in (
        ("kdrl", {"kd": SampledKL(beta=0.3)}),
        ("dapo", {"kd": ExactKL(beta=0.3), "policy_loss": PolicyLossConfig(normalisation="dapo")}),
    ):
        alone = worker.facts(worker.run(rows, steps=2, micro_batch_tokens=120, chunk_size=5, **settings))
        assert [rank[name]["world"] for rank in ranks] == [2, 2]
        for step in range(2):
            texts = [sorted(ids for rank in ranks for ids in rank[name]["written"][step].values())]
            assert texts == [sorted(alone["written"][step].values())], "other samples"
            for rank in ranks:
                assert distance(rank[name]["gradients"][step], alone["gradients"][step]) < TOLERANCE
                for metric in ("pg", "kd", "reward", "length", "entropy", "kl_to_teacher"):
                    found = rank[name]["logged"][step][metric]
                    assert found == pytest.approx(alone["logged"][step][metric], rel=1e-5, abs=1e-8), metric


@pytest.mark.slow
def test_a_rank_without_examples(tmp_path: Path, distance: Callable[..., float]) -> None:
    """It computes a dummy, which is no sample and raises no alarm."""
    done = forked.run([str(tmp_path / "out"), "1"], ranks=2, script=WORKER)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "sampler and trainer" not in done.stderr
    ranks = [torch.load(f"{tmp_path / 'out'}.{rank}", weights_only=True)["kdrl"] for rank in range(2)]
    assert sorted(len(rank["written"][0]) for rank in ranks) == [0, 4]
    alone = worker.run(worker.examples(1), steps=2, micro_batch_tokens=120, chunk_size=5, kd=SampledKL(beta=0.3))
    assert distance(ranks[0]["gradients"][1], alone.gradients[1]) < TOLERANCE


def test_several_steps_on_one_batch(views: Any, rows: list[Any], distance: Callable[..., float]) -> None:
    """The second step's ratio is taken against the policy before the first, and clips."""
    bounds = {"clip_low": 1e-4, "clip_high": 1e-4}
    module = worker.run(rows, steps=2, teacher=None, policy_loss=PolicyLossConfig(num_iterations=2, **bounds))
    first, second = module.logged[:2]
    assert len(module.kept) == 1
    assert distance(module.gradients[0], expected(views, module.kept[0])) < TOLERANCE
    assert first["clip_low"] == first["clip_high"] == 0.0
    assert second["clip_low"] + second["clip_high"] > 0.1
    wide = PolicyLossConfig(num_iterations=2, clip_high=9.0, clip_low=0.9)
    unclipped = worker.run(rows, steps=2, teacher=None, policy_loss=wide)
    assert distance(unclipped.gradients[0], module.gradients[0]) < TOLERANCE
    assert distance(unclipped.gradients[1], module.gradients[1]) > 0.1, "clipping takes gradients away"


def test_sampler_and_trainer_agree(rows: list[Any]) -> None:
    module = worker.run(rows, policy={"dtype": "float32"}, teacher=None)
    logged = module.logged[0]
    assert logged["sampler_mismatch"] < 1e-4
    assert logged["sampler_mismatch"] <= logged["sampler_mismatch_max"] < 1e-3


def hotter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plant a sampler that draws at another temperature than the loss knows of."""
    sample = TransformersEngine.generate

    def hot(self: Any, prompts: Any, spec: Any, **options: Any) -> Any:
        return sample(self, prompts, replace(spec, temperature=2.0), **options)

    monkeypatch.setattr(TransformersEngine, "generate", hot)


def test_a_planted_temperature_is_noticed(rows: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*sampler and trainer")
        worker.run(rows, teacher=None)
    hotter(monkeypatch)
    with pytest.warns(UserWarning, match=r"log-probabilities of sampler and trainer differ by \d\.\d+ nats a token"):
        worker.run(rows, teacher=None)


def test_importance_weights_are_capped(
    views: Any, rows: list[Any], distance: Callable[..., float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples of a hotter policy: every token's gradient is scaled by min(pi / mu, cap)."""
    hotter(monkeypatch)
    settings = {"teacher": None, "policy_loss": PolicyLossConfig(tis_cap=1.1, normalisation="dapo")}
    with pytest.warns(UserWarning, match="sampler and trainer"):
        module = worker.run(rows, **settings)
    policy, rollouts = views[0], module.kept[0]
    policy.zero_grad()
    parts, capped = [], 0
    for rollout in rollouts:
        own, _, _ = token_values(views, rollout)
        weight = (own.detach() - torch.from_numpy(rollout.logprobs)).exp()
        capped += int((weight > 1.1).sum())
        advantage = torch.from_numpy(rollout.advantages)
        parts.append((-advantage * (own - own.detach()).exp() * weight.clamp(max=1.1)).sum())
    (torch.stack(parts).sum() / sum(len(r.token_ids) for r in rollouts)).backward()
    found = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    assert capped
    assert distance(module.gradients[0], found) < TOLERANCE


def test_equal_groups(rows: list[Any]) -> None:
    """They say nothing; counted or not, and drawn anew as often as is asked."""
    same = [RewardConfig("format", options={"pattern": "never"})]
    module = worker.run(rows, rewards=same, policy_loss=PolicyLossConfig(equal_groups="drop"), kd=SampledKL(beta=0.3))
    assert all(rollout.pg_count == 0 and rollout.kd_count > 0 for rollout in module.kept[0])
    assert module.logged[0]["pg"] == 0.0
    assert module.logged[0]["kd"] > 0
    assert module.logged[0]["no_signal"] == 1.0
    kept = worker.run(rows, rewards=same, teacher=None)
    assert kept.logged[0]["grad_norm"] == 0.0
    again = worker.run(rows, rewards=same, rollout=rollout_of(2, 6, dynamic_sampling=2), teacher=None)
    once = worker.run(rows, rewards=same, rollout=rollout_of(2, 6), teacher=None)
    assert [r.key for r in again.kept[0]] != [r.key for r in once.kept[0]]


def test_nothing_to_learn_from_ends_the_run(rows: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepkd.modules.base.MOST_SKIPPED", 3)
    same = [RewardConfig("format", options={"pattern": "never"})]
    with pytest.raises(TrainingError, match=r"no example of 3 batch\(es\) in a row has a single target"):
        worker.run(rows, rewards=same, teacher=None, policy_loss=PolicyLossConfig(equal_groups="drop"))


def test_cut_off_completions(rows: list[Any]) -> None:
    short = rollout_of(4, 40, truncated="mask", overlong_penalty=4)
    module = worker.run(rows, rollout=short)
    cut = [rollout for rollout in module.kept[0] if rollout.cut_off]
    whole = [rollout for rollout in module.kept[0] if not rollout.cut_off]
    assert cut
    assert whole
    assert all(rollout.pg_weight == rollout.kd_weight == rollout.pg_count == 0 for rollout in cut)
    assert all(rollout.pg_weight > 0 for rollout in whole)
    plain = [-max(0, len(r.token_ids) - 20) / 20 + 0.5 * bool(re.search(r"\d", r.text)) for r in module.kept[0]]
    for rollout, reward in zip(module.kept[0], plain, strict=True):
        assert rollout.reward == pytest.approx(reward - short.penalty(len(rollout.token_ids)))
    assert any(short.penalty(len(rollout.token_ids)) > 0 for rollout in module.kept[0])
    assert [short.penalty(n) for n in (36, 37, 38, 40, 99)] == [0.0, 0.25, 0.5, 1.0, 1.0]
    assert RolloutConfig().penalty(10_000) == 0.0


def test_a_stand_in_for_what_was_drawn_is_left_out(rows: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM may draw an id that no token has; the others of its group are compared among themselves."""
    generate = TransformersEngine.generate

    def drawn(*arguments: Any, **options: Any) -> Any:
        found = generate(*arguments, **options)
        said = np.array([-9.0])
        end_token = {"token_ids": np.array([1]), "logprobs": said, "raw_logprobs": said, "finish": "length", "text": ""}
        found[0][1] = replace(found[0][1], **end_token)
        return found

    monkeypatch.setattr(TransformersEngine, "generate", drawn)
    module = worker.run(rows, rollout=rollout_of(4, 6))
    groups = [[rollout for rollout in module.kept[0] if rollout.group == number] for number in (0, 1)]
    assert [[rollout.sample for rollout in own] for own in groups] == [[0, 2, 3], [0, 1, 2, 3]]
    rewards = torch.tensor([rollout.reward for rollout in groups[0]], dtype=torch.float64)
    expected = group_advantages(rewards, torch.zeros(3, dtype=torch.int64)).tolist()
    assert [rollout.advantages[0] for rollout in groups[0]] == pytest.approx(expected)
    assert module.logged[0]["sampler_mismatch"] < 1e-6


def test_schedules() -> None:
    paper = SampledKL(beta=5e-3, schedule=Linear())
    assert [paper.schedule.coefficient(paper.beta, step) for step in (0, 40, 80, 500)] == pytest.approx(
        [5e-3, 3e-3, 1e-3, 1e-3]
    )
    switch = SampledKL(beta=0.1, schedule=Switch(3))
    assert [switch.schedule.coefficient(switch.beta, step) for step in (0, 2, 3, 9)] == [0.1, 0.1, 0.0, 0.0]
    assert [switch.schedule.policy_share(step) for step in (0, 2, 3, 9)] == [0.0, 0.0, 1.0, 1.0]
    assert SampledKL().schedule.coefficient(SampledKL().beta, 999) == 2e-3


def test_a_switch_distils_first(rows: list[Any]) -> None:
    module = worker.run(rows, steps=3, kd=SampledKL(beta=0.3, schedule=Switch(2)))
    assert [step["kd"] > 0 for step in module.logged] == [True, True, False]
    assert [step["pg"] == 0 for step in module.logged[:2]] == [True, True]


def test_validation_is_the_cross_entropy_of_given_solutions(rows: list[Any]) -> None:
    """Neither rollouts nor a teacher: every token of every solution alike, in a module that has never trained."""
    module = worker.KDRL(
        PolicyConfig(**worker.POLICY), teacher=worker.TEACHER, rollout=worker.ROLLOUT, micro_batch_tokens=60
    )
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    plan = BatchPlan([row.size for row in rows], size=3, shuffle=False)
    (found,) = trainer.validate(module, StepLoader(rows, plan), verbose=False)
    total, number = 0.0, 0
    for row in rows:
        ids, start = torch.tensor([[*row.prompt_ids, *row.token_ids]]), len(row.prompt_ids)
        logits = module.model.model(input_ids=ids).logits[0, start - 1 : -1].detach()
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, start:], reduction="sum"))
        number += len(row.token_ids)
    assert found["val/loss"] == pytest.approx(total / number, rel=1e-6)
    assert "val/kd" not in found, "there is nothing to count"


# ---- rewards ---------------------------------------------------------------------------------------------------------


def custom(completions: list[str], steps: list[list[str]], bonus: float = 0.0, **columns: Any) -> list[float]:
    """In TRL's signature."""
    assert set(columns) >= {"prompts", "completion_ids", "answer", "rows"}
    return [float(len(step)) + bonus for step in steps]


def failing(completions: list[str], **_: Any) -> list[float]:
    raise KeyError("price")


def short(completions: list[str], **_: Any) -> list[float]:
    return [1.0]


def undefined(completions: list[str], **_: Any) -> list[Any]:
    return [0.5, math.nan, *[1.0] * (len(completions) - 2)]


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> str:
    """This module under a name that a recipe can give."""
    monkeypatch.setitem(sys.modules, "my_rewards", sys.modules[__name__])
    return "my_rewards"


def test_functions_of_ones_own(importable: str, rows: list[Any]) -> None:
    specs = [
        RewardConfig(f"{importable}:custom", weight=0.1, options={"bonus": 2.0}),
        RewardConfig("accuracy", weight=3.0),
    ]
    module = worker.run(rows, rewards=specs, teacher=None)
    for rollout in module.kept[0]:
        steps = len(rollout.steps)
        assert rollout.reward == pytest.approx(0.1 * (steps + 2.0) + 3.0 * rollout.correct)
        assert rollout.parts == {f"{importable}:custom": steps + 2.0, "accuracy": float(rollout.correct)}
    assert module.logged[0]["reward/accuracy"] >= 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("failing", r"the reward 'my_rewards:failing' failed on the 16 completions .*/0' to .*/3': KeyError: 'price'"),
        ("short", "the reward 'my_rewards:short' gave 1 values for 16 completions"),
        ("undefined", r"the reward 'my_rewards:undefined' gave nan for '.*/1'"),
    ],
)
def test_rewards_that_fail(name: str, message: str, importable: str, rows: list[Any]) -> None:
    with pytest.raises(TrainingError, match=message):
        worker.run(rows, rewards=[RewardConfig(f"{importable}:{name}")], teacher=None)


def test_an_attribute_error_in_a_factory_comes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.nn.Module`` would say that the module has no ``sampler``."""

    def broken(*_: Any) -> None:
        raise AttributeError("'Settings' object has no attribute 'limit'")

    monkeypatch.setattr("stepkd.modules.kdrl.Rewards", broken)
    module = KDRLModule(PolicyConfig(path="tiny-0.1m"))
    vars(module)["sampled_accuracy"] = SimpleNamespace(grader=None, close=lambda: None)
    with pytest.raises(RuntimeError, match=r"KDRLModule\.sampler cannot be made: 'Settings' .* attribute 'limit'"):
        _ = module.sampler


def test_a_second_fit_makes_a_sampler_with_workers_of_its_own() -> None:
    module = KDRLModule(PolicyConfig(path="tiny-0.1m"))
    vars(module).update(sampler=object(), sampled_accuracy=SimpleNamespace(close=lambda: None))
    module.teardown("fit")
    assert not {"sampler", "sampled_accuracy"} & set(vars(module))


def test_rewards_of_steps() -> None:
    columns: dict[str, list[Any]] = {
        "rows": [{"id": "a", "prompt": "?"}] * 3,
        "steps": [["3 + 4 = 7", "7 * 2 = 15"], ["3 + 4 = 7"], []],
        "completions": ["", "", ""],
    }
    for reduce, values in (("mean", [0.5, 1.0, 0.0]), ("min", [0.0, 1.0, 0.0])):
        spec = RewardConfig("steps", options={"scorer": "arithmetic", "reduce": reduce})
        assert Rewards([spec], None)(columns, ["a", "b", "c"])[0] == values  # type: ignore[arg-type]


def test_rows_without_an_answer(rows: list[Any]) -> None:
    bare = [replace(row, row={"id": row.id, "prompt": "x"}) for row in rows]
    assert all(rollout.correct is None for rollout in worker.run(bare, teacher=None).kept[0])
    with pytest.raises(TrainingError, match=r"the reward 'accuracy' failed on .*KeyError: 'answer'"):
        worker.run(bare, rewards=[RewardConfig("accuracy")], teacher=None)


def skipping(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    """Nothing to say of the first two completions of a group of four."""
    return [float(len(ids)) if i % 4 > 1 else None for i, ids in enumerate(completion_ids)]


def telling(
    completion_ids: list[list[int]], log_metric: Any, log_extra: Any, trainer_state: Any, **_: Any
) -> list[float | None]:
    """One value, for the first completion of a group; the rest are passed over."""
    log_metric("mine", 2.0 + trainer_state.global_step)
    log_metric("mine", 4.0 + trainer_state.global_step)
    log_extra("place", [f"{trainer_state.max_steps}/{i}" for i in range(len(completion_ids))])
    return [1.0 if i % 4 == 0 else None for i in range(len(completion_ids))]


def test_completions_that_rewards_pass_over(
    rows: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A None is left out of the sum; where all are None the completion has no advantage, and no part in the mean."""
    module = worker.run(rows, rewards=[skipping, RewardConfig(telling, weight=3.0)], teacher=None, folder=tmp_path)  # type: ignore[arg-type]
    kept = module.kept[0]
    for first in range(0, len(kept), 4):
        group = kept[first : first + 4]
        assert [r.parts["telling"] for r in group] == [1.0, None, None, None]
        assert group[0].reward == 3.0
        assert math.isnan(group[1].reward)
        assert [r.reward for r in group[2:]] == [float(len(r.token_ids)) for r in group[2:]]
        known = [group[i] for i in (0, 2, 3)]
        expected = group_advantages(torch.tensor([r.reward for r in known], dtype=torch.float64), torch.zeros(3).long())
        assert [r.advantages[0] for r in known] == pytest.approx(expected.tolist())
        assert not group[1].advantages.any()
    logged = module.logged[0]
    assert logged["reward"] == pytest.approx(sum(r.reward for r in kept if r.reward == r.reward) / (len(kept) * 3 / 4))
    assert logged["reward/telling"] == 1.0
    assert logged["mine"] == 3.0
    [sample, *_] = json.loads((tmp_path / "samples.jsonl").read_text())["samples"]
    assert sample["extra"] == {"place": "1/0"}
    assert sample["rewards"] == {"skipping": None, "telling": 1.0}
    assert main(["samples", str(tmp_path), "--number", "16"]) == 0
    shown = capsys.readouterr().out
    shown = " ".join(shown.split())
    assert "reward 3, skipping none, telling 1" in shown
    assert "reward none, " in shown


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rollout_of(0, 4), "n=0: must be at least 1"),
        (lambda: rollout_of(2, 4, temperature=0.0), "rollout.sampling.temperature=0: must be positive"),
        (lambda: rollout_of(2, 4, top_p=0.9), "rollout.sampling: top_p=0.9, top_k=0: .* cut its distribution"),
        (lambda: RolloutConfig(truncated="drop"), "unknown rollout.truncated 'drop'"),  # type: ignore[arg-type]
        (lambda: RolloutConfig(overlong_penalty=0), r"rollout.overlong_penalty=0: must lie in \[1, 256\]"),
        (lambda: RolloutConfig(dynamic_sampling=-1), "rollout.dynamic_sampling=-1"),
        (lambda: PolicyLossConfig(normalisation="trpo"), "unknown policy_loss.normalisation 'trpo'"),  # type: ignore[arg-type]
        (lambda: PolicyLossConfig(clip_low=1.0), "policy_loss.clip_low=1.0"),
        (lambda: PolicyLossConfig(num_iterations=0), "policy_loss.num_iterations=0"),
        (lambda: PolicyLossConfig(tis_cap=0.0), "policy_loss.tis_cap=0.0"),
        (lambda: PolicyLossConfig(weight=-1.0), "policy_loss.weight=-1.0"),
        (lambda: ExactKL(beta=-1.0), "kd.beta=-1.0"),
        (lambda: Switch(0), "kd.schedule.until_step=0"),
        (lambda: Linear(delta=-1.0), "kd.schedule.delta=-1.0"),
        (lambda: AsAdvantage(beta=-1.0), "kd.beta=-1.0"),
        (lambda: SampledKL(mask="all"), "unknown kd.mask 'all'"),  # type: ignore[arg-type]
        (lambda: SampledKL(estimator="k4"), "unknown kd.estimator 'k4'"),  # type: ignore[arg-type]
        (lambda: TopK(0), "top_k.k=0"),
        (lambda: StepCreditConfig("checker", weight=-1.0), "step_credit.weight=-1.0"),
        (lambda: StepCreditConfig("checker", outcome_weight=-1.0), "step_credit.outcome_weight=-1.0"),
        (lambda: StepCreditConfig("checker", discount=1.1), "step_credit.discount=1.1"),
        (lambda: SampleLogConfig(every=0), "samples.every=0: must be at least 1"),
        (lambda: RewardConfig("acuracy"), "unknown reward 'acuracy'. Did you mean 'accuracy'"),
        (lambda: RewardConfig("format"), "'format' needs the option 'pattern'"),
        (lambda: RewardConfig("length", options={"limit": 3, "max": 4}), "'length' has no option 'max'"),
        (lambda: RewardConfig(weight=math.nan), "weight=nan of 'accuracy'"),
        (lambda: Rewards([RewardConfig("format", options={"pattern": None})], None), "pattern=None of 'format'"),  # type: ignore[arg-type]
        (lambda: Rewards([RewardConfig("format", options={"pattern": "("})], None), "pattern '\\('"),  # type: ignore[arg-type]
        (lambda: Rewards([RewardConfig("no.such:thing")], None), "cannot be imported"),  # type: ignore[arg-type]
        (
            lambda: Rewards([RewardConfig("math:pi")], None),
            "'math:pi' does not take its options: .* is not a callable object",
        ),  # type: ignore[arg-type]
        (
            lambda: KDRLModule(PolicyConfig(), policy_loss=PolicyLossConfig(weight=0.0)),
            "policy_loss.weight=0 with teacher None, .* nothing would be left to learn from",
        ),
        (lambda: KDRLModule(PolicyConfig(), rewards=[]), "rewards: give at least one"),
        *[
            (lambda changes=changes: KDRLModule(PolicyConfig(), teacher=worker.TEACHER, **changes), message)
            for changes, message in (
                (
                    {"kd": AsAdvantage(), "policy_loss": PolicyLossConfig(weight=0.5)},
                    "kd: AsAdvantage distils through the policy-gradient term, which policy_loss.weight 0.5",
                ),
                ({"kd": AsAdvantage(), "policy_loss": PolicyLossConfig(equal_groups="drop")}, "or equal_groups: drop"),
                ({"kd": ExactKL(beta=0.0), "policy_loss": PolicyLossConfig(weight=0.0)}, "nothing would be left"),
                (
                    {"kd": SampledKL(schedule=Switch(2)), "policy_loss": PolicyLossConfig(weight=0.0)},
                    "kd.schedule Switch: nothing would be left",
                ),
                (
                    {"rollout": RolloutConfig(dynamic_sampling=1), "policy_loss": PolicyLossConfig(weight=0.0)},
                    "has no use for step_credit and rollout.dynamic_sampling",
                ),
            )
        ],
        (lambda: KDRLModule(PolicyConfig(), kd=SampledKL(schedule=Switch(1))), "and there is no teacher"),
        (
            lambda: KDRLModule(PolicyConfig(), teacher=SelfAverage()),
            "KDRL distils from another model, and the teacher SelfAverage is the student itself",
        ),
        (lambda: KDRLModule(PolicyConfig(), rollout=rollout_of(1, 4)), "needs at least 2"),
    ],
)
def test_mistakes(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_samples_lie_beside_the_metrics_whatever_the_order_of_loggers(tmp_path: Path) -> None:
    module = KDRLModule(PolicyConfig("tiny-0.1m"))
    module.configure_model()
    module._trainer = SimpleNamespace(loggers=[JsonlLogger(tmp_path / "run"), CSVLogger(tmp_path / "own")])  # type: ignore[assignment]
    module.begin()
    assert module._sample_log.path == tmp_path / "run" / "samples.jsonl"
