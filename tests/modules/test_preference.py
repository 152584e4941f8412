"""KTO, Step-KTO and DPO are what plain logits of separate rows give, whatever the packing, padding and split."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from stepkd.data.batching import BatchPlan, Position, StepLoader
from stepkd.data.completion import Completion
from stepkd.errors import ConfigError
from stepkd.models.policy import Policy
from stepkd.models.spec import LoRAConfig, PolicyConfig
from stepkd.modules import preference
from stepkd.modules.dpo import DPOModule, SigmoidByVisits
from stepkd.modules.kto import KTOModule, ReferencePointConfig, StepKTOModule
from stepkd.modules.preference import ReferenceConfig

_SPEC = importlib.util.spec_from_file_location("preference_worker", Path(__file__).with_name("preference_worker.py"))
assert _SPEC is not None
worker = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(worker)  # type: ignore[union-attr]

TOLERANCE = 1e-10
ZERO = {"outcome": "zero", "step": "zero"}
LAYOUTS = [
    {},
    {"shares": False},
    {"layout": {"padding_side": "left"}},
    {"layout": {"padding_side": "left", "pad_to": 173}, "shares": False},
    {"layout": {"pad_to": 160}},
    {"micro_batch_tokens": 60},
    {"micro_batch_tokens": 150, "shares": False},
    {"micro_batch_tokens": 200, "chunk_size": 3},
]


@pytest.fixture(scope="module", autouse=True)
def norms_in_full_precision() -> Iterator[None]:
    """See :func:`worker.full_precision_norms`."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaRMSNorm, "forward", worker.full_precision_norm)
        yield


@pytest.fixture(scope="module")
def views() -> tuple[Policy, Policy]:
    """The policy that is trained, and its reference."""
    return Policy.load(PolicyConfig(**worker.POLICY)), Policy.load(PolicyConfig(path="tiny-0.1m", dtype="float64"))


def ratios(views: tuple[Policy, Policy], prompt: Any, ids: Any) -> Tensor:
    """Token log-ratios of one completion, from plain logits of one unpadded row."""
    whole = torch.tensor([[*prompt, *ids]])
    logps = []
    for view in views:
        logits = view.model(input_ids=whole).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        logps.append(logits.gather(-1, whole[0, len(prompt) :].unsqueeze(-1)).squeeze(-1))
    return logps[0] - logps[1].detach()


def gradients(views: tuple[Policy, Policy], loss: Tensor) -> dict[str, Tensor]:
    views[0].zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in views[0].named_parameters() if p.grad is not None}


def rotated_points(views: tuple[Policy, Policy], examples: list[Any]) -> tuple[float, float]:
    """z0 and z0_step: completions met by the prompt that follows in a rotation without equal prompts."""
    # Two solutions of every problem: ordered by problem, two places further is always another problem.
    prompts = list(dict.fromkeys(tuple(example.prompt_ids) for example in examples))
    order = [example for prompt in prompts for example in examples if tuple(example.prompt_ids) == prompt]
    sums, steps = [], []
    for place, example in enumerate(order):
        other = order[place - 2]
        assert tuple(other.prompt_ids) != tuple(example.prompt_ids)
        with torch.no_grad():
            tokens = ratios(views, example.prompt_ids, other.token_ids)
        sums.append(float(tokens.sum()))
        steps += [float(tokens[start:end].sum()) for start, end in other.spans]
    return max(0.0, sum(sums) / len(sums)), max(0.0, sum(steps) / len(steps))


def term(ratio: Tensor, label: int, z: float, beta: float, weights: Any) -> Tensor:
    """lambda_y - v."""
    sign, weight = (1, weights[0]) if label == 1 else (-1, weights[1])
    return weight * (1 - torch.sigmoid(sign * beta * (ratio - z)))


