"""The policy: a causal language model with its tokenizer, seen the way losses and samplers need it.

Axes: B rows, T padded length, H hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stepkd.losses.linear import VocabHead
from stepkd.models.head import (
    backbone_of,
    check_head,
    check_padding,
    evaluation_mode,
    positions_from_mask,
    real_vocab_size,
    vocab_head,
)
from stepkd.models.load import load_model
from stepkd.models.spec import PolicySpec

__all__ = ["HiddenStates", "Policy", "positions_from_mask"]


class HiddenStates(Protocol):
    """A view of a language model: hidden states, and the head that turns them into logits."""

    @property
    def head(self) -> VocabHead:
        """Hidden states to logits over the real vocabulary."""
        ...

    def hidden(self, input_ids_BT: Tensor, attention_mask_BT: Tensor, position_ids_BT: Tensor | None = None) -> Tensor:
        """Last hidden states (B, T, H)."""
        ...


class Policy(nn.Module):
    """Model and tokenizer with the views that training and sampling need.

    Args:
        model: a transformers causal language model, peft-wrapped or not.
        tokenizer: its tokenizer.
        spec: where it came from; recorded in checkpoints.
        verify_head: check once that hidden states and head reproduce the model's logits, whichever side is padded.
    """

    def __init__(self, model: Any, tokenizer: Any, spec: PolicySpec | None = None, *, verify_head: bool = True) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.spec = spec
        self.training = model.training
        self.vocab_size = real_vocab_size(tokenizer, self.causal_lm.get_output_embeddings().weight.shape[0])
        self._frozen: list[Policy] = []  # in a list so that the reference never becomes a submodule
        if verify_head:
            check_head(self.causal_lm)
            check_padding(self.causal_lm)

    @classmethod
    def load(cls, spec: PolicySpec) -> Policy:
        """Load the policy a spec describes."""
        model, tokenizer = load_model(spec)
        return cls(model, tokenizer, spec)

    @property
    def has_adapter(self) -> bool:
        """Whether peft adapters are in place."""
        return hasattr(self.model, "peft_config")

    @property
    def causal_lm(self) -> Any:
        """The transformers model itself (adapters injected)."""
        return self.model.get_base_model() if self.has_adapter else self.model

    @property
    def head(self) -> VocabHead:
        """Hidden states to logits over the real vocabulary."""
        return vocab_head(self.causal_lm, self.vocab_size)

    @property
    def device(self) -> torch.device:
        """Device of the embeddings."""
        return self.causal_lm.get_input_embeddings().weight.device

    @property
    def eos_ids(self) -> frozenset[int]:
        """Every id that ends a generation: the tokenizer's end token and the model's generation settings."""
        ids = {int(self.tokenizer.eos_token_id)}
        configured = getattr(getattr(self.causal_lm, "generation_config", None), "eos_token_id", None)
        if configured is not None:
            ids.update([configured] if isinstance(configured, int) else configured)
        return frozenset(i for i in ids if 0 <= i < self.vocab_size)

    @property
    def max_length(self) -> int | None:
        """Context length in tokens, or None when the model states none."""
        return getattr(self.causal_lm.config.get_text_config(), "max_position_embeddings", None)

    def hidden(self, input_ids_BT: Tensor, attention_mask_BT: Tensor, position_ids_BT: Tensor | None = None) -> Tensor:
        """Last hidden states.

        Args:
            input_ids_BT: token ids, any padding side.
            attention_mask_BT: 1 for tokens, 0 for padding.
            position_ids_BT: positions; None counts each row's real tokens from 0.

        Returns:
            (B, T, H) hidden states in the model's dtype; rows of padding hold arbitrary finite values.
        """
        if position_ids_BT is None:
            position_ids_BT = positions_from_mask(attention_mask_BT)
        output = backbone_of(self.causal_lm)(
            input_ids=input_ids_BT,
            attention_mask=attention_mask_BT,
            position_ids=position_ids_BT,
            use_cache=False,
        )
        return output.last_hidden_state

    def trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters that require gradients."""
        return [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]

    def freeze_copy(self) -> None:
        """Keep a frozen copy of the current weights as the reference (full fine-tuning, or a reference reset)."""
        frozen = Policy(copy.deepcopy(self.model), self.tokenizer, self.spec, verify_head=False)
        frozen.requires_grad_(False).eval()
        self._frozen[:] = [frozen]

    @contextmanager
    def reference(self) -> Iterator[HiddenStates]:
        """The frozen reference model: the copy when there is one, else this model with its adapter off.

        No gradients, evaluation mode (dropout off). The copy follows the policy's device.

        Raises:
            RuntimeError: full fine-tuning without :meth:`freeze_copy` first.
        """
        with torch.no_grad():
            if self._frozen:
                frozen = self._frozen[0]
                if frozen.device != self.device:
                    frozen.to(self.device)
                yield frozen
            elif self.has_adapter:
                with evaluation_mode(self), self.model.disable_adapter():
                    yield self
            else:
                raise RuntimeError("no adapter to switch off: call freeze_copy() before training all weights")
