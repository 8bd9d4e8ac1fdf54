"""Walks over all pairs of K rows in blocks, so that no [K, K] matrix is ever held."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TILE = 2048


def pair_sum(rows: Tensor, f: Callable[[Tensor, Tensor, int], Tensor]) -> Tensor:
    """Σ over blocks of ``f(rows[i:i+T], rows, i)``, where ``f`` returns a tensor of fixed shape.

    Args:
        rows: [K, D].
        f: of a block of rows [T, D], all rows, and the index of the block's first row.
    """
    total: Tensor | None = None
    for start in range(0, len(rows), TILE):
        part = f(rows[start : start + TILE], rows, start)
        total = part if total is None else total + part
    assert total is not None
    return total


def closeness(rows: Tensor, error: Tensor) -> Tensor:
    """Σ_{j≠i} 1/(‖r_i − r_j‖² − e_i − e_j) for every row, [K]; NaN where a difference is negative.

    Args:
        rows: [K, D].
        error: e [K], the expected squared error of each row.
    """
    parts = []
    for i in range(0, len(rows), TILE):
        square = squared_distances(rows[i : i + TILE], rows, i) - error[i : i + TILE, None] - error
        parts.append(square.masked_fill_(square < 0, torch.nan).reciprocal_().sum(1))
    return torch.cat(parts)


def squared_distances(block: Tensor, rows: Tensor, start: int) -> Tensor:
    """‖block_i − rows_j‖² [T, K], exact for near neighbours; +∞ on the diagonal.

    One product gives all of them; the few that cancel more than six digits are formed again from
    differences.
    """
    a, b = block.square().sum(1), rows.square().sum(1)
    scale = a[:, None] + b
    d = (scale - 2 * block @ rows.T).clamp(min=0)
    d.diagonal(start).fill_(torch.inf)
    i, j = (d < 1e-6 * scale).nonzero(as_tuple=True)
    for part in torch.split(torch.arange(len(i), device=i.device), 65536):
        d[i[part], j[part]] = (block[i[part]] - rows[j[part]]).square().sum(1)
    return d
