"""FrozenStats: the moments of a statistic that no longer changes, with their decompositions."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ncmethods._core import InputError
from ncmethods._linalg import spd_factor

if TYPE_CHECKING:
    from ncmethods.stats import ClassStats


class FrozenStats:
    """An immutable view of a :class:`~ncmethods.stats.ClassStats`, made by its ``freeze()``.

    Every scorer and score that is fitted from one FrozenStats shares its decompositions. All
    tensors are float64 copies; what happens to the statistic afterwards does not reach them.

    Args:
        stats: what to freeze; one with samples.
    """

    def __init__(self, stats: ClassStats) -> None:
        self.num_classes, self.dim, self.layer = stats.num_classes, stats.dim, stats.layer
        self.normalized, self.scatter = stats.normalized, stats.scatter
        self.counts, self.means, self.trace = stats.counts, stats.means, stats.trace
        self.mean = stats.global_mean("sample")  # [D]
        self._within = stats.within if stats.scatter else None
        self._weight = stats.class_weight
        self._cache: dict[Any, Any] = {}

    @property
    def active(self) -> Tensor:
        """Which classes have samples, bool [K]."""
        return self.counts > 0

    @cached_property
    def N(self) -> int:
        """Number of samples."""
        return int(self.counts.sum())

    @property
    def within(self) -> Tensor:
        """Within-class scatter [D, D].

        Raises:
            InputError: the statistic was kept without it, or with class weights.
        """
        if self._within is None or self._weight is not None:
            raise InputError(
                "This needs the plain within-class scatter [D, D]; the statistic was accumulated "
                f"with {'scatter=False' if self._within is None else 'class_weight'}."
            )
        return self._within

    @cached_property
    def sigma_w(self) -> Tensor:
        """Within-class covariance [D, D], over N."""
        return self.within / self.N

    @cached_property
    def sigma_t(self) -> Tensor:
        """Total covariance [D, D] of the samples, over N."""
        M = (self.means - self.mean)[self.active]
        return self.sigma_w + M.T * (self.counts[self.active].double() / self.N) @ M

    def cached(self, key: Any, make: Callable[[], Any]) -> Any:
        """``make()``, computed once for each ``key``."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def whitener(self, kind: str = "within", shrinkage: float = 0.0) -> Tensor:
        """F [D, D] with F Fᵀ = Σ⁻¹, for Σ the ``"within"`` or the ``"total"`` covariance.

        Directions whose variance is under 1e-8 of the largest count as if they had that much, so
        collapsed classes and dead units give large finite distances.

        Args:
            kind: which covariance.
            shrinkage: s of (1 − s) Σ + s tr(Σ)/D · I.
        """

        def make() -> Tensor:
            sigma = self.sigma_w if kind == "within" else self.sigma_t
            scale = float(sigma.diagonal().mean())
            eye = torch.eye(self.dim, dtype=sigma.dtype, device=sigma.device)
            sigma = (1 - shrinkage) * sigma + shrinkage * scale * eye
            size = float(self.sigma_t.diagonal().max())
            return spd_factor(sigma, size)

        F: Tensor = self.cached((kind, shrinkage), make)
        return F

    def second_moment_eigh(self, about: Tensor) -> tuple[Tensor, Tensor]:
        """Eigenvalues [D], ascending, and vectors [D, D] of E[(h − about)(h − about)ᵀ]."""

        def make() -> tuple[Tensor, Tensor]:
            shift = self.mean - about.to(self.mean)
            values, vectors = torch.linalg.eigh(self.sigma_t + shift.outer(shift))
            return values, vectors

        pair: tuple[Tensor, Tensor] = self.cached(about.double().cpu().numpy().tobytes(), make)
        return pair
