"""Baselines for every ranking: what simple classifiers reach on the features, leave-one-out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ncmethods._core import InputError
from ncmethods.features import FeatureSet
from ncmethods.transfer._inputs import labelled

__all__ = ["knn", "linear_probe", "nearest_centre"]

_ENTRIES = 1 << 25  # of a block of distances


def nearest_centre(data: FeatureSet) -> Tensor:
    """Accuracy of the nearest class mean, each sample judged by means without it, [] in [0, 1].

    A sample that is alone in its class is an error: its class has no mean without it.

    References:
        The mean without x is m − (x − m)/(n − 1): x lies n/(n − 1) times as far from it.
    """
    data = labelled(data)
    y, stats, x = _labels(data), data.frozen, data.features.double()
    means = stats.means.nan_to_num(0.0).to(x)
    x, means = x - stats.mean.to(x), means - stats.mean.to(x)
    far = x.square().sum(1, keepdim=True) - 2 * x @ means.T + means.square().sum(1)
    far = far.masked_fill(~stats.active.to(x.device), torch.inf)
    n = stats.counts.to(x)[y]
    own = (x - means[y]).square().sum(1) * (n / (n - 1)).square()  # ∞ or NaN where n = 1
    far.scatter_(1, y[:, None], own.nan_to_num(torch.inf)[:, None])
    return (far.argmin(1) == y).double().mean() if len(y) > 1 else x.new_tensor(torch.nan)


def knn(data: FeatureSet, *, k: int = 5) -> Tensor:
    """Leave-one-out accuracy of the k nearest neighbours by cosine, [] in [0, 1].

    The majority decides; among equal majorities the class of the most similar neighbours.

    Args:
        data: features and labels; cost N² D.
        k: neighbours, less than N.

    Raises:
        InputError: a k that is not between 1 and N − 1.
    """
    data = labelled(data)
    y, N = _labels(data), len(data)
    if not 1 <= k < N:
        raise InputError(f"k must lie between 1 and N − 1 = {N - 1}, got {k}.")
    x = F.normalize(data.features, dim=1)
    hits = 0
    for rows in torch.split(torch.arange(N, device=x.device), max(1, _ENTRIES // N)):
        near = x[rows] @ x.T
        near[torch.arange(len(rows), device=x.device), rows] = -torch.inf
        similar, which = near.topk(k)
        votes = x.new_zeros(len(rows), data.num_classes)
        votes.scatter_add_(1, y[which], 1 + (1 + similar) / (2 * k + 1) / 2)
        hits += int((votes.argmax(1) == y[rows]).sum())
    return torch.tensor(hits / N, dtype=torch.float64)


def linear_probe(data: FeatureSet, *, ridges: Sequence[float] = (1e-6, 1e-4, 1e-2, 1.0)) -> Tensor:
    """Leave-one-out accuracy of ridge regression on one-hot labels, the best ridge, [] in [0, 1].

    In closed form from one eigendecomposition of Σ_T (prediction errors without a sample are its
    residual over 1 − its leverage). With intercept, which is not penalised. The best of few ridges
    is an optimistic choice by a little.

    Args:
        data: features and labels.
        ridges: penalties, in units of the mean variance of a feature times N.

    Raises:
        InputError: no ridge, or one that is not positive.

    References:
        Allen, Technometrics 1974 (PRESS).
    """
    if not ridges or min(ridges) <= 0:
        raise InputError(f"ridges must be positive, got {tuple(ridges)}.")
    data = labelled(data)
    y, stats, N = _labels(data), data.frozen, len(data)
    values, vectors = stats.second_moment_eigh(stats.mean)
    values, size = N * values.clamp(min=0), float(N * values.clamp(min=0).mean()) or 1.0
    counts = stats.counts.double()
    means = (stats.means - stats.mean).nan_to_num(0.0)
    cross = vectors.T @ (counts[:, None] * means).T  # ZᵀY [D, K]
    z = (data.features.double() - stats.mean.to(data.features.device)) @ vectors.to(
        data.features.device
    )
    target = F.one_hot(y, data.num_classes).double()
    best = torch.zeros((), dtype=torch.float64)
    for ridge in ridges:
        shrunk = (1 / (values + ridge * size)).to(z)
        fitted = z @ (shrunk[:, None] * cross.to(z)) + (counts / N).to(z)
        left = 1 - 1 / N - (z.square() @ shrunk)  # 1 − leverage
        without = target - (target - fitted) / left.clamp(min=1e-12)[:, None]
        best = torch.maximum(best, (without.argmax(1) == y).double().mean().cpu())
    return best


def _labels(data: FeatureSet) -> Tensor:
    assert data.labels is not None
    return data.labels
