"""NCI: how near a centred feature points to the row of its predicted class, and its norm."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from ncmethods._core import InputError
from ncmethods.ood._scorer import Scorer, Train, linear_rows, moments

__all__ = ["NCI"]

_NEAR = 1e-8  # smallest distance from the mean


class NCI(Scorer):
    """−(w_ŷ · (h − μ) / ‖h − μ‖ + α‖h‖₁), ŷ the predicted class and μ the mean of the training set.

    Under neural collapse centred in-distribution features point along the row of their class, and
    lie farther from the origin than others. The row is not scaled to unit length. ‖h − μ‖ counts as
    1e-8 at least; at μ the score is −α‖h‖₁.

    Fitted from moments (the mean alone) and the rows of the head. ``fit(train, head, *,
    alpha=1e-4)``:

    - ``alpha``: weight of the norm, ≥ 0.

    Raises:
        InputError: no head, or a negative alpha.

    References:
        Liu and Qin, CVPR 2025, arXiv:2311.01479.
    """

    needs: ClassVar = frozenset({"features", "logits"})
    center: Tensor  # [D]
    rows: Tensor  # [K, D]
    alpha: float

    @classmethod
    def fit(cls, train: Train, head: nn.Module | None = None, *, alpha: float = 1e-4) -> NCI:
        """The scorer fitted on ``train``; see the class for its hyperparameters."""
        if not (math.isfinite(alpha) and alpha >= 0):
            raise InputError(f"alpha must be finite and ≥ 0, got {alpha}.")
        stats = moments(train)
        rows, _ = linear_rows(head, cls.__name__, stats.dim)
        return cls(head, center=stats.mean, rows=rows.to(stats.mean), alpha=alpha)

    def sizes(self) -> tuple[int | None, int | None]:
        """D and K of the rows."""
        K, D = self.rows.shape
        return D, K

    def score(self, features: Tensor, logits: Tensor) -> Tensor:
        """Negative proximities [N]."""
        z = features - self.center.to(features.dtype)
        guess = logits.max(1)[1]  # one pass less than argmax
        along: Tensor = self.rows.to(z.dtype).index_select(0, guess).mul_(z).sum(1)
        length: Tensor = torch.linalg.vector_norm(z, dim=1).clamp(min=_NEAR)
        size: Tensor = torch.linalg.vector_norm(features, ord=1, dim=1)
        return -along / length - self.alpha * size
