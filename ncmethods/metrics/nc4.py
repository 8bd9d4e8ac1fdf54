"""NC4, the decision: the classifier agrees with the nearest class mean. Needs samples."""

from __future__ import annotations

import torch
from torch import Tensor

from ncmethods._core import InputError, check_features, check_logits

__all__ = ["agreement", "nearest_mean"]

_CHUNK = 2**24  # distances that are held at once


def nearest_mean(features: Tensor, means: Tensor) -> Tensor:
    """Index [N] of the class mean with the smallest Euclidean distance.

    Features and means are centred first, in float64, so that a common offset costs no digits.

    Args:
        features: [N, D].
        means: class means [K, D]; NaN rows (classes without samples) are never chosen.

    Raises:
        InputError: D differs, or no class has a mean.
    """
    features = check_features(features, means.shape[1])
    known = ~means.isnan().any(1)
    if not bool(known.any()):
        raise InputError("No class has a mean: update the statistic with labelled features first.")
    M = means.double().to(features.device)
    known = known.to(features.device)
    center = M[known].mean(0)
    M = (M - center).nan_to_num()
    half = (0.5 * M.square().sum(1)).masked_fill(~known, torch.inf)
    nearest = [
        (half - (x.double() - center) @ M.T).argmin(1)
        for x in torch.split(features, max(1, _CHUNK // len(M)))
    ]
    return torch.cat(nearest) if nearest else torch.empty(0, dtype=torch.int64)


def agreement(features: Tensor, logits: Tensor, means: Tensor) -> Tensor:
    """Share of samples whose largest logit is that of their nearest class mean, [], in [0, 1].

    The logits are those of the head with its bias.

    Args:
        features: [N, D].
        logits: [N, K] of the same samples.
        means: class means [K, D], of the training features.

    Raises:
        InputError: no samples, or shapes that do not fit.

    References:
        Papyan, Han, Donoho 2020, arXiv:2008.08186 (NC4; there the mismatch).
    """
    logits = check_logits(logits, len(means))
    if len(features) == 0 or len(logits) != len(features):
        raise InputError(
            f"NC4 needs samples with logits, got {len(features)} features and {len(logits)} logits."
        )
    same = logits.argmax(1).to(features.device) == nearest_mean(features, means)
    return same.double().mean()
