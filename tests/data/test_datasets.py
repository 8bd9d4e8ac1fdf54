import gzip
import hashlib
import importlib.util
import os
import pickle
import socket
import struct
import subprocess
import sys
import urllib.error
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from ncmethods import data
from ncmethods._core import DataError, InputError
from ncmethods.data import datasets

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def bare_machine(tmp_path, monkeypatch):
    """No dataset anywhere but in the test's own directories."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NCMETHODS_DATA", raising=False)
    monkeypatch.setattr(datasets, "_DEBIAN", tmp_path / "usr")


def write_idx(path, array, magic=None, packed=False):
    head = struct.pack(f">{1 + array.ndim}i", magic or 0x800 + array.ndim, *array.shape)
    content = head + array.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    if packed:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
    else:
        path.write_bytes(content)
    return "sha256:" + hashlib.sha256(content).hexdigest()


@pytest.fixture
def fashion(tmp_path, monkeypatch):
    """Writes a small Fashion-MNIST into a folder, and makes its checksums the known ones."""
    rng = np.random.RandomState(0)
    arrays = {
        "train-images-idx3-ubyte": rng.randint(0, 256, (20, 28, 28)),
        "train-labels-idx1-ubyte": np.arange(20) % 10,
        "t10k-images-idx3-ubyte": rng.randint(0, 256, (10, 28, 28)),
        "t10k-labels-idx1-ubyte": np.arange(10),
    }

    def write(folder, packed=False):
        sums = {name: write_idx(folder / name, a, packed=packed) for name, a in arrays.items()}
        monkeypatch.setitem(datasets._FILES, "fashion-mnist", {"fashion-mnist": sums})
        return arrays

    return write


# --- what runs without a file -------------------------------------------------------------------


def test_names_are_the_table():
    assert data.names() == (
        "fashion-mini",
        "glyphs-mini",
        "digits",
        "fashion-mnist",
        "cifar10",
        "cifar100",
        "glyphs",
        "image-folder",
        "imagenet-lt",
        "places-lt",
        "inaturalist18",
    )


def test_fashion_mini():
    splits = data.load("fashion-mini")
    assert splits.name == "fashion-mini"
    assert splits.train.images.shape == (5000, 1, 28, 28)
    assert splits.test.images.shape == (2000, 1, 28, 28)
    assert data.class_counts(splits.train).tolist() == [500] * 10
    assert data.class_counts(splits.test).tolist() == [200] * 10
    assert len(splits.train) == 5000
    assert splits.train.num_classes == 10
    splits.train.images[0] = 0  # owned: writable without touching the file


DEBIAN = Path("/usr/share/datasets/fashion-mnist")


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_fashion_mini_is_fashion_mnist(tmp_path):
    full = data.load("fashion-mnist", DEBIAN)  # all four real checksums
    assert full.train.images.shape == (60000, 1, 28, 28)
    assert full.test.images.shape == (10000, 1, 28, 28)
    mini = data.load("fashion-mini")
    with np.load(datasets._SHIPPED, allow_pickle=False) as file:
        for part in ("train", "test"):
            index, small = file[f"{part}_index"], getattr(mini, part)
            whole = getattr(full, part)
            assert len(np.unique(index)) == len(index) == len(small)
            assert torch.equal(whole.images[index], small.images)
            assert torch.equal(whole.labels[index], small.labels)
            assert whole.classes == small.classes


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_script_makes_the_shipped_file(tmp_path, monkeypatch):
    monkeypatch.setenv("NCMETHODS_DATA", str(DEBIAN))
    spec = importlib.util.spec_from_file_location(
        "make_fashion_mini", REPOSITORY / "scripts" / "make_fashion_mini.py"
    )
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    sums = [script.main(tmp_path / name) for name in ("a.npz", "b.npz")]
    assert sums[0] == sums[1]  # reproducible
    with np.load(tmp_path / "a.npz") as made, np.load(datasets._SHIPPED) as shipped:
        assert made.files == shipped.files  # and, with whatever zlib, the same content
        assert all(np.array_equal(made[key], shipped[key]) for key in made.files)


def test_damaged_fashion_mini(tmp_path, monkeypatch):
    damaged = tmp_path / "fashion-mini.npz"
    damaged.write_bytes(datasets._SHIPPED.read_bytes()[:-1])
    monkeypatch.setattr(datasets, "_SHIPPED", damaged)
    with pytest.raises(DataError, match=r"fashion-mini.npz is damaged: expected sha256 .* got "):
        data.load("fashion-mini")


def test_digits():
    from sklearn.datasets import load_digits

    splits = data.load("digits")
    pixels, labels = load_digits(return_X_y=True)
    assert len(splits.train) + len(splits.test) == 1797
    assert splits.train.images.shape[1:] == (1, 8, 8)
    assert splits.train.images.max() == 255
    share = data.class_counts(splits.test).numpy() / np.bincount(labels)
    assert (np.abs(share - 0.2) < 0.005).all()
    # Train and test are disjoint and together the whole: compare as multisets of (pixels, label).
    both = [
        (*(im.flatten() * (16 / 255)).round().int().tolist(), int(y))
        for part in splits[:2]
        for im, y in zip(part.images, part.labels)
    ]
    assert sorted(both) == sorted((*map(int, p), int(y)) for p, y in zip(pixels, labels))
    assert torch.equal(splits.test.images, data.load("digits").test.images)


def test_size_resizes():
    splits = data.load("digits", size=28)
    assert splits.train.images.shape[1:] == (1, 28, 28)
    assert splits.test.images.dtype == torch.uint8
    small = data.load("fashion-mini", size=14).test.images.float()
    original = data.load("fashion-mini", size=28).test.images.float()
    pooled = torch.nn.functional.avg_pool2d(original, 2)
    assert (small - pooled).abs().mean() < 12  # same pictures (random pairs differ by 60)
    with pytest.raises(InputError, match="size must be a number of pixels ≥ 1, got 0"):
        data.load("digits", size=0)


# --- unknown and missing ------------------------------------------------------------------------


@pytest.mark.parametrize("verb", [data.load, data.available, data.fetch])
def test_unknown_name_suggests(verb):
    with pytest.raises(InputError, match=r"Unknown dataset 'cifar-10'. Did you mean 'cifar10'"):
        verb("cifar-10")


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10", "cifar100"])
def test_missing_says_what_to_do(name, tmp_path):
    assert not data.available(name)
    with pytest.raises(DataError) as raised:
        data.load(name)
    message = str(raised.value)
    layout, files = next(iter(datasets._FILES[name].items()))
    assert f"ncmethods fetch {name}" in message
    assert str(tmp_path / "home" / ".cache" / "ncmethods" / layout) in message
    assert all(file in message for file in files)
    assert "`fashion-mini` runs now" in message
    assert ("apt-get install dataset-fashion-mnist" in message) == (name == "fashion-mnist")
    with pytest.raises(DataError, match=f"into {tmp_path / 'mine'}"):
        data.load(name, tmp_path / "mine")


def test_available():
    assert data.available("fashion-mini")
    assert data.available("digits")
    assert not data.available("image-folder")


# --- idx ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "place",
    [
        "root",
        "root/fashion-mnist",
        "root/FashionMNIST/raw",
        "home/.cache/ncmethods/fashion-mnist",
        "env/fashion-mnist",
        "usr/fashion-mnist",
    ],
)
def test_idx_round_trip(fashion, tmp_path, monkeypatch, packed, place):
    arrays = fashion(tmp_path / place, packed)
    monkeypatch.setenv("NCMETHODS_DATA", str(tmp_path / "env"))
    root = tmp_path / "root" if place.startswith("root") else None
    assert data.available("fashion-mnist", root)
    splits = data.load("fashion-mnist", root)
    train, test = splits.train, splits.test
    assert np.array_equal(train.images[:, 0].numpy(), arrays["train-images-idx3-ubyte"])
    assert np.array_equal(train.labels.numpy(), arrays["train-labels-idx1-ubyte"])
    assert np.array_equal(test.images[:, 0].numpy(), arrays["t10k-images-idx3-ubyte"])
    assert np.array_equal(test.labels.numpy(), arrays["t10k-labels-idx1-ubyte"])
    assert train.classes[9] == "Ankle boot"


def test_root_comes_first(fashion, tmp_path):
    fashion(tmp_path / "usr" / "fashion-mnist")
    fashion(tmp_path / "root")
    write_idx(tmp_path / "usr" / "fashion-mnist" / "t10k-labels-idx1-ubyte", np.zeros(10))
    data.load("fashion-mnist", tmp_path / "root")
    with pytest.raises(DataError, match="t10k-labels"):
        data.load("fashion-mnist")


def test_incomplete_folder_is_named(fashion, tmp_path):
    fashion(tmp_path / "root")
    (tmp_path / "root" / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="root lacks t10k-labels-idx1-ubyte"):
        data.load("fashion-mnist", tmp_path / "root")
    assert not data.available("fashion-mnist", tmp_path / "root")


def test_damaged_idx(fashion, tmp_path):
    def failing(match):
        with pytest.raises(DataError, match=match) as raised:
            data.load("fashion-mnist", tmp_path)
        assert str(path) in str(raised.value)
        assert "fetch it again" in str(raised.value)

    fashion(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    good = path.read_bytes()
    path.write_bytes(good[:-5])
    failing(f"truncated or damaged: expected {len(good)} bytes, got {len(good) - 5}")
    path.write_bytes(b"")
    failing("expected magic number 0x0803, got 0x0000")
    path.write_bytes(b"\0\0\x08\x01" + good[4:])
    failing("expected magic number 0x0803, got 0x0801")
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    failing(f"expected sha256 {hashlib.sha256(good).hexdigest()}, got [0-9a-f]{{64}}")


def test_damaged_gzip(fashion, tmp_path):
    fashion(tmp_path, packed=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 0xFF
    for bad in (good[: len(good) // 2], b"not gzip at all", b"", bytes(flipped)):
        path.write_bytes(bad)
        with pytest.raises(DataError, match=r"ubyte\.gz"):
            data.load("fashion-mnist", tmp_path)


def test_unreadable_file(fashion, tmp_path, monkeypatch):
    fashion(tmp_path)

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match="cannot be read: Permission denied"):
        data.load("fashion-mnist", tmp_path)


# --- CIFAR --------------------------------------------------------------------------------------


def python2_batch(pixels, **lists):
    """The bytes that Python 2 wrote: protocol 2, byte strings, the old home of _reconstruct."""

    def text(value):
        return b"T" + struct.pack("<I", len(value)) + value

    def number(value):
        return b"J" + struct.pack("<i", value)

    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(" + number(0) + b"t"
        + text(b"b") + b"tR(" + number(1) + b"(" + b"".join(map(number, pixels.shape)) + b"t"
        + b"cnumpy\ndtype\n(" + text(b"u1") + number(0) + number(1) + b"tR("
        + number(3) + text(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
        + b"\x89" + text(pixels.astype(np.uint8).tobytes()) + b"tb"
    )  # fmt: skip
    items = text(b"data") + array
    for key, values in lists.items():
        write = number if isinstance(values[0], int) else text
        items += text(key.encode()) + b"](" + b"".join(map(write, values)) + b"e"
    return b"\x80\x02}(" + items + b"u."


def write_cifar(folder, monkeypatch, name, binary=False):
    """A small CIFAR in the format of its authors; returns its images and labels."""
    rng, K = np.random.RandomState(0), 10 if name == "cifar10" else 100
    classes = [f"class{c}" for c in range(K)]
    layout, files = list(datasets._FILES[name].items())[binary]
    folder.mkdir(parents=True, exist_ok=True)
    sums, parts = {}, {"train": [], "test": []}
    for file in files:
        if file == list(files)[-1]:
            key = "label_names" if K == 10 else "fine_label_names"
            content = "\n".join(classes).encode() + b"\n"
            if not binary:
                content = pickle.dumps({key: classes}, 2)
        else:
            pixels = rng.randint(0, 256, (4, 3072)).astype(np.uint8)
            labels = rng.randint(0, K, 4)
            parts["test" if file.startswith("test") else "train"].append((pixels, labels))
            heads = [labels] if K == 10 else [labels // 5, labels]  # coarse and fine
            if binary:
                content = np.column_stack([*heads, pixels]).astype(np.uint8).tobytes()
            else:
                keys = ["labels"] if K == 10 else ["coarse_labels", "fine_labels"]
                lists = {k: v.tolist() for k, v in zip(keys, heads)}
                content = python2_batch(pixels, filenames=[b"a.png"] * 4, **lists)
        (folder / file).write_bytes(content)
        sums[file] = (
            f"bytes:{len(content)}" if binary else f"md5:{hashlib.md5(content).hexdigest()}"
        )
    if binary:
        sums[file] = None
    monkeypatch.setitem(datasets._FILES[name], layout, sums)
    return {
        part: tuple(np.concatenate(column) for column in zip(*rows)) for part, rows in parts.items()
    }


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_round_trip(name, binary, tmp_path, monkeypatch):
    layout = list(datasets._FILES[name])[binary]
    written = write_cifar(tmp_path / layout, monkeypatch, name, binary)
    splits = data.load(name, tmp_path)
    for part in ("train", "test"):
        read, (pixels, labels) = getattr(splits, part), written[part]
        assert np.array_equal(read.images.flatten(1).numpy(), pixels)
        assert np.array_equal(read.labels.numpy(), labels)
        assert read.images.shape[1:] == (3, 32, 32)
    assert splits.train.classes[3] == "class3"
    assert splits.train.num_classes == (10 if name == "cifar10" else 100)
    assert splits.name == name


def test_python2_batch_is_what_pickle_reads():
    """The hand-written format of the tests is a pickle that Python itself reads."""
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 6)
    content = python2_batch(pixels, labels=[3, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy, about the old names and flags
        batch = pickle.loads(content, encoding="latin1")
    assert np.array_equal(batch["data"], pixels)
    assert batch["labels"] == [3, 1]


@pytest.mark.parametrize("binary", [False, True])
def test_damaged_cifar(binary, tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch, "cifar10", binary)
    path = tmp_path / ("data_batch_2.bin" if binary else "data_batch_2")
    good = path.read_bytes()
    path.write_bytes(good[:-100])
    expected = len(good) if binary else hashlib.md5(good).hexdigest()
    with pytest.raises(DataError, match=f"data_batch_2.* expected .* {expected}, got ") as raised:
        data.load("cifar10", tmp_path)
    assert f"({len(good) - 100} bytes)" in str(raised.value)


def test_labels_outside_the_classes(tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch, "cifar10", binary=True)
    path = tmp_path / "test_batch.bin"
    path.write_bytes(b"\xff" + path.read_bytes()[1:])
    with pytest.raises(DataError, match=r"test_batch.bin: expected labels below 10, got 255"):
        data.load("cifar10", tmp_path)


class Harmful:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def put_batch(folder, content):
    """Make ``content`` the first batch of the CIFAR-10 in ``folder``, checksum and all."""
    (folder / "data_batch_1").write_bytes(content)
    sums = datasets._FILES["cifar10"]["cifar-10-batches-py"]
    sums["data_batch_1"] = f"md5:{hashlib.md5(content).hexdigest()}"


@pytest.mark.parametrize("function", [os.mkdir, eval, np.memmap])
def test_forbidden_global_is_refused(function, tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch, "cifar10")
    canary = tmp_path / "canary"
    argument = f"open({str(canary)!r}, 'w')" if function is eval else str(canary)
    content = pickle.dumps({"data": Harmful(function, argument), "labels": [0]}, 2)
    put_batch(tmp_path, content)
    refused = rf"data_batch_1 is not a CIFAR batch: it asks for .*{function.__name__}\."
    with pytest.raises(DataError, match=refused):
        data.load("cifar10", tmp_path)
    assert not canary.exists()


def test_allowed_name_of_another_module_is_refused(tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch, "cifar10")
    put_batch(tmp_path, b"\x80\x02cothers\nndarray\n.")
    with pytest.raises(DataError, match=r"it asks for others\.ndarray"):
        data.load("cifar10", tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x02}", b"garbage", pickle.dumps({"x": 1}), pickle.dumps([1])]
)
def test_not_a_batch(content, tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch, "cifar10")
    put_batch(tmp_path, content)
    with pytest.raises(DataError, match="data_batch_1 is not a CIFAR batch"):
        data.load("cifar10", tmp_path)


# --- fetch --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fashion-mini", "digits", "image-folder"])
def test_nothing_to_fetch(name):
    with pytest.raises(InputError, match=f"'{name}' needs no download"):
        data.fetch(name)
    if name != "image-folder":
        with pytest.raises(InputError, match=f"skip_unreadable is for image files .*not {name}"):
            data.load(name, skip_unreadable=True)


def test_fetch_returns_what_is_there(fashion, tmp_path):
    fashion(tmp_path / "usr" / "fashion-mnist")
    assert data.fetch("fashion-mnist") == tmp_path / "usr" / "fashion-mnist"


def test_fetch_downloads_and_verifies(fashion, tmp_path, monkeypatch):
    fashion(tmp_path / "source", packed=True)
    asked = []

    def download_url(url, root, filename, md5):
        asked.append(url)
        Path(root).mkdir(parents=True, exist_ok=True)
        (Path(root) / filename).write_bytes((tmp_path / "source" / filename).read_bytes())

    monkeypatch.setattr("torchvision.datasets.utils.download_url", download_url)
    home = tmp_path / "home" / ".cache" / "ncmethods"
    assert data.fetch("fashion-mnist") == home / "fashion-mnist"
    assert len(asked) == 4
    assert all(url.startswith("http") and url.endswith(".gz") for url in asked)
    assert (
        data.fetch("fashion-mnist", tmp_path / "mine")
        == tmp_path / "home/.cache/ncmethods/fashion-mnist"
    )
    assert len(asked) == 4  # found, not fetched again
    # A damaged file is fetched anew.
    (home / "fashion-mnist" / "t10k-labels-idx1-ubyte.gz").write_bytes(b"")
    assert data.fetch("fashion-mnist") == home / "fashion-mnist"
    # What came is verified.
    (tmp_path / "source" / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"other"))
    (home / "fashion-mnist" / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte\.gz: expected magic number"):
        data.fetch("fashion-mnist")


def test_fetch_cifar(tmp_path, monkeypatch):
    def download(url, download_root, filename, md5, remove_finished):
        assert url.endswith(f"/{filename}")
        assert len(md5) == 32
        assert remove_finished
        write_cifar(Path(download_root) / "cifar-100-python", monkeypatch, "cifar100")

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", download)
    assert data.fetch("cifar100", tmp_path / "here") == tmp_path / "here" / "cifar-100-python"


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10", "cifar100"])
@pytest.mark.parametrize(
    "error", [urllib.error.URLError("no route"), TimeoutError("no route"), RuntimeError("no route")]
)
def test_fetch_without_network(name, error, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        assert 0 < socket.getdefaulttimeout() <= 30  # a silent host ends it too
        raise error

    monkeypatch.setattr("torchvision.datasets.utils.download_url", refuse)
    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", refuse)
    with pytest.raises(DataError, match=f"Could not fetch {name} into .*no route.*fashion-mini"):
        data.fetch(name, tmp_path)
    assert socket.getdefaulttimeout() is None


def test_fetch_into_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="Could not fetch cifar10 into"):
        data.fetch("cifar10", tmp_path / "file")


# --- ImageData and the room ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 1, 4, 4), torch.zeros(2).long(), "images must be uint8"),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(2).long(), r"\[N, C, H, W\]"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2), "labels must be int64"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(3).long(), "N = 2"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 2]), "0 … 1 .* got 0 … 2"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([-1, 0]), "got -1 … 0"),
    ],
)
def test_bad_image_data(images, labels, message):
    with pytest.raises(InputError, match=message):
        data.ImageData(images, labels, ("a", "b"))


def test_subset():
    mini = data.load("fashion-mini").test
    some = mini.subset(torch.tensor([5, 3]))
    assert len(some) == 2
    assert torch.equal(some.images, mini.images[[5, 3]])
    assert some.classes == mini.classes


def test_import_is_light():
    code = "import ncmethods.data, sys; print({'torchvision', 'sklearn', 'PIL'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
