"""Images from files: a person's own folder, and the published long-tailed sets by their lists."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ncmethods._core import DataError, InputError
from ncmethods.data.datasets import Array, ImageData, Splits, held_out, homes

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
LARGEST = 64
"""Side of the squares that larger images of a folder are resized to, if nothing is said."""
LIST_SIZE = 224
"""The same for the published sets."""


class Part(NamedTuple):
    """The image files of one split before they are read."""

    paths: list[str]
    labels: NDArray[np.int64]  # [N]


def say(text: str) -> None:
    """Print a line on stderr; of several processes only the first does."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def shown(items: Sequence[object], most: int = 12) -> str:
    """All of a dozen items; of more the first, and how many follow."""
    more = f", … ({len(items) - most} more)" if len(items) > most else ""
    return ", ".join(map(str, items[:most])) + more


# --- a folder per class -------------------------------------------------------------------------


def image_folder(
    root: Path | None, size: int | None = None, *, skip_unreadable: bool = False
) -> Splits:
    """What ``data.load`` gives for ``image-folder``.

    Raises:
        DataError: no class folders, classes that differ between the splits, images that cannot be
            read.
        InputError: more images than fit into memory.
    """
    if root is None or not root.is_dir():
        raise DataError(
            "image-folder needs root (--data.root), a directory with CLASS/*.png, or with "
            f"train/CLASS/*.png and test/CLASS/*.png, got {root}. "
            "Without files, `fashion-mini` runs now."
        )
    folders = _split_folders(root)
    classes, train, passed = _class_files(folders.pop("train"))
    parts, notes = {"train": train}, []
    for split, folder in folders.items():
        _, parts[split], others = _class_files(folder, classes)
        passed += others
    if "test" not in parts:
        test = held_out(torch.from_numpy(train.labels), classes).numpy()
        for split, chosen in (("train", ~test), ("test", test)):
            kept = np.flatnonzero(chosen)
            parts[split] = Part([train.paths[i] for i in kept], train.labels[kept])
        notes.append("no test folder: a fifth of each class is held out for testing")
    if size is None:
        size, note = _side([path for part in parts.values() for path in part.paths])
        notes.append(note)
    if passed:
        notes.append(f"passed over, files of other kinds: {shown(passed, 3)}")
    splits = _read("image-folder", parts, classes, size, skip_unreadable)
    colour = "grey" if splits.train.images.shape[1] == 1 else "RGB"
    numbers = ", ".join(f"{len(getattr(splits, split)):,} {split}" for split in parts)
    say(
        f"image-folder: {len(classes)} classes, {numbers} images, {size} × {size} {colour}"
        + "".join(f"\n  {note}" for note in notes)
    )
    return splits


def _folders(place: Path) -> list[Path]:
    """The folders in ``place`` by name, without hidden ones."""
    try:
        return sorted(p for p in place.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError as error:
        raise DataError(f"{place} cannot be read: {error.strerror or error}.") from error


def _split_folders(root: Path) -> dict[str, Path]:
    """The folder that holds the class folders of each split; ``train`` may be ``root`` itself."""
    found = {p.name: p for p in _folders(root)}
    held = [found[name] for name in ("test", "val") if name in found]
    train = found.get("train")
    if train is None and held:
        raise DataError(
            f"{root} has {held[0].name}/ but no train/. Put the training images into "
            f"{root / 'train'}/CLASS, or rename {held[0].name}/ if it is a class."
        )
    if train is None or not (held or _folders(train)):  # a class may be called train
        return {"train": root}
    unused = [name for name in found if name not in ("train", "test", "val")]
    if unused:
        say(f"image-folder: beside train/ only test/ and val/ are read, not {shown(unused)}")
    return {"train": train} | dict(zip(("test", "validation"), held))


def _class_files(
    folder: Path, classes: tuple[str, ...] | None = None
) -> tuple[tuple[str, ...], Part, list[str]]:
    """Classes and image files of ``folder/CLASS/*``, and files that are no images.

    Args:
        folder: holds the class folders.
        classes: of the training set, which must be those here; None takes what is found.
    """
    found = tuple(p.name for p in _folders(folder))
    if classes is None and len(found) < 2:
        loose = sum(p.suffix.lower() in SUFFIXES for p in folder.iterdir())
        why = f" {loose} images lie in it directly: sort them by class." if loose else ""
        raise DataError(
            f"{folder}: expected at least 2 folders, one per class, got {shown(found) or 'none'}."
            + why
        )
    classes = classes or found
    unknown = [c for c in found if c not in classes]
    lacking = [c for c in classes if c not in found]
    if unknown:
        raise DataError(
            f"{folder} has {len(unknown)} of its {len(found)} classes without training images: "
            f"{shown(unknown)}. The {len(classes)} trained classes are {shown(classes)}. "
            "Add training images, or remove the folders."
        )
    if lacking:
        raise DataError(
            f"{folder} lacks {len(lacking)} of the {len(classes)} trained classes: "
            f"{shown(lacking)}. Add images of them, or remove the classes from the training set."
        )
    paths: list[str] = []
    labels: list[int] = []
    others: list[str] = []
    empty = {}
    for c, title in enumerate(classes):
        images, rest = _images(folder / title)
        if not images:
            empty[title] = rest
        paths += images
        labels += [c] * len(images)
        others += rest
    if empty:
        known, rest = ", ".join(SUFFIXES), [file for files in empty.values() for file in files]
        kinds = f" They hold files of other kinds: {shown(rest, 3)}." if rest else ""
        raise DataError(
            f"{folder} has {len(empty)} class folders without an image ({known}): "
            f"{shown(list(empty))}.{kinds} Put images into them, or remove them."
        )
    return classes, Part(paths, np.asarray(labels)), others


def _images(folder: Path) -> tuple[list[str], list[str]]:
    """Image files anywhere below ``folder``, and other files; hidden ones are neither."""

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}.") from error

    images: list[str] = []
    others: list[str] = []
    for place, inside, files in os.walk(folder, onerror=fail):
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                known = name.lower().endswith(SUFFIXES)
                (images if known else others).append(os.path.join(place, name))
    return images, others


