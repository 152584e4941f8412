"""What every method inherits: clear stops, averages, checkpoints, validation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM

from stepkd.data.batching import BatchPlan, Position, StepLoader
from stepkd.data.config import DataConfig
from stepkd.data.datamodule import StepData
from stepkd.errors import ConfigError, MachineError, ModelError, StepkdError, TrainingError
from stepkd.losses import LossTerms
from stepkd.models.checkpoint import export_model, load_trained
from stepkd.models.spec import LoRAConfig, PolicyConfig, build_tiny
from stepkd.modules.optim import OptimizerConfig
from stepkd.modules.sft import SFTModule
from stepkd.modules.step_metrics import require_finite
from stepkd.modules.validation import ValidationConfig
from stepkd.runs.process import STOP_REQUEST, Preempted
from stepkd.sampling.engine import SamplingConfig

STEADY = OptimizerConfig(lr=1e-3, schedule="constant", warmup=0)


def loader_of(examples: Any, module: Any, size: int = 4) -> StepLoader:
    plan = BatchPlan([example.size for example in examples], size=size, shuffle=False)
    return StepLoader(examples, plan, position=lambda: module.position)


class Poisoned(SFTModule):
    """Its loss is infinite on the micro-batch that holds one given row."""

    poison = ""

    def loss_terms(self, micro_batch: Any) -> LossTerms:
        terms = super().loss_terms(micro_batch)
        if self.poison in micro_batch.ids and self.global_step >= 2:
            terms.sums["ce"] = terms.sums["ce"] * float("nan")
        return terms


def test_a_non_finite_loss_after_a_request_to_stop_blames_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A served teacher may have gone first; in the middle of a batch there is nothing to save."""
    monkeypatch.setattr(STOP_REQUEST, "name", "SIGTERM")
    micro: list[Any] = [SimpleNamespace(ids=["a"])]
    given: dict[str, Any] = {"step": 3, "device": torch.device("cpu")}
    with pytest.raises(Preempted, match="SIGTERM"):
        require_finite([torch.tensor(torch.nan)], 1.0, micro, begins=True, **given)
    with pytest.raises(MachineError, match=r"step 3: asked to stop, .* middle of a batch"):
        require_finite([torch.tensor(torch.nan)], 1.0, micro, begins=False, **given)


def test_a_non_finite_loss_stops_and_names_the_rows(examples: Any, trainer: Any, tmp_path: Path) -> None:
    module = Poisoned(PolicyConfig(path="tiny-0.1m"), STEADY, micro_batch_tokens=100)
    module.poison = examples[9].id  # in the third batch of four
    runner = trainer(max_steps=4)
    before: dict[str, torch.Tensor] = {}

    def keep_weights(*_: Any) -> None:
        before.update({name: p.detach().clone() for name, p in module.named_parameters()})

    module.on_train_batch_start = keep_weights  # type: ignore[method-assign, assignment]
    with pytest.raises(TrainingError, match="step 2: the loss is not finite") as caught:
        runner.fit(module, train_dataloaders=loader_of(examples, module))
    assert examples[9].id in str(caught.value)
    assert not any(example.id in str(caught.value) for example in examples[:8])
    assert "checkpoint" not in str(caught.value), "there is none"
    assert module.position == Position(0, 2), "the poisoned batch must not count as done"
    after = dict(module.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items()), "the weights were touched"


def test_a_batch_without_targets_is_refused(examples: Any, trainer: Any) -> None:
    class Blind(SFTModule):
        def count(self, micro_batch: Any) -> dict[str, float]:
            return {"ce": 0.0}

    module = Blind(PolicyConfig(path="tiny-0.1m"), STEADY)
    with pytest.raises(TrainingError, match=r"no example of 1 batch.* has a single target"):
        trainer().fit(module, train_dataloaders=loader_of(examples, module))


def test_the_model_is_gathered_once_for_all_steps_of_a_batch(examples: Any, trainer: Any) -> None:
    """And only by a method whose prepare() runs it."""

    class TwoSteps(SFTModule):
        steps_per_batch = 2
        events: list[str]

        def prepare(self, batch: Any) -> Iterator[Any]:
            self.events.append("prepared")
            for _ in range(2):
                yield self.prepare_examples(batch.examples)

        @contextmanager
        def gathered(self) -> Iterator[None]:
            self.events.append("gathered")
            yield
            self.events.append("sharded")

        def after_step(self, metrics: dict[str, float]) -> None:
            self.events.append("step")

    for prepares, expected in ((False, ["prepared"]), (True, ["gathered", "prepared", "sharded"])):
        module = TwoSteps(PolicyConfig(path="tiny-0.1m"), STEADY)
        module.prepares_with_model, module.events = prepares, []
        trainer(max_steps=2).fit(module, train_dataloaders=loader_of(examples, module))
        assert module.events == [*expected, "step", "step"]


