"""Golden checks of the sheet (metrics_and_heads.md, §5) that no other file covers in full.

=====  =========================================================================================
check  where
=====  =========================================================================================
1–3    test_geometry.py; here for the other measures at collapse and the debiased forms
4      test_geometry.py, test_properties.py (every measure); here what NC5 reads instead
5–8    test_geometry.py; 5 (rank) and 8 (product) also test_more.py
9      test_more.py at K = 10; here for any K, and the Riesz energies
10     test_geometry.py
11     test_more.py for the simplex, the orthoplex, n = 5 and 8; here for every n
12     test_more.py at K = 4; here for any K, and at an angle
13     test_stats.py (any tree, any batch); here ≤ 1e-14, with empty classes and B = 1
14     test_stats.py, test_more.py; here the test collapse that it gives in closed form
15     test_stats.py (moments); here the measures in both weightings
16     test_stats.py, test_geometry.py, test_properties.py (every measure)
17     test_geometry.py; test_properties.py for every shift-invariant measure
18     test_geometry.py at 7 of 50; here the closed form for any K' of K
19     tests/heads/test_heads.py
20     test_regression.py
21     the guided heads (not a measure)
=====  =========================================================================================
"""

import math

import pytest
import torch

from ncmethods import metrics
from ncmethods.features import FeatureSet
from ncmethods.frames import orthogonal_frame, simplex_etf
from ncmethods.stats import ClassStats

f64 = torch.float64


def etf(K, D):
    return simplex_etf(K, D, dtype=f64, generator=torch.Generator().manual_seed(K))


def stats_of(features, labels, K=None):
    K = int(labels.max()) + 1 if K is None else K
    return ClassStats(K, features.shape[1]).update(features, labels)


def cross(means, sigma):
    """2D points per class, μ_k ± σ√D·e_j: Σ_W = σ²I exactly."""
    K, D = means.shape
    step = sigma * math.sqrt(D) * torch.eye(D, dtype=f64)
    features = (means[:, None] + torch.cat([step, -step])).reshape(-1, D)
    return features, torch.arange(K).repeat_interleave(2 * D)


@pytest.mark.parametrize(("K", "D"), [(2, 1), (3, 9), (10, 16)])
def test_1_every_measure_at_collapse(K, D):
    labels = torch.arange(K).repeat(3)
    stats = stats_of(4 * etf(K, D)[labels], labels)
    rows, W = stats.centered_means(), 0.3 * etf(K, D)
    found = {
        "debiased nc1": metrics.debiased_nc1(stats),
        "debiased ratio": metrics.debiased_trace_ratio(stats),
        "debiased cdnv": metrics.debiased_cdnv(stats),
        "max": metrics.angles(rows)["max"],
        "gram": metrics.gram_distance(rows, etf(K, K)),
        "seli": metrics.gram_distance(rows, metrics.seli(stats.counts)[1]),
        "energy": metrics.log_energy(rows)[1],
        "product": metrics.product_duality(W, rows),
        "spread": metrics.duality_spread(W, rows),
        "bias": metrics.bias_duality(W, None, stats.global_mean()),
        "test": metrics.strong_test_nc1(stats, stats),
    }
    for name, value in found.items():
        assert abs(float(value)) < 1e-12, name
    # A spread is a root, and arccos has no digits at 180°.
    assert float(metrics.angles(rows)["std"]) < 1e-7
    angle = math.degrees(math.acos(-1 / (K - 1)))
    assert float(metrics.min_angle(rows)) == pytest.approx(angle, abs=1e-9)
    assert float(metrics.debiased_angle(stats, 0, 1)) == pytest.approx(angle, abs=1e-5)
    margin = float(metrics.one_vs_rest_margin(rows))
    assert margin == pytest.approx(K / (K - 1), abs=1e-6)
    for rank in (metrics.stable_rank, metrics.participation_ratio, metrics.nuclear_rank):
        assert float(rank(stats.sigma_t)) == pytest.approx(K - 1, abs=1e-5)
    assert int(metrics.threshold_rank(stats.sigma_t)) == K - 1


@pytest.mark.parametrize(("K", "D", "r", "sigma"), [(10, 64, 5.0, 0.5), (4, 3, 3.0, 0.8)])
def test_2_debiased_forms(K, D, r, sigma):
    """With n = 2D per class: v = Dσ²·n/(n − 1) and e = v/n taken out of each squared norm.

    Σ_B has r²/(K − 1) on its span, and the Gram matrix of its rows loses e/K there.
    """
    stats = stats_of(*cross(r * etf(K, D), sigma))
    n = 2 * D
    v = D * sigma**2 * n / (n - 1)
    e, distance = v / n, 2 * K * r**2 / (K - 1)
    ratio = v / (r**2 - (1 - 1 / K) * e)
    assert float(metrics.debiased_trace_ratio(stats)) == pytest.approx(ratio, rel=1e-12)
    cdnv = v / (distance - 2 * e)
    assert float(metrics.debiased_cdnv(stats)) == pytest.approx(cdnv, rel=1e-12)
    # In the span of the means all is isotropic: k equal eigenvalues, of Σ_B less the error p.
    s, k, p, df = sigma**2 * n / (n - 1), K - 1, 1 / (n * K), K * (n - 1)
    eigenvalue = r**2 / k - D * s * p
    q, g = s * eigenvalue, 1 / eigenvalue
    q2 = df**2 / ((df - 1) * (df + 2)) * (1 - D / df) * s**2 * r**2 / k - D * s**3 * p
    bend = k * (k + 1) * p * (6 * q**2 * g**4 - 4 * q2 * g**3)
    nc1 = (k * q * g**2 - bend) / K
    assert float(metrics.debiased_nc1(stats)) == pytest.approx(nc1, rel=1e-12)
    # Norms and products lose the same share, so an ETF keeps its angle.
    angle = math.degrees(math.acos(-1 / (K - 1)))
    assert float(metrics.debiased_angle(stats, 1, 2)) == pytest.approx(angle, rel=1e-12)


