"""A fitted scorer, with its threshold, as an outlier detector of scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, OutlierMixin

from ncmethods._core import InputError
from ncmethods.ood._scorer import Scorer
from ncmethods.ood.calibration import Threshold

__all__ = ["OutlierDetector"]


class OutlierDetector(OutlierMixin, BaseEstimator):  # type: ignore[misc]
    """scikit-learn's conventions for scores of features [N, D]: higher = more normal.

    ``score_samples`` is the negative score, ``decision_function`` that less ``offset_``, so that
    what is flagged is negative, and ``predict`` gives −1 for outliers and +1 for the rest. Fitting
    is ours: ``fit`` does nothing.

    Args:
        scorer: fitted; one that needs logits was fitted with a head.
        threshold: a fitted, unconditional :class:`ncmethods.ood.Threshold`; without one there is
            no decision, only ``score_samples``.
    """

    def __init__(self, scorer: Scorer, threshold: Threshold | None = None) -> None:
        self.scorer, self.threshold = scorer, threshold

    def fit(self, X: Any = None, y: Any = None) -> OutlierDetector:
        """Nothing: the scorer is fitted."""
        return self

    def __sklearn_is_fitted__(self) -> bool:
        return True

    @property
    def offset_(self) -> float:
        """The smallest ``score_samples`` that passes as normal.

        Raises:
            InputError: no threshold, or one for each class.
        """
        if self.threshold is None:
            raise InputError("There is no decision without a threshold: pass Threshold.fit(…).")
        if self.threshold.value.numel() != 1:
            raise InputError("scikit-learn has one offset: pass a threshold for all classes alike.")
        return -float(self.threshold.value)

    @torch.no_grad()
    def score_samples(self, X: Any) -> NDArray[Any]:
        """Negative scores [N] of features [N, D]."""
        features = torch.as_tensor(np.asarray(X))
        scores: NDArray[Any] = self.scorer.confidence(features).double().cpu().numpy()
        return scores

    def decision_function(self, X: Any) -> NDArray[Any]:
        """``score_samples`` less ``offset_`` [N]: negative = outlier."""
        return self.score_samples(X) - self.offset_

    def predict(self, X: Any) -> NDArray[Any]:
        """−1 for outliers and +1 for the rest [N]; rows without a score are outliers."""
        return np.where(self.decision_function(X) >= 0, 1, -1)
