"""Loading: what comes back, and the message for each thing that cannot be loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from stepkd.errors import ConfigError, ModelError
from stepkd.models.load import load_model, load_tokenizer
from stepkd.models.policy import Policy
from stepkd.models.spec import LoRAConfig, PolicyConfig

PRESET = "tiny-0.1m"
IDS = torch.tensor([[5, 17, 33, 8, 60, 4]])


class Payload:
    """Pickles to a call that leaves a file behind."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def edit_json(file: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None deletes."""
    values = json.loads(file.read_text())
    values.update(changes)
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


# ---- what loads ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16", "float64"])
def test_tiny_presets_in_every_dtype(dtype: Any) -> None:
    model, tokenizer = load_model(PolicyConfig(path=PRESET, dtype=dtype))
    assert model.dtype == (torch.float32 if dtype is None else getattr(torch, dtype))
    assert len(tokenizer) == 100
    assert not model.training


def test_tiny_seed_and_attention_are_used() -> None:
    first, _ = load_model(PolicyConfig(path=PRESET, init_seed=1))
    other, _ = load_model(PolicyConfig(path=PRESET, init_seed=2, attention="eager"))
    assert not torch.equal(first.model.embed_tokens.weight, other.model.embed_tokens.weight)
    assert (first.config._attn_implementation, other.config._attn_implementation) == ("sdpa", "eager")
    with pytest.raises(ConfigError, match=r"policy\.attention='warp' does not work"):
        load_model(PolicyConfig(path=PRESET, attention="warp"))


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_folder_round_trip(folder: Path, dtype: Any) -> None:
    expected, _ = load_model(PolicyConfig(path=PRESET, init_seed=3, dtype=dtype))
    policy = Policy.load(PolicyConfig(path=str(folder), dtype=dtype, attention="eager"))
    assert policy.model.config._attn_implementation == "eager"
    assert not policy.model.training
    for name, weight in expected.state_dict().items():
        assert torch.equal(policy.model.state_dict()[name], weight)
    assert policy.tokenizer.chat_template


def test_sharded_folder_and_a_lost_shard(folder: Path) -> None:
    model, _ = load_model(PolicyConfig(path=str(folder)))
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    again, _ = load_model(PolicyConfig(path=str(folder)))
    assert torch.equal(logits(again), logits(model))
    shards[-1].unlink()
    with pytest.raises(ModelError, match=f"cannot load .*{shards[-1].name}"):
        load_model(PolicyConfig(path=str(folder)))


def test_home_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    model, _ = load_model(PolicyConfig(path=f"~/{folder.name}"))
    assert model.num_parameters() > 0
    with pytest.raises(ModelError, match=r"no model folder at .*nowhere"):
        load_model(PolicyConfig(path="~/nowhere"))


def test_tokenizer_from_elsewhere(folder: Path, tmp_path: Path) -> None:
    apart = tmp_path / "tokenizer"
    apart.mkdir()
    for file in folder.glob("*token*"):
        shutil.move(file, apart / file.name)
    tokenizer = load_tokenizer(PolicyConfig(path=str(folder), tokenizer=str(apart)))
    assert tokenizer("3+4").input_ids == load_tokenizer(PolicyConfig(path=PRESET))("3+4").input_ids
    assert len(load_tokenizer(PolicyConfig(path=str(folder), tokenizer=PRESET))) == 100


# ---- adapters ------------------------------------------------------------------------------------------------------


