"""Samplers: shares, coverage, determinism, ranks."""

import math

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

from ncmethods import data
from ncmethods._core import InputError
from ncmethods.data import BoundBatches, ClassSampler, DeviceLoader, ImageData, class_shares

COUNTS = torch.tensor([500, 120, 30, 5])
LABELS = torch.arange(4).repeat_interleave(COUNTS)[torch.randperm(655)]


def drawn(sampler, epoch=0):
    return torch.bincount(LABELS[torch.from_numpy(sampler.order(epoch))], minlength=4)


def test_shares_by_hand():
    n = torch.tensor([90, 9, 1, 0])
    for sampling, want in {
        "instance": [0.9, 0.09, 0.01, 0],
        "sqrt": [n.double()[c].sqrt() / (math.sqrt(90) + 3 + 1) for c in range(4)],
        "balanced": [1 / 3, 1 / 3, 1 / 3, 0],
    }.items():
        torch.testing.assert_close(class_shares(n, sampling), torch.tensor(want).double())
    for t, same in ((0, "instance"), (1, "balanced")):
        assert torch.equal(class_shares(n, "progressive", progress=t), class_shares(n, same))
    half = class_shares(n, "progressive", progress=0.5)
    torch.testing.assert_close(
        half[:3], torch.tensor([0.9 + 1 / 3, 0.09 + 1 / 3, 0.01 + 1 / 3]).double() / 2
    )


@pytest.mark.parametrize("length", [655, 100, 7, 3000])
@pytest.mark.parametrize("sampling", ["instance", "sqrt", "balanced"])
def test_every_class_gets_its_share_to_one_sample(sampling, length):
    sampler = ClassSampler(LABELS, sampling, length=length)
    want = class_shares(COUNTS, sampling) * length
    for epoch in range(5):
        found = drawn(sampler, epoch)
        assert found.sum() == length == len(sampler)
        assert ((found - want).abs() < 1 + 1e-9).all()


def test_fractional_shares_are_right_on_average():
    """7 samples, 4 classes: 1.75 each, sometimes 1 and sometimes 2."""
    sampler = ClassSampler(LABELS, "balanced", length=7)
    means = torch.stack([drawn(sampler, e) for e in range(400)]).double().mean(0)
    assert ((means - 1.75).abs() < 4 * 0.44 / 20).all()


def test_progress_from_first_to_balanced():
    sampler = ClassSampler(LABELS, "progressive", epochs=5, length=655)
    for epoch, t in enumerate((0, 0.25, 0.5, 0.75, 1)):
        want = class_shares(COUNTS, "progressive", progress=t) * 655
        assert ((drawn(sampler, epoch) - want).abs() < 1 + 1e-9).all()
    assert ((drawn(sampler, 9) - 655 / 4).abs() < 1).all()  # beyond the end: balanced


def test_instance_shows_each_sample_once_and_balanced_each_equally_often():
    assert sorted(ClassSampler(LABELS, "instance").order(3)) == list(range(655))
    often = np.bincount(ClassSampler(LABELS, "balanced", length=2000).order(1), minlength=655)
    for c in range(4):
        of = often[LABELS.numpy() == c]
        assert of.max() - of.min() <= 1


def test_seed_and_epoch_alone_decide():
    torch.manual_seed(0)
    one, two = ClassSampler(LABELS, seed=3), ClassSampler(LABELS, seed=3)
    two.order(7)
    assert np.array_equal(one.order(2), two.order(2))
    assert not np.array_equal(one.order(2), one.order(3))
    assert not np.array_equal(one.order(2), ClassSampler(LABELS, seed=4).order(2))
    one.set_epoch(2)
    assert list(one) == two.order(2).tolist()


@pytest.mark.parametrize("world", [2, 3])
def test_the_union_over_ranks_is_the_epoch_of_one_process(world):
    whole = ClassSampler(LABELS, length=654).order(1)
    ranks = [ClassSampler(LABELS, length=655, rank=r, world=world) for r in range(world)]
    for rank in ranks:
        rank.set_epoch(1)
    together = np.stack([list(rank) for rank in ranks], 1).ravel()
    assert len({len(rank) for rank in ranks}) == 1
    if world * len(ranks[0]) == len(whole):
        assert np.array_equal(together, whole)
    else:
        assert np.array_equal(together, ranks[0].order(1))


def test_ignored_labels_and_missing_classes():
    labels = torch.tensor([0, -1, 2, 0, -100, 2, 2])
    order = ClassSampler(labels, "balanced", length=40).order(0)
    assert not set(order.tolist()) & {1, 4}
    assert torch.bincount(labels[torch.from_numpy(order)]).tolist() == [20, 0, 20]


def test_in_somebodys_loader():
    sampler = ClassSampler(LABELS, "balanced", length=100)
    loader = DataLoader(TensorDataset(LABELS), batch_size=10, sampler=sampler)
    assert torch.bincount(torch.cat([y for (y,) in loader])).tolist() == [25] * 4


@pytest.mark.parametrize("world", [1, 2])
def test_in_the_device_loader(world):
    images = torch.zeros(655, 1, 4, 4, dtype=torch.uint8)
    source = ImageData(images, LABELS, tuple("abcd"))
    sampler = ClassSampler(LABELS, "balanced", length=203)
    ranks = [
        DeviceLoader(source, 20, rank=r, world=world, sampler=sampler, mean=[0], std=[1])
        for r in range(world)
    ]
    assert len(ranks[0]) == 11
    seen = torch.cat([b.y for rank in ranks for b in rank.epoch(2)])
    assert torch.equal(torch.bincount(seen), drawn(sampler, 2))
    with pytest.raises(InputError, match="need train=True"):
        DeviceLoader(source, 20, sampler=sampler, train=False)


def test_binding_examples_are_in_every_batch():
    labels = torch.tensor([0, 3, 1, 1, -1, 0, 3, 0])
    bound = BoundBatches(BatchSampler(SequentialSampler(labels), 3, False), labels, seed=1)
    batches = list(bound)
    assert len(bound) == len(batches) == 3
    assert [batch[:-3] for batch in batches] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert all(batch[-3:] == bound.binding for batch in batches)
    assert labels[bound.binding].tolist() == [0, 1, 3]
    loader = DataLoader(TensorDataset(labels), batch_sampler=bound)
    assert all({0, 1, 3} <= set(y.tolist()) for (y,) in loader)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sampling": "even"}, "Unknown sampling 'even'"),
        ({"sampling": "progressive"}, "needs the number of epochs"),
        ({"length": 0}, "length be at least world"),
        ({"rank": 2, "world": 2}, "rank must lie in"),
        ({"seed": -1}, "seed at least 0"),
    ],
)
def test_bad_samplers(options, said):
    with pytest.raises(InputError, match=said):
        ClassSampler(LABELS, **options)
    with pytest.raises(InputError, match="empty"):
        ClassSampler(torch.tensor([], dtype=torch.int64))
    with pytest.raises(InputError, match="progress"):
        class_shares(COUNTS, "progressive", progress=1.5)
    assert data.Sampling
