"""Figures and pages of run directories, drawn from their files alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ncmethods._core import CheckpointError, InputError, write_text
from ncmethods.viz.figures import (
    class_accuracy,
    class_comparison,
    comparison,
    confusion,
    cosine_heatmap,
    nc_curves,
    scatter,
)
from ncmethods.viz.page import Details, Heading, Image, Section, Table, Text, html_report
from ncmethods.viz.tables import paired, summary, text_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["comparison_page", "draw_run", "run_figures", "run_page", "write_comparison"]

Rows = Sequence[Mapping[str, Any]]

_CAPTIONS = {
    "curves": "Neural collapse over training, on the training and the test set.",
    "means": "Cosines between centred class means of the training features.",
    "rows": "Cosines between the rows of the classifier.",
    "accuracy": "Test accuracy by class, shaded by training frequency.",
    "confusion": "Which classes are taken for which, as shares of the true class.",
}


def run_figures(directory: Path, rows: Rows) -> dict[str, Figure]:
    """The five figures of a finished run: curves, means, rows, accuracy, confusion.

    Args:
        directory: of the run, with config.json and evaluation.safetensors.
        rows: of its metrics.jsonl.

    Raises:
        CheckpointError: the run has not finished.
    """
    saved, data = _evaluation(directory), _config(directory)["data"]
    names, counts = data["classes"], data["counts"]
    return {
        "curves": nc_curves(rows),
        "means": cosine_heatmap(saved["train_means"], names, title="Class means", counts=counts),
        "rows": cosine_heatmap(saved["weight"], names, title="Classifier rows", counts=counts),
        "accuracy": class_accuracy(_recall(saved), counts, data["groups"], names),
        "confusion": confusion(saved["confusion"], names),
    }


def run_page(directory: Path, rows: Rows, figures: Mapping[str, Figure] | None = None) -> Path:
    """Write ``report.html`` of a finished run: its last measures, five figures, its settings.

    Args:
        directory: of the run.
        rows: of its metrics.jsonl.
        figures: of :func:`run_figures`, where they are drawn already.
    """
    figures = run_figures(directory, rows) if figures is None else figures
    config = _config(directory)
    title = f"{config['method']}, seed {config['seed']}"
    last = rows[-1] if rows else {}
    measures = [(key, last[key]) for key in sorted(last) if "/" in key]
    sections: list[Section] = [
        Text(_described(config)),
        *(Image(figure, _CAPTIONS[key]) for key, figure in figures.items()),
        Heading("After training"),
        Table(("measure", "value"), measures),
        Details("Settings", config),
    ]
    return html_report(directory / "report.html", title=title, sections=sections)


def draw_run(directory: Path, rows: Rows) -> dict[str, Figure]:
    """The figures of a finished run, after its ``report.html`` was written with them."""
    figures = run_figures(directory, rows)
    run_page(directory, rows, figures)
    return figures


def write_comparison(
    out: Path,
    runs: Mapping[str, Sequence[tuple[Path, Rows]]],
    tables: Sequence[Mapping[str, tuple[str, float, int]]],
    panels: Mapping[str, str],
    *,
    command: str = "",
) -> str:
    """Write ``OUT/table.md`` and ``OUT/report.html``; returns the tables and where they are.

    Args:
        out: directory of the comparison.
        runs: method → its runs, each a directory with the rows of its metrics.jsonl.
        tables: columns of each table, as in :func:`summary`.
        panels: key of the last row → title of its panel in the comparison figure.
        command: that made the runs.
    """
    last = {method: [rows[-1] for _, rows in of] for method, of in runs.items()}
    filled = [summary(last, columns) for columns in tables]
    if len(runs) > 1:
        filled.append(paired(last, tables[0]))
    text = "\n\n".join(text_table(*table) for table in filled)
    write_text(out / "table.md", text + "\n")
    comparison_page(out / "report.html", filled, runs, panels, command=command)
    return f"\n{text}\n\nreport: {out / 'report.html'}\ntable:  {out / 'table.md'}"


def comparison_page(
    path: Path,
    tables: Sequence[tuple[Sequence[str], Sequence[Sequence[Any]]]],
    runs: Mapping[str, Sequence[tuple[Path, Rows]]],
    panels: Mapping[str, str],
    *,
    command: str = "",
) -> Path:
    """Write one page that compares methods over seeds.

    Args:
        path: of the page.
        tables: columns and rows of each, as printed.
        runs: method → its runs, each a directory with the rows of its metrics.jsonl.
        panels: key of the last row → title of its panel in the comparison figure.
        command: that made the runs.
    """
    values = {
        method: {key: [rows[-1].get(key) for _, rows in of] for key in panels}
        for method, of in runs.items()
    }
    curves = {method: [row for _, rows in of for row in rows] for method, of in runs.items()}
    first = _config(next(iter(runs.values()))[0][0])
    sections: list[Section] = [
        Text(_described(first)),
        *(Table(*table, caption=_caption(table)) for table in tables),
        Image(comparison(values, panels), "Methods side by side: mean ± sd, one dot per seed."),
        *_against(values, panels),
        Image(
            _by_class(runs),
            "Test accuracy by class, most frequent first, with its training samples: mean ± sd "
            "over seeds.",
        ),
        Image(
            nc_curves(curves, prefixes=("train",)),
            "Neural collapse of the training features: mean and range over seeds.",
        ),
    ]
    for method, of in runs.items():
        figures = run_figures(*of[0])
        sections += [Heading(f"{method}, seed {_config(of[0][0])['seed']}")]
        sections += [Image(figures[key], _CAPTIONS[key]) for key in ("accuracy", "means", "rows")]
    sections += [Details("Command", command), Details("Settings of the first run", first)]
    return html_report(path, title="Comparison", sections=sections)


def _caption(table: tuple[Sequence[str], Sequence[Sequence[Any]]]) -> str:
    if table[0][0].startswith("minus "):
        return "Differences to the first method, paired by seed: mean ± sd over seeds."
    return "Mean ± sd over seeds; last epoch."


def _against(
    values: Mapping[str, Mapping[str, Sequence[float | None]]], panels: Mapping[str, str]
) -> list[Section]:
    """The measure of the first panel against that of the last: accuracy against geometry."""
    (y, accuracy), *_, (x, geometry) = panels.items()
    try:
        figure = scatter(values, (x, geometry.replace("\n", " ")), (y, accuracy))
    except InputError:  # nothing to draw
        return []
    return [Image(figure, "Geometry and accuracy: a small dot per seed.")]


def _by_class(runs: Mapping[str, Sequence[tuple[Path, Rows]]]) -> Figure:
    """Accuracy of each class of the first run under every method; classes are found by name."""
    data = _config(next(iter(runs.values()))[0][0])["data"]
    results = {}
    for method, of in runs.items():
        found = [
            dict(zip(_config(path)["data"]["classes"], _recall(_evaluation(path)).tolist()))
            for path, _ in of
        ]
        results[method] = torch.tensor(
            [[seed.get(name, math.nan) for name in data["classes"]] for seed in found]
        )
    return class_comparison(results, data["counts"], data["classes"])


def _evaluation(directory: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    path = directory / "evaluation.safetensors"
    if not path.exists():
        raise CheckpointError(f"{directory} has no {path.name}: the run has not finished.")
    saved: dict[str, Tensor] = load_file(path)
    return saved


def _recall(saved: Mapping[str, Tensor]) -> Tensor:
    """Share of each class that is found [K]; NaN of a class without test samples."""
    table = saved["confusion"].double()
    return table.diagonal() / table.sum(1)


def _config(directory: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((directory / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory} is not a run directory: {error}") from error
    return config


def _described(config: Mapping[str, Any]) -> str:
    """One sentence on data and training."""
    data, train = config["data"], config["train"]
    groups = ", ".join(f"{name} {len(of)}" for name, of in data["groups"].items())
    return (
        f"{data.get('name', 'data')}: {sum(data['counts'])} training images in "
        f"{len(data['counts'])} classes of {max(data['counts'])} to {min(data['counts'])}; "
        f"groups: {groups}. {train['epochs']} epochs, {config['model']['backbone']}."
    )
