"""The two halves that every head has: a neck and a geometry."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncmethods._core import InputError, check_choice, check_num_classes, no_autocast


class ResidualNeck(nn.Module):
    """Two hidden layers of twice the width with LayerNorm, beside a linear path, no last bias.

    Nothing in it depends on the batch: it can be trained alone on few features.

    References:
        Yang et al., ICLR 2023, arXiv:2302.03004 (the projection of NC-FSCIL, by its code).
    """

    def __init__(self, in_features: int, dim: int) -> None:
        super().__init__()
        hidden = 2 * in_features
        self.deep = nn.Sequential(
            nn.Linear(in_features, hidden),
            nn.LayerNorm(hidden),
            nn.LeakyReLU(0.1),
            nn.Linear(hidden, hidden),
            nn.LayerNorm(hidden),
            nn.LeakyReLU(0.1),
            nn.Linear(hidden, dim, bias=False),
        )
        self.straight = nn.Linear(in_features, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[M, in_features] → [M, dim]."""
        out: Tensor = self.deep(x) + self.straight(x)
        return out


def make_neck(neck: str | nn.Module | None, in_features: int, dim: int) -> nn.Module:
    """The module between backbone and rows: [M, in_features] → [M, dim].

    ``None`` is the identity, ``"bn"`` BatchNorm1d (after a bias-free Linear where the width
    changes), ``"linear"`` a Linear, ``"mlp"`` Linear, ReLU, Linear with ``in_features`` hidden
    units, ``"residual"`` a :class:`ResidualNeck`. A module of your own is taken as it is. Call it
    through :func:`through_neck`.

    Raises:
        InputError: an unknown neck, or no neck although the width changes.
    """
    if isinstance(neck, nn.Module):
        return neck
    check_choice(str(neck), ("bn", "linear", "mlp", "residual", "None"), "neck")
    if neck == "linear":
        return nn.Linear(in_features, dim)
    if neck == "mlp":
        return nn.Sequential(
            nn.Linear(in_features, in_features), nn.ReLU(), nn.Linear(in_features, dim)
        )
    if neck == "residual":
        return ResidualNeck(in_features, dim)
    if neck == "bn":
        norm = nn.BatchNorm1d(dim)
        return (
            norm
            if dim == in_features
            else nn.Sequential(nn.Linear(in_features, dim, bias=False), norm)
        )
    if dim != in_features:
        raise InputError(
            f"Without a neck, dim must equal in_features = {in_features}, got {dim}. "
            "Use neck='bn' or neck='linear' to change the width."
        )
    return nn.Identity()


def channel_axis(x: Tensor) -> int:
    """Where the channels of a head's input are: axis 1 of maps and volumes, else the last axis.

    [N, D] vectors, [N, T, D] tokens, [N, D, H, W] maps, [N, D, T, H, W] volumes.
    """
    return 1 if x.ndim >= 4 else -1


def through_neck(neck: nn.Module, x: Tensor, in_features: int) -> Tensor:
    """``neck`` on the channels of ``x``; every other axis is one of samples.

    A BatchNorm neck takes its statistics over all other axes. It sees a matrix [M, in_features]
    whatever the input, so ``SyncBatchNorm.convert_sync_batchnorm`` may replace it.

    Raises:
        InputError: ``x`` has another width.
    """
    axis = channel_axis(x)
    if x.shape[axis] != in_features:
        raise InputError(
            f"The head takes in_features = {in_features} on axis {axis % x.ndim} of its input, got "
            f"{tuple(x.shape)}. Channels are axis 1 of a 4-D or 5-D input, and the last axis of "
            "[N, D] and [N, T, D]."
        )
    if x.ndim <= 2 or isinstance(neck, nn.Identity):
        features: Tensor = neck(x)
        return features
    rows = x.movedim(axis, -1)
    out: Tensor = neck(rows.flatten(0, -2))
    return out.reshape(*rows.shape[:-1], out.shape[-1]).movedim(-1, axis)


def default_scale(num_classes: int) -> float:
    """Logit scale at which perfect collapse on a unit simplex gives probability 0.99.

    With unit features on unit ETF rows the margin between the true and any other logit is
    s·K/(K−1), so p = 1/(1 + (K−1)e^{−sK/(K−1)}) and p = 0.99 needs s = ((K−1)/K)·log(99(K−1)).
    """
    K = check_num_classes(num_classes)
    return (K - 1) / K * math.log(99 * (K - 1))


def frame_scale(frame: Tensor) -> float:
    """Logit scale at which every class gets probability ≥ 0.99 when features lie on their rows.

    The margin of a row is at least 1 − max cosine, so s = log(99(K−1))/(1 − max cosine). For a
    simplex that is :func:`default_scale`.

    Raises:
        InputError: two rows point the same way, or rows without values.
    """
    if frame.is_meta:
        raise InputError("The frame is on the meta device: pass scale=…, it has no values to read.")
    K, U, largest = len(frame), _unit(frame.detach().double()), -1.0
    for start in range(0, K, 1024):
        cosines = U[start : start + 1024] @ U.T
        cosines.diagonal(start).fill_(-1)
        largest = max(largest, float(cosines.amax()))
    if largest > 1 - 1e-6:
        raise InputError(
            f"Two rows of the frame coincide (cosine {largest:.6f}): no scale separates their "
            "classes. Pass a frame of different rows, or scale=… if you mean it."
        )
    return math.log(99 * (K - 1)) / (1 - largest)


def collapse_floor(num_classes: int, scale: float) -> float:
    """Cross-entropy at perfect collapse: log(1 + (K−1)e^{−sK/(K−1)}).

    Unit features on the vertices of a unit simplex. No other unit rows and features do better.
    """
    K = num_classes
    return math.log1p((K - 1) * math.exp(-scale * K / (K - 1)))


