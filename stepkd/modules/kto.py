"""KTO (arXiv 2402.01306) and Step-KTO (arXiv 2501.10799): learning from right and wrong, of answers and of steps.

Axes: N completion tokens, R completions, S steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from stepkd.data.batching import StepBatch, mismatched
from stepkd.data.collate import Batch
from stepkd.data.completion import Completion
from stepkd.data.encode import Example, as_completion
from stepkd.errors import ConfigError, check_bounds
from stepkd.losses import LossTerms, kto, ratio_rule, reference_point, segment_sum, step_kto, step_kto_counts
from stepkd.losses.kto import DEFAULT_REDUCTION, ClassWeights, Reduction
from stepkd.models.spec import PolicyConfig
from stepkd.modules.base import Prepared
from stepkd.modules.distributed import all_reduce
from stepkd.modules.preference import PreferenceModule, ReferenceConfig

OutcomePoint = Literal["mismatch", "batch", "zero"]
StepPoint = Literal["mismatch", "batch", "per_index", "zero"]
EVEN = (1.0, 1.0)
"""Class weights of a validation without training before it."""


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
    ema: float = 0.9
    """``per_index``: decay of the running average, in [0, 1); 0 takes each batch by itself."""

    def __post_init__(self) -> None:
        check_bounds("reference_point.", self, ema="[0, 1)")

    @property
    def needs_mismatches(self) -> bool:
        """Whether mismatched pairs are to be read."""
        return self.outcome == "mismatch" or self.step in ("mismatch", "per_index")

    @property
    def needs_batch(self) -> bool:
        """Whether the batch's own log-ratios are needed before the first backward pass."""
        return "batch" in (self.outcome, self.step)


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
        """Point of every step.

        Args:
            completion_S: completion of every step, in order.
            like: a tensor of the dtype that points are wanted in, and on their device.
        """
        if not self.by_index:
            return self.z0_step
        starts_S = torch.searchsorted(completion_S, completion_S)  # first step of the same completion
        index_S = torch.arange(len(completion_S), device=completion_S.device) - starts_S
        table = torch.tensor([*self.by_index, self.z0_step], dtype=torch.float64, device=completion_S.device)
        return table[index_S.clamp(max=len(self.by_index))].to(like)


def mismatched_completions(batch: StepBatch, rotation: str, max_length: int | None = None) -> list[Completion]:
    """Prompts of this rank's examples with the completions of others; one that exceeds the context is left out.

    Args:
        batch: this rank's share, with its peers (without them, the share is the whole batch).
        rotation: ``global`` or ``device``; see :class:`ReferencePointConfig`.
        max_length: the model's context in tokens.
    """
    peers, places = batch.peers, batch.places
    if not peers:
        peers, places = batch.examples, tuple(range(len(batch.examples)))
    partners: dict[int, int | None] = {}
    if rotation == "global":
        partners = dict(enumerate(mismatched([peer.prompt_ids for peer in peers])))
    else:
        order = sorted(places)
        partners = {place: order[k - 1] for k, place in enumerate(order)}
    found = []
    for place in places:
        partner = partners[place]
        if partner is None or not peers[partner].completion_ids:
            continue
        other: Example = peers[partner]
        completion = as_completion(peers[place].prompt_ids, other.completion_ids, other.spans)
        if max_length is None or completion.length <= max_length:
            found.append(completion)
    return found


