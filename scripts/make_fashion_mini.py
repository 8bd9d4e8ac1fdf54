"""Make ncmethods/data/_files/fashion-mini.npz from the full Fashion-MNIST.

500 training and 200 test images per class, from the official training and test files, drawn with
seed 0 and kept in the order of those files. ``*_index`` are their positions there.

    python scripts/make_fashion_mini.py [TARGET]

prints the SHA-256 of the file, which must equal FASHION_MINI_SHA256 in ncmethods/data/datasets.py.
Running it again gives the same bytes (with the same zlib).
"""

import hashlib
import sys
from pathlib import Path

import numpy as np

from ncmethods import data

TARGET = Path(data.__file__).parent / "_files" / "fashion-mini.npz"


def main(target: Path) -> str:
    """Write the subset to ``target`` and return its SHA-256."""
    splits = data.load("fashion-mnist")
    arrays = {}
    for part, full, per_class in (("train", splits.train, 500), ("test", splits.test, 200)):
        chosen = data.long_tail_indices(full.labels, [per_class] * 10, seed=0).sort().values
        arrays[f"{part}_images"] = full.images[chosen].numpy()
        arrays[f"{part}_labels"] = full.labels[chosen].numpy().astype(np.uint8)
        arrays[f"{part}_index"] = chosen.numpy().astype(np.int32)
    np.savez_compressed(target, **arrays)
    return hashlib.sha256(target.read_bytes()).hexdigest()


if __name__ == "__main__":
    print(main(Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET))