def adapter(folder: Path, out: Path) -> tuple[Path, torch.Tensor]:
    """Write an adapter that does something; returns its folder and the adapted logits."""
    model, _ = load_model(PolicyConfig(path=str(folder), lora=LoRAConfig(r=4)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(out)
    return out, logits(model)


def test_adapter_folder_loads_and_trains_on(folder: Path, tmp_path: Path) -> None:
    path, expected = adapter(folder, tmp_path / "adapter")
    policy = Policy.load(PolicyConfig(path=str(path)))
    assert policy.has_adapter
    assert torch.equal(logits(policy.model), expected)
    assert not torch.allclose(logits(load_model(PolicyConfig(path=str(folder)))[0]), expected)
    names = [name for name, _ in policy.trainable_parameters()]
    assert names
    assert all(".lora_" in name for name in names)
    policy.model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for _, p in policy.trainable_parameters())
    # The tokenizer is the base model's, until the adapter brings its own.
    assert load_tokenizer(PolicyConfig(path=str(path))).chat_template == policy.tokenizer.chat_template
    policy.tokenizer.chat_template = "{{ 'own' }}"
    policy.tokenizer.save_pretrained(path)
    assert Policy.load(PolicyConfig(path=str(path))).tokenizer.chat_template == "{{ 'own' }}"


def test_the_adapter_names_what_can_be_loaded_again(tmp_path: Path) -> None:
    model, _ = load_model(PolicyConfig(path=PRESET, lora=LoRAConfig(r=4)))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == PRESET
    assert torch.equal(logits(load_model(PolicyConfig(path=str(tmp_path)))[0]), logits(model))
    assert len(load_tokenizer(PolicyConfig(path=str(tmp_path)))) == 100


def test_broken_adapters(folder: Path, tmp_path: Path) -> None:
    path, _ = adapter(folder, tmp_path / "adapter")
    config, weights = path / "adapter_config.json", path / "adapter_model.safetensors"
    with pytest.raises(ConfigError, match=r"is an adapter and policy\.lora asks for a new one: drop policy\.lora"):
        load_model(PolicyConfig(path=str(path), lora=LoRAConfig()))
    tensors = load_file(weights)
    save_file({name: value[..., :2].contiguous() for name, value in tensors.items()}, weights)
    with pytest.raises(ModelError, match=r"does not fit .* of another shape: .*\[4, 2\] for \[4, \d+\]"):
        load_model(PolicyConfig(path=str(path)))
    weights.write_bytes(b"torn")
    with pytest.raises(ModelError, match="cannot load the adapter in "):
        load_model(PolicyConfig(path=str(path)))
    weights.unlink()
    with pytest.raises(ModelError, match=r"holds adapter_config.json but no adapter_model\.safetensors"):
        load_model(PolicyConfig(path=str(path)))
    edit_json(config, base_model_name_or_path=None)
    with pytest.raises(ModelError, match="names no base model"):
        load_model(PolicyConfig(path=str(path)))
    config.write_text("{")
    with pytest.raises(ModelError, match=r"cannot read .*adapter_config\.json"):
        load_model(PolicyConfig(path=str(path)))


ADAPTERS: dict[str, Any] = {
    "lora": lambda peft: peft.LoraConfig(r=4, target_modules="all-linear"),
    "modules_to_save": lambda peft: peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "tokens": lambda peft: peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[1, 2]),
    "dora": lambda peft: peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], use_dora=True),
    "ia3": lambda peft: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": lambda peft: peft.VeraConfig(r=4, target_modules=["q_proj"]),
    "vblora": lambda peft: peft.VBLoRAConfig(r=2, num_vectors=16, vector_length=16, target_modules=["q_proj"]),
}


@pytest.mark.parametrize("kind", list(ADAPTERS))
def test_an_adapter_loads_as_a_whole_or_not_at_all(folder: Path, tmp_path: Path, kind: str) -> None:
    import peft

    config, path = ADAPTERS[kind](peft), tmp_path / "adapter"
    config.task_type = "CAUSAL_LM"
    base, _ = load_model(PolicyConfig(path=str(folder)))
    base.name_or_path = str(folder)
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(path)
    found, _ = load_model(PolicyConfig(path=str(path)))
    assert torch.equal(logits(found), logits(model.eval()))
    file = path / "adapter_model.safetensors"
    whole = load_file(file)
    count, first = len(whole), next(name for name in whole if "lora_A" not in name or kind != "vera")
    renames = (("model.layers", "model.decoder"), ("lm_head", "head"), ("embed_tokens", "words"), ("vblora_v", "v"))
    renamed = dict(whole)
    for old, new in renames:
        renamed = {name.replace(old, new): value for name, value in renamed.items()}
    broken = {
        f"{count} missing.*; {count} left over" if kind != "vera" else "missing.*; .* left over": renamed,
        rf"\(1 missing: {first}\)": {name: value for name, value in whole.items() if name != first},
        r"\(1 left over: base_model\.model\.x\)": whole | {"base_model.model.x": torch.zeros(1)},
        rf"\(1 of another shape: {first}: ": whole | {first: whole[first].repeat_interleave(2, 0)},
    }
    for message, tensors in broken.items():
        save_file(tensors, file)
        with pytest.raises(ModelError, match=rf"does not fit {folder}, the base model .*{message}"):
            load_model(PolicyConfig(path=str(path)))


def test_an_adapter_of_a_larger_model_is_refused(folder: Path, tmp_path: Path) -> None:
    path, _ = adapter(folder, tmp_path / "adapter")
    edit_json(path / "adapter_config.json", base_model_name_or_path="tiny-0.5m")
    with pytest.raises(
        ModelError, match=r"does not fit tiny-0\.5m, .* \(28 of another shape: .*\[4, 176\] for \[4, 256\]"
    ):
        load_model(PolicyConfig(path=str(path)))


def test_prompt_tuning_is_refused(folder: Path, tmp_path: Path) -> None:
    from peft import PromptTuningConfig, get_peft_model

    model, _ = load_model(PolicyConfig(path=str(folder)))
    get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).save_pretrained(
        tmp_path / "p"
    )
    with pytest.raises(ModelError, match="prompt-learning adapter"):
        load_model(PolicyConfig(path=str(tmp_path / "p")))


