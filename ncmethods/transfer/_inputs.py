"""What a score reads: moments, principal coordinates, and the two steps of a pool-level score."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ncmethods._core import InputError
from ncmethods.features import FeatureSet
from ncmethods.stats import ClassStats, FrozenStats

__all__ = [
    "PoolScore",
    "between",
    "extent",
    "frozen",
    "labelled",
    "min_max",
    "principal",
    "saturated",
]


class PoolScore(NamedTuple):
    """A score that compares candidates: its value depends on who else is in the pool.

    ``score(pool)`` of FeatureSets by name gives values [] by name. The raw components of one
    candidate do not depend on the others: compute them one candidate at a time, keep them, and
    combine at the end.
    """

    components: Callable[[FeatureSet], dict[str, Tensor]]
    """Raw components [] of one candidate, by name."""
    combine: Callable[[Mapping[str, Mapping[str, Tensor]]], dict[str, Tensor]]
    """Values [] by candidate, from the components of all."""

    def __call__(self, pool: Mapping[str, FeatureSet]) -> dict[str, Tensor]:
        """Values [] by candidate."""
        return self.combine({name: self.components(data) for name, data in pool.items()})


def frozen(stats: ClassStats | FrozenStats, pca: int | None = None) -> FrozenStats:
    """The moments, or those of the ``pca`` leading principal coordinates where D is larger.

    One FrozenStats (``FeatureSet.frozen``, ``ClassStats.freeze()``) shares its decompositions
    among the scores that are given it.

    Raises:
        InputError: samples instead of moments, none of them, or a ``pca`` under 1.
    """
    if isinstance(stats, FeatureSet):
        raise InputError("This score is computed from moments: pass data.stats or data.frozen.")
    view = stats if isinstance(stats, FrozenStats) else stats.freeze()
    if pca is not None and pca < 1:
        raise InputError(f"pca is a number of principal directions, at least 1, got {pca}.")
    return view if pca is None or pca >= view.dim else view.principal(pca)


def saturated(stats: ClassStats | FrozenStats, pca: int | None = None) -> bool:
    """Whether there are so few samples that any features separate the classes: N ≤ D + 1.

    H-score, VCI and LDA then have the same value for every model in general position, random ones
    included. ``pca`` as in the score.
    """
    D = stats.dim if pca is None else min(pca, stats.dim)
    return stats.N <= D + 1


def between(stats: FrozenStats, weighting: str = "sample") -> Tensor:
    """Rows R [K_active, D] with RᵀR = Σ_B, classes weighted by count or alike (``"class"``).

    Raises:
        InputError: fewer than two classes with samples.
    """
    means = stats.means[stats.active]
    if len(means) < 2:
        raise InputError(
            f"This score compares classes: at least two need samples, got {len(means)}."
        )
    if weighting == "class":
        shares, center = torch.full_like(means[:, 0], 1 / len(means)), means.mean(0)
    else:
        shares, center = stats.counts[stats.active].double() / stats.N, stats.mean
    return (means - center) * shares.sqrt()[:, None]


def extent(stats: FrozenStats) -> float:
    """What the rounding of class means is relative to: the largest entry, or the spread."""
    spread = stats.sigma_w.diagonal().mean().clamp(min=0).sqrt()
    return max(float(stats.means[stats.active].abs().max()), float(spread))


def principal(data: FeatureSet, pca: int) -> FeatureSet:
    """Centred coordinates of the samples along the ``pca`` leading principal directions (PCA).

    No more than D; not whitened.

    Raises:
        InputError: a ``pca`` under 1.
    """
    if pca < 1:
        raise InputError(f"pca is a number of principal directions, at least 1, got {pca}.")
    stats = data.frozen
    basis = stats.leading(min(pca, data.dim))  # [D, d]
    z = (data.features.double() - stats.mean.to(data.features.device)) @ basis.to(
        data.features.device
    )
    return FeatureSet(z, data.labels, data.num_classes, data.logits)


def labelled(data: FeatureSet) -> FeatureSet:
    """``data`` without rows whose label is negative.

    Raises:
        InputError: moments instead of samples, no labelled row, or features that are not finite.
    """
    if not isinstance(data, FeatureSet):
        raise InputError(f"This score needs samples, a FeatureSet: got {type(data).__name__}.")
    if data.labels is None:
        raise InputError(
            "Transferability needs labels of the target data: this FeatureSet has none."
        )
    keep = data.labels >= 0
    data = data if bool(keep.all()) else data.subset(keep)
    if data.features.requires_grad:
        data = FeatureSet(data.features.detach(), data.labels, data.num_classes, data.logits)
    if not len(data):
        raise InputError("There is no labelled row.")
    bad = int((~data.features.isfinite().all(1)).sum())
    if bad:
        raise InputError(
            f"{bad} rows of features hold NaN or Inf. Leave them out, or mend the model."
        )
    return data


def min_max(pool: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Components of every candidate scaled to [0, 1] over the pool.

    NaN where all are equal to rounding. A candidate whose component is NaN does not touch the
    others.

    Raises:
        InputError: fewer than two candidates.
    """
    if len(pool) < 2:
        raise InputError(
            f"A pool-level score compares candidates: at least two, got {len(pool)}. Its raw "
            "components are those of score.components(data)."
        )
    scaled: dict[str, dict[str, Tensor]] = {name: {} for name in pool}
    for c in next(iter(pool.values())):
        known = [float(parts[c]) for parts in pool.values() if not bool(parts[c].isnan())]
        low, high = (min(known), max(known)) if known else (0.0, 0.0)
        flat = not high - low > 1e-12 * max(abs(low), abs(high))
        for name, parts in pool.items():
            scaled[name][c] = parts[c] * torch.nan if flat else (parts[c] - low) / (high - low)
    return scaled
