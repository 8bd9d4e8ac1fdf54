"""Cosine head: learned rows, compared by angle."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ncmethods._core import check_num_classes
from ncmethods.heads._base import make_neck, scaled_cosine

__all__ = ["CosineHead", "cosine_head"]


class CosineHead(nn.Module):
    """A classifier with learned rows whose logits are ``scale · cos(h, w_c)``.

    Args:
        in_features: width of the backbone.
        num_classes: K.
        dim: D of the rows; ``in_features`` if None.
        neck: ``"bn"``, ``"linear"`` or None.
        scale: factor on the cosines.
        generator: CPU generator of the initial rows.
    """

    bias: None = None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        dim: int | None = None,
        neck: str | None = None,
        scale: float = 30.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        dim = in_features if dim is None else dim
        self.in_features, self.out_features = in_features, check_num_classes(num_classes)
        self.scale = float(scale)
        self.neck = make_neck(neck, in_features, dim)
        rows = torch.randn(num_classes, dim, generator=generator)
        self.weight = nn.Parameter(nn.functional.normalize(rows, dim=1))

    def embed(self, x: Tensor) -> Tensor:
        """Features [N, D] of the backbone's output [N, in_features]."""
        features: Tensor = self.neck(x)
        return features

    def logits(self, features: Tensor) -> Tensor:
        """Logits [N, K] of features [N, D], float32 also under autocast."""
        return scaled_cosine(features, self.weight, self.scale, normalize=True, unit_rows=True)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, K] of the backbone's output [N, in_features]."""
        return self.logits(self.embed(x))

    def extra_repr(self) -> str:
        """Shape and scale for ``print(model)``."""
        K, D = self.weight.shape
        return f"{K} learned unit rows in R^{D}, scale={self.scale:.4g}"


def cosine_head(
    in_features: int,
    num_classes: int,
    *,
    dim: int | None = None,
    neck: str | None = None,
    scale: float = 30.0,
    generator: torch.Generator | None = None,
) -> CosineHead:
    """Classifier head with logits ``scale · cos(h, w_c)`` and learned rows.

    What LDAM is defined on: both features and rows are normalised, and there is no bias.

    Args:
        in_features: width of the backbone.
        num_classes: K.
        dim: D of the rows; ``in_features`` if None.
        neck: ``"bn"``, ``"linear"`` or None.
        scale: factor on the cosines; 30 in LDAM.
        generator: CPU generator of the initial rows.

    References:
        Cao et al., NeurIPS 2019, arXiv:1906.07413, §3.2 (unit features and rows).
    """
    return CosineHead(
        in_features, num_classes, dim=dim, neck=neck, scale=scale, generator=generator
    )
