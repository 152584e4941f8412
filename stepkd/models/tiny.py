"""Character tokenizer and Llama models of 0.1M to 2M parameters for the tiny world; nothing is downloaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stepkd.errors import ConfigError, check_choice

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TINY_CONTEXT = 1024
"""Longest sequence in tokens, of the tokenizer and of every preset."""

TINY_PRESETS: dict[str, dict[str, int]] = {
    "tiny-0.1m": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 2},
    "tiny-0.5m": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4},
    "tiny-2m": {"hidden_size": 192, "intermediate_size": 576, "num_hidden_layers": 4, "num_attention_heads": 6},
}
"""LlamaConfig settings by preset; heads are 32 wide, embeddings tied, 100 tokens of vocabulary."""

_PAD, _EOS, _UNK = "<pad>", "<eos>", "<unk>"
_PRINTABLE = [chr(code) for code in range(0x20, 0x7F)]
_VOCABULARY = [_PAD, _EOS, _UNK, "####", "\n", *_PRINTABLE]
_DTYPES = ("float32", "bfloat16", "float16", "float64")

_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Build the character tokenizer of the tiny world.

    One token for each printable ASCII character and the newline, one for ``####``, and ``<pad>``, ``<eos>``, ``<unk>``:
    the same 100 tokens for every task. Nothing is added, trimmed or cleaned up, so text of these characters survives
    encoding and decoding exactly; any other character becomes ``<unk>``.

    Returns:
        A fast tokenizer with offsets, a chat template and a maximum length of `TINY_CONTEXT` tokens.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(_VOCABULARY)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=_UNK))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"####|[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=_PAD,
        eos_token=_EOS,
        unk_token=_UNK,
        clean_up_tokenization_spaces=False,
        model_max_length=TINY_CONTEXT,
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def tiny_config(preset: str, tokenizer: Any) -> LlamaConfig:
    """Return the model settings of a preset for a tokenizer's vocabulary and special tokens.

    Args:
        preset: a name in `TINY_PRESETS`.
        tokenizer: gives the vocabulary size and the pad, eos and (optional) bos ids.

    Raises:
        ConfigError: unknown preset.
    """
    from transformers import LlamaConfig

    check_choice("tiny model preset", preset, TINY_PRESETS)
    return LlamaConfig(
        **TINY_PRESETS[preset],
        vocab_size=len(tokenizer),
        max_position_embeddings=TINY_CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def build_tiny(preset: str, *, seed: int, dtype: str = "float32") -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Build an untrained tiny Llama and its tokenizer.

    Args:
        preset: a name in `TINY_PRESETS`.
        seed: seed of the weights, 0 to 2**63 - 1. The global generators are left as they were.
        dtype: ``float32``, ``bfloat16``, ``float16`` or ``float64``. Weights are drawn in float32 and cast, so that
            all types start from the same point.

    Returns:
        The model on the CPU in evaluation mode, and the tokenizer.

    Raises:
        ConfigError: unknown preset or dtype, or a seed out of range.
    """
    import torch
    from transformers import LlamaForCausalLM

    check_choice("dtype", dtype, _DTYPES)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ConfigError(f"seed={seed!r} must be a whole number between 0 and 2**63 - 1")
    tokenizer = tiny_tokenizer()
    config = tiny_config(preset, tokenizer)
    # The constructor draws from the CPU's global generator; these weights are thrown away and its state is put back.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            if weight.ndim == 1:
                weight.fill_(1.0)  # the norms' scales
            else:
                weight.normal_(0.0, config.initializer_range, generator=generator)
    return model.to(getattr(torch, dtype)).eval(), tokenizer