def brute_step_kto(views: tuple[Policy, Policy], examples: list[Any], reduction: str = "sum_steps") -> Tensor:
    z0, z0_step = rotated_points(views, examples)
    assert z0 > 0
    assert z0_step > 0
    settings = worker.STEP_WEIGHTS
    outcomes, steps, labelled = [], [], 0
    for example in examples:
        tokens = ratios(views, example.prompt_ids, example.token_ids)
        if example.outcome >= 0:
            outcomes.append(term(tokens.sum(), example.outcome, z0, settings["beta"], settings["class_weights"]))
        own = [
            term(tokens[start:end].sum(), label, z0_step, settings["beta"], settings["class_weights"])
            for (start, end), label in zip(example.spans, example.step_labels, strict=True)
            if label >= 0
        ]
        if own:
            labelled += 1
            steps.append(sum(own) / (len(own) if reduction == "mean_steps" else 1))
    return sum(outcomes) / len(outcomes) + settings["loss_weights"]["step"] * sum(steps) / labelled


@pytest.fixture(scope="module")
def examples() -> list[Any]:
    return worker.feedback_examples()


@pytest.fixture(scope="module")
def expected(views: Any, examples: list[Any]) -> tuple[float, dict[str, Tensor]]:
    loss = brute_step_kto(views, examples)
    return float(loss.detach()), gradients(views, loss)


@pytest.mark.parametrize("settings", LAYOUTS, ids=str)
def test_step_kto_whatever_the_layout(
    settings: dict[str, Any], examples: list[Any], expected: Any, distance: Callable[..., float]
) -> None:
    module = worker.run(worker.StepKTO, examples, **worker.STEP_WEIGHTS, **settings)
    assert distance(module.gradients, expected[1]) < TOLERANCE
    assert float(module.trainer.callback_metrics["train/loss"]) == pytest.approx(expected[0], rel=1e-6)
    assert bool(module.shared) == settings.get("shares", True)
    assert (len(module.shapes) > 1) == ("micro_batch_tokens" in settings)


def test_the_mean_over_a_completions_steps(views: Any, examples: list[Any], distance: Callable[..., float]) -> None:
    loss = brute_step_kto(views, examples, "mean_steps")
    module = worker.run(worker.StepKTO, examples, **worker.STEP_WEIGHTS, reduction="mean_steps", micro_batch_tokens=100)
    assert distance(module.gradients, gradients(views, loss)) < TOLERANCE


def test_kto(views: Any, examples: list[Any], distance: Callable[..., float]) -> None:
    z0, _ = rotated_points(views, examples)
    losses = [
        term(ratios(views, e.prompt_ids, e.token_ids).sum(), e.outcome, z0, 0.2, worker.WEIGHTS["class_weights"])
        for e in examples
        if e.outcome >= 0
    ]
    expected = gradients(views, sum(losses) / len(losses))
    module = worker.run(worker.KTO, examples, **worker.WEIGHTS, beta=0.2, micro_batch_tokens=130)
    assert distance(module.gradients, expected) < TOLERANCE
    alone = worker.run(
        worker.StepKTO,
        examples,
        **{**worker.STEP_WEIGHTS, "loss_weights": {"step": 0.0}, "beta": 0.2},
        micro_batch_tokens=130,
    )
    assert distance(alone.gradients, expected) < TOLERANCE


@pytest.mark.parametrize("settings", LAYOUTS, ids=str)
def test_dpo_whatever_the_layout(settings: dict[str, Any], views: Any, distance: Callable[..., float]) -> None:
    pairs = worker.pair_examples()
    losses = []
    for pair in pairs:
        better, worse = (ratios(views, pair.prompt_ids, side.token_ids).sum() for side in pair.completions)
        losses.append(-torch.nn.functional.logsigmoid(0.4 * (better - worse)))
    module = worker.run(worker.DPO, pairs, beta=0.4, **settings)
    assert distance(module.gradients, gradients(views, sum(losses) / len(losses))) < TOLERANCE
    assert any(pair.row.get("prefix") for pair in pairs)


