"""SupCon with a fixed number of positives (KCL) and with class targets on the sphere (TSC)."""

from __future__ import annotations

import torch
from torch import Tensor

from ncmethods._core import InputError, check_features, check_labels, no_autocast
from ncmethods.losses._contrast import (
    attract,
    check_rows,
    check_temperature,
    same_class,
    shut,
    unit,
)

__all__ = ["k_positive_supcon", "targeted_supcon"]


def k_positive_supcon(
    features: Tensor,
    labels: Tensor,
    *,
    positives: int | None = 6,
    views: int = 1,
    keys: Tensor | None = None,
    key_labels: Tensor | None = None,
    own: Tensor | None = None,
    temperature: float = 0.07,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Supervised contrastive loss with at most k positives of its class for each anchor.

    Head and tail classes then have equally many positives. An anchor is compared with the other
    samples of the batch or, with ``keys``, with these instead (a queue, as in MoCo). Positives are
    its own other views and k entries of its class, drawn anew at every call without replacement;
    where a class has fewer, all of them. The mean is over anchors that have a positive.

    Args:
        features: [N, D].
        labels: int64 [N]; negative labels are left out.
        positives: k; None takes all of the class.
        views: how many views of each image are stacked along N, view after view (row i and row
            i + N/views show one image); an anchor's other views always are positives and do not
            count among the k. Only without ``keys``.
        keys: contrast entries [M, D], without gradient.
        key_labels: their classes int64 [M]; negative labels are left out.
        own: another view of each anchor [N, D], one more entry and positive of that anchor alone,
            without gradient. Only with ``keys``.
        temperature: τ.
        generator: of the draw; the global one of the device if None.

    Returns:
        loss [].

    Raises:
        InputError: shapes that do not fit, keys without labels, or τ ≤ 0.

    References:
        Kang et al., ICLR 2021 (k-positive contrastive learning), OpenReview OqtLIabPTit.
    """
    return _loss(
        features, labels, None, 0.0, positives, views, keys, key_labels, own, temperature, generator
    )


def targeted_supcon(
    features: Tensor,
    labels: Tensor,
    weight: Tensor,
    *,
    target_weight: float = 0.2,
    positives: int | None = 6,
    views: int = 1,
    keys: Tensor | None = None,
    key_labels: Tensor | None = None,
    own: Tensor | None = None,
    temperature: float = 0.07,
    generator: torch.Generator | None = None,
) -> Tensor:
    """:func:`k_positive_supcon` that also pulls each class to its target on the sphere.

    The K targets join the contrast set of every anchor; that of its class is one more positive,
    whose term weighs ``target_weight``. With s = cos/τ and P(i) the positives with the target,
    ℓ_i = −(1/#P(i)) [Σ_{p ∈ P(i) ∖ t} log q_ip + target_weight · log q_it], q the softmax of s
    over the contrast set.

    Args:
        features: [N, D].
        labels: int64 [N]; negative labels are left out.
        weight: targets [K, D] in the order of the classes, without gradient: any frame. Which row a
            class gets is :func:`ncmethods.frames.assign`'s to say.
        target_weight: λ of the target's term.
        positives: as in :func:`k_positive_supcon`, and so are the others.
        views: as there.
        keys: as there.
        key_labels: as there.
        own: as there.
        temperature: τ.
        generator: as there.

    Returns:
        loss [].

    Raises:
        InputError: shapes that do not fit, labels ≥ K, keys without labels, or τ ≤ 0.

    References:
        Li et al., CVPR 2022, arXiv:2111.13998 (targeted supervised contrastive learning).
    """
    rows = weight.detach()
    return _loss(
        features,
        labels,
        rows,
        target_weight,
        positives,
        views,
        keys,
        key_labels,
        own,
        temperature,
        generator,
    )


def _loss(
    features: Tensor,
    labels: Tensor,
    targets: Tensor | None,
    target_weight: float,
    k: int | None,
    views: int,
    keys: Tensor | None,
    key_labels: Tensor | None,
    own: Tensor | None,
    temperature: float,
    generator: torch.Generator | None,
) -> Tensor:
    check_temperature(temperature)
    features = check_features(features)
    N, D = features.shape
    K = None if targets is None else len(check_rows(targets, D))
    y = check_labels(labels, N, K)
    if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 0):
        raise InputError(f"positives must be an integer ≥ 0, or None for all, got {k!r}.")
    if (keys is None) != (key_labels is None) or (own is not None and keys is None):
        raise InputError(
            "keys and key_labels go together, and own needs them. In a batch without keys the "
            "other views are rows of features: say views=2."
        )
    if views < 1 or N % views or (views > 1 and keys is not None):
        raise InputError(
            f"views = {views} must divide the {N} rows of features, and is 1 where there are keys: "
            "other views then come as own."
        )
    known = y >= 0
    with no_autocast(features.device):
        z = unit(features, known)
        if keys is None or key_labels is None:
            image = torch.arange(N, device=y.device) % (N // views)
            mine, barred = same_class(y, known)
            twin = (image[:, None] == image) & mine
            others, sure, free = z, twin, mine & ~twin
        else:
            of_key = check_labels(key_labels, len(keys), K)
            seen = of_key >= 0
            others = unit(check_rows(keys.detach(), D, "keys").to(z.dtype), seen)
            free = (y[:, None] == of_key) & seen & known[:, None]  # [N, M]
            sure, barred = torch.zeros_like(free), ~seen
        chosen = sure | _draw(free, k, generator)
        logits = z @ others.T / temperature  # [N, M]
        pull = torch.einsum("nm,nm->n", chosen.to(z.dtype), logits)
        mass = number = chosen.sum(1).to(z.dtype)  # of weights, and of positives
        entries = [logits.masked_fill(barred, shut(z.dtype))]
        if own is not None:
            if own.shape != features.shape:
                raise InputError(
                    f"own must be [N, D] = {[N, D]}, a view of each anchor, got {list(own.shape)}."
                )
            with_own = (z * unit(own.detach().to(z.dtype), known)).sum(1) / temperature
            pull, mass, number = pull + with_own, mass + 1, number + 1
            entries.append(with_own[:, None])
        if targets is not None:
            to_targets = z @ unit(targets.to(z.dtype)).T / temperature  # [N, K]
            to_own = to_targets.gather(1, y.clamp(min=0)[:, None])[:, 0]
            pull = pull + target_weight * to_own
            mass, number = mass + target_weight, number + 1
            entries.append(to_targets)
        number = number.clamp(min=1)
        return attract(torch.cat(entries, 1), pull / number, known & (mass > 0), mass / number)


def _draw(free: Tensor, k: int | None, generator: torch.Generator | None) -> Tensor:
    """At most k of the true entries of each row, all equally likely."""
    if k is None or k >= free.shape[1]:
        return free
    device = free.device if generator is None else generator.device
    lot = torch.rand(free.shape, generator=generator, device=device).to(free.device)
    value, index = lot.masked_fill(~free, -1.0).topk(k, 1)
    return torch.zeros_like(free).scatter(1, index, value >= 0)