def _side(paths: Sequence[str]) -> tuple[int, str]:
    """Side of the squares that suits the images, and how it was found."""
    from PIL import Image

    sides = []
    for path in paths[:: -(-len(paths) // 256)]:
        try:
            with Image.open(path) as image:
                sides.append(min(image.size))
        except Exception:
            continue  # what cannot be read is said later, of all images
    if not sides:
        return LARGEST, f"size {LARGEST}: the default"
    median = int(np.median(sides))
    if median <= LARGEST:
        return median, f"size {median}: their median short side"
    return LARGEST, f"size {LARGEST}: the default for larger ones (median short side {median})"


# --- published lists ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Lists:
    """A published set: text files of lines ``path label``, and images below the same root.

    Args:
        folder: what repositories call the folder of the lists.
        num_classes: K.
        files: list and number of its lines, by split; ``validation`` may be missing.
        images: what to download, and how it lies.
    """

    folder: str
    num_classes: int
    files: Mapping[str, tuple[str, int]]
    images: str

    def place(self, base: Path) -> Path | None:
        """Where the lists are: in ``base`` or in its ``folder``; None if one is missing."""
        wanted = [file for split, (file, _) in self.files.items() if split != "validation"]
        for place in (base, base / self.folder):
            if all((place / file).is_file() for file in wanted):
                return place
        return None


# Lines as counted in the lists of facebookresearch/classifier-balancing f162ade; of the training
# lists of ImageNet-LT and iNaturalist 2018 as said by TensorFlow Datasets and visipedia/inat_comp.
LISTS = {
    "imagenet-lt": Lists(
        "ImageNet_LT",
        1000,
        {
            "train": ("ImageNet_LT_train.txt", 115_846),
            "test": ("ImageNet_LT_test.txt", 50_000),
            "validation": ("ImageNet_LT_val.txt", 20_000),
        },
        "the images of ImageNet 2012 (image-net.org) as train/WNID/*.JPEG and val/WNID/*.JPEG",
    ),
    "places-lt": Lists(
        "Places_LT",
        365,
        {
            "train": ("Places_LT_train.txt", 62_500),
            "test": ("Places_LT_test.txt", 36_500),
            "validation": ("Places_LT_val.txt", 7_300),
        },
        "the images of Places365-Standard, 256 × 256 (places2.csail.mit.edu), as train/CLASS/*.jpg "
        "and val/CLASS/*.jpg",
    ),
    "inaturalist18": Lists(
        "iNaturalist18",
        8142,
        {
            "train": ("iNaturalist18_train.txt", 437_513),
            "test": ("iNaturalist18_val.txt", 24_426),
        },
        "train_val2018.tar.gz of github.com/visipedia/inat_comp, unpacked, as "
        "train_val2018/GROUP/LABEL/*.jpg",
    ),
}


def what_to_get(name: str, base: Path) -> str:
    """The files of a published set and where they go, as a sentence."""
    known = LISTS[name]
    files = ", ".join(file for file, _ in known.files.values())
    return (
        f"Put {files} (github.com/facebookresearch/classifier-balancing, data/{known.folder}) into "
        f"{base / known.folder}, and into {base} {known.images}, each as its list names it."
    )


def listed_at(name: str, root: Path | None) -> tuple[Path, Path] | None:
    """Where the images of a published set are, and where its lists are; None if nowhere."""
    for home in homes(root):
        for base in (home, home / name):
            place = LISTS[name].place(base)
            if place is not None:
                return base, place
    return None


def listed(
    name: str, root: Path | None, size: int | None = None, *, skip_unreadable: bool = False
) -> Splits:
    """What ``data.load`` gives for ``imagenet-lt``, ``places-lt`` and ``inaturalist18``.

    Raises:
        DataError: lists or images are missing or not what was published.
        InputError: more images than fit into memory.
    """
    known, found, searched = LISTS[name], listed_at(name, root), homes(root)
    if found is None:
        raise DataError(
            f"{name} is not on this machine (looked in {', '.join(map(str, searched))}). "
            f"{what_to_get(name, searched[0])} Without a download, `fashion-mini` runs now."
        )
    base, place = found
    parts = {}
    for split, (file, lines) in known.files.items():
        if split == "validation" and not (place / file).is_file():
            continue
        parts[split] = _listed_files(place / file, lines, known.num_classes, base)
        first = parts[split].paths[0]
        if not os.path.exists(first):
            raise DataError(
                f"{place / file} names {first}, which is not there. {what_to_get(name, base)}"
            )
    counts = np.bincount(parts["train"].labels, minlength=known.num_classes)
    if not counts.all():
        raise DataError(
            f"{place / known.files['train'][0]} has no image of {int((counts == 0).sum())} of the "
            f"{known.num_classes} labels: {shown(np.flatnonzero(counts == 0).tolist())}. {_ANOTHER}"
        )
    classes = _titles(parts["train"], base, known.num_classes)
    return _read(name, parts, classes, size or LIST_SIZE, skip_unreadable)


_ANOTHER = "Download the list again."


def _listed_files(path: Path, lines: int, num_classes: int, base: Path) -> Part:
    """The files of a list, which must have so many lines, with labels below K."""
    try:
        content = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    paths, labels = [], []
    for number, line in enumerate(content, 1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(" ")
        if not name or not label.isdecimal():
            raise DataError(f"{path}, line {number}: expected `path label`, got {line!r}.")
        if int(label) >= num_classes:
            raise DataError(
                f"{path}, line {number}: expected a label in 0 … {num_classes - 1}, got {label}. "
                "Is it the list of another dataset?"
            )
        paths.append(os.path.join(base, name))
        labels.append(int(label))
    if len(paths) != lines:
        raise DataError(f"{path}: expected {lines:,} lines, got {len(paths):,}. {_ANOTHER}")
    return Part(paths, np.asarray(labels))


def _titles(train: Part, base: Path, num_classes: int) -> tuple[str, ...]:
    """Names of the classes: the folders of their images below train/, or the label itself."""
    first = np.unique(train.labels, return_index=True)[1]
    paths = [Path(train.paths[i]).relative_to(base).parts for i in first]
    titles = tuple("/".join(parts[1:-1]) for parts in paths)
    return titles if len({*titles}) == num_classes else tuple(map(str, range(num_classes)))


# --- reading images -----------------------------------------------------------------------------


def _read(
    name: str, parts: Mapping[str, Part], classes: tuple[str, ...], size: int, skip: bool
) -> Splits:
    """All images as uint8 squares; of one channel if all of them are grey."""
    paths = [path for part in parts.values() for path in part.paths]
    _check_memory(name, len(paths), size)
    images, failed, grey = _decoded(name, paths, size)
    if failed:
        reasons = "".join(f"\n  {paths[i]}: {failed[i]}" for i in sorted(failed)[:12])
        more = f"\n  … and {len(failed) - 12} more" if len(failed) > 12 else ""
        found = f"{name}: {len(failed):,} of {len(paths):,} images cannot be read"
        if not skip:
            raise DataError(
                f"{found}:{reasons}{more}\nRepair or remove them, or leave them out with "
                "skip_unreadable (--data.skip-unreadable)."
            )
        say(f"{found} and are left out:{reasons}{more}")
    good = np.asarray([i not in failed for i in range(len(paths))])
    kept = np.flatnonzero(good)
    for to, of in enumerate(kept if failed else ()):
        images[to] = images[of]  # in place: a second copy may not fit
    if grey:
        images = images[:, :1].contiguous()
    made, begin, start = {}, 0, 0
    for split, part in parts.items():
        labels = part.labels[good[begin : begin + len(part.paths)]]
        lost = np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0)
        if skip and len(lost):
            titles = shown([classes[c] for c in lost])
            raise DataError(
                f"{name}: no image of {titles} in {split} can be read. Repair them, or remove the "
                "class."
            )
        rows = images[start : start + len(labels)]
        made[split] = ImageData(rows, torch.from_numpy(labels.copy()), classes)
        begin, start = begin + len(part.paths), start + len(labels)
    return Splits(made["train"], made["test"], name, made.get("validation"))


def _check_memory(name: str, images: int, size: int) -> None:
    """Raise if the images of all processes on this machine need more memory than it has."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    need = images * 3 * size**2 * processes
    have = _memory()
    if need > have:
        each = f" in each of {processes} processes" if processes > 1 else ""
        raise InputError(
            f"{name}: {images:,} images of {size} × {size} pixels{each} take {need / 1e9:.3g} GB, "
            f"and this machine has {have / 1e9:.3g} GB of memory. "
            f"Set size (--data.size) to {int(size * math.sqrt(have / need))} or less."
        )


def _memory() -> float:
    """Bytes of memory of this machine, infinite where it does not say."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE")) * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return math.inf


