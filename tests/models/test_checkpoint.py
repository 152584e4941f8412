"""From a checkpoint back to a model, and what is not taken for a checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stepkd.errors import ConfigError, ModelError
from stepkd.models import checkpoint as checkpoints
from stepkd.models.checkpoint import (
    find_checkpoint,
    load_policy,
    load_trained,
    read_checkpoint,
    save_policy,
    tokenizer_fingerprint,
    weights_fingerprint,
)
from stepkd.models.load import load_tokenizer, model_config
from stepkd.models.policy import Policy
from stepkd.models.spec import LoRAConfig, PolicyConfig, build_tiny

IDS = torch.tensor([[5, 17, 33, 8, 60, 4]])
FULL = PolicyConfig(path="tiny-0.1m")
LORA = PolicyConfig(path="tiny-0.1m", lora=LoRAConfig(r=4))


class Payload:
    """Pickles to a call that leaves a file behind."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def logits(policy: Policy) -> torch.Tensor:
    with torch.no_grad():
        return policy.model(input_ids=IDS, use_cache=False).logits


def trained(spec: PolicyConfig, seed: int = 0) -> Policy:
    """A policy whose trainable weights are not those it started from."""
    policy, generator = Policy.load(spec), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in policy.trainable_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return policy


def save(policy: Policy, file: Path, *, spec: PolicyConfig | None = None) -> Path:
    """Write what ``StepModule.on_save_checkpoint`` leaves in a checkpoint."""
    extra: dict[str, Any] = {
        "format": 2,
        "module": "stepkd.modules.sft.SFTModule",
        "policy": asdict(spec or policy.spec or FULL),
        "position": {},
        "seed": 0,
    }
    weights = {f"policy.{name}": p.detach() for name, p in policy.trainable_parameters()}
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": weights, "stepkd": extra, "epoch": 0, "global_step": 3}, file)
    return file


@pytest.mark.parametrize("spec", [FULL, LORA, PolicyConfig(path="tiny-0.1m", dtype="bfloat16", lora=LoRAConfig(r=4))])
def test_checkpoint_brings_the_trained_model_back(spec: PolicyConfig, tmp_path: Path) -> None:
    policy = trained(spec)
    again = load_trained(save(policy, tmp_path / "x.ckpt"))
    assert again.spec == spec
    assert not again.training
    assert torch.equal(logits(again), logits(policy))
    assert not torch.equal(logits(again), logits(Policy.load(spec)))


@pytest.mark.parametrize("first", [FULL, LORA])
@pytest.mark.parametrize("kind", ["run", "checkpoint"])
def test_a_run_is_a_policy_to_start_from(first: PolicyConfig, kind: str, tmp_path: Path) -> None:
    begun = trained(first)
    file = save(begun, tmp_path / "run" / "checkpoints" / "best.ckpt")
    spec = PolicyConfig(path=str(tmp_path / "run") if kind == "run" else str(file))
    policy = load_policy(spec)
    assert policy.spec == spec
    assert torch.equal(logits(policy), logits(begun))
    names = [name for name, _ in policy.trainable_parameters()]
    assert names == [name for name, _ in begun.trainable_parameters()], "an adapter is trained further"
    with torch.no_grad():
        for _, parameter in policy.trainable_parameters():
            parameter.mul_(1.1)
    again = load_trained(save(policy, tmp_path / "second" / "last.ckpt"))
    assert torch.equal(logits(again), logits(policy)), "a run that started from a run"


def test_fresh_adapters_stand_on_the_weights_of_a_run(tmp_path: Path) -> None:
    begun = trained(FULL)
    save(begun, tmp_path / "run" / "last.ckpt")
    policy = load_policy(PolicyConfig(path=str(tmp_path / "run"), lora=LoRAConfig(r=4), gradient_checkpointing=True))
    assert all("lora_" in name for name, _ in policy.trainable_parameters())
    with policy.reference() as reference:
        assert torch.equal(logits(reference), logits(begun))
    with pytest.raises(ConfigError, match="cannot name its base model: use mode merged"):
        save_policy(policy, tmp_path / "export", mode="adapter")


def test_fresh_adapters_on_those_of_a_run_are_refused(tmp_path: Path) -> None:
    save(trained(LORA), tmp_path / "run" / "last.ckpt")
    with pytest.raises(ConfigError, match="merge it first"):
        load_policy(PolicyConfig(path=str(tmp_path / "run"), lora=LoRAConfig(r=4)))


