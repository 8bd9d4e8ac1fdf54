"""Label smoothing: targets that leave a share of the mass to all classes."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ncmethods._core import InputError, check_counts, check_labels, check_logits
from ncmethods.losses._average import average

__all__ = ["label_aware_smoothing", "label_smoothing"]


def label_smoothing(logits: Tensor, labels: Tensor, *, epsilon: float = 0.1) -> Tensor:
    """Cross-entropy to the target (1−ε) e_y + ε/K.

    The smallest value is reached where the label's logit leads all others by log(1 + K(1−ε)/ε).

    Args:
        logits: [N, K].
        labels: int64 [N]; negative labels are left out.
        epsilon: share of the uniform distribution; 0 is plain cross-entropy.

    Returns:
        loss [], the mean over labelled samples, 0 if there are none.

    Raises:
        InputError: shapes that do not fit, labels ≥ K, or ε outside [0, 1].

    References:
        Szegedy et al., CVPR 2016, arXiv:1512.00567 (label-smoothing regularisation).
    """
    _check_share(epsilon, "epsilon")
    z = check_logits(logits)
    labels = check_labels(labels, len(z), z.shape[1])
    each = F.cross_entropy(
        z, labels.clamp(min=-1), ignore_index=-1, label_smoothing=epsilon, reduction="none"
    )
    return average(each, labels, z.shape[1])


def label_aware_smoothing(
    logits: Tensor,
    labels: Tensor,
    counts: Tensor,
    *,
    epsilon_many: float = 0.4,
    epsilon_few: float = 0.1,
) -> Tensor:
    """Label smoothing that is stronger for frequent classes, for the second stage of MiSLAS.

    The target of class c is (1−ε_c) e_c + ε_c/K with ε_c = ε_few + (ε_many − ε_few) ·
    sin(π/2 · (n_c − n_min)/(n_max − n_min)), the authors' concave form.

    Args:
        logits: [N, K].
        labels: int64 [N]; negative labels are left out.
        counts: training samples per class [K]. n_min is the smallest positive count; a class with
            count 0 gets ε_few and keeps its place in the softmax. Equal counts give ε_few.
        epsilon_many: ε of the most frequent class.
        epsilon_few: ε of the rarest class.

    Returns:
        loss [], the mean over labelled samples, 0 if there are none.

    Raises:
        InputError: shapes that do not fit, labels ≥ K, or an ε outside [0, 1].

    References:
        Zhong et al., CVPR 2021, arXiv:2104.00466 (label-aware smoothing).
    """
    _check_share(epsilon_many, "epsilon_many")
    _check_share(epsilon_few, "epsilon_few")
    z = check_logits(logits)
    labels = check_labels(labels, len(z), z.shape[1])
    n = check_counts(counts, z.shape[1]).to(z.device).double()
    rarest = torch.where(n > 0, n, torch.inf).min()
    spread = (n.max() - rarest).clamp(min=torch.finfo(n.dtype).tiny)
    rank = ((n - rarest) / spread).clamp(min=0)  # 0 the rarest class, 1 the most frequent
    epsilon = epsilon_few + (epsilon_many - epsilon_few) * (math.pi / 2 * rank).sin()  # [K]
    share = epsilon.to(z.dtype)[labels.clamp(min=0)]  # [N]
    log_p = F.log_softmax(z, dim=1)
    own = F.nll_loss(log_p, labels.clamp(min=-1), ignore_index=-1, reduction="none")
    return average((1 - share) * own - share * log_p.mean(1), labels, z.shape[1])


def _check_share(epsilon: float, name: str) -> None:
    if not 0 <= epsilon <= 1:
        raise InputError(f"{name} must lie in [0, 1], got {epsilon}: it is a share of the target.")
