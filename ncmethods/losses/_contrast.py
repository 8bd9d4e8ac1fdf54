"""What the contrastive losses share: unit rows, checks, and the masked log-softmax."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

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


def unit(rows: Tensor, known: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """Rows of length 1/√τ, so that products of such rows are cosines over τ.

    Rows of zeros stay, and so do rows outside ``known``, which become zero.
    """
    if known is not None:
        rows = torch.where(known[:, None], rows, 0.0)  # their NaN must not reach other rows
    result: Tensor = rows / _length(rows, temperature)[:, None]
    return result


def _length(rows: Tensor, temperature: float) -> Tensor:
    """√τ ‖row‖ [N]; of a row of zeros √τ."""
    length = torch.linalg.vector_norm(rows, dim=1)
    result: Tensor = temperature**0.5 * length.masked_fill(length == 0, 1.0)
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
    z, W = unit(features, known, temperature), weight.to(features.dtype)
    positive, barred = same_class(labels, known)
    rest = 1 + positive.sum(1).to(z.dtype)  # entries of the anchor's class without itself
    here, there, own = torch.zeros_like(barred, dtype=z.dtype), z.new_zeros(()), z.new_zeros(())
    if average:  # logarithms of the sizes of classes, taken from the logits
        size = z.new_ones(K).index_add(0, y, known.to(z.dtype))
        own, less = rest.log(), size.log()
        here = torch.where(positive, -own[:, None], -less[y])
        there = (-less).repeat(len(y), 1).scatter_(1, y[:, None], -own[:, None])
    batch = torch.addmm(here.masked_fill_(barred, shut(z.dtype)), z, z.T)
    # The rows' lengths divide [N, K] and not [K, D], which is larger.
    prototypes = torch.addcdiv(there, z @ W.T, _length(W, temperature))
    # Unlike that of ``gather`` the gradient of ``nll_loss`` is deterministic on a GPU.
    label = -F.nll_loss(prototypes, y, reduction="none")
    pull = own + ((batch * positive.to(z.dtype)).sum(1) + label) / rest
    return attract(torch.cat([batch, prototypes], 1), pull, known / rest if by_class else known)
