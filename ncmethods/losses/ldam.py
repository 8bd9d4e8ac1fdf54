"""LDAM: larger margins for rarer classes, and the weights of its deferred re-weighting."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ncmethods._core import InputError, check_counts, check_labels, check_logits
from ncmethods.losses._average import average

__all__ = ["drw_weights", "ldam"]


def ldam(
    logits: Tensor,
    labels: Tensor,
    counts: Tensor,
    *,
    max_margin: float = 0.5,
    scale: float = 30.0,
    class_weight: Tensor | None = None,
) -> Tensor:
    """Cross-entropy with a margin that grows as n_c^{−1/4}.

    The logits come as a cosine head returns them, s·cos θ; the label's cosine is lowered by
    Δ_y = max_margin · (n_min / n_y)^{1/4}.

    Args:
        logits: [N, K], scaled cosines.
        labels: int64 [N]; negative labels are left out.
        counts: training samples per class [K]; a class with count 0 gets no margin.
        max_margin: Δ of the rarest class, in cosine units.
        scale: s, the head's scale.
        class_weight: weights [K] for deferred re-weighting (see :func:`drw_weights`); the mean is
            then weighted, as in torch's cross-entropy.

    Returns:
        loss [], 0 if no sample is labelled.

    Raises:
        InputError: shapes that do not fit, or labels ≥ K.

    References:
        Cao et al., NeurIPS 2019, arXiv:1906.07413, §3.2, eqs. (12) and (13).
    """
    z = check_logits(logits)
    labels = check_labels(labels, len(z), z.shape[1])
    n = check_counts(counts, z.shape[1]).to(z.device).double()
    rarest = torch.where(n > 0, n, torch.inf).min()
    margin = torch.where(n > 0, max_margin * (rarest / n).pow(0.25), 0.0)  # [K]
    y = labels.clamp(min=0)
    shift = torch.zeros_like(z).scatter(1, y[:, None], scale * margin.to(z.dtype)[y][:, None])
    each = F.cross_entropy(z - shift, labels.clamp(min=-1), ignore_index=-1, reduction="none")
    return average(each, labels, z.shape[1], class_weight=class_weight)


def drw_weights(counts: Tensor, *, beta: float = 0.9999) -> Tensor:
    """Class weights of deferred re-weighting: (1−β)/(1−β^{n_c}), scaled to sum K.

    Args:
        counts: training samples per class [K], all positive.
        beta: 0 gives equal weights; towards 1 they approach 1/n_c.

    Returns:
        weights [K], float32. The recipe passes them as ``class_weight`` from a late epoch on.

    Raises:
        InputError: a class without samples.

    References:
        Cui et al., CVPR 2019, arXiv:1901.05555, eq. (8). Deferred: Cao et al. 2019, algorithm 1,
        which prints 1/n_c; its released code takes these weights.
    """
    n = check_counts(counts).double()
    if bool((n <= 0).any()):
        empty = (n <= 0).nonzero().flatten().tolist()
        raise InputError(f"Classes {empty} have no training samples, so they have no weight.")
    w = (1 - beta) / (1 - torch.as_tensor(beta, dtype=torch.float64) ** n)
    return (w * len(n) / w.sum()).float()
