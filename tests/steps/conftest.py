"""Tokenizers for the step tests: characters, byte-level BPE (characters split over tokens), SentencePiece style."""

from __future__ import annotations

from typing import Any

import pytest

CORPUS = [
    "Step 1: 3 + 4 = 7.\nStep 2: 7 * 2 = 14.\n\nThe answer is 14.\n",
    "a\nb\nc a\nb is true. So it is.\n\n\n#### 14\n",
    "\n\n  indented\n\tline 日本 😀 ok\r\n",
]


def byte_level_bpe(*, use_regex: bool, trim_offsets: bool = False) -> Any:
    """Byte-level BPE trained on a few lines. Without the regex, tokens span line ends (``a\\nb``)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", clean_up_tokenization_spaces=False)


def sentencepiece_style(words: list[str]) -> Any:
    """BPE with byte fallback and a prefix space, as Llama 2 has it; each of ``words`` is a token."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "</s>": 1}
    vocabulary |= {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    merges = []
    for character in sorted({c for word in words for c in word} | {"▁"}):
        vocabulary[character] = len(vocabulary)
    for word in words:
        for length in range(2, len(word) + 1):
            if word[:length] not in vocabulary:
                merges.append((word[: length - 1], word[length - 1]))
                vocabulary[word[:length]] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


@pytest.fixture(scope="session")
def tokenizers_by_name() -> dict[str, Any]:
    from stepkd.models.spec import tiny_tokenizer

    return {
        "characters": tiny_tokenizer(),
        "bpe": byte_level_bpe(use_regex=True),
        "bpe_trimmed": byte_level_bpe(use_regex=True, trim_offsets=True),
        "bpe_over_lines": byte_level_bpe(use_regex=False),
        "sentencepiece": sentencepiece_style(["▁ки", "ки", "▁a", "▁b", "ab"]),
    }