def test_loss_weights_scale_the_component(examples: Any, one_step: Any) -> None:
    plain = one_step(examples[:4])
    double = one_step(examples[:4], loss_weights={"ce": 2.0})
    for name, gradient in plain.gradients.items():
        assert torch.allclose(double.gradients[name], 2 * gradient, rtol=1e-12, atol=0)


def test_an_unknown_loss_weight_is_refused(examples: Any, one_step: Any) -> None:
    with pytest.raises(ConfigError, match="outcome"):
        one_step(examples[:2], loss_weights={"outcome": 1.0})


def test_clipping_bounds_the_update_and_logs_the_full_norm(examples: Any, one_step: Any) -> None:
    spec = OptimizerConfig(lr=1e-3, schedule="constant", warmup=0, max_grad_norm=1e-3)
    module = one_step(examples[:4], optimizer=spec)
    norm = sum(float(g.norm() ** 2) for g in module.gradients.values()) ** 0.5
    assert norm > 1e-2
    assert float(module.trainer.callback_metrics["train/grad_norm"]) == pytest.approx(norm, rel=1e-5)
    clipped = sum(float(p.norm() ** 2) for p in clipped_gradients(module)) ** 0.5
    assert clipped == pytest.approx(1e-3 * 0.1, rel=1e-3)


def clipped_gradients(module: Any) -> list[torch.Tensor]:
    """What AdamW saw: its first moment after one step is (1 - beta1) times the gradient."""
    state = module.trainer.optimizers[0].state
    return [entry["exp_avg"] for entry in state.values()]


def test_checkpoints_hold_trainable_weights_only(examples: Any, trainer: Any, tmp_path: Path) -> None:
    module = SFTModule(PolicyConfig(path="tiny-0.1m", lora=LoRAConfig(r=2)), STEADY)
    runner = trainer()
    runner.fit(module, train_dataloaders=loader_of(examples, module))
    runner.save_checkpoint(tmp_path / "x.ckpt")
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert checkpoint["state_dict"]
    assert all("lora_" in name for name in checkpoint["state_dict"])
    assert checkpoint["stepkd"]["position"] == {"epoch": 0, "batch": 1}
    assert checkpoint["stepkd"]["policy"]["lora"]["r"] == 2


def test_checkpoints_hold_what_the_run_knows_of_its_engine(examples: Any, trainer: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"policy": PolicyConfig(path="tiny-0.1m"), "optimizer": STEADY}
    module, again = SFTModule(**settings), SFTModule(**settings)
    runner = trainer()
    runner.fit(module, train_dataloaders=loader_of(examples, module))
    module.model.engine_noise |= {"noise": 0.1, "before": 0.2}
    runner.save_checkpoint(tmp_path / "x.ckpt")
    trainer(max_steps=2).fit(
        again, train_dataloaders=loader_of(examples, again), ckpt_path=tmp_path / "x.ckpt", weights_only=True
    )
    assert again.model.engine_noise == {"noise": 0.1, "before": 0.2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"policy": PolicyConfig(path="tiny-0.1m", lora=LoRAConfig(r=2))},
            "holds other weights than this recipe trains",
        ),
        ({"seed": 7}, "seed: 0 then, 7 now"),
        ({"optimizer": OptimizerConfig(lr=2e-3, schedule="constant", warmup=0)}, "optimizer.lr: 0.001 then, 0.002 now"),
        ({"loss_weights": {"ce": 2.0}}, "loss_weights.ce: not set then, 2.0 now"),
    ],
)
def test_resuming_something_else_is_refused(
    change: dict[str, Any], message: str, examples: Any, trainer: Any, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"policy": PolicyConfig(path="tiny-0.1m"), "optimizer": STEADY}
    module = SFTModule(**settings)
    runner = trainer()
    runner.fit(module, train_dataloaders=loader_of(examples, module))
    runner.save_checkpoint(tmp_path / "x.ckpt")
    other = SFTModule(**{**settings, **change})
    with pytest.raises(StepkdError, match=message):
        trainer(max_steps=2).fit(
            other, train_dataloaders=loader_of(examples, other), ckpt_path=tmp_path / "x.ckpt", weights_only=True
        )


