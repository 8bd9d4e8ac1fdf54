"""Collapse of test features about the means that training found (Hui, Belkin, Nakkiran)."""

from __future__ import annotations

from torch import Tensor

from ncmethods._core import InputError
from ncmethods.features import FeatureSet
from ncmethods.metrics.nc1 import Between
from ncmethods.metrics.nc4 import nearest_mean
from ncmethods.stats import ClassStats

__all__ = ["scatter_about", "strong_test_nc1", "weak_test_nc1"]


def scatter_about(stats: ClassStats, means: Tensor) -> Tensor:
    """Σ_i (x_i − m_{y_i})(x_i − m_{y_i})ᵀ about given means, from moments alone, [D, D].

    The parallel-axis identity: the scatter about the own means plus Σ_c n_c (μ_c − m_c)(·)ᵀ.

    Args:
        stats: with scatter, without class_weight.
        means: m [K, D].

    Raises:
        InputError: shapes that do not fit, or a class with samples but without a mean.
    """
    if tuple(means.shape) != (stats.num_classes, stats.dim):
        raise InputError(
            f"means must be [K, D] = [{stats.num_classes}, {stats.dim}], got {tuple(means.shape)}."
        )
    if stats.class_weight is not None:
        raise InputError(
            "scatter_about needs a statistic that was accumulated without class_weight."
        )
    active = stats.active
    gap = (stats.means - means.to(stats.counts.device).double())[active]
    if bool(gap.isnan().any()):
        raise InputError("A class has test samples but no training mean. Leave it out of both.")
    Z = gap * stats.counts[active].double().sqrt()[:, None]
    return stats.within + Z.T @ Z


def strong_test_nc1(train: ClassStats, test: ClassStats, *, weighting: str = "class") -> Tensor:
    """NC1 of test features about the *training* means of their true classes, [].

    No second pass: both statistics suffice.

    Args:
        train: moments of the training features.
        test: moments of the test features, by their true labels.
        weighting: of the training means in Σ_B.

    References:
        Hui, Belkin, Nakkiran 2022, arXiv:2202.08384 (strong test collapse).
    """
    return Between.of(train, weighting).nc1(scatter_about(test, train.means) / test.N)


def weak_test_nc1(train: ClassStats, test: FeatureSet, *, weighting: str = "class") -> Tensor:
    """NC1 of test features about the nearest training mean, whichever class that is, [].

    Needs the samples: which mean is nearest is not a function of the moments. Never above
    :func:`strong_test_nc1` when Σ_B is isotropic on the span of the means.

    Args:
        train: moments of the training features.
        test: test samples; their labels are not used.
        weighting: of the training means in Σ_B.

    References:
        Hui, Belkin, Nakkiran 2022, arXiv:2202.08384 (weak test collapse).
    """
    near = nearest_mean(test.features, train.means)
    stats = ClassStats(train.num_classes, train.dim).update(test.features, near)
    return Between.of(train, weighting).nc1(scatter_about(stats, train.means) / len(test))
