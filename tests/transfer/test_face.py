"""FaCe-style: the collapsed ETF, closed forms, a loop in numpy, limits, the pool."""

import math
import sys

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from ncmethods import metrics
from ncmethods._core import InputError
from ncmethods.features import FeatureSet
from ncmethods.frames import simplex_etf
from ncmethods.stats import ClassStats
from ncmethods.transfer.face import face, face_pool

F64 = torch.float64
KINDS = ("diagonal", "spherical")


def blobs(N=300, K=5, D=8, seed=0, dtype=F64):
    rng = torch.Generator().manual_seed(seed)
    y = (K * torch.rand(N, generator=rng).square()).long()
    spread = 0.3 + torch.rand(K, D, generator=rng, dtype=F64)
    means = torch.randn(K, D, generator=rng, dtype=F64)
    x = means[y] + spread[y] * torch.randn(N, D, generator=rng, dtype=F64)
    return FeatureSet(x.to(dtype), y, K)


def collapsed(C, D):
    y = torch.arange(5 * C) % C
    return FeatureSet(simplex_etf(C, D, dtype=F64)[y], y, C)


def naive(data, kind="diagonal", t=0.05, include_self=False, floor=1e-4):
    """Fairness by definition, and minus NC1 by a pseudo-inverse."""
    x, y = data.features.numpy(), data.labels.numpy()
    seen = np.unique(y)
    least = floor * x.var(0).mean()
    M = [x[y == c].mean(0) for c in seen]
    V = [np.maximum(x[y == c].var(0), least) for c in seen]
    if kind == "spherical":
        V = [np.full_like(v, v.mean()) for v in V]
    rows = []
    for k in range(len(seen)):
        each = [
            np.prod(
                np.sqrt(2 * np.sqrt(V[k] * V[j]) / (V[k] + V[j]))
                * np.exp(-((M[k] - M[j]) ** 2) / (4 * (V[k] + V[j])))
            )
            for j in range(len(seen))
            if include_self or j != k
        ]
        e = np.exp(np.array(each) / t)
        rows.append(entropy(e / e.sum()))
    R = np.stack(M) - np.mean(M, axis=0)
    within = sum((y == c).sum() / len(y) * np.cov(x[y == c].T, bias=True) for c in seen)
    pinv = np.linalg.pinv(R.T @ R / len(seen), rcond=1e-10, hermitian=True)
    return -float(np.trace(within @ pinv)) / len(seen), float(np.mean(rows))


