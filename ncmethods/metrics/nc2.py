"""NC2, the geometry of K rows (class means or classifier rows): a simplex ETF at collapse.

Every function takes rows [K, D] and leaves centring to the caller: centred rows cannot tell a
simplex ETF from an orthogonal frame, uncentred ones can.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ncmethods._core import InputError

__all__ = ["equiangular", "equinorm", "gram_etf", "min_angle"]


def _rows(rows: Tensor) -> Tensor:
    if rows.ndim != 2 or len(rows) < 2:
        raise InputError(f"rows must be [K, D] with K ≥ 2, got shape {tuple(rows.shape)}.")
    return rows.double()


def _cosines(rows: Tensor) -> Tensor:
    unit = F.normalize(rows, dim=1)
    return unit @ unit.T


def equinorm(rows: Tensor) -> Tensor:
    """Coefficient of variation of the row norms (population standard deviation), [].

    References:
        Papyan, Han, Donoho 2020, arXiv:2008.08186 (NC2, equal norms).
    """
    norms: Tensor = torch.linalg.vector_norm(_rows(rows), dim=1)
    return norms.std(correction=0) / norms.mean()


def equiangular(rows: Tensor) -> Tensor:
    """Mean over pairs of ``|cos + 1/(K−1)|``, [].

    References:
        Papyan, Han, Donoho 2020, arXiv:2008.08186 (NC2, equal and maximal angles).
    """
    K = len(rows)
    gap = (_cosines(_rows(rows)) + 1 / (K - 1)).abs()
    return (gap.sum() - gap.diagonal().sum()) / (K * (K - 1))


def gram_etf(rows: Tensor) -> Tensor:
    """‖G/‖G‖_F − E/‖E‖_F‖_F with G the Gram matrix and E = I − 11ᵀ/K, [], in [0, √2].

    References:
        Zhu et al. 2021, arXiv:2105.02375 (measure of NC2).
    """
    R = _rows(rows)
    K = len(R)
    G = R @ R.T
    E = (torch.eye(K, dtype=G.dtype, device=G.device) - 1 / K) / math.sqrt(K - 1)
    distance: Tensor = torch.linalg.matrix_norm(G / torch.linalg.matrix_norm(G) - E)
    return distance


def min_angle(rows: Tensor) -> Tensor:
    """Smallest angle between two rows in degrees, [].

    References:
        Fang et al. 2021, arXiv:2101.12699 (minority collapse: angles between minority rows).
    """
    R = _rows(rows)
    cosines = _cosines(R).fill_diagonal_(-torch.inf)
    i, j = divmod(int(cosines.argmax()), len(R))
    a, b = F.normalize(R[i], dim=0), F.normalize(R[j], dim=0)
    # Kahan's form keeps small angles exact where arccos loses half of the digits.
    angle = 2 * torch.atan2(torch.linalg.vector_norm(a - b), torch.linalg.vector_norm(a + b))
    return torch.rad2deg(angle)
