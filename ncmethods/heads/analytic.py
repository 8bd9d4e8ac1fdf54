"""Linear classifiers in closed form from class moments: nearest mean, LDA, ridge.

What they are computed from merges and subtracts exactly (:class:`~ncmethods.stats.ClassStats`), so
that they do not depend on the order in which classes or samples arrived, and forget a class that
is taken out.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ncmethods._core import InputError, check_choice
from ncmethods.features import FeatureSet
from ncmethods.stats import ClassStats, FrozenStats

__all__ = ["lda", "ncm", "ridge"]

Moments = FeatureSet | ClassStats | FrozenStats


def ncm(train: Moments, metric: Literal["l2", "cosine"] = "l2") -> nn.Linear:
    """Nearest class mean as a linear layer.

    ``l2``: w_c = μ_c, b_c = −½‖μ_c‖², so that logits and −½‖h − μ_c‖² differ by a number per sample
    only: argmax and softmax are those of the distances. ``cosine``: unit rows μ_c/‖μ_c‖, no bias;
    the argmax is the class mean at the smallest angle.

    A class without samples is masked: its row is 0 and its bias −∞, so it is never predicted. One
    sample is its own mean.

    Args:
        train: features and labels, or their class moments.
        metric: one of the two.

    Returns:
        features → logits, of the features' dtype and on their device (float32 for moments).

    Raises:
        InputError: an unknown metric, no labels, or no samples.

    References:
        Kang et al., ICLR 2020, arXiv:1910.09217 (NCM).
    """
    check_choice(metric, ("l2", "cosine"), "metric")
    _, means, empty = _means(train)
    norms = means.norm(dim=1)
    if metric == "cosine":
        means = means / torch.where(norms > 0, norms, 1)[:, None]
        bias = None if not bool(empty.any()) else torch.zeros_like(norms)
    else:
        bias = -0.5 * norms.square()
    return _linear(train, means, bias, empty)


def lda(
    train: Moments, *, shrinkage: float = 1e-4, prior: Literal["class", "sample"] = "class"
) -> nn.Linear:
    """Linear discriminant analysis: w_c = Σ⁻¹μ_c, b_c = −½ μ_cᵀΣ⁻¹μ_c + log π_c.

    Σ = (1 − s) Σ_W + s tr(Σ_W)/D · I. With ``prior="class"`` all classes are equally likely: that
    is streaming LDA, whatever the order in which the moments were collected. A class without
    samples is masked, and where nothing varies within classes the nearest mean decides.

    Args:
        train: features and labels, or their class moments.
        shrinkage: s in [0, 1]; 0 needs a Σ_W that is safely invertible, or directions without
            variance count as if they had 1e-8 of the largest.
        prior: π_c, the same for all, or the share of the samples.

    Returns:
        features → logits, of the features' dtype and on their device (float32 for moments).

    Raises:
        InputError: a shrinkage out of range, an unknown prior, no labels, or no samples.

    References:
        Hayes and Kanan, CVPR-W 2020, arXiv:1909.01520 (streaming LDA).
    """
    check_choice(prior, ("class", "sample"), "prior")
    if not 0 <= shrinkage <= 1:
        raise InputError(f"shrinkage lies in [0, 1], got {shrinkage}.")
    stats, means, empty = _means(train)
    if stats.sigma_w.any():
        # About the mean of all: far from the origin the products would cancel.
        F, center = stats.whitener("within", shrinkage), stats.mean
        z = (means - center) @ F  # [K, D]
        rows = z @ F.T
        bias = -0.5 * z.square().sum(1) - rows @ center
    else:
        rows, bias = means, -0.5 * means.square().sum(1)
    if prior == "sample":
        bias = bias + stats.counts.double().clamp(min=1).log()
    return _linear(train, rows, bias, empty)


def ridge(train: Moments, penalty: float = 1.0, *, intercept: bool = False) -> nn.Linear:
    """Ridge regression on one-hot labels: W = YᵀF (FᵀF + λI)⁻¹.

    Args:
        train: features F [N, D] and labels, or their class moments.
        penalty: λ > 0, on the sum over samples.
        intercept: with a bias that is not penalised.

    Returns:
        features → logits, of the features' dtype and on their device (float32 for moments).

    Raises:
        InputError: a penalty that is not positive, no labels, or no samples.

    References:
        McDonnell et al., NeurIPS 2023, arXiv:2307.02251 (RanPAC: on random projections).
    """
    if not penalty > 0:
        raise InputError(f"penalty must be positive, got {penalty}.")
    stats, means, empty = _means(train)
    center = stats.mean if intercept else torch.zeros_like(stats.mean)
    n, N, M = stats.counts.double(), stats.N, (means - center).masked_fill(empty[:, None], 0)
    gram = stats.within + M.T @ (n[:, None] * M)
    gram.diagonal().add_(penalty)
    rows = torch.linalg.solve(gram, (n[:, None] * M).T).T
    if not intercept:
        return _linear(train, rows, torch.zeros_like(n) if bool(empty.any()) else None, empty)
    return _linear(train, rows, n / N - rows @ center, empty)


def _means(train: Moments) -> tuple[FrozenStats, Tensor, Tensor]:
    """The moments, class means [K, D] with zeros for classes without samples, and which those are.

    Raises:
        InputError: no labels, or no samples.
    """
    active = train.stats.active if isinstance(train, FeatureSet) else train.active
    if not bool(active.any()):
        raise InputError("There are no samples, hence no class means.")
    if isinstance(train, FeatureSet):
        stats = train.frozen
    else:
        stats = train.freeze() if isinstance(train, ClassStats) else train
    empty = ~active
    return stats, stats.means.masked_fill(empty[:, None], 0), empty


def _linear(train: Moments, rows: Tensor, bias: Tensor | None, empty: Tensor) -> nn.Linear:
    """The layer, in which classes without samples have the bias −∞."""
    like = train.features if isinstance(train, FeatureSet) else rows.float()
    K, D = rows.shape
    layer = nn.Linear(D, K, bias=bias is not None, device=like.device, dtype=like.dtype)
    with torch.no_grad():
        layer.weight.copy_(rows.masked_fill(empty[:, None], 0))
        if bias is not None:
            layer.bias.copy_(bias.masked_fill(empty, -torch.inf))
    return layer
