"""NRC1 to NRC3 and Deep NRC against the closed form of the model, naive code and the authors'."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.optimize import minimize_scalar
from sklearn.decomposition import PCA

from ncmethods._core import InputError
from ncmethods.metrics import regression
from ncmethods.metrics.regression import deep_nrc, nrc1, nrc2, nrc3

f64 = torch.float64


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=f64, generator=torch.Generator().manual_seed(seed))


def targets(N=200, seed=0):
    mix = torch.tensor([[1.0, 0.3, 0.0], [0.0, 0.8, -0.2], [0.0, 0.0, 1.5]], dtype=f64)
    return draw(N, 3, seed=seed) @ mix + torch.tensor([5.0, -20.0, 0.0], dtype=f64)


def optimum(Y, lam_h, lam_w, D=10):
    """W and H at the optimum of ‖HWᵀ − Ỹ‖²/2N + λ_H‖H‖²/2N + λ_W‖W‖²/2: golden check 20."""
    C = Y - Y.mean(0)
    values, U = torch.linalg.eigh(C.T @ C / len(C))
    Q = torch.linalg.qr(draw(D, len(values), seed=7))[0]
    root = (values.sqrt() - math.sqrt(lam_h * lam_w)).clamp(min=0)
    W = (lam_h / lam_w) ** 0.25 * (U * root.sqrt()) @ Q.T
    H = torch.linalg.solve(W.T @ W + lam_h * torch.eye(D, dtype=f64), W.T @ C.T).T
    return W, H, C


def reference():
    """Points that need no random generator: features, last layer, targets, a layer of 3 units."""
    i, d = torch.arange(40, dtype=f64), torch.arange(12, dtype=f64)
    H = torch.stack([torch.sin(0.7 * i * (k + 1)) / (k + 1) + 0.3 * k for k in range(12)], 1)
    W = torch.stack([torch.cos(d * (k + 1) + k) for k in range(3)])
    Y = torch.stack(
        [
            torch.sin(0.7 * i) + 0.2 * torch.cos(i),
            2 * torch.sin(1.4 * i) + 0.5 * torch.sin(0.7 * i) + 1,
        ],
        1,
    )
    return H, W, Y


# --- the model's optimum ------------------------------------------------------------------------


@pytest.mark.parametrize(("lam_h", "lam_w"), [(0.01, 0.03), (0.3, 0.3)])
def test_20_the_optimum_of_the_model_has_collapsed(lam_h, lam_w):
    Y = targets()
    W, H, C = optimum(Y, lam_h, lam_w)
    # It is the optimum: the gradient by autograd vanishes, and no smaller loss is near.
    w, h = W.clone().requires_grad_(), H.clone().requires_grad_()
    loss = (h @ w.T - C).square().sum() / (2 * len(C))
    loss = loss + lam_h * h.square().sum() / (2 * len(C)) + lam_w * w.square().sum() / 2
    for gradient in torch.autograd.grad(loss, (w, h)):
        assert float(gradient.abs().max()) < 1e-12
    for variant in ("raw", "n"):
        assert float(nrc1(H, 3, variant=variant)) < 1e-20
        assert float(nrc2(H, W, variant=variant)) < 1e-20
    assert float(nrc3(W, Y, gamma=lam_h * lam_w)) < 1e-20
    assert float(nrc3(W, Y)) < 1e-20
    assert float(nrc3(W, Y, gamma=0.5 * lam_h * lam_w)) > 1e-6


def test_strong_penalties_remove_the_weakest_target():
    Y = targets()
    C = Y - Y.mean(0)
    values = torch.linalg.eigvalsh(C.T @ C / len(C))
    gamma = float(values[0] + values[1]) / 2
    W, H, _ = optimum(Y, math.sqrt(gamma), math.sqrt(gamma))
    assert int(torch.linalg.matrix_rank(W)) == 2
    assert float(nrc3(W, Y, gamma=gamma)) < 1e-20
    assert float(nrc2(H, W)) < 1e-20  # rows that depend on each other add no direction
    with pytest.raises(InputError, match="the model's W is 0"):
        nrc3(W, Y, gamma=float(values[2]))


def test_the_best_gamma_is_the_minimum():
    Y = targets()
    C = (Y - Y.mean(0)).numpy()
    root = sqrtm(np.cov(C.T, bias=True)).real
    low = math.sqrt(np.linalg.eigvalsh(root @ root)[0])
    inner = [0, 0, 0]
    for seed in range(12):
        W = draw(3, 6, seed=seed)
        if seed % 3:  # near the model's optimum: the best γ lies inside, or would lie outside
            penalty = (0.3, 0.9)[seed % 3 - 1]
            W = optimum(Y, penalty, penalty, 6)[0] + 0.05 * W
        G = (W @ W.T).numpy()
        G = G / np.linalg.norm(G)

        def distance(s, G=G):
            T = root - s * np.eye(3)
            return ((G - T / np.linalg.norm(T)) ** 2).sum()

        grid = np.linspace(0, low, 400)
        start = int(np.argmin([distance(s) for s in grid]))
        near = (grid[max(start - 1, 0)], grid[min(start + 1, 399)])
        found = minimize_scalar(distance, bounds=near, method="bounded", options={"xatol": 1e-12})
        expected = min(found.fun, distance(0), distance(low))
        inner[(start > 0) + (start == 399)] += 1
        assert float(nrc3(W, Y)) == pytest.approx(expected, rel=1e-9)
    assert min(inner) >= 2  # both ends, and the closed form between them


def test_equal_variances_ask_for_orthogonal_rows_at_any_gamma():
    Y = torch.cat([torch.eye(3, dtype=f64), -torch.eye(3, dtype=f64)])
    Q = torch.linalg.qr(draw(5, 3))[0].T
    assert float(nrc3(4 * Q, Y)) < 1e-20
    W = torch.diag(torch.tensor([0.0, 0.0, 1.0], dtype=f64))
    assert float(nrc3(W, Y)) == pytest.approx(2 - 2 / math.sqrt(3), rel=1e-12)
    assert float(nrc3(W, Y, gamma=0.1)) == pytest.approx(2 - 2 / math.sqrt(3), rel=1e-12)


def test_targets_are_centred_over_samples_not_over_outputs():
    """A port that subtracts each sample's mean over its outputs gets another Σ, and fails this."""
    Y = targets()
    W, _, _ = optimum(Y, 0.01, 0.03)
    wrong = Y - Y.mean(1, keepdim=True)
    assert float(nrc3(W, Y)) < 1e-20
    assert float(nrc3(W, Y + torch.tensor([1e3, 0, -1e3]))) < 1e-18
    assert float(nrc3(W, wrong)) > 0.1
    H = draw(200, 10)
    shifted = deep_nrc(H, Y + torch.tensor([1e3, 0, -1e3]))
    assert shifted == pytest.approx(deep_nrc(H, Y), rel=1e-9)


