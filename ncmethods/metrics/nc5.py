"""NC5: class means against the mean of out-of-distribution features."""

from __future__ import annotations

from torch import Tensor

from ncmethods._core import InputError
from ncmethods.metrics._tiles import unit
from ncmethods.stats import ClassStats

__all__ = ["nc5"]


def nc5(stats: ClassStats, ood_mean: Tensor) -> Tensor:
    """Mean over classes of ``|cos(μ_c, μ_OOD)|``, uncentred, [], in [0, 1]: 0 is orthogonal.

    Args:
        stats: class moments of in-distribution features.
        ood_mean: mean of the out-of-distribution features [D].

    Raises:
        InputError: another D.

    References:
        Ben Ammar et al., ICLR 2024, "NECO" (NC5).
    """
    if tuple(ood_mean.shape) != (stats.dim,):
        raise InputError(f"ood_mean must be [D] = [{stats.dim}], got {tuple(ood_mean.shape)}.")
    M = stats.means[stats.active]
    return (unit(M) @ unit(ood_mean.to(M)[None])[0]).abs().mean()
