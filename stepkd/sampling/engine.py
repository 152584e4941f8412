"""What an engine is: prompts in, completions out, every draw keyed by the sample's global number."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from stepkd.data.completion import Completion, Ids, Numbers
from stepkd.errors import ConfigError, DataError, check_bounds

Progress = Callable[[int], Any]
DEFAULT_NEW_TOKENS = 512
"""Longest completion in tokens where neither settings nor a benchmark say."""


@dataclass(frozen=True)
class SamplingConfig:
    """How completions are drawn: their number, distribution, length and seed, the same for every engine.

    ``SamplingConfig(temperature=0)`` is greedy; ``SamplingConfig(n=8, temperature=0.7)`` draws eight completions a
    prompt.
    """

    n: int = 1
    """Completions per prompt, >= 1."""
    temperature: float = 1.0
    """Logits are divided by it, 1e-4 or more; 0 takes the most likely token (greedy)."""
    top_p: float = 1.0
    """Nucleus: the smallest set of most likely tokens whose probability reaches this, in (0, 1]; 1 is off. Keep it off
    for distillation and policy gradients: it changes the distribution the samples come from."""
    top_k: int = 0
    """Only the k most likely tokens; 0 is off."""
    max_new_tokens: int | None = None
    """Longest completion in tokens, >= 1; one that is cut there has finish ``length``. Null takes what the benchmark of
    the data has, and 512 where there is none."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion. Their tokens stay in the ids, their text is cut off."""
    seed: int = 0
    """Seed of the run; with the purpose, step and sample number it keys each sample's noise."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        bounds = {"n": "[1, inf)", "top_p": "(0, 1]", "top_k": "[0, inf)", "max_new_tokens": "[1, inf)"}
        check_bounds("", self, **bounds)
        if self.temperature != 0 and not 1e-4 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature={self.temperature}: must be 0 (greedy), or finite and at least 1e-4")
        if any(not text for text in self.stop):
            raise ConfigError("an empty stop string would end every completion at once")

    def check_unbiased(self, place: str) -> None:
        """Refuse settings of training samples that would draw from another distribution than the policy's.

        Args:
            place: where the settings stand, for the message (``rollout.sampling``).

        Raises:
            ConfigError: greedy, or with top_p or top_k.
        """
        if self.temperature == 0:
            raise ConfigError(f"{place}.temperature=0: must be positive; greedy completions are no samples")
        if self.top_p < 1 or self.top_k:
            raise ConfigError(
                f"{place}: top_p={self.top_p}, top_k={self.top_k}: the loss takes samples for the policy's own, and "
                "these cut its distribution; leave top_p at 1 and top_k at 0"
            )

    def check_noise(self, what: str) -> None:
        """Refuse several greedy completions of one prompt.

        Args:
            what: what they are, for the message.

        Raises:
            ConfigError: there is more than one, at temperature 0.
        """
        if self.n > 1 and self.temperature == 0:
            raise ConfigError(
                f"{self.n} {what} at temperature 0 would all be the same: set sampling.temperature, or draw one"
            )

    def room(self, what: str, tokens: int, context: int | None) -> int:
        """Most tokens that a completion may have.

        Args:
            what: what is completed, for the message.
            tokens: its tokens.
            context: of the model, in tokens; None: unlimited.

        Returns:
            :attr:`longest`, or what the context leaves beside the prompt where that is less; at least 1.

        Raises:
            DataError: nothing to start from, or no room for a single token.
        """
        if tokens == 0:
            raise DataError(f"{what} has no tokens: a model needs at least one token to start from")
        if context is not None and tokens >= context:
            raise DataError(
                f"{what} has {tokens} tokens and the model's context is {context}: use fewer few-shot examples, a "
                "model with a longer context, or drop the row"
            )
        return self.longest if context is None else min(self.longest, context - tokens)

    def before_stop(self, text: str) -> str:
        """A completion's text up to the earliest of the stop strings; all of it where none occurs."""
        return text[: min((found for stop in self.stop if (found := text.find(stop)) >= 0), default=len(text))]

    @property
    def different(self) -> int:
        """Completions of a prompt that can differ: ``n``, and 1 of what is greedy, of which vLLM gives no more."""
        return self.n if self.temperature else 1

    @property
    def longest(self) -> int:
        """Longest completion in tokens: ``max_new_tokens``, or 512 where that is null."""
        return DEFAULT_NEW_TOKENS if self.max_new_tokens is None else self.max_new_tokens


