"""Hyperspherical uniformity: how evenly the directions of K rows cover the sphere.

Both energies work on unit rows and walk over the pairs in tiles; no [K, K] matrix is held.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ncmethods._core import InputError
from ncmethods.metrics._tiles import TILE, pair_sum, squared_distances

__all__ = ["log_energy", "riesz_energy"]


def _unit(rows: Tensor) -> Tensor:
    if rows.ndim != 2 or len(rows) < 2:
        raise InputError(f"rows must be [K, D] with K ≥ 2, got shape {tuple(rows.shape)}.")
    return F.normalize(rows.double(), dim=1)


def log_energy(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance over pairs of −log‖u_i − u_j‖ between unit rows, two [].

    Lower is more uniform; a simplex ETF has mean −½·log(2K/(K−1)) and variance 0.

    Args:
        rows: centred class means or classifier rows [K, D].

    Raises:
        InputError: fewer than two rows.

    References:
        Wu, Papyan 2024, arXiv:2405.17767 (GNC2); Liu et al. 2023, arXiv:2303.06484.
    """
    U = _unit(rows)
    pairs = len(U) * (len(U) - 1)

    def energies(a: Tensor, b: Tensor, start: int, center: Tensor | float) -> Tensor:
        e = -0.5 * squared_distances(a, b, start).log() - center
        e.diagonal(start).zero_()
        return e

    mean = pair_sum(U, lambda a, b, i: energies(a, b, i, 0.0).sum()) / pairs
    return mean, pair_sum(U, lambda a, b, i: energies(a, b, i, mean).square().sum()) / pairs


def riesz_energy(rows: Tensor, *, s: float | None = None) -> Tensor:
    """Logarithm of the mean over pairs of ‖u_i − u_j‖^{−s} between unit rows, [].

    Kept in logarithms: with s = D − 2 the energy itself underflows float32 from D ≈ 250 on and then
    reads "perfectly uniform". Lower is more uniform.

    Args:
        rows: centred class means or classifier rows [K, D].
        s: exponent > 0; max(D − 2, 1) if None.

    Raises:
        InputError: fewer than two rows, or s ≤ 0.

    References:
        Liu et al. 2023, arXiv:2303.06484 (hyperspherical energy).
    """
    U = _unit(rows)
    power = float(max(U.shape[1] - 2, 1) if s is None else s)
    if power <= 0:
        raise InputError(f"s must be positive, got {s}. For s → 0 use log_energy.")
    blocks = [
        (-0.5 * power * squared_distances(U[i : i + TILE], U, i).log()).flatten().logsumexp(0)
        for i in range(0, len(U), TILE)
    ]
    return torch.stack(blocks).logsumexp(0) - math.log(len(U) * (len(U) - 1))
