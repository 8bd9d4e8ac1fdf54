import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ncmethods._core import InputError
from ncmethods.incremental import (
    ExemplarMemory,
    FeatureMemory,
    by_cosine,
    herding,
    herding_by_class,
)
from ncmethods.stats import ClassStats

GOLDEN = torch.tensor([(1, 0), (0, 1), (0.8, 0.6), (0.6, 0.8), (-1, 0)])


def naive(features, m):
    """The running mean closest to the mean of the unit features, as the definition reads.

    Ties are ties to rounding: of two features each is as good a first.
    """
    u = features / np.linalg.norm(features, axis=1, keepdims=True)
    chosen = []
    for k in range(1, min(m, len(u)) + 1):
        left = [i for i in range(len(u)) if i not in chosen]
        gaps = [k * u.mean(0) - u[chosen].sum(0) - u[i] for i in left]
        costs = np.array([gap @ gap / 2 for gap in gaps])
        chosen.append(left[int(np.argmax(costs <= costs.min() + 1e-11))])
    return chosen


def features_of(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 0.3


# --- herding ------------------------------------------------------------------------------------


def test_golden_orders():
    """Golden check 9. Toward the normalised mean it would be 3, 1, 2, 0, 4."""
    assert herding(GOLDEN, 5).tolist() == [3, 1, 0, 4, 2]
    assert herding(5 * GOLDEN.double(), 5).tolist() == [3, 1, 0, 4, 2]  # lengths play no part
    assert by_cosine(GOLDEN, 5).tolist() == [3, 2, 1, 0, 4]


def test_as_pycil_chooses():
    """PyCIL's loop, run once on these features.

    https://github.com/LAMDA-CL/PyCIL/blob/f3509b8ca3f20660ce4aa13f19d5283de81b4b35/models/base.py#L216
    continuum 43ba009 gives the same but for the last, 28: it counts a row twice and goes on.
    https://github.com/Continvvm/continuum/blob/43ba0090dec7e5d6976c57df05cb5ef5225e88f2/continuum/rehearsal/herding.py#L68
    """
    x = torch.from_numpy(np.random.RandomState(3).randn(40, 6) + 0.5)
    assert herding(x, 12).tolist() == [38, 25, 9, 19, 15, 34, 22, 13, 27, 30, 32, 26]


@given(st.integers(1, 25), st.integers(1, 6), st.integers(0, 30), st.integers(0, 10**6))
def test_herding_is_the_naive_loop(N, D, m, seed):
    x = features_of(N, D, seed=seed).double()
    assert herding(x, m).tolist() == naive(x.numpy(), m)


def test_prefixes_ties_and_zeros():
    x = features_of(50, 4)
    whole = herding(x, 50)
    assert whole.sort().values.tolist() == list(range(50))  # without repetition
    for m in (0, 1, 7, 49):
        assert torch.equal(herding(x, m), whole[:m])
        assert torch.equal(by_cosine(x, m), by_cosine(x, 50)[:m])
    assert torch.equal(herding(x, 99), whole)
    same = torch.ones(4, 3).expand(9, 4, 3).reshape(36, 3)
    assert herding(same, 5).tolist() == [0, 1, 2, 3, 4]
    assert by_cosine(same, 5).tolist() == [0, 1, 2, 3, 4]
    assert herding(torch.zeros(3, 2), 3).tolist() == [0, 1, 2]
    assert herding(torch.empty(0, 2), 3).shape == by_cosine(torch.empty(0, 2), 3).shape == (0,)
    far = torch.cat([x[:5], torch.zeros(1, 4)])  # a row of zeros does not turn into NaN
    assert sorted(herding(far, 6).tolist()) == list(range(6))


@pytest.mark.parametrize("block", [1, 300, 1 << 22])
def test_classes_at_once_are_classes_one_by_one(block, monkeypatch):
    monkeypatch.setattr("ncmethods.incremental.memory._BLOCK", block)
    sizes = [1, 3, 40, 7, 0, 90, 5]
    labels = torch.arange(7).repeat_interleave(torch.tensor(sizes))
    labels = torch.cat([labels, torch.full((4,), -1)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    x = features_of(len(labels), 5)
    x[labels == -1] = 100
    rows = herding_by_class(x, labels, 6)
    wanted = []
    for c in range(7):
        at = torch.nonzero(labels == c).flatten()
        wanted += at[naive(x[at].double().numpy(), 6)].tolist() if len(at) else []
    assert rows.tolist() == wanted
    assert herding_by_class(x, labels, 0).shape == (0,)
    assert herding_by_class(x, torch.full_like(labels, -1), 6).shape == (0,)


def test_herding_keeps_the_mean():
    """What it is for: 20 exemplars stand for 500 better than 20 random ones."""
    u = torch.nn.functional.normalize(features_of(500, 16), dim=1)
    gap = [(u[rows].mean(0) - u.mean(0)).norm() for rows in (herding(u, 20), torch.arange(20))]
    assert gap[0] < 0.25 * gap[1]


@pytest.mark.parametrize("pick", [herding, by_cosine])
def test_bad_features(pick):
    with pytest.raises(InputError, match="1 rows of features hold NaN"):
        pick(torch.tensor([[1.0, torch.nan], [1, 1]]), 1)
    with pytest.raises(InputError, match="2-D"):
        pick(torch.ones(3), 1)
    with pytest.raises(InputError, match="m must be"):
        pick(torch.ones(3, 2), -1)


# --- exemplars ----------------------------------------------------------------------------------


def test_golden_shrinking():
    memory = ExemplarMemory(total=5)
    memory.update(torch.tensor([10, 11, 12, 13, 14]), torch.zeros(5, dtype=torch.int64), GOLDEN)
    assert memory.indices.tolist() == [13, 11, 10, 14, 12]
    memory.update(torch.tensor([20]), torch.tensor([1]), torch.ones(1, 2))
    assert memory.of_class(0).tolist() == [13, 11]
    assert memory.of_class(5).tolist() == []
    assert memory.labels.tolist() == [0, 0, 1]


@pytest.mark.parametrize("select", ["herding", "mean_cosine", "random"])
def test_total_of_2000(select):
    """Golden check 10."""
    memory = ExemplarMemory(total=2000, select=select)
    sizes = []
    for t in range(10):
        labels = torch.arange(10 * t, 10 * t + 10).repeat(220)
        memory.update(2200 * t + torch.arange(2200), labels, features_of(2200, 2, seed=t))
        found = torch.bincount(memory.labels)
        assert (found == found[0]).all()
        sizes.append(int(found[0]))
    assert sizes == [200, 100, 66, 50, 40, 33, 28, 25, 22, 20]
    assert len(memory) == 2000
    assert memory.classes == tuple(range(100))


@pytest.mark.parametrize("select", ["herding", "mean_cosine", "random"])
def test_growing_memory(select):
    """20 per class, and all of a class that has fewer: the first keep theirs as others come."""
    memory = ExemplarMemory(per_class=20, select=select)
    x, y = features_of(100, 4), torch.tensor([0] * 60 + [1] * 33 + [2] * 7)
    memory.update(torch.arange(93), y[:93], x[:93])
    before = memory.of_class(0), memory.of_class(1)
    memory.update(torch.arange(93, 100), y[93:], x[93:])
    assert torch.bincount(memory.labels).tolist() == [20, 20, 7]
    assert torch.equal(memory.of_class(0), before[0])
    assert torch.equal(memory.of_class(1), before[1])
    assert torch.equal(y[memory.indices], memory.labels)
    if select == "herding":
        assert memory.of_class(0).tolist() == naive(x[:60].double().numpy(), 20)
    if select == "mean_cosine":
        u = x[:60].double() / x[:60].double().norm(dim=1, keepdim=True)
        assert memory.of_class(0).tolist() == (u @ u.mean(0)).argsort(descending=True)[:20].tolist()


def test_shrinking_is_choosing_fewer():
    """A prefix is what a smaller memory would have chosen."""
    x, y = features_of(60, 4), torch.arange(60) % 2
    for select in ("herding", "mean_cosine", "random"):
        large, small = (ExemplarMemory(per_class=m, select=select) for m in (12, 5))
        for memory in (large, small):
            memory.update(torch.arange(60), y, x)
        for c in (0, 1):
            assert torch.equal(large.of_class(c)[:5], small.of_class(c))


@pytest.mark.parametrize("select", ["random", "reservoir"])
@pytest.mark.parametrize("size", [{"per_class": 6}, {"total": 30}])
def test_draws_do_not_depend_on_portions(select, size):
    y = torch.randint(3, (400,), generator=torch.Generator().manual_seed(0))
    at = torch.arange(400)
    once, parts = (ExemplarMemory(**size, select=select, seed=4) for _ in range(2))
    once.update(at, y)
    for chunk in torch.randperm(400, generator=torch.Generator().manual_seed(1)).split(37):
        parts.update(chunk, y[chunk])
        parts.update(chunk, y[chunk])  # shown twice is shown once
    assert torch.equal(parts.indices, once.indices)
    assert torch.equal(parts.labels, once.labels)
    other = ExemplarMemory(**size, select=select, seed=5)
    other.update(at, y)
    assert not torch.equal(other.indices, once.indices)


def test_random_is_uniform():
    """Each of 10 samples is among the 3 kept in 3/10 of the seeds, and pairs in 1/15."""
    kept = np.zeros((4000, 10))
    for seed in range(4000):
        memory = ExemplarMemory(per_class=3, select="random", seed=seed)
        memory.update(1000 + torch.arange(10), torch.zeros(10, dtype=torch.int64))
        kept[seed, memory.indices.numpy() - 1000] = 1
    assert (kept.sum(1) == 3).all()
    np.testing.assert_allclose(kept.mean(0), 0.3, atol=5 * (0.3 * 0.7 / 4000) ** 0.5)
    pairs = (kept.T @ kept / 4000)[np.triu_indices(10, 1)]
    np.testing.assert_allclose(pairs, 1 / 15, atol=5 * (1 / 15 / 4000) ** 0.5)


def test_reservoir_follows_frequency():
    """Of 900 and 100 samples a reservoir of 100 holds about 90 and 10, random 50 and 50."""
    y = (torch.arange(1000) >= 900).long()
    shares = []
    for seed in range(100):
        memory = ExemplarMemory(total=100, select="reservoir", seed=seed)
        memory.update(torch.arange(1000), y)
        assert len(memory) == 100
        shares.append(int((memory.labels == 1).sum()))
    sd = (100 * 0.1 * 0.9 * 900 / 999) ** 0.5  # hypergeometric
    assert abs(np.mean(shares) - 10) < 4 * sd / 10
    assert 0.75 * sd < np.std(shares) < 1.3 * sd
    even = ExemplarMemory(total=100, select="random")
    even.update(torch.arange(1000), y)
    assert torch.bincount(even.labels).tolist() == [50, 50]


def test_reservoir_without_place_for_a_class():
    """A class of which nothing is held has been seen."""
    memory = ExemplarMemory(total=3, select="reservoir", seed=1)
    for c, n in ((0, 2000), (1, 1)):
        memory.update(3000 * c + torch.arange(n), torch.full((n,), c))
    assert memory.labels.tolist() == [0, 0, 0]
    assert memory.classes == (0, 1)


@pytest.mark.parametrize("select", ["herding", "mean_cosine", "random", "reservoir"])
def test_state_comes_back(select):
    x, y, at = features_of(90, 3), torch.arange(90) // 30, torch.randperm(500)[:90]
    whole, first = (ExemplarMemory(total=20, select=select, seed=2) for _ in range(2))
    for memory in (whole, first):
        memory.update(at[:60], y[:60], x[:60])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed = ExemplarMemory(total=20, select=select, seed=2)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for memory in (whole, resumed):
        memory.update(at[60:], y[60:], x[60:])
    assert torch.equal(resumed.indices, whole.indices)
    assert torch.equal(resumed.labels, whole.labels)
    assert resumed.classes == whole.classes
    for other in ({"total": 21}, {"per_class": 20}, {"total": 20, "seed": 3}):
        with pytest.raises(InputError, match="other settings"):
            ExemplarMemory(select=select, **{"seed": 2} | other).load_state_dict(whole.state_dict())


def test_classes_leave():
    memory = ExemplarMemory(per_class=2)
    memory.update(torch.arange(6), torch.tensor([0, 0, 0, 1, 1, -1]), features_of(6, 2))
    assert 5 not in memory.indices  # ignored
    with pytest.raises(InputError, match=r"\[1\] were ranked before"):
        memory.update(torch.tensor([7]), torch.tensor([1]), features_of(1, 2))
    memory.remove([1, 8])
    memory.update(torch.tensor([7]), torch.tensor([1]), features_of(1, 2))
    assert memory.of_class(1).tolist() == [7]
    assert "3 exemplars of 2 classes" in repr(memory)


def test_an_empty_update_changes_nothing():
    none = torch.empty(0, dtype=torch.int64)
    for select in ("herding", "mean_cosine", "random", "reservoir"):
        memory = ExemplarMemory(total=4, select=select)
        memory.update(none, none, torch.empty(0, 3))
        assert len(memory) == len(memory.labels) == 0
        assert memory.indices.dtype == memory.labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "per_class=None, total=None"),
        ({"per_class": 20, "total": 2000}, "per_class=20, total=2000"),
        ({"per_class": 0}, "at least one"),
        ({"total": 1.5}, "at least one"),
        ({"total": 5, "select": "herd"}, "Did you mean 'herding'"),
    ],
)
def test_memories_that_cannot_be(options, match):
    with pytest.raises(InputError, match=match):
        ExemplarMemory(**options)


