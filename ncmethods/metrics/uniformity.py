"""Hyperspherical uniformity: how evenly the directions of K rows cover the sphere.

Both energies work on unit rows and walk over the pairs in tiles; no [K, K] matrix is held.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ncmethods._core import InputError
from ncmethods.metrics._tiles import Pairs, unit

__all__ = ["log_energy", "riesz_energy"]


def _unit(rows: Tensor) -> Pairs:
    return Pairs(unit(Pairs(rows).rows))


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
    pairs, mean, square = 0, U.square.new_zeros(()), U.square.new_zeros(())
    for a, b, d in U.distances():  # Chan's merge of each tile's mean and squares
        e = -0.5 * d.log()
        n = e.numel()
        if a == b:
            n -= len(e)
            e.fill_diagonal_(0)
        center = e.sum() / max(n, 1)
        gap = e.sub_(center)
        if a == b:
            gap.fill_diagonal_(0)
        n *= 1 if a == b else 2
        step = center - mean
        square = square + gap.square().sum() * (1 if a == b else 2)
        square = square + step.square() * (pairs * n / max(pairs + n, 1))
        mean = mean + step * (n / max(pairs + n, 1))
        pairs += n
    return mean, square / pairs


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
    power = float(max(U.rows.shape[1] - 2, 1) if s is None else s)
    if power <= 0:
        raise InputError(f"s must be positive, got {s}. For s → 0 use log_energy.")
    tiles = [
        (-0.5 * power * d.log()).flatten().logsumexp(0) + (0 if a == b else math.log(2))
        for a, b, d in U.distances()
    ]
    return torch.stack(tiles).logsumexp(0) - math.log(len(U) * (len(U) - 1))
