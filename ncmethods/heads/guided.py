"""A simplex ETF that follows the class means: the nearest one, in closed form."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ncmethods._core import InputError, check_features, check_labels, no_autocast
from ncmethods.frames import nearest_etf, simplex_etf
from ncmethods.heads._base import (
    ScaledHead,
    _unit,
    builder_scale,
    channel_axis,
    scaled_cosine,
)

__all__ = ["GuidedHead", "guided_head"]


class FollowingHead(ScaledHead):
    """What the heads share whose rows follow moving class means.

    The state lies in two buffers: ``weight`` [K, D], and ``means`` [K, D], the moving averages, NaN
    for a class that was never seen. They are replaced, not written to, so a backward pass that is
    still to come is not disturbed. On several ranks the sums of the batch are all-reduced.
    """

    weight: Tensor
    means: Tensor
    momentum: float
    normalize = True
    differentiable = False

    @torch.no_grad()
    def observe(self, features: Tensor, labels: Tensor) -> None:
        """Move the class means towards those of a batch, and the rows with them.

        Does nothing in eval mode. Every rank must call it.

        Args:
            features: [N, D], what ``embed`` returned.
            labels: [N] int64; negative ones are left out.

        Raises:
            InputError: another D, or labels that do not fit.
        """
        if self.training:
            self._follow(features, labels)

    def logits(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits [N, K] of features [N, D], float32 also under autocast.

        With ``labels``, in training mode, the head observes the batch first.
        """
        rows = self.weight
        if labels is not None and self.training:
            with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
                rows = self._follow(features, labels)
        return scaled_cosine(features, rows, self.scale, normalize=self.normalize, unit_rows=False)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """``logits(embed(x), labels)`` of the backbone's output [N, in_features]."""
        return self.logits(self.embed(x), labels)

    def _follow(self, features: Tensor, labels: Tensor) -> Tensor:
        """The rows after this batch; they and the means become the state."""
        raise NotImplementedError

    def moved(self, features: Tensor, labels: Tensor) -> Tensor:
        """The means [K, D] after this batch."""
        return moving_means(
            self.means, features, labels, momentum=self.momentum, normalize=self.normalize
        )


