"""The memory that the doctor foretells is what training takes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stepkd.cli import main
from stepkd.doctor.footprint import Batch, activations, cache_bytes, footprint, skeleton, weight_bytes
from stepkd.doctor.live import LiveBytes, peak_of
from stepkd.models import LoraSpec, Policy, PolicySpec, build_tiny
from stepkd.models.checkpoint import load_trained
from stepkd.modules.base import StepModule
from stepkd.training import fit

ROOT = Path(__file__).resolve().parents[2]
TINY = PolicySpec(path="tiny-0.1m")


def check_fit(words: list[str]) -> tuple[Any, Any]:
    """Module and data of a recipe."""
    return fit.check_fit(words=words)[:2]


def recipe(name: str, *settings: str) -> list[str]:
    words = ["--config", str(ROOT / "recipes" / "tiny" / f"{name}.yaml"), "--data.init_args.validation", "null"]
    return words + [word for setting in settings for word in (f"--{setting}".split("=", 1))]


def test_live_bytes_are_counted_from_birth_to_death() -> None:
    def work() -> None:
        a = torch.zeros(1000, dtype=torch.float64)
        b = a + 1
        del a
        c = b.view(10, 100)  # no storage of its own
        b = c * 2
        del c

    before = torch.zeros(10**6)
    assert peak_of(work).peak == 2 * 8000
    assert sorted(peak_of(work).sizes) == [8000, 8000]
    with LiveBytes() as live:
        before.add_(1)
        kept = before[:10]
    assert (live.now, live.peak) == (0, 0), "what was there before does not count"
    assert len(kept) == 10


@pytest.mark.parametrize(
    "spec",
    [
        TINY,
        replace(TINY, dtype="bfloat16"),
        replace(TINY, lora=LoraSpec(r=3)),
        replace(TINY, dtype="bfloat16", lora=LoraSpec(r=3, modules_to_save=["lm_head"])),
    ],
    ids=str,
)
def test_a_skeleton_has_the_weights_of_the_policy(spec: PolicySpec) -> None:
    real, bones = Policy.load(spec).model, skeleton(spec)
    assert all(p.is_meta for p in bones.parameters())
    for trained in (False, True):
        counted = [
            sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad or not trained)
            for model in (real, bones)
        ]
        assert counted[0] == counted[1]
    assert weight_bytes(bones, spec) == sum(p.numel() * p.element_size() for p in real.parameters())
    packed = weight_bytes(bones, replace(spec, quantization="nf4", lora=LoraSpec()))
    assert packed < weight_bytes(bones, spec)


def test_auto_counts_a_bfloat16_checkpoint_as_it_is_trained(tmp_path: Path) -> None:
    for part in build_tiny("tiny-0.1m", seed=0, dtype="bfloat16"):
        part.save_pretrained(tmp_path)
    path, words = f"model.init_args.policy.path={tmp_path}", ("data.init_args.train.options.n=16",)
    auto, full = (
        footprint(*check_fit(recipe("sft", path, f"model.init_args.policy.dtype={dtype}", *words)))
        for dtype in ("auto", "float32")
    )
    assert (auto.held, auto.peak) == (full.held, full.peak)


def test_an_adapter_folder_is_trained_alone(tmp_path: Path) -> None:
    lora = Policy.load(replace(TINY, lora=LoraSpec(r=3)))
    lora.model.save_pretrained(tmp_path)
    lora.tokenizer.save_pretrained(tmp_path)
    spec = PolicySpec(path=str(tmp_path))
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


@pytest.mark.parametrize("spec", [TINY, replace(TINY, lora=LoraSpec(r=4))], ids=["full", "lora"])
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_activations_of_all_layers_follow_from_a_few(spec: PolicySpec, share: float) -> None:
    """Shallow copies of a few tokens against the whole model on more of them."""
    policy = Policy.load(spec)
    policy.train()
    mask = torch.ones(40, 50, dtype=torch.long)
    mask[::2, int(50 * (1 - 2 * share)) :] = 0
    ids = torch.ones_like(mask)
    real = peak_of(lambda: policy.hidden(ids, mask).sum().backward()).peak
    real -= sum(p.grad.numel() * p.grad.element_size() for p in policy.parameters() if p.grad is not None)
    tokens = int(mask.sum())
    assert activations(spec, Batch(tokens, share, tokens, 10, True), "32-true").peak == pytest.approx(real, rel=0.1)


def test_an_allocator_on_a_gpu_has_its_share_of_everything() -> None:
    found = footprint(*check_fit(recipe("sft", "data.init_args.train.options.n=16")), device="cuda")
    phase = found.phases["training"]
    held = sum(size for name, size in found.held.items() if name != "around")
    tensors = held + sum(size for name, size in phase.items() if name != "allocator")
    assert phase["allocator"] == pytest.approx(0.1 * tensors, abs=1)


def test_large_tensors_have_pages_of_their_own() -> None:
    few, many = (activations(TINY, Batch(n, 0.0, n, 10, True), "32-true").small for n in (1000, 10**6))
    assert few == 1
    assert many < 0.2


def test_checkpointed_layers_keep_less() -> None:
    batch = Batch(4000, 0.0, 4000, 10, True)
    plain, saved = (
        activations(replace(TINY, gradient_checkpointing=on), batch, "32-true").peak for on in (False, True)
    )
    assert saved < 0.6 * plain


@pytest.mark.parametrize(
    "words",
    [
        recipe("sft", "data.init_args.train.options.n=200"),
        recipe("prm", "data.init_args.train.options.n=200"),
        recipe("sft", "data.init_args.train.options.n=200", "model.init_args.policy.lora={r: 4}"),
        recipe(
            "kdrl",
            "data.init_args.train.options.n=64",
            "model.init_args.policy.path=tiny-0.5m",
            "model.init_args.teacher.path=tiny-0.1m",
            "model.init_args.rewards=[{name: length, options: {limit: 9}}]",
        ),
    ],
    ids=["sft", "prm", "lora", "kdrl"],
)
def test_a_step_takes_what_was_foretold(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors alive at the peak of real optimiser steps; allocator and libraries, which differ by machine, apart."""
    module, data = check_fit(words)
    found = footprint(module, data)
    parts = {name: size for name, size in found.phases["training"].items() if name != "allocator"}
    foretold = found.held["gradients"] + sum(parts.values())
    peaks = []
    step = StepModule.training_step

    def counted(self: Any, batch: Any, batch_idx: int) -> None:
        with LiveBytes() as live:
            step(self, batch, batch_idx)
        peaks.append(live.peak)

    monkeypatch.setattr(StepModule, "training_step", counted)
    done = main(["fit", *words, "--trainer.max_steps", "3", "--out", str(tmp_path / "run")])
    assert done == 0
    # Optimiser states are born in the first step and stay; from then on only the rest is new.
    assert max(peaks[1:]) == pytest.approx(foretold, rel=0.15)


