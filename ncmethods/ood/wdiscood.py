"""WDiscOOD: distances in the discriminant space of whitened features, and outside it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncmethods._core import InputError
from ncmethods._linalg import truncated_svd
from ncmethods.ood._scorer import Scorer, Train, from_nearest, moments

__all__ = ["WDiscOOD"]


class WDiscOOD(Scorer):
    """min_c ‖z_D − z̄_c‖ + β ‖z_R‖, for the whitened feature z = Σ_W^−½ (h − μ).

    z_D is the part of z in the d leading directions of linear discriminant analysis, those in
    which the whitened class means differ most (every class counts the same); z_R is what is left.
    The first term asks how far the nearest class is, the second how far the feature lies from what
    tells classes apart. Directions without variance are treated as in
    :class:`~ncmethods.ood.mahalanobis.Mahalanobis`. Scores are ≥ 0.

    Fitted from moments. ``fit(train, head=None, *, rank=None, residual_weight=5.0,
    normalize=False)``:

    - ``rank``: d; if None the smaller of K − 1 and D − 1. Directions in which class means do not
      differ never count as discriminants, so there may be fewer;
    - ``residual_weight``: β; the authors take 5 on CNNs and 1 on ViT;
    - ``normalize``: scale features to unit length first, as they do on ViT and contrastive
      features.

    Raises:
        InputError: a rank that is not between 1 and D − 1, or a negative β.

    References:
        Chen et al., ICCV 2023, arXiv:2303.07543.
    """

    center: Tensor  # [D]
    factor: Tensor  # [D, D], whitens and turns: d discriminants first, then the residual
    discriminants: Tensor  # class means there, [K', d]
    residual_weight: float
    normalize: bool

    @classmethod
    def fit(
        cls,
        train: Train,
        head: nn.Module | None = None,
        *,
        rank: int | None = None,
        residual_weight: float = 5.0,
        normalize: bool = False,
    ) -> WDiscOOD:
        """The scorer fitted on ``train``; see the class for its hyperparameters."""
        if not (math.isfinite(residual_weight) and residual_weight >= 0):
            raise InputError(f"residual_weight must be ≥ 0 and finite, got {residual_weight}.")
        stats = moments(train, unit=normalize)
        means = stats.means[stats.active]
        if rank is None:
            rank = min(max(len(means) - 1, 1), stats.dim - 1)
        if not 1 <= rank < stats.dim:
            raise InputError(
                f"WDiscOOD needs a rank between 1 and D − 1 = {stats.dim - 1}, got {rank}: the "
                "whole space leaves nothing outside."
            )
        whiten = stats.whitener("within")
        size = float(torch.linalg.vector_norm(means @ whiten, dim=1).amax())
        M = (means - stats.mean) @ whiten
        _, V = truncated_svd(M, min(rank, *M.shape), size)  # [d, D]
        turn, _ = torch.linalg.qr(V.T, mode="complete")
        return cls(
            head,
            center=stats.mean,
            factor=whiten @ turn,
            discriminants=(M @ turn)[:, : len(V)],
            rank=rank,
            residual_weight=residual_weight,
            normalize=normalize,
        )

    def score(self, features: Tensor, logits: Tensor) -> Tensor:
        """Distances [N]."""
        x = F.normalize(features, dim=1) if self.normalize else features
        x = (x - self.center).to(x.dtype)
        z, means = x @ self.factor.to(x.dtype), self.discriminants.to(x.dtype)
        inside, outside = z[:, : means.shape[1]], z[:, means.shape[1] :]
        near: Tensor = torch.linalg.vector_norm(from_nearest(inside, means), dim=1)
        far: Tensor = torch.linalg.vector_norm(outside, dim=1)
        return near + self.residual_weight * far
