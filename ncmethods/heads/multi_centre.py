"""Several centres for each class; a class is as near as its nearest one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ncmethods._core import InputError, check_choice, check_num_classes
from ncmethods.frames import multi_centre
from ncmethods.heads._base import _unit, channel_axis, default_scale, scaled_cosine, warn_low_scale
from ncmethods.heads.rotated import DerivedHead

__all__ = ["MultiCentreHead", "multi_centre_head"]


class MultiCentreHead(DerivedHead):
    """A classifier with several unit rows for each class.

    The logit of a class is the largest of ``scale · cos(h, row)`` over its rows (``pool="max"``),
    or log((1/M) Σ exp(scale · cos)) (``"logsumexp"``). With one row each both are the plain cosine
    head. ``rows`` [R, D] holds the centres in the order of the classes; ``weight`` [K, D], which
    the Head protocol asks for, is the mean of the rows of each class. No single linear layer can
    take the place of this head, so ``weight`` serves to measure alignment, not to deploy.

    Args:
        rows: centres [R, D], those of class 0 first, then those of class 1, and so on.
        centres: how many each class has; their sum is R.
        in_features: width of the backbone.
        learn_rows: train the rows; they are normalised in the forward pass.
        pool: ``"max"`` or ``"logsumexp"``.
        neck: ``"bn"``, ``"linear"``, ``"mlp"``, a module of your own, or None.
        scale: factor on the cosines, positive.
        learn_scale: train the scale; it starts at ``scale`` and stays positive.

    Raises:
        InputError: rows that are not finite [Σ centres, D], or an option that does not fit.
    """

    rows: Tensor
    owner: Tensor
    members: Tensor

    def __init__(
        self,
        rows: Tensor,
        centres: Sequence[int],
        in_features: int,
        *,
        learn_rows: bool = False,
        pool: str = "max",
        neck: str | nn.Module | None = "bn",
        scale: float = 1.0,
        learn_scale: bool = False,
    ) -> None:
        check_choice(pool, ("max", "logsumexp"), "pool")
        R, K = sum(centres), check_num_classes(len(centres))
        if (
            rows.ndim != 2
            or len(rows) != R
            or min(centres) < 1
            or not rows.is_floating_point()
            or not bool(rows.isfinite().all())
        ):
            raise InputError(
                f"rows must be a finite floating [{R}, D] matrix with centres = {list(centres)}, "
                f"each ≥ 1, got {rows.dtype} {tuple(rows.shape)}."
            )
        D = rows.shape[1]
        super().__init__(in_features, K, D, neck=neck, scale=scale, learn_scale=learn_scale)
        self.pool = pool
        start = rows.detach().clone()
        if learn_rows:
            self.rows = nn.Parameter(start)
        else:
            self.register_buffer("rows", start)
        number = torch.tensor(centres)
        owner = torch.arange(K).repeat_interleave(number)  # [R]
        slots = torch.arange(int(number.max()))
        first = number.cumsum(0) - number
        # Row of each centre of each class [K, M]; −1 where a class has fewer than M.
        members = torch.where(slots < number[:, None], first[:, None] + slots, -1)
        self.register_buffer("owner", owner, persistent=False)
        self.register_buffer("members", members, persistent=False)

    @property
    def weight(self) -> Tensor:
        """Mean of the unit rows of each class [K, D]."""
        rows = _unit(self.rows)
        sums = rows.new_zeros(len(self.members), rows.shape[1]).index_add(0, self.owner, rows)
        return sums / (self.members >= 0).sum(1, keepdim=True)

    def logits(self, features: Tensor) -> Tensor:
        """Logits [N, K] of features [N, D], float32 also under autocast."""
        z = scaled_cosine(features, self.rows, self.scale, normalize=True, unit_rows=True)
        axis, absent = channel_axis(z), self.members < 0
        each = z.movedim(axis, -1)[..., self.members.clamp(min=0)]  # [N, K, M]
        each = each.masked_fill(absent, -math.inf)
        if self.pool == "max":
            pooled = each.amax(-1)
        else:
            pooled = each.logsumexp(-1) - (~absent).sum(1).to(each.dtype).log()
        return pooled.movedim(-1, axis)

    def extra_repr(self) -> str:
        """Shape and geometry for ``print(model)``."""
        kind = "learned" if isinstance(self.rows, nn.Parameter) else "fixed"
        R, D = self.rows.shape
        return (
            f"{R} {kind} rows in R^{D} for {self.out_features} classes, pool={self.pool}, "
            f"{self.scale_repr()}"
        )


def multi_centre_head(
    in_features: int,
    num_classes: int,
    *,
    centres: int | Sequence[int] = 2,
    sibling: float = 0.5,
    learn_rows: bool = False,
    pool: str = "max",
    dim: int | None = None,
    neck: str | nn.Module | None = "bn",
    scale: float | None = None,
    learn_scale: bool = False,
    generator: torch.Generator | None = None,
) -> MultiCentreHead:
    """Classifier head with several centres for each class.

    For classes that consist of several groups, and to give rare classes a wider cone.

    Args:
        in_features: width of the backbone.
        num_classes: K.
        centres: M for every class, or one number for each.
        sibling: cosine of two centres of one class, where the rows are fixed. Centres of different
            classes have the lowest cosine that it allows: :func:`ncmethods.frames.multi_centre`.
        learn_rows: learn the rows, from random ones; then any ``dim`` will do.
        pool: ``"max"`` or ``"logsumexp"`` over the centres of a class.
        dim: D of the rows; ``in_features`` if None. Fixed rows need K·M − 1.
        neck: as in :func:`ncmethods.heads.etf_head`.
        scale: factor on the cosines; if None, log(99(K−1))/(1 − c) for fixed rows, c the cosine of
            centres of different classes, and ((K−1)/K)·log(99(K−1)) for learned ones.
        learn_scale: train the scale, from that value.
        generator: CPU generator of the rows.

    Raises:
        InputError: a frame that does not exist in ``dim``, or an option that does not fit.

    References:
        The general form, without a paper's loss. Several learned centres: Qian et al., ICCV 2019,
        arXiv:1909.05235; the maximum over them: Deng et al., ECCV 2020.
    """
    K, D = check_num_classes(num_classes), in_features if dim is None else dim
    each = [centres] * K if isinstance(centres, int) else list(centres)
    if len(each) != K or not all(type(m) is int and m >= 1 for m in each):
        raise InputError(
            f"centres must be an integer ≥ 1, or one for each of the {K} classes, got {centres!r}."
        )
    if learn_rows:
        rows = _unit(torch.randn(sum(each), D, generator=generator))
        largest = -1 / (K - 1)
    else:
        rows = multi_centre(
            K, D, centres=each, sibling=sibling, generator=generator, dtype=torch.float64
        )
        largest = round(float(rows[0] @ rows[-1]), 12)  # the same whatever the rotation
    rows = rows.to(torch.get_default_dtype())
    if scale is None:
        scale = default_scale(K) * K / (K - 1) / (1 - largest)
    elif not learn_scale:
        warn_low_scale(K, scale)
    return MultiCentreHead(
        rows,
        each,
        in_features,
        learn_rows=learn_rows,
        pool=pool,
        neck=neck,
        scale=scale,
        learn_scale=learn_scale,
    )
