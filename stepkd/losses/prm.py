"""Losses of process reward models: cross-entropy on step labels, hard or soft, and PQM's ranking of a solution's steps.

Axes: S or L labelled steps of all completions, in order, C classes from worst to best, H hidden size, V vocabulary, R
completions, K the R starts and L steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

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
    if logps_SC.shape != targets_SC.shape:
        raise ValueError(f"log-probabilities {tuple(logps_SC.shape)} but targets {tuple(targets_SC.shape)}")
    weighted_SC = _weighted(targets_SC, class_weights)
    with torch.no_grad():
        target_S = _likeliest(targets_SC)
        hit_S = (_likeliest(logps_SC) == target_S).to(logps_SC.dtype)
        best_S, worst_S = target_S == targets_SC.shape[-1] - 1, target_S == 0
        brier_S = (logps_SC.softmax(-1) - targets_SC).square().sum(-1) / 2
    metrics = {
        "accuracy": (hit_S.sum(), _count(torch.ones_like(hit_S))),
        "accuracy_correct": (hit_S[best_S].sum(), _count(best_S)),
        "accuracy_incorrect": (hit_S[worst_S].sum(), _count(worst_S)),
        "brier": (brier_S.sum(), _count(torch.ones_like(hit_S))),
    }
    return LossTerms({"prm": -(weighted_SC * logps_SC).sum()}, metrics)


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
    rivals_KK = torch.where(rivals_KK, scores_K + margin * ~correct_K, float("-inf"))
    flawed_R = segment_sum((~correct_L).double(), completion_L, num_completions) > 0
    kept_K = torch.cat([flawed_R, correct_L])
    losses_K = torch.where(kept_K, rivals_KK.logsumexp(-1) - scores_K, 0.0)
    terms_R = segment_sum(kept_K.to(losses_K), completion_K, num_completions)
    total = (segment_sum(losses_K, completion_K, num_completions) / terms_R.clamp(min=1)).sum()
    ordered_K = kept_K & (rivals_KK.argmax(-1) == order_K)
    return LossTerms({"pqm": total}, {"pqm_ordered": (ordered_K.sum().float(), kept_K.sum().float())})


def _weighted(targets_SC: Tensor, class_weights: Sequence[float] | None) -> Tensor:
    if class_weights is None:
        return targets_SC
    if len(class_weights) != targets_SC.shape[-1]:
        raise ValueError(f"{len(class_weights)} class weights for {targets_SC.shape[-1]} classes")
    return targets_SC * targets_SC.new_tensor(list(class_weights))


def _likeliest(values_SC: Tensor) -> Tensor:
    """The class of the largest value, the last of several."""
    return values_SC.shape[-1] - 1 - values_SC.flip(-1).argmax(-1)


def _count(kept_S: Tensor) -> Tensor:
    return kept_S.sum().to(torch.float32)
