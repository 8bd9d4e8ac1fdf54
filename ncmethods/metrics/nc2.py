"""NC2, the geometry of K rows (class means or classifier rows): a simplex ETF at collapse.

Every function takes rows [K, D] and leaves centring to the caller: centred rows cannot tell a
simplex ETF from an orthogonal frame, uncentred ones can.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ncmethods._core import InputError, check_counts
from ncmethods.metrics._tiles import Pairs, unit

__all__ = [
    "angles",
    "equiangular",
    "equinorm",
    "gram_distance",
    "gram_etf",
    "min_angle",
    "seli",
]


def equinorm(rows: Tensor) -> Tensor:
    """Coefficient of variation of the row norms (population standard deviation), [].

    References:
        Papyan, Han, Donoho 2020, arXiv:2008.08186 (NC2, equal norms).
    """
    return variation(Pairs(rows).square)


def variation(square: Tensor) -> Tensor:
    """Coefficient of variation of norms, given as squares [K], []."""
    norms = square.sqrt()
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
    return angles_of(Pairs(rows))


def angles_of(pairs: Pairs) -> dict[str, Tensor]:
    """:func:`angles` of pairs that are there already."""
    K = len(pairs)
    worst, total = pairs.square.new_zeros(()), pairs.square.new_zeros(3)
    for a, b, cosines in pairs.cosines(diagonal=-1 / (K - 1)):
        gap = cosines.add_(1 / (K - 1))
        size = gap.abs()
        worst = torch.maximum(worst, size.max())
        total += torch.stack((size.sum(), gap.sum(), gap.square().sum())) * (1 if a == b else 2)
    mean, signed, square = total / (K * (K - 1))
    return {"mean": mean, "max": worst, "std": (square - signed.square()).clamp(min=0).sqrt()}


def gram_etf(rows: Tensor) -> Tensor:
    """‖G/‖G‖_F − E/‖E‖_F‖_F with G the Gram matrix and E = I − 11ᵀ/K, [], in [0, √2].

    References:
        Zhu et al. 2021, arXiv:2105.02375 (measure of NC2).
    """
    return gram_etf_of(Pairs(rows))


def gram_etf_of(pairs: Pairs) -> Tensor:
    """:func:`gram_etf` of pairs that are there already."""
    K = len(pairs)
    return _gram_distance(pairs, lambda a, b: _eye(a, b, pairs.square) - 1 / K)


def _eye(a: slice, b: slice, like: Tensor) -> Tensor:
    """The tile of the identity matrix."""
    shape = (a.stop - a.start, b.stop - b.start)
    return torch.eye(*shape, dtype=like.dtype, device=like.device) * (a == b)


def gram_distance(rows: Tensor, target: Tensor | Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Distance of the Gram matrix of the rows to that of a target geometry, both at unit norm, [].

    Args:
        rows: [K, D].
        target: rows [K, D'] such as ``frames.orthogonal_frame(K, K)`` or those of :func:`seli`; or
            the entry of the target's Gram matrix as a symmetric function of row and column indices.

    Raises:
        InputError: another K.
    """
    pairs = Pairs(rows)
    if isinstance(target, Tensor):
        if target.ndim != 2 or len(target) != len(pairs):
            raise InputError(
                f"target must be [K, D'] with K = {len(pairs)}, got {tuple(target.shape)}."
            )
        T = target.detach().to(pairs.rows)
        return _gram_distance(pairs, lambda a, b: T[a] @ T[b].T)
    index = torch.arange(len(pairs), device=pairs.rows.device)
    return _gram_distance(pairs, lambda a, b: target(index[a, None], index[b]).to(pairs.rows))


def _gram_distance(pairs: Pairs, target: Callable[[slice, slice], Tensor]) -> Tensor:
    def norms(a: slice, b: slice, G: Tensor) -> Tensor:
        return torch.stack((G.square().sum(), target(a, b).square().sum()))

    g, e = pairs.sum(norms).sqrt()
    return pairs.sum(lambda a, b, G: (G / g - target(a, b) / e).square().sum()).sqrt()


def nc2_of(pairs: Pairs) -> dict[str, Tensor]:
    """The three NC2 measures of ``report``, by name."""
    return {
        "equinorm": variation(pairs.square),
        "equiangular": angles_of(pairs)["mean"],
        "gram_etf": gram_etf_of(pairs),
    }


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
    """Smallest angle between two rows in degrees, []; NaN if a row is zero.

    References:
        Fang et al. 2021, arXiv:2101.12699 (minority collapse: angles between minority rows).
    """
    pairs = Pairs(unit(Pairs(rows).rows))
    if bool(pairs.square.isnan().any()):
        return pairs.square.new_tensor(torch.nan)
    best = (-math.inf, 0, 0)
    for a, b, cosines in pairs.cosines(diagonal=-math.inf):
        i, j = divmod(int(cosines.argmax()), cosines.shape[1])
        best = max(best, (float(cosines[i, j]), a.start + i, b.start + j))
    u, v = pairs.rows[best[1]], pairs.rows[best[2]]
    # Kahan's form keeps small angles exact where arccos loses half of the digits.
    angle = 2 * torch.atan2(torch.linalg.vector_norm(u - v), torch.linalg.vector_norm(u + v))
    return torch.rad2deg(angle)