def test_what_is_held_beside_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    words = recipe("sft", "data.init_args.train.options.n=100", "model.init_args.ema_decay=0.9")
    found = footprint(*check_fit(words))
    weights = found.held["weights"]
    assert found.held["gradients"] == found.held["running average"] == weights
    assert found.held["optimiser (AdamW)"] == 2 * weights
    assert "sampling" in found.phases
    parts = [sum(phase.values()) for phase in found.phases.values()]
    assert found.peak == sum(found.held.values()) + max(parts)
    module, data = check_fit(
        recipe("sft", "data.init_args.train={source: rows, path: /no/such/file.jsonl, options: {}}")
    )
    assert "the recipe's limit" in footprint(module, data).facts["largest micro-batch"]


def test_copies_of_the_policy_are_held_too() -> None:
    """The frozen reference of preference training, unless adapters or a cache stand in for it; a self-teacher."""
    lora, cache = "model.init_args.policy.lora={r: 4}", "model.init_args.reference={cache: true}"
    for settings, copies in ((), True), ((lora,), False), ((cache,), False):
        nowhere = ("data.init_args.train.path=/no/such/file.jsonl", "model.init_args.policy.path=tiny-0.1m")
        held = footprint(*check_fit(recipe("dpo", *nowhere, *settings))).held
        assert held.get("reference") == (held["weights"] if copies else None)
    few = ("data.init_args.train.options.n=64", "model.init_args.policy.path=tiny-0.1m")
    for form, copies in (("epoch", 1), ("ema", 2)):
        held = footprint(*check_fit(recipe("self_distill", *few, f"model.init_args.teacher.itself={form}"))).held
        assert held["self-teacher"] == copies * held["weights"]


