import copy
import errno
import functools
import io
import json
import operator
import os
import pickle

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from distributed import run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ncmethods import _core
from ncmethods import stats as module
from ncmethods._core import InputError
from ncmethods.frames import simplex_etf
from ncmethods.stats import ClassStats, frequency_groups, rare_classes

F64 = torch.float64


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def draw(N, K, D, offset=0.0, sigma=1.0, dtype=torch.float32, seed=0):
    """Gaussian classes about random means at an offset; labels in random order."""
    generator = seeded(seed)
    means = offset + torch.randn(K, D, dtype=F64, generator=generator)
    y = torch.randint(K, (N,), generator=generator)
    x = means[y] + sigma * torch.randn(N, D, dtype=F64, generator=generator)
    return x.to(dtype), y


def two_pass(x, y, K, weight=None):
    """Counts, means, traces and scatter by the definitions, in float64."""
    x = x.double()
    D = x.shape[1]
    counts = torch.bincount(y, minlength=K)
    means, trace = torch.full((K, D), torch.nan, dtype=F64), torch.zeros(K, dtype=F64)
    within = torch.zeros(D, D, dtype=F64)
    for c in y.unique().tolist():
        rows = x[y == c]
        means[c] = rows.mean(0)
        r = rows - means[c]
        trace[c] = r.square().sum()
        within += (1.0 if weight is None else float(weight[c])) * r.T @ r
    return counts, means, trace, within


def stats_of(x, y, K, batch=None, **kwargs):
    stats = ClassStats(K, x.shape[1], **kwargs)
    for rows in torch.arange(len(x)).split(batch or max(len(x), 1)):
        stats.update(x[rows], y[rows])
    return stats


def apart(a, b):
    """Relative Frobenius distance, NaN matching NaN."""
    a, b = a.double(), b.double()
    assert torch.equal(a.isnan(), b.isnan())
    a, b = a.nan_to_num(), b.nan_to_num()
    return float((a - b).norm() / b.norm().clamp(min=1e-300))


def assert_same(a, b, bound):
    """Two statistics agree: counts exactly, the rest to ``bound`` of the scatter."""
    assert torch.equal(a.counts, b.counts)
    assert apart(a.means, b.means) <= bound
    size = float(b.trace.sum())
    assert float((a.trace - b.trace).abs().max()) <= bound * max(size, 1e-300)
    if a.scatter:
        assert float((a.within - b.within).norm()) <= bound * max(float(b.within.norm()), 1e-300)


def assert_equal(a, b):
    """Two statistics are the same bits."""
    for name in ("counts", "trace") + (("within",) if a.scatter else ()):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert torch.equal(a.means.nan_to_num(), b.means.nan_to_num())
    assert a.ignored == b.ignored


def assert_right(stats, x, y, bound, weight=None):
    counts, means, trace, within = two_pass(x, y, stats.num_classes, weight)
    assert torch.equal(stats.counts, counts)
    assert apart(stats.means, means) <= bound
    assert float((stats.trace - trace).abs().max()) <= bound * float(trace.sum())
    if stats.scatter:
        assert apart(stats.within, within) <= bound
        assert torch.equal(stats.within, stats.within.T)


# --- accuracy -----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["random", "sorted"])
@pytest.mark.parametrize(("offset", "sigma"), [(10, 1), (1000, 1), (10, 1e-3)])
def test_accuracy_in_float32(offset, sigma, order):
    x, y = draw(20_000, 10, 64, offset, sigma)
    if order == "sorted":
        y, by = y.sort()
        x = x[by]
    assert_right(stats_of(x, y, 10, batch=256), x, y, 2e-6)


