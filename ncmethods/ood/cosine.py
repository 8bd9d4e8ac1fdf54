"""Angles to class means and to classifier rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ncmethods._core import check_head
from ncmethods.ood._scorer import Scorer, Train, linear_rows, moments
from ncmethods.ood.logit import check_positive

__all__ = ["ETFAngle", "PrototypeCosine"]


def unit(x: Tensor) -> Tensor:
    """Rows of unit length; a zero row stays zero and gets no gradient."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    rows: Tensor = x / length.masked_fill(length == 0, torch.inf)
    return rows


class PrototypeCosine(Scorer):
    """−max_c cos(h − μ, μ_c − μ): the angle to the nearest class mean, seen from the mean of all.

    In [−1, 1]; a feature at μ has no direction and scores 0, and so does every feature where all
    class means agree.

    Fitted from moments. ``fit(train, head=None, *, centre=True)``; without ``centre`` the angles
    are those at the origin, −max_c cos(h, μ_c).
    """

    center: Tensor  # [D], μ or zero
    prototypes: Tensor  # [K', D], unit rows

    @classmethod
    def fit(
        cls, train: Train, head: nn.Module | None = None, *, centre: bool = True
    ) -> PrototypeCosine:
        """The scorer fitted on ``train``; see the class for its hyperparameter."""
        stats = moments(train)
        means = stats.means[stats.active]
        center = stats.mean if centre else torch.zeros_like(stats.mean)
        rows = means - center
        # What is left of equal means is rounding, which has no direction.
        length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        rows = rows.masked_fill(length <= 1e-12 * means.abs().amax(), 0.0)
        return cls(head, center=center, prototypes=unit(rows), centre=centre)

    def score(self, features: Tensor, logits: Tensor) -> Tensor:
        """Negative largest cosines [N]."""
        x = unit((features - self.center).to(features.dtype))
        return -(x @ self.prototypes.to(x.dtype).T).amax(1)


class ETFAngle(Scorer):
    """−max_c cos(h, w_c), or with a temperature −T log Σ_c exp(cos(h, w_c)/T).

    The angle to the nearest row of the classifier. On the rows of a simplex ETF it lies in
    [−1, 1/(K−1)]: −1 on a row, 0 for what is orthogonal to all. A zero feature has no direction
    and scores 0 (−T log K).

    ``fit(train=None, head, *, temperature=None)``; nothing is estimated, but the head must have
    rows of the features' width. Any head will do; on an ETF head the rows are the frame. A
    ``temperature`` of 0.05 to 0.1 is usual; at 1 the score is almost flat.
    """

    rows: Tensor  # [K, D], of unit length
    temperature: float | None

    @classmethod
    def fit(
        cls,
        train: Train | None = None,
        head: nn.Module | None = None,
        *,
        temperature: float | None = None,
    ) -> ETFAngle:
        """The scorer; of ``train`` only the width is looked at."""
        if temperature is not None:
            check_positive(temperature=temperature)
        dim = _width(head) if train is None else train.dim
        W, _ = linear_rows(head, cls.__name__, dim)
        return cls(head, rows=unit(W), temperature=temperature)

    def score(self, features: Tensor, logits: Tensor) -> Tensor:
        """Negative largest cosines, or energies of cosines, [N]."""
        cosines = unit(features) @ self.rows.to(features.dtype).T
        if self.temperature is None:
            return -cosines.amax(1)
        return -self.temperature * (cosines / self.temperature).logsumexp(1)


def _width(head: nn.Module | None) -> int:
    """D of the rows of ``head``; 0 where there is none."""
    weight = None if head is None else check_head(head).weight
    return weight.shape[-1] if isinstance(weight, Tensor) else 0
