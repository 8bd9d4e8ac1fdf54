"""LogME: golden values, a dense maximisation of the evidence, invariances, collapse."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ncmethods._core import InputError
from ncmethods.features import FeatureSet
from ncmethods.stats import ClassStats
from ncmethods.transfer.logme import logme, logme_regression

F64 = torch.float64


def rng(seed):
    return torch.Generator().manual_seed(seed)


def blobs(N=60, D=5, K=3, seed=0, spread=1.0, offset=0.0, dtype=F64):
    g = rng(seed)
    y = torch.randint(K, (N,), generator=g)
    means = torch.randn(K, D, generator=g, dtype=F64)
    x = means[y] + spread * torch.randn(N, D, generator=g, dtype=F64) + offset
    return FeatureSet(x.to(dtype), y, K)


def dense(features, target):
    """Largest (1/N) log N(t | 0, F Fᵀ/α + I/β) over α and β: N × N matrices, many starts."""
    from scipy.optimize import minimize

    f, t = features.numpy(), target.numpy()
    N = len(t)

    def loss(log_variances):
        prior, noise = np.exp(log_variances)
        C = prior * f @ f.T + noise * np.eye(N)
        _, logdet = np.linalg.slogdet(C)
        return 0.5 * (N * math.log(2 * math.pi) + logdet + t @ np.linalg.solve(C, t)) / N

    starts = [(a, b) for a in (-6.0, -3.0, 0.0) for b in (-5.0, -2.0, 0.0)]
    bounds = [(-14, 6), (-14, 6)]
    found = [minimize(loss, s, bounds=bounds, tol=1e-13) for s in starts]
    found += [minimize(loss, min(found, key=lambda r: r.fun).x, method="Nelder-Mead", tol=1e-11)]
    return -min(r.fun for r in found)


def test_golden_value_between_what_others_stop_at():
    f = torch.tensor([[1, 0], [0, 1], [1, 1], [2, 1], [0, 2], [1, 3]], dtype=F64)
    data = FeatureSet(f, torch.tensor([0, 0, 1, 1, 2, 2]), 3)
    value = float(logme(data.stats))
    # tllib stops at −0.7200492, the LogME repository at −0.7206740.
    assert -0.7200493 <= value <= -0.7200467
    assert value == pytest.approx(-0.7200467526, abs=1e-10)
    # Class 0 has no signal: α → ∞.
    alone = logme_regression(f, (data.labels == 0).double())
    limit = 0.5 * math.log(6 / 2) - 0.5 - 0.5 * math.log(2 * math.pi)
    assert float(alone) == pytest.approx(limit, abs=1e-12)


@pytest.mark.parametrize(("N", "D", "spread"), [(60, 5, 1.0), (60, 5, 0.1), (40, 30, 2.0)])
def test_is_the_largest_evidence(N, D, spread):
    data = blobs(N, D, spread=spread)
    want = [dense(data.features, (data.labels == c).double()) for c in range(3)]
    assert float(logme(data.stats)) == pytest.approx(np.mean(want), abs=1e-6)


def test_more_dimensions_than_samples():
    """The evidence of fewer samples than dimensions, where least squares leaves nothing over."""
    data = blobs(24, 40)
    want = [dense(data.features, (data.labels == c).double()) for c in range(3)]
    assert float(logme(data.stats)) == pytest.approx(np.mean(want), abs=1e-6)
    targets = F.one_hot(data.labels).double()
    assert float(logme_regression(data.features, targets)) == pytest.approx(np.mean(want), abs=1e-6)


def test_regression_is_the_largest_evidence():
    g = rng(3)
    x = torch.randn(50, 6, generator=g, dtype=F64)
    t = x @ torch.randn(6, 2, generator=g, dtype=F64) + torch.randn(50, 2, generator=g, dtype=F64)
    want = np.mean([dense(x, column) for column in t.T])
    assert float(logme_regression(x, t)) == pytest.approx(want, abs=1e-6)
    assert logme_regression(x, t[:, 0]) == logme_regression(x, t[:, :1])


@pytest.mark.parametrize("offset", [0.0, 5.0, 1000.0])
def test_moments_are_enough(offset):
    data = blobs(80, 7, offset=offset)
    want = logme_regression(data.features, F.one_hot(data.labels, 3).double())
    torch.testing.assert_close(logme(data.stats), want, rtol=0, atol=1e-8)
    halves = [ClassStats(3, 7).update(x, y) for x, y in zip(
        data.features.split(31), data.labels.split(31), strict=True)]  # fmt: skip
    torch.testing.assert_close(logme(halves[0] + halves[1] + halves[2]), want, rtol=0, atol=1e-8)


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
def test_ill_conditioned_features_beside_an_svd(condition):
    """The same evidence from a singular value decomposition of F, which squares nothing."""
    data = blobs(300, 20, seed=5)
    x = data.features * torch.logspace(0, -math.log10(condition), 20, dtype=F64)
    U, S, _ = torch.linalg.svd(x, full_matrices=False)
    lam = torch.logspace(-18, 6, 20001, dtype=F64)
    p = lam[:, None] / (lam[:, None] + S.square())
    total = 0.0
    for c in range(3):
        t = (data.labels == c).double()
        xi = U.T @ t
        rest = (t - U @ xi).square().sum()
        f = ((rest + p @ xi.square()) / 300).log() - p.log().sum(1) / 300
        total += -0.5 * (math.log(2 * math.pi) + 1 + float(f.min())) / 3
    got = float(logme(FeatureSet(x, data.labels, 3).stats))
    assert got == pytest.approx(total, abs=1e-6)


def test_invariances():
    data = blobs(80, 6)
    want = logme(data.stats)
    Q = torch.linalg.qr(torch.randn(6, 6, generator=rng(2), dtype=F64))[0]
    for x in (
        data.features @ Q,
        F.pad(data.features, (0, 3)),
        10 * data.features,
        torch.cat((data.features, data.features), 1),
    ):
        torch.testing.assert_close(
            logme(FeatureSet(x, data.labels, 3).stats), want, rtol=0, atol=1e-11
        )
    named = FeatureSet(data.features, 2 - data.labels, 3)
    torch.testing.assert_close(logme(named.stats), want, rtol=0, atol=1e-12)
    gap = FeatureSet(data.features, data.labels * 2, 6)  # classes 1, 3, 5 without samples
    torch.testing.assert_close(logme(gap.stats), want, rtol=0, atol=1e-12)
    float32 = FeatureSet(data.features.float(), data.labels, 3)
    torch.testing.assert_close(logme(float32.stats), want, rtol=0, atol=1e-6)
    assert logme(data.frozen) == want


def test_better_features_have_a_higher_value():
    values = [float(logme(blobs(200, 8, spread=s).stats)) for s in (0.1, 0.5, 2.0, 10.0)]
    assert values == sorted(values, reverse=True)


def test_collapsed_features_are_finite_and_above_all_others():
    y = torch.arange(3).repeat_interleave(5)
    one_hot = torch.eye(3, dtype=F64)[y]
    exact = float(logme(FeatureSet(one_hot, y, 3).stats))
    assert math.isfinite(exact)
    noise = torch.randn(15, 3, generator=rng(1), dtype=F64)
    near = [float(logme(FeatureSet(one_hot + s * noise, y, 3).stats)) for s in (1e-8, 1e-3, 1e-1)]
    assert near[0] == pytest.approx(exact, abs=1e-6)
    assert exact > near[1] > near[2]
    # Within six digits of collapse the residual is still exact: its own formula, not 1 − Σ x².
    small = FeatureSet(one_hot + 1e-5 * noise, y, 3)
    direct = logme_regression(small.features, one_hot)
    torch.testing.assert_close(logme(small.stats), direct, rtol=0, atol=1e-6)


def test_degenerate_features():
    y = torch.arange(8) % 2
    constant = FeatureSet(torch.ones(8, 3, dtype=F64), y, 2)
    nothing = FeatureSet(torch.zeros(8, 3, dtype=F64), y, 2)
    limit = 0.5 * math.log(2) - 0.5 - 0.5 * math.log(2 * math.pi)
    assert float(logme(nothing.stats)) == pytest.approx(limit, abs=1e-12)
    assert limit <= float(logme(constant.stats)) < 0.1
    single = FeatureSet(blobs(8, 3).features, torch.tensor([0, 1, 1, 1, 1, 1, 1, 1]), 2)
    assert logme(single.stats).isfinite()
    one = FeatureSet(blobs(8, 3).features, torch.zeros(8, dtype=torch.int64), 2)
    assert logme(one.stats).isfinite()


def test_regression_targets():
    x = torch.randn(20, 3, generator=rng(0), dtype=F64)
    t = torch.randn(20, 2, generator=rng(1), dtype=F64)
    padded = torch.cat((t, torch.zeros(20, 1, dtype=F64)), 1)
    assert logme_regression(x, padded) == logme_regression(x, t)
    assert logme_regression(x, torch.zeros(20)).isnan()
    assert logme_regression(x, x[:, 0]).isfinite()  # fitted exactly
    with pytest.raises(InputError, match="targets must be"):
        logme_regression(x, t[:5])
    with pytest.raises(InputError, match="targets must be"):
        logme_regression(x, [1.0] * 20)
    with pytest.raises(InputError, match="finite"):
        logme_regression(x, t / 0)


def test_needs_a_scatter():
    stats = ClassStats(2, 3, scatter=False).update(torch.randn(8, 3), torch.arange(8) % 2)
    with pytest.raises(InputError, match="scatter"):
        logme(stats)
