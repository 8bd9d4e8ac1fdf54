"""ETran's parts against numpy, scikit-learn, and the authors' code run once."""

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from ncmethods._core import InputError
from ncmethods.features import FeatureSet
from ncmethods.transfer.etran import energy, etran, nearest_mean_probability


def sample(seed=0, spread=1.0, n=150, d=12, k=3):
    rng = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % k
    x = torch.randn(k, d, generator=rng)[y] + spread * torch.randn(n, d, generator=rng)
    return FeatureSet(x.double(), y, k)


def test_energy_is_the_mean_log_sum_exp_of_the_lowest():
    z = torch.randn(1000, 6, dtype=torch.float64)
    values = np.sort(logsumexp(z.numpy(), 1))
    assert float(energy(z)) == pytest.approx(values.mean(), rel=1e-12)
    assert float(energy(z, tail=0.005)) == pytest.approx(values[:5].mean(), rel=1e-12)
    assert float(energy(z + 3)) == pytest.approx(values.mean() + 3, rel=1e-12)
    assert float(energy(z[:7], tail=0.005)) == float(energy(z[:7], tail=0.1))  # one sample at least
    for tail in (0, 1.5):
        with pytest.raises(InputError, match="tail"):
            energy(z, tail=tail)
    with pytest.raises(InputError, match=r"\[N, Z\]"):
        energy(z[0])


def test_the_classifier_is_that_of_the_authors():
    """LDA_Score of mgholamikn/ETran@d4551ed (metrics.py), run once on this sample: 0.959776."""
    torch.manual_seed(0)
    y = torch.arange(150) % 3
    x = torch.randn(3, 12)[y] + torch.randn(150, 12)
    value = float(nearest_mean_probability(FeatureSet(x, y, 3)))
    assert value == pytest.approx(0.9597760959854453, rel=1e-6)


def test_it_is_a_softmax_over_distances():
    data = sample(spread=2.0)
    X, y = data.features.numpy(), data.labels.numpy()
    means = np.stack([X[y == c].mean(0) for c in range(3)])
    z = -0.5 * ((X[:, None] - means) ** 2).sum(2)
    p = np.exp(z - logsumexp(z, 1, keepdims=True))
    want = p[np.arange(150), y].mean()
    assert float(nearest_mean_probability(data)) == pytest.approx(want, rel=1e-9)
    gap = FeatureSet(data.features, 2 * data.labels, 6)
    assert float(nearest_mean_probability(gap)) == pytest.approx(want, rel=1e-9)
    same = FeatureSet(torch.ones(30, 4), torch.arange(30) % 3, 3)
    assert float(nearest_mean_probability(same)) == pytest.approx(1 / 3)


def test_the_pool_scales_each_component():
    pool = {"a": sample(0), "b": sample(1, 3.0), "c": sample(2, 0.1)}
    parts = {name: etran.components(data) for name, data in pool.items()}
    columns = {c: np.array([float(parts[n][c]) for n in pool]) for c in ("energy", "lda")}
    e, p = ((v - v.min()) / (v.max() - v.min()) for v in columns.values())
    values = etran(pool)
    np.testing.assert_allclose([float(values[n]) for n in pool], 0.15 * e + 0.85 * p, rtol=1e-9)
    with pytest.raises(InputError, match="at least two, got 1"):
        etran({"a": pool["a"]})
    assert all(np.isnan(float(v)) for v in etran({"a": pool["a"], "b": pool["a"]}).values())
