"""Heads whose rows are a fixed frame: the simplex ETF head, and one for any frame."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ncmethods._core import InputError, check_counts, check_num_classes
from ncmethods.frames import simplex_etf
from ncmethods.heads._base import ScaledHead, builder_scale, check_rows, scaled_cosine

__all__ = ["FixedHead", "class_lengths", "etf_head", "frame_head"]


class FixedHead(ScaledHead):
    """A classifier whose rows are a frame that training does not move.

    ``forward(x) = logits(embed(x))``: ``embed`` is the neck, ``logits`` the geometry. ``weight`` is
    a persistent buffer, so optimizers never see it and a ``state_dict`` carries it; with
    ``neck=None`` the state is that of ``nn.Linear(bias=False)``. The state of an ``nn.Linear`` with
    a bias is refused, also with ``strict=False``: its rows would take the place of the frame.

    Args:
        frame: rows [K, D], finite. Their lengths are kept: a longer row has larger logits.
        in_features: width of the backbone.
        neck: ``"bn"``, ``"linear"``, ``"mlp"``, a module of your own, or None.
        normalize: scale features to unit norm before the rows act on them.
        scale: factor on the logits, positive.
        learn_scale: train the scale; it starts at ``scale`` and stays positive.
        as_parameter: keep the rows as a parameter without gradient instead of a buffer. DDP
            broadcasts buffers in every forward pass and FSDP does not shard them; for huge K.

    Raises:
        InputError: a frame that is not a finite floating [K, D] matrix, or a bad neck or scale.
    """

    weight: Tensor

    def __init__(
        self,
        frame: Tensor,
        in_features: int,
        *,
        neck: str | nn.Module | None = "bn",
        normalize: bool = True,
        scale: float = 1.0,
        learn_scale: bool = False,
        as_parameter: bool = False,
    ) -> None:
        K, D = check_rows(frame).shape
        super().__init__(in_features, K, D, neck=neck, scale=scale, learn_scale=learn_scale)
        self.normalize = normalize
        rows = frame.detach().clone()
        if as_parameter:
            self.weight = nn.Parameter(rows, requires_grad=False)
        else:
            self.register_buffer("weight", rows)

    def logits(self, features: Tensor) -> Tensor:
        """Logits [N, K] of features [N, D], float32 also under autocast."""
        return scaled_cosine(
            features, self.weight, self.scale, normalize=self.normalize, unit_rows=False
        )

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if f"{prefix}bias" in state_dict:
            raise InputError(
                f"{prefix}weight and {prefix}bias are the state of an nn.Linear: loading them "
                "would replace the fixed rows by learned ones. Remove both keys to keep the frame."
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Shape and geometry for ``print(model)``."""
        K, D = self.weight.shape
        return f"{K} fixed rows in R^{D}, normalize={self.normalize}, {self.scale_repr()}"


def class_lengths(counts: Tensor) -> Tensor:
    """Lengths √(γ/n_c) for the rows of the classes, γ the mean of the counts: rare means long.

    A class without samples has length 1 and does not enter the mean.

    Args:
        counts: training samples per class [K].

    Returns:
        lengths [K], float32.

    References:
        The rule of NC-FSCIL's released head (``with_len``), which counts the labels of each batch
        and stretches only the targets of its loss, not the rows that score a test image.
    """
    n = check_counts(counts).double()
    mean = n.sum() / (n > 0).sum()
    return torch.where(n > 0, mean / n.clamp(min=1), 1.0).sqrt().float()


