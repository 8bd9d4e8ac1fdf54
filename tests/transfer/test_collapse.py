"""Collapse scores: closed forms, the metrics they are, invariances, limits, a bound that holds."""

import itertools
import math

import pytest
import torch

from ncmethods import frames, metrics
from ncmethods._core import InputError
from ncmethods.features import FeatureSet
from ncmethods.stats import ClassStats
from ncmethods.transfer.collapse import cdnv, few_shot_cdnv, nc1, vci

F64 = torch.float64
ALL = (nc1, vci, cdnv, lambda stats: few_shot_cdnv(stats, 5))


def blobs(sizes=(40, 40, 40, 40), D=6, seed=0, spread=1.0):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    means = torch.randn(len(sizes), D, generator=g, dtype=F64)
    return FeatureSet(
        means[y] + spread * torch.randn(len(y), D, generator=g, dtype=F64), y, len(sizes)
    )


def frame_with_noise(C=4, D=6, sigma=0.5):
    """Unit simplex ETF with points μ_c ± √D σ e_d: exactly isotropic within-class covariance."""
    means = frames.simplex_etf(C, D, generator=torch.Generator().manual_seed(0)).double()
    steps = torch.eye(D, dtype=F64) * D**0.5 * sigma
    x = (means[:, None] + torch.cat((steps, -steps))).flatten(0, 1)
    return FeatureSet(x, torch.arange(C).repeat_interleave(2 * D), C)


@pytest.mark.parametrize(("C", "D", "sigma"), [(4, 6, 0.5), (3, 2, 0.1), (10, 32, 2.0)])
def test_golden_frame_with_isotropic_noise(C, D, sigma):
    stats = frame_with_noise(C, D, sigma).stats
    s = sigma**2 * (C - 1)
    tol = {"rel": 2e-6}  # of frames, which are float32
    assert float(nc1(stats)) == pytest.approx(-s * (C - 1) / C, **tol)
    assert float(vci(stats)) == pytest.approx(-s / (1 + s), **tol)
    assert float(cdnv(stats)) == pytest.approx(-D * s / (2 * C), **tol)
    for n in (1, 5, 100):
        want = -4 * (1 + n**-0.5) ** 2 * (C - 1) * D * s / (2 * C)
        assert float(few_shot_cdnv(stats, n)) == pytest.approx(want, **tol)
    if C == 4:
        found = [float(f(stats)) for f in (nc1, vci, cdnv)]
        assert found == pytest.approx([-0.5625, -0.4285714, -0.5625], rel=2e-6)


@pytest.mark.parametrize("sizes", [(40, 40, 40, 40), (90, 3, 1, 20), (25, 0, 31, 7)])
def test_are_the_metrics_negated(sizes):
    data = blobs(sizes)
    pairs = ((nc1, metrics.nc1_pinv), (vci, metrics.vci), (cdnv, metrics.cdnv))
    for score, metric in pairs:
        for stats in (data.stats, data.frozen):
            torch.testing.assert_close(score(stats), -metric(data.stats), rtol=1e-12, atol=0)
    plain = ClassStats(4, 6, scatter=False).update(data.features, data.labels)
    torch.testing.assert_close(cdnv(plain), cdnv(data.stats), rtol=1e-12, atol=0)


def test_few_shot_bound_is_its_formula():
    data = blobs((30, 5, 0, 17, 1))
    x, y, n = data.features, data.labels, 3
    found = [c for c in range(5) if bool((y == c).any())]
    mu = {c: x[y == c].mean(0) for c in found}
    v = {c: float((x[y == c] - mu[c]).square().sum(1).mean()) for c in found}
    total = sum(
        ((2 + n**-0.5) * v[i] ** 0.5 + (v[j] / n) ** 0.5) ** 2
        / float((mu[i] - mu[j]).square().sum())
        for i, j in itertools.permutations(found, 2)
    )
    assert float(few_shot_cdnv(data.stats, n)) == pytest.approx(-total / len(found), rel=1e-12)


