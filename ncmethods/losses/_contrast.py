"""What the contrastive losses share: unit rows, checks, and the masked log-softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from ncmethods._core import InputError


def check_temperature(temperature: float) -> None:
    """Raise unless ``temperature`` is positive."""
    if not temperature > 0:
        raise InputError(f"temperature must be > 0, got {temperature}. Usual: 0.05 to 0.5.")


def check_rows(weight: Tensor, dim: int, name: str = "weight") -> Tensor:
    """Return rows [K, D] for features of width ``dim``.

    Raises:
        InputError: not floating and 2-D, or of another width.
    """
    if weight.ndim != 2 or weight.shape[1] != dim or not weight.is_floating_point():
        raise InputError(
            f"{name} must be floating [K, D] with D = {dim} as the features have, got "
            f"{weight.dtype} {tuple(weight.shape)}. Rows and features must live in one space: use "
            "the features after the head's neck, or map the rows with the same projection."
        )
    return weight


def unit(rows: Tensor, known: Tensor | None = None) -> Tensor:
    """Rows of length 1; rows of zeros stay, and so do rows outside ``known``, which become zero."""
    if known is not None:
        rows = torch.where(known[:, None], rows, 0.0)  # their NaN must not reach other rows
    length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    result: Tensor = rows / length.masked_fill(length == 0, 1.0)
    return result


def shut(dtype: torch.dtype) -> float:
    """The logit of an entry that is not in the sum; finite, so a row may have no entry."""
    return torch.finfo(dtype).min / 2


def attract(entries: Tensor, pull: Tensor, vote: Tensor, mass: Tensor | None = None) -> Tensor:
    """Mean over anchors i of mass_i · log Σ_k e^{entries_ik} − pull_i.

    Args:
        entries: logits of the contrast set [N, M]; those outside it :func:`shut`.
        pull: weighted sum of the logits of the positives [N].
        vote: weight ≥ 0 of each anchor in the mean [N]; 0 for what is no anchor. Without any, the
            loss is 0 and has a zero gradient.
        mass: sum of the weights of the positives [N]; 1 if None.
    """
    total = entries.logsumexp(1)
    each = (total if mass is None else mass * total) - pull
    vote = vote.to(each.dtype)
    loss: Tensor = (vote * torch.where(vote > 0, each, 0.0)).sum() / vote.sum().clamp(
        min=torch.finfo(each.dtype).tiny
    )
    return loss


def same_class(labels: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Positives of each sample of a batch, and what is not to be compared with it; bool [N, N].

    The latter are the sample itself and those without a label.
    """
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    barred = itself | ~known
    return (labels[:, None] == labels) & ~barred & known[:, None], barred


def among_prototypes(
    features: Tensor,
    labels: Tensor,
    weight: Tensor,
    temperature: float,
    *,
    average: bool = False,
    by_class: bool = False,
) -> Tensor:
    """Supervised contrastive loss of a batch and a prototype for each class, which is no anchor.

    Args:
        features: [N, D].
        labels: [N].
        weight: [K, D].
        temperature: τ.
        average: take class means in the sum of the softmax, not entries.
        by_class: take class means of the anchors.
    """
    known, y, K = labels >= 0, labels.clamp(min=0), len(weight)
    z, rows = unit(features, known), unit(weight.to(features.dtype))
    sums = rows.index_add(0, y, z)  # [K, D]; samples without label are zero
    size = z.new_ones(K).index_add(0, y, known.to(z.dtype))  # entries of each class
    rest = (size[y] - 1).clamp(min=1)  # without the anchor itself; its prototype is there
    pull = (z * (sums[y] - z)).sum(1) / rest / temperature

    batch, prototypes = z @ z.T / temperature, z @ rows.T / temperature
    barred = torch.eye(len(z), dtype=torch.bool, device=z.device) | ~known
    if average:
        classes = torch.arange(K, device=y.device)
        own, less = rest.log()[:, None], size.log()
        batch = batch - torch.where(y[:, None] == y, own, less[y])
        prototypes = prototypes - torch.where(y[:, None] == classes, own, less)
    entries = torch.cat([batch.masked_fill(barred, shut(z.dtype)), prototypes], 1)
    return attract(entries, pull, known / rest if by_class else known)
