"""H-score: golden values, tllib's values, pseudo-inverses, bounds, invariances, saturation."""

import math

import numpy as np
import pytest
import torch
from sklearn.covariance import LedoitWolf

from ncmethods import metrics
from ncmethods._core import InputError
from ncmethods.features import FeatureSet
from ncmethods.frames import simplex_etf
from ncmethods.stats import ClassStats
from ncmethods.transfer._inputs import saturated
from ncmethods.transfer.h_score import h_score, ledoit_wolf, regularised_h_score

F64 = torch.float64


def blobs(N=300, K=5, D=8, seed=0, balanced=False, spread=1.0, dtype=F64):
    rng = torch.Generator().manual_seed(seed)
    y = torch.arange(N) % K if balanced else (K * torch.rand(N, generator=rng).square()).long()
    mix = torch.randn(D, D, generator=rng, dtype=F64)
    means = torch.randn(K, D, generator=rng, dtype=F64)
    x = means[y] + spread * torch.randn(N, D, generator=rng, dtype=F64) @ mix
    return FeatureSet(x.to(dtype), y, K)


def by_pinv(x, y, alpha=0.0):
    """Tr(Σ_α† Σ_B)(1 − α) in numpy, both over N, by a pseudo-inverse."""
    x = x.double().numpy()
    y = y.numpy()
    g = np.stack([x[y == c].mean(0) for c in y])
    S, B = np.cov(x.T, bias=True), np.cov(g.T, bias=True)
    S = (1 - alpha) * S + alpha * S.trace() / len(S) * np.eye(len(S))
    return (1 - alpha) * float(np.trace(np.linalg.pinv(S, rcond=1e-12, hermitian=True) @ B))


# --- golden values ------------------------------------------------------------------------------


def etf_with_noise(C, D, sigma):
    M = simplex_etf(C, D, dtype=F64)
    arm = math.sqrt(D) * sigma * torch.eye(D, dtype=F64)
    x = torch.cat([m + s * arm for m in M for s in (1, -1)])
    return FeatureSet(x, torch.arange(C).repeat_interleave(2 * D), C)


@pytest.mark.parametrize(("C", "D", "sigma"), [(4, 6, 0.5), (3, 5, 0.1), (10, 12, 2.0)])
def test_golden_etf_with_isotropic_noise(C, D, sigma):
    """Sheet, check 3: VCI = s/(1 + s) with s = σ²(C − 1), H = (C − 1)(1 − VCI)."""
    data = etf_with_noise(C, D, sigma)
    s = sigma**2 * (C - 1)
    assert float(metrics.vci(data.stats)) == pytest.approx(s / (1 + s), rel=1e-10)
    assert float(metrics.nc1_pinv(data.stats)) == pytest.approx(s * (C - 1) / C, rel=1e-10)
    assert float(metrics.cdnv(data.stats)) == pytest.approx(D * s / (2 * C), rel=1e-10)
    assert float(h_score(data.stats)) == pytest.approx((C - 1) / (1 + s), rel=1e-10)
    if C == 4:
        assert float(h_score(data.stats)) == pytest.approx(1.7142857, abs=1e-7)


# thuml/Transfer-Learning-Library, tllib/ranking/hscore.py at c4aa59e, run once on these features:
# https://github.com/thuml/Transfer-Learning-Library/blob/c4aa59eb565650a552b809411601d0589efbbfe4/tllib/ranking/hscore.py
TLLIB = [
    (200, 5, 12, 0.7060590097422758, 0.6324115974519257),
    (60, 4, 90, 2.9999999999999862, 2.295618284798767),
    (30, 3, 28, 1.6243300961427463, 0.6622934514664492),
    (500, 7, 40, 1.364489135490604, 1.287001731682233),
]


