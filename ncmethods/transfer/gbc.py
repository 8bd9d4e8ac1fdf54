"""GBC: how much the classes overlap, each taken for a Gaussian."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ncmethods._core import InputError, check_choice
from ncmethods.features import FeatureSet
from ncmethods.metrics._tiles import Pairs
from ncmethods.stats import ClassStats, FrozenStats
from ncmethods.transfer._inputs import frozen, principal

__all__ = ["gbc"]

COVARIANCES = ("diagonal", "spherical")
_ENTRIES = 2**21  # of a tile of pairs and dimensions: 16 MiB of float64


def gbc(
    data: FeatureSet | ClassStats | FrozenStats,
    *,
    components: int | None = 64,
    covariance: str = "diagonal",
    floor: float = 1e-4,
) -> Tensor:
    """Minus the sum over ordered pairs of classes of their Bhattacharyya coefficient, [].

    It lies between −K(K − 1), for classes that coincide, and 0. Each class is a Gaussian with
    variances over n_c. Classes without samples are left out; one sample has the variance ``floor``.
    The floor is in squared units of the features, so the value depends on their scale.

    Args:
        data: samples; or, with ``components=None``, moments that hold the class variances,
            ``ClassStats(..., variances=True)``.
        components: principal coordinates (not whitened) that are compared; None for the features
            themselves.
        covariance: ``"diagonal"`` variances, or their mean (``"spherical"``).
        floor: smallest variance of a class along a coordinate.

    Raises:
        InputError: moments with ``components``, or without class variances; fewer than two classes
            with samples; a negative floor.

    References:
        Pándy et al. 2022, arXiv:2111.12780 (definition of GBC).
    """
    check_choice(covariance, COVARIANCES, "covariance")
    if not floor > 0:
        raise InputError(f"floor must be positive, got {floor}: a class can be a single point.")
    means, variances = gaussians(data, components)
    total = means.new_zeros(())
    for a, b, overlap in overlaps(Gaussians(means, variances.clamp(min=floor)), covariance):
        total -= overlap.sum() * (1 if a == b else 2)
    return total


class Gaussians(NamedTuple):
    """The classes that have samples, each a Gaussian."""

    means: Tensor  # [K, D]
    variances: Tensor  # [K, D]


def gaussians(
    data: FeatureSet | ClassStats | FrozenStats, components: int | None = None
) -> Gaussians:
    """Means, about the mean of all samples, and variances along each coordinate.

    Raises:
        InputError: see :func:`gbc`.
    """
    if not isinstance(data, FeatureSet):
        if components is not None:
            raise InputError(
                "Class variances along principal coordinates are not a function of the moments: "
                "pass a FeatureSet, or components=None."
            )
        return _active(frozen(data))

    def make() -> Gaussians:
        z = data if components is None else principal(data, components)
        assert z.labels is not None  # or there were no moments
        light = ClassStats(z.num_classes, z.dim, scatter=False, variances=True)
        return _active(light.update(z.features, z.labels).freeze())

    made: Gaussians = data.frozen.cached(("gaussians", components), make)
    return made


def _active(stats: FrozenStats) -> Gaussians:
    keep = stats.active
    if int(keep.sum()) < 2:
        raise InputError(
            f"This score compares classes: at least two need samples, got {keep.sum()}."
        )
    return Gaussians((stats.means - stats.mean)[keep], stats.variances[keep])


def overlaps(classes: Gaussians, covariance: str) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield slices a ≤ b of classes and their Bhattacharyya coefficients [A, B], 0 on the diagonal.

    With σ̄² the mean of two variances it is exp(−D_B),

        D_B = ⅛ Σ_d Δμ_d²/σ̄_d² + ½ Σ_d (ln σ̄_d² − ½ ln σ_i,d² − ½ ln σ_j,d²).

    Args:
        classes: with positive variances.
        covariance: one of ``COVARIANCES``.
    """
    means, variances = classes
    K, D = means.shape
    if covariance == "spherical":
        v = variances.mean(1)
        for a, b, d in Pairs(means).distances():
            both = (v[a, None] + v[b]) / 2
            shape = both.log() - (v[a, None].log() + v[b].log()) / 2
            yield a, b, torch.exp(-(d / both / 8 + D / 2 * shape))
        return
    logs = variances.log().sum(1)
    side = max(1, math.isqrt(_ENTRIES // D))
    for i in range(0, K, side):
        a = slice(i, min(i + side, K))
        for j in range(i, K, side):
            b = slice(j, min(j + side, K))
            both = (variances[a, None] + variances[b]) / 2  # [A, B, D]
            apart = ((means[a, None] - means[b]).square_() / both).sum(2)
            shape = both.log_().sum(2) - (logs[a, None] + logs[b]) / 2
            overlap = torch.exp(-(apart / 8 + shape / 2))
            if a == b:
                overlap.fill_diagonal_(0)
            yield a, b, overlap
