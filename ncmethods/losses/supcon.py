"""Supervised contrastive loss, also on rectified features, and with class prototypes."""

from __future__ import annotations

import torch
from torch import Tensor

from ncmethods._core import check_features, check_labels, no_autocast
from ncmethods.losses._contrast import (
    among_prototypes,
    attract,
    check_rows,
    check_temperature,
    same_class,
    shut,
    unit,
)

__all__ = ["prototype_supcon", "supcon"]


def supcon(
    features: Tensor, labels: Tensor, *, temperature: float = 0.1, relu: bool = False
) -> Tensor:
    """Pull the samples of a class together and push all others away, on the unit sphere.

    Mean over anchors i of −(1/#P(i)) Σ_{p ∈ P(i)} log [e^{z_i·z_p/τ} / Σ_{k≠i} e^{z_i·z_k/τ}], z
    the features scaled to unit length, P(i) the other samples of the class. An anchor without
    positives adds nothing and is not counted in the mean; it still is a negative for the others.

    Args:
        features: [N, D]; several views of the images stacked along N.
        labels: int64 [N], repeated for each view; negative labels are left out altogether.
        temperature: τ.
        relu: rectify the features before they are scaled to unit length. The minimiser then is an
            orthogonal frame, whatever the class counts.

    Returns:
        loss []; 0 where no class has two samples.

    Raises:
        InputError: shapes that do not fit, or τ ≤ 0.

    References:
        Khosla et al., NeurIPS 2020, arXiv:2004.11362 (the form with the sum outside the logarithm).
        With ReLU: Kini et al., ICLR 2024, arXiv:2306.07960.
    """
    check_temperature(temperature)
    features = check_features(features)
    y = check_labels(labels, len(features))
    known = y >= 0
    with no_autocast(features.device):
        z = unit(features.relu() if relu else features, known, temperature)
        positive, barred = same_class(y, known)
        number = positive.sum(1)
        outside = torch.zeros_like(barred, dtype=z.dtype).masked_fill_(barred, shut(z.dtype))
        logits = torch.addmm(outside, z, z.T)  # [N, N]
        pull = (logits * positive.to(z.dtype)).sum(1) / number.clamp(min=1)
        return attract(logits, pull, number > 0)


def prototype_supcon(
    features: Tensor,
    labels: Tensor,
    weight: Tensor,
    *,
    temperature: float = 0.1,
    relu: bool = False,
) -> Tensor:
    """Supervised contrastive loss with a prototype for each class in the contrast set.

    As :func:`supcon`, with the K rows of ``weight``, scaled to unit length, among the entries that
    an anchor is compared with: the row of its class is a positive, the others are negatives.
    Prototypes are no anchors. Every labelled sample has a positive, so every one counts.

    Args:
        features: [N, D]; several views of the images stacked along N.
        labels: int64 [N], repeated for each view; negative labels are left out.
        weight: prototypes [K, D]: a frame, or learned rows, which get a gradient.
        temperature: τ.
        relu: rectify the features (not the rows) first.

    Returns:
        loss [].

    Raises:
        InputError: shapes that do not fit, labels ≥ K, or τ ≤ 0.

    References:
        The general form; SupCon as in :func:`supcon`. :func:`balanced_contrastive` has prototypes
        too, and averages over classes in the sum.
    """
    check_temperature(temperature)
    features = check_features(features)
    K = len(check_rows(weight, features.shape[1]))
    y = check_labels(labels, len(features), K)
    with no_autocast(features.device):
        x = features.relu() if relu else features
        return among_prototypes(x, y, weight, temperature)
