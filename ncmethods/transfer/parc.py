"""PARC: do samples that lie close have the same label?"""

from __future__ import annotations

import torch
from torch import Tensor

from ncmethods._core import InputError
from ncmethods.features import FeatureSet
from ncmethods.transfer._inputs import labelled, principal

__all__ = ["parc"]

_MOST = 20_000  # samples: two hundred million pairs


def parc(data: FeatureSet, *, components: int | None = 32) -> Tensor:
    """Spearman correlation of feature distance and label distance over all pairs, in [−100, 100].

    The distance of two samples is 1 − the Pearson correlation of their features, which are brought
    to ``components`` principal coordinates and standardised; that of their labels 1 − the
    correlation of one-hot labels. The latter has two values, so that the rank correlation is one
    sort: memory and time grow with N².

    A correlation over coordinates changes when one of them changes its sign, and principal
    directions have none: here their largest entry is positive, as in scikit-learn since 1.5. A
    rotation of the features can move the score by a point or two.

    Args:
        data: features and labels.
        components: principal coordinates, at least 2; None for the features themselves.

    Returns:
        [], NaN where all pairs have one label or one distance.

    Raises:
        InputError: more than 20 000 samples: pass some of each class.

    References:
        Bolya et al., NeurIPS 2021, arXiv:2111.06977, §4.
    """
    data = labelled(data)
    if len(data) > _MOST:
        raise InputError(
            f"PARC compares all pairs of samples: at most {_MOST}, got {len(data)}. Pass a part of "
            "each class."
        )
    if components is not None and components < 2:
        raise InputError(f"A correlation needs at least 2 components, got {components}.")
    y = data.labels
    assert y is not None
    x = data.features.double() if components is None else principal(data, components).features
    x = _standard(_standard(x, 0), 1)
    i, j = torch.triu_indices(len(x), len(x), 1, device=x.device)
    far = 1 - (x @ x.T / x.shape[1])[i, j]
    apart = (y[i] != y[j]).double()
    del i, j
    order = far.argsort()
    _, ties, sizes = torch.unique_consecutive(far[order], return_inverse=True, return_counts=True)
    middle = sizes.cumsum(0) - (sizes - 1).double() / 2  # mid-ranks, from 1
    rank = middle[ties]
    rank, apart = rank - rank.mean(), apart[order] - apart.mean()
    score: Tensor = 100 * (rank @ apart) / (rank.square().sum() * apart.square().sum()).sqrt()
    return score


def _standard(x: Tensor, dim: int) -> Tensor:
    """Mean 0 and variance 1 along a dimension; what is constant along it stays 0."""
    x = x - x.mean(dim, keepdim=True)
    spread = x.square().mean(dim, keepdim=True).sqrt()
    return x / spread.masked_fill(spread <= 1e-12 * spread.max(), 1.0)