def test_an_adapter_is_not_resumed_on_another_base(examples: Any, trainer: Any, tmp_path: Path) -> None:
    for part in build_tiny("tiny-0.1m", seed=0):
        part.save_pretrained(tmp_path / "base")
    policy = PolicyConfig(path=str(tmp_path / "base"), lora=LoRAConfig(r=2))
    module, runner = SFTModule(policy, STEADY), trainer()
    runner.fit(module, train_dataloaders=loader_of(examples, module))
    runner.save_checkpoint(tmp_path / "x.ckpt")
    resumed: dict[str, Any] = {"ckpt_path": tmp_path / "x.ckpt", "weights_only": True}
    trainer(max_steps=2).fit(module := SFTModule(policy, STEADY), loader_of(examples, module), **resumed)
    assert module.global_step == 2
    build_tiny("tiny-0.1m", seed=1)[0].save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match=r"begun with another policy model .*policy\.path again"):
        trainer(max_steps=2).fit(module := SFTModule(policy, STEADY), loader_of(examples, module), **resumed)


def test_float16_is_refused(examples: Any, one_step: Any) -> None:
    with pytest.raises(ConfigError, match="bf16-mixed"):
        one_step(examples[:2], dtype="float32", trainer={"precision": "16-true"})


def test_float16_weights_are_refused(examples: Any, one_step: Any) -> None:
    with pytest.raises(ConfigError, match="loss scaling"):
        one_step(examples[:2], dtype="float16")


def test_training_all_weights_in_bfloat16_is_refused(examples: Any, one_step: Any) -> None:
    with pytest.raises(ConfigError, match=r"20 of 20 trained weights are bfloat16 .*set policy\.dtype float32 with"):
        one_step(examples[:2], dtype="bfloat16", trainer={"precision": "bf16-mixed"})


def test_bfloat16_weights_are_trained_where_that_is_allowed(examples: Any, one_step: Any) -> None:
    module = one_step(examples[:2], dtype="bfloat16", policy={"allow_low_precision": True})
    moments = clipped_gradients(module)
    assert {each.dtype for each in (*module.model.parameters(), *moments)} == {torch.bfloat16}
    assert all(each.any() for each in moments)


def test_a_single_bfloat16_weight_is_found(examples: Any, trainer: Any) -> None:
    module = SFTModule(PolicyConfig(path="tiny-0.1m"), STEADY)
    module.configure_model()
    module.model.causal_lm.model.layers[1].mlp.to(torch.bfloat16)
    with pytest.raises(ConfigError, match=r"3 of 20 trained weights are bfloat16 \(model.*layers\.1\.mlp\.gate_proj"):
        trainer().fit(module, train_dataloaders=loader_of(examples, module))


def moved(before: dict[str, torch.Tensor], module: Any) -> dict[str, float]:
    """Share of every trained weight's elements that training changed."""
    now = dict(module.model.trainable_parameters())
    return {name: float((now[name].float() != value.float()).float().mean()) for name, value in before.items()}


def weights_of(module: Any) -> dict[str, torch.Tensor]:
    module.configure_model()
    return {name: parameter.detach().clone() for name, parameter in module.model.trainable_parameters()}


SMALL_STEPS = OptimizerConfig(lr=2e-6, schedule="constant", warmup=0)


def test_null_trains_all_weights_of_a_bfloat16_checkpoint_in_float32(
    examples: Any, trainer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for part in build_tiny("tiny-0.1m", seed=0, dtype="bfloat16"):
        part.save_pretrained(tmp_path / "base")
    module = SFTModule(PolicyConfig(path=str(tmp_path / "base"), dtype=None), SMALL_STEPS)
    with caplog.at_level("INFO"):
        before = weights_of(module)
    assert "policy.dtype null: all weights are trained, so they are loaded in float32" in caplog.text
    runner = trainer(max_steps=3)
    runner.fit(module, train_dataloaders=loader_of(examples, module))
    # Rows of characters that no example has get no gradient.
    assert min(share for name, share in moved(before, module).items() if "embed" not in name) > 0.9
    runner.save_checkpoint(tmp_path / "x.ckpt")
    assert load_trained(tmp_path / "x.ckpt").causal_lm.dtype == torch.float32


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens", "lm_head"], ["norm"], ["mlp"]])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_modules_to_save_train_in_float32_on_a_bfloat16_base(
    saved: list[str], precision: Any, examples: Any, trainer: Any, tmp_path: Path
) -> None:
    lora = LoRAConfig(r=2, target_modules=["q_proj"], modules_to_save=saved)
    module = SFTModule(PolicyConfig(path="tiny-0.1m", dtype="bfloat16", lora=lora), SMALL_STEPS)
    before = weights_of(module)
    ids = torch.tensor([[5, 17, 33, 8, 60, 4]])
    with module.model.reference() as reference:  # its adapters and saved modules off
        expected = reference.head(reference.hidden(ids, torch.ones_like(ids)))
        assert torch.equal(module.model.head(module.model.hidden(ids, torch.ones_like(ids))), expected)
    runner = trainer(max_steps=3, precision=precision)
    runner.fit(module, train_dataloaders=loader_of(examples, module))
    shares = {name: share for name, share in moved(before, module).items() if "modules_to_save" in name}
    assert shares
    assert min(share for name, share in shares.items() if "embed" not in name) > 0.9
    runner.save_checkpoint(tmp_path / "x.ckpt")
    trained = {name: value for name, value in module.model.named_parameters() if "modules_to_save" in name}
    found = dict(load_trained(tmp_path / "x.ckpt").named_parameters())
    assert all(torch.equal(found[name], value) for name, value in trained.items())
    out = export_model(tmp_path / "x.ckpt", tmp_path / "out")
    assert {str(value.dtype) for value in load_file(out / "model.safetensors").values()} == {"torch.bfloat16"}