# --- outside references -------------------------------------------------------------------------


def test_matches_the_authors_code():
    """``compute_metrics``, run once on these points; its 1e-8 in the norms moves the ninth digit.

    github.com/Konokiii/NC_regression/blob/dcf076d1bbff7f56480e816ceb395de2d4b77af4/agent/BC.py
    The last value is its grid of 1000 γ over [0, λ_min].
    """
    H, W, Y = reference()
    W = W[:2]
    assert float(nrc1(H, 2, variant="raw")) == pytest.approx(45.743498479081765, rel=1e-9)
    assert float(nrc1(H, 2, variant="n")) == pytest.approx(0.9838212288405735, rel=1e-7)
    assert float(nrc1(H, 2, variant="nc")) == pytest.approx(0.26870574892289667, rel=3e-7)
    assert float(nrc2(H, W, variant="raw")) == pytest.approx(43.79566001477492, rel=1e-9)
    assert float(nrc2(H, W, variant="n")) == pytest.approx(0.9419285290398376, rel=1e-7)
    assert float(nrc3(W, Y, gamma=1e-4)) == pytest.approx(0.15260134907575018, rel=1e-9)
    rows = torch.zeros(2, 12, dtype=f64)
    rows[:, :2] = torch.tensor([[0.45, 0.1], [0.1, 1.2]])
    assert float(nrc3(rows, Y)) == pytest.approx(0.0020481921459739537, abs=2e-8)


def test_deep_nrc_matches_the_authors_code():
    """``compute_nrc_mlp``, run once in float64.

    github.com/altayunal/neural-collapse-regression/blob/77218cd0f550837b2b00b9b2537e7a1b9c2d2b5c/run_measurements.py
    Its CKA takes only the first n columns of the features, so it is compared where D = n.
    """
    H, W, Y = reference()
    found = deep_nrc(H, Y, W)
    assert found["noise"] == pytest.approx(0.16163179, rel=1e-7)
    assert found["alignment"] == pytest.approx(0.48082725441565277, rel=1e-10)
    assert found["error"] == pytest.approx(0.009142018515651336, rel=1e-8)
    assert deep_nrc(H[:, :2], Y)["cka"] == pytest.approx(0.4926609981617668, rel=1e-9)
    assert found["cka"] > 0.5


