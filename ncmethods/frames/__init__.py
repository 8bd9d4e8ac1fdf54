"""Target geometries: unit rows [K, D] that a classifier or the class means can be held to.

Every frame is a function ``(num_classes, dim, *, …, generator=None, dtype=torch.float32)`` that
builds in float64. Smallest D, and cosines of pairs of rows:

======================== ============ ==================================================
frame                    D            cosines
======================== ============ ==================================================
simplex_etf, sparse_etf  K − 1        −1/(K−1)
orthogonal_frame         K            0
nonnegative_orthogonal   K            0, entries ≥ 0
hadamard                 next 2^p ≥ K 0, entries ±c
orthoplex                K/2          0 or −1
spread                   2            largest one as small as D allows
softmax_code             2            one-vs-rest margin as large as D allows
hierarchical             K − 1        one inside groups, one between them
multi_centre             K·M − 1      one inside classes, one between them; K·M rows
======================== ============ ==================================================

``nearest_etf`` and ``assign`` fit a frame to class means.
"""

from ncmethods.frames.codes import softmax_code, spread
from ncmethods.frames.fit import assign, nearest_etf
from ncmethods.frames.orthogonal import (
    hadamard,
    nonnegative_orthogonal,
    orthogonal_frame,
    orthoplex,
)
from ncmethods.frames.simplex import simplex_etf, sparse_etf
from ncmethods.frames.tree import hierarchical, multi_centre

__all__ = [
    "assign",
    "hadamard",
    "hierarchical",
    "multi_centre",
    "nearest_etf",
    "nonnegative_orthogonal",
    "orthogonal_frame",
    "orthoplex",
    "simplex_etf",
    "softmax_code",
    "sparse_etf",
    "spread",
]
