"""report: every measure that the inputs allow, in one dictionary ready to be logged."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ncmethods._core import InputError, check_counts, check_logits, logits_of
from ncmethods.features import FeatureSet
from ncmethods.metrics._tiles import Pairs, closeness
from ncmethods.metrics._weighting import centred, variances, weighting_of
from ncmethods.metrics.debiased import (
    corrected_nc2,
    debiased_min_angle,
    debiased_nc1,
    debiased_trace_ratio,
    mean_noise,
    unbiased_variances,
)
from ncmethods.metrics.generalization import strong_test_nc1, weak_test_nc1
from ncmethods.metrics.jackknife import estimate, replicates
from ncmethods.metrics.nc1 import Between, cdnv_of, trace_ratio
from ncmethods.metrics.nc2 import min_angle, nc2_of
from ncmethods.metrics.nc3 import duality_cosine, self_duality
from ncmethods.metrics.nc4 import nearest_mean
from ncmethods.stats import ClassStats, rare_classes

__all__ = ["Report", "report"]

Values = dict[str, Tensor]
# These are corrected in closed form; of the other keys the jackknife takes the bias out.
_CLOSED = {"nc1/pinv", "nc1/trace_ratio", "nc1/cdnv", "angle/rare_means_min"}


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
    train: FeatureSet | ClassStats | None = None,
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
    classifier rows as they are). Beside them stand ``…/debiased``, without the error of few
    samples, and for a statistic with ``groups`` also ``…/se``, the standard error of the debiased
    value; with 20 groups ``debiased ± 2.1 se`` is a 95 % interval.

    Args:
        data: class moments, or samples where NC4 is wanted.
        head: nn.Linear or a head of this library; its rows must live in the space of the features.
        unit: statistic of the unit-normalised features; adds the NC1 and NC2 keys with ``/unit``.
        counts: training samples per class [K], which say which classes are rare.
        train: the training features, where ``data`` are test features: NC4 then asks for the
            nearest *training* mean, and ``nc1/strong_test`` and ``nc1/weak_test`` are added.
        weighting: of the classes in NC1 and μ_G: ``"class"``, ``"sample"``, ``"papyan"``,
            ``"papyan-demo"``, ``"zhu"``, ``"galanti"`` or ``"he-su"``.
        rare: class indices to use as rare; from ``counts`` by ``stats.rare_classes`` if None.
        prefix: put before every key.

    Raises:
        InputError: nothing was accumulated, or shapes that do not fit.

    Warns:
        UserWarning: a class has a single sample, so its variance reads 0.
    """
    stats = data.stats if isinstance(data, FeatureSet) else data
    if not isinstance(stats, ClassStats):
        raise InputError(
            f"report measures a FeatureSet or a ClassStats, got {type(data).__name__}. Use "
            "ClassStats(num_classes, dim).update(features, labels)."
        )
    if not stats.K_active:
        raise InputError("This ClassStats is empty: call update(features, labels) first.")
    single = (stats.counts == 1).nonzero().flatten().tolist()
    if single:
        warnings.warn(
            f"Classes {single[:9]}{' and more' * (len(single) > 9)} have a single sample: their "
            "variance reads 0, and NC1 too small.",
            stacklevel=2,
        )
    weight = None if head is None else _weight(head, stats)
    classes = _rare(stats, counts, rare)
    values, rank = _measures(stats, weight, weighting, classes)
    if weight is not None:  # of the head alone: no sampling error
        values |= _nc2("weight", Pairs(weight - weight.mean(0)), Pairs(weight))
        if len(classes) >= 2:
            values["angle/rare_weight_min"] = min_angle(weight[classes])
    if unit is not None:
        if not unit.normalized or unit.layer != stats.layer:
            raise InputError(
                f"unit must be a ClassStats(normalized=True, layer={stats.layer!r}) of unit-norm "
                f"features, got normalized={unit.normalized}, layer={unit.layer!r}."
            )
        for key, value in _measures(unit, None, weighting, [])[0].items():
            name, mark, kind = key.partition("/debiased" if key.endswith("/debiased") else "/se")
            values[f"{name}/unit{mark}{kind}"] = value
    if train is not None:
        train = train.stats if isinstance(train, FeatureSet) else train
        _check_alike(train, stats)
        if stats.scatter and stats.class_weight is None and train.K_active >= 2:
            values["nc1/strong_test"] = strong_test_nc1(train, stats, weighting=weighting)
            if isinstance(data, FeatureSet):
                values["nc1/weak_test"] = weak_test_nc1(train, data, weighting=weighting)
    if isinstance(data, FeatureSet) and data.labels is not None and stats.K_active >= 2:
        values |= _decisions(data, head, (train or stats).means)
    return Report(
        {prefix + key: float(value) for key, value in sorted(values.items())},
        _provenance(stats, weighting, rank),
    )


