"""Balanced contrastive learning: SupCon whose sum over the batch counts classes, not samples."""

from __future__ import annotations

from torch import Tensor

from ncmethods._core import check_choice, check_features, check_labels, no_autocast
from ncmethods.losses._contrast import among_prototypes, check_rows, check_temperature

__all__ = ["balanced_contrastive"]


def balanced_contrastive(
    features: Tensor,
    labels: Tensor,
    weight: Tensor,
    *,
    temperature: float = 0.1,
    balance: str = "none",
) -> Tensor:
    """Supervised contrastive loss with prototypes, in which every class weighs the same.

    Mean over samples i of −(1/#P(i)) Σ_{p ∈ P(i)} log [e^{s_ip} / Σ_{k≠i} e^{s_ik}/a_ik] with
    s = z·z/τ over unit samples and unit prototypes. a_ik is how many entries the class of k has in
    the batch, its prototype included, without i itself: the sum runs over class means of e^s.
    All classes are in every batch through their prototype. What an anchor is pushed away from thus
    has no head and no tail; the anchors themselves are counted by ``balance``.

    Args:
        features: [N, D]; several views of the images stacked along N.
        labels: int64 [N], repeated for each view; negative labels are left out.
        weight: prototypes [K, D], which get a gradient. The authors take g(w_c): an MLP of the
            classifier's rows, into the space of the features.
        temperature: τ.
        balance: how anchors are averaged: ``"none"`` is the plain mean, as in the authors' code;
            ``"batch"`` the mean over the classes of the batch of their mean. Only with the latter
            is a collapsed simplex stationary in a batch of unequal classes.

    Returns:
        loss [].

    Raises:
        InputError: shapes that do not fit, labels ≥ K, τ ≤ 0, or an unknown balance.

    References:
        Zhu et al., CVPR 2022, arXiv:2207.09052 (class averaging and class complement).
    """
    check_temperature(temperature)
    check_choice(balance, ("batch", "none"), "balance")
    features = check_features(features)
    K = len(check_rows(weight, features.shape[1]))
    y = check_labels(labels, len(features), K)
    with no_autocast(features.device):
        return among_prototypes(
            features, y, weight, temperature, average=True, by_class=balance == "batch"
        )
