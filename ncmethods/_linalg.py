"""Decompositions with an explicit rank and tolerance, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def truncated_svd(matrix: Tensor, rank: int, size: float = 0.0) -> tuple[Tensor, Tensor]:
    """Leading singular values [r] and right singular vectors [r, D] of ``matrix`` [K, D].

    ``r`` is ``rank``, or less where singular values fall under max(K, D)·eps of the largest, or of
    ``size``, that of the entries before they were centred.
    """
    _, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    floor = max(matrix.shape) * torch.finfo(S.dtype).eps * max(float(S[0]), size)
    r = min(rank, int(S.gt(floor).sum()))
    return S[:r], Vh[:r]


def trace_pinv_product(sigma: Tensor, rows: Tensor) -> Tensor:
    """Tr(Σ† RᵀR) for a symmetric positive semi-definite Σ [D, D] and rows R [K, D], [].

    Eigenvalues of Σ under D·eps of the largest count as zero.
    """
    values, vectors = torch.linalg.eigh(sigma)
    keep = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
    power = (rows @ vectors).square().sum(0)  # [D]
    product: Tensor = (power[keep] / values[keep]).sum()
    return product
