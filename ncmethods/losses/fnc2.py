"""Focal neural-collapse contrastive loss: hard pairs and hard prototypes weigh more."""

from __future__ import annotations

import torch
from torch import Tensor

from ncmethods._core import InputError, check_features, check_labels, no_autocast
from ncmethods.losses._contrast import (
    check_rows,
    check_temperature,
    same_class,
    shut,
    unit,
)

__all__ = ["fnc2"]


def fnc2(
    features: Tensor,
    labels: Tensor,
    weight: Tensor | None = None,
    *,
    gamma: float = 2.0,
    temperature: float = 0.1,
) -> Tensor:
    """Contrastive loss whose sample–sample and sample–prototype terms carry a focal factor.

    With z and the rows p of ``weight`` scaled to unit length, and G_i the sum of e^{z_i·e/τ} over
    the other samples e of the batch and over all prototypes:

        P(j|i) = e^{z_i·z_j/τ} / G_i,   R(i) = e^{z_i·p_{y_i}/τ} / G_i,
        L = −mean_{pairs of one class} (1−P)^γ log P − mean_i (1−R)^γ log R.

    The first mean is over pairs, not over anchors: large classes weigh with their square. A batch
    without pairs, or without labelled samples, has no such term.

    Args:
        features: [N, D]; several views of the images stacked along N.
        labels: int64 [N], repeated for each view; negative labels are left out.
        weight: prototypes [K, D] without gradient, a frame; pass the rows of classes seen so far.
            None leaves prototypes out of G and drops the second term.
        gamma: γ ≥ 0; 0 is the contrastive loss without focal factor.
        temperature: τ.

    Returns:
        loss [].

    Raises:
        InputError: shapes that do not fit, labels ≥ K, γ < 0 or τ ≤ 0.

    References:
        Dang et al., WACV 2025, arXiv:2412.02865, whose full text was not at hand. The formula here
        is that of a later work that uses the loss: arXiv:2609.03406, eqs. (13) to (20).
    """
    check_temperature(temperature)
    if not gamma >= 0:
        raise InputError(f"gamma must be ≥ 0, got {gamma}. 0 turns the focal factor off.")
    features = check_features(features)
    K = None if weight is None else len(check_rows(weight, features.shape[1]))
    y = check_labels(labels, len(features), K)
    known = y >= 0
    with no_autocast(features.device):
        z = unit(features, known)
        positive, barred = same_class(y, known)
        pairs = z @ z.T / temperature
        entries = pairs.masked_fill(barred, shut(z.dtype))
        if weight is not None:
            to_rows = z @ unit(weight.detach().to(z.dtype)).T / temperature  # [N, K]
            entries = torch.cat([entries, to_rows], 1)
        total = entries.logsumexp(1, keepdim=True)  # [N, 1], log G
        loss = _focal(pairs - total, positive, gamma)
        if weight is not None:
            at_own = to_rows.gather(1, y.clamp(min=0)[:, None])
            loss = loss + _focal(at_own - total, known[:, None], gamma)
        return loss


def _focal(log_p: Tensor, where: Tensor, gamma: float) -> Tensor:
    """Mean of −(1−p)^γ log p over the places ``where``; 0 if there are none."""
    log_p = torch.where(where, log_p, 0.0)
    rest = -torch.expm1(log_p)  # 1 − p, exact also near p = 1
    hard = rest.clamp(min=torch.finfo(rest.dtype).tiny).pow(gamma)
    mean: Tensor = -(hard * log_p).sum() / where.sum().clamp(min=1)
    return mean
