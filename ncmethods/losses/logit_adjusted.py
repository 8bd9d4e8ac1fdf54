"""Logit adjustment: cross-entropy that knows how often each class was seen."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ncmethods._core import check_counts, check_labels, check_logits
from ncmethods.losses._average import average

__all__ = ["logit_adjusted"]


def logit_adjusted(logits: Tensor, labels: Tensor, counts: Tensor, *, tau: float = 1.0) -> Tensor:
    """Cross-entropy of ``logits + τ log π`` with class priors π = counts / Σ counts.

    At τ = 1 this is balanced softmax (Ren et al. 2020) and ARB (Xie et al. 2023), with global
    counts or, passing the batch's own, in their batch form. Predict with the plain logits. A class
    with count 0 takes no part in the softmax.

    Args:
        logits: [N, K].
        labels: int64 [N]; negative labels are left out.
        counts: training samples per class [K].
        tau: strength; 0 is plain cross-entropy.

    Returns:
        loss [], 0 if no sample is labelled.

    Raises:
        InputError: shapes that do not fit, or labels ≥ K.

    References:
        Menon et al., ICLR 2021, arXiv:2007.07314, §5.1, eq. (10).
    """
    z = check_logits(logits)
    labels = check_labels(labels, len(z), z.shape[1])
    prior = check_counts(counts, z.shape[1]).to(z.device).double()
    adjustment = tau * (prior / prior.sum()).log() if tau else prior.mul(0)
    z = z + adjustment.to(z.dtype)
    each = F.cross_entropy(z, labels.clamp(min=-1), ignore_index=-1, reduction="none")
    return average(each, labels, z.shape[1])
