"""H-score: the share of the variance that the labels explain, direction by direction."""

from __future__ import annotations

import torch
from torch import Tensor

from ncmethods._linalg import cholesky
from ncmethods.features import FeatureSet
from ncmethods.stats import ClassStats, FrozenStats
from ncmethods.transfer._inputs import between, extent, frozen

__all__ = ["h_score", "regularised_h_score"]

_ROWS = 4096  # of samples that are read at once


def h_score(stats: ClassStats | FrozenStats, *, pca: int | None = None) -> Tensor:
    """Tr(Σ_T† Σ_B), between 0 and min(K_active − 1, D), [].

    Both covariances are over samples; on balanced classes it is (K_active − 1)(1 − VCI). No
    invertible affine map of the features changes it. Where the within-class scatter vanishes it is
    the number of directions that the means span, K_active − 1 in general, and 0 for constant
    features. With N ≤ D + 1 samples it is K_active − 1 for any features in general position, also
    random ones: take ``pca``.

    Σ_T is inverted by the Cholesky factor of its correlations, or, where they are singular or
    nearly so, on its eigenvalues above D·eps of the largest, N − 1 at most.

    Args:
        stats: with scatter. Classes without samples are left out; a single sample is a class.
        pca: number of leading principal directions that are kept; all if None.

    Raises:
        InputError: fewer than two classes with samples, no scatter or a class-weighted one.

    References:
        Bao et al. 2019, arXiv:2212.10082 (definition of the H-score).
    """
    view = frozen(stats)
    return _explained(frozen(view, pca), 0.0, _rounding(view))


def regularised_h_score(data: FeatureSet | ClassStats | FrozenStats) -> Tensor:
    """(1 − α) Tr(Σ_α⁻¹ Σ_B) with Σ_α = (1 − α) Σ_T + α Tr(Σ_T)/D · I, [].

    α is the shrinkage of Ledoit and Wolf (2004) for Σ_T. All covariances are over N. The
    value lies between 0 and min(K_active − 1, D) and is unchanged by rotations, shifts and a
    common scale. Constant features give 0.

    Args:
        data: samples; or moments that hold Σ‖x − μ‖⁴, ``ClassStats(..., shrinkage=True)``.

    Raises:
        InputError: moments without it, fewer than two classes with samples.

    References:
        Ibrahim, Ponomareva, Mazumder 2021, arXiv:2110.06893 (the shrunk form).
    """
    view = data.frozen if isinstance(data, FeatureSet) else frozen(data)
    between(view)  # before the samples are read
    fourth = _fourth(data, view) if isinstance(data, FeatureSet) else view.fourth
    return _explained(view, ledoit_wolf(view, fourth), _rounding(view))


def ledoit_wolf(stats: FrozenStats, fourth: Tensor) -> float:
    """Shrinkage α of Σ_T towards a multiple of I, in [0, 1]; 0 where Σ_T is one already.

    Args:
        stats: with scatter.
        fourth: Σ‖x − μ‖⁴ about the mean of the samples.

    References:
        Ledoit, Wolf 2004, Journal of Multivariate Analysis 88 (365–411).
    """
    S, D = stats.sigma_t, stats.dim
    shape = S - S.diagonal().mean() * torch.eye(D, dtype=S.dtype, device=S.device)
    delta = float(shape.square().sum())
    beta = min(float(fourth.to(S) / stats.N - S.square().sum()) / stats.N, delta)
    return beta / delta if beta > 0 else 0.0


def _fourth(data: FeatureSet, stats: FrozenStats) -> Tensor:
    """Σ‖x − μ‖⁴ of the samples, kept with their moments."""

    def make() -> Tensor:
        assert data.labels is not None  # or there were no moments
        mean, total = stats.mean.to(data.features.device), stats.mean.new_zeros(())
        for x, y in zip(torch.split(data.features, _ROWS), torch.split(data.labels, _ROWS)):
            fourth = torch.linalg.vector_norm(x.detach() - mean, dim=1).pow(4)
            total += fourth[(y >= 0).to(fourth.device)].sum().to(total)
        return total

    made: Tensor = stats.cached("fourth", make)
    return made


def _rounding(stats: FrozenStats) -> float:
    """The variance that the rounding of the class means can make."""
    eps = torch.finfo(stats.means.dtype).eps
    return (max(stats.means.shape) * eps * extent(stats)) ** 2


def _explained(stats: FrozenStats, shrinkage: float, rounding: float) -> Tensor:
    """(1 − α) Tr(Σ_α† Σ_B), [], for the shrinkage α; variances up to ``rounding`` are none."""
    R, S, D = between(stats), stats.sigma_t, stats.dim
    bound, rank = min(len(R) - 1, D), min(stats.N - 1, D)
    target = shrinkage * float(S.diagonal().mean())
    live = S.diagonal() > rounding  # dead units say nothing, and no factor stands them
    R = R[:, live]

    def make() -> tuple[Tensor, Tensor] | None:
        if not R.shape[1] or (not shrinkage and rank < R.shape[1]):
            return None
        sigma = (1 - shrinkage) * S[live][:, live]
        sigma.diagonal().add_(target)
        unit = sigma.diagonal().rsqrt()  # the factor of correlations: no unit is too small
        L = cholesky(unit[:, None] * sigma * unit)
        return None if L is None else (L, unit)

    factor = stats.cached(("cholesky", shrinkage), make)
    if factor is not None:
        L, unit = factor
        value = torch.linalg.solve_triangular(L, (R * unit).T, upper=False).square().sum()
    else:
        values, vectors = stats.second_moment_eigh(stats.mean)
        keep = values > max(D * torch.finfo(S.dtype).eps * float(values[-1]), rounding)
        keep[: D - rank] = False
        power = (R @ vectors[live][:, keep]).square().sum(0)
        value = (power / ((1 - shrinkage) * values[keep] + target)).sum()
    bounded: Tensor = ((1 - shrinkage) * value).clamp(0, bound)  # beyond by rounding only
    return bounded
