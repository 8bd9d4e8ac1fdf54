import json
from decimal import ROUND_FLOOR, Decimal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Subset, TensorDataset

from ncmethods import data
from ncmethods._core import InputError


def images(labels, num_classes=None):
    labels = torch.as_tensor(labels)
    K = num_classes or int(labels.max()) + 1
    pixels = torch.arange(len(labels)).to(torch.uint8).view(-1, 1, 1, 1)
    return data.ImageData(pixels, labels, tuple(f"c{c}" for c in range(K)))


# --- counts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_max", "K", "R", "total"),
    [
        (5000, 10, 10, 20431),
        (5000, 10, 50, 13996),
        (5000, 10, 100, 12406),
        (5000, 10, 200, 11203),
        (500, 100, 10, 19573),
        (500, 100, 50, 12608),
        (500, 100, 100, 10847),
        (500, 100, 200, 9502),
        (6000, 10, 100, 14886),
    ],
)
def test_exp_totals_of_the_field(n_max, K, R, total):
    assert sum(data.long_tail_counts(n_max, K, R)) == total


def test_exp_counts_of_the_field():
    cifar10 = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    fashion = [6000, 3596, 2156, 1292, 774, 464, 278, 166, 100, 60]
    cifar100 = data.long_tail_counts(500, 100, 100)
    assert data.long_tail_counts(5000, 10, 100) == cifar10
    assert data.long_tail_counts(6000, 10, 100) == fashion
    assert cifar100[:2] == [500, 477]
    assert cifar100[-1] == 5
    many, few = sum(n > 100 for n in cifar100), sum(n < 20 for n in cifar100)
    assert (many, 100 - many - few, few) == (35, 35, 30)
    assert sum(data.long_tail_counts(2000, 10, 100)) == 4958


def test_step_and_balanced():
    assert sum(data.long_tail_counts(500, 100, 100, "step")) == 25250
    assert data.long_tail_counts(1000, 10, 100, "step") == [1000] * 5 + [10] * 5
    assert data.long_tail_counts(7, 5, 7, "step") == [7, 7, 1, 1, 1]  # first half: K // 2
    assert data.long_tail_counts(7, 5, 7, "step", rare_classes=1) == [7, 7, 7, 7, 1]
    assert data.long_tail_counts(500, 3, 100, "balanced") == [500] * 3


@given(st.integers(2, 120), st.integers(1, 300), st.integers(1, 50))
def test_exp_is_the_exact_floor(K, R, n_min):
    n_max = R * n_min
    exact = [
        (n_max * Decimal(R) ** (-Decimal(c) / (K - 1)) + Decimal(10) ** -20).to_integral_value(
            ROUND_FLOOR
        )
        for c in range(K)
    ]
    counts = data.long_tail_counts(n_max, K, R)
    assert counts == exact
    assert counts[0] == n_max
    assert counts[-1] == n_min


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((500, 10, 0.5), "imbalance R .* got 0.5"),
        ((500, 10, float("nan")), "imbalance R"),
        ((50, 10, 100), "n_max = 50 with imbalance 100 leaves the rarest class without images"),
        ((0, 10, 1, "balanced"), "n_max = 0"),
        ((500, 1, 100), "num_classes must be an integer ≥ 2"),
        ((500, 10, 100, "exq"), "Did you mean 'exp'"),
    ],
)
def test_bad_profiles(arguments, message):
    with pytest.raises(InputError, match=message):
        data.long_tail_counts(*arguments)


@pytest.mark.parametrize(("profile", "rare"), [("exp", 2), ("step", 0), ("step", 10)])
def test_bad_rare_classes(profile, rare):
    with pytest.raises(InputError, match="rare_classes belongs to profile 'step'"):
        data.long_tail_counts(500, 10, 100, profile, rare_classes=rare)


# --- indices ------------------------------------------------------------------------------------


def test_indices_do_not_repeat_and_have_the_counts():
    labels = torch.arange(1000) % 10
    counts = data.long_tail_counts(100, 10, 50)
    chosen = data.long_tail_indices(labels, counts, seed=3)
    assert len(chosen.unique()) == len(chosen) == sum(counts)
    assert labels[chosen].bincount().tolist() == counts
    assert torch.equal(chosen, data.long_tail_indices(labels, counts, seed=3))
    assert not torch.equal(chosen, data.long_tail_indices(labels, counts, seed=4))


