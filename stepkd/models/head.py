"""The parts of a causal language model that the losses need: hidden states and the vocabulary head; and its dropout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stepkd.errors import DataError, ModelError
from stepkd.losses.linear import VocabHead

PROBE = 64
"""Tokens that are read to see whether training mode computes what evaluation mode does."""


def backbone_of(causal_lm: Any) -> nn.Module:
    """The transformer below the vocabulary head: ids to last hidden states.

    Raises:
        ModelError: the class has no separate backbone.
    """
    backbone = causal_lm.base_model
    if backbone is causal_lm:  # a class whose base_model_prefix names nothing (Llama 4)
        backbone = getattr(causal_lm, "model", causal_lm)
    if backbone is causal_lm or causal_lm.get_output_embeddings() is None:
        raise ModelError(
            f"{type(causal_lm).__name__} has no backbone and vocabulary head that can be called apart; "
            "stepkd needs a decoder-only ...ForCausalLM class"
        )
    return backbone


_MULTIPLYING = ("hyperclovax",)  # architectures that read Granite's ``logits_scaling`` the other way round


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
        scaling = float(config.logits_scaling)
        scale = scaling if config.model_type in _MULTIPLYING else 1.0 / scaling
    return VocabHead(
        causal_lm.get_output_embeddings(),
        logit_scale=scale,
        softcap=getattr(config, "final_logit_softcapping", None),
        vocab_size=vocab_size,
    )


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode (dropout off) for a block; afterwards every submodule is back in the mode it had."""
    training = [child for child in module.modules() if child.training]
    module.eval()
    try:
        yield
    finally:
        for child in training:
            child.training = True


@torch.no_grad()
def check_head(causal_lm: Any) -> None:
    """Compare hidden states + head with the model's own logits on four tokens.

    Some architectures do more between backbone and logits than :func:`vocab_head` knows of; training them head-side
    would silently optimise another model.

    Raises:
        ModelError: the logits differ, or are not finite.
    """
    ids = _probe_ids(causal_lm)
    with evaluation_mode(causal_lm):
        expected: Tensor = causal_lm(input_ids=ids, use_cache=False).logits
        actual = vocab_head(causal_lm)(backbone_of(causal_lm)(input_ids=ids, use_cache=False).last_hidden_state)
    if not torch.isfinite(expected).all():
        raise ModelError(
            f"{type(causal_lm).__name__}: logits are not finite in {expected.dtype}: broken weights, or a dtype too "
            "narrow for this model (policy.dtype: bfloat16 or float32)"
        )
    error = relative_error(actual, expected)
    if not error < (1e-2 if is_half(causal_lm) else 1e-4):
        raise ModelError(
            f"{type(causal_lm).__name__}: logits rebuilt from hidden states differ from the model's own by "
            f"{error:.2%}; its head does something stepkd does not know (please report the architecture)"
        )


@torch.no_grad()
def check_padding(causal_lm: Any) -> None:
    """Compare hidden states of four tokens padded on the right with the same four padded on the left.

    Sampling pads left and training pads right. Recurrent and encoder-decoder models, for instance, give other states
    then: training would look fine and sampling would be of another model.

    Raises:
        ModelError: the states differ, or are not finite.
    """
    ids, pad = _probe_ids(causal_lm), 3
    padding = torch.zeros_like(ids[:, :pad])
    input_ids = torch.cat([torch.cat([ids, padding], 1), torch.cat([padding, ids], 1)])
    mask = torch.cat([torch.ones_like(ids), padding], 1)
    mask = torch.cat([mask, mask.flip(1)])
    with evaluation_mode(causal_lm):
        hidden = backbone_of(causal_lm)(
            input_ids=input_ids, attention_mask=mask, position_ids=positions_from_mask(mask), use_cache=False
        ).last_hidden_state
    error = relative_error(hidden[1, pad:], hidden[0, :-pad])
    # In half precision the two layouts round differently (and may route a token to another expert).
    if not (torch.isfinite(hidden).all() and error < (0.3 if is_half(causal_lm) else 1e-3)):
        raise ModelError(
            f"{type(causal_lm).__name__}: left and right padding give different hidden states (by {error:.1%}) with "
            f"{hidden.dtype} and {causal_lm.config._attn_implementation} attention; stepkd needs a decoder-only model "
            "that honours attention masks (in float64, eager attention does not: use sdpa)"
        )


def positions_from_mask(attention_mask_BT: Tensor) -> Tensor:
    """Position of each token among its row's real tokens, so that left and right padding give the same states."""
    return (attention_mask_BT.long().cumsum(-1) - 1).clamp(min=0)


def steady_length(config: Any) -> int | None:
    """Tokens up to which rotary positions are the same whatever else is in the batch; None: always.

    LongRoPE (Phi-3) goes over to other frequencies, for a whole batch at once, as soon as its longest sequence passes
    the original context: a row's states would depend on its micro-batch, and sampled tokens on those read before the
    change.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    lengths = []
    for scaling in (rope, *(each for each in rope.values() if isinstance(each, dict))):  # one, or one per kind of layer
        if scaling.get("rope_type") == "longrope" and scaling["long_factor"] != scaling["short_factor"]:
            original = scaling.get("original_max_position_embeddings")
            lengths.append(original or config.original_max_position_embeddings)
    return min(lengths, default=None)


def _probe_ids(causal_lm: Any) -> Tensor:
    weight = causal_lm.get_input_embeddings().weight
    return torch.tensor([[1, 2, 3, 0]], device=weight.device) % weight.shape[0]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of a difference, as a share of what is expected."""
    difference = (actual.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp(min=1e-30))


