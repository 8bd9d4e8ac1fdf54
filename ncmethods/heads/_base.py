"""The two halves that every head has: a neck and a geometry."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncmethods._core import InputError, check_choice, check_num_classes, no_autocast


def make_neck(neck: str | None, in_features: int, dim: int) -> nn.Module:
    """The module between backbone and rows: [N, in_features] → [N, dim].

    ``None`` is the identity, ``"bn"`` BatchNorm1d (after a bias-free Linear where the width
    changes), ``"linear"`` a Linear.

    Raises:
        InputError: an unknown neck, or no neck although the width changes.
    """
    check_choice(str(neck), ("bn", "linear", "None"), "neck")
    if neck == "linear":
        return nn.Linear(in_features, dim)
    if neck == "bn":
        norm = nn.BatchNorm1d(dim)
        return (
            norm
            if dim == in_features
            else nn.Sequential(nn.Linear(in_features, dim, bias=False), norm)
        )
    if dim != in_features:
        raise InputError(
            f"Without a neck, dim must equal in_features = {in_features}, got {dim}. "
            "Use neck='bn' or neck='linear' to change the width."
        )
    return nn.Identity()


def default_scale(num_classes: int) -> float:
    """Logit scale at which perfect collapse on a unit simplex gives probability 0.99.

    With unit features on unit ETF rows the margin between the true and any other logit is
    s·K/(K−1), so p = 1/(1 + (K−1)e^{−sK/(K−1)}) and p = 0.99 needs s = ((K−1)/K)·log(99(K−1)).
    """
    K = check_num_classes(num_classes)
    return (K - 1) / K * math.log(99 * (K - 1))


def scaled_cosine(
    features: Tensor, rows: Tensor, scale: float, *, normalize: bool, unit_rows: bool
) -> Tensor:
    """``scale · ⟨h, w_c⟩`` [N, K], in float32 or wider whatever autocast says."""
    dtype = torch.promote_types(features.dtype, torch.float32)
    with no_autocast(features.device):
        h, W = features.to(dtype), rows.to(dtype)
        if normalize:
            h = _unit(h)
        if unit_rows:
            W = _unit(W)
        return scale * F.linear(h, W)


def _unit(x: Tensor) -> Tensor:
    """Rows scaled to unit norm; a zero row stays zero and gets no gradient.

    ``F.normalize`` would give it one of 1e12: one dead sample behind a ReLU ends the training.
    """
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    unit: Tensor = x / length.masked_fill(length == 0, torch.inf)
    return unit
