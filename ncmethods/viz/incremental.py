"""Figures of incremental learning: accuracy over sessions, and the matrix of tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ncmethods._core import InputError, write_text
from ncmethods.viz.figures import COLORS, INK, SMALL, STYLES, TITLE, _figure, _heatmap, _legend
from ncmethods.viz.page import Details, Image, Section, Table, html_report
from ncmethods.viz.tables import paired, summary, text_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["accuracy_matrix", "session_curves", "write_sessions"]


def session_curves(
    curves: Mapping[str, Sequence[Sequence[float]]],
    classes: Sequence[int],
    *,
    label: str = "accuracy over seen classes",
    title: str = "",
) -> Figure:
    """A measure after each session: mean line of each method, and of up to four the range of runs.

    Args:
        curves: method → one curve for each run, of one value per session.
        classes: classes seen after each session.
        label: of the measure.
        title: of the figure.

    Raises:
        InputError: no curve, or curves of another length.
    """
    if not curves or any(len(c) != len(classes) for of in curves.values() for c in of):
        raise InputError(f"Each curve needs one value for each of the {len(classes)} sessions.")
    figure, axes = _figure(3.0, legend=len(curves))
    lines: dict[str, Any] = {}
    for i, (method, of) in enumerate(curves.items()):
        runs = torch.tensor([list(map(float, c)) for c in of], dtype=torch.float64)
        color, style = COLORS[i % len(COLORS)], STYLES[i // len(COLORS) % len(STYLES)]
        mean = runs.nanmean(0).tolist()
        (lines[method],) = axes.plot(
            classes, mean, color=color, linestyle=style, marker="o", markersize=3, linewidth=1.5
        )
        if len(runs) > 1 and len(curves) <= 4:
            low, high = runs.amin(0).tolist(), runs.amax(0).tolist()
            axes.fill_between(classes, low, high, color=color, alpha=0.12, linewidth=0)
    axes.set_xticks(list(classes))
    axes.set_xlabel("classes seen", fontsize=SMALL, color=INK)
    axes.set_ylabel(label, fontsize=SMALL, color=INK)
    axes.set_title(title, fontsize=TITLE, color=INK)
    _legend(figure, lines)
    return figure


def accuracy_matrix(matrix: Tensor, *, title: str = "") -> Figure:
    """Accuracy on the classes of each task (columns) after each session (rows), per cent.

    Args:
        matrix: R, [sessions, tasks] in [0, 1]; NaN above the diagonal.
        title: of the figure.
    """
    from matplotlib.colors import Normalize

    values = 100 * matrix.double()
    T = len(values)
    small = T <= 12
    figure, axes, _ = _heatmap(
        values,
        norm=Normalize(0, 100),
        cmap="viridis",
        bar="accuracy, per cent",
        cell="{:.0f}".format if small else None,
        height=4.2,
    )
    ticks = list(range(T)) if small else list(range(0, T, -(-T // 10)))
    axes.set_xticks(ticks, [str(t) for t in ticks], fontsize=SMALL)
    axes.set_yticks(ticks, [str(t) for t in ticks], fontsize=SMALL)
    axes.set_xlabel("classes of session", fontsize=SMALL, color=INK)
    axes.set_ylabel("after session", fontsize=SMALL, color=INK)
    axes.set_title(title, fontsize=TITLE, color=INK)
    return figure


def write_sessions(
    out: Path,
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    columns: Mapping[str, tuple[str, float, int]],
    *,
    title: str,
    command: str = "",
) -> tuple[str, dict[str, Figure]]:
    """OUT/report.html and OUT/table.md of methods that learned classes session by session.

    Args:
        out: directory.
        runs: method → of each stream, in the same order of streams, the measures of ``columns``,
            ``curve`` (accuracy after each session), ``classes_seen`` and ``matrix``.
        columns: title → (key, factor, decimals); of ``seconds`` no differences are shown.
        title: of the page.
        command: that made it.

    Returns:
        Text for a terminal, and the matrix figure of each method.
    """
    table = summary(runs, columns)
    text = text_table(*table)
    sections: list[Section] = [
        Table(*table, "Accuracies in per cent; mean ± sd over class orders and seeds.")
    ]
    if len(runs) > 1:
        differences = paired(runs, {k: v for k, v in columns.items() if v[0] != "seconds"})
        sections.append(Table(*differences, "Differences within the same order and seed."))
        text += "\n\n" + text_table(*differences)
    curves = session_curves(
        {name: [[100 * a for a in run["curve"]] for run in of] for name, of in runs.items()},
        next(iter(runs.values()))[0]["classes_seen"],
        label="accuracy over seen classes, per cent",
    )
    caption = "Mean over orders and seeds; of up to four methods also the range."
    sections.append(Image(curves, caption))
    figures = {}
    for name, of in runs.items():
        matrix = torch.stack([run["matrix"] for run in of]).mean(0)
        figures[name] = accuracy_matrix(matrix, title=name)
        sections.append(Image(figures[name], "Mean over orders and seeds."))
    sections.append(Details("Command", command))
    page = html_report(out / "report.html", title=title, sections=sections)
    write_text(out / "table.md", text + "\n")
    return f"\n{text}\n\nreport: {page}", figures
