"""NC3, self-duality: classifier rows line up with the centred class means."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ncmethods._core import InputError

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
    return (1 - F.cosine_similarity(W, M, dim=1)).mean()


def duality_spread(weight: Tensor, means: Tensor) -> Tensor:
    """Variance over classes of cos(w_c, μ_c − μ_G), []: 0 when all pairs agree alike.

    Args:
        weight: classifier rows [K, D].
        means: centred class means [K, D].

    References:
        Wu, Papyan 2024, arXiv:2405.17767 (UNC3, on cosines instead of products).
    """
    W, M = _pair(weight, means)
    return F.cosine_similarity(W, M, dim=1).var(correction=0)


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
    P = W @ M.T
    E = (torch.eye(K, dtype=P.dtype, device=P.device) - 1 / K) / math.sqrt(K - 1)
    distance: Tensor = torch.linalg.matrix_norm(P / torch.linalg.matrix_norm(P) - E)
    return distance


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
