"""GBC: closed forms, Google's values, a loop over pairs, tiles, limits."""

import math
import sys

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch.utils._python_dispatch import TorchDispatchMode

from ncmethods._core import InputError
from ncmethods.features import FeatureSet
from ncmethods.frames import simplex_etf
from ncmethods.stats import ClassStats
from ncmethods.transfer.gbc import Gaussians, gaussians, gbc, overlaps

F64 = torch.float64
KINDS = ("diagonal", "spherical")


def blobs(N=300, K=5, D=8, seed=0, offset=0.0, dtype=F64):
    rng = torch.Generator().manual_seed(seed)
    y = (K * torch.rand(N, generator=rng).square()).long()
    spread = 0.3 + torch.rand(K, D, generator=rng, dtype=F64)
    means = torch.randn(K, D, generator=rng, dtype=F64)
    x = offset + means[y] + spread[y] * torch.randn(N, D, generator=rng, dtype=F64)
    return FeatureSet(x.to(dtype), y, K)


def naive(x, y, kind="diagonal", floor=1e-4):
    """Each pair as scalar Gaussians, coordinate by coordinate: ∫√(pq) is a product over them."""
    x, y = np.asarray(x), np.asarray(y)
    total = 0.0
    for a in np.unique(y):
        for b in np.unique(y):
            if a == b:
                continue
            u, v = (np.maximum(x[y == c].var(0), floor) for c in (a, b))
            if kind == "spherical":
                u, v = np.full_like(u, u.mean()), np.full_like(v, v.mean())
            gap = x[y == a].mean(0) - x[y == b].mean(0)
            each = np.sqrt(2 * np.sqrt(u * v) / (u + v)) * np.exp(-(gap**2) / (4 * (u + v)))
            total += float(np.prod(each))
    return -total


