"""Image files: a person's own folder, the published lists, and everything that can be wrong."""

import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ncmethods import cli, data
from ncmethods._core import DataError, InputError
from ncmethods.data import datasets, folders


@pytest.fixture(autouse=True)
def bare_machine(tmp_path, monkeypatch):
    """No dataset anywhere but in the test's own directories."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NCMETHODS_DATA", raising=False)
    monkeypatch.setattr(datasets, "_DEBIAN", tmp_path / "usr")


@pytest.fixture
def root(tmp_path):
    return tmp_path / "photos"


def picture(c, size=(20, 16), seed=0):
    pixels = np.random.RandomState(seed).randint(0, 60, (size[1], size[0], 3)) + 60 * c
    return Image.fromarray(pixels.astype(np.uint8))


def write_images(folder, per_class, size=(20, 16), suffix=".png"):
    """Noise around 30, 90, 150, …, by class in the order given; each picture is another one."""
    for c, (name, n) in enumerate(per_class.items()):
        (folder / name).mkdir(parents=True)
        for i in range(n):
            picture(c, size, seed=1000 * c + i).save(folder / name / f"{i:03}{suffix}")


def load(root, **how):
    return data.load("image-folder", root, **how)


# --- where the images lie -----------------------------------------------------------------------


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_its_own_split(held_out, root):
    write_images(root / "train", {"dog": 3, "ant": 2, "cat": 4})
    write_images(root / held_out, {"ant": 1, "cat": 1, "dog": 2})
    assert data.available("image-folder", root)
    splits = load(root)
    assert splits.train.classes == splits.test.classes == ("ant", "cat", "dog")
    assert data.class_counts(splits.train).tolist() == [2, 4, 3]
    assert data.class_counts(splits.test).tolist() == [1, 1, 2]
    assert splits.validation is None
    assert load(str(root), size=8).test.images.shape == (4, 3, 8, 8)


def test_val_beside_test_is_for_choosing(root, capsys):
    for part, n in (("train", 5), ("test", 2), ("val", 3)):
        write_images(root / part, {"a": n, "b": 1})
    (root / "valid").mkdir()
    splits = load(root)
    assert [len(part) for part in splits if isinstance(part, data.ImageData)] == [6, 3, 4]
    assert data.class_counts(splits.validation).tolist() == [3, 1]
    said = capsys.readouterr().err
    assert "beside train/ only test/ and val/ are read, not valid" in said
    assert "2 classes, 6 train, 3 test, 4 validation images, 16 × 16 RGB" in said


@pytest.mark.parametrize("inside", ["", "train"])
def test_a_fifth_of_each_class_is_held_out(inside, root, capsys):
    write_images(root / inside, {"a": 10, "b": 2, "c": 15}, size=(16, 16))
    splits = load(root, size=16)
    assert data.class_counts(splits.test).tolist() == [2, 1, 3]
    assert data.class_counts(splits.train).tolist() == [8, 1, 12]
    assert "no test folder: a fifth of each class is held out" in capsys.readouterr().err
    # The same images as hold_out takes from the whole.
    files = sorted((root / inside).rglob("*.png"))
    pixels = np.stack([np.asarray(Image.open(f)) for f in files]).transpose(0, 3, 1, 2)
    labels = torch.tensor(["abc".index(f.parent.name) for f in files])
    whole = data.ImageData(torch.from_numpy(pixels.copy()), labels, ("a", "b", "c"))
    expected = data.hold_out(whole, "image-folder")
    assert torch.equal(splits.train.images, expected.train.images)
    assert torch.equal(splits.test.images, expected.test.images)
    assert torch.equal(splits.test.labels, expected.test.labels)


def test_a_class_may_be_called_train(root):
    write_images(root, {"car": 2, "plane": 2, "train": 3})
    assert load(root).train.classes == ("car", "plane", "train")


def test_nested_files_count_and_hidden_ones_do_not(root, capsys):
    write_images(root, {"a": 2, "b": 3})
    write_images(root / "a", {"more": 2, ".thumbs": 4})
    write_images(root, {".cache": 5})
    (root / "a" / "._000.png").write_text("what macOS leaves")
    (root / "b" / "IMG_1.HEIC").write_text("from a telephone")
    splits = load(root)
    assert [len(splits.train), len(splits.test)] == [5, 2]
    assert splits.train.classes == ("a", "b")
    assert re.search(r"passed over, files of other kinds: \S+IMG_1.HEIC\n", capsys.readouterr().err)


# --- pixels -------------------------------------------------------------------------------------


def one_per_class(root, save):
    """Two classes of two files each, all of them written by ``save``; their squares."""
    for c in "ab":
        (root / c).mkdir(parents=True)
        for i in range(2):
            save(root / c / f"{i}")
    return load(root, size=4).train.images


def test_centre_of_a_wide_picture(root):
    wide = np.zeros((4, 8), np.uint8)
    wide[:, 2:6] = 200
    images = one_per_class(root, lambda p: Image.fromarray(wide).save(f"{p}.png"))
    assert (images == 200).all()
    assert images.shape == (2, 1, 4, 4)  # all grey: one channel


def test_squares_are_those_of_torchvision(root):
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    square = Compose([Resize(10, InterpolationMode.BICUBIC), CenterCrop(10)])
    write_images(root, {"a": 5, "b": 5}, size=(80, 40))
    splits = load(root, size=10)
    files = {c: sorted((root / c).iterdir()) for c in "ab"}
    kept = {c: iter(part) for c, part in files.items()}
    expected = [np.asarray(square(Image.open(f))) for c in "ab" for f in kept[c]]
    got = torch.cat([splits.train.images, splits.test.images]).permute(0, 2, 3, 1).numpy()
    inner = np.s_[:, 3:7]  # one crops before it resizes, the other after
    for image in got:
        assert min(np.abs(image[inner].astype(int) - e[inner]).max() for e in expected) <= 2


def test_all_images_in_their_order(root):
    """More than one thread's share, against a plain loop."""
    write_images(root / "train", {"a": 70, "b": 31}, size=(9, 9))
    write_images(root / "test", {"a": 1, "b": 1}, size=(9, 9))
    train = load(root, size=9).train
    files = [f for c in "ab" for f in sorted((root / "train" / c).iterdir())]
    plain = np.stack([np.asarray(Image.open(f)) for f in files]).transpose(0, 3, 1, 2)
    assert np.array_equal(train.images.numpy(), plain)
    assert train.labels.tolist() == [0] * 70 + [1] * 31


