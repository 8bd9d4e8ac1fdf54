"""Vector scaling: logits that are divided and shifted by how often each class was seen."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ncmethods._core import check_counts, check_labels, check_logits
from ncmethods.losses._average import average

__all__ = ["vector_scaling"]


def vector_scaling(
    logits: Tensor, labels: Tensor, counts: Tensor, *, gamma: float = 0.3, tau: float = 1.0
) -> Tensor:
    """Cross-entropy of z_c / Δ_c + τ log π_c with Δ_c = (n_max / n_c)^γ, π = counts / Σ counts.

    τ = 0 is CDT (class-dependent temperatures), γ = 0 is :func:`~ncmethods.losses.logit_adjusted`,
    both 0 plain cross-entropy. Predict with the plain logits.

    Args:
        logits: [N, K].
        labels: int64 [N]; negative labels are left out.
        counts: training samples per class [K]. A class with count 0 takes no part in the softmax,
            unless γ = τ = 0.
        gamma: strength of the temperatures; rare classes must reach larger logits in training.
        tau: strength of the additive adjustment.

    Returns:
        loss [], the mean over labelled samples, 0 if there are none.

    Raises:
        InputError: shapes that do not fit, or labels ≥ K.

    References:
        Kini et al., NeurIPS 2021, arXiv:2103.01550 (VS loss). CDT: Ye et al., arXiv:2001.01385.
    """
    z = check_logits(logits)
    labels = check_labels(labels, len(z), z.shape[1])
    n = check_counts(counts, z.shape[1]).to(z.device).double()
    if gamma or tau:
        scale = (n / n.max()).pow(gamma)  # 1 / Δ_c
        shift = torch.where(n > 0, tau * (n / n.sum()).log(), -torch.inf)
        z = torch.addcmul(shift.to(z.dtype), z, scale.to(z.dtype))
    each = F.cross_entropy(z, labels.clamp(min=-1), ignore_index=-1, reduction="none")
    return average(each, labels, z.shape[1])
