"""Separation: how far a feature lies in the span of the rows, and how sure the classifier is."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from ncmethods.ood._scorer import Scorer, Train, linear_rows
from ncmethods.ood.cosine import _width, unit

__all__ = ["Separation"]


class Separation(Scorer):
    """−Σ_c abs cos(h, w_c) − max_c softmax(l)_c.

    Low on the rows (−2 − p on those of a simplex ETF, for any K), high for what is orthogonal to
    all of them: −1/K for a feature of length zero without a bias. Made for networks that were
    trained with :func:`ncmethods.losses.separation`, which sends outliers there.

    ``fit(train=None, head)``; nothing is estimated, but the head must have rows of the features'
    width.

    References:
        Wu et al., ICLR 2025, arXiv:2405.17816, as their code has it.
    """

    needs: ClassVar = frozenset({"features", "logits"})
    rows: Tensor  # [K, D], of unit length

    @classmethod
    def fit(cls, train: Train | None = None, head: nn.Module | None = None) -> Separation:
        """The scorer; of ``train`` only the width is looked at."""
        W, _ = linear_rows(head, cls.__name__, _width(head) if train is None else train.dim)
        return cls(head, rows=unit(W))

    def score(self, features: Tensor, logits: Tensor) -> Tensor:
        """Negative sums of cosines and confidences [N]."""
        inside = (unit(features) @ self.rows.to(features.dtype).T).abs().sum(1)
        return -inside - F.softmax(logits, dim=1).amax(1)
