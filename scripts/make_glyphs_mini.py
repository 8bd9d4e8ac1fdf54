"""Make ncmethods/data/_files/glyphs-mini.npz from the full set of glyphs.

The classes named below, as drawn by 40 training and 12 test families whose licences let anyone
share them: families of ``LICENCES`` that draw most of the Latin alphabet, in the order of a hash of
their names, one for each first word of a name. Which ones test is what the full set says.

    ncmethods fetch glyphs
    python scripts/make_glyphs_mini.py [TARGET]

prints the SHA-256 of the file, which must equal GLYPHS_MINI_SHA256 in ncmethods/data/glyphs.py, and
the table of families for NOTICE and docs/howto/glyphs.md. The same fonts, Pillow and FreeType give
the same images; the same zlib gives the same bytes.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

from ncmethods.data import glyphs

TARGET = Path(glyphs.__file__).parent / "_files" / "glyphs-mini.npz"
TRAIN, TEST = 40, 12

CHARACTERS = (
    "0123456789"
    "ABDEFGHKNQRTWÀÁÅÉÖ"
    "abcdefghkmnqrstuzàáâäåāăąèéêëēęòóôöøőñńňśšşçćčùúüůźžżğłđßþ"
    "ΔΘΞΣΩαβδηλξπωάήώἀἄᾶὤἣᾤͲϻ"
    "БДЖЛЦЯбджфяийѝѓґғҗқѠѦѨѮѹ"
    "ɖʃƁȼɋꜫⱯℲ"
)

# Packages and their fonts' licence, read in /usr/share/doc/PACKAGE/copyright. OFL is SIL's Open
# Font License 1.0 or 1.1, BSD has 3 clauses.
LICENCES = {
    name: licence
    for licence, names in {
        "OFL": """
            fonts-allerta fonts-anonymous-pro fonts-arapey fonts-averia-gwf fonts-averia-sans-gwf
            fonts-averia-serif-gwf fonts-cabin fonts-cantarell fonts-cardo fonts-cmu
            fonts-comfortaa fonts-comic-neue fonts-compagnon fonts-courier-prime fonts-croscore
            fonts-crosextra-carlito fonts-ebgaramond fonts-elstob fonts-fantasque-sans
            fonts-firacode fonts-gfs-artemisia fonts-gfs-baskerville fonts-gfs-complutum
            fonts-gfs-didot fonts-gfs-neohellenic fonts-inconsolata fonts-inter fonts-junction
            fonts-junicode fonts-jura fonts-karla fonts-lato fonts-league-mono fonts-lemonada
            fonts-linuxlibertine fonts-manrope fonts-millimetre fonts-mononoki fonts-national-park
            fonts-noto-core fonts-oldstandard fonts-opendin fonts-play fonts-quattrocento
            fonts-quicksand fonts-sil-andika fonts-sil-charis fonts-sil-doulos
            fonts-sil-gentiumplus fonts-sora fonts-stix fonts-vollkorn fonts-yanone-kaffeesatz
            fonts-yrsa-rasa fonts-eurofurence fonts-monofur fonts-okolaks
        """,
        "Apache-2.0": "fonts-clear-sans fonts-open-sans fonts-roboto-slab fonts-roboto-unhinted",
        "MIT": "fonts-agave fonts-fanwood fonts-lindenhill fonts-roadgeek",
        "BSD": "fonts-go",
        "Bitstream Vera": "fonts-dejavu-core",
    }.items()
    for name in names.split()
}


def main(target: Path) -> str:
    """Write the slice to ``target`` and return its SHA-256."""
    path = glyphs.located(None)
    if path is None:
        raise SystemExit("Run `ncmethods fetch glyphs` first.")
    with np.load(path) as file:
        full = dict(file)
    parts = ("train", "test")
    images, labels, owners = (
        np.concatenate([full[f"{part}_{what}"] for part in parts])
        for what in ("images", "labels", "families")
    )
    held_out = np.zeros(len(full["families"]), bool)
    held_out[full["test_families"]] = True
    known = {
        face["family"]: face
        for face in json.loads(path.with_suffix(".json").read_text())["families"]
    }

    latin = [
        i for i, members in enumerate(full["members"]) if members[0] in "abdefghmnqrstABDEGHMN"
    ]
    drawn = np.bincount(owners[np.isin(labels, latin)], minlength=len(held_out))
    free = [
        i
        for i, family in enumerate(full["families"])
        if known[family]["package"] in LICENCES and drawn[i] >= 15
    ]
    free.sort(key=lambda i: hashlib.sha256(full["families"][i].encode()).digest())
    clan = {full["families"][i].split()[0]: i for i in reversed(free)}
    free = [i for i in free if clan[full["families"][i].split()[0]] == i]
    chosen = [i for i in free if not held_out[i]][:TRAIN] + [i for i in free if held_out[i]][:TEST]

    wanted = [i for i, m in enumerate(full["members"]) if set(m) & set(CHARACTERS)]
    keep = np.isin(owners, chosen) & np.isin(labels, wanted)
    images, labels, owners = images[keep], labels[keep], owners[keep]
    tests = held_out[owners]
    K = len(full["classes"])
    n_train, n_test = (np.bincount(labels[m], minlength=K) for m in (~tests, tests))
    # Full-set classes are ordered by code point among equals; the order here is by this slice.
    first = np.array([ord(m[0]) for m in full["members"]])
    order = [c for c in np.lexsort((first, -n_train)) if n_train[c] >= 3 and n_test[c] >= 1]
    number = np.full(K, -1)
    number[order] = np.arange(len(order))
    fine = number[labels] >= 0
    alive, owners = np.unique(owners[fine], return_inverse=True)
    labels = number[labels[fine]]
    rows = glyphs.Drawings(images[fine], labels, owners).keep(np.lexsort((owners, labels)))
    mini = glyphs.GlyphSet(
        rows,
        tuple(full["classes"][order]),
        tuple(full["members"][order]),
        tuple(full["families"][alive]),
        held_out[alive],
    )
    for family, test in zip(mini.families, mini.held_out, strict=True):
        face = known[family]
        licence = LICENCES[face["package"]]
        part = "test" if test else "train"
        print("|", " | ".join((family, part, face["package"], face["version"], licence)), "|")
    return glyphs.write(mini, target)


if __name__ == "__main__":
    print(main(Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET))
