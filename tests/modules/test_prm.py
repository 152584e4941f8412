"""PRMModule: brute force, transformers' own losses, invariance, label rules, resuming, the command line."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from stepkd.data.collate import Batch, collate, plan
from stepkd.data.completion import Completion
from stepkd.data.encode import LabelRule, step_targets
from stepkd.data.step_encode import StepEncoder
from stepkd.data.templates import get_template
from stepkd.models.spec import Classifier, LabelTokens, LoRAConfig, PolicyConfig, StepHeadConfig, tiny_tokenizer
from stepkd.models.step_head import resolve_ids
from stepkd.modules.optim import OptimizerConfig
from stepkd.modules.prm import (
    PQM,
    LanguageModelling,
    MultilevelRanking,
    PRMModule,
    StepCrossEntropy,
    StepDecisions,
    StepLoss,
    StepRegression,
)
from stepkd.steps.format import StepFormat


def by_hand(name: str) -> Any:
    """A file of the losses' tests, for the formulas written out in it."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "losses" / f"{name}.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


ranking = by_hand("test_pqm")

TOLERANCE = 1e-10  # float64, relative norm
ROOT = Path(__file__).resolve().parents[2]
STEADY = OptimizerConfig(lr=1e-3, schedule="constant", warmup=0)
TOKENS = LabelTokens()
FULL_VOCABULARY = LabelTokens(restricted=False)
CLASSIFIER = Classifier()
ONE_LAYER = Classifier(layers=1, format=StepFormat(marker=None))
HEADS = {"label_tokens": TOKENS, "full_vocabulary": FULL_VOCABULARY, "classifier": CLASSIFIER, "one_layer": ONE_LAYER}
MAIN = pytest.mark.parametrize("case", ["label_tokens", "classifier"], indirect=True)
Gradients = dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=list(HEADS))
def case(
    request: pytest.FixtureRequest, encoded: Any, brute_force_steps: Any
) -> tuple[StepHeadConfig, list[Completion], float, Gradients]:
    """A head, 16 solutions, and the loss and gradients of the plain model, one unpadded row at a time."""
    head = HEADS[request.param]
    examples = encoded(head)
    return head, examples, *brute_force_steps(head, examples)


# ---- brute force and invariance -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{"padding_side": "left"}, {"padding_side": "left", "pad_to": 250}, {"pad_to": 233, "chunk_size": 3}],
    ids=str,
)
def test_padding_and_chunks(settings: dict[str, Any], case: Any, prm_step: Any, distance: Any) -> None:
    head, examples, loss, gradients = case
    module = prm_step(examples, head, micro_batch_tokens=100_000, **settings)
    assert distance(module.gradients, gradients) < TOLERANCE
    logged = module.trainer.callback_metrics
    assert float(logged["train/prm"]) == pytest.approx(loss, rel=1e-6)  # logged in float32
    assert float(logged["train/loss"]) == float(logged["train/prm"])


@MAIN
@pytest.mark.parametrize("parts", [1, 2, 4, 8, 16])
def test_micro_batch_split(parts: int, case: Any, prm_step: Any, distance: Any) -> None:
    head, examples, loss, gradients = case
    budget = next(tokens for tokens in range(1, 10_000) if len(plan(examples, tokens)) <= parts)
    module = prm_step(examples, head, micro_batch_tokens=budget)
    assert parts // 2 < len(module.shapes) == len(plan(examples, budget)) <= parts
    assert distance(module.gradients, gradients) < TOLERANCE
    assert float(module.trainer.callback_metrics["train/prm"]) == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 7])
def test_chunk_size(chunk_size: int, prm_step: Any, distance: Any, encoded: Any, brute_force_steps: Any) -> None:
    examples = encoded(TOKENS)
    module = prm_step(examples, chunk_size=chunk_size, micro_batch_tokens=500)
    assert distance(module.gradients, brute_force_steps(TOKENS, examples)[1]) < TOLERANCE


@MAIN
def test_gradient_checkpointing_changes_nothing(case: Any, prm_step: Any, distance: Any) -> None:
    head, examples, _, gradients = case
    module = prm_step(examples, head, policy={"gradient_checkpointing": True}, micro_batch_tokens=500)
    assert distance(module.gradients, gradients) < TOLERANCE