def test_deep_nrc_matches_scikit_learn_and_numpy():
    H, Y, W = draw(150, 8) @ draw(8, 8, seed=1), targets(150), draw(6, 8, seed=2)
    found = deep_nrc(H, Y, W)
    pca = PCA(3, svd_solver="full").fit(H.numpy())
    assert found["noise"] == pytest.approx(1 - pca.explained_variance_ratio_.sum(), rel=1e-10)
    C, D = (H - H.mean(0)).numpy(), (Y - Y.mean(0)).numpy()
    K, L = C @ C.T, D @ D.T
    cka = np.trace(K @ L) / np.sqrt(np.trace(K @ K) * np.trace(L @ L))
    assert found["cka"] == pytest.approx(cka, rel=1e-10)
    fit = np.linalg.lstsq(H.numpy(), D, rcond=None)[0]
    assert found["error"] == pytest.approx(((H.numpy() @ fit - D) ** 2).mean(), rel=1e-10)
    angles = np.linalg.svd(pca.components_ @ np.linalg.svd(W.numpy())[2][:3].T)[1]
    assert found["alignment"] == pytest.approx(angles.mean(), rel=1e-10)


def test_nrc1_is_what_pca_leaves():
    H = draw(150, 8) @ draw(8, 8, seed=1)
    total = float((H - H.mean(0)).square().sum(1).mean())
    pca = PCA(3, svd_solver="full").fit(H.numpy())
    centred = total * (1 - pca.explained_variance_ratio_.sum())
    assert float(nrc1(H - H.mean(0), 3, variant="raw")) == pytest.approx(centred, rel=1e-10)
    m = H.mean(0).numpy()
    beside = float((m**2).sum() - ((pca.components_ @ m) ** 2).sum())
    assert float(nrc1(H, 3, variant="raw")) == pytest.approx(centred + beside, rel=1e-10)


def test_collapse_of_a_deep_layer():
    Y = targets()
    C = Y - Y.mean(0)
    Q = torch.linalg.qr(draw(9, 3))[0].T
    found = deep_nrc(2 * C @ Q, Y, draw(7, 3, seed=1) @ Q)
    assert found["noise"] < 1e-12
    assert found["cka"] == pytest.approx(1, abs=1e-12)
    assert found["alignment"] == pytest.approx(1, abs=1e-12)
    assert found["error"] < 1e-20
    # A layer that reads other directions, and one of too few.
    other = torch.linalg.qr(torch.cat([Q.T, draw(9, 3, seed=4)], 1))[0][:, 3:].T
    assert deep_nrc(C @ Q, Y, other)["alignment"] < 1e-7
    assert "alignment" not in deep_nrc(C @ Q, Y, Q[:2])
    assert "alignment" not in deep_nrc(C @ Q, Y)
    # CKA does not depend on the basis, so not on which columns come first.
    turn = torch.linalg.qr(draw(9, 9, seed=5))[0]
    noisy = C @ Q + 0.3 * draw(200, 9, seed=6)
    assert deep_nrc(noisy @ turn, Y)["cka"] == pytest.approx(deep_nrc(noisy, Y)["cka"], rel=1e-10)


# --- properties ---------------------------------------------------------------------------------


def test_invariances():
    H, W = draw(100, 8) @ draw(8, 8, seed=1) + 2, draw(3, 8, seed=2)
    Q = torch.linalg.qr(draw(8, 8, seed=3))[0]
    for variant in ("raw", "n", "nc"):
        scale = 9 if variant == "raw" else 1
        whole = float(nrc1(H, 3, variant=variant))
        assert float(nrc1(3 * H @ Q, 3, variant=variant)) == pytest.approx(scale * whole, rel=1e-9)
        shift = float(nrc1(H + 5, 3, variant=variant))
        assert (shift == pytest.approx(whole, rel=1e-9)) == (variant == "nc")
        if variant != "nc":
            two = float(nrc2(H, W, variant=variant))
            mixed = draw(3, 3, seed=4) @ W @ Q  # the same row space
            assert float(nrc2(3 * H @ Q, mixed, variant=variant)) == pytest.approx(scale * two)
    Y, turn = targets(), torch.linalg.qr(draw(3, 3, seed=5))[0]
    whole = float(nrc3(W, Y))
    assert float(nrc3(7 * W @ Q, 2 * Y + 3)) == pytest.approx(whole, rel=1e-9)
    assert float(nrc3(turn @ W, Y @ turn.T)) == pytest.approx(whole, rel=1e-9)
    assert float(nrc3(W[[2, 0, 1]], Y)) != pytest.approx(whole, rel=1e-3)


