"""Rows for classes that are still to come: a fixed frame with spare vertices."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ncmethods._core import InputError, check_labels
from ncmethods.frames import assign, simplex_etf
from ncmethods.heads._base import builder_scale, channel_axis
from ncmethods.heads.fixed import FixedHead

__all__ = ["GrowingHead", "growing_head"]


class GrowingHead(FixedHead):
    """A fixed head of which only some classes are in use; the others wait.

    All rows exist from the start, so K, the shapes, the optimizer and the compiled graph stay as
    they are when a class arrives. A class that waits has the logit −∞: probability 0, no gradient.
    The row of a class in use never changes. ``active`` [K] is a buffer and part of the state.

    Args:
        frame: rows [K, D], K the number of classes that there will ever be.
        in_features: width of the backbone.
        active: how many classes are in use at the start (the first ones), or their numbers.
        neck: ``"bn"``, ``"linear"``, ``"mlp"``, a module of your own, or None.
        normalize: scale features to unit norm before the rows act on them.
        scale: factor on the logits, positive.
        learn_scale: train the scale; it starts at ``scale`` and stays positive.

    Raises:
        InputError: as :class:`FixedHead`, or classes that do not exist.
    """

    active: Tensor

    def __init__(
        self,
        frame: Tensor,
        in_features: int,
        *,
        active: int | Iterable[int],
        neck: str | nn.Module | None = "bn",
        normalize: bool = True,
        scale: float = 1.0,
        learn_scale: bool = False,
    ) -> None:
        super().__init__(
            frame,
            in_features,
            neck=neck,
            normalize=normalize,
            scale=scale,
            learn_scale=learn_scale,
        )
        self.register_buffer("active", torch.zeros(self.out_features, dtype=torch.bool))
        if isinstance(active, int):
            self.grow(active)
        else:
            self.activate(active)

    @torch.no_grad()
    def grow(self, num_classes: int, *, means: Tensor | None = None) -> Tensor:
        """Take the next ``num_classes`` waiting classes into use, in order of their numbers.

        Args:
            num_classes: how many.
            means: of their features [num_classes, D], to choose their rows by; see ``activate``.

        Returns:
            Their numbers [num_classes] int64.

        Raises:
            InputError: not an integer ≥ 1, or more than are waiting.
        """
        waiting = (~self.active).nonzero().flatten()
        if (
            isinstance(num_classes, bool)
            or not isinstance(num_classes, int)
            or not 1 <= num_classes <= len(waiting)
        ):
            raise InputError(
                f"grow takes an integer from 1 to {len(waiting)}, the rows that are not in use, "
                f"got {num_classes!r}. Rows cannot be added later: build the head with a larger "
                "num_classes."
            )
        return self.activate(waiting[:num_classes], means=means)

    @torch.no_grad()
    def activate(self, classes: Iterable[int] | Tensor, *, means: Tensor | None = None) -> Tensor:
        """Take these classes into use. Call it on every rank, with the same arguments.

        Without ``means`` a class gets the row of its number. With them, the free rows are dealt out
        so that the cosines of the new classes with their rows have the largest sum (Hungarian
        method); the other free rows fill the places that are left.

        Args:
            classes: numbers of waiting classes, distinct.
            means: of their features after the neck [len(classes), D], in the same order.

        Returns:
            ``classes`` as an int64 tensor.

        Raises:
            InputError: numbers that do not exist, twice, or in use; means of another shape.
        """
        device = self.active.device
        new = torch.as_tensor(
            classes if isinstance(classes, Tensor) else list(classes), device=device
        )
        new = check_labels(new.to(torch.int64) if len(new) == 0 else new)
        K, listed = self.out_features, new.tolist()
        if len(set(listed)) < len(listed) or not all(0 <= c < K for c in listed):
            raise InputError(f"classes must be distinct numbers from 0 to {K - 1}, got {listed}.")
        if bool(self.active[new].any()):
            raise InputError(
                f"Classes {new[self.active[new]].tolist()} are in use already: their rows stay. "
                "Leave them out."
            )
        if means is not None:
            if tuple(means.shape) != (len(new), self.weight.shape[1]):
                raise InputError(
                    f"means must be [{len(new)}, {self.weight.shape[1]}], one row for each new "
                    f"class, got {tuple(means.shape)}."
                )
            free = (~self.active).nonzero().flatten()
            chosen = free[assign(self.weight[free], means).to(device)]
            places = torch.cat([new, free[~torch.isin(free, new)]])
            rows = torch.cat([chosen, free[~torch.isin(free, chosen)]])
            weight = self.weight.clone()
            weight[places] = self.weight[rows]
            self.weight = weight
        self.active = self.active.index_fill(0, new, True)
        return new

    def logits(self, features: Tensor) -> Tensor:
        """Logits [N, K] of features [N, D], float32 also under autocast; −∞ for waiting classes."""
        z = super().logits(features)
        axis = channel_axis(z)
        return z.movedim(axis, -1).masked_fill(~self.active, -math.inf).movedim(-1, axis)

    def extra_repr(self) -> str:
        """Shape and geometry for ``print(model)``."""
        used = "" if self.active.is_meta else f", {int(self.active.sum())} in use"
        return super().extra_repr() + used


def growing_head(
    in_features: int,
    num_classes: int,
    *,
    active: int | Iterable[int] | None = None,
    dim: int | None = None,
    neck: str | nn.Module | None = "bn",
    normalize: bool = True,
    scale: float | None = None,
    learn_scale: bool = False,
    generator: torch.Generator | None = None,
) -> GrowingHead:
    """Classifier head with the vertices of a simplex ETF kept ready for later classes.

    ``head.grow(n)`` takes n more classes into use; the rows of the earlier ones stay as they are.

    Args:
        in_features: width of the backbone.
        num_classes: K, all classes that there will ever be.
        active: how many are in use at the start (the first ones), or their numbers; all if None.
        dim: D of the rows; ``in_features`` if None. Must be at least K − 1.
        neck: as in :func:`ncmethods.heads.etf_head`.
        normalize: scale features to unit norm, so that logits are scaled cosines.
        scale: factor on the logits; ((K−1)/K)·log(99(K−1)) if None, and 1 if features are not
            normalised.
        learn_scale: train the scale, from that value.
        generator: CPU generator of the rotation.

    Raises:
        InputError: dim < K − 1, classes that do not exist, or a neck or scale that does not fit.

    References:
        Yang et al., ICLR 2023, arXiv:2302.03004 (one simplex ETF for the classes of all sessions).
    """
    frame = simplex_etf(
        num_classes,
        in_features if dim is None else dim,
        generator=generator,
        dtype=torch.get_default_dtype(),
    )
    scale = builder_scale(scale, num_classes, normalize=normalize, quiet=learn_scale)
    return GrowingHead(
        frame,
        in_features,
        active=num_classes if active is None else active,
        neck=neck,
        normalize=normalize,
        scale=scale,
        learn_scale=learn_scale,
    )