class PointEstimator:
    """Keeps the running averages and turns log-ratios into points.

    Args:
        spec: how.
    """

    def __init__(self, spec: ReferencePointConfig) -> None:
        self.spec = spec
        self.averages: list[float] = []

    def __call__(
        self,
        mismatches: Sequence[tuple[Completion, Tensor]],
        own: Sequence[tuple[Completion, Tensor]],
        device: torch.device,
        *,
        update: bool = True,
    ) -> Points:
        """Points of a batch; every rank calls this.

        Args:
            mismatches: this rank's mismatched completions with their token log-ratios.
            own: its own completions with theirs, when the spec asks for them.
            device: of the collective.
            update: whether running averages move (in training) or are only read.
        """
        sums: dict[str, float] = {}
        for name, items in (("mismatch", mismatches), ("batch", own)):
            totals = [float(ratios_N.double().sum()) for _, ratios_N in items]
            steps = [value for completion, ratios_N in items for value in _step_sums(completion, ratios_N)]
            mean = self.spec.rotation == "device"
            for kind, values in (("outcome", totals), ("step", steps)):
                divisor = len(values) if mean and values else 1
                sums[f"{name}/{kind}/sum"] = sum(values) / divisor
                sums[f"{name}/{kind}/count"] = len(values) / divisor
        sums = all_reduce(sums, device)
        points = {
            (name, kind): reference_point(sums[f"{name}/{kind}/sum"], sums[f"{name}/{kind}/count"])
            for name in ("mismatch", "batch")
            for kind in ("outcome", "step")
        }
        step = "mismatch" if self.spec.step == "per_index" else self.spec.step
        by_index = self._by_index(mismatches, device, update) if self.spec.step == "per_index" else ()
        return Points(points.get((self.spec.outcome, "outcome"), 0.0), points.get((step, "step"), 0.0), by_index)

    def _by_index(
        self, mismatches: Sequence[tuple[Completion, Tensor]], device: torch.device, update: bool
    ) -> tuple[float, ...]:
        """Clamped points by step number, after this batch has moved the running averages."""
        rows = [_step_sums(completion, ratios_N) for completion, ratios_N in mismatches]
        longest = int(all_reduce({"n": float(max(map(len, rows), default=0))}, device, op="max")["n"])
        sums = {f"{part}/{i}": 0.0 for i in range(longest) for part in ("sum", "count")}
        for row in rows:
            for i, value in enumerate(row):
                sums[f"sum/{i}"] += value
                sums[f"count/{i}"] += 1
        sums = all_reduce(sums, device)
        means, old = [sums[f"sum/{i}"] / sums[f"count/{i}"] for i in range(longest)], self.averages
        moved = [then + (1 - self.spec.ema) * (mean - then) for then, mean in zip(old, means, strict=False)]
        averages = [*moved, *old[longest:], *means[len(old) :]]
        if update:
            self.averages = averages
        return tuple(max(0.0, value) for value in averages)


def _step_sums(completion: Completion, ratios_N: Tensor) -> list[float]:
    values = ratios_N.double().cpu()
    return [float(values[start:end].sum()) for start, end in completion.spans]


class KTOModule(PreferenceModule):
    """KTO on whole completions, each of them right or wrong.

    Args:
        policy: the model to train; LoRA or all weights.
        reference: the frozen model.
        beta: > 0.
        class_weights: (lambda_D, lambda_U) of right and wrong completions; ``ratio`` gives both classes the same total,
            counted over the training data.
        reference_point: how z0 is estimated.
        **settings: ``packing``, ``optimizer`` and what else :class:`~stepkd.modules.preference.PreferenceModule` takes.
    """

    loss_names: tuple[str, ...] = ("outcome",)
    feedback = "right and wrong completions"

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
        if not 0 < beta < float("inf"):
            raise ConfigError(f"beta={beta}: must be positive")
        self.beta = beta
        self.class_weights = _checked_weights("class_weights", class_weights)
        self.point_spec = reference_point or ReferencePointConfig()
        self.prepares_with_model |= self.point_spec.needs_mismatches or self.point_spec.needs_batch
        self._estimator = PointEstimator(self.point_spec)
        self._points = Points()

    def on_fit_start(self) -> None:
        """Class weights by the ratio rule, which reads the training data."""
        super().on_fit_start()
        self.class_weights = self._resolved("outcomes", self.class_weights)

    def _resolved(self, kind: str, weights: ClassWeights | None) -> ClassWeights:
        if weights is not None:
            return weights
        if not hasattr(self.datamodule, "label_counts"):
            raise ConfigError("class weights by the ratio rule need the data's counts: use FeedbackData, or give them")
        counts = self.datamodule.label_counts()
        return ratio_rule(counts[f"right_{kind}"], counts[f"wrong_{kind}"])

    # ---- reference points ------------------------------------------------------------------------------------------

    def mismatches(self, batch: StepBatch) -> list[Completion]:
        """This rank's prompts with other prompts' completions."""
        if not self.point_spec.needs_mismatches:
            return []
        return mismatched_completions(batch, self.point_spec.rotation, self.model.max_length)

    def prepare(self, batch: StepBatch) -> Iterator[Prepared]:
        """The batch's completions with their reference log-probabilities, once the reference points are known."""
        others = self.mismatches(batch)
        own: list[Completion] = []
        if self.point_spec.needs_batch:
            own = [completion for example in batch.examples for completion in example.completions]
        with self.phases.phase("reference points"):
            self._points = self._estimator(
                list(zip(others, self.frozen_logratios(others), strict=True)),
                list(zip(own, self.frozen_logratios(own), strict=True)),
                self.device,
                update=self.trainer.training,
            )
        yield from super().prepare(batch)

    def method_state(self) -> dict[str, Any]:
        """The running averages of the reference points."""
        return {"point_averages": list(self._estimator.averages)}

    def restore_method_state(self, state: dict[str, Any]) -> None:
        """Take back :meth:`method_state`."""
        self._estimator.averages = list(state.get("point_averages", []))

    # ---- loss ------------------------------------------------------------------------------------------------------

    def count(self, batch: Batch) -> dict[str, float]:
        """Completions with an outcome."""
        return {"outcome": float((batch.outcome_R >= 0).sum())}

    def loss_terms(self, batch: Batch) -> LossTerms:
        """KTO's value terms."""
        logratios_R = segment_sum(self.logratios(batch), batch.completion_N, batch.num_completions)
        terms = kto(
            logratios_R,
            batch.outcome_R,
            z0=self._points.z0,
            beta=self.beta,
            weights=self.class_weights or EVEN,
        )
        return self._with_points(terms, {"z0": self._points.z0})

    def derived_metrics(self, values: dict[str, float]) -> dict[str, float]:
        """Margins: mean reward of the right less that of the wrong."""
        return {
            f"{prefix}margin": values[f"{prefix}reward_right"] - values[f"{prefix}reward_wrong"]
            for prefix in ("", "step_")
            if {f"{prefix}reward_right", f"{prefix}reward_wrong"} <= values.keys()
        }

    @staticmethod
    def _with_points(terms: LossTerms, points: dict[str, float]) -> LossTerms:
        one = torch.tensor(1.0)
        terms.metrics |= {name: (torch.tensor(value), one) for name, value in points.items()}
        return terms


