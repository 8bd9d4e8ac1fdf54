"""Collapse along depth: from the statistics of several layers, in order of depth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ncmethods._core import InputError

__all__ = ["effective_depth", "progressive_collapse", "separation_law"]


def separation_law(fuzziness: Sequence[float] | Tensor) -> dict[str, float]:
    """Straight line through log Tr(Σ_W Σ_B†) over depth.

    A factor common to all layers, such as the 1/K of :func:`nc1_pinv`, changes none of the results.
    The paper weighs Σ_B by sample: on uneven classes pass ``nc1_pinv(…, weighting="sample")``.
    Layers narrower than K − 1 invert Σ_B at a lower rank and do not compare with the others.

    Args:
        fuzziness: NC1 of each layer in order of depth, all positive.

    Returns:
        ``slope`` per layer (natural logarithm), ``ratio`` = e^slope, ``r2`` of the fit.

    Raises:
        InputError: fewer than three layers, or a value that is not positive and finite.

    References:
        He, Su 2023, "A law of data separation in deep learning", arXiv:2210.17020.
    """
    y = torch.as_tensor(fuzziness, dtype=torch.float64, device="cpu")
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

    Also called NCC depth, for nearest class centre. It counts the layers that are given: name every
    block of a network to read it as a depth. A later layer with a larger error does not matter.

    Args:
        ncc_error: share of samples of each layer, in order of depth, whose nearest class mean is
            not that of their own label; in [0, 1].
        eps: error that counts as separated.

    Returns:
        The index, or the number of layers if none gets there.

    Raises:
        InputError: no layers, or a value outside [0, 1].

    References:
        Galanti, Galanti, Ben-Shaul 2022, "On the implicit bias towards minimal depth of deep neural
        networks", arXiv:2202.09028 (effective depth).
    """
    errors = list(ncc_error.values()) if isinstance(ncc_error, Mapping) else list(ncc_error)
    if not errors or not all(0 <= e <= 1 for e in errors):
        raise InputError(f"ncc_error must hold errors in [0, 1] by depth, got {errors}.")
    return next((i for i, e in enumerate(errors) if e <= eps), len(errors))


def progressive_collapse(measure: Mapping[str, float] | Sequence[float] | Tensor) -> float:
    """Share of steps from one layer to the next at which a collapse measure falls, in [0, 1].

    Progressive feedforward collapse is the conjecture that a trained network collapses more with
    each layer, so that every measure falls with depth: then this is 1. It is 0 where the measure
    never falls, and a tie counts as no fall. The share is our summary; the paper plots the curves.

    Args:
        measure: one value per layer in order of depth, smaller = more collapsed: NC1, distance to
            an ETF, nearest-class-mean error.

    Raises:
        InputError: fewer than two layers, or a value that is NaN.

    References:
        Wang, Gai, Zhang 2024, "Progressive feedforward collapse of ResNet training",
        arXiv:2405.00985.
    """
    values = list(measure.values()) if isinstance(measure, Mapping) else measure
    y = torch.as_tensor(values, dtype=torch.float64, device="cpu")
    if y.ndim != 1 or len(y) < 2 or bool(y.isnan().any()):
        raise InputError(
            "Progressive collapse compares successive layers: it needs at least 2 values without "
            f"NaN, got {y.tolist()}."
        )
    return float((y[1:] < y[:-1]).double().mean())
