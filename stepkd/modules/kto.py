"""KTO (arXiv 2402.01306) and Step-KTO (arXiv 2501.10799): learning from correct and incorrect, of answers and of steps;
and ImplicitPRM's cross-entropy (arXiv 2412.01981), which learns a reward of both from answers.

Axes: N completion tokens, R completions, S steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from stepkd.data.batching import StepBatch, mismatched
from stepkd.data.collate import Batch
from stepkd.data.completion import Completion
from stepkd.data.datamodule import StepData
from stepkd.data.feedback import FeedbackEncoder, feedback_counts
from stepkd.errors import ConfigError, check_bounds, check_choice
from stepkd.losses import (
    LossTerms,
    kto,
    outcome_cross_entropy,
    ratio_rule,
    reference_point,
    segment_sum,
    step_kto,
    step_kto_counts,
)
from stepkd.losses.kto import DEFAULT_REDUCTION, ClassWeights, Reduction
from stepkd.models.spec import PolicyConfig
from stepkd.modules.components import Component, ForwardPass
from stepkd.modules.distributed import all_reduce, union
from stepkd.modules.preference import PreferenceModule, ReferenceConfig

OutcomePoint = Literal["mismatch", "batch", "zero"]
StepPoint = Literal["mismatch", "batch", "per_index", "zero"]
KINDS: tuple[Literal["outcomes", "steps"], ...] = ("outcomes", "steps")
EVEN = (1.0, 1.0)
"""Class weights of a validation without training before it."""
DECAY = 0.9
"""Of the running averages of ``per_index``, by optimiser step."""


@dataclass(frozen=True)
class ReferencePointConfig:
    """How the points are estimated that values are measured from."""

    outcome: OutcomePoint = "mismatch"
    """Of completions. ``mismatch``: mean log-ratio of prompts with the completions of other prompts (KTO);
    ``batch``: of the batch's own completions, which is biased by its mix of labels; ``zero``: none (APO-zero)."""
    step: StepPoint = "mismatch"
    """Of steps. ``mismatch``: mean over the steps of the mismatched completions; ``per_index``: the same for each step
    number, as a running average; ``batch`` and ``zero`` as above."""
    rotation: Literal["global", "device"] = "global"
    """``global``: completions are exchanged within the whole batch, always between different prompts; ``device``:
    within a rank's share, by one place, and the ranks' means are averaged (TRL's way)."""

    def __post_init__(self) -> None:
        check_bounds("reference_point.", self)

    @property
    def reads(self) -> set[str]:
        """Whose log-ratios are needed before the first backward pass: ``mismatch``, ``batch``."""
        kinds: set[str] = {"mismatch" if kind == "per_index" else kind for kind in (self.outcome, self.step)}
        return kinds - {"zero"}


@dataclass(frozen=True)
class Points:
    """The points of one optimiser step."""

    z0: float = 0.0
    """Of completions, >= 0."""
    z0_step: float = 0.0
    """Of steps, >= 0."""
    by_index: tuple[float, ...] = ()
    """Of steps by their number, where that is asked for; later steps have ``z0_step``."""

    def of_steps(self, completion_S: Tensor, like: Tensor) -> float | Tensor:
        """Point of every step, for :func:`stepkd.losses.step_kto`.

        Args:
            completion_S: completion of every step, in order.
            like: a tensor of the dtype that points are wanted in, and on their device.

        Returns:
            ``z0_step`` for all, or (S,) points by the step's number in its completion.
        """
        if not self.by_index:
            return self.z0_step
        starts_S = torch.searchsorted(completion_S, completion_S)  # first step of the same completion
        index_S = torch.arange(len(completion_S), device=completion_S.device) - starts_S
        table = torch.tensor([*self.by_index, self.z0_step], dtype=torch.float64, device=completion_S.device)
        return table[index_S.clamp(max=len(self.by_index))].to(like)


