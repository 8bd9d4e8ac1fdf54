"""Estimates for small classes: unbiased where the plug-in ones are not."""

import math

import pytest
import torch

from ncmethods import frames, metrics
from ncmethods.metrics.debiased import _curvature
from ncmethods.stats import ClassStats

K, D = 10, 64
TRUE = {"angle": 96.379, "nc1": 0.081, "cdnv": 0.288, "ratio": 0.64}


def simulate(n, seed):
    """Classes at an ETF of radius 5 with σ = 0.5: the isotropic golden check, sampled."""
    g = torch.Generator().manual_seed(seed)
    means = 5 * frames.simplex_etf(K, D, dtype=torch.float64, generator=g)
    y = torch.arange(K).repeat(n)
    x = means[y] + 0.5 * torch.randn(n * K, D, dtype=torch.float64, generator=g)
    return ClassStats(K, D).update(x, y)


def mean_of(measure, n, repeats=40):
    return sum(float(measure(simulate(n, seed))) for seed in range(repeats)) / repeats


@pytest.mark.parametrize("n", [5, 20])
def test_debiased_values_hit_the_truth_where_the_plug_in_misses_it(n):
    for name, plug_in, debiased in (
        ("nc1", metrics.nc1_pinv, metrics.debiased_nc1),
        ("cdnv", metrics.cdnv, metrics.debiased_cdnv),
        ("ratio", metrics.trace_ratio, metrics.debiased_trace_ratio),
    ):
        found, naive = mean_of(debiased, n), mean_of(plug_in, n)
        assert found == pytest.approx(TRUE[name], rel=0.04)
        assert abs(naive - TRUE[name]) > 2 * abs(found - TRUE[name])


def test_debiased_angle_of_two_near_classes():
    g = torch.Generator().manual_seed(0)
    means = torch.zeros(3, D, dtype=torch.float64)
    angle = math.radians(36.9)
    means[0, 0], means[1, 0], means[1, 1] = 5, 5 * math.cos(angle), 5 * math.sin(angle)
    means[2] = -means[0] - means[1]  # the global mean is zero
    naive, found = [], []
    for _ in range(60):
        y = torch.arange(3).repeat(5)
        x = means[y] + torch.randn(15, D, dtype=torch.float64, generator=g)
        stats = ClassStats(3, D).update(x, y)
        naive.append(float(metrics.min_angle(stats.centered_means()[:2])))
        found.append(float(metrics.debiased_angle(stats, 0, 1)))
    found = [a for a in found if not math.isnan(a)]
    assert sum(naive) / len(naive) > 48
    assert sum(found) / len(found) == pytest.approx(36.9, abs=3)


def test_many_samples_leave_nothing_to_correct():
    stats = simulate(3000, 0)
    assert float(metrics.debiased_nc1(stats)) == pytest.approx(
        float(metrics.nc1_pinv(stats)), rel=2e-3
    )
    assert float(metrics.debiased_cdnv(stats)) == pytest.approx(
        float(metrics.cdnv(stats)), rel=2e-3
    )
    angle = float(metrics.debiased_angle(stats, 0, 1))
    assert angle == pytest.approx(TRUE["angle"], abs=0.5)


def test_what_cannot_be_estimated_is_nan():
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    single = ClassStats(3, 4).update(x, torch.tensor([0, 0, 1, 1, 1, 2]))
    assert torch.isnan(metrics.debiased_cdnv(single))
    assert torch.isnan(metrics.debiased_trace_ratio(single))
    one_each = ClassStats(3, 4).update(x[:3], torch.arange(3))
    assert torch.isnan(metrics.debiased_nc1(one_each))


def test_curvature_is_the_mean_of_the_second_order_change():
    """Against simulation: E Tr(W (R+tE)†(R+tE)†ᵀ) for small errors E with covariance P ⊗ W."""
    g = torch.Generator().manual_seed(0)
    k, D, N, t = 4, 6, 400_000, 0.05
    R = torch.randn(k, D, generator=g, dtype=torch.float64)
    A = torch.randn(D, D, generator=g, dtype=torch.float64) / 2
    B = torch.randn(k, k, generator=g, dtype=torch.float64) / 2
    W, P = A @ A.T, B @ B.T
    values, U = torch.linalg.eigh(R @ R.T)
    R, P, B = U.T @ R, U.T @ P @ U, U.T @ B  # in the basis where G is diagonal
    Q, Q2 = R @ W @ R.T, R @ W @ W @ R.T
    E = t * B @ torch.randn(N // 2, k, D, generator=g, dtype=torch.float64) @ A.T
    total = torch.zeros((), dtype=torch.float64)
    for part in torch.split(torch.cat((E, -E)), 50_000):
        X = torch.linalg.inv((R + part) @ (R + part).mT)
        total += ((X @ X) * ((R + part) @ W @ (R + part).mT)).sum()
    change = total / N - (Q.diagonal() / values.square()).sum()
    # What the errors add to G and to Q by themselves, and what their products add.
    own = (t**2 * P * (W * W).sum()).diagonal() / values.square()
    inverse = torch.diag(1 / values)
    noise = t**2 * P * W.trace()
    own = own.sum() - 2 * (inverse @ noise @ inverse @ inverse * Q.T).sum()
    bend = _curvature(1 / values, t**2 * P, Q, Q2)
    assert float(bend) == pytest.approx(float(change - own), rel=0.05)
    assert abs(float(bend)) > 0.1 * abs(float(change))
