"""``module.loss(rows)`` is the loss of a training step, with the same gradients, and leaves nothing behind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

import stepkd
from stepkd.data.encode import LabelRule
from stepkd.errors import ConfigError, DataError, TrainingError
from stepkd.models import Classifier, LabelTokens
from stepkd.modules import OptimizerConfig, ReferenceConfig, ReferencePointConfig, RolloutConfig, SourceConfig
from stepkd.modules.base import StepModule
from stepkd.modules.gkd_settings import Mixed
from stepkd.teachers import Local, SelfSnapshot

SOLUTIONS = [
    {"prompt": "4+8=", "answer": "2", "solution": "4+8=2\n#### 2"},
    {"prompt": "7*3+1=", "answer": "2", "solution": "7*3=1\n1+1=2\n#### 2"},
]
STEPS = [
    {
        "prompt": "4+8*6=",
        "completions": ["8*6=8\n", "4+8=2\n", "#### 2"],
        "labels": [True, True, True],
        "outcome": True,
    },
    {"prompt": "7+5=", "completions": ["7+5=3\n", "#### 3"], "labels": [False, False], "outcome": False},
]
PAIRS = [
    {"prompt": "4+8=", "chosen": "4+8=2\n#### 2", "rejected": "4+8=3\n#### 3"},
    {"prompt": "7+5=", "chosen": "7+5=2\n#### 2", "rejected": "7+5=9\n#### 9"},
]


def checksum(completions: list[str], **_: Any) -> list[float]:
    """A reward that differs between completions."""
    return [float(sum(map(ord, text)) % 7) for text in completions]


SHORT = stepkd.SamplingConfig(n=2, max_new_tokens=8)
OWN = SourceConfig(lmbda=1.0, sampling=SHORT)
POINTS = ReferencePointConfig(step="per_index")
OTHER = ReferenceConfig(path="tiny-0.1m")
METHODS: dict[str, tuple[type[StepModule], list[dict[str, Any]], dict[str, Any]]] = {
    "sft": (stepkd.SFTModule, SOLUTIONS, {}),
    "prm": (stepkd.PRMModule, STEPS, {"head": LabelTokens()}),
    "prm classifier": (stepkd.PRMModule, STEPS, {"head": Classifier()}),
    "dpo": (stepkd.DPOModule, PAIRS, {"reference": OTHER}),
    "kto": (stepkd.KTOModule, STEPS, {"reference": OTHER}),
    "step kto": (stepkd.StepKTOModule, STEPS, {"reference": OTHER, "reference_point": POINTS}),
    "step kto cached": (stepkd.StepKTOModule, STEPS, {"reference": ReferenceConfig("tiny-0.1m", cache=True)}),
    "gkd": (stepkd.GKDModule, SOLUTIONS, {"teacher": Local("tiny-0.5m"), "source": OWN}),
    "self": (stepkd.GKDModule, SOLUTIONS, {"teacher": SelfSnapshot(), "source": SourceConfig(lmbda=0.0)}),
    "kdrl": (
        stepkd.KDRLModule,
        SOLUTIONS,
        {"teacher": Local("tiny-0.5m"), "rollout": RolloutConfig(sampling=SHORT), "rewards": [checksum]},
    ),
}
"""Of every method rows, and settings under which its loss is not 0."""


def made(name: str) -> Any:
    kind, _, settings = METHODS[name]
    policy = stepkd.PolicyConfig("tiny-0.1m", init_seed=3, lora=stepkd.LoRAConfig(r=2, dropout=0.2))
    return kind(policy, micro_batch_tokens=40, optimizer=OptimizerConfig(lr=1e-2), **settings)


def step(module: Any, rows: list[dict[str, Any]], steps: int = 1, **settings: Any) -> tuple[float, float]:
    """Loss and gradient norm of the last of some training steps."""
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(module, stepkd.StepData(train=rows, template="task", overlap_ngram=0, shuffle=False))
    return float(trainer.callback_metrics["train/loss"]), float(trainer.callback_metrics["train/grad_norm"])


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"self"}))  # which is no other than itself at first
def test_loss_and_gradients_are_those_of_a_training_step(name: str) -> None:
    rows = METHODS[name][1]
    module = made(name)
    loss = module.loss(rows, template="task")
    loss.backward()
    assert loss.shape == ()
    norm = torch.cat([p.grad.flatten() for _, p in module.model.trainable_parameters()]).norm()
    expected = step(made(name), rows)
    assert (loss.item(), norm.item()) == pytest.approx(expected, rel=1e-5)
    assert norm > 0


@pytest.mark.parametrize(
    "name", ["step kto", *(pytest.param(each, marks=pytest.mark.slow) for each in ("step kto cached", "self")), "kdrl"]
)
def test_training_is_the_same_after_it(name: str) -> None:
    rows, module = METHODS[name][1], made(name)
    module.loss(rows[::-1] + rows, template="task")
    assert module._trainer is None
    assert step(module, rows, 2) == pytest.approx(step(made(name), rows, 2), rel=1e-5)
    before = module.trainer
    module.loss(rows, template="task")
    assert module.trainer is before


def test_a_module_that_is_being_trained_is_left_alone() -> None:
    class Looks(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            pl_module.loss(METHODS["step kto"][1], template="task")

    with pytest.raises(TrainingError, match="make a second module"):
        step(made("step kto"), METHODS["step kto"][1], 1, callbacks=[Looks()])


def test_rows_that_teach_nothing_are_refused() -> None:
    module = stepkd.StepKTOModule(stepkd.PolicyConfig("tiny-0.1m"))
    with pytest.raises(DataError, match="learns from rows of the kinds"):
        module.loss(PAIRS, template="task")
    assert module._trainer is None


def test_labels_that_all_agree_are_an_error_unless_allowed() -> None:
    module = stepkd.PRMModule(stepkd.PolicyConfig("tiny-0.1m"))
    with pytest.raises(DataError, match="all 3 training labels are the same"):
        module.loss(STEPS[:1], template="task")
    assert module.loss(STEPS[:1], template="task", allow_one_class=True, labels=LabelRule()).item() > 0


def test_a_batch_without_targets_is_an_error() -> None:
    module = made("prm")
    module.count = lambda batch: {"prm": 0.0}
    with pytest.raises(TrainingError, match=r"step 0: no example of 1 batch\(es\) in a row has a single target"):
        module.loss(STEPS, template="task")


def test_a_loop_of_ones_own_counts_its_steps() -> None:
    """Dropout, samples and GKD's source are those of the step, as in training; schedules move."""
    module = stepkd.GKDModule(stepkd.PolicyConfig("tiny-0.1m"), Local("tiny-0.5m"), source=SourceConfig(sampling=SHORT))
    drawn: list[str] = []
    draw = module.draw_source
    module.draw_source = lambda: drawn.append(draw()) or drawn[-1]  # type: ignore[func-returns-value, method-assign]
    losses = [module.loss(SOLUTIONS, step=step, template="task").item() for step in range(12)]
    assert set(drawn) == {"student", "data"}
    assert len({round(loss, 6) for loss, source in zip(losses, drawn, strict=True) if source == "student"}) > 1
    assert module.loss(SOLUTIONS, step=3, template="task").item() == losses[3]
    policy, source = stepkd.PolicyConfig("tiny-0.1m"), SourceConfig(lmbda=0.0)
    mixed = stepkd.GKDModule(policy, Local("tiny-0.5m"), source=source, cross_entropy=Mixed(0.0, 1.0, steps=3))
    at = [mixed.loss(SOLUTIONS, step=step, template="task").item() for step in range(4)]
    assert at[1] == pytest.approx((at[0] + at[2]) / 2)
    assert at[3] == at[2]
    mixed.cross_entropy = Mixed()
    with pytest.raises(ConfigError, match="the run has no planned end"):
        mixed.loss(SOLUTIONS, template="task")
    mixed._trainer = SimpleNamespace(training=False, max_steps=3, global_step=2)  # type: ignore[assignment]
    assert mixed.loss(SOLUTIONS, template="task").item() == pytest.approx(0.2 * at[0] + 0.8 * at[2])


def test_class_weights_of_a_run_outlast_a_look_at_other_rows() -> None:
    module = made("step kto")
    step(module, METHODS["step kto"][1])
    before = dict(module.values.weights)
    module.loss([*STEPS, STEPS[0], STEPS[0]], template="task")
    assert module.values.weights == before


@pytest.mark.parametrize(
    ("settings", "data", "message"),
    [
        ({"loss_weights": {"stepp": 0.5}}, {}, r"loss_weights names \['stepp'\]"),
        ({"reference": OTHER}, {"max_length": 10**6}, "max_length=1000000 exceeds the model's context"),
        ({"reference": ReferenceConfig("hf_" + "a" * 34)}, {}, "reference.path holds a password or token"),
    ],
)
def test_what_training_refuses_is_refused_without_a_trainer(
    settings: dict[str, Any], data: dict[str, Any], message: str
) -> None:
    module = stepkd.StepKTOModule(stepkd.PolicyConfig("tiny-0.1m"), **settings)
    module.complete_model = lambda: module.model.freeze_copy()  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match=message):
        module.loss(STEPS, template="task", **data)
    assert module._trainer is None
