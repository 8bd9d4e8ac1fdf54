"""Spread features on the sphere: the nearest-neighbour estimate of their entropy."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ncmethods._core import no_autocast
from ncmethods.losses._class_means import known_rows, mean_of

__all__ = ["koleo"]

TILE = 4096


def koleo(features: Tensor, labels: Tensor | None = None, *, eps: float = 1e-8) -> Tensor:
    """−mean_i log(‖ẑ_i − ẑ_nn(i)‖ + ε), ẑ the features scaled to unit length.

    nn(i) is the sample of the batch with the largest cosine to i, itself left out, of whatever
    class. The term is low where no two samples lie close: it works against collapse. The gradient
    reaches both ends of a pair. 0 with fewer than two samples.

    Args:
        features: [N, D].
        labels: int64 [N]; only to leave out samples with a negative label. All count if None.
        eps: ε.

    Returns:
        loss [], without its weight.

    Raises:
        InputError: shapes that do not fit.

    References:
        Harun et al., ICML 2025, arXiv:2502.10691, as their code has it; the estimator (KoLeo) is
        that of Sablayrolles et al., ICLR 2019, arXiv:1806.03198.
    """
    with no_autocast(features.device):
        h, known = known_rows(features, labels)
        if len(h) < 2:
            return h.sum() * 0.0
        Z = F.normalize(h, dim=1, eps=1e-8)
        gap = torch.linalg.vector_norm(Z - Z[_nearest(Z.detach(), known)], dim=1)
        loss = -mean_of((gap + eps).log(), known)
        return torch.where(known.sum() >= 2, loss, 0 * loss)


@torch.no_grad()
def _nearest(Z: Tensor, known: Tensor) -> Tensor:
    """Index [N] of the other known row with the largest cosine."""
    found = []
    for start in range(0, len(Z), TILE):
        cosine = (Z[start : start + TILE] @ Z.T).masked_fill(~known, -2)  # [T, N]
        cosine.diagonal(start).fill_(-2)
        found.append(cosine.argmax(1))
    return torch.cat(found)
