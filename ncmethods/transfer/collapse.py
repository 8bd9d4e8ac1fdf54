"""Neural collapse of the features on the target data, signed so that higher is better."""

from __future__ import annotations

import torch
from torch import Tensor

from ncmethods._core import InputError
from ncmethods._linalg import truncated_svd
from ncmethods.metrics._tiles import Pairs, closeness
from ncmethods.metrics.nc1 import Between, cdnv_of
from ncmethods.stats import ClassStats, FrozenStats
from ncmethods.transfer._inputs import between, frozen

__all__ = ["cdnv", "few_shot_cdnv", "nc1", "vci"]


def nc1(stats: ClassStats | FrozenStats) -> Tensor:
    """−Tr(Σ_W Σ_B†)/K, [], at most 0: minus :func:`ncmethods.metrics.nc1_pinv`.

    Σ_B is of class means that weigh alike, Σ_W over samples. NaN where all class means agree, or no
    class has two samples.

    Args:
        stats: with scatter.

    Raises:
        InputError: fewer than two classes with samples, no scatter, or a class-weighted one.

    References:
        Papyan, Han, Donoho 2020, arXiv:2008.08186 (NC1).
    """
    view = frozen(stats)
    return -_between(view).nc1(_sigma_w(view))


def vci(stats: ClassStats | FrozenStats, *, pca: int | None = None) -> Tensor:
    """−(1 − Tr(Σ_T† Σ_B) / rank Σ_B), [], in [−1, 0]: minus :func:`ncmethods.metrics.vci`.

    With fewer samples than dimensions it nears 0 whatever the features are: ``pca`` keeps it from
    that. Where all class means agree it is −1; NaN where no class has two samples.

    Args:
        stats: with scatter.
        pca: number of leading principal directions that are kept; all if None.

    Raises:
        InputError: as in :func:`nc1`.

    References:
        Xu, Liu 2023, arXiv:2306.03440 (definition of VCI).
    """
    view = frozen(stats, pca)
    found, sigma_w = _between(view), _sigma_w(view)
    return -found.vci(sigma_w, view.N) if found.rank else sigma_w[0, 0] * 0 - 1


def cdnv(stats: ClassStats | FrozenStats) -> Tensor:
    """Minus the mean over pairs of classes of (v_i + v_j) / (2‖μ_i − μ_j‖²), [], at most 0.

    Minus :func:`ncmethods.metrics.cdnv`; needs no scatter. −∞ where two class means agree; NaN
    where those two classes do not vary either, or no class has two samples.

    Raises:
        InputError: fewer than two classes with samples.

    References:
        Galanti, György, Hutter 2022, arXiv:2112.15121 (definition of CDNV).
    """
    view = frozen(stats)
    near, _ = closeness(Pairs(_means(view)))
    return -cdnv_of(_variances(view), near)


def few_shot_cdnv(stats: ClassStats | FrozenStats, shots: int) -> Tensor:
    """Minus a bound on the error of the nearest mean of ``shots`` samples per class, [].

    With d_ij = ‖μ_i − μ_j‖, v_c the mean squared distance to the class mean and n shots, a sample
    of class i is nearer to the estimated mean of j with probability at most

        [((2 + 1/√n) √v_i + √(v_j/n)) / d_ij]²

    for any distribution: by the triangle inequality such a sample has 2‖h − μ_i‖ plus the errors of
    both estimates ≥ d_ij, then Markov's inequality on the square. These are summed over j and
    averaged over i. It is no estimate of the error and mostly above 1: with equal variances it is
    4 (1 + 1/√n)² (K − 1) CDNV. Needs no scatter; −∞ and NaN as in :func:`cdnv`.

    Args:
        stats: class moments.
        shots: n, samples for each estimated mean.

    Raises:
        InputError: fewer than two classes with samples, or a ``shots`` under 1.
    """
    if shots < 1:
        raise InputError(f"shots is a number of samples per class, at least 1, got {shots}.")
    view = frozen(stats)
    s, root = _variances(view).sqrt(), shots**-0.5
    pairs = Pairs(_means(view))
    total = s.new_zeros(())
    for a, b, d in pairs.distances():
        u, v = s[a, None], s[b]
        total = total + (((2 + root) * u + root * v).square() / d).sum()
        if a != b:
            total = total + (((2 + root) * v + root * u).square() / d).sum()
    return -total / len(pairs)


def _means(view: FrozenStats) -> Tensor:
    """Centred class means [K_active, D], zero where they agree up to rounding."""
    R = between(view, "class")
    M: Tensor = R * len(R) ** 0.5
    floor = max(M.shape) * torch.finfo(M.dtype).eps * _size(view)
    return M * 0 if float(M.abs().max()) <= floor else M


def _size(view: FrozenStats) -> float:
    """What the rounding of class means is relative to: the largest entry, or the spread."""
    spread = (view.trace.sum() / view.N).nan_to_num().sqrt()
    return max(float(view.means[view.active].abs().max()), float(spread))


def _between(view: FrozenStats) -> Between:
    """Σ_B of class means that weigh alike, decomposed once."""

    def make() -> Between:
        M = _means(view)
        R = M / len(M) ** 0.5
        return Between(R, *truncated_svd(R, min(len(R) - 1, view.dim), _size(view)))

    made: Between = view.cached("between", make)
    return made


def _sigma_w(view: FrozenStats) -> Tensor:
    """Σ_W [D, D]; NaN where no class has two samples."""
    return view.sigma_w if _told(view) else torch.full_like(view.sigma_w, torch.nan)


def _variances(view: FrozenStats) -> Tensor:
    """Mean squared distances to the class means [K_active]; NaN where no class has two samples."""
    v = (view.trace / view.counts)[view.active]
    return v if _told(view) else torch.full_like(v, torch.nan)


def _told(view: FrozenStats) -> bool:
    return int(view.active.sum()) < view.N
