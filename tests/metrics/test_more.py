"""Uniformity, margins, ranks, targets, duality and test collapse against closed forms."""

import math

import numpy as np
import pytest
import torch

from ncmethods import frames, metrics
from ncmethods._core import InputError
from ncmethods.features import FeatureSet
from ncmethods.metrics import _tiles
from ncmethods.stats import ClassStats

f64 = torch.float64


def etf(K, D=None):
    return frames.simplex_etf(
        K, K if D is None else D, dtype=f64, generator=torch.Generator().manual_seed(K)
    )


def random_rows(K, D, seed=0):
    return torch.randn(K, D, dtype=f64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[3, 2048])
def tile(request, monkeypatch):
    """Every walk over pairs, in one block and in many."""
    monkeypatch.setattr(_tiles, "TILE", request.param)
    return request.param


# --- uniformity ---------------------------------------------------------------------------------


def test_log_energy_of_an_etf_is_the_closed_form(tile):
    mean, variance = metrics.log_energy(7.0 * etf(10, 32))
    assert float(mean) == pytest.approx(-0.5 * math.log(20 / 9), abs=1e-12)
    assert float(mean) == pytest.approx(-0.3992538481, abs=1e-9)
    assert float(variance) < 1e-20


def test_energies_match_naive_loops(tile):
    X = random_rows(11, 5)
    U = X / X.norm(dim=1, keepdim=True)
    d = [float((U[i] - U[j]).norm()) for i in range(11) for j in range(11) if i != j]
    mean, variance = metrics.log_energy(X)
    assert float(mean) == pytest.approx(np.mean(-np.log(d)), rel=1e-10)
    assert float(variance) == pytest.approx(np.var(-np.log(d)), rel=1e-9)
    for s in (1.0, 3.0, 8.0):
        expected = np.log(np.mean(np.array(d) ** -s))
        assert float(metrics.riesz_energy(X, s=s)) == pytest.approx(expected, rel=1e-10)
    assert metrics.riesz_energy(X) == metrics.riesz_energy(X, s=3.0)


def test_riesz_energy_does_not_underflow_where_the_plain_one_does():
    K, D = 20, 1024
    energy = metrics.riesz_energy(etf(K, D))
    assert float(energy) == pytest.approx(-(D - 2) / 2 * math.log(2 * K / (K - 1)), rel=1e-9)
    assert torch.exp(energy.float()) == 0
    close = random_rows(K, D)
    close[1] = close[0] + 0.5 * close[1]
    assert metrics.riesz_energy(close) > energy + 100


def test_near_duplicates_keep_their_distance():
    X = torch.ones(3, 4, dtype=f64) * 1e3
    X[1, 0] += 1e-5
    ((_, _, d),) = _tiles.Pairs(X).distances()
    assert float(d[0, 1]) == pytest.approx(1e-10, rel=1e-6)
    assert float(d[0, 2]) == 0
    assert torch.isinf(d.diagonal()).all()


def test_uniformity_of_one_row_or_with_bad_s_is_an_error():
    with pytest.raises(InputError, match="K ≥ 2"):
        metrics.log_energy(torch.ones(1, 3))
    with pytest.raises(InputError, match="positive"):
        metrics.riesz_energy(random_rows(3, 3), s=0.0)


# --- margin -------------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [2, 5, 10])
def test_margin_of_a_simplex(K):
    assert float(metrics.one_vs_rest_margin(etf(K))) == pytest.approx(K / (K - 1), abs=1e-6)


def test_margin_of_orthoplex_and_polygons():
    axes = torch.eye(4, dtype=f64)
    assert float(metrics.one_vs_rest_margin(torch.cat((axes, -axes)))) == pytest.approx(1, abs=1e-6)
    for n in (5, 8):
        t = 2 * math.pi * torch.arange(n, dtype=f64) / n
        polygon = torch.stack((t.cos(), t.sin()), 1)
        expected = 1 - math.cos(2 * math.pi / n)
        assert float(metrics.one_vs_rest_margin(polygon)) == pytest.approx(expected, abs=1e-4)


def test_margin_matches_a_quadratic_program():
    from scipy.optimize import minimize

    W = random_rows(6, 4, seed=3)
    W = W / W.norm(dim=1, keepdim=True)
    found = []
    for k in range(6):
        rest = np.delete(W.numpy(), k, 0)
        result = minimize(
            lambda p, rest=rest, k=k: ((p @ rest - W[k].numpy()) ** 2).sum(),
            np.full(5, 0.2),
            bounds=[(0, 1)] * 5,
            constraints={"type": "eq", "fun": lambda p: p.sum() - 1},
            options={"ftol": 1e-14, "maxiter": 500},
        )
        found.append(math.sqrt(result.fun))
    assert float(metrics.one_vs_rest_margin(5 * W)) == pytest.approx(min(found), abs=1e-5)


