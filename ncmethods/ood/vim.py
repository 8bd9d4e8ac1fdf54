"""ViM and Residual: how far a feature lies outside the principal space of the training features."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ncmethods._core import InputError
from ncmethods.ood._scorer import Scorer, Train, linear_rows, moments, samples, train_logits

__all__ = ["Residual", "ViM"]

_CHUNK = 4096  # training rows projected at a time
_FLOOR = 1e-6  # of the length of the features: a mean residual below it is rounding


class Residual(Scorer):
    """‖Nᵀ(h − u)‖, the length of a feature outside the d leading directions of the training set.

    The origin u = −W⁺b is where the logits vanish, or come nearest to it. N holds the D − d
    eigenvectors of E[(h − u)(h − u)ᵀ] with the smallest eigenvalues. Scores are ≥ 0, and 0 at u.

    Fitted from moments and the rows of the head. ``fit(train, head, *, rank=None)``:

    - ``rank``: d; if None the authors' rule, 1000 for D ≥ 2048, 512 for D ≥ 768, else D // 2.

    Raises:
        InputError: no head, or a rank that is not between 1 and D − 1.

    References:
        Wang et al., CVPR 2022, arXiv:2203.10807.
    """

    center: Tensor  # [D], μ − NNᵀ(μ − u): as good as u, and near the features
    null: Tensor  # [D, D − d], N: orthonormal columns

    @classmethod
    def fit(
        cls, train: Train, head: nn.Module | None = None, *, rank: int | None = None
    ) -> Residual:
        """The scorer fitted on ``train``; see the class for its hyperparameters."""
        space, _ = cls._outside(train, head, rank)
        return cls(None, **space)

    @classmethod
    def _outside(
        cls, train: Train, head: nn.Module | None, rank: int | None
    ) -> tuple[dict[str, Any], float]:
        """What a scorer keeps, and the root mean squared length of h − u."""
        stats = moments(train)
        D = stats.dim
        if rank is None:
            rank = 1000 if D >= 2048 else 512 if D >= 768 else D // 2
        if not 1 <= rank < D:
            raise InputError(
                f"{cls.__name__} needs a rank between 1 and D − 1 = {D - 1}, got {rank}: the whole "
                "space leaves nothing outside."
            )
        u = origin(head, cls.__name__, D).to(stats.mean)
        values, vectors = stats.second_moment_eigh(u)
        null = vectors[:, : D - rank]
        center = stats.mean - null @ ((stats.mean - u) @ null)
        length = float(values.clamp(min=0).sum().sqrt())
        return {"center": center, "null": null, "rank": rank}, length

    def residual(self, features: Tensor) -> Tensor:
        """Lengths [N] outside the principal space."""
        x = features - self.center.to(features.dtype)
        length: Tensor = torch.linalg.vector_norm(x @ self.null.to(x.dtype), dim=1)
        return length

    def score(self, features: Tensor, logits: Tensor) -> Tensor:
        """Lengths [N] outside the principal space."""
        return self.residual(features)


class ViM(Residual):
    """α‖Nᵀ(h − u)‖ − log Σ_c exp(l_c): the residual as the logit of one more class.

    α = E[max_c l_c] / E[‖Nᵀ(h − u)‖] over the training samples gives that logit the size of the
    others. A mean residual under 1e-6 of the length of the features (collapse) counts as that much:
    α stays finite. The score at u is −log Σ_c exp(l_c) alone.

    Fitted from samples, because of α, and the rows of the head. ``fit(train, head, *, rank=None)``
    as in :class:`Residual`.

    Raises:
        InputError: moments only, no head, a rank that is not between 1 and D − 1, or largest logits
            whose mean is not positive.

    References:
        Wang et al., CVPR 2022, arXiv:2203.10807.
    """

    needs: ClassVar = frozenset({"features", "logits"})
    alpha: Tensor  # [], float64

    @classmethod
    def fit(cls, train: Train, head: nn.Module | None = None, *, rank: int | None = None) -> ViM:
        """The scorer fitted on ``train``; see the class for its hyperparameters."""
        data = samples(train, cls.__name__)
        space, length = cls._outside(train, head, rank)
        top = float(train_logits(data, head, cls.__name__).amax(1).double().mean())
        if not top > 0:
            raise InputError(
                "ViM scales the residual to the largest logits, whose mean over the training set "
                f"must be positive, got {top:.4g}: α would reward what lies outside. Use Residual."
            )
        outside, total = Residual(None, **space), 0.0
        with torch.no_grad():
            for x in torch.split(data.features, _CHUNK):
                total += float(outside.residual(x).double().sum())
        alpha = top / (max(total / len(data), _FLOOR * length) or 1.0)
        return cls(head, **space, alpha=torch.tensor(alpha, dtype=torch.float64))

    def score(self, features: Tensor, logits: Tensor) -> Tensor:
        """Virtual logits less the log-sum-exp of the others [N]."""
        return self.alpha.to(features.dtype) * self.residual(features) - logits.logsumexp(1)


def origin(head: nn.Module | None, name: str, dim: int) -> Tensor:
    """The origin u = −W⁺b [D] in float64; singular values that are rounding count as zero."""
    W, b = linear_rows(head, name, dim)
    given: Any = head
    eps = torch.finfo(torch.float64 if given.weight.dtype == torch.float64 else torch.float32).eps
    u: Tensor = -torch.linalg.pinv(W, rtol=eps * max(W.shape)) @ b
    return u
