"""A classifier without learned rows: the moving averages of the class means."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ncmethods.heads._base import _unit, builder_scale
from ncmethods.heads.guided import FollowingHead, check_momentum

__all__ = ["ClassMeanHead", "class_mean_head"]


class ClassMeanHead(FollowingHead):
    """A classifier whose rows are the directions of moving class means of unit features.

    Call ``head.observe(features, labels)`` after the forward pass of a training step, or score with
    ``head(x, labels)``, which looks first. Nothing is learned but the neck, and the scale if asked.

    The state lies in two buffers: ``weight`` [K, D], unit rows, and ``means`` [K, D], NaN for a
    class that was never seen; such a class keeps the random row that it started with. They are
    replaced, not written to. On several ranks the sums of the batch are all-reduced.

    Args:
        in_features: width of the backbone.
        num_classes: K.
        dim: D of the rows; ``in_features`` if None.
        neck: ``"bn"``, ``"linear"``, ``"mlp"``, a module of your own, or None.
        scale: factor on the cosines, positive.
        learn_scale: train the scale; it starts at ``scale`` and stays positive.
        momentum: share of the old means in the new, in [0, 1).
        center: subtract the average of the class means before they become rows.
        generator: CPU generator of the first rows.

    Raises:
        InputError: a neck, scale or momentum that does not fit.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        dim: int | None = None,
        neck: str | nn.Module | None = None,
        scale: float = 1.0,
        learn_scale: bool = False,
        momentum: float = 0.9,
        center: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        dim = in_features if dim is None else dim
        super().__init__(
            in_features, num_classes, dim, neck=neck, scale=scale, learn_scale=learn_scale
        )
        self.momentum, self.center = check_momentum(momentum), center
        self.register_buffer("weight", _unit(torch.randn(num_classes, dim, generator=generator)))
        self.register_buffer("means", torch.full_like(self.weight, torch.nan))

    def _follow(self, features: Tensor, labels: Tensor) -> Tensor:
        self.means = self.moved(features, labels)
        rows = self.means - self.means.nanmean(0) if self.center else self.means
        length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        self.weight = torch.where(length > 0, rows / length, self.weight)  # NaN: never seen
        return self.weight

    def extra_repr(self) -> str:
        """Shape and geometry for ``print(model)``."""
        K, D = self.weight.shape
        return (
            f"{K} class means in R^{D}, momentum={self.momentum:.4g}, center={self.center}, "
            f"{self.scale_repr()}"
        )


def class_mean_head(
    in_features: int,
    num_classes: int,
    *,
    dim: int | None = None,
    neck: str | nn.Module | None = None,
    scale: float | None = None,
    learn_scale: bool = False,
    momentum: float = 0.9,
    center: bool = False,
    generator: torch.Generator | None = None,
) -> ClassMeanHead:
    """Classifier head whose rows are class-mean features, kept as moving averages.

    The third property of neural collapse, put in by hand: rows and class means are the same. It
    has no rows to store gradients or optimizer state for, which counts where classes are many.
    Call ``head.observe(features, labels)`` in every training step.

    Args:
        in_features: width of the backbone.
        num_classes: K; any, also K > D + 1.
        dim: D of the rows; ``in_features`` if None.
        neck: as in :func:`ncmethods.heads.etf_head`; none by default.
        scale: factor on the cosines; ((K−1)/K)·log(99(K−1)) if None.
        learn_scale: train the scale, from that value.
        momentum: share of the old class means in the new; 0 takes those of the batch.
        center: subtract the average of the class means before they become rows.
        generator: CPU generator of the rows before anything is observed.

    Raises:
        InputError: a neck, scale or momentum that does not fit.

    References:
        Jiang et al., ICML 2024, arXiv:2310.05351 (class-mean features as the classifier).
    """
    scale = builder_scale(scale, num_classes, quiet=learn_scale)
    return ClassMeanHead(
        in_features,
        num_classes,
        dim=dim,
        neck=neck,
        scale=scale,
        learn_scale=learn_scale,
        momentum=momentum,
        center=center,
        generator=generator,
    )
