"""Labels of mixed images: mixup, Remix, and the box of CutMix."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ncmethods._core import InputError, check_counts, check_labels

__all__ = ["CutMixBox", "cutmix_box", "mixed", "remix_labels", "remix_lambda"]


def mixed(
    loss: Callable[..., Tensor],
    labels: Tensor,
    labels_mix: Tensor,
    lam: float | Tensor,
    **tensors: Any,
) -> Tensor:
    """λ L(y) + (1 − λ) L(y_mix), what the training loop does with mixed batches.

    Args:
        loss: any loss that takes ``labels``; bind hyperparameters with ``functools.partial``.
        labels: of the images that have weight λ, as ``loss`` takes them.
        labels_mix: of the images that have weight 1 − λ, same shape.
        lam: λ in [0, 1], one for the batch. A tensor [N] needs a ``loss`` that returns a value for
            each sample, [N]; the losses of this library return their mean, which no longer tells
            the samples apart.
        **tensors: what else the loss takes, by name (``logits=``, ``features=``, ``counts=``, …).

    Returns:
        loss [].

    Raises:
        InputError: label shapes that differ, or λ for each sample with a loss that returns a mean.
    """
    if labels.shape != labels_mix.shape:
        raise InputError(
            f"labels and labels_mix must have one shape, got {tuple(labels.shape)} and "
            f"{tuple(labels_mix.shape)}."
        )
    one = loss(labels=labels, **tensors)
    other = loss(labels=labels_mix, **tensors)
    if isinstance(lam, Tensor) and lam.ndim and lam.shape != one.shape:
        raise InputError(
            f"lam of shape {tuple(lam.shape)} needs a loss of that shape, got one of shape "
            f"{tuple(one.shape)}. Pass one λ for the batch, or a loss that returns [N]; for Remix "
            "change the labels with remix_labels."
        )
    return (lam * one + (1 - lam) * other).mean()


def remix_lambda(
    labels: Tensor,
    labels_mix: Tensor,
    counts: Tensor,
    lam: float | Tensor,
    *,
    kappa: float = 3.0,
    tau: float = 0.5,
) -> Tensor:
    """Label weight of Remix: the rare class of a mixed pair gets the whole label.

    λ_y = 0 where n_y ≥ κ n_mix and λ < τ; 1 where κ n_y ≤ n_mix and 1 − λ < τ; else λ.

    Args:
        labels: int64 [N], of the images that have weight λ.
        labels_mix: int64 [N], of the images that have weight 1 − λ.
        counts: training samples per class [K].
        lam: λ of the images, a number or [N].
        kappa: how many times as frequent the other class must be.
        tau: how large the rare class' share of the image must be: more than 1 − τ.

    Returns:
        λ_y [N]. Where a label is negative, λ.

    Raises:
        InputError: labels of different lengths or ≥ K, bad counts.

    References:
        Chou et al., ECCV 2020 workshops, arXiv:2007.03943.
    """
    n = check_counts(counts).to(labels.device)
    a = check_labels(labels, num_classes=len(n))
    b = check_labels(labels_mix, len(a), len(n))
    n_a, n_b = n[a.clamp(min=0)], n[b.clamp(min=0)]
    known = (a >= 0) & (b >= 0)
    none = known & (n_a >= kappa * n_b) & (lam < tau)
    whole = known & (kappa * n_a <= n_b) & (1 - lam < tau)
    return torch.where(none, 0.0, torch.where(whole, 1.0, lam))


def remix_labels(
    labels: Tensor,
    labels_mix: Tensor,
    counts: Tensor,
    lam: float,
    *,
    kappa: float = 3.0,
    tau: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """Remix as a change of labels, so that one λ serves the batch and any loss.

    A pair whose label weight Remix sets to 0 gets ``labels_mix`` twice, one whose weight it sets to
    1 ``labels`` twice. Mixed with λ, the loss of each sample is then λ_y ℓ(y) + (1 − λ_y) ℓ(y_mix)
    with λ_y of :func:`remix_lambda`.

    Args:
        labels: int64 [N], of the images that have weight λ.
        labels_mix: int64 [N], of the images that have weight 1 − λ.
        counts: training samples per class [K].
        lam: λ of the images.
        kappa: as in :func:`remix_lambda`.
        tau: as in :func:`remix_lambda`.

    Returns:
        new ``labels`` and ``labels_mix``, each [N].

    Raises:
        InputError: as in :func:`remix_lambda`.

    References:
        Chou et al., ECCV 2020 workshops, arXiv:2007.03943.
    """
    weight = remix_lambda(labels, labels_mix, counts, lam, kappa=kappa, tau=tau)
    one = torch.where(weight == 0, labels_mix, labels)
    other = torch.where(weight == 1, labels, labels_mix)
    return one, other


class CutMixBox(NamedTuple):
    """Rows ``top:bottom`` and columns ``left:right`` to replace, and the label weight left."""

    top: int
    bottom: int
    left: int
    right: int
    lam: float


def cutmix_box(height: int, width: int, lam: float, centre: tuple[int, int]) -> CutMixBox:
    """Box of about (1 − λ) of the image around ``centre``, cut at the border, and its exact λ.

    Sides are √(1 − λ) of the image's, rounded down to even numbers of pixels.

    Args:
        height: rows of the image.
        width: columns of the image.
        lam: λ that was drawn, in [0, 1].
        centre: row and column of the box' centre, drawn uniformly from the image.

    Returns:
        the box; its ``lam`` is the share of pixels outside, the label weight to use.

    Raises:
        InputError: λ outside [0, 1], no pixels, or a centre outside the image.

    References:
        Yun et al., ICCV 2019, arXiv:1905.04899.
    """
    row, column = centre
    if not (0 <= lam <= 1 and 0 <= row < height and 0 <= column < width):
        raise InputError(
            "cutmix_box needs lam in [0, 1] and a centre inside the image, got "
            f"lam={lam}, centre={centre}, height={height}, width={width}."
        )
    side = math.sqrt(1 - lam)
    high, wide = int(height * side) // 2, int(width * side) // 2
    top, bottom = max(row - high, 0), min(row + high, height)
    left, right = max(column - wide, 0), min(column + wide, width)
    area = (bottom - top) * (right - left)
    return CutMixBox(top, bottom, left, right, 1 - area / (height * width))