def test_a_run_has_a_tokenizer_and_a_configuration(tmp_path: Path) -> None:
    save(trained(LORA), tmp_path / "run" / "last.ckpt")
    spec = PolicyConfig(path=str(tmp_path / "run"))
    assert load_tokenizer(spec).eos_token == "<eos>"
    assert load_tokenizer(PolicyConfig(path="tiny-2m", tokenizer=spec.path)).eos_token == "<eos>"
    assert model_config(spec).hidden_size == 64


def test_on_a_folder_of_real_weights(folder: Path, tmp_path: Path) -> None:
    spec = PolicyConfig(
        path=str(folder), gradient_checkpointing=True, lora=LoRAConfig(r=4, modules_to_save=["lm_head"])
    )
    policy = trained(spec)
    again = load_trained(save(policy, tmp_path / "x.ckpt"), attention="eager")
    assert again.spec is not None
    assert (again.spec.gradient_checkpointing, again.spec.attention) == (False, "eager")
    assert torch.allclose(logits(again), logits(policy), atol=1e-5)


def test_best_is_preferred_to_last_in_a_run_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    last, best = trained(FULL, 1), trained(FULL, 2)
    save(last, run / "checkpoints" / "last.ckpt")
    assert torch.equal(logits(load_trained(run)), logits(last))
    save(best, run / "checkpoints" / "best.ckpt")
    assert torch.equal(logits(load_trained(run)), logits(best))
    assert torch.equal(logits(load_trained(run / "checkpoints")), logits(best))
    assert torch.equal(logits(load_trained(str(run / "checkpoints" / "last.ckpt"))), logits(last))
    assert find_checkpoint(tmp_path) is None


def test_dtype_can_be_changed(folder: Path, tmp_path: Path) -> None:
    assert load_trained(save(trained(FULL), tmp_path / "x.ckpt"), dtype="float64").model.dtype == torch.float64
    assert load_trained(folder).model.dtype == torch.float32  # the folder's own
    assert load_trained(folder, dtype="bfloat16").model.dtype == torch.bfloat16
    with pytest.raises(ConfigError, match=r"unknown policy\.dtype 'int4': choose from float32"):
        load_trained(folder, dtype="int4")


def test_quantised_training_loads_on_the_plain_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepkd.models.load.find_spec", lambda name: None)
    policy = trained(LORA)
    quantised = PolicyConfig(path="tiny-0.1m", lora=LoRAConfig(r=4), quantization="nf4")
    file = save(policy, tmp_path / "x.ckpt", spec=quantised)
    with pytest.raises(ConfigError, match="needs bitsandbytes"):
        load_trained(file)
    assert torch.equal(logits(load_trained(file, dequantise=True)), logits(policy))


def test_presets_and_models_are_taken_too(folder: Path) -> None:
    assert torch.equal(logits(load_trained("tiny-0.1m")), logits(Policy.load(FULL)))
    assert torch.equal(logits(load_trained(folder)), logits(Policy.load(PolicyConfig(path=str(folder)))))


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"no checkpoint at {tmp_path}/absent\.ckpt"):
        load_trained(tmp_path / "absent.ckpt")
    with pytest.raises(ModelError, match=f"no checkpoint at {tmp_path}"):
        read_checkpoint(tmp_path)
    with pytest.raises(ModelError, match=rf"{tmp_path}.*config\.json"):  # a run that was stopped before its first one
        load_trained(tmp_path)


