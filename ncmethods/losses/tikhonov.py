"""Tikhonov regularisation of features, rows and bias, as in unconstrained-features models."""

from __future__ import annotations

from torch import Tensor

from ncmethods._core import InputError, check_features, check_labels, no_autocast
from ncmethods.losses._class_means import known_rows, mean_of

__all__ = ["feature_decay", "tikhonov"]


def feature_decay(features: Tensor, labels: Tensor | None = None) -> Tensor:
    """½ · mean_i ‖h_i‖².

    Args:
        features: [N, D].
        labels: int64 [N]; samples with a negative label are left out. All count if None.

    Returns:
        loss [], without its λ.

    Raises:
        InputError: shapes that do not fit, or labels ≥ K.

    References:
        Hasegawa and Sato, ICLR 2024, arXiv:2305.16573 (feature regularisation, λ = 0.01).
    """
    with no_autocast(features.device):
        h, known = known_rows(features, labels)
        return mean_of(h.square().sum(1), known) / 2


def tikhonov(
    features: Tensor,
    weight: Tensor,
    labels: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    feature: float = 0.01,
    row: float = 5e-3,
    offset: float = 0.0,
) -> Tensor:
    """Quadratic penalty on features, classifier rows and bias: the terms of the UFM objective.

    feature/2 · mean_i ‖h_i‖² + row/2 · ‖W‖_F² + offset/2 · ‖b‖².

    For plain SGD the second term is what ``weight_decay`` on the head does; here it is part of the
    loss, so it is the same for every optimizer and shows in the logged value. Set the head's
    ``weight_decay`` to 0, or it is counted twice. A fixed frame has a constant second term.

    Args:
        features: [N, D].
        weight: [K, D].
        labels: int64 [N]; samples with a negative label are left out. All count if None.
        bias: [K], or None.
        feature: λ_h. In models that penalise λ_H/2 ‖H‖_F² over all N samples it is N · λ_H.
        row: λ_W.
        offset: λ_b.

    Returns:
        loss [].

    Raises:
        InputError: shapes that do not fit, or labels ≥ K.

    References:
        Hasegawa and Sato, ICLR 2024, arXiv:2305.16573 (λ_h = 0.01, weight decay 5e-3 on all
        parameters, fixed ETF rows).
    """
    h = check_features(features)
    if weight.ndim != 2 or weight.shape[1] != h.shape[1]:
        raise InputError(
            f"weight must be [K, D] with D = {h.shape[1]} as the features have, got "
            f"{tuple(weight.shape)}. Use the features after the head's neck."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise InputError(f"bias must be [{len(weight)}], one per class, got {tuple(bias.shape)}.")
    if labels is not None:
        labels = check_labels(labels, len(h), len(weight))
    with no_autocast(h.device):
        loss = feature * feature_decay(h, labels) + row / 2 * weight.to(h.dtype).square().sum()
        return loss if bias is None else loss + offset / 2 * bias.to(h.dtype).square().sum()
