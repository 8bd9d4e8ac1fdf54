"""Frames with closed forms on the axes: orthogonal, orthoplex, Hadamard, non-negative."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ncmethods._core import InputError, check_choice, check_num_classes
from ncmethods.frames._haar import check_dim, haar_isometry, place

__all__ = ["hadamard", "nonnegative_orthogonal", "orthogonal_frame", "orthoplex"]


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
            "simplex_etf needs only K − 1, orthoplex K/2."
        )
    if rotation == "canonical":
        return torch.eye(K, dim, dtype=dtype)
    return haar_isometry(dim, K, generator).T.to(dtype)


def orthoplex(
    num_classes: int,
    dim: int,
    *,
    rotation: str = "haar",
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Rows of the orthoplex ±e_i: every pair at cosine 0 or −1; needs ``dim ≥ K/2``.

    Row i is e_i for i < D and −e_{i−D} after that. For D + 2 ≤ K ≤ 2D no frame has a largest cosine
    below 0, so this one is optimal by that measure.

    Args:
        num_classes: K ≥ 2.
        dim: D ≥ K/2.
        rotation: ``"haar"`` turns the axes by a Haar rotation, ``"canonical"`` leaves them.
        generator: CPU generator for the Haar draw; the global one if None.
        dtype: of the result.

    Returns:
        frame [K, D].

    Raises:
        InputError: 2D < K, or an unknown rotation.

    References:
        Pernici et al. 2021, arXiv:2103.15632 (d-orthoplex classifier).
    """
    K, D = check_dim(num_classes, dim)
    check_choice(rotation, ("haar", "canonical"), "rotation")
    if 2 * D < K:
        raise InputError(
            f"An orthoplex in {D} dimensions has {2 * D} rows, got num_classes = {K}: "
            f"it needs dim ≥ {(K + 1) // 2}. spread and softmax_code take any K."
        )
    axes = torch.eye(D, dtype=torch.float64)
    return place(torch.cat((axes, -axes))[:K], D, rotation, generator).to(dtype)


def hadamard(
    num_classes: int,
    dim: int,
    *,
    rotation: str = "signs",
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Rows of a Hadamard matrix: entries ±c (or 0 in unused columns), every pair at cosine 0.

    Let n be the smallest power of two that is at least K. Sylvester's matrix H_n stands side by
    side ⌊D/n⌋ times and its first K rows are taken, so ``dim ≥ n``; the last D mod n columns are
    zero and c = 1/√(n⌊D/n⌋). Entries of one size make the product with the rows additions only.

    Args:
        num_classes: K ≥ 2.
        dim: D ≥ n.
        rotation: ``"signs"`` flips the sign of whole columns at random, ``"canonical"`` leaves
            Sylvester's signs: its first row is constant, which every non-negative feature likes.
        generator: CPU generator for the signs; the global one if None.
        dtype: of the result.

    Returns:
        frame [K, D].

    Raises:
        InputError: D < n, or an unknown rotation.

    References:
        Hoffer, Hubara, Soudry 2018, arXiv:1801.04540.
    """
    K, D = check_dim(num_classes, dim)
    check_choice(rotation, ("signs", "canonical"), "rotation")
    n = 1 << (K - 1).bit_length()
    if n > D:
        raise InputError(
            f"Hadamard rows of {K} classes need dim ≥ {n}, the next power of two, got {D}. "
            + (
                "orthogonal_frame needs only K."
                if K <= D
                else "simplex_etf needs K − 1, orthoplex K/2."
            )
        )
    H = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(n.bit_length() - 1):
        H = torch.cat((torch.cat((H, H), 1), torch.cat((H, -H), 1)))
    copies = D // n
    rows = torch.zeros(K, D, dtype=torch.float64)
    rows[:, : n * copies] = H[:K].repeat(1, copies) / math.sqrt(n * copies)
    if rotation == "signs":
        rows *= 1.0 - 2 * torch.randint(2, (D,), generator=generator)
    return rows.to(dtype)


def nonnegative_orthogonal(
    num_classes: int,
    dim: int,
    *,
    rotation: str = "permutation",
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Non-negative orthonormal frame: each of the D dimensions belongs to one class; ``dim ≥ K``.

    Rows that are non-negative and orthogonal have disjoint support. Every class gets ⌊D/K⌋ or
    ⌈D/K⌉ dimensions with equal values. Features after a ReLU reach each row at cosine 1; those of a
    randomly rotated frame only at 0.707.

    Args:
        num_classes: K ≥ 2.
        dim: D ≥ K.
        rotation: ``"permutation"`` deals the dimensions at random, ``"canonical"`` gives each class
            a block of neighbours.
        generator: CPU generator for the permutation; the global one if None.
        dtype: of the result.

    Returns:
        frame [K, D].

    Raises:
        InputError: D < K, or an unknown rotation.

    References:
        Kim, Kim, ICLR 2024, "Fixed Non-negative Orthogonal Classifier: Inducing Zero-mean Neural
        Collapse with Feature Dimension Separation" (openreview.net/forum?id=F4bmOrmUwc).
    """
    K, D = check_dim(num_classes, dim)
    check_choice(rotation, ("permutation", "canonical"), "rotation")
    if D < K:
        raise InputError(
            f"A non-negative orthogonal frame of {K} classes needs dim ≥ {K}, got {D}: each class "
            "owns a dimension. Widen the features with a neck that ends in a ReLU, or use "
            "simplex_etf (K − 1) or orthoplex (K/2) behind a neck without one."
        )
    owner = torch.arange(D) * K // D
    if rotation == "permutation":
        owner = owner[torch.randperm(D, generator=generator)]
    rows = torch.nn.functional.one_hot(owner, K).T.double()
    return (rows / rows.sum(1, keepdim=True).sqrt()).to(dtype)
