"""FeatureNorm: the length of a feature."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ncmethods.ood._scorer import Scorer, Train

__all__ = ["FeatureNorm"]


class FeatureNorm(Scorer):
    """−‖h‖, from −∞ to 0 at the zero vector.

    Made for networks that were trained on features of unit length: there the norm is free of the
    loss, and in-distribution features are longer.

    ``fit(train=None, head=None)``; nothing is estimated.

    References:
        Haas et al., arXiv:2306.04072.
    """

    @classmethod
    def fit(cls, train: Train | None = None, head: nn.Module | None = None) -> FeatureNorm:
        """The scorer; neither ``train`` nor ``head`` plays a part."""
        return cls(None)

    def score(self, features: Tensor, logits: Tensor) -> Tensor:
        """Negative lengths [N]."""
        length: Tensor = torch.linalg.vector_norm(features, dim=1)
        return -length
