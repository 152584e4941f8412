"""Distillation of reward models by plain logits; what losses are fitted to, in checkpoints; what is refused."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stepkd.data.collate import collate
from stepkd.data.config import DataConfig
from stepkd.data.datamodule import StepData
from stepkd.errors import ConfigError, ModelError
from stepkd.losses import subclass_directions, subclass_targets
from stepkd.models.checkpoint import load_trained, save_policy
from stepkd.models.policy import Policy
from stepkd.models.spec import Classifier, LabelTokens, PolicyConfig
from stepkd.modules.optim import OptimizerConfig
from stepkd.modules.prm import PRMModule, StepCrossEntropy
from stepkd.modules.prm_teachers import MCMI, StepDistillation
from stepkd.steps.format import StepFormat

_SPEC = importlib.util.spec_from_file_location("methods_worker", Path(__file__).with_name("methods_worker.py"))
assert _SPEC is not None
worker = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(worker)  # type: ignore[union-attr]

STEADY = OptimizerConfig(lr=1e-3, schedule="constant", warmup=0)
PLAIN = Classifier()


@pytest.fixture(scope="module", params=["classifier", pytest.param("label_tokens", marks=pytest.mark.slow)])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An untrained reward model with either head."""
    if request.param == "classifier":
        return worker.reward_model()
    out, teacher = tmp_path_factory.mktemp("teacher"), Policy.load(PolicyConfig(path="tiny-0.5m", dtype="float64"))
    teacher.attach_step_head(LabelTokens())
    save_policy(teacher, out)
    return str(out)


def module_of(head: Any, losses: list[Any], **settings: Any) -> PRMModule:
    policy = PolicyConfig(path="tiny-0.1m", **{"dtype": "float64", **settings.pop("policy", {})})
    weights = {"mcmi": 0.5} if any(isinstance(loss, MCMI) for loss in losses) else {}
    return PRMModule(policy, head, losses, optimizer=STEADY, **{"loss_weights": weights, **settings})


@pytest.mark.parametrize("subclasses", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_students_loss_is_cross_entropy_with_the_teachers_probabilities(
    subclasses: int, folder: str, encoded: Any, fresh: Any, plain_logits: Any
) -> None:
    """Plain logits of separate rows, value and gradients; the sub-classes from the features that the head reads."""
    head = Classifier(subclasses=subclasses)
    examples, teacher = encoded(head, 12), load_trained(folder)
    module = module_of(head, [StepDistillation(folder, temperature=0.6)])
    module.configure_model()
    (loss,) = module.components
    loss.begin(_Run(module, examples))
    features: list[torch.Tensor] = []

    def keep(_: Any, inputs: tuple[torch.Tensor, ...], __: Any) -> None:
        features.append(inputs[0])

    score = teacher.require_step_head().score
    last = teacher.causal_lm.get_output_embeddings() if score is None else score[-1]
    hook = last.register_forward_hook(keep)
    with torch.no_grad():
        classes = [plain_logits(teacher, example) for example in examples]
    hook.remove()
    if score is None:  # the output layer read all positions
        at = [torch.tensor(each.read_at) + len(each.prompt_ids) for each in examples]
        features = [each[0, places] for each, places in zip(features, at, strict=True)]
    logps, read = torch.cat(classes).log_softmax(-1), torch.cat(features)
    targets = logps.softmax(-1)
    if subclasses > 1:
        weights = last.weight if score is not None else last.weight[list(teacher.require_step_head().ids.labels)]
        found = subclass_directions(read, logps, weights.detach(), subclasses)
        targets = subclass_targets(logps, read, *found, temperature=0.6)
    student = fresh(head)
    logits = torch.cat([plain_logits(student, example) for example in examples])
    expected = -(targets * logits.log_softmax(-1)).sum()
    batch = collate(examples, 0)
    terms = module.loss_terms(batch)
    assert module.count(batch) == {"step_kd": float(len(logits))}
    assert float(terms.sums["step_kd"].detach()) == pytest.approx(float(expected.detach()), rel=1e-9)
    same = logits.view(len(logits), 2, -1).logsumexp(-1).argmax(-1) == logps.argmax(-1)
    assert [float(each) for each in terms.metrics["teacher_agreement"]] == [float(same.sum()), float(len(logits))]
    parts = [[p for _, p in each.trainable_parameters()] for each in (module.model, student)]
    ours = torch.autograd.grad(terms.sums["step_kd"], parts[0], allow_unused=True)
    theirs = torch.autograd.grad(expected, parts[1], allow_unused=True)
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, rtol=1e-7, atol=1e-10)