@dataclass(frozen=True)
class Branch:
    """A sequence, and the prefixes of it that are to be continued."""

    token_ids: Sequence[int]
    """Prompt and solution."""
    cuts: Sequence[int]
    """Lengths of the prefixes in tokens, strictly increasing, each from 1 to the sequence's length."""
    index: int
    """Global number of the sequence; keys the noise of its continuations."""


@dataclass(frozen=True)
class BranchContinuations:
    """What was drawn from one branch."""

    continuations: tuple[tuple[Completion, ...], ...]
    """For each cut its continuations, by sample number; their ``prompt_ids`` are the prefix."""
    prefill_tokens: int
    """Tokens of the sequence read for it: the longest prefix where reading is shared, else all prefixes together."""


class Wanted(NamedTuple):
    """A prompt to complete."""

    prompt: list[int]
    """Its token ids."""
    limit: int
    """Most tokens of a completion."""
    key: tuple[int | str, ...]
    """Purpose, step and its global number (of a prefix: the sequence's, and the cut): what the noise of its completions
    is keyed by, with the seed."""
    entropies: bool = False
    """Whether the entropies of its completions are asked for."""


class Scores(NamedTuple):
    """What a model says of the T tokens of a completion, at temperature 1."""

    logps_T: Numbers
    """float64 log-probability of each of its tokens after all tokens before it, in nats."""
    ids_Tk: Ids
    """int64 the k most likely tokens at every position, most likely first."""
    logps_Tk: Numbers
    """float64 log-probabilities of those."""


