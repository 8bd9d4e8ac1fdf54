"""Squared error: numerical minima against closed forms, settings and tolerances of the sheet."""

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch.nn import functional as F

from ncmethods import metrics
from ncmethods.data import long_tail_counts
from ncmethods.ufm import UFM, mixup_targets, predict, solve, solve_many
from ncmethods.ufm._batch import Batch


def gram(rows):
    return rows @ rows.T


def close(a, b, tol):
    torch.testing.assert_close(a, b, rtol=0, atol=tol)


EYE, ONES = torch.eye(4).double(), torch.ones(4, 4).double()


@pytest.mark.parametrize("bias", ["none", "free"])
@pytest.mark.parametrize("ridge", [(5e-3, 1e-3), (1e-2, 5e-3)])
def test_orthogonal_frame_without_bias_and_etf_with_a_free_one(bias, ridge):
    """Tirer and Bruna, theorems 3.1 and 3.2: K = 4, n = 5, D = 20, Gram matrix to 1e-5."""
    K, n, (lam_w, lam_h) = 4, 5, ridge
    s = solve(UFM(K, 20, n, "mse", ridge_w=lam_w, ridge_h=lam_h, bias=bias))
    assert s.converged
    c = K * math.sqrt(n * lam_h * lam_w)
    rho = (1 - c) * math.sqrt(lam_w / (n * lam_h))
    target = rho * (EYE if bias == "none" else EYE - ONES / K)
    close(gram(s.means), target, 1e-5)
    close(s.weight, math.sqrt(n * lam_h / lam_w) * s.means, 1e-5)
    assert metrics.trace_ratio(s.stats) < 1e-12
    if bias == "free":
        close(s.bias, torch.full((K,), 1 / K).double(), 1e-6)
    else:  # centred means cannot tell the two apart
        assert metrics.gram_etf(s.means - s.means.mean(0)) < 1e-5
        assert metrics.gram_etf(s.means) > 0.4
    p = predict(s.model)
    close(gram(p.features), target, 1e-12)
    close(s.logits[::n], p.logits, 1e-6)
    assert s.loss == pytest.approx(p.loss, abs=1e-12)


def test_past_the_threshold_everything_is_zero():
    """c = K √(nλ_Hλ_W) ≥ 1."""
    model = UFM(4, 20, 5, "mse", ridge_w=0.2, ridge_h=0.1)
    assert model.threshold == pytest.approx(4 * math.sqrt(5 * 0.2 * 0.1))
    with pytest.warns(UserWarning, match=r"√\(λ_Hλ_W/n_k\) < 1 does not hold"):
        s = solve(model)
    assert s.features.norm() < 1e-6
    assert s.loss == pytest.approx(0.5)
    p = predict(model)
    assert p.features.norm() == 0
    assert p.loss == pytest.approx(0.5)


def test_transition_of_the_penalised_bias():
    """c = 0.0316: ETF up to λ_b = c/(1−c), then the eigenvalue along 1 grows to that of an OF."""
    K, n = 4, 5
    c = math.sqrt(1e-3)
    lam_w, lam_h = c / K, c / (K * n)  # then K √(nλ_Hλ_W) = c
    edge = c / (1 - c)
    ridges = [0.01, 0.02, 0.9 * edge, 0.99 * edge, 1.05 * edge, 0.04, 0.05, 0.1, 0.3, 1.0, 10.0]
    models = [
        UFM(K, 8, n, "mse", ridge_w=lam_w, ridge_h=lam_h, bias="ridge", ridge_b=b) for b in ridges
    ]
    ratios = []
    for s, b in zip(solve_many(models), ridges):
        assert s.converged
        G = gram(s.means)
        rho = (1 - c) * math.sqrt(lam_w / (n * lam_h))
        ratio = float(G.sum()) / K / rho
        assert ratio == pytest.approx(max(0.0, 1 - c / (b * (1 - c))), abs=1e-5)
        close(gram(predict(s.model).features), G, 1e-5)
        close(predict(s.model).bias, s.bias, 1e-6)
        assert predict(s.model).loss == pytest.approx(s.loss, abs=1e-12)
        ratios.append(ratio)
    assert max(ratios[:4]) < 1e-5
    for i, kept in ((4, 0.0476), (7, 0.6734), (10, 0.9967)):
        assert ratios[i] == pytest.approx(kept, abs=5e-5)


