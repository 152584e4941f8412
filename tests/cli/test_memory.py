"""The doctor's lower bound holds in real runs, and its measurement is one of real steps."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked
import pytest
import torch

from stepkd.cli import main, memory
from stepkd.cli.memory import Bound, cache_bytes, in_own_process, lower_bound, skeleton, two_steps, weight_bytes
from stepkd.errors import ConfigError, DataError, MachineError
from stepkd.models.checkpoint import load_trained
from stepkd.models.machine import memory_peak
from stepkd.models.policy import Policy
from stepkd.models.spec import LoRAConfig, PolicyConfig, build_tiny
from stepkd.modules.base import StepModule
from stepkd.training import fit

ROOT = Path(__file__).resolve().parents[2]
TINY = PolicyConfig(path="tiny-0.1m")
FEW = ("data.init_args.train.options.n=16", "model.init_args.policy.path=tiny-0.1m")


def check_fit(words: list[str]) -> tuple[Any, Any]:
    """Module and data of a recipe."""
    return fit.check_fit(words=words)[:2]


def recipe(name: str, *settings: str) -> list[str]:
    words = ["--config", str(ROOT / "recipes" / "tiny" / f"{name}.yaml"), "--data.init_args.validation", "null"]
    return words + [word for setting in settings for word in (f"--{setting}".split("=", 1))]


@pytest.mark.parametrize(
    "spec",
    [
        TINY,
        replace(TINY, dtype="bfloat16"),
        replace(TINY, lora=LoRAConfig(r=3)),
        replace(TINY, dtype="bfloat16", lora=LoRAConfig(r=3, modules_to_save=["lm_head"])),
    ],
    ids=str,
)
def test_a_skeleton_has_the_weights_of_the_policy(spec: PolicyConfig) -> None:
    real, bones = Policy.load(spec).model, skeleton(spec)
    assert all(p.is_meta for p in bones.parameters())
    for trained in (False, True):
        counted = [
            sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad or not trained)
            for model in (real, bones)
        ]
        assert counted[0] == counted[1]
    assert weight_bytes(bones, spec) == sum(p.numel() * p.element_size() for p in real.parameters())
    packed = weight_bytes(bones, replace(spec, quantization="nf4", lora=LoRAConfig()))
    assert packed < weight_bytes(bones, spec)


def test_auto_counts_a_bfloat16_checkpoint_as_it_is_trained(tmp_path: Path) -> None:
    for part in build_tiny("tiny-0.1m", seed=0, dtype="bfloat16"):
        part.save_pretrained(tmp_path)
    path = f"model.init_args.policy.path={tmp_path}"
    auto, full = (
        lower_bound(*check_fit(recipe("sft", path, f"model.init_args.policy.dtype={dtype}")))
        for dtype in ("auto", "float32")
    )
    assert (auto.held, auto.at_least) == (full.held, full.at_least)


def test_an_adapter_folder_is_trained_alone(tmp_path: Path) -> None:
    lora = Policy.load(replace(TINY, lora=LoRAConfig(r=3)))
    lora.model.save_pretrained(tmp_path)
    lora.tokenizer.save_pretrained(tmp_path)
    spec = PolicyConfig(path=str(tmp_path))
    real, bones = Policy.load(spec).model, skeleton(spec)
    for model in (real, bones):
        assert 0 < sum(p.numel() for p in model.parameters() if p.requires_grad) < 20_000
    assert weight_bytes(bones, spec) == weight_bytes(real, spec)


def test_a_row_of_cache() -> None:
    policy = Policy.load(TINY)
    output = policy.causal_lm(input_ids=torch.ones(1, 7, dtype=torch.long), use_cache=True)
    kept = sum(
        t.numel() * t.element_size() for layer in output.past_key_values.layers for t in (layer.keys, layer.values)
    )
    assert cache_bytes(TINY, 7) == kept


@pytest.mark.parametrize(
    "words",
    [recipe("sft", *FEW, "model.init_args.ema_decay=0.9"), recipe("prm", *FEW, "model.init_args.policy.lora={r: 4}")],
    ids=["full", "lora"],
)
def test_what_is_held_is_what_a_run_holds(words: list[str], tmp_path: Path) -> None:
    held = lower_bound(*check_fit(words)).held
    assert main(["fit", *words, "--trainer.max_steps", "1", "--out", str(tmp_path / "run")]) == 0
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)

    def bytes_of(tensors: Any) -> int:
        return sum(each.numel() * each.element_size() for each in tensors if each.numel() > 1)

    (states,) = [each["state"] for each in checkpoint["optimizer_states"]]
    assert held["optimiser (AdamW)"] == bytes_of(value for state in states.values() for value in state.values())
    assert held["gradients"] == bytes_of(checkpoint["state_dict"].values())
    assert held["weights"] == bytes_of(load_trained(tmp_path / "run").model.parameters())
    if "ema" in checkpoint["stepkd"]:
        assert held["running average"] == bytes_of(checkpoint["stepkd"]["ema"].values())


def test_a_chunk_of_logits_and_the_cache_come_on_top() -> None:
    words = recipe("kdrl", *FEW, "model.init_args.chunk_size=8")
    module, data = check_fit(words)
    bound = lower_bound(module, data)
    vocabulary = int(skeleton(TINY).get_output_embeddings().weight.shape[0])
    assert bound.phases["training"] == {"chunk of logits": 8 * vocabulary * 4}
    rows = min(module.engine.max_rows, data.global_batch_size * module.rollout_spec.sampling.n)
    assert bound.phases["sampling"]["key-value cache"] == rows * cache_bytes(TINY, module.rollout_spec.sampling.longest)
    sums = [sum(phase.values()) for phase in bound.phases.values()]
    assert bound.at_least == sum(bound.held.values()) + max(sums)
    assert not lower_bound(*check_fit(recipe("prm", *FEW))).phases, "a step head makes no logits of the vocabulary"


def test_copies_of_the_policy_are_held_too() -> None:
    """The frozen reference of preference training, unless adapters or a cache stand in for it; a self-teacher."""
    lora, cache = "model.init_args.policy.lora={r: 4}", "model.init_args.reference={cache: true}"
    for settings, copies in ((), True), ((lora,), False), ((cache,), False):
        nowhere = ("data.init_args.train.path=/no/such/file.jsonl", "model.init_args.policy.path=tiny-0.1m")
        held = lower_bound(*check_fit(recipe("dpo", *nowhere, *settings))).held
        assert held.get("reference") == (held["weights"] if copies else None)
    for form, copies in (("SelfSnapshot", 1), ("SelfAverage", 2), ("SelfBase", 1)):
        held = lower_bound(*check_fit(recipe("self_distill", *FEW, f"model.teacher={form}"))).held
        assert held["self-teacher"] == copies * held["weights"]


def test_a_teacher_that_is_a_run(tmp_path: Path) -> None:
    """Its adapters count, its base in the dtype that it was trained in."""
    adapted = ("model.init_args.policy.lora={r: 4}", "model.init_args.policy.dtype=bfloat16")
    fit = ["fit", *recipe("sft", *FEW, *adapted), "--trainer.max_steps", "1", "--out", str(tmp_path / "run")]
    assert main(fit) == 0
    found = lower_bound(*check_fit(recipe("kdrl", *FEW, f"model.teacher.path={tmp_path / 'run'}")))
    policy = load_trained(tmp_path / "run")
    assert found.held["teacher"] == sum(p.numel() * p.element_size() for p in policy.parameters())
    (tmp_path / "run" / "checkpoints" / "last.ckpt").write_bytes(b"torn")
    found = lower_bound(*check_fit(recipe("kdrl", *FEW, f"model.teacher.path={tmp_path / 'run'}")))
    assert "teacher" not in found.held
    assert "not counted, its settings cannot be read" in found.facts["teacher"]


def test_a_sharded_model() -> None:
    """A quarter of what is held each; everything to sample and to validate."""
    words = recipe(
        "kdrl",
        "model.init_args.policy.path=tiny-0.5m",
        "model.teacher.path=tiny-0.1m",
        "model.teacher.sharded=true",
    )
    whole, cut = (lower_bound(*check_fit(words), shards=shards) for shards in (1, 4))
    for name in ("weights", "gradients", "optimiser (AdamW)", "teacher"):
        assert cut.held[name] == pytest.approx(whole.held[name] / 4, abs=1)
    weights, teacher = whole.held["weights"], whole.held["teacher"]
    gathered = {"gathered weights": weights, "gathered teacher": teacher}
    assert cut.phases["sampling"].items() >= gathered.items()
    assert cut.phases["before a step"] == gathered
    mixed = lower_bound(*check_fit(words), precision="bf16-mixed", shards=4).phases
    assert mixed["sampling"]["gathered weights"] == weights // 2
    assert mixed["sampling"]["gathered teacher"] == teacher, "in its own dtype"
    bfloat16 = [*words, "--model.init_args.policy.dtype", "bfloat16"]
    half = lower_bound(*check_fit(bfloat16), precision="bf16-mixed", shards=4).phases
    assert half["sampling"]["gathered weights"] == weights // 2


@pytest.mark.parametrize("validates", [False, True])
def test_a_validation_gathers_the_model_too(validates: bool) -> None:
    """Without sampling anything."""
    words = recipe("sft", "model.init_args.validation=null")
    if validates:
        words += ["--data.init_args.validation", "{source: task, split: validation, options: {n: 4}}"]
    cut = lower_bound(*check_fit(words), shards=2)
    assert "before a step" not in cut.phases
    assert ("validation" in cut.phases) == validates
    if validates:
        assert cut.phases["validation"]["gathered weights"] == lower_bound(*check_fit(words)).held["weights"]


def test_the_largest_batch_is_measured_over_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    words = recipe("sft", "data.init_args.train.options.n=200", "data.init_args.global_batch_size=8", *FEW[1:])
    batches = []
    step = StepModule.training_step

    def seen(self: Any, batch: Any, batch_idx: int) -> None:
        batches.append(batch)
        step(self, batch, batch_idx)

    monkeypatch.setattr(StepModule, "training_step", seen)
    before = memory_peak()
    peak = two_steps(words, "cpu")
    assert before is not None
    assert peak >= before
    first, second = ([example.id for example in batch.examples] for batch in batches)
    assert sorted(first) == sorted(second)
    module, data = check_fit(words)
    data.trainer = SimpleNamespace(lightning_module=module, global_rank=0, world_size=1, limit_train_batches=1.0)
    data.setup("fit")
    sums = [sum(data.examples["train"][i].size for i in batch) for batch in data.train_dataloader().plan.batches(0)]
    assert sum(example.size for example in batches[0].examples) == max(sums)


def test_a_step_that_runs_out_of_memory_says_what_to_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr(StepModule, "_micro_loss", full)
    with pytest.raises(MachineError, match=r"out of memory in the phase 'micro-batch'.*micro_batch_tokens \(now \d+"):
        two_steps(recipe("sft", *FEW), "cpu")


def test_a_killed_process_is_a_lack_of_memory() -> None:
    with pytest.raises(MachineError, match=r"the process was killed.*micro_batch_tokens"):
        in_own_process(os._exit, 137)


def test_the_command_measures_where_the_device_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "get_context", lambda _: forked.SERVER)  # tests/cli/test_cli.py starts the real one
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ["doctor", "--out", str(tmp_path), "--recipe", recipe("sft")[1], "--set", "data.init_args.validation=null"]
    words += [word for setting in FEW for word in ("--set", setting)]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["memory"]
    assert found["measured_bytes"] > found["at_least_bytes"] > 0
    assert main(["doctor", "--recipe", str(tmp_path / "none.yaml")]) == 2


@pytest.mark.parametrize(
    ("outcome", "code", "shown"),
    [
        (3 * 2**20, 0, "3 MiB of 50 MiB free, measured over two optimiser steps ok"),
        (49 * 2**20, 0, "49 MiB of 50 MiB free, measured over two optimiser steps note"),
        (MachineError("lower it"), 1, "at least 2 MiB of 50 MiB free bad two optimiser steps do not fit: lower it"),
        (DataError("no file"), 1, "at least 2 MiB of 50 MiB free bad a run would stop: no file"),
        (ConfigError("too long"), 1, "at least 2 MiB of 50 MiB free bad a run would stop: too long"),
    ],
)
def test_what_a_measurement_says(
    outcome: Any, code: int, shown: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    def measured(words: list[str], device: str) -> int:
        assert device == "cpu"
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(memory, "measured_peak", measured)
    monkeypatch.setattr("stepkd.models.machine.memory_free", lambda *_: 50 * 2**20)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("COLUMNS", "200")
    words = ["doctor", "--out", str(tmp_path), "--recipe", recipe("sft")[1], "--set", FEW[1]]
    assert main(words) == code
    assert shown in " ".join(capsys.readouterr().out.split())


def test_the_command_measures_nothing_that_cannot_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "measured_peak", None)
    monkeypatch.setattr("stepkd.models.machine.memory_free", lambda *_: 2**20)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("COLUMNS", "200")
    words = ["doctor", "--out", str(tmp_path), "--recipe", recipe("sft")[1], "--set", FEW[1]]
    assert main(words) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "of 1 MiB free" in shown
    assert "micro_batch_tokens" in shown
    assert "at least: the first, and the largest phase" in shown
    assert main([*words, "--set", "trainer.accelerator=gpu"]) == 0, "its device is not here"
    assert "not measured: there is no free cuda memory here" in " ".join(capsys.readouterr().out.split())


def test_the_command_knows_sharded_recipes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "measured_peak", lambda words, device: 1)
    words = ["doctor", "--json", "--recipe", recipe("sft")[1]]
    sharded = [*words, str(ROOT / "recipes" / "strategy" / "fsdp2.yaml")]
    held = []
    for line in ([*words, str(ROOT / "recipes" / "strategy" / "single.yaml")], sharded, [*sharded, "--ranks", "8"]):
        main(line)
        held.append(json.loads(capsys.readouterr().out)["memory"]["held"]["weights"])
    assert held[0] == held[1] == pytest.approx(8 * held[2], abs=8)
    assert main([*sharded, "--ranks", "0"]) == 2


def test_the_largest_phase_counts() -> None:
    bound = Bound(held={"weights": 5}, phases={"training": {"a": 1, "b": 2}, "sampling": {"c": 2}})
    assert bound.at_least == 8