@pytest.mark.parametrize(("C", "D"), [(3, 2), (4, 6), (10, 16)])
@pytest.mark.parametrize("kind", KINDS)
def test_golden_collapsed_etf(C, D, kind):
    """Sheet, check 9: C = 0, F = log(C − 1) without the class itself, which is the most."""
    data = collapsed(C, D)
    parts = face_pool.components(data)
    assert float(parts["collapse"]) == pytest.approx(0, abs=1e-12)
    assert float(parts["fairness"]) == pytest.approx(math.log(C - 1), rel=1e-12)
    assert float(face(data, covariance=kind)) == pytest.approx(math.log(C - 1), rel=1e-12)
    # With it the softmax is e^{1/t} against C − 1 ones.
    z = math.exp(1 / 0.05) + C - 1
    p = math.exp(1 / 0.05) / z
    want = -p * math.log(p) + (C - 1) / z * math.log(z)
    got = face(data, covariance=kind, include_self=True)
    assert float(got) == pytest.approx(want, rel=1e-6)
    assert want < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_fairness_alone_certifies_nothing(kind):
    """Classes that overlap completely have the fairness of collapsed ones; C tells them apart."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, generator=rng, dtype=F64)
    y = torch.arange(4).repeat_interleave(50)
    shifted = x.repeat(4, 1) + 1e-4 * simplex_etf(4, 6, dtype=F64)[y]
    parts = face_pool.components(FeatureSet(shifted, y, 4))
    assert float(parts["fairness"]) == pytest.approx(math.log(3), rel=1e-6)
    assert float(parts["collapse"]) < -1e6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("include_self", [False, True])
@pytest.mark.parametrize("t", [0.05, 1.0, 1e-4])
def test_is_the_loop_over_classes(kind, include_self, t):
    data = blobs()
    if t == 1e-4:  # numpy's exponentials overflow: the entropy of a hard maximum is 0
        value = face(data, temperature=t, covariance=kind, include_self=include_self, scale=1e3)
        want = naive(data, kind)[0]
        assert float(value) == pytest.approx(want, rel=1e-6)
        return
    C, F = naive(data, kind, t, include_self)
    assert (0.01 < F < math.log(5)) or (include_self and t == 0.05 and F > 1e-7)
    for scale in (1.0, 0.3):
        value = face(data, temperature=t, covariance=kind, include_self=include_self, scale=scale)
        assert value.dtype == F64
        assert float(value) == pytest.approx(C + scale * F, rel=1e-9)


def test_collapse_is_minus_nc1():
    data = blobs()
    parts = face_pool.components(data)
    torch.testing.assert_close(parts["collapse"], -metrics.nc1_pinv(data.stats))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("include_self", [False, True])
def test_tiles_change_nothing(kind, include_self, monkeypatch):
    data = blobs(N=400, K=37)
    want = face(data, covariance=kind, include_self=include_self)
    monkeypatch.setattr(sys.modules["ncmethods.transfer.gbc"], "_ENTRIES", 8)  # one pair at a time
    monkeypatch.setattr("ncmethods.metrics._tiles.TILE", 5)
    got = face(data, covariance=kind, include_self=include_self)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_what_changes_nothing():
    data = blobs()
    rng = torch.Generator().manual_seed(3)
    Q = torch.linalg.qr(torch.randn(8, 8, generator=rng, dtype=F64))[0]
    for kind in KINDS:
        want = face(data, covariance=kind)
        A = Q if kind == "spherical" else torch.eye(8, dtype=F64).flip(0)
        for x in (3 * data.features @ A + 1000, 1e-6 * data.features @ A):
            got = face(FeatureSet(x, 4 - data.labels, 5), covariance=kind)
            torch.testing.assert_close(got, want, rtol=1e-7, atol=0)
    single = FeatureSet(data.features.float(), data.labels, 5)
    torch.testing.assert_close(face(single), face(data), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_two_classes_gaps_and_single_samples(kind):
    data = blobs()
    two = FeatureSet(data.features, data.labels.clamp(max=1), 9)
    assert float(face(two, covariance=kind)) == pytest.approx(naive(two, kind)[0], rel=1e-9)
    x = torch.cat((data.features, data.features[:1] + 1, data.features[:3] * torch.nan))
    y = torch.cat((2 * data.labels, torch.tensor([11]), torch.full((3,), -1)))
    want = sum(naive(FeatureSet(x[:301], y[:301], 15), kind))
    assert float(face(FeatureSet(x, y, 15), covariance=kind)) == pytest.approx(want, rel=1e-9)


def test_where_there_is_nothing_to_say():
    y = torch.arange(40) % 4
    same = FeatureSet(torch.full((40, 6), 1000.1), y, 4)  # the means coincide
    assert face(same).isnan()
    assert float(face_pool.components(same)["fairness"]) == pytest.approx(math.log(3), rel=1e-12)
    alone = FeatureSet(blobs().features[:8], torch.arange(8), 8)  # no class has two samples
    assert face(alone).isnan()


def test_moments_and_samples_give_one_value():
    data = blobs()
    x, y = data.features, data.labels
    whole = sum(ClassStats(5, 8, variances=True).update(x[i::3], y[i::3]) for i in range(3))
    for given in (whole, whole.freeze()):
        torch.testing.assert_close(face(given), face(data), rtol=1e-9, atol=0)


def test_the_pool_scales_both_terms():
    pool = {"a": blobs(seed=0), "b": blobs(seed=1), "c": blobs(seed=2), "etf": collapsed(5, 8)}
    parts = {name: face_pool.components(data) for name, data in pool.items()}
    values = face_pool(pool)
    table = np.array([[float(p[c]) for c in ("collapse", "fairness")] for p in parts.values()])
    want = ((table - table.min(0)) / np.ptp(table, axis=0)).sum(1)
    np.testing.assert_allclose([float(v) for v in values.values()], want, rtol=1e-12)
    assert float(values["etf"]) == pytest.approx(2, rel=1e-12)
    for name, data in pool.items():
        assert float(face(data)) == pytest.approx(sum(map(float, parts[name].values())), rel=1e-12)
    with pytest.raises(InputError, match="at least two"):
        face_pool({"a": pool["a"]})


def test_what_cannot_be_scored():
    data = blobs()
    with pytest.raises(InputError, match=r"variances=True"):
        face(data.stats)
    with pytest.raises(InputError, match="scatter"):
        face(ClassStats(5, 8, scatter=False, variances=True).update(data.features, data.labels))
    with pytest.raises(InputError, match="at least two need samples, got 1"):
        face(FeatureSet(data.features, data.labels * 0, 5))
    for name in ("temperature", "floor"):
        with pytest.raises(InputError, match=f"{name} must be positive"):
            face(data, **{name: 0.0})
    with pytest.raises(InputError, match="covariance 'full'"):
        face(data, covariance="full")
