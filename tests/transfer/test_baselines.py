"""Baselines against scikit-learn, one sample left out at a time."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid

from ncmethods._core import InputError
from ncmethods.features import FeatureSet
from ncmethods.transfer.baselines import knn, linear_probe, nearest_centre


def sample(n=70, d=9, k=4, seed=0, offset=0.0):
    rng = torch.Generator().manual_seed(seed)
    y = torch.randint(k, (n,), generator=rng)
    x = 1.2 * torch.randn(k, d, generator=rng, dtype=torch.float64)[y] + offset
    return FeatureSet(x + torch.randn(n, d, generator=rng, dtype=torch.float64), y, k)


def left_out(model, data, target=None):
    y = data.labels.numpy()
    found = cross_val_predict(
        model, data.features.numpy(), y if target is None else target, cv=LeaveOneOut()
    )
    return ((found if found.ndim == 1 else found.argmax(1)) == y).mean()


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_nearest_centre(seed, offset):
    data = sample(seed=seed, offset=offset)
    assert float(nearest_centre(data)) == pytest.approx(left_out(NearestCentroid(), data))


@pytest.mark.parametrize("k", [1, 5])
def test_knn(k):
    data = sample(n=120)
    theirs = left_out(KNeighborsClassifier(k, metric="cosine"), data)
    assert float(knn(data, k=k)) == pytest.approx(theirs, abs=0.0 if k == 1 else 0.02)  # ties


@pytest.mark.parametrize("d", [9, 90])  # also with more features than samples
@pytest.mark.parametrize("ridge", [1e-4, 1e-1, 10.0])
def test_linear_probe(d, ridge):
    data = sample(d=d, offset=5.0)
    size = len(data) * data.features.numpy().var(0).mean()
    target = np.eye(4)[data.labels.numpy()]
    # With the others' mean as intercept; the penalty stays.
    theirs = left_out(Ridge(alpha=ridge * size), data, target)
    assert float(linear_probe(data, ridges=(ridge,))) == pytest.approx(theirs)
    best = max(float(linear_probe(data, ridges=(r,))) for r in (ridge, 1.0))
    assert float(linear_probe(data, ridges=(ridge, 1.0))) == best


def test_a_class_of_one_collapse_and_gaps():
    x = torch.cat([torch.eye(3).repeat(5, 1), torch.full((1, 3), 9.0)])
    y = torch.cat([(torch.arange(15) % 3) * 2, torch.tensor([5])])
    data = FeatureSet(x, y, 6)
    assert float(nearest_centre(data)) == pytest.approx(15 / 16)  # whoever is alone is an error
    assert float(knn(data, k=3)) == pytest.approx(15 / 16)
    assert 0 <= float(linear_probe(data)) <= 1
    same = FeatureSet(torch.ones(20, 3), torch.arange(20) % 2, 2)
    for score in (nearest_centre, knn, linear_probe):
        assert 0 <= float(score(same)) <= 1


def test_errors():
    data = sample()
    for k in (0, 70):
        with pytest.raises(InputError, match="k must lie between"):
            knn(data, k=k)
    for ridges in ((), (0.0,)):
        with pytest.raises(InputError, match="ridges must be positive"):
            linear_probe(data, ridges=ridges)
    with pytest.raises(InputError, match="NaN or Inf"):
        knn(FeatureSet(data.features * torch.nan, data.labels, 4))
    with pytest.raises(InputError, match="needs samples"):
        knn(data.stats)
