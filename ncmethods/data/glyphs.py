"""Glyphs: letters and digits drawn from free fonts; many classes, a hierarchy, a natural tail.

A class is a shape that at least five font families draw: ``LATIN SMALL LETTER E WITH ACUTE``. An
image is one family's drawing of it. Families, never images, are split into training and test. How
often a class occurs is how many families have it, so the tail is the data's own.

``load("glyphs-mini")`` is a frozen slice in the package. ``ncmethods fetch glyphs`` draws the whole
set from the fonts of the Debian packages in ``PACKAGES``.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ncmethods._core import DataError, InputError, atomic_path, check_choice, write_text
from ncmethods.data.datasets import ImageData, Splits, homes

__all__ = [
    "PACKAGES",
    "Drawings",
    "Face",
    "Families",
    "GlyphSet",
    "assemble",
    "draw",
    "faces",
    "families",
    "groups",
    "hierarchy",
    "is_letter",
    "is_test",
    "render",
]

Images = NDArray[np.uint8]
Indices = NDArray[np.int64]
Units = NDArray[np.float32]

SIDE = 28
"""Pixels of an image's side."""
INK = 24
"""Pixels of a glyph's longer side; the rest is margin."""
SAME = 0.98
"""Two drawings are the same if the cosine of their pixels exceeds this."""
LEAST = 5
"""Families that a class needs; at least 3 of them train, at least 1 tests."""
FEWEST = 50
"""Families that a set needs: with fewer there is no tail."""
SEED = 5
"""Of the split by family; one of those (0 to 11 were tried) that cost few classes a side."""
GLYPHS_MINI_SHA256 = "e66abf8f4d9f3d8f6be4b56618b0d8af162914b771173ada12f0243ef86a7c85"

_SHIPPED = Path(__file__).parent / "_files" / "glyphs-mini.npz"
_FONTS = Path("/usr/share/fonts")
_AGAIN = "Run `ncmethods fetch glyphs`."

