"""Dot regression: pull each feature onto the fixed vertex of its class."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ncmethods._core import InputError, check_choice, check_features, check_labels, no_autocast
from ncmethods.losses._average import BALANCES, average

__all__ = ["dot_regression"]


def dot_regression(
    features: Tensor,
    labels: Tensor,
    weight: Tensor,
    *,
    balance: str = "batch",
    counts: Tensor | None = None,
    normalize: bool = True,
    norm_penalty: float = 0.0,
) -> Tensor:
    """Squared distance of ⟨h, w_y⟩ from its largest value; no term pushes classes apart.

    Per sample ℓ = (⟨h, w_y⟩ − ‖h‖‖w_y‖)² / (2‖h‖‖w_y‖), norms without gradient. With
    ``normalize`` and unit rows that is ½(1 − cos θ)² at angle θ to the vertex.

    Args:
        features: [N, D], the head's input after its neck.
        labels: int64 [N]; negative labels are left out.
        weight: fixed rows [K, D]; they get no gradient.
        balance: how samples are averaged. ``"batch"`` is the mean over the classes of the batch of
            their mean, what the authors' code does; ``"none"`` the plain mean, what the paper
            prints; ``"global"`` Σ ℓ_i/n_{y_i} / Σ 1/n_{y_i} with the training ``counts``.
        counts: training samples per class [K], for ``balance="global"``.
        normalize: scale features to unit norm; without it this is the authors' ImageNet form.
        norm_penalty: λ of λ·mean‖h‖, for ``normalize=False`` (the authors use 0.01).

    Returns:
        loss [].

    Raises:
        InputError: shapes that do not fit, labels ≥ K, an unknown balance, ``"global"`` without
            counts.

    References:
        Yang et al., NeurIPS 2022, arXiv:2203.09081 (dot-regression loss). The batch balancing is
        in the authors' released code and not in the paper.
    """
    check_choice(balance, BALANCES, "balance")
    features = check_features(features)
    if weight.ndim != 2 or weight.shape[1] != features.shape[1]:
        raise InputError(
            f"weight must be [K, D] with D = {features.shape[1]} as the features have, got "
            f"{tuple(weight.shape)}. Use the features after the head's neck."
        )
    K = len(weight)
    labels = check_labels(labels, len(features), K)
    y = labels.clamp(min=0)
    with no_autocast(features.device):
        h = F.normalize(features, dim=1) if normalize else features
        W = weight.detach().to(h.dtype)
        length = torch.linalg.vector_norm(h, dim=1)  # [N]
        reach = (length * torch.linalg.vector_norm(W, dim=1)[y]).detach()
        dots = (h * W[y]).sum(1)
        tiny = torch.finfo(h.dtype).tiny
        per_sample = (dots - reach).square() / (2 * reach.clamp(min=tiny))
        loss = average(per_sample, labels, K, balance, counts)
        if norm_penalty:
            loss = loss + norm_penalty * average(length, labels, K)
    return loss