@pytest.mark.parametrize("select", ["herding", "mean_cosine", "random", "reservoir"])
def test_fewer_places_than_classes(select):
    memory = ExemplarMemory(total=2, select=select)
    memory.update(torch.arange(2), torch.arange(2), features_of(2, 3))
    with pytest.raises(InputError, match="total=2 has no place for each of 3 classes"):
        memory.update(torch.tensor([2]), torch.tensor([2]), features_of(1, 3))
    assert memory.indices.tolist() == [0, 1]  # nothing was changed


def test_updates_that_cannot_be():
    memory, two = ExemplarMemory(per_class=2), torch.arange(2)
    with pytest.raises(InputError, match="needs the features"):
        memory.update(two, two)
    with pytest.raises(InputError, match="one row per index: 2, got 3"):
        memory.update(two, two, torch.ones(3, 2))
    with pytest.raises(InputError, match="2 rows"):
        memory.update(two, torch.arange(3), torch.ones(2, 2))
    with pytest.raises(InputError, match="twice"):
        memory.update(torch.zeros(2, dtype=torch.int64), two, torch.ones(2, 2))


def test_pycil_keys():
    config = {"memory_size": 2000, "memory_per_class": 20, "fixed_memory": False, "shuffle": True}
    memory = ExemplarMemory.from_pycil(config)
    assert (memory.total, memory.per_class, memory.select) == (2000, None, "herding")
    memory = ExemplarMemory.from_pycil(config | {"fixed_memory": True}, select="random")
    assert (memory.total, memory.per_class, memory.select) == (None, 20, "random")


