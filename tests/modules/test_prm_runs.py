"""Runs of reward models: settings, checkpoints, resuming, validation, the command line."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stepkd.cli import main
from stepkd.data.config import DataConfig
from stepkd.data.datamodule import StepData
from stepkd.data.encode import LabelRule
from stepkd.errors import ConfigError, StepkdError
from stepkd.losses import step_cross_entropy
from stepkd.models.checkpoint import load_trained
from stepkd.models.spec import Classifier, LabelTokens, LoRAConfig, PolicyConfig, StepHeadConfig
from stepkd.modules.optim import OptimizerConfig
from stepkd.modules.prm import (
    PQM,
    LanguageModelling,
    MultilevelRanking,
    PRMModule,
    StepCrossEntropy,
    StepDecisions,
    StepRegression,
)
from stepkd.modules.prm_teachers import MCMI
from stepkd.modules.validation import ValidationConfig
from stepkd.sampling.engine import SamplingConfig

ROOT = Path(__file__).resolve().parents[2]
STEADY = OptimizerConfig(lr=1e-3, schedule="constant", warmup=0)
TOKENS = LabelTokens()
CLASSIFIER = Classifier()
HEADS = {"label_tokens": TOKENS, "classifier": CLASSIFIER}


# ---- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"losses": lambda: [LanguageModelling()]},
            r"losses: \[LanguageModelling\] do not train the step head .* add Step",
        ),
        (
            {"losses": list},
            r"losses: \[\] do not train the step head by .*: add .* or StepDistillation, or leave",
        ),
        (
            {"losses": lambda: [MultilevelRanking()]},
            r"losses: \[MultilevelRanking\] do not train the step head by",
        ),
        ({"losses": lambda: [StepCrossEntropy(), MCMI()]}, r"MCMI with weight 1 .* loss_weights: \{mcmi: 0\.1\}"),
        (
            {"losses": lambda: [StepCrossEntropy(), LanguageModelling()], "head": LabelTokens(meaning="outcome")},
            r"at every token LanguageModelling .* head\.labels=\['-', '\+'\]: take head Classifier",
        ),
        (
            {"losses": lambda: [StepRegression()], "head": Classifier(classes=3, neutral="half")},
            r"StepRegression trains whether .* and head\.neutral='half' reads",
        ),
        (
            {"losses": lambda: [PQM()], "head": Classifier(classes=3, neutral="incorrect")},
            r"PQM trains whether .* and head\.neutral='incorrect' reads",
        ),
        (
            {"losses": lambda: [StepCrossEntropy(), PQM()], "head": Classifier(members=2)},
            r"PQM would train the mean of head\.members=2 .* take StepCrossEntropy or StepDistillation",
        ),
        ({"losses": lambda: [StepCrossEntropy([1.0])]}, r"class_weights=\[1.0\]: 2 positive numbers"),
        ({"losses": lambda: [StepCrossEntropy([1.0, -1.0])]}, "positive numbers"),
        # a batch of that class alone would weigh nothing
        ({"losses": lambda: [StepCrossEntropy([1.0, 0.0])]}, "positive numbers"),
        ({"losses": lambda: [StepCrossEntropy([1.0, float("nan")])]}, "positive numbers"),
        ({"losses": lambda: [StepCrossEntropy([1.0, float("inf")])]}, "positive numbers"),
        (
            {"losses": lambda: [StepCrossEntropy([1.0, 1.0])], "head": LabelTokens(labels=("-", "0", "+"))},
            "3 positive numbers",
        ),
        ({"losses": lambda: [PQM(-1.0)]}, "margin=-1.0"),
        ({"losses": lambda: [StepRegression(form="mae")]}, "unknown losses.form 'mae'"),  # type: ignore[arg-type]
        ({"losses": lambda: [StepDecisions()]}, "the head has 2 classes: set head.classes: 3"),
        ({"losses": lambda: [MultilevelRanking(lower=-0.1)]}, "losses.lower=-0.1"),
        ({"losses": lambda: [MultilevelRanking(upper=float("nan"))]}, "losses.upper=nan"),
        (
            {"losses": lambda: [StepCrossEntropy(), PQM()], "head": LabelTokens(meaning="outcome")},
            "PQM compares the steps of a solution, and an outcome reward model",
        ),
        ({"validation": ValidationConfig(SamplingConfig())}, "is not sampled from; use null"),
        ({"loss_weights": {"lm": -1.0}}, "loss_weights={'lm': -1.0}"),
        ({"loss_weights": {"lm": float("nan")}}, "loss_weights={'lm': nan}"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PRMModule(
            PolicyConfig(path="tiny-0.1m"),
            **{name: value() if name == "losses" else value for name, value in settings.items()},
        )


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def data(**settings: Any) -> StepData:
    options = {"task": "modular:terms=3", "noise": {"rate": 0.4}}
    defaults: dict[str, Any] = {
        "train": DataConfig(source="task", split="train", options={**options, "n": 24}),
        "validation": DataConfig(source="task", split="validation", options={**options, "n": 6}),
        "template": "task",
        "global_batch_size": 8,
        "max_length": 64,
        "overlap_ngram": 0,
    }
    return StepData(**{**defaults, **settings})


def fitted(trainer: Any, head: StepHeadConfig, *, steps: int, checkpoint: Path | None = None, **settings: Any) -> Any:
    """A run of so many steps, from its start or from a checkpoint."""
    source = settings.pop("data", None) or data()
    module = PRMModule(
        PolicyConfig(path="tiny-0.1m", lora=settings.pop("lora", None)), head, optimizer=STEADY, **settings
    )
    runner = trainer(max_steps=steps, num_sanity_val_steps=0)
    arguments: dict[str, Any] = {} if checkpoint is None else {"ckpt_path": checkpoint, "weights_only": True}
    runner.fit(module, datamodule=source, **arguments)
    return runner


LORA = LoRAConfig(r=4, target_modules=["q_proj", "down_proj"])


@pytest.mark.parametrize("name", ["label_tokens", "classifier"])
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_resumed_run_is_the_uninterrupted_one_and_loads_for_scoring(
    name: str, lora: LoRAConfig | None, trainer: Any, tmp_path: Path, encoded: Any, scored: Any
) -> None:
    head, settings = HEADS[name], {"lora": lora}
    whole = fitted(trainer, head, steps=4, **settings)
    fitted(trainer, head, steps=2, **settings).save_checkpoint(tmp_path / "two.ckpt")
    resumed = fitted(trainer, head, steps=4, checkpoint=tmp_path / "two.ckpt", **settings)
    weights = dict(whole.lightning_module.model.trainable_parameters())
    assert any("step_head" in key for key in weights) is (name == "classifier")
    for key, value in resumed.lightning_module.model.trainable_parameters():
        assert torch.equal(value, weights[key]), key
    whole.save_checkpoint(tmp_path / "four.ckpt")
    loaded = load_trained(tmp_path / "four.ckpt")
    examples = encoded(head, 4)
    values = scored(loaded, examples)
    assert torch.equal(values, scored(whole.lightning_module.model, examples))
    assert not torch.equal(values, scored(load_trained(tmp_path / "two.ckpt"), examples))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": replace(TOKENS, labels=("0", "1"))}, r"head\.labels: \['-', '\+'\] then, \['0', '1'\] now"),
        ({"head": replace(TOKENS, restricted=False)}, r"head\.restricted: True then, False now"),
        ({"head": CLASSIFIER}, r"holds other weights .* [Uu]se the policy \(path, lora\) and the head"),
        ({"data": data(labels=LabelRule(after_error="keep"))}, r"data\.rows_and_batches"),
    ],
)
def test_another_head_or_other_labels_cannot_go_on(
    change: dict[str, Any], message: str, trainer: Any, tmp_path: Path
) -> None:
    fitted(trainer, TOKENS, steps=1).save_checkpoint(tmp_path / "x.ckpt")
    head = change.pop("head", TOKENS)
    with pytest.raises(StepkdError, match=message):
        fitted(trainer, head, steps=2, checkpoint=tmp_path / "x.ckpt", **change)


def test_validation_measures_both_classes(trainer: Any, fresh: Any, plain_logits: Any) -> None:
    module = PRMModule(PolicyConfig(path="tiny-0.1m"), TOKENS, [StepCrossEntropy([2.0, 1.0])])
    source = data()
    logged = trainer().validate(module, datamodule=source, verbose=False)[0]
    examples: Any = source.examples["validation"]
    policy = fresh(TOKENS, dtype="float32")
    with torch.no_grad():
        logps = torch.cat([plain_logits(policy, example) for example in examples]).log_softmax(-1)
    targets = torch.tensor([target for example in examples for target in example.targets if target])
    terms = step_cross_entropy(logps, targets, class_weights=[2.0, 1.0])
    assert logged["val/prm"] == pytest.approx(float(terms.sums["prm"] / (targets @ torch.tensor([2.0, 1.0])).sum()))
    for name in ("accuracy", "accuracy_correct", "accuracy_incorrect", "brier"):
        total, count = terms.metrics[name]
        assert logged[f"val/{name}"] == pytest.approx(float(total / count), rel=1e-5)


def test_a_reward_model_is_not_sampled_from() -> None:
    module = PRMModule(PolicyConfig(path="tiny-0.1m"))
    with pytest.raises(ConfigError, match="use stepkd score"):
        module.predict_step(None, 0)  # type: ignore[arg-type]
    assert any("stepkd evaluate-prm --scorer runs/x" in line for line in module.next_commands("runs/x"))


# ---- the command line -----------------------------------------------------------------------------------------------

OVERLAY = """
trainer: {max_steps: 4, val_check_interval: 2}
checkpoint: {every_n_steps: 1}
model:
  init_args:
    policy: {path: tiny-0.1m}
    head: {class_path: Classifier, init_args: {layers: 1, format: {marker_place: before_separator}}}
    losses: [{class_path: StepCrossEntropy, init_args: {class_weights: [2.0, 1.0]}}, PQM, LanguageModelling]
    optimizer: {warmup: 1}
