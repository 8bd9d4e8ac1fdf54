"""ETran: energy of the features, and a classifier that looks for the nearest class mean."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F

from ncmethods._core import InputError
from ncmethods.features import FeatureSet
from ncmethods.transfer._inputs import PoolScore, labelled, min_max

__all__ = ["energy", "etran", "nearest_mean_probability"]


def energy(source_logits: Tensor, *, tail: float | None = None) -> Tensor:
    """Mean log-sum-exp of the source logits on target images, [].

    High where the source model finds something that it knows.

    Args:
        source_logits: [N, Z].
        tail: share of the samples, those of the lowest log-sum-exp, that are averaged; all if None.

    Raises:
        InputError: not [N, Z], or a tail out of (0, 1].

    References:
        Gholami et al., ICCV 2023, arXiv:2308.02027.
    """
    if source_logits.ndim != 2 or not len(source_logits):
        raise InputError(f"source_logits are [N, Z], got {tuple(source_logits.shape)}.")
    if tail is not None and not 0 < tail <= 1:
        raise InputError(f"tail is a share of the samples in (0, 1], got {tail}.")
    values = source_logits.double().logsumexp(1)
    if tail is None:
        return values.mean()
    return values.topk(max(1, int(tail * len(values))), largest=False).values.mean()


def nearest_mean_probability(data: FeatureSet) -> Tensor:
    """Mean posterior of the true class under unit-covariance Gaussians, [] in (0, 1].

    What ETran's code computes as linear discriminant: its eigenvectors come out orthonormal, so
    that nothing is whitened, and the nearest class mean is left.
    """
    data = labelled(data)
    assert data.labels is not None
    stats, x = data.frozen, data.features.double()
    means = (stats.means - stats.mean).nan_to_num(0.0).to(x)
    log_prior = stats.counts.double().log().to(x)  # −∞ where a class has no sample
    logits = (x - stats.mean.to(x)) @ means.T - means.square().sum(1) / 2 + log_prior
    return F.softmax(logits, 1).gather(1, data.labels[:, None]).mean()


def _components(data: FeatureSet) -> dict[str, Tensor]:
    """Energy of the lowest half per cent of the features, as the code has it, and the LDA term."""
    return {
        "energy": energy(data.features, tail=0.005),
        "lda": nearest_mean_probability(data),
    }


def _combine(pool: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    scaled = min_max(pool)
    return {name: 0.15 * parts["energy"] + 0.85 * parts["lda"] for name, parts in scaled.items()}


etran = PoolScore(_components, _combine)
"""0.15 · energy + 0.85 · LDA, each scaled to [0, 1] over the pool, as in ETran's code.

Energy is the log-sum-exp of the features over the lowest 0.5 % of the samples, not of logits.
"""
