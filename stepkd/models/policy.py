"""The policy: a causal language model with its tokenizer, seen the way losses and samplers need it.

Axes: B rows, T padded length, H hidden size.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from stepkd.data.templates import end_ids
from stepkd.errors import ConfigError, ModelError
from stepkd.losses.linear import VocabHead
from stepkd.models.adapter import first_line
from stepkd.models.head import (
    backbone_of,
    check_head,
    check_padding,
    check_rows,
    evaluation_mode,
    positions_from_mask,
    real_vocab_size,
    steady_length,
    vocab_head,
)
from stepkd.models.load import listed_ends, load_model
from stepkd.models.packed import check_unpadded, is_worth_it, unpadded_hidden
from stepkd.models.sharding import gathered
from stepkd.models.spec import PolicyConfig, StepHeadConfig
from stepkd.models.step_head import StepHead, named_marker, resolve_ids, saved_step_head

logger = logging.getLogger(__name__)


class Policy(nn.Module):
    """Model and tokenizer with the views that training and sampling need.

    Args:
        model: a transformers causal language model, peft-wrapped or not.
        tokenizer: its tokenizer.
        spec: where it came from; recorded in checkpoints.
        verify_head: check once that hidden states and head reproduce the model's logits, whichever side is padded.
    """

    def __init__(
        self, model: Any, tokenizer: Any, spec: PolicyConfig | None = None, *, verify_head: bool = True
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.spec = spec
        self.files = ""
        """Hash of the weights' files where another process holds the weights."""
        self.engine_noise: dict[str, Any] = {}
        """What a run has learnt of the noise of an engine elsewhere (:class:`~stepkd.sampling.follow.FollowCheck`)."""
        self.training = model.training
        self.step_head: StepHead | None = None
        self._rows = int(self.causal_lm.get_output_embeddings().weight.shape[0])
        self.vocab_size = real_vocab_size(tokenizer, self._rows)
        self._has_spare_ids = max(tokenizer.get_vocab().values()) >= self._rows
        self._frozen: list[Policy] = []  # in a list so that the reference never becomes a submodule
        if verify_head:
            check_head(self.causal_lm)
            check_padding(self.causal_lm)
            self.can_unpad  # noqa: B018 - looked at now, while no strategy has sharded the weights yet
            if (steady := steady_length(self.causal_lm.config.get_text_config())) == self.max_length is not None:
                logger.warning(
                    "%s changes its rotary frequencies for a whole batch once a sequence is longer than %d tokens: "
                    "that is its context here. For longer ones write its long_factor over its short_factor in "
                    "config.json (the long frequencies at every length)",
                    type(self.causal_lm).__name__,
                    steady,
                )

    @classmethod
    def load(cls, spec: PolicyConfig) -> Policy:
        """Load the policy a spec describes, with the step head that its folder holds.

        Args:
            spec: path or hub id, dtype, adapters and the rest.

        Returns:
            The policy, as it was saved; with fresh adapters where the spec asks for them.

        Raises:
            ModelError: nothing loadable there, or hidden states and head that do not reproduce the model's logits.
            ConfigError: settings that do not fit the model or this machine.
        """
        model, tokenizer = load_model(spec)
        policy = cls(model, tokenizer, spec)
        saved = saved_step_head(spec.path, spec.revision)
        if saved is not None:
            policy.attach_step_head(saved[0], weights=saved[1])
        return policy

    def attach_step_head(
        self, spec: StepHeadConfig, *, seed: int = 0, weights: Mapping[str, Tensor] | None = None
    ) -> StepHead:
        """Make this model one that scores steps.

        Args:
            spec: how it scores them.
            seed: seed of a classifier's first weights.
            weights: weights of a trained classifier in place of fresh ones.

        Returns:
            The head; a head of the same spec that is there already (from an export) is kept.

        Raises:
            ConfigError: a marker or label that is not one token here, or a head of another spec is there already.
            ModelError: weights of another shape.
        """
        spec = named_marker(spec, self.tokenizer)
        if self.step_head is not None:
            if self.step_head.spec != spec:
                raise ConfigError(
                    f"the model already has a step head, {self.step_head.spec}, and the recipe asks for {spec}: give "
                    "the same head settings to continue training it, or start from a model without one"
                )
            return self.step_head
        hidden_size = self.causal_lm.get_input_embeddings().weight.shape[1]
        head = StepHead(spec, resolve_ids(spec, self.tokenizer), hidden_size, seed=seed).to(self.device)
        embeddings = self.causal_lm.get_input_embeddings()
        if embeddings.weight.dtype == torch.float64:
            head.double()
        if weights is not None:
            try:
                head.load_state_dict(dict(weights))
            except RuntimeError as error:
                raise ModelError(f"the step head's weights do not fit this model: {first_line(error)}") from error
        # A classifier's loss gives the vocabulary head no gradient, and DDP waits for every gradient: the head is not
        # trained. Language modelling beside a classifier reads it as it is.
        if head.score is not None:
            shared = {id(parameter) for parameter in embeddings.parameters()}
            for parameter in self.causal_lm.get_output_embeddings().parameters():
                if id(parameter) not in shared:
                    parameter.requires_grad_(False)
        self.step_head = head
        return head

    def require_step_head(self) -> StepHead:
        """The step head.

        Raises:
            ModelError: the model has none.
        """
        if self.step_head is None:
            raise ModelError(
                "this model scores no steps: it has no step head. Give a run or an export of a reward model, or say "
                "how a plain model scores them (scorer.head, or attach_step_head)"
            )
        return self.step_head

    def step_scores(self, hidden_SH: Tensor) -> Tensor:
        """Chance that each step is correct, by the step head.

        Args:
            hidden_SH: last hidden states at the steps' reading positions.

        Returns:
            (S,) scores in [0, 1].

        Raises:
            ModelError: the model has no step head.
        """
        return self.require_step_head().scores(hidden_SH, self.head)

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
        """Hidden states to logits over the real vocabulary, in float32 or float64: what the functions of ``losses``
        take."""
        return vocab_head(self.causal_lm, self.vocab_size)

    @property
    def device(self) -> torch.device:
        """Device of the embeddings."""
        return self.causal_lm.get_input_embeddings().weight.device

    @property
    def eos_ids(self) -> frozenset[int]:
        """Every id that ends a generation: the tokenizer's end token, that which the chat template writes behind an
        answer, and the model's generation settings."""
        ids = end_ids(self.tokenizer) | listed_ends(self.causal_lm)
        return frozenset(i for i in ids if 0 <= i < self.vocab_size)

    @property
    def max_length(self) -> int | None:
        """Context length in tokens, or None when the model states none (:func:`~stepkd.models.head.steady_length`)."""
        config = self.causal_lm.config.get_text_config()
        lengths = (getattr(config, "max_position_embeddings", None), steady_length(config))
        return min((length for length in lengths if length is not None), default=None)

    def check_ids(self, ids: Tensor) -> None:
        """Refuse ids that only the tokenizer knows; see :func:`~stepkd.models.head.check_rows`.

        Args:
            ids: int64 token ids of any shape; nothing is read of them where the model has a row for every id.

        Raises:
            ConfigError: the weights are not in this process.
        """
        if self.device.type == "meta":
            raise ConfigError(
                "another process samples from the policy, and this job computes with its weights, too (signals of a "
                "segmenter): take --engine Transformers"
            )
        if self._has_spare_ids:
            check_rows(ids, self._rows, self.tokenizer)

    def hidden(self, input_ids_BT: Tensor, attention_mask_BT: Tensor, shared_BT: Tensor | None = None) -> Tensor:
        """Last hidden states.

        Args:
            input_ids_BT: token ids, any padding side.
            attention_mask_BT: 1 for tokens, 0 for padding.
            shared_BT: the place whose state each place has, where rows begin alike
                (:attr:`~stepkd.data.collate.Batch.shared_BT`): the model computes such a beginning once where
                :attr:`can_unpad`.

        Returns:
            (B, T, H) hidden states in the model's dtype; rows of padding hold arbitrary finite values.
        """
        self.check_ids(input_ids_BT)
        if self.can_unpad and is_worth_it(attention_mask_BT, shared_BT):
            return unpadded_hidden(self.causal_lm, input_ids_BT, attention_mask_BT, shared_BT)
        output = backbone_of(self.causal_lm)(
            input_ids=input_ids_BT,
            attention_mask=attention_mask_BT,
            position_ids=positions_from_mask(attention_mask_BT),
            use_cache=False,
        )
        return output.last_hidden_state

    def forward(self, compute: Callable[..., Any], *arguments: Any) -> Any:
        """``compute(*arguments)`` as one forward pass of this module.

        Losses are computed in here: a sharded model (FSDP2) has its embeddings and heads gathered for it, up to the end
        of the backward pass. What is returned must hold the loss itself, alone or in a tuple.
        """
        return compute(*arguments)

    def gathered(self) -> AbstractContextManager[Any]:
        """A block without gradients with all weights of a sharded model in place, so that no rank waits in it."""
        return gathered(self)

    @cached_property
    def can_unpad(self) -> bool:
        """Whether padding can be left out of forward passes (:func:`~stepkd.models.packed.check_unpadded`)."""
        return check_unpadded(self.causal_lm)

    def trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters that require gradients, in the model's order; a step head's are among them."""
        return [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]

    def freeze_copy(self) -> None:
        """Keep a frozen copy of the current weights as the reference (full fine-tuning, or a reference reset)."""
        self.set_reference(self.twin())

    def twin(self, shared: dict[int, Any] | None = None) -> Policy:
        """A copy of the model.

        Args:
            shared: id of a parameter -> what the copy has in its place, for those that are not to be copied.
        """
        twin = Policy(copy.deepcopy(self.model, shared), self.tokenizer, self.spec, verify_head=False)
        twin.can_unpad = self.can_unpad  # one architecture; a strategy may shard the copy before it is first asked
        return twin

    def set_reference(self, reference: Policy | None) -> None:
        """Take another model as the reference.

        Args:
            reference: a model of the same vocabulary, which is frozen and put into evaluation mode here; it is no
                submodule. None drops the one there is; a model with an adapter is its own reference then, with the
                adapter off.
        """
        if reference is not None:
            reference.requires_grad_(False).eval()
        self._frozen[:] = [] if reference is None else [reference]

    @property
    def shares_prompts(self) -> bool:
        """Whether this model, and its reference where that is another one, compute what rows begin with once."""
        return all(each.can_unpad for each in (self, *self._frozen))

    @contextmanager
    def reference(self) -> Iterator[Policy]:
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