def test_a_teacher_that_is_a_run(tmp_path: Path) -> None:
    """Its adapters count, its base in the dtype that it was trained in."""
    few = ("data.init_args.train.options.n=16", "model.init_args.policy.path=tiny-0.1m")
    adapted = ("model.init_args.policy.lora={r: 4}", "model.init_args.policy.dtype=bfloat16")
    fit = ["fit", *recipe("sft", *few, *adapted), "--trainer.max_steps", "1", "--out", str(tmp_path / "run")]
    assert main(fit) == 0
    found = footprint(*check_fit(recipe("kdrl", *few, f"model.init_args.teacher.path={tmp_path / 'run'}")))
    policy = load_trained(tmp_path / "run")
    assert found.held["teacher"] == sum(p.numel() * p.element_size() for p in policy.parameters())


def test_a_recipe_that_does_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["doctor", "--out", str(tmp_path), "--config", str(ROOT / "recipes/tiny/sft.yaml")]
    words += ["--set", "data.init_args.validation=null", "--set", "data.init_args.train.options.n=100"]
    assert main([*words, "--json"]) == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    assert memory["peak_bytes"] > 100 * 2**20
    monkeypatch.setattr("stepkd.models.limits.memory_free", lambda *_: 50 * 2**20)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(words) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "of 50 MiB free" in shown
    assert "micro_batch_tokens" in shown
    assert main(["doctor", "--config", str(tmp_path / "none.yaml")]) == 2


def test_a_model_that_is_cut_up() -> None:
    """A quarter of what is held each; two blocks and the rest for a pass, everything to sample and to validate."""
    words = recipe(
        "kdrl",
        "data.init_args.train.options.n=16",
        "model.init_args.policy.path=tiny-0.5m",
        "model.init_args.teacher.path=tiny-0.1m",
        "model.init_args.teacher.sharded=true",
    )
    whole, cut = (footprint(*check_fit(words), shards=shards) for shards in (1, 4))
    for name in ("weights", "gradients", "optimiser (AdamW)", "teacher"):
        assert cut.held[name] == pytest.approx(whole.held[name] / 4, abs=1)
    weights, teacher = whole.held["weights"], whole.held["teacher"]
    training, sampling = cut.phases["training"], cut.phases["sampling"]
    assert 0.2 * weights < training["gathered blocks"] < weights
    assert 0.1 * weights < training["their gradients"] < training["gathered blocks"]
    assert 0.2 * teacher < training["gathered teacher"] <= teacher
    assert (sampling["gathered weights"], sampling["gathered teacher"]) == (weights, teacher)
    assert cut.phases["before a step"].items() >= {"gathered weights": weights, "gathered teacher": teacher}.items()
    mixed = footprint(*check_fit(words), precision="bf16-mixed", shards=4).phases
    assert mixed["training"]["gathered blocks"] == training["gathered blocks"] // 2
    assert mixed["training"]["gathered teacher"] == training["gathered teacher"], "in its own dtype"
    assert mixed["sampling"]["gathered weights"] == weights // 2
    half = footprint(
        *check_fit([*words, "--model.init_args.policy.dtype", "bfloat16"]), precision="bf16-mixed", shards=4
    ).phases
    assert half["sampling"]["gathered weights"] == weights // 2


@pytest.mark.parametrize("validates", [False, True])
def test_a_validation_gathers_the_model_too(validates: bool) -> None:
    """Without sampling anything."""
    words = recipe("sft", "data.init_args.train.options.n=16", "model.init_args.validation.samples=0")
    if validates:
        words += [
            "--data.init_args.validation",
            "{source: task, split: validation, options: {task: 'modular:terms=4', n: 4}}",
        ]
    cut = footprint(*check_fit(words), shards=2)
    assert "before a step" not in cut.phases
    assert ("validation" in cut.phases) == validates
    if validates:
        whole = footprint(*check_fit(words)).held["weights"]
        assert cut.phases["validation"]["gathered weights"] == whole


@pytest.mark.slow
def test_the_command_knows_sharded_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    from stepkd.cli import main

    root = Path(__file__).resolve().parents[2] / "recipes"
    words = ["doctor", "--json", "--config", str(root / "tiny" / "sft.yaml"), "--config"]
    sharded = [*words, str(root / "strategy" / "fsdp2.yaml")]
    held = []
    for line in ([*words, str(root / "strategy" / "single.yaml")], sharded, [*sharded, "--ranks", "8"]):
        main(line)
        held.append(json.loads(capsys.readouterr().out)["memory"]["held"]["weights"])
    assert held[0] == held[1] == pytest.approx(8 * held[2], abs=8)
    assert main([*sharded, "--ranks", "0"]) == 2
