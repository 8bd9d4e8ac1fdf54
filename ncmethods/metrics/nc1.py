"""NC1, variability collapse: how small the classes are beside the distances between them.

All four measures are ≥ 0, and 0 at collapse. Classes without samples are left out; where no class
has two samples nothing is known of variances, and they are NaN. ``weighting`` is
``"class"`` (the default), ``"sample"``, or how a publication does it: ``"papyan"``,
``"papyan-demo"``, ``"zhu"``, ``"galanti"``, ``"he-su"``. On a long tail the choice moves NC1 by an
order of magnitude; on equal counts only those differ that do not divide by K (demo, He and Su).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ncmethods._core import InputError
from ncmethods._linalg import cholesky, trace_pinv_product, truncated_svd
from ncmethods.metrics._tiles import Pairs, closeness
from ncmethods.metrics._weighting import centred, size, variances, weighting_of
from ncmethods.stats import ClassStats

__all__ = ["Between", "cdnv", "nc1_pinv", "trace_ratio", "vci"]


class Between(NamedTuple):
    """Σ_B = RᵀR and its leading singular values and vectors."""

    rows: Tensor  # R [K_active, D]
    S: Tensor  # [r]
    V: Tensor  # [r, D]

    @classmethod
    def of(cls, stats: ClassStats, weighting: str) -> Between:
        """Decompose Σ_B at rank min(K_active − 1, D), less what is rounding of the means."""
        R = weighting_of(weighting).rows(stats)
        return cls(R, *truncated_svd(R, min(len(R) - 1, stats.dim), size(stats)))

    @property
    def rank(self) -> int:
        """At which Σ_B is inverted."""
        return len(self.S)

    def nc1(self, sigma_w: Tensor) -> Tensor:
        """Tr(Σ_W Σ_B†)/K, []; NaN where the means coincide and nothing tells the classes apart."""
        if not self.rank:
            return self.rows.new_tensor(torch.nan)
        spread = ((self.V @ sigma_w) * self.V).sum(1).clamp(min=0)  # v_jᵀ Σ_W v_j
        return (spread / self.S.square()).sum() / len(self.rows)

    def vci(self, sigma_w: Tensor, samples: int) -> Tensor:
        """1 − Tr((Σ_W + Σ_B)† Σ_B)/rank Σ_B, [].

        With β the eigenvalues of Σ_W⁻¹Σ_B it is the mean of 1/(1 + β), where nothing cancels in
        collapse. A singular Σ_W leaves the form above, inverted at the rank ``samples`` allow.
        """
        R, rank = self.rows, self.rank
        if not rank or samples <= len(R):
            return R.new_tensor(torch.nan)
        L = cholesky(sigma_w) if samples - len(R) >= len(sigma_w) else None
        if L is None:
            total = trace_pinv_product(sigma_w + R.T @ R, R, min(samples - 1, len(sigma_w)))
            return (1 - total / rank).clamp(0, 1)  # beyond by rounding only
        Z = torch.linalg.solve_triangular(L, R.T, upper=False)
        beta = torch.linalg.eigvalsh(Z.T @ Z if len(R) <= len(Z) else Z @ Z.T)[-rank:]
        value: Tensor = (1 / (1 + beta)).mean()
        return value


def nc1_pinv(stats: ClassStats, *, weighting: str = "class") -> Tensor:
    """NC1 of the papers, Tr(Σ_W Σ_B†)/K, [].

    Σ_B is inverted at rank min(K_active − 1, D), less directions in which the means agree to
    rounding (``report`` says at which rank); NaN where all means agree.

    Args:
        stats: with scatter; Σ_W is weighted as it was accumulated, and a named preset raises where
            that is not its own weighting.
        weighting: of the classes.

    Raises:
        InputError: fewer than two classes with samples, no scatter, or a Σ_W of another weighting.

    References:
        Papyan, Han, Donoho 2020, arXiv:2008.08186 (NC1).
    """
    how = weighting_of(weighting)
    between = Between.of(stats, weighting)
    value = between.nc1(how.sigma_w(stats))
    return value if how.per_class else value * len(between.rows)


def trace_ratio(stats: ClassStats, *, weighting: str = "class") -> Tensor:
    """Tr Σ_W / Tr Σ_B, []: needs no scatter.

    Args:
        stats: class moments.
        weighting: of the classes.

    References:
        Tirer, Huang, Niles-Weed 2023, arXiv:2210.16658 (NC1 by traces).
    """
    how = weighting_of(weighting)
    return how.trace_w(stats) / how.rows(stats).square().sum()


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
    if int(active.sum()) < 2:
        raise InputError(f"CDNV compares classes: at least two need samples, got {active.sum()}.")
    near, _ = closeness(Pairs(centred(stats)[active]))
    return cdnv_of(variances(stats)[active], near)


def cdnv_of(variances: Tensor, near: Tensor) -> Tensor:
    """CDNV from class variances [K] and :func:`closeness` [K]."""
    return (variances @ near) / (len(near) * (len(near) - 1))


def vci(stats: ClassStats, *, weighting: str = "class") -> Tensor:
    """Variability collapse index 1 − Tr(Σ_T† Σ_B) / rank Σ_B, [], in [0, 1].

    Σ_T = Σ_W + Σ_B with the same weighting of Σ_B; rank Σ_B as in :func:`nc1_pinv`. Unlike NC1 it
    is unchanged by any invertible linear map of the features. With fewer samples than dimensions
    it is biased to 0.

    References:
        Xu, Liu 2023, arXiv:2306.03440 (definition of VCI).
    """
    sigma_w = weighting_of(weighting).sigma_w(stats)
    return Between.of(stats, weighting).vci(sigma_w, stats.N)
