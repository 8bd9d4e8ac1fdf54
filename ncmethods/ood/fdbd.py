"""fDBD: distances to the decision boundaries, relative to the distance from the training mean."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncmethods.ood._scorer import Scorer, Train, linear_rows, moments

__all__ = ["fDBD"]

_SAME = 1e-6  # of the largest row: rows that are nearer than this are one row
_BLOCK = 128  # rows whose distances are taken at a time
_NEAR = 1e-8  # smallest distance from the mean


class fDBD(Scorer):
    """−Σ_{c ≠ ŷ} (l_ŷ − l_c) / ‖w_ŷ − w_c‖ / ‖h − μ‖, ŷ the predicted class, μ the training mean.

    (l_ŷ − l_c) / ‖w_ŷ − w_c‖ is the distance of h from the boundary between two classes. Rows that
    agree to 1e-6 of the largest row have no boundary, and their pair is left out. Scores are ≤ 0. A
    feature nearer to μ than 1e-8 counts as that near: its score is large, negative and finite.

    Fitted from moments (the mean alone) and the rows of the head. ``fit(train, head)``.

    Raises:
        InputError: no head.

    References:
        Liu and Qin, ICML 2024, arXiv:2312.11536.
    """

    needs: ClassVar = frozenset({"features", "logits"})
    center: Tensor  # [D]
    inverse: Tensor  # [K, K], 1 / ‖w_i − w_j‖, 0 where rows agree

    @classmethod
    def fit(cls, train: Train, head: nn.Module | None = None) -> fDBD:
        """The scorer fitted on ``train``."""
        stats = moments(train)
        W, _ = linear_rows(head, cls.__name__, stats.dim)
        return cls(head, center=stats.mean, inverse=inverse_distances(W).to(stats.mean))

    def sizes(self) -> tuple[int | None, int | None]:
        """D of the mean and K of the rows."""
        return len(self.center), len(self.inverse)

    def score(self, features: Tensor, logits: Tensor) -> Tensor:
        """Negative sums of distances [N]."""
        top, guess = logits.max(1)
        inverse = self.inverse.to(logits.dtype).index_select(0, guess)
        total: Tensor = torch.linalg.vecdot(top[:, None] - logits, inverse)
        z = features - self.center.to(features.dtype)
        length: Tensor = torch.linalg.vector_norm(z, dim=1).clamp(min=_NEAR)
        return -total / length


def inverse_distances(rows: Tensor) -> Tensor:
    """1 / ‖w_i − w_j‖ [K, K] of float64 rows [K, D]; 0 where they agree to 1e-6 of the largest."""
    same = _SAME * float(rows.norm(dim=1).max())
    rows = rows - rows.mean(0)  # differences stay, and the squares below lose fewer digits
    lengths = rows.square().sum(1)
    inverse = rows.new_empty(len(rows), len(rows))
    for i in range(0, len(rows), _BLOCK):  # the upper triangle, and its mirror
        j = min(i + _BLOCK, len(rows))
        squares = torch.addmm(lengths[i:], rows[i:j], rows[i:].T, alpha=-2)
        squares.add_(lengths[i:j, None]).fill_diagonal_(0)
        block = F.threshold(squares, same**2, torch.inf, inplace=True).rsqrt_()
        inverse[i:j, i:], inverse[i:, i:j] = block, block.T
    return inverse
