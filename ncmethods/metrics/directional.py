"""Directional CDNV: the variance of the classes along the lines between their means.

Needs samples: no pooled scatter holds the variance of one class in one direction, and K scatters
would be K×D×D. So this is a second pass over the features, once the class means are known.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ncmethods._core import InputError, check_labels
from ncmethods.features import FeatureSet
from ncmethods.metrics._tiles import Pairs
from ncmethods.stats import ClassStats

__all__ = ["directional_cdnv"]

_CHUNK = 2048  # samples that meet a tile of classes at once


def directional_cdnv(data: FeatureSet, stats: ClassStats | None = None) -> Tensor:
    """CDNV that counts only the variance along the line between the two class means, [].

    The mean over ordered pairs of classes of

        (u_ijᵀ Σ_i u_ij + u_ijᵀ Σ_j u_ij) / (2‖μ_i − μ_j‖²),  u_ij = (μ_i − μ_j)/‖μ_i − μ_j‖,

    with Σ_c the covariance of class c (divided by n_c). This is :func:`cdnv` with the total
    variance of a class replaced by that along u_ij, so it is never above ``cdnv``, and equal to it
    in one dimension; isotropic classes give ``cdnv``/D. The one-sided form u_ijᵀ Σ_i u_ij/‖·‖² of
    the paper has the same mean over ordered pairs.

    A second pass over the samples, N·K·D operations in float64; memory holds the class means and
    tiles of samples by classes. Samples with negative labels and classes without samples are left
    out; the variance of a single sample is 0. NaN where two means coincide, which leaves no
    direction, and where no class has two samples.

    Args:
        data: features with labels.
        stats: the means to measure about, with or without scatter; those of ``data`` if None.
            Classes that are empty in ``stats`` are left out, as by ``ClassStats.at_least``. With
            training statistics and test data it is the second moment about the training means.

    Raises:
        InputError: no labels, fewer than two classes with samples, another K or D, or features that
            are not finite.

    References:
        Luthra, Salunkhe, Galanti 2026, arXiv:2603.03530 (directional CDNV, decision-axis variance).
    """
    if data.labels is None:
        raise InputError("Directional CDNV needs labels. Pass a FeatureSet with labels.")
    X = data.features.detach()
    y = check_labels(data.labels.cpu(), len(data), data.num_classes).to(X.device)
    if stats is None:
        stats = ClassStats(data.num_classes, data.dim, scatter=False).update(X, y)
    if (stats.num_classes, stats.dim) != (data.num_classes, data.dim):
        raise InputError(
            f"data has K = {data.num_classes} and D = {data.dim}, stats K = {stats.num_classes} "
            f"and D = {stats.dim}. Accumulate both with the same model and classes."
        )
    active = stats.active.to(X.device)
    known = ((y >= 0) & active[y.clamp(min=0)]).nonzero()[:, 0]
    order = known[y[known].argsort(stable=True)]  # class by class
    classes, y, counts = torch.unique(y[order], return_inverse=True, return_counts=True)
    K = len(classes)
    if K < 2:
        raise InputError(f"CDNV compares classes: at least two need samples, got {K}.")
    M = stats.means.to(X.device)[classes]  # [K', D], float64
    center = M.mean(0)
    M = M - center
    ends = [0, *counts.cumsum(0).tolist()]  # where the samples of each class begin
    total, finite = M.new_zeros(()), torch.ones((), dtype=torch.bool, device=X.device)

    def add(own: slice, other: slice, squares: Tensor) -> None:
        """Count the samples of the classes ``own`` along the lines to the classes ``other``."""
        for i in range(ends[own.start], ends[own.stop], _CHUNK):
            rows = slice(i, min(i + _CHUNK, ends[own.stop]))
            c = y[rows]
            R = X[order[rows]].double() - center - M[c]  # [B, D]
            finite.logical_and_(R.isfinite().all())
            along = R @ M[other].T - (R * M[c]).sum(1, keepdim=True)
            along /= squares[c - own.start]  # r·(μ_j − μ_i)/‖μ_j − μ_i‖², 0 at the own class
            total.add_(counts[c].double().reciprocal() @ along.square_().sum(1))

    for a, b, squares in Pairs(M).distances():
        add(a, b, squares)
        if a != b:
            add(b, a, squares.T)
    if not bool(finite):
        raise InputError("features hold NaN or Inf. Look for overflow in half precision.")
    value = total / (K * (K - 1))
    told = value.isfinite() & (stats.counts[classes.to(stats.counts.device)] > 1).any()
    return torch.where(told, value, torch.nan)