# --- features -----------------------------------------------------------------------------------


def test_means_and_counts():
    x, y = features_of(50, 3).double(), torch.arange(50) % 4
    y[:5] = -1
    memory = FeatureMemory(6, 3)
    for part in torch.arange(50).split(7):
        memory.add(x[part], y[part])
    for c in range(4):
        torch.testing.assert_close(memory.means()[c], x[y == c].mean(0), rtol=1e-12, atol=0)
    assert memory.means()[4:].isnan().all()
    assert memory.counts.tolist() == [*torch.bincount(y[y >= 0]).tolist(), 0, 0]


def test_pooled_mean_of_maps_is_mean_of_pooled():
    """Golden check 13: why means of pooled features stand for NC-FSCIL's spatial maps."""
    maps = features_of(30, 8, 4, 4)
    labels = torch.arange(30) % 3
    memory = FeatureMemory(3, 8).add(maps.mean((2, 3)), labels)
    of_maps = torch.stack([maps[labels == c].mean(0) for c in range(3)]).mean((2, 3))
    torch.testing.assert_close(memory.means().float(), of_maps, rtol=0, atol=1e-6)


def test_held_features():
    x, y = features_of(90, 3), torch.tensor([0] * 60 + [1] * 25 + [2] * 5)
    memory = FeatureMemory(4, 3, keep=10, seed=1).add(x, y)
    held, labels = memory.samples(10)
    assert torch.bincount(labels, minlength=4).tolist() == [10, 10, 5, 0]
    for row, c in zip(held, labels):
        assert (x[y == c] == row).all(1).any()
    assert len(torch.unique(held, dim=0)) == 25
    again = [memory.samples(4, torch.Generator().manual_seed(s))[0] for s in (0, 0, 1)]
    assert torch.equal(again[0], again[1])
    assert not torch.equal(again[0], again[2])
    assert len(again[0]) == 12
    assert memory.samples(0)[0].shape == (0, 3)
    # The draw does not depend on the portions in which a class comes.
    parts = FeatureMemory(4, 3, keep=10, seed=1)
    for part in torch.arange(90).split(8):
        parts.add(x[part], y[part])
    assert torch.equal(parts.samples(10, torch.Generator().manual_seed(0))[0],
                       memory.samples(10, torch.Generator().manual_seed(0))[0])  # fmt: skip


