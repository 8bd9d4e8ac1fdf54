"""Simplex equiangular tight frames: the plain one, and one with prescribed zeros."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ncmethods._core import InputError, check_choice, check_num_classes
from ncmethods.frames._haar import check_dim, haar_isometry, helmert

__all__ = ["simplex_etf", "sparse_etf"]


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
    Haar-distributed isometry of R^{K−1} into R^D. It exists for every ``dim ≥ K − 1``; with
    ``dim = K − 1`` it is the maximally separated matrix of Kasarla et al., up to rotation.

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
        Papyan, Han, Donoho 2020, arXiv:2008.08186 (definition of the simplex ETF). Kasarla et al.
        2022, arXiv:2206.08704 (D = K − 1). The Haar draw: Mezzadri 2007, arXiv:math-ph/0609050,
        section "A correct and efficient algorithm".
    """
    K = check_num_classes(num_classes)
    check_choice(rotation, ("haar", "canonical"), "rotation")
    least = K if rotation == "canonical" else K - 1
    if dim < least:
        others = (
            " rotation='haar' needs only K − 1."
            if dim == K - 1
            else f" In {dim} dimensions: softmax_code and spread"
            + (", or orthoplex for K ≤ 2D." if 2 * dim >= K else ".")
        )
        raise InputError(
            f"A {rotation} simplex ETF of {K} classes needs dim ≥ {least}, got {dim}. "
            f"Widen the features (etf_head(..., dim={least}) adds a linear neck), or drop the "
            "simplex: cosine_head learns its rows in any dimension." + others
        )
    if rotation == "canonical":
        rows = torch.eye(K, dim, dtype=torch.float64)
        rows[:, :K] -= 1 / K
    else:
        rows = helmert(K) @ haar_isometry(dim, K - 1, generator).T
    return (rows * math.sqrt(K / (K - 1))).to(dtype)


def sparse_etf(
    num_classes: int,
    dim: int,
    *,
    sparsity: float = 0.6,
    steps: int = 5000,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Simplex ETF of which a prescribed share of the entries is zero.

    The zeros are drawn, evenly over the columns, and stay; the other entries are found by
    alternating projection between the matrices with these zeros, whose columns sum to zero, and the
    simplex ETFs (one eigendecomposition). Where both meet the cosines are exact, to 1e-12.

    Args:
        num_classes: K ≥ 2.
        dim: D.
        sparsity: share of zeros, to the nearest of the K·D entries.
        steps: at most.
        generator: CPU generator of the zeros and the start; the global one if None.
        dtype: of the result.

    Returns:
        frame [K, D] with round(sparsity · K · D) zeros.

    Raises:
        InputError: fewer free entries than conditions, or no simplex found with these zeros.

    References:
        Xiao et al. 2024, arXiv:2401.08977 (static sparse ETF, which they find approximately).
    """
    K, D = check_dim(num_classes, dim)
    if D < K - 1:
        raise InputError(f"A simplex ETF of {K} classes needs dim ≥ {K - 1}, got {D}.")
    if not 0 <= sparsity < 1:
        raise InputError(f"sparsity must lie in [0, 1), got {sparsity!r}.")
    free = K * D - round(sparsity * K * D)
    # Columns sum to zero, and the K(K−1)/2 products of the K − 1 rows that are left are given.
    if free < 2 * D or free - D < K * (K - 1) // 2:
        raise InputError(
            f"A simplex ETF of {K} classes in dim = {D} with sparsity = {sparsity} has {free} free "
            f"entries; it needs two in each column and at least {D + K * (K - 1) // 2} in all. "
            f"Take sparsity ≤ {max(0.0, 1 - max(2 * D, D + K * (K - 1) // 2) / (K * D)):.3f}, or "
            "a larger dim."
        )
    order = torch.rand(K, D, dtype=torch.float64, generator=generator).argsort(0).argsort(0)
    more = torch.rand(D, dtype=torch.float64, generator=generator).argsort() < free % D
    mask = (order < free // D + more.long()).double()  # [K, D], free entries
    count = mask.sum(0)

    Q = helmert(K)
    length = math.sqrt(K / (K - 1))
    rows = torch.randn(K, D, dtype=torch.float64, generator=generator)
    for _ in range(steps):
        rows = rows * mask
        rows = rows - mask * (rows.sum(0) / count)
        B = Q.T @ rows
        values, V = torch.linalg.eigh(B @ B.T)  # an SVD can fail where all values are equal
        off = float((values - length**2).abs().max())
        if off < 1e-13:
            return rows.to(dtype)
        rows = Q @ (V * (length / values.clamp(min=1e-20).sqrt())) @ (V.T @ B)
    raise InputError(
        f"No simplex ETF of {K} classes in dim = {D} was found with this draw of {sparsity:.0%} "
        f"zeros (its Gram matrix is still off by {off:.1e} after {steps} steps). "
        "Lower sparsity, widen dim, or draw again."
    )