_PACKAGES = """
    culmus fonts-3270 fonts-adf-accanthis fonts-adf-baskervald fonts-adf-berenis fonts-adf-gillius
    fonts-adf-ikarius fonts-adf-irianis fonts-adf-libris fonts-adf-mekanus fonts-adf-romande
    fonts-adf-switzera fonts-adf-tribun fonts-adf-universalis fonts-adf-verana fonts-agave
    fonts-allerta fonts-anonymous-pro fonts-arapey fonts-arundina fonts-averia-gwf
    fonts-averia-sans-gwf fonts-averia-serif-gwf fonts-b612 fonts-beng-extra fonts-beteckna
    fonts-bpg-georgian fonts-breip fonts-cabin fonts-cantarell fonts-cardo fonts-century-catalogue
    fonts-clear-sans fonts-cmu fonts-comfortaa fonts-comic-neue fonts-compagnon
    fonts-courier-prime fonts-croscore fonts-crosextra-caladea fonts-crosextra-carlito
    fonts-dancingscript fonts-dejavu-core fonts-deva-extra fonts-dkg-handwriting fonts-dosis
    fonts-dustin fonts-ebgaramond fonts-ecolier-court fonts-elstob fonts-essays1743
    fonts-eurofurence fonts-evertype-conakry fonts-fantasque-sans fonts-fanwood fonts-farsiweb
    fonts-firacode fonts-freefont-ttf fonts-gargi fonts-georgewilliams fonts-gfs-artemisia
    fonts-gfs-baskerville fonts-gfs-bodoni-classic fonts-gfs-complutum fonts-gfs-didot
    fonts-gfs-didot-classic fonts-gfs-gazis fonts-gfs-neohellenic fonts-gfs-olga fonts-gfs-porson
    fonts-gfs-solomos fonts-gfs-theokritos fonts-go fonts-goudybookletter fonts-hermit
    fonts-hosny-amiri fonts-hosny-thabit fonts-inconsolata fonts-inter fonts-isabella
    fonts-jetbrains-mono fonts-johnsmith-induni fonts-joscelyn fonts-junction fonts-junicode
    fonts-jura fonts-karla fonts-karmilla fonts-kaushanscript fonts-khmeros fonts-kristi fonts-lao
    fonts-lato fonts-league-mono fonts-league-spartan fonts-leckerli-one fonts-lemonada
    fonts-levien-museum fonts-levien-typoscript fonts-lg-aboriginal fonts-liberation
    fonts-lindenhill fonts-linuxlibertine fonts-lobstertwo fonts-lohit-beng-bengali
    fonts-lohit-deva fonts-lohit-gujr fonts-lohit-guru fonts-lohit-mlym fonts-lohit-taml
    fonts-manrope fonts-millimetre fonts-mona fonts-monofur fonts-monoid fonts-mononoki
    fonts-mph-2b-damase fonts-nakula fonts-national-park fonts-noto-core fonts-noto-mono
    fonts-oflb-asana-math fonts-okolaks fonts-oldstandard fonts-open-sans fonts-opendin
    fonts-opendyslexic fonts-opensymbol fonts-oxygen fonts-paktype fonts-paratype fonts-play
    fonts-prociono fonts-quattrocento fonts-quicksand fonts-radisnoir fonts-roadgeek
    fonts-roboto-slab fonts-roboto-unhinted fonts-routed-gothic fonts-rufscript fonts-sahadeva
    fonts-sarai fonts-sil-abyssinica fonts-sil-andika fonts-sil-charis fonts-sil-doulos
    fonts-sil-ezra fonts-sil-galatia fonts-sil-gentiumplus fonts-sil-harmattan fonts-sil-lateef
    fonts-sil-padauk fonts-sil-scheherazade fonts-sjfonts fonts-smc-chilanka fonts-smc-gayathri
    fonts-smc-manjari fonts-smc-meera fonts-smc-rachana fonts-sora fonts-stix fonts-symbola
    fonts-tiresias fonts-tlwg-garuda-ttf fonts-tlwg-kinnari-ttf fonts-tlwg-laksaman-ttf
    fonts-tlwg-loma-ttf fonts-tlwg-mono-ttf fonts-tlwg-norasi-ttf fonts-tlwg-purisa-ttf
    fonts-tlwg-sawasdee-ttf fonts-tlwg-typist-ttf fonts-tlwg-umpush-ttf fonts-tlwg-waree-ttf
    fonts-tuffy fonts-unikurdweb fonts-uralic fonts-urw-base35 fonts-vollkorn
    fonts-yanone-kaffeesatz fonts-yrsa-rasa
"""
PACKAGES = tuple(_PACKAGES.split())
"""Debian packages whose fonts make the set."""


_NO_LETTERS = frozenset(
    {
        # Signs, keycaps and construction lines in the place of letters.
        *("D050000L", "Standard Symbols PS", "Linux Biolinum Keyboard O"),
        "BPG DedaEna Block GPL&GNU",
        # Capitals in the place of small letters, or the other way round.
        *("Beteckna", "Go Smallcaps", "Humor Sans", "Irianis ADF Style Std", "Marked Fool"),
        *("Mekanus ADF Titling Std", "Romande ADF Style Std", "Solothurn", "Tomson Talks"),
        *("Ubuntu-Title", "Winks", "[F500]", "unifur"),
        # Other letters than their code points say.
        *("Delphine", "Mitra", "Summersby"),
    }
)
"""Families that are passed over: what they draw is not what Unicode means."""


# --- names: script, letter, diacritic -----------------------------------------------------------

_SCRIPT = re.compile(r"(?:OLD|LINEAR|TAI|INSCRIPTIONAL|EXTENDED) \S+|\S+")
_UNNAMED = {"TURNED": "LATIN", "ROMAN": "LATIN"}  # TURNED CAPITAL F, ROMAN NUMERAL REVERSED …


def hierarchy(classes: Iterable[str]) -> list[tuple[str, str, str]]:
    """Script, base letter and diacritic of each class.

    The base letter is what the canonical decomposition (NFD) leaves without its combining marks
    and, since Unicode does not decompose strokes and hooks, what its name says before ``WITH``.

    Args:
        classes: Unicode names of characters, as in ``ImageData.classes``.

    Returns:
        K tuples, such as ``("LATIN", "LATIN SMALL LETTER E", "ACUTE")``; a letter without a
        diacritic has ``""`` there.

    Raises:
        InputError: a name that no character has.
    """
    return [_placed(name) for name in classes]


