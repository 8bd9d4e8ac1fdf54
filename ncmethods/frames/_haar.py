"""What several frames are built from: contrasts, Haar isometries, and their placing in R^D."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ncmethods._core import InputError, check_num_classes


def check_dim(num_classes: int, dim: int) -> tuple[int, int]:
    """Return (K, D) if K is an integer of at least 2 and D one of at least 1."""
    return check_num_classes(num_classes), check_positive("dim", dim)


def check_positive(name: str, value: int) -> int:
    """Return ``value`` if it is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name} must be an integer ≥ 1, got {value!r}.")
    return value


def helmert(num_classes: int) -> Tensor:
    """Orthonormal basis [K, K−1] of the contrasts: columns orthogonal to the ones vector."""
    j = torch.arange(1, num_classes, dtype=torch.float64)
    below = torch.ones(num_classes, num_classes - 1, dtype=torch.float64).triu()
    below[1:].diagonal().copy_(-j)
    return below / (j * (j + 1)).sqrt()


def simplex_rows(num_classes: int) -> Tensor:
    """Unit rows [K, K−1] with every pair at cosine −1/(K−1)."""
    return helmert(num_classes) * math.sqrt(num_classes / (num_classes - 1))


def haar_isometry(dim: int, rank: int, generator: torch.Generator | None) -> Tensor:
    """Haar-distributed [dim, rank] matrix with orthonormal columns, float64."""
    gaussian = torch.randn(dim, rank, dtype=torch.float64, generator=generator)
    Q, R = torch.linalg.qr(gaussian)
    signs = R.diagonal().sign()
    isometry: Tensor = Q * torch.where(signs == 0, torch.ones_like(signs), signs)
    return isometry


def place(rows: Tensor, dim: int, rotation: str, generator: torch.Generator | None) -> Tensor:
    """Rows [K, r] in R^dim: turned by a Haar isometry, or (canonical) padded with zeros."""
    if rotation == "haar":
        return rows @ haar_isometry(dim, rows.shape[1], generator).T
    return torch.nn.functional.pad(rows, (0, dim - rows.shape[1]))
