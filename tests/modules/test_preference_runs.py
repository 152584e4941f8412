"""Whole runs of preference training: two processes, the reference cache, kill and resume, bad data."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from lightning.pytorch import Trainer
from transformers import AutoModelForCausalLM, Starcoder2Config

from stepkd.data.config import DataConfig
from stepkd.data.datamodule import StepData
from stepkd.data.encode import LabelRule
from stepkd.errors import ConfigError, DataError, ModelError
from stepkd.models.spec import LoRAConfig, PolicyConfig, build_tiny
from stepkd.modules.dpo import DPOModule, Sigmoid, SigmoidByVisits
from stepkd.modules.kto import ImplicitPRMModule, KTOModule, ReferencePointConfig, StepKTOModule
from stepkd.modules.preference import ReferenceConfig
from stepkd.scorers.load import Implicit, load_scorer
from stepkd.scorers.scorer import score_rows

WORKER = Path(__file__).with_name("preference_worker.py")
_SPEC = importlib.util.spec_from_file_location("preference_worker", WORKER)
assert _SPEC is not None
worker = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(worker)  # type: ignore[union-attr]


def launch(out: Path, rows: int, ranks: int) -> dict[str, Any]:
    done = forked.run([str(out), str(rows)], ranks=ranks, script=WORKER, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=True)


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path, distance: Callable[..., float]) -> None:
    """The same points, losses and gradients, with an odd number of rows and micro-batches that differ by rank."""
    one, two = launch(tmp_path / "1.pt", 13, 1), launch(tmp_path / "2.pt", 13, 2)
    for name in ("mismatch", "per_index", "batch", "dpo"):
        assert (one[name]["world"], two[name]["world"]) == (1, 2)
        assert distance(two[name]["gradients"], one[name]["gradients"]) < 1e-10
        assert one[name]["metrics"] == pytest.approx(two[name]["metrics"], rel=1e-6)
    assert one["mismatch"]["metrics"]["train/z0"] > 0
    assert torch.allclose(one["per_index"]["averages"], two["per_index"]["averages"], rtol=1e-9)


# --- cache ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    kept = ("id", "prompt", "answer", "outcome")
    lines = [
        {name: row[name] for name in kept} | {"completions": row["steps"], "labels": row["step_labels"]}
        for row in worker.solutions(6)
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


def data(path: Path, **settings: Any) -> StepData:
    common: dict[str, Any] = {"template": "task", "global_batch_size": 5, "max_length": 128}
    spec = DataConfig(path=str(path))
    return StepData(**{"train": spec, "validation": spec, **common, **settings})


def fit(
    folder: Path, module: Any, rows_of: Any, steps: int, checkpoint: Path | None = None, precision: Any = "32-true"
) -> Any:
    trainer = Trainer(
        precision=precision,
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=str(folder),
    )
    trainer.fit(module, rows_of, ckpt_path=checkpoint, weights_only=True)
    return module


def step_kto(**settings: Any) -> StepKTOModule:
    policy = PolicyConfig(path="tiny-0.1m", dtype="float32")
    return StepKTOModule(policy, beta=0.5, optimizer=worker.STEADY, micro_batch_tokens=200, **settings)


def weights(module: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.model.trainable_parameters()}


def test_the_cache_serves_a_whole_run(rows: Path, tmp_path: Path) -> None:
    """Two epochs with changing mismatched pairs, and validation; the copy of the weights is let go before step one."""
    plain = fit(tmp_path / "plain", step_kto(), data(rows), 5)
    cached = fit(tmp_path / "cached", step_kto(reference=ReferenceConfig(cache=True)), data(rows), 5)
    with plain.model.reference():
        pass
    with pytest.raises(RuntimeError, match="no adapter to switch off"), cached.model.reference():
        pass
    for name, value in weights(plain).items():
        assert torch.allclose(value, weights(cached)[name], rtol=1e-4, atol=1e-6), name
    first, second = (m.trainer.callback_metrics["train/z0"] for m in (plain, cached))
    assert float(first) == pytest.approx(float(second), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("lora", [pytest.param(None, marks=pytest.mark.slow), LoRAConfig(r=4)], ids=["all", "adapter"])
def test_a_run_of_outcomes_scores_steps_by_what_it_learnt(rows: Path, tmp_path: Path, lora: Any) -> None:
    """The scorer finds beta, template and reference in the checkpoint; an end token is of no step."""
    policy = PolicyConfig(path="tiny-0.1m", dtype="float32", lora=lora)
    module = fit(tmp_path, ImplicitPRMModule(policy, beta=0.5, optimizer=worker.STEADY), data(rows), 2)
    module.trainer.save_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    examples = module.datamodule.examples["train"][:3]
    module.know_reference(examples)
    for cumulative in (True, False):
        scorer = load_scorer(Implicit(str(tmp_path / "run"), cumulative=cumulative), device="cpu")
        found = score_rows(scorer, [example.row for example in examples])
        for example, ratios_N, scores in zip(examples, module.frozen_logratios(examples), found, strict=True):
            ratios_N[-1] = 0.0
            ends_S = torch.as_tensor(example.step_ends)
            q_S = 0.5 * ratios_N.double().cumsum(0)[ends_S - 1]
            wanted = q_S if cumulative else q_S.diff(prepend=torch.zeros(1))
            assert scores == pytest.approx(wanted.sigmoid().tolist(), abs=1e-6)
            assert q_S.abs().max() > 1e-4


class AtStart(KTOModule):
    """Keeps the largest log-ratio, and z0, of the first step, in which policy and reference are the same."""

    largest = 0.0
    z0 = 0.0

    def forward_pass(self, micro_batch: Any) -> Any:
        found = super().forward_pass(micro_batch)
        if self.global_step == 0 and self.trainer.training:
            self.largest = max(self.largest, float(found.logratios_N.detach().abs().max()))
            self.z0 = max(self.z0, self.values.points.z0)
        return found


def sharp(path: Path, config: Any = None) -> PolicyConfig:
    """A model that is sure of its tokens, so that rounding shows."""
    model, tokenizer = build_tiny("tiny-0.1m", seed=0)
    if config is not None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)
    for part in (model, tokenizer):
        part.save_pretrained(path)
    return PolicyConfig(path=str(path), dtype="float32")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_cached_reference_is_computed_as_the_policy_is(rows: Path, tmp_path: Path, precision: Any) -> None:
    spec = sharp(tmp_path / "model")
    settings: dict[str, Any] = {"optimizer": worker.STEADY, "reference": ReferenceConfig(cache=True)}
    rows_of = data(rows, validation=None)
    cached = fit(tmp_path, AtStart(spec, **settings, micro_batch_tokens=1), rows_of, 1, precision=precision)
    assert max(cached.largest, cached.z0) <= 1e-5


def test_the_references_context_is_checked(rows: Path, tmp_path: Path) -> None:
    spec = sharp(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 100}))
    with pytest.raises(ConfigError, match=r"data\.max_length=128 exceeds the reference's context of 100 tokens"):
        fit(tmp_path, step_kto(reference=ReferenceConfig(path=spec.path)), data(rows), 1)


def test_every_dropout_is_off_at_step_zero(rows: Path, tmp_path: Path) -> None:
    config = Starcoder2Config(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        sliding_window=None,
        residual_dropout=0.1,
        embedding_dropout=0.1,
        bos_token_id=None,
        eos_token_id=1,
    )
    module = AtStart(sharp(tmp_path / "model", config), optimizer=worker.STEADY)
    assert fit(tmp_path, module, data(rows, validation=None), 1).largest <= 1e-5
    assert module.z0 <= 1e-5


# --- resume --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_resumed_run_ends_with_the_same_weights(cache: bool, rows: Path, tmp_path: Path) -> None:
    """Running averages of the points included; the reference is the policy as it started, not as it was resumed."""
    how: dict[str, Any] = {"reference_point": ReferencePointConfig(step="per_index")}
    how |= {"reference": ReferenceConfig(cache=cache)}
    whole = fit(tmp_path / "a", step_kto(**how), data(rows), 5)
    half = fit(tmp_path / "b", step_kto(**how), data(rows), 3)
    half.trainer.save_checkpoint(tmp_path / "half.ckpt")
    saved = list(half._estimator.averages)
    resumed = fit(tmp_path / "b", step_kto(**how), data(rows), 5, tmp_path / "half.ckpt")
    assert saved
    assert resumed._estimator.averages == whole._estimator.averages != saved
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())


def test_another_reference_is_another_run(rows: Path, tmp_path: Path) -> None:
    half = fit(tmp_path, step_kto(), data(rows), 2)
    half.trainer.save_checkpoint(tmp_path / "half.ckpt")
    from stepkd.models.spec import build_tiny, tiny_tokenizer

    build_tiny("tiny-0.1m", seed=5)[0].save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    other = step_kto(reference=ReferenceConfig(path=str(tmp_path / "other")))
    with pytest.raises(ConfigError, match=r"reference\.path: .*other' now"):
        fit(tmp_path, other, data(rows), 4, tmp_path / "half.ckpt")
    other.resume_with = ("reference",)
    assert fit(tmp_path, other, data(rows), 4, tmp_path / "half.ckpt").trainer.global_step == 4


def test_a_reference_whose_weights_changed_is_another_run(rows: Path, tmp_path: Path) -> None:
    """Under the same path: the settings are equal, and the weights are told apart."""
    from stepkd.models.spec import build_tiny, tiny_tokenizer

    spec = ReferenceConfig(path=str(tmp_path / "other"))
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    build_tiny("tiny-0.1m", seed=4)[0].save_pretrained(tmp_path / "other")
    half = fit(tmp_path, step_kto(reference=spec), data(rows), 2)
    half.trainer.save_checkpoint(tmp_path / "half.ckpt")
    build_tiny("tiny-0.1m", seed=5)[0].save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="begun with another reference model"):
        fit(tmp_path, step_kto(reference=spec), data(rows), 4, tmp_path / "half.ckpt")


def test_changed_labels_are_other_data(rows: Path, tmp_path: Path) -> None:
    half = fit(tmp_path, step_kto(), data(rows), 2)
    half.trainer.save_checkpoint(tmp_path / "half.ckpt")
    with pytest.raises(ConfigError, match="cannot be resumed"):
        fit(tmp_path, step_kto(), data(rows, labels=LabelRule(after_error="mask")), 4, tmp_path / "half.ckpt")


# --- validation and bad input --------------------------------------------------------------------------------------


def test_validation_measures_what_training_does(rows: Path, tmp_path: Path) -> None:
    module = step_kto(reduction="mean_steps")
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=str(tmp_path))
    found = trainer.validate(module, data(rows), verbose=False)[0]
    assert found["val/outcome"] == pytest.approx(0.5, abs=1e-6)  # the policy is its reference
    assert found["val/step"] == pytest.approx(0.5, abs=1e-6)
    assert 0 < found["val/labels/correct_with_incorrect_step"] <= 1


def test_one_class_is_refused(rows: Path, tmp_path: Path) -> None:
    correct = [line for line in rows.read_text().splitlines() if json.loads(line)["outcome"]]
    path = tmp_path / "correct.jsonl"
    path.write_text("\n".join(correct) + "\n")
    with pytest.raises(DataError, match="labelled outcomes are correct"):
        fit(tmp_path, step_kto(), data(path), 1)
    module = fit(tmp_path, step_kto(), data(path, allow_one_class=True), 1)
    assert torch.isfinite(module.trainer.callback_metrics["train/loss"])


def test_data_of_another_method(rows: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.labels is set, and DPOModule reads no labels"):
        fit(tmp_path, DPOModule(PolicyConfig(path="tiny-0.1m")), data(rows, labels=LabelRule()), 1)
    with pytest.raises(DataError, match="DPOModule learns from rows of the kinds preference"):
        fit(tmp_path, DPOModule(PolicyConfig(path="tiny-0.1m")), data(rows), 1)


def test_settings_out_of_range() -> None:
    policy = PolicyConfig(path="tiny-0.1m")
    incorrect: list[tuple[Any, dict[str, Any], str]] = [
        (KTOModule, {"beta": 0}, "beta=0"),
        (KTOModule, {"class_weights": [1.0]}, "two positive numbers"),
        (StepKTOModule, {"loss_weights": {"step": -1}}, "loss_weights"),
        (StepKTOModule, {"reduction": "sum"}, "reduction"),
    ]
    for kind, settings, message in incorrect:
        with pytest.raises(ConfigError, match=message):
            kind(policy, **settings)
    with pytest.raises(ConfigError, match=r"loss.label_smoothing=0.7: must lie in \[0, 0.5\]"):
        Sigmoid(0.7)


def test_visits_are_asked_for_by_name() -> None:
    pairs = [pair for pair in worker.pair_examples() if pair.visits is not None]
    lacking = [pair.__class__(**{**vars(pair), "visits": None}) for pair in pairs]
    with pytest.raises(ConfigError, match=f"{lacking[0].id[:5]}.*has no visit counts"):
        worker.run(worker.DPO, lacking, loss=SigmoidByVisits())


def test_labels_that_the_method_learns_from_must_be_there(rows: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    unlabelled, correct_steps = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    kept = ("id", "prompt", "answer")
    unpaired = [
        {name: row[name] for name in kept} | {"completion": "".join(row["completions"]), "label": row["outcome"]}
        for row in lines
    ]
    unlabelled.write_text("\n".join(map(json.dumps, unpaired)) + "\n")
    with pytest.raises(DataError, match=r"no row has labelled steps.*KTO, which needs none"):
        fit(tmp_path, step_kto(), data(unlabelled), 1)
    correct_steps.write_text(
        "\n".join(json.dumps(row | {"labels": [True] * len(row["labels"])}) for row in lines) + "\n"
    )
    with pytest.raises(DataError, match="labelled steps are correct"):
        fit(tmp_path, step_kto(), data(correct_steps), 1)
    for path in (unlabelled, correct_steps):  # KTO does not look at steps
        module = KTOModule(PolicyConfig(path="tiny-0.1m"), optimizer=worker.STEADY)
        assert torch.isfinite(fit(tmp_path, module, data(path), 1).trainer.callback_metrics["train/loss"])
