"""NECO: golden values, scikit-learn's scaler and PCA, invariances, the choice of the rank."""

import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler
from torch import nn

from ncmethods import ood
from ncmethods._core import InputError
from ncmethods.features import FeatureSet

F64 = {"dtype": torch.float64}


def skewed(N=200, D=8, seed=0):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, generator=rng, **F64) @ torch.randn(D, D, generator=rng, **F64)
    return FeatureSet(x + 5, torch.arange(N) % 4, 4)


def test_golden_values():
    e1, e2 = torch.eye(3, **F64)[:2]
    x = torch.stack((2 * e1, -2 * e1, e2, -e2))
    h = torch.tensor([[3.0, 4.0, 12.0]], **F64)
    for offset in (0.0, 10 * e1):  # centred: a shift of all changes nothing
        train = FeatureSet(x + offset, torch.tensor([0, 0, 1, 1]), 2)
        plain = ood.NECO.fit(train, rank=2, scale=False)
        assert float(plain(h + offset)) == pytest.approx(-5 / 13, rel=1e-12)
        times = ood.NECO.fit(train, rank=2, scale=False, times_max_logit=True)
        logits = torch.tensor([[2.0, -1.0]], **F64)
        assert float(times(h + offset, logits)) == pytest.approx(-10 / 13, rel=1e-12)


@pytest.mark.parametrize("scale", [False, True])
def test_is_scikit_learns_scaler_and_pca(scale):
    train = skewed()
    h = skewed(seed=5).features
    scaler = StandardScaler(with_std=scale).fit(train.features.numpy())
    pca = PCA(svd_solver="full").fit(scaler.transform(train.features.numpy()))
    z = torch.from_numpy(scaler.transform(h.numpy()))
    for rank in (1, 3, 7):
        inside = z @ torch.from_numpy(pca.components_[:rank].T)
        want = -inside.norm(dim=1) / z.norm(dim=1)
        got = ood.NECO.fit(train, rank=rank, scale=scale)(h)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_rank_is_the_larger_of_both_rules():
    train = skewed(D=12)
    for variance in (0.3, 0.9, 1.0):
        scaled = StandardScaler().fit_transform(train.features.numpy())
        held = PCA().fit(scaled).explained_variance_ratio_.cumsum()
        want = min(max(3, int((held < variance).sum()) + 1), 11)
        assert ood.NECO.fit(train, variance=variance).rank == want
    assert ood.NECO.fit(train, variance=0.01).rank == 3  # K − 1
    with pytest.raises(InputError, match="variance"):
        ood.NECO.fit(train, variance=0)


def test_invariances_and_bounds():
    train, h = skewed(), skewed(seed=5).features
    scorer = ood.NECO.fit(train, rank=3)
    mean = train.features.mean(0)
    torch.testing.assert_close(scorer(mean + 4 * (h - mean)), scorer(h))
    assert (scorer(h) <= 0).all()
    assert (scorer(h) >= -1).all()
    stretch = torch.arange(1, 9, **F64)
    moved = FeatureSet(train.features * stretch - 3, train.labels, 4)
    torch.testing.assert_close(ood.NECO.fit(moved, rank=3)(h * stretch - 3), scorer(h))
    assert scorer(mean[None]).isfinite().all()


def test_constant_coordinates_and_constant_features_stay_finite():
    train = skewed()
    flat = FeatureSet(nn.functional.pad(train.features, (0, 1), value=2.0), train.labels, 4)
    h = nn.functional.pad(skewed(seed=5).features, (0, 1), value=2.0)
    torch.testing.assert_close(
        ood.NECO.fit(flat, rank=3)(h), ood.NECO.fit(train, rank=3)(h[:, :-1])
    )
    still = FeatureSet(torch.ones(20, 5), torch.arange(20) % 4, 4)
    assert ood.NECO.fit(still)(torch.eye(5)).isfinite().all()


def test_moments_are_enough_and_share_one_decomposition(monkeypatch):
    train, h = skewed(), skewed(seed=5).features
    frozen = train.stats.freeze()
    want = ood.NECO.fit(train, rank=3)(h)
    torch.testing.assert_close(ood.NECO.fit(frozen, rank=3)(h), want)
    monkeypatch.setattr(torch.linalg, "eigh", None)
    ood.NECO.fit(frozen, rank=5)


@pytest.mark.parametrize("rank", [0, 8, 9])
def test_rank_must_leave_something_outside(rank):
    with pytest.raises(InputError, match="between 1 and D"):
        ood.NECO.fit(skewed(), rank=rank)
