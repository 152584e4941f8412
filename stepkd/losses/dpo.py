"""DPO on pairs of completions, or of single next steps (Step-DPO, MCTS-DPO).

Axes: P pairs.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from stepkd.losses.reduce import LossTerms

PairLoss = Literal["sigmoid", "ipo"]


def dpo(
    chosen_logratios_P: Tensor,
    rejected_logratios_P: Tensor,
    *,
    beta: float = 0.1,
    loss: PairLoss = "sigmoid",
    label_smoothing: float | Tensor = 0.0,
    lengths_P2: Tensor | None = None,
) -> LossTerms:
    """Direct preference optimisation as a named sum over pairs.

    Step-DPO (Lai et al. 2024, arXiv 2406.18629, equation 2) is this on single next steps, whose log-ratios leave out
    the prompt and the steps before; beta is 0.4 in its text, 0.5 for 72B, its scripts have it the other way round.

    With ``D = chosen log-ratio - rejected log-ratio``:

    * ``sigmoid``: ``-(1 - a) log sigma(beta D) - a log sigma(-beta D)`` with label smoothing a (Rafailov et al. 2023,
      arXiv 2305.18290, equation 7; smoothing as in conservative DPO);
    * ``ipo``: ``(D - 1 / (2 beta))^2`` (Azar et al. 2023, arXiv 2310.12036, equation 17).

    Args:
        chosen_logratios_P: ``sum_t log pi - log ref`` of the preferred completions.
        rejected_logratios_P: the same of the others.
        beta: > 0.
        loss: see above.
        label_smoothing: chance in [0, 0.5] that a pair is the wrong way round, one number or one per pair
            (:func:`visit_smoothing`); only ``sigmoid`` has it.
        lengths_P2: tokens of both sides, >= 1: divide each log-ratio by them (length-normalised ratios); None: sums.

    Returns:
        ``sums["dpo"]``, whose denominator is P. Metrics: ``reward_chosen``, ``reward_rejected``, ``margin`` (means of
        beta times the log-ratios used and of their difference) and ``accuracy`` (share of pairs with D > 0).

    Raises:
        ValueError: an unknown loss, or shapes that differ (they would broadcast).
    """
    if loss not in get_args(PairLoss):
        raise ValueError(f"loss={loss!r}: must be one of {', '.join(get_args(PairLoss))}")
    pairs = chosen_logratios_P.shape
    if rejected_logratios_P.shape != pairs:
        raise ValueError(f"chosen log-ratios {tuple(pairs)} and rejected {tuple(rejected_logratios_P.shape)}")
    smoothing_P = torch.as_tensor(label_smoothing, dtype=chosen_logratios_P.dtype, device=chosen_logratios_P.device)
    if smoothing_P.dim() and smoothing_P.shape != pairs:
        raise ValueError(f"label_smoothing of shape {tuple(smoothing_P.shape)} for {pairs.numel()} pairs")
    if lengths_P2 is not None:
        if lengths_P2.shape != (*pairs, 2):
            raise ValueError(f"lengths of shape {tuple(lengths_P2.shape)} for {pairs.numel()} pairs")
        chosen_logratios_P = chosen_logratios_P / lengths_P2[:, 0]
        rejected_logratios_P = rejected_logratios_P / lengths_P2[:, 1]
    delta_P = chosen_logratios_P - rejected_logratios_P
    if loss == "sigmoid":
        losses_P = -(1 - smoothing_P) * F.logsigmoid(beta * delta_P) - smoothing_P * F.logsigmoid(-beta * delta_P)
    else:
        losses_P = (delta_P - 1 / (2 * beta)).square()
    count = torch.tensor(float(len(delta_P)), device=delta_P.device)
    chosen_P, rejected_P = beta * chosen_logratios_P.detach(), beta * rejected_logratios_P.detach()
    metrics = {
        "reward_chosen": (chosen_P.sum(), count),
        "reward_rejected": (rejected_P.sum(), count),
        "margin": ((chosen_P - rejected_P).sum(), count),
        "accuracy": ((chosen_P > rejected_P).float().sum(), count),
    }
    return LossTerms({"dpo": losses_P.sum()}, metrics)


def visit_smoothing(better_visits_P: Tensor, worse_visits_P: Tensor) -> Tensor:
    """Label smoothing from the visit counts of a tree search: ``min(N_worse / (N_worse + N_better), 0.5)``.

    Args:
        better_visits_P, worse_visits_P: visits of the two actions, >= 0. Where neither was visited, nothing says which
            is better: 0.5.

    Returns:
        (P,) smoothing in [0, 0.5], float64.

    Raises:
        ValueError: a negative count.

    Source: Xie et al. 2024 (arXiv 2405.00451); its code has ``1 - 1 / (1 + N_w / max(1, N_b))``, the same for N_b >= 1.
    """
    better_P, worse_P = better_visits_P.double(), worse_visits_P.double()
    if bool((better_P < 0).any() or (worse_P < 0).any()):
        raise ValueError("visit counts must not be negative")
    total_P = better_P + worse_P
    return torch.where(total_P > 0, worse_P / total_P.clamp(min=1.0), 0.5).clamp(max=0.5)