class Engine(ABC):
    """Draws and scores completions with a model, in this process or on a server.

    The noise of a sample is keyed by seed, purpose, step and global number, so that it does not depend on batch or
    rank. Subclasses define ``_draw`` and ``_score``.
    """

    policy: Any
    """The :class:`~stepkd.models.policy.Policy` that is sampled from; None where it only scores."""
    cut_off: int = 0
    """Completions so far that ended before an id that no token has, which a padded vocabulary head can draw."""
    keeps_prefixes: bool = False
    """Whether an engine without a prefix cache of its own keeps what it reads and draws, save completions with an end
    token, for calls that continue it; what searches sets it. Memory is bounded, and tokens are the same up to
    rounding."""
    gives_entropies: ClassVar[bool] = False
    """Whether it knows the whole distribution that a token is drawn from."""
    _version: int | None = None

    @property
    def max_length(self) -> int | None:
        """Context in tokens; None: no limit is known."""
        return None if self.policy.max_length is None else int(self.policy.max_length)

    def generate(
        self,
        prompts: Sequence[Collection[int]],
        spec: SamplingConfig,
        *,
        purpose: str = "rollout",
        step: int = 0,
        indices: Sequence[int | tuple[int | str, ...]] | None = None,
        limits: Sequence[int] | None = None,
        entropies: bool = False,
        on_progress: Progress | None = None,
    ) -> list[list[Completion]]:
        """Draw ``spec.n`` completions of each prompt.

        Args:
            prompts: token ids of each prompt.
            spec: how to draw.
            purpose: names the use, so that evaluation and training draw different noise.
            step: optimiser step (or iteration); with ``purpose`` and the index it keys the noise.
            indices: global number of each prompt; None counts from 0. Sample j of prompt g uses the stream of
                ``g * n + j`` whatever the batch, its order, or the rank; of a tuple ``(*tuple, j)``, whatever n.
            limits: most tokens of each prompt's completions, >= 1, where that is less than ``spec.longest``.
            entropies: whether the completions are to have :attr:`~stepkd.data.completion.Completion.entropies`.
            on_progress: called with the number of completions just finished.

        Returns:
            For each prompt its n completions, in order.

        Raises:
            DataError: an empty prompt, or one that leaves no room for a single token in the model's context.
            ModelError: the model's logits are not numbers, or a server's answer is no completion.
            ConfigError: a server whose log-probabilities are not of what it samples from, or entropies it cannot tell.
            MachineError: no server answers in time.
        """
        if entropies and not self.gives_entropies:
            raise ConfigError(
                f"{type(self).__name__} tells the most likely tokens only, no entropy: take --engine Transformers"
            )
        indices = range(len(prompts)) if indices is None else indices
        wanted = [
            Wanted(
                np.asarray(prompt).tolist(),
                min(limit, spec.room(f"prompt {index}", len(prompt), self.max_length)),
                (purpose, step, *((*index, 0) if isinstance(index, tuple) else (index,))),
                entropies,
            )
            for prompt, index, limit in zip(prompts, indices, limits or [spec.longest] * len(prompts), strict=True)
        ]
        return self._draw(wanted, spec, on_progress)

    def continue_branches(
        self,
        branches: Sequence[Branch],
        spec: SamplingConfig,
        *,
        purpose: str = "branch",
        step: int = 0,
        on_progress: Progress | None = None,
    ) -> list[BranchContinuations]:
        """Draw ``spec.n`` continuations of every prefix.

        Args:
            branches: sequences with their cuts.
            spec: how to draw.
            purpose: names the use, so that different uses draw different noise.
            step: optimiser step (or iteration). Sample j of the prefix of c tokens of sequence g uses the stream of
                ``(spec.seed, purpose, step, g, c, j)``, whatever the batch.
            on_progress: called with the number of continuations just finished.

        Returns:
            One record per branch, in order.

        Raises:
            DataError: a prefix that leaves no room for a single token in the model's context.
            ModelError, ConfigError, MachineError: see :meth:`generate`.
        """
        return self._continue(branches, spec, (purpose, step), on_progress)

    def _continue(
        self, branches: Sequence[Branch], spec: SamplingConfig, key: tuple[str, int], on_progress: Progress | None
    ) -> list[BranchContinuations]:
        """What :meth:`continue_branches` gives; every prefix is a prompt of its own where reading is not shared."""
        wanted = [
            Wanted(
                np.asarray(branch.token_ids[:cut]).tolist(),
                spec.room(f"a prefix of branch {branch.index}", cut, self.max_length),
                (*key, branch.index, cut),
            )
            for branch in branches
            for cut in branch.cuts
        ]
        drawn = iter(self._draw(wanted, spec, on_progress))
        return [
            BranchContinuations(tuple(tuple(next(drawn)) for _ in branch.cuts), sum(branch.cuts)) for branch in branches
        ]

    def score(self, completions: Sequence[Completion], top_k: int = 0) -> list[Scores]:
        """What the model says of given completions, whoever wrote them.

        It is said at temperature 1, of the model's own distribution: vLLM knows no other in the scores of given text,
        so that other temperatures are no part of this contract.

        Args:
            completions: of which prompts and token ids are read; one without tokens gets empty scores.
            top_k: most likely tokens wanted at every position, from 0 to the vocabulary's size (of vLLM to 64, or to
                what a server's ``--max-logprobs`` says).

        Returns:
            One record a completion, in order, whatever the batch up to rounding.

        Raises:
            DataError: a prompt without tokens, an id that the model has not, or more tokens than :attr:`scored_length`.
            ModelError: the model's logits are not numbers, or a server scored other tokens.
            ConfigError: a server that cannot score, or not so many tokens.
            MachineError: no server answers in time.
        """
        check_scored(completions, self.policy and self.policy.vocab_size, self.scored_length)
        return self._score(completions, top_k)

    @property
    def scored_length(self) -> int | None:
        """Most tokens of prompt and completion that can be scored; None: no limit is known."""
        return self.max_length

    @abstractmethod
    def choice_logps(self, prompts: Sequence[Sequence[int]], token_ids: Sequence[int]) -> Numbers:
        """How likely each of some tokens is behind prompts, given that the next one is among them.

        Args:
            prompts: P lists of token ids, none empty, each with room for one token in the model's context. What several
                begin with is read once where the engine caches prefixes and one of them was asked for before.
            token_ids: C different ids.

        Returns:
            (P, C) float64 log-probabilities in nats, at temperature 1; those of a prompt sum to probability 1.

        Raises:
            ModelError: a server that says nothing of these tokens.
            MachineError: no server answers in time.
        """

    def facts(self) -> dict[str, Any]:
        """What decides samples beside model and settings and is not of this process, for a job's ``settings.json``."""
        return {}

    def forget(self) -> None:  # noqa: B027
        """Clear what is kept of earlier calls. A job does so before every unit of work: what was read in another
        shape differs by rounding, and a job that is resumed has not read it."""

    def update(self, version: int) -> None:
        """Have it sample from the policy's weights as they are now; all ranks call it.

        Args:
            version: of the weights; nothing is sent again for the version that was sent last.

        Raises:
            ConfigError: weights that the engine cannot take.
            MachineError: no server takes them in time.
        """
        if self._version != version:
            self._send(version)
            self._version = version

    def _send(self, version: int) -> None:  # noqa: B027
        """Give it the policy's weights; nothing to do where it samples from the policy itself."""

    @abstractmethod
    def _draw(
        self, wanted: Sequence[Wanted], spec: SamplingConfig, on_progress: Progress | None
    ) -> list[list[Completion]]:
        """What :meth:`generate` gives."""

    @abstractmethod
    def _score(self, completions: Sequence[Completion], top_k: int) -> list[Scores]:
        """What :meth:`score` gives."""


