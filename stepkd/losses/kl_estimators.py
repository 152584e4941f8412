"""Estimators of a KL divergence from the log-probabilities of sampled tokens alone.

With ``d = log pi - log T`` at a token that the policy sampled:

====== ==================== ======================================================================
name   value                as a loss, its expected gradient is that of
====== ==================== ======================================================================
``k1`` ``d``                nothing: it is 0
``k2`` ``d^2 / 2``          the reverse KL(pi || T) (arXiv 2506.02208 takes this one)
``k3`` ``exp(-d) + d - 1``  the forward KL(T || pi); the value is unbiased for the reverse one
====== ==================== ======================================================================

All of it per token, at sampled prefixes that are taken as given: what a token does to later ones is left out. The
exact divergence over the vocabulary, and over the k likeliest tokens and a bucket, are in
:mod:`stepkd.losses.divergence`. Names follow Schulman, "Approximating KL divergence".
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from stepkd.errors import check_choice

Estimator = Literal["k1", "k2", "k3"]


def kl_estimate(
    kind: Estimator,
    logps_N: Tensor,
    other_logps_N: Tensor,
    *,
    clamp: float | None = None,
    gradient: Estimator | None = None,
) -> Tensor:
    """An estimate of KL(policy || other) at every sampled token.

    Args:
        kind: which estimator the values are of.
        logps_N: of the sampled tokens under the policy; gradients flow through them.
        other_logps_N: under the other model (teacher, reference), detached.
        clamp: > 0: a bound c on |d| in the gradient of ``k2``, whose loss becomes ``-sg[clamp(R)] log pi`` with
            ``R = -d``. (Its value is then Huber's, quadratic up to c and linear beyond; clamping d inside the square
            would give the worst tokens no gradient at all.)
        gradient: take the gradient of another estimator, straight-through: the value stays that of ``kind``.

    Raises:
        ValueError: another kind, a clamp that is not positive or without ``k2``, or shapes that differ.
    """
    check_choice("KL estimator", kind, get_args(Estimator))
    if logps_N.shape != other_logps_N.shape:
        raise ValueError(
            f"{tuple(logps_N.shape)} log-probabilities and {tuple(other_logps_N.shape)} of the other model"
        )
    if clamp is not None and (not clamp > 0 or "k2" not in (kind, gradient)):
        raise ValueError(f"clamp={clamp}: must be positive, and belongs to k2")
    value_N = _value(kind, logps_N - other_logps_N.detach(), clamp)
    if gradient is None or gradient == kind:
        return value_N
    check_choice("KL estimator", gradient, get_args(Estimator))
    through_N = _value(gradient, logps_N - other_logps_N.detach(), clamp)
    return value_N.detach() + through_N - through_N.detach()


def _value(kind: Estimator, difference_N: Tensor, clamp: float | None) -> Tensor:
    if kind == "k1":
        return difference_N
    if kind == "k3":
        return torch.expm1(-difference_N) + difference_N
    if clamp is None:
        return 0.5 * difference_N.square()
    return torch.nn.functional.huber_loss(
        difference_N, torch.zeros_like(difference_N), reduction="none", delta=float(clamp)
    )
