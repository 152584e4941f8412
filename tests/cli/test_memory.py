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
from stepkd.cli.memory import in_own_process, lower_bound, skeleton, two_steps, weight_bytes
from stepkd.errors import ConfigError, DataError, MachineError, ModelError
from stepkd.models.checkpoint import load_trained
from stepkd.models.machine import memory_peak
from stepkd.models.policy import Policy
from stepkd.models.spec import LoRAConfig, PolicyConfig, build_tiny
from stepkd.modules.base import StepModule
from stepkd.training import fit

ROOT = Path(__file__).resolve().parents[2]
TINY = PolicyConfig(path="tiny-0.1m")
FEW = ("data.init_args.train.options.n=16", "model.init_args.policy.path=tiny-0.1m")


def module_of(words: list[str]) -> Any:
    """The module of a recipe."""
    return fit.check_fit(words=words).module


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


def test_null_counts_a_bfloat16_checkpoint_as_it_is_trained(tmp_path: Path) -> None:
    for part in build_tiny("tiny-0.1m", seed=0, dtype="bfloat16"):
        part.save_pretrained(tmp_path)
    path = f"model.init_args.policy.path={tmp_path}"
    stored, full = (
        lower_bound(module_of(recipe("sft", path, f"model.init_args.policy.dtype={dtype}")))
        for dtype in ("null", "float32")
    )
    assert stored == full


def test_an_adapter_folder_is_trained_alone(tmp_path: Path) -> None:
    lora = Policy.load(replace(TINY, lora=LoRAConfig(r=3)))
    lora.model.save_pretrained(tmp_path)
    lora.tokenizer.save_pretrained(tmp_path)
    spec = PolicyConfig(path=str(tmp_path))
    real, bones = Policy.load(spec).model, skeleton(spec)
    for model in (real, bones):
        assert 0 < sum(p.numel() for p in model.parameters() if p.requires_grad) < 20_000
    assert weight_bytes(bones, spec) == weight_bytes(real, spec)


@pytest.mark.parametrize(
    "words",
    [recipe("sft", *FEW), recipe("prm", *FEW, "model.init_args.policy.lora={r: 4}")],
    ids=["full", "lora"],
)
def test_what_is_held_is_what_a_run_holds(words: list[str], tmp_path: Path) -> None:
    held = lower_bound(module_of(words))
    assert main(["fit", *words, "--trainer.max_steps", "1", "--out", str(tmp_path / "run")]) == 0
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)

    def bytes_of(tensors: Any) -> int:
        return sum(each.numel() * each.element_size() for each in tensors if each.numel() > 1)

    (states,) = [each["state"] for each in checkpoint["optimizer_states"]]
    assert held["optimiser (AdamW)"] == bytes_of(value for state in states.values() for value in state.values())
    assert held["gradients"] == bytes_of(checkpoint["state_dict"].values())
    assert held["weights"] == bytes_of(load_trained(tmp_path / "run").model.parameters())


def test_copies_of_the_policy_are_held_too() -> None:
    """The frozen reference of preference training, unless adapters or a cache stand in for it; a self-teacher."""
    lora, cache = "model.init_args.policy.lora={r: 4}", "model.init_args.reference={cache: true}"
    for settings, copies in ((), True), ((lora,), False), ((cache,), False):
        nowhere = ("data.init_args.train.path=/no/such/file.jsonl", "model.init_args.policy.path=tiny-0.1m")
        held = lower_bound(module_of(recipe("dpo", *nowhere, *settings)))
        assert held.get("reference") == (held["weights"] if copies else None)
    for form, copies in (("SelfSnapshot", 1), ("SelfAverage", 2), ("SelfBase", 1)):
        held = lower_bound(module_of(recipe("self_distill", *FEW, f"model.teacher={form}")))
        assert held["self-teacher"] == copies * held["weights"]


