"""report: every measure that the inputs allow, in one dictionary ready to be logged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ncmethods._core import InputError, check_counts, check_logits, logits_of
from ncmethods.features import FeatureSet
from ncmethods.metrics.nc1 import cdnv, nc1_terms, trace_ratio, vci
from ncmethods.metrics.nc2 import equiangular, equinorm, gram_etf, min_angle
from ncmethods.metrics.nc3 import duality_cosine, self_duality
from ncmethods.metrics.nc4 import nearest_mean
from ncmethods.stats import ClassStats, rare_classes

__all__ = ["Report", "report"]


class Report(dict[str, float]):
    """Measures by key, ready for ``wandb.log``; ``provenance`` is the line a paper would print."""

    def __init__(self, values: dict[str, float], provenance: str) -> None:
        super().__init__(values)
        self.provenance = provenance


def report(
    data: FeatureSet | ClassStats,
    head: nn.Module | None = None,
    *,
    unit: ClassStats | None = None,
    counts: Tensor | None = None,
    weighting: str = "class",
    rare: Sequence[int] | None = None,
    prefix: str = "",
) -> Report:
    """Measure neural collapse: NC1 to NC4 and the angles among rare classes.

    What the inputs cannot give is absent: ``nc3/*`` and ``*_weight`` need a head, ``nc4/*`` needs
    samples with logits, ``angle/rare_*`` needs training counts, ``nc1/pinv`` and ``nc1/vci`` need a
    scatter. Measures of fewer than two classes with samples are absent too.

    Keys: ``nc1/{pinv,trace_ratio,cdnv,vci}``;
    ``nc2/{equinorm,equiangular,gram_etf}_{means,weight}`` of centred rows and the same with
    ``_uncentred``; ``nc3/{self_duality,cosine}``;
    ``nc4/{agreement,ncc_accuracy}``; ``angle/rare_{means,weight}_min`` in degrees (centred means,
    classifier rows as they are).

    Args:
        data: class moments, or samples where NC4 is wanted.
        head: nn.Linear or a head of this library; its rows must live in the space of the features.
        unit: statistic of the unit-normalised features; adds the NC1 and NC2 keys with ``/unit``.
        counts: training samples per class [K], which say which classes are rare.
        weighting: of the class means in μ_G and Σ_B, ``"class"`` or ``"sample"``.
        rare: class indices to use as rare; from ``counts`` by ``stats.rare_classes`` if None.
        prefix: put before every key.

    Raises:
        InputError: nothing was accumulated, or shapes that do not fit.
    """
    stats = data.stats if isinstance(data, FeatureSet) else data
    if not isinstance(stats, ClassStats):
        raise InputError(
            f"report measures a FeatureSet or a ClassStats, got {type(data).__name__}. Use "
            "ClassStats(num_classes, dim).update(features, labels)."
        )
    weight = None if head is None else _weight(head, stats)
    values, rank = _geometry(stats, weight, weighting)

    if unit is not None:
        if not unit.normalized:
            raise InputError("unit must be a ClassStats(normalized=True) of unit-norm features.")
        values |= {f"{key}/unit": v for key, v in _geometry(unit, None, weighting)[0].items()}

    if isinstance(data, FeatureSet) and data.labels is not None and stats.K_active >= 2:
        logits = data.logits
        if logits is None and head is not None:
            with torch.no_grad():
                logits = logits_of(head, data.features.to(head.weight))  # type: ignore[arg-type]
        near = nearest_mean(data.features, stats.means)
        known = data.labels >= 0
        values["nc4/ncc_accuracy"] = float((near == data.labels)[known].double().mean())
        if logits is not None:  # nc4.agreement, without a second search for the nearest means
            chosen = check_logits(logits, stats.num_classes).argmax(1).to(near.device)
            values["nc4/agreement"] = float((chosen == near).double().mean())

    if counts is not None or rare is not None:
        if rare is None:
            assert counts is not None
            rare = rare_classes(check_counts(counts, stats.num_classes))
        if any(not 0 <= c < stats.num_classes for c in rare):
            raise InputError(f"rare must hold classes 0…{stats.num_classes - 1}, got {list(rare)}.")
        rows = stats.centered_means()[list(rare)]
        if len(rows) >= 2 and not bool(rows.isnan().any()):
            values["angle/rare_means_min"] = float(min_angle(rows))
        if len(rows) >= 2 and weight is not None:
            values["angle/rare_weight_min"] = float(min_angle(weight[list(rare)]))

    features = f"{'unit' if stats.normalized else 'raw'} features"
    layer = f" of {stats.layer}" if stats.layer else ""
    scatter = "class_weight-weighted" if stats._class_weight is not None else "sample-weighted"
    measure = f"NC1 pinv, {scatter} Σ_W, {weighting}-weighted Σ_B, rank {rank}, "
    provenance = (
        f"{measure if 'nc1/pinv' in values else ''}{features}{layer}, "
        f"N = {stats.N:,}, {stats.K_active} of {stats.num_classes} classes"
    )
    return Report({prefix + key: value for key, value in values.items()}, provenance)


def _weight(head: nn.Module, stats: ClassStats) -> Tensor:
    weight: Any = getattr(head, "weight", None)
    shape = (stats.num_classes, stats.dim)
    if not isinstance(weight, Tensor) or tuple(weight.shape) != shape:
        got = tuple(weight.shape) if isinstance(weight, Tensor) else type(head).__name__
        raise InputError(
            f"head.weight must be [K, D] = {list(shape)} like the statistic, got {got}. "
            "Measure the features after the head's neck."
        )
    return weight.detach().double().to(stats.counts.device)


def _geometry(
    stats: ClassStats, weight: Tensor | None, weighting: str
) -> tuple[dict[str, float], int]:
    """NC1, NC2 and NC3 of one statistic, and the rank of NC1."""
    out: dict[str, Tensor] = {}
    rank = 0
    active = stats.active
    if not bool(active.any()):
        raise InputError("This ClassStats is empty: call update(features, labels) first.")
    if stats.K_active >= 2:
        if stats.scatter:
            out["nc1/pinv"], rank = nc1_terms(stats, weighting)
            out["nc1/vci"] = vci(stats, weighting=weighting)
        out["nc1/trace_ratio"] = trace_ratio(stats, weighting=weighting)
        out["nc1/cdnv"] = cdnv(stats)
        out |= _nc2("means", stats.means[active], stats.centered_means(weighting)[active])
    if weight is not None:
        out |= _nc2("weight", weight, weight - weight.mean(0))
        if stats.K_active >= 2:
            centred = stats.centered_means(weighting)[active]
            out["nc3/self_duality"] = self_duality(weight[active], centred)
            out["nc3/cosine"] = duality_cosine(weight[active], centred)
    return {key: float(value) for key, value in sorted(out.items())}, rank


def _nc2(rows: str, raw: Tensor, centred: Tensor) -> dict[str, Tensor]:
    return {
        f"nc2/{measure.__name__}_{rows}{suffix}": measure(matrix)
        for measure in (equinorm, equiangular, gram_etf)
        for suffix, matrix in (("", centred), ("_uncentred", raw))
    }
