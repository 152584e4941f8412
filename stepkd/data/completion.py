"""A completion from the sampler to the loss and to the row: token ids, log-probabilities and steps, as arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from stepkd.steps.labels import correct_targets
from stepkd.steps.segment import Span

Ids = NDArray[np.int64]
Numbers = NDArray[np.float64]
Finish = Literal["stop", "length"]
UNKNOWN: Any = None
"""In place of numbers that nobody has."""


@dataclass(frozen=True, eq=False)
class Completion:
    """One completion of T tokens. Nothing is re-tokenised on its way, and only a row turns the arrays into lists.

    Two of them are never equal, also with the same tokens; :attr:`key` is equal where prompt and completion are.
    """

    prompt_ids: Ids
    """int64 ids of what it continues."""
    token_ids: Ids
    """int64 ids of its own, the end token included where there is one; none for a prompt to be sampled from."""
    step_ends: Ids = UNKNOWN
    """int64 exclusive ends of its steps, which partition its tokens; until it is segmented it is one step."""
    logprobs: Numbers = field(default=UNKNOWN, kw_only=True)
    """Log-probability of each token under the distribution it was drawn from (after temperature, top-k and top-p); None
    where it was not drawn."""
    raw_logprobs: Numbers = field(default=UNKNOWN, kw_only=True)
    """Log-probability of each token under the model at temperature 1, nothing cut off; None: the engine has none."""
    entropies: Numbers = field(default=UNKNOWN, kw_only=True)
    """Entropy in nats, at temperature 1, of the distribution that each token was drawn from; None: not asked for."""
    finish: Finish = field(default="stop", kw_only=True)
    """``stop``: end token or stop string; ``length``: cut at max_new_tokens or the context's end."""
    text: str = field(default="", kw_only=True)
    """Decoded text without special tokens and without the stop string."""
    sample: int = field(default=0, kw_only=True)
    """Which of its prompt's samples it is, from 0."""
    id: str = field(default="", kw_only=True)
    """Id of its row; errors and results name it."""
    row: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    """The row it was made from, or that asked for it."""
    outcome: int = field(default=-1, kw_only=True)
    """1: the answer is correct (the completion is desirable), 0: it is not, -1: not known."""
    targets: tuple[tuple[float, ...] | None, ...] = field(default=(), kw_only=True)
    """For each step the probabilities of its classes, worst first, or None; empty where no step is labelled."""
    read_at: tuple[int, ...] = field(default=(), kw_only=True)
    """For each step with a place in ``targets`` the index in ``token_ids`` at which it is scored."""
    step_weights: tuple[float, ...] = field(default=(), kw_only=True)
    """How much each step counts in a distillation, 0 or more; empty: all of them once."""

    def __post_init__(self) -> None:
        whole = [len(self.token_ids)] if len(self.token_ids) else []
        ends = whole if self.step_ends is None else self.step_ends
        for name, values in (("prompt_ids", self.prompt_ids), ("token_ids", self.token_ids), ("step_ends", ends)):
            object.__setattr__(self, name, np.asarray(values, dtype=np.int64))
        for name in ("logprobs", "raw_logprobs", "entropies"):
            if (values := getattr(self, name)) is not None:
                object.__setattr__(self, name, np.asarray(values, dtype=np.float64))
                assert len(values) == len(self.token_ids), f"{len(values)} {name} for {len(self.token_ids)} tokens"

    @property
    def spans(self) -> tuple[Span, ...]:
        """``(start, end)`` of every step in tokens, half-open, counted from the completion's first token."""
        return tuple(pairwise([0, *self.step_ends.tolist()]))

    @property
    def length(self) -> int:
        """Prompt plus completion, in tokens: what a model's context must hold."""
        return len(self.prompt_ids) + len(self.token_ids)

    @property
    def size(self) -> int:
        """Tokens of an example: its prompt once, and all of its completions."""
        return len(self.prompt_ids) + sum(len(each.token_ids) for each in self.completions)

    @property
    def completions(self) -> tuple[Completion, ...]:
        """The completions of an example, all of one prompt: itself alone, or the two sides of a pair."""
        return (self,)

    @property
    def step_labels(self) -> tuple[int, ...]:
        """For each step 1 where its label calls it correct (:func:`~stepkd.steps.labels.correct_targets`), 0 where it
        does not, -1 where there is none."""
        if not self.targets:
            return (-1,) * len(self.step_ends)
        return tuple(-1 if each is None else int(correct_targets(np.array(each))) for each in self.targets)

    @property
    def key(self) -> bytes:
        """16 bytes of its prompt's and its own ids, by which caches of what a frozen model says of it find it."""
        prompt, own = (",".join(map(str, ids.tolist())) for ids in (self.prompt_ids, self.token_ids))
        return hashlib.blake2b(f"{prompt};{own}".encode(), digest_size=16).digest()
