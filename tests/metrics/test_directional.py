"""Directional CDNV against closed forms, a naive loop and the authors' code."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ncmethods._core import InputError
from ncmethods.features import FeatureSet
from ncmethods.frames import simplex_etf
from ncmethods.metrics import _tiles, directional
from ncmethods.metrics.directional import directional_cdnv
from ncmethods.metrics.nc1 import cdnv
from ncmethods.stats import ClassStats

f64 = torch.float64


def etf(K, D):
    return simplex_etf(K, D, dtype=f64, generator=torch.Generator().manual_seed(K))


def cloud(K=5, D=7, N=90, seed=0, offset=0.0):
    """Anisotropic classes of unequal size."""
    g = torch.Generator().manual_seed(seed)
    y = (torch.rand(N, generator=g).square() * K).long()
    mix = torch.randn(D, D, generator=g, dtype=f64)
    means = 3 * torch.randn(K, D, generator=g, dtype=f64)
    return offset + means[y] + torch.randn(N, D, generator=g, dtype=f64) @ mix, y


def naive(X, y):
    """The definition, with a covariance per class and a loop over pairs."""
    X, y = X.double().numpy(), y.numpy()
    classes = [c for c in np.unique(y) if c >= 0]
    mean = {c: X[y == c].mean(0) for c in classes}
    cov = {c: np.cov(X[y == c].T, bias=True) if (y == c).sum() > 1 else 0 for c in classes}
    values = []
    for i in classes:
        for j in classes:
            if i != j:
                d = mean[i] - mean[j]
                u = d / np.linalg.norm(d)
                spread = u @ (cov[i] + cov[j]) @ u if np.ndim(cov[i] + cov[j]) else 0.0
                values.append(spread / (2 * d @ d))
    return float(np.mean(values))


def value(X, y, K=5, **more):
    return float(directional_cdnv(FeatureSet(X, y, K), **more))


@pytest.mark.parametrize(("K", "D", "r", "sigma"), [(5, 64, 1.0, 0.5), (2, 3, 4.0, 2.0)])
def test_isotropic_classes_give_cdnv_over_dim(K, D, r, sigma):
    means = r * etf(K, D)
    step = sigma * math.sqrt(D) * torch.eye(D, dtype=f64)
    X = (means[:, None] + torch.cat([step, -step])).reshape(-1, D)
    y = torch.arange(K).repeat_interleave(2 * D)
    data = FeatureSet(X, y, K)
    found = float(directional_cdnv(data))
    assert found == pytest.approx(sigma**2 * (K - 1) / (2 * K * r**2), rel=1e-12)
    assert found == pytest.approx(float(cdnv(data.stats)) / D, rel=1e-12)


def test_two_classes_in_the_plane():
    """Means (0, 0) and (4, 0); variance across the line does not count, along it does."""
    a = torch.tensor([[1.0, 30.0], [-1.0, -30.0], [1.0, -30.0], [-1.0, 30.0]])
    b = torch.tensor([[4.0, 5.0], [4.0, -5.0], [6.0, 0.0], [2.0, 0.0]])
    data = FeatureSet(torch.cat([a, b]), torch.tensor([0] * 4 + [1] * 4), 2)
    assert float(directional_cdnv(data)) == pytest.approx((1 + 2) / (2 * 16), rel=1e-12)
    assert float(cdnv(data.stats)) == pytest.approx((901 + 14.5) / (2 * 16), rel=1e-6)


def test_matches_the_definition_and_stays_below_cdnv():
    for seed in range(4):
        X, y = cloud(seed=seed)
        found = value(X, y)
        assert found == pytest.approx(naive(X, y), rel=1e-11)
        assert found < float(cdnv(FeatureSet(X, y, 5).stats))


def test_equals_cdnv_on_a_line():
    X, y = cloud(D=1)
    data = FeatureSet(X, y, 5)
    assert float(directional_cdnv(data)) == pytest.approx(float(cdnv(data.stats)), rel=1e-11)
    plane = torch.cat([X, torch.zeros_like(X)], 1)  # and so it does inside a plane
    assert value(plane, y) == pytest.approx(float(cdnv(data.stats)), rel=1e-11)


def test_matches_the_authors_code():
    """``GeometricEvaluator.compute_directional_cdnv``, run once on these points.

    github.com/DLFundamentals/directional_cdnv_bounds/blob/947f1410e12034a5a6097bf2884040110cc1b8c7/eval_utils/geometry.py
    """
    K, D, N = 4, 6, 60
    i = torch.arange(N)
    y = 7 * i % K
    columns = [
        torch.sin(0.7 * i.double() * (d + 1)) + (d + 1) * torch.cos(1.3 * y.double() * (d + 2))
        for d in range(D)
    ]
    keep = ~((y == 3) & (i > 10))  # a long tail
    X, y = torch.stack(columns, 1)[keep], y[keep]
    assert value(X, y, K) == pytest.approx(0.005327706992846042, rel=1e-10)


@pytest.mark.parametrize(("tile", "chunk"), [(2, 7), (3, 2048), (2048, 50)])
def test_tiles_and_order_of_samples_do_not_matter(monkeypatch, tile, chunk):
    X, y = cloud(K=5, N=300)
    whole = value(X, y)
    monkeypatch.setattr(_tiles, "TILE", tile)
    monkeypatch.setattr(directional, "_CHUNK", chunk)
    assert value(X, y) == pytest.approx(whole, rel=1e-12)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    assert value(X[order], y[order]) == pytest.approx(whole, rel=1e-12)


def test_invariances():
    X, y = cloud()
    whole = value(X, y)
    Q = torch.linalg.qr(torch.randn(7, 7, dtype=f64, generator=torch.Generator().manual_seed(3)))[0]
    assert value(5 * X @ Q + 20, y) == pytest.approx(whole, rel=1e-9)
    assert value(X, (y + 1) % 5) == pytest.approx(whole, rel=1e-12)
    squeezed = X @ torch.diag(torch.tensor([1, 1, 1, 1, 1, 1, 0.1], dtype=f64))
    assert value(squeezed, y) != pytest.approx(whole, rel=1e-3)


def test_float32_far_from_the_origin():
    X, y = cloud()
    near = value(X.float(), y)
    assert near == pytest.approx(value(X, y), rel=1e-5)
    far = (X + 1000).float()
    assert value(far, y) == pytest.approx(naive(far, y), rel=1e-5)
    assert value(X.half(), y) == pytest.approx(value(X, y), rel=1e-2)


def test_collapse_at_an_offset_is_tiny_and_not_negative():
    means = 3 * etf(6, 8) + 1000
    y = torch.arange(6).repeat(10)
    assert 0 <= value(means[y], y, 6) < 1e-24
    step = 1e-6 * torch.eye(8, dtype=f64)
    X = (means[:, None] + torch.cat([step, -step])).reshape(-1, 8)
    expected = (1e-12 / 8) * 5 / (2 * 6 * 9)
    assert value(X, torch.arange(6).repeat_interleave(16), 6) == pytest.approx(expected, rel=1e-5)


@pytest.mark.filterwarnings("ignore:No class has two samples")
def test_ignored_labels_empty_classes_and_single_samples():
    X, y = cloud()
    whole = value(X, y)
    more = torch.cat([X, torch.full((3, 7), 50.0, dtype=f64)])
    assert value(more, torch.cat([y, torch.tensor([-1, -100, -1])])) == whole
    assert value(X, y, K=9) == pytest.approx(whole, rel=1e-13)
    assert value(X, y + 3, K=9) == pytest.approx(whole, rel=1e-13)
    single = torch.cat([X, X.new_full((1, 7), 4.0)])
    labels = torch.cat([y, torch.tensor([5])])
    assert value(single, labels, 6) == pytest.approx(naive(single, labels), rel=1e-11)
    assert math.isnan(value(X[:2], torch.tensor([0, 1])))  # nothing is known of variances
    assert math.isnan(float(cdnv(FeatureSet(X[:2], torch.tensor([0, 1]), 5).stats)))


def test_means_of_another_statistic():
    X, y = cloud()
    own = ClassStats(5, 7, scatter=False).update(X, y)
    assert value(X, y, stats=own) == value(X, y)
    train = ClassStats(5, 7).update(*cloud(seed=1, N=400))
    m = train.means
    expected = np.mean(
        [
            float(((X[y == i] - m[i]) @ (m[j] - m[i])).square().mean())
            / float((m[j] - m[i]).square().sum()) ** 2
            for i in range(5)
            for j in range(5)
            if i != j
        ]
    )
    assert value(X, y, stats=train) == pytest.approx(expected, rel=1e-11)
    # A single test sample tells something about the training means, nothing about its own.
    assert value(X[:2], torch.tensor([0, 1]), stats=train) > 0
    # Classes that the statistic lacks are left out, such as those below a minimum count.
    few = torch.cat([X, X[:1] + 9]), torch.cat([y + 1, y.new_zeros(1)])
    tail = ClassStats(6, 7, scatter=False).update(*few)
    assert tail.counts[0] == 1
    assert value(*few, 6, stats=tail.at_least(2)) == pytest.approx(value(X, y), rel=1e-12)
    assert value(*few, 6) != pytest.approx(value(X, y), rel=1e-3)


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returns."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.size = max(self.size, out.numel())
        return out


def test_thousands_of_classes_without_a_square_matrix(monkeypatch):
    K, D = 3000, 8
    g = torch.Generator().manual_seed(0)
    y = torch.arange(2 * K) % K
    means = torch.randn(K, D, generator=g, dtype=f64)
    X = means[y] + 0.1 * torch.randn(2 * K, D, generator=g, dtype=f64)
    monkeypatch.setattr(_tiles, "TILE", 500)
    monkeypatch.setattr(directional, "_CHUNK", 500)
    with Largest() as largest:
        found = value(X, y, K)
    assert largest.size <= max(2 * K * D, 500**2) < K * K / 10
    M = (X[:K] + X[K:]) / 2
    r = (X[:K] - X[K:]) / 2  # both samples of a class lie at ± r
    expected = 0.0
    for i in range(K):
        d = M - M[i]
        square = d.square().sum(1)
        square[i] = torch.inf
        expected += float(((d @ r[i]) / square).square().sum())
    assert found == pytest.approx(expected / (K * (K - 1)), rel=1e-9)


def test_coinciding_means_have_no_direction():
    X = torch.tensor([[0.0, 1.0], [0.0, -1.0], [1.0, 0.0], [-1.0, 0.0], [5.0, 5.0]])
    assert math.isnan(value(X, torch.tensor([0, 0, 1, 1, 2])))
    for seed in range(4):  # the projections may round to 0 or not: 0/0 and x/0
        rows = torch.randn(3, 301, dtype=f64, generator=torch.Generator().manual_seed(seed))
        X = torch.cat([rows, rows, rows.roll(7, 1)])
        assert math.isnan(value(X, torch.arange(3).repeat_interleave(3), 3))


def test_bad_input():
    X, y = cloud()
    with pytest.raises(InputError, match="needs labels"):
        directional_cdnv(FeatureSet(X, None, 5))
    with pytest.raises(InputError, match="at least two"):
        value(X, torch.zeros_like(y))
    with pytest.raises(InputError, match="at least two"):
        value(X, -torch.ones_like(y))
    with pytest.raises(InputError, match="at least two"):
        value(X[:0], y[:0])
    with pytest.raises(InputError, match="num_classes"):
        value(X, y + 1)
    with pytest.raises(InputError, match="K = 5"):
        value(X, y, stats=ClassStats(4, 7))
    with pytest.raises(InputError, match="got 1"):
        value(X, y, stats=ClassStats(5, 7).update(X[y == 4], y[y == 4]))
    broken = X.clone()
    broken[4, 2] = torch.nan
    for stats in (None, ClassStats(5, 7).update(X, y)):
        with pytest.raises(InputError, match="NaN"):
            value(broken, y, stats=stats)
