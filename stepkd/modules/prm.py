"""Process reward models: a language model that scores every step of a solution.

Two heads (:class:`~stepkd.models.spec.StepHeadConfig`): label tokens at a step marker, as in Math-Shepherd
(arXiv 2312.08935) and ASPRM (arXiv 2502.13943), or a small classifier, as in Qwen2.5-Math-PRM (arXiv 2501.07301). With
``data.labels.scope: outcome`` and ``head.meaning: outcome`` it is an outcome reward model, the baseline, trained at
every token as in Cobbe et al. 2021 (arXiv 2110.14168) and "Let's Verify Step by Step" (arXiv 2305.20050), and read at
the last.

Axes: L labelled steps, C classes from worst to best, N targets.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from stepkd.data.batching import StepBatch
from stepkd.data.collate import Batch
from stepkd.data.completion import Completion
from stepkd.data.datamodule import StepData
from stepkd.data.encode import LabelRule
from stepkd.data.step_encode import StepEncoder
from stepkd.errors import ConfigError, check_bounds
from stepkd.losses import (
    LossTerms,
    cross_entropy,
    likeliest,
    log_odds,
    multilevel_ranking,
    pqm,
    step_cross_entropy,
    step_decision_counts,
    step_decisions,
    step_regression,
    step_weights,
)
from stepkd.models.policy import Policy
from stepkd.models.spec import LabelTokens, PolicyConfig, StepHeadConfig
from stepkd.models.step_head import StepHeadIds, resolve_ids
from stepkd.modules.base import StepModule
from stepkd.modules.components import ForwardPass, StepLoss
from stepkd.modules.policy_module import telling
from stepkd.modules.prm_teachers import FittedLoss, StepDistillation

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepCrossEntropy(StepLoss):
    """Cross-entropy on step labels, hard or soft; see :func:`stepkd.losses.step_cross_entropy`."""

    class_weights: list[float] | None = None
    """Weight of each class, worst first, > 0, for data where one class is rare; null weighs all steps alike."""

    names = ("prm",)

    def __post_init__(self) -> None:
        if self.class_weights is not None and not all(0 < weight < float("inf") for weight in self.class_weights):
            raise ConfigError(f"class_weights={self.class_weights}: positive numbers, one per class, worst first")

    def check(self, head: StepHeadConfig) -> None:
        """A weight for each class."""
        if self.class_weights is not None and len(self.class_weights) != head.num_classes:
            raise ConfigError(f"class_weights={self.class_weights}: {head.num_classes} positive numbers, worst first")

    def count(self, batch: Batch) -> dict[str, float]:
        """Labelled steps, or the sum of their weights."""
        return {"prm": float(step_weights(batch.targets_LC, self.class_weights).sum())}

    def terms(self, forward: ForwardPass) -> LossTerms:
        """Cross-entropy of the labelled steps, with accuracies by class."""
        targets_LC = forward.batch.targets_LC.to(forward.step_logps_LC)
        return step_cross_entropy(forward.step_logps_LC, targets_LC, class_weights=self.class_weights)


@dataclass(frozen=True, kw_only=True)
class StepRegression(StepLoss):
    """Regression of step scores on step values; see :func:`stepkd.losses.step_regression`.

    Of three classes it trains incorrect against both others: ``accuracy``, which tells three apart, is of no use then.
    """

    form: Literal["mse", "bce"] = "mse"
    """Squared error (Cobbe et al. 2021; Qwen2.5-Math-PRM on soft labels), the default, or binary cross-entropy, which
    for two classes among themselves is StepCrossEntropy."""

    names = ("value",)

    def __post_init__(self) -> None:
        check_bounds("losses.", self)

    def check(self, head: StepHeadConfig) -> None:
        """A score that the loss trains."""
        _check_two_sided(self, head)

    def count(self, batch: Batch) -> dict[str, float]:
        """Labelled steps."""
        return {"value": float(len(batch.targets_LC))}

    def terms(self, forward: ForwardPass) -> LossTerms:
        """Errors of the labelled steps, with the metrics of cross-entropy."""
        logps_LC = forward.step_logps_LC
        return step_regression(logps_LC, forward.batch.targets_LC.to(logps_LC), form=self.form)


def _check_two_sided(loss: StepLoss, head: StepHeadConfig) -> None:
    """Refuse a score of three classes that a loss of two sides (the worst class, or not) leaves as it is."""
    if head.num_classes == 3 and head.neutral != "correct":
        raise ConfigError(
            f"losses: {type(loss).__name__} trains whether a step is incorrect, and head.neutral={head.neutral!r} "
            "reads neutral and correct apart: set head.neutral: correct, take two classes, or StepDecisions"
        )


@dataclass(frozen=True)
class StepDecisions(StepLoss):
    """Ratings -1, 0 and 1 as two decisions in turn, incorrect or not and neutral or not, after Ord2Seq (arXiv
    2307.09004); see :func:`stepkd.losses.step_decisions`. It needs a head of three classes."""

    names = ("ordinal_incorrect", "ordinal_neutral")

    def check(self, head: StepHeadConfig) -> None:
        """Three classes."""
        if head.num_classes != 3:
            raise ConfigError(
                "losses: StepDecisions tells incorrect, neutral and correct apart, and the head has "
                f"{head.num_classes} classes: set head.classes: 3 (Classifier) or three head.labels (LabelTokens)"
            )

    def count(self, batch: Batch) -> dict[str, float]:
        """Labelled steps, and those of them that are not incorrect."""
        return step_decision_counts(batch.targets_LC)

    def terms(self, forward: ForwardPass) -> LossTerms:
        """Cross-entropy of each decision, with the metrics of cross-entropy."""
        return step_decisions(forward.step_logps_LC, forward.batch.targets_LC.to(forward.step_logps_LC))


@dataclass(frozen=True)
class LanguageModelling(StepLoss):
    """Next-token cross-entropy on the correct steps' own tokens.

    The verifiers of Cobbe et al. 2021 (arXiv 2110.14168) are trained with this and their labels' loss; leaving out the
    steps that are not labelled correct is ours. It helps a model that cannot do the task yet. Beside a ``Classifier``
    it reads the vocabulary head as it is: that is not trained, unless it is tied to the embeddings.
    """

    names = ("lm",)
    reads_head = False

    def bound(self, policy: Policy) -> LanguageModelling:
        """One that leaves out the markers, which are no text of a step."""
        marker = policy.require_step_head().ids.marker
        return self if marker is None else _WithoutMarkers(marker)

    def count(self, batch: Batch) -> dict[str, float]:
        """Tokens of correct steps."""
        return {"lm": float(self._own(batch).sum())}

    def terms(self, forward: ForwardPass) -> LossTerms:
        """``lm``: their summed negative log-likelihood (nats)."""
        batch, own_N = forward.batch, self._own(forward.batch)
        hidden = forward.hidden_at(batch.needed_N[own_N])
        found = cross_entropy(forward.head, hidden, batch.targets_N[own_N], chunk_size=forward.chunk_size)
        return LossTerms({"lm": found.sums["ce"]})

    def _own(self, batch: Batch) -> Tensor:
        return batch.correct_N


@dataclass(frozen=True)
class _WithoutMarkers(LanguageModelling):
    marker: int

    def _own(self, batch: Batch) -> Tensor:
        return batch.correct_N & (batch.targets_N != self.marker)


@dataclass(frozen=True)
class PQM(StepLoss):
    """PQM's ranking of steps (arXiv 2410.11287): correct ones rise with their number and stand above incorrect ones.

    The paper's score is the output of a value head; here it is the head's log-odds that the step is not of the worst
    class, so that scores mean what they mean after cross-entropy (INFERRED). A soft label of at least 0.5 is correct,
    and so is a neutral one.
    """

    margin: float = 4.0
    """How far incorrect steps are to stand below correct ones, in log-odds, >= 0 (the paper's zeta; its code has 4)."""

    names = ("pqm",)
    compares_steps = True

    def __post_init__(self) -> None:
        check_bounds("losses.", self, margin="[0, inf)")

    def check(self, head: StepHeadConfig) -> None:
        """A score that the loss trains."""
        _check_two_sided(self, head)

    def count(self, batch: Batch) -> dict[str, float]:
        """Solutions with a labelled step."""
        return {"pqm": float(batch.completion_L.unique().numel())}

    def terms(self, forward: ForwardPass) -> LossTerms:
        """See :func:`stepkd.losses.pqm`."""
        scores_L, batch = log_odds(forward.step_logps_LC), forward.batch
        return pqm(scores_L, batch.correct_L, batch.completion_L, batch.num_completions, margin=self.margin)


@dataclass(frozen=True, kw_only=True)
class MultilevelRanking(StepLoss):
    """QuantiDCE's ranking of levels (arXiv 2106.00507) within a solution: steps of one label have scores near their
    mean, and the means of the labels lie apart, the better label's above.

    A level is a class of the labels, soft ones by the likelier; a score is the mean class, from 0 (worst) to 1 (best).
    It goes beside another loss: see :func:`stepkd.losses.multilevel_ranking`.
    """

    lower: float = 0.3
    """Least distance of the mean scores of adjacent levels, in [0, 1]; the authors' value."""
    upper: float = 0.1
    """Greatest mean distance of a level's scores from their mean, in [0, 1]; the authors' value."""

    names = ("ranking",)
    reads_head = False
    compares_steps = True

    def __post_init__(self) -> None:
        check_bounds("losses.", self, lower="[0, 1]", upper="[0, 1]")

    def count(self, batch: Batch) -> dict[str, float]:
        """Solutions with a labelled step."""
        return {"ranking": float(batch.completion_L.unique().numel())}

    def terms(self, forward: ForwardPass) -> LossTerms:
        """See :func:`stepkd.losses.multilevel_ranking`."""
        probs_LC, batch = forward.step_logps_LC.softmax(-1), forward.batch
        classes = probs_LC.shape[-1]
        scores_L = probs_LC @ torch.linspace(0, 1, classes, dtype=probs_LC.dtype, device=probs_LC.device)
        return multilevel_ranking(
            scores_L,
            likeliest(batch.targets_LC),
            batch.completion_L,
            batch.num_completions,
            num_levels=classes,
            lower=self.lower,
            upper=self.upper,
        )


_TOKENS = LabelTokens()


class PRMModule(StepModule):
    """A reward model of steps.

    Args:
        policy: the model to train; LoRA or all weights.
        head: how it scores steps.
        losses: what it learns by, added up with ``loss_weights``: ``StepCrossEntropy`` (``prm``; null is this alone),
            ``StepRegression`` (``value``), ``StepDecisions`` (``ordinal_incorrect``, ``ordinal_neutral``), ``PQM``
            (``pqm``), ``StepDistillation`` (``step_kd``), and beside any of them ``MultilevelRanking`` (``ranking``),
            ``LanguageModelling`` (``lm``) and ``MCMI`` (``mcmi``).
        every_token: an outcome reward model (``head.meaning: outcome``) learns the outcome at every token of a solution
            (Cobbe et al. 2021, "Let's Verify Step by Step"); false: at the last one alone, which is what scoring and
            validation read. Of a process reward model, and of one that reads the prompt alone, it says nothing.
        **settings: ``optimizer``, ``validation`` and what else :class:`~stepkd.modules.base.StepModule` takes.
    """

    scores_steps = True
    default_template = "math"
    labels_give_accuracy = True

    def __init__(
        self,
        policy: PolicyConfig,
        head: StepHeadConfig = _TOKENS,
        losses: list[StepLoss] | None = None,
        every_token: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__(policy, **settings)
        self.head_spec = head
        self.every_token = every_token and head.meaning == "outcome" and head.format.marker_place != "prompt_end"
        losses = [StepCrossEntropy()] if losses is None else losses
        if not any(loss.reads_head for loss in losses):
            given = ", ".join(type(loss).__name__ for loss in losses)
            raise ConfigError(
                f"losses: [{given}] do not train the step head by themselves: add StepCrossEntropy, StepRegression, "
                "StepDecisions, PQM or StepDistillation, or leave losses out, which is StepCrossEntropy alone"
            )
        if head.meaning == "outcome" and (comparing := [type(loss).__name__ for loss in losses if loss.compares_steps]):
            raise ConfigError(
                f"losses: {comparing[0]} compares the steps of a solution, and an outcome reward model (head.meaning: "
                "outcome) has one label for all of it: take StepCrossEntropy or StepRegression"
            )
        language = any(isinstance(loss, LanguageModelling) for loss in losses)
        if self.every_token and language and isinstance(head, LabelTokens):
            raise ConfigError(
                "losses: at every token LanguageModelling asks for the text's next token where the outcome asks for "
                f"one of head.labels={list(head.labels)}: take head Classifier, or every_token: false"
            )
        if "mcmi" not in self.loss_weights and any("mcmi" in loss.names for loss in losses):
            raise ConfigError(
                "losses: MCMI with weight 1 pushes steps that are not sure away from their labels: set a small "
                "one, loss_weights: {mcmi: 0.1}"
            )
        linear = (StepCrossEntropy, StepDistillation, LanguageModelling)
        if head.members > 1 and (others := [type(loss).__name__ for loss in losses if not isinstance(loss, linear)]):
            raise ConfigError(
                f"losses: {others[0]} would train the mean of head.members={head.members} and leave them no reason to "
                "differ: take StepCrossEntropy or StepDistillation, which train each by itself, or head.members: 1"
            )
        self.components = self.losses = losses
        if self.validation_spec.sampling is not None:
            raise ConfigError("validation.sampling: a reward model scores steps and is not sampled from; use null")
        for loss in losses:
            loss.check(head)

    @cached_property
    @telling
    def _step_head_ids(self) -> StepHeadIds:
        """Marker and label ids in the policy's tokenizer; available before the weights are loaded."""
        return resolve_ids(self.head_spec, self.tokenizer)

    def make_encoder(self, data: StepData) -> StepEncoder:
        """The method learns from solutions with step labels, or with an outcome."""
        labels, meaning = data.labels or LabelRule(), self.head_spec.meaning
        if (labels.scope == "outcome") != (meaning == "outcome"):
            raise ConfigError(
                f"data.labels.scope is {labels.scope!r} and model.head.meaning is {meaning!r}: an outcome reward model "
                "sets both to 'outcome', a process reward model neither"
            )
        if meaning == "value" and labels.after_error != "keep":
            logger.warning(
                "labels of future success (head.meaning: value) are cut off after the first incorrect step "
                "(labels.after_error): the last step, which scores are reduced by, is then learnt from nearly "
                "correct solutions only; keep them, or reduce by the minimum"
            )
        return StepEncoder(
            self.tokenizer,
            data.template,
            format=self.head_spec.format,
            marker_id=self._step_head_ids.marker,
            max_length=data.max_length,
            num_classes=self.head_spec.num_classes,
            labels=labels,
            segmenter=data.segmenter,
        )

    def complete_model(self) -> None:
        """Put the step head on the policy."""
        self.model.attach_step_head(self.head_spec, seed=self.policy_spec.init_seed)
        self.components = [loss.bound(self.model) for loss in self.losses]
        self._fitted_losses = [loss for loss in self.components if isinstance(loss, FittedLoss)]
        for loss in self._fitted_losses:
            self.frozen |= loss.frozen

    def begin(self) -> None:
        """Losses read the training data, where they have to."""
        for loss in self._fitted_losses:
            loss.begin(self)

    def method_state(self) -> dict[str, Any]:
        """What losses are fitted to."""
        return {loss.names[0]: dict(loss.fitted) for loss in self._fitted_losses}

    def adopt_method_state(self, state: dict[str, Any]) -> None:
        """Take it back."""
        for loss in self._fitted_losses:
            loss.fitted.update(state.get(loss.names[0], {}))

    def prepare_examples(self, examples: Iterable[Completion]) -> list[Batch]:
        """See :meth:`StepModule.prepare_examples`; in training with ``every_token``, labels at every token."""
        batches = super().prepare_examples(examples)
        return [batch.at_every_token() for batch in batches] if self.every_token and self.training else batches

    def predict_step(self, batch: StepBatch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """A reward model samples nothing."""
        raise ConfigError("stepkd predict samples completions, and this is a reward model: use stepkd score")

    def next_commands(self, run: str) -> list[str]:
        """A reward model is judged and used, not sampled from."""
        return [
            f"judge:  stepkd evaluate-prm --scorer {run} {self._evaluation(steps=True)} --out ...",
            f"score:  stepkd score --scorer {run} --completions ... --out ...",
            f"report: stepkd report {run} ...",
            f"export: stepkd export {run} --to ...",
        ]
