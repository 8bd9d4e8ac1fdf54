"""Figures of incremental learning: what they show, by their artists."""

import pytest
import torch

from ncmethods import viz
from ncmethods._core import InputError

CURVES = {"a": [[90.0, 70.0, 50.0], [80.0, 60.0, 40.0]], "b": [[90.0, 85.0, 80.0]]}


def test_curves_are_means_over_runs_at_the_classes_seen():
    figure = viz.session_curves(CURVES, [2, 4, 6], title="t")
    (axes,) = figure.axes
    first, second = axes.lines
    assert first.get_xdata().tolist() == [2, 4, 6]
    assert list(first.get_ydata()) == [85, 65, 45]
    assert list(second.get_ydata()) == [90, 85, 80]
    (band,) = axes.collections  # of the method with two runs
    low, high = band.get_datalim(axes.transData).intervaly
    assert (low, high) == (40, 90)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    many = viz.session_curves({str(i): CURVES["a"] for i in range(5)}, [2, 4, 6])
    assert not many.axes[0].collections
    for curves, classes in (({}, [2]), (CURVES, [2, 4])):
        with pytest.raises(InputError, match="one value for each of the"):
            viz.session_curves(curves, classes)


def test_the_matrix_shows_per_cent_below_the_diagonal():
    R = torch.tensor([[0.98, torch.nan], [0.5, 0.75]])
    figure = viz.accuracy_matrix(R, title="t")
    axes = figure.axes[0]
    shown = {t.get_position(): t.get_text() for t in axes.texts}
    assert shown == {(0, 0): "98", (0, 1): "50", (1, 1): "75"}
    assert axes.get_ylabel() == "after session"
    large = viz.accuracy_matrix(torch.rand(20, 20))
    assert not large.axes[0].texts
    assert len(large.axes[0].get_xticks()) <= 10


def test_one_page_for_all_methods(tmp_path):
    def run(last):
        return {
            "accuracy": last,
            "seconds": 2.0,
            "curve": [0.9, last],
            "classes_seen": [2, 4],
            "matrix": torch.tensor([[0.9, torch.nan], [last, last]]),
        }

    runs = {"a": [run(0.5), run(0.6)], "b": [run(0.7), run(0.9)]}
    columns = {"last": ("accuracy", 100, 1), "s": ("seconds", 1, 0)}
    text, figures = viz.write_sessions(tmp_path, runs, columns, title="T", command="do it")
    assert "55.0 ± 7.1" in text
    assert "+25.0 ± 7.1" in text  # paired: 20 and 30
    paired = (tmp_path / "table.md").read_text().split("minus a")[1]
    assert "| s" not in paired.splitlines()[0]
    page = (tmp_path / "report.html").read_text()
    assert "do it" in page
    assert page.count("data:image/png") == 3
    assert set(figures) == {"a", "b"}
    shown = {t.get_position(): t.get_text() for t in figures["b"].axes[0].texts}
    assert shown == {(0, 0): "90", (0, 1): "80", (1, 1): "80"}