def test_3_debiased_two_classes_on_a_line():
    """Points ±a ± σ: v = 2σ², so Σ_B = a² − ½·σ² and the squared distance is 4a² − 2σ²."""
    a, sigma = 1.5, 0.7
    x = torch.tensor([[a + sigma], [a - sigma], [-a + sigma], [-a - sigma]], dtype=f64)
    stats = stats_of(x, torch.tensor([0, 0, 1, 1]))
    between, v = a**2 - sigma**2 / 2, 2 * sigma**2
    assert float(metrics.debiased_trace_ratio(stats)) == pytest.approx(v / between, rel=1e-12)
    assert metrics.debiased_nc1(stats).isnan()  # two samples a class do not tell
    assert float(metrics.debiased_cdnv(stats)) == pytest.approx(v / (4 * between), rel=1e-12)


@pytest.mark.parametrize("K", [2, 5])
def test_4_nc5_is_no_function_of_the_centred_features(K):
    """Orthonormal means about an offset t·e_K along the OOD mean: t/√(1 + t²), from 0 to 1."""
    means = torch.eye(K + 1, dtype=f64)
    for t in (0.0, 0.5, 3.0, 1e3):
        stats = stats_of(means[:K] + t * means[K], torch.arange(K))
        want = t / math.sqrt(1 + t * t)
        assert float(metrics.nc5(stats, 2 * means[K])) == pytest.approx(want, rel=1e-12)
    scaled = stats_of(7 * means[:K], torch.arange(K))
    assert float(metrics.nc5(scaled, means[0])) == pytest.approx(1 / K)


@pytest.mark.parametrize("K", [2, 3, 40])
def test_9_energies_of_an_etf(K):
    square = 2 * K / (K - 1)
    mean, variance = metrics.log_energy(etf(K, K + 5))
    assert float(mean) == pytest.approx(-0.5 * math.log(square), abs=1e-13)
    assert float(variance) < 1e-24
    for s in (0.5, 2.0, 50.0):
        energy = float(metrics.riesz_energy(etf(K, K + 5), s=s))
        assert energy == pytest.approx(-s / 2 * math.log(square), rel=1e-12)


def test_9_energies_of_an_orthogonal_frame():
    rows = 3 * orthogonal_frame(6, 8, dtype=f64)
    mean, variance = metrics.log_energy(rows)
    assert float(mean) == pytest.approx(-0.5 * math.log(2), abs=1e-13)
    assert float(variance) < 1e-24


@pytest.mark.parametrize("n", [3, 4, 6, 12, 24])
def test_11_margin_of_a_polygon(n):
    t = 2 * math.pi * torch.arange(n, dtype=f64) / n
    polygon = torch.stack((t.cos(), t.sin()), 1)
    want = 1 - math.cos(2 * math.pi / n)
    # The square of the distance is within 1e-9 of the optimum.
    assert float(metrics.one_vs_rest_margin(polygon)) ** 2 == pytest.approx(want**2, abs=1e-8)


@pytest.mark.parametrize("d", [2, 3, 7])
def test_11_margin_of_simplex_and_orthoplex(d):
    axes = torch.eye(d, dtype=f64)
    margin = metrics.one_vs_rest_margin(torch.cat((axes, -axes)))
    assert float(margin) == pytest.approx(1, abs=1e-7)
    K = d + 1
    margin = metrics.one_vs_rest_margin(5 * etf(K, d))
    assert float(margin) == pytest.approx(K / (K - 1), abs=1e-7)


