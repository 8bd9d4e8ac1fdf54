"""Cosine regression of features to one of several centres of their class."""

from __future__ import annotations

import torch
from torch import Tensor

from ncmethods._core import (
    InputError,
    _readable,
    check_choice,
    check_features,
    check_labels,
    no_autocast,
)
from ncmethods.losses._contrast import check_rows, unit

__all__ = ["multi_centre_regression"]


def multi_centre_regression(
    features: Tensor,
    labels: Tensor,
    rows: Tensor,
    owner: Tensor,
    *,
    assigned: Tensor | None = None,
    balance: str = "batch",
    norm_penalty: float = 0.0,
) -> Tensor:
    """Pull each feature onto the nearest centre of its class; no term pushes classes apart.

    Per sample ℓ = ½(1 − cos θ)², θ the angle to the centre. With one centre for each class it is
    :func:`dot_regression` on unit features.

    Args:
        features: [N, D], the head's input after its neck.
        labels: int64 [N]; negative labels are left out.
        rows: centres [R, D], scaled to unit length here; they get no gradient. ``head.rows`` of a
            :func:`ncmethods.heads.multi_centre_head`.
        owner: class of each centre, int64 [R]; ``head.owner``.
        assigned: the centre of each sample, int64 [N] in 0 … R − 1, in place of the nearest one;
            where it is negative, the nearest one is taken.
        balance: ``"batch"`` is the mean over the classes of the batch of their mean, ``"none"`` the
            plain mean, as in :func:`dot_regression`.
        norm_penalty: λ of λ·mean‖h‖.

    Returns:
        loss [].

    Raises:
        InputError: shapes that do not fit, labels ≥ K, a class without a centre, an unknown
            balance.

    References:
        The general form, without a paper's name: see its card.
    """
    check_choice(balance, ("batch", "none"), "balance")
    features = check_features(features)
    R = len(check_rows(rows, features.shape[1], "rows"))
    K = _check_owner(owner, R)
    y = check_labels(labels, len(features), K)
    known = y >= 0
    with no_autocast(features.device):
        h = torch.where(known[:, None], features, 0.0)
        cosine = unit(h) @ unit(rows.detach().to(h.dtype)).T  # [N, R]
        mine = owner == y[:, None]
        at_centre = cosine.masked_fill(~mine, -2.0).max(1).values
        if assigned is not None:
            place = check_labels(assigned, len(h))
            if _readable(place) and int(place.amax()) >= R:
                raise InputError(
                    f"assigned must be < {R}, the number of rows (negative = the nearest), got "
                    f"{int(place.amax())}."
                )
            there = cosine.gather(1, place.clamp(min=0)[:, None])[:, 0]
            at_centre = torch.where(place >= 0, there, at_centre)
        per_sample = (1 - at_centre).square() / 2
        share = known.to(h.dtype)
        if balance == "batch":
            # A sample's class has as many samples as share its row of centres.
            first = mine.to(torch.int8).argmax(1)  # [N], the first centre of its class
            size = h.new_zeros(R).index_add(0, first, share)
            share = share / size.clamp(min=1)[first]
        loss: Tensor = (share * torch.where(known, per_sample, 0.0)).sum() / share.sum().clamp(
            min=torch.finfo(h.dtype).tiny
        )
        if norm_penalty:
            length = torch.linalg.vector_norm(h, dim=1)
            loss = loss + norm_penalty * length.sum() / known.sum().clamp(min=1)
        return loss


def _check_owner(owner: Tensor, rows: int) -> int | None:
    """K, or None where the values cannot be read without a host sync."""
    if owner.shape != (rows,) or owner.is_floating_point():
        raise InputError(
            f"owner must be the class of each of the {rows} rows, int64 [R], got {owner.dtype} "
            f"{list(owner.shape)}."
        )
    if not _readable(owner):
        return None
    if int(owner.min()) < 0 or int(owner.bincount().min()) == 0:
        raise InputError(
            f"owner must give every row a class, and every class from 0 to the largest a row, got "
            f"{owner.tolist()}."
        )
    return int(owner.max()) + 1
