"""The rows of the classes in zero-padded batches: one call of linalg serves many classes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_ENTRIES = 2**22  # in a batch: 32 MiB of float64
_SLACK = 1.25  # largest over smallest class in a batch


def class_blocks(
    rows: Tensor, labels: Tensor, center: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield labels [G] and blocks [G, n, d] of classes of similar sizes, padded with zero rows.

    Zero rows change no singular value but zeros. Together the blocks hold every row once.

    Args:
        rows: [N, d]; blocks are gathered from it in float64.
        labels: [N], none of them negative.
        center: subtracted from the rows [d].
    """
    order = labels.argsort(stable=True)
    classes, sizes = torch.unique_consecutive(labels[order], return_counts=True)
    starts = sizes.cumsum(0) - sizes
    by_size = sizes.argsort(stable=True)
    n = sizes[by_size].tolist()
    i = 0
    while i < len(n):
        j = i + 1
        while (
            j < len(n)
            and n[j] <= _SLACK * n[i] + 1
            and (j + 1 - i) * n[j] * rows.shape[1] <= _ENTRIES
        ):
            j += 1
        at = by_size[i:j]
        place = torch.arange(n[j - 1], device=rows.device)
        real = place < sizes[at, None]  # [G, n]
        index = order[(starts[at, None] + place).clamp(max=len(order) - 1)]
        block = rows[index].double()
        if center is not None:
            block -= center
        yield classes[at], block.masked_fill_(~real[..., None], 0)
        i = j
