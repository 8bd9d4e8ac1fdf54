"""Small classes: estimates without the plug-in bias.

The mean of n samples is off by v/n in squared norm (v = total variance of the class). Plug-in
estimates ignore that and read collapse where there are only few samples.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ncmethods._core import InputError
from ncmethods.metrics._tiles import closeness
from ncmethods.stats import ClassStats

__all__ = ["debiased_angle", "debiased_cdnv", "debiased_nc1", "debiased_trace_ratio"]


def _variances(stats: ClassStats) -> Tensor:
    """Unbiased total variance of each class [K]; NaN for fewer than two samples."""
    n = stats.counts.double()
    return torch.where(n > 1, stats.trace / (n - 1), torch.nan)


def _mean_error(stats: ClassStats) -> Tensor:
    """E‖m_c − μ_c‖² [K] = v_c / n_c; NaN where it cannot be estimated."""
    return _variances(stats) / stats.counts


def debiased_trace_ratio(stats: ClassStats) -> Tensor:
    """Tr Σ_W / Tr Σ_B with class-weighted, bias-corrected traces, []; NaN if Σ_B vanishes.

    Σ_W averages the unbiased class variances over classes; Tr Σ_B loses (1 − 1/K)·mean(v_c/n_c).
    """
    active = stats.active
    v = _variances(stats)[active]
    K = len(v)
    between = stats.centered_means()[active].square().sum(1).mean()
    between = between - (1 - 1 / K) * _mean_error(stats)[active].mean()
    return torch.where(between > 0, v.mean() / between, torch.nan)


def debiased_cdnv(stats: ClassStats) -> Tensor:
    """CDNV with ‖m_i − m_j‖² − v_i/n_i − v_j/n_j in the denominator, []; NaN if one is ≤ 0."""
    active = stats.active
    M, v, e = stats.centered_means()[active], _variances(stats)[active], _mean_error(stats)[active]
    K = len(M)
    value = (v @ closeness(M, e)) / (K * (K - 1))
    return torch.where(value.isfinite(), value, torch.nan)


def debiased_nc1(stats: ClassStats) -> Tensor:
    """Tr(Σ_W Σ_B†)/K with Σ_W = within/(N − K) and Σ_B − (1 − 1/K)·mean(1/n)·Σ_W, [].

    NaN where the corrected Σ_B is not positive on the span of the centred means.
    """
    active = stats.active
    n = stats.counts[active].double()
    K = len(n)
    if float(n.sum()) <= K:
        return torch.full((), torch.nan, dtype=torch.float64)
    sigma_w = stats.within / (n.sum() - K)
    R = stats.centered_means()[active] / math.sqrt(K)
    _, S, V = torch.linalg.svd(R, full_matrices=False)
    V = V[: min(K - 1, stats.dim)]  # the span of the centred means
    W = V @ sigma_w @ V.T
    B = torch.diag(S[: len(V)].square()) - (1 - 1 / K) * n.reciprocal().mean() * W
    values, vectors = torch.linalg.eigh(B)
    if float(values[0]) <= 0:
        return torch.full((), torch.nan, dtype=torch.float64)
    nc1: Tensor = ((vectors.T @ W @ vectors).diagonal() / values).sum() / K
    return nc1


def debiased_angle(stats: ClassStats, i: int, j: int) -> Tensor:
    """Angle between two centred class means in degrees, norms without v/n, [].

    NaN where a corrected norm is not positive, or the corrected cosine leaves [−1, 1].
    """
    active = stats.active
    if not (bool(active[i]) and bool(active[j])):
        raise InputError(f"Classes {i} and {j} must both have samples.")
    K = int(active.sum())
    e = _mean_error(stats)
    M = stats.centered_means()
    pull = e[active].sum() / K**2  # variance of the estimated global mean

    def norm(c: int) -> Tensor:
        return M[c].square().sum() - (1 - 2 / K) * e[c] - pull

    dot = M[i] @ M[j] + (e[i] + e[j]) / K - pull
    return torch.rad2deg((dot / (norm(i) * norm(j)).sqrt()).acos())
