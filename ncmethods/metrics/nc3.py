"""NC3, self-duality: classifier rows line up with the centred class means."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ncmethods._core import InputError
from ncmethods.metrics._tiles import TILE, unit

__all__ = [
    "bias_duality",
    "duality_cosine",
    "duality_spread",
    "product_duality",
    "self_duality",
]


def _pair(weight: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    if weight.shape != means.shape or weight.ndim != 2:
        raise InputError(
            "weight and means must both be [K, D], got "
            f"{tuple(weight.shape)} and {tuple(means.shape)}. Were the features taken after the "
            "head's neck?"
        )
    return weight.detach().to(means.device).double(), means.double()


def _cosines(W: Tensor, M: Tensor) -> Tensor:
    """cos(w_c, m_c) [K]; NaN for rows of norm 0."""
    return (unit(W) * unit(M)).sum(1)


def self_duality(weight: Tensor, means: Tensor) -> Tensor:
    """‖W/‖W‖_F − M/‖M‖_F‖_F, [], in [0, 2]: 0 when rows and means agree up to one scale.

    Args:
        weight: classifier rows [K, D].
        means: centred class means [K, D].

    References:
        Papyan, Han, Donoho 2020, arXiv:2008.08186 (NC3); much public code squares it.
    """
    W, M = _pair(weight, means)
    gap = W / torch.linalg.matrix_norm(W) - M / torch.linalg.matrix_norm(M)
    distance: Tensor = torch.linalg.matrix_norm(gap)
    return distance


def duality_cosine(weight: Tensor, means: Tensor) -> Tensor:
    """Mean over classes of 1 − cos(w_c, μ_c − μ_G), [], in [0, 2].

    Args:
        weight: classifier rows [K, D].
        means: centred class means [K, D].

    References:
        Jiang et al. 2023, arXiv:2310.05351 (self-duality).
    """
    W, M = _pair(weight, means)
    return (1 - _cosines(W, M)).mean()


def duality_spread(weight: Tensor, means: Tensor) -> Tensor:
    """Variance over classes of cos(w_c, μ_c − μ_G), []: 0 when all pairs agree alike.

    Args:
        weight: classifier rows [K, D].
        means: centred class means [K, D].

    References:
        Wu, Papyan 2024, arXiv:2405.17767 (UNC3, on cosines instead of products).
    """
    W, M = _pair(weight, means)
    return _cosines(W, M).var(correction=0)


def product_duality(weight: Tensor, means: Tensor) -> Tensor:
    """‖W Mᵀ/‖W Mᵀ‖_F − E/‖E‖_F‖_F with E = I − 11ᵀ/K, [], in [0, 2].

    Also 0 for W and M that differ by an invertible map and its inverse transpose, where
    :func:`self_duality` is not.

    Args:
        weight: classifier rows [K, D].
        means: centred class means [K, D].

    References:
        Zhu et al. 2021, arXiv:2105.02375 (measure of NC3).
    """
    W, M = _pair(weight, means)
    K = len(W)
    tiles = [slice(i, min(i + TILE, K)) for i in range(0, K, TILE)]
    norm = sum(((W[a] @ M.T).square().sum() for a in tiles), W.new_zeros(())).sqrt()
    total = W.new_zeros(())
    for a in tiles:
        E = torch.full((a.stop - a.start, K), -1 / K, dtype=W.dtype, device=W.device)
        E.diagonal(a.start).add_(1)
        total = total + (W[a] @ M.T / norm - E / math.sqrt(K - 1)).square().sum()
    return total.sqrt()


def bias_duality(weight: Tensor, bias: Tensor | None, global_mean: Tensor) -> Tensor:
    """‖W μ_G + b‖₂, []: 0 when the bias takes the global mean out of the decision.

    Args:
        weight: classifier rows [K, D].
        bias: [K], or None for no bias.
        global_mean: [D], of the features.

    References:
        Zhu et al. 2021, arXiv:2105.02375 (bias collapse).
    """
    shift = weight.detach().double() @ global_mean.to(weight.device).double()
    if bias is not None:
        shift = shift + bias.detach().double()
    norm: Tensor = torch.linalg.vector_norm(shift)
    return norm
