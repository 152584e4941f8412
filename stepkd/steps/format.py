"""How a solution is written for a model that scores steps: what separates steps, and where the marker goes.

Published process reward models differ in nothing so much as in this, and get it wrong most easily. A marker goes in as
a token id: joining step texts with a marker string and tokenising again moves token boundaries and is known to cost a
published PRM several F1 points on ProcessBench (QwenLM/ProcessBench issue 12).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from stepkd.errors import ConfigError, DataError, check_bounds

Meaning = Literal["correctness", "value", "outcome"]
"""What a score estimates: that the step is correct, that the answer will be correct from here on (Monte-Carlo labels),
or, at the last step only, that the whole solution is correct (ORM)."""


@dataclass(frozen=True)
class StepFormat:
    """The layout of steps and markers."""

    marker: str | None = "auto"
    """Token put after each step, at which the step is scored; ``auto`` takes the first of
    :data:`MARKER_CANDIDATES` that the tokenizer has as one token; None: no marker, a step is scored at its last
    token."""
    separator: str = "\n"
    """Text between two steps (:func:`written_steps`); empty where the steps are cuts of one text (AdaptiveStep) and
    joining them gives it back."""
    marker_place: Literal["step_end", "before_separator", "prompt_end"] = "step_end"
    """``step_end``: behind the separator, where the step's span ends; ``before_separator``: between the step's text and
    its separator (Math-Shepherd's ``ки`` before the newline); ``prompt_end``: once, behind the prompt, so that nothing
    of the solution is read: whether the sampler will know the answer, P(IK) of arXiv 2207.05221."""
    tokenize: Literal["whole", "per_step"] = "whole"
    """``whole``: one solution, as the policy reads it, in which no token reaches over the end of a step; ``per_step``:
    every step as the beginning of a text, as models do whose marker is a special token between steps without a
    separator (Qwen2.5-Math-PRM). They differ for tokenizers that begin a text with a piece of its own."""

    def __post_init__(self) -> None:
        check_bounds("", self)
        if self.marker == "":
            raise ConfigError("the step marker is empty text: name a token, 'auto', or null for no marker")
        if self.marker is None and self.marker_place != "step_end":
            raise ConfigError(f"marker_place {self.marker_place!r} needs a marker")


def check_steps(steps: Sequence[str], name: str, *, blank: bool = False) -> None:
    """Refuse a solution that cannot be scored.

    Args:
        steps: texts of its steps.
        name: the row's, for the message.
        blank: whether steps without text are allowed.

    Raises:
        DataError: no step, or one without text.
    """
    if not steps:
        raise DataError("no steps: drop the row", path=name, column="completions")
    if not blank and (empty := [k for k, step in enumerate(steps) if not step.strip()]):
        raise DataError(
            f"step {empty[0]} of {len(steps)}, from 0, has no text: drop empty steps", path=name, column="completions"
        )


def written_steps(steps: Sequence[str], separator: str = "\n", *, close_last: bool = False) -> tuple[str, ...]:
    """Step texts as they stand in a solution: the separator behind each that does not end in it or in a line break.

    A blank at a step's end separates nothing: tokenizers join it with the first word of the next step.

    Args:
        steps: texts of the steps, with or without separators.
        separator: what stands between two steps.
        close_last: whether the last step gets it too.

    Returns:
        As many texts; joined they are the solution's text.
    """
    written = [step if step.endswith((separator, "\n")) else step + separator for step in steps]
    return (*written,) if close_last else (*written[:-1], *steps[-1:])


MARKER_CANDIDATES = (
    "<extra_0>",
    " ки",
    "<|reserved_special_token_0|>",
    "<|fim_pad|>",
    "<file_sep>",
    "<unused0>",
    "<|extra_0|>",
    "~",
)
"""What ``auto`` tries, in this order: markers of published models, reserved tokens of common tokenizers, and ``~``,
which the tiny world never writes."""


def marker_token_id(tokenizer: Any, marker: str, *, what: str = "step marker") -> int:
    """Id of a marker that must be exactly one token of this tokenizer.

    The id is the one that encoding the marker gives. SentencePiece tokenizers put a lone prefix piece before some
    markers (a newline on Llama 2); a first piece that decodes to nothing is ignored.

    Args:
        tokenizer: any transformers tokenizer.
        marker: its text.
        what: what to call it in messages.

    Raises:
        ConfigError: the marker is not one token here; the message shows its pieces.
    """
    ids = list(tokenizer.encode(marker, add_special_tokens=False))
    pieces = tokenizer.convert_ids_to_tokens(ids)
    if len(ids) == 2 and not marker.startswith(" ") and not tokenizer.decode(ids[:1]).strip(" "):
        ids = ids[1:]
    if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
        return int(ids[0])
    if pieces == [tokenizer.unk_token]:
        raise ConfigError(f"{what} {marker!r} is unknown to this tokenizer: choose one that it has as a token")
    raise ConfigError(
        f"{what} {marker!r} is {len(pieces)} tokens {pieces} in this tokenizer, not one: choose one that is "
        "a single token, or add it with tokenizer.add_special_tokens and resize the embeddings"
    )


def auto_marker(tokenizer: Any) -> str:
    """The first of :data:`~stepkd.steps.format.MARKER_CANDIDATES` that is one token of this tokenizer.

    Raises:
        ConfigError: none of them is.
    """
    for marker in MARKER_CANDIDATES:
        try:
            marker_token_id(tokenizer, marker)
        except ConfigError:
            continue
        return marker
    raise ConfigError(
        f"none of the usual step markers {list(MARKER_CANDIDATES)} is a single token of this tokenizer: name one that "
        "is, best a reserved special token that never occurs in solutions"
    )
