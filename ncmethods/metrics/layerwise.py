"""Collapse along depth: from the statistics of several layers, in order of depth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ncmethods._core import InputError

__all__ = ["effective_depth", "separation_law"]


def separation_law(fuzziness: Sequence[float] | Tensor) -> dict[str, float]:
    """Straight line through log Tr(Σ_W Σ_B†) over depth.

    Args:
        fuzziness: NC1 of each layer in order of depth, all positive.

    Returns:
        ``slope`` per layer (natural logarithm), ``ratio`` = e^slope, ``r2`` of the fit.

    Raises:
        InputError: fewer than three layers, or a value that is not positive and finite.

    References:
        He, Su 2023, "A law of data separation in deep learning", arXiv:2210.17020.
    """
    y = torch.as_tensor(fuzziness, dtype=torch.float64)
    if y.ndim != 1 or len(y) < 3 or not bool(((y > 0) & y.isfinite()).all()):
        raise InputError(
            f"The separation law needs at least 3 layers with positive NC1, got {y.tolist()}."
        )
    y = y.log()
    x = torch.arange(len(y), dtype=torch.float64)
    x = x - x.mean()
    slope = float((x * y).sum() / x.square().sum())
    spread = (y - y.mean()).square().sum()
    rest = (y - y.mean() - slope * x).square().sum()
    r2 = 1.0 if float(spread) == 0 else 1 - float(rest / spread)
    return {"slope": slope, "ratio": math.exp(slope), "r2": r2}


def effective_depth(ncc_error: Mapping[str, float] | Sequence[float], *, eps: float = 0.01) -> int:
    """Index of the first layer whose nearest-class-mean error is at most ``eps``, from 0.

    Args:
        ncc_error: error of each layer in order of depth, in [0, 1].
        eps: error that counts as separated.

    Returns:
        The index, or the number of layers if none gets there.

    References:
        Galanti et al. 2022, "On the implicit bias towards minimal depth of deep neural networks".
    """
    errors = list(ncc_error.values()) if isinstance(ncc_error, Mapping) else list(ncc_error)
    if not errors or not all(0 <= e <= 1 for e in errors):
        raise InputError(f"ncc_error must hold errors in [0, 1] by depth, got {errors}.")
    return next((i for i, e in enumerate(errors) if e <= eps), len(errors))
