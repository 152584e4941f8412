"""What a teacher of reward models has beyond the probabilities of few classes: a spread within each class (MCMI), and
sub-classes in its features (LELP).

Axes: L labelled steps, C classes from worst to best, D sub-classes of one class, K = C D of all, class by class, H
features of the teacher.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepkd.errors import ConfigError
from stepkd.losses.reduce import LossTerms


def class_centroids(logps_LC: Tensor, targets_LC: Tensor) -> Tensor:
    """Mean prediction of the steps of each class, by their labels.

    Args:
        logps_LC: log-probabilities of the classes, among others or not.
        targets_LC: target probabilities, each row sums to one.

    Returns:
        (C, C) probabilities above 0: row y is Q_y, the mean over steps, weighted by ``targets_LC[:, y]``; a class
        without steps has even ones.
    """
    weights_CL, probs_LC = targets_LC.T.to(logps_LC), logps_LC.softmax(-1)
    totals_C1, least = weights_CL.sum(-1, keepdim=True), torch.finfo(probs_LC.dtype).tiny
    means_CC = (weights_CL @ probs_LC / totals_C1.clamp(min=least)).clamp(min=least)  # of what underflowed, too
    return torch.where(totals_C1 > 0, means_CC, 1 / len(means_CC))


def mcmi(logps_LC: Tensor, targets_LC: Tensor, centroids_CC: Tensor) -> LossTerms:
    """Minus the conditional mutual information of prediction and step given the label, to be weighed beside
    cross-entropy, which pulls all steps of a class to one point.

    ``- sum over steps and classes y of targets[y] KL(p || Q_y)``. With Q the centroids of these very steps
    (:func:`class_centroids`) it is exactly minus their number times I(step; prediction | label), and so is its
    gradient, although none goes through Q: the mean prediction is what minimises the sum.

    Args:
        logps_LC: log-probabilities of the classes, among others or not; gradients flow through them.
        targets_LC: target probabilities, each row sums to one.
        centroids_CC: Q, constant; those of all training data before MCMI in the authors' code.

    Returns:
        ``sums["mcmi"]`` in nats, <= 0, whose denominator is L.

    Source: Ye et al. 2024 (arXiv 2401.08732); code: iclr2024mcmi/ICLRMCMI, d12f354.
    """
    logps_LC = logps_LC.log_softmax(-1)
    distances_LC = (logps_LC.exp() * logps_LC).sum(-1, keepdim=True) - logps_LC.exp() @ centroids_CC.to(
        logps_LC
    ).log().T
    return LossTerms({"mcmi": -(targets_LC.to(logps_LC) * distances_LC).sum()})


def subclass_directions(
    features_LH: Tensor, logps_LC: Tensor, weights_KH: Tensor, subclasses: int
) -> tuple[Tensor, Tensor]:
    """The directions that split each class of a teacher: the principal ones of its steps' features, in the null
    space of the teacher's output.

    Features are projected onto the null space of the output weights; of those of a class, each step weighing the
    probability of the class there, the D directions of most variance are taken and rotated at random, so that all
    have the same variance in expectation.

    Args:
        features_LH: what the teacher's last layer reads.
        logps_LC: its log-probabilities.
        weights_KH: weights of its last layer.
        subclasses: D, >= 1.

    Returns:
        (C, D, H) directions and (C, D) offsets, float64: the projections ``directions @ features - offsets`` of a class
        have mean 0, and variance 1 on average over D.

    Raises:
        ConfigError: the features of a class vary in fewer directions.

    Source: Loo et al. 2024, LELP (arXiv 2409.20449), section 3.1, as reviews of it describe it: null space, PCA by
    class, random rotation. The paper itself was not read: **reconstruction** of the centring, the scale, and of whose
    classes the steps are.
    """
    features_LH, weights_KH, size = features_LH.double(), weights_KH.double(), (subclasses, subclasses)
    read_HH = torch.linalg.pinv(weights_KH) @ weights_KH
    noise_DD = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rotation_DD = torch.linalg.qr(noise_DD).Q.to(features_LH)
    directions, offsets = [], []
    for probs_L in logps_LC.double().softmax(-1).T:
        shares_L1 = (probs_L / probs_L.sum())[:, None]
        mean_H = (shares_L1 * features_LH).sum(0)
        apart_LH = (features_LH - mean_H) @ (torch.eye(len(mean_H)).to(read_HH) - read_HH)
        variances_H, axes_HH = torch.linalg.eigh(apart_LH.T @ (shares_L1 * apart_LH))
        variances_D, axes_DH = variances_H[-subclasses:], axes_HH.T[-subclasses:]
        if len(axes_DH) < subclasses or not variances_D[0] > 1e-12 * features_LH.square().mean():
            what = f"a class vary in fewer than {subclasses} directions that its output does not read"
            raise ConfigError(f"the teacher's features of {what}: lower head.subclasses, or give more training data")
        axes_DH = axes_DH * axes_DH.gather(1, axes_DH.abs().argmax(1, keepdim=True)).sign()  # whatever machine it is
        directions.append(rotation_DD @ axes_DH / variances_D.mean().sqrt())
        offsets.append(directions[-1] @ mean_H)
    return torch.stack(directions), torch.stack(offsets)


def subclass_targets(
    logps_LC: Tensor, features_LH: Tensor, directions_CDH: Tensor, offsets_CD: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """A teacher's probabilities of sub-classes: that of the class, times a softmax over the class's projections.

    Args:
        logps_LC: the teacher's log-probabilities.
        features_LH: what its last layer reads.
        directions_CDH, offsets_CD: what :func:`subclass_directions` gives.
        temperature: divides the projections, whose standard deviation is about 1; > 0.

    Returns:
        (L, K) probabilities, class by class; those of a class add up to the class's, and are it where D is 1.
    """
    projections_LCD = torch.einsum("lh,cdh->lcd", features_LH.to(directions_CDH), directions_CDH) - offsets_CD
    shares_LCD = (projections_LCD / temperature).softmax(-1).to(logps_LC)
    return (logps_LC.softmax(-1)[..., None] * shares_LCD).flatten(1)