def test_dpo_with_visits_lengths_and_from_the_first_difference(views: Any, distance: Callable[..., float]) -> None:
    pairs, losses, shortened = worker.pair_examples(), [], 0
    for pair in pairs:
        (better, worse), (b, w) = pair.completions, pair.visits
        shared = 0
        while (
            shared < min(len(better.token_ids), len(worse.token_ids))
            and better.token_ids[shared] == worse.token_ids[shared]
        ):
            shared += 1
        shortened += shared > 0
        values = [
            ratios(views, pair.prompt_ids, side.token_ids)[shared:].sum() / max(1, len(side.token_ids) - shared)
            for side in (better, worse)
        ]
        a = min(w / (w + b), 0.5)
        d = 0.4 * (values[0] - values[1])
        losses.append(-(1 - a) * torch.nn.functional.logsigmoid(d) - a * torch.nn.functional.logsigmoid(-d))
    assert shortened
    module = worker.run(
        worker.DPO,
        pairs,
        beta=0.4,
        loss=SigmoidByVisits(),
        length_normalised=True,
        from_first_difference=True,
        micro_batch_tokens=150,
    )
    assert distance(module.gradients, gradients(views, sum(losses) / len(losses))) < TOLERANCE


# --- reference points ----------------------------------------------------------------------------------------------


def points(examples: list[Any], **spec: Any) -> dict[str, float]:
    module = worker.run(worker.StepKTO, examples, **worker.STEP_WEIGHTS, reference_point=ReferencePointConfig(**spec))
    return {name: float(module.trainer.callback_metrics[f"train/{name}"]) for name in ("z0", "z0_step")}


def test_points_of_the_batch_and_none(views: Any, examples: list[Any]) -> None:
    with torch.no_grad():
        tokens = [ratios(views, e.prompt_ids, e.token_ids) for e in examples]
    steps = [float(t[start:end].sum()) for t, e in zip(tokens, examples, strict=True) for start, end in e.spans]
    found = points(examples, outcome="batch", step="batch")
    assert found["z0"] == pytest.approx(max(0.0, sum(float(t.sum()) for t in tokens) / len(tokens)), rel=1e-5)
    assert found["z0_step"] == pytest.approx(max(0.0, sum(steps) / len(steps)), rel=1e-5)
    assert points(examples, outcome="zero", step="zero") == {"z0": 0.0, "z0_step": 0.0}