def test_held_features_are_a_uniform_draw():
    first = np.zeros(20)
    for seed in range(2000):
        memory = FeatureMemory(2, 1, keep=5, seed=seed)
        memory.add(torch.arange(20.0)[:, None], torch.zeros(20, dtype=torch.int64))
        first[memory.samples(5)[0].flatten().long().numpy()] += 1
    np.testing.assert_allclose(first / 2000, 0.25, atol=5 * (0.25 * 0.75 / 2000) ** 0.5)


def test_gaussian_has_the_moments():
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(3, 3, generator=g, dtype=torch.float64)
    y = torch.arange(600) % 2
    x = torch.randn(600, 3, generator=g, dtype=torch.float64) @ mix + 5 * y[:, None]
    memory = FeatureMemory(3, 3, covariance=True).add(x, y)
    drawn, labels = memory.gaussian(20_000, g)
    assert labels.unique().tolist() == [0, 1]
    sigma = ClassStats(2, 3).update(x, y).sigma_w
    for c in range(2):
        one = drawn[labels == c]
        torch.testing.assert_close(one.mean(0), x[y == c].mean(0), rtol=0, atol=0.1)
        torch.testing.assert_close(one.T.cov(), sigma, rtol=0.05, atol=0.1)
    flat = FeatureMemory(2, 3, covariance=True)  # a singular covariance
    flat.add(torch.ones(4, 3), torch.tensor([0, 0, 1, 1]))
    torch.testing.assert_close(flat.gaussian(2)[0], torch.ones(4, 3).double())


