"""Figures and page of one measurement: what `ncmethods measure --out` draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ncmethods.viz.figures import cosine_heatmap, projection, spectrum
from ncmethods.viz.page import Details, Heading, Image, Section, Table, Text, html_report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ncmethods.stats import ClassStats

__all__ = ["collapse_figures", "collapse_page", "measure_table"]

_CAPTIONS = {
    "spectrum": "Eigenvalues of the covariance within classes and of that between class means.",
    "means": "Cosines between centred class means, largest class first.",
    "rows": "Cosines between the rows of the classifier, largest class first.",
    "projection": "Class means in the plane of their largest spread.",
}


def collapse_figures(
    stats: ClassStats,
    *,
    weight: Tensor | None = None,
    counts: Tensor | None = None,
    class_names: Sequence[str] | None = None,
    samples: tuple[Tensor, Tensor] | None = None,
    weighting: str = "class",
) -> dict[str, Figure]:
    """The figures that a statistic allows: spectrum, means, rows, projection.

    Args:
        stats: class moments; the spectrum needs their scatter.
        weight: classifier rows [K, D].
        counts: training samples per class [K], to sort by; by default those of ``stats``.
        class_names: one per class.
        samples: features [N, D] and labels [N], drawn into the projection.
        weighting: of the class means, ``"class"`` or ``"sample"``.
    """
    size = stats.counts.cpu() if counts is None else counts
    features, labels = (None, None) if samples is None else samples
    figures = {"spectrum": spectrum(stats, weighting=weighting)} if stats.scatter else {}
    for key, title, rows in (
        ("means", "Class means", stats.centered_means(weighting)),
        ("rows", "Classifier rows", weight),
    ):
        if rows is not None:
            figures[key] = cosine_heatmap(rows, class_names, title=title, counts=size, sort=True)
    figures["projection"] = projection(
        stats.means, class_names, weight=weight, counts=size, features=features, labels=labels
    )
    return figures


def measure_table(
    reports: Mapping[str, Mapping[str, float]],
) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of measures: value, debiased and se of one layer, or a column per layer.

    Args:
        reports: layer → key → value, as of ``metrics.report``; NaN becomes None.
    """
    keys = dict.fromkeys(key for one in reports.values() for key in one)
    plain = [key for key in keys if not key.endswith(("/debiased", "/se"))]
    if len(reports) == 1:
        (one,) = reports.values()
        beside = [s for s in ("debiased", "se") if any(key.endswith(f"/{s}") for key in one)]
        columns = ["measure", "value", *beside]
        rows = [[one[key], *(one.get(f"{key}/{s}") for s in beside)] for key in plain]
    else:
        columns = ["measure", *reports]
        rows = [[one.get(key) for one in reports.values()] for key in plain]
    return columns, [
        [key, *(v if v is not None and math.isfinite(v) else None for v in row)]
        for key, row in zip(plain, rows, strict=True)
    ]


def collapse_page(
    path: Path,
    title: str,
    table: tuple[Sequence[str], Sequence[Sequence[Any]]],
    provenance: Mapping[str, str],
    figures: Mapping[str, Mapping[str, Figure]],
    settings: Mapping[str, Any],
) -> Path:
    """Write the page of one measurement: table, figures of each layer, settings.

    Args:
        path: of the page.
        title: of the page.
        table: of :func:`measure_table`.
        provenance: layer → the line a paper would print beside its numbers.
        figures: layer → :func:`collapse_figures`.
        settings: that made the numbers, folded at the end.
    """
    sections: list[Section] = [Table(*table)]
    for layer, drawn in figures.items():
        sections += [Heading(layer)] if len(figures) > 1 else []
        sections += [Text(provenance[layer])]
        sections += [Image(figure, _CAPTIONS[key]) for key, figure in drawn.items()]
    return html_report(path, title=title, sections=[*sections, Details("Settings", settings)])