@pytest.mark.parametrize("name", ["label_tokens", "classifier"])
def test_lora_gradients_do_not_depend_on_the_split(name: str, prm_step: Any, distance: Any, encoded: Any) -> None:
    head = HEADS[name]
    modules = ["q_proj", "down_proj", *(["lm_head"] if name == "label_tokens" else [])]
    policy = {"lora": LoRAConfig(r=4, target_modules=modules)}
    examples = encoded(head)
    whole = prm_step(examples, head, policy=policy, micro_batch_tokens=100_000, chunk_size=100_000)
    split = prm_step(examples, head, policy=policy, micro_batch_tokens=200, chunk_size=5)
    assert len(split.shapes) > len(whole.shapes)
    assert all("lora" in key or "step_head" in key for key in whole.gradients)
    assert set(whole.gradients) == {key for key, _ in whole.model.trainable_parameters()}
    assert distance(split.gradients, whole.gradients) < TOLERANCE


def test_float32_stays_within_its_precision(case: Any, prm_step: Any, distance: Any) -> None:
    head, examples, _, gradients = case
    module = prm_step(examples, head, dtype="float32", micro_batch_tokens=300, chunk_size=11)
    assert distance({name: value.double() for name, value in module.gradients.items()}, gradients) < 1e-5


@pytest.mark.parametrize("name", ["label_tokens", "classifier"])
def test_soft_labels(
    name: str, prm_step: Any, distance: Any, encoded: Any, brute_force_steps: Any, fresh: Any, plain_logits: Any
) -> None:
    """Chances that no binary fraction writes, and steps without a label between labelled ones."""
    head = HEADS[name]
    soft = encoded(head, rule=LabelRule(kind="soft", after_error="keep"), labels=lambda labels: chances(labels))
    assert any(None in example.targets for example in soft)
    module = prm_step(soft, head, micro_batch_tokens=300)
    assert distance(module.gradients, brute_force_steps(head, soft)[1]) < TOLERANCE
    policy, total, count = fresh(head), 0.0, 0
    for example in soft:
        kept = [i for i, target in enumerate(example.targets) if target is not None]
        logits = plain_logits(policy, example)[kept].detach()
        wanted = torch.tensor([example.targets[i] for i in kept], dtype=torch.float64)
        total += float(F.cross_entropy(logits, wanted, reduction="sum"))
        count += len(kept)
    assert float(module.trainer.callback_metrics["train/prm"]) == pytest.approx(total / count, rel=1e-6)


def chances(labels: Sequence[bool]) -> list[float | None]:
    return [None if i % 3 == 1 else (0.7 if correct else 0.1) + 0.01 * i for i, correct in enumerate(labels)]


def test_class_weights_are_torchs_weighted_mean(prm_step: Any, encoded: Any, fresh: Any, plain_logits: Any) -> None:
    examples = encoded(TOKENS)
    module = prm_step(examples, losses=[StepCrossEntropy([3.0, 0.5])], micro_batch_tokens=300)
    policy = fresh(TOKENS)
    logits = torch.cat([plain_logits(policy, example) for example in examples]).detach()
    labels = torch.tensor([int(target[1]) for example in examples for target in example.targets if target])
    expected = F.cross_entropy(logits, labels, weight=torch.tensor([3.0, 0.5], dtype=torch.float64))
    assert float(module.trainer.callback_metrics["train/prm"]) == pytest.approx(float(expected), rel=1e-6)


def test_neutral_class(prm_step: Any, distance: Any, encoded: Any, brute_force_steps: Any) -> None:
    head = Classifier(classes=3)
    examples = encoded(
        head, labels=lambda labels: [(-1, 1)[correct] if i % 3 else 0 for i, correct in enumerate(labels)]
    )
    assert {target.index(1.0) for example in examples for target in example.targets if target} == {0, 1, 2}
    module = prm_step(examples, head, micro_batch_tokens=400)
    assert distance(module.gradients, brute_force_steps(head, examples)[1]) < TOLERANCE


