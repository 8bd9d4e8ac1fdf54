"""Encourage or prevent within-class collapse."""

from __future__ import annotations

import torch
from torch import Tensor

from ncmethods._core import check_choice, no_autocast
from ncmethods.losses._class_means import class_means

__all__ = ["signed_nc1"]


def signed_nc1(
    features: Tensor, labels: Tensor, *, goal: str = "collapse", measure: str = "share"
) -> Tensor:
    """Within-class variability of a batch, with the sign that encourages or prevents collapse.

    With V_c = mean_{i ∈ c} ‖h_i − m_c‖² over the U classes of the batch, ``"share"`` is
    w = W/(W + B), W = mean_c V_c and B = mean_c ‖m_c − m̄‖²: 0 at collapse, at most 1, unchanged by
    a shift, a rotation and a scale of the features. So preventing collapse can earn at most the
    weight of this term, and cannot run away. ``"cdnv"`` is the mean over ordered pairs of
    (V_c + V_c′)/(2‖m_c − m_c′‖²), without an upper bound.

    A class with one sample has V_c = 0. With fewer than two classes the loss is 0.

    Args:
        features: [N, D].
        labels: int64 [N]; negative labels are left out.
        goal: ``"collapse"`` returns the measure, ``"prevent"`` its negative.
        measure: ``"share"`` or ``"cdnv"``.

    Returns:
        loss [], without its λ.

    Raises:
        InputError: shapes that do not fit, an unknown goal or measure.

    References:
        Han et al., NeurIPS 2025, arXiv:2509.17738, subtract λ·CDNV: ``goal="prevent",
        measure="cdnv"``, λ = 1e-3 in their script. The share is ours.
    """
    check_choice(goal, ("collapse", "prevent"), "goal")
    check_choice(measure, ("share", "cdnv"), "measure")
    with no_autocast(features.device):
        batch = class_means(features, labels)
        V, M, enough = batch.spread(), batch.centred(), batch.classes >= 2
        within, between = batch.average(V), batch.average(M.square().sum(1))
        total, least = (within + between), torch.finfo(V.dtype)
        if measure == "share":
            value = within / total.clamp(min=least.tiny)
        else:
            apart = ~torch.eye(len(V), dtype=torch.bool, device=V.device)
            pair = batch.present[:, None] & batch.present & apart
            smallest = max(1, len(V)) * least.tiny  # a row of its inverses has a finite sum
            floor = (least.eps * total.detach()).clamp(min=smallest)  # means that coincide
            near = torch.where(pair, 1 / _squared_distances(M).to(V.dtype).maximum(floor), 0.0)
            value = (V * near.sum(1)).sum() / pair.sum().clamp(min=1)
        value = torch.where(enough, value, 0 * value)
        return value if goal == "collapse" else -value


def _squared_distances(M: Tensor) -> Tensor:
    """‖m_c − m_c′‖² of centred rows [N, D], as exact as their dtype.

    From products in float64 where that is more than the rows hold: a third of the time or less.
    """
    if M.dtype == torch.float64 or M.device.type == "mps":
        return torch.cdist(M, M, compute_mode="donot_use_mm_for_euclid_dist").square()
    X = M.double()
    length = X.square().sum(1)
    return torch.addmm(length[:, None] + length, X, X.T, alpha=-2)