def test_limits():
    H = draw(60, 5)
    for variant in ("raw", "n", "nc"):
        assert float(nrc1(H, 5, variant=variant)) < 1e-20
    flat = torch.cat([torch.eye(6, dtype=f64), -torch.eye(6, dtype=f64)])
    assert float(nrc1(flat, 2)) == pytest.approx(4 / 6, abs=1e-12)
    assert float(nrc2(flat, torch.eye(6)[:1])) == pytest.approx(5 / 6, abs=1e-12)
    assert float(nrc2(flat, torch.zeros(2, 6))) == pytest.approx(1)
    assert float(nrc1(H[:1], 2)) <= 1  # one sample: no variance, any directions


@pytest.mark.parametrize("chunk", [1, 7])
def test_chunks_equal_the_whole(monkeypatch, chunk):
    H, Y, W = draw(50, 6) + 3, targets(50), draw(4, 6, seed=1)

    def numbers():
        ones = [nrc1(H, 2, variant=v) for v in ("raw", "n", "nc")]
        return [float(v) for v in (*ones, nrc2(H, W), *deep_nrc(H, Y, W).values())]

    whole = numbers()
    monkeypatch.setattr(regression, "_CHUNK", chunk)
    assert numbers() == pytest.approx(whole, rel=1e-10)


def test_float32_agrees_also_far_away():
    H, Y, W = draw(80, 6) @ draw(6, 6, seed=1), targets(80), draw(3, 6, seed=2)
    for variant in ("raw", "n", "nc"):
        low, high = (float(nrc1(x, 2, variant=variant)) for x in (H.float(), H))
        assert low == pytest.approx(high, rel=1e-5)
    far = (H + 1000).float()
    low, high = (float(nrc1(x, 2, variant="nc")) for x in (far, far.double()))
    assert low == high == pytest.approx(float(nrc1(H, 2, variant="nc")), rel=1e-3)
    assert float(nrc2(H.float(), W.float())) == pytest.approx(float(nrc2(H, W)), rel=1e-5)
    assert float(nrc3(W.float(), Y.float())) == pytest.approx(float(nrc3(W, Y)), rel=1e-4)
    found = deep_nrc(H.float(), Y.float(), W.float())
    assert found == pytest.approx(deep_nrc(H, Y, W), rel=1e-4)


def test_gradients_are_left_alone():
    H, W = draw(20, 5).requires_grad_(), torch.nn.Parameter(draw(2, 5))
    Y = targets(20)[:, :2]
    for found in (nrc1(H, 2), nrc2(H, W), nrc3(W, Y)):
        assert not found.requires_grad


def test_bad_input():
    H, W, Y = draw(30, 5), draw(3, 5), targets(30)
    for n in (0, 6):
        with pytest.raises(InputError, match="num_targets"):
            nrc1(H, n)
    with pytest.raises(InputError, match="Did you mean"):
        nrc1(H, 2, variant="raww")
    with pytest.raises(InputError, match="variant"):
        nrc2(H, W, variant="nc")
    with pytest.raises(InputError, match="D = 4"):
        nrc2(H, W[:, :4])
    with pytest.raises(InputError, match="NaN or Inf"):
        nrc1(H.masked_fill(H > 2, torch.inf), 2)
    with pytest.raises(InputError, match="hold samples"):
        nrc1(H[:0], 2)
    with pytest.raises(InputError, match="finite"):
        nrc2(H, W / 0)
    with pytest.raises(InputError, match="share n"):
        nrc3(W[:2], Y)
    with pytest.raises(InputError, match="one target"):
        nrc3(W[:1], Y[:, :1])
    with pytest.raises(InputError, match=r"unsqueeze"):
        nrc3(W, Y[:, 0])
    with pytest.raises(InputError, match="constant"):
        nrc3(W, torch.ones(30, 3))
    with pytest.raises(InputError, match="constant"):
        nrc3(torch.zeros(3, 5), Y)
    for gamma in (-1e-3, math.nan):
        with pytest.raises(InputError, match="gamma"):
            nrc3(W, Y, gamma=gamma)
    with pytest.raises(InputError, match=r"\[30, n\]"):
        deep_nrc(H, Y[:-1])
    with pytest.raises(InputError, match="constant"):
        deep_nrc(torch.ones(30, 5), Y)
    with pytest.raises(InputError, match="D = 5"):
        deep_nrc(H, Y, W[:, :4])
    with pytest.raises(InputError, match="num_targets"):
        deep_nrc(H[:, :2], Y)
