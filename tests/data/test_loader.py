import random

import numpy as np
import pytest
import torch
from torchvision.transforms import functional as TF

from ncmethods._core import InputError
from ncmethods.data import DeviceLoader, ImageData, channel_stats

AUGMENT = {"crop": 2, "flip": True, "mixup": 0.4}


def pictures(n, C=3, H=6, W=5, K=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (n, C, H, W), generator=g, dtype=torch.uint8)
    return ImageData(pixels, torch.randint(0, K, (n,), generator=g), tuple("abcd")[:K])


def numbered(n):
    """Images whose label and whose every pixel is their index."""
    index = torch.arange(n)
    pixels = index.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()
    return ImageData(pixels, index, tuple(map(str, range(n))))


def same(a, b):
    return all(
        (x is None and y is None) or (torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y)
        for x, y in zip(a, b)
    )


# --- order and position -------------------------------------------------------------------------


def test_an_epoch_shows_each_image_once_in_a_new_order():
    loader = DeviceLoader(numbered(50), 16)
    first, second = (torch.cat([b.y for b in loader.epoch(e)]).tolist() for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second != sorted(second)
    assert [len(b.y) for b in loader.epoch(0)] == [12, 13, 12, 13]


def test_a_batch_depends_on_seed_epoch_and_step_alone():
    loader = DeviceLoader(pictures(40), 8, seed=5, **AUGMENT)
    unbroken = {(e, s): b for e in range(3) for s, b in enumerate(loader.epoch(e))}
    fresh = DeviceLoader(pictures(40), 8, seed=5, **AUGMENT)
    for e, s in [(2, 3), (0, 4), (1, 0), (0, 0)]:  # any order, another object
        resumed = list(fresh.epoch(e, start_step=s))
        assert len(resumed) == len(loader) - s
        assert all(same(unbroken[e, s + i], b) for i, b in enumerate(resumed))
    other = next(DeviceLoader(pictures(40), 8, seed=6, **AUGMENT).epoch(0))
    assert not torch.equal(other.x, unbroken[0, 0].x)
    assert len({b.lam for b in unbroken.values()}) == len(unbroken)


def test_interleaved_epochs_do_not_disturb_each_other():
    loader = DeviceLoader(pictures(24), 8, **AUGMENT)
    apart = [list(loader.epoch(0)), list(loader.epoch(1))]
    mixed = list(zip(loader.epoch(0), loader.epoch(1)))
    assert all(same(a, apart[0][s]) and same(b, apart[1][s]) for s, (a, b) in enumerate(mixed))


def test_global_random_state_is_neither_read_nor_moved():
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    first = list(DeviceLoader(pictures(24), 8, **AUGMENT).epoch(0))
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])
    assert states[2] == random.getstate()
    torch.manual_seed(1), np.random.seed(1)
    assert all(same(*p) for p in zip(first, DeviceLoader(pictures(24), 8, **AUGMENT).epoch(0)))


def test_the_data_are_not_changed():
    source = pictures(24)
    before = source.images.clone(), source.labels.clone()
    list(DeviceLoader(source, 8, **AUGMENT).epoch(0))
    list(DeviceLoader(source, 8, train=False))
    assert torch.equal(before[0], source.images)
    assert torch.equal(before[1], source.labels)


# --- ranks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("augment", [{}, {"crop": 2}, {"flip": True}, {"mixup": 1.0}, AUGMENT])
def test_the_union_over_ranks_is_the_batch_of_one_process(world, augment):
    source = pictures(48)  # 12 · 4: no short batch
    single = list(DeviceLoader(source, 12, **augment).epoch(3))
    ranks = [
        list(DeviceLoader(source, 12, rank=r, world=world, **augment).epoch(3))
        for r in range(world)
    ]
    for whole, *parts in zip(single, *ranks):
        assert torch.equal(whole.x, torch.cat([p.x for p in parts]))
        assert torch.equal(whole.y, torch.cat([p.y for p in parts]))
        assert all(p.lam == whole.lam for p in parts)
        if whole.y_mix is not None:
            assert torch.equal(whole.y_mix, torch.cat([p.y_mix for p in parts]))