def test_seed_0_draws_as_the_published_generator():
    """LDAM-DRW: np.random.seed, then per class a shuffle of np.where and the first n."""
    labels = np.random.RandomState(1).randint(0, 5, 400)
    counts = [40, 20, 10, 5, 2]
    state, expected = np.random.RandomState(0), []
    for c, n in enumerate(counts):
        members = np.where(labels == c)[0]
        state.shuffle(members)
        expected += members[:n].tolist()
    assert data.long_tail_indices(torch.from_numpy(labels), counts, seed=0).tolist() == expected


def test_drawing_leaves_the_global_state_alone():
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    data.long_tail_indices(torch.arange(100) % 2, [5, 5], seed=0)
    assert np.array_equal(before[0], np.random.get_state()[1])
    assert torch.equal(before[1], torch.get_rng_state())


@pytest.mark.parametrize(
    ("labels", "counts", "seed", "message"),
    [
        ([0, 0, 1], [2, 2], 0, "Class 1: 2 images wanted, but the dataset has 1"),
        ([0, 0, 1], [2, -1], 0, "Class 1: -1 images wanted"),
        ([0, 0, 1], [1, 1, 1], 0, "Class 2: 1 images wanted, but the dataset has 0"),
        ([0, 1, 2], [1, 1], 0, "one entry per class: 2 given, but there is a label 2"),
        ([0.0, 1.0], [1, 1], 0, "labels must be integers"),
        ([0, 1], [1, 1], -1, "seed must lie in"),
    ],
)
def test_bad_draws(labels, counts, seed, message):
    with pytest.raises(InputError, match=message):
        data.long_tail_indices(torch.tensor(labels), counts, seed=seed)


# --- order --------------------------------------------------------------------------------------


def test_reorder_relabels():
    old = images([0, 1, 2, 2, 0])
    new = data.reorder(old, (2, 0, 1))
    assert new.classes == ("c2", "c0", "c1")
    assert new.labels.tolist() == [1, 2, 0, 0, 1]
    assert new.images is old.images
    for before, after in zip(old.labels, new.labels):
        assert old.classes[before] == new.classes[after]


@given(st.permutations(range(6)))
def test_reorder_can_be_undone(order):
    old = images([0, 1, 2, 3, 4, 5, 5, 0])
    back = data.reorder(data.reorder(old, order), [order.index(c) for c in range(6)])
    assert torch.equal(back.labels, old.labels)
    assert back.classes == old.classes


@pytest.mark.parametrize("order", [(0, 1), (0, 0, 1), (1, 2, 3)])
def test_order_must_be_a_permutation(order):
    with pytest.raises(InputError, match=r"each class index 0 … 2 once, got \["):
        data.reorder(images([0, 1, 2]), order)


def test_default_order():
    confusable = (1, 8, 9, 5, 7, 3, 0, 4, 2, 6)
    assert data.default_order("fashion-mini", 10) == confusable == data.CONFUSABLE_ORDER
    assert data.default_order("fashion-mnist", 10) == confusable
    assert data.default_order("cifar10", 10) == tuple(range(10))
    names = data.load("fashion-mini").train.classes
    assert [names[c] for c in confusable[6:]] == ["T-shirt/top", "Coat", "Pullover", "Shirt"]


# --- class_counts -------------------------------------------------------------------------------


class Torchvision:
    def __init__(self, targets, classes):
        self.targets, self.classes = targets, classes


def test_class_counts_of_many_kinds():
    labels = [0, 2, 2, 3]
    for source in (
        labels,
        tuple(labels),
        np.array(labels, dtype=np.uint8),
        torch.tensor(labels),
        Torchvision(labels, list("abcd")),
        images(labels),
        Subset(images([9, 0, 2, 2, 3, 9], 10), [1, 2, 3, 4]),
    ):
        counts = data.class_counts(source)
        assert counts.dtype == torch.int64
        assert counts.tolist()[:4] == [1, 0, 2, 1]
        assert counts.sum() == 4
    assert data.class_counts(labels, 6).tolist() == [1, 0, 2, 1, 0, 0]
    assert data.class_counts(Torchvision(labels, "abcdef")).tolist() == [1, 0, 2, 1, 0, 0]
    assert data.class_counts([-1, 0, -100, 1]).tolist() == [1, 1]  # ignored samples


