"""Mahalanobis: golden values, scikit-learn, invariances, collapse, leave-one-out by brute force."""

import numpy as np
import pytest
import torch
from sklearn.covariance import EmpiricalCovariance

from ncmethods import ood
from ncmethods._core import InputError
from ncmethods.features import FeatureSet
from ncmethods.stats import ClassStats

BOTH = (ood.Mahalanobis, ood.RelativeMahalanobis)


def blobs(n=40, K=4, D=6, seed=0, dtype=torch.float64, offset=0.0):
    rng = torch.Generator().manual_seed(seed)
    y = torch.arange(K).repeat_interleave(n)
    means = 3 * torch.randn(K, D, generator=rng, dtype=torch.float64)
    mix = torch.randn(D, D, generator=rng, dtype=torch.float64)
    noise = torch.randn(len(y), D, generator=rng, dtype=torch.float64) @ mix
    return FeatureSet((means[y] + noise + offset).to(dtype), y, K)


def queries(n=25, D=6, seed=9, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    return (4 * torch.randn(n, D, generator=rng, dtype=torch.float64)).to(dtype)


def test_golden_values():
    x = torch.tensor([[-1.0], [1.0], [9.0], [11.0]], dtype=torch.float64)
    train = FeatureSet(x, torch.tensor([0, 0, 1, 1]), 2)
    h = torch.tensor([[4.0]], dtype=torch.float64)
    assert float(ood.Mahalanobis.fit(train)(h)) == pytest.approx(16, rel=1e-12)
    assert float(ood.RelativeMahalanobis.fit(train)(h)) == pytest.approx(16 - 1 / 26, rel=1e-12)


def test_is_scikit_learns_distance():
    train, h = blobs(), queries()
    means = train.stats.means
    within = EmpiricalCovariance(assume_centered=True).fit(
        (train.features - means[train.labels]).numpy()
    )
    total = EmpiricalCovariance().fit(train.features.numpy())
    near = np.min([within.mahalanobis((h - m).numpy()) for m in means], axis=0)
    np.testing.assert_allclose(ood.Mahalanobis.fit(train)(h), near, rtol=1e-10)
    np.testing.assert_allclose(
        ood.RelativeMahalanobis.fit(train)(h), near - total.mahalanobis(h.numpy()), rtol=1e-9
    )


@pytest.mark.parametrize("cls", BOTH)
def test_invariances(cls):
    train, h = blobs(), queries()
    want = cls.fit(train)(h)
    twice = FeatureSet(train.features.repeat(2, 1), train.labels.repeat(2), 4)
    torch.testing.assert_close(cls.fit(twice)(h), want)
    map_ = torch.randn(6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    moved = FeatureSet(train.features @ map_ + 100, train.labels, 4)
    torch.testing.assert_close(cls.fit(moved)(h @ map_ + 100), want, rtol=1e-7, atol=1e-7)
    named = FeatureSet(train.features, 3 - train.labels, 4)
    torch.testing.assert_close(cls.fit(named)(h), want)


@pytest.mark.parametrize("cls", BOTH)
def test_moments_samples_and_frozen_moments_are_one_fit(cls):
    train, h = blobs(), queries()
    halves = [
        ClassStats(4, 6).update(train.features[rows], train.labels[rows])
        for rows in (slice(0, 70), slice(70, None))
    ]
    whole = halves[0] + halves[1]
    want = cls.fit(train)(h)
    for given in (whole, whole.freeze()):
        torch.testing.assert_close(cls.fit(given)(h), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("cls", BOTH)
def test_normalize_is_a_fit_on_unit_features(cls):
    train, h = blobs(), queries()
    unit = FeatureSet(train.features / train.features.norm(dim=1, keepdim=True), train.labels, 4)
    got = cls.fit(train, normalize=True)
    torch.testing.assert_close(got(h), cls.fit(unit)(h / h.norm(dim=1, keepdim=True)))
    torch.testing.assert_close(got(7 * h), got(h))
    stats = ClassStats(4, 6, normalized=True).update(unit.features, unit.labels)
    torch.testing.assert_close(cls.fit(stats, normalize=True)(h), got(h), rtol=1e-9, atol=1e-9)
    with pytest.raises(InputError, match="normalized=True"):
        cls.fit(train.stats, normalize=True)
    with pytest.raises(InputError, match="unit length"):
        cls.fit(stats)


def test_a_far_offset_costs_float32_no_more_than_its_own_digits():
    train, h = blobs(offset=0.0), queries()
    want = ood.Mahalanobis.fit(train)(h)
    far = blobs(offset=1000.0, dtype=torch.float32)
    got = ood.Mahalanobis.fit(far)((h + 1000).float())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=3e-3, atol=3e-3)


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("spread", [0.0, 1e-6])
def test_collapsed_classes_stay_finite(cls, spread):
    train = blobs(dtype=torch.float32)
    means = train.stats.means.float()
    noise = spread * torch.randn(160, 6, generator=torch.Generator().manual_seed(1))
    train = FeatureSet(means[train.labels] + noise, train.labels, 4)
    scorer = cls.fit(train)
    scores = scorer(torch.cat((means, queries(dtype=torch.float32), torch.zeros(1, 6))))
    assert scores.isfinite().all()
    assert scores[:4].max() < scores[4:].min()
    if cls is ood.Mahalanobis:
        assert (scores >= 0).all()


def test_dead_units_and_shrinkage():
    train, h = blobs(), queries()
    dead = FeatureSet(torch.nn.functional.pad(train.features, (0, 2)), train.labels, 4)
    still = torch.nn.functional.pad(h, (0, 2))
    scorer = ood.Mahalanobis.fit(dead)
    torch.testing.assert_close(scorer(still), ood.Mahalanobis.fit(train)(h))
    woken = still + torch.tensor([0, 0, 0, 0, 0, 0, 1.0, 0])
    assert (scorer(woken) > 1e3 + scorer(still)).all()
    sigma = train.stats.sigma_w
    eye = torch.eye(6, dtype=torch.float64) * sigma.trace() / 6
    inverse = torch.linalg.inv(0.7 * sigma + 0.3 * eye)
    d = h[:, None] - train.stats.means
    want = torch.einsum("qkd,de,qke->qk", d, inverse, d).amin(1)
    torch.testing.assert_close(ood.Mahalanobis.fit(train, shrinkage=0.3)(h), want)
    with pytest.raises(InputError, match="shrinkage"):
        ood.Mahalanobis.fit(train, shrinkage=1.5)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("cls", BOTH)
def test_leave_one_out_is_brute_force(cls, normalize):
    train = blobs(n=9, K=3)
    got = cls.leave_one_out(train, normalize=normalize)
    rows = torch.arange(len(train))

    def without(i):
        rest = FeatureSet(train.features[rows != i], train.labels[rows != i], 3)
        return cls.fit(rest, normalize=normalize)(train.features[i : i + 1])

    torch.testing.assert_close(got, torch.cat([without(i) for i in rows]), rtol=1e-10, atol=1e-10)
    if cls is ood.Mahalanobis:  # who was in the fit looks near
        assert (got > cls.fit(train, normalize=normalize)(train.features)).all()


def test_leave_one_out_skips_ignored_rows_and_says_what_it_cannot_do():
    train = blobs(n=9, K=3)
    more = FeatureSet(
        torch.cat((train.features, queries(2))),
        torch.cat((train.labels, torch.tensor([-1, -1]))),
        3,
    )
    torch.testing.assert_close(
        ood.Mahalanobis.leave_one_out(more), ood.Mahalanobis.leave_one_out(train)
    )
    with pytest.raises(InputError, match="needs the samples"):
        ood.Mahalanobis.leave_one_out(train.stats)
    with pytest.raises(InputError, match="at least 2 samples"):
        ood.Mahalanobis.leave_one_out(FeatureSet(train.features[:-8], train.labels[:-8], 3))
    with pytest.raises(InputError, match="more than D"):
        ood.Mahalanobis.leave_one_out(blobs(n=3, K=3))


def test_a_statistic_without_scatter_says_so():
    stats = ClassStats(4, 6, scatter=False).update(queries(8), torch.arange(8) % 4)
    with pytest.raises(InputError, match="scatter"):
        ood.Mahalanobis.fit(stats)