def _measures(
    stats: ClassStats, weight: Tensor | None, weighting: str, rare: list[int]
) -> tuple[Values, int]:
    """What depends on class moments, with ``/debiased`` and ``/se`` values; and the rank of NC1."""
    if stats.K_active < 2:
        return {}, 0
    plain, closed, rank = _plain_and_closed(stats, weight, weighting, rare)
    out = plain | {f"{key}/debiased": value for key, value in closed.items()}
    if stats.groups:
        center = weighting_of(weighting).center

        def base(part: ClassStats, plain: Values, closed: Values) -> Values:
            return (
                plain
                | _named("means", corrected_nc2(part, center))
                | _named("means_uncentred", corrected_nc2(part, None))
                | closed
            )

        def without(part: ClassStats) -> Values:
            if part.K_active < stats.K_active:
                return {}  # the group held all of a class: NaN
            return base(part, *_plain_and_closed(part, weight, weighting, rare)[:2])

        left = replicates(without, stats)
        unknown = torch.full((stats.groups,), torch.nan, dtype=torch.float64)
        for key, value in base(stats, plain, closed).items():
            found = estimate(float(value), left.get(key, unknown))
            if key not in _CLOSED:
                out[f"{key}/debiased"] = torch.tensor(found.debiased, dtype=torch.float64)
            out[f"{key}/se"] = torch.tensor(found.se, dtype=torch.float64)
    return out, rank


def _plain_and_closed(
    stats: ClassStats, weight: Tensor | None, weighting: str, rare: list[int]
) -> tuple[Values, Values, int]:
    """Plug-in measures, those that are debiased in closed form, and the rank of NC1."""
    how, active, rank = weighting_of(weighting), stats.active, 0
    plain, closed = {}, {}
    if stats.scatter:
        sigma_w, between = how.sigma_w(stats), Between.of(stats, weighting)
        rank = between.rank
        plain["nc1/pinv"] = between.nc1(sigma_w) * (1 if how.per_class else len(between.rows))
        plain["nc1/vci"] = between.vci(sigma_w, stats.N)
        del sigma_w, between
        closed["nc1/pinv"] = debiased_nc1(stats, weighting=weighting)
    plain["nc1/trace_ratio"] = trace_ratio(stats, weighting=weighting)
    closed["nc1/trace_ratio"] = debiased_trace_ratio(stats, weighting=weighting)
    means = centred(stats, how.center)
    pairs = Pairs(means[active])
    near, near_corrected = closeness(pairs, mean_noise(stats, None).own)
    plain["nc1/cdnv"] = cdnv_of(variances(stats)[active], near)
    closed["nc1/cdnv"] = cdnv_of(unbiased_variances(stats)[active], near_corrected)
    plain |= _nc2("means", pairs, Pairs(stats.means[active]))
    if weight is not None:
        plain["nc3/self_duality"] = self_duality(weight[active], pairs.rows)
        plain["nc3/cosine"] = duality_cosine(weight[active], pairs.rows)
    if len(rare) >= 2 and bool(active[rare].all()):
        plain["angle/rare_means_min"] = min_angle(means[rare])
        closed["angle/rare_means_min"] = debiased_min_angle(stats, rare, how.center)
    return plain, closed, rank


def _nc2(rows: str, centred: Pairs, raw: Pairs) -> Values:
    return _named(rows, nc2_of(centred)) | _named(f"{rows}_uncentred", nc2_of(raw))


def _named(rows: str, values: Values) -> Values:
    return {f"nc2/{name}_{rows}": value for name, value in values.items()}


def _decisions(data: FeatureSet, head: nn.Module | None, means: Tensor) -> Values:
    """NC4: the nearest class mean against the label and against the head's decision."""
    assert data.labels is not None
    logits = data.logits
    if logits is None and head is not None:
        with torch.no_grad():
            logits = logits_of(head, data.features.to(head.weight))  # type: ignore[arg-type]
    near = nearest_mean(data.features, means)
    known = data.labels >= 0
    out = {"nc4/ncc_accuracy": (near == data.labels.to(near.device))[known].double().mean()}
    if logits is not None:  # nc4.agreement, without a second search for the nearest means
        chosen = check_logits(logits, data.num_classes).argmax(1).to(near.device)
        out["nc4/agreement"] = (chosen == near).double().mean()
    return out


def _provenance(stats: ClassStats, weighting: str, rank: int) -> str:
    """What a paper would print beside the numbers."""
    how, counts = weighting_of(weighting), stats.counts[stats.active]
    measure = ""
    if stats.scatter and stats.K_active >= 2:
        within = f"{how.within or 'sample'}-weighted"
        if how.within is None and stats.class_weight is not None:
            within = "class_weight-weighted"
        full = min(len(counts) - 1, stats.dim)
        cut = f" (not {full}: in the other directions the means agree)" if rank < full else ""
        measure = f"NC1 pinv, {within} Σ_W, {how}, rank {rank}{cut}, "
    features = f"{'unit' if stats.normalized else 'raw'} features"
    layer = f" of {stats.layer}" if stats.layer else ""
    return (
        f"{measure}{features}{layer}, N = {stats.N:,}, {len(counts)} of {stats.num_classes} "
        f"classes, n_c ≥ {int(counts.min())}"
    )


def _rare(stats: ClassStats, counts: Tensor | None, rare: Sequence[int] | None) -> list[int]:
    """The rare classes, as given or from the training counts."""
    if rare is None:
        rare = [] if counts is None else rare_classes(check_counts(counts, stats.num_classes))
    if any(not 0 <= c < stats.num_classes for c in rare):
        raise InputError(f"rare must hold classes 0…{stats.num_classes - 1}, got {list(rare)}.")
    return list(rare)


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


def _check_alike(train: ClassStats, stats: ClassStats) -> None:
    if not isinstance(train, ClassStats):
        raise InputError(f"train must be a FeatureSet or a ClassStats, got {type(train).__name__}.")
    for field in ("num_classes", "dim", "normalized", "layer"):
        a, b = getattr(train, field), getattr(stats, field)
        if a != b:
            raise InputError(f"train and data differ in {field}: {a!r} and {b!r}.")