@pytest.mark.parametrize(
    ("n", "batch_size", "world", "sizes"),
    [
        (50, 16, 1, [12, 13, 12, 13]),
        (50, 16, 2, [12, 13, 12, 13]),
        (49, 16, 3, [12, 12, 12, 13]),
        (48, 16, 1, [16, 16, 16]),
        (5000, 128, 1, [125] * 40),
        (7, 16, 2, [7]),  # smaller than one batch
        (7, 2, 1, [2, 2, 3]),  # never one
        (9, 4, 2, [4, 5]),
        (2, 128, 1, [2]),
    ],
)
def test_batches_are_even_and_those_of_one_process(n, batch_size, world, sizes):
    batch_size = batch_size // world * world
    ranks = [
        list(DeviceLoader(pictures(n), batch_size, rank=rank, world=world).epoch(0))
        for rank in range(world)
    ]
    whole = list(DeviceLoader(pictures(n), batch_size, rank=0, world=1).epoch(0))
    assert [sum(len(b.x) for b in batch) for batch in zip(*ranks)] == sizes
    for one, *parts in zip(whole, *ranks):
        if len(whole) == len(sizes):
            assert torch.equal(torch.cat([b.x for b in parts]), one.x)
        assert min(len(b.x) for b in parts) >= 2
        assert max(len(b.x) for b in parts) - min(len(b.x) for b in parts) <= 1
        means = torch.stack([b.share * b.x.double().mean((0, 2, 3)) for b in parts]).mean(0)
        torch.testing.assert_close(
            means, torch.cat([b.x for b in parts]).double().mean((0, 2, 3)), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize(("n", "world"), [(23, 1), (23, 2), (23, 4), (3, 4)])
def test_evaluation_sees_each_image_once_over_ranks(n, world):
    seen = []
    for rank in range(world):
        loader = DeviceLoader(numbered(n), 8, train=False, rank=rank, world=world)
        labels = [y.tolist() for _, y in loader]
        assert len(labels) == len(loader)
        assert all(0 < len(y) <= 8 // world for y in labels)
        mine = [label for batch in labels for label in batch]
        assert mine == list(range(n))[rank::world]
        seen += mine
    assert sorted(seen) == list(range(n))


def test_evaluation_normalises_in_order():
    source = pictures(11)
    mean, std = channel_stats(source)
    x = torch.cat([x for x, _ in DeviceLoader(source, 4, train=False)])
    expected = TF.normalize(source.images.float() / 255, mean, std)
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-6)
    assert x.dtype == torch.float32


# --- augmentation -------------------------------------------------------------------------------


def plain(source, **kw):
    """A loader that leaves pixels in 0 … 255."""
    C = source.images.shape[1]
    return DeviceLoader(source, len(source), mean=[0.0] * C, std=[1 / 255] * C, **kw)


@pytest.mark.parametrize("flip", [False, True])
def test_crop_and_flip_equal_torchvision_sample_by_sample(flip):
    n, p = 30, 3
    source = pictures(n, H=6, W=5)
    batch = next(plain(source, crop=p, flip=flip, seed=2).epoch(1))
    order = next(plain(source, seed=2).epoch(1))  # same images, not augmented
    offsets, mirrored = set(), 0
    for image, whole in zip(batch.x.round(), order.x.round()):
        options = {
            (dy, dx, m): TF.crop(TF.hflip(padded) if m else padded, dy, dx, 6, 5)
            for padded in [TF.pad(whole, p)]
            for dy in range(2 * p + 1)
            for dx in range(2 * p + 1)
            for m in {False, flip}
        }
        found = [key for key, option in options.items() if torch.equal(option, image)]
        assert len(found) == 1
        offsets.add(found[0][:2])
        mirrored += found[0][2]
    assert len(offsets) > 15
    assert (5 < mirrored < 25) if flip else mirrored == 0


def test_crop_reaches_both_ends_evenly():
    source = ImageData(
        torch.full((4000, 1, 4, 4), 255, dtype=torch.uint8), torch.zeros(4000).long(), ("a", "b")
    )
    x = next(plain(source, crop=1).epoch(0)).x[:, 0].round() == 255
    # A row of the padding shows on top for offset 0, below for offset 2, nowhere for offset 1.
    top, bottom = ~x[:, 0].any(1), ~x[:, -1].any(1)
    for share in (top, bottom, ~top & ~bottom):
        assert abs(share.double().mean() - 1 / 3) < 4 * (2 / 9 / 4000) ** 0.5


def test_flip_alone_mirrors_about_half():
    source = pictures(1000, C=1)
    batch, order = next(plain(source, flip=True).epoch(0)), next(plain(source).epoch(0))
    kept = (batch.x == order.x).flatten(1).all(1)
    turned = (batch.x == order.x.flip(3)).flatten(1).all(1)
    assert (kept ^ turned).all()
    assert abs(turned.double().mean() - 0.5) < 4 * 0.5 / 1000**0.5


def test_mixup_is_the_stated_mixture():
    source = pictures(64)
    mixed, order = next(plain(source, mixup=1.0).epoch(0)), next(plain(source).epoch(0))
    assert 0 < mixed.lam < 1
    assert torch.equal(mixed.y, order.y)
    # Solve for each partner, then check that partners are a permutation with the right labels.
    partners = (mixed.x - mixed.lam * order.x) / (1 - mixed.lam)
    distance = (partners[:, None] - order.x).flatten(2).norm(dim=2)
    perm = distance.argmin(1)
    assert distance.min(1).values.max() < 0.05
    assert sorted(perm.tolist()) == list(range(64))
    assert torch.equal(mixed.y_mix, order.y[perm])
    assert (perm != torch.arange(64)).sum() > 50


def test_mixup_keeps_label_mass_and_off_is_off():
    batch = next(DeviceLoader(pictures(32), 32).epoch(0))
    assert batch.y_mix is None
    assert batch.lam == 1.0
    lams = [next(DeviceLoader(pictures(4), 4, mixup=0.2, seed=s).epoch(0)).lam for s in range(300)]
    # Beta(.2, .2): mean 1/2, variance 1/(4 (2a + 1)).
    assert abs(np.mean(lams) - 0.5) < 4 * (1 / 5.6 / 300) ** 0.5
    assert abs(np.var(lams) - 1 / 5.6) < 0.03


def test_no_host_sync():
    """On the meta device a value cannot be read: whatever would wait for the device raises."""
    loader = DeviceLoader(pictures(20), 8, device="meta", **AUGMENT)
    shapes = [(b.x.shape, b.y.device.type, b.y_mix.shape) for b in loader.epoch(0)]
    assert shapes[0] == ((6, 3, 6, 5), "meta", (6,))
    assert len(shapes) == 3
    twice = DeviceLoader(pictures(20), 8, device="meta", crop=2, views=2)
    assert next(twice.epoch(0)).x.shape == (12, 3, 6, 5)


# --- views --------------------------------------------------------------------------------------


@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize(("crop", "flip"), [(2, True), (2, False), (0, True)])
def test_the_augmentation_is_drawn_view_by_view(views, crop, flip):
    """Against numpy and torchvision: which image, which crop, mirrored or not, in which order.

    With one view these are the batches that the loader gave before it had views.
    """
    source, size, seed = pictures(23), 6, 4
    loader = plain(source, crop=crop, flip=flip, views=views, seed=seed)
    loader.batch_size = size
    for epoch in (0, 2):
        order = np.random.default_rng([seed, epoch, 0]).permutation(23)
        ends = [23 * step // 4 for step in range(5)]
        batches = list(loader.epoch(epoch))
        assert len(batches) == 4
        for step, batch in enumerate(batches):
            chosen = order[ends[step] : ends[step + 1]]
            rng = np.random.default_rng([seed, epoch, step + 1])
            expected = []
            for _ in range(views):
                tops, lefts = rng.integers(0, 2 * crop + 1, (2, len(chosen)))
                mirrored = rng.integers(0, 1 + flip, len(chosen))
                for i, top, left, turn in zip(chosen, tops, lefts, mirrored):
                    image = TF.crop(TF.pad(source.images[i], crop), top, left, 6, 5)
                    expected.append(TF.hflip(image) if turn else image)
            assert torch.equal(batch.x.round().byte(), torch.stack(expected))
            assert batch.y.tolist() == source.labels[chosen].tolist() * views


def test_the_first_view_is_the_batch_of_one_view_and_the_others_differ():
    options = {"crop": 2, "flip": True, "seed": 3}
    one, two = (DeviceLoader(pictures(40), 8, views=v, **options) for v in (1, 2))
    assert len(one) == len(two)
    for a, b in zip(one.epoch(1), two.epoch(1), strict=True):
        assert torch.equal(a.x, b.x[:8])
        assert torch.equal(b.y, a.y.repeat(2))
        differing = (b.x[:8] != b.x[8:]).flatten(1).any(1)
        assert differing.sum() >= 6  # one of 50 draws repeats the crop and the mirroring
        assert (b.y_mix, b.lam, b.share) == (None, 1.0, 1.0)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("n", [48, 50])  # even batches, and uneven slices
def test_the_union_of_views_over_ranks_is_the_batch_of_one_process(world, n):
    options = {"crop": 2, "flip": True, "views": 2}
    single = list(DeviceLoader(pictures(n), 12, **options).epoch(3))
    ranks = [
        list(DeviceLoader(pictures(n), 12, rank=r, world=world, **options).epoch(3))
        for r in range(world)
    ]
    for whole, *parts in zip(single, *ranks, strict=True):
        halves = [[part.x.chunk(2)[v] for part in parts] for v in range(2)]
        assert torch.equal(whole.x, torch.cat(halves[0] + halves[1]))
        labels = [[part.y.chunk(2)[v] for part in parts] for v in range(2)]
        assert torch.equal(whole.y, torch.cat(labels[0] + labels[1]))
        weighted = torch.stack([p.share * p.x.double().mean() for p in parts]).mean()
        torch.testing.assert_close(weighted, whole.x.double().mean(), rtol=1e-12, atol=1e-12)


def test_a_batch_of_views_depends_on_seed_epoch_and_step_alone():
    options = {"crop": 2, "flip": True, "views": 2, "seed": 5}
    unbroken = {
        (e, s): b
        for e in range(2)
        for s, b in enumerate(DeviceLoader(pictures(40), 8, **options).epoch(e))
    }
    fresh = DeviceLoader(pictures(40), 8, **options)
    for e, s in [(1, 3), (0, 4), (1, 0)]:
        assert all(same(unbroken[e, s + i], b) for i, b in enumerate(fresh.epoch(e, s)))


# --- statistics and bad input -------------------------------------------------------------------


# --- auxiliary outliers -------------------------------------------------------------------------


def aside(M, C=3, H=6, W=5):
    return pictures(M, C, H, W, seed=9).images


def test_a_batch_brings_two_outliers_for_each_image_and_is_else_the_same():
    plain = DeviceLoader(pictures(40), 16, **AUGMENT)
    more = DeviceLoader(pictures(40), 16, outliers=aside(7), **AUGMENT)
    for without, batch in zip(plain.epoch(1), more.epoch(1)):
        assert without.outliers is None
        assert same(without[:5], batch[:5])
        assert len(batch.outliers) == 2 * len(batch.y)


def test_outliers_are_those_that_were_given_normalised_and_all_are_shown():
    source = aside(7)
    loader = DeviceLoader(pictures(40), 16, outliers=source)
    mean, std = (255 * torch.tensor(of)[:, None, None] for of in (loader.mean, loader.std))
    known = {(image - mean).div(std).numpy().tobytes() for image in source.float()}
    shown = [o.numpy().tobytes() for b in loader.epoch(0) for o in b.outliers]
    assert set(shown) == known
    first, second = (next(loader.epoch(e)).outliers for e in (0, 1))
    assert not torch.equal(first, second)
    with_draws = DeviceLoader(pictures(40), 16, outliers=source, crop=2, flip=True)
    assert {o.numpy().tobytes() for o in next(with_draws.epoch(0)).outliers} - known


@pytest.mark.parametrize("world", [2, 3])
def test_the_union_of_outliers_over_ranks_is_that_of_one_process(world):
    options = {"outliers": aside(50), "crop": 1, "seed": 4}
    whole = list(DeviceLoader(pictures(40), 12, **options).epoch(2))
    ranks = [
        list(DeviceLoader(pictures(40), 12, rank=r, world=world, **options).epoch(2, 1))
        for r in range(world)
    ]
    for one, *parts in zip(whole[1:], *ranks):
        assert torch.equal(torch.cat([p.outliers for p in parts]), one.outliers)
        assert [len(p.outliers) for p in parts] == [2 * len(p.y) for p in parts]


@pytest.mark.parametrize("bad", [aside(0), aside(4, C=1), aside(4, H=7)])
def test_outliers_of_another_shape_are_refused(bad):
    with pytest.raises(InputError, match=r"outliers must be images \[M, 3, 6, 5\]"):
        DeviceLoader(pictures(40), 8, outliers=bad)
    with pytest.raises(InputError, match="outliers, views and a sampler need train=True"):
        DeviceLoader(pictures(40), 8, outliers=aside(3), train=False)


def test_channel_stats_equal_numpy():
    source = pictures(50)
    mean, std = channel_stats(source)
    pixels = source.images.numpy() / 255
    np.testing.assert_allclose(mean, pixels.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std((0, 2, 3)), rtol=1e-12)
    assert all(isinstance(v, float) for v in mean + std)
    constant = ImageData(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.zeros(3).long(), ("a",))
    assert channel_stats(constant) == ([0.0], [1.0])


@pytest.mark.parametrize(
    ("n", "options", "message"),
    [
        (40, {"batch_size": 9, "world": 2}, "multiple of world = 2"),
        (40, {"batch_size": 1}, "at least 2 images per rank, got 1"),
        (40, {"batch_size": 0, "train": False}, "batch_size must be ≥ 1"),
        (3, {"batch_size": 8, "world": 2}, "4 for world = 2, got 3"),
        (40, {"batch_size": 8, "rank": 2, "world": 2}, "rank must lie in 0 … world − 1 = 1, got 2"),
        (40, {"batch_size": 8, "mean": [0.0]}, r"one value per channel \(3\)"),
        (40, {"batch_size": 8, "std": [1.0, 0.0, 1.0]}, "std > 0"),
        (40, {"batch_size": 8, "seed": -1}, "seed=-1"),
        (40, {"batch_size": 8, "crop": -1}, "crop=-1"),
        (40, {"batch_size": 8, "mixup": -0.1}, "mixup=-0.1"),
        (40, {"batch_size": 8, "mixup": float("nan")}, "mixup=nan"),
        (40, {"batch_size": 8, "flip": True, "train": False}, "need train=True"),
        (40, {"batch_size": 8, "views": 2, "train": False}, "views and a sampler need train=True"),
        (40, {"batch_size": 8, "views": 0}, "views must be at least 1"),
        (40, {"batch_size": 8, "crop": 2, "views": 2, "mixup": 0.4}, "1 with mixup"),
        (40, {"batch_size": 8, "views": 2}, "2 views without crop or flip are 2 copies"),
        (0, {"batch_size": 8, "train": False}, "at least one image"),
    ],
)
def test_bad_loaders(n, options, message):
    with pytest.raises(InputError, match=message):
        DeviceLoader(pictures(n), **options)


def test_bad_positions():
    loader = DeviceLoader(pictures(40), 8)
    for position in [(-1, 0), (0, -1), (0, 6)]:
        with pytest.raises(InputError, match="start_step in 0 … 5"):
            loader.epoch(*position)
    assert list(loader.epoch(0, 5)) == []
    with pytest.raises(InputError, match=r"iterate loader\.epoch"):
        iter(loader).__next__()
    with pytest.raises(InputError, match="iterate an evaluation loader directly"):
        DeviceLoader(pictures(40), 8, train=False).epoch(0)
