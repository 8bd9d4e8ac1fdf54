"""A linear classifier that is told the shortcut while it trains, and not when it is used."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncmethods._core import InputError, check_labels, no_autocast
from ncmethods.frames import simplex_etf
from ncmethods.heads._base import ScaledHead, channel_axis, scaled_cosine

__all__ = ["PrimeHead", "prime_head"]


class PrimeHead(ScaledHead):
    """A bias-free linear classifier of [h; v_a], v_a the prime of the sample's bias attribute.

    ``weight`` [K, D] acts on the features, ``prime_weight`` [K, D] on the primes, a frozen simplex
    ETF ``primes`` [A, D] with a vertex for each attribute. In eval mode, and without an attribute,
    the prime is zero: what remains is a plain linear layer with ``weight``.

    Args:
        in_features: width of the backbone.
        num_classes: K.
        num_attributes: A ≤ K; attribute a is the shortcut to class a.
        dim: D; ``in_features`` if None. Must be at least A − 1.
        neck: ``"bn"``, ``"linear"``, ``"mlp"``, a module of your own, or None.
        generator: CPU generator of the primes and of the first rows.

    Raises:
        InputError: A < 2 or A > K, dim < A − 1, or a neck that does not fit.
    """

    primes: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        num_attributes: int,
        dim: int | None = None,
        neck: str | nn.Module | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        D = in_features if dim is None else dim
        super().__init__(in_features, num_classes, D, neck=neck, scale=1.0, learn_scale=False)
        if num_attributes > num_classes:
            raise InputError(
                f"num_attributes must be ≤ num_classes = {num_classes}, for attribute a is the "
                f"shortcut to class a, got {num_attributes}."
            )
        primes = simplex_etf(
            num_attributes, D, generator=generator, dtype=torch.get_default_dtype()
        )
        self.register_buffer("primes", primes)
        # As nn.Linear(2·D, K) begins.
        both = torch.rand(2, num_classes, D, generator=generator) * 2 - 1
        self.weight, self.prime_weight = (nn.Parameter(w / math.sqrt(2 * D)) for w in both)

    def logits(self, features: Tensor, attribute: Tensor | None = None) -> Tensor:
        """Logits [N, K] of features [N, D], float32 also under autocast.

        Args:
            features: [N, D].
            attribute: [N] int64, bias attribute of each sample; used in training mode only.
                Negative: unknown, no prime.

        Raises:
            InputError: attributes ≥ A, or of another length.
        """
        z = scaled_cosine(features, self.weight, self.scale, normalize=False, unit_rows=False)
        if attribute is None or not self.training:
            return z
        a = check_labels(attribute, len(features), len(self.primes))
        shift = torch.where((a >= 0)[:, None], self._shifts()[a.clamp(min=0)], 0.0)  # [N, K]
        return z + shift.reshape(len(z), *[1] * (z.ndim - 2), -1).movedim(-1, channel_axis(z))

    def forward(self, x: Tensor, attribute: Tensor | None = None) -> Tensor:
        """``logits(embed(x), attribute)`` of the backbone's output [N, in_features]."""
        return self.logits(self.embed(x), attribute)

    def prime_loss(self, attribute: Tensor) -> Tensor:
        """The second loss: cross-entropy of what the prime adds to the logits, to its attribute.

        CE(W[h; v_a] − W[h; 0], a) = CE(W₂v_a, a): it trains ``prime_weight`` to read the shortcut
        off the prime, and has no gradient in the features.

        Args:
            attribute: [N] int64; negative ones are left out.

        Returns:
            Mean over the samples [], 0 if there are none.

        Raises:
            InputError: attributes ≥ A.
        """
        a = check_labels(attribute, num_classes=len(self.primes))
        known = a >= 0
        each = F.cross_entropy(self._shifts()[a.clamp(min=0)], a.clamp(min=0), reduction="none")
        return torch.where(known, each, 0.0).sum() / known.sum().clamp(min=1)

    def _shifts(self) -> Tensor:
        """What each prime adds to the logits [A, K], in float32 or wider."""
        W = self.prime_weight
        dtype = torch.promote_types(W.dtype, torch.float32)
        with no_autocast(W.device):
            return F.linear(self.primes.to(dtype), W.to(dtype))

    def extra_repr(self) -> str:
        """Shape and geometry for ``print(model)``."""
        K, D = self.weight.shape
        return f"{K} learned rows in R^{D}, primes of {len(self.primes)} attributes"


def prime_head(
    in_features: int,
    num_classes: int,
    *,
    num_attributes: int | None = None,
    dim: int | None = None,
    neck: str | nn.Module | None = None,
    generator: torch.Generator | None = None,
) -> PrimeHead:
    """Classifier head that is primed with a known bias attribute while it trains.

    Where an attribute (the colour, the background) predicts the class in most training samples, it
    comes as an input of its own, so the features need not carry it. Train with
    ``F.cross_entropy(head(x, attribute), y) + 0.8 * head.prime_loss(attribute)``.

    Args:
        in_features: width of the backbone.
        num_classes: K.
        num_attributes: A ≤ K; K if None. Attribute a is the shortcut to class a.
        dim: D; ``in_features`` if None. Must be at least A − 1.
        neck: as in :func:`ncmethods.heads.etf_head`; none by default.
        generator: CPU generator of the primes and of the first rows.

    Raises:
        InputError: A < 2 or A > K, dim < A − 1, or a neck that does not fit.

    References:
        Wang et al., CVPR 2024, arXiv:2405.05587; the second loss as in the authors' code.
    """
    return PrimeHead(
        in_features,
        num_classes,
        num_attributes=num_classes if num_attributes is None else num_attributes,
        dim=dim,
        neck=neck,
        generator=generator,
    )
