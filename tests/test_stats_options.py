"""What ClassStats keeps when asked for: class variances and the sums for Ledoit–Wolf shrinkage."""

import copy
import functools
import operator
import pickle

import numpy as np
import pytest
import torch
from distributed import run_ranks
from sklearn.covariance import ledoit_wolf_shrinkage
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ncmethods import stats as module
from ncmethods._core import InputError
from ncmethods.stats import ClassStats

F64 = torch.float64
BOTH = {"variances": True, "shrinkage": True}


def draw(N, K, D, offset=0.0, dtype=F64, seed=0, sigma=1.0):
    """Classes of unlike axes, skewed so that third moments do not vanish."""
    rng = torch.Generator().manual_seed(seed)
    y = torch.randint(K, (N,), generator=rng)
    spread = sigma * (0.5 + torch.rand(K, D, generator=rng, dtype=F64))
    noise = torch.randn(N, D, generator=rng, dtype=F64)
    noise = noise + 0.3 * noise.square()
    means = 2 * torch.randn(K, D, generator=rng, dtype=F64)
    return (offset + means[y] + spread[y] * noise).to(dtype), y


def stats_of(x, y, K, batch=None, **options):
    stats = ClassStats(K, x.shape[1], **(BOTH | options))
    for rows in torch.arange(len(x)).split(batch or max(len(x), 1)):
        stats.update(x[rows], y[rows])
    return stats


def variances(x, y, K):
    """numpy's, class by class; NaN where there are no samples."""
    rows = [x[y == c].double().numpy() for c in range(K)]
    empty = np.full(x.shape[1], np.nan)
    return np.stack([np.var(r, axis=0) if len(r) else empty for r in rows])


def fourth(x):
    z = x.double().numpy()
    return float((((z - z.mean(0)) ** 2).sum(1) ** 2).sum())


def assert_right(stats, x, y, rel, atol=0.0):
    got = stats.variances
    assert got.dtype == stats.fourth.dtype == F64
    assert got.shape == (stats.num_classes, stats.dim)
    np.testing.assert_allclose(got, variances(x, y, stats.num_classes), rtol=rel, atol=atol)
    assert float(stats.fourth) == pytest.approx(fourth(x), rel=rel)


def shrinkage(stats):
    """Ledoit and Wolf's intensity from what the statistic holds."""
    S, N, D = stats.sigma_t, stats.N, stats.dim
    beta = (stats.fourth / N - S.square().sum()) / (D * N)
    delta = (S - S.trace() / D * torch.eye(D, dtype=F64)).square().sum() / D
    return float(min(beta, delta) / delta)


# --- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [3, 3000])  # fewer and more classes than rows
@pytest.mark.parametrize("offset", [0, 1000])
@pytest.mark.parametrize("batch", [300, None])
def test_variances_and_fourth_moment_of_float64_features(K, offset, batch):
    x, y = draw(5_000, K, 7, offset)
    assert_right(stats_of(x, y, K, batch), x, y, 1e-9, atol=1e-11)


@pytest.mark.parametrize(("N", "D"), [(60, 90), (500, 12), (9_000, 4), (40, 2)])
@pytest.mark.parametrize("offset", [0, 1000])
def test_shrinkage_is_scikit_learns(N, D, offset):
    x, y = draw(N, 4, D, offset)
    want = ledoit_wolf_shrinkage(x.numpy())
    assert want == 1 if N == 40 else 0 < want < 0.9
    assert shrinkage(stats_of(x, y, 4, batch=64)) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("offset", [0, 1000])
