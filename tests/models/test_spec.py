"""Model settings, and the tiny models and tokenizer."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from stepkd.errors import ConfigError
from stepkd.models.load import training_spec
from stepkd.models.spec import (
    TINY_CONTEXT,
    TINY_PRESETS,
    LoRAConfig,
    PolicyConfig,
    build_tiny,
    spec_from_dict,
    tiny_config,
    tiny_tokenizer,
)
from stepkd.tasks.families import TASKS
from stepkd.tasks.rows import make_rows


@pytest.mark.parametrize(
    "spec",
    [
        PolicyConfig(),
        PolicyConfig(path="org/name", revision="main", dtype="bfloat16", attention="sdpa", gradient_checkpointing=True),
        PolicyConfig(lora=LoRAConfig(r=4, alpha=8.0, target_modules=["q_proj"], modules_to_save=["lm_head"])),
        PolicyConfig(lora=LoRAConfig(), quantization="nf4"),
    ],
)
def test_dict_round_trip(spec: PolicyConfig) -> None:
    assert spec_from_dict(asdict(spec)) == spec
    assert spec_from_dict(json.loads(json.dumps(asdict(spec)))) == spec


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": ""}, r"policy\.path is empty"),
        ({"dtype": "float8"}, r"unknown policy\.dtype 'float8': .*choose from float32"),
        ({"quantization": "int3"}, r"unknown policy\.quantization 'int3': .*choose from none, nf4, int8"),
    ],
)
def test_bad_policy_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PolicyConfig(**settings)


def test_quantised_weights_are_trained_beside_an_adapter_only() -> None:
    with pytest.raises(ConfigError, match=r"policy\.quantization='nf4' without policy\.lora.*add a lora section"):
        training_spec(PolicyConfig(quantization="nf4"))
    assert training_spec(PolicyConfig(quantization="nf4", lora=LoRAConfig())).quantization == "nf4"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, r"policy\.lora\.r=0"),
        ({"alpha": 0.0}, r"policy\.lora\.alpha=0\.0: must be positive"),
        ({"dropout": 1.0}, r"policy\.lora\.dropout=1\.0: must lie in \[0, 1\)"),
        ({"dropout": -0.1}, r"policy\.lora\.dropout=-0\.1"),
    ],
)
def test_bad_lora_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoRAConfig(**settings)


def test_settings_of_a_newer_version_are_named() -> None:
    with pytest.raises(ConfigError, match=r"unknown policy settings \['warp'\].*newer stepkd"):
        spec_from_dict({"path": "x", "warp": 9})
    with pytest.raises(ConfigError, match=r"unknown policy\.lora settings \['gears'\].*newer stepkd"):
        spec_from_dict({"path": "x", "lora": {"r": 2, "gears": 5}})


def test_trust_in_remote_code_is_off() -> None:
    assert PolicyConfig().trust_remote_code is False


TOKENIZER = tiny_tokenizer()


def encode(text: str) -> list[int]:
    return TOKENIZER(text).input_ids


@pytest.mark.parametrize("name", TASKS)
def test_round_trip_over_every_task(name: str) -> None:
    for row in make_rows(name, 20, seed=0):
        text = row["prompt"] + row["solution"]
        ids = encode(text)
        assert TOKENIZER.unk_token_id not in ids
        assert TOKENIZER.decode(ids) == text
        assert len(ids) == len(text) - 3  # one token for ####
        assert encode(row["prompt"]) + encode(row["solution"]) == ids
        assert len(ids) < TINY_CONTEXT


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([chr(code) for code in range(0x20, 0x7F)] + ["\n", "####"]), max_size=40).map("".join))
def test_any_printable_text_round_trips_with_correct_offsets(text: str) -> None:
    if any(special in text for special in ("<pad>", "<eos>", "<unk>")):
        return
    encoded = TOKENIZER(text, return_offsets_mapping=True)
    assert TOKENIZER.decode(encoded.input_ids) == text
    assert TOKENIZER.decode(encoded.input_ids, skip_special_tokens=True) == text
    pieces = [text[start:end] for start, end in encoded.offset_mapping]
    assert "".join(pieces) == text
    assert TOKENIZER.convert_ids_to_tokens(encoded.input_ids) == pieces


@pytest.mark.parametrize(
    "text", ["", "\n", "\n\n", "  two  spaces  ", "a .b ,c n't", " ####", "#####", "########", "# ##"]
)
def test_spaces_newlines_and_marks_are_kept(text: str) -> None:
    assert TOKENIZER.decode(encode(text)) == text


def test_unknown_characters_become_unk_one_by_one() -> None:
    encoded = TOKENIZER("aé\t漢b", return_offsets_mapping=True)
    assert encoded.input_ids == [encode("a")[0], *[TOKENIZER.unk_token_id] * 3, encode("b")[0]]
    assert encoded.offset_mapping == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]


def test_special_tokens_and_limits() -> None:
    assert len(TOKENIZER) == 100
    assert (TOKENIZER.pad_token, TOKENIZER.eos_token, TOKENIZER.unk_token) == ("<pad>", "<eos>", "<unk>")
    assert TOKENIZER.bos_token is None
    assert len({TOKENIZER.pad_token_id, TOKENIZER.eos_token_id, TOKENIZER.unk_token_id}) == 3
    assert TOKENIZER.model_max_length == TINY_CONTEXT
    assert encode("<eos>") == [TOKENIZER.eos_token_id]


def test_chat_template() -> None:
    messages = [{"role": "user", "content": "3+4=\n"}]
    prompt = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == "user: 3+4=\n\nassistant: "
    messages.append({"role": "assistant", "content": "#### 7"})
    assert TOKENIZER.apply_chat_template(messages, tokenize=False) == prompt + "#### 7<eos>\n"


def test_tokenizer_survives_saving(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "  3+4 =\n#### 7 .b"
    assert loaded(text).input_ids == encode(text)
    assert loaded.decode(loaded(text).input_ids) == text
    assert loaded.model_max_length == TINY_CONTEXT
    assert loaded.chat_template == TOKENIZER.chat_template


@pytest.mark.parametrize("preset", list(TINY_PRESETS))
def test_parameter_counts_are_close_to_the_names(preset: str) -> None:
    model, tokenizer = build_tiny(preset, seed=0)
    named = float(preset.removeprefix("tiny-").removesuffix("m")) * 1e6
    assert abs(model.num_parameters() / named - 1) < 0.1
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.head_dim == 32
    config = tiny_config(preset, tokenizer)
    assert config.vocab_size == len(tokenizer)
    assert (config.pad_token_id, config.eos_token_id, config.bos_token_id) == (0, 1, None)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_weights_hang_on_the_seed_alone() -> None:
    random.seed(0)
    torch.manual_seed(0)
    before, python_before = torch.get_rng_state(), random.getstate()
    first, _ = build_tiny("tiny-0.1m", seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python_before
    torch.manual_seed(99)
    again, _ = build_tiny("tiny-0.1m", seed=4)
    other, _ = build_tiny("tiny-0.1m", seed=5)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
        assert weight.ndim == 1 or not torch.equal(weight, other.state_dict()[name])


def test_dtypes_start_from_the_same_point() -> None:
    single, tokenizer = build_tiny("tiny-0.1m", seed=0)
    double, _ = build_tiny("tiny-0.1m", seed=0, dtype="float64")
    half, _ = build_tiny("tiny-0.1m", seed=0, dtype="bfloat16")
    assert (double.dtype, half.dtype) == (torch.float64, torch.bfloat16)
    for name, weight in single.state_dict().items():
        assert torch.equal(weight.double(), double.state_dict()[name])
        assert torch.equal(weight.bfloat16(), half.state_dict()[name])
    ids = torch.tensor([tokenizer("3+4=\n#### 7").input_ids])
    with torch.no_grad():
        assert torch.allclose(single(ids).logits.double(), double(ids).logits, atol=1e-5)
        assert single(ids).logits.shape == (1, ids.shape[1], 100)


def test_bad_settings() -> None:
    with pytest.raises(ConfigError, match=r"unknown tiny model preset 'tiny-0.5': did you mean 'tiny-0.5m'\?"):
        build_tiny("tiny-0.5", seed=0)
    with pytest.raises(ConfigError, match=r"policy.init_seed=-1: must be 0 or positive"):
        PolicyConfig(init_seed=-1)
