"""ViM and Residual: golden values, numpy, the origin, shared decompositions, collapse."""

import math

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from torch import nn

from ncmethods._core import InputError
from ncmethods.features import FeatureSet
from ncmethods.ood.vim import Residual, ViM, origin

F64 = {"dtype": torch.float64}


def linear(rows, bias=None):
    rows = torch.as_tensor(rows, **F64)
    head = nn.Linear(rows.shape[1], rows.shape[0], bias=bias is not None).double()
    head.weight.data.copy_(rows)
    if bias is not None:
        head.bias.data.copy_(torch.as_tensor(bias, **F64))
    return head


def random(N=200, D=12, K=5, seed=0):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, generator=rng, **F64) @ torch.randn(D, D, generator=rng, **F64)
    head = linear(torch.randn(K, D, generator=rng, **F64), torch.randn(K, generator=rng, **F64))
    return FeatureSet(x + 3, torch.arange(N) % K, K), head


def test_golden_alpha_and_score():
    x = torch.tensor([[3, 0, 1], [0, 3, -1], [3, 0, -1], [0, 3, 1]], **F64)
    head = linear([[1, 0, 0], [0, 1, 0]])
    scorer = ViM.fit(FeatureSet(x, torch.tensor([0, 1, 0, 1]), 2), head, rank=2)
    assert scorer.alpha == pytest.approx(3, rel=1e-12)
    h = torch.tensor([[1, 0, 2]], **F64)
    assert float(scorer(h)) == pytest.approx(6 - math.log(math.e + 1), rel=1e-12)
    assert float(scorer(h)) == pytest.approx(4.686738, abs=5e-7)


def test_golden_origin():
    u = origin(linear([[2, 0], [0, 4]], [2, -4]), "ViM", 2)
    torch.testing.assert_close(u, torch.tensor([-1, 1], **F64))
    assert not origin(linear([[2, 0], [0, 4]]), "ViM", 2).any()  # no bias


def test_is_the_formula_in_numpy():
    train, head = random()
    x, W, b = train.features.numpy(), head.weight.detach().numpy(), head.bias.detach().numpy()
    h = random(seed=7)[0].features.numpy()
    u = -np.linalg.pinv(W) @ b
    Vt = np.linalg.svd(x - u)[2]
    for d in (1, 4, 11):
        outside = lambda z: np.linalg.norm((z - u) @ Vt[d:].T, axis=1)  # noqa: B023, E731
        residual = Residual.fit(train, head, rank=d)(torch.from_numpy(h))
        np.testing.assert_allclose(residual, outside(h), rtol=1e-9, atol=1e-11)
        alpha = (x @ W.T + b).max(1).mean() / outside(x).mean()
        vim = ViM.fit(train, head, rank=d)
        assert vim.alpha == pytest.approx(alpha, rel=1e-9)
        want = alpha * outside(h) - logsumexp(h @ W.T + b, axis=1)
        np.testing.assert_allclose(vim(torch.from_numpy(h)), want, rtol=1e-9, atol=1e-9)


def test_residual_vanishes_at_the_origin_and_grows_with_distance():
    train, head = random()
    scorer, u = Residual.fit(train, head, rank=4), origin(head, "Residual", 12)
    h = random(seed=7)[0].features
    torch.testing.assert_close(scorer(u[None]), torch.zeros(1, **F64), atol=1e-12, rtol=0)
    torch.testing.assert_close(scorer(u + 5 * (h - u)), 5 * scorer(h))
    assert (scorer(h) >= 0).all()
    sizes = torch.stack([Residual.fit(train, head, rank=d)(h) for d in range(1, 12)])
    assert (sizes.diff(dim=0) <= 0).all()  # a larger space leaves less outside