def fixed(N, K, D):
    """Features without a random number; some label sets have gaps."""
    i, j = torch.arange(N)[:, None].double(), torch.arange(D)[None].double()
    y = (torch.arange(N) ** 2 // 3 + torch.arange(N)) % K
    x = torch.sin(1.7 * i + 0.9 * j * j + 0.3 * i * j)
    return FeatureSet(x + 0.5 * torch.cos(2.1 * y.double()[:, None] * (j + 1)), y, K)


@pytest.mark.parametrize(("N", "K", "D", "plain", "regularised"), TLLIB)
def test_is_tllibs(N, K, D, plain, regularised):
    """Their Σ_B is over N − 1 and the shrunk Σ_T over N: ours is theirs times (N − 1)/N."""
    data = fixed(N, K, D)
    assert float(h_score(data.stats)) == pytest.approx(plain, abs=1e-9)
    want = regularised * (N - 1) / N
    assert float(regularised_h_score(data)) == pytest.approx(want, rel=1e-12)
    stats = ClassStats(K, D, shrinkage=True).update(data.features, data.labels)
    assert float(regularised_h_score(stats)) == pytest.approx(want, rel=1e-12)
    assert float(h_score(fixed(N, K, D).stats)) <= K - 1


@pytest.mark.parametrize("seed", range(4))
def test_is_the_pseudo_inverse(seed):
    data = blobs(seed=seed)
    x, y = data.features, data.labels
    value = h_score(data.stats)
    assert value.dtype == F64
    assert value.shape == ()
    assert float(value) == pytest.approx(by_pinv(x, y), rel=1e-9)
    alpha = LedoitWolf().fit(x.numpy()).shrinkage_
    assert ledoit_wolf(data.frozen, _fourth_of(x)) == pytest.approx(alpha, rel=1e-9)
    assert float(regularised_h_score(data)) == pytest.approx(by_pinv(x, y, alpha), rel=1e-9)


def _fourth_of(x):
    return (x - x.mean(0)).square().sum(1).square().sum()


def test_where_the_shrinkage_is_nothing_or_all():
    one = blobs(D=1)  # in one dimension the target is the variance itself
    assert ledoit_wolf(one.frozen, _fourth_of(one.features)) == 0
    assert float(regularised_h_score(one)) == pytest.approx(float(h_score(one.stats)), rel=1e-12)
    noise = FeatureSet(blobs(N=6, K=2, D=40).features, torch.arange(6) % 2, 2)
    wild = FeatureSet(noise.features.pow(3), noise.labels, 2)
    assert ledoit_wolf(wild.frozen, 1e9 * _fourth_of(wild.features)) == 1
    same = FeatureSet(torch.ones(9, 3, dtype=F64), torch.arange(9) % 3, 3)
    assert ledoit_wolf(same.frozen, _fourth_of(same.features)) == 0


@pytest.mark.parametrize("seed", range(3))
def test_balanced_classes_make_it_a_vci(seed):
    stats = blobs(balanced=True, seed=seed).stats
    want = 4 * (1 - metrics.vci(stats))
    torch.testing.assert_close(h_score(stats), want, rtol=1e-10, atol=0)


# --- bounds and limits --------------------------------------------------------------------------


@pytest.mark.parametrize(("N", "K", "D"), [(300, 5, 8), (300, 12, 4), (40, 6, 80), (20, 20, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("spread", [0.0, 1e-5, 1.0])
def test_never_above_the_bound(N, K, D, dtype, spread):
    data = blobs(N, K, D, balanced=True, spread=spread, dtype=dtype)
    bound = min(K - 1, D)
    for value in (h_score(data.stats), h_score(data.stats, pca=3), regularised_h_score(data)):
        assert 0 <= float(value) <= bound
    if not spread:
        assert float(h_score(data.stats)) == pytest.approx(bound, rel=1e-6)
        assert float(h_score(data.stats, pca=3)) == pytest.approx(min(3, bound), rel=1e-6)


def test_golden_collapsed_one_hot_features():
    """Sheet, check 6."""
    y = torch.arange(30) % 3
    data = FeatureSet(torch.eye(3)[y], y, 3)
    assert float(h_score(data.stats)) == pytest.approx(2, rel=1e-12)
    assert float(metrics.vci(data.stats)) == pytest.approx(0, abs=1e-12)
    assert float(metrics.cdnv(data.stats)) == 0
    # The samples lie at one distance from their mean, and the two directions of three vary alike:
    # α = (Σ‖z‖⁴/N − ‖S‖²)/N over ‖S − μI‖² = (4/9 − 2/9)/30 over 2/27.
    alpha = (2 / 9 / 30) / (2 / 27)
    want = 2 * (1 - alpha) / 3 / ((1 - alpha) / 3 + alpha * 2 / 9) * 1
    assert float(regularised_h_score(data)) == pytest.approx(want, rel=1e-10)


@pytest.mark.parametrize("value", [0.0, 1.0, 1000.1])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_constant_features_give_zero(value, dtype):
    for D in (1, 2, 7):
        data = FeatureSet(torch.full((50, D), value, dtype=dtype), torch.arange(50) % 4, 4)
        assert float(h_score(data.stats)) == 0
        assert float(h_score(data.stats, pca=1)) == 0
        assert float(regularised_h_score(data)) == 0


@pytest.mark.parametrize(("N", "D", "full"), [(30, 60, True), (30, 29, True), (31, 29, False)])
def test_saturation_is_told(N, D, full):
    """Sheet, check 4: with N ≤ D + 1 any features, here noise, have H = K − 1."""
    rng = torch.Generator().manual_seed(1)
    x, y = torch.randn(N, D, generator=rng, dtype=F64), torch.arange(N) % 4
    stats = FeatureSet(x, y, 4).stats
    assert saturated(stats) is saturated(stats.freeze()) is full
    assert (float(h_score(stats)) > 3 - 1e-6) is full
    assert not saturated(stats, pca=8)
    assert saturated(stats, pca=1000) is full
    assert float(h_score(stats, pca=8)) < 2.5


# --- invariances --------------------------------------------------------------------------------


def moved(data, shift, how):
    rng = torch.Generator().manual_seed(7)
    A = torch.randn(data.dim, data.dim, generator=rng, dtype=F64)
    A = torch.linalg.qr(A)[0] if how == "rotation" else A
    return FeatureSet(data.features @ A * 3 + shift, data.labels, data.num_classes)


@pytest.mark.parametrize("shift", [0, 1000])
def test_what_changes_nothing(shift):
    data = blobs()
    plain, shrunk = float(h_score(data.stats)), float(regularised_h_score(data))
    assert float(h_score(moved(data, shift, "any").stats)) == pytest.approx(plain, rel=1e-7)
    turned = moved(data, shift, "rotation")
    assert float(regularised_h_score(turned)) == pytest.approx(shrunk, rel=1e-8)
    assert float(h_score(turned.stats, pca=3)) == pytest.approx(
        float(h_score(data.stats, pca=3)), rel=1e-8
    )
    assert float(regularised_h_score(moved(data, 0, "any"))) != pytest.approx(shrunk, rel=1e-3)
    twice = FeatureSet(data.features.repeat(2, 1), data.labels.repeat(2), 5)
    assert float(h_score(twice.stats)) == pytest.approx(plain, rel=1e-10)
    renamed = FeatureSet(data.features, 4 - data.labels, 5)
    assert float(h_score(renamed.stats)) == pytest.approx(plain, rel=1e-12)


def test_dead_and_doubled_units_change_nothing():
    data = blobs(spread=0.3)
    x = data.features
    want = float(h_score(data.stats))
    dead = torch.cat((x[:, :3], torch.full((300, 2), 7.0, dtype=F64), x[:, 3:]), 1)
    doubled = torch.cat((x, x), 1)
    small = torch.cat((x[:, :4], 1e-9 * x[:, 4:]), 1)
    for features, rel in ((dead, 1e-10), (doubled, 1e-8), (small, 1e-8)):
        value = h_score(FeatureSet(features, data.labels, 5).stats)
        assert float(value) == pytest.approx(want, rel=rel)


def test_pca_is_scikit_learns_then_the_score():
    from sklearn.decomposition import PCA

    data = blobs(D=20)
    z = torch.from_numpy(PCA(4).fit_transform(data.features.numpy()))
    assert float(h_score(data.stats, pca=4)) == pytest.approx(by_pinv(z, data.labels), rel=1e-9)
    all_of_it = h_score(data.stats, pca=20)
    torch.testing.assert_close(all_of_it, h_score(data.stats), rtol=1e-9, atol=0)


# --- moments and labels -------------------------------------------------------------------------


def test_moments_and_samples_give_one_value():
    data = blobs()
    x, y = data.features, data.labels
    parts = [ClassStats(5, 8, shrinkage=True).update(x[i::3], y[i::3]) for i in range(3)]
    whole = sum(parts)
    for given in (whole, whole.freeze(), data.frozen):
        torch.testing.assert_close(h_score(given), h_score(data.stats), rtol=1e-9, atol=0)
    for given in (whole, whole.freeze()):
        torch.testing.assert_close(
            regularised_h_score(given), regularised_h_score(data), rtol=1e-9, atol=0
        )
    rest = whole - parts[0]
    left = torch.arange(300) % 3 != 0
    want = regularised_h_score(FeatureSet(x[left], y[left], 5))
    torch.testing.assert_close(regularised_h_score(rest), want, rtol=1e-9, atol=0)


def test_float32_features():
    data = blobs(N=2000, balanced=True)
    far = FeatureSet((data.features + 1000).float(), data.labels, 5)
    assert float(h_score(far.stats)) == pytest.approx(float(h_score(data.stats)), rel=1e-3)
    single = FeatureSet(data.features.float(), data.labels, 5)
    assert float(h_score(single.stats)) == pytest.approx(float(h_score(data.stats)), rel=2e-6)
    assert float(regularised_h_score(single)) == pytest.approx(
        float(regularised_h_score(data)), rel=2e-6
    )


def test_gaps_single_samples_and_ignored_rows():
    data = blobs()
    x = torch.cat((data.features, data.features[:1] + 3, data.features[:5] * torch.nan))
    y = torch.cat((2 * data.labels, torch.tensor([11]), torch.full((5,), -1)))
    gaps = FeatureSet(x, y, 15)
    dense = FeatureSet(x[:301], torch.cat((data.labels, torch.tensor([5]))), 6)
    assert float(h_score(gaps.stats)) == pytest.approx(float(h_score(dense.stats)), rel=1e-12)
    assert float(regularised_h_score(gaps)) == pytest.approx(
        float(regularised_h_score(dense)), rel=1e-12
    )
    alone = FeatureSet(data.features[:8], torch.arange(8), 8)  # every class is one sample
    assert float(h_score(alone.stats)) == pytest.approx(7, rel=1e-9)


def test_what_cannot_be_scored():
    data = blobs()
    with pytest.raises(InputError, match="at least two need samples, got 1"):
        h_score(FeatureSet(data.features, data.labels * 0, 5).stats)
    with pytest.raises(InputError, match="at least two need samples, got 1"):
        regularised_h_score(FeatureSet(data.features, data.labels * 0, 5))
    with pytest.raises(InputError, match="empty"):
        h_score(ClassStats(5, 8))
    with pytest.raises(InputError, match=r"shrinkage=True.*samples"):
        regularised_h_score(data.stats)
    with pytest.raises(InputError, match="moments"):
        h_score(data)
    with pytest.raises(InputError, match="pca"):
        h_score(data.stats, pca=0)
    light = ClassStats(5, 8, scatter=False).update(data.features, data.labels)
    with pytest.raises(InputError, match="scatter"):
        h_score(light)
    with pytest.raises(InputError, match="no class statistics"):
        regularised_h_score(FeatureSet(data.features, None, 5))


def test_one_factor_serves_later_calls(monkeypatch):
    frozen = blobs().frozen
    first = h_score(frozen)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", None)
    monkeypatch.setattr(torch.linalg, "eigh", None)
    assert torch.equal(h_score(frozen), first)
