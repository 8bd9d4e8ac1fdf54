"""Means of the classes of one batch, with their gradient, and without knowing K."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ncmethods._core import check_features, check_labels


@dataclass(frozen=True)
class ClassMeans:
    """The classes of a batch.

    There are never more classes than samples, so they are numbered 0 … N − 1 in the order of their
    labels: nothing needs K, and nothing waits for the device.
    """

    features: Tensor  # [N, D], zero where the label is negative
    known: Tensor  # bool [N]
    index: Tensor  # int64 [N], number of the sample's class
    counts: Tensor  # [N] samples of each class; most are 0
    means: Tensor  # [N, D]; zero where a class has no samples

    @property
    def present(self) -> Tensor:
        """Which numbers are classes, bool [N]."""
        return self.counts > 0

    @property
    def classes(self) -> Tensor:
        """U, how many classes the batch holds, []."""
        return self.present.sum()

    def spread(self) -> Tensor:
        """Mean squared distance ‖h − m_c‖² from the class mean, per class [N]."""
        gap = (self.features - self.means[self.index]).square().sum(1) * self.known
        return _sums(gap, self.index) / self.counts.clamp(min=1)

    def centred(self) -> Tensor:
        """m_c − m̄ [N, D], m̄ the mean over the classes; zero where a class has no samples."""
        centre = self.means.sum(0) / self.classes.clamp(min=1)
        return torch.where(self.present[:, None], self.means - centre, 0.0)

    def average(self, each: Tensor) -> Tensor:
        """Mean over the classes of ``each`` [N], []; 0 without any."""
        value: Tensor = torch.where(self.present, each, 0.0).sum() / self.classes.clamp(min=1)
        return value


def class_means(features: Tensor, labels: Tensor) -> ClassMeans:
    """Counts and means of the classes of a batch.

    Args:
        features: floating [N, D]; at least float32 after this.
        labels: int64 [N]; samples with a negative label are left out, whatever they hold.

    Raises:
        InputError: shapes that do not fit.
    """
    h = check_features(features)
    y = check_labels(labels, len(h))
    known = y >= 0
    h = torch.where(known[:, None], h, 0.0)
    in_order, order = y.sort()
    step = (in_order[1:] != in_order[:-1]).long()
    number = torch.cat([step.new_zeros(min(len(y), 1)), step.cumsum(0)])
    index = torch.empty_like(y).scatter(0, order, number)
    counts = _sums(known.to(h.dtype), index)
    means = _sums(h, index) / counts.clamp(min=1)[:, None]
    return ClassMeans(h, known, index, counts, means)


def _sums(values: Tensor, index: Tensor) -> Tensor:
    """Sum of the ``values`` [N, …] of each class."""
    return torch.zeros_like(values).index_add(0, index, values)


def known_rows(features: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Features with zeros where the label is negative, and which labels are not; bool [N].

    Raises:
        InputError: shapes that do not fit.
    """
    h = check_features(features)
    if labels is None:
        return h, torch.ones(len(h), dtype=torch.bool, device=h.device)
    known = check_labels(labels, len(h)) >= 0
    return torch.where(known[:, None], h, 0.0), known


def mean_of(each: Tensor, known: Tensor) -> Tensor:
    """Mean of ``each`` [N] over the known samples, []; 0 without any."""
    value: Tensor = (each * known).sum() / known.sum().clamp(min=1)
    return value