@pytest.mark.parametrize("K", [3, 3000])  # fewer and more classes than rows that are summed at once
@pytest.mark.parametrize("offset", [0, 1000])
def test_accuracy_in_float64(K, offset):
    x, y = draw(9_000, K, 12, offset, dtype=F64)
    assert_right(stats_of(x, y, K, batch=700), x, y, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("D", [255, 256, 301])
def test_block_rows_of_the_symmetric_product(D, dtype):
    """From D = 256 on only blocks on and above the diagonal are multiplied."""
    x, y = draw(2_500, 3, D, offset=10, dtype=dtype)
    stats = stats_of(x, y, 3)
    bound = 2e-6 if dtype == torch.float32 else 1e-12
    for _ in range(2):  # a read fills the lower triangle; the next update starts from there
        assert_right(stats, x, y, bound)
        stats.update(x, y)
        x, y = torch.cat([x, x]), torch.cat([y, y])


def test_long_streams_do_not_wear_out_float32():
    x, y = draw(600_000, 4, 3, offset=10)
    assert_right(stats_of(x, y, 4), x, y, 2e-7)


@pytest.mark.parametrize("own_class", [True, False])
@pytest.mark.parametrize("size", [1e4, 1e7])
def test_outlier_in_the_first_row_costs_the_others_nothing(size, own_class):
    x, y = draw(5_000, 10, 16)
    if own_class:
        y[y == 3] = 4
    x[0], y[0] = size, 3
    stats = stats_of(x, y, 10)
    _, means, trace, within = two_pass(x, y, 10)
    assert apart(stats.within, within) <= 2e-6
    others = torch.arange(10) != 3
    assert float((stats.trace / trace - 1)[others].abs().nan_to_num().max()) <= 2e-6
    assert apart(stats.means[others], means[others]) <= 2e-6


def test_accuracy_with_drifting_means():
    x, y = draw(20_000, 5, 16, sigma=0.1)
    x += torch.linspace(0, 500, len(x))[:, None]
    assert_right(stats_of(x, y, 5, batch=100), x, y, 2e-6)


def test_accuracy_with_classes_far_apart():
    x, y = draw(8_000, 6, 16, sigma=1.0)
    x += 1e4 * y[:, None]
    assert_right(stats_of(x, y, 6, batch=100), x, y, 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_golden_collapse_at_offset_1000(dtype):
    """Classes k at μ_k ± σ√D e_j give Σ_W = σ²I exactly: NC1 = σ²(K−1)²/(K r²) (sheet, check 2)."""
    K, D, offset = 5, 8, 1000.0
    sigma = 1e-3 * 2**0.5
    M = simplex_etf(K, D, rotation="canonical", dtype=F64)
    # Steps of 2⁻¹³ are exact in float32 at 1000: the design survives the rounding of the features.
    M = (M * 2**10).round() / 2**10 + offset
    arm = round(sigma * D**0.5 * 2**13) / 2**13
    x = torch.cat([m + s * arm * torch.eye(D, dtype=F64) for m in M for s in (1, -1)]).to(dtype)
    y = torch.arange(K).repeat_interleave(2 * D)
    for batch in (1, 7, None):
        stats = stats_of(x, y, K, batch=batch)
        centred = stats.centered_means()
        eigen, axes = torch.linalg.eigh(stats.sigma_b())
        keep = eigen > 1e-9 * eigen.max()
        assert int(keep.sum()) == K - 1
        inverse = (axes[:, keep] / eigen[keep]) @ axes[:, keep].T
        nc1 = float((stats.sigma_w @ inverse).trace()) / K
        want = arm**2 / D * float(torch.trace(inverse)) / K
        assert nc1 == pytest.approx(want, rel=1e-5)
        assert 1e-6 < nc1 < 1e-5
        assert float(torch.linalg.eigvalsh(stats.within).min()) > 0
        torch.testing.assert_close(centred, M - M.mean(0), rtol=0, atol=1e-9)
    assert (stats_of(M[y], y, K).trace >= 0).all()  # total collapse


def test_total_collapse_is_zero_and_not_negative():
    x = torch.full((5_000, 4), 1000.1)
    stats = stats_of(x, torch.arange(5_000) % 3, 3, batch=64)
    assert float(stats.trace.min()) >= 0
    assert float(stats.trace.max()) <= 1e-6
    assert float(stats.within.diagonal().min()) >= 0


def test_derived_covariances():
    x, y = draw(3_000, 4, 6, offset=3, dtype=F64)
    y[:2000] = y[:2000] % 2  # unequal counts
    stats = stats_of(x, y, 4)
    counts, means, _, within = two_pass(x, y, 4)
    share = counts.double() / counts.sum()
    torch.testing.assert_close(stats.sigma_w, within / 3_000)
    torch.testing.assert_close(stats.sigma_t, torch.cov(x.T, correction=0))
    torch.testing.assert_close(stats.global_mean("sample"), x.mean(0))
    torch.testing.assert_close(stats.global_mean(), means.mean(0))
    assert apart(stats.sigma_b(), torch.cov(means.T, correction=0)) < 1e-13
    by_sample = torch.cov(means.T, correction=0, fweights=counts)
    assert apart(stats.sigma_b("sample"), by_sample) < 1e-13
    torch.testing.assert_close(stats.class_shares("sample"), share)
    torch.testing.assert_close(stats.class_shares(), torch.full((4,), 0.25, dtype=F64))
    torch.testing.assert_close(stats.trace.sum(), stats.within.trace())
    with pytest.raises(InputError, match=r"Unknown weighting 'samples'.*'sample'"):
        stats.sigma_b("samples")


def test_golden_imbalanced():
    """Sheet, check 15: {0; 2, 2, 2} has μ_G 1 or 1.5, Σ_B 1 or .75, total variance .75."""
    stats = ClassStats(2, 1).update(
        torch.tensor([[0.0], [2], [2], [2]]), torch.tensor([0, 1, 1, 1])
    )
    assert stats.global_mean().tolist() == [1.0]
    assert stats.global_mean("sample").tolist() == [1.5]
    assert stats.sigma_b().item() == pytest.approx(1)
    assert stats.sigma_b("sample").item() == pytest.approx(0.75)
    assert stats.sigma_t.item() == pytest.approx(0.75)


def test_golden_train_mean_scatter():
    """Sheet, check 14: scatter about other means = S + Σ n_c (μ_c − m_c)(μ_c − m_c)ᵀ."""
    x, y = draw(4_000, 5, 7, offset=5, dtype=F64)
    train, test = stats_of(x[:2000], y[:2000], 5), stats_of(x[2000:], y[2000:], 5)
    r = x[2000:] - train.means[y[2000:]]
    shift = test.means - train.means
    got = test.within + (shift * test.counts[:, None]).T @ shift
    assert apart(got, r.T @ r) <= 1e-13


# --- one stream, many ways to cut it ------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("K", [4, 5000])
def test_batch_split_changes_no_bit(K, dtype):
    x, y = draw(2 * module._CHUNK + 77, K, 5, offset=10, dtype=dtype)
    y[::50] = -1
    whole = stats_of(x, y, K)
    for batch in (1 if K == 4 else 3, 100, module._CHUNK, module._CHUNK + 1):
        assert_equal(stats_of(x, y, K, batch=batch), whole)


@pytest.mark.parametrize("rows", [-1, 0, 1])
@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("K", [2, 2048, 2049])
def test_chunk_boundaries(K, chunks, rows):
    N = chunks * module._CHUNK + rows
    x, y = draw(N, K, 3, offset=10)
    assert_right(stats_of(x, y, K, batch=999), x, y, 2e-6)


def test_many_and_few_classes_take_the_same_value():
    """The slot per class and the slot per row are two ways to one number."""
    x, y = draw(1_500, 8, 6, offset=100)
    few, many = stats_of(x, y, 8), stats_of(x, y, 1_501)
    assert apart(many.within, few.within) <= 2e-6
    assert apart(many.trace[:8], few.trace) <= 2e-6
    assert torch.equal(many.counts[:8], few.counts)
    assert many.K_active == 8


def test_reads_do_not_disturb_the_stream():
    x, y = draw(3_000, 4, 6, offset=10)
    stats = ClassStats(4, 6)
    for rows in torch.arange(3_000).split(170):
        stats.update(x[rows], y[rows])
        assert torch.equal(stats.counts, torch.bincount(y[: rows[-1] + 1], minlength=4))
        assert torch.equal(stats.within, stats.within.T)
        repr(stats)
    assert_right(stats, x, y, 2e-6)


def test_mixed_precisions_in_one_stream():
    x, y = draw(6_000, 4, 6, offset=10, dtype=F64)
    stats = ClassStats(4, 6)
    stats.update(x[:1000].float(), y[:1000]).update(x[1000:4000], y[1000:4000])
    stats.update(x[4000:].float(), y[4000:])
    assert_right(stats, x, y, 2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_upcast(dtype):
    x, y = draw(3_000, 4, 6, dtype=dtype)
    assert_equal(stats_of(x, y, 4), stats_of(x.float(), y, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_and_matmul_precision_change_nothing(dtype):
    x, y = draw(3_000, 4, 6, offset=10)
    plain = stats_of(x, y, 4)
    with torch.autocast("cpu", dtype):
        cast = stats_of(x, y, 4)
        assert_equal(cast, plain)
        assert torch.equal(cast.sigma_b(), plain.sigma_b())
        merged = cast + cast
    assert merged.within.dtype == F64
    assert torch.equal(merged.within, (plain + plain).within)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert_equal(stats_of(x, y, 4), plain)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_features_with_grad_keep_no_graph():
    x, y = draw(3_000, 4, 6)
    x.requires_grad_()
    stats = ClassStats(4, 6).update(x * 1.0, y)
    for value in (stats.within, stats.means, stats.trace, stats.sigma_b(), (stats + stats).within):
        assert not value.requires_grad
        assert value.grad_fn is None
    assert torch.equal(x, draw(3_000, 4, 6)[0])  # and the input is left as it was


def test_the_input_is_not_changed():
    x, y = draw(module._CHUNK, 4, 6)
    x[5], y[7] = torch.nan, -1
    before = x.clone(), y.clone()
    stats = ClassStats(4, 6).update(x, y)
    assert stats.ignored == 1
    assert torch.equal(x.nan_to_num(), before[0].nan_to_num())
    assert torch.equal(y, before[1])


@pytest.mark.parametrize("N", [3_000, 500])
def test_inference_mode_leaves_a_state_that_can_be_used_outside(N):
    x, y = draw(N, 4, 6)
    with torch.inference_mode():
        born = ClassStats(4, 6).update(x.clone(), y.clone())
        summed = sum([born, born])
    assert_equal(born, stats_of(x, y, 4))
    for stats in (born, summed):
        seen = stats.N
        assert stats.update(x, y).N - seen == N
    with torch.inference_mode():
        born.update(x, y)
        _ = born.within
    assert born.update(x, y).N == 4 * N


def test_views_and_strides():
    x, y = draw(500, 4, 12)
    strided = ClassStats(4, 6).update(x[:, ::2], y)
    assert_equal(strided, ClassStats(4, 6).update(x[:, ::2].contiguous(), y))
    flipped = ClassStats(4, 500 // 2).update(x[:250].T, torch.arange(12) % 4)
    assert flipped.N == 12


# --- classes and labels -------------------------------------------------------------------------


def test_empty_batches():
    x, y = draw(100, 3, 4)
    stats = ClassStats(3, 4).update(x[:0], y[:0])
    assert stats.N == 0
    stats.update(x, y).update(x[:0], y[:0])
    assert_equal(stats, stats_of(x, y, 3))


def test_read_before_update():
    stats = ClassStats(3, 4)
    assert stats.counts.tolist() == [0, 0, 0]
    assert (stats.N, stats.K_active, stats.ignored) == (0, 0, 0)
    assert stats.means.isnan().all()
    assert stats.trace.tolist() == [0, 0, 0]
    assert not stats.within.any()
    for read in (
        lambda: stats.sigma_w,
        lambda: stats.sigma_t,
        stats.sigma_b,
        stats.global_mean,
        stats.centered_means,
        stats.class_shares,
    ):
        with pytest.raises(InputError, match="is empty: call update"):
            read()
    assert "num_classes=3, dim=4, N=0" in repr(stats)


def test_single_sample_classes_have_no_variance():
    x, _ = draw(6, 6, 4, offset=1000)
    stats = ClassStats(6, 4).update(x, torch.arange(6))
    assert torch.equal(stats.means, x.double())
    assert not stats.trace.any()
    assert not stats.within.any()


def test_golden_an_empty_class_changes_only_K_active():
    x, y = draw(2_000, 4, 6, offset=10, dtype=F64)
    y[y == 2] = 3
    with_empty, without = stats_of(x, y, 4), stats_of(x, y - (y == 3).long(), 3)
    assert with_empty.K_active == 3
    assert with_empty.active.tolist() == [True, True, False, True]
    assert with_empty.means[2].isnan().all()
    assert with_empty.centered_means()[2].isnan().all()
    assert with_empty.counts[2] == with_empty.trace[2] == 0
    for read in ("sigma_w", "sigma_t"):
        torch.testing.assert_close(getattr(with_empty, read), getattr(without, read))
    for weighting in ("class", "sample"):
        torch.testing.assert_close(with_empty.sigma_b(weighting), without.sigma_b(weighting))
        torch.testing.assert_close(
            with_empty.global_mean(weighting), without.global_mean(weighting)
        )


def test_negative_labels_are_ignored_and_counted():
    x, y = draw(3_000, 4, 6, offset=10)
    masked = y.clone()
    masked[::3], masked[1] = -100, -1
    x[0] = torch.nan  # an ignored row may hold anything
    stats = stats_of(x, masked, 4, batch=100)
    assert stats.ignored == 1001
    assert_right(stats, x[masked >= 0], masked[masked >= 0], 2e-6)
    nothing = ClassStats(4, 6).update(x, torch.full_like(y, -1))
    assert (nothing.N, nothing.ignored) == (0, 3000)


@pytest.mark.parametrize("K", [4, 5000])
def test_bad_rows_raise_at_the_first_read_and_touch_nothing_else(K):
    x, y = draw(3_000, 4, 6, offset=10)
    good = torch.ones(3_000, dtype=torch.bool)
    good[[0, 10, 2500, 2501]] = False
    y[0], x[10], x[2500, 3], x[2501, 0] = K, torch.inf, torch.nan, -torch.inf
    stats = ClassStats(K, 6)
    for rows in torch.arange(3_000).split(256):
        stats.update(x[rows], y[rows])  # never here: that would be a host sync
    reads = [
        lambda: stats.counts,
        lambda: stats.means,
        lambda: stats.trace,
        lambda: stats.within,
        lambda: stats.sigma_w,
        lambda: stats.N,
        stats.global_mean,
        stats.sigma_b,
        lambda: (stats + ClassStats(K, 6)).within,
    ]
    for read in reads:
        with pytest.raises(InputError, match=rf"1 labels were ≥ num_classes = {K} "):
            read()
    y[0] = 1
    good[0] = True
    stats = stats_of(x, y, K)
    with pytest.raises(InputError, match="3 feature rows held NaN or Inf"):
        stats.means  # noqa: B018
    stats._rejected.zero_()  # look behind the error
    want = stats_of(x[good], y[good], K)
    assert_same(stats, want, 2e-6)


def test_label_dtypes():
    x, y = draw(300, 200, 4)
    want = stats_of(x, y, 200)
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert_equal(stats_of(x, y.to(dtype), 200), want)


def test_wrong_arguments():
    x, y = draw(10, 3, 4)
    stats = ClassStats(3, 4)
    for features, labels, words in [
        (x[0], y, r"2-D tensor \[N, D\]"),
        (x[None], y, r"2-D tensor \[N, D\]"),
        (x.int(), y, "floating point"),
        (x[:, :3], y, r"D = 4 columns.*\(10, 3\)"),
        (x.tolist(), y, "2-D tensor"),
        (x, y.float(), "integers"),
        (x, y[None], "1-D tensor"),
        (x, y[:9], "10 rows"),
    ]:
        with pytest.raises(InputError, match=words):
            stats.update(features, labels)
    assert stats.N == 0
    for K in (1, 0, -1, 2.5, "3"):
        with pytest.raises(InputError, match="num_classes must be an integer ≥ 2"):
            ClassStats(K, 4)
    for D in (0, -1, 2.5, True):
        with pytest.raises(InputError, match="dim must be an integer ≥ 1"):
            ClassStats(3, D)
    with pytest.raises(InputError, match="scatter=False"):
        ClassStats(3, 4, scatter=False).update(x, y).within  # noqa: B018


def test_without_scatter_the_rest_is_the_same():
    x, y = draw(5_000, 4, 6, offset=10)
    light, full = stats_of(x, y, 4, scatter=False), stats_of(x, y, 4)
    assert torch.equal(light.means, full.means)
    assert torch.equal(light.trace, full.trace)
    assert torch.equal((light + light).trace, (full + full).trace)
    assert torch.equal(light.sigma_b(), full.sigma_b())
    assert "_within" not in light.state_dict()


# --- class_weight -------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (F64, 1e-12)])
def test_class_weight_is_the_weighted_scatter(dtype, bound):
    x, y = draw(5_000, 4, 6, offset=10, dtype=dtype)
    weight = [2.0, 0.0, 0.5, 1.0]
    stats = stats_of(x, y, 4, class_weight=weight)
    assert_right(stats, x, y, bound, weight)
    total = sum(w * int(n) for w, n in zip(weight, stats.counts))
    assert apart(stats.sigma_w, two_pass(x, y, 4, weight)[3] / total) <= bound
    with pytest.raises(InputError, match="class_weight"):
        stats.sigma_t  # noqa: B018
    halves = [stats_of(x[i::2], y[i::2], 4, class_weight=weight) for i in (0, 1)]
    assert_same(halves[0] + halves[1], stats, bound)
    assert_same(stats - halves[0], halves[1], 4 * bound)


def test_class_weight_is_checked_and_copied():
    for bad in ([1.0, 2.0], [1.0, -1.0, 1.0], [0.0, 0.0, 0.0], [1.0, float("nan"), 1.0]):
        with pytest.raises(InputError):
            ClassStats(3, 2, class_weight=bad)
    weight = torch.ones(3, dtype=F64)
    stats = ClassStats(3, 2, class_weight=weight)
    weight.zero_()
    assert stats._class_weight.tolist() == [1, 1, 1]


# --- the algebra --------------------------------------------------------------------------------


@functools.cache
def leaves():
    """Ten small statistics at an offset, some with empty classes, some with one sample."""
    out = []
    for i in range(10):
        x, y = draw(1 + 37 * i, 5, 4, offset=100, dtype=F64, seed=i)
        out.append((x, y % (1 + i % 5)))
    return out


@st.composite
def trees(draw_):
    """A sequence of leaves, a random tree of + over them, and which of them to take away again."""
    picks = draw_(st.lists(st.integers(0, 9), min_size=1, max_size=7, unique=True))
    cuts = draw_(st.lists(st.integers(0, 100), min_size=len(picks), max_size=len(picks)))
    gone = draw_(st.lists(st.sampled_from(picks), max_size=len(picks) - 1, unique=True))
    return picks, cuts, gone


def grow(parts, cuts):
    if len(parts) == 1:
        return parts[0]
    cut = 1 + cuts[0] % (len(parts) - 1)
    return grow(parts[:cut], cuts[1:]) + grow(parts[cut:], cuts[::-1][:-1] or cuts)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(tree=trees(), scatter=st.booleans())
def test_any_tree_of_plus_and_minus_agrees(tree, scatter):
    picks, cuts, gone = tree
    data = leaves()
    part = {i: stats_of(*data[i], 5, scatter=scatter) for i in picks}
    before = {i: copy.deepcopy(s) for i, s in part.items()}
    total = grow([part[i] for i in picks], cuts)
    for i in gone:
        total = total - part[i]
    kept = [i for i in picks if i not in gone]
    rows = [torch.cat([data[i][j] for i in kept]) for j in (0, 1)]
    assert_same(total, stats_of(*rows, 5, scatter=scatter), 1e-9)
    assert_same(total, functools.reduce(operator.add, [part[i] for i in kept[::-1]]), 1e-9)
    for i in picks:  # the operands are untouched
        assert_equal(part[i], before[i])


def test_plus_commutes_and_sums():
    a, b, c = (stats_of(*leaves()[i], 5) for i in (3, 6, 9))
    assert_same(a + b, b + a, 1e-13)
    assert_same(sum([a, b, c]), a + (b + c), 1e-13)
    empty = ClassStats(5, 4)
    assert_equal(a + empty, a)
    assert_equal(empty + a, a)
    assert_equal(a - empty, a)
    assert (a - a).N == 0
    assert not (a - a).trace.any()
    alone = sum([a])
    alone.update(*leaves()[4])  # a new object, not a second name
    assert a.N == 1 + 37 * 3
    with pytest.raises(TypeError):
        a + 1
    with pytest.raises(TypeError):
        a - 1


@pytest.mark.parametrize("K", [4, 3000])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (F64, 1e-12)])
def test_split_data_merges_to_the_whole(dtype, bound, K):
    x, y = draw(6_000, K, 6, offset=1000, dtype=dtype)
    whole = stats_of(x, y, K)
    parts = [stats_of(x[i::3], y[i::3], K) for i in range(3)]
    assert_same(sum(parts), whole, bound)
    assert_same(whole - parts[0], parts[1] + parts[2], 4 * bound)


def test_staged_rows_take_part_in_the_algebra():
    """Nothing read before: what waits in the stage counts on both sides."""
    x, y = draw(300, 3, 4, dtype=F64)
    for scatter in (True, False):
        a, b = (stats_of(x[i::2], y[i::2], 3, scatter=scatter) for i in (0, 1))
        assert (a + b).N == 300
        a, b = (stats_of(x[i::2], y[i::2], 3, scatter=scatter) for i in (0, 1))
        whole = stats_of(x, y, 3, scatter=scatter)
        assert_same(whole - a, b, 1e-12)


def test_merged_statistics_can_be_updated():
    x, y = draw(9_000, 3, 4, offset=10)
    a, b = stats_of(x[:3000], y[:3000], 3), stats_of(x[3000:6000], y[3000:6000], 3)
    total = (a + b).update(x[6000:], y[6000:])
    assert_right(total, x, y, 2e-6)
    assert a.N == b.N == 3000
    assert total.within.data_ptr() != total.within.data_ptr()  # what is read is a copy


@pytest.mark.parametrize(
    ("theirs", "word"),
    [
        ({"num_classes": 4}, "num_classes"),
        ({"dim": 5}, "dim"),
        ({"scatter": False}, "scatter"),
        ({"normalized": True}, "normalized"),
        ({"layer": "layer3"}, "layer: '' and 'layer3'"),
        ({"class_weight": [1, 1, 1]}, "class_weight"),
    ],
)
def test_unlike_statistics_do_not_mix(theirs, word):
    ours = {"num_classes": 3, "dim": 4}
    a, b = ClassStats(**ours), ClassStats(**(ours | theirs))
    for combine in (operator.add, operator.sub):
        with pytest.raises(InputError, match=f"Cannot combine.*{word}"):
            combine(a, b)
    weighted = [ClassStats(**ours, class_weight=w) for w in ([1, 2, 3], [1, 2, 4])]
    with pytest.raises(InputError, match="class_weight"):
        weighted[0] + weighted[1]


def test_taking_99_percent_away_at_offset_1000():
    x, y = draw(100_000, 4, 6, offset=1000, dtype=F64)
    whole, part = stats_of(x, y, 4), stats_of(x[1000:], y[1000:], 4)
    assert_same(whole - part, stats_of(x[:1000], y[:1000], 4), 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_removing_a_class_leaves_it_empty(dtype):
    x, y = draw(5_000, 4, 6, offset=1000, dtype=dtype)
    rest = stats_of(x, y, 4) - stats_of(x[y == 2], y[y == 2], 4)
    assert rest.active.tolist() == [True, True, False, True]
    assert rest.means[2].isnan().all()
    assert rest.trace[2] == 0
    bound = 4e-6 if dtype == torch.float32 else 1e-12
    assert_same(rest, stats_of(x[y != 2], y[y != 2], 4), bound)


@pytest.mark.parametrize("left", [0, 1, 5])
@pytest.mark.parametrize("offset", [0, 1000])
def test_removing_nearly_all_float32_samples_is_not_mistaken_for_a_wrong_part(left, offset):
    x, y = draw(20_000, 4, 6, offset=offset)
    order = torch.randperm(len(x) - left, generator=seeded(0)) + left
    rest = stats_of(x, y, 4) - stats_of(x[order], y[order], 4)
    assert int(rest.counts.sum()) == left
    assert (rest.trace >= 0).all()
    same = torch.full((100, 6), 1000.1)  # and where there is no variance at all
    a = stats_of(same, torch.arange(100) % 4, 4)
    assert (a - stats_of(same[:90], torch.arange(90) % 4, 4)).N == 10


def test_removing_what_is_not_a_part_raises():
    x, y = draw(1_000, 4, 6)
    whole = stats_of(x, y, 4)
    with pytest.raises(InputError, match=r"more samples than there are: classes \[1\]"):
        whole - stats_of(x[:1].repeat(900, 1), torch.ones(900, dtype=torch.long), 4)
    with pytest.raises(InputError, match=r"negative variance.*not a part"):
        whole - stats_of(10 * x[:500], y[:500], 4)
    with pytest.raises(InputError, match=r"negative variance.*not a part"):
        whole - stats_of(x[:500] + 100, y[:500], 4)
    assert_equal(whole, stats_of(x, y, 4))


def test_counts_of_skipped_rows_follow_the_algebra():
    x, y = draw(20, 3, 4)
    y[:5] = -1
    a, b = stats_of(x, y, 3), stats_of(x[:10], y[:10], 3)
    assert (a + b).ignored == 10
    assert (a - b).ignored == 0
    y[7] = 3
    with pytest.raises(InputError, match="1 labels"):
        (a + stats_of(x, y, 3)).counts  # noqa: B018


# --- state --------------------------------------------------------------------------------------


def test_state_dict_in_mid_stream():
    x, y = draw(5_000, 4, 6, offset=10)
    stats = stats_of(x[:3000], y[:3000], 4)  # with rows in the stage
    other = ClassStats(4, 6)
    other.update(x[:7], y[:7])  # and so has the one that is loaded into
    other.load_state_dict(stats.state_dict())
    assert_equal(other, stats)
    for s in (stats, other):
        s.update(x[3000:], y[3000:])
    assert_equal(other, stats)
    assert_right(other, x, y, 2e-6)
    buffer = io.BytesIO()
    torch.save(stats.state_dict(), buffer)
    buffer.seek(0)
    third = ClassStats(4, 6)
    third.load_state_dict(torch.load(buffer, weights_only=True))
    assert_equal(third, stats)
    with pytest.raises(RuntimeError, match="size mismatch"):
        ClassStats(5, 6).load_state_dict(stats.state_dict())


@pytest.mark.parametrize("how", [copy.deepcopy, copy.copy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_in_mid_stream(how):
    x, y = draw(5_000, 4, 6, offset=10)
    stats = stats_of(x[:3000], y[:3000], 4, normalized=True, layer="fc", class_weight=[1, 2, 3, 4])
    other = how(stats)
    assert (other.normalized, other.layer) == (True, "fc")
    assert_equal(other, stats)
    if how is not copy.copy:
        stats.update(x[:100], y[:100])
        other.update(x[3000:], y[3000:])
        assert other.N == 5000
        assert stats.N == 3100


def test_pickle_holds_no_work_buffers():
    x, y = draw(3_000, 4, 64)
    stats = stats_of(x, y, 4)
    assert len(pickle.dumps(stats)) < 8 * (64 * 64 + 4 * 64) + 10_000


def test_save_and_load(tmp_path):
    x, y = draw(5_000, 4, 6, offset=10)
    y[:3] = -1
    stats = stats_of(x, y, 4, normalized=True, layer="l3", class_weight=[1, 2, 3, 4])
    path = tmp_path / "new" / "stats.safetensors"
    stats.save(path)
    again = ClassStats.load(path)
    assert_equal(again, stats)
    assert (again.normalized, again.layer, again.scatter) == (True, "l3", True)
    assert_same(again + stats, stats + stats, 1e-15)
    assert again.update(x, y).N == 2 * stats.N
    light = stats_of(x, y, 4, scatter=False)
    light.save(path)
    assert_equal(ClassStats.load(str(path)), light)
    assert os.listdir(path.parent) == ["stats.safetensors"]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "stats.safetensors"
    old = stats_of(*draw(100, 3, 4), 3)
    old.save(path)
    new = stats_of(*draw(200, 3, 4), 3)

    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def broken(*args, **kwargs):
        raise safetensors.SafetensorError("Error while serializing: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(_core.os, "fsync", full)
        with pytest.raises(InputError, match="No space left"):
            new.save(path)
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", broken)
        with pytest.raises(InputError, match="No space left"):
            new.save(path)
    assert_equal(ClassStats.load(path), old)
    assert os.listdir(tmp_path) == ["stats.safetensors"]
    with pytest.raises(InputError, match="Cannot write"):
        new.save(path / "inside-a-file")


def test_damaged_and_foreign_files(tmp_path):
    path = tmp_path / "stats.safetensors"
    stats_of(*draw(100, 3, 4), 3).save(path)
    whole = path.read_bytes()
    for damaged in (b"", b"not a tensor file", whole[:-9], whole[:40], b"\xff" * 64):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="Cannot read"):
            ClassStats.load(path)
    for missing in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(InputError, match="Cannot read"):
            ClassStats.load(missing)
    key, fields = "ncmethods.ClassStats", {"num_classes": 3, "dim": 4, "scatter": True}
    fields |= {"normalized": False, "layer": "", "reduced": False}
    tensors = {"counts": torch.zeros(3, dtype=torch.int64)}
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(InputError, match=r"not one written by ClassStats\.save"):
        ClassStats.load(path)
    for meta in ("{", "{}", "[]", json.dumps(fields), json.dumps(fields | {"future": 1})):
        safetensors.torch.save_file(tensors, path, metadata={key: meta})
        with pytest.raises(InputError, match="damaged ClassStats file"):
            ClassStats.load(path)


@pytest.mark.parametrize("when", ["before", "between"])
def test_casting_the_model_never_casts_the_state(when):
    x, y = draw(3_000, 4, 6, offset=10)
    for cast in (
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.double(),
        lambda m: m.float(),
        lambda m: m.to("cpu", torch.float16),
    ):
        net = nn.Sequential(nn.Linear(6, 4), ClassStats(4, 6))
        stats = net[1]
        if when == "between":
            stats.update(x[:1000], y[:1000])
        cast(net)
        dtypes = {name: b.dtype for name, b in stats.named_buffers()}
        assert dtypes.pop("_counts") == dtypes.pop("_rejected") == torch.int64
        assert set(dtypes.values()) == {F64}
        start = 1000 if when == "between" else 0
        assert_right(stats.update(x[start:], y[start:]), x, y, 2e-6)


def test_meta_device_and_default_dtype():
    assert ClassStats(4, 6).to("meta")._means.device.type == "meta"
    torch.set_default_dtype(torch.float16)
    try:
        x, y = draw(5_000, 4, 6, offset=10, dtype=F64)
        halves = [stats_of(x[i::2], y[i::2], 4) for i in (0, 1)]
        assert_right(halves[0] + halves[1], x, y, 1e-12)
    finally:
        torch.set_default_dtype(torch.float32)


# --- ranks --------------------------------------------------------------------------------------


def shards(world_size, dtype):
    """Rank r sees its own classes at its own mean; the last of three ranks sees nothing."""
    out = []
    for rank in range(world_size):
        x, y = draw(3_000 + 100 * rank, 6, 5, offset=10, dtype=dtype, seed=rank)
        x += 5 * rank * (y[:, None] + 1)  # the same class lies elsewhere on every rank
        y[y == rank + 2] = 0  # class 2 is unknown to rank 0, class 3 to rank 1
        y[:rank] = -1
        keep = y < 5  # class 5 is empty everywhere
        out.append((x[keep], y[keep]) if rank < 2 else (x[:0], y[:0]))
    return out


def reduce_on_ranks(rank, world_size):
    results = {}
    real, calls = dist.all_reduce, []

    def counted(tensor, *args, **kwargs):
        calls.append(tensor.numel())
        return real(tensor, *args, **kwargs)

    dist.all_reduce = counted
    for name, dtype, kwargs in [
        ("float32", torch.float32, {}),
        ("float64", F64, {}),
        ("light", F64, {"scatter": False}),
        ("weighted", F64, {"class_weight": [1.0, 2, 3, 4, 5, 6]}),
    ]:
        x, y = shards(world_size, dtype)[rank]
        stats = stats_of(x, y, 6, batch=500, **kwargs)
        calls.clear()
        assert stats.all_reduce() is stats
        assert len(calls) == 2, calls
        again = copy.deepcopy(stats).all_reduce()  # idempotent, also as a copy
        resumed = ClassStats(6, 5, **kwargs)
        resumed.load_state_dict(stats.state_dict())
        resumed.all_reduce()
        assert len(calls) == 2, calls
        assert_equal(again, stats)
        assert_equal(resumed, stats)
        assert (stats + stats).N == 2 * stats.N
        results[name] = stats

    with pytest.raises(InputError, match="update after all_reduce"):
        stats.update(*shards(world_size, F64)[0])
    with pytest.raises(InputError, match="different reduced"):
        stats + stats_of(*shards(world_size, F64)[0], 6, class_weight=[1.0, 2, 3, 4, 5, 6])

    x, y = shards(world_size, F64)[rank]
    y = torch.where(torch.arange(len(y)) == 4, 99 if rank == 0 else 1, y)
    bad = ClassStats(6, 5).update(x, y).all_reduce()
    with pytest.raises(InputError, match="1 labels were ≥"):
        bad.counts  # noqa: B018
    pair = dist.new_group([0, 1])
    if rank < 2:
        results["group"] = stats_of(*shards(world_size, F64)[rank], 6).all_reduce(pair)
    return results


@pytest.mark.parametrize("world_size", [2, 3])
def test_all_reduce(world_size):
    ranks = run_ranks(reduce_on_ranks, world_size)
    for name, dtype, bound, kwargs in [
        ("float32", torch.float32, 2e-6, {}),
        ("float64", F64, 1e-12, {}),
        ("light", F64, 1e-12, {"scatter": False}),
        ("weighted", F64, 1e-12, {"class_weight": [1.0, 2, 3, 4, 5, 6]}),
        ("group", F64, 1e-12, {}),
    ]:
        x, y = (torch.cat(part) for part in zip(*shards(world_size, dtype)))
        alone = stats_of(x, y, 6, **kwargs)
        assert alone.K_active == 5
        for result in ranks[:2] if name == "group" else ranks:
            assert_same(result[name], alone, bound)
            assert_equal(result[name], ranks[0][name])  # every rank holds the same bits
            assert result[name].ignored == alone.ignored
    # Back in one process the reduced statistic is a statistic like any other.
    back = ranks[0]["float64"]
    assert (back + alone).N == back.N + alone.N
    assert back.update(x, y).N == 2 * alone.N


def test_all_reduce_in_one_process_is_a_no_op():
    x, y = draw(100, 3, 4)
    stats = stats_of(x, y, 3).all_reduce().all_reduce()
    assert stats.update(x, y).N == 200


# --- cost ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [4, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_update_never_asks_the_device(K, dtype):
    """A fake tensor has no value: any read of one on the host would raise."""
    with FakeTensorMode():
        stats = ClassStats(K, 8)
        if K == 4:
            stats._class_weight = torch.ones(K, dtype=F64)
        for batch in (3, 100, module._CHUNK, 1, 2 * module._CHUNK + 5):
            x, y = torch.randn(batch, 8, dtype=dtype), torch.randint(K, (batch,))
            assert stats.update(x, y) is stats
        stats._complete()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_update_on_cuda():
    for K in (4, 3000):
        for dtype, bound in ((torch.float32, 2e-6), (F64, 1e-12), (torch.float16, 2e-6)):
            x, y = draw(9_000, K, 64, offset=10, dtype=dtype)
            xs, ys = x.cuda(), y.cuda()
            stats = ClassStats(K, 64).update(xs[:1], ys[:1])  # the state moves once
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("medium")
            torch.cuda.set_sync_debug_mode("error")
            try:
                with torch.autocast("cuda", torch.bfloat16):
                    for rows in torch.arange(1, 9_000).split(700):
                        stats.update(xs[rows[0] : rows[-1] + 1], ys[rows[0] : rows[-1] + 1])
            finally:
                torch.cuda.set_sync_debug_mode("default")
                torch.set_float32_matmul_precision(before)
            assert stats.means.device.type == "cuda"
            assert_right(copy.deepcopy(stats).cpu(), x, y, bound)
            host = stats_of(x, y, K)
            assert (host + stats).N == 18_000
            assert (stats - host).N == 0


class Largest(TorchDispatchMode):
    """Record the bytes of the largest tensor that an operation makes or fills."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, (tuple, list)) else (out,)
        if not func.is_view:
            inputs = {id(a) for a in args}
            new = [t for t in made if isinstance(t, torch.Tensor) and id(t) not in inputs]
            self.largest = max([self.largest, *(t.numel() * t.element_size() for t in new)])
        return out


def test_no_temporary_of_K_times_D():
    """A batch of 64 costs nothing that grows with K × D; a stage is 2 × rows × D."""
    K, D, B = 20_000, 512, 64
    x, y = draw(B, 4, D)
    stats = ClassStats(K, D, scatter=False)
    with Largest() as seen:
        stats.update(x, y)
    assert seen.largest <= 2 * module._CHUNK * D * 4
    with Largest() as seen:
        stats._sum_stage()
    assert seen.largest <= 2 * (B + 1) * D * 8 + 8 * (K + 1)
    assert_same(stats, stats_of(x, y, K, scatter=False), 0)


def test_memory_does_not_depend_on_N():
    def size(stats):
        work = [stats._pending, *(stats._stage or ())]
        tensors = [t for t in [*stats.buffers(), *work] if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors)

    x, y = draw(2 * module._CHUNK, 4, 6)
    stats = ClassStats(4, 6).update(x, y).update(x[:9], y[:9])
    first = size(stats)
    for _ in range(10):
        stats.update(x, y)
    assert size(stats) == first
    assert first <= 8 * (4 * 6 + 2 * 6 * 6) + module._CHUNK * (2 * 6 * 4 + 8) + 200


# --- groups of classes --------------------------------------------------------------------------


def test_frequency_groups_by_threshold():
    counts = [500, 101, 100, 20, 19, 0]
    want = {"many": [0, 1], "medium": [2, 3], "few": [4, 5]}
    assert frequency_groups(counts) == want
    assert frequency_groups(torch.tensor(counts), "thresholds") == want
    assert frequency_groups([5, 5]) == {"many": [], "medium": [], "few": [0, 1]}


def test_frequency_groups_by_rank():
    counts = [10, 40, 30, 20, 40]
    assert frequency_groups(counts, "2/2/1") == {"many": [1, 4], "medium": [2, 3], "few": [0]}
    assert frequency_groups(counts, "3/2") == {"many": [1, 2, 4], "few": [0, 3]}
    assert frequency_groups([7] * 4, "2/2") == {"many": [0, 1], "few": [2, 3]}  # ties by index
    assert frequency_groups(counts, "0/5") == {"many": [], "few": [0, 1, 2, 3, 4]}
    for bad in ("2/2", "5", "1/1/1/2", "a/b", "-1/6", "", "2//3", "²/3", "threshold"):
        with pytest.raises(InputError, match=r"add up to K = 5"):
            frequency_groups(counts, bad)
    with pytest.raises(InputError, match="counts must be"):
        frequency_groups([1, -1])


def test_rare_classes():
    assert rare_classes([50, 50, 50]) == []
    assert rare_classes([500, 200, 19, 5]) == [2, 3]  # the few group
    assert rare_classes([500, 400, 300, 200, 100, 5]) == [4, 5]  # too few: the rarest third
    assert rare_classes(torch.arange(100, 1000, 100)) == [0, 1, 2]
    assert rare_classes([900, 800, 700, 600]) == [2, 3]  # never fewer than two


def test_finite_features_whose_squares_overflow_raise_and_pass_in_float64():
    x = torch.tensor([[1e20, 0.0], [-1e20, 1.0], [0.0, 2.0]])
    y = torch.tensor([0, 0, 1])
    with pytest.raises(InputError, match="overflowed float32"):
        ClassStats(2, 2).update(x, y).within  # noqa: B018
    assert ClassStats(2, 2).update(x.double(), y).within[0, 0] == pytest.approx(2e40)


def test_two_classes_have_no_rare_pair():
    assert rare_classes([100, 5]) == []


# --- groups and rare classes --------------------------------------------------------------------


def grouped(x, y, K=4, groups=5, **options):
    return ClassStats(K, x.shape[1], groups=groups, **options).update(x, y)


def test_parts_sum_to_the_whole_and_share_out_every_class():
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 4, (9_000,), generator=g)
    x = torch.randn(9_000, 7, generator=g, dtype=F64) + y[:, None]
    stats = grouped(x, y)
    assert stats.groups == len(stats.parts) == 5
    total = sum(stats.parts)
    assert torch.equal(total.counts, stats.counts)
    torch.testing.assert_close(total.within, stats.within, rtol=1e-12, atol=0)
    torch.testing.assert_close(total.means, stats.means, rtol=1e-12, atol=0)
    sizes = torch.stack([part.counts for part in stats.parts])
    assert int((sizes.max(0).values - sizes.min(0).values).max()) <= 1
    plain = ClassStats(4, 7).update(x, y)
    assert torch.equal(stats.within, plain.within)  # the groups change no bit of the whole


def test_groups_do_not_fall_in_step_with_the_labels():
    """Labels that come in turn, as many as there are groups: no group takes all of a class."""
    y = torch.arange(100) % 5
    stats = grouped(torch.randn(100, 3), y, K=5)
    assert all(bool((part.counts == 4).all()) for part in stats.parts)


@pytest.mark.parametrize("cut", [1, 7, 4096, 5000])
def test_groups_do_not_depend_on_the_batches(cut):
    y = torch.arange(6_000) % 4
    x = torch.randn(6_000, 3, generator=torch.Generator().manual_seed(1))
    whole, parts = grouped(x, y), ClassStats(4, 3, groups=5)
    rows = range(0, 6_000, cut) if cut > 1 else [0, 1, 2]
    for i in rows:
        parts.update(x[i : i + cut], y[i : i + cut])
    if cut == 1:
        parts.update(x[3:], y[3:])
    for a, b in zip(whole.parts, parts.parts):
        assert torch.equal(a.within, b.within)


def test_groups_are_stored_copied_and_merged(tmp_path):
    y = torch.arange(60) % 4
    x = torch.randn(60, 3, dtype=F64)
    a, b = grouped(x[:25], y[:25]), grouped(x[25:], y[25:])
    both = a + b
    torch.testing.assert_close(sum(both.parts).within, both.within)
    assert (both - b).groups == 0
    both.save(tmp_path / "g.safetensors")
    loaded = ClassStats.load(tmp_path / "g.safetensors")
    twin = ClassStats(4, 3, groups=5)
    twin.load_state_dict(both.state_dict())
    for other in (loaded, twin, copy.deepcopy(both), pickle.loads(pickle.dumps(both))):
        for one, two in zip(both.parts, other.parts, strict=True):
            assert torch.equal(one.counts, two.counts)
            assert torch.equal(one.within, two.within)
    with pytest.raises(InputError, match="different groups: 5 and 0"):
        a + ClassStats(4, 3).update(x, y)
    for wrong in (1, -2, 2.0, True):
        with pytest.raises(InputError, match="groups must be 0 or an integer ≥ 2"):
            ClassStats(4, 3, groups=wrong)


def _grouped_on_ranks(rank, world_size):
    y = torch.arange(90) % 4
    x = torch.randn(90, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    mine = slice(rank, None, world_size)
    stats = grouped(x[mine], y[mine]).all_reduce()
    return [(part.counts, part.within) for part in stats.parts], stats.within


def test_groups_on_two_ranks():
    (parts, whole), other = run_ranks(_grouped_on_ranks, 2)
    torch.testing.assert_close(whole, other[1], rtol=0, atol=0)
    counts = torch.stack([n for n, _ in parts])
    assert counts.sum(0).tolist() == [23, 23, 22, 22]
    assert int((counts.max(0).values - counts.min(0).values).max()) <= 2


def test_at_least_empties_small_classes():
    y = torch.tensor([0, 0, 0, 1, 2, 2])
    x = torch.randn(6, 3, dtype=F64)
    stats = ClassStats(4, 3, scatter=False).update(x, y)
    left = stats.at_least(2)
    keep = y != 1
    want = ClassStats(4, 3, scatter=False).update(x[keep], y[keep])
    assert left.counts.tolist() == [3, 0, 2, 0]
    assert torch.equal(left.means.nan_to_num(), want.means.nan_to_num())
    assert torch.equal(left.trace, want.trace)
    assert stats.counts.tolist() == [3, 1, 2, 0]
    full = ClassStats(4, 3).update(x, y)
    with pytest.raises(InputError, match=r"1 classes have fewer than 2.*scatter=False"):
        full.at_least(2)
    assert torch.equal(full.at_least(1).within, full.within)
    groups = grouped(x, y, scatter=False).at_least(2)
    assert sum(part.counts for part in groups.parts).tolist() == [3, 0, 2, 0]