def etf_head(
    in_features: int,
    num_classes: int,
    *,
    dim: int | None = None,
    neck: str | nn.Module | None = "bn",
    normalize: bool = True,
    scale: float | None = None,
    learn_scale: bool = False,
    lengths: Tensor | None = None,
    rotation: str = "haar",
    as_parameter: bool = False,
    generator: torch.Generator | None = None,
) -> FixedHead:
    """Classifier head with the rows of a fixed simplex ETF.

    A BatchNorm neck stands before the rows by default: features after a ReLU cannot reach a rotated
    ETF (their cosine stops at 0.707).

    Args:
        in_features: width of the backbone.
        num_classes: K.
        dim: D of the rows; ``in_features`` if None. Must be at least K − 1.
        neck: ``"bn"``; ``"linear"``; ``"mlp"``, which is Linear, ReLU, Linear with ``in_features``
            hidden units; a module of your own; or None (the rows act on the backbone's output).
        normalize: scale features to unit norm, so that logits are scaled cosines.
        scale: factor on the logits; ((K−1)/K)·log(99(K−1)) if None, which lets cross-entropy
            reach probability 0.99 at perfect collapse, and 1 if features are not normalised.
        learn_scale: train the scale, from that value.
        lengths: of the rows [K], e.g. :func:`class_lengths`; 1 if None.
        rotation: ``"haar"`` or ``"canonical"``, as in :func:`ncmethods.frames.simplex_etf`.
        as_parameter: keep the rows as a frozen parameter instead of a buffer; see
            :class:`FixedHead`.
        generator: CPU generator of the rotation.

    Raises:
        InputError: dim < K − 1, or a neck, scale or lengths that do not fit.

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
    quiet = learn_scale or lengths is not None
    scale = builder_scale(scale, num_classes, normalize=normalize, quiet=quiet)
    return FixedHead(
        _stretch(frame, lengths),
        in_features,
        neck=neck,
        normalize=normalize,
        scale=scale,
        learn_scale=learn_scale,
        as_parameter=as_parameter,
    )


def frame_head(
    in_features: int,
    num_classes: int,
    *,
    frame: Tensor | Callable[..., Tensor],
    dim: int | None = None,
    neck: str | nn.Module | None = "bn",
    normalize: bool = True,
    scale: float | None = None,
    learn_scale: bool = False,
    lengths: Tensor | None = None,
    as_parameter: bool = False,
    generator: torch.Generator | None = None,
) -> FixedHead:
    """Classifier head with the rows of any fixed frame.

    Args:
        in_features: width of the backbone.
        num_classes: K.
        frame: unit rows [K, D], or a function of :mod:`ncmethods.frames` or of your own, called as
            ``frame(num_classes, dim)``, with ``generator=`` where one is given.
        dim: D that a function is asked for; ``in_features`` if None. A tensor brings its own.
        neck: as in :func:`etf_head`. Non-negative frames suit features after a ReLU: use None.
        normalize: scale features to unit norm, so that logits are scaled cosines.
        scale: factor on the logits; log(99(K−1))/(1 − max cosine) if None, which gives every class
            probability 0.99 or more when features lie on their rows (all pairs are compared, in
            tiles), and 1 if features are not normalised.
        learn_scale: train the scale, from that value.
        lengths: of the rows [K], e.g. :func:`class_lengths`; 1 if None.
        as_parameter: keep the rows as a frozen parameter instead of a buffer; see
            :class:`FixedHead`.
        generator: CPU generator for a function.

    Raises:
        InputError: a frame that is not finite or not [num_classes, dim], rows that have not unit
            length or coincide, or a neck, scale or lengths that do not fit.
    """
    K = check_num_classes(num_classes)
    if isinstance(frame, Tensor):
        rows, D = frame, frame.shape[-1] if dim is None else dim
    else:
        D = in_features if dim is None else dim
        rows = frame(K, D) if generator is None else frame(K, D, generator=generator)
    if tuple(rows.shape) != (K, D):
        raise InputError(
            f"The frame must be [num_classes, dim] = {(K, D)}, got {tuple(rows.shape)}."
        )
    rows = _unit_frame(rows).to(torch.get_default_dtype())
    quiet = learn_scale or lengths is not None
    scale = builder_scale(scale, K, normalize=normalize, quiet=quiet, frame=rows)
    return FixedHead(
        _stretch(rows, lengths),
        in_features,
        neck=neck,
        normalize=normalize,
        scale=scale,
        learn_scale=learn_scale,
        as_parameter=as_parameter,
    )


def _unit_frame(rows: Tensor) -> Tensor:
    """``rows`` if they are finite and of unit norm to 1e-3 (bfloat16: what its grid allows)."""
    if rows.is_meta:
        return rows
    if not rows.is_floating_point() or not bool(rows.isfinite().all()):
        raise InputError(f"The frame must be floating and finite, got {rows.dtype}: {rows}.")
    norms = torch.linalg.vector_norm(rows.detach().double(), dim=1)
    if float((norms - 1).abs().max()) > max(1e-3, 4 * torch.finfo(rows.dtype).eps):
        raise InputError(
            f"The rows of a frame have unit length, got {float(norms.min()):.4g} to "
            f"{float(norms.max()):.4g}. Pass F.normalize(frame, dim=1), and lengths=… for rows of "
            "different lengths."
        )
    return rows


def _stretch(frame: Tensor, lengths: Tensor | None) -> Tensor:
    """Rows of the given lengths [K]."""
    if lengths is None:
        return frame
    lengths = torch.as_tensor(lengths, dtype=frame.dtype, device=frame.device)
    positive = lengths.is_meta or bool(((lengths > 0) & (lengths < torch.inf)).all())
    if lengths.shape != frame.shape[:1] or not positive:
        raise InputError(
            f"lengths must be {len(frame)} positive numbers, one per class, got "
            f"{lengths.tolist() if lengths.numel() <= 8 else tuple(lengths.shape)}."
        )
    return lengths[:, None] * frame