class StepKTOModule(KTOModule):
    """Step-KTO: KTO's value term for the outcome, and one for every step; one forward pass serves both.

    A reconstruction, see :func:`stepkd.losses.step_kto`: how the paper weighs and averages its step terms and where it
    measures them from was not found, so all of it is open to choice.

    Args:
        policy, reference, beta, class_weights, reference_point: as for :class:`KTOModule`.
        step_weight: weight ``w_s`` of the step term, >= 0; 0 is KTO.
        beta_step: beta of the steps; null: ``beta``.
        step_class_weights: as ``class_weights``, counted over the steps.
        reduction: ``sum_steps``, ``mean_steps`` or ``mean_all_steps``: see :func:`stepkd.losses.step_kto`.
        **settings: as for :class:`KTOModule`.
    """

    loss_names = ("outcome", "step")

    def __init__(
        self,
        policy: PolicyConfig,
        reference: ReferenceConfig | None = None,
        beta: float = 0.1,
        class_weights: list[float] | Literal["ratio"] = "ratio",
        step_weight: float = 1.0,
        beta_step: float | None = None,
        step_class_weights: list[float] | Literal["ratio"] = "ratio",
        reduction: Reduction = DEFAULT_REDUCTION,
        reference_point: ReferencePointConfig | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(policy, reference, beta, class_weights, reference_point, **settings)
        if not 0 <= step_weight < float("inf"):
            raise ConfigError(f"step_weight={step_weight}: must be 0 (KTO alone) or positive")
        if beta_step is not None and not 0 < beta_step < float("inf"):
            raise ConfigError(f"beta_step={beta_step}: must be positive, or null for beta")
        if reduction not in ("mean_steps", "sum_steps", "mean_all_steps"):
            raise ConfigError(f"reduction={reduction!r}: must be mean_steps, sum_steps or mean_all_steps")
        self.loss_weights.setdefault("step", step_weight)
        self.beta_step = beta_step
        self.step_class_weights = _checked_weights("step_class_weights", step_class_weights)
        self.reduction: Reduction = reduction

    def on_fit_start(self) -> None:
        """Class weights of outcomes and of steps."""
        super().on_fit_start()
        self.step_class_weights = self._resolved("steps", self.step_class_weights)

    def count(self, batch: Batch) -> dict[str, float]:
        """Completions with an outcome; steps, or completions with labelled ones, by the reduction."""
        return step_kto_counts(batch.label_S, batch.completion_S, batch.outcome_R, self.reduction)

    def loss_terms(self, batch: Batch) -> LossTerms:
        """Step-KTO's value terms of outcomes and steps."""
        ratios_N = self.logratios(batch)
        terms = step_kto(
            segment_sum(ratios_N, batch.step_N, len(batch.completion_S)),
            batch.label_S,
            batch.completion_S,
            batch.outcome_R,
            z0=self._points.z0,
            z0_step=self._points.of_steps(batch.completion_S, ratios_N),
            beta=self.beta,
            beta_step=self.beta_step,
            reduction=self.reduction,
            weights=self.class_weights or EVEN,
            step_weights=self.step_class_weights or EVEN,
        )
        return self._with_points(terms, {"z0": self._points.z0, "z0_step": self._points.z0_step})


def _checked_weights(name: str, weights: list[float] | str) -> ClassWeights | None:
    """The weights, or None for the ratio rule."""
    if weights == "ratio":
        return None
    if not isinstance(weights, list | tuple) or len(weights) != 2 or not all(0 < w < float("inf") for w in weights):
        raise ConfigError(f"{name}={weights!r}: two positive numbers, of right and of wrong ones, or 'ratio'")
    return (float(weights[0]), float(weights[1]))