class GuidedHead(FollowingHead):
    """A classifier whose rows are the simplex ETF nearest to moving class means.

    Nobody but the labels knows the class means, so the head is told about them: either
    ``head.observe(features, labels)`` after a training step's forward pass, which any loop can do,
    or ``head(x, labels)`` and ``head.logits(features, labels)``, which look before they score. In
    eval mode both leave the rows as they are; without labels it is a fixed head.

    The state lies in two buffers: ``weight`` [K, D], and ``means`` [K, D], the moving averages, NaN
    for a class that was never seen. They are replaced, not written to, so a backward pass that is
    still to come is not disturbed. On several ranks the sums of the batch are all-reduced. The
    forward pass without labels compiles in one graph; call ``observe`` outside of it.

    Args:
        in_features: width of the backbone.
        num_classes: K.
        dim: D of the rows; ``in_features`` if None. Must be at least K − 1.
        neck: ``"bn"``, ``"linear"``, ``"mlp"``, a module of your own, or None.
        normalize: scale features to unit norm, before they are averaged and scored.
        scale: factor on the logits, positive.
        learn_scale: train the scale; it starts at ``scale`` and stays positive.
        momentum: share of the old means in the new, in [0, 1).
        pull: δ ≥ 0, how strongly the rows are held to the last ones.
        differentiable: ``logits(features, labels)`` has a gradient through the rows too.
        generator: CPU generator of the ETF that training starts from.

    Raises:
        InputError: dim < K − 1, or a value out of its range.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        dim: int | None = None,
        neck: str | nn.Module | None = "bn",
        normalize: bool = True,
        scale: float = 1.0,
        learn_scale: bool = False,
        momentum: float = 0.9,
        pull: float = 1e-3,
        differentiable: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        if not 0 <= pull < float("inf"):
            raise InputError(f"pull must be a finite number ≥ 0, got {pull}.")
        dim = in_features if dim is None else dim
        frame = simplex_etf(num_classes, dim, generator=generator, dtype=torch.get_default_dtype())
        super().__init__(
            in_features, num_classes, dim, neck=neck, scale=scale, learn_scale=learn_scale
        )
        self.normalize, self.pull, self.differentiable = normalize, float(pull), differentiable
        self.momentum = check_momentum(momentum)
        self.register_buffer("weight", frame)
        self.register_buffer("means", torch.full_like(frame, torch.nan))

    def _follow(self, features: Tensor, labels: Tensor) -> Tensor:
        means = self.moved(features, labels)
        rows = nearest_etf(means, prior=self.weight if self.pull else None, weight=self.pull)
        self.means, self.weight = means.detach(), rows.detach()
        return rows

    def extra_repr(self) -> str:
        """Shape and geometry for ``print(model)``."""
        K, D = self.weight.shape
        return (
            f"{K} rows of the nearest simplex ETF in R^{D}, momentum={self.momentum:.4g}, "
            f"pull={self.pull:.4g}, normalize={self.normalize}, {self.scale_repr()}"
        )


def guided_head(
    in_features: int,
    num_classes: int,
    *,
    dim: int | None = None,
    neck: str | nn.Module | None = "bn",
    normalize: bool = True,
    scale: float | None = None,
    learn_scale: bool = False,
    momentum: float = 0.9,
    pull: float = 1e-3,
    differentiable: bool = False,
    generator: torch.Generator | None = None,
) -> GuidedHead:
    """Classifier head with the simplex ETF that lies nearest to the class means.

    Unlike a fixed ETF the frame turns towards the features, and unlike learned rows it is exact at
    every step. Call ``head.observe(features, labels)`` in every training step.

    Args:
        in_features: width of the backbone.
        num_classes: K.
        dim: D of the rows; ``in_features`` if None. Must be at least K − 1.
        neck: as in :func:`ncmethods.heads.etf_head`.
        normalize: scale features to unit norm, before they are averaged and scored.
        scale: factor on the logits; ((K−1)/K)·log(99(K−1)) if None, and 1 if features are not
            normalised.
        learn_scale: train the scale, from that value.
        momentum: share of the old class means in the new; 0 takes those of the batch.
        pull: δ of the term (δ/2)‖P − P₀‖² that holds the frame to the last one. It also decides
            directions that the means leave open. 0 leaves it out.
        differentiable: let ``head(x, labels)`` have a gradient through the rows as well.
        generator: CPU generator of the ETF that training starts from.

    Raises:
        InputError: dim < K − 1, or a neck, scale, momentum or pull that does not fit.

    References:
        Markou, Ajanthan, Gould, NeurIPS 2024, arXiv:2411.01248.
    """
    scale = builder_scale(scale, num_classes, normalize=normalize, quiet=learn_scale)
    return GuidedHead(
        in_features,
        num_classes,
        dim=dim,
        neck=neck,
        normalize=normalize,
        scale=scale,
        learn_scale=learn_scale,
        momentum=momentum,
        pull=pull,
        differentiable=differentiable,
        generator=generator,
    )


def check_momentum(momentum: float) -> float:
    """Return ``momentum`` if it lies in [0, 1)."""
    if not 0 <= momentum < 1:
        raise InputError(f"momentum must lie in [0, 1), got {momentum}.")
    return float(momentum)


def moving_means(
    means: Tensor, features: Tensor, labels: Tensor, *, momentum: float, normalize: bool
) -> Tensor:
    """Moving averages [K, D] of the class means after one batch, over all ranks.

    A class that comes for the first time takes its batch mean; one that is absent keeps what it
    has, or NaN. Rows with a negative label and rows that are not finite are left out.

    Args:
        means: before [K, D], NaN for a class that was never seen.
        features: [N, D]; maps [N, D, H, W] with labels [N, H, W].
        labels: [N] int64.
        momentum: share of ``means`` in the result.
        normalize: average unit vectors.

    Raises:
        InputError: features of another D, or labels that do not fit.
    """
    K, D = means.shape
    h = features.movedim(channel_axis(features), -1).flatten(0, -2)
    h = check_features(h, D)
    y = check_labels(labels.flatten(), len(h), K)
    with no_autocast(h.device):
        if normalize:
            h = _unit(h)
        keep = (y >= 0) & h.isfinite().all(1)
        h = torch.where(keep[:, None], h, 0.0)
        sums = h.new_zeros(K, D + 1).index_add(
            0, y.clamp(min=0), torch.cat([h, keep[:, None].to(h)], 1)
        )
        sums = _over_ranks(sums)
        n, old = sums[:, D:], means.to(h.dtype)
        batch = sums[:, :D] / n.clamp(min=1)
        mixed = torch.lerp(batch, torch.where(old.isnan(), batch, old), momentum)
        return torch.where(n > 0, mixed, old).to(means.dtype)


def _over_ranks(sums: Tensor) -> Tensor:
    """Sum over the ranks of a distributed run, with its gradient where one is asked for."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return sums
    if sums.requires_grad:
        from torch.distributed.nn.functional import all_reduce

        total: Tensor = all_reduce(sums)  # type: ignore[no-untyped-call]
        return total
    dist.all_reduce(sums)
    return sums
