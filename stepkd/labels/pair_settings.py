"""The settings of a Step-DPO pair job."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from stepkd.errors import ConfigError, check_choice
from stepkd.labels.settings import JobSpec
from stepkd.rollout import SamplingSpec
from stepkd.steps import get_segmenter
from stepkd.steps.labels import Neutral, check_threshold

Take = Literal["wrong", "all"]


@dataclass(frozen=True, kw_only=True)
class StepPairSpec(JobSpec):
    """One Step-DPO pair job. The sampling defaults are those of the paper (arXiv 2406.18629)."""

    rollouts: str
    """Labelled rollout rows: a file, the folder of a labelling job, or data settings in one word."""
    take: Take = "wrong"
    """``wrong``: solutions with a wrong answer; ``all``: also those with a right answer and a wrong step."""
    continuations: int = 20
    """Continuations of every correct prefix, >= 1."""
    temperature: float = 0.8
    """Temperature of the continuations; 0 is greedy, and then there is one."""
    top_p: float = 0.95
    """Nucleus of the continuations, in (0, 1]; 1 is off."""
    max_pairs: int = 1
    """Most pairs per solution, >= 1; they share the wrong step."""
    neutral: Neutral = "right"
    """What a step rated 0 is. The paper's script has ``wrong``; with ``mask`` a solution is dropped whose first wrong
    step comes behind one."""
    check_step: bool = False
    """Whether the better step must itself be right: by ``judge``, else by the tiny world's exact checker."""
    judge: str | None = None
    """Scorer of the better step, as :func:`stepkd.scorers.load.load_scorer` reads it."""
    reference: bool = False
    """Show the row's gold solution (else its answer) to the judge."""
    threshold: float = 0.5
    """A soft step label, and a step that is checked, is right from this chance or score on; in (0, 1)."""
    segmenter: str | None = None
    """What cuts continuations into steps; None: what cut the row (its ``labelling``), else ``newline``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_counts("continuations", "max_pairs")
        check_choice("--from", self.take, get_args(Take))
        check_choice("neutral", self.neutral, get_args(Neutral))
        check_threshold(self.threshold)
        if self.temperature == 0 and self.continuations > 1:
            raise ConfigError(
                f"{self.continuations} continuations at temperature 0 would all be the same: set --temperature, or "
                "--continuations 1"
            )
        if self.judge is not None and not self.check_step:
            raise ConfigError("--judge goes with --check-step: it checks the better step of every pair")
        if self.reference and self.judge is None:
            raise ConfigError("--reference goes with --judge, the model that checks steps")
        if self.segmenter is not None:
            if self.segmenter.partition(":")[0] == "reject":
                raise ConfigError("segmenter 'reject' needs a teacher's signals, which continuations do not have")
            get_segmenter(self.segmenter)

    def continuation(self, max_new_tokens: int) -> SamplingSpec:
        """How continuations are drawn."""
        return self.drawing(self.continuations, max_new_tokens)