def _decoded(name: str, paths: Sequence[str], size: int) -> tuple[Tensor, dict[int, str], bool]:
    """Images [N, 3, size, size] read by threads, why some could not be, whether all are grey."""
    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    rows: Array = images.numpy()
    failed: dict[int, str] = {}
    coloured: set[int] = set()
    step = 32

    def read(start: int) -> int:
        for i in range(start, min(start + step, len(paths))):
            try:
                rows[i], grey = _square(paths[i], size, size)
            except Exception as error:  # damaged files make Pillow raise nearly anything
                failed[i] = reason(error).replace(f" {paths[i]!r}", "")
                continue
            if not grey:
                coloured.add(i)
        return min(start + step, len(paths))

    progress = _progress(name, len(paths))
    pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1))  # Pillow decodes outside the GIL
    try:
        for done in pool.map(read, range(0, len(paths), step)):
            progress(done)
    finally:
        pool.shutdown(cancel_futures=True)
    return images, failed, not coloured


def _progress(name: str, total: int) -> Callable[[int], None]:
    """Say how far it is and how long it will take: after 5 s, then ever more rarely."""
    began = time.perf_counter()
    then = began + 5

    def tell(done: int) -> None:
        nonlocal then
        now = time.perf_counter()
        if now < then or done == total:
            return
        left = (now - began) * (total - done) / done
        eta = f"{left / 60:.0f} min" if left > 90 else f"{left:.0f} s"
        say(f"{name}: {done:,} of {total:,} images read, about {eta} left")
        then = now + min(60, now - began)

    return tell