def test_an_adapter_that_transformers_applies_by_itself_is_refused(folder: Path, tmp_path: Path) -> None:
    path, _ = adapter(folder, tmp_path / "adapter")
    for file in path.glob("adapter_*"):
        shutil.copy(file, folder / file.name)  # base weights and adapter in one folder, the base naming itself
    with pytest.raises(ModelError, match="is a peft adapter: download it"):
        load_model(PolicyConfig(path=str(folder)))


def test_lora_that_fits_nowhere() -> None:
    with pytest.raises(ConfigError, match=r"policy\.lora does not fit tiny-0\.1m: .*nonsense"):
        load_model(PolicyConfig(path=PRESET, lora=LoRAConfig(target_modules=["nonsense"])))
    with pytest.raises(ConfigError, match=r"modules_to_save names \['lm_haed'\], which tiny-0\.1m does not have"):
        load_model(PolicyConfig(path=PRESET, lora=LoRAConfig(modules_to_save=["norm", "lm_haed"])))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantisation_without_its_package(folder: Path, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepkd.models.load.find_spec", lambda name: None)
    for path in (PRESET, str(folder)):
        with pytest.raises(
            ConfigError, match=rf"quantization='{kind}' needs bitsandbytes: pip install 'stepkd\[qlora\]'"
        ):
            load_model(PolicyConfig(path=path, lora=LoRAConfig(), quantization=kind))


# ---- broken models -------------------------------------------------------------------------------------------------


def test_folders_that_hold_no_model(folder: Path, tmp_path: Path) -> None:
    for path in (str(tmp_path / "nowhere"), "./nowhere", "a/b/c", str(folder / "config.json")):
        with pytest.raises(ModelError, match=f"no model folder at {path}"):
            load_model(PolicyConfig(path=path))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"holds a config\.json but no weights .* cut off\?"):
        load_model(PolicyConfig(path=str(folder)))
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"is a folder without config\.json"):
        load_model(PolicyConfig(path=str(folder)))


def test_unreachable_hub_id() -> None:
    with pytest.raises(ModelError, match=r"no folder 'org/absent' here, and no model .*HF_HUB_OFFLINE is set"):
        load_model(PolicyConfig(path="org/absent"))


def test_torn_files(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for torn in (b"", b"not safetensors", whole[: len(whole) // 2]):
        weights.write_bytes(torn)
        with pytest.raises(ModelError, match=f"cannot load '{folder}'"):
            load_model(PolicyConfig(path=str(folder)))
    weights.write_bytes(whole)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match=f"cannot load '{folder}'"):
        load_model(PolicyConfig(path=str(folder)))


def test_weights_that_would_start_at_random_are_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"lacks weights .*\(model\.layers\.1\.mlp\.up_proj\.weight; 1 in all\).*random"
    ):
        load_model(PolicyConfig(path=str(folder)))


def test_weights_of_another_size_are_refused(folder: Path) -> None:
    edit_json(folder / "config.json", intermediate_size=96)
    with pytest.raises(ModelError, match=f"cannot load '{folder}'"):
        load_model(PolicyConfig(path=str(folder)))


def test_an_encoder_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    config = BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(folder)
    with pytest.raises(ModelError, match=r"lacks weights that BertLMHeadModel needs \(cls\."):
        load_model(PolicyConfig(path=str(folder)))


def test_remote_code_is_not_run(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (folder / "own.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n")
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    edit_json(folder / "config.json", model_type="own", auto_map=code)
    with pytest.raises(ModelError, match=r"ships its own Python code.*policy\.trust_remote_code: true"):
        load_model(PolicyConfig(path=str(folder)))
    assert not mark.exists()


def test_pickled_weights_execute_nothing(folder: Path, tmp_path: Path) -> None:
    expected = logits(load_model(PolicyConfig(path=str(folder)))[0])
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert torch.equal(logits(load_model(PolicyConfig(path=str(folder)))[0]), expected)
    mark = tmp_path / "ran"
    for legacy in (False, True):
        torch.save(
            {**tensors, "extra": Payload(mark)}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy
        )
        with pytest.raises(ModelError, match=f"cannot load '{folder}'"):
            load_model(PolicyConfig(path=str(folder)))
        assert not mark.exists()


# ---- tokenizers ----------------------------------------------------------------------------------------------------


def test_folder_without_tokenizer(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(ModelError, match=rf"no tokenizer at '{folder}': .*set policy\.tokenizer"):
        load_model(PolicyConfig(path=str(folder)))


def test_tokenizer_without_end(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", eos_token=None)
    with pytest.raises(ModelError, match=r"has no end-of-sequence token: set eos_token in its tokenizer_config\.json"):
        load_model(PolicyConfig(path=str(folder)))


def test_a_tokenizer_without_pad_token_pads_with_its_end_token(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", pad_token=None)
    _, tokenizer = load_model(PolicyConfig(path=str(folder)))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1
