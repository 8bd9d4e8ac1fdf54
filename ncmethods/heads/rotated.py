"""A frame whose shape is fixed and whose rotation is learned."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ncmethods._core import InputError, no_autocast
from ncmethods.frames import simplex_etf
from ncmethods.heads._base import ScaledHead, builder_scale, check_rows, scaled_cosine

__all__ = ["RotatedHead", "rotated_head"]


class DerivedHead(ScaledHead):
    """A head whose ``weight`` [K, D] is computed from its parameters.

    A ``state_dict`` carries the computed rows as well, so a plain ``nn.Linear`` can take them. They
    are left out when it is loaded, for they follow from the rest.
    """

    @property
    def weight(self) -> Tensor:
        """Rows [K, D]."""
        raise NotImplementedError

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        state_dict.pop(f"{prefix}weight", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class RotatedHead(DerivedHead):
    """A classifier whose rows are a given frame, turned by a rotation that is learned.

    The frame is F = C·Bᵀ with B [D, r] an orthonormal basis of the space that its rows span. The
    rows are ``weight = C·Vᵀ``, V [D, r] the Q factor of the parameter ``basis`` [D, r]. V has
    orthonormal columns whatever an optimizer does to ``basis``, so norms and cosines of the rows
    stay those of the frame, and every rotation of it can be reached. V does not depend on the
    length of ``basis``: weight decay changes the size of the next step, not the rows.

    Args:
        frame: rows [K, D], finite, not all zero; where training starts.
        in_features: width of the backbone.
        neck: ``"bn"``, ``"linear"``, ``"mlp"``, a module of your own, or None.
        normalize: scale features to unit norm before the rows act on them.
        scale: factor on the logits, positive.
        learn_scale: train the scale; it starts at ``scale`` and stays positive.

    Raises:
        InputError: a frame that is not a finite floating [K, D] matrix, or a bad neck or scale.
    """

    coordinates: Tensor

    def __init__(
        self,
        frame: Tensor,
        in_features: int,
        *,
        neck: str | nn.Module | None = "bn",
        normalize: bool = True,
        scale: float = 1.0,
        learn_scale: bool = False,
    ) -> None:
        K, D = check_rows(frame).shape
        if not bool(frame.any()):
            raise InputError("frame must be rows [K, D] that are not all zero: nothing to turn.")
        super().__init__(in_features, K, D, neck=neck, scale=scale, learn_scale=learn_scale)
        self.normalize = normalize
        F = frame.detach().double()
        _, S, Bt = torch.linalg.svd(F, full_matrices=False)
        r = int(S.gt(max(K, D) * torch.finfo(frame.dtype).eps * S[0]).sum())
        self.basis = nn.Parameter(Bt[:r].T.to(frame.dtype).contiguous())  # [D, r]
        self.register_buffer("coordinates", (F @ Bt[:r].T).to(frame.dtype))  # C [K, r]

    @property
    def weight(self) -> Tensor:
        """Rows [K, D], with their gradient to the rotation."""
        P, C = self.basis, self.coordinates
        dtype = torch.promote_types(P.dtype, torch.float32)
        with no_autocast(P.device):
            Q, R = torch.linalg.qr(P.to(dtype))
            rows: Tensor = C.to(dtype) @ (Q * R.diagonal().sgn()).T
        return rows.to(P.dtype)

    def logits(self, features: Tensor) -> Tensor:
        """Logits [N, K] of features [N, D], float32 also under autocast."""
        return scaled_cosine(
            features, self.weight, self.scale, normalize=self.normalize, unit_rows=False
        )

    def extra_repr(self) -> str:
        """Shape and geometry for ``print(model)``."""
        (K, r), D = self.coordinates.shape, len(self.basis)
        return (
            f"{K} rows of rank {r} in R^{D}, learned rotation, normalize={self.normalize}, "
            f"{self.scale_repr()}"
        )


def rotated_head(
    in_features: int,
    num_classes: int,
    *,
    frame: Tensor | None = None,
    dim: int | None = None,
    neck: str | nn.Module | None = "bn",
    normalize: bool = True,
    scale: float | None = None,
    learn_scale: bool = False,
    generator: torch.Generator | None = None,
) -> RotatedHead:
    """Classifier head with the geometry of a frame and directions that are learned.

    The angles between the rows are exact before and after every optimizer step, while the whole
    frame turns towards the features.

    Args:
        in_features: width of the backbone.
        num_classes: K.
        frame: rows [K, D] to turn; a simplex ETF if None.
        dim: D of the simplex ETF; ``in_features`` if None. Must be at least K − 1.
        neck: as in :func:`ncmethods.heads.etf_head`.
        normalize: scale features to unit norm, so that logits are scaled cosines.
        scale: factor on the logits; ((K−1)/K)·log(99(K−1)) if None, and 1 if features are not
            normalised.
        learn_scale: train the scale, from that value.
        generator: CPU generator of the rotation that training starts from.

    Raises:
        InputError: dim < K − 1; a frame of another K, or beside ``dim``; a neck or scale that does
            not fit.

    References:
        Gao et al., ICML 2023, PMLR 202:27542–27563 (orthogonal matrices learn the directions
        of an ETF). The parametrisation is ours.
    """
    if frame is None:
        frame = simplex_etf(
            num_classes,
            in_features if dim is None else dim,
            generator=generator,
            dtype=torch.get_default_dtype(),
        )
    elif dim is not None or frame.ndim != 2 or len(frame) != num_classes:
        raise InputError(
            f"frame must be [num_classes, D] = [{num_classes}, D] and sets D by itself, got "
            f"{tuple(frame.shape)} with dim={dim}. Leave dim out, or leave frame out."
        )
    scale = builder_scale(scale, num_classes, normalize=normalize, quiet=learn_scale)
    return RotatedHead(
        frame, in_features, neck=neck, normalize=normalize, scale=scale, learn_scale=learn_scale
    )
