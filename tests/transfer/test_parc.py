"""PARC against scipy's rank correlation over all pairs, and against the authors' definition."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from ncmethods._core import InputError
from ncmethods.features import FeatureSet
from ncmethods.transfer.parc import parc


def sample(n=80, d=12, k=3, seed=0):
    rng = torch.Generator().manual_seed(seed)
    y = torch.randint(k, (n,), generator=rng)
    x = 2 * torch.randn(k, d, generator=rng, dtype=torch.float64)[y]
    return FeatureSet(x + torch.randn(n, d, generator=rng, dtype=torch.float64), y, k)


@pytest.mark.parametrize("components", [None, 5])
def test_it_is_spearman_over_all_pairs(components):
    data = sample()
    x = data.features.numpy()
    if components:
        x = PCA(components, svd_solver="full").fit_transform(x)
    pairs = np.triu_indices(len(x), 1)
    far = 1 - np.corrcoef(StandardScaler().fit_transform(x))[pairs]
    # Rounded: corrcoef of one-hot rows gives four values in place of two, which break the ties.
    apart = (1 - np.corrcoef(np.eye(3)[data.labels.numpy()]))[pairs].round(9)
    want = 100 * spearmanr(far, apart).statistic
    assert float(parc(data, components=components)) == pytest.approx(want, rel=1e-9)


def test_limits_and_invariances():
    y = torch.arange(60) % 3
    vertices = torch.eye(3)[y] + 1e-3 * torch.randn(60, 3)
    same = 19 / 59  # of the pairs: √(3p(1 − p)) is the largest rank correlation with two values
    most = 100 * (3 * same * (1 - same)) ** 0.5
    assert float(parc(FeatureSet(vertices, y, 3), components=None)) == pytest.approx(most, abs=0.1)
    data = sample()
    value = float(parc(data, components=8))
    moved = FeatureSet(data.features * 3 + 7, data.labels, 3)
    assert float(parc(moved, components=8)) == pytest.approx(value)
    names = FeatureSet(data.features, 2 - data.labels, 3)
    assert float(parc(names, components=8)) == pytest.approx(value, rel=1e-12)
    one = FeatureSet(data.features, torch.zeros(80).long(), 3)
    assert np.isnan(float(parc(one)))
    assert np.isnan(float(parc(FeatureSet(torch.ones(20, 5), torch.arange(20) % 3, 3))))


def test_errors():
    data = sample()
    with pytest.raises(InputError, match="at least 2 components"):
        parc(data, components=1)
    many = FeatureSet(torch.zeros(20_001, 2), torch.zeros(20_001).long(), 2)
    with pytest.raises(InputError, match="at most 20000"):
        parc(many)
    with pytest.raises(InputError, match="has none"):
        parc(FeatureSet(data.features, None, 3))
