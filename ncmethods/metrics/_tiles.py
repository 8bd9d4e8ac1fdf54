"""All pairs of K rows in tiles: no [K, K] matrix is held once K exceeds the side of a tile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ncmethods._core import InputError

TILE = 2048  # rows to a side: 32 MiB of float64


class Noise(NamedTuple):
    """What the sampling error of estimated rows adds to their inner products, on average.

    Independent rows with squared errors e_c, centred by the mean with weights p_c, gain
    e_i·1[i = j] − p_i e_i − p_j e_j + Σ p_c² e_c.
    """

    own: Tensor  # e [K]
    pull: Tensor  # p e [K]
    common: Tensor  # Σ p² e []

    @classmethod
    def of(cls, error: Tensor, shares: Tensor | None = None) -> Noise:
        """Of rows with errors e [K], centred with ``shares`` p [K] or not at all."""
        p = torch.zeros_like(error) if shares is None else shares
        return cls(error, p * error, (p * p * error).sum())

    def at(self, index: Tensor | list[int]) -> Noise:
        """Of some of the rows."""
        return Noise(self.own[index], self.pull[index], self.common)

    def square(self) -> Tensor:
        """Its diagonal [K]."""
        return self.own - 2 * self.pull + self.common

    def tile(self, a: slice, b: slice) -> Tensor:
        """Its tile [A, B]."""
        N = self.common - self.pull[a, None] - self.pull[b]
        if a == b:
            N += torch.diag(self.own[a])
        return N


class Pairs:
    """Inner products of all pairs of rows, the tiles on and above the diagonal.

    A single tile is kept, so several measures of the same few rows cost one product.

    Args:
        rows: [K, D] with K ≥ 2; computed in float64.
        noise: taken out of the inner products. Squared norms may then be negative: what is made
            of their roots is NaN.

    Raises:
        InputError: something else.
    """

    def __init__(self, rows: Tensor, noise: Noise | None = None) -> None:
        if not isinstance(rows, Tensor) or rows.ndim != 2 or len(rows) < 2:
            got = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            raise InputError(f"rows must be [K, D] with K ≥ 2, got {got}.")
        self.rows = rows.detach().double()
        self.square = self.rows.square().sum(1)  # [K]
        self.noise = noise
        if noise is not None:
            self.square = self.square - noise.square()
        self._tile: Tensor | None = None

    def __len__(self) -> int:
        """Number of rows K."""
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield row slices a ≤ b and the inner products of their rows [A, B]: only read them."""
        K = len(self)
        if self._tile is not None:
            yield slice(0, K), slice(0, K), self._tile
            return
        for i in range(0, K, TILE):
            a = slice(i, min(i + TILE, K))
            for j in range(i, K, TILE):
                b = slice(j, min(j + TILE, K))
                G = self.rows[a] @ self.rows[b].T
                if self.noise is not None:
                    G -= self.noise.tile(a, b)
                if len(G) == K:
                    self._tile = G
                yield a, b, G

    def sum(self, f: Callable[[slice, slice, Tensor], Tensor]) -> Tensor:
        """Σ over all tiles, also those below the diagonal, of a symmetric function of a tile."""
        total: Tensor | None = None
        for a, b, G in self:
            part = f(a, b, G) * (1 if a == b else 2)
            total = part if total is None else total + part
        assert total is not None
        return total

    def cosines(self, diagonal: float) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield cosines instead, NaN for rows of norm 0, with ``diagonal`` on the diagonal."""
        inverse = self.square.rsqrt().masked_fill_(self.square <= 0, torch.nan)
        for a, b, G in self:
            C = G * inverse[a, None] * inverse[b]
            if a == b:
                C.fill_diagonal_(diagonal)
            yield a, b, C

    def distances(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield squared distances instead, exact for near neighbours, with ∞ on the diagonal.

        The few that cancel more than six digits in ‖a‖² + ‖b‖² − 2ab are formed again from
        differences.
        """
        for a, b, G in self:
            scale = self.square[a, None] + self.square[b]
            d = torch.add(scale, G, alpha=-2)
            if a == b:
                d.fill_diagonal_(torch.inf)
            i, j = (d < 1e-6 * scale).nonzero(as_tuple=True)
            for part in torch.split(torch.arange(len(i), device=i.device), 65536):
                near = self.rows[a.start + i[part]] - self.rows[b.start + j[part]]
                d[i[part], j[part]] = near.square().sum(1)
            yield a, b, d


def unit(rows: Tensor) -> Tensor:
    """Rows of unit norm; NaN for rows of norm 0, which have no direction."""
    return rows / rows.square().sum(1, keepdim=True).sqrt()


def closeness(pairs: Pairs, error: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Σ_{j≠i} 1/‖r_i − r_j‖² for every row [K], and the same less the rows' errors.

    Args:
        pairs: of the rows.
        error: e [K], expected squared error of each row: 1/(‖r_i − r_j‖² − e_i − e_j), NaN where
            that is not positive. Without it the second sums are zero.
    """
    plain, corrected = torch.zeros_like(pairs.square), torch.zeros_like(pairs.square)

    def add(into: Tensor, a: slice, b: slice, inverse: Tensor) -> None:
        into[a] += inverse.sum(1)
        if a != b:
            into[b] += inverse.sum(0)

    for a, b, d in pairs.distances():
        add(plain, a, b, d.reciprocal())
        if error is not None:
            less = d - error[a, None] - error[b]
            add(corrected, a, b, less.masked_fill_(less <= 0, torch.nan).reciprocal_())
    return plain, corrected