def test_torn_checkpoints(tmp_path: Path) -> None:
    file = save(trained(FULL), tmp_path / "x.ckpt")
    whole = file.read_bytes()
    for torn in (b"", b"x", bytes(5000), whole[:100], whole[: len(whole) // 2], whole[:-30]):
        file.write_bytes(torn)
        with pytest.raises(ModelError, match=r"x\.ckpt is not a whole checkpoint \(\w+\): use an earlier one"):
            read_checkpoint(file)


@pytest.mark.parametrize("content", [{}, [1], {"stepkd": 1}, {"stepkd": "policy"}, {"stepkd": {"policy": {}}}, 3])
def test_foreign_checkpoints(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(ModelError, match="is not a stepkd checkpoint: it has no 'stepkd' section"):
        read_checkpoint(tmp_path / "x.ckpt")


def test_hostile_checkpoints_execute_nothing(tmp_path: Path) -> None:
    mark, file = tmp_path / "ran", tmp_path / "x.ckpt"
    content = {"state_dict": {}, "stepkd": {"policy": {}, "extra": Payload(mark)}}
    torch.save(content, file)
    with pytest.raises(ModelError, match=r"holds more than tensors and plain values, .* execute code: refused"):
        load_trained(file)
    torch.save(content, file, _use_new_zipfile_serialization=False)
    with pytest.raises(ModelError, match=r"x\.ckpt"):
        load_trained(file)
    assert not mark.exists()
    torch.load(file, weights_only=False)  # the payload is a real one
    assert mark.exists()


def test_weights_of_another_recipe(folder: Path, tmp_path: Path) -> None:
    other = PolicyConfig(path="tiny-0.5m")
    for spec in (LORA, other):  # other names, other shapes
        file = save(trained(FULL), tmp_path / "x.ckpt", spec=spec)
        with pytest.raises(ModelError, match="holds weights of another model than its own policy section describes"):
            load_trained(file)


def test_missing_and_left_over_weights_are_counted(tmp_path: Path) -> None:
    file = save(trained(LORA), tmp_path / "x.ckpt")
    content = torch.load(file)
    first = next(iter(content["state_dict"]))
    content["state_dict"]["policy.x"] = content["state_dict"].pop(first)
    torch.save(content, file)
    with pytest.raises(ModelError, match=rf"1 missing: {first.removeprefix('policy.')}; 1 left over: x\)"):
        load_trained(file)


def test_an_adapter_on_changed_base_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    policy = trained(PolicyConfig(path=str(folder), lora=LoRAConfig(r=4)))
    file = save(policy, tmp_path / "x.ckpt")
    content = torch.load(file)
    content["stepkd"]["base"] = checkpoints.base_fingerprint(policy)
    torch.save(content, file)
    assert torch.equal(logits(load_trained(file)), logits(policy))
    build_tiny("tiny-0.1m", seed=4)[0].save_pretrained(folder)  # another model of the same shapes, in the same place
    with pytest.raises(ModelError, match=r"holds an adapter of .*model, whose weights are others now"):
        load_trained(file)


def test_fingerprints_tell_weights_apart() -> None:
    model, _ = build_tiny("tiny-0.1m", seed=0)
    same, _ = build_tiny("tiny-0.1m", seed=0)
    seen = {weights_fingerprint(model)}
    assert seen == {weights_fingerprint(same)}
    assert all(len(fingerprint) == 16 for fingerprint in seen)
    seen.add(weights_fingerprint(build_tiny("tiny-0.1m", seed=1)[0]))
    seen.add(weights_fingerprint(build_tiny("tiny-0.1m", seed=0, dtype="float64")[0]))
    for _, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.reshape(-1)[0] += 1.0
        seen.add(weights_fingerprint(model))
    assert len(seen) == 3 + len(list(model.parameters()))


def test_fingerprints_cover_the_end_of_odd_sizes() -> None:
    for size in (1, 999, 1500, 3001):
        layer = nn.Linear(size, 1, bias=False)
        before = weights_fingerprint(layer)
        with torch.no_grad():
            layer.weight.mul_(1.5)
        assert weights_fingerprint(layer) != before
    assert weights_fingerprint(nn.Linear(0, 4, bias=False)) != weights_fingerprint(nn.Linear(0, 5, bias=False))


def test_a_model_that_another_process_samples_from(tmp_path: Path) -> None:
    """Everything but its weights, which nothing can be computed with."""
    save_policy(Policy.load(PolicyConfig("tiny-0.1m")), tmp_path / "model")
    for path in ("tiny-0.1m", str(tmp_path / "model")):
        whole, outline = load_trained(path), load_trained(path, weights=False)
        facts = [
            (each.eos_ids, each.max_length, each.vocab_size, tokenizer_fingerprint(each.tokenizer))
            for each in (whole, outline)
        ]
        assert facts[0] == facts[1]
        assert weights_fingerprint(outline) != weights_fingerprint(whole)
        ids = torch.tensor([[5, 6]])
        with pytest.raises(ConfigError, match="another process samples from the policy"):
            outline.hidden(ids, torch.ones_like(ids))
    with pytest.raises(ModelError, match="loads whole models: export it"):
        load_trained(save(trained(FULL), tmp_path / "last.ckpt"), weights=False)