class _PointEstimator:
    """Keeps the running averages and turns log-ratios into points.

    Args:
        spec: how.
    """

    def __init__(self, spec: ReferencePointConfig) -> None:
        self.spec = spec
        self.averages: list[float] = []

    def __call__(
        self, items: Mapping[str, Sequence[tuple[Completion, Tensor]]], device: torch.device, *, update: bool = True
    ) -> Points:
        """Points of a batch; every rank calls this.

        Args:
            items: this rank's completions with their token log-ratios, of each kind that the spec reads.
            device: of the collective.
            update: whether running averages move (in training) or are only read.
        """
        step = "mismatch" if self.spec.step == "per_index" else self.spec.step
        rows = [
            [float(ratios_N.double().cpu()[start:end].sum()) for start, end in completion.spans]
            for completion, ratios_N in items.get(step, ())
        ]
        outcomes = [float(ratios_N.double().sum()) for _, ratios_N in items.get(self.spec.outcome, ())]
        z0, z0_step = self._point(outcomes, device), self._point([value for row in rows for value in row], device)
        return Points(z0, z0_step, self._by_index(rows, device, update) if self.spec.step == "per_index" else ())

    def _point(self, values: Sequence[float], device: torch.device) -> float:
        divisor = len(values) if self.spec.rotation == "device" and values else 1
        total = all_reduce({"sum": sum(values) / divisor, "count": len(values) / divisor}, device)
        return reference_point(total["sum"], total["count"])

    def _by_index(self, rows: Sequence[Sequence[float]], device: torch.device, update: bool) -> tuple[float, ...]:
        """Clamped points by step number, after this batch has moved the running averages."""
        longest = len(union(str(i) for row in rows for i in range(len(row))))
        columns = [[row[i] for row in rows if len(row) > i] for i in range(longest)]
        sums = all_reduce({str(i): sum(column) for i, column in enumerate(columns)}, device)
        counts = all_reduce({str(i): len(column) for i, column in enumerate(columns)}, device)
        means, old = [sums[i] / counts[i] for i in sums], self.averages
        moved = [then + (1 - DECAY) * (mean - then) for then, mean in zip(old, means, strict=False)]
        averages = [*moved, *old[longest:], *means[len(old) :]]
        if update:
            self.averages = averages
        return tuple(max(0.0, value) for value in averages)


GivenWeights = list[float] | Literal["ratio"]
"""Weights of correct and of incorrect ones, or ``ratio``: both classes get the same total, counted over the data."""


class ValueTerms(Component):
    """KTO's value term of whole completions and, for Step-KTO, one of the same form for every step.

    Args:
        beta: > 0.
        class_weights: (lambda_D, lambda_U) of correct and incorrect ones, or the ratio rule.
        reduction: of steps, see :func:`stepkd.losses.step_kto`; None: whole completions alone.
    """

    def __init__(self, beta: float, class_weights: GivenWeights, reduction: Reduction | None = None) -> None:
        if not 0 < beta < float("inf"):
            raise ConfigError(f"beta={beta}: must be positive")
        self.beta, self.reduction = beta, reduction
        self.names = ("outcome",) if reduction is None else ("outcome", "step")
        self.learns: tuple[Literal["outcomes", "steps"], ...] = ("outcomes",) if reduction is None else KINDS
        """What it needs labels of."""
        self.weights: dict[str, ClassWeights] = {}
        """Of each kind that it learns from; empty until the ratio rule has counted the data."""
        self.counts_data = class_weights == "ratio"
        """Whether the weights are the ratio rule's."""
        if class_weights != "ratio":
            if len(class_weights) != 2 or not all(0 < weight < float("inf") for weight in class_weights):
                raise ConfigError(
                    f"class_weights={class_weights!r}: two positive numbers, of correct and incorrect ones, or 'ratio'"
                )
            self.weights = dict.fromkeys(self.learns, (float(class_weights[0]), float(class_weights[1])))
        self.points = Points()
        """Those of the optimiser step that is being taken."""

    def count(self, batch: Batch) -> dict[str, float]:
        """Completions with an outcome, and completions with a labelled step."""
        counts = step_kto_counts(batch.label_S, batch.completion_S, batch.outcome_R)
        return {name: counts[name] for name in self.names}

    def terms(self, forward: ForwardPass) -> LossTerms:
        """See :func:`stepkd.losses.kto` and :func:`stepkd.losses.step_kto`."""
        batch, ratios_N, points = forward.batch, forward.logratios_N, self.points
        weights = self.weights.get("outcomes", EVEN)
        if self.reduction is None:
            ratios_R = segment_sum(ratios_N, batch.completion_N, batch.num_completions)
            terms = kto(ratios_R, batch.outcome_R, z0=points.z0, beta=self.beta, weights=weights)
            terms.metrics["z0"] = _one_value(points.z0)
            return terms
        terms = step_kto(
            segment_sum(ratios_N, batch.step_N, len(batch.completion_S)),
            batch.label_S,
            batch.completion_S,
            batch.outcome_R,
            z0=points.z0,
            z0_step=points.of_steps(batch.completion_S, ratios_N),
            beta=self.beta,
            reduction=self.reduction,
            weights=weights,
            step_weights=self.weights.get("steps", EVEN),
        )
        terms.metrics |= {"z0": _one_value(points.z0), "z0_step": _one_value(points.z0_step)}
        return terms


