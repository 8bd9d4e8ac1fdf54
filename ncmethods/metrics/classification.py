"""Accuracy, F1 and calibration of logits: what is reported beside the geometry."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ncmethods._core import InputError, check_labels, check_logits

__all__ = [
    "accuracy_by_class",
    "brier",
    "classification",
    "confusion_matrix",
    "ece",
    "fit_temperature",
    "nll",
]


def _checked(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = check_logits(logits)
    if len(logits) == 0:
        raise InputError("logits must have at least one row, got none.")
    labels = check_labels(labels, len(logits))
    if int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
        raise InputError(
            f"labels must lie in 0…{logits.shape[1] - 1}, got "
            f"{int(labels.min())}…{int(labels.max())}."
        )
    return logits.detach().double(), labels


def confusion_matrix(logits: Tensor, labels: Tensor) -> Tensor:
    """Counts [K, K] of (true class, predicted class), int64."""
    logits, labels = _checked(logits, labels)
    K = logits.shape[1]
    return torch.bincount(labels * K + logits.argmax(1), minlength=K * K).view(K, K)


def accuracy_by_class(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of right answers in each class [K]; NaN for classes without samples."""
    table = confusion_matrix(logits, labels).double()
    return table.diagonal() / table.sum(1)


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats, []."""
    logits, labels = _checked(logits, labels)
    return F.cross_entropy(logits, labels)


def brier(logits: Tensor, labels: Tensor) -> Tensor:
    """Brier score Σ_k (p_k − 1[k = y])², mean over samples, [], in [0, 2]."""
    logits, labels = _checked(logits, labels)
    p = logits.softmax(1)
    return (p - F.one_hot(labels, p.shape[1])).square().sum(1).mean()


def ece(logits: Tensor, labels: Tensor, *, bins: int = 15) -> Tensor:
    """Expected calibration error of the top class with equal-width bins, [], in [0, 1].

    References:
        Guo et al. 2017, arXiv:1706.04599, eq. (3).
    """
    logits, labels = _checked(logits, labels)
    confidence, predicted = logits.softmax(1).max(1)
    gap = (predicted == labels).double() - confidence
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    return torch.zeros(bins, dtype=gap.dtype, device=gap.device).index_add_(
        0, index, gap
    ).abs().sum() / len(labels)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Temperature T > 0 that minimises the NLL of ``logits / T``.

    References:
        Guo et al. 2017, arXiv:1706.04599 (temperature scaling).
    """
    from scipy.optimize import minimize_scalar

    logits, labels = _checked(logits, labels)

    def loss(log_t: float) -> float:
        return float(F.cross_entropy(logits / math.exp(log_t), labels))

    return math.exp(minimize_scalar(loss, bounds=(-6, 6), method="bounded").x)


def _cross_fitted(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits divided by a temperature that was fitted on the other half of each class."""
    order = labels.argsort(stable=True)
    fold = torch.empty_like(labels)
    fold[order] = torch.arange(len(labels), device=labels.device) % 2
    scaled = logits.double().clone()
    for half in (0, 1):
        mine, other = fold == half, fold != half
        if bool(other.any()):
            scaled[mine] /= fit_temperature(logits[other], labels[other])
    return scaled


def classification(
    logits: Tensor,
    labels: Tensor,
    groups: Mapping[str, Sequence[int]] | None = None,
    *,
    scaled: bool = True,
) -> dict[str, float]:
    """Accuracy, macro-F1, NLL, ECE and Brier score as floats.

    ``…/scaled`` values follow one temperature, fitted on one half of the samples and applied to
    the other, both ways. ``accuracy/<group>`` is the mean of the per-class accuracies of a group.

    Args:
        logits: [N, K].
        labels: int64 [N].
        groups: group name to class indices, e.g. of ``stats.frequency_groups``; a group
            with a class that has no sample is left out.
        scaled: whether to fit temperatures, which takes longer than all the rest.
    """
    logits, labels = _checked(logits, labels)
    table = confusion_matrix(logits, labels).double()
    right, true, predicted = table.diagonal(), table.sum(1), table.sum(0)
    seen = true + predicted > 0
    by_class = right / true
    out = {"accuracy": float(right.sum() / true.sum())}
    for name, classes in (groups or {}).items():
        values = by_class[list(classes)]
        if len(values) and not bool(values.isnan().any()):
            out[f"accuracy/{name}"] = float(values.mean())
    out |= {
        "f1_macro": float((2 * right / (true + predicted))[seen].mean()),
        "nll": float(nll(logits, labels)),
        "ece": float(ece(logits, labels)),
        "brier": float(brier(logits, labels)),
    }
    if scaled:
        fitted = _cross_fitted(logits, labels)
        out |= {"nll/scaled": float(nll(fitted, labels)), "ece/scaled": float(ece(fitted, labels))}
    return out
