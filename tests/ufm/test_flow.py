"""Gradient flows: the central path, the linear rate, and the flow without penalties."""

import pytest
import torch

from ncmethods import metrics
from ncmethods.ufm import UFM, flow, predict, solve_many


def test_variability_falls_along_the_central_path():
    """ÑC1 = Tr Σ_W / Tr Σ_B falls at each of 300 recorded points (Perturbation analysis)."""
    K, n, lam = 4, 6, 5e-3
    model = UFM(K, 8, n, "mse", ridge_w=lam / K, ridge_h=lam / (K * n))
    path = flow(model, torch.linspace(0, 30, 300), central=True)
    ratio = torch.tensor([float(metrics.trace_ratio(s.stats)) for s in path.solutions])
    assert (ratio.diff() < 0).all()
    assert ratio[0] > 3 * ratio[-1]
    assert (path.loss.diff() < 0).all()
    for s in path.solutions[::100]:  # W*(H) = Y Hᵀ (H Hᵀ + nλ_W I)⁻¹ in the paper's normalisation
        H = s.features
        Y = torch.eye(K).double()[s.labels]
        W = torch.linalg.solve(H.T @ H + n * lam * torch.eye(8).double(), H.T @ Y).T
        torch.testing.assert_close(s.weight, W, rtol=1e-8, atol=1e-10)


def test_perturbed_model_moves_features_towards_collapse():
    """min f + β/2N ‖H − H₀‖²: less variability than H₀, and the less the smaller β."""
    g = torch.Generator().manual_seed(1)
    H0 = torch.randn(24, 8, dtype=torch.float64, generator=g)
    ratios = [float(metrics.trace_ratio(_stats(H0)))]
    models = [
        UFM(4, 8, 6, "mse", ridge_w=1e-3, ridge_h=1e-3, anchor=(H0, beta))
        for beta in (10.0, 1.0, 0.01, 1e-3)
    ]
    ratios += [float(metrics.trace_ratio(s.stats)) for s in solve_many(models, tol=1e-6)]
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[-1] < 1e-2 * ratios[0]


def _stats(H):
    from ncmethods.stats import ClassStats

    return ClassStats(4, 8).update(H, torch.arange(4).repeat_interleave(6))


def test_linear_convergence():
    """log(f − f*) of the flow falls on a line late on: R² > 0.99."""
    model = UFM(4, 6, 3, "mse", ridge_w=2e-2, ridge_h=1e-2)
    best = predict(model).loss
    path = flow(model, torch.linspace(0, 700, 141), tolerance=1e-11)
    gap = (path.loss - best).clamp(min=1e-300)
    late = (gap < 1e-3) & (gap > 1e-7)
    assert late.sum() > 20
    x, y = path.time[late], gap[late].log()
    r = torch.corrcoef(torch.stack([x, y]))[0, 1]
    assert float(r**2) > 0.99
    assert float(r) < 0


def test_flow_without_penalties():
    """From a small start the flow reaches the ETF direction; from a large one it does not."""
    model = UFM(4, 6, 3, "mse", ridge_w=0.0, ridge_h=0.0, bias="free")
    away = []
    for start in (1e-3, 1.0):
        end = flow(model, [0.0, 2000.0], start=start).solutions[-1]
        assert end.loss < 1e-8
        away.append(float(metrics.gram_etf(end.means - end.means.mean(0))))
    assert away[0] < 1e-2
    assert away[1] > 3 * away[0]


def test_flow_follows_the_gradient():
    """Against Euler's method written out."""
    model = UFM(3, 4, 2, "ce", ridge_w=1e-2, ridge_h=1e-2, bias="free")
    path = flow(model, [0.0, 0.5, 1.0], seed=3)
    H, W = path.solutions[0].features.clone(), path.solutions[0].weight.clone()
    b, y = torch.zeros(3).double(), torch.tensor([0, 0, 1, 1, 2, 2])
    steps = 4000
    for _ in range(steps):
        P = ((H @ W.T + b).softmax(1) - torch.eye(3).double()[y]) / 6
        H, W, b = (
            H - (P @ W + 1e-2 * H) / steps,
            W - (P.T @ H + 1e-2 * W) / steps,
            b - P.sum(0) / steps,
        )
    end = path.solutions[-1]
    torch.testing.assert_close(end.features, H, rtol=0, atol=1e-4)
    torch.testing.assert_close(end.weight, W, rtol=0, atol=1e-4)
    torch.testing.assert_close(end.bias, b, rtol=0, atol=1e-4)
    assert float(path.loss[-1]) == end.loss


def test_flow_of_supcon():
    model = UFM(3, 4, 3, "supcon", constraint="sphere", temperature=0.5)
    path = flow(model, [0.0, 10.0, 400.0])
    assert path.loss.tolist() == sorted(path.loss.tolist(), reverse=True)
    assert float(path.loss[-1]) == pytest.approx(predict(model).loss, abs=1e-6)
    assert path.solutions[0].features.norm(dim=1).tolist() == pytest.approx([1.0] * 9)


@pytest.mark.parametrize(
    ("change", "times", "central", "message"),
    [
        ({}, [0.0, 0.0], False, "must increase"),
        ({}, [0.0], False, "end beyond 0"),
        ({}, [-1.0, 0.0], False, "from 0 on"),
        ({"constraint": "nonnegative"}, [1.0], False, "free variables"),
        ({"constraint": "sphere", "loss": "ce"}, [1.0], False, "free variables"),
        ({"loss": "ce"}, [1.0], True, "central=True needs"),
    ],
)
def test_bad_flow(change, times, central, message):
    model = UFM(**{"num_classes": 3, "dim": 4, "loss": "mse", **change})
    with pytest.raises(ValueError, match=message):
        flow(model, times, central=central)
