"""Closed-form classifiers from moments, against scikit-learn; exact in any order of arrival."""

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge

from ncmethods import heads
from ncmethods._core import InputError
from ncmethods.features import FeatureSet
from ncmethods.stats import ClassStats

K, D = 4, 6


def sample(n=200, offset=0.0, seed=0):
    rng = torch.Generator().manual_seed(seed)
    y = torch.randint(K, (n,), generator=rng)
    centres = 2 * torch.randn(K, D, generator=rng, dtype=torch.float64)
    mix = torch.randn(D, D, generator=rng, dtype=torch.float64)
    x = centres[y] + torch.randn(n, D, generator=rng, dtype=torch.float64) @ mix + offset
    return FeatureSet(x, y, K)


@pytest.mark.parametrize("shrinkage", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_lda_is_its_formula(shrinkage, offset):
    train, test = sample(offset=offset), sample(offset=offset, seed=1)
    X, y = train.features.numpy(), train.labels.numpy()
    means = np.stack([X[y == c].mean(0) for c in range(K)])
    S = sum(np.cov(X[y == c].T, bias=True) * (y == c).mean() for c in range(K))
    S = (1 - shrinkage) * S + shrinkage * np.trace(S) / D * np.eye(D)
    rows = np.linalg.solve(S, means.T).T
    bias = -0.5 * (rows * means).sum(1)
    z = heads.lda(train, shrinkage=shrinkage)(test.features).detach().numpy()
    want = test.features.numpy() @ rows.T + bias
    np.testing.assert_allclose(
        z - z[:, :1], want - want[:, :1], rtol=1e-6, atol=1e-6 * max(1.0, offset)
    )


def test_lda_on_equal_counts_decides_as_scikit_learn():
    rng = np.random.default_rng(0)
    y = np.arange(400) % K
    X = rng.normal(size=(K, D))[y] + rng.normal(size=(400, D)) @ rng.normal(size=(D, D))
    theirs = LinearDiscriminantAnalysis(solver="lsqr").fit(X, y)
    ours = heads.lda(FeatureSet(torch.tensor(X), torch.tensor(y), K), shrinkage=0, prior="sample")
    new = rng.normal(size=(500, D)) * 2
    z = ours(torch.tensor(new)).detach().numpy()
    theirs = theirs.decision_function(new)
    np.testing.assert_allclose(z - z[:, :1], theirs - theirs[:, :1], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("penalty", [1e-3, 10.0])
def test_ridge_is_scikit_learns(intercept, penalty):
    train = sample(offset=3.0)
    target = np.eye(K)[train.labels.numpy()]
    theirs = Ridge(alpha=penalty, fit_intercept=intercept).fit(train.features.numpy(), target)
    ours = heads.ridge(train, penalty, intercept=intercept)
    np.testing.assert_allclose(ours.weight.detach().numpy(), theirs.coef_, rtol=1e-6, atol=1e-9)
    if intercept:
        np.testing.assert_allclose(ours.bias.detach().numpy(), theirs.intercept_, rtol=1e-6)
    else:
        assert ours.bias is None


@pytest.mark.parametrize("make", [heads.ncm, heads.lda, heads.ridge])
def test_any_order_of_arrival_and_a_class_taken_out(make):
    whole = sample()
    parts = [
        ClassStats(K, D).update(whole.features[rows], whole.labels[rows])
        for rows in torch.randperm(200).split(30)
    ]
    at_once = make(whole.stats)
    for order in (parts, parts[::-1]):
        torch.testing.assert_close(make(sum(order)).weight, at_once.weight, rtol=1e-6, atol=1e-7)
    gone = whole.subset(whole.labels == 2)
    left = whole.subset(whole.labels != 2)
    without, never = make(whole.stats - gone.stats), make(left)
    torch.testing.assert_close(without.weight.double(), never.weight.double(), rtol=1e-5, atol=1e-6)
    assert not bool((without(whole.features.float()).argmax(1) == 2).any())
    assert not bool(without.weight[2].any())


def test_collapsed_features_and_dead_units_stay_finite():
    y = torch.arange(40) % K
    x = torch.cat([torch.eye(K)[y], torch.zeros(40, 2)], 1)
    train = FeatureSet(x, y, K)
    for layer in (heads.lda(train), heads.lda(train, shrinkage=0), heads.ridge(train, 1e-6)):
        assert bool(layer.weight.isfinite().all())
        assert bool((layer(x).argmax(1) == y).all())


def test_errors():
    train = sample()
    with pytest.raises(InputError, match="shrinkage lies in"):
        heads.lda(train, shrinkage=1.5)
    with pytest.raises(InputError, match="prior"):
        heads.lda(train, prior="flat")
    with pytest.raises(InputError, match="penalty must be positive"):
        heads.ridge(train, 0.0)
    with pytest.raises(InputError, match="no class means"):
        heads.lda(FeatureSet(train.features, torch.full((200,), -1), K))
    with pytest.raises(InputError):
        heads.lda(FeatureSet(train.features, None, K))
