"""Standard errors of any measure: the delete-a-group jackknife."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ncmethods._core import InputError
from ncmethods.features import FeatureSet
from ncmethods.stats import ClassStats, nth_of_class

__all__ = ["Jackknife", "jackknife"]


class Jackknife(NamedTuple):
    """A measure with its standard error; floats."""

    value: float
    """Of all samples."""
    debiased: float
    """Without the part of the bias that falls like 1/n."""
    se: float
    """Standard error of both."""
    groups: int
    """G, into which the samples were dealt."""

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Student's interval about ``debiased`` with G − 1 degrees of freedom.

        Raises:
            InputError: a level outside (0, 1).
        """
        from scipy.stats import t

        if not 0 < level < 1:
            raise InputError(f"level must lie between 0 and 1, got {level}.")
        half = float(t.ppf(0.5 + level / 2, self.groups - 1)) * self.se
        return self.debiased - half, self.debiased + half


def jackknife(
    measure: Callable[..., Tensor | float],
    data: ClassStats | FeatureSet,
    *,
    groups: int = 20,
) -> Jackknife:
    """Standard error and bias of a measure, by leaving out one of G groups of samples at a time.

    With θ_g the measure without group g: se² = (G−1)/G · Σ (θ_g − θ̄)², and the debiased value is
    G θ − (G−1) θ̄. Groups are dealt class by class. Samples must be independent: neither frames of
    one video nor patches of one image. A measure that sits at its bound (an absolute value that is
    truly 0) has no normal error, and its interval does not cover.

    Args:
        measure: of a ClassStats or a FeatureSet, such as ``metrics.cdnv``; other arguments bound
            with ``functools.partial``.
        data: a ClassStats with ``groups=G``, or samples.
        groups: G, for samples.

    Raises:
        InputError: a ClassStats without groups.

    References:
        Efron, Tibshirani 1993, "An introduction to the bootstrap", chapter 11.
    """
    left = replicates(lambda part: {"": measure(part)}, data, groups)
    return estimate(float(measure(data)), left[""])


def estimate(value: float, left: Tensor) -> Jackknife:
    """From the measure of all samples, and those without each group [G]."""
    G, mean = len(left), left.mean()
    se = ((G - 1) / G * (left - mean).square().sum()).sqrt()
    return Jackknife(value, G * value - (G - 1) * float(mean), float(se), G)


def replicates(
    measures: Callable[..., Mapping[str, Tensor | float]],
    data: ClassStats | FeatureSet,
    groups: int = 20,
) -> dict[str, Tensor]:
    """Measures without each group [G], by key; NaN where one cannot be had."""
    rest = [measures(part) for part in _without(data, groups)]
    nan = float("nan")
    return {
        key: torch.tensor([float(one.get(key, nan)) for one in rest], dtype=torch.float64)
        for key in {key: None for one in rest for key in one}
    }


def _without(data: ClassStats | FeatureSet, groups: int) -> Iterator[ClassStats | FeatureSet]:
    if isinstance(data, ClassStats):
        if not data.groups:
            raise InputError(
                "This ClassStats keeps no groups: standard errors need ClassStats(..., groups=20) "
                "from the first update on."
            )
        yield from (data - part for part in data.parts)
        return
    if isinstance(groups, bool) or not isinstance(groups, int) or not 2 <= groups <= len(data):
        raise InputError(
            f"groups must be an integer from 2 to N = {len(data)} samples, got {groups!r}."
        )
    y = data.labels if data.labels is not None else torch.zeros(len(data), dtype=torch.int64)
    turn = (nth_of_class(y) + y) % groups
    for g in range(groups):
        keep = (turn != g).to(data.features.device)
        yield FeatureSet(
            data.features[keep],
            None if data.labels is None else data.labels[keep],
            data.num_classes,
            None if data.logits is None else data.logits[keep],
        )
