"""What fits of one statistic share: eigendecompositions, and the directions of both whiteners."""

import pytest
import torch
from sklearn.decomposition import PCA
from torch import nn

from ncmethods import ood
from ncmethods.features import FeatureSet
from ncmethods.ood.vim import Residual

F64 = {"dtype": torch.float64}


def case(N=90, D=8, K=4, seed=0):
    rng = torch.Generator().manual_seed(seed)
    y = torch.arange(N) % K
    x = 3 * torch.randn(K, D, generator=rng, **F64)[y] + torch.randn(N, D, generator=rng, **F64)
    head = nn.Linear(D, K).double()
    head.weight.data.copy_(torch.randn(K, D, generator=rng, **F64))
    head.bias.data.copy_(3 + torch.randn(K, generator=rng, **F64))
    return FeatureSet(x + 1, y, K), head


def test_one_eigendecomposition_for_each_matrix(monkeypatch):
    """Three matrices: about u, the correlations, Σ_T. Ranks and further scorers add none."""
    decompose, seen = torch.linalg.eigh, []

    def eigh(matrix, *args, **kwargs):
        seen.extend([matrix] if len(matrix) == 8 else [])  # not the small Gram matrices
        return decompose(matrix, *args, **kwargs)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    train, head = case()
    stats = train.frozen
    for rank in (2, 5):
        Residual.fit(stats, head, rank=rank)
        ood.ViM.fit(train, head, rank=rank)
    assert len(seen) == 1
    for rank in (2, 5, None):
        ood.NECO.fit(stats, rank=rank)
    assert len(seen) == 2
    for rank in (2, 5, None):
        ood.NECO.fit(stats, rank=rank, scale=False)
    stats.leading(3), stats.principal(4)
    assert len(seen) == 3
    for cls in (ood.Mahalanobis, ood.RelativeMahalanobis, ood.NCI, ood.fDBD, ood.WDiscOOD):
        cls.fit(stats, head)
    assert len(seen) == 3
    u = -torch.linalg.pinv(head.weight.detach()) @ head.bias.detach()
    x = train.features
    for matrix, want in zip(
        seen, ((x - u).T @ (x - u) / 90, torch.corrcoef(x.T), torch.cov(x.T, correction=0))
    ):
        torch.testing.assert_close(matrix, want, rtol=1e-10, atol=1e-10)


def test_leading_directions_are_scikit_learns():
    train, _ = case()
    want = torch.from_numpy(PCA(3, svd_solver="full").fit(train.features.numpy()).components_.T)
    got = train.frozen.leading(3)
    torch.testing.assert_close(got * (got * want).sum(0).sign(), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("D", "K", "r"), [(8, 4, 3), (8, 8, 7), (3, 6, 3), (8, 2, 1)])
def test_relative_distance_lives_in_the_span_of_the_means(D, K, r):
    train, _ = case(D=D, K=K)
    scorer = ood.RelativeMahalanobis.fit(train)
    assert scorer.factor.shape == scorer.factor_total.shape == (D, r)
    q = 4 * torch.randn(30, D, generator=torch.Generator().manual_seed(5), **F64)
    d = q[:, None] - train.stats.means
    near = torch.einsum("qkd,de,qke->qk", d, torch.linalg.inv(train.stats.sigma_w), d).amin(1)
    x = train.features - train.features.mean(0)
    z = q - train.features.mean(0)
    far = ((z @ torch.linalg.inv(x.T @ x / len(x))) * z).sum(1)
    torch.testing.assert_close(scorer(q), near - far, rtol=1e-9, atol=1e-9)
    F, G = train.frozen.relative_whiteners()
    W, T = train.frozen.whitener("within"), train.frozen.whitener("total")
    torch.testing.assert_close(F @ F.T - G @ G.T, W @ W.T - T @ T.T, rtol=1e-9, atol=1e-9)


def test_relative_distance_with_shrinkage_or_dead_units_keeps_all_directions():
    train, _ = case()
    assert ood.RelativeMahalanobis.fit(train, shrinkage=0.2).factor.shape == (8, 8)
    dead = FeatureSet(nn.functional.pad(train.features, (0, 1)), train.labels, 4)
    scorer = ood.RelativeMahalanobis.fit(dead)
    assert scorer.factor.shape == (9, 9)
    q = nn.functional.pad(train.features[:5], (0, 1))
    want = ood.RelativeMahalanobis.fit(train)(train.features[:5])
    torch.testing.assert_close(scorer(q), want, rtol=1e-8, atol=1e-8)
    woken = q + nn.functional.one_hot(torch.tensor(8), 9)
    assert (scorer(woken) - scorer(q)).abs().min() > 1e-3


def test_relative_distance_of_one_class_is_zero(tmp_path):
    x = case()[0].features
    scorer = ood.RelativeMahalanobis.fit(FeatureSet(x, torch.zeros(90, dtype=torch.int64), 2))
    assert scorer.factor.shape == (8, 0)
    assert not scorer(3 * x).any()
    scorer.save(tmp_path / "one.safetensors")
    again = ood.RelativeMahalanobis.load(tmp_path / "one.safetensors")
    assert not again(3 * x).any()


@pytest.mark.parametrize("cls", [ood.Mahalanobis, ood.RelativeMahalanobis, ood.NECO])
def test_rounding_the_centre_costs_nothing(cls):
    """The centre has float32's digits; the distances are still those from the exact mean."""
    train, _ = case()
    far = FeatureSet(train.features + 1000 / 7, train.labels, 4)
    q = 4 * torch.randn(30, 8, generator=torch.Generator().manual_seed(5), **F64)
    scorer = cls.fit(far)
    assert torch.equal(scorer.center, scorer.center.float().double())
    assert not torch.equal(scorer.center, far.frozen.mean)
    torch.testing.assert_close(scorer(q + 1000 / 7), cls.fit(train)(q), rtol=1e-8, atol=1e-8)
