"""WDiscOOD: the authors' code, a reference in numpy, Mahalanobis, invariances, collapse."""

import numpy as np
import pytest
import torch

from ncmethods import ood
from ncmethods._core import InputError
from ncmethods.features import FeatureSet
from ncmethods.ood.wdiscood import WDiscOOD
from ncmethods.stats import ClassStats

# ood_scores/scorer_dist.py at the commit below, run once on the CPU on `given()`: score_g
# "ClsEucl", score_h "CenterEucl", whitened, alpha 1e-5, negated; it computes in float32.
# https://github.com/ivalab/WDiscOOD/blob/88c4df0ad149da5f8acc198b6d988be9f4640630/ood_scores/scorer_dist.py
AUTHORS = {  # rank, residual weight, unit features
    (2, 5.0, False): [54.870811462, 114.411949158, 26.603199005, 36.714248657],
    (1, 5.0, False): [55.607315063, 115.358627319, 26.563709259, 35.298103333],
    (2, 1.0, True): [17.646091461, 13.248628616, 8.275677681, 11.482565880],
    (2, 0.0, False): [38.614158630, 88.590522766, 6.550835609, 1.774324894],
}


def given():
    r = np.random.RandomState(0)
    y = np.repeat([0, 1, 2], [20, 12, 8])
    means, mix = 3 * r.randn(3, 5), r.randn(5, 5)
    x = means[y] + r.randn(40, 5) @ mix + 1
    return FeatureSet(torch.tensor(x), torch.tensor(y), 3), torch.tensor(4 * r.randn(4, 5))


@pytest.mark.parametrize("setting", AUTHORS)
def test_is_the_authors_code(setting):
    rank, weight, normalize = setting
    train, h = given()
    got = WDiscOOD.fit(train, rank=rank, residual_weight=weight, normalize=normalize)(h)
    np.testing.assert_allclose(got, AUTHORS[setting], rtol=1e-5)


def test_is_its_definition():
    train, h = given()
    x, y, q = train.features.numpy(), train.labels.numpy(), h.numpy()
    means = np.stack([x[y == c].mean(0) for c in range(3)])
    sigma = (x - means[y]).T @ (x - means[y]) / len(x)
    values, vectors = np.linalg.eigh(sigma)
    root = vectors / np.sqrt(values) @ vectors.T
    z, mean, m = q @ root, x.mean(0) @ root, means @ root
    for rank in (1, 2):
        V = np.linalg.eigh((m - mean).T @ (m - mean))[1][:, -rank:]
        near = np.linalg.norm((z @ V)[:, None] - m @ V, axis=2).min(1)
        rest = z - mean - (z - mean) @ V @ V.T
        want = near + 2 * np.linalg.norm(rest, axis=1)
        got = WDiscOOD.fit(train, rank=rank, residual_weight=2.0)(h)
        np.testing.assert_allclose(got, want, rtol=1e-10)


def test_both_parts_make_the_mahalanobis_distance():
    """With all K − 1 discriminants the class means lie among them: the squares add up."""
    train, h = given()
    near = WDiscOOD.fit(train, residual_weight=0.0)(h)
    far = WDiscOOD.fit(train, residual_weight=1.0)(h) - near
    torch.testing.assert_close(near.square() + far.square(), ood.Mahalanobis.fit(train)(h))


def test_invariances():
    train, h = given()
    want = WDiscOOD.fit(train)(h)
    mix = torch.randn(5, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    moved = FeatureSet(train.features @ mix + 100, train.labels, 3)
    torch.testing.assert_close(WDiscOOD.fit(moved)(h @ mix + 100), want, rtol=1e-8, atol=1e-8)
    halves = [ClassStats(4, 5).update(train.features[i::2], train.labels[i::2]) for i in (0, 1)]
    torch.testing.assert_close(WDiscOOD.fit(halves[0] + halves[1])(h), want)  # one class is empty
    unit = WDiscOOD.fit(train, normalize=True)
    torch.testing.assert_close(unit(7 * h), unit(h))
    more = WDiscOOD.fit(train, rank=4)  # three means span two directions
    torch.testing.assert_close(more(h), want)


@pytest.mark.parametrize("spread", [0.0, 1e-6])
def test_collapsed_classes_stay_finite(spread):
    train, h = given()
    noise = spread * torch.randn(40, 5, generator=torch.Generator().manual_seed(1))
    means = train.stats.means
    scorer = WDiscOOD.fit(FeatureSet(means[train.labels] + noise, train.labels, 3))
    scores = scorer(torch.cat((means, h, torch.zeros(1, 5))).float())
    assert scores.isfinite().all()
    assert scores[:3].max() < scores[3:].min()


@pytest.mark.parametrize("copies", [1, 2])
def test_means_that_do_not_differ_leave_the_residual(copies):
    """One class alone, or every sample in both classes: only the distance to the mean is left."""
    train, h = given()
    x = train.features.repeat_interleave(copies, 0)
    y = torch.arange(len(x)) % copies
    got = WDiscOOD.fit(FeatureSet(x, y, 2), residual_weight=1.0)(h)
    want = ood.Mahalanobis.fit(FeatureSet(x, 0 * y, 2))(h).sqrt()
    torch.testing.assert_close(got, want)


def test_constant_features_stay_finite():
    still = FeatureSet(torch.ones(20, 5), torch.arange(20) % 4, 4)
    assert WDiscOOD.fit(still)(torch.eye(5)).isfinite().all()


def test_gradients_at_the_centre_are_finite():
    train, h = given()
    scorer = WDiscOOD.fit(train)
    x = torch.cat((scorer.center[None], train.stats.means, h)).requires_grad_()
    scorer(x).sum().backward()
    assert x.grad.isfinite().all()


def test_errors():
    train, _ = given()
    for rank in (0, 5):
        with pytest.raises(InputError, match="between 1 and D − 1 = 4"):
            WDiscOOD.fit(train, rank=rank)
    with pytest.raises(InputError, match="residual_weight"):
        WDiscOOD.fit(train, residual_weight=-1.0)
    with pytest.raises(InputError, match="normalized=True"):
        WDiscOOD.fit(train.stats, normalize=True)
