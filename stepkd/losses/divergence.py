"""Divergences of a student's next-token distribution from a teacher's.

All take log-probabilities ``log_student_CV`` and ``log_teacher_CV`` (C positions, V tokens or buckets, each row
normalised) and give one number per position in nats, shape (C,), float32 or better. Names say the direction: *forward*
is KL(teacher || student), which covers the teacher's modes; *reverse* is KL(student || teacher), which seeks one.
:func:`tempered` makes log-probabilities of logits, :func:`top_k_buckets` a coarser pair of distributions to which every
divergence applies as it is. Gradients go to the student, and to a teacher that requires them.

A probability of exactly 0 on the side that weighs contributes 0; on the other side it makes the value infinite, as the
formulas say.

Notation: T teacher, S student, H entropy.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stepkd.errors import check_choice


def forward_kl(log_student_CV: Tensor, log_teacher_CV: Tensor) -> Tensor:
    """KL(T || S): the sum over tokens of T (log T - log S).

    A student that lowers it covers every mode of the teacher: a token that the teacher finds likely and the student
    does not is what costs most (Hinton et al. 2015, arXiv 1503.02531, up to the teacher's entropy).

    Args:
        log_student_CV: log-probabilities of the student, nats; gradients flow through them.
        log_teacher_CV: those of the teacher, of the same shape; a teacher that needs gradients gets them.

    Returns:
        (C,) values >= 0 up to rounding; infinite where the student has probability 0 and the teacher has not.
    """
    return _expectation(log_teacher_CV, log_teacher_CV - log_student_CV)


def reverse_kl(log_student_CV: Tensor, log_teacher_CV: Tensor) -> Tensor:
    """KL(S || T): the sum over tokens of S (log S - log T).

    A student that lowers it seeks modes of the teacher: a token that the student finds likely and the teacher does not
    is what costs most (MiniLLM, arXiv 2306.08543).

    Args:
        log_student_CV: log-probabilities of the student, nats; gradients flow through them.
        log_teacher_CV: those of the teacher, of the same shape; a teacher that needs gradients gets them.

    Returns:
        (C,) values >= 0 up to rounding; infinite where the teacher has probability 0 and the student has not.
    """
    return _expectation(log_student_CV, log_student_CV - log_teacher_CV)


def generalized_jsd(
    log_student_CV: Tensor, log_teacher_CV: Tensor, *, beta: float = 0.5, scaled: bool = False
) -> Tensor:
    """Generalised Jensen-Shannon divergence: beta KL(T || M) + (1 - beta) KL(S || M) (GKD, arXiv 2306.13649, sec. 2).

    M = beta T + (1 - beta) S. Its value tends to 0 at both ends, like beta KL(T || S) and (1 - beta) KL(S || T). At
    exactly 0 and 1 the KL itself is returned, as in TRL, so that the scale **jumps** there: tune the learning rate
    for every beta, or take ``scaled``.

    Args:
        log_student_CV, log_teacher_CV: log-probabilities; between the ends no gradient flows to the teacher's.
        beta: in [0, 1]; towards 0 it acts like the forward KL, towards 1 like the reverse KL.
        scaled: divide by beta (1 - beta); continuous on [0, 1], with the KLs as its ends.

    Returns:
        (C,) values >= 0, up to rounding; for beta 0.5, not scaled, at most log 2.
    """
    if beta == 0.0:
        return forward_kl(log_student_CV, log_teacher_CV)
    if beta == 1.0:
        return reverse_kl(log_student_CV, log_teacher_CV)
    value_C: Tensor = _JSD.apply(log_student_CV, log_teacher_CV.detach(), beta)
    return value_C / (beta * (1 - beta)) if scaled else value_C


class _JSD(torch.autograd.Function):
    """The divergence between the ends, with its gradient made beside it.

    ``dJSD / dlog S = (1 - beta) S (log S - log M)``: one tensor is kept, and few are made on the way.
    """

    @staticmethod
    def forward(ctx: Any, log_student_CV: Tensor, log_teacher_CV: Tensor, beta: float) -> Tensor:
        student_CV, teacher_CV = log_student_CV.exp(), log_teacher_CV.exp()
        log_mixture_CV = (student_CV * (1 - beta)).add_(teacher_CV, alpha=beta).log_()
        gap_CV = log_teacher_CV - log_mixture_CV
        # A probability of 0 counts for nothing, whatever its logarithm; one that is not a number stays visible.
        of_teacher_C = gap_CV.masked_fill_(teacher_CV == 0, 0.0).mul_(teacher_CV).sum(-1)
        torch.sub(log_student_CV, log_mixture_CV, out=gap_CV)
        weighted_CV = gap_CV.masked_fill_(student_CV == 0, 0.0).mul_(student_CV)
        value_C = beta * of_teacher_C + (1 - beta) * weighted_CV.sum(-1)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(weighted_CV.mul_(1 - beta))
        return value_C

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_value_C: Tensor) -> tuple[Tensor, None, None]:
        (gradient_CV,) = ctx.saved_tensors
        return gradient_CV * of_value_C.unsqueeze(-1), None, None


def skew_forward_kl(log_student_CV: Tensor, log_teacher_CV: Tensor, *, skew: float = 0.1) -> Tensor:
    """KL(T || skew T + (1 - skew) S) (DistiLLM, arXiv 2402.03898): bounded by -log(skew).

    Args:
        log_student_CV, log_teacher_CV: log-probabilities.
        skew: in [0, 1]; 0 is the forward KL.

    Returns:
        (C,) values in [0, -log(skew)], up to rounding; at ``skew=1`` all 0, and the student gets no gradient.
    """
    return forward_kl(_mixture(log_teacher_CV, log_student_CV, skew), log_teacher_CV)


def skew_reverse_kl(log_student_CV: Tensor, log_teacher_CV: Tensor, *, skew: float = 0.1) -> Tensor:
    """KL(S || skew S + (1 - skew) T) (DistiLLM, arXiv 2402.03898): bounded by -log(skew).

    Args:
        log_student_CV, log_teacher_CV: log-probabilities.
        skew: in [0, 1]; 0 is the reverse KL.

    Returns:
        (C,) values in [0, -log(skew)], up to rounding; at ``skew=1`` all 0.
    """
    return reverse_kl(log_student_CV, _mixture(log_student_CV, log_teacher_CV, skew))


def balanced_kl(log_student_CV: Tensor, log_teacher_CV: Tensor, *, delta: float = 2.0) -> Tensor:
    """Forward plus reverse KL, one of them times ``delta`` by which side is surer (after BD-KD, arXiv 2212.12965).

    Where H(S) < H(T), a student surer than its teacher, the forward term counts ``delta`` times, else the reverse one.
    The paper weighs the two by the gap of the entropies; which one is raised was not found, so the direction is a
    **reconstruction**: the forward KL spreads a student out, the reverse KL sharpens it. The gate passes no gradient.

    Args:
        log_student_CV, log_teacher_CV: log-probabilities.
        delta: at least 1; 1 is the plain sum.

    Returns:
        (C,) values >= 0, up to rounding.
    """
    with torch.no_grad():
        surer_C = entropy(log_student_CV) < entropy(log_teacher_CV)
    forward_C, reverse_C = forward_kl(log_student_CV, log_teacher_CV), reverse_kl(log_student_CV, log_teacher_CV)
    return torch.where(surer_C, delta * forward_C + reverse_C, forward_C + delta * reverse_C)


def nkd(
    log_student_CV: Tensor,
    log_teacher_CV: Tensor,
    targets_C: Tensor,
    *,
    gamma: float = 1.5,
    temperature: float = 1.0,
) -> Tensor:
    """Normalised knowledge distillation (NKD, arXiv 2303.13005): the target's term, and the shape of the others.

    ``-T_y log S_y - gamma temperature^2 sum over i != y of N(T)_i log N(S)_i``, where N renormalises over the tokens
    other than the target y, at the temperature. A cross-entropy: not 0 where the two agree. The paper adds the usual
    cross-entropy with the target, which is no part of it here (``GKDModule``: ``cross_entropy: Beside``).

    Args:
        log_student_CV, log_teacher_CV: log-probabilities of the whole vocabulary (not of buckets), at temperature 1.
        targets_C: int64 observed tokens.
        gamma: weight of the second term, at least 0.
        temperature: of the second term, > 0.
    """
    index_C1 = targets_C.unsqueeze(-1)
    of_target_C = log_teacher_CV.gather(-1, index_C1).exp() * log_student_CV.gather(-1, index_C1)
    others = []
    for log_CV in (log_teacher_CV, log_student_CV):
        rest_CV = (log_CV / temperature).scatter(-1, index_C1, -math.inf)
        others.append(rest_CV - rest_CV.logsumexp(-1, keepdim=True))
    of_others_C = _expectation(others[0], others[1])
    return -of_target_C.squeeze(-1) - gamma * temperature**2 * of_others_C


def entropy(log_CV: Tensor) -> Tensor:
    """Entropy of every row.

    Args:
        log_CV: log-probabilities, nats, each row normalised.

    Returns:
        (C,) entropies in nats, from 0 (one sure token) to log V (all equally likely). Differentiable.
    """
    return -_expectation(log_CV, log_CV)


def tempered(logits_CV: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of logits divided by a temperature.

    Args:
        logits_CV: logits of any floating type; float16 and bfloat16 are raised to float32 first.
        temperature: > 0; above 1 the distribution is flatter.

    Returns:
        (C, V) log-probabilities in nats, float32 or float64. Differentiable.
    """
    logits_CV = logits_CV.float() if logits_CV.dtype in (torch.float16, torch.bfloat16) else logits_CV
    return torch.log_softmax(logits_CV if temperature == 1.0 else logits_CV / temperature, dim=-1)


def temperature_slope(
    log_student_CV: Tensor, log_teacher_CV: Tensor, targets_C: Tensor, *, temperature: float
) -> Tensor:
    """Derivative, by the logarithm of a temperature of the teacher's, of what that is trained on: ``- log T_y +
    KL(T || S)`` with ``T = softmax(log_teacher / temperature)``.

    It keeps the teacher at the targets y and brings it as near to the student as that allows, which narrows the gap of
    sharpness between them. In PESF-KD (Rao et al. 2022, arXiv 2205.15308; code: 1170300319/PESF-KD, d3f6aa8) both terms
    train a small network on the teacher's last features, added to its logits; one temperature in its place is a
    **reconstruction**.

    Args:
        log_student_CV, log_teacher_CV: log-probabilities of the whole vocabulary.
        targets_C: int64 tokens of the completions.
        temperature: > 0.

    Returns:
        (C,) derivatives, in nats: below 0 where a higher temperature is better.
    """
    logits_CV = log_teacher_CV / temperature
    tempered_CV = logits_CV.log_softmax(-1)
    above_CV = logits_CV - _expectation(tempered_CV, logits_CV).unsqueeze(-1)
    of_target_C = above_CV.gather(-1, targets_C.unsqueeze(-1)).squeeze(-1)
    return of_target_C - _expectation(tempered_CV, above_CV * (tempered_CV - log_student_CV))


def top_k_buckets(log_CV: Tensor, ids_Ck: Tensor, *, tail: bool = True) -> Tensor:
    """A coarser distribution: k chosen tokens, and everything else in one bucket.

    A divergence between two such distributions never exceeds that between the whole ones (data processing), and it
    sees when the student puts mass where the teacher has none; that of truncated ones does neither.

    Args:
        log_CV: log-probabilities.
        ids_Ck: int64 different tokens of every position, those the teacher finds most likely.
        tail: False: no bucket, the k are renormalised (for comparison).

    Returns:
        (C, k + 1) log-probabilities, the last one the tail's; (C, k) without it.

    Raises:
        ValueError: a tail is wanted and all tokens are chosen: an empty bucket has no gradient.
    """
    if tail and ids_Ck.shape[-1] >= log_CV.shape[-1]:
        raise ValueError(f"all {log_CV.shape[-1]} tokens are chosen, so that no tail is left: compare them as they are")
    kept_Ck = log_CV.gather(-1, ids_Ck)
    if not tail:
        return kept_Ck - kept_Ck.logsumexp(-1, keepdim=True)
    # Summed over the other tokens, not 1 minus the kept mass: that is all rounding where the student is sure.
    rest_C = log_CV.scatter(-1, ids_Ck, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([kept_Ck, rest_C], dim=-1)


Estimator = Literal["k1", "k2", "k3"]


def kl_estimate(kind: Estimator, logps_N: Tensor, other_logps_N: Tensor) -> Tensor:
    """An estimate of KL(policy || other) at every sampled token, from its log-probabilities alone.

    With ``d = log pi - log T`` at a token that the policy sampled:

    ====== ==================== ======================================================================
    name   value                as a loss, its expected gradient is that of
    ====== ==================== ======================================================================
    ``k1`` ``d``                nothing: it is 0
    ``k2`` ``d^2 / 2``          the reverse KL(pi || T) (arXiv 2506.02208 takes this one)
    ``k3`` ``exp(-d) + d - 1``  the forward KL(T || pi); the value is unbiased for the reverse one
    ====== ==================== ======================================================================

    All of it per token, at sampled prefixes that are taken as they are: what a token does to later ones is left out.
    Names follow Schulman, "Approximating KL divergence".

    Args:
        kind: which estimator the values are of.
        logps_N: of the sampled tokens under the policy; gradients flow through them.
        other_logps_N: under the other model (teacher, reference), detached.

    Returns:
        (N,) values in nats; those of ``k2`` and ``k3`` are never below 0, save by rounding.

    Raises:
        ConfigError: another kind.
        ValueError: shapes that differ.
    """
    if logps_N.shape != other_logps_N.shape:
        raise ValueError(
            f"{tuple(logps_N.shape)} log-probabilities and {tuple(other_logps_N.shape)} of the other model"
        )
    check_choice("KL estimator", kind, get_args(Estimator))
    difference_N = logps_N - other_logps_N.detach()
    if kind == "k1":
        return difference_N
    return 0.5 * difference_N.square() if kind == "k2" else torch.expm1(-difference_N) + difference_N


def _mixture(log_first_CV: Tensor, log_second_CV: Tensor, share: float) -> Tensor:
    """log(share first + (1 - share) second)."""
    if share == 0.0:
        return log_second_CV
    if share == 1.0:
        return log_first_CV
    return torch.logaddexp(log_first_CV + math.log(share), log_second_CV + math.log1p(-share))


def _expectation(log_weight_CV: Tensor, values_CV: Tensor) -> Tensor:
    """Sum over the last axis of exp(log weight) times value, where a weight of 0 counts for nothing."""
    weight_CV = log_weight_CV.exp()
    return (weight_CV * torch.where(weight_CV > 0, values_CV, 0.0)).sum(-1)