@pytest.mark.parametrize("K", [2, 10])
def test_12_nc5(K):
    Q = orthogonal_frame(K + 1, K + 3, dtype=f64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(K).repeat(4)
    stats = stats_of(2 * Q[labels], labels)
    assert float(metrics.nc5(stats, Q[0])) == pytest.approx(1 / K, rel=1e-12)
    assert float(metrics.nc5(stats, -5 * Q[K])) == pytest.approx(0, abs=1e-14)
    assert float(metrics.nc5(stats, Q[:K].sum(0))) == pytest.approx(1 / math.sqrt(K), rel=1e-12)


def test_13_merging_is_associative():
    """(a + b) + c = a + (b + c) ≤ 1e-14, with classes that one or all of them lack, and B = 1."""
    g = torch.Generator().manual_seed(13)
    means = 3 * torch.randn(6, 4, generator=g, dtype=f64)

    def part(size, classes):
        y = torch.randint(classes, (size,), generator=g)
        return stats_of(means[y] + torch.randn(size, 4, generator=g, dtype=f64), y, 6)

    for sizes in ((50, 40, 30), (1, 1, 1), (200, 1, 0), (3, 500, 2)):
        a, b, c = (part(size, 3 + i) for i, size in enumerate(sizes))  # class 5 stays empty
        left, right = (a + b) + c, a + (b + c)
        assert torch.equal(left.counts, right.counts)
        for name in ("means", "trace", "within"):
            one, two = (getattr(s, name).nan_to_num() for s in (left, right))
            assert float((one - two).norm()) <= 1e-14 * max(float(one.norm()), 1.0), name
        if sum(sizes) > 10:
            assert left.K_active in (4, 5)  # class 5 has none
            for measure in (metrics.nc1_pinv, metrics.trace_ratio, metrics.cdnv, metrics.vci):
                torch.testing.assert_close(measure(left), measure(right), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("K", "D", "r"), [(5, 8, 3.0), (3, 2, 0.5)])
def test_14_test_collapse_of_a_wrong_class(K, D, r):
    """Test points on the mean of the next class: Tr Σ_W = ‖μ_c − μ_{c+1}‖² gives NC1 = 2.

    On a simplex Σ_B = r²/(K−1) on its span, so strong NC1 is (2Kr²/(K−1))·(K−1)/(Kr²) = 2 whatever
    the training noise; the nearest mean is hit exactly, so weak NC1 is 0.
    """
    train = stats_of(*cross(r * etf(K, D), 0.1))
    labels = torch.arange(K).repeat(2)
    test = FeatureSet(r * etf(K, D).roll(-1, 0)[labels], labels, K)
    assert float(metrics.strong_test_nc1(train, test.stats)) == pytest.approx(2, rel=1e-12)
    assert float(metrics.weak_test_nc1(train, test)) < 1e-25
    # Half of the way to the next mean, less a little, both see the same scatter.
    means = r * etf(K, D)
    near = FeatureSet((means + 0.4 * (means.roll(-1, 0) - means))[labels], labels, K)
    strong, weak = metrics.strong_test_nc1(train, near.stats), metrics.weak_test_nc1(train, near)
    assert float(strong) == pytest.approx(0.16 * 2, rel=1e-12)
    assert float(weak) == pytest.approx(0.16 * 2, rel=1e-12)
    far = FeatureSet((means + 0.6 * (means.roll(-1, 0) - means))[labels], labels, K)
    assert float(metrics.strong_test_nc1(train, far.stats)) == pytest.approx(0.36 * 2, rel=1e-12)
    assert float(metrics.weak_test_nc1(train, far)) == pytest.approx(0.16 * 2, rel=1e-12)


def test_15_measures_of_unequal_classes():
    """{−½, ½; 1.5, 1.5, 2.5, 2.5, 2.5, 1.5}: Σ_W = ¼; Σ_B 1 by class, .75 by sample; Σ_T = 1."""
    x = torch.tensor([-0.5, 0.5, 1.5, 1.5, 2.5, 2.5, 2.5, 1.5], dtype=f64)[:, None]
    stats = stats_of(x, torch.tensor([0, 0, 1, 1, 1, 1, 1, 1]))
    for weighting, between in (("class", 1.0), ("sample", 0.75)):
        for measure, want in (
            (metrics.trace_ratio, 0.25 / between),
            (metrics.nc1_pinv, 0.25 / between / 2),
            (metrics.vci, 1 - between / (0.25 + between)),
        ):
            assert float(measure(stats, weighting=weighting)) == pytest.approx(want, rel=1e-14)
    assert float(metrics.cdnv(stats)) == pytest.approx(0.25 / 4, rel=1e-14)
    assert float(stats.sigma_t) == pytest.approx(1.0, rel=1e-14)


@pytest.mark.parametrize(("part", "K"), [(7, 50), (2, 3), (9, 10)])
def test_18_part_of_an_etf(part, K):
    """K' rows of a K-simplex have cos −1/(K−1); centred they are a simplex of their own.

    Uncentred G = aI − b11ᵀ has ⟨G, E⟩ = K/(K−1)·√(K'−1) and ‖G‖² = K' + K'(K'−1)/(K−1)².
    """
    rows = etf(K, K + 1)[:part]
    size = math.sqrt(part + part * (part - 1) / (K - 1) ** 2)
    inner = K / (K - 1) * math.sqrt(part - 1) / size
    want = math.sqrt(2 - 2 * inner)
    assert float(metrics.gram_etf(rows)) == pytest.approx(want, rel=1e-9)
    assert float(metrics.angles(rows)["max"]) == pytest.approx(1 / (part - 1) - 1 / (K - 1))
    centred = rows - rows.mean(0)
    assert float(metrics.gram_etf(centred)) < 1e-13
    assert float(metrics.angles(centred)["max"]) < 1e-13
    assert float(metrics.equinorm(centred)) < 1e-13
