"""Linear discriminant scores: LDA, and SFDA, which makes the features harder first."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ncmethods._core import InputError
from ncmethods.features import FeatureSet
from ncmethods.stats import ClassStats, FrozenStats
from ncmethods.transfer._inputs import labelled, principal

__all__ = ["lda", "sfda"]

_ROWS = 4096  # of samples at a time
_LEAST = 1e-10  # shrinkage


def lda(data: FeatureSet, *, shrinkage: float | None = None, pca: int | None = None) -> Tensor:
    """Mean posterior of the true class, (1/N) Σ_i P(y_i | f_i), [], in (0, 1].

    P is that of Gaussians with the class means, the class frequencies and one covariance
    (1 − λ) Σ_W + λ tr(Σ_W)/D · I with λ = max(exp(−5 σ_max(Σ_W)), 1e-10). The scale of the features
    is part of the definition. With N ≤ D it nears 1 whatever the features are: ``pca`` keeps it
    from that. Directions of less than 1e-8 of the largest variance count as if they had that much.

    Args:
        data: with labels; negative ones are left out.
        shrinkage: λ in [0, 1]; the formula's if None.
        pca: number of leading principal directions that are kept; all if None.

    Raises:
        InputError: no labels, fewer than two classes with samples, or λ out of [0, 1].

    References:
        Shao et al. 2022, arXiv:2207.03036 (SFDA; this is its first step).
    """
    data, shrinkage = _prepared(data, shrinkage, pca)
    labels = _slots(data)
    rule = _Rule(data.frozen, shrinkage)
    return _mean_posterior(rule, zip(torch.split(data.features, _ROWS), torch.split(labels, _ROWS)))


def sfda(data: FeatureSet, *, shrinkage: float | None = None, pca: int | None = None) -> Tensor:
    """:func:`lda` of features that were mixed towards the other classes, [], in (0, 1].

    A first LDA gives P; with q_i = exp P(y_i | f_i) / Σ_c exp P(c | f_i) the features become
    q_i f_i + (1 − q_i) · the mean of the other classes' means. A second LDA with the same λ is
    fitted to them and scores them.

    Args:
        data: with labels; negative ones are left out.
        shrinkage: λ in [0, 1]; that of the features as given if None.
        pca: number of leading principal directions that are kept; all if None.

    Raises:
        InputError: as in :func:`lda`.

    References:
        Shao et al. 2022, arXiv:2207.03036.
    """
    data, shrinkage = _prepared(data, shrinkage, pca)
    stats, labels = data.frozen, _slots(data)
    rule = _Rule(stats, shrinkage)
    means = stats.means[stats.active].to(data.features.device)
    others = (means.sum(0) - means) / (len(means) - 1)

    def mixed() -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in zip(torch.split(data.features, _ROWS), torch.split(labels, _ROWS)):
            soft = F.softmax(rule.posterior(x), 1)
            q = soft.gather(1, y[:, None])
            yield q * x.double() + (1 - q) * others[y], y

    second = ClassStats(len(means), data.dim)
    for x, y in mixed():
        second.update(x, y)
    return _mean_posterior(_Rule(second.freeze(), shrinkage), mixed())


class _Rule:
    """P(c | f) under Gaussians with a common, shrunk covariance; classes without samples left out.

    Args:
        stats: moments that it is fitted from.
        shrinkage: λ.
    """

    def __init__(self, stats: FrozenStats, shrinkage: float) -> None:
        self.center = stats.mean
        factor = stats.whitener("within", shrinkage)
        white = (stats.means - stats.mean)[stats.active] @ factor  # [K', D]
        prior = stats.counts[stats.active].double() / stats.N
        self.weight, self.bias = white @ factor.T, prior.log() - white.square().sum(1) / 2

    def posterior(self, x: Tensor) -> Tensor:
        """P [n, K'] of rows [n, D]."""
        z = x.double() - self.center.to(x.device)
        return F.softmax(z @ self.weight.T.to(x.device) + self.bias.to(x.device), 1)


def _mean_posterior(rule: _Rule, rows: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.cat([rule.posterior(x).gather(1, y[:, None]) for x, y in rows]).mean()


def _prepared(
    data: FeatureSet, shrinkage: float | None, pca: int | None
) -> tuple[FeatureSet, float]:
    """Labelled samples, projected if asked for, and λ."""
    data = labelled(data)
    data = data if pca is None else principal(data, pca)
    stats = data.frozen
    if int(stats.active.sum()) < 2:
        raise InputError("A discriminant needs at least two classes with samples, got 1.")
    if shrinkage is None:
        shrinkage = stats.cached("lda shrinkage", lambda: _shrinkage(stats.sigma_w))
    if not 0 <= shrinkage <= 1:
        raise InputError(f"shrinkage must lie in [0, 1], got {shrinkage}.")
    return data, shrinkage


def _shrinkage(sigma: Tensor) -> float:
    """max(exp(−5 σ_max), 1e-10); no eigenvalues where a variance alone says that it is 1e-10."""
    if 5 * float(sigma.diagonal().max()) >= -math.log(_LEAST):
        return _LEAST
    return max(math.exp(-5 * float(torch.linalg.eigvalsh(sigma)[-1])), _LEAST)


def _slots(data: FeatureSet) -> Tensor:
    """Labels [N] counted among the classes that have samples."""
    assert data.labels is not None
    active = data.frozen.active.to(data.labels.device)
    return (active.cumsum(0) - 1)[data.labels]