def test_a_mixture_of_experts_is_told_of_its_auxiliary_loss(
    examples: Any, trainer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = MixtralConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        sliding_window=None,
        router_aux_loss_coef=0.02,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    build_tiny("tiny-0.1m", seed=0)[1].save_pretrained(tmp_path)
    module = SFTModule(PolicyConfig(path=str(tmp_path)), STEADY)
    trainer().fit(module, train_dataloaders=loader_of(examples, module))
    assert "MixtralForCausalLM is a mixture of experts: its auxiliary loss, which balances the experts" in caplog.text
    assert "(router_aux_loss_coef 0.02), is not part of this method's loss" in caplog.text


def test_bf16_mixed_trains_close_to_float32(examples: Any, one_step: Any, distance: Any) -> None:
    exact = one_step(examples, dtype="float32")
    mixed = one_step(examples, dtype="float32", trainer={"precision": "bf16-mixed"})
    assert all(gradient.dtype == torch.float32 for gradient in mixed.gradients.values())
    assert distance(mixed.gradients, exact.gradients) < 0.05


class TwoSteps(SFTModule):
    """An on-policy method in outline: one batch serves two optimiser steps."""

    steps_per_batch = 2

    def prepare(self, batch: Any) -> Any:
        half = len(batch.examples) // 2
        yield self.prepare_examples(batch.examples[:half])
        yield self.prepare_examples(batch.examples[half:])


def test_inner_steps_follow_the_schedule_to_its_end(examples: Any, trainer: Any) -> None:
    spec = OptimizerConfig(lr=1e-3, schedule="linear", warmup=0)
    module = TwoSteps(PolicyConfig(path="tiny-0.1m"), spec)
    runner = trainer(max_steps=-1, max_epochs=2)
    runner.fit(module, train_dataloaders=loader_of(examples, module))
    assert runner.global_step == 16  # 2 epochs of 4 batches of 2 steps
    assert module.position == Position(2, 0)
    assert runner.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)


def test_a_step_without_items_can_be_skipped(examples: Any, trainer: Any) -> None:
    class Blind(SFTModule):
        skip_empty_steps = True

        def count(self, micro_batch: Any) -> dict[str, float]:
            return {"ce": 0.0}

    module = Blind(PolicyConfig(path="tiny-0.1m"), STEADY)
    runner = trainer(max_steps=-1, max_epochs=1)
    runner.fit(module, train_dataloaders=loader_of(examples, module))
    assert runner.global_step == 0
    assert module.position == Position(1, 0)


def test_the_logged_learning_rate_is_the_one_that_was_used(examples: Any, trainer: Any) -> None:
    module = SFTModule(PolicyConfig(path="tiny-0.1m"), OptimizerConfig(lr=1e-3, schedule="linear", warmup=2))
    runner = trainer(max_steps=3)
    rates: list[float] = []

    def keep(*_: Any) -> None:
        rates.append(float(runner.callback_metrics["train/lr"]))

    module.on_train_batch_end = keep  # type: ignore[method-assign, assignment]
    runner.fit(module, train_dataloaders=loader_of(examples, module))
    assert rates == pytest.approx([0.0, 0.5e-3, 1e-3], abs=1e-9)


def test_other_data_or_batches_cannot_be_resumed(trainer: Any, tmp_path: Path) -> None:
    module = SFTModule(PolicyConfig(path="tiny-0.1m"), STEADY)
    runner = trainer()
    runner.fit(module, datamodule=tiny_data())
    runner.save_checkpoint(tmp_path / "x.ckpt")
    again = SFTModule(PolicyConfig(path="tiny-0.1m"), STEADY)
    with pytest.raises(ConfigError, match="rows_and_batches"):
        trainer(max_steps=2).fit(
            again, datamodule=tiny_data(global_batch_size=4), ckpt_path=tmp_path / "x.ckpt", weights_only=True
        )


