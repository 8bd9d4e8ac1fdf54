"""How the samples of a batch are averaged: plainly, over the classes of the batch, or by counts."""

from __future__ import annotations

import torch
from torch import Tensor

from ncmethods._core import InputError, check_choice, check_counts

BALANCES = ("batch", "none", "global")


def average(
    each: Tensor,
    labels: Tensor,
    num_classes: int,
    balance: str = "none",
    counts: Tensor | None = None,
    class_weight: Tensor | None = None,
) -> Tensor:
    """Mean of ``each`` [N] over the samples with a label, []; 0 if there are none.

    Args:
        each: one value per sample.
        labels: int64 [N], negative where a sample is left out.
        num_classes: K.
        balance: ``"none"`` is the plain mean, ``"batch"`` the mean over the classes of the batch of
            their mean, ``"global"`` Σ x_i/n_{y_i} / Σ 1/n_{y_i}.
        counts: training samples per class [K], for ``"global"``; below 1 is taken as 1.
        class_weight: weights w [K]; the mean is then Σ w_y x / Σ w_y, as in torch's cross-entropy.

    Raises:
        InputError: an unknown balance, ``"global"`` without counts, or weights of another length.
    """
    check_choice(balance, BALANCES, "balance")
    share, y = (labels >= 0).to(each.dtype), labels.clamp(min=0)
    if balance == "batch":
        present = torch.zeros(num_classes, device=each.device, dtype=each.dtype)
        share = share / present.index_add_(0, y, share).clamp(min=1)[y]
    elif balance == "global":
        if counts is None:
            raise InputError("balance='global' needs counts, the training samples per class.")
        share = share / check_counts(counts, num_classes).to(each).clamp(min=1)[y]
    if class_weight is not None:
        if class_weight.shape != (num_classes,):
            raise InputError(
                f"class_weight must be [K] with K = {num_classes}, got {tuple(class_weight.shape)}."
            )
        share = share * class_weight.to(share)[y]
    value: Tensor = (share * each).sum() / share.sum().clamp(min=torch.finfo(each.dtype).tiny)
    return value
