"""Pick-all-label: the softmax loss of samples that carry several labels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ncmethods._core import InputError, check_logits

__all__ = ["pick_all_label"]


def pick_all_label(logits: Tensor, labels: Tensor, *, normalize: bool = False) -> Tensor:
    """Cross-entropy summed over the positive labels of a sample, mean over samples.

    Multi-label: ``labels`` is a multi-hot matrix here, not class indices. With one positive label
    in each row the loss is plain cross-entropy.

    Args:
        logits: [N, K].
        labels: multi-hot [N, K] of 0 and 1, any dtype. A row with a negative entry is left out; a
            row without a positive label has loss 0 and counts in the mean.
        normalize: divide the sum by the number of positive labels of the sample.

    Returns:
        loss [], 0 if every row is left out.

    Raises:
        InputError: shapes that do not fit, or entries > 1 (looked at on the CPU only).

    References:
        Li et al., ICML 2024, arXiv:2310.15903. Both forms: Menon et al., NeurIPS 2019
        ("Multilabel reductions").
    """
    z = check_logits(logits)
    if not isinstance(labels, Tensor) or labels.shape != z.shape:
        got = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise InputError(
            f"labels must be multi-hot {tuple(z.shape)} as the logits are, got {got}. "
            "For class indices take F.one_hot(labels, K), or plain cross-entropy."
        )
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = ~((labels <= 0) | (labels == 1))  # NaN too
        if bool(bad.any()):
            raise InputError(
                "labels must hold 0 and 1 (a negative entry leaves its row out), got "
                f"{labels[bad][0].item()}. "
                "Mixed labels: mix the losses, see losses.mixed."
            )
    known = (labels >= 0).all(1)
    positive = labels.to(z)
    per_sample = F.cross_entropy(z, positive, reduction="none")  # −Σ_c y_c log p_c
    if normalize:
        per_sample = per_sample / positive.sum(1).clamp(min=1)
    return (per_sample * known).sum() / known.sum().clamp(min=1)