def test_another_rank_is_a_model_error_not_a_traceback(examples: Any, trainer: Any, tmp_path: Path) -> None:
    module = SFTModule(PolicyConfig(path="tiny-0.1m", lora=LoRAConfig(r=4)), STEADY)
    runner = trainer()
    runner.fit(module, train_dataloaders=loader_of(examples, module))
    runner.save_checkpoint(tmp_path / "x.ckpt")
    other = SFTModule(PolicyConfig(path="tiny-0.1m", lora=LoRAConfig(r=8)), STEADY)
    with pytest.raises(ModelError, match="28 of another shape"):
        trainer(max_steps=2).fit(
            other, train_dataloaders=loader_of(examples, other), ckpt_path=tmp_path / "x.ckpt", weights_only=True
        )


def tiny_data(**settings: Any) -> StepData:
    options = {"task": "modular:terms=3,modulus=5"}
    defaults: dict[str, Any] = {
        "train": DataConfig(source="task", split="train", options={**options, "n": 40}),
        "validation": DataConfig(source="task", split="validation", options={**options, "n": 6}),
        "predict": DataConfig(source="task", split="test", options={**options, "n": 3}),
        "template": "task",
        "global_batch_size": 8,
        "max_length": 64,
    }
    return StepData(**{**defaults, **settings})


def test_validation_measures_loss_and_sampled_accuracy(trainer: Any) -> None:
    module = SFTModule(PolicyConfig(path="tiny-0.1m"), STEADY, ValidationConfig(SamplingConfig(n=2, max_new_tokens=12)))
    data = tiny_data()
    runner = trainer()
    first = runner.validate(module, datamodule=data, verbose=False)[0]
    again = trainer().validate(module, datamodule=data, verbose=False)[0]
    assert first == again, "the same noise is drawn at every validation"
    assert 0 <= first["val/accuracy"] <= 1
    assert first["val/tokens"] <= 12
    assert first["val/loss"] == first["val/ce"]
    assert 0 <= first["val/token_accuracy"] <= 1
    examples = data.examples["validation"]
    total = sum(float(module.loss_terms(module._collate([e])).sums["ce"].detach()) for e in examples)
    assert first["val/ce"] == pytest.approx(total / sum(len(e.token_ids) for e in examples), rel=1e-5)


def test_predict_gives_valid_completion_rows(trainer: Any) -> None:
    from stepkd.data.rows import COMPLETION, validate

    module = SFTModule(PolicyConfig(path="tiny-0.1m"), STEADY, ValidationConfig(SamplingConfig(n=2, max_new_tokens=9)))
    batches = trainer().predict(module, datamodule=tiny_data())
    rows = [row for batch in batches for row in batch]
    assert len(rows) == 6
    for row in rows:
        validate(row, COMPLETION)
    assert {row["sample"] for row in rows} == {0, 1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "optimizer.lr=0.0"),
        ({"lr": float("nan")}, "optimizer.lr=nan: must be positive"),
        ({"schedule": "cosin"}, "choose from constant, linear, cosine"),
        ({"beta2": 1.0}, "optimizer.beta2=1.0"),
        ({"warmup": -1}, "optimizer.warmup=-1"),
    ],
)
def test_bad_optimizer_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OptimizerConfig(**settings)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedules_warm_up_and_end_where_they_should(schedule: str) -> None:
    from stepkd.modules.optim import build_optimizer, build_schedule

    spec = OptimizerConfig(lr=1.0, schedule=schedule, warmup=5)  # type: ignore[arg-type]
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = build_optimizer(spec, [("w", parameter)])
    plan = build_schedule(spec, optimizer, 50)
    rates = []
    for _ in range(50):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        plan.step()
    assert rates[:6] == pytest.approx([step / 5 for step in range(6)])
    assert max(rates) == pytest.approx(1.0)
    end = optimizer.param_groups[0]["lr"]
    assert end == pytest.approx(1.0 if schedule == "constant" else 0.0, abs=1e-6)


def test_only_matrices_decay() -> None:
    from stepkd.modules.optim import build_optimizer

    named = [("w", torch.nn.Parameter(torch.ones(2, 2))), ("norm", torch.nn.Parameter(torch.ones(2)))]
    optimizer = build_optimizer(OptimizerConfig(weight_decay=0.1), named)
    assert {g["weight_decay"]: len(g["params"]) for g in optimizer.param_groups} == {0.1: 1, 0.0: 1}
