"""Weight aligning: new rows of a linear classifier as long as the old ones."""

from __future__ import annotations

import torch
from torch import Tensor

from ncmethods._core import InputError

__all__ = ["weight_align"]


def weight_align(weight: Tensor, old: int) -> Tensor:
    """Rows [K, D] of which the new ones are scaled by γ = mean‖w_old‖ / mean‖w_new‖.

    Biases stay as they are.

    Args:
        weight: [K, D], rows of the old classes first.
        old: how many are old, 1 … K − 1.

    Raises:
        InputError: no old rows, or no new ones.

    References:
        Zhao et al., CVPR 2020, arXiv:1911.07053.
    """
    if not 1 <= old < len(weight):
        raise InputError(f"old lies in 1 … K − 1 = {len(weight) - 1}, got {old}.")
    norms = weight.detach().norm(dim=1)
    gamma = norms[:old].mean() / norms[old:].mean().clamp(min=torch.finfo(weight.dtype).tiny)
    return torch.cat([weight[:old], gamma * weight[old:]])
