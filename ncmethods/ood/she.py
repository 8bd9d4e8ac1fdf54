"""SHE: the inner product with the mean of the correctly classified features of a class."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ncmethods._core import InputError, check_logits
from ncmethods.ood._scorer import Scorer, Train, samples, train_logits
from ncmethods.stats import ClassStats

__all__ = ["SHE"]


class SHE(Scorer):
    """−h · S_ŷ, S_c the mean of the training features of class c that are classified correctly.

    ŷ is the predicted class among those that have such features (with rare classes some have none).
    The zero vector scores 0.

    Fitted from samples with labels and logits, or ``head``. ``fit(train, head=None)``.

    Raises:
        InputError: moments only, no labels, no logits, or no sample that is classified correctly.

    References:
        Zhang et al., ICLR 2023, openreview.net/forum?id=KkazG4lgKL.
    """

    needs: ClassVar = frozenset({"features", "logits"})
    patterns: Tensor  # [K, D], 0 where a class has none
    known: Tensor  # bool [K], which classes have one

    @classmethod
    def fit(cls, train: Train, head: nn.Module | None = None) -> SHE:
        """The scorer fitted on ``train``."""
        data = samples(train, cls.__name__)
        if data.labels is None:
            raise InputError("SHE needs labels, to know which samples are classified correctly.")
        guess = check_logits(train_logits(data, head, cls.__name__), data.num_classes).argmax(1)
        right = torch.where(guess == data.labels, data.labels, -1)
        stats = ClassStats(data.num_classes, data.dim, scatter=False).update(data.features, right)
        if not stats.N:
            raise InputError(
                f"SHE found none of {len(data)} training samples classified correctly. Are labels "
                "and logits those of one label set, in one order?"
            )
        return cls(head, patterns=stats.means.nan_to_num(0.0), known=stats.active)

    def sizes(self) -> tuple[int | None, int | None]:
        """D and K of the patterns."""
        K, D = self.patterns.shape
        return D, K

    def score(self, features: Tensor, logits: Tensor) -> Tensor:
        """Negative inner products [N]."""
        guess = logits.masked_fill(~self.known, -torch.inf).argmax(1)
        return -(features * self.patterns.to(features.dtype)[guess]).sum(1)
