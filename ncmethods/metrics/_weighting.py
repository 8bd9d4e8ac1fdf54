"""How classes are weighted in Σ_W, μ_G and Σ_B: by name, as published code does it."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from ncmethods._core import InputError, check_choice
from ncmethods.stats import ClassStats

__all__ = ["WEIGHTINGS", "Weighting"]


class Weighting(NamedTuple):
    """Weights of the classes, each ``"class"`` (alike) or ``"sample"`` (by count).

    ``within`` of their covariances in Σ_W (None: as accumulated), ``center`` of their means in μ_G,
    ``between`` of their centred means in Σ_B; ``per_class``: whether NC1 is divided by K.
    """

    within: str | None
    center: str
    between: str
    per_class: bool = True

    def __str__(self) -> str:
        """For provenance."""
        center = "" if self.center == self.between else f" about the {self.center} mean"
        return f"{self.between}-weighted Σ_B{center}" + ("" if self.per_class else ", not / K")

    def rows(self, stats: ClassStats) -> Tensor:
        """Rows R [K_active, D] with RᵀR = Σ_B: centred means times the roots of their shares.

        Raises:
            InputError: fewer than two classes have samples.
        """
        shares = stats.class_shares(self.between)
        active = shares > 0
        if int(active.sum()) < 2:
            raise InputError(
                f"Neural collapse compares classes: at least two need samples, got {active.sum()}."
            )
        return centred(stats, self.center)[active] * shares[active, None].sqrt()

    def sigma_w(self, stats: ClassStats) -> Tensor:
        """Σ_W [D, D].

        Raises:
            InputError: the scatter was accumulated with another weighting of unequal classes.
        """
        ratio = accumulated(stats) / self.weight(stats)
        if len(ratio) and bool((ratio - ratio[0]).abs().max() > 1e-6 * ratio[0].abs()):
            remedy = "1 / counts" if self.within == "class" else "None"
            raise InputError(
                f"This weighting needs a Σ_W averaged by {self.within}, and a pooled scatter "
                f"cannot be re-weighted. Accumulate ClassStats(class_weight={remedy})."
            )
        return stats.sigma_w if _told(stats) else torch.full_like(stats.within, torch.nan)

    def weight(self, stats: ClassStats) -> Tensor:
        """Weights [K_active] that multiply the scatter and the counts of the classes in Σ_W."""
        if self.within is None:
            return accumulated(stats)
        counts = stats.counts[stats.active].double()
        return torch.ones_like(counts) if self.within == "sample" else 1 / counts

    def trace_w(self, stats: ClassStats) -> Tensor:
        """Tr Σ_W, []: of any weighting, since traces are kept by class."""
        weight = self.weight(stats)
        if not _told(stats):
            return weight.new_tensor(torch.nan)
        return weight @ stats.trace[stats.active] / (weight @ stats.counts[stats.active].double())


def accumulated(stats: ClassStats) -> Tensor:
    """Weights [K_active] with which the scatter was accumulated."""
    weight = stats.class_weight
    return (torch.ones_like(stats.trace) if weight is None else weight)[stats.active]


def size(stats: ClassStats) -> float:
    """What the rounding of class means is relative to: the largest entry, or the spread."""
    spread = (stats.trace.sum() / stats.counts.sum()).sqrt()
    return max(float(stats.means.nan_to_num().abs().max()), float(spread))


def centred(stats: ClassStats, center: str = "class") -> Tensor:
    """``stats.centered_means``, zero where all class means agree up to rounding, [K, D]."""
    M = stats.centered_means(center)
    floor = max(M.shape) * torch.finfo(M.dtype).eps * size(stats)
    return M * 0 if float(M.nan_to_num().abs().max()) <= floor else M


def _told(stats: ClassStats) -> bool:
    """Whether any class has two samples; warns if not."""
    told = stats.K_active < stats.N
    if not told and stats.K_active > 1:
        warnings.warn(
            "No class has two samples: nothing is known of variances, and NC1 is NaN.",
            stacklevel=4,
        )
    return told


def variances(stats: ClassStats) -> Tensor:
    """Mean squared distance to the class mean [K]; NaN if no class has two samples."""
    v = stats.trace / stats.counts
    return v if _told(stats) else torch.full_like(v, torch.nan)


# Sources, with lines of code: docs/metrics/who-computes-what.md.
WEIGHTINGS = {
    "class": Weighting(None, "class", "class"),
    "sample": Weighting(None, "sample", "sample"),
    "papyan": Weighting("sample", "class", "class"),
    "papyan-demo": Weighting("sample", "class", "class", per_class=False),
    "zhu": Weighting("sample", "sample", "class"),
    "galanti": Weighting("class", "class", "class"),
    "he-su": Weighting("sample", "sample", "sample", per_class=False),
}


def weighting_of(name: str) -> Weighting:
    """The weighting of a name."""
    return WEIGHTINGS[check_choice(name, WEIGHTINGS, "weighting")]