def test_a_row_inside_the_hull_of_the_others_has_no_margin():
    W = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert float(metrics.one_vs_rest_margin(W)) == pytest.approx(0, abs=1e-4)


# --- ranks --------------------------------------------------------------------------------------

RANKS = [
    metrics.stable_rank,
    metrics.participation_ratio,
    metrics.nuclear_rank,
    metrics.effective_rank,
    metrics.threshold_rank,
]


@pytest.mark.parametrize("rank", RANKS, ids=lambda f: f.__name__)
def test_ranks_of_a_flat_spectrum_count_it(rank):
    Q = frames.orthogonal_frame(4, 9, dtype=f64)
    assert float(rank(3.0 * Q.T @ Q)) == pytest.approx(4, abs=1e-5)
    M = etf(10)
    assert float(rank(M.T @ M)) == pytest.approx(9, abs=1e-5)


def test_ranks_of_a_known_spectrum():
    sigma = torch.tensor([4.0, 1.0, 1e-8])
    lam = torch.diag(sigma.double() ** 2)
    assert float(metrics.stable_rank(lam)) == pytest.approx(17 / 16)
    assert float(metrics.participation_ratio(lam)) == pytest.approx(17**2 / (256 + 1))
    assert float(metrics.nuclear_rank(lam)) == pytest.approx(25 / 17)
    entropy = -(0.8 * math.log(0.8) + 0.2 * math.log(0.2))
    assert float(metrics.effective_rank(lam)) == pytest.approx(math.exp(entropy), rel=1e-6)
    assert int(metrics.threshold_rank(lam)) == 2
    with pytest.raises(InputError, match="zero"):
        metrics.stable_rank(torch.zeros(3, 3))
    with pytest.raises(InputError, match="square"):
        metrics.stable_rank(torch.zeros(3, 4))


# --- NC2 targets --------------------------------------------------------------------------------


def test_angles_match_naive_loops(tile):
    X = random_rows(9, 6)
    U = X / X.norm(dim=1, keepdim=True)
    cosines = np.array([float(U[i] @ U[j]) for i in range(9) for j in range(9) if i != j])
    found = {k: float(v) for k, v in metrics.angles(X).items()}
    assert found["mean"] == pytest.approx(np.abs(cosines + 1 / 8).mean(), rel=1e-12)
    assert found["max"] == pytest.approx(np.abs(cosines + 1 / 8).max(), rel=1e-12)
    assert found["std"] == pytest.approx(cosines.std(), rel=1e-9)
    assert metrics.equiangular(X) == metrics.angles(X)["mean"]


def test_min_angle_and_gram_and_cdnv_do_not_depend_on_the_tiles(tile):
    X = random_rows(10, 6)
    U = X / X.norm(dim=1, keepdim=True)
    cosines = U @ U.T - 2 * torch.eye(10)
    assert float(metrics.min_angle(X)) == pytest.approx(math.degrees(math.acos(cosines.max())))
    G = X @ X.T
    E = torch.eye(10, dtype=f64) - 0.1
    expected = (G / G.norm() - E / E.norm()).norm()
    assert float(metrics.gram_etf(X)) == pytest.approx(float(expected), rel=1e-12)
    x = X.repeat(3, 1) + 0.1 * random_rows(30, 6, seed=1)
    stats = ClassStats(10, 6).update(x, torch.arange(10).repeat(3))
    m, v = stats.means, stats.trace / 3
    pairs = [
        float((v[i] + v[j]) / (2 * (m[i] - m[j]).square().sum()))
        for i in range(10)
        for j in range(10)
        if i != j
    ]
    assert float(metrics.cdnv(stats)) == pytest.approx(np.mean(pairs), rel=1e-10)


def test_gram_distance_knows_the_etf_from_the_orthogonal_frame():
    K = 8
    orthogonal = frames.orthogonal_frame(K, 12, dtype=f64)
    assert float(metrics.gram_distance(2 * orthogonal, torch.eye(K))) < 1e-7
    assert float(metrics.gram_distance(etf(K), etf(K, 20))) < 1e-7
    apart = math.sqrt(2 - 2 * math.sqrt(1 - 1 / K))
    assert float(metrics.gram_distance(orthogonal, etf(K))) == pytest.approx(apart, rel=1e-9)
    with pytest.raises(InputError, match="K = 8"):
        metrics.gram_distance(orthogonal, torch.eye(7))