def groups(classes: Iterable[str]) -> Tensor:
    """Two levels of groups for ``frames.hierarchical``: scripts, and base letters inside them.

    Args:
        classes: Unicode names of characters.

    Returns:
        int64 [2, K]: script and base letter of each class, numbered as they first occur.

    Raises:
        InputError: a name that no character has.
    """
    places = hierarchy(classes)
    scripts = {place[0]: None for place in places}
    bases = {place[:2]: None for place in places}
    ids = [{key: i for i, key in enumerate(level)} for level in (scripts, bases)]
    rows = [[ids[0][place[0]] for place in places], [ids[1][place[:2]] for place in places]]
    return torch.tensor(rows, dtype=torch.int64)


def _placed(name: str) -> tuple[str, str, str]:
    try:
        first, *rest = list(unicodedata.normalize("NFD", unicodedata.lookup(name)))
    except (KeyError, TypeError) as error:
        raise InputError(
            f"Classes of glyphs are Unicode names such as 'LATIN SMALL LETTER E', got {name!r}."
        ) from error
    base = unicodedata.name(first)
    script = _SCRIPT.findall(base)[0]
    script = _UNNAMED.get(script, script)
    marks = [unicodedata.name(mark).removeprefix("COMBINING ") for mark in rest]
    marks = [mark.removeprefix(f"{script} ").removesuffix(" ACCENT") for mark in marks]
    stem, _, stroke = base.partition(" WITH ")
    if stroke and _is_name(stem):
        base, marks = stem, [stroke, *marks]
    return script, base, " AND ".join(marks)


def _is_name(name: str) -> bool:
    try:
        return bool(unicodedata.lookup(name))
    except KeyError:
        return False


@functools.cache
def is_letter(code: int) -> bool:
    """Whether code point ``code`` can be a class: a letter or a decimal digit with a name.

    Left out are compatibility variants (ligatures, superscripts, mathematical alphabets), code
    points that normalise to another one, and the ideographs and syllable blocks of East Asia.
    """
    char = chr(code)
    return (
        unicodedata.category(char) in ("Lu", "Ll", "Lt", "Lo", "Nd")
        and not unicodedata.decomposition(char).startswith("<")
        and unicodedata.is_normalized("NFC", char)
        and not unicodedata.name(char, "CJK").startswith(
            ("CJK", "HANGUL", "TANGUT", "NUSHU", "YI ")
        )
    )


# --- fonts and drawings -------------------------------------------------------------------------


@dataclass(frozen=True)
class Face:
    """The upright regular face of a font family."""

    family: str
    style: str
    path: Path
    package: str | None = None
    version: str | None = None


_SLANTED = re.compile(r"ital|obliq|slant|inclin", re.IGNORECASE)
_REGULAR = ("regular", "book", "roman", "normal", "medium", "")


def faces(folder: str | os.PathLike[str] | None = None) -> list[Face]:
    """One face of each font family: upright, as regular as there is.

    Args:
        folder: where ``.ttf``, ``.otf`` and ``.ttc`` files are searched, at any depth. If None,
            ``/usr/share/fonts``; where dpkg knows the packages, only the fonts of ``PACKAGES``.

    Returns:
        Faces sorted by family. Slanted faces, files that cannot be opened, and a few families that
        draw something else than letters are passed over.
    """
    paths = {
        Path(where, name).resolve()
        for where, _, names in os.walk(_FONTS if folder is None else folder)
        for name in names
        if name.lower().endswith((".ttf", ".otf", ".ttc"))
    }
    owners = _owners(sorted(paths)) if folder is None else {}
    best: dict[str, tuple[tuple[int, str], Face]] = {}
    for path in sorted(owners or paths):
        try:
            family, style = ((name or "").strip() for name in _opened(path, 12).getname())
        except OSError:
            continue
        if not family or family in _NO_LETTERS or _SLANTED.search(f"{family} {style}"):
            continue
        low = style.lower()
        rank = _REGULAR.index(low) if low in _REGULAR else len(_REGULAR) + len(low)
        key = (rank, path.name)
        if family not in best or key < best[family][0]:
            best[family] = key, Face(family, style, path, *owners.get(path, ()))
    return [best[family][1] for family in sorted(best)]