@pytest.mark.parametrize(
    ("source", "K", "message"),
    [
        ([0, 1, 5], 5, "below num_classes = 5, got 5"),
        (torch.tensor([0.0, 1.0]), None, "labels must be integers"),
        (torch.zeros(3, 2, dtype=torch.long), None, "1-D tensor"),
        (["cat", "dog"], None, "list of integers"),
        (torch.empty(0, dtype=torch.long), None, "no labels to count"),
        (TensorDataset(torch.zeros(3)), None, r"\.targets or \.labels, got TensorDataset"),
        (None, None, "got NoneType"),
    ],
)
def test_bad_counts(source, K, message):
    with pytest.raises(InputError, match=message):
        data.class_counts(source, K)


# --- long_tailed --------------------------------------------------------------------------------


def test_long_tailed_fashion_mini():
    full = data.load("fashion-mini")
    tail = data.long_tailed(full, imbalance=100, seed=0)
    assert data.class_counts(tail.train).tolist() == data.long_tail_counts(500, 10, 100)
    assert data.class_counts(tail.test).tolist() == [200] * 10
    assert torch.equal(tail.test.images, full.test.images)
    assert tail.train.classes == tail.test.classes
    assert tail.train.classes[-1] == "Shirt"
    assert tail.name == "fashion-mini"
    # Every image keeps its name.
    names = {
        image.numpy().tobytes(): full.train.classes[y] for image, y in zip(*_parts(full.train))
    }
    for image, y in zip(*_parts(tail.train)):
        assert names[image.numpy().tobytes()] == tail.train.classes[y]


def _parts(part):
    return part.images, part.labels.tolist()


def test_long_tailed_options():
    full = data.load("digits")
    step = data.long_tailed(full, imbalance=10, profile="step", n_max=100, seed=1)
    assert data.class_counts(step.train).tolist() == [100] * 5 + [10] * 5
    assert step.train.classes == full.train.classes  # canonical
    order = tuple(reversed(range(10)))
    flat = data.long_tailed(full, imbalance=1, profile="balanced", n_max=20, order=order, seed=1)
    assert data.class_counts(flat.train).tolist() == [20] * 10
    assert flat.train.classes[0] == "9"
    widest = data.long_tailed(full, imbalance=10, seed=1)
    assert data.class_counts(widest.train)[0] == data.class_counts(full.train).min()
    with pytest.raises(InputError, match="Class 0: 4000 images wanted"):
        data.long_tailed(full, imbalance=10, n_max=4000, seed=0)


def test_validation_images_are_others_and_leave_the_training_images_as_they_were():
    splits = data.load("fashion-mini")
    plain, more = (
        data.long_tailed(splits, imbalance=10, n_max=100, validation=v, seed=3) for v in (0, 40)
    )
    assert plain.validation is None
    assert torch.equal(plain.train.images, more.train.images)
    assert torch.equal(plain.train.labels, more.train.labels)
    assert data.class_counts(more.validation).tolist() == [40] * 10
    seen = {image.numpy().tobytes() for image in more.train.images}
    aside = {image.numpy().tobytes() for image in more.validation.images}
    whole = {image.numpy().tobytes() for image in splits.train.images}
    assert not seen & aside
    assert aside < whole
    assert data.class_counts(
        data.long_tailed(splits, imbalance=10, validation=40, seed=3).train
    ).tolist() == data.long_tail_counts(460, 10, 10)  # what every class can give is 500
    assert data.TailConfig(imbalance=10, n_max=100, validation=40).load().validation is not None
    for profile, n in (("natural", 5), ("exp", -1)):
        with pytest.raises(InputError, match="leaves out"):
            data.long_tailed(splits, imbalance=10, profile=profile, validation=n, seed=0)


def test_natural_keeps_every_image_and_relabels():
    full = data.load("digits")
    order = [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    tail = data.long_tailed(full, imbalance=100, profile="natural", order=order, seed=0)
    assert torch.equal(tail.train.images, full.train.images)
    assert torch.equal(tail.train.labels, 9 - full.train.labels)
    assert torch.equal(tail.test.labels, 9 - full.test.labels)


def test_tail_config_loads_what_long_tailed_makes_and_records_no_path():
    config = data.TailConfig(imbalance=10, profile="step", seed=3, root="/somewhere")
    a = config.load()
    b = data.long_tailed(data.load("fashion-mini"), imbalance=10, profile="step", seed=3)
    assert torch.equal(a.train.images, b.train.images)
    assert torch.equal(a.train.labels, b.train.labels)
    assert "root" not in config.record()
    assert json.loads(json.dumps(config.record())) == config.record()