def test_float32_features(offset):
    x, y = draw(20_000, 5, 16, offset, dtype=torch.float32)
    assert_right(stats_of(x, y, 5, batch=256), x, y, 2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_upcast(dtype):
    x, y = draw(3_000, 4, 6, dtype=dtype)
    one, two = stats_of(x, y, 4), stats_of(x.float(), y, 4)
    assert torch.equal(one.variances, two.variances)
    assert torch.equal(one.fourth, two.fourth)


def test_variances_sum_to_the_trace_and_to_the_diagonal():
    x, y = draw(2_000, 4, 6, offset=10)
    stats = stats_of(x, y, 4)
    squares = stats.variances * stats.counts[:, None]
    torch.testing.assert_close(squares.sum(1), stats.trace)
    torch.testing.assert_close(squares.sum(0), stats.within.diagonal())


def test_an_outlier_in_the_first_row_costs_little():
    """The pivot is the mean of many rows, so one of them cannot put it far from the rest."""
    x, y = draw(8_000, 4, 6)
    x[0] = 1e4
    stats = stats_of(x, y, 4)
    assert_right(stats, x, y, 1e-9)
    rest = stats - stats_of(x[:1], y[:1], 4)
    assert float(stats.fourth) / fourth(x[1:]) > 1e9
    assert float(rest.fourth) == pytest.approx(fourth(x[1:]), rel=1e-3)  # ten digits are gone


def test_drifting_and_sorted_streams():
    x, y = draw(9_000, 6, 5, sigma=0.1)
    drift = x + torch.linspace(0, 500, len(x))[:, None]
    assert_right(stats_of(drift, y, 6, batch=100), drift, y, 1e-9)
    order = y.argsort()
    assert_right(stats_of(x[order], y[order], 6, batch=100), x[order], y[order], 1e-9)


def test_collapse_is_zero_and_not_negative():
    x = torch.full((5_000, 4), 1000.1)
    stats = stats_of(x, torch.arange(5_000) % 3, 3, batch=64)
    assert float(stats.variances.abs().max()) <= 1e-15
    assert 0 <= float(stats.fourth) <= 1e-20


# --- classes and labels -------------------------------------------------------------------------


def test_empty_and_single_sample_classes():
    x, y = draw(300, 3, 4, offset=1000)
    y[y == 1] = 0
    x, y = torch.cat((x, x[:1] + 5)), torch.cat((y, torch.tensor([3])))
    stats = stats_of(x, y, 5)
    assert stats.variances[[1, 4]].isnan().all()
    assert stats.variances[3].tolist() == [0, 0, 0, 0]
    assert_right(stats, x, y, 1e-9)
    alone = stats_of(x[:1], y[:1], 5)
    assert float(alone.fourth) == 0
    with pytest.raises(InputError, match="is empty"):
        ClassStats(5, 4, **BOTH).fourth  # noqa: B018
    assert ClassStats(5, 4, **BOTH).variances.isnan().all()


@pytest.mark.parametrize("K", [4, 5000])
def test_rows_that_do_not_count(K):
    x, y = draw(3_000, 4, 6, offset=10)
    y[::3] = -1
    x[0] = torch.nan
    keep = y >= 0
    stats = stats_of(x, y, K, batch=100)
    assert_right(stats, x[keep], y[keep], 1e-9)
    first = torch.cat((torch.full((9_000, 6), torch.nan, dtype=F64), x[keep]))
    label = torch.cat((torch.full((9_000,), -1), y[keep]))
    late = stats_of(first, label, K)  # nothing counts in the first chunks
    assert_right(late, x[keep], y[keep], 1e-9)
    y[5], x[7] = K, torch.inf
    bad = stats_of(x, y, K)
    for read in ("variances", "fourth"):
        with pytest.raises(InputError, match="labels were ≥"):
            getattr(bad, read)


def test_class_weight_leaves_variances_alone_and_refuses_shrinkage():
    x, y = draw(500, 3, 4)
    stats = stats_of(x, y, 3, shrinkage=False, class_weight=[1.0, 2.0, 0.0])
    np.testing.assert_allclose(stats.variances, variances(x, y, 3), rtol=1e-12)
    for options in ({"class_weight": [1.0, 1, 1]}, {"scatter": False}):
        with pytest.raises(InputError, match="shrinkage=True needs the plain scatter"):
            ClassStats(3, 4, shrinkage=True, **options)
    light = ClassStats(3, 4, scatter=False, variances=True).update(x, y)
    np.testing.assert_allclose(light.variances, variances(x, y, 3), rtol=1e-12)


def test_what_was_not_asked_for_says_so():
    x, y = draw(50, 3, 4)
    stats = ClassStats(3, 4).update(x, y)
    assert not {"_squares", "_pivot", "_quartic", "_cubic"} & set(stats.state_dict())
    for one in (stats, stats.freeze()):
        with pytest.raises(InputError, match="variances=True"):
            one.variances  # noqa: B018
        with pytest.raises(InputError, match="shrinkage=True"):
            one.fourth  # noqa: B018


# --- the algebra --------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 1000])
def test_any_merge_is_the_whole(offset):
    x, y = draw(3_000, 5, 4, offset)
    x += 3 * torch.linspace(-1, 1, len(x))[:, None]  # the parts have means of their own
    cuts = [x[:1], x[1:100], x[100:101], x[101:2000], x[2000:]]
    labels = torch.split(y, [len(c) for c in cuts])
    parts = [stats_of(c, v, 5) for c, v in zip(cuts, labels)]
    trees = [
        functools.reduce(operator.add, parts),
        functools.reduce(operator.add, parts[::-1]),
        (parts[3] + parts[0]) + (parts[4] + (parts[1] + parts[2])),
        sum(parts) + ClassStats(5, 4, **BOTH),
        ClassStats(5, 4, **BOTH) + sum(parts),
    ]
    for tree in trees:
        assert_right(tree, x, y, 1e-9)
    more = copy.deepcopy(trees[0]).update(x[:500], y[:500])
    assert_right(more, torch.cat((x, x[:500])), torch.cat((y, y[:500])), 1e-9)


def test_parts_whose_first_rows_lie_apart():
    """Their pivots are not their means when they are merged, and the whole is merged once more."""
    x, y = draw(3_000, 4, 5, offset=1000)
    x[:50] += 20
    x[1_000:1_050] -= 30
    parts = []
    for rows in torch.arange(3_000).split(1_000):
        part = stats_of(x[rows[:50]], y[rows[:50]], 4)
        part.counts  # noqa: B018  a read: the pivot is the mean of these rows
        parts.append(part.update(x[rows[50:]], y[rows[50:]]))
    whole = (parts[0] + parts[1]) + parts[2]
    assert_right(whole, x, y, 1e-9)
    assert_right(
        whole - parts[1], torch.cat((x[:1000], x[2000:])), torch.cat((y[:1000], y[2000:])), 1e-9
    )
    for part, rows in zip(parts, torch.arange(3_000).split(1_000)):
        z = x[rows] - 990
        third = (z.square().sum(1)[:, None] * z).sum(0)
        got = part._fourth_about(torch.full((5,), 990.0, dtype=F64))[1]
        torch.testing.assert_close(got, third, rtol=1e-9, atol=0)


@pytest.mark.parametrize("offset", [0, 1000])
def test_minus_takes_a_part_away(offset):
    x, y = draw(4_000, 4, 5, offset)
    whole = stats_of(x, y, 4)
    for rows in (torch.arange(4_000) >= 1_000, y == 2, torch.arange(4_000) % 4_000 > 60):
        left = ~rows
        got = whole - stats_of(x[rows], y[rows], 4)
        assert_right(got, x[left], y[left], 1e-8 if int(left.sum()) < 100 else 1e-9)
        both = got + stats_of(x[rows], y[rows], 4)
        assert_right(both, x, y, 1e-9)
    gone = whole - whole
    assert gone.variances.isnan().all()
    assert not gone._quartic
    assert not gone._cubic.any()
    again = gone.update(x[:700] + 50, y[:700])  # nothing of the old place is left
    assert_right(again, x[:700] + 50, y[:700], 1e-9)
    one = whole - stats_of(x[1:], y[1:], 4)
    assert float(one.fourth) == 0
    assert not one.variances[y[0]].any()


def test_unlike_statistics_do_not_mix():
    options = [{}, {"variances": True}, {"shrinkage": True}]
    for i, ours in enumerate(options):
        for theirs in options[:i]:
            a, b = ClassStats(3, 4, **ours), ClassStats(3, 4, **theirs)
            for combine in (operator.add, operator.sub):
                with pytest.raises(InputError, match=r"different (variances|shrinkage): (Tr|Fa)"):
                    combine(a, b)


def test_groups_keep_them_too():
    x, y = draw(1_000, 4, 3, offset=100)
    stats = stats_of(x, y, 4, groups=5)
    assert_right(stats, x, y, 1e-9)
    assert_right(sum(stats.parts), x, y, 1e-9)


def test_at_least_empties_small_classes():
    x, y = draw(300, 4, 3)
    y[:2], y[2:][y[2:] == 1] = 1, 0
    stats = ClassStats(4, 3, scatter=False, variances=True).update(x, y)
    left = stats.at_least(3)
    assert left.variances[1].isnan().all()
    assert torch.equal(left.variances[[0, 2, 3]], stats.variances[[0, 2, 3]])
    keep = y != 1
    more = left + ClassStats(4, 3, scatter=False, variances=True).update(x[:2], y[:2])
    want = torch.cat((x[keep], x[:2])), torch.cat((y[keep], y[:2]))
    np.testing.assert_allclose(more.variances, variances(*want, 4), rtol=1e-9)


# --- state --------------------------------------------------------------------------------------


def test_stored_copied_and_loaded(tmp_path):
    x, y = draw(3_000, 4, 6, offset=1000)
    stats = stats_of(x[:2000], y[:2000], 4, groups=2)
    stats.save(tmp_path / "s.safetensors")
    twin = ClassStats(4, 6, groups=2, **BOTH)
    twin.load_state_dict(stats.state_dict())
    loaded = ClassStats.load(tmp_path / "s.safetensors")
    for other in (loaded, twin, copy.deepcopy(stats), pickle.loads(pickle.dumps(stats))):
        assert torch.equal(other.variances, stats.variances)
        assert torch.equal(other.fourth, stats.fourth)
        assert torch.equal(other.parts[1].fourth, stats.parts[1].fourth)
        assert_right(other.update(x[2000:], y[2000:]), x, y, 1e-9)
    with pytest.raises(RuntimeError, match=r"Missing key.*_squares"):
        twin.load_state_dict(ClassStats(4, 6, groups=2).state_dict())


def test_casting_the_model_never_casts_them():
    x, y = draw(500, 4, 6, offset=1000)
    net = torch.nn.Sequential(stats_of(x, y, 4)).half().to(torch.bfloat16)
    assert_right(net[0], x, y, 1e-9)


def test_frozen_moments_carry_them():
    x, y = draw(500, 4, 6)
    stats = stats_of(x, y, 4)
    view = stats.freeze()
    assert torch.equal(view.variances, stats.variances)
    assert torch.equal(view.fourth, stats.fourth)
    stats.update(x, y)
    assert float(view.fourth) == pytest.approx(fourth(x), rel=1e-9)
    for read in ("variances", "fourth"):  # not functions of what is projected
        with pytest.raises(InputError, match="pass samples"):
            getattr(view.principal(3), read)


# --- ranks --------------------------------------------------------------------------------------


def shard(rank):
    x, y = draw(1_000 + 100 * rank, 5, 4, offset=1000 + 20 * rank, seed=rank)
    return (x, y) if rank < 2 else (x[:0], y[:0])


def reduce_on_ranks(rank, world_size):
    stats = stats_of(*shard(rank), 5, batch=300).all_reduce()
    again = copy.deepcopy(stats).all_reduce()
    light = stats_of(*shard(rank), 5, scatter=False, shrinkage=False).all_reduce()
    values = [s.variances for s in (stats, again, light)] + [stats.fourth, again.fourth]
    return [*values, (stats + stats).fourth]


def test_ranks():
    results = run_ranks(reduce_on_ranks, 3)  # the third has no samples
    x, y = (torch.cat(part) for part in zip(*map(shard, range(3))))
    for result in results:
        for one in result[:3]:
            np.testing.assert_allclose(one, variances(x, y, 5), rtol=1e-9)
        np.testing.assert_allclose(result[3:], [fourth(x)] * 2 + [2 * fourth(x)], rtol=1e-9)
        for a, b in zip(result, results[0]):
            assert torch.equal(a, b)


# --- cost ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [4, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_update_never_asks_the_device(K, dtype):
    """A fake tensor has no value: any read of one on the host would raise."""
    with FakeTensorMode():
        stats = ClassStats(K, 8, **BOTH)
        for batch in (3, module._CHUNK, 2 * module._CHUNK + 5):
            stats.update(torch.randn(batch, 8, dtype=dtype), torch.randint(K, (batch,)))
        stats._complete()


class Largest(TorchDispatchMode):
    """Record the elements of the largest new tensor."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view and all(out is not a for a in args):
            self.largest = max(self.largest, out.numel())
        return out


def test_an_update_makes_nothing_of_the_size_of_the_classes():
    K, D, B = 20_000, 64, 50
    stats = ClassStats(K, D, **BOTH)
    x, y = draw(B, K, D, dtype=torch.float32)
    stats.update(x, y)
    with Largest() as seen:
        stats._sum_stage()
    assert seen.largest <= max(K + 1, D * D, (B + 1) * D)
