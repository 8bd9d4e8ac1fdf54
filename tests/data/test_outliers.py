"""Outliers: the shape that is asked for, seeded, and what their names promise."""

import numpy as np
import pytest
import torch
from sklearn import datasets
from sklearn.utils import Bunch

from ncmethods import data
from ncmethods._core import InputError
from ncmethods.data import ImageData
from ncmethods.data.outliers import PATTERNS, batches_as, outliers

SHAPES = [(1, 28, 28), (3, 32, 20)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [*PATTERNS, "digits", "glyphs-mini"])
def test_shape_dtype_and_seed(name, shape):
    one, again, other = (outliers(name, shape, n=9, seed=s) for s in (0, 0, 1))
    assert one.dtype == torch.uint8
    assert one.shape == (9, *shape)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_what_the_patterns_are():
    made = {name: outliers(name, (3, 24, 24), n=300).double() / 255 for name in PATTERNS}
    assert made["uniform"].std() == pytest.approx(12**-0.5, abs=0.01)
    assert made["gaussian"].mean() == pytest.approx(0.5, abs=0.01)
    assert (made["flat"].flatten(1).std(1) == 0).all()
    assert made["flat"].flatten(1).mean(1).std() > 0.2
    waves = made["gratings"]
    assert (waves[:, 0] == waves[:, 2]).all()
    assert waves.mean() == pytest.approx(0.5, abs=0.03)
    spectrum = torch.fft.rfft2(waves[:, 0] - waves[:, 0].mean((1, 2), keepdim=True)).abs()
    assert (spectrum.flatten(1).amax(1) > 0.3 * spectrum.flatten(1).sum(1) / 24).all()


def test_photos_are_mirrored_crops_of_many_sizes(monkeypatch):
    """Of two pictures whose brightness grows evenly to the right, one red and one green."""
    ramps = np.zeros((2, 427, 640, 3), np.uint8)
    for c in (0, 1):
        ramps[c, :, :, c] = np.arange(640) * 255 // 639
    monkeypatch.setattr(datasets, "load_sample_images", lambda: Bunch(images=ramps))
    made = outliers("photos", (3, 16, 16), n=2000).double()
    assert (made[:, 2] == 0).all()
    assert (made - made[:, :, :1]).abs().max() <= 1  # nothing changes from top to bottom
    row = made.sum(1)[:, 0]  # one channel of two is dark
    across = 16 / 15 * (row[:, -1] - row[:, 0]) * 639 / 255  # width of the crop in pixels
    sides = across.abs()
    straight = row[:, :1] + (row[:, -1:] - row[:, :1]) * torch.linspace(0, 1, 16)
    assert (row - straight).abs().max() < 3
    assert 5 < sides.min() < 25
    assert 235 < sides.max() < 265
    assert sides.median() == pytest.approx(64, rel=0.1)  # as many octaves below as above
    assert (across < 0).double().mean() == pytest.approx(0.5, abs=0.04)
    red = made[:, 0].flatten(1).amax(1) > made[:, 1].flatten(1).amax(1)
    assert red.double().mean() == pytest.approx(0.5, abs=0.04)


def test_photos_are_averaged_to_grey():
    colours = outliers("photos", (3, 12, 12), n=20).double()
    grey = outliers("photos", (1, 12, 12), n=20).double()
    assert (colours.mean(1) - grey[:, 0]).abs().max() <= 1
    assert (colours.std(1) > 5).any()


def test_a_dataset_keeps_its_images():
    whole = data.load("fashion-mini").test.images
    got = outliers("fashion-mini", (1, 28, 28), n=10**6)
    assert len(got) == len(whole)
    assert sorted(map(int, got.long().sum((1, 2, 3)))) == sorted(
        map(int, whole.long().sum((1, 2, 3)))
    )
    grey = outliers("digits", (3, 8, 8), n=5)
    assert torch.equal(grey[:, 0], grey[:, 1])


def test_bad_requests():
    with pytest.raises(InputError, match="Did you mean 'gratings'"):
        outliers("grating", (1, 8, 8))
    with pytest.raises(InputError, match="at least 1"):
        outliers("flat", (1, 8, 8), n=0)


def test_batches_as_another_model_wants_them():
    """Grey repeated, resized, normalised per channel; even batches, in order or at rows."""
    images = torch.randint(0, 256, (7, 1, 8, 8), dtype=torch.uint8)
    whole = ImageData(images, torch.arange(7) % 2, ("a", "b"))
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    found = list(batches_as(whole, (3, 8, 8), mean, std, 3))
    assert [len(x) for x, _ in found] == [3, 3, 1]
    x, y = (torch.cat(of) for of in zip(*found))
    center, spread = (torch.tensor(v)[:, None, None] for v in (mean, std))
    want = (images.float() / 255 - center) / spread
    torch.testing.assert_close(x, want)
    assert torch.equal(y, whole.labels)
    ((some, labels),) = batches_as(whole, (3, 4, 4), mean, std, 5, torch.tensor([6, 1]))
    assert some.shape == (2, 3, 4, 4)
    assert labels.tolist() == [0, 1]