def test_a_rotation_of_everything_changes_nothing():
    train, head = random()
    h = random(seed=7)[0].features
    Q = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(2), **F64))[0]
    turned = linear(head.weight.detach() @ Q, head.bias.detach())
    moved = FeatureSet(train.features @ Q, train.labels, 5)
    for cls in (Residual, ViM):
        want = cls.fit(train, head, rank=4)(h)
        torch.testing.assert_close(cls.fit(moved, turned, rank=4)(h @ Q), want)


@pytest.mark.parametrize(
    ("dim", "rank"), [(5, 2), (512, 256), (767, 383), (768, 512), (2047, 512), (2048, 1000)]
)
def test_default_rank_is_the_authors_rule(dim, rank, monkeypatch):
    x = torch.randn(4, dim, generator=torch.Generator().manual_seed(0))
    train = FeatureSet(x, torch.arange(4) % 2, 2)
    # the rule alone: no decomposition of 2048 × 2048
    train.frozen._cache[torch.zeros(dim, **F64).numpy().tobytes()] = (
        torch.ones(dim, **F64),
        torch.zeros(dim, 1, **F64).expand(dim, dim),
    )
    scorer = Residual.fit(train, linear(torch.ones(2, dim)))
    assert (scorer.rank, scorer.null.shape[1]) == (rank, dim - rank)


@pytest.mark.parametrize("cls", [Residual, ViM])
@pytest.mark.parametrize("rank", [0, 12, 13, 1000])
def test_rank_must_leave_something_outside(cls, rank):
    with pytest.raises(InputError, match=f"{cls.__name__} needs a rank between 1 and D − 1 = 11"):
        cls.fit(*random(), rank=rank)


def test_one_decomposition_for_all(monkeypatch):
    train, head = random()
    Residual.fit(train, head, rank=4)
    monkeypatch.setattr(torch.linalg, "eigh", None)
    ViM.fit(train, head, rank=6)
    Residual.fit(train, head, rank=2)


def test_largest_logits_that_are_negative_are_refused():
    train, head = random()
    head.bias.data -= 1000
    with pytest.raises(InputError, match="must be positive"):
        ViM.fit(train, head, rank=4)
    assert Residual.fit(train, head, rank=4)(train.features).isfinite().all()


def test_logits_of_the_samples_come_before_those_of_the_head():
    train, head = random()
    logits = 2 * head(train.features).detach()
    own = FeatureSet(train.features, train.labels, 5, logits)
    assert ViM.fit(own, head, rank=4).alpha == pytest.approx(2 * ViM.fit(train, head, rank=4).alpha)


def test_scale_of_the_residual_is_bounded_in_collapse():
    means = 10 * torch.eye(8, **F64)[:4]
    y = torch.arange(40) % 4
    head = linear(means / 10)
    scorer = ViM.fit(FeatureSet(means[y], y, 4), head, rank=4)
    assert scorer.alpha == pytest.approx(10 / (1e-6 * 10))  # 1e-6 of the length, not 1e-16
    noise = 1e-3 * torch.randn(40, 8, generator=torch.Generator().manual_seed(0), **F64)
    near = ViM.fit(FeatureSet(means[y] + noise, y, 4), head, rank=4)
    assert near.alpha < 1e4  # far from collapse the ratio stands as it is
    outside = torch.zeros(1, 8, **F64).index_fill(1, torch.tensor([7]), 1.0)
    assert (scorer(means[0] + outside) > scorer(means).max()).all()


def test_rows_that_sum_to_rounding_have_a_finite_origin():
    """float32 rows of a simplex: the last singular value is rounding, not a direction."""
    K, D = 10, 64
    simplex = torch.linalg.qr(torch.randn(D, K, generator=torch.Generator().manual_seed(1)))[0].T
    rows = (simplex - simplex.mean(0)).float()
    head = nn.Linear(D, K)
    head.weight.data.copy_(rows)
    head.bias.data.fill_(1.0)  # along the direction that the rows lack
    assert origin(head, "ViM", D).norm() < 1e-4