class OutcomeCrossEntropy(ValueTerms):
    """Cross-entropy of completions' outcomes; see :func:`stepkd.losses.outcome_cross_entropy`."""

    def terms(self, forward: ForwardPass) -> LossTerms:
        """``outcome`` alone."""
        batch = forward.batch
        ratios_R = segment_sum(forward.logratios_N, batch.completion_N, batch.num_completions)
        return outcome_cross_entropy(ratios_R, batch.outcome_R, beta=self.beta)


class KTOModule(PreferenceModule):
    """KTO on whole completions, each of them correct or incorrect, measured from a reference point.

    Args:
        policy: the model to train; LoRA or all weights.
        reference: the frozen model.
        beta: > 0.
        class_weights: (lambda_D, lambda_U) of correct and incorrect completions; ``ratio`` gives both classes the same
            total, counted over the training data.
        reference_point: how z0 is estimated.
        **settings: ``optimizer``, ``validation`` and what else :class:`~stepkd.modules.base.StepModule` takes.
    """

    def __init__(
        self,
        policy: PolicyConfig,
        reference: ReferenceConfig | None = None,
        beta: float = 0.1,
        class_weights: list[float] | Literal["ratio"] = "ratio",
        reference_point: ReferencePointConfig | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(policy, reference, **settings)
        self.point_spec = reference_point or ReferencePointConfig()
        self.prepares_with_model |= bool(self.point_spec.reads)
        self._estimator = _PointEstimator(self.point_spec)
        self.values = ValueTerms(beta, class_weights)
        """The component that the points and class weights are for."""
        self.components = (self.values,)

    def make_encoder(self, data: StepData) -> FeedbackEncoder:
        """The method learns from completions with an outcome, or with labelled steps."""
        return FeedbackEncoder(
            self.tokenizer,
            data.template,
            data.segmenter,
            max_length=data.max_length,
            labels=data.labels,
            learns=self.values.learns,
        )

    def begin(self) -> None:
        """Class weights by the ratio rule, which reads the training data."""
        if self.values.counts_data:
            if not isinstance(self.datamodule, StepData):
                raise ConfigError("class weights by the ratio rule need the data's counts: use StepData, or give them")
            n = feedback_counts(self.datamodule.examples["train"])
            for kind in self.values.learns:
                self.values.weights[kind] = ratio_rule(n[f"correct_{kind}"], n[f"incorrect_{kind}"])

    def mismatches(self, batch: StepBatch) -> list[Completion]:
        """This rank's prompts with the completions of other prompts; one that exceeds the context is left out."""
        if "mismatch" not in self.point_spec.reads:
            return []
        partners = mismatched([tuple(peer.prompt_ids) for peer in batch.peers])
        if self.point_spec.rotation == "device":
            order = sorted(batch.places)
            for k, place in enumerate(order):
                partners[place] = order[k - 1]
        pairs = [(batch.peers[place], partners[place]) for place in batch.places]
        found = [replace(batch.peers[other], prompt_ids=own.prompt_ids) for own, other in pairs if other is not None]
        return [each for each in found if self.model.max_length is None or each.length <= self.model.max_length]

    def prepare(self, batch: StepBatch) -> Iterator[list[Batch]]:
        """The batch's completions with their reference log-probabilities, once the reference points are known."""
        own, others = [each for example in batch.examples for each in example.completions], self.mismatches(batch)
        self.know_reference([*own, *others])
        kinds = {"mismatch": others, "batch": own if "batch" in self.point_spec.reads else []}
        with self.phases.phase("reference points"):
            items = {kind: list(zip(each, self.frozen_logratios(each), strict=True)) for kind, each in kinds.items()}
            self.values.points = self._estimator(items, self.device, update=self.trainer.training)
        yield from super().prepare(batch)

    def method_state(self) -> dict[str, Any]:
        """The running averages of the reference points."""
        return {"point_averages": list(self._estimator.averages)}

    def restore_method_state(self, state: dict[str, Any]) -> None:
        """Take back :meth:`method_state`."""
        self._estimator.averages = list(state.get("point_averages", []))

    def derived_metrics(self, values: dict[str, float]) -> dict[str, float]:
        """With margins: mean reward of the correct less that of the incorrect."""
        return values | {
            f"{prefix}margin": values[f"{prefix}reward_correct"] - values[f"{prefix}reward_incorrect"]
            for prefix in ("", "step_")
            if {f"{prefix}reward_correct", f"{prefix}reward_incorrect"} <= values.keys()
        }


class StepKTOModule(KTOModule):
    """Step-KTO: KTO's value term for the outcome, and one for every step; one forward pass serves both.

    A reconstruction, see :func:`stepkd.losses.step_kto`: how the paper weighs and averages its step terms and where it
    measures them from was not found, so all of it is open to choice; the weight ``w_s`` of the step term is
    ``loss_weights: {step: w_s}``, and 0 is KTO.

    Args:
        policy, reference, beta, reference_point: as for :class:`KTOModule`.
        class_weights: of completions and of steps; ``ratio`` counts each by itself.
        reduction: ``sum_steps`` or ``mean_steps``: see :func:`stepkd.losses.step_kto`.
        **settings: as for :class:`KTOModule`.
    """

    def __init__(
        self,
        policy: PolicyConfig,
        reference: ReferenceConfig | None = None,
        beta: float = 0.1,
        class_weights: list[float] | Literal["ratio"] = "ratio",
        reduction: Reduction = DEFAULT_REDUCTION,
        reference_point: ReferencePointConfig | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(policy, reference, beta, class_weights, reference_point, **settings)
        check_choice("reduction", reduction, get_args(Reduction))
        self.values = ValueTerms(beta, class_weights, reduction)
        self.components = (self.values,)


class ImplicitPRMModule(KTOModule):
    """A reward model that is a policy: cross-entropy on outcomes, whose log-ratios score steps (``implicit:RUN``).

    The paper's other objectives are :class:`KTOModule` and :class:`~stepkd.modules.dpo.DPOModule` as they are.

    Args:
        policy: the model to train; LoRA or all weights.
        reference: the frozen model.
        beta: > 0; the paper has 0.05.
        **settings: ``optimizer``, ``validation`` and what else :class:`~stepkd.modules.base.StepModule` takes.
    """

    def __init__(
        self, policy: PolicyConfig, reference: ReferenceConfig | None = None, beta: float = 0.05, **settings: Any
    ) -> None:
        super().__init__(policy, reference, beta, [*EVEN], ReferencePointConfig("zero", "zero"), **settings)
        self.values = OutcomeCrossEntropy(beta, [*EVEN])
        self.components = (self.values,)


def _one_value(number: float) -> tuple[Tensor, Tensor]:
    """A metric that is the same in every micro-batch."""
    return torch.tensor(number), torch.tensor(1.0)