data:
  init_args:
    train: {options: {task: 'modular:terms=3', n: 40, noise: {rate: 0.4}}}
    validation: {options: {task: 'modular:terms=3', n: 8, noise: {rate: 0.4}}}
    labels: {after_error: mask, neutral: incorrect}
    global_batch_size: 16
"""


def command(tmp_path: Path, out: Path, *extra: str) -> list[str]:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(OVERLAY)
    recipe = ROOT / "recipes" / "tiny" / "prm.yaml"
    return ["fit", "--config", str(recipe), "--config", str(overlay), "--out", str(out), *extra]


def last(out: Path) -> dict[str, Any]:
    return torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)


def test_the_recipe_runs_with_settings_of_head_and_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(command(tmp_path, out)) == 0
    assert "stepkd score --scorer" in capsys.readouterr().out
    checkpoint = last(out)
    assert checkpoint["global_step"] == 4
    head = checkpoint["stepkd"]["step_head"]
    assert (head["kind"], head["layers"], head["format"]["marker_place"]) == ("classifier", 1, "before_separator")
    text = (out / "config.yaml").read_text()
    assert "after_error: mask" in text
    assert re.search(r"class_weights:\n +- 2.0\n +- 1.0", text)
    assert re.search(r"class_path: stepkd\.modules\.(prm\.)?PQM\n", text)
    again = load_trained(out)
    assert again.require_step_head().spec.format.marker == "~"
    metrics = (out / "metrics.jsonl").read_text()
    assert '"val/accuracy_incorrect"' in metrics
    assert all(f'"train/{name}"' in metrics for name in ("prm", "pqm", "lm"))