@pytest.mark.parametrize("profile", ["step", "exp"])
@pytest.mark.parametrize("folded", [False, True])
def test_norms_of_imbalanced_classes(profile, folded):
    """Means stay orthogonal; ‖h_k‖² = [√n_k − N√(λ_Wλ_H)]₊ √(λ_W/λ_H)/n_k, to 1e-4."""
    counts = long_tail_counts(40, 4, 20, profile)
    n = torch.tensor(counts).double()
    lam_w, lam_h = 5e-2, 1.25e-2
    model = UFM(4, 8, counts, "mse", ridge_w=lam_w, ridge_h=lam_h, folded=folded)
    N = float(n.sum())
    left = (n.sqrt() - N * math.sqrt(lam_w * lam_h)).clamp(min=0)
    with_warning = model.threshold >= 1
    assert with_warning == bool((left == 0).any())
    if with_warning:
        with pytest.warns(UserWarning, match="does not hold for every class"):
            s = solve(model)
    else:
        s = solve(model)
    close(gram(s.means), torch.diag(left * math.sqrt(lam_w / lam_h) / n), 1e-4)
    close(gram(s.weight), torch.diag(left * math.sqrt(lam_h / lam_w)), 1e-4)
    assert (left == 0).any()  # some vanish,
    assert (left > 0).any()  # some do not
    assert s.loss == pytest.approx(predict(model).loss, abs=1e-10)
    assert s.stats.counts.tolist() == counts


def test_the_threshold_at_which_a_class_vanishes():
    """A class is gone iff √n_k ≤ N √(λ_Wλ_H)."""
    counts = (30, 30, 5, 5)
    edge = math.sqrt(5) / 70
    models = [
        UFM(4, 6, counts, "mse", ridge_w=f * edge, ridge_h=f * edge, folded=True)
        for f in (0.9, 0.98, 1.02, 1.1)
    ]
    with pytest.warns(UserWarning, match="does not hold for every class"):
        rare = [float(s.means[2:].norm()) for s in solve_many(models)]
    assert min(rare[:2]) > 0.1
    assert max(rare[2:]) < 1e-4


def test_singular_values_of_two_layers():
    """The sheet's values for K = 4, n = 5 and one penalty for all; alignments."""
    lams = [1e-3, 5e-3, 2e-2, 5e-2, 8e-2]
    models = [UFM(4, 8, 5, "mse", ridge_w=v, ridge_h=v, depth=2) for v in lams]
    for s, lam, kept in zip(
        solve_many(models, restarts=8), lams, [0.9931, 0.9654, 0.8559, 0.5929, 0.0]
    ):
        values = torch.linalg.svdvals(s.mean_of(s.logits))
        close(values, torch.full((4,), kept).double(), 1e-3)

        def cost(v, lam=lam):
            return (v - 1) ** 2 / 8 + 1.5 * (lam**3 * 5 * v * v) ** (1 / 3)

        best = minimize_scalar(cost, bounds=(0.2, 1), method="bounded", options={"xatol": 1e-10})
        assert s.loss == pytest.approx(4 * min(best.fun, cost(0)), abs=1e-8)
        p = predict(s.model)
        assert s.loss == pytest.approx(p.loss, abs=1e-10)
        if kept:
            close(values, torch.full((4,), best.x).double(), 1e-6)
            V, W1, W2 = s.means, *s.layers
            assert metrics.self_duality(W2, V @ W1.T) < 1e-6
            assert metrics.self_duality(W2 @ W1, V) < 1e-6


