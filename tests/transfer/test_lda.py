"""LDA and SFDA: the authors' code run once, scikit-learn, limits, bad input."""

import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ncmethods._core import InputError
from ncmethods.features import FeatureSet
from ncmethods.transfer.lda import lda, sfda

F64 = torch.float64


def waves(N, D, K, scale=1.0):
    """Features that need no generator: the same on every machine."""
    i, d = torch.arange(N, dtype=F64)[:, None], torch.arange(D, dtype=F64)
    y = torch.arange(N) * 7 % 11 % K
    x = torch.sin(1.7 * (i + 1) * (d + 1) + 0.3 * i)
    return FeatureSet(scale * (x + torch.cos(2.3 * y.double()[:, None] * (d + 1))), y, K)


# SFDA().fit(x, y).predict_proba(x) and SFDA_Score(x, y), with the shrinkage that it printed, of
# github.com/TencentARC/SFDA/blob/3b7edf76bd682acb1eba4f4c5eb7ea7f3f7f6c59/metrics.py
AUTHORS = [
    ((60, 5, 4, 1.0), 0.03032148758015255, 0.8589938275453757, 0.6172497533315048),
    ((60, 5, 4, 0.3), 0.730058304313288, 0.8506524925732645, 0.6042145801441786),
    ((60, 5, 4, 3.0), 1e-10, 0.8590037393127822, 0.6183622816529816),
    ((90, 20, 6, 1.0), 0.07426234196389692, 0.9955239972230321, 0.9294099894626124),
]


@pytest.mark.parametrize(("shape", "shrinkage", "first", "second"), AUTHORS)
def test_are_the_authors_values(shape, shrinkage, first, second):
    data = waves(*shape)
    assert float(lda(data, shrinkage=shrinkage)) == pytest.approx(first, rel=1e-10)
    assert float(sfda(data, shrinkage=shrinkage)) == pytest.approx(second, rel=1e-10)
    # Theirs takes three steps of a power iteration for σ_max: close to it from below.
    assert float(lda(data)) == pytest.approx(first, rel=1e-3)
    assert float(sfda(data)) == pytest.approx(second, rel=1e-3)


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_default_shrinkage(scale):
    data = waves(60, 5, 4, scale)
    x, y = data.features.numpy(), data.labels.numpy()
    within = sum((y == c).mean() * np.cov(x[y == c].T, bias=True) for c in range(4))
    lam = max(np.exp(-5 * np.linalg.eigvalsh(within)[-1]), 1e-10)
    for score in (lda, sfda):
        assert score(data) == pytest.approx(float(score(data, shrinkage=lam)), rel=1e-12)


@pytest.mark.parametrize("shrinkage", [0.0, 0.2, 0.9])
def test_lda_is_scikit_learns(shrinkage):
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    data = waves(90, 7, 5)
    x, y = data.features.numpy(), data.labels.numpy()
    rule = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(x, y)
    want = rule.predict_proba(x)[np.arange(90), y].mean()
    assert float(lda(data, shrinkage=shrinkage)) == pytest.approx(want, rel=1e-9)


def test_sfda_is_two_scikit_learn_rules():
    """Both steps in numpy, with unequal classes."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    data = waves(70, 4, 5)
    x, y = data.features.numpy(), data.labels.numpy()
    rule = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.3)
    soft = np.exp(rule.fit(x, y).predict_proba(x))
    q = (soft / soft.sum(1, keepdims=True))[np.arange(70), y][:, None]
    means = np.stack([x[y == c].mean(0) for c in range(5)])
    others = np.stack([np.delete(means, c, 0).mean(0) for c in range(5)])
    mixed = q * x + (1 - q) * others[y]
    want = rule.fit(mixed, y).predict_proba(mixed)[np.arange(70), y].mean()
    assert float(sfda(data, shrinkage=0.3)) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("score", [lda, sfda])
def test_invariances_gaps_and_chunks(score, monkeypatch):
    data = waves(90, 6, 4)
    want = score(data)
    Q = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=F64))[0]
    moved = FeatureSet(data.features @ Q + 20, 3 - data.labels, 4)
    torch.testing.assert_close(score(moved), want, rtol=1e-9, atol=0)
    gap = FeatureSet(data.features, 3 * data.labels + 1, 12)
    torch.testing.assert_close(score(gap), want, rtol=1e-11, atol=0)
    more = torch.cat((data.features, data.features[:5] + 9))
    ignored = FeatureSet(more, torch.cat((data.labels, torch.full((5,), -1))), 4)
    torch.testing.assert_close(score(ignored), want, rtol=1e-11, atol=0)
    float32 = FeatureSet(data.features.float(), data.labels, 4)
    torch.testing.assert_close(score(float32), want, rtol=1e-5, atol=0)
    monkeypatch.setattr(sys.modules["ncmethods.transfer.lda"], "_ROWS", 13)
    torch.testing.assert_close(score(data), want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("score", [lda, sfda])
def test_analytic_limits(score):
    y = torch.arange(40) % 4
    noise = torch.randn(10, 5, generator=torch.Generator().manual_seed(1), dtype=F64)
    same = FeatureSet(noise.repeat_interleave(4, 0), y, 4)  # every class has the same rows
    assert float(score(same)) == pytest.approx(1 / 4, abs=1e-9)
    far = FeatureSet(noise.repeat_interleave(4, 0) + 1e3 * torch.eye(5, dtype=F64)[y], y, 4)
    assert float(score(far)) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("score", [lda, sfda])
def test_degenerate_features(score):
    y = torch.arange(12) % 3
    collapsed = FeatureSet(torch.eye(3)[y], y, 3)
    assert float(score(collapsed)) == pytest.approx(1, abs=1e-12)
    constant = FeatureSet(torch.full((12, 3), 0.1), y, 3)
    assert float(score(constant)) == pytest.approx(1 / 3, abs=1e-12)
    dead = F.pad(waves(60, 5, 4).features, (0, 2))
    dead = FeatureSet(dead, waves(60, 5, 4).labels, 4)
    assert float(score(dead, shrinkage=0.0)) == pytest.approx(
        float(score(waves(60, 5, 4), shrinkage=0.0)), rel=1e-9
    )
    single = FeatureSet(waves(12, 3, 2).features, torch.tensor([0] + [1] * 11), 2)
    assert 0 < float(score(single)) <= 1


def test_saturates_and_pca_does_not():
    g = torch.Generator().manual_seed(0)
    noise = FeatureSet(5 * torch.randn(40, 100, generator=g, dtype=F64), torch.arange(40) % 4, 4)
    assert float(lda(noise)) > 0.999
    assert float(lda(noise, pca=3)) < 0.7


@pytest.mark.parametrize("score", [lda, sfda])
def test_bad_input(score):
    data = waves(20, 3, 3)
    with pytest.raises(InputError, match="shrinkage"):
        score(data, shrinkage=2.0)
    with pytest.raises(InputError, match="two classes"):
        score(FeatureSet(data.features, torch.zeros(20, dtype=torch.int64), 3))
    with pytest.raises(InputError, match="samples"):
        score(data.stats)
    with pytest.raises(InputError, match="pca"):
        score(data, pca=0)
