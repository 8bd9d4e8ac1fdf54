"""Softmax losses, the sphere and SupCon: settings and tolerances of the sheet."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from ncmethods import frames, metrics
from ncmethods.ufm import UFM, label_sets, mixup_targets, predict, solve, solve_many


def gram(rows):
    return rows @ rows.T


def close(a, b, tol):
    torch.testing.assert_close(a, b, rtol=0, atol=tol)


def cosines(rows):
    return gram(F.normalize(rows, dim=1))


@pytest.mark.parametrize("loss", ["ce", "label-smoothing", "focal"])
@pytest.mark.parametrize("bias", ["none", "free"])
def test_losses_share_the_etf(loss, bias):
    """ETF error below 1e-6, and the closed margin."""
    model = UFM(6, 8, 4, loss, ridge_w=2e-3, ridge_h=1e-3, bias=bias, gamma=3.0)
    s, p = solve(model), predict(model)
    assert s.converged
    assert metrics.gram_etf(s.means) < 1e-6
    assert metrics.self_duality(s.weight, s.means) < 1e-6
    assert metrics.trace_ratio(s.stats) < 1e-12
    assert s.loss == pytest.approx(p.loss, abs=1e-10)
    close(s.mean_of(s.logits) - s.logits.mean(), p.logits, 1e-6)
    close(gram(s.means), gram(p.features), 1e-5)
    close(gram(s.weight), gram(p.weight), 1e-5)


def test_margin_of_cross_entropy():
    """e^s = 1/κ − (K−1) with κ = √(nλ_Hλ_W), and zero from κ = 1/K on."""
    K, n = 5, 3
    for lam, zero in ((1e-3, False), (5e-2, False), (0.2, True)):
        kappa = math.sqrt(n) * lam
        p = predict(UFM(K, K, n, "ce", ridge_w=lam, ridge_h=lam))
        margin = float(p.logits[0, 0] - p.logits[0, 1])
        assert (kappa >= 1 / K) == zero
        assert margin == pytest.approx(0 if zero else math.log(1 / kappa - (K - 1)), abs=1e-12)
        if zero:
            assert solve(UFM(K, K, n, "ce", ridge_w=lam, ridge_h=lam)).means.norm() < 1e-6
            focal = UFM(K, K, n, "focal", ridge_w=lam, ridge_h=lam)
            assert predict(focal).loss == pytest.approx((1 - 1 / K) ** 2 * math.log(K))


def test_label_smoothing_conditions_the_problem():
    """The Hessian in h on the span of W has the condition number K p_y at the minimum."""
    K, found = 10, []
    for epsilon in (0.0, 0.1, 0.2):
        s = solve(UFM(K, 10, 1, "label-smoothing", ridge_w=1e-4, ridge_h=1e-4, epsilon=epsilon))
        W, h = s.weight, s.means[0]
        _, values, Vh = torch.linalg.svd(W, full_matrices=False)
        V = Vh[values > 1e-6 * values[0]]

        def loss(u, W=W, h=h, V=V, epsilon=epsilon):
            z = (W @ (h + u @ V))[None]
            return F.cross_entropy(z, torch.tensor([0]), label_smoothing=epsilon)

        H = torch.autograd.functional.hessian(loss, torch.zeros(len(V)).double())
        eigen = torch.linalg.eigvalsh(H)
        p = float(s.logits[0].softmax(0)[0])
        assert float(eigen[-1] / eigen[0]) == pytest.approx(K * p, rel=1e-5)
        found.append(K * p)
    assert found[0] > found[1] > found[2]
    assert found[0] == pytest.approx(9.99, abs=0.005)
    assert found[2] == pytest.approx(8.19, abs=0.005)


def test_minority_collapse():
    """Cosine of two minority rows at R = 1 … 1000, layer-peeled penalties λ/K and λ/(K n_k)."""
    K, lam, models = 4, 5e-3, []
    for R in (1, 100, 300, 1000):
        n = torch.tensor([R, R, 1, 1])
        models.append(UFM(K, 6, n, folded=True, ridge_w=lam / K, ridge_h=(lam / K / n).tolist()))
    found = [float(cosines(s.weight)[2, 3]) for s in solve_many(models)]
    for cosine, kept in zip(found, (-0.33, 0.08, 0.59, 1.0)):
        assert cosine == pytest.approx(kept, abs=5e-3)
    assert found[-1] == pytest.approx(1, abs=1e-9)


def test_seli_in_the_limit_of_vanishing_ridge():
    """Distance of the Gram matrix of W to SELI, kept values; an ETF stays away."""
    counts = (10, 10, 1, 1)
    rows = metrics.seli(torch.tensor(counts))
    models = [
        UFM(4, 5, counts, folded=True, ridge_w=v, ridge_h=v) for v in (1e-3, 1e-5, 1e-7, 1e-9)
    ]
    found = solve_many(models, tol=1e-7)
    for i, kept in ((0, (0.103, 0.061, 0.044, 0.034)), (1, None)):
        away = [float(metrics.gram_distance((s.weight, s.means)[i], rows[i])) for s in found]
        assert away == sorted(away, reverse=True)
        if kept:
            assert away == pytest.approx(kept, abs=5e-4)
    assert min(float(metrics.gram_etf(s.weight)) for s in found) > 0.41


def test_imbalanced_cross_entropy_with_nonnegative_features():
    """Means are orthogonal, exactly, and longer the rarer their class."""
    model = UFM(4, 6, (40, 20, 8, 2), ridge_w=1e-3, ridge_h=1e-3, constraint="nonnegative")
    s = solve(model)
    assert s.converged
    close(cosines(s.means), torch.eye(4).double(), 1e-12)
    assert metrics.trace_ratio(s.stats) < 1e-12
    lengths = s.means.norm(dim=1)
    assert (lengths.diff() > 0.1).all()
    p = predict(model)
    close(lengths, p.features.norm(dim=1), 1e-6)
    close(gram(s.weight), gram(p.weight), 1e-5)
    assert s.loss == pytest.approx(p.loss, abs=1e-10)


def test_threshold_of_minority_collapse_with_nonnegative_features():
    """A class vanishes iff √n_k ≤ N √(λ_Hλ_W K/(K−1)); label smoothing as well."""
    n = torch.tensor([40, 20, 8, 2])
    for loss in ("ce", "label-smoothing"):
        edge = math.sqrt(2 * 3 / 4) / 70 * (1 if loss == "ce" else 0.9)
        models = [
            UFM(4, 6, n, loss, ridge_w=f * edge, ridge_h=f * edge, constraint="nonnegative",
                folded=True)
            for f in (0.95, 1.05)
        ]  # fmt: skip
        for s, gone in zip(solve_many(models, restarts=12), (False, True)):
            assert bool(s.means[3].norm() < 1e-6) == gone
            p = predict(s.model)
            assert bool(p.features[3].norm() == 0) == gone
            assert s.loss == pytest.approx(p.loss, abs=1e-10)
            close(s.logits, p.logits, 1e-5)


@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_sphere(temperature):
    """Every start ends in the simplex ETF, features and rows alike, to 1e-5."""
    model = UFM(5, 6, 3, constraint="sphere", temperature=temperature)
    for seed in range(5):
        s = solve(model, seed=seed)
        close(gram(s.means), gram(frames.simplex_etf(5, 6).double()), 1e-5)
        close(s.weight, s.means, 1e-5)
        assert s.loss == pytest.approx(predict(model).loss, abs=1e-10)


@pytest.mark.parametrize(
    ("K", "dim", "cosine"), [(4, 2, 0.0), (6, 3, 0.0), (10, 5, 0.0), (5, 2, 0.309)]
)
def test_softmax_codes(K, dim, cosine):
    """More classes than D + 1 and a small τ: the best one-vs-rest margin, self-dual."""
    model = UFM(K, dim, 1, constraint="sphere", temperature=0.1)
    with pytest.warns(UserWarning, match=f"D ≥ {K - 1} does not hold"):
        s = solve(model, restarts=12, tol=1e-8)
    G = cosines(s.weight)
    assert float((G - 2 * torch.eye(K)).max()) == pytest.approx(cosine, abs=1e-3)
    code = frames.softmax_code(K, dim, dtype=torch.float64)
    assert metrics.one_vs_rest_margin(s.weight) == pytest.approx(
        float(metrics.one_vs_rest_margin(code)), abs=1e-3
    )
    with pytest.raises(ValueError, match="softmax_code"):
        predict(model)


def test_supcon_with_relu_is_orthogonal_for_any_counts():
    """12/12/3/3: class Gram matrix I to 1e-3 with ReLU, unequal cosines without."""
    model = UFM(4, 8, (12, 12, 3, 3), "supcon", constraint="nonnegative", temperature=0.3)
    s = solve(model)
    close(cosines(s.means), torch.eye(4).double(), 1e-3)
    assert s.loss == pytest.approx(predict(model).loss, abs=1e-10)
    free = replace(model, constraint="sphere")
    G = cosines(solve(free).means)
    assert float(G[0, 1]) == pytest.approx(-0.40, abs=5e-3)
    assert float(G[2, 3]) == pytest.approx(-0.15, abs=5e-3)
    with pytest.raises(ValueError, match="unequal counts"):
        predict(free)


def test_supcon_has_one_minimum():
    """20 random starts reach one value, that of the simplex ETF."""
    model = UFM(4, 6, 3, "supcon", constraint="sphere", temperature=0.5)
    values = [solve(model, seed=seed).loss for seed in range(20)]
    assert max(values) - min(values) < 1e-6
    assert values[0] == pytest.approx(predict(model).loss, abs=1e-9)
    # Two in a class and one in each other: the anchor sees 1 positive and 3·3 negatives.
    assert predict(model).loss == pytest.approx(math.log(2 + 9 * math.exp(-4 / 3 / 0.5)))


@pytest.mark.parametrize("bias", ["none", "free"])
def test_pick_all_label(bias):
    """Means of pairs are one multiple of the sum of the tag means, which form an ETF."""
    T = label_sets(4, (1, 2))
    assert T.sum(1).tolist() == [1] * 4 + [2] * 6
    model = UFM(4, 6, 3, "pick-all-label", targets=T, ridge_w=5e-3, ridge_h=5e-3, bias=bias)
    s = solve(model)
    tags, pairs = s.means[:4], s.means[4:]
    sums = T[4:] @ tags
    close(F.cosine_similarity(pairs, sums), torch.ones(6).double(), 1e-6)
    scale = pairs.norm(dim=1) / sums.norm(dim=1)
    assert float(scale.max() - scale.min()) < 1e-6
    assert 0.8 < float(scale[0]) < 0.95
    assert metrics.gram_etf(tags) < 1e-6


def test_mixup_channels():
    """A fixed ETF, CE: same-class features on their row, mixed ones in a plane, and longer."""
    K = 4
    etf = frames.simplex_etf(K, 6, dtype=torch.float64)
    T = mixup_targets(K, (0.5, 0.7))
    s = solve(UFM(K, 6, 1, targets=T, weight=etf, ridge_w=0.0, ridge_h=5e-3, folded=True))
    H = s.features
    close(F.cosine_similarity(H[:K], etf), torch.ones(K).double(), 1e-9)
    for h, t in zip(H[K:], T[K:]):
        i, j = t.nonzero().flatten().tolist()
        span = torch.stack([etf[i], etf[j], etf.sum(0) - etf[i] - etf[j]])
        left = h - torch.linalg.lstsq(span.T, h).solution @ span
        assert left.norm() < 1e-6 * h.norm()
        if float(t[i]) == 0.5:  # not the convex combination of the two means
            assert h.norm() > 1.3 * (0.5 * (H[i] + H[j])).norm()
