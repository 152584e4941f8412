"""KTO and Step-KTO: value terms of desirable and undesirable completions and steps; and cross-entropy of outcomes.

Axes: R completions, S steps of all completions (in order, completion by completion).

A log-ratio is ``sum_t log pi(y_t | x, y_<t) - log ref(y_t | x, y_<t)`` over the tokens of a completion or a step, not
multiplied by beta. A label is 1 (desirable), 0 (undesirable) or -1 (not labelled: no loss).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from stepkd.losses.reduce import LossTerms, segment_sum
from stepkd.steps.labels import is_settled

Reduction = Literal["mean_steps", "sum_steps"]
DEFAULT_REDUCTION: Reduction = "sum_steps"
"""Chosen by an ablation in the tiny world (``recipes/claims/step_kto_ablation.yaml``), confirmed on other seeds."""
ClassWeights = tuple[float, float]
"""Weights (lambda_D, lambda_U) of desirable and undesirable items, each > 0."""

SATURATED = 0.95
"""A value above it counts as saturated: its gradient is below a fifth of the largest."""


def reference_point(total: float, count: float) -> float:
    """KTO's reference point: a KL estimate from mismatched pairs, never below 0.

    Args:
        total: sum of the log-ratios over the global batch (all ranks).
        count: how many there are; 0 (a batch of one, or of one prompt only) gives 0.

    Returns:
        The mean log-ratio in nats, or 0 where it is negative.

    Source: KTO (arXiv 2402.01306), section 4.1.
    """
    return max(0.0, total / count) if count else 0.0


def kto_values(logratios: Tensor, labels: Tensor, *, reference: float | Tensor = 0.0, beta: float = 0.1) -> Tensor:
    """Values in (0, 1): ``sigma(beta (r - z))`` of desirable items, ``sigma(beta (z - r))`` of undesirable ones.

    Args:
        logratios: log-ratios r, any shape; float32 or float64.
        labels: 1 or 0 (other labels are read as 0), same shape.
        reference: reference point z, one number or one per item; no gradient flows through it.
        beta: risk aversion, > 0.

    Returns:
        Values of the shape and dtype of the log-ratios: the higher, the better the policy treats the item.

    Raises:
        ValueError: shapes that differ (they would broadcast).

    Source: KTO (Ethayarajh et al. 2024, arXiv 2402.01306), equation 8.
    """
    if labels.shape != logratios.shape:
        raise ValueError(f"log-ratios {tuple(logratios.shape)} and labels {tuple(labels.shape)}")
    if isinstance(reference, Tensor):
        if reference.dim() and reference.shape != logratios.shape:
            raise ValueError(f"reference points {tuple(reference.shape)} for log-ratios {tuple(logratios.shape)}")
        reference = reference.detach()
    return torch.sigmoid(torch.where(labels == 1, 1.0, -1.0).to(logratios.dtype) * beta * (logratios - reference))


def kto(
    logratios_R: Tensor,
    labels_R: Tensor,
    *,
    z0: float | Tensor = 0.0,
    beta: float = 0.1,
    weights: ClassWeights = (1.0, 1.0),
) -> LossTerms:
    """KTO on whole completions: the sum of ``lambda_y (1 - v(x, y))``.

    Args:
        logratios_R: summed log-ratios of the completions.
        labels_R: 1 desirable, 0 undesirable, -1 without a label.
        z0: reference point (:func:`reference_point`); 0 is APO-zero's unpaired form.
        beta: > 0.
        weights: (lambda_D, lambda_U); the denominator is the number of labelled completions, whatever the weights.

    Returns:
        ``sums["outcome"]``. Metrics: ``reward_correct`` and ``reward_incorrect`` (mean of beta r by label) and
        ``saturated`` (share of values above 0.95).

    Source: KTO (Ethayarajh et al. 2024, arXiv 2402.01306), equations 7 and 8.
    """
    loss, metrics = _value_loss(logratios_R, labels_R, z0, beta, weights, torch.ones_like(logratios_R))
    return LossTerms({"outcome": loss}, metrics)


def outcome_cross_entropy(logratios_R: Tensor, labels_R: Tensor, *, beta: float = 0.05) -> LossTerms:
    """Cross-entropy of outcomes; ``sigma(beta r)`` of a completion's log-ratio r is the chance that it is correct.

    Trained so, the policy and its reference score steps, too (``stepkd.scorers.implicit``).

    Args:
        logratios_R: summed log-ratios of the completions.
        labels_R: 1 correct, 0 incorrect, -1 without a label (no loss).
        beta: > 0.

    Returns:
        ``sums["outcome"]``: ``-log sigma(beta r)`` of correct ones, ``-log(1 - sigma(beta r))`` of incorrect ones; the
        denominator is the number of labelled ones. Metrics: ``reward_correct`` and ``reward_incorrect`` (mean of beta r
        by label), and ``accuracy`` (of ``sigma(beta r)`` at 0.5).

    Raises:
        ValueError: shapes that differ.

    Source: ImplicitPRM (Yuan et al. 2024, arXiv 2412.01981), cross-entropy loss; its print lacks the minus.
    """
    if labels_R.shape != logratios_R.shape:
        raise ValueError(f"log-ratios {tuple(logratios_R.shape)} and labels {tuple(labels_R.shape)}")
    correct_R, labelled_R = labels_R == 1, labels_R >= 0
    signs_R = torch.where(correct_R, 1.0, -1.0).to(logratios_R.dtype)
    logps_R = F.logsigmoid(signs_R * beta * logratios_R)
    rewards_R = beta * logratios_R.detach()
    hits_R = labelled_R & ((rewards_R >= 0) == correct_R)
    metrics = {
        "reward_correct": (rewards_R[correct_R].sum(), correct_R.sum().float()),
        "reward_incorrect": (rewards_R[labels_R == 0].sum(), (labels_R == 0).sum().float()),
        "accuracy": (hits_R.sum().float(), labelled_R.sum().float()),
    }
    return LossTerms({"outcome": -torch.where(labelled_R, logps_R, 0.0).sum()}, metrics)


def step_kto(
    step_logratios_S: Tensor,
    step_labels_S: Tensor,
    completion_S: Tensor,
    labels_R: Tensor,
    *,
    z0: float | Tensor = 0.0,
    z0_step: float | Tensor = 0.0,
    beta: float = 0.1,
    reduction: Reduction = DEFAULT_REDUCTION,
    weights: ClassWeights = (1.0, 1.0),
    step_weights: ClassWeights = (1.0, 1.0),
) -> LossTerms:
    """Step-KTO: KTO's value term for the completion's outcome, and one of the same form for each of its steps.

    A completion's log-ratio is the sum of its steps' (they partition it), so one forward pass serves both terms. The
    weight ``w_s`` of the step term is a weight of :func:`~stepkd.losses.reduce.component_scales`.

    A reconstruction: the paper (Lin et al. 2025, arXiv 2501.10799) adds step-level value terms to KTO's; their weight,
    average over steps and reference point were not found in it and are options here, beta is the outcome term's.

    Args:
        step_logratios_S: summed log-ratios of the steps.
        step_labels_S: 1 correct, 0 incorrect, -1 without a label.
        completion_S: int64 completion of every step, in [0, R).
        labels_R: outcomes: 1 correct, 0 incorrect, -1 not known.
        z0: reference point of completions.
        z0_step: reference point of steps, one number or one per step. A step's log-ratio is about 1/H of its
            completion's, so ``z0`` does not serve for it.
        beta: > 0, of outcomes and steps.
        reduction: ``sum_steps``: the sum over a completion's labelled steps, averaged over completions;
            ``mean_steps``: their mean in place of the sum. A sum over H steps weighs H times the mean beside the
            outcome term: with many steps, lower ``w_s``.
        weights: (lambda_D, lambda_U) of outcomes.
        step_weights: the same of steps.

    Returns:
        ``sums["outcome"]`` and ``sums["step"]``, whose denominators are :func:`step_kto_counts`. Metrics: those of
        :func:`kto`, the same with ``step_`` before them, and
        ``labels/correct_with_incorrect_step``: what the batch's labels say, :class:`~stepkd.steps.labels.Tally`.

    Raises:
        ValueError: an unknown reduction, or shapes that differ.
    """
    if not step_logratios_S.shape == step_labels_S.shape == completion_S.shape:
        raise ValueError(
            f"{tuple(step_logratios_S.shape)} step log-ratios, {tuple(step_labels_S.shape)} labels and "
            f"{tuple(completion_S.shape)} completion numbers"
        )
    logratios_R = segment_sum(step_logratios_S, completion_S, len(labels_R))
    outcome, metrics = _value_loss(logratios_R, labels_R, z0, beta, weights, torch.ones_like(logratios_R))
    share_S = _step_shares(step_labels_S, completion_S, len(labels_R), reduction).to(step_logratios_S.dtype)
    step, step_metrics = _value_loss(step_logratios_S, step_labels_S, z0_step, beta, step_weights, share_S)
    metrics |= {f"step_{name}": value for name, value in step_metrics.items()}
    metrics["labels/correct_with_incorrect_step"] = _tallied(step_labels_S, completion_S, labels_R)
    return LossTerms({"outcome": outcome, "step": step}, metrics)


def step_kto_counts(step_labels_S: Tensor, completion_S: Tensor, labels_R: Tensor) -> dict[str, float]:
    """Denominators of :func:`step_kto` for a batch; those of several batches and ranks add up.

    Args:
        step_labels_S: 1 correct, 0 incorrect, -1 without a label.
        completion_S: int64 completion of every step, in [0, R).
        labels_R: outcomes: 1 correct, 0 incorrect, -1 not known.

    Returns:
        ``outcome``: completions whose outcome is known; ``step``: completions with at least one labelled step.
    """
    labelled_R = segment_sum((step_labels_S >= 0).double(), completion_S, len(labels_R)) > 0
    return {"outcome": float((labels_R >= 0).sum()), "step": float(labelled_R.sum())}


def ratio_rule(desirable: int, undesirable: int) -> ClassWeights:
    """Class weights that give both classes the same total: ``lambda_D n_D = lambda_U n_U``, the rarer one raised.

    Args:
        desirable, undesirable: how many items there are of each; where one is 0 the weights are 1.

    Returns:
        (lambda_D, lambda_U), each at least 1 and one of them exactly 1; 10 desirable and 30 undesirable items give (3,
        1).

    Source: KTO, equation 9 in v1: the ratio of the two sides should lie in [1, 4/3]; this takes its lower end.
    """
    if not desirable or not undesirable:
        return (1.0, 1.0)
    return (max(1.0, undesirable / desirable), max(1.0, desirable / undesirable))


def _value_loss(
    logratios: Tensor,
    labels: Tensor,
    reference: float | Tensor,
    beta: float,
    weights: ClassWeights,
    share: Tensor,
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Sum of ``share * lambda * (1 - value)`` over labelled items, and metrics."""
    values = kto_values(logratios, labels, reference=reference, beta=beta)
    correct, incorrect = labels == 1, labels == 0
    factor = (correct.to(values.dtype) * weights[0] + incorrect.to(values.dtype) * weights[1]) * share
    rewards, high = beta * logratios.detach(), (values.detach() > SATURATED)
    metrics = {
        "reward_correct": (rewards[correct].sum(), correct.sum().float()),
        "reward_incorrect": (rewards[incorrect].sum(), incorrect.sum().float()),
        "saturated": (high[correct | incorrect].sum().float(), (correct | incorrect).sum().float()),
    }
    return (factor * (1.0 - values)).sum(), metrics


def _step_shares(labels_S: Tensor, completion_S: Tensor, completions: int, reduction: str) -> Tensor:
    """1 / H for the mean over a completion's H labelled steps, else 1."""
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction={reduction!r}: must be one of {', '.join(get_args(Reduction))}")
    if reduction == "sum_steps":
        return torch.ones(labels_S.shape, dtype=torch.float64, device=labels_S.device)
    counts_R = segment_sum((labels_S >= 0).double(), completion_S, completions)
    return 1.0 / counts_R.clamp(min=1.0)[completion_S]


def _tallied(step_labels_S: Tensor, completion_S: Tensor, labels_R: Tensor) -> tuple[Tensor, Tensor]:
    """The counts of :class:`~stepkd.steps.labels.Tally` behind its share."""

    def count(chosen_S: Tensor) -> Tensor:
        return segment_sum(chosen_S.float(), completion_S, len(labels_R))

    marks = (torch.ones_like(step_labels_S), step_labels_S == 1, step_labels_S == 0)
    steps_R, correct_R, incorrect_R = map(count, marks)
    labelled_R = is_settled(steps_R, correct_R, incorrect_R) & (labels_R == 1)
    return (labelled_R & (incorrect_R > 0)).sum().float(), labelled_R.sum().float()