def test_photographs_stand_upright(root):
    sky = np.zeros((8, 8, 3), np.uint8)
    sky[:4] = 255  # bright above
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90° clockwise to see it upright
    turned = Image.fromarray(np.rot90(sky).copy())
    images = one_per_class(root, lambda p: turned.save(f"{p}.png", exif=exif)).float()
    assert (images[:, :, 0].mean(), images[:, :, -1].mean()) == (255, 0)


def test_a_large_jpeg_is_the_same_picture(root):
    """It is decoded at a fraction of its size; a smooth picture does not change."""
    ramp = np.broadcast_to(np.linspace(0, 255, 640)[:, None], (640, 640)).astype(np.uint8)
    images = one_per_class(root, lambda p: Image.fromarray(ramp).save(f"{p}.jpg", quality=95))
    quarters = ramp.reshape(4, 160, 640).mean((1, 2))
    assert (images.float().mean((0, 1, 3)) - torch.from_numpy(quarters)).abs().max() < 6


@pytest.mark.parametrize(
    ("mode", "channels"), [("1", 1), ("L", 1), ("LA", 1), ("RGB", 3), ("RGBA", 3), ("P", 3)]
)
def test_channels_of_each_mode(mode, channels, root):
    ink = Image.new("RGB", (6, 6), (255, 255, 255)).convert(mode)
    if mode == "P":
        ink.info["transparency"] = bytes([255] * 255)
    images = one_per_class(root, lambda p: ink.save(f"{p}.png"))
    assert images.shape == (2, channels, 4, 4)
    assert (images == 255).all()


