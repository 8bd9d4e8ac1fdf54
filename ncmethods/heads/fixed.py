"""Heads whose rows are a fixed frame: the simplex ETF head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ncmethods._core import InputError, check_num_classes
from ncmethods.frames import simplex_etf
from ncmethods.heads._base import default_scale, make_neck, scaled_cosine

__all__ = ["FixedHead", "etf_head"]


class FixedHead(nn.Module):
    """A classifier whose rows are a frame that training does not move.

    ``forward(x) = logits(embed(x))``: ``embed`` is the neck, ``logits`` the geometry. ``weight`` is
    a persistent buffer, so optimizers never see it and a ``state_dict`` carries it; with
    ``neck=None`` the state is that of ``nn.Linear(bias=False)``.

    Args:
        frame: rows [K, D], finite.
        in_features: width of the backbone.
        neck: ``"bn"``, ``"linear"`` or None.
        normalize: scale features to unit norm before the rows act on them.
        scale: factor on the logits.

    Raises:
        InputError: a frame that is not a finite floating [K, D] matrix, or a bad neck.
    """

    weight: Tensor
    bias: None = None

    def __init__(
        self,
        frame: Tensor,
        in_features: int,
        *,
        neck: str | None = "bn",
        normalize: bool = True,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        if frame.ndim != 2 or not frame.is_floating_point() or not bool(frame.isfinite().all()):
            raise InputError(
                "frame must be a finite floating [K, D] matrix of rows, got "
                f"{frame.dtype} {tuple(frame.shape)}."
            )
        self.out_features, dim = check_num_classes(frame.shape[0]), frame.shape[1]
        self.in_features, self.normalize, self.scale = in_features, normalize, float(scale)
        self.neck = make_neck(neck, in_features, dim)
        self.register_buffer("weight", frame.detach().clone())

    def embed(self, x: Tensor) -> Tensor:
        """Features [N, D] of the backbone's output [N, in_features]."""
        features: Tensor = self.neck(x)
        return features

    def logits(self, features: Tensor) -> Tensor:
        """Logits [N, K] of features [N, D], float32 also under autocast."""
        return scaled_cosine(
            features, self.weight, self.scale, normalize=self.normalize, unit_rows=False
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, K] of the backbone's output [N, in_features]."""
        return self.logits(self.embed(x))

    def extra_repr(self) -> str:
        """Shape and geometry for ``print(model)``."""
        K, D = self.weight.shape
        return f"{K} fixed rows in R^{D}, normalize={self.normalize}, scale={self.scale:.4g}"


def etf_head(
    in_features: int,
    num_classes: int,
    *,
    dim: int | None = None,
    neck: str | None = "bn",
    normalize: bool = True,
    scale: float | None = None,
    rotation: str = "haar",
    generator: torch.Generator | None = None,
) -> FixedHead:
    """Classifier head with the rows of a fixed simplex ETF.

    A BatchNorm neck stands before the rows by default: features after a ReLU cannot reach a rotated
    ETF (their cosine stops at 0.707).

    Args:
        in_features: width of the backbone.
        num_classes: K.
        dim: D of the rows; ``in_features`` if None. Must be at least K − 1.
        neck: ``"bn"``, ``"linear"`` or None (the rows act on the backbone's output).
        normalize: scale features to unit norm, so that logits are scaled cosines.
        scale: factor on the logits; ((K−1)/K)·log(99(K−1)) if None, which lets cross-entropy
            reach probability 0.99 at perfect collapse, and 1 if features are not normalised.
        rotation: ``"haar"`` or ``"canonical"``, as in :func:`ncmethods.frames.simplex_etf`.
        generator: CPU generator of the rotation.

    Raises:
        InputError: dim < K − 1, or a neck that does not fit.

    References:
        Yang et al., NeurIPS 2022, arXiv:2203.09081: a classifier fixed to a simplex ETF. The
        default scale is ours; it follows from the cosine −1/(K−1) and softmax.
    """
    frame = simplex_etf(
        num_classes,
        in_features if dim is None else dim,
        rotation=rotation,
        generator=generator,
        dtype=torch.get_default_dtype(),
    )
    if scale is None:
        scale = default_scale(num_classes) if normalize else 1.0
    return FixedHead(frame, in_features, neck=neck, normalize=normalize, scale=scale)
