"""A scorer among scikit-learn's outlier detectors: the same conventions as theirs."""

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.covariance import EmpiricalCovariance
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from ncmethods import ood
from ncmethods._core import InputError
from ncmethods.features import FeatureSet
from ncmethods.integrations.sklearn import OutlierDetector

rng = np.random.default_rng(0)
FIT, HELD, FAR = (rng.normal(size=(n, 4)) + shift for n, shift in ((300, 0), (99, 0), (50, 2.5)))
TRAIN = FeatureSet(torch.tensor(FIT), torch.zeros(len(FIT), dtype=torch.long), 2)
SCORER = ood.Mahalanobis.fit(TRAIN)
THRESHOLD = ood.Threshold.fit(SCORER(torch.tensor(HELD)), alpha=0.05)


def test_signs_and_shapes_are_those_of_scikit_learn():
    ours = OutlierDetector(SCORER, THRESHOLD).fit(FIT)
    distance = EmpiricalCovariance().fit(FIT).mahalanobis(FAR)
    np.testing.assert_allclose(ours.score_samples(FAR), -distance, rtol=1e-6)
    np.testing.assert_allclose(
        ours.decision_function(FAR), ours.score_samples(FAR) - ours.offset_, rtol=0
    )
    assert set(ours.predict(FAR)) <= {-1, 1}
    np.testing.assert_array_equal(ours.predict(FAR) == -1, ours.decision_function(FAR) < 0)
    normal = np.r_[np.ones(len(HELD)), np.zeros(len(FAR))]
    both = np.r_[HELD, FAR]
    area = ood.auroc(SCORER(torch.tensor(HELD)), SCORER(torch.tensor(FAR)))
    assert roc_auc_score(normal, ours.decision_function(both)) == pytest.approx(float(area))


def test_it_flags_what_the_threshold_flags():
    scores = SCORER(torch.tensor(np.r_[HELD, FAR]))
    found = OutlierDetector(SCORER, THRESHOLD).predict(np.r_[HELD, FAR])
    np.testing.assert_array_equal(found == -1, THRESHOLD(scores).numpy())
    assert (found[: len(HELD)] == -1).sum() == 4  # ⌊0.05 · 100⌋ − 1 of the calibration scores
    assert OutlierDetector(SCORER, THRESHOLD).predict([[np.nan] * 4]) == [-1]


def test_in_a_pipeline_and_cloned():
    pipeline = make_pipeline(FunctionTransformer(), OutlierDetector(SCORER, THRESHOLD))
    np.testing.assert_array_equal(
        clone(pipeline).fit(FIT).predict(FAR), OutlierDetector(SCORER, THRESHOLD).predict(FAR)
    )


def test_no_decision_without_one_threshold():
    with pytest.raises(InputError, match="no decision without a threshold"):
        OutlierDetector(SCORER).predict(FAR)
    assert OutlierDetector(SCORER).score_samples(FAR).shape == (50,)
    by_class = ood.Threshold.fit(
        SCORER(torch.tensor(HELD)), alpha=0.05, groups=torch.arange(99) % 2
    )
    with pytest.raises(InputError, match="one offset"):
        OutlierDetector(SCORER, by_class).predict(FAR)
