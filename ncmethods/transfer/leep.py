"""LEEP, NCE and NLEEP: how well source classes, or clusters, predict the target labels."""

from __future__ import annotations

import torch
from torch import Tensor

from ncmethods._core import InputError, check_labels
from ncmethods.features import FeatureSet
from ncmethods.transfer._inputs import labelled

__all__ = ["leep", "nce", "nleep"]

_SUM = 1e-3  # by which probabilities may miss 1: those of half precision do


def leep(source_probs: Tensor, labels: Tensor) -> Tensor:
    """Mean log-likelihood of the labels under the empirical predictor, [] ≤ 0.

    Mean over samples of log Σ_z P̂(y_i|z) p_iz, where P̂ is the empirical conditional distribution
    of labels given source classes. Needs the source classifier's probabilities on target images,
    not its features.

    Args:
        source_probs: p [N, Z], rows that sum to one.
        labels: int64 [N]; negative ones are left out.

    Raises:
        InputError: rows that are not probabilities, no labelled row, or sizes that differ.

    References:
        Nguyen et al., ICML 2020, arXiv:2002.12462.
    """
    p, y = _source(source_probs, labels)
    joint = p.new_zeros(int(y.max()) + 1, p.shape[1]).index_add_(0, y, p)  # N·P̂(y, z)
    mass = joint.sum(0)
    given = joint / mass.clamp(min=torch.finfo(p.dtype).tiny)  # P̂(y|z); 0 where z never occurs
    score: Tensor = (p * given[y]).sum(1).log().mean()
    return score


def nce(source_probs: Tensor, labels: Tensor) -> Tensor:
    """Negative conditional entropy −H(Y | Ẑ) of labels given the source class, [] ≤ 0, in nats.

    Ẑ is the largest entry of each row. LEEP of one-hot probabilities.

    Args:
        source_probs: [N, Z], rows that sum to one.
        labels: int64 [N]; negative ones are left out.

    Raises:
        InputError: as :func:`leep`.

    References:
        Tran et al., ICCV 2019, arXiv:1908.08142.
    """
    p, y = _source(source_probs, labels)
    return leep(torch.zeros_like(p).scatter_(1, p.argmax(1, keepdim=True), 1.0), y)


def nleep(
    data: FeatureSet, *, per_class: int = 5, energy: float = 0.8, seed: int | None = 0
) -> Tensor:
    """LEEP with a Gaussian mixture in place of the source classes, [] ≤ 0.

    The features are brought to the principal coordinates that hold a share ``energy`` of their
    variance, and a mixture of ``per_class`` · K full Gaussians is fitted there by scikit-learn,
    whose posteriors stand for probabilities. Stochastic in ``seed``; the slowest of the scores.

    Args:
        data: features and labels.
        per_class: components for each class that has samples.
        energy: share of the variance, in (0, 1).
        seed: of the mixture's start.

    Raises:
        InputError: fewer samples than components, or a share out of range.

    References:
        Li et al., CVPR 2021, arXiv:2011.11200. SFDA's and NCTI's copies leave out the logarithm;
        this has it.
    """
    import warnings

    from sklearn.decomposition import PCA
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    data = labelled(data)
    if not 0 < energy < 1:
        raise InputError(f"energy is a share of the variance in (0, 1), got {energy}.")
    assert data.labels is not None
    M = per_class * int(data.frozen.active.sum())
    if len(data) < M:
        raise InputError(
            f"NLEEP fits {M} Gaussians and got {len(data)} samples: pass per_class=1, or more."
        )
    X = data.features.double().cpu().numpy()
    Z = PCA(n_components=energy, svd_solver="full").fit_transform(X) if X.std() > 0 else X[:, :1]
    with warnings.catch_warnings():
        # A mixture that has not settled after 100 steps serves; collapsed features repeat points.
        warnings.simplefilter("ignore", ConvergenceWarning)
        mixture = GaussianMixture(n_components=M, random_state=seed).fit(Z)
    return leep(torch.from_numpy(mixture.predict_proba(Z)), data.labels.cpu())


def _source(source_probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Checked probabilities in float64 and labels, without rows whose label is negative."""
    if source_probs.ndim != 2:
        raise InputError(f"source_probs are [N, Z], got {tuple(source_probs.shape)}.")
    y = check_labels(labels, len(source_probs))
    keep = y >= 0
    p, y = source_probs.double()[keep], y[keep]
    if not len(p):
        raise InputError("There is no labelled row.")
    off = (p.sum(1) - 1).abs()
    if not bool((p >= 0).all()) or not bool((off <= _SUM).all()):
        raise InputError(
            "source_probs must be probabilities: rows ≥ 0 that sum to one. Entries go down to "
            f"{float(p.min()):.4g}, and the worst sum is off by {float(off.max()):.4g}. Of logits "
            "take the softmax."
        )
    return p, y