def check_scored(
    completions: Sequence[Completion], vocab_size: int | None, context: int | None, who: str = "model"
) -> None:
    """Refuse completions that a model cannot read.

    Args:
        completions: errors name them by their id, or by their number.
        vocab_size: ids that the model has; None: not known.
        context: of the model, in tokens; None: not known.
        who: what the model is called.

    Raises:
        DataError: a prompt without tokens, an unknown id, or more tokens than the context holds.
    """
    for number, each in enumerate(completions):
        name = each.id or number
        if len(each.prompt_ids) == 0:
            raise DataError(f"prompt {name} has no tokens: a model needs at least one token to start from")
        ids = np.concatenate([each.prompt_ids, each.token_ids])
        unknown = ids[(ids < 0) | (ids >= (vocab_size or np.inf))]
        if len(unknown):
            raise DataError(
                f"prompt and completion {name} hold id {unknown[0]}, and the {who} has ids 0 to "
                f"{vocab_size and vocab_size - 1}: were they tokenised with another tokenizer?"
            )
        if context is not None and each.length > context:
            raise DataError(
                f"prompt and completion {name} have {each.length} tokens and the {who}'s context is {context}: shorten "
                "or drop the row"
            )


def is_stand_in(completion: Completion, eos_ids: Collection[int]) -> bool:
    """Whether an end token stands for what was drawn first: an id beyond the vocabulary, of vLLM's padded head.

    Its log-probability is that id's. Of such a completion nothing can be learnt; the others of its prompt are drawn as
    if that id were drawn again until it has a token. (Completions of a server that nobody waits for any more are an end
    token, too, with finish ``stop``: their step is given up.)
    """
    return completion.finish == "length" and len(completion.token_ids) == 1 and completion.token_ids[0] in eos_ids


def decode_text(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """The text of sampled ids, without special tokens, white space as it was sampled.

    Args:
        tokenizer: any transformers tokenizer.
        token_ids: of a completion, the end token included or not.
    """
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))
