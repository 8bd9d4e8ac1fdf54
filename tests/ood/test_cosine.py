"""PrototypeCosine and ETFAngle: golden values, scikit-learn's cosines, invariances, edges; NC5."""

import math

import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity
from torch import nn

from ncmethods import frames, heads, metrics
from ncmethods._core import InputError
from ncmethods.features import FeatureSet
from ncmethods.ood.cosine import ETFAngle, PrototypeCosine
from ncmethods.stats import ClassStats

F64 = {"dtype": torch.float64}


def blobs(n=20, K=4, D=6, offset=2.0):
    rng = torch.Generator().manual_seed(0)
    y = torch.arange(n * K) % K
    means = 3 * torch.randn(K, D, generator=rng, **F64)
    return FeatureSet(means[y] + torch.randn(n * K, D, generator=rng, **F64) + offset, y, K)


def queries(n=25, D=6):
    return 4 * torch.randn(n, D, generator=torch.Generator().manual_seed(9), **F64)


def linear(W):
    head = nn.Linear(W.shape[1], len(W)).double()
    head.weight.data.copy_(W)
    return head


# --- ETFAngle ---------------------------------------------------------------------------------


def test_etf_angle_golden_values():
    W = frames.simplex_etf(5, 7, dtype=torch.float64)
    outside = torch.linalg.svd(W)[2][-1]  # orthogonal to the span of the rows
    angle = ETFAngle.fit(head=linear(3 * W))  # lengths of rows play no part
    h = torch.stack((2 * W[3], -5 * W[3], outside, torch.zeros(7, **F64)))
    torch.testing.assert_close(angle(h), torch.tensor([-1, -0.25, 0, 0], **F64), atol=1e-12, rtol=0)
    flat = ETFAngle.fit(head=linear(W), temperature=1.0)
    want = torch.tensor([-math.log(math.e + 4 * math.exp(-1 / 4)), -math.log(5)], **F64)
    torch.testing.assert_close(flat(h[[0, 2]]), want)
    assert float(want[0]) == pytest.approx(-1.76, abs=0.005)
    assert float(want[1]) == pytest.approx(-1.61, abs=0.005)


def test_etf_angle_is_scikit_learns_cosine_and_tends_to_the_largest():
    rng = torch.Generator().manual_seed(1)
    W, h = torch.randn(4, 6, generator=rng, **F64), queries()
    cosines = torch.from_numpy(cosine_similarity(h, W))
    torch.testing.assert_close(ETFAngle.fit(head=linear(W))(h), -cosines.amax(1))
    for T in (0.05, 0.5):
        want = -T * torch.log(torch.exp(cosines / T).sum(1))
        torch.testing.assert_close(ETFAngle.fit(head=linear(W), temperature=T)(h), want)
    cold = ETFAngle.fit(head=linear(W), temperature=1e-4)
    torch.testing.assert_close(cold(h), -cosines.amax(1), atol=1e-3, rtol=0)


def test_etf_angle_sees_directions_only():
    head, h = heads.etf_head(6, 4, neck=None).double(), queries()
    for T in (None, 0.1):
        angle = ETFAngle.fit(head=head, temperature=T)
        torch.testing.assert_close(angle(7 * h), angle(h))
        torch.testing.assert_close(angle(h, torch.zeros(25, 4)), angle(h))  # logits play no part
    assert (ETFAngle.fit(head=head)(h) <= 1 / 3 + 1e-12).all()  # a simplex leaves no larger angle


def test_etf_angle_errors():
    with pytest.raises(InputError, match="needs the rows"):
        ETFAngle.fit()
    with pytest.raises(InputError, match="needs the rows"):
        ETFAngle.fit(blobs())
    with pytest.raises(InputError, match="as wide as the features"):
        ETFAngle.fit(blobs(), nn.Linear(5, 4))
    with pytest.raises(InputError, match="temperature"):
        ETFAngle.fit(head=nn.Linear(5, 4), temperature=0.0)
    with pytest.raises(InputError, match="D = 6"):
        ETFAngle.fit(head=nn.Linear(6, 4))(torch.ones(2, 1))


# --- PrototypeCosine --------------------------------------------------------------------------


def test_prototype_cosine_golden_values():
    e1, e2 = torch.eye(3, **F64)[:2]
    x = torch.stack((e1 + e2 / 2, e1 - e2 / 2, -e1, -e1))
    for offset in (0.0, 10 * e1 - e2):  # seen from the mean: a shift of all changes nothing
        score = PrototypeCosine.fit(FeatureSet(x + offset, torch.tensor([0, 0, 1, 1]), 2))
        h = torch.stack((4 * e1, -e1, e2, 3 * e1 + 4 * e2, 0 * e1)) + offset
        torch.testing.assert_close(score(h), torch.tensor([-1, -1, 0, -0.6, 0], **F64))


def test_prototype_cosine_is_scikit_learns():
    train, h = blobs(), queries()
    means = torch.stack([train.features[train.labels == c].mean(0) for c in range(4)])
    mean = train.features.mean(0)
    want = -cosine_similarity(h - mean, means - mean).max(1)
    torch.testing.assert_close(PrototypeCosine.fit(train)(h), torch.from_numpy(want))
    plain = PrototypeCosine.fit(train, centre=False)
    torch.testing.assert_close(plain(h), torch.from_numpy(-cosine_similarity(h, means).max(1)))
    torch.testing.assert_close(plain(9 * h), plain(h))


def test_prototype_cosine_of_moments_and_absent_classes():
    train, h = blobs(), queries()
    want = PrototypeCosine.fit(train)(h)
    thin = ClassStats(6, 6, scatter=False).update(train.features, train.labels)  # 2 without samples
    torch.testing.assert_close(PrototypeCosine.fit(thin)(h), want)
    near = PrototypeCosine.fit(train)
    mean = train.features.mean(0)
    torch.testing.assert_close(near(mean + 3 * (h - mean)), want)


def test_prototype_cosine_without_directions():
    """Class means that agree to rounding, and a feature at the mean, have no angle: 0."""
    train, h = blobs(), queries()
    x = train.features[::4]
    same = FeatureSet(x.repeat_interleave(3, 0), torch.arange(60) % 3, 3)
    torch.testing.assert_close(PrototypeCosine.fit(same)(h), torch.zeros(25, **F64))
    score = PrototypeCosine.fit(train)
    assert float(score(score.center[None])) == 0
    rows = torch.cat((score.center[None], h)).requires_grad_()
    score(rows).sum().backward()
    assert rows.grad.isfinite().all()


# --- NC5, the set metric ----------------------------------------------------------------------


def test_nc5_golden_values():
    W = frames.simplex_etf(5, 7, dtype=torch.float64)
    stats = ClassStats(5, 7).update(W, torch.arange(5))
    assert float(metrics.nc5(stats, 4 * W[1])) == pytest.approx(2 / 5, rel=1e-12)
    assert float(metrics.nc5(stats, torch.linalg.svd(W)[2][-1])) == pytest.approx(0, abs=1e-12)
    rng = torch.Generator().manual_seed(2)
    ood = torch.randn(30, 6, generator=rng, **F64).mean(0)
    train = blobs()
    want = abs(cosine_similarity(train.stats.means, ood[None])).mean()
    assert float(metrics.nc5(train.stats, ood)) == pytest.approx(want, rel=1e-12)
