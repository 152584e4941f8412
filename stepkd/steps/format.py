"""How a solution is written for a model that scores steps: what separates steps, and where the marker goes.

Published process reward models differ in nothing so much as in this, and get it wrong most easily.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stepkd.errors import ConfigError, check_choice

Meaning = Literal["correctness", "value", "outcome"]
"""What a score estimates: that the step is right, that the answer will be right from here on (Monte-Carlo labels), or,
at the last step only, that the whole solution is right (ORM)."""


@dataclass(frozen=True)
class StepFormat:
    """The layout of steps and markers."""

    marker: str | None = "auto"
    """Token put after each step, at which the step is scored; ``auto`` takes the first of
    :data:`MARKER_CANDIDATES` that the tokenizer has as one token; None: no marker, a step is scored at its last
    token."""
    separator: str = "\n"
    """Text between two steps, where a step does not end in white space already; empty where the steps are cuts of one
    text (AdaptiveStep) and joining them gives it back."""
    marker_place: Literal["step_end", "before_separator"] = "step_end"
    """``step_end``: behind the separator, where the step's span ends; ``before_separator``: between the step's text and
    its separator (Math-Shepherd's ``ки`` before the newline)."""
    tokenize: Literal["whole", "per_step"] = "whole"
    """``whole``: the solution once, as the policy reads it; ``per_step``: every step on its own, as models do whose
    marker is a special token between steps without a separator (Qwen2.5-Math-PRM)."""

    def __post_init__(self) -> None:
        check_choice("marker_place", self.marker_place, ("step_end", "before_separator"))
        check_choice("tokenize", self.tokenize, ("whole", "per_step"))
        if self.marker == "":
            raise ConfigError("the step marker is empty text: name a token, 'auto', or null for no marker")
        if self.marker is None and self.marker_place == "before_separator":
            raise ConfigError("marker_place 'before_separator' needs a marker")


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