@pytest.mark.parametrize(("C", "square"), [(3, 0.25), (5, 0.1), (10, 1.0)])
@pytest.mark.parametrize("kind", KINDS)
def test_golden_equal_spheres_on_an_etf(C, square, kind):
    """Sheet, check 8: −C(C − 1) exp(−C/(4(C − 1)σ²))."""
    D = C
    arm = math.sqrt(D * square) * torch.eye(D, dtype=F64)
    x = torch.cat([m + s * arm for m in simplex_etf(C, D, dtype=F64) for s in (1, -1)])
    data = FeatureSet(x, torch.arange(C).repeat_interleave(2 * D), C)
    want = -C * (C - 1) * math.exp(-C / (4 * (C - 1) * square))
    assert float(gbc(data, components=None, covariance=kind)) == pytest.approx(want, rel=1e-10)
    assert float(gbc(data, covariance=kind)) == pytest.approx(want, rel=1e-10)  # isotropic
    if (C, square) == (3, 0.25):
        assert want == pytest.approx(-1.3387810, abs=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_is_the_loop_over_pairs(kind, seed):
    data = blobs(seed=seed)
    value = gbc(data, components=None, covariance=kind)
    assert value.dtype == F64
    assert value.shape == ()
    assert float(value) == pytest.approx(naive(data.features, data.labels, kind), rel=1e-10)


# google-research/google-research, stable_transfer/transferability/gbc.py at 1d4d2f1, run once on
# these features (in numpy): https://github.com/google-research/google-research/blob/
# 1d4d2f1aa6f2883a790d2ae46a6ee8ab150d8f31/stable_transfer/transferability/gbc.py
GOOGLE = [
    (200, 5, 12, -6.250907750592084, -6.633667313484294),
    (500, 7, 40, -9.914251394384399, -9.92623101038582),
]


@pytest.mark.parametrize(("N", "K", "D", "diagonal", "spherical"), GOOGLE)
def test_is_googles_where_that_is_right(N, K, D, diagonal, spherical):
    """Theirs adds the logarithms of a spherical covariance once instead of D times."""
    i, j = torch.arange(N)[:, None].double(), torch.arange(D)[None].double()
    y = (torch.arange(N) ** 2 // 3 + torch.arange(N)) % K
    x = torch.sin(1.7 * i + 0.9 * j * j + 0.3 * i * j) + 0.5 * torch.cos(
        2.1 * y.double()[:, None] * (j + 1)
    )
    data = FeatureSet(x, y, K)
    assert float(gbc(data, components=None)) == pytest.approx(diagonal, rel=1e-10)
    ours = float(gbc(data, components=None, covariance="spherical"))
    assert spherical < ours  # their classes of unlike size overlap too much
    means, variances = gaussians(data)
    v = variances.clamp(min=1e-4).mean(1)
    both = (v[:, None] + v) / 2
    once = (both.log() - (v[:, None].log() + v.log()) / 2) / 2
    theirs = torch.exp(-(torch.cdist(means, means).square() / both / 8 + once)).fill_diagonal_(0)
    assert -float(theirs.sum()) == pytest.approx(spherical, rel=1e-10)


def test_components_are_scikit_learns():
    data = blobs(D=20)
    z = PCA(4).fit_transform(data.features.numpy())
    for kind in KINDS:
        got = gbc(data, components=4, covariance=kind)
        assert float(got) == pytest.approx(naive(z, data.labels, kind), rel=1e-9)
    full = PCA(20).fit_transform(data.features.numpy())  # a rotation, where D ≤ 64
    assert float(gbc(data)) == pytest.approx(naive(full, data.labels), rel=1e-9)


# --- pairs in tiles -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_change_nothing(kind, monkeypatch):
    data = blobs(N=400, K=37)
    want = gbc(data, components=None, covariance=kind)
    monkeypatch.setattr(
        sys.modules["ncmethods.transfer.gbc"], "_ENTRIES", 8 * 9
    )  # tiles of 3 × 3 classes
    monkeypatch.setattr("ncmethods.metrics._tiles.TILE", 5)
    got = gbc(data, components=None, covariance=kind)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


class Largest(TorchDispatchMode):
    """Record the elements of the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize("kind", KINDS)
def test_memory_of_pairs_is_that_of_a_tile(kind, monkeypatch):
    monkeypatch.setattr(sys.modules["ncmethods.transfer.gbc"], "_ENTRIES", 2**14)
    monkeypatch.setattr("ncmethods.metrics._tiles.TILE", 64)
    rng = torch.Generator().manual_seed(0)
    K, D = 300, 16
    many = Gaussians(
        torch.randn(K, D, generator=rng, dtype=F64), 1 + torch.rand(K, D, generator=rng, dtype=F64)
    )
    with Largest() as seen:
        total = sum(o.sum() * (1 if a == b else 2) for a, b, o in overlaps(many, kind))
    assert seen.largest <= 2**14
    assert 0 < float(total) < K * (K - 1)


# --- limits, labels, moments --------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_classes_that_coincide_and_classes_far_apart(kind):
    y = torch.arange(40) % 4
    same = FeatureSet(torch.ones(40, 6, dtype=F64) * 1000.1, y, 4)
    assert float(gbc(same, covariance=kind)) == pytest.approx(-12, rel=1e-12)
    apart = FeatureSet(torch.eye(4)[y], y, 4)
    assert -1e-300 < float(gbc(apart, covariance=kind)) <= 0
    near = FeatureSet(0.05 * torch.eye(4)[y], y, 4)  # ‖Δμ‖² = 50 floors: exp(−50/8)
    value = gbc(near, components=None, covariance=kind)
    assert float(value) == pytest.approx(-12 * math.exp(-50 / 8), rel=1e-6)
    wider = gbc(near, components=None, covariance=kind, floor=1e-3)
    assert float(wider) == pytest.approx(-12 * math.exp(-5 / 8), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_what_changes_nothing(kind):
    data = blobs(N=600)
    want = float(gbc(data, components=5, covariance=kind))
    Q = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(3), dtype=F64))[0]
    for x in (data.features @ Q + 1000, data.features):
        twice = FeatureSet(x.repeat(2, 1), data.labels.repeat(2), 5)
        assert float(gbc(twice, components=5, covariance=kind)) == pytest.approx(want, rel=1e-9)
    renamed = FeatureSet(data.features, 4 - data.labels, 5)
    assert float(gbc(renamed, components=5, covariance=kind)) == pytest.approx(want, rel=1e-12)
    far = FeatureSet((data.features + 1000).float(), data.labels, 5)
    assert float(gbc(far, components=5, covariance=kind)) == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_gaps_and_single_samples(kind):
    data = blobs()
    x = torch.cat((data.features, data.features[:1] + 1, data.features[:3] * torch.nan))
    y = torch.cat((2 * data.labels, torch.tensor([11]), torch.full((3,), -1)))
    got = gbc(FeatureSet(x, y, 15), components=None, covariance=kind)
    assert float(got) == pytest.approx(naive(x[:301], y[:301], kind), rel=1e-10)
    alone = gbc(FeatureSet(data.features[:8], torch.arange(8), 8), covariance=kind)
    assert float(alone) <= 0


@pytest.mark.parametrize("kind", KINDS)
def test_moments_and_samples_give_one_value(kind):
    data = blobs()
    x, y = data.features, data.labels
    parts = [
        ClassStats(5, 8, scatter=False, variances=True).update(x[i::3], y[i::3]) for i in range(3)
    ]
    want = gbc(data, components=None, covariance=kind)
    whole = sum(parts)
    for given in (whole, whole.freeze()):
        got = gbc(given, components=None, covariance=kind)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=0)


def test_what_cannot_be_scored():
    data = blobs()
    with pytest.raises(InputError, match=r"components=None"):
        gbc(ClassStats(5, 8, variances=True).update(data.features, data.labels))
    with pytest.raises(InputError, match=r"variances=True"):
        gbc(data.stats, components=None)
    with pytest.raises(InputError, match="at least two need samples, got 1"):
        gbc(FeatureSet(data.features, data.labels * 0, 5))
    with pytest.raises(InputError, match="no class statistics"):
        gbc(FeatureSet(data.features, None, 5))
    with pytest.raises(InputError, match="floor must be positive"):
        gbc(data, floor=0.0)
    with pytest.raises(InputError, match="covariance 'full'"):
        gbc(data, covariance="full")
    with pytest.raises(InputError, match="at least 1"):
        gbc(data, components=0)
