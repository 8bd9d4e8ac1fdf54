"""Focal loss: cross-entropy that pays less attention to what is already well classified."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ncmethods._core import InputError, check_labels, check_logits
from ncmethods.losses._average import average

__all__ = ["focal"]


def focal(
    logits: Tensor, labels: Tensor, *, gamma: float = 2.0, class_weight: Tensor | None = None
) -> Tensor:
    """The softmax focal loss (1 − p_y)^γ · (−log p_y); the factor has its gradient too.

    Args:
        logits: [N, K].
        labels: int64 [N]; negative labels are left out.
        gamma: focus γ ≥ 0; 0 is plain cross-entropy.
        class_weight: weights α [K] (see :func:`~ncmethods.losses.drw_weights`); the mean is then
            Σ α_y ℓ / Σ α_y, as in torch's cross-entropy.

    Returns:
        loss [], the mean over labelled samples, 0 if there are none.

    Raises:
        InputError: shapes that do not fit, labels ≥ K, or γ < 0.

    References:
        Lin et al., ICCV 2017, arXiv:1708.02002, whose loss is binary; this is its usual
        softmax form.
    """
    if not gamma >= 0:
        raise InputError(f"gamma must be ≥ 0, got {gamma}: 0 is plain cross-entropy.")
    z = check_logits(logits)
    labels = check_labels(labels, len(z), z.shape[1])
    surprise = F.cross_entropy(z, labels.clamp(min=-1), ignore_index=-1, reduction="none")
    miss = -torch.expm1(-surprise)  # 1 − p_y
    miss = miss.clamp(min=torch.finfo(z.dtype).tiny)  # a power < 1 has no slope at 0
    return average(miss.pow(gamma) * surprise, labels, z.shape[1], class_weight=class_weight)
