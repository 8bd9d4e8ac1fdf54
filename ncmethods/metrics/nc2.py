"""NC2, the geometry of K rows (class means or classifier rows): a simplex ETF at collapse.

Every function takes rows [K, D] and leaves centring to the caller: centred rows cannot tell a
simplex ETF from an orthogonal frame, uncentred ones can.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ncmethods._core import InputError, check_counts
from ncmethods.metrics._tiles import TILE, pair_sum

__all__ = [
    "angles",
    "equiangular",
    "equinorm",
    "gram_distance",
    "gram_etf",
    "min_angle",
    "seli",
]


def _rows(rows: Tensor) -> Tensor:
    if rows.ndim != 2 or len(rows) < 2:
        raise InputError(f"rows must be [K, D] with K ≥ 2, got shape {tuple(rows.shape)}.")
    return rows.double()


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
    return angles(rows)["mean"]


def angles(rows: Tensor) -> dict[str, Tensor]:
    """Mean, maximum and standard deviation over pairs of the cosines' distance to −1/(K−1).

    ``mean`` and ``max`` are of ``|cos + 1/(K−1)|``, ``std`` is that of the cosines; each []. Walks
    over the pairs in tiles.

    References:
        Papyan, Han, Donoho 2020, arXiv:2008.08186 (NC2).
    """
    U = F.normalize(_rows(rows), dim=1)
    K = len(U)
    pairs, target = K * (K - 1), -1 / (K - 1)
    worst = U.new_zeros(())

    def block(a: Tensor, b: Tensor, start: int) -> Tensor:
        nonlocal worst
        gap = a @ b.T - target
        gap.diagonal(start).zero_()
        worst = torch.maximum(worst, gap.abs().max())
        return torch.stack((gap.abs().sum(), gap.sum(), gap.square().sum()))

    total, signed, square = pair_sum(U, block) / pairs
    return {"mean": total, "max": worst, "std": (square - signed.square()).clamp(min=0).sqrt()}


def gram_etf(rows: Tensor) -> Tensor:
    """‖G/‖G‖_F − E/‖E‖_F‖_F with G the Gram matrix and E = I − 11ᵀ/K, [], in [0, √2].

    References:
        Zhu et al. 2021, arXiv:2105.02375 (measure of NC2).
    """
    K = len(rows)
    return gram_distance(rows, lambda i, j: (i == j).double() - 1 / K)


def gram_distance(rows: Tensor, target: Tensor | Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Distance of the Gram matrix of the rows to that of a target geometry, both at unit norm, [].

    Args:
        rows: [K, D].
        target: rows [K, D'] such as ``frames.orthogonal_frame(K, K)`` or those of :func:`seli`; or
            the entry of the target's Gram matrix as a function of row and column indices.

    Raises:
        InputError: another K.
    """
    R = _rows(rows)
    if isinstance(target, Tensor):
        if target.ndim != 2 or len(target) != len(R):
            raise InputError(
                f"target must be [K, D'] with K = {len(R)}, got {tuple(target.shape)}."
            )
        T = target.to(R)

        def entries(a: slice) -> Tensor:
            return T[a] @ T.T
    else:
        index = torch.arange(len(R), device=R.device)

        def entries(a: slice) -> Tensor:
            return target(index[a, None], index[None]).to(R)

    def norms(a: Tensor, b: Tensor, start: int) -> Tensor:
        E = entries(slice(start, start + len(a)))
        return torch.stack(((a @ b.T).square().sum(), E.square().sum()))

    g, e = pair_sum(R, norms).sqrt()

    def gap(a: Tensor, b: Tensor, start: int) -> Tensor:
        E = entries(slice(start, start + len(a)))
        square: Tensor = (a @ b.T / g - E / e).square().sum()
        return square

    return pair_sum(R, gap).sqrt()


def seli(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Geometry of unregularised cross-entropy on unequal counts: rows of W and of class means.

    From the SVD of Y − 1/K with one column per sample: W = U Σ^½ and H = V Σ^½; equal counts give a
    simplex ETF. Both come up to one rotation, so compare Gram matrices (:func:`gram_distance`).

    Args:
        counts: training samples per class [K], all positive.

    Returns:
        W [K, K−1] and class means H [K, K−1].

    References:
        Thrampoulidis et al. 2022, arXiv:2208.05512 (simplex-encoded-labels interpolation).
    """
    n = check_counts(counts).double()
    if bool((n <= 0).any()):
        raise InputError(f"SELI needs samples in every class, got counts {n.tolist()}.")
    K = len(n)
    # The n_c equal columns of a class fold into one times √n_c: same U and Σ, V/√n_c per sample.
    Z = (torch.eye(K, dtype=torch.float64) - 1 / K) * n.sqrt()
    U, S, Vh = torch.linalg.svd(Z)
    root = S[: K - 1].sqrt()
    return U[:, : K - 1] * root, Vh.T[:, : K - 1] * root / n.sqrt()[:, None]


def min_angle(rows: Tensor) -> Tensor:
    """Smallest angle between two rows in degrees, [].

    References:
        Fang et al. 2021, arXiv:2101.12699 (minority collapse: angles between minority rows).
    """
    U = F.normalize(_rows(rows), dim=1)
    best = (-math.inf, 0, 0)
    for start in range(0, len(U), TILE):
        cosines = U[start : start + TILE] @ U.T
        cosines.diagonal(start).fill_(-torch.inf)
        i, j = divmod(int(cosines.argmax()), len(U))
        best = max(best, (float(cosines[i, j]), start + i, j))
    a, b = U[best[1]], U[best[2]]
    # Kahan's form keeps small angles exact where arccos loses half of the digits.
    angle = 2 * torch.atan2(torch.linalg.vector_norm(a - b), torch.linalg.vector_norm(a + b))
    return torch.rad2deg(angle)