def _owners(paths: Sequence[Path]) -> dict[Path, tuple[str, str]]:
    """Package and version of each font file that belongs to ``PACKAGES``; {} without dpkg."""
    if not paths or shutil.which("dpkg-query") is None:
        return {}

    def ask(*words: str) -> list[list[str]]:
        done = subprocess.run(["dpkg-query", *words], capture_output=True, text=True, check=False)
        return [line.split("\t") for line in done.stdout.splitlines()]

    versions = {p: v for p, v in ask("-W", "-f=${Package}\t${Version}\n", *PACKAGES) if v}
    owners = {}
    for line, *_ in ask("-S", *map(str, paths)):
        package, _, path = line.partition(": ")
        if package in versions:
            owners[Path(path)] = package, versions[package]
    return owners


def _opened(path: Path, size: int) -> Any:
    """The font in a file, without the shaping that only some builds of Pillow have."""
    from PIL import ImageFont

    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def draw(face: Face) -> tuple[Indices, Images]:
    """Every letter and digit of a face: code points [n], images [n, 28, 28] (ink 255 on 0).

    A glyph is scaled until its longer side is 24 pixels, and centred. Empty glyphs and those that
    look like the font's missing-glyph box are left out.
    """
    from matplotlib.ft2font import FT2Font

    font = _opened(face.path, 96)
    missing = _image(font, "\U0010fffe")  # a noncharacter: drawn as .notdef
    codes, images = [], []
    for code in sorted(FT2Font(str(face.path)).get_charmap()):
        if is_letter(code):
            image = _image(font, chr(code))
            if image is not None and (missing is None or not np.array_equal(image, missing)):
                codes.append(code)
                images.append(image)
    return np.array(codes, np.int64), np.array(images, np.uint8).reshape(-1, SIDE, SIDE)


