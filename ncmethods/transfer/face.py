"""FaCe-style: variance collapse of the classes, and how evenly each overlaps with the others."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ncmethods._core import InputError, check_choice
from ncmethods._linalg import truncated_svd
from ncmethods.features import FeatureSet
from ncmethods.metrics.nc1 import Between
from ncmethods.stats import ClassStats, FrozenStats
from ncmethods.transfer._inputs import PoolScore, between, extent, frozen, min_max
from ncmethods.transfer.gbc import COVARIANCES, Gaussians, gaussians, overlaps

__all__ = ["face", "face_pool"]


def face(
    data: FeatureSet | ClassStats | FrozenStats,
    *,
    temperature: float = 0.05,
    include_self: bool = False,
    covariance: str = "diagonal",
    scale: float = 1.0,
    floor: float = 1e-4,
) -> Tensor:
    """C + s·F: variance collapse and class fairness, [].

    C = −Tr(Σ_W Σ_B†)/K ≤ 0 is minus NC1, with classes weighted alike in Σ_B. F is the mean over
    classes k of the entropy of softmax_j(O_kj/t), with O the Bhattacharyya coefficients of the
    classes as Gaussians. It lies between 0 and log(K − 1), the latter where all others overlap with
    k alike: so they do when all are collapsed, and when all coincide. F alone certifies nothing.

    Classes without samples are left out. Where no class has two samples, or all means coincide, the
    value is NaN. A common scale, shifts and, for spherical Gaussians, rotations change nothing.

    Args:
        data: samples; or moments that hold class variances, ``ClassStats(..., variances=True)``.
        temperature: t.
        include_self: whether j runs over k too. Collapsed classes then have the lowest F.
        covariance: of the Gaussians, ``"diagonal"`` or ``"spherical"``.
        scale: s; 1/log(K − 1) puts the second term into [0, 1].
        floor: smallest variance of a class along a dimension; a share of the mean total variance.

    Raises:
        InputError: fewer than two classes with samples, no class variances, options out of range.

    References:
        Ding, Jiang, Sheng, Zheng, Liang 2023, arXiv:2310.05754. The sum of the two terms, C and
        the coefficient are confirmed; the card says what is not.
    """
    terms = _components(
        data,
        temperature=temperature,
        include_self=include_self,
        covariance=covariance,
        floor=floor,
    )
    return terms["collapse"] + scale * terms["fairness"]


def _components(
    data: FeatureSet | ClassStats | FrozenStats,
    *,
    temperature: float = 0.05,
    include_self: bool = False,
    covariance: str = "diagonal",
    floor: float = 1e-4,
) -> dict[str, Tensor]:
    """C and F."""
    check_choice(covariance, COVARIANCES, "covariance")
    for name, value in (("temperature", temperature), ("floor", floor)):
        if not value > 0:
            raise InputError(f"{name} must be positive, got {value}.")
    view = data.frozen if isinstance(data, FeatureSet) else frozen(data)
    R = between(view, "class")
    rank = min(len(R) - 1, view.dim)
    collapse = Between(R, *truncated_svd(R, rank, extent(view))).nc1(view.sigma_w)
    if len(R) == view.N:  # nothing is known of variances
        collapse = collapse * torch.nan
    means, variances = gaussians(data)
    least = floor * float(view.sigma_t.diagonal().mean()) or 1.0
    classes = Gaussians(means, variances.clamp(min=least))
    fairness = _entropy(classes, covariance, temperature, include_self).mean()
    return {"collapse": -collapse, "fairness": fairness}


def _entropy(classes: Gaussians, covariance: str, temperature: float, include_self: bool) -> Tensor:
    """Entropy of softmax_j(O_kj/t) for each class k, [K], tile by tile.

    With e = exp(o − max o) it is log Σe − (Σ e log e)/Σe; the largest o so far is kept.
    """
    top = torch.zeros_like(classes.means[:, 0])  # no overlap is less
    Z, W = torch.zeros_like(top), torch.zeros_like(top)

    def add(rows: slice, o: Tensor, axis: int) -> None:
        new = torch.maximum(top[rows], o.amax(axis))
        down = top[rows] - new
        e = (o - new.unsqueeze(axis)).exp()
        W[rows] = down.exp() * (W[rows] + down * Z[rows]) + torch.xlogy(e, e).sum(axis)
        Z[rows] = down.exp() * Z[rows] + e.sum(axis)
        top[rows] = new

    for a, b, overlap in overlaps(classes, covariance):
        o = overlap / temperature
        if a == b:
            o.fill_diagonal_(1 / temperature if include_self else -torch.inf)
        add(a, o, 1)
        if a != b:
            add(b, o, 0)
    return Z.log() - W / Z


def _combine(pool: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: parts["collapse"] + parts["fairness"] for name, parts in min_max(pool).items()}


face_pool = PoolScore(_components, _combine)
"""C + F, each scaled to [0, 1] over the pool; :func:`face` without that."""