def test_an_ensemble_teaches_its_mean_and_each_of_a_students_members_learns_it(
    tmp_path: Path, encoded: Any, plain_logits: Any
) -> None:
    teacher = Policy.load(PolicyConfig(path="tiny-0.1m", dtype="float64", init_seed=3))
    several = Classifier(members=3, layers=1)
    with torch.no_grad():
        for weight in teacher.attach_step_head(several, seed=1).parameters():
            weight.mul_(4)
    save_policy(teacher, tmp_path)
    examples = encoded(several, 6)
    module = module_of(Classifier(members=2), [StepDistillation(str(tmp_path))])
    module.configure_model()
    module.components[0].begin(_Run(module, examples))
    batch = collate(examples, 0)
    found = module.loss_terms(batch).sums["step_kd"]

    def by_member(policy: Policy) -> torch.Tensor:
        score, own = policy.require_step_head().score, []
        for member in list(score):  # type: ignore[arg-type]
            policy.step_head.score = member  # type: ignore[union-attr]
            own.append(torch.cat([plain_logits(policy, example) for example in examples]).log_softmax(-1))
        policy.step_head.score = score  # type: ignore[union-attr]
        return torch.stack(own)

    with torch.no_grad():
        targets = by_member(teacher).exp().mean(0)
        each = [-(targets * own).sum() for own in by_member(module.model)]
    assert float(found.detach()) == pytest.approx(float(sum(each)) / 2, rel=1e-9)
    refused = module_of(Classifier(subclasses=2), [StepDistillation(str(tmp_path))])
    with pytest.raises(ConfigError, match=r"has head\.members above 1, and sub-classes are found by the one output"):
        refused.configure_model()


class _Run:
    """What a loss asks of the module that is about to train, with its training data."""

    def __init__(self, module: PRMModule, examples: list[Any]) -> None:
        self.module, self.datamodule = module, worker.SimpleNamespace(examples={"train": examples})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


# ---- runs -----------------------------------------------------------------------------------------------------------


def data(**settings: Any) -> StepData:
    options = {"task": "modular:terms=3", "noise": {"rate": 0.4}, "n": 24}
    train = DataConfig(source="task", split="train", options=options)
    return StepData(**{"train": train, "template": "task", "global_batch_size": 8, "max_length": 64, **settings})


def fitted(trainer: Any, losses: list[Any], *, steps: int, head: Any = PLAIN, checkpoint: Path | None = None) -> Any:
    module = module_of(head, losses, policy={"dtype": "float32"})
    runner = trainer(max_steps=steps, num_sanity_val_steps=0)
    arguments: dict[str, Any] = {} if checkpoint is None else {"ckpt_path": checkpoint, "weights_only": True}
    runner.fit(module, datamodule=data(overlap_ngram=0), **arguments)
    return runner


@pytest.mark.parametrize("name", ["mcmi", pytest.param("step_kd", marks=pytest.mark.slow)])
def test_a_resumed_run_has_the_constants_of_its_start(name: str, trainer: Any, tmp_path: Path) -> None:
    """MCMI's centroids are those of the weights before the first step, which the resumed run never sees."""
    head = Classifier(subclasses=2) if name == "step_kd" else PLAIN

    def losses() -> list[Any]:
        return [StepDistillation(worker.reward_model())] if name == "step_kd" else [StepCrossEntropy(), MCMI()]

    whole = fitted(trainer, losses(), steps=2, head=head)
    fitted(trainer, losses(), steps=1, head=head).save_checkpoint(tmp_path / "one.ckpt")
    resumed = fitted(trainer, losses(), steps=2, head=head, checkpoint=tmp_path / "one.ckpt")
    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert saved["stepkd"]["method_state"][name]
    assert not any("teacher" in key for key in saved["state_dict"])
    weights = dict(whole.lightning_module.model.trainable_parameters())
    for key, value in resumed.lightning_module.model.trainable_parameters():
        assert torch.equal(value, weights[key]), key
    if name == "step_kd":
        assert saved["stepkd"]["frozen"]["losses.teacher"]


def test_two_runs_of_one_loss_share_nothing(trainer: Any) -> None:
    losses = [StepCrossEntropy(), MCMI()]
    first = fitted(trainer, losses, steps=1).lightning_module
    second = module_of(PLAIN, losses)
    second.configure_model()
    assert first.components[1].fitted
    assert not second.components[1].fitted
    assert not losses[1].fitted