def test_few_shot_bound_over_several_tiles(monkeypatch):
    data = blobs((4,) * 23)
    want = few_shot_cdnv(data.stats, 2)
    monkeypatch.setattr("ncmethods.metrics._tiles.TILE", 7)
    torch.testing.assert_close(few_shot_cdnv(data.stats, 2), want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("shots", [1, 4])
def test_few_shot_bound_holds(shots):
    """Draws of the estimated means and of test samples, from heavy-tailed unequal classes."""
    g = torch.Generator().manual_seed(0)
    means = 12 * torch.eye(3, dtype=F64)
    scale = torch.tensor([0.2, 1.0, 2.0], dtype=F64)

    def draw(c, n):
        wild = torch.rand(n, 1, generator=g, dtype=F64) ** -0.25
        return means[c] + scale[c] * wild * torch.randn(n, 3, generator=g, dtype=F64)

    y = torch.arange(3).repeat_interleave(20000)
    x = torch.cat([draw(c, 20000) for c in range(3)])
    bound = -float(few_shot_cdnv(FeatureSet(x, y, 3).stats, shots))
    errors = []
    for _ in range(30):
        centres = torch.stack([draw(c, shots).mean(0) for c in range(3)])
        errors.append(float((torch.cdist(x, centres).argmin(1) != y).double().mean()))
    assert 1e-4 < sum(errors) / 30 < bound < 1


@pytest.mark.parametrize("score", ALL)
def test_invariances(score):
    data = blobs()
    want = score(data.stats)
    Q = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(2), dtype=F64))[0]
    moved = FeatureSet(5 * data.features @ Q + 30, 3 - data.labels, 4)
    torch.testing.assert_close(score(moved.stats), want, rtol=1e-9, atol=0)
    gap = FeatureSet(data.features, 2 * data.labels, 8)
    torch.testing.assert_close(score(gap.stats), want, rtol=1e-12, atol=0)
    halves = [
        ClassStats(4, 6).update(data.features[r], data.labels[r])
        for r in (slice(0, 70), slice(70, None))
    ]
    torch.testing.assert_close(score(halves[0] + halves[1]), want, rtol=1e-10, atol=0)


def test_vci_under_an_invertible_map_and_the_others_not():
    data = blobs()
    A = torch.randn(6, 6, generator=torch.Generator().manual_seed(3), dtype=F64)
    mapped = FeatureSet(data.features @ A, data.labels, 4)
    torch.testing.assert_close(vci(mapped.stats), vci(data.stats), rtol=1e-9, atol=0)
    assert abs(float(cdnv(mapped.stats) / cdnv(data.stats)) - 1) > 0.05


def test_pca_is_vci_of_principal_coordinates():
    data = blobs(D=9, seed=4)
    x = data.features - data.features.mean(0)
    V = torch.linalg.svd(x, full_matrices=False)[2][:3]
    want = -metrics.vci(FeatureSet(x @ V.T, data.labels, 4).stats)
    torch.testing.assert_close(vci(data.stats, pca=3), want, rtol=1e-9, atol=0)
    torch.testing.assert_close(vci(data.stats, pca=50), vci(data.stats))


def test_vci_saturates_with_fewer_samples_than_dimensions_and_pca_does_not():
    wide = blobs((10,) * 4, D=100, spread=5.0)
    assert float(vci(wide.stats)) == pytest.approx(0, abs=1e-6)
    assert float(vci(wide.stats, pca=5)) < -0.3


def test_collapsed_constant_and_undefined():
    y = torch.arange(12) % 3
    one_hot = FeatureSet(torch.eye(3, dtype=F64)[y], y, 3)
    for score in ALL:
        assert float(score(one_hot.stats)) == pytest.approx(0, abs=1e-14)
    constant = FeatureSet(torch.full((12, 3), 7.0), y, 3)
    assert nc1(constant.stats).isnan()
    assert float(vci(constant.stats)) == -1
    assert cdnv(constant.stats).isnan()
    # Two classes share a mean: nothing tells them apart.
    x = torch.tensor([[1.0], [-1.0], [1.0], [-1.0], [5.0], [7.0]], dtype=F64)
    shared = FeatureSet(x, torch.arange(6) // 2, 3)
    assert float(cdnv(shared.stats)) == -math.inf
    assert float(few_shot_cdnv(shared.stats, 2)) == -math.inf
    assert nc1(shared.stats).isfinite()
    singles = FeatureSet(torch.randn(3, 3, dtype=F64), torch.arange(3), 3)
    for score in ALL:
        assert score(singles.stats).isnan()
        with pytest.raises(InputError, match="at least two"):
            score(FeatureSet(x, torch.zeros(6, dtype=torch.int64), 3).stats)
    with pytest.raises(InputError, match="shots"):
        few_shot_cdnv(shared.stats, 0)