@pytest.mark.parametrize(
    ("R", "w", "h"),
    [(1, 96.379, 96.379), (10, 88.088, 100.763), (100, 70.243, 103.202), (1000, 47.875, 104.067)],
)
def test_seli_angles_of_the_minority(R, w, h):
    W, H = metrics.seli(torch.tensor([R * 10] * 5 + [10] * 5))
    assert float(metrics.min_angle(W[5:])) == pytest.approx(w, abs=1e-3)
    assert float(metrics.min_angle(H[5:])) == pytest.approx(h, abs=1e-3)
    # The logits of its own samples: 1[c = y] − 1/K.
    torch.testing.assert_close(W @ H.T, torch.eye(10, dtype=f64) - 0.1)
    with pytest.raises(InputError, match="every class"):
        metrics.seli(torch.tensor([3, 0, 2]))


# --- duality ------------------------------------------------------------------------------------


def test_product_duality_forgives_a_map_and_its_inverse_transpose():
    K = 6
    A = random_rows(K, K, seed=1) + 3 * torch.eye(K, dtype=f64)
    M, W = etf(K) @ A, etf(K) @ torch.linalg.inv(A).T
    assert float(metrics.product_duality(W, M)) < 1e-7
    assert float(metrics.self_duality(W, M)) > 0.05
    assert float(metrics.product_duality(-W, M)) == pytest.approx(2)


def test_spread_and_bias():
    M = etf(5)
    assert float(metrics.duality_spread(3 * M, M)) < 1e-20
    W = M.clone()
    W[0] = -W[0]
    assert float(metrics.duality_spread(W, M)) == pytest.approx(np.var([-1, 1, 1, 1, 1]))
    mean = random_rows(1, 5)[0]
    assert float(metrics.bias_duality(W, -W @ mean, mean)) < 1e-12
    assert float(metrics.bias_duality(W, None, mean)) == pytest.approx(float((W @ mean).norm()))


def test_nc5_of_orthonormal_means():
    means = torch.eye(6, dtype=f64)
    stats = ClassStats(4, 6).update(means[:4], torch.arange(4))
    assert float(metrics.nc5(stats, means[0])) == pytest.approx(1 / 4)
    assert float(metrics.nc5(stats, -3 * means[5])) == 0
    with pytest.raises(InputError, match="ood_mean"):
        metrics.nc5(stats, means)


# --- test collapse ------------------------------------------------------------------------------


def sample(N, K=5, D=7, seed=0, noise=1.0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(N) % K
    centers = 3 * random_rows(K, D, seed=9)
    return centers[labels] + noise * torch.randn(N, D, dtype=f64, generator=generator), labels


def test_scatter_about_other_means_needs_no_second_pass():
    (x, y), (xt, yt) = sample(60), sample(45, seed=1)
    train, test = ClassStats(5, 7).update(x, y), ClassStats(5, 7).update(xt, yt)
    r = xt - train.means[yt]
    found = metrics.scatter_about(test, train.means)
    assert float((found - r.T @ r).norm() / (r.T @ r).norm()) < 1e-13
    assert torch.allclose(metrics.scatter_about(test, test.means), test.within)
    with pytest.raises(InputError, match="means must be"):
        metrics.scatter_about(test, train.means[:4])
    only = ClassStats(5, 7).update(x[y < 4], y[y < 4])
    with pytest.raises(InputError, match="no training mean"):
        metrics.scatter_about(test, only.means)


def test_strong_and_weak_collapse():
    (x, y), (xt, yt) = sample(200), sample(150, seed=1, noise=4.0)
    train = ClassStats(5, 7).update(x, y)
    same = metrics.strong_test_nc1(train, train)
    assert float(same) == pytest.approx(float(metrics.nc1_pinv(train)), rel=1e-10)
    test = FeatureSet(xt, yt, 5)
    strong = metrics.strong_test_nc1(train, test.stats)
    weak = metrics.weak_test_nc1(train, test)
    assert weak < strong
    assert strong > 3 * same
    # On the training means themselves, under any labels, weak collapse is perfect.
    swapped = FeatureSet(train.means, torch.tensor([1, 2, 3, 4, 0]), 5)
    assert float(metrics.weak_test_nc1(train, swapped)) < 1e-20
    assert metrics.strong_test_nc1(train, swapped.stats) > 0.1
