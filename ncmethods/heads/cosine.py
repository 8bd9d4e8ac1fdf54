"""Cosine head: learned rows, compared by angle."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ncmethods.heads._base import ScaledHead, builder_scale, scaled_cosine

__all__ = ["CosineHead", "cosine_head"]


class CosineHead(ScaledHead):
    """A classifier with learned rows whose logits are ``scale · cos(h, w_c)``.

    Args:
        in_features: width of the backbone.
        num_classes: K.
        dim: D of the rows; ``in_features`` if None.
        neck: ``"bn"``, ``"linear"``, ``"mlp"``, a module of your own, or None.
        scale: factor on the cosines, positive.
        learn_scale: train the scale; it starts at ``scale`` and stays positive.
        generator: CPU generator of the initial rows.

    Raises:
        InputError: a bad number of classes, neck or scale.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        dim: int | None = None,
        neck: str | nn.Module | None = None,
        scale: float = 30.0,
        learn_scale: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        D = in_features if dim is None else dim
        super().__init__(
            in_features, num_classes, D, neck=neck, scale=scale, learn_scale=learn_scale
        )
        rows = torch.randn(num_classes, D, generator=generator)
        self.weight = nn.Parameter(nn.functional.normalize(rows, dim=1))

    def logits(self, features: Tensor) -> Tensor:
        """Logits [N, K] of features [N, D], float32 also under autocast."""
        return scaled_cosine(features, self.weight, self.scale, normalize=True, unit_rows=True)

    def extra_repr(self) -> str:
        """Shape and scale for ``print(model)``."""
        K, D = self.weight.shape
        return f"{K} learned unit rows in R^{D}, {self.scale_repr()}"


def cosine_head(
    in_features: int,
    num_classes: int,
    *,
    dim: int | None = None,
    neck: str | nn.Module | None = None,
    scale: float = 30.0,
    learn_scale: bool = False,
    generator: torch.Generator | None = None,
) -> CosineHead:
    """Classifier head with logits ``scale · cos(h, w_c)`` and learned rows.

    What LDAM is defined on: both features and rows are normalised, and there is no bias.

    Args:
        in_features: width of the backbone.
        num_classes: K.
        dim: D of the rows; ``in_features`` if None.
        neck: ``"bn"``, ``"linear"``, ``"mlp"``, a module of your own, or None.
        scale: factor on the cosines; 30 in LDAM.
        learn_scale: train the scale, from that value.
        generator: CPU generator of the initial rows.

    Raises:
        InputError: a bad number of classes, neck or scale.

    References:
        Cao et al., NeurIPS 2019, arXiv:1906.07413, §3.2 (unit features and rows).
    """
    scale = builder_scale(scale, num_classes, quiet=learn_scale)
    return CosineHead(
        in_features,
        num_classes,
        dim=dim,
        neck=neck,
        scale=scale,
        learn_scale=learn_scale,
        generator=generator,
    )