def read_square(path: str, shape: tuple[int, int, int]) -> Tensor:
    """One image file as uint8 [C, H, W], read as those of a folder are; C is 1 or 3.

    Raises:
        Exception: what Pillow or the system raise where it cannot be read.
    """
    C, H, W = shape
    image = torch.from_numpy(_square(path, W, H)[0].copy())
    if C == 3:
        return image
    luma = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    return (image * luma).sum(0, keepdim=True).round().to(torch.uint8)


def reason(error: Exception) -> str:
    """Why a file cannot be read, in the words of what raised."""
    return str(getattr(error, "strerror", None) or error) or type(error).__name__


def images_below(folder: Path) -> list[str]:
    """Image files anywhere below ``folder``, in order; hidden ones are left out.

    Raises:
        DataError: a folder that cannot be read.
    """
    return _images(folder)[0]


def _square(path: str, width: int, height: int) -> tuple[Array, bool]:
    """An image as [3, height, width], upright, resized and centre cropped; if it is grey."""
    from PIL import Image, ImageOps

    with Image.open(path) as file:
        # A large JPEG is decoded at a fraction of its size.
        file.draft(None, (2 * width, 2 * height))
        ImageOps.exif_transpose(file, in_place=True)
        image: Any = file
        if image.mode == "P":  # a palette, perhaps with transparency
            image = image.convert("RGBA")
        if image.mode == "F":
            raise ValueError("its pixels are floating-point numbers: save it with 8 or 16 bits")
        if image.mode.startswith("I"):  # 16 bits, whose high byte is kept
            high = np.asarray(image).clip(0, 65535).astype(np.uint16) >> 8
            image = Image.fromarray(high.astype(np.uint8))
        grey = image.mode in ("1", "L", "LA")
        square = ImageOps.fit(image.convert("RGB"), (width, height))
    return np.asarray(square).transpose(2, 0, 1), grey
