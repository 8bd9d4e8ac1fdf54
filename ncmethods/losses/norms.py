"""Regularisers of the centre and of the lengths of features."""

from __future__ import annotations

import torch
from torch import Tensor

from ncmethods._core import check_choice, no_autocast
from ncmethods.losses._class_means import class_means, known_rows, mean_of

__all__ = ["norm_variation", "zero_mean"]


def zero_mean(features: Tensor, labels: Tensor, *, balance: str = "batch") -> Tensor:
    """Squared norm of the mean of a batch: 0 where the features are centred.

    Args:
        features: [N, D].
        labels: int64 [N]; negative labels are left out.
        balance: ``"batch"`` takes the mean over the classes of the batch of their means,
            ``"none"`` the mean over samples. They differ where the counts do.

    Returns:
        loss [], without its λ.

    Raises:
        InputError: shapes that do not fit, or an unknown balance.

    References:
        Liu et al., AISTATS 2023, arXiv:2302.12453: their code has this term on learned centres
        (``CentreRegularizer(mean=…)``), with weight 0 by default. On batch means it is ours.
    """
    check_choice(balance, ("batch", "none"), "balance")
    with no_autocast(features.device):
        batch = class_means(features, labels)
        if balance == "batch":
            mean = batch.means.sum(0) / batch.classes.clamp(min=1)
        else:
            mean = batch.features.sum(0) / batch.known.sum().clamp(min=1)
        loss: Tensor = mean.square().sum()
    return loss


def norm_variation(features: Tensor, labels: Tensor, *, of: str = "samples") -> Tensor:
    """Variance of feature lengths over their squared mean: 0 where all lengths are equal.

    Var(‖·‖)/mean(‖·‖)² does not change with the scale of the features.

    Args:
        features: [N, D].
        labels: int64 [N]; negative labels are left out.
        of: ``"samples"`` the lengths ‖h_i‖; ``"means"`` the lengths of the centred class means
            ‖m_c − m̄‖ of the batch, which are equal in neural collapse. 0 with one class.

    Returns:
        loss [], without its λ.

    Raises:
        InputError: shapes that do not fit, or an unknown ``of``.
    """
    check_choice(of, ("samples", "means"), "of")
    with no_autocast(features.device):
        if of == "samples":
            rows, keep = known_rows(features, labels)
        else:
            batch = class_means(features, labels)
            rows, keep = batch.centred(), batch.present
        length = torch.linalg.vector_norm(rows, dim=1)
        mean = mean_of(length, keep)
        gap = (length - mean) / mean.clamp(min=torch.finfo(length.dtype).tiny)
        return mean_of(gap.square(), keep)