def test_sixteen_bits_keep_the_high_byte(root):
    deep = Image.fromarray(np.full((5, 5), 0x7FFF, np.uint16))
    images = one_per_class(root, lambda p: deep.save(f"{p}.png"))
    assert images.shape == (2, 1, 4, 4)
    assert (images == 0x7F).all()


def test_one_coloured_image_makes_three_channels(root):
    write_images(root, {"a": 3, "b": 3})
    for f in root.rglob("*.png"):
        Image.open(f).convert("L").save(f)
    assert load(root).train.images.shape[1] == 1
    (root / "b" / "000.png").unlink()
    picture(1).save(root / "b" / "000.png")
    both = load(root)
    assert both.train.images.shape[1] == both.test.images.shape[1] == 3


# --- what is chosen and said --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "side", "words"),
    [
        ([(20, 28), (28, 30), (40, 31)], 28, "size 28: their median short side"),
        ([(200, 100)] * 3, 64, r"size 64: the default for larger ones \(median short side 100\)"),
    ],
)
def test_size_comes_from_the_images(sizes, side, words, root, capsys):
    for c in "ab":
        (root / c).mkdir(parents=True)
        for i, size in enumerate(sizes):
            picture(0, size).save(root / c / f"{i}.png")
    assert load(root).train.images.shape[-2:] == (side, side)
    assert re.search(words, capsys.readouterr().err)
    assert load(root, size=5).train.images.shape[-1] == 5
    assert "size" not in capsys.readouterr().err


def test_only_the_first_process_speaks(root, capsys, monkeypatch):
    write_images(root, {"a": 2, "b": 2})
    monkeypatch.setenv("RANK", "1")
    load(root)
    assert capsys.readouterr().err == ""


