"""Target geometries: unit rows [K, D] that a classifier or the class means can be held to."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ncmethods._core import InputError, check_choice, check_num_classes

__all__ = ["orthogonal_frame", "simplex_etf"]


def simplex_etf(
    num_classes: int,
    dim: int,
    *,
    rotation: str = "haar",
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Simplex equiangular tight frame: K unit rows, every pair at cosine −1/(K−1).

    Built in float64: Helmert's [K, K−1] orthonormal contrasts, scaled by √(K/(K−1)), times a
    Haar-distributed isometry of R^{K−1} into R^D. It exists for every ``dim ≥ K − 1``.

    Args:
        num_classes: K ≥ 2.
        dim: D.
        rotation: ``"haar"`` draws the isometry (QR of a Gaussian matrix with fixed signs);
            ``"canonical"`` centres the K unit axes and pads with zeros, which needs D ≥ K.
        generator: CPU generator for the Haar isometry; the global one if None.
        dtype: of the result.

    Returns:
        frame [K, D].

    Raises:
        InputError: D too small for a simplex, or an unknown rotation.

    References:
        Papyan, Han, Donoho 2020, arXiv:2008.08186 (definition of the simplex ETF). The Haar draw:
        Mezzadri 2007, arXiv:math-ph/0609050, section "A correct and efficient algorithm".
    """
    K = check_num_classes(num_classes)
    check_choice(rotation, ("haar", "canonical"), "rotation")
    least = K if rotation == "canonical" else K - 1
    if dim < least:
        raise InputError(
            f"A {rotation} simplex ETF of {K} classes needs dim ≥ {least}, got {dim}. "
            f"Widen the features (etf_head(..., dim={least}) adds a linear neck), or drop the "
            "simplex: cosine_head learns its rows in any dimension."
            + (" rotation='haar' needs only K − 1." if dim == K - 1 else "")
        )
    if rotation == "canonical":
        rows = torch.eye(K, dim, dtype=torch.float64)
        rows[:, :K] -= 1 / K
    else:
        rows = _helmert(K) @ _haar_isometry(dim, K - 1, generator).T
    return (rows * math.sqrt(K / (K - 1))).to(dtype)


def orthogonal_frame(
    num_classes: int,
    dim: int,
    *,
    rotation: str = "haar",
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Orthonormal frame: K unit rows, every pair at cosine 0; needs ``dim ≥ K``.

    The geometry of class means that are *not* centred (bias-free or non-negative features);
    centring it gives a simplex ETF.

    Args:
        num_classes: K ≥ 2.
        dim: D ≥ K.
        rotation: ``"haar"`` draws the rows from the Haar measure, ``"canonical"`` takes the axes.
        generator: CPU generator for the Haar draw; the global one if None.
        dtype: of the result.

    Returns:
        frame [K, D].

    Raises:
        InputError: D < K, or an unknown rotation.

    References:
        Mezzadri 2007, arXiv:math-ph/0609050, section "A correct and efficient algorithm".
    """
    K = check_num_classes(num_classes)
    check_choice(rotation, ("haar", "canonical"), "rotation")
    if dim < K:
        raise InputError(
            f"An orthogonal frame of {K} classes needs dim ≥ {K}, got {dim}. "
            "simplex_etf needs only K − 1."
        )
    if rotation == "canonical":
        return torch.eye(K, dim, dtype=dtype)
    return _haar_isometry(dim, K, generator).T.to(dtype)


def _helmert(num_classes: int) -> Tensor:
    """Orthonormal basis [K, K−1] of the contrasts: columns orthogonal to the ones vector."""
    j = torch.arange(1, num_classes, dtype=torch.float64)
    below = torch.ones(num_classes, num_classes - 1, dtype=torch.float64).triu()
    below[1:].diagonal().copy_(-j)
    return below / (j * (j + 1)).sqrt()


def _haar_isometry(dim: int, rank: int, generator: torch.Generator | None) -> Tensor:
    """Haar-distributed [dim, rank] matrix with orthonormal columns, float64."""
    gaussian = torch.randn(dim, rank, dtype=torch.float64, generator=generator)
    Q, R = torch.linalg.qr(gaussian)
    signs = R.diagonal().sign()
    isometry: Tensor = Q * torch.where(signs == 0, torch.ones_like(signs), signs)
    return isometry
