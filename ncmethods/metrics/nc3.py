"""NC3, self-duality: classifier rows line up with the centred class means."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ncmethods._core import InputError

__all__ = ["duality_cosine", "self_duality"]


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