def test_progress_is_rare_and_has_an_end(capsys, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(folders.time, "perf_counter", lambda: next(clock))
    tell = folders._progress("photos", 300)  # at 0 s
    for done in range(1, 301):
        tell(done)
    lines = capsys.readouterr().err.splitlines()
    seen = [int(re.search(r"photos: (\d+) of 300", line)[1]) for line in lines]
    assert seen == [5, 10, 20, 40, 80, 140, 200, 260]  # one image a second
    assert lines[0].endswith("about 5 min left")
    assert lines[-1].endswith("about 40 s left")


def test_a_quick_folder_shows_no_progress(root, capsys):
    write_images(root, {"a": 40, "b": 40})
    load(root)
    assert "left" not in capsys.readouterr().err


def test_more_than_the_memory(root, monkeypatch):
    write_images(root, {"a": 5, "b": 5})
    monkeypatch.setattr(folders, "_memory", lambda: 10 * 3 * 50**2)
    assert load(root, size=50).train.images.shape[-1] == 50
    monkeypatch.setattr(folders, "_decoded", lambda *_: pytest.fail("nothing is read first"))
    with pytest.raises(InputError, match=r"10 images of 51 × 51 pixels take 7.8e-05 GB, .* 50 or"):
        load(root, size=51)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(InputError, match=r"in each of 4 processes .* to 25 or less"):
        load(root, size=50)


def test_memory_of_this_machine():
    assert 2**28 < folders._memory() < 2**50


# --- what can be wrong --------------------------------------------------------------------------


def failing(root, match, **how):
    with pytest.raises(DataError, match=match) as raised:
        load(root, **how)
    return str(raised.value)


def test_no_folder(root):
    failing(None, r"image-folder needs root \(--data.root\).*got None.*fashion-mini")
    failing(root, r"needs root .*photos")
    root.write_text("a file")
    failing(root, r"needs root .*photos")


def test_too_few_classes(root):
    root.mkdir()
    failing(root, r"photos: expected at least 2 folders, one per class, got none\.$")
    write_images(root, {"a": 3})
    failing(root, r"expected at least 2 folders, one per class, got a\.$")
    picture(0).save(root / "loose.png")
    failing(root, "got a. 1 images lie in it directly: sort them by class")


def test_images_without_class_folders_in_train(root):
    write_images(root, {"train": 3, "test": 2})
    failing(root, r"photos/train: .* got none. 3 images lie in it directly")


def test_a_test_folder_alone(root):
    write_images(root, {"ant": 2, "test": 2})
    failing(root, r"has test/ but no train/. Put the training images into \S+train/CLASS")


def test_a_class_of_one_image(root):
    write_images(root, {"a": 3, "b": 1})
    failing(root, r"Class 'b' needs at least 2 images to be split .* it has 1")


def test_classes_that_differ(root):
    write_images(root / "train", {"a": 3, "b": 3})
    write_images(root / "test", {"a": 3, "fox": 1, "gnu": 1})
    failing(root, r"test has 2 of its 3 classes without training images: fox, gnu. .* a, b. Add")
    for c in ("fox", "gnu"):
        for f in (root / "test" / c).iterdir():
            f.unlink()
        (root / "test" / c).rmdir()
    failing(root, r"test lacks 1 of the 2 trained classes: b. Add images of them, or remove")
    write_images(root / "test", {"b": 1})
    write_images(root / "val", {"a": 1, "b": 1, "hen": 1})
    failing(root, r"val has 1 of its 3 classes without training images: hen")


def test_empty_classes(root):
    write_images(root, {"a": 3, "b": 3, "c": 0, "d": 0})
    failing(root, r"2 class folders without an image \(.png, .*: c, d. Put images into them")
    (root / "c" / "scan.pdf").write_text("no image")
    (root / "c" / ".DS_Store").write_text("hidden")
    (root / "d" / "x.heic").write_text("no image")
    message = failing(root, r"They hold files of other kinds: \S+scan.pdf, \S+x.heic\. Put")
    assert "DS_Store" not in message


@pytest.fixture
def damaged(root):
    """20 images of two classes: 15 damaged in several ways, those of class a all but two."""
    write_images(root / "train", {"a": 16, "b": 4}, size=(40, 40), suffix=".jpg")
    write_images(root / "test", {"a": 1, "b": 1}, size=(40, 40), suffix=".jpg")
    good = (root / "train/a/000.jpg").read_bytes()
    bad = (b"not a picture", b"", good[:40], good[: len(good) // 2])
    for i in range(2, 16):
        (root / f"train/a/{i:03}.jpg").write_bytes(bad[i % 4])
    Image.fromarray(np.zeros((4, 4), np.float32)).save(root / "train/b/0.tif")
    return root


def test_unreadable_images_are_listed(damaged):
    message = failing(damaged, r"image-folder: 15 of 23 images cannot be read:\n")
    assert message.count("photos/train/") == 12  # a dozen at most
    assert "a/003.jpg: " in message
    assert "000.jpg" not in message
    assert "a/012.jpg: cannot identify image file\n" in message  # the path once a line
    assert "\n  … and 3 more\n" in message
    assert "skip_unreadable (--data.skip-unreadable)" in message


def test_unreadable_images_are_skipped_when_asked(damaged, capsys):
    splits = load(damaged, size=8, skip_unreadable=True)
    said = capsys.readouterr().err
    assert "15 of 23 images cannot be read and are left out:\n" in said
    assert "2 classes, 6 train, 2 test images" in said
    assert data.class_counts(splits.train).tolist() == [2, 4]
    fine = [damaged / f"train/{n}.jpg" for n in ("a/000", "a/001", "b/000", "b/001", "b/002")]
    for row, path in zip(splits.train.images, fine):  # none has slipped
        mean = np.asarray(Image.open(path).convert("RGB")).mean()
        assert abs(row.float().mean() - mean) < 1.5
    for path in (damaged / "train/a").iterdir():
        path.write_bytes(b"")
    failing(damaged, "no image of a in train can be read. Repair", skip_unreadable=True)


def test_floating_point_pixels(damaged):
    for f in (damaged / "train/a").glob("0[01]?.jpg"):
        f.unlink()
    picture(0).save(damaged / "train/a/000.png")
    failing(damaged, r"b/0.tif: its pixels are floating-point numbers: save it with 8 or 16 bits")


def test_no_permission(root, monkeypatch):
    """Tests may run as root, whom no mode of a file stops: the calls refuse instead."""
    write_images(root, {"a": 3, "b": 3})
    target = str(root / "a" / "001.png")
    with monkeypatch.context() as patch:
        true = Image.open

        def refuse(path, *args, **kwargs):
            if str(path) == target:
                raise PermissionError(13, "Permission denied", path)
            return true(path, *args, **kwargs)

        patch.setattr(Image, "open", refuse)
        failing(root, r"1 of 6 images cannot be read:\n  \S+a/001.png: Permission denied\n")
    with monkeypatch.context() as patch:
        scandir = os.scandir

        def closed(path):
            if str(path) == str(root / "a"):
                raise PermissionError(13, "Permission denied", str(path))
            return scandir(path)

        patch.setattr(os, "scandir", closed)
        failing(root, r"photos/a cannot be read: Permission denied")
    with monkeypatch.context() as patch:

        def shut(path):
            raise PermissionError(13, "Permission denied", str(path))

        patch.setattr(Path, "iterdir", shut)
        failing(root, r"photos cannot be read: Permission denied")


# --- as a long tail -----------------------------------------------------------------------------


def test_a_folder_has_its_own_tail(root, capsys):
    for part in ("train", "test", "val"):
        write_images(root / part, {"ant": 3, "bee": 9, "cat": 3, "dog": 5})
    config = data.TailConfig("image-folder", root=root)
    splits = config.load()
    assert splits.train.classes == ("bee", "dog", "ant", "cat")  # the order of equals is kept
    assert data.class_counts(splits.train).tolist() == [9, 5, 3, 3]
    for part in (splits.train, splits.test, splits.validation):
        means = [part.images[part.labels == c].float().mean() for c in range(4)]
        level = [90, 210, 30, 150]  # as written: class c is 30 + 60 c
        assert all(abs(m - at) < 4 for m, at in zip(means, level))
        assert part.classes == splits.train.classes
    said = capsys.readouterr().err
    assert "all training images, by class: bee 9, dog 5, ant 3, cat 3\n" in said
    assert "--data.profile exp" in said
    assert config.drawn(7) is config  # every seed sees the same images, read once
    assert config.record()["profile"] == "natural"
    assert "skip_unreadable" not in config.record()
    assert replace(config, skip_unreadable=True).record()["skip_unreadable"]


def test_the_order_and_the_tail_can_be_set(root):
    write_images(root / "train", {"a": 4, "b": 12, "c": 8})
    write_images(root / "test", {"a": 1, "b": 1, "c": 1})
    config = data.TailConfig("image-folder", root=root)
    assert replace(config, order=(2, 0, 1)).load().train.classes == ("c", "a", "b")
    cut = replace(config, profile="exp", imbalance=4, n_max=12)
    splits = cut.load()
    assert splits.train.classes == ("b", "c", "a")
    assert data.class_counts(splits.train).tolist() == [12, 6, 3]
    assert cut.drawn(7).seed == 7
    with pytest.raises(InputError, match=r"n_max = 5 cuts .* profile exp, step or balanced"):
        replace(config, n_max=5).load()
    with pytest.raises(InputError, match="leaves out none"):
        replace(config, validation=2).load()


def test_benchmarks_are_cut_as_before():
    config = data.TailConfig("digits", imbalance=10)
    assert config.profile is None
    assert config.record()["profile"] == "exp"
    assert config.drawn(3).seed == 3
    assert data.class_counts(config.load().train).tolist() == data.long_tail_counts(139, 10, 10)
    many = data.TailConfig("digits", profile="natural").load().train
    assert many.classes == tuple("0123456789")


def test_command_without_flags(root, tmp_path, capsys):
    write_images(root, {"newt": 8, "owl": 40, "pig": 12}, size=(18, 20))
    folder = ["long-tailed", "--data.name", "image-folder", "--data.root", str(root)]
    quick = "--methods ce --seeds 0 1 --train.epochs 1 --train.measurements 1 --no-wandb --out"
    cli.main([*folder, *quick.split(), str(tmp_path / "out")])
    out, err = capsys.readouterr()
    assert "image-folder: 32, 10, 6 training images per class" in out
    assert err.count("3 classes, 48 train, 12 test images, 18 × 18 RGB") == 1  # for both seeds
    assert "owl 32, pig 10, newt 6" in err
    (root / "pig" / "000.png").write_bytes(b"")
    with pytest.raises(SystemExit):
        cli.main([*folder, "--out", str(tmp_path / "again")])
    assert "error: image-folder: 1 of 60 images cannot be read" in capsys.readouterr().err


# --- published lists ----------------------------------------------------------------------------


def lines_of(name):
    """The first lines of the lists in facebookresearch/classifier-balancing f162ade, by label."""
    return {
        "imagenet-lt": {
            "train": "train/n0144{c:04}/n0144{c:04}_{i}.JPEG {c}",
            "test": "val/n0144{c:04}/ILSVRC2012_val_000{i:05}.JPEG {c}",
            "validation": "train/n0144{c:04}/n0144{c:04}_9{i}.JPEG {c}",
        },
        "places-lt": {
            "train": "train/apartment_building/outdoor{c}/0000{i}.jpg {c}",
            "test": "val_256/Places365_val_{c}00{i}.jpg {c}",  # flat, as in MiSLAS' list
            "validation": "train/apartment_building/outdoor{c}/0001{i}.jpg {c}",
        },
        "inaturalist18": {
            "train": "train_val2018/Plantae/{c}/9f8ecb39{i}.jpg {c}",
            "test": "train_val2018/Plantae/{c}/cb75e788{i}.jpg {c}",
        },
    }[name]


COUNTS = {"train": [2, 6, 3], "test": [1, 1, 1], "validation": [2, 2, 2]}


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Writes a small published set with K = 3 in the format of the lists."""

    def write(name, place="", newline="\n"):
        base = tmp_path / "sets"
        known, files = folders.LISTS[name], {}
        for split, form in lines_of(name).items():
            rows = [form.format(c=c, i=i) for c in range(3) for i in range(COUNTS[split][c])]
            np.random.RandomState(0).shuffle(rows)
            file = known.files[split][0]
            files[split] = (file, len(rows))
            (base / place).mkdir(parents=True, exist_ok=True)
            (base / place / file).write_bytes((newline.join(rows) + newline).encode())
            for row in rows:
                path, c = row.split()
                (base / path).parent.mkdir(parents=True, exist_ok=True)
                picture(int(c), (50, 40)).save(base / path, "JPEG")
        monkeypatch.setitem(folders.LISTS, name, replace(known, num_classes=3, files=files))
        return base

    return write


def test_published_numbers():
    """3, 20, 50 or 100 images of each class where a list is balanced."""
    per_class = {
        ("imagenet-lt", "test"): 50,
        ("imagenet-lt", "validation"): 20,
        ("places-lt", "test"): 100,
        ("places-lt", "validation"): 20,
        ("inaturalist18", "test"): 3,
    }
    for (name, split), each in per_class.items():
        known = folders.LISTS[name]
        assert known.files[split][1] == each * known.num_classes
    assert {n: k.files["train"] for n, k in folders.LISTS.items()} == {
        "imagenet-lt": ("ImageNet_LT_train.txt", 115_846),
        "places-lt": ("Places_LT_train.txt", 62_500),
        "inaturalist18": ("iNaturalist18_train.txt", 437_513),
    }


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("name", folders.LISTS)
def test_lists(name, newline, published):
    base = published(name, folders.LISTS[name].folder, newline)
    assert data.available(name, base)
    splits = data.load(name, base)
    assert splits.name == name
    assert splits.train.images.shape == (11, 3, 224, 224)
    assert data.class_counts(splits.train).tolist() == COUNTS["train"]
    assert data.class_counts(splits.test).tolist() == COUNTS["test"]
    assert (splits.validation is None) == (name == "inaturalist18")
    for part in (p for p in (splits.train, splits.test, splits.validation) if p is not None):
        level = part.images.float().mean((1, 2, 3))
        assert ((level - 30 - 60 * part.labels).abs() < 4).all()
    assert (
        splits.train.classes
        == {
            "imagenet-lt": ("n01440000", "n01440001", "n01440002"),
            "places-lt": tuple(f"apartment_building/outdoor{c}" for c in range(3)),
            "inaturalist18": ("Plantae/0", "Plantae/1", "Plantae/2"),
        }[name]
    )


def test_a_published_set_has_its_own_tail(published, monkeypatch, tmp_path):
    published("imagenet-lt")
    monkeypatch.setenv("NCMETHODS_DATA", str(tmp_path / "sets"))
    splits = data.TailConfig("imagenet-lt", size=16).load()
    assert splits.train.classes == ("n01440001", "n01440002", "n01440000")
    assert data.class_counts(splits.train).tolist() == [6, 3, 2]
    assert splits.validation.classes == splits.train.classes
    assert splits.train.images.shape[-1] == 16
    (tmp_path / "sets" / "ImageNet_LT_val.txt").unlink()  # many people have only the other two
    assert data.load("imagenet-lt", size=16).validation is None
    (tmp_path / "sets").rename(tmp_path / "elsewhere")
    (tmp_path / "sets").mkdir()
    (tmp_path / "elsewhere").rename(tmp_path / "sets" / "imagenet-lt")
    assert len(data.load("imagenet-lt", size=16).train) == 11


def test_titles_that_are_not_unique(published):
    base = published("inaturalist18")
    for f in ("iNaturalist18_train.txt", "iNaturalist18_val.txt"):
        text = (base / f).read_text()
        (base / f).write_text(re.sub(r"Plantae/\d/", "all/", text))
    (base / "train_val2018/all").mkdir()
    for f in (base / "train_val2018/Plantae").rglob("*.jpg"):
        (base / "train_val2018/all" / f.name).write_bytes(f.read_bytes())
    assert data.load("inaturalist18", base, size=8).train.classes == ("0", "1", "2")


def test_missing_lists_say_what_to_get(tmp_path):
    assert not data.available("places-lt")
    with pytest.raises(DataError) as raised:
        data.load("places-lt", tmp_path / "mine")
    with pytest.raises(InputError) as refused:
        data.fetch("places-lt", tmp_path / "mine")
    for message in (str(raised.value), str(refused.value)):
        for word in ("Places_LT_train.txt", "Places_LT_test.txt", "classifier-balancing"):
            assert word in message
        assert f"into {tmp_path / 'mine' / 'Places_LT'}" in message
        assert "Places365-Standard, 256 × 256" in message
    assert "looked in" in str(raised.value)
    assert "cannot be fetched" in str(refused.value)


def test_lists_without_images(published):
    base = published("inaturalist18")
    (base / "train_val2018").rename(base / "other")
    with pytest.raises(
        DataError, match=r"train.txt names \S+Plantae/\d/\w+.jpg, which is not th.*"
    ):
        data.load("inaturalist18", base)
    (base / "other").rename(base / "train_val2018")
    last = (base / "iNaturalist18_train.txt").read_text().split()[-2]
    (base / last).unlink()
    with pytest.raises(DataError, match=r"1 of 14 images .*\n  \S+: No such file or directory\n"):
        data.load("inaturalist18", base)
    assert len(data.load("inaturalist18", base, size=8, skip_unreadable=True).train) == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.splitlines(True)[0],
            r"train.txt: expected 11 lines, got 1. Download",
        ),
        (lambda t: t.replace(".jpg 2", ".jpg 3"), r"line \d+: expected a label in 0 … 2, got 3"),
        (lambda t: t.replace(".jpg 2", ".jpg 1"), r"has no image of 1 of the 3 labels: 2"),
        (lambda t: t.replace(" ", ","), r"line 1: expected `path label`, got 'train_val2018/.*'"),
        (lambda t: t.replace(".jpg 0", ".jpg -1"), r"expected `path label`, got '\S+ -1'"),
        (lambda t: "", r"expected 11 lines, got 0"),
        (lambda t: "\n\n" + t + "\n", None),
    ],
)
def test_damaged_lists(change, message, published):
    base = published("inaturalist18")
    path = base / "iNaturalist18_train.txt"
    path.write_text(change(path.read_text()))
    if message is None:
        assert len(data.load("inaturalist18", base, size=8).train) == 11
        return
    with pytest.raises(DataError, match=message):
        data.load("inaturalist18", base, size=8)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"train.txt cannot be read: 'utf-8' codec"):
        data.load("inaturalist18", base, size=8)
