"""A policy that was trained on outcomes, and its reference, as a process reward model (Yuan et al. 2024, arXiv
2412.01981; PRIME, arXiv 2502.01456).

Where a reward of whole solutions is learnt as ``beta log pi(y | x) / ref(y | x)``, as KTO, DPO and the paper's
cross-entropy do, the same sum over the tokens up to the end of step t is a value q_t of what has been written, and the
step's reward is ``r_t = q_t - q_{t-1}``: the sum over the step's own tokens. The score is ``sigma(q_t)`` or
``sigma(r_t)``, which keeps the order. Cross-entropy training makes ``sigma`` of the sum over a whole solution and its
end token the chance that its answer is correct; here the end token belongs to no step, as whether a solution goes on
cannot be told of a part of one, so that what the policy learnt at it alone is missing from the last score.

Axes: T tokens of a solution, S its scored steps.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stepkd.data.completion import Completion
from stepkd.data.step_encode import StepEncoder
from stepkd.data.templates import PromptTemplate
from stepkd.errors import ConfigError, ModelError
from stepkd.models.checkpoint import load_policy, load_trained, reference_fingerprint
from stepkd.models.policy import Policy
from stepkd.models.source import find_checkpoint
from stepkd.models.spec import PolicyConfig, spec_from_dict
from stepkd.runs.rundir import read_checkpoint
from stepkd.sampling.annotate import check_same_vocabulary
from stepkd.sampling.transformers_engine import TransformersEngine
from stepkd.scorers.prm import NO_LIMIT, Item, SolutionScorer
from stepkd.steps.format import StepFormat

logger = logging.getLogger(__name__)


class WrittenSteps(StepEncoder):
    """Steps as a policy writes them: no markers, and no separator behind the last one."""

    _closes_last = False


class ImplicitPRM(SolutionScorer):
    """Scores steps by how much likelier the policy finds them than its reference.

    Both models read 8,192 tokens a pass, whatever ``max_rows`` is, and the prompt again with every solution.

    Args:
        policy: the trained model, with its reference (:meth:`~stepkd.models.policy.Policy.set_reference`, or an adapter
            to switch off).
        template: prompt template that it was trained with.
        beta: factor of the log-ratios, > 0.
        cumulative: ``sigma(q_t)``, an estimate of future success (meaning ``value``); off, ``sigma(r_t)``, at least 0.5
            where the step is no less likely than under the reference (meaning ``correctness``).
        **reading: settings of :class:`~stepkd.scorers.prm.PolicyScorer`.

    Raises:
        ConfigError: a number out of range.
        ModelError: the reference has another vocabulary.
    """

    def __init__(
        self, policy: Policy, *, template: str | PromptTemplate, beta: float, cumulative: bool = True, **reading: Any
    ) -> None:
        super().__init__(policy, template, **reading)
        if not 0 < beta < float("inf"):
            raise ConfigError(f"scorer.beta={beta}: must be positive")
        with policy.reference() as frozen:
            check_same_vocabulary(policy.tokenizer, frozen.tokenizer, "reference")
            self.max_length = min(self.max_length, frozen.max_length or self.max_length)
        self.beta, self.cumulative = beta, cumulative
        self.meaning = "value" if cumulative else "correctness"
        plain = StepFormat(marker=None)
        self.encoder = WrittenSteps(policy.tokenizer, self.template, format=plain, marker_id=None, max_length=NO_LIMIT)

    def provenance(self) -> dict[str, Any]:
        """See :class:`~stepkd.scorers.scorer.StepScorer`."""
        found = {"scorer": "implicit", "beta": self.beta, "cumulative": self.cumulative}
        return found | {"reference": reference_fingerprint(self.policy)} | super().provenance()

    def _score_items(self, items: Sequence[Item]) -> list[list[float]]:
        asked = [item for item in items if item.places]
        rows = [Completion(np.array(item.head), np.array(item.ids), id=item.name) for item in asked]
        own = TransformersEngine(self.policy).score(rows)
        with self.policy.reference() as frozen:
            theirs = TransformersEngine(frozen).score(rows)
        for item, policy, reference in zip(asked, own, theirs, strict=True):
            q_T = self.beta * np.cumsum(policy.logps_T - reference.logps_T)
            q_S = q_T[[at for _, at in item.places]]
            values_S = torch.from_numpy(q_S if self.cumulative else np.diff(q_S, prepend=0.0)).sigmoid()
            for (step, _), score in zip(item.places, self._scores(values_S, [item.name] * len(q_S)), strict=True):
                item.scores[step] = score
        return [item.scores for item in items]


def load_implicit(
    path: str, reference: str | None = None, beta: float | None = None, **how: Any
) -> tuple[Policy, float]:
    """Load a policy with its reference.

    Args:
        path: a run of KTO, DPO or ImplicitPRM, its checkpoint, or a model that one of them exported.
        reference: the frozen model; None: the run's own.
        beta: None: the run's own.
        **how: ``dtype`` and ``attention``, as for :func:`~stepkd.models.checkpoint.load_trained`.

    Returns:
        The policy, which has its reference, and beta.

    Raises:
        ConfigError: ``path`` is no run, or one of another method, and does not say what is not given; or one that
            learnt the mean of log-ratios, not their sum.
        ModelError: a model that cannot be loaded, or a reference that is not what the run was trained against.
    """
    found = find_checkpoint(Path(path).expanduser())
    run = {} if found is None else read_checkpoint(found)["stepkd"]
    settings, then = run.get("settings", {}), run.get("frozen", {}).get("reference")
    beta = settings.get("beta") if beta is None else beta
    if beta is None or (reference is None and then is None):
        raise ConfigError(
            f"{path} is no run of KTO, DPO or ImplicitPRM, which record beta and the reference that they were trained "
            "against: give scorer.beta and scorer.reference"
        )
    if settings.get("length_normalised"):
        raise ConfigError(
            f"{path} was trained with length_normalised: true: it learnt the mean log-ratio of a solution, of which "
            "sums over steps are no parts; train with length_normalised: false"
        )
    start = spec_from_dict(run["policy"]) if run else PolicyConfig(path, dtype=None)
    same_dtype = how.get("dtype") in (None, start.dtype)
    as_trained = same_dtype and reference in (None, settings.get("reference.path"))
    if then is not None and reference is None and not same_dtype:
        logger.warning(
            "scorer.dtype=%s is not that of the training: whether the reference of %s is still the one that it was "
            "trained against is not checked",
            *(how["dtype"], path),
        )
    how |= {"dtype": how.get("dtype") or start.dtype}
    policy, reference = load_trained(path, **how), reference or settings.get("reference.path")
    if reference is not None:
        policy.set_reference(load_trained(reference, **how))
    elif start.lora is None:  # else it is the policy without its adapter
        own = {name: value for name, value in how.items() if value is not None}
        policy.set_reference(load_policy(replace(start, gradient_checkpointing=False, **own)))
    if as_trained and then != (now := reference_fingerprint(policy)):
        raise ModelError(
            f"the reference of {path} is another model now than when it was trained (weights {then} then, {now} now): "
            "put the old one back, or name it (scorer.reference)"
        )
    return policy, float(beta)
