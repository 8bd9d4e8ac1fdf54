"""TransRate: the coding rate of all features less that of the classes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ncmethods._core import InputError, check_choice
from ncmethods.features import FeatureSet
from ncmethods.transfer._blocks import class_blocks
from ncmethods.transfer._inputs import labelled, principal

__all__ = ["transrate"]


def transrate(
    data: FeatureSet, *, eps: float = 1e-4, weighting: str = "class", pca: int | None = None
) -> Tensor:
    """R(Z) − mean_c R(Z_c), with R(Z) = ½ log det(I + ZᵀZ/(n ε)) and Z centred as a whole, [].

    The determinants of classes are n_c × n_c where n_c < D. Classes without samples are left out,
    and so are rows with a negative label. Constant features give 0.

    Args:
        data: with labels.
        eps: ε, the distortion, in units of a squared feature; the value depends on the scale of
            the features beside it.
        weighting: of the rates of the classes, ``"class"`` for their mean, ``"sample"`` by counts.
        pca: number of leading principal directions that are kept; all if None.

    Raises:
        InputError: no labels, or an ``eps`` that is not positive.

    References:
        Huang et al., ICML 2022 (PMLR 162).
    """
    if not eps > 0:
        raise InputError(f"eps must be positive, got {eps}.")
    check_choice(weighting, ("class", "sample"), "weighting")
    data = labelled(data)
    data = data if pca is None else principal(data, pca)
    stats, labels = data.frozen, data.labels
    assert labels is not None  # labelled
    shares = stats.counts.double() / stats.N
    if weighting == "class":
        shares = stats.active.double() / stats.active.sum()
    center, counts = stats.mean.to(data.features.device), stats.counts.to(labels.device)

    def rates(labels: Tensor, counts: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for classes, block in class_blocks(data.features, labels, center):
            gram = block @ block.mT if block.shape[1] < block.shape[2] else block.mT @ block
            yield classes, _rate(gram / (eps * counts[classes].double()[:, None, None]))

    if stats.dim > stats.N:
        ((_, total),) = rates(labels.clamp(max=0), counts.sum()[None])
        total = total[0]
    else:
        total = _rate(stats.sigma_t / eps)
    for classes, rate in rates(labels, counts):
        total = total - shares[classes.to(shares.device)] @ rate.to(shares)
    return total


def _rate(gram: Tensor) -> Tensor:
    """½ log det(I + G) of positive semi-definite matrices G [..., n, n]."""
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    L, info = torch.linalg.cholesky_ex(eye + gram)
    if bool(info.any()):  # G beyond 1e16: what is negative is rounding
        values: Tensor = torch.linalg.eigvalsh(gram).clamp(min=0)
        return values.log1p().sum(-1) / 2
    rate: Tensor = L.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return rate