def reads_alike(causal_lm: Any, actual: Tensor, expected: Tensor) -> bool:
    """Whether two layouts of a few tokens gave the same hidden states, up to rounding."""
    return relative_error(actual, expected) < (0.03 if is_half(causal_lm) else 1e-4)


def is_half(causal_lm: Any) -> bool:
    """Whether a model computes in 16 bits."""
    return causal_lm.dtype in (torch.float16, torch.bfloat16)


def real_vocab_size(tokenizer: Any, num_rows: int) -> int:
    """Number of token ids the tokenizer can produce, at most ``num_rows``.

    Model families pad their embedding matrices to round sizes, and sizes of one family differ in the padding (Qwen2.5:
    151,936 and 152,064 rows for one tokenizer). Rows beyond the tokenizer are never targets and never sampled. An added
    token beyond the rows (Gemma 3 1B: one for images) does no harm until a text holds it: :func:`check_rows`.

    Raises:
        ModelError: the tokenizer has ordinary tokens, or its end token, beyond the embedding matrix.
    """
    ids = tokenizer.get_vocab().values()
    spare = set(tokenizer.added_tokens_decoder) - {tokenizer.eos_token_id}
    if max((i for i in ids if i not in spare), default=0) >= num_rows:
        raise ModelError(
            f"the tokenizer knows {max(ids) + 1} ids but the model has only {num_rows} embedding rows: take the "
            f"tokenizer that belongs to the weights (policy.tokenizer), or {_grown(max(ids) + 1)}"
        )
    return max(i for i in ids if i < num_rows) + 1


def check_rows(ids: Tensor, num_rows: int, tokenizer: Any) -> None:
    """Refuse token ids that a model has no embedding for.

    Raises:
        DataError: names the first one's token.
    """
    beyond = ids[ids >= num_rows]
    if beyond.numel():
        found, size = int(beyond[0]), max(tokenizer.get_vocab().values()) + 1
        raise DataError(
            f"a text holds {tokenizer.convert_ids_to_tokens(found)!r} (id {found}), for which the model has no "
            f"embedding ({num_rows} rows): take it out of the text, or {_grown(size)}"
        )


def _grown(size: int) -> str:
    return (
        f"give the model rows for all tokens, in transformers: model.resize_token_embeddings({size}); "
        "model.save_pretrained(FOLDER); tokenizer.save_pretrained(FOLDER); then name that folder"
    )


@torch.no_grad()
def disable_dropout(causal_lm: Any) -> bool:
    """Make a model compute in training mode what it computes in evaluation mode.

    Rates of dropout, dropped layers and router jitter become 0 wherever a module or the config holds one. Whether that
    was all is measured: a pass in evaluation mode and two in training mode must agree with evaluation as it was.

    Args:
        causal_lm: the transformers model, adapters injected, whole on this rank; left in the mode it had.

    Returns:
        Whether a rate was above 0.

    Raises:
        ModelError: something else is random, or depends on a rate.
    """
    modes = [(module, module.training) for module in causal_lm.modules()]
    config = causal_lm.config
    try:
        expected = _read(causal_lm.eval())
        changed = [_zero_rates(each) for each in (*causal_lm.modules(), config, config.get_text_config())]
        for mode in (False, True, True):
            # A GPU's order of summation makes smaller differences.
            if not relative_error(_read(causal_lm.train(mode)), expected) <= (1e-2 if is_half(causal_lm) else 1e-5):
                raise ModelError(
                    f"with its dropout and jitter rates at 0, {type(causal_lm).__name__} computes something else in "
                    f"{'training' if mode else 'evaluation'} mode: this method compares the policy with another view "
                    "of it and needs a model without randomness of its own"
                )
    finally:
        for module, mode in modes:
            module.training = mode
    return any(changed)


def _zero_rates(holder: Any) -> bool:
    """Set what a module or config calls a rate to 0; whether one was above."""
    own = "drop" in type(holder).__name__.lower()
    rates = [
        name
        for name, value in vars(holder).items()
        if isinstance(value, float) and value > 0 and ("drop" in name or "jitter" in name or (own and name == "p"))
    ]
    for name in rates:
        setattr(holder, name, 0.0)
    return bool(rates)


def _read(causal_lm: Any) -> Tensor:
    """Last hidden states of a few tokens."""
    weight = causal_lm.get_input_embeddings().weight
    number = min(PROBE, getattr(causal_lm.config.get_text_config(), "max_position_embeddings", None) or PROBE)
    ids = (torch.arange(1, number + 1, device=weight.device) % weight.shape[0]).unsqueeze(0)
    output = backbone_of(causal_lm)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    hidden: Tensor = output.last_hidden_state
    return hidden
