"""Losses that also see auxiliary outliers: images that belong to no class."""

from __future__ import annotations

import torch
from torch import Tensor

from ncmethods._core import check_features, check_labels, check_logits, no_autocast
from ncmethods.losses._class_means import known_rows, mean_of

__all__ = ["outlier_exposure", "separation"]


def outlier_exposure(outlier_logits: Tensor) -> Tensor:
    """mean(log Σ_c e^{l_c} − mean_c l_c): cross-entropy of outliers with the uniform distribution.

    log K where all logits of an outlier agree, more elsewhere. 0 without outliers.

    Args:
        outlier_logits: [M, K].

    Returns:
        loss [], to be added to that of the labelled samples; the literature takes half of it.

    Raises:
        InputError: logits that are not floating [M, K].

    References:
        Hendrycks et al., ICLR 2019, arXiv:1812.04606.
    """
    with no_autocast(outlier_logits.device):
        z = check_logits(outlier_logits)
        each = z.logsumexp(1) - z.mean(1)
        return each.sum() / max(len(each), 1)


def separation(
    features: Tensor, labels: Tensor, weight: Tensor, outlier_features: Tensor
) -> Tensor:
    """Mean of Σ_c abs cos(h, w_c) over outliers − mean cos(h_i, w_{y_i}): outliers leave span W.

    −1 where features lie on their rows and outliers are orthogonal to all. The rows are detached:
    features move, the classifier does not. A zero feature has no direction; its cosines are 0.

    Args:
        features: [N, D].
        labels: int64 [N]; samples with a negative label are left out.
        weight: rows of the classifier [K, D].
        outlier_features: [M, D].

    Returns:
        loss [], to be added to cross-entropy; each mean is 0 where it has no sample.

    Raises:
        InputError: shapes that do not fit, or a label ≥ K.

    References:
        Wu et al., ICLR 2025, arXiv:2405.17816, as their code has it.
    """
    with no_autocast(features.device):
        W = _unit(check_features(weight.detach()))
        h, known = known_rows(check_features(features, W.shape[1]), labels)
        y = check_labels(labels, len(h), len(W))
        o = _unit(check_features(outlier_features, W.shape[1]))
        W, o = W.to(h.dtype), o.to(h.dtype)
        aligned = mean_of((_unit(h) * W[y.clamp(min=0)]).sum(1), known)
        outside: Tensor = (o @ W.T).abs().sum() / max(len(o), 1)
        return outside - aligned


def _unit(x: Tensor) -> Tensor:
    """Rows of unit length; a zero row stays zero and gets no gradient."""
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    rows: Tensor = x / length.masked_fill(length == 0, torch.inf)
    return rows
