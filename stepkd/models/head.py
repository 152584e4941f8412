"""The parts of a causal language model that the losses need: hidden states and the vocabulary head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stepkd.errors import ModelError
from stepkd.losses.linear import VocabHead


def backbone_of(causal_lm: Any) -> nn.Module:
    """The transformer below the vocabulary head: ids to last hidden states.

    Raises:
        ModelError: the class has no separate backbone.
    """
    backbone = causal_lm.base_model
    if backbone is causal_lm or causal_lm.get_output_embeddings() is None:
        raise ModelError(
            f"{type(causal_lm).__name__} has no backbone and vocabulary head that can be called apart; "
            "stepkd needs a decoder-only ...ForCausalLM class"
        )
    return backbone


def vocab_head(causal_lm: Any, vocab_size: int | None = None) -> VocabHead:
    """Build the head function of a transformers causal language model.

    Args:
        causal_lm: the ``...ForCausalLM`` model (adapters may be injected in it).
        vocab_size: number of real tokens; None keeps all rows of the weight.
    """
    config = causal_lm.config.get_text_config()
    scale = 1.0
    if getattr(config, "logit_scale", None) is not None:
        scale = float(config.logit_scale)
    elif getattr(config, "logits_scaling", None) is not None:
        scale = 1.0 / float(config.logits_scaling)
    return VocabHead(
        causal_lm.get_output_embeddings(),
        logit_scale=scale,
        softcap=getattr(config, "final_logit_softcapping", None),
        vocab_size=vocab_size,
    )


@torch.no_grad()
def check_head(causal_lm: Any) -> None:
    """Compare hidden states + head with the model's own logits on four tokens.

    Some architectures do more between backbone and logits than :func:`vocab_head` knows of; training them head-side
    would silently optimise another model.

    Raises:
        ModelError: the logits differ.
    """
    was_training = causal_lm.training
    causal_lm.eval()
    try:
        rows = causal_lm.get_input_embeddings().weight.shape[0]
        device = causal_lm.get_input_embeddings().weight.device
        input_ids = torch.tensor([[1, 2, 3, 0]], device=device) % rows
        expected: Tensor = causal_lm(input_ids=input_ids, use_cache=False).logits.float()
        hidden = backbone_of(causal_lm)(input_ids=input_ids, use_cache=False).last_hidden_state
        actual = vocab_head(causal_lm)(hidden).float()
    finally:
        causal_lm.train(was_training)
    error = (expected - actual).norm() / expected.norm().clamp(min=1e-30)
    if not error < 1e-2:
        raise ModelError(
            f"{type(causal_lm).__name__}: logits rebuilt from hidden states differ from the model's own by "
            f"{error:.1%}; its head does something stepkd does not know (please report the architecture)"
        )


def real_vocab_size(tokenizer: Any, num_rows: int) -> int:
    """Number of token ids the tokenizer can produce, at most ``num_rows``.

    Model families pad their embedding matrices to round sizes, and sizes of one family differ in the padding (Qwen2.5:
    151,936 and 152,064 rows for one tokenizer). Rows beyond the tokenizer are never targets and never sampled.

    Raises:
        ModelError: the tokenizer has ids beyond the embedding matrix.
    """
    size = max(tokenizer.get_vocab().values()) + 1
    if size > num_rows:
        raise ModelError(
            f"the tokenizer knows {size} ids but the model has only {num_rows} embedding rows: "
            "tokenizer and weights do not belong together, or the embeddings need resizing"
        )
    return size