@pytest.mark.slow
def test_mcmi_spreads_predictions_for_one_label(trainer: Any, encoded: Any, scored: Any) -> None:
    """The sign: with the term, predictions for a label lie further apart than without."""
    spreads = []
    for weight in (0.0, 0.9):
        optimizer = OptimizerConfig(lr=3e-3, schedule="constant", warmup=0)
        module = module_of(
            PLAIN, [StepCrossEntropy(), MCMI()], policy={"dtype": "float32"}, loss_weights={"mcmi": weight}
        )
        module.optimizer_spec = optimizer
        trainer(max_steps=25, num_sanity_val_steps=0).fit(module, datamodule=data(overlap_ngram=0))
        examples = encoded(PLAIN, 16)
        labels = torch.tensor([target[1] for example in examples for target in example.targets if target])
        scores = scored(module.model, examples)
        spreads.append(sum(float(scores[labels == y].std()) for y in (0.0, 1.0)))
    assert spreads[1] > 1.1 * spreads[0]


def test_the_losses_of_a_loops_rows_are_fitted_once() -> None:
    """The constants are the first call's, so that a sub-class means the same at every step of a loop."""
    rows = [
        {"prompt": "1+1+1=", "completions": ["1+1=2\n", "2+1=3\n"], "labels": [True, True]},
        {"prompt": "1+2+1=", "completions": ["1+2=4\n", "4+1=5\n"], "labels": [False, True]},
    ]
    module = module_of(PLAIN, [StepCrossEntropy(), MCMI()])
    assert torch.isfinite(module.loss(rows, template="task"))
    first = module.components[1].fitted["centroids_CC"].clone()
    module.loss(rows[:1], template="task", allow_one_class=True)
    assert torch.equal(module.components[1].fitted["centroids_CC"], first)


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_unfit_teachers(tmp_path: Path) -> None:
    Policy.load(PolicyConfig(path="tiny-0.1m")).model.save_pretrained(tmp_path)
    cases = [
        (
            PLAIN,
            "tiny-0.1m",
            r"losses\.teacher=tiny-0\.1m has no step head: give a reward model of the student's, 2 cl",
        ),
        (Classifier(classes=3), worker.reward_model(), "has 2 classes of correctness and .*: give .* 3 classes"),
        (Classifier(meaning="value"), worker.reward_model(), "2 classes of correctness and .*: give .* 2 classes of v"),
        (
            Classifier(format=StepFormat(marker=None)),
            worker.reward_model(),
            "2 classes of .*: give .* 2 classes of .*marker=None",
        ),
    ]
    for head, path, message in cases:
        with pytest.raises(ModelError, match=message):
            module_of(head, [StepDistillation(path)]).configure_model()
    with pytest.raises(ConfigError, match=r"losses\.temperature=0\.0"):
        StepDistillation("x", temperature=0.0)


def test_losses_that_read_the_training_data_need_some(prm_step: Any, encoded: Any) -> None:
    with pytest.raises(ConfigError, match="losses: MCMI reads the training data first: train with StepData"):
        prm_step(encoded(PLAIN, 4), PLAIN, losses=[StepCrossEntropy(), MCMI()], loss_weights={"mcmi": 0.1})
    with pytest.raises(ConfigError, match=r"losses: \[MCMI\] do not train the step head by themselves"):
        module_of(PLAIN, [MCMI()])
    prm_step(encoded(PLAIN, 4), PLAIN, losses=[StepDistillation(worker.reward_model())])  # without sub-classes: none


@pytest.mark.parametrize("losses", [[StepCrossEntropy(), MCMI()], [StepDistillation("teacher")]])
def test_validation_of_weights_alone_says_where_the_constants_are(losses: list[Any], trainer: Any) -> None:
    head = Classifier() if len(losses) > 1 else Classifier(subclasses=2)
    losses = [replace(each, teacher=worker.reward_model()) if hasattr(each, "teacher") else each for each in losses]
    held_out = DataConfig(
        source="task", split="test", options={"task": "modular:terms=3", "noise": {"rate": 0.4}, "n": 8}
    )
    with pytest.raises(ConfigError, match=r"has constants that training computes .* --ckpt_path of a run"):
        trainer().validate(module_of(head, losses), datamodule=data(validation=held_out))


def test_a_teacher_of_another_prompt_template_is_refused(trainer: Any, tmp_path: Path) -> None:
    run = trainer(max_steps=1, num_sanity_val_steps=0)
    run.fit(module_of(PLAIN, [StepCrossEntropy()], policy={"dtype": "float32"}), datamodule=data(overlap_ngram=0))
    run.save_checkpoint(tmp_path / "teacher.ckpt")
    module = module_of(PLAIN, [StepDistillation(str(tmp_path / "teacher.ckpt"))], policy={"dtype": "float32"})
    other = data(overlap_ngram=0, template="plain", max_length=96)
    with pytest.raises(ConfigError, match=r"losses\.teacher was trained with the template task, data\.template is p"):
        trainer(max_steps=1, num_sanity_val_steps=0).fit(module, datamodule=other)
