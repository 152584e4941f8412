"""How a language model scores steps, as settings: label tokens at a marker, or a classifier; and their JSON."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal

from stepkd.errors import ConfigError, ModelError, check_bounds, check_choice
from stepkd.steps.format import Meaning, StepFormat


class StepHeadConfig(ABC):
    """How steps are scored, by :class:`LabelTokens` or a :class:`Classifier`; recorded in checkpoints and exports."""

    kind: ClassVar[str]
    """Its name in ``step_head.json``."""
    format: StepFormat
    neutral: Literal["correct", "incorrect", "half"]
    meaning: Meaning

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """C, from worst to best: 2, or 3 with neutral in the middle."""

    def to_dict(self) -> dict[str, Any]:
        """The settings as ``step_head.json`` and checkpoints hold them; :func:`step_head_from_dict` reads them."""
        return {"kind": self.kind, **asdict(self)}  # type: ignore[call-overload]


@dataclass(frozen=True, kw_only=True)
class _Head(StepHeadConfig):
    format: StepFormat = field(default_factory=StepFormat)
    """Separators and markers of the steps."""
    neutral: Literal["correct", "incorrect", "half"] = "correct"
    """What a neutral class counts as in a score; "Let's Verify Step by Step" counts it as correct."""
    meaning: Meaning = "correctness"
    """What the scores estimate; decides how they are reduced to one number per solution."""

    def __post_init__(self) -> None:
        check_bounds("head.", self)


@dataclass(frozen=True, kw_only=True)
class LabelTokens(_Head):
    """The vocabulary head's probability of a good and a bad token at the step marker (Math-Shepherd, ASPRM)."""

    labels: tuple[str, ...] = ("-", "+")
    """Label tokens from worst to best, each one token: two, or three with neutral in the middle."""
    restricted: bool = True
    """Probabilities among the label tokens only; off, over the whole vocabulary, which training then also has to learn
    to leave (ASPRM's choice). Scores are always among the label tokens."""

    kind = "label_tokens"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "labels", tuple(self.labels))
        if len(self.labels) not in (2, 3) or len(set(self.labels)) != len(self.labels):
            raise ConfigError(f"head.labels={list(self.labels)}: two or three different tokens, from worst to best")
        if self.format.marker is None:
            raise ConfigError("label tokens are predicted at a step marker: set head.format.marker")

    @property
    def num_classes(self) -> int:
        """One per label."""
        return len(self.labels)


@dataclass(frozen=True, kw_only=True)
class Classifier(_Head):
    """A small head on the hidden state, in place of the vocabulary (Qwen2.5-Math-PRM)."""

    classes: int = 2
    """Outputs: 2 (incorrect, correct) or 3 (incorrect, neutral, correct)."""
    layers: int = 2
    """Layers: 2, or 1 as transformers' token classification models have (TRL's PRMTrainer)."""

    kind = "classifier"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds("head.", self, classes="[2, 3]", layers="[1, 2]")

    @property
    def num_classes(self) -> int:
        """One per output."""
        return self.classes


_KINDS: dict[str, type[LabelTokens] | type[Classifier]] = {each.kind: each for each in (LabelTokens, Classifier)}


def step_head_from_dict(values: Mapping[str, Any]) -> StepHeadConfig:
    """Inverse of :meth:`StepHeadConfig.to_dict`. Files of 0.1 hold the settings of all kinds, of which those of others
    are left, and other words for ``neutral``.

    Raises:
        ConfigError: an unknown kind, or settings that cannot be.
        ModelError: unknown keys (from a newer version).
    """
    older = {"right": "correct", "wrong": "incorrect"}
    values = {name: older.get(value, value) if name == "neutral" else value for name, value in values.items()}
    layout = dict(values.get("format", {}))
    check_choice("head.kind", kind := values.get("kind", LabelTokens.kind), _KINDS)
    own = {each.name for each in fields(_KINDS[kind])}
    known = {"kind"}.union(*({each.name for each in fields(member)} for member in _KINDS.values()))
    if unknown := set(values) - known | set(layout) - {each.name for each in fields(StepFormat)}:
        raise ModelError(f"unknown step head settings {sorted(unknown)}: was this written by a newer stepkd?")
    return _KINDS[kind](**{name: values[name] for name in own & set(values)} | {"format": StepFormat(**layout)})