def test_the_reference_reads_own_and_mismatched_completions_together(
    examples: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a prompt that both go on from is computed once."""
    seen: list[Any] = []

    class Seen(preference.ForwardPass):
        def __init__(self, policy: Policy, batch: Any, chunk_size: int) -> None:
            seen.append(batch)
            super().__init__(policy, batch, chunk_size)

    monkeypatch.setattr(preference, "ForwardPass", Seen)
    worker.run(worker.StepKTO, examples, **worker.STEP_WEIGHTS)
    (batch,) = seen
    assert batch.num_completions == 2 * len(examples)
    places_BT = torch.arange(batch.shared_BT.numel()).view_as(batch.shared_BT)
    assert int((batch.shared_BT != places_BT).sum()) >= sum(len(e.prompt_ids) for e in examples)


def test_points_by_index_are_a_running_average(views: Any, examples: list[Any], distance: Callable[..., float]) -> None:
    """At first each step is measured from the mean over mismatched steps of its own number."""
    prompts = list(dict.fromkeys(tuple(example.prompt_ids) for example in examples))
    order = [example for prompt in prompts for example in examples if tuple(example.prompt_ids) == prompt]
    by_index: dict[int, list[float]] = {}
    for place, example in enumerate(order):
        other = order[place - 2]
        with torch.no_grad():
            tokens = ratios(views, example.prompt_ids, other.token_ids)
        for number, (start, end) in enumerate(other.spans):
            by_index.setdefault(number, []).append(float(tokens[start:end].sum()))
    z0, _ = rotated_points(views, examples)
    settings, outcomes, steps = worker.STEP_WEIGHTS, [], []
    for example in examples:
        tokens = ratios(views, example.prompt_ids, example.token_ids)
        if example.outcome >= 0:
            outcomes.append(term(tokens.sum(), example.outcome, z0, settings["beta"], settings["class_weights"]))
        own = []
        for number, ((start, end), label) in enumerate(zip(example.spans, example.step_labels, strict=True)):
            z = max(0.0, sum(by_index[number]) / len(by_index[number]))
            if label >= 0:
                own.append(term(tokens[start:end].sum(), label, z, settings["beta"], settings["class_weights"]))
        steps += [sum(own)] if own else []
    loss = sum(outcomes) / len(outcomes) + settings["loss_weights"]["step"] * sum(steps) / len(steps)
    module = worker.run(
        worker.StepKTO,
        examples,
        **settings,
        reference_point=ReferencePointConfig(step="per_index"),
        micro_batch_tokens=100,
    )
    assert distance(module.gradients, gradients(views, loss)) < TOLERANCE
    first = [sum(values) / len(values) for _, values in sorted(by_index.items())]
    assert module._estimator.averages == pytest.approx(first, rel=1e-9)
    twice = worker.run(
        worker.StepKTO, examples, steps=2, **settings, reference_point=ReferencePointConfig(step="per_index")
    )
    moved = [abs(a - b) for a, b in zip(twice._estimator.averages, first, strict=True)]
    assert 0 < max(moved) < 0.1 * max(map(abs, first)) + 0.1


@pytest.mark.parametrize("count", [1, 2, 3])
def test_small_batches(count: int, examples: list[Any]) -> None:
    """One completion has no mismatched pair: z0 is 0 and the loss is a number; two prompts exchange completions."""
    few = [examples[0], examples[3], examples[4]][:count]
    module = worker.run(worker.StepKTO, few, **worker.STEP_WEIGHTS)
    found = module.trainer.callback_metrics
    assert math.isfinite(float(found["train/loss"]))
    assert sum(float(g.norm()) for g in module.gradients.values()) > 0
    if count == 1:
        assert float(found["train/z0"]) == float(found["train/z0_step"]) == 0.0


def test_one_class_and_no_labels_at_all(examples: list[Any]) -> None:
    """An empty class is no NaN, and a batch without a single label of one kind trains the other."""
    correct = [example for example in examples if example.outcome == 1][:3]
    assert correct
    found = worker.run(worker.KTO, correct, **worker.WEIGHTS).trainer.callback_metrics
    assert math.isfinite(float(found["train/loss"]))
    assert "train/reward_incorrect" not in found
    unlabelled = [example for example in examples if set(example.step_labels) == {-1}]
    assert unlabelled
    module = worker.run(worker.StepKTO, unlabelled, **worker.STEP_WEIGHTS)
    assert float(module.trainer.callback_metrics["train/step"]) == 0.0
    assert sum(float(g.norm()) for g in module.gradients.values()) > 0


# --- the reference -------------------------------------------------------------------------------------------------


def test_a_policy_that_is_its_reference_has_values_of_one_half(examples: list[Any]) -> None:
    module = worker.run(
        worker.StepKTO,
        examples,
        reference=ReferenceConfig(),
        class_weights=[1, 1],
        reduction="mean_steps",
    )
    found = module.trainer.callback_metrics
    assert float(found["train/outcome"]) == pytest.approx(0.5, abs=1e-7)
    assert float(found["train/step"]) == pytest.approx(0.5, abs=1e-7)
    pairs = worker.run(worker.DPO, worker.pair_examples(), reference=ReferenceConfig())
    assert float(pairs.trainer.callback_metrics["train/dpo"]) == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize(
    ("cache", "points", "runs"),
    [(False, {}, True), (True, {}, True), (True, {"outcome": "batch", "step": "zero"}, True), (True, ZERO, False)],
)
def test_what_is_computed_before_a_step(cache: bool, points: dict[str, Any], runs: bool) -> None:
    """A model that is sharded over ranks is gathered for it."""
    point, reference = ReferencePointConfig(**points), ReferenceConfig(cache=cache)
    module = StepKTOModule(PolicyConfig(path="tiny-0.1m"), reference, reference_point=point)
    assert module.prepares_with_model == runs
    assert DPOModule(PolicyConfig(path="tiny-0.1m"), reference).prepares_with_model != cache


def test_the_cache_holds_what_a_run_on_other_data_meets(monkeypatch: pytest.MonkeyPatch) -> None:
    """20 batches of 1 after a batch of 10: from the beginning the plan would never come to where the run stands."""
    examples = [Completion((1,), np.array([each + 2]), np.array([1]), id=f"row {each}") for each in range(40)]
    loader = StepLoader(examples, BatchPlan([2] * 40, size=1, seed=0))
    module = DPOModule(PolicyConfig(path="tiny-0.1m"), ReferenceConfig(cache=True))
    data = SimpleNamespace(train_dataloader=lambda: loader, val_dataloader=lambda: None)
    monkeypatch.setattr(type(module), "datamodule", data)
    monkeypatch.setattr(module, "planned_steps", lambda: 20)
    module.position = Position(0, 0)
    first = {each.key for each in module._all_completions()}
    module.position = Position(3, 7)
    both = {each.key for each in module._all_completions()}
    loader.position = lambda: module.position
    met = {each.key for batch in islice(loader, 20) for each in batch.examples}
    assert met - first
    assert met | first <= both


def test_a_completion_that_the_cache_lacks_is_named() -> None:
    module = DPOModule(PolicyConfig(path="tiny-0.1m"), ReferenceConfig(cache=True))
    module._all_are_known = True
    completion = Completion((1,), np.array([2]), np.array([1]), id="3")
    batch = SimpleNamespace(examples=[SimpleNamespace(completions=[completion])])
    with pytest.raises(ConfigError, match=r"no log-probabilities of a completion of row 3.*reference.cache: false"):
        module._referenced(cast(Any, batch))


def test_adapters_off_equal_a_copy(examples: list[Any], distance: Callable[..., float]) -> None:
    """After a step the adapter-off view is still the start, which a copy of the merged start is too."""
    lora = {"lora": LoRAConfig(r=4, target_modules=["q_proj", "down_proj"])}
    copied = {"policy": lora, "reference": ReferenceConfig(path="tiny-0.1m")}
    start = {**lora, "init_seed": 0}  # the weights that the reference's path loads
    off = worker.run(
        worker.StepKTO, examples, steps=3, policy=start, reference=ReferenceConfig(), **worker.STEP_WEIGHTS
    )
    on = worker.run(
        worker.StepKTO, examples, steps=3, policy=start, reference=copied["reference"], **worker.STEP_WEIGHTS
    )
    assert set(off.gradients) == set(on.gradients)
    assert all("lora" in name for name in off.gradients)
    assert distance(off.gradients, on.gradients) < TOLERANCE
    assert float(off.trainer.callback_metrics["train/z0"]) == pytest.approx(
        float(on.trainer.callback_metrics["train/z0"]), rel=1e-6
    )


def test_dropout_is_off_in_both_views(examples: list[Any], distance: Callable[..., float]) -> None:
    plain = {"lora": LoRAConfig(r=4, target_modules=["q_proj"])}
    dropping = {"lora": LoRAConfig(r=4, target_modules=["q_proj"], dropout=0.5)}
    runs = [worker.run(worker.KTO, examples, steps=2, policy=policy, **worker.WEIGHTS) for policy in (plain, dropping)]
    assert distance(runs[0].gradients, runs[1].gradients) < TOLERANCE


@pytest.mark.parametrize("value", [0.0, -0.1, math.nan, math.inf])
@pytest.mark.parametrize("module", [DPOModule, KTOModule, StepKTOModule])
def test_a_beta_that_is_no_positive_number_is_refused(module: Any, value: float) -> None:
    with pytest.raises(ConfigError, match=f"beta={value}: must be positive"):
        module(PolicyConfig(path="tiny-0.1m"), beta=value)
