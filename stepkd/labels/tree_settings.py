"""The settings of a job that makes preference pairs by tree search."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from stepkd.errors import ConfigError, check_choice
from stepkd.labels.settings import JobSpec
from stepkd.scorers.scorer import Reduction
from stepkd.search.mcts import SearchSettings
from stepkd.search.pairs import PairSettings
from stepkd.steps import get_segmenter

ValueKind = Literal["rollout", "scorer", "self_evaluation"]


@dataclass(frozen=True, kw_only=True)
class TreePairSpec(JobSpec):
    """One job of tree-search pairs, after arXiv 2405.00451; :mod:`stepkd.search.mcts` says what differs. The paper's
    value is ``self_evaluation``, not the default."""

    problems: str
    """Problems with answers: file, folder or data settings in one word."""
    search: SearchSettings = field(default_factory=SearchSettings)
    """How trees are searched."""
    pairs: PairSettings = field(default_factory=PairSettings)
    """Which pairs a tree gives."""
    value: ValueKind = "rollout"
    """What estimates a state: the share of right answers among simulated continuations (``rollout``); what a step
    scorer says of it (``scorer``); what the policy itself, or ``judge``, answers when asked whether each step is right,
    with the reference before it (``self_evaluation``)."""
    rollouts: int = 8
    """``rollout``: continuations per state, >= 1."""
    judge: str | None = None
    """``scorer``: what scores, as :func:`stepkd.scorers.load.load_scorer` reads it. ``self_evaluation``: the model that
    is asked; None: the policy itself."""
    judge_template: str | None = None
    """``scorer``: prompt template of the scoring model, a name or a YAML file; None: its own."""
    reduction: Reduction | None = None
    """``scorer`` and ``self_evaluation``: from the scores of all steps to one; None: ``product`` where they say whether
    a step is right, ``last`` (the newest step's) where they estimate the future."""
    segmenter: str = "newline"
    """What a step is."""
    max_step_tokens: int = 128
    """Longest step in tokens, >= 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_counts("rollouts", "max_step_tokens")
        check_choice("value", self.value, get_args(ValueKind))
        if self.reduction is not None:
            check_choice("reduction", self.reduction, get_args(Reduction))
        if self.temperature == 0:
            raise ConfigError("a tree needs different steps from one state: set --temperature above 0")
        if self.model is None:
            raise ConfigError("searching trees for --problems needs --model")
        if self.value == "scorer" and self.judge is None:
            raise ConfigError("--value scorer needs the model that scores the steps: --judge MODEL (or checker)")
        if self.value == "rollout" and self.judge is not None:
            raise ConfigError("--judge goes with --value scorer or self_evaluation, not with rollout")
        if self.reduction is not None and self.value == "rollout":
            raise ConfigError("--reduction goes with --value scorer or self_evaluation, not with rollout")
        if self.judge_template is not None and self.value != "scorer":
            raise ConfigError(f"--judge-template goes with --value scorer, not with {self.value}")
        get_segmenter(self.segmenter)  # a wrong name is said before anything is loaded

    def settings(self) -> dict[str, Any]:
        """What decides the pairs beside model, data and sampling, as JSON values."""
        return {"search": dataclasses.asdict(self.search), **dataclasses.asdict(self.pairs)}