def test_a_teacher_that_is_a_run(tmp_path: Path) -> None:
    """Its adapters count, its base in the dtype that it was trained in."""
    adapted = ("model.init_args.policy.lora={r: 4}", "model.init_args.policy.dtype=bfloat16")
    fit = ["fit", *recipe("sft", *FEW, *adapted), "--trainer.max_steps", "1", "--out", str(tmp_path / "run")]
    assert main(fit) == 0
    found = lower_bound(module_of(recipe("kdrl", *FEW, f"model.teacher.path={tmp_path / 'run'}")))
    policy = load_trained(tmp_path / "run")
    assert found["teacher"] == sum(p.numel() * p.element_size() for p in policy.parameters())
    (tmp_path / "run" / "checkpoints" / "last.ckpt").write_bytes(b"torn")
    with pytest.raises(ModelError, match="not a whole checkpoint"):
        lower_bound(module_of(recipe("kdrl", *FEW, f"model.teacher.path={tmp_path / 'run'}")))


def test_a_sharded_model() -> None:
    """A quarter of what is held each."""
    words = recipe(
        "kdrl",
        "model.init_args.policy.path=tiny-0.5m",
        "model.teacher.path=tiny-0.1m",
        "model.teacher.sharded=true",
    )
    whole, cut = (lower_bound(module_of(words), shards=shards) for shards in (1, 4))
    for name in ("weights", "gradients", "optimiser (AdamW)", "teacher"):
        assert cut[name] == pytest.approx(whole[name] / 4, abs=1)


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
    module, data, _ = fit.check_fit(words=words)
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
    assert found.pop("measured") > sum(found.values()) > 0
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
    def measured(work: Any, words: list[str], device: str) -> int:
        assert (work, device) == (two_steps, "cpu")
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(memory, "in_own_process", measured)
    monkeypatch.setattr("stepkd.models.machine.memory_free", lambda *_: 50 * 2**20)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("COLUMNS", "200")
    words = ["doctor", "--out", str(tmp_path), "--recipe", recipe("sft")[1], "--set", FEW[1]]
    assert main(words) == code
    assert shown in " ".join(capsys.readouterr().out.split())


def test_a_model_that_is_not_here_leaves_the_rest_of_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    teacher = ["--set", "model.init_args.teacher={class_path: Local, init_args: {path: /nope/teacher}}"]
    words = ["doctor", "--out", str(tmp_path), "--recipe", recipe("gkd")[1], *teacher]
    words += ["--set", "model.init_args.policy.path=tiny-0.1m"]
    assert main(words) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "recipe memory not known bad" in shown
    assert "/nope/teacher" in shown
    for part in ("python", "threads", "launcher", "free"):
        assert part in shown


def test_the_command_measures_nothing_that_cannot_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "in_own_process", None)
    monkeypatch.setattr("stepkd.models.machine.memory_free", lambda *_: 2**20)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("COLUMNS", "200")
    words = ["doctor", "--out", str(tmp_path), "--recipe", recipe("sft")[1], "--set", FEW[1]]
    assert main(words) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "of 1 MiB free" in shown
    assert "micro_batch_tokens" in shown
    assert "memory, at least weights" in shown
    assert main([*words, "--set", "trainer.accelerator=gpu"]) == 0, "its device is not here"
    assert "not measured: there is no free cuda memory here" in " ".join(capsys.readouterr().out.split())


def test_the_command_knows_sharded_recipes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "in_own_process", lambda *_: 1)
    words = ["doctor", "--json", "--recipe", recipe("sft")[1]]
    sharded = [*words, str(ROOT / "recipes" / "strategy" / "fsdp2.yaml")]
    held = []
    for line in ([*words, str(ROOT / "recipes" / "strategy" / "single.yaml")], sharded, [*sharded, "--ranks", "8"]):
        main(line)
        held.append(json.loads(capsys.readouterr().out)["memory"]["weights"])
    assert held[0] == held[1] == pytest.approx(8 * held[2], abs=8)
    assert main([*sharded, "--ranks", "0"]) == 2
