"""NC1 to NC4 against closed forms, numpy and naive code (golden checks of the sheet, §5)."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ncmethods import metrics
from ncmethods._core import InputError, logits_of
from ncmethods._linalg import trace_pinv_product, truncated_svd
from ncmethods.features import FeatureSet
from ncmethods.frames import orthogonal_frame, simplex_etf
from ncmethods.stats import ClassStats

f64 = torch.float64
NC1 = (metrics.nc1_pinv, metrics.trace_ratio, metrics.cdnv, metrics.vci)


def cross(means, sigma):
    """2D points per class, μ_k ± σ√D·e_j: Σ_W = σ²I exactly."""
    K, D = means.shape
    step = sigma * math.sqrt(D) * torch.eye(D, dtype=means.dtype)
    features = (means[:, None] + torch.cat([step, -step])).reshape(-1, D)
    return features, torch.arange(K).repeat_interleave(2 * D)


def stats_of(features, labels, K=None):
    K = int(labels.max()) + 1 if K is None else K
    return ClassStats(K, features.shape[1]).update(features, labels)


def cloud(seed=0, K=6, D=10, N=200, long_tail=False):
    noise = torch.Generator().manual_seed(seed)
    means = 2 * torch.randn(K, D, generator=noise, dtype=f64)
    if long_tail:
        labels = torch.arange(K).repeat_interleave(torch.tensor([100, 50, 25, 12, 6, 3])[:K])
    else:
        labels = torch.randint(K, (N,), generator=noise)
    mix = torch.randn(D, D, generator=noise, dtype=f64)
    return means[labels] + torch.randn(len(labels), D, generator=noise, dtype=f64) @ mix, labels


def values(stats):
    return torch.stack([measure(stats) for measure in NC1])


# --- closed forms -------------------------------------------------------------------------------


def test_1_collapse():
    K, D = 5, 12
    means = 3 * simplex_etf(K, D, dtype=f64)
    labels = torch.arange(K).repeat(4)
    stats = stats_of(means[labels], labels)
    assert values(stats).abs().max() < 1e-12
    M, W = stats.centered_means(), 7 * means
    assert metrics.equinorm(M) < 1e-12
    assert metrics.equiangular(M) < 1e-12
    assert metrics.gram_etf(M) < 1e-12
    assert metrics.self_duality(W, M) < 1e-12
    assert metrics.duality_cosine(W, M) < 1e-12
    assert metrics.agreement(means[labels], means[labels] @ W.T, stats.means) == 1


@pytest.mark.parametrize(("K", "D", "r", "sigma"), [(5, 64, 1.0, 0.5), (3, 7, 4.0, 2.0)])
def test_2_isotropic_classes_on_an_etf(K, D, r, sigma):
    stats = stats_of(*cross(r * simplex_etf(K, D, dtype=f64), sigma))
    want = [
        sigma**2 * (K - 1) ** 2 / (K * r**2),
        D * sigma**2 / r**2,
        D * sigma**2 * (K - 1) / (2 * K * r**2),
        sigma**2 / (sigma**2 + r**2 / (K - 1)),
    ]
    torch.testing.assert_close(values(stats), torch.tensor(want, dtype=f64), rtol=1e-12, atol=0)


def test_2_printed_values():
    # (K, D, r, σ) = (10, 64, 5, .5).
    stats = stats_of(*cross(5 * simplex_etf(10, 64, dtype=f64), 0.5))
    want = torch.tensor([0.081, 0.64, 0.288, 0.0825688073], dtype=f64)
    torch.testing.assert_close(values(stats), want, rtol=1e-9, atol=0)


def test_3_two_classes_on_a_line():
    a, sigma = 1.5, 0.7
    features = torch.tensor([[a + sigma], [a - sigma], [-a + sigma], [-a - sigma]], dtype=f64)
    stats = stats_of(features, torch.tensor([0, 0, 1, 1]))
    q = sigma**2 / a**2
    want = torch.tensor([q / 2, q, q / 4, q / (q + 1)], dtype=f64)
    torch.testing.assert_close(values(stats), want, rtol=1e-12, atol=0)


def all_measures(features, labels, W):
    stats = stats_of(features, labels)
    M = stats.centered_means()
    return torch.stack(
        [
            *values(stats),
            metrics.equinorm(M),
            metrics.equiangular(M),
            metrics.gram_etf(M),
            metrics.min_angle(M),
            metrics.self_duality(W, M),
            metrics.duality_cosine(W, M),
        ]
    )


@given(st.integers(0, 10_000), st.floats(0.01, 100), st.floats(-50, 50))
@settings(max_examples=20, deadline=None)
def test_4_rotation_scale_and_shift_change_nothing(seed, scale, shift):
    features, labels = cloud(seed)
    W = torch.randn(6, 10, dtype=f64, generator=torch.Generator().manual_seed(seed))
    Q = orthogonal_frame(10, 10, dtype=f64, generator=torch.Generator().manual_seed(seed))
    moved = scale * features @ Q.T + shift
    torch.testing.assert_close(
        all_measures(moved, labels, W @ Q.T), all_measures(features, labels, W), rtol=1e-7, atol=0
    )


@pytest.mark.parametrize("weighting", ["class", "sample"])
@pytest.mark.parametrize("K", [6, 11])
def test_4_vci_under_a_general_invertible_map(K, weighting):
    noise = torch.Generator().manual_seed(5)
    labels = torch.arange(400) % K
    features = 2 * torch.randn(K, 10, generator=noise, dtype=f64)[labels]
    features += torch.randn(400, 10, generator=noise, dtype=f64)
    A = torch.randn(10, 10, dtype=f64, generator=noise)
    before, after = stats_of(features, labels), stats_of(features @ A, labels)
    same = [metrics.vci(s, weighting=weighting) for s in (before, after)]
    torch.testing.assert_close(*same, rtol=1e-9, atol=0)
    one, two = (metrics.nc1_pinv(s, weighting=weighting) for s in (before, after))
    if K - 1 < 10:
        assert abs(one - two) > 0.01 * one
    else:  # Σ_B has full rank, so NC1 is invariant too
        torch.testing.assert_close(one, two, rtol=1e-9, atol=0)


def test_5_one_hot_means_are_an_etf_when_centred():
    rows = torch.eye(10, dtype=f64)
    centred = rows - rows.mean(0)
    assert metrics.gram_etf(centred) < 1e-14
    assert metrics.equiangular(centred) < 1e-14
    # Uncentred rows tell the orthogonal frame from the ETF.
    assert metrics.equiangular(rows) == pytest.approx(1 / 9, abs=1e-14)
    assert len(truncated_svd(centred, 10)[0]) == 9


def test_6_gram_distance_of_uncentred_rows():
    eye = metrics.gram_etf(torch.eye(10))
    assert eye == pytest.approx(math.sqrt(2 - 2 * math.sqrt(0.9)), abs=1e-12)
    assert eye == pytest.approx(0.3203644860, abs=1e-9)
    assert metrics.gram_etf(torch.ones(10, 4)) == pytest.approx(math.sqrt(2), abs=1e-12)


def test_7_opposite_and_deranged_rows():
    M = simplex_etf(10, 16, dtype=f64)
    assert metrics.self_duality(-M, M) == pytest.approx(2)
    assert metrics.duality_cosine(-M, M) == pytest.approx(2)
    assert metrics.agreement(M, M @ -M.T, M) == 0
    moved = M.roll(1, 0)
    assert metrics.self_duality(moved, M) == pytest.approx(1.490711985, abs=1e-9)
    assert metrics.duality_cosine(moved, M) == pytest.approx(1 + 1 / 9)
    assert metrics.agreement(M, M @ moved.T, M) == 0


def test_8_self_duality_is_papyans_not_the_product_form():
    noise = torch.Generator().manual_seed(6)
    M, A = simplex_etf(5, 8, dtype=f64), torch.randn(8, 8, dtype=f64, generator=noise)
    means, W = M @ A, M @ torch.linalg.inv(A).T
    product = W @ means.T
    E = (torch.eye(5, dtype=f64) - 0.2) / 2
    assert torch.linalg.matrix_norm(product / torch.linalg.matrix_norm(product) - E) < 1e-12
    assert metrics.self_duality(W, means) > 0.1
    direct = (W / W.norm() - means / means.norm()).norm()
    assert metrics.self_duality(W, means) == pytest.approx(direct.item(), abs=1e-14)


def test_10_cdnv_of_three_points():
    means = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]], dtype=f64)
    step = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=f64)
    root = torch.tensor([1.0, 2.0, 3.0], dtype=f64).sqrt()
    features = (means[:, None] + root[:, None, None] * step).reshape(-1, 2)
    stats = stats_of(features, torch.tensor([0, 0, 1, 1, 2, 2]))
    assert stats.trace.tolist() == pytest.approx([2, 4, 6])
    assert metrics.cdnv(stats) == pytest.approx(0.1305555555555, abs=1e-12)


def test_18_part_of_a_larger_etf():
    M = simplex_etf(50, 64, dtype=f64)[:7]
    assert metrics.gram_etf(M) == pytest.approx(0.33604704, abs=1e-8)
    centred = M - M.mean(0)
    assert metrics.gram_etf(centred) < 1e-13
    assert metrics.equiangular(centred) < 1e-13
    assert metrics.equiangular(M) == pytest.approx(1 / 6 - 1 / 49, abs=1e-13)


# --- outside references -------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["class", "sample"])
@pytest.mark.parametrize(("K", "D"), [(6, 10), (6, 3)])
def test_nc1_and_vci_against_numpy(weighting, K, D):
    features, labels = cloud(1, K, D, long_tail=True)
    stats = stats_of(features, labels)
    x, y = features.numpy(), labels.numpy()
    n = np.bincount(y)
    mu = np.stack([x[y == c].mean(0) for c in range(K)])
    share = n / n.sum() if weighting == "sample" else np.full(K, 1 / K)
    M = mu - share @ mu
    S_b = (M * share[:, None]).T @ M
    r = x - mu[y]
    S_w = r.T @ r / len(x)
    want = np.trace(S_w @ np.linalg.pinv(S_b, rcond=1e-10, hermitian=True)) / K
    assert metrics.nc1_pinv(stats, weighting=weighting).item() == pytest.approx(want, rel=1e-9)
    want = np.trace(S_w) / np.trace(S_b)
    assert metrics.trace_ratio(stats, weighting=weighting).item() == pytest.approx(want, rel=1e-12)
    rank = min(K - 1, D)
    want = 1 - np.trace(np.linalg.pinv(S_w + S_b, rcond=1e-12) @ S_b) / rank
    assert metrics.vci(stats, weighting=weighting).item() == pytest.approx(want, rel=1e-9)


def test_weighting_matters_on_a_long_tail():
    stats = stats_of(*cloud(2, long_tail=True))
    by_class, by_sample = (metrics.nc1_pinv(stats, weighting=w).item() for w in ("class", "sample"))
    assert by_sample > 2 * by_class
    with pytest.raises(InputError, match="Unknown weighting 'sampel'"):
        metrics.nc1_pinv(stats, weighting="sampel")


def test_cdnv_against_a_double_loop():
    features, labels = cloud(3, long_tail=True)
    x, y = features.numpy(), labels.numpy()
    mu = [x[y == c].mean(0) for c in range(6)]
    v = [((x[y == c] - mu[c]) ** 2).sum(1).mean() for c in range(6)]
    pairs = [
        (v[i] + v[j]) / (2 * ((mu[i] - mu[j]) ** 2).sum())
        for i in range(6)
        for j in range(6)
        if i != j
    ]
    got = metrics.cdnv(stats_of(features, labels)).item()
    assert got == pytest.approx(np.mean(pairs), rel=1e-12)


def test_min_angle_against_arccos_and_at_tiny_angles():
    rows = torch.randn(7, 5, dtype=f64, generator=torch.Generator().manual_seed(7))
    cosine = np.corrcoef(np.hstack([rows.numpy(), -rows.numpy()]))  # rows of mean 0
    want = np.degrees(np.arccos((cosine - 2 * np.eye(7)).max()))
    assert metrics.min_angle(rows).item() == pytest.approx(want, rel=1e-9)
    for tiny in (1e-5, 1e-9):
        pair = torch.tensor([[1.0, 0.0], [math.cos(tiny), math.sin(tiny)]], dtype=f64)
        assert metrics.min_angle(pair).item() == pytest.approx(math.degrees(tiny), rel=1e-6)
    opposite = torch.tensor([[1.0, 0.0], [-3.0, 0.0]])
    assert metrics.min_angle(opposite).item() == pytest.approx(180)
    assert metrics.min_angle(torch.ones(3, 2)).item() == 0


@pytest.mark.parametrize(
    ("R", "weight_angle", "mean_angle"),
    [(1, 96.379, 96.379), (10, 88.088, 100.763), (100, 70.243, 103.202), (1000, 47.875, 104.067)],
)
def test_seli(R, weight_angle, mean_angle):
    """Thrampoulidis et al. 2022: G_W = UΣUᵀ, G_H = VΣVᵀ of the SEL matrix (losses sheet, 13)."""
    labels = np.repeat(np.arange(10), [R] * 5 + [1] * 5)
    Z = np.eye(10)[:, labels] - 0.1  # [K, N]
    U, S, Vt = np.linalg.svd(Z, full_matrices=False)
    root = np.sqrt(np.where(S > 1e-9, S, 0))
    W, H = torch.from_numpy(U * root), torch.from_numpy(Vt.T * root)
    minority = [int(np.flatnonzero(labels == c)[0]) for c in range(5, 10)]
    assert metrics.min_angle(W[5:]).item() == pytest.approx(weight_angle, abs=1e-3)
    assert metrics.min_angle(H[minority]).item() == pytest.approx(mean_angle, abs=1e-3)
    # The same two numbers are what report gives for rare classes: features H, rows W.
    features = FeatureSet(torch.cat((H, H)), torch.from_numpy(np.tile(labels, 2)), 10)
    head = nn.Linear(10, 10, bias=False, dtype=f64)
    with torch.no_grad():
        head.weight.copy_(W)
    out = metrics.report(features, head, rare=range(5, 10))
    assert out["angle/rare_weight_min"] == pytest.approx(weight_angle, abs=1e-3)
    if R == 100:
        means = np.stack([H.numpy()[labels == c][0] for c in range(10)])
        ratio = [np.linalg.norm(m[0]) / np.linalg.norm(m[9]) for m in (W.numpy(), means)]
        assert ratio == pytest.approx([2.4013, 0.3399], abs=1e-4)


# --- numerics -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [1.0, 1e-3])
def test_17_offset_in_float32(sigma):
    """NC1 within 1e-4 at offset 1000, never negative, on the features as float32 holds them."""
    noise = torch.Generator().manual_seed(8)
    means = torch.randn(20, 64, generator=noise, dtype=f64)
    labels = torch.arange(4000) % 20
    features = means[labels] + sigma * torch.randn(4000, 64, generator=noise, dtype=f64)
    stored = (features + 1000).float()
    exact = stats_of(stored.double(), labels)
    got = stats_of(stored, labels)
    for measure in NC1:
        assert measure(got) > 0
        torch.testing.assert_close(measure(got), measure(exact), rtol=1e-4, atol=0)
    if sigma == 1.0:
        near = stats_of(features, labels)
        torch.testing.assert_close(values(got), values(near), rtol=1e-4, atol=0)


def test_collapse_at_an_offset_is_still_measured():
    means = 5 * simplex_etf(10, 32, dtype=f64)
    features, labels = cross(means, 1e-3)
    near, far = stats_of(features, labels), stats_of(features + 1000, labels)
    nc1 = metrics.nc1_pinv(near).item()
    assert nc1 == pytest.approx(1e-6 * 81 / 250, rel=1e-9)
    assert metrics.nc1_pinv(far).item() == pytest.approx(nc1, rel=1e-6)


def test_coinciding_means_are_not_collapse():
    """Dead features: Σ_B = 0 up to rounding. That is NaN, not a perfect NC1 of 0."""
    labels = torch.arange(12) % 3
    for value in (3.3, 0.0, 1000.1):
        stats = stats_of(torch.full((12, 4), value), labels)
        assert metrics.nc1_pinv(stats).isnan()
    moved = torch.full((12, 4), 1000.0)
    moved[labels == 1, 0] += 1.0
    assert metrics.nc1_pinv(stats_of(moved, labels)) == 0


def test_16_classes_without_samples_change_nothing():
    features, labels = cloud(9)
    spread = torch.tensor([0, 2, 3, 5, 6, 8])  # 1, 4, 7, 9 stay empty
    full, holes = stats_of(features, labels), stats_of(features, spread[labels], 10)
    assert (full.K_active, holes.K_active) == (6, 6)
    torch.testing.assert_close(values(holes), values(full), rtol=1e-12, atol=0)
    a, b = metrics.report(full), metrics.report(holes)
    assert a.keys() == b.keys()
    assert list(a.values()) == pytest.approx(list(b.values()), rel=1e-12, nan_ok=True)


def test_single_sample_classes():
    means = 2 * simplex_etf(4, 6, dtype=f64)
    stats = stats_of(means, torch.arange(4))
    with pytest.warns(UserWarning, match="No class has two samples"):
        assert values(stats).isnan().all()
    # One class with spread, three single points: only that class contributes.
    features = torch.cat([means, means[:1] + 1, means[:1] - 1])
    labels = torch.tensor([0, 1, 2, 3, 0, 0])
    v = 2 * 6 / 3
    square = torch.cdist(means, means).square()
    want = sum(v / (2 * square[0, j]) for j in range(1, 4)) * 2 / 12
    assert metrics.cdnv(stats_of(features, labels)).item() == pytest.approx(want.item(), rel=1e-9)


def test_fewer_than_two_classes_raise():
    stats = ClassStats(3, 2).update(torch.randn(4, 2), torch.tensor([1, 1, 1, 1]))
    for measure in NC1:
        with pytest.raises(InputError, match="at least two need samples, got 1"):
            measure(stats)
    with pytest.raises(InputError, match="empty"):
        metrics.nc1_pinv(ClassStats(3, 2))
    flat = ClassStats(3, 2, scatter=False).update(torch.randn(4, 2), torch.tensor([0, 1, 1, 2]))
    assert metrics.trace_ratio(flat) > 0
    assert metrics.cdnv(flat) > 0
    for measure in (metrics.nc1_pinv, metrics.vci):
        with pytest.raises(InputError, match="keeps no scatter"):
            measure(flat)


def test_rank_is_explicit():
    rows = torch.diag(torch.tensor([1.0, 1e-3, 1e-12, 0.0], dtype=f64))
    assert len(truncated_svd(rows, 4)[0]) == 3
    assert len(truncated_svd(rows, 2)[0]) == 2
    assert len(truncated_svd(rows, 4, size=1e6)[0]) == 2
    for D in (2, 6):  # by the Gram matrix of either side
        wide = torch.randn(4, D, dtype=f64)
        S, V = truncated_svd(wide, 2)
        assert torch.allclose(S, torch.linalg.svdvals(wide)[:2], rtol=1e-12)
        assert torch.allclose(V @ wide.T @ wide @ V.T, torch.diag(S**2), atol=1e-10)
    sigma = torch.diag(torch.tensor([4.0, 2.0, 0.0], dtype=f64))
    R = torch.tensor([[2.0, 0.0, 5.0], [0.0, 1.0, 0.0]], dtype=f64)
    assert trace_pinv_product(sigma, R) == pytest.approx(1 + 0.5)


@pytest.mark.parametrize("measure", [metrics.equinorm, metrics.equiangular, metrics.gram_etf])
def test_rows_must_be_a_matrix(measure):
    with pytest.raises(InputError, match=r"rows must be \[K, D\] with K ≥ 2"):
        measure(torch.randn(1, 4))
    with pytest.raises(InputError, match="rows must be"):
        measure(torch.randn(4))


def test_equinorm_is_the_coefficient_of_variation():
    rows = torch.randn(8, 5, dtype=f64, generator=torch.Generator().manual_seed(9))
    norms = np.linalg.norm(rows.numpy(), axis=1)
    assert metrics.equinorm(rows).item() == pytest.approx(norms.std() / norms.mean(), rel=1e-12)


def test_duality_needs_equal_shapes():
    for measure in (metrics.self_duality, metrics.duality_cosine):
        with pytest.raises(InputError, match=r"both be \[K, D\].*after the head's neck"):
            measure(torch.randn(4, 3), torch.randn(4, 5))


# --- NC4 ----------------------------------------------------------------------------------------


def test_nearest_mean_against_distances():
    features, labels = cloud(10)
    means = stats_of(features, labels).means
    want = torch.cdist(features, means).argmin(1)
    assert torch.equal(metrics.nearest_mean(features, means), want)
    assert torch.equal(metrics.nearest_mean((features + 1000).float(), means + 1000), want)
    assert metrics.nearest_mean(features[:0], means).shape == (0,)
    holes = torch.cat([means, torch.full((2, 10), torch.nan, dtype=f64)])
    assert torch.equal(metrics.nearest_mean(features, holes), want)


def test_nearest_mean_beyond_one_chunk(monkeypatch):
    monkeypatch.setattr(metrics.nc4, "_CHUNK", 10_000)
    means = torch.randn(3, 2, dtype=f64)
    features = torch.randn(20_000, 2, dtype=f64)
    want = torch.cdist(features, means).argmin(1)
    assert torch.equal(metrics.nearest_mean(features, means), want)


def test_17_agreement_uses_the_bias():
    """b' = b − W·offset undoes a shift; a head without its bias would disagree."""
    noise = torch.Generator().manual_seed(11)
    M = simplex_etf(8, 12, dtype=f64)
    labels = torch.arange(400) % 8
    features = M[labels] + 0.05 * torch.randn(400, 12, generator=noise, dtype=f64)
    offset = 1000 * torch.randn(12, generator=noise, dtype=f64)
    head = nn.Linear(12, 8, dtype=f64)
    with torch.no_grad():
        head.weight.copy_(M)
        head.bias.zero_()
    means = stats_of(features, labels).means
    before = metrics.agreement(features, logits_of(head, features), means)
    with torch.no_grad():
        head.bias -= head.weight @ offset
    moved = (features + offset).float()
    logits = logits_of(head, moved.double()).detach()
    after = metrics.agreement(moved, logits, stats_of(moved, labels).means)
    assert before == after == 1
    without = metrics.agreement(moved, moved.double() @ M.T, stats_of(moved, labels).means)
    assert without < 0.5


def test_agreement_errors():
    features, means = torch.randn(4, 3), torch.randn(5, 3)
    for bad, words in [
        ((features, torch.randn(3, 5), means), "4 features and 3 logits"),
        ((features[:0], torch.randn(0, 5), means), "0 features"),
        ((features, torch.randn(4, 6), means), "K = 5 columns"),
        ((features[:, :2], torch.randn(4, 5), means), "D = 3 columns"),
        ((features, torch.randn(4, 5), means * torch.nan), "No class has a mean"),
    ]:
        with pytest.raises(InputError, match=words):
            metrics.agreement(*bad)
