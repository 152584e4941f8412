"""Losses of process reward models: cross-entropy on step labels, hard or soft, regression on step values, ordinal
labels as two decisions, and two rankings of a solution's steps: PQM's by their number, QuantiDCE's by their level.

Axes: S or L labelled steps of all completions, in order, C classes from worst to best, H hidden size, V vocabulary, R
completions, K the R starts and L steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from stepkd.losses.linear import DEFAULT_CHUNK, chunked_head
from stepkd.losses.reduce import LossTerms, segment_sum


def label_token_logps(
    head: Callable[[Tensor], Tensor],
    hidden_SH: Tensor,
    label_ids: Sequence[int],
    *,
    restricted: bool = True,
    chunk_size: int = DEFAULT_CHUNK,
) -> Tensor:
    """Log-probabilities of the label tokens at step markers.

    The logits are taken *at* the marker, not one position before it: the marker asks, its output answers (OpenRLHF's
    PRMLoss, Math-Shepherd).

    Args:
        head: hidden states to logits (a :class:`~stepkd.losses.linear.VocabHead`).
        hidden_SH: last hidden states at the markers.
        label_ids: C ids of the label tokens.
        restricted: normalise over the label tokens only; else over the vocabulary.
        chunk_size: positions per chunk; does not change the result.

    Returns:
        (S, C) log-probabilities in nats.
    """
    index = torch.tensor(list(label_ids), device=hidden_SH.device)

    def pick(logits_CV: Tensor) -> Tensor:
        picked = logits_CV.index_select(-1, index)
        return picked.log_softmax(-1) if restricted else picked - logits_CV.logsumexp(-1, keepdim=True)

    return chunked_head(pick, head, hidden_SH, chunk_size=chunk_size)


def step_cross_entropy(
    logps_SC: Tensor, targets_SC: Tensor, *, class_weights: Sequence[float] | None = None
) -> LossTerms:
    """Cross-entropy of step labels as a named sum.

    A hard label is a one-hot row; a soft label p of two classes is ``(1 - p, p)``, so the loss is
    ``-(1 - p) log p_bad - p log p_good`` (Math-Shepherd, arXiv 2312.08935, with the minus its print lacks).

    Args:
        logps_SC: log-probabilities of the classes.
        targets_SC: target probabilities, each row sums to one.
        class_weights: weight of each class, >= 0; a step weighs ``sum_c targets[c] * weight[c]``, and the denominator
            is the sum of these (:func:`step_weights`), as in torch's weighted cross-entropy. None: all 1.

    Returns:
        ``sums["prm"]``; metrics ``accuracy`` (most likely class against the most likely target),
        ``accuracy_correct`` and ``accuracy_incorrect`` over the steps whose target is the best or the worst class (of
        equally likely ones the better counts: a step is correct from even odds on), and ``brier`` (mean over steps of
        ``sum_c (p_c - t_c)^2 / 2``, with p among the classes).

    Raises:
        ValueError: shapes that differ, or a weight count that is not C.
    """
    metrics = _metrics(logps_SC, targets_SC)
    return LossTerms({"prm": -(_weighted(targets_SC, class_weights) * logps_SC).sum()}, metrics)


def step_weights(targets_SC: Tensor, class_weights: Sequence[float] | None = None) -> Tensor:
    """Weight of every step in :func:`step_cross_entropy`, whose sum is that loss's denominator.

    Args:
        targets_SC: target probabilities, worst class first; each row sums to one.
        class_weights: C weights, >= 0; None: all 1.

    Returns:
        (S,) ``sum_c targets[c] * weight[c]``, in the dtype of the targets; all 1 without class weights.

    Raises:
        ValueError: a weight count that is not C.
    """
    return _weighted(targets_SC, class_weights).sum(-1)


def step_regression(logps_SC: Tensor, targets_SC: Tensor, *, form: Literal["mse", "bce"]) -> LossTerms:
    """Regression of step scores on step values, both in [0, 1].

    A step's score r is the probability that it is not of the worst class, among the classes alone; its value v is the
    same of the target: a soft label, or 0 and 1 of a hard one. ``mse`` is ``(r - v)^2`` (Cobbe et al. 2021, arXiv
    2110.14168; Qwen2.5-Math-PRM's soft labels, arXiv 2501.07301), ``bce`` is ``-v log r - (1 - v) log(1 - r)``, which
    for two classes is :func:`step_cross_entropy`.

    Args:
        logps_SC: log-probabilities of the classes, among others or not.
        targets_SC: target probabilities, each row sums to one.
        form: ``mse`` or ``bce``.

    Returns:
        ``sums["value"]``, whose denominator is S; metrics of :func:`step_cross_entropy`.

    Raises:
        ValueError: shapes that differ, or an unknown form.
    """
    metrics, values_S = _metrics(logps_SC, targets_SC), targets_SC[:, 1:].sum(-1)
    odds_S = log_odds(logps_SC)
    if form == "mse":
        return LossTerms({"value": (odds_S.sigmoid() - values_S).square().sum()}, metrics)
    if form != "bce":
        raise ValueError(f"form={form!r}: mse or bce")
    return LossTerms({"value": F.binary_cross_entropy_with_logits(odds_S, values_S, reduction="sum")}, metrics)


def log_odds(logps_SC: Tensor) -> Tensor:
    """Log-odds (S,), in nats, that a step is not of the worst class; of log-probabilities (S, C) worst class first,
    among the classes or among more."""
    return logps_SC[:, 1:].logsumexp(-1) - logps_SC[:, 0]


def step_decisions(logps_SC: Tensor, targets_SC: Tensor) -> LossTerms:
    """Ordinal labels of three classes as two decisions in turn: is a step incorrect, and if it is not, is it neutral?

    Label -1 is the sequence "incorrect", 0 "not incorrect, neutral", 1 "not incorrect, not neutral". The second
    decision is among the classes that the first has left (as Ord2Seq masks when it decodes), and is asked of steps
    that get there. The two sums have denominators of their own (:func:`step_decision_counts`), so that where incorrect
    steps are many the adjacent classes 0 and 1 are told apart as firmly as where they are few; added up undivided they
    are cross-entropy, by the chain rule.

    Args:
        logps_SC: log-probabilities of three classes, among others or not.
        targets_SC: target probabilities, each row sums to one.

    Returns:
        ``sums["ordinal_incorrect"]`` and ``sums["ordinal_neutral"]``; metrics of :func:`step_cross_entropy`.

    Raises:
        ValueError: shapes that differ, or not three classes.

    Source: Wang et al. 2023, Ord2Seq (arXiv 2307.09004) and its code, which has a decoder with a layer for each
    decision and a binary cross-entropy for each class there; two decisions on one head are ours.
    """
    metrics = _metrics(logps_SC, targets_SC)
    if logps_SC.shape[-1] != 3:
        raise ValueError(f"{logps_SC.shape[-1]} classes: the two decisions are on three (-1, 0, 1)")
    rest_S = logps_SC[:, 1:].logsumexp(-1)
    first_SC = torch.stack([logps_SC[:, 0], rest_S], -1) - logps_SC.logsumexp(-1, keepdim=True)
    reached_S = targets_SC[:, 1:].sum(-1)
    incorrect = (targets_SC[:, 0] * first_SC[:, 0] + reached_S * first_SC[:, 1]).sum()
    neutral = (targets_SC[:, 1:] * (logps_SC[:, 1:] - rest_S[:, None])).sum()
    return LossTerms({"ordinal_incorrect": -incorrect, "ordinal_neutral": -neutral}, metrics)


def step_decision_counts(targets_SC: Tensor) -> dict[str, float]:
    """Denominators of :func:`step_decisions`: the steps, and those of them that are not incorrect, by their targets."""
    return {"ordinal_incorrect": float(len(targets_SC)), "ordinal_neutral": float(targets_SC[:, 1:].sum())}


def pqm(
    scores_L: Tensor, correct_L: Tensor, completion_L: Tensor, num_completions: int, *, margin: float = 4.0
) -> LossTerms:
    """PQM's comparative loss: correct steps rise with their number, and stand above all incorrect ones by a margin.

    With Q the scores of a completion, c_1, c_2, ... its correct steps, W its incorrect ones and ``Q_{c_0} = 0``::

        mean over t of  -log( exp Q_{c_t} / (sum_{q <= t} exp Q_{c_q} + sum_{w in W} exp(Q_w + margin)) )

    The start (t = 0) is a term where there are incorrect steps, as in the authors' code: without any it would be 0.

    Args:
        scores_L: unbounded scores, the log-odds that a step is correct.
        correct_L: bool, whether each step is correct.
        completion_L: int64 completion of every step, in [0, R).
        num_completions: R.
        margin: zeta, >= 0: how far incorrect steps are to stand below.

    Returns:
        ``sums["pqm"]``: the means of all completions that have a labelled step, whose number is the denominator;
        metric ``pqm_ordered``: share of their terms in which the step has the largest part.

    Raises:
        ValueError: shapes that differ, or a negative margin.

    Source: Li and Li 2024 (arXiv 2410.11287), equation 10; code: WindyLee0822/Process_Q_Model.
    """
    if not scores_L.shape == correct_L.shape == completion_L.shape or margin < 0:
        shapes = [tuple(each.shape) for each in (scores_L, correct_L, completion_L)]
        raise ValueError(f"scores, labels and completions of shapes {shapes}, margin={margin}: equal ones, at least 0")
    starts_R = torch.arange(num_completions, device=completion_L.device)
    completion_K = torch.cat([starts_R, completion_L])
    correct_K = torch.cat([torch.ones_like(starts_R, dtype=torch.bool), correct_L])
    scores_K = torch.cat([scores_L.new_zeros(num_completions), scores_L])
    order_K = torch.arange(len(completion_K), device=completion_L.device)
    rivals_KK = (completion_K == completion_K[:, None]) & (~correct_K | (order_K <= order_K[:, None]))
    rivals_KK = torch.where(rivals_KK, scores_K + margin * (~correct_K).to(scores_K), float("-inf"))
    flawed_R = segment_sum((~correct_L).double(), completion_L, num_completions) > 0
    kept_K = torch.cat([flawed_R, correct_L])
    losses_K = torch.where(kept_K, rivals_KK.logsumexp(-1) - scores_K, 0.0)
    terms_R = segment_sum(kept_K.to(losses_K), completion_K, num_completions)
    total = (segment_sum(losses_K, completion_K, num_completions) / terms_R.clamp(min=1)).sum()
    ordered_K = kept_K & (rivals_KK.argmax(-1) == order_K)
    return LossTerms({"pqm": total}, {"pqm_ordered": (ordered_K.sum().float(), kept_K.sum().float())})


def multilevel_ranking(
    scores_L: Tensor,
    level_L: Tensor,
    completion_L: Tensor,
    num_completions: int,
    *,
    num_levels: int,
    lower: float = 0.3,
    upper: float = 0.1,
) -> LossTerms:
    """QuantiDCE's ranking of levels: their mean scores lie apart and in order, and each level's scores together.

    With c_l the mean score of a completion's steps of level l, over its levels l and pairs of levels l < m::

        sum over pairs of  max(0, (m - l) * lower - |c_m - c_l|) + max(0, c_l - c_m)
        + sum over levels of  max(0, mean_i |score_i - c_l| - upper)

    Between ``-(m - l) * lower`` and 0 of ``c_m - c_l`` the two terms of a pair cancel, so that means that are a little
    out of order have no gradient: take it beside another loss.

    Args:
        scores_L: scores in [0, 1].
        level_L: int64 level of every step, in [0, num_levels), 0 the worst.
        completion_L: int64 completion of every step, in [0, R).
        num_completions: R.
        num_levels: how many levels there are, >= 1.
        lower: least distance of adjacent levels, in [0, 1]; 0.3 is the authors'.
        upper: greatest mean distance from the level's mean, in [0, 1]; 0.1 is the authors'.

    Returns:
        ``sums["ranking"]``: of all completions, whose number with a labelled step is the denominator; metric
        ``ranking_ordered``: share of pairs of levels whose better one has the higher mean.

    Raises:
        ValueError: shapes that differ.

    Source: Ye et al. 2021, QuantiDCE (arXiv 2106.00507), the score's part, weighted by the distance of levels; code:
    James-Yip/QuantiDCE. There a group is a dialogue's responses; that it is a solution's steps is ours.
    """
    if not scores_L.shape == level_L.shape == completion_L.shape:
        shapes = [tuple(each.shape) for each in (scores_L, level_L, completion_L)]
        raise ValueError(f"scores, levels and completions of shapes {shapes}: equal ones")
    group_L = completion_L * num_levels + level_L
    sizes = segment_sum(torch.ones_like(scores_L), group_L, num_completions * num_levels)
    means = segment_sum(scores_L, group_L, len(sizes)) / sizes.clamp(min=1)
    spread = segment_sum((scores_L - means[group_L]).abs(), group_L, len(sizes)) / sizes.clamp(min=1)
    total = (spread - upper).clamp(min=0).sum()  # 0 for a level without steps
    there_RC, means_RC = sizes.view(-1, num_levels) > 0, means.view(-1, num_levels)
    ordered = pairs = scores_L.new_zeros(())
    for worse, better in combinations(range(num_levels), 2):
        gap_R = (means_RC[:, better] - means_RC[:, worse])[there_RC[:, better] & there_RC[:, worse]]
        total = total + ((better - worse) * lower - gap_R.abs()).clamp(min=0).sum() + (-gap_R).clamp(min=0).sum()
        ordered, pairs = ordered + (gap_R > 0).sum(), pairs + len(gap_R)
    return LossTerms({"ranking": total}, {"ranking_ordered": (ordered.float(), pairs.float())})


def likeliest(values_SC: Tensor) -> Tensor:
    """The class of the largest value, (S,) int64; of several the best, as even odds call a step correct."""
    return values_SC.shape[-1] - 1 - values_SC.flip(-1).argmax(-1)


def _metrics(logps_SC: Tensor, targets_SC: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Those of :func:`step_cross_entropy`."""
    if logps_SC.shape != targets_SC.shape:
        raise ValueError(f"log-probabilities {tuple(logps_SC.shape)} but targets {tuple(targets_SC.shape)}")
    with torch.no_grad():
        target_S = likeliest(targets_SC)
        hit_S = (likeliest(logps_SC) == target_S).to(logps_SC.dtype)
        best_S, worst_S = target_S == targets_SC.shape[-1] - 1, target_S == 0
        brier_S = (logps_SC.softmax(-1) - targets_SC).square().sum(-1) / 2
    return {
        "accuracy": (hit_S.sum(), _count(torch.ones_like(hit_S))),
        "accuracy_correct": (hit_S[best_S].sum(), _count(best_S)),
        "accuracy_incorrect": (hit_S[worst_S].sum(), _count(worst_S)),
        "brier": (brier_S.sum(), _count(torch.ones_like(hit_S))),
    }


def _weighted(targets_SC: Tensor, class_weights: Sequence[float] | None) -> Tensor:
    if class_weights is None:
        return targets_SC
    if len(class_weights) != targets_SC.shape[-1]:
        raise ValueError(f"{len(class_weights)} class weights for {targets_SC.shape[-1]} classes")
    return targets_SC * targets_SC.new_tensor(list(class_weights))


def _count(kept_S: Tensor) -> Tensor:
    return kept_S.sum().to(torch.float32)
