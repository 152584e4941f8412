"""PQM: process rewards as a ranking of the steps of a solution.

Axes: L labelled steps of all completions, in order, R completions, K the R starts and L steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepkd.losses.reduce import LossTerms, segment_sum


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
