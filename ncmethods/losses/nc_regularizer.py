"""Regularisers for NC1 and NC2: features to centres, and centres far from each other."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncmethods._core import (
    InputError,
    check_choice,
    check_features,
    check_labels,
    check_num_classes,
    no_autocast,
)
from ncmethods.losses._class_means import class_means

__all__ = ["CentreRegularizer", "live_centres", "nc1_centres", "nc2_max_min_angle"]

MODES = ("v0", "v1", "v2")
LIMIT = 0.99999  # of a cosine: beyond it acos has no usable gradient
TILE = 2048


def nc1_centres(features: Tensor, labels: Tensor, centres: Tensor) -> Tensor:
    """Mean squared distance of the features from the centre of their class, each class alike.

    (1/K) Σ_c (1/b_c) Σ_{i ∈ c} ‖h_i − μ_c‖², b_c samples of class c in the batch. A class without
    samples adds 0, and K counts it.

    Args:
        features: [N, D].
        labels: int64 [N]; negative labels are left out.
        centres: μ [K, D]; they get a gradient too if they ask for one.

    Returns:
        loss [].

    Raises:
        InputError: shapes that do not fit, or labels ≥ K.

    References:
        Liu et al., AISTATS 2023, arXiv:2302.12453, as their code has it.
    """
    h = check_features(features)
    mu = _check_centres(centres, h.shape[1])
    K = len(mu)
    y = check_labels(labels, len(h), K)
    known, y = y >= 0, y.clamp(min=0)
    with no_autocast(h.device):
        dtype = torch.promote_types(h.dtype, mu.dtype)
        h = torch.where(known[:, None], h, 0.0).to(dtype)
        gap = (h - mu.to(dtype)[y]).square().sum(1) * known  # [N]
        counts = h.new_zeros(K).index_add(0, y, known.to(dtype))
        loss: Tensor = (gap / counts.clamp(min=1)[y]).sum() / K
    return loss


def nc2_max_min_angle(centres: Tensor, *, mode: str = "v0") -> Tensor:
    """Minus the angle between centres, seen from their mean: lowest at a simplex ETF.

    Only ``centres`` get a gradient. Where they are parameters, as with Liu et al., no gradient
    reaches the features: those follow through :func:`nc1_centres`.

    Args:
        centres: [K, D], K ≥ 2.
        mode: ``"v0"`` minus the mean over classes of the angle to the nearest other class;
            ``"v1"`` minus the smallest of all angles; ``"v2"`` the Frobenius norm of the cosines
            with −1/(K−1) on the diagonal, which asks for right angles. Radians; cosines are clamped
            to ±0.99999, so centres that lie in one direction get no gradient in v0 and v1.

    Returns:
        loss [].

    Raises:
        InputError: fewer than two centres, or an unknown mode.

    References:
        Liu et al., AISTATS 2023, arXiv:2302.12453, as their code has it.
    """
    check_choice(mode, MODES, "mode")
    mu = _check_centres(centres)
    if len(mu) < 2:
        raise InputError(f"An angle needs two centres, got {tuple(mu.shape)}.")
    with no_autocast(mu.device):
        return _angle(mu - mu.mean(0), None, mode)


def live_centres(
    features: Tensor,
    labels: Tensor,
    *,
    nc1: float = 0.01,
    nc2: float = 0.1,
    mean: float = 0.0,
    mode: str = "v0",
) -> Tensor:
    """The same regularisers on the class means of the batch: their gradient reaches the features.

    nc1 · mean_c mean_i ‖h_i − m_c‖² + nc2 · NC2(m) + mean · ‖m̄‖² over the U classes of the batch.
    NC2 needs two classes and is 0 with one. This form is ours.

    Args:
        features: [N, D].
        labels: int64 [N]; negative labels are left out.
        nc1: weight of the distance from the class mean.
        nc2: weight of :func:`nc2_max_min_angle`.
        mean: weight of the squared norm of the mean of the class means.
        mode: as in :func:`nc2_max_min_angle`.

    Returns:
        loss [].

    Raises:
        InputError: shapes that do not fit, or an unknown mode.
    """
    check_choice(mode, MODES, "mode")
    with no_autocast(features.device):
        batch = class_means(features, labels)
        centre = batch.means.sum(0) / batch.classes.clamp(min=1)
        loss = nc1 * batch.average(batch.spread()) + mean * centre.square().sum()
        return loss + nc2 * _angle(batch.centred(), batch.present, mode)


class CentreRegularizer(nn.Module):
    """NC1 and NC2 regularisers with centres that are learned beside the network.

    ``forward(features, labels)`` is nc1·NC1 + nc2·NC2 + mean·‖μ̄‖². The features feel NC1 alone:
    they follow the centres, and the centres are driven apart. Give ``param_group()`` to the
    optimizer; the centres travel in the ``state_dict``.

    Args:
        num_classes: K.
        dim: D of the features.
        nc1: λ₁, weight of :func:`nc1_centres`.
        nc2: λ₂, weight of :func:`nc2_max_min_angle`.
        mean: λ₃, weight of the squared norm of the mean of the centres.
        mode: as in :func:`nc2_max_min_angle`.
        generator: of the initial centres, N(0, 1) in every coordinate.

    Raises:
        InputError: K < 2, D < 1, a negative or infinite weight, or an unknown mode.

    References:
        Liu et al., AISTATS 2023, arXiv:2302.12453; constants from their code.
    """

    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        nc1: float = 0.01,
        nc2: float = 0.1,
        mean: float = 0.0,
        mode: str = "v0",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_num_classes(num_classes)
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
            raise InputError(f"dim must be an integer ≥ 1, the width of the features, got {dim!r}.")
        for name, value in (("nc1", nc1), ("nc2", nc2), ("mean", mean)):
            if not (value >= 0 and math.isfinite(value)):
                raise InputError(f"{name} must be a finite number ≥ 0, got {value}.")
        self.nc1, self.nc2, self.mean = float(nc1), float(nc2), float(mean)
        self.mode = check_choice(mode, MODES, "mode")
        self.centres = nn.Parameter(torch.randn(num_classes, dim, generator=generator))

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """The regulariser [] of features [N, D] with int64 labels [N]."""
        loss = self.nc1 * nc1_centres(features, labels, self.centres)
        loss = loss + self.nc2 * nc2_max_min_angle(self.centres, mode=self.mode)
        if self.mean:
            with no_autocast(features.device):
                loss = loss + self.mean * self.centres.mean(0).square().sum()
        return loss

    def param_group(self, lr: float = 0.5) -> dict[str, Any]:
        """The centres as a group for ``torch.optim.SGD``, with the published step.

        The authors divide the gradient of the centres, the NC2 part included, by λ₁ and take plain
        SGD steps of 0.5. In one optimizer that is the learning rate lr/λ₁ without momentum and
        decay. A schedule of the optimizer scales it too; theirs stays constant.

        Args:
            lr: step for the divided gradient.

        Raises:
            InputError: nc1 is 0: then nothing ties the centres to the features.
        """
        if not self.nc1:
            raise InputError("nc1 is 0: the centres would be driven apart without any feature.")
        step = {"lr": lr / self.nc1, "momentum": 0.0, "weight_decay": 0.0, "nesterov": False}
        return {"params": [self.centres], **step}

    def extra_repr(self) -> str:
        """Shape and weights for ``print``."""
        K, D = self.centres.shape
        return f"{K} centres in R^{D}, nc1={self.nc1:g}, nc2={self.nc2:g}, mean={self.mean:g}"


def _check_centres(centres: Tensor, dim: int | None = None) -> Tensor:
    if (
        not isinstance(centres, Tensor)
        or centres.ndim != 2
        or not centres.is_floating_point()
        or (dim is not None and centres.shape[1] != dim)
    ):
        width = "" if dim is None else f" with D = {dim} as the features have"
        got = f"{centres.dtype} {tuple(centres.shape)}" if isinstance(centres, Tensor) else centres
        raise InputError(f"centres must be floating [K, D]{width}, got {got}.")
    return centres if centres.dtype == torch.float64 else centres.float()


def _angle(centred: Tensor, present: Tensor | None, mode: str) -> Tensor:
    """NC2 of centred rows [K, D], of those ``present``; 0 if they are fewer than two."""
    U = F.normalize(centred, dim=1)
    if not len(U):
        return U.sum()
    if present is None:
        present = torch.ones(len(U), dtype=torch.bool, device=U.device)
    K = present.sum().to(U.dtype)
    enough = K >= 2
    if mode == "v2":
        gram = U.T @ U if len(U) > U.shape[1] else U @ U.T
        off = gram.square().sum() - U.square().sum(1).square().sum()  # without the diagonal
        diagonal = K / (K - 1).clamp(min=1).square()
        return torch.where(enough, off.clamp(min=0) + diagonal, 1.0).sqrt() * enough
    nearest = _nearest(U.detach(), present)
    cosine = (U * U[nearest]).sum(1)
    if mode == "v1":
        cosine = cosine.masked_fill(~present, -2).max()
        angle = cosine.clamp(-LIMIT, LIMIT).acos()
    else:
        angles = cosine.clamp(-LIMIT, LIMIT).acos()
        angle = torch.where(present, angles, 0.0).sum() / K.clamp(min=1)
    return -angle * enough


@torch.no_grad()
def _nearest(U: Tensor, present: Tensor) -> Tensor:
    """Index [K] of the other row with the largest cosine; of itself where there is none."""
    found = []
    for start in range(0, len(U), TILE):
        cosine = U[start : start + TILE] @ U.T  # [T, K]
        cosine = cosine.masked_fill(~present, -2)
        cosine.diagonal(start).fill_(-2)
        found.append(cosine.argmax(1))
    return torch.cat(found)
