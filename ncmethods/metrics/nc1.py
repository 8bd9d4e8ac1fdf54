"""NC1, variability collapse: how small the classes are beside the distances between them.

All four measures are ≥ 0, and 0 at collapse. Classes without samples are left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ncmethods._core import InputError
from ncmethods._linalg import trace_pinv_product, truncated_svd
from ncmethods.metrics._tiles import closeness
from ncmethods.stats import ClassStats

__all__ = ["cdnv", "nc1_pinv", "nc1_terms", "trace_ratio", "vci"]


def between_rows(stats: ClassStats, weighting: str = "class") -> Tensor:
    """Rows R [K_active, D] with RᵀR = Σ_B: centred means times the roots of their shares.

    Raises:
        InputError: fewer than two classes have samples.
    """
    shares = stats.class_shares(weighting)
    active = shares > 0
    if int(active.sum()) < 2:
        raise InputError(
            f"Neural collapse compares classes: at least two need samples, got {stats.K_active}."
        )
    return (stats.centered_means(weighting) * shares.sqrt()[:, None])[active]


def _size(stats: ClassStats) -> float:
    """Largest entry of the class means, which sets the rounding of centred means."""
    return float(stats.means.nan_to_num().abs().max())


def nc1_terms(stats: ClassStats, weighting: str = "class") -> tuple[Tensor, int]:
    """Tr(Σ_W Σ_B†)/K, [], and the rank at which Σ_B was inverted."""
    R = between_rows(stats, weighting)
    S, V = truncated_svd(R, min(len(R) - 1, stats.dim), size=_size(stats))
    if not len(S):  # the means coincide: nothing tells the classes apart
        return R.new_tensor(torch.nan), 0
    spread = ((V @ stats.sigma_w) * V).sum(1)  # v_jᵀ Σ_W v_j
    return (spread / S.square()).sum() / len(R), len(S)


def nc1_pinv(stats: ClassStats, *, weighting: str = "class") -> Tensor:
    """NC1 of the papers, Tr(Σ_W Σ_B†)/K, [].

    Σ_B is inverted at rank min(K_active − 1, D), less directions in which the means agree to
    rounding (``report`` says at which rank); NaN where all means agree. Σ_W is weighted as it was
    accumulated.

    Args:
        stats: with scatter.
        weighting: of the means in μ_G and Σ_B: ``"class"`` or ``"sample"``. On a long tail the
            choice moves NC1 by an order of magnitude.

    Raises:
        InputError: fewer than two classes with samples, or no scatter.

    References:
        Papyan, Han, Donoho 2020, arXiv:2008.08186 (NC1).
    """
    return nc1_terms(stats, weighting)[0]


def trace_ratio(stats: ClassStats, *, weighting: str = "class") -> Tensor:
    """Tr Σ_W / Tr Σ_B, []: needs no scatter.

    Args:
        stats: class moments; Σ_W is weighted by sample.
        weighting: of the means in μ_G and Σ_B.

    References:
        Tirer, Huang, Niles-Weed 2023, arXiv:2210.16658 (NC1 by traces).
    """
    within = stats.trace.sum() / stats.counts.sum()
    return within / between_rows(stats, weighting).square().sum()


def cdnv(stats: ClassStats) -> Tensor:
    """Class-distance normalised variance, []: needs no scatter.

    The mean over ordered pairs of classes of (v_i + v_j) / (2‖μ_i − μ_j‖²), with v_c the mean
    squared distance to the class mean.

    Raises:
        InputError: fewer than two classes with samples.

    References:
        Galanti, György, Hutter 2022, arXiv:2112.15121 (definition of CDNV).
    """
    active = stats.active
    M = stats.centered_means()[active]
    v = (stats.trace / stats.counts)[active]
    K = len(M)
    if K < 2:
        raise InputError(f"CDNV compares classes: at least two need samples, got {K}.")
    return (v @ closeness(M, torch.zeros_like(v))) / (K * (K - 1))


def vci(stats: ClassStats, *, weighting: str = "class") -> Tensor:
    """Variability collapse index 1 − Tr(Σ_T† Σ_B) / rank Σ_B, [], in [0, 1].

    Σ_T = Σ_W + Σ_B with the same weighting of Σ_B; rank Σ_B as in :func:`nc1_pinv`. Unlike NC1 it
    is unchanged by any invertible linear map of the features.

    References:
        Xu, Liu 2023, arXiv:2306.03440 (definition of VCI).
    """
    R = between_rows(stats, weighting)
    S, _ = truncated_svd(R, min(len(R) - 1, stats.dim), size=_size(stats))
    return 1 - trace_pinv_product(stats.sigma_w + R.T @ R, R) / len(S)