@pytest.mark.parametrize("bias", ["none", "free"])
@pytest.mark.parametrize("counts", [5, (40, 20, 8, 2)])
def test_depth_three_linear(bias, counts):
    """Singular values shrink as von Neumann's inequality says, for any counts."""
    model = UFM(4, 6, counts, "mse", ridge_w=(1e-2, 3e-3, 5e-3), ridge_h=2e-4, bias=bias, depth=3)
    s = solve(replace(model, folded=True), restarts=3)
    p = predict(model)
    assert s.loss == pytest.approx(p.loss, abs=1e-12)
    close(s.logits, p.logits, 1e-6)
    close(gram(s.means), gram(p.features), 1e-5)
    close(gram(s.weight), gram(p.weight), 1e-5)


def test_two_layers_with_relu_reach_the_linear_value():
    """Theorem 4.2: σ(Z) is an orthogonal frame and ‖σ(Z)‖_* = ‖Z‖_*; H itself is not unique."""
    model = UFM(4, 12, 5, "mse", ridge_w=5e-3, ridge_h=5e-3, depth=2, relu=True, folded=True)
    with pytest.warns(UserWarning, match="did not converge"):
        found = [solve(model, seed=seed, steps=250) for seed in range(6)]
    best = predict(model).loss
    assert all(s.loss > best - 1e-10 for s in found)
    good = [s for s in found if s.loss < best + 1e-6]
    assert len(good) >= 5
    for s in good:
        Z = s.features @ s.layers[0].T
        assert metrics.gram_distance(Z.relu(), EYE) < 4e-3
        assert torch.linalg.matrix_norm(Z, "nuc") == pytest.approx(
            float(torch.linalg.matrix_norm(Z.relu(), "nuc")), abs=1e-3
        )


def test_nonnegative_features():
    """No bias: the same orthogonal frame. Free bias: no ETF, whose means must be centred first."""
    model = UFM(4, 8, 5, "mse", ridge_w=5e-3, ridge_h=1e-3, constraint="nonnegative", folded=True)
    s = solve(model)
    p = predict(model)
    assert s.features.min() >= 0
    close(gram(s.means), gram(p.features), 1e-5)
    assert s.loss == pytest.approx(p.loss, abs=1e-10)
    s = solve(replace(model, bias="free"))
    assert metrics.gram_distance(s.means, EYE) < 1e-5
    assert metrics.gram_etf(s.means - s.means.mean(0)) < 1e-5
    close(s.bias, torch.full((4,), 0.25).double(), 1e-6)


def test_deep_relu_has_minima_below_collapse():
    """L = 4, K = 10, λ = 0.004, width 30: a solution of lower rank beats 0.0992."""
    model = UFM(10, 30, 1, "mse", ridge_w=4e-3, ridge_h=4e-3, depth=4, relu=True)
    collapse = predict(replace(model, relu=False)).loss
    assert collapse == pytest.approx(0.0992, abs=5e-5)
    with pytest.warns(UserWarning, match="did not converge"):
        s = solve(model, restarts=5, steps=300)
    assert s.loss < 0.98 * collapse


