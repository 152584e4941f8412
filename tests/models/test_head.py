"""Hidden states + head against the models' own logits, and the two checks that refuse what does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from stepkd.errors import ModelError
from stepkd.models.head import backbone_of, check_head, check_padding, evaluation_mode, real_vocab_size, vocab_head
from stepkd.models.spec import build_tiny, tiny_tokenizer

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Gemma": {},
    "Gemma2": {"final_logit_softcapping": 2.0},
    "Gemma3Text": {"final_logit_softcapping": 3.0},
    "Mistral": {"sliding_window": 4},
    "Phi": {},  # a bias in the head
    "Phi3": {},
    "GPT2": {"n_inner": 64},
    "GPTNeoX": {},
    "OPT": {"ffn_dim": 64, "word_embed_proj_dim": 16},
    "Cohere": {"logit_scale": 0.25},
    "Cohere2": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 8.0},
    "HyperCLOVAX": {"logits_scaling": 0.5},  # multiplies where Granite divides
    "Olmo2": {},
    "SmolLM3": {},
    "StableLm": {},
    "Starcoder2": {},
    "NanoChat": {"final_logit_softcapping": 2.0},
    "Falcon": {"head_dim": None},
    "Bloom": {},
}
_NO_FLOAT64_PADDING = {"Gemma2", "Bloom"}  # eager attention only


def small_model(name: str, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """A random model of an architecture, with logits of order one so that scales and caps show."""
    config_class = getattr(transformers, f"{name}Config")
    values = {**SMALL, **ARCHITECTURES.get(name, {}), **settings}
    config = config_class(**{key: value for key, value in values.items() if value is not None})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for weight in model.parameters():
        if weight.ndim >= 2:
            nn.init.normal_(weight, std=0.3)
        else:
            nn.init.uniform_(weight, 0.5, 1.5)
    return model.to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_head_equals_the_models_logits(name: str, dtype: torch.dtype) -> None:
    model = small_model(name, dtype)
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        actual = vocab_head(model)(backbone_of(model)(input_ids=ids, use_cache=False).last_hidden_state)
    assert actual.dtype == dtype
    assert expected.std() > 0.1
    assert (actual - expected).norm() <= (1e-12 if dtype == torch.float64 else 1e-5) * expected.norm()
    check_head(model)
    if dtype == torch.float32 or name not in _NO_FLOAT64_PADDING:
        check_padding(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Cohere", "Granite", "Phi"])
def test_half_precision_passes_the_checks(name: str, dtype: torch.dtype) -> None:
    model = small_model(name, dtype)
    check_head(model)
    check_padding(model)
    hidden = torch.ones(3, 32, dtype=dtype)
    assert vocab_head(model)(hidden).dtype == torch.float32


def test_scales_and_caps_are_read() -> None:
    assert vocab_head(small_model("Granite")).logit_scale == pytest.approx(1 / 8)
    assert vocab_head(small_model("HyperCLOVAX")).logit_scale == 0.5
    assert vocab_head(small_model("Cohere")).logit_scale == 0.25
    assert vocab_head(small_model("Gemma2")).softcap == 2.0
    llama = vocab_head(small_model("Llama"))
    assert (llama.logit_scale, llama.softcap, llama.vocab_size) == (1.0, None, None)


class ShiftedHead(LlamaForCausalLM):
    """A head with a twist that no configuration tells of."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = self.twist(output.logits)
        return output

    def twist(self, logits: Tensor) -> Tensor:
        return logits * 1.01


class CappedHead(ShiftedHead):
    def twist(self, logits: Tensor) -> Tensor:
        return 8.0 * torch.tanh(logits / 8.0)


@pytest.mark.parametrize("kind", [ShiftedHead, CappedHead])
def test_unknown_heads_are_refused(kind: type[ShiftedHead]) -> None:
    torch.manual_seed(0)
    model = kind(LlamaConfig(**SMALL))
    nn.init.normal_(model.lm_head.weight, std=0.3)
    model.train()
    with pytest.raises(ModelError, match=rf"{kind.__name__}: logits rebuilt .* differ .*%.*report the architecture"):
        check_head(model)
    assert model.training


def test_a_model_of_one_piece_is_refused() -> None:
    model = small_model("Llama")
    model.base_model_prefix = "nothing"
    assert backbone_of(model) is model.model  # found all the same
    model.set_output_embeddings(None)
    with pytest.raises(ModelError, match="has no backbone and vocabulary head that can be called apart"):
        backbone_of(model)


def test_recurrent_models_are_refused_for_their_padding() -> None:
    model = small_model("Rwkv", torch.float32, attention_hidden_size=32)
    check_head(model)
    with pytest.raises(ModelError, match="RwkvForCausalLM: left and right padding give different hidden states"):
        check_padding(model)


def test_eager_attention_in_float64_is_refused_with_the_way_out() -> None:
    model = small_model("Llama")
    check_padding(model)
    model.set_attn_implementation("eager")
    with pytest.raises(ModelError, match=r"float64 and eager attention; .*use sdpa"):
        check_padding(model)


def test_broken_weights_are_not_blamed_on_the_head() -> None:
    model = small_model("Llama")
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(ModelError, match=r"logits are not finite in torch\.float64: broken weights, or a dtype"):
        check_head(model)


def test_evaluation_mode_puts_every_submodule_back() -> None:
    model = small_model("Llama").train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(KeyError), evaluation_mode(model):  # noqa: PT012
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == before


class Words:
    """A tokenizer as far as its size goes."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    eos_token_id = 1
    added_tokens_decoder = frozenset[int]()

    def get_vocab(self) -> dict[str, int]:
        return {f"w{i}": i for i in self.ids}


def test_padded_vocabulary_is_cut() -> None:
    # Qwen2.5: one tokenizer, 151,936 or 152,064 rows (huggingface/trl#2215).
    assert real_vocab_size(Words([0, 1, 90]), 96) == 91
    assert real_vocab_size(Words([0, 95]), 96) == 96
    assert real_vocab_size(tiny_tokenizer(), 100) == 100
    model = small_model("Gemma2")
    hidden = torch.randn(4, 32, dtype=torch.float64)
    whole, cut = vocab_head(model)(hidden), vocab_head(model, 91)(hidden)
    assert cut.shape == (4, 91)
    assert torch.equal(cut, whole[:, :91])


def test_a_tokenizer_beyond_the_model_is_refused() -> None:
    with pytest.raises(ModelError, match="the tokenizer knows 97 ids but the model has only 96 embedding rows"):
        real_vocab_size(Words([0, 96]), 96)


def test_tiny_presets_pass() -> None:
    for dtype in ("float32", "bfloat16", "float16", "float64"):
        model, _ = build_tiny("tiny-0.1m", seed=0, dtype=dtype)
        check_head(model)
        check_padding(model)