@settings(max_examples=10)
@given(st.integers(0, 3), st.booleans())
def test_feature_state_comes_back(keep, covariance):
    x, y = features_of(40, 3), torch.arange(40) % 4
    whole, first = (FeatureMemory(4, 3, keep=keep, covariance=covariance) for _ in range(2))
    whole.add(x[:25], y[:25])
    first.add(x[:25], y[:25])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed = FeatureMemory(4, 3, keep=keep, covariance=covariance)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for memory in (whole, resumed):
        memory.add(x[25:], y[25:])
    assert torch.equal(resumed.means(), whole.means())
    if covariance:
        assert torch.equal(resumed.stats.sigma_w, whole.stats.sigma_w)
    if keep:
        a, b = (memory.samples(2, torch.Generator().manual_seed(0)) for memory in (whole, resumed))
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
    with pytest.raises(InputError, match="other settings"):
        FeatureMemory(4, 3, keep=keep, covariance=not covariance).load_state_dict(
            whole.state_dict()
        )


def test_bad_feature_memories():
    memory = FeatureMemory(3, 2)
    with pytest.raises(InputError, match="keep=n"):
        memory.samples(1)
    with pytest.raises(InputError, match="covariance=True"):
        memory.gaussian(1)
    with pytest.raises(InputError, match="empty"):
        FeatureMemory(3, 2, covariance=True).gaussian(1)
    with pytest.raises(InputError, match="num_classes = 3"):
        memory.add(torch.ones(1, 2), torch.tensor([3]))
    with pytest.raises(InputError, match="NaN"):
        memory.add(torch.full((1, 2), torch.nan), torch.tensor([1]))
    with pytest.raises(InputError, match="D = 2"):
        memory.add(torch.ones(1, 3), torch.tensor([1]))
    with pytest.raises(InputError, match="keep"):
        FeatureMemory(3, 2, keep=-1)
    assert memory.means().isnan().all()
    assert memory.add(torch.empty(0, 2), torch.empty(0, dtype=torch.int64)).counts.sum() == 0