def _image(font: Any, char: str) -> Images | None:
    """``char`` as [28, 28], or None if there is nothing to see."""
    from PIL import Image

    try:
        mask = font.getmask(char, mode="L")
    except (OSError, ValueError):  # an outline that FreeType refuses
        return None
    if not min(mask.size):
        return None
    picture = Image.frombytes("L", mask.size, bytes(mask))
    box = picture.getbbox()
    if box is None:
        return None
    scale = INK / max(box[2] - box[0], box[3] - box[1])
    w, h = (max(1, round(scale * side)) for side in (box[2] - box[0], box[3] - box[1]))
    small = picture.crop(box).resize((w, h), Image.Resampling.HAMMING)
    canvas = Image.new("L", (SIDE, SIDE))
    canvas.paste(small, ((SIDE - w) // 2, (SIDE - h) // 2))
    return np.asarray(canvas)


# --- from drawings to classes -------------------------------------------------------------------


class Drawings(NamedTuple):
    """Glyph images, what each shows, and which family drew it."""

    images: Images  # [N, 28, 28]
    labels: Indices  # [N] code points, then classes
    families: Indices  # [N]

    def keep(self, chosen: NDArray[Any]) -> Drawings:
        """The drawings that a mask or indices choose."""
        return Drawings(self.images[chosen], self.labels[chosen], self.families[chosen])


@dataclass(frozen=True, eq=False)
class GlyphSet:
    """Drawings with classes, most frequent first.

    Args:
        drawings: images, classes and families, in this order of precedence: class, family.
        classes: K Unicode names, each of the lowest code point that looks so.
        members: K strings, all characters that look so.
        families: names.
        held_out: per family, whether it is for testing.
    """

    drawings: Drawings
    classes: tuple[str, ...]
    members: tuple[str, ...]
    families: tuple[str, ...]
    held_out: NDArray[np.bool_]


def is_test(family: str, seed: int = SEED) -> bool:
    """Whether a family is held out; about a fifth are, by a hash of their name's first word.

    So "DejaVu Sans" and "DejaVu Serif" fall on one side, and a new family moves no other.
    """
    digest = hashlib.sha256(f"{seed} {family.split()[0]}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < 0.2 * 2**32


def assemble(drawings: Drawings, families: Sequence[str], *, seed: int = SEED) -> GlyphSet:
    """Classes from drawings of code points.

    1. Code points that look the same in most of the families that have both are one class.
    2. A family loses its drawings of a script if a third of them repeat those of one family that
       draws more of it.
    3. No family keeps one drawing under two classes: the class whose mean is nearer keeps it.
    4. Classes of fewer than 5 families, or without 3 that train and 1 that tests, are dropped.

    Args:
        drawings: images, code points, families.
        families: name of each family.
        seed: of the split by family.

    Returns:
        The set, with the families that keep a drawing.
    """
    codes, chars, times = np.unique(drawings.labels, return_inverse=True, return_counts=True)
    drawings = drawings._replace(labels=chars).keep(times[chars] > 1)  # one family is no class
    titles = [unicodedata.name(chr(code)) for code in codes]
    # By family, then code point; a class takes its lowest code point that the family has.
    rows = drawings.keep(np.lexsort((drawings.labels, drawings.families)))
    merged = _lookalikes(rows, len(codes))  # [characters] → the lowest character alike
    rows = rows._replace(labels=merged[rows.labels])
    rows = rows.keep(np.unique(rows.families * len(codes) + rows.labels, return_index=True)[1])
    scripts = np.unique([place[0] for place in hierarchy(titles)], return_inverse=True)[1]
    rows = rows.keep(~_repeated(rows, scripts))
    rows = rows.keep(~_ambiguous(rows, len(codes)))
    held_out = np.array([is_test(family, seed) for family in families])
    tests = held_out[rows.families]
    n_test, n_train = (np.bincount(rows.labels[m], minlength=len(codes)) for m in (tests, ~tests))
    able = (n_train + n_test >= LEAST) & (n_train >= 3) & (n_test >= 1)
    order = [c for c in np.lexsort((codes, -n_train)) if able[c]]
    number = np.full(len(codes), -1)
    number[order] = np.arange(len(order))
    rows = rows._replace(labels=number[rows.labels]).keep(able[rows.labels])
    alive, owner = np.unique(rows.families, return_inverse=True)
    rows = rows._replace(families=owner).keep(np.lexsort((owner, rows.labels)))
    return GlyphSet(
        rows,
        tuple(titles[c] for c in order),
        tuple("".join(map(chr, codes[merged == c])) for c in order),
        tuple(families[f] for f in alive),
        held_out[alive],
    )


def _units(images: Images) -> Units:
    """Images as unit vectors [n, 784]."""
    flat: Units = images.reshape(len(images), -1).astype(np.float32)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    return flat


def _alike(images: Images, tile: int = 1024) -> tuple[Indices, Indices]:
    """Pairs a < b of images that are the same."""
    units = _units(images)
    found = [
        np.argwhere(np.triu(units[i : i + tile] @ units[i:].T > SAME, 1)) + i
        for i in range(0, len(units), tile)
    ]
    pairs = np.concatenate([np.empty((0, 2), np.int64), *found])
    return pairs[:, 0], pairs[:, 1]


def _by(keys: Indices) -> list[Indices]:
    """Indices of equal keys, together, in the order of the keys."""
    order = np.argsort(keys, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(keys[order])) + 1) if len(keys) else []


def _lookalikes(rows: Drawings, n: int) -> Indices:
    """For each of n characters, the lowest one that looks the same in most families with both."""
    found = [np.empty(0, np.int64)]
    for mine in _by(rows.families):
        a, b = _alike(rows.images[mine])
        found.append(rows.labels[mine[a]] * n + rows.labels[mine[b]])
    pairs, times = np.unique(np.concatenate(found), return_counts=True)
    a, b = pairs // n, pairs % n
    has = np.zeros((n, int(rows.families.max(initial=-1)) + 1), bool)
    has[rows.labels, rows.families] = True
    both = np.array([np.count_nonzero(has[i] & has[j]) for i, j in zip(a, b, strict=True)], int)
    linked = (times >= 2) & (2 * times > both)
    lowest = np.arange(n)
    for i, j in zip(a[linked], b[linked], strict=True):  # sorted, so j meets its lowest i first
        if lowest[i] == i and lowest[j] == j:
            lowest[j] = i
    return lowest


def _repeated(rows: Drawings, scripts: Indices) -> NDArray[np.bool_]:
    """Drawings of a family that repeats another one in their script and draws less of it."""
    out = np.zeros(len(rows.labels), bool)
    for mine in _by(scripts[rows.labels]):
        owners, owner = np.unique(rows.families[mine], return_inverse=True)
        same = np.zeros((len(owners), len(owners)), int)
        for own in _by(rows.labels[mine]):
            units = _units(rows.images[mine[own]])
            same[np.ix_(owner[own], owner[own])] += units @ units.T > SAME
        size = np.bincount(owner)
        kept = np.zeros(len(owners), bool)
        for f in np.lexsort((owners, -size)):
            kept[f] = not (3 * same[f, kept] >= size[f]).any()
        out[mine] = ~kept[owner]
    return out


def _ambiguous(rows: Drawings, n: int) -> NDArray[np.bool_]:
    """Drawings that the same family has for another class, too, whose mean is nearer."""
    out = np.zeros(len(rows.labels), bool)
    fit = np.zeros(len(rows.labels), np.float32)
    for mine in _by(rows.labels):
        units = _units(rows.images[mine])
        mean = units.mean(0)
        fit[mine] = units @ (mean / np.linalg.norm(mean))
    for mine in _by(rows.families):
        a, b = _alike(rows.images[mine])
        out[mine[np.where(fit[mine[a]] >= fit[mine[b]], b, a)]] = True
    return out


# --- files --------------------------------------------------------------------------------------


class Families(NamedTuple):
    """Name of the font family that drew each image, in the order of the splits."""

    train: tuple[str, ...]
    test: tuple[str, ...]


def families(name: str = "glyphs-mini", root: str | os.PathLike[str] | None = None) -> Families:
    """The font family of each image of ``load(name, root)``.

    Args:
        name: ``glyphs-mini`` or ``glyphs``.
        root: as for ``load``.

    Raises:
        InputError: another name.
        DataError: the set is missing or damaged.
    """
    file = _contents(name, None if root is None else Path(root).expanduser())
    train, test = (file["families"][file[f"{part}_families"]] for part in ("train", "test"))
    return Families(tuple(train.tolist()), tuple(test.tolist()))


def load(name: str, root: Path | None) -> Splits:
    """What ``data.load`` gives for ``glyphs-mini`` and ``glyphs``."""
    file = _contents(name, root)
    classes = tuple(file["classes"].tolist())
    train, test = (
        ImageData(
            torch.from_numpy(file[f"{part}_images"]).unsqueeze(1),
            torch.from_numpy(file[f"{part}_labels"].astype(np.int64)),
            classes,
        )
        for part in ("train", "test")
    )
    return Splits(train, test, name)


def places(root: Path | None) -> list[Path]:
    """Where ``glyphs.npz`` may be, in the order of search."""
    return [
        p for home in homes(root) for p in (home / "glyphs.npz", home / "glyphs" / "glyphs.npz")
    ]


def located(root: Path | None) -> Path | None:
    """The first ``glyphs.npz`` that has its record beside it, or None."""
    return next((p for p in places(root) if p.is_file() and _record(p).is_file()), None)


def _record(path: Path) -> Path:
    return path.with_suffix(".json")


def _contents(name: str, root: Path | None) -> dict[str, NDArray[Any]]:
    check_choice(name, ("glyphs-mini", "glyphs"), "set of glyphs")
    if name == "glyphs-mini":
        return _read(_SHIPPED, GLYPHS_MINI_SHA256, "Install ncmethods again.")
    path = located(root)
    if path is None:
        raise DataError(
            f"glyphs is not on this machine (looked in {', '.join(map(str, homes(root)))}). "
            "Run `ncmethods fetch glyphs`: it draws them from fonts that Debian packages install. "
            "Without it, `glyphs-mini` runs now."
        )
    try:
        expected = json.loads(_record(path).read_text())["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{_record(path)} is damaged: {error}. {_AGAIN}") from error
    return _read(path, expected, _AGAIN)


def _read(path: Path, expected: str, advice: str) -> dict[str, NDArray[Any]]:
    """The arrays of a set, after its checksum was verified."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    got = hashlib.sha256(content).hexdigest()
    if got != expected:
        raise DataError(f"{path} is damaged: expected sha256 {expected}, got {got}. {advice}")
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        return dict(file)


def write(glyphs: GlyphSet, path: Path) -> str:
    """Write a set as one .npz, whole or not at all, and return its SHA-256."""
    rows = glyphs.drawings
    arrays: dict[str, Any] = {
        "classes": np.array(glyphs.classes),
        "members": np.array(glyphs.members),
        "families": np.array(glyphs.families),
    }
    tests = glyphs.held_out[rows.families]
    for part, mask in (("train", ~tests), ("test", tests)):
        images, labels, owners = rows.keep(mask)
        arrays[f"{part}_images"] = images
        arrays[f"{part}_labels"] = labels.astype(np.uint16)
        arrays[f"{part}_families"] = owners.astype(np.uint16)
    with atomic_path(path) as temporary:
        with open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays)
        digest = hashlib.sha256(temporary.read_bytes()).hexdigest()
    return digest


def fetch(root: Path | None) -> Path:
    """Draw the set from the fonts of this machine unless a good one is there; return its folder."""
    try:
        _contents("glyphs", root)
    except DataError:
        return render(homes(root)[0] / "glyphs")
    return next(path.parent for path in places(root) if path == located(root))


def render(target: Path, folder: str | os.PathLike[str] | None = None, *, seed: int = SEED) -> Path:
    """Draw the whole set into ``target``: ``glyphs.npz``, and ``glyphs.json`` that records it.

    The record has the SHA-256 of the set and of each font file, the packages and their versions.
    Pillow, its FreeType and the fonts decide each pixel: the same ones give the same bytes.

    Args:
        target: directory.
        folder: of the fonts; see ``faces``.
        seed: of the split by family.

    Returns:
        ``target``.

    Raises:
        DataError: fewer than 50 font families; the message has the command that installs them.
        InputError: ``target`` cannot be written.
    """
    import PIL
    from PIL import features
    from tqdm import tqdm

    found = faces(folder)
    lacking = sorted({*PACKAGES} - {face.package for face in found})
    install = f"apt-get install -y --no-install-recommends {' '.join(lacking)}"
    if len(found) < FEWEST:
        raise DataError(
            f"glyphs is drawn from at least {FEWEST} font families, found {len(found)} in "
            f"{_FONTS if folder is None else folder}. On Debian, run `{install}`. "
            "Without them, `glyphs-mini` runs now."
        )
    if folder is None and lacking:
        warnings.warn(
            f"glyphs is drawn without {len(lacking)} of its {len(PACKAGES)} packages; for all of "
            f"it, run `{install}`, remove {target}, and fetch it again.",
            stacklevel=2,
        )
    drawn = [draw(face) for face in tqdm(found, desc="glyphs", unit="font", disable=None)]
    codes, images = (np.concatenate(part) for part in zip(*drawn, strict=True))
    owners = np.repeat(np.arange(len(found)), [len(of_face) for of_face, _ in drawn])
    glyphs = assemble(Drawings(images, codes, owners), [face.family for face in found], seed=seed)
    rows, part = glyphs.drawings, dict(zip(glyphs.families, glyphs.held_out, strict=True))
    path = target / "glyphs.npz"
    record = {
        "sha256": write(glyphs, path),
        "classes": len(glyphs.classes),
        "train": int((~glyphs.held_out)[rows.families].sum()),
        "test": int(glyphs.held_out[rows.families].sum()),
        "seed": seed,
        "pillow": PIL.__version__,
        "freetype": features.version("freetype2"),
        "unicode": unicodedata.unidata_version,
        "families": [
            asdict(face)
            | {
                "path": str(face.path),
                "sha256": hashlib.sha256(face.path.read_bytes()).hexdigest(),
                "part": "test" if part[face.family] else "train",
            }
            for face in found
            if face.family in part
        ],
    }
    write_text(_record(path), json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return target
