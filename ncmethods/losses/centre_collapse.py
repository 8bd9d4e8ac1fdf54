"""Centre collapse for dense prediction: class centres of the batch, held to a frame."""

from __future__ import annotations

import torch
from torch import Tensor

from ncmethods._core import InputError, check_counts, check_features, check_labels, no_autocast
from ncmethods.losses._contrast import check_rows, unit

__all__ = ["centre_collapse"]


def centre_collapse(
    features: Tensor,
    labels: Tensor,
    weight: Tensor,
    counts: Tensor,
    *,
    scale: float = 5.0,
    smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy of the batch's class centres against a frame, one vote for each class.

    The pixels of class c in the batch have the mean z̄_c; its logits are
    scale · ⟨z̄_c/‖z̄_c‖, e_k⟩ + log π_k. A class counts once however many pixels it has; a class
    without pixels does not count. It stands beside the pixel-wise loss, not in its place.

    Args:
        features: dense maps [N, D, H, W] (any number of axes after D), or [N, D].
        labels: int64 [N, H, W], or [N]; negative labels are left out. Of the size of ``features``.
        weight: frame [K, D]; unit rows.
        counts: training images that contain the class [K]; π = counts / Σ counts.
        scale: s.
        smoothing: share of the target that goes from the label to the K − 1 other classes, in equal
            parts. (torch's ``label_smoothing`` is this times K/(K−1).)

    Returns:
        loss [].

    Raises:
        InputError: shapes that do not fit, labels ≥ K, or a smoothing outside [0, 1).

    References:
        Zhong et al., CVPR 2023, arXiv:2301.01100 (centre collapse regulariser).
    """
    if not 0 <= smoothing < 1:
        raise InputError(f"smoothing must be in [0, 1), got {smoothing}.")
    if features.ndim < 2 or features.shape[:1] + features.shape[2:] != labels.shape:
        raise InputError(
            f"features [N, D, …] and labels [N, …] must have the same places, got "
            f"{list(features.shape)} and {list(labels.shape)}. Resize the maps to the labels: "
            "F.interpolate(maps, labels.shape[1:], mode='bilinear', align_corners=True)."
        )
    x = check_features(features.movedim(1, -1).reshape(-1, features.shape[1]))  # [P, D]
    K = len(check_rows(weight, x.shape[1]))
    y = check_labels(labels.reshape(-1), len(x), K)
    prior = check_counts(counts, K).to(x.device)
    known = y >= 0
    y = y.clamp(min=0)
    with no_autocast(x.device):
        x = torch.where(known[:, None], x, 0.0)
        number = x.new_zeros(K).index_add(0, y, known.to(x.dtype))
        centres = x.new_zeros(K, x.shape[1]).index_add(0, y, x)
        centres = unit(centres / number.clamp(min=1)[:, None])
        prior = prior.to(x.dtype if x.device.type == "mps" else torch.float64)
        # The authors' floor: smoothing gives weight also to a class that was never counted.
        bias = (prior / prior.sum() + 1e-12).log().to(x.dtype)
        log_p = (scale * centres @ weight.to(x.dtype).T + bias).log_softmax(1)  # [K, K]
        at_own = log_p.diagonal()
        at_others = (log_p.sum(1) - at_own) / max(K - 1, 1)
        each = -(1 - smoothing) * at_own - smoothing * at_others
        present = number > 0
        loss: Tensor = torch.where(present, each, 0.0).sum() / present.sum().clamp(min=1)
        return loss
