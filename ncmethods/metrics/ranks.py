"""Ranks of a feature matrix: how many dimensions the features really use.

Every function takes a symmetric positive semi-definite matrix, such as ``stats.sigma_t``, or the
Gram matrix of rows; singular values σ are the roots of its eigenvalues λ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ncmethods._core import InputError

__all__ = ["effective_rank", "nuclear_rank", "participation_ratio", "stable_rank", "threshold_rank"]


def _eigenvalues(sigma: Tensor) -> Tensor:
    if sigma.ndim != 2 or sigma.shape[0] != sigma.shape[1]:
        raise InputError(f"sigma must be a square matrix [D, D], got {tuple(sigma.shape)}.")
    if not bool(sigma.isfinite().all()):
        raise InputError("sigma holds NaN or Inf: its rank is not defined.")
    values: Tensor = torch.linalg.eigvalsh(sigma.double()).clamp(min=0)
    if float(values[-1]) == 0:
        raise InputError("sigma is zero: its rank is not defined. Are all features the same?")
    return values


def stable_rank(sigma: Tensor) -> Tensor:
    """Σλ / λ_max, [], in [1, D]."""
    values = _eigenvalues(sigma)
    return values.sum() / values[-1]


def participation_ratio(sigma: Tensor) -> Tensor:
    """(Σλ)² / Σλ², [], in [1, D]."""
    values = _eigenvalues(sigma)
    return values.sum().square() / values.square().sum()


def nuclear_rank(sigma: Tensor) -> Tensor:
    """(Σσ / ‖σ‖₂)² of the singular values, [], in [1, D]: the "numerical rank" of NC papers."""
    values = _eigenvalues(sigma)
    return values.sqrt().sum().square() / values.sum()


def effective_rank(sigma: Tensor) -> Tensor:
    """Exp of the entropy of σ/Σσ, [], in [1, D].

    References:
        Roy, Vetterli 2007, "The effective rank: a measure of effective dimensionality".
    """
    p = _eigenvalues(sigma).sqrt()
    p = p / p.sum()
    rank: Tensor = torch.special.entr(p).sum().exp()
    return rank


def threshold_rank(sigma: Tensor, *, rtol: float = 1e-3) -> Tensor:
    """How many singular values exceed ``rtol`` of the largest, []."""
    values = _eigenvalues(sigma)
    return (values.sqrt() > rtol * values[-1].sqrt()).sum()