@pytest.mark.parametrize("depth", [3, 4])
def test_deep_relu_of_two_classes_collapses(depth):
    """K = 2: no solution lies below collapse, and the best start reaches it, of rank 2."""
    model = UFM(2, 8, 3, "mse", ridge_w=4e-3, ridge_h=4e-3, depth=depth, relu=True, folded=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # kinks keep the gradient up
        s = solve(model, restarts=8, steps=400)
    best = predict(replace(model, relu=False)).loss
    assert s.loss == pytest.approx(best, abs=1e-6)
    for h, W in zip(s.inputs, s.layers):
        assert torch.linalg.matrix_rank(h, atol=1e-2) == 2
        assert torch.linalg.matrix_rank(W, atol=1e-2) == 2
    for h in s.inputs[1:]:
        assert F.cosine_similarity(h[0], h[1], dim=0).abs() < 1e-2


def test_other_critical_points_are_strict_saddles():
    """Leaving classes out gives a critical point whose Hessian has a negative eigenvalue."""
    model = UFM(3, 3, 2, "mse", ridge_w=1e-2, ridge_h=1e-2, folded=True)
    p, batch = predict(model), Batch([model], scaled=False)
    for left in (0, 1, 2, 3):
        keep = (torch.arange(3) < left).double()[:, None]
        x = torch.cat([(keep * p.features).flatten(), (keep * p.weight).flatten()])
        assert batch.with_gradient(x[None])[1].norm() < 1e-12
        H = torch.autograd.functional.hessian(lambda v: batch.value(v[None])[0], x)
        least = float(torch.linalg.eigvalsh(H)[0])
        assert (least < -1e-2) if left < 3 else (least > -1e-12)


def test_law_of_neural_regression_collapse():
    """WWᵀ = √(λ_H/λ_W) [Σ^½ − √(λ_Hλ_W) I]₊ with λ_H/2N; to 1e-6."""
    g = torch.Generator().manual_seed(0)
    N, k = 40, 3
    Y = torch.randn(N, k, generator=g).double() @ torch.diag(torch.tensor([2.0, 1.0, 0.5]).double())
    Y = Y - Y.mean(0)
    for lam_h, lam_w in ((1e-2, 1e-3), (2.0, 0.3)):  # the second drops the smallest direction
        s = solve(UFM(k, 6, 1, "regression", targets=Y, ridge_h=lam_h / N, ridge_w=lam_w))
        values, V = torch.linalg.eigh(Y.T @ Y / N)
        left = (values.sqrt() - math.sqrt(lam_h * lam_w)).clamp(min=0)
        close(gram(s.weight), math.sqrt(lam_h / lam_w) * V @ torch.diag(left) @ V.T, 1e-6)
        assert s.loss == pytest.approx(predict(s.model).loss, abs=1e-10)
        assert metrics.nrc3(s.weight, Y, gamma=lam_h * lam_w) < 1e-10
        assert metrics.nrc2(s.features, s.weight) < 1e-10


def test_mixed_targets_of_squared_error_give_convex_combinations():
    T = mixup_targets(3, (0.25, 0.5))
    assert T.shape == (9, 3)
    s = solve(UFM(3, 5, 2, "mse", targets=T, ridge_w=1e-3, ridge_h=1e-3, folded=True))
    close(s.means[3:], T[3:] @ s.means[:3], 1e-6)
    close(gram(s.means), gram(predict(s.model).features), 1e-5)


def test_in_few_dimensions_the_solver_warns_and_the_closed_form_refuses():
    model = UFM(5, 3, 2, "mse", ridge_w=1e-2, ridge_h=1e-3)
    with pytest.warns(UserWarning, match="D ≥ 5 does not hold"):
        s = solve(model)
    assert torch.linalg.matrix_rank(s.means, atol=1e-4) == 3
    with pytest.raises(ValueError, match="needs D ≥ 5"):
        predict(model)
    # Eckart and Young: three of the five singular values are left.
    c = 5 * math.sqrt(2 * 1e-5)
    assert s.loss == pytest.approx((3 * c * (2 - c) + 2) / 10, abs=1e-9)


def test_closed_form_of_a_scalar_problem_against_scipy():
    """The shrinking of deep models, on a grid of sizes and penalties."""
    from ncmethods.ufm.predict import _shrunk

    for depth in (1, 2, 3, 6):
        for kappa in (1e-3, 2e-2, 0.1):
            value = torch.tensor([0.1, 1.0, 4.0]).double()
            for v, s in zip(value.tolist(), _shrunk(value, 4.0, kappa, depth).tolist()):

                def cost(x, v=v, depth=depth, kappa=kappa):
                    return (x - v) ** 2 / 8 + (depth + 1) / 2 * (kappa * x) ** (2 / (depth + 1))

                grid = np.linspace(0, v, 20001)
                assert cost(s) <= cost(grid).min() + 1e-12