def check_scale(scale: float) -> float:
    """Return ``scale`` as a float if it is positive and finite."""
    value = float(scale)
    if not 0 < value < math.inf:
        raise InputError(f"scale must be a positive number, got {value}.")
    return value


def builder_scale(
    scale: float | None,
    num_classes: int,
    *,
    normalize: bool = True,
    quiet: bool = False,
    frame: Tensor | None = None,
) -> float:
    """The scale that a builder gives its head: ``scale``, or the default where it is None.

    The default is :func:`frame_scale` of ``frame``, :func:`default_scale` without one, and 1 where
    features are not normalised. A given scale warns where it is too small, unless ``quiet``. Call
    it from the builder itself: the warning points at the line that called that.
    """
    K = check_num_classes(num_classes)
    if scale is not None:
        if normalize and not quiet:
            warn_low_scale(K, scale, stacklevel=4)
        return scale
    if not normalize:
        return 1.0
    return default_scale(K) if frame is None else frame_scale(frame)


def check_rows(frame: Tensor) -> Tensor:
    """Return ``frame`` if it is a finite floating [K, D] matrix; meta tensors have no values."""
    if (
        frame.ndim != 2
        or not frame.is_floating_point()
        or not (frame.is_meta or bool(frame.isfinite().all()))
    ):
        raise InputError(
            "frame must be a finite floating [K, D] matrix of rows, got "
            f"{frame.dtype} {tuple(frame.shape)}."
        )
    return frame


def warn_low_scale(num_classes: int, scale: float, *, stacklevel: int = 3) -> None:
    """Warn when ``scale`` leaves even perfect collapse unsure.

    The rule: the floor of cross-entropy exceeds log 2 (the true class gets p < 1/2), or, for two
    or three classes, half of log K (the loss of guessing).
    """
    floor = collapse_floor(num_classes, check_scale(scale))
    if floor > min(math.log(2), math.log(num_classes) / 2):
        warnings.warn(
            f"scale={scale:.4g} is too small for {num_classes} classes: with unit features and "
            f"rows, cross-entropy cannot fall below {floor:.3f} (p = {math.exp(-floor):.3f} at "
            f"perfect collapse). scale={default_scale(num_classes):.3g} reaches p = 0.99 on a "
            "simplex ETF.",
            stacklevel=stacklevel,
        )


def scaled_cosine(
    features: Tensor, rows: Tensor, scale: float | Tensor, *, normalize: bool, unit_rows: bool
) -> Tensor:
    """``scale · ⟨h, w_c⟩`` [N, K], in float32 or wider whatever autocast says.

    Maps [N, D, H, W] give [N, K, H, W] and tokens [N, T, D] give [N, T, K]; see
    :func:`channel_axis`.

    Raises:
        InputError: features and rows of different D.
    """
    axis = channel_axis(features)
    if features.shape[axis] != rows.shape[-1]:
        raise InputError(
            f"features must have D = {rows.shape[-1]} on axis {axis % features.ndim}, as the rows "
            f"have, got {tuple(features.shape)}. Pass what head.embed(x) returns."
        )
    dtype = torch.promote_types(features.dtype, torch.float32)
    with no_autocast(features.device):
        h, W = features.to(dtype).movedim(axis, -1), rows.to(dtype)
        if normalize:
            h = _unit(h)
        if unit_rows:
            W = _unit(W)
        if isinstance(scale, Tensor):
            scale = scale.to(dtype)
        return (scale * F.linear(h, W)).movedim(-1, axis)


def _unit(x: Tensor) -> Tensor:
    """Rows scaled to unit norm; a zero row stays zero and gets no gradient.

    ``F.normalize`` would give it one of 1e12: one dead sample behind a ReLU ends the training.
    """
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    unit: Tensor = x / length.masked_fill(length == 0, torch.inf)
    return unit


class ScaledHead(nn.Module):
    """What the heads with logits ``scale · ⟨h, w_c⟩`` share: a neck and a positive scale.

    A learned scale is stored as its logarithm, the parameter ``log_scale`` [].
    """

    bias: None = None
    log_scale: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        dim: int,
        *,
        neck: str | nn.Module | None,
        scale: float,
        learn_scale: bool,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, check_num_classes(num_classes)
        self.neck = make_neck(neck, in_features, dim)
        self.register_parameter("log_scale", nn.Parameter(torch.zeros(())) if learn_scale else None)
        self.scale = scale

    @property
    def scale(self) -> float | Tensor:
        """Factor on the logits: a float, or a tensor [] with its gradient where it is learned."""
        return self._scale if self.log_scale is None else self.log_scale.exp()

    @scale.setter
    def scale(self, value: float) -> None:
        value = check_scale(value)
        if self.log_scale is None:
            self._scale = value
        else:
            with torch.no_grad():
                self.log_scale.fill_(math.log(value))

    def embed(self, x: Tensor) -> Tensor:
        """Features [N, D] of the backbone's output [N, in_features].

        Also [N, T, in_features] → [N, T, D] and [N, in_features, H, W] → [N, D, H, W].
        """
        return through_neck(self.neck, x, self.in_features)

    def logits(self, features: Tensor) -> Tensor:
        """Logits [N, K] of features [N, D]."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, K] of the backbone's output [N, in_features]; maps give maps."""
        return self.logits(self.embed(x))

    def scale_repr(self) -> str:
        """The scale for ``extra_repr``."""
        return f"scale={self._scale:.4g}" if self.log_scale is None else "scale=learned"
