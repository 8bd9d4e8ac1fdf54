"""Measures of neural collapse: functions ``(stats, …) -> []`` and one ``report``."""

from ncmethods.metrics.classification import (
    accuracy_by_class,
    brier,
    classification,
    confusion_matrix,
    ece,
    fit_temperature,
    nll,
)
from ncmethods.metrics.nc1 import cdnv, nc1_pinv, trace_ratio, vci
from ncmethods.metrics.nc2 import equiangular, equinorm, gram_etf, min_angle
from ncmethods.metrics.nc3 import duality_cosine, self_duality
from ncmethods.metrics.nc4 import agreement, nearest_mean
from ncmethods.metrics.report import Report, report

__all__ = [
    "Report",
    "accuracy_by_class",
    "agreement",
    "brier",
    "cdnv",
    "classification",
    "confusion_matrix",
    "duality_cosine",
    "ece",
    "equiangular",
    "equinorm",
    "fit_temperature",
    "gram_etf",
    "min_angle",
    "nc1_pinv",
    "nearest_mean",
    "nll",
    "report",
    "self_duality",
    "trace_ratio",
    "vci",
]
