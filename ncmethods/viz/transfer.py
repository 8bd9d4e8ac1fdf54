"""Figures of transferability: ranks, intervals, scores against accuracy, curves over depth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from ncmethods._core import InputError
from ncmethods.viz.figures import (
    COLORS,
    INK,
    MARKERS,
    MISSING,
    SMALL,
    TITLE,
    _figure,
    _grid,
    _heatmap,
    _legend,
    _log_ticks,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["accuracy_scatter", "depth_curves", "rank_heatmap", "score_intervals"]


def rank_heatmap(
    ranks: Mapping[str, Mapping[str, int | None]], candidates: Sequence[str], *, title: str = ""
) -> Figure:
    """Candidates by scores, the rank in each cell, 1 the best; None stays grey.

    Args:
        ranks: score → candidate → rank.
        candidates: rows, in order.
        title: of the figure.

    Raises:
        InputError: nothing to draw.
    """
    from matplotlib.colors import Normalize

    if not ranks or not candidates:
        raise InputError("rank_heatmap needs at least one score and one candidate.")
    cells = torch.tensor(
        [[of.get(name) or math.nan for of in ranks.values()] for name in candidates]
    )
    figure, axes, _ = _heatmap(
        cells,
        norm=Normalize(1, max(len(candidates), 2)),
        cmap="viridis_r",
        bar="rank, 1 is the best",
        cell=lambda value: f"{value:.0f}",
        height=1.9 + 0.22 * len(candidates),
        square=False,
    )
    axes.set_xticks(range(len(ranks)), list(ranks), fontsize=SMALL, rotation=40, ha="right")
    axes.set_yticks(range(len(candidates)), [_short(name) for name in candidates], fontsize=SMALL)
    axes.set_title(title, fontsize=TITLE, color=INK, loc="left")
    return figure


def score_intervals(
    values: Mapping[str, float],
    intervals: Mapping[str, tuple[float, float]],
    *,
    title: str = "",
) -> Figure:
    """One score of every candidate with its interval, the best on top.

    Args:
        values: candidate → value; NaN is left out.
        intervals: candidate → lower and upper end.
        title: of the figure.

    Raises:
        InputError: no candidate has a value.
    """
    known = sorted((v, name) for name, v in values.items() if math.isfinite(v))
    if not known:
        raise InputError("score_intervals needs a candidate whose value is a number.")
    figure, axes = _figure(0.9 + 0.24 * len(known))
    for row, (value, name) in enumerate(known):
        low, high = intervals.get(name, (math.nan, math.nan))
        if math.isfinite(low) and math.isfinite(high):
            axes.plot([low, high], [row, row], color=MISSING, lw=3, solid_capstyle="butt")
        axes.plot(value, row, "o", ms=5, color=COLORS[0])
    axes.set_yticks(range(len(known)), [_short(name) for _, name in known], fontsize=SMALL)
    axes.set_ylim(-0.6, len(known) - 0.4)
    axes.set_xlabel("value, higher = better transfer", fontsize=SMALL, color=INK)
    axes.set_title(title, fontsize=TITLE, color=INK, loc="left")
    return figure


def accuracy_scatter(
    values: Mapping[str, Mapping[str, float]],
    accuracies: Mapping[str, float],
    taus: Mapping[str, float] | None = None,
) -> Figure:
    """Each score against the accuracy, a panel per score, a colour per candidate.

    Args:
        values: score → candidate → value.
        accuracies: candidate → accuracy in [0, 1].
        taus: score → weighted τ, for the titles.

    Raises:
        InputError: nothing to draw.
    """
    names = [name for name in accuracies if any(name in of for of in values.values())]
    if not names:
        raise InputError("accuracy_scatter needs a candidate with a score and an accuracy.")
    taus = taus or {}
    figure, panels = _grid(len(values), 1.7, legend=len(names))
    handles = {}
    for axes, (score, of) in zip(panels, values.items(), strict=True):
        for i, name in enumerate(names):
            value = of.get(name, math.nan)
            if not math.isfinite(value):
                continue
            (handles[_short(name, 18)],) = axes.plot(
                value, 100 * accuracies[name], MARKERS[i // len(COLORS) % len(MARKERS)],
                color=COLORS[i % len(COLORS)], ms=5, ls="none",
            )  # fmt: skip
        tau = f", τ {taus[score]:.2f}" if math.isfinite(taus.get(score, math.nan)) else ""
        axes.set_title(f"{score}{tau}".replace("-", "−"), fontsize=SMALL, color=INK, loc="left")
        axes.tick_params(axis="x", labelrotation=20)
    panels[0].set_ylabel("accuracy, %", fontsize=SMALL, color=INK)
    _legend(figure, handles)
    return figure


def depth_curves(curves: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Figure:
    """Measures of each model over its layers, a panel per measure, on a logarithmic axis for NC1.

    Args:
        curves: model → layer, in order of depth → measure → value.

    Raises:
        InputError: no model has two layers.
    """
    curves = {model: of for model, of in curves.items() if len(of) > 1}
    if not curves:
        raise InputError("depth_curves needs a model with two layers or more.")
    longest = max(curves.values(), key=len)
    measures = list(next(iter(longest.values())))
    figure, panels = _grid(len(measures), 2.4, legend=len(curves))
    handles = {}
    for axes, measure in zip(panels, measures, strict=True):
        drawn = []
        for i, (model, of) in enumerate(curves.items()):
            y = [row.get(measure, math.nan) for row in of.values()]
            drawn += y
            (handles[_short(model, 18)],) = axes.plot(
                range(len(of)), y, marker=MARKERS[i % len(MARKERS)], ms=4, lw=1.4,
                color=COLORS[i % len(COLORS)],
            )  # fmt: skip
        if measure.startswith("NC1") and all(v > 0 for v in drawn):
            axes.set_yscale("log")
            _log_ticks(axes.yaxis)
        axes.set_title(measure, fontsize=SMALL, color=INK, loc="left")
        same = all(list(of) == list(longest) for of in curves.values())
        labels = [_short(layer, 14) if same else f"{i}" for i, layer in enumerate(longest, 1)]
        axes.set_xticks(range(len(longest)), labels, fontsize=SMALL, rotation=30, ha="right")
    _legend(figure, handles)
    return figure


def _short(name: str, most: int = 26) -> str:
    """The end of a long name."""
    return name if len(name) <= most else "…" + name[1 - most :]