def test_the_language_part_is_plain_cross_entropy_on_correct_steps_without_the_markers(
    prm_step: Any, distance: Any, encoded: Any, fresh: Any
) -> None:
    examples = encoded(TOKENS)
    module = prm_step(
        examples, losses=[StepCrossEntropy(), LanguageModelling()], loss_weights={"lm": 0.5}, micro_batch_tokens=300
    )
    policy, ids_of = fresh(TOKENS), resolve_ids(TOKENS, tiny_tokenizer())
    steps = language = torch.zeros((), dtype=torch.float64)
    num_steps = num_tokens = num_incorrect = 0
    for example in examples:
        assert None not in example.targets
        ids = torch.tensor([*example.prompt_ids, *example.token_ids])
        wanted = torch.where(ids == ids_of.marker, -100, ids)
        wanted[: len(example.prompt_ids)] = -100
        for (start, end), target in zip(example.spans, example.targets, strict=True):
            if target == (1.0, 0.0):
                wanted[len(example.prompt_ids) + start : len(example.prompt_ids) + end] = -100
                num_incorrect += 1
        logits = policy.model(input_ids=ids[None]).logits[0]
        language = language + F.cross_entropy(logits[:-1], wanted[1:], reduction="sum")
        correct = torch.tensor([int(target[1]) for target in example.targets if target])
        at_markers = logits[ids == ids_of.marker][:, list(ids_of.labels)]
        steps = steps + F.cross_entropy(at_markers, correct, reduction="sum")
        num_steps, num_tokens = num_steps + len(correct), num_tokens + int((wanted != -100).sum())
    assert 0 < num_incorrect < num_steps
    (steps / num_steps + 0.5 * language / num_tokens).backward()
    gradients = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    assert distance(module.gradients, gradients) < TOLERANCE
    logged = module.trainer.callback_metrics
    assert float(logged["train/lm"]) == pytest.approx(float(language.detach() / num_tokens), rel=1e-6)
    assert float(logged["train/loss"]) == pytest.approx(float(logged["train/prm"] + 0.5 * logged["train/lm"]), rel=1e-6)


@pytest.mark.parametrize(
    "head",
    [TOKENS, FULL_VOCABULARY, LabelTokens(labels=("-", "0", "+")), CLASSIFIER, Classifier(classes=3)],
    ids=["two tokens", "of the vocabulary", "three tokens", "two classes", "three classes"],
)
def test_the_ranking_is_pqms_on_the_log_odds_of_a_step(head: StepHeadConfig, encoded: Any, plain_logits: Any) -> None:
    """Two solutions under either head, with a chance of a half or a neutral step, and a step without a label."""
    two = head.num_classes == 2
    labels = [[0.9, 0.5, None, 0.25], [0.125, 1.0, 0.5]] if two else [[1, 0, None, -1], [-1, 1, 0]]
    correct = [[True, True, False], [False, True, True]]
    given = iter([*labels, *labels])
    rule = LabelRule(after_error="keep")
    long = [each for each in encoded(head, 16) if len(each.targets) >= 4][:2]
    rows = [dict(example.row) | {"labels": next(given)} for example in long]
    examples = [
        replace(example, targets=tuple(step_targets(row, len(row["labels"]), head.num_classes, rule)))
        for example, row in zip(long, rows, strict=True)
    ]
    examples = [replace(each, read_at=each.read_at[: len(each.targets)]) for each in examples]
    module = PRMModule(PolicyConfig(path="tiny-0.1m", dtype="float64"), head, losses=[PQM(margin=1.5)])
    module.configure_model()
    batch = collate(examples, 0)
    expected = []
    for example, good in zip(examples, correct, strict=True):
        chances = plain_logits(module.model, example).softmax(-1)
        p = 1 - chances[[target is not None for target in example.targets], 0]
        expected.append(ranking.by_hand((p / (1 - p)).log(), good, 1.5))
    found, total = module.loss_terms(batch).sums["pqm"], torch.stack(expected).sum()
    assert float(found.detach()) == pytest.approx(float(total.detach()), rel=1e-10)
    assert module.count(batch) == {"pqm": 2.0}
    parameters = [p for _, p in module.model.trainable_parameters()]
    ours, wanted = (torch.autograd.grad(value, parameters, allow_unused=True) for value in (found, total))
    for one, other in zip(ours, wanted, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, rtol=1e-9, atol=1e-13)


def expected_sums(loss: StepLoss, logits: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """The loss of one solution's labelled steps from the classes' probabilities."""
    p = logits.softmax(-1)
    if isinstance(loss, StepRegression):
        r, value = 1 - p[:, 0], 1 - targets[:, 0]
        each = (r - value) ** 2 if loss.form == "mse" else -value * r.log() - (1 - value) * (1 - r).log()
        return {"value": each.sum()}
    if isinstance(loss, StepDecisions):
        first = targets[:, 0] * p[:, 0].log() + (1 - targets[:, 0]) * (1 - p[:, 0]).log()
        second = targets[:, 1] * (p[:, 1] / (1 - p[:, 0])).log() + targets[:, 2] * (p[:, 2] / (1 - p[:, 0])).log()
        return {"ordinal_incorrect": -first.sum(), "ordinal_neutral": -second.sum()}
    assert isinstance(loss, MultilevelRanking)
    scores = p[:, -1] + (p[:, 1] / 2 if p.shape[1] == 3 else 0)
    levels = (targets.argmax(-1) if targets.shape[1] == 3 else (targets[:, 1] >= 0.5).long()).tolist()
    return {"ranking": by_hand("test_step_objectives").by_hand(scores, levels, loss.lower, loss.upper)}


@pytest.mark.parametrize(
    ("head", "loss"),
    [
        (FULL_VOCABULARY, StepRegression()),
        (LabelTokens(labels=("-", "0", "+")), StepRegression(form="bce")),
        (Classifier(classes=3), StepDecisions()),
        (TOKENS, MultilevelRanking(lower=0.9, upper=0.0)),
        (Classifier(classes=3), MultilevelRanking(lower=0.9, upper=0.0)),
    ],
    ids=str,
)
def test_objectives_are_their_formulas_on_plain_logits(
    head: StepHeadConfig, loss: StepLoss, encoded: Any, plain_logits: Any
) -> None:
    two = head.num_classes == 2
    change = chances if two else (lambda labels: [(-1, 1)[good] if i % 3 else 0 for i, good in enumerate(labels)])
    examples = encoded(head, 5, labels=change)
    beside = [StepCrossEntropy()] if isinstance(loss, MultilevelRanking) else []
    module = PRMModule(PolicyConfig(path="tiny-0.1m", dtype="float64"), head, losses=[loss, *beside])
    module.configure_model()
    batch = collate(examples, 0)
    wanted: dict[str, torch.Tensor] = {}
    for example in examples:
        kept = [i for i, target in enumerate(example.targets) if target is not None]
        targets = torch.tensor([example.targets[i] for i in kept], dtype=torch.float64)
        for name, value in expected_sums(loss, plain_logits(module.model, example)[kept], targets).items():
            wanted[name] = wanted.get(name, 0.0) + value
    found, steps = module.loss_terms(batch).sums, float(len(batch.targets_LC))
    counts = {"value": steps, "ranking": 5.0, "ordinal_incorrect": steps}
    counts["ordinal_neutral"] = steps - float(batch.targets_LC[:, 0].sum())
    assert module.count(batch) == {name: counts[name] for name in wanted} | ({"prm": steps} if beside else {})
    parameters = [p for _, p in module.model.trainable_parameters()]
    for name, value in wanted.items():
        assert float(found[name].detach()) == pytest.approx(float(value.detach()), rel=1e-9)
        ours, theirs = (
            torch.autograd.grad(each, parameters, allow_unused=True, retain_graph=True) for each in (found[name], value)
        )
        assert any(one is not None and one.abs().sum() > 0 for one in ours)
        for one, other in zip(ours, theirs, strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.allclose(one, other, rtol=1e-8, atol=1e-12)


# ---- parity with transformers ---------------------------------------------------------------------------------------


def as_token_labels(batch: Batch, values: torch.Tensor) -> torch.Tensor:
    """-100 everywhere, and each step's label at its position: not shifted."""
    labels = torch.full(batch.input_ids_BT.shape, -100)
    labels.view(-1)[batch.read_L] = values
    return labels


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
@pytest.mark.parametrize("head", [ONE_LAYER, CLASSIFIER], ids=["one_layer", "two_layers"])
def test_hard_labels_are_token_classification_by_transformers(
    head: StepHeadConfig, dtype: Any, tolerance: float, distance: Any, encoded: Any
) -> None:
    """LlamaForTokenClassification with the same weights on the same padded batch, on value and gradient.

    The loss that transformers returns casts logits to float32, so in float64 it is taken from its logits.
    """
    from transformers import LlamaForTokenClassification

    module = PRMModule(PolicyConfig(path="tiny-0.1m", dtype=dtype), head)
    module.configure_model()
    batch = collate(encoded(head), 0)
    theirs = LlamaForTokenClassification(module.model.causal_lm.config).to(getattr(torch, dtype))
    if head.layers == 2:  # Qwen2.5-Math-PRM's two layers in place of its one
        hidden = module.model.causal_lm.config.hidden_size
        theirs.score = torch.nn.Sequential(
            torch.nn.Linear(hidden, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, 2)
        ).to(getattr(torch, dtype))
    theirs.model.load_state_dict(module.model.causal_lm.model.state_dict())
    theirs.load_state_dict(module.model.require_step_head().state_dict(), strict=False)
    theirs.eval()
    labels = as_token_labels(batch, batch.targets_LC.argmax(-1))
    output = theirs(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, labels=labels)
    expected = F.cross_entropy(output.logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    expected.backward()
    loss = module.loss_terms(batch).sums["prm"] / module.count(batch)["prm"]
    loss.backward()
    assert loss.item() == pytest.approx(output.loss.item(), rel=1e-5)
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    ours = {name: p.grad for name, p in module.model.named_parameters() if p.grad is not None}
    wanted = {
        ("model.model." if name.startswith("model.") else "step_head.") + name.removeprefix("model."): p.grad
        for name, p in theirs.named_parameters()
    }
    assert distance(ours, wanted) < tolerance * 10


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
@pytest.mark.parametrize("restricted", [True, False])
def test_label_tokens_are_the_models_own_logits_at_the_markers(
    restricted: bool, dtype: Any, tolerance: float, encoded: Any
) -> None:
    head = TOKENS if restricted else FULL_VOCABULARY
    module = PRMModule(PolicyConfig(path="tiny-0.1m", dtype=dtype), head)
    module.configure_model()
    batch = collate(encoded(head), 0)
    tokens = torch.tensor(resolve_ids(head, module.tokenizer).labels)
    classes = batch.targets_LC.argmax(-1)
    logits = module.model.model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT).logits
    labels = as_token_labels(batch, classes if restricted else tokens[classes])
    logits = logits[..., tokens] if restricted else logits
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    loss = module.loss_terms(batch).sums["prm"] / module.count(batch)["prm"]
    assert (labels != -100).sum() == len(batch.read_L) == module.count(batch)["prm"]
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)


# ---- label rules ----------------------------------------------------------------------------------------------------


def test_truncating_and_masking_after_the_first_error_give_one_gradient(
    prm_step: Any, distance: Any, encoded: Any
) -> None:
    """A causal model reads nothing behind a step, so leaving later steps in place without labels changes nothing."""
    whole, cut = encoded(TOKENS, 6), encoded(TOKENS, 6, rule=LabelRule(after_error="truncate"))
    masked = [
        replace(full, targets=(*short.targets, *[None] * (len(full.targets) - len(short.targets))))
        for full, short in zip(whole, cut, strict=True)
    ]
    assert sum(example.length for example in masked) > sum(example.length for example in cut)
    gradients = prm_step(cut, micro_batch_tokens=300).gradients
    assert distance(prm_step(masked, micro_batch_tokens=300).gradients, gradients) < TOLERANCE
    assert distance(prm_step(whole, micro_batch_tokens=300).gradients, gradients) > 1e-2, "keeping them does"


OUTCOME = {"label_tokens": LabelTokens(meaning="outcome"), "classifier": Classifier(meaning="outcome")}


def test_an_outcome_model_of_the_last_token_reads_the_last_step_only(
    prm_step: Any, distance: Any, encoded: Any, brute_force_steps: Any
) -> None:
    head = OUTCOME["label_tokens"]
    examples = encoded(head, 8, rule=LabelRule(scope="outcome"))
    assert all(sum(target is not None for target in example.targets) == 1 for example in examples)
    module = prm_step(examples, head, every_token=False, micro_batch_tokens=300)
    assert distance(module.gradients, brute_force_steps(head, examples)[1]) < TOLERANCE


def test_a_head_behind_the_prompt_learns_the_pass_rates_of_problems(prm_step: Any, scored: Any) -> None:
    """P(IK): one outcome a sample, whose mean is the target; what the sample says is not read."""
    head = Classifier(format=StepFormat(marker="~", marker_place="prompt_end"), meaning="outcome")
    rows = [
        {"id": f"{problem}/{k}", "prompt": problem, "completion": f"{k}", "outcome": k < passes}
        for problem, passes in (("1+1=", 8), ("2+2=", 2), ("3+3=", 5))
        for k in range(8)
    ]
    marker = resolve_ids(head, tiny_tokenizer()).marker
    layout = {"format": head.format, "marker_id": marker, "labels": LabelRule(scope="outcome")}
    examples = StepEncoder(tiny_tokenizer(), get_template("task"), **layout).examples(rows)
    module = prm_step(examples, head, steps=60, optimizer=OptimizerConfig(lr=3e-3))
    found_PK = scored(module.policy, examples).reshape(3, 8)
    assert found_PK.std(dim=1).max() < 1e-9
    assert found_PK.mean(dim=1).tolist() == pytest.approx([1.0, 0.25, 0.625], abs=0.1)


@pytest.mark.parametrize("name", OUTCOME)
def test_an_outcome_model_learns_at_every_token_and_is_validated_at_the_last(
    name: str, prm_step: Any, distance: Any, encoded: Any, brute_force_steps: Any
) -> None:
    """Cobbe et al. 2021: the same label at each token of the solution, the prompt left out. Of two classes binary
    cross-entropy is the same."""
    head, losses = OUTCOME[name], [StepRegression(form="bce")] if name == "classifier" else [StepCrossEntropy()]
    (summed,) = losses[0].names
    examples = encoded(head, 8, rule=LabelRule(scope="outcome"))
    everywhere = [
        replace(
            each,
            step_ends=np.arange(1, len(each.token_ids) + 1),
            read_at=tuple(range(len(each.token_ids))),
            targets=(each.targets[-1],) * len(each.token_ids),
        )
        for each in examples
    ]
    loss, gradients = brute_force_steps(head, everywhere)
    module = prm_step(examples, head, losses=losses, micro_batch_tokens=300, chunk_size=7)
    assert distance(module.gradients, gradients) < TOLERANCE
    assert float(module.trainer.callback_metrics[f"train/{summed}"]) == pytest.approx(loss, rel=1e-6)
    module.train()
    (batch,) = module.prepare_examples(examples[:1])
    assert module.count(batch) == {summed: float(len(examples[0].token_ids))}
    module.eval()
    (batch,) = module.prepare_examples(examples[:1])
    assert module.count(batch) == {summed: 1.0}


def test_a_process_model_does_not_learn_at_every_token(encoded: Any) -> None:
    module = PRMModule(PolicyConfig(path="tiny-0.1m"), TOKENS, every_token=True)
    assert module.every_token is False


@pytest.mark.parametrize("name", ["label_tokens", "classifier"])
def test_a_learning_model_tells_correct_from_incorrect(name: str, prm_step: Any, encoded: Any, scored: Any) -> None:
    """The sign: after some steps on the same solution, correct steps score above a half and incorrect ones below."""
    head = HEADS[name]
    example = next(e for e in encoded(head) if {(1.0, 0.0), (0.0, 1.0)} == set(e.targets) and e.length < 100)
    optimizer = OptimizerConfig(lr=1e-2, schedule="constant", warmup=0)
    module = prm_step([example], head, steps=25, dtype="float32", optimizer=optimizer)
    values = scored(module.model, [example])
    assert [value > 0.5 for value in values.tolist()] == [target == (0.0, 1.0) for target in example.targets]
