import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from ncmethods import viz
from ncmethods._core import InputError
from ncmethods.frames import simplex_etf
from ncmethods.stats import ClassStats
from ncmethods.viz import Details, Heading, Image, Table, Text, html_report

NAMES = ["ankle boot", "bag", "coat"]
COUNTS = torch.tensor([100, 10, 30])


def curve_rows(scale=1.0, epochs=range(1, 4)):
    out = [{"epoch": 0, "train/loss": 2.0}]
    for e in epochs:
        row = {"epoch": e, "train/nc1/pinv": scale / e, "test/nc1/pinv": 2 * scale / e}
        out.append(row | {"train/angle/rare_means_min": None, "angle/rare_weight_min": 96.0})
    return out


def layer_rows():
    names = ["backbone.blocks.0.conv1", "backbone.blocks.1", "head"]
    return [
        {"epoch": e} | {f"{name}/nc1/pinv": 10.0 ** -(i * e) for i, name in enumerate(names)}
        for e in (1, 2, 10)
    ]


def samples(seed=0):
    rng = np.random.default_rng(seed)
    labels = np.repeat([0, 1, 2], [30, 20, 10])
    return rng.normal(size=(60, 5)) * [3, 1, 1, 0.1, 0.01] + 2 * np.eye(5)[labels], labels


def moments(**how):
    x, y = samples()
    return ClassStats(3, 5, **how).update(torch.from_numpy(x), torch.from_numpy(y))


def texts(axes):
    return [t.get_text() for t in axes.texts]


FIGURES = {
    "nc_curves": lambda: viz.nc_curves(curve_rows()),
    "nc_compared": lambda: viz.nc_curves({"ce": curve_rows(), "etf": curve_rows(0.5)}),
    "cosine_heatmap": lambda: viz.cosine_heatmap(
        torch.tensor([[3.0, 0, 1], [-2, 1, 0], [-1, -1, -1]]), NAMES, counts=COUNTS
    ),
    "class_accuracy": lambda: viz.class_accuracy(
        [0.9, math.nan, 0.5], COUNTS, {"many": [0], "few": [1, 2]}, NAMES
    ),
    "class_bars": lambda: viz.class_comparison(
        {"ce": [[0.9, 1.0, 0.5], [0.7, 0.0, 0.6]], "etf": [[0.8, math.nan, 0.1]]}, COUNTS, NAMES
    ),
    "class_lines": lambda: viz.class_comparison(
        {f"method {i}": torch.rand(2, 100) for i in range(9)}, range(1280, 1180, -1)
    ),
    "confusion": lambda: viz.confusion(torch.tensor([[3, 1, 0], [0, 0, 0], [1, 1, 2]]), NAMES),
    "comparison": lambda: viz.comparison({"ce": {"acc": [0.5, 0.6]}, "etf": {"acc": [0.7]}}),
    "scatter": lambda: viz.scatter(
        {"ce": {"a": [20.0, 30.0], "acc": [0.5, 0.6]}, "etf": {"a": [90.0], "acc": [0.7]}},
        ("a", "Angle (°)"),
        ("acc", "Accuracy"),
    ),
    "cosine_sorted": lambda: viz.cosine_heatmap(torch.eye(40), counts=range(1, 41), sort=True),
    "cosine_two": lambda: viz.cosine_heatmap(torch.tensor([[1.0], [-1.0]])),
    "layer_heatmap": lambda: viz.layer_heatmap(layer_rows(), "nc1/pinv"),
    "spectrum": lambda: viz.spectrum(moments()),
    "projection": lambda: viz.projection(
        moments().means, NAMES, weight=torch.randn(3, 5), counts=COUNTS, features=torch.randn(9, 5)
    ),
    "projection_many": lambda: viz.projection(torch.randn(40, 8), counts=range(1, 41)),
}


def test_importing_viz_does_not_import_matplotlib_and_figures_do_not_import_pyplot():
    code = (
        "import sys, torch; from ncmethods import viz; assert 'matplotlib' not in sys.modules;"
        "viz.cosine_heatmap(torch.eye(3)); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("make", FIGURES.values(), ids=FIGURES)
def test_every_figure_is_column_wide_titled_and_has_text_of_at_least_9_points(make):
    from matplotlib.text import Text as Label

    figure = make()
    figure.draw_without_rendering()
    assert figure.get_size_inches()[0] == 4.5
    drawn = [t for t in figure.findobj(Label) if t.get_text() and t.get_visible()]
    assert min(t.get_fontsize() for t in drawn if not re.match(r"\$\\math", t.get_text())) >= 9
    for axes in figure.axes:
        if axes.get_label() != "<colorbar>":
            assert axes.get_title() or axes.get_title(loc="left")


@pytest.mark.parametrize("make", FIGURES.values(), ids=FIGURES)
def test_no_label_is_cut_off_at_the_border(make):
    figure = make()
    figure.draw_without_rendering()
    inside = figure.bbox
    for axes in figure.axes:
        box = axes.get_tightbbox()
        assert box.x0 >= inside.x0 - 1
        assert box.x1 <= inside.x1 + 1
        assert box.y0 >= inside.y0 - 1
        assert box.y1 <= inside.y1 + 1


# --- curves ------------------------------------------------------------------------------------


def test_nc_curves_draws_one_panel_per_metric_and_one_line_per_prefix():
    figure = viz.nc_curves(curve_rows())
    nc1, head = figure.axes  # the metric that is null throughout has no panel
    train, test = nc1.lines
    np.testing.assert_allclose(train.get_xydata(), [[1, 1], [2, 1 / 2], [3, 1 / 3]])
    np.testing.assert_allclose(test.get_ydata(), [2, 1, 2 / 3])
    assert nc1.get_yscale() == "log"
    assert head.get_yscale() == "linear"
    assert len(head.lines) == 1
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["train", "test"]


def test_nc_curves_compares_methods_and_draws_the_range_of_seeds():
    seeds = curve_rows(1.0) + curve_rows(3.0)
    figure = viz.nc_curves({"ce": seeds, "etf": curve_rows(0.1)}, ["nc1/pinv"], prefixes=["train"])
    (axes,) = figure.axes
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [2, 1, 2 / 3])
    (band,) = axes.collections
    assert band.get_paths()[0].vertices[:, 1].min() == pytest.approx(1 / 3)
    assert band.get_paths()[0].vertices[:, 1].max() == pytest.approx(3)
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["ce", "etf"]
    assert axes.lines[0].get_color() != axes.lines[1].get_color()


def test_nc_curves_of_an_unknown_key_takes_its_name_as_title():
    rows = [{"epoch": 1, "rank": 3}]
    assert viz.nc_curves(rows, ["rank"]).axes[0].get_title(loc="left").startswith("rank")


def test_full_collapse_has_no_logarithm_and_is_drawn_all_the_same():
    axes = viz.nc_curves([{"epoch": 1, "nc1/pinv": 0.0}]).axes[0]
    assert axes.get_yscale() == "linear"
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[1, 0]])


def test_nc_curves_says_what_the_rows_hold():
    with pytest.raises(InputError, match="The rows hold: epoch, train/loss"):
        viz.nc_curves([{"epoch": 0, "train/loss": 2.0}])
    with pytest.raises(InputError, match="nothing"):
        viz.nc_curves([])


# --- heat maps ---------------------------------------------------------------------------------


def test_heatmap_shows_the_cosines_on_a_fixed_scale():
    vectors = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]], requires_grad=True)
    axes = viz.cosine_heatmap(vectors, NAMES, counts=COUNTS).axes[0]
    (image,) = axes.images
    np.testing.assert_allclose(image.get_array(), [[1, 0, -1], [0, 1, 0], [-1, 0, 1]], atol=1e-15)
    assert image.get_clim() == (-1, 1)
    assert texts(axes) == ["100", "0", "−100", "0", "100", "0", "−100", "0", "100"]
    rows = [t.get_text() for t in axes.get_yticklabels()]
    assert rows == ["ankle boot (100)", "bag (10)", "coat (30)"]
    assert [t.get_text() for t in axes.get_xticklabels()] == NAMES


def test_heatmap_of_an_etf_is_flat_off_the_diagonal_whatever_its_scale():
    etf = 7 * (torch.eye(4) - 0.25)
    shown = viz.cosine_heatmap(etf).axes[0].images[0].get_array()
    np.testing.assert_allclose(shown[~np.eye(4, dtype=bool)], -1 / 3, atol=1e-6)


def test_an_empty_class_is_grey_in_its_row_and_column():
    vectors = torch.eye(3)
    vectors[1] = 0
    axes = viz.cosine_heatmap(vectors).axes[0]
    masked = np.isnan(np.ma.filled(axes.images[0].get_array(), np.nan))
    assert masked.tolist() == [[False, True, False], [True] * 3, [False, True, False]]
    assert len(axes.texts) == 4


@pytest.mark.parametrize(("K", "cells", "ticks"), [(12, 144, 12), (13, 0, 13), (100, 0, 10)])
def test_many_classes_drop_numbers_then_names(K, cells, ticks):
    axes = viz.cosine_heatmap(torch.eye(K), counts=[1] * K).axes[0]
    assert len(axes.texts) == cells
    assert len(axes.get_xticklabels()) == ticks


def test_long_class_names_are_cut_so_that_cells_keep_their_place():
    axes = viz.confusion(torch.eye(2), ["a very long name of a class", "b"]).axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["a very long name …", "b"]


def test_sorting_puts_the_largest_class_first_and_keeps_names_and_counts_together():
    vectors = torch.tensor([[1.0, 0], [0, 1], [1, 1]])
    axes = viz.cosine_heatmap(vectors, NAMES, counts=torch.tensor([5, 500, 50]), sort=True).axes[0]
    labels = [t.get_text() for t in axes.get_yticklabels()]
    assert labels == ["bag (500)", "coat (50)", "ankle boot (5)"]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["bag", "coat", "ankle boot"]
    h = math.sqrt(0.5)
    np.testing.assert_allclose(
        axes.images[0].get_array(), [[1, h, 0], [h, 1, h], [0, h, 1]], atol=1e-6
    )


def test_a_thousand_sorted_classes_keep_their_counts_on_the_axis():
    axes = viz.cosine_heatmap(torch.eye(1000), counts=range(1000), sort=True).axes[0]
    labels = [t.get_text() for t in axes.get_yticklabels()]
    assert labels[:2] == ["999 (999)", "899 (899)"]
    assert len(labels) == 10


@pytest.mark.parametrize(("K", "empty"), [(2, 0), (4, 0), (5, 1)])
def test_the_colour_bar_marks_the_cosine_of_an_etf(K, empty):
    rows = simplex_etf(K - empty, 8)
    cosine = float(rows[0] @ rows[1])
    figure = viz.cosine_heatmap(torch.cat((rows, torch.full((empty, 8), math.nan))))
    bar = figure.axes[1]
    np.testing.assert_allclose(bar.lines[-1].get_xdata(), [cosine] * 2, atol=1e-6)
    assert texts(bar) == [f"ETF −{abs(cosine):.2g}"]


def test_layers_stand_from_first_to_last_and_epochs_from_left_to_right():
    axes, bar = viz.layer_heatmap(layer_rows()[::-1], "nc1/pinv").axes
    (image,) = axes.images
    want = [[1, 1, 1], [1e-1, 1e-2, 1e-10], [1e-2, 1e-4, 1e-20]]
    np.testing.assert_allclose(image.get_array(), want)
    assert type(image.norm).__name__ == "LogNorm"
    layers = [t.get_text() for t in axes.get_yticklabels()]
    assert layers == ["…ne.blocks.0.conv1", "backbone.blocks.1", "head"]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["1", "2", "10"]
    assert texts(axes)[:4] == ["1", "1", "1", "0.1"]
    assert bar.get_xlabel() == "tr(Σ_W Σ_B⁺) / K"


def test_layer_heatmap_averages_seeds_and_greys_what_is_missing():
    rows = [
        {"epoch": 1, "train/a/nc2/x": 1.0, "train/b/nc2/x": math.nan, "test/a/nc2/x": 9.0},
        {"epoch": 1, "train/a/nc2/x": 3.0, "train/b/nc2/x": None, "train/a/nc2/xx": 9.0},
        {"epoch": 2, "train/b/nc2/x": -1.0},
    ]
    axes = viz.layer_heatmap(rows, "nc2/x", ["b", "a"], prefix="train/").axes[0]
    (image,) = axes.images
    shown = np.ma.filled(image.get_array(), np.nan)
    np.testing.assert_allclose(shown, [[np.nan, -1], [2, np.nan]])
    assert type(image.norm).__name__ == "Normalize"
    assert texts(axes) == ["−1", "2"]


def test_layer_heatmap_of_one_value_and_of_full_collapse():
    assert texts(viz.layer_heatmap([{"epoch": 1, "a/nc1/pinv": 0.5}], "nc1/pinv").axes[0]) == [
        "0.5"
    ]
    axes = viz.layer_heatmap([{"epoch": 1, "a/nc1/pinv": 0.0, "b/nc1/pinv": 0.1}], "nc1/pinv").axes[
        0
    ]
    assert texts(axes) == ["0.1"]  # zero has no logarithm
    assert texts(viz.layer_heatmap([{"epoch": 1, "a/nc1/pinv": 0.0}], "nc1/pinv").axes[0]) == ["0"]


def test_layer_heatmap_says_what_the_rows_hold():
    with pytest.raises(InputError, match="The rows hold: epoch, train/loss"):
        viz.layer_heatmap([{"epoch": 0, "train/loss": 2.0}], "nc1/pinv")
    with pytest.raises(InputError, match="of layer9"):
        viz.layer_heatmap(layer_rows(), "nc1/pinv", ["layer9"])


# --- spectrum ----------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["class", "sample"])
def test_spectrum_draws_the_eigenvalues_of_both_covariances(weighting):
    x, y = samples()
    means = np.stack([x[y == c].mean(0) for c in range(3)])
    share = np.full(3, 1 / 3) if weighting == "class" else np.bincount(y) / 60
    within, between = np.cov((x - means[y]).T, bias=True), np.cov(means.T, aweights=share, ddof=0)
    figure = viz.spectrum(moments(), weighting=weighting)
    (axes,) = figure.axes
    sigma_w, sigma_b, mark = axes.lines
    np.testing.assert_allclose(sigma_w.get_ydata(), np.linalg.eigvalsh(within)[::-1], rtol=1e-9)
    np.testing.assert_allclose(
        sigma_b.get_ydata(), np.linalg.eigvalsh(between)[:-3:-1], rtol=1e-9
    )  # K − 1 of them: the third is zero
    assert list(sigma_b.get_xdata()) == [1, 2]
    assert mark.get_xdata() == [2, 2]
    assert (axes.get_yscale(), axes.get_xscale()) == ("log", "log")


def test_spectrum_of_full_collapse_and_of_no_spread():
    y = torch.arange(6) % 3
    collapsed = ClassStats(3, 4).update(torch.eye(3, 4)[y], y)
    figure = viz.spectrum(collapsed)
    figure.draw_without_rendering()
    sigma_b, _ = figure.axes[0].lines
    np.testing.assert_allclose(sigma_b.get_ydata(), [1 / 3, 1 / 3])
    figure = viz.spectrum(ClassStats(3, 4).update(torch.ones(6, 4), y))
    figure.draw_without_rendering()
    assert len(figure.axes[0].lines) == 1


# --- projection --------------------------------------------------------------------------------


def spots(figure):
    return figure.axes[0].collections[-1].get_offsets()


def test_projection_keeps_the_distances_of_means_in_a_plane():
    flat = torch.tensor([[0.0, 0], [3, 0], [0, 4], [1, 1]], dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(6, 2, dtype=torch.float64)).Q
    shown = torch.from_numpy(np.asarray(spots(viz.projection(flat @ basis.T + 100))))
    torch.testing.assert_close(torch.cdist(shown, shown), torch.cdist(flat, flat))
    figure = viz.projection(flat @ basis.T)
    variance = np.linalg.eigvalsh(np.cov(flat.T))[::-1] / np.trace(np.cov(flat.T)) * 100
    assert figure.axes[0].get_xlabel() == f"axis 1 ({variance[0]:.3g} % of the spread)"
    assert figure.axes[0].get_ylabel() == f"axis 2 ({variance[1]:.3g} %)"


def test_of_an_etf_the_plane_holds_2_of_k_minus_1_shares_and_dual_rows_reach_their_means():
    means = 7 * simplex_etf(6, 9) + 3
    centred = means - means.mean(0)
    figure = viz.projection(means, weight=0.1 * centred, features=means, labels=torch.arange(6))
    axes = figure.axes[0]
    assert "(20 %" in axes.get_xlabel()
    points, arrows, dots = axes.collections
    tips = np.stack((arrows.U, arrows.V), 1)
    np.testing.assert_allclose(tips, dots.get_offsets(), atol=1e-5)
    np.testing.assert_allclose(points.get_offsets(), dots.get_offsets(), atol=1e-5)
    np.testing.assert_allclose(points.get_facecolor()[:, :3], dots.get_facecolor()[:, :3])
    names = [t.get_text() for t in figure.legends[0].get_texts()]
    assert names == ["class mean", "classifier row, scaled", "sample"]


def test_projection_leaves_out_empty_classes_and_lies_flat_for_two():
    means = torch.tensor([[1.0, 0], [math.nan] * 2, [3, 0]])
    figure = viz.projection(means, NAMES, counts=COUNTS)
    np.testing.assert_allclose(sorted(spots(figure).tolist()), [[-1, 0], [1, 0]], atol=1e-12)
    assert sorted(texts(figure.axes[0])) == ["ankle boot", "coat"]
    assert "100 %" in figure.axes[0].get_xlabel()
    assert spots(viz.projection(torch.tensor([[1.0], [2.0]]))).shape == (2, 2)
    arrows = viz.projection(torch.eye(2, 6), weight=torch.randn(2, 6)).axes[0].collections[0]
    assert not arrows.V.any()  # there is no second axis to be drawn on


def test_projection_names_that_would_overlap_move_apart():
    figure = viz.projection(torch.tensor([[0.0, 0], [0, 0], [0, 0], [9, 0]]), list("abcd"))
    heights = sorted(t.xyann[1] for t in figure.axes[0].texts)[-3:]
    assert min(np.diff(heights)) > 0


def test_projection_of_many_classes_is_coloured_by_their_counts():
    counts = torch.arange(1, 41)
    axes, bar = viz.projection(torch.randn(40, 8), counts=counts).axes
    assert axes.collections[-1].get_array().tolist() == counts.tolist()
    assert bar.get_xlabel() == "training samples"
    assert len(viz.projection(torch.randn(40, 8), counts=[7] * 40).axes) == 1
    assert not texts(axes)


# --- one measurement ---------------------------------------------------------------------------


def test_measure_table_puts_errors_beside_values_and_layers_side_by_side():
    one = {"nc1/cdnv": 1.0, "nc1/cdnv/se": 0.1, "nc1/cdnv/debiased": 1.2, "nc1/vci": math.nan}
    assert viz.measure_table({"head": one}) == (
        ["measure", "value", "debiased", "se"],
        [["nc1/cdnv", 1.0, 1.2, 0.1], ["nc1/vci", None, None, None]],
    )
    assert viz.measure_table({"a": one, "b": {"nc4/agreement": 1.0}}) == (
        ["measure", "a", "b"],
        [["nc1/cdnv", 1.0, None], ["nc1/vci", None, None], ["nc4/agreement", None, 1.0]],
    )


def test_collapse_figures_are_those_that_the_statistic_allows(tmp_path):
    full = viz.collapse_figures(moments(), weight=torch.randn(3, 5), class_names=NAMES)
    assert list(full) == ["spectrum", "means", "rows", "projection"]
    rows = [t.get_text() for t in full["means"].axes[0].get_yticklabels()]
    assert rows == ["ankle boot (30)", "bag (20)", "coat (10)"]
    figures = viz.collapse_figures(moments(scatter=False))
    assert list(figures) == ["means", "projection"]
    table = (["measure", "a", "b"], [["nc1/cdnv", 0.5, None]])
    page = viz.collapse_page(
        tmp_path / "p.html", "t", table, {"a": "A", "b": "B"}, {"a": full, "b": figures}, {"k": 1}
    )
    text = page.read_text()
    assert text.count("<img") == 6
    assert "<h2>a</h2>\n<p>A</p>" in text


def test_confusion_normalises_rows_and_names_the_axes():
    axes = viz.confusion(torch.tensor([[3, 1, 0], [0, 0, 0], [1, 1, 2]]), NAMES).axes[0]
    shown = np.ma.filled(axes.images[0].get_array(), np.nan)
    np.testing.assert_allclose(shown, [[0.75, 0.25, 0], [np.nan] * 3, [0.25, 0.25, 0.5]])
    assert axes.images[0].get_clim() == (0, 1)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")


# --- accuracy ----------------------------------------------------------------------------------


def test_class_accuracy_sorts_by_counts_and_shades_by_group():
    figure = viz.class_accuracy([0.9, 0.2, 0.5], COUNTS, {"many": [0], "few": [1, 2]}, NAMES)
    (axes,) = figure.axes
    np.testing.assert_allclose([bar.get_height() for bar in axes.patches], [90, 50, 20])
    labels = [t.get_text() for t in axes.get_xticklabels()]
    assert labels == ["ankle boot (100)", "coat (30)", "bag (10)"]
    colors = [bar.get_facecolor() for bar in axes.patches]
    assert colors[0] != colors[1] == colors[2]
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["many 90 %", "few 35 %"]
    assert axes.get_ylabel() == "accuracy (%)"


def test_class_accuracy_leaves_out_what_was_not_measured_and_greys_what_has_no_group():
    nothing = viz.class_accuracy([math.nan, 0.2, 0.5], COUNTS, {"many": [0], "empty": []})
    (axes,) = nothing.axes
    assert texts(axes) == ["50", "20"]
    assert not nothing.legends
    assert axes.patches[1].get_facecolor() == axes.patches[2].get_facecolor()


def test_class_bars_are_means_over_seeds_with_sd_most_frequent_class_first():
    results = {"ce": [[0.9, 0.2, 0.5], [0.7, 0.4, 0.5]], "etf": [[0.8, math.nan, 0.1]]}
    figure = viz.class_comparison(results, COUNTS, NAMES)
    (axes,) = figure.axes
    labels = [t.get_text() for t in axes.get_yticklabels()]
    assert labels == ["ankle boot\n100", "coat\n30", "bag\n10"]
    assert axes.yaxis_inverted()  # so the first stands on top
    ce, ce_sd, etf, etf_sd = axes.containers
    np.testing.assert_allclose([bar.get_width() for bar in ce], [80, 50, 30])
    np.testing.assert_allclose([bar.get_width() for bar in etf], [80, 10, 0])
    whiskers = np.array(ce_sd.lines[2][0].get_segments())[:, :, 0]
    mean, sd = np.array([80, 50, 30]), np.std([[90, 50, 20], [70, 50, 40]], axis=0, ddof=1)
    np.testing.assert_allclose(whiskers, np.stack([mean - sd, mean + sd], 1))
    (one, other) = (s for s in etf_sd.lines[2][0].get_segments() if s.size == 4)
    np.testing.assert_allclose([one[:, 0], other[:, 0]], [[80, 80], [10, 10]])
    # A bar of one class touches that of the next method and not that of the next class.
    spans = [[(b.get_y(), b.get_y() + b.get_height()) for b in bars] for bars in (ce, etf)]
    for k in range(3):
        assert spans[0][k][1] == pytest.approx(spans[1][k][0])
        assert k - 0.5 < spans[0][k][0] < spans[1][k][1] < k + 0.5
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["ce", "etf"]


def test_class_lines_average_classes_alike_in_rank():
    rng = np.random.default_rng(0)
    counts, accuracy = rng.permutation(np.arange(100, 123)), rng.random((4, 23))
    accuracy[:, counts.argmax()] = math.nan
    axes = viz.class_comparison({"ce": accuracy, "la": accuracy / 2}, counts, bins=5).axes[0]
    groups = np.array_split(np.argsort(-counts), 5)
    each = np.stack([np.nanmean(100 * accuracy[:, g], axis=1) for g in groups], 1)
    ce, la = axes.containers
    (x, y), (beside, half) = (np.array(c.lines[0].get_data(), float) for c in (ce, la))
    np.testing.assert_allclose([y, half], [each.mean(0), each.mean(0) / 2])
    assert 0 < (beside - x).min() <= (beside - x).max() < 0.5
    whiskers = np.array(ce.lines[2][0].get_segments())[:, :, 1]
    sd = each.std(0, ddof=1)
    np.testing.assert_allclose(whiskers, np.stack([each.mean(0) - sd, each.mean(0) + sd], 1))
    ticks = [t.get_text() for t in axes.get_xticklabels()]
    assert ticks == [f"{counts[g].mean():.0f}" for g in groups]


@pytest.mark.parametrize(("K", "bars"), [(12, True), (13, False)])
def test_methods_beyond_the_colours_get_another_pattern(K, bars):
    results = {f"m{i}": torch.rand(2, K) for i in range(10)}
    axes = viz.class_comparison(results, [1] * K).axes[0]
    assert bool(axes.patches) == bars
    if bars:
        look = [(p.get_facecolor(), p.get_hatch()) for p in axes.patches[::K]]
    else:
        look = [(c.lines[0].get_color(), c.lines[0].get_linestyle()) for c in axes.containers]
    assert len(look) == len(set(look)) == 10


def run_directory(root, confusion, classes, counts, seed=0):
    from safetensors.torch import save_file

    root.mkdir(parents=True)
    data = {"name": "toy", "classes": classes, "counts": counts, "groups": {"many": [0, 1, 2]}}
    config = {"method": root.parent.name, "seed": seed, "data": data, "train": {"epochs": 3}}
    (root / "config.json").write_text(json.dumps(config | {"model": {"backbone": "small_cnn"}}))
    tensors = {"confusion": torch.tensor(confusion), "weight": torch.eye(3)}
    save_file(tensors | {"train_means": torch.eye(3)}, root / "evaluation.safetensors")
    return root, [{"epoch": 1, "test/accuracy": 0.5, "train/nc1/pinv": 0.1, "angle": 20.0}]


def test_the_comparison_page_compares_methods_class_by_class_and_by_name(tmp_path, monkeypatch):
    drawn = {}

    def keep(results, counts, names):
        drawn.update(results=results, counts=counts, names=names)
        return viz.class_comparison(results, counts, names)

    monkeypatch.setattr("ncmethods.viz.run.class_comparison", keep)
    one, two = [[8, 2, 0], [5, 5, 0], [0, 0, 4]], [[6, 2, 2], [0, 10, 0], [4, 0, 0]]
    counts = COUNTS.tolist()
    runs = {
        "ce": [
            run_directory(tmp_path / "ce" / "seed0", one, NAMES, counts),
            run_directory(tmp_path / "ce" / "seed1", two, NAMES, counts, 1),
        ],
        "other": [run_directory(tmp_path / "other" / "seed0", one, [*NAMES[1:], "hat"], counts)],
    }
    panels = {"test/accuracy": "accuracy", "angle": "angle"}
    tables = ({"all %": ("test/accuracy", 100, 1)},)
    viz.write_comparison(tmp_path, runs, tables, panels, command="x")
    assert (drawn["counts"], drawn["names"]) == (counts, NAMES)
    np.testing.assert_allclose(drawn["results"]["ce"], [[0.8, 0.5, 1], [0.6, 1, 0]], rtol=1e-6)
    np.testing.assert_allclose(drawn["results"]["other"], [[math.nan, 0.8, 0.5]], rtol=1e-6)
    page = Page((tmp_path / "report.html").read_text())
    assert sum("Test accuracy by class, most" in image["alt"] for image in page.all("img")) == 1


def test_comparison_shows_mean_sd_and_every_seed():
    results = {
        "ce": {"acc": [0.5, 0.6, 0.7], "angle": [20.0]},
        "etf": {"acc": [0.8, math.nan, None]},
    }
    figure = viz.comparison(results, {"acc": "Accuracy (0–1)", "angle": "Angle (°)", "none": "?"})
    accuracy, angle = figure.axes
    assert accuracy.get_title(loc="left") == "Accuracy (0–1)"
    assert [t.get_text() for t in accuracy.get_yticklabels()] == ["ce", "etf"]
    ce, etf = accuracy.containers
    assert ce.lines[0].get_xdata().item() == pytest.approx(0.6)
    (segment,) = ce.lines[2][0].get_segments()
    np.testing.assert_allclose(segment[:, 0], [0.5, 0.7])  # mean ± sample sd
    (segment,) = etf.lines[2][0].get_segments()
    np.testing.assert_allclose(segment[:, 0], [0.8, 0.8])
    dots = [line.get_xdata() for line in accuracy.lines if line.get_markersize() < 3]
    assert sorted(len(d) for d in dots) == [1, 3]
    assert len(angle.containers) == 1


def test_scatter_pairs_the_seeds():
    results = {
        "ce": {"a": [20.0, None, 40.0, math.nan], "acc": [0.5, 0.9, 0.7, 0.1]},
        "etf": {"a": [None], "acc": [0.8]},
        "dr": {"a": [80.0], "acc": [0.75]},
    }
    figure = viz.scatter(results, ("a", "Angle (°)"), ("acc", "Accuracy"))
    (axes,), (legend,) = figure.axes, figure.legends
    assert (axes.get_xlabel(), axes.get_title(loc="left")) == ("Angle (°)", "Accuracy")
    drawn = [np.stack(line.get_data(), 1) for line in axes.lines]
    assert [len(points) for points in drawn] == [2, 1, 1, 1]
    np.testing.assert_allclose(drawn[0], [[20, 0.5], [40, 0.7]])
    np.testing.assert_allclose(drawn[1], [[30, 0.6]])
    assert [t.get_text() for t in legend.get_texts()] == ["ce", "dr"]


def test_signed_cells_are_numbers():
    from ncmethods.viz.page import _numeric

    assert all(map(_numeric, ("+5.6 ± 0.2", "-2.5 ± 0.9", "−1", "71.2 ± 0.4", "–", None, 3)))
    assert not any(map(_numeric, ("ce", "+x", True, "minus ce")))


def test_paired_differences_by_hand():
    results = {
        "ce": [{"acc": 0.5}, {"acc": 0.7}, {"acc": None}],
        "la": [{"acc": 0.6}, {"acc": 0.82}, {"acc": 0.9}],
        "dr": [{"acc": 0.4}, {}, {}],
        "none": [{}, {}, {}],
    }
    columns, rows = viz.paired(results, {"all %": ("acc", 100, 1)})
    assert columns == ["minus ce", "all %"]
    assert rows == [["la", "+11.0 ± 1.4"], ["dr", "-10.0"], ["none", "–"]]


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: viz.scatter({"ce": {"a": [1.0]}}, ("a", ""), ("b", "")), "both a and b"),
        (lambda: viz.cosine_heatmap(torch.ones(3)), "2-D"),
        (lambda: viz.cosine_heatmap([[1.0]]), "2-D"),
        (lambda: viz.cosine_heatmap(torch.eye(3), ["a"]), "1 names"),
        (lambda: viz.cosine_heatmap(torch.eye(3), counts=[1]), "1 counts"),
        (lambda: viz.confusion(torch.ones(2, 3)), "square"),
        (lambda: viz.cosine_heatmap(torch.eye(3), sort=True), "pass counts"),
        (lambda: viz.spectrum(moments(scatter=False)), "scatter=True"),
        (lambda: viz.projection(torch.full((3, 2), math.nan)), "two classes or more, got 0"),
        (lambda: viz.projection(torch.eye(3), weight=torch.eye(4)), r"weight must be \[K, 3\]"),
        (lambda: viz.projection(torch.eye(3), features=torch.eye(4)), r"features must be \[N, 3\]"),
        (lambda: viz.class_accuracy([0.1], COUNTS, {}), r"must both be \[K\]"),
        (lambda: viz.class_comparison({}, COUNTS), "at least one method"),
        (lambda: viz.class_comparison({"ce": [[0.1, 0.2]]}, COUNTS), r"K = 3 .*'ce': \(1, 2\)"),
        (lambda: viz.class_comparison({"ce": [0.1, 0.2, 0.3]}, COUNTS), r"'ce': \(3,\)"),
        (lambda: viz.class_comparison({"ce": [[0.1] * 3]}, COUNTS, ["a"]), "1 names"),
        (lambda: viz.comparison({}), "methods: none"),
        (lambda: viz.comparison({"ce": {"a": [1.0]}}, {"b": "B"}), "methods: ce"),
    ],
)
def test_bad_input_is_named(call, match):
    with pytest.raises(InputError, match=match):
        call()


# --- the report --------------------------------------------------------------------------------


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "img"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def sections():
    return [
        Text("One <script>alert(1)</script> & two.\n\nSecond paragraph."),
        Heading("Results & more"),
        Table(
            ["method", "accuracy", "rare angle", *[f"column {i}" for i in range(12)]],
            [["etf", "71.2 ± 0.4", None, *[0.123456] * 12], ["ce", "–", 2, *[-1e-7] * 12]],
            caption="mean ± sd",
        ),
        *[Image(make(), f'"{name}" & co') for name, make in FIGURES.items()],
        Details("Configuration", {"data": {"name": "digits", "n": 3}, "path": "x" * 300}),
        Details("Command", "ncmethods long-tailed --methods " + "y" * 300),
    ]


def test_the_report_stands_alone_and_escapes_everything(tmp_path):
    text = html_report(tmp_path / "report.html", title="a < b", sections=sections()).read_text()
    page = Page(text)
    assert not page.open
    for tag, attrs in page.tags:
        assert tag not in {"script", "link", "iframe", "base"}
        assert not any(name.startswith("on") or name == "href" for name in attrs)
    assert "url(" not in text
    assert "@import" not in text
    assert "http" not in re.sub(r'base64,[^"]*', "", text)
    images = page.all("img")
    assert len(images) == len(FIGURES)
    for image, name in zip(images, FIGURES, strict=True):
        assert image["src"].startswith("data:image/png;base64,")
        assert image["alt"] == f'"{name}" & co'
        assert image["width"] == "450"
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all(
        "meta"
    )
    assert "<title>a &lt; b</title>" in text
    assert "<td>data.name</td><td>digits</td>" in text
    assert text.count("<table>") == text.count('<div class="scroll"><table>') == 2


def test_numbers_stand_right_and_read_short(tmp_path):
    text = html_report(tmp_path / "r.html", title="t", sections=sections()[:3]).read_text()
    assert '<td>etf</td><td class="n">71.2 ± 0.4</td><td class="n">–</td>' in text
    assert '<td class="n">0.1235</td>' in text
    assert '<td class="n">-1e-07</td>' in text


def test_the_same_sections_give_the_same_bytes(tmp_path):
    a = html_report(tmp_path / "a.html", title="t", sections=sections()[:4])
    b = html_report(tmp_path / "b.html", title="t", sections=sections()[:4])
    assert a.read_bytes() == b.read_bytes()


def test_the_report_refuses_what_it_cannot_show(tmp_path):
    with pytest.raises(InputError, match="got str"):
        html_report(tmp_path / "r.html", title="t", sections=["text"])
    with pytest.raises(InputError, match="2 cells"):
        html_report(tmp_path / "r.html", title="t", sections=[Table(["a", "b"], [[1]])])
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="Cannot write"):
        html_report(tmp_path / "file" / "r.html", title="t", sections=[])


PROBE = """<script>addEventListener("load", () => {
  document.querySelectorAll("details").forEach(d => d.open = true);
  const shown = i => i.naturalWidth > 0 && i.getBoundingClientRect().width > 0
    && i.getBoundingClientRect().right <= innerWidth;
  const page = document.documentElement;
  console.log("PROBE" + JSON.stringify({width: innerWidth, overflow: page.scrollWidth - innerWidth,
    images: document.images.length, shown: [...document.images].filter(shown).length}));
})</script></body>"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 375])
def test_a_real_browser_shows_every_figure_without_errors_or_sideways_scrolling(tmp_path, width):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("needs chromium")
    text = html_report(tmp_path / "report.html", title="Run", sections=sections()).read_text()
    (tmp_path / "probed.html").write_text(text.replace("</body>", PROBE))
    (tmp_path / "window.html").write_text(  # headless windows are at least 500 px wide
        f'<body style="margin:0"><iframe src="probed.html" style="width:{width}px; height:9000px; '
        'border:0"></iframe>'
    )
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    flags += "--disable-background-networking --disable-component-update --enable-logging=stderr"
    run = subprocess.run(
        [
            chromium,
            *flags.split(),
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--screenshot={tmp_path / 'shot.png'}",
            f"--window-size={width},9000",
            (tmp_path / "window.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    console = [line for line in run.stderr.splitlines() if "CONSOLE" in line]
    (line,) = console  # the probe's own, and no error beside it
    probe = json.loads(re.search(r"PROBE(\{.*?\})", line)[1].replace('\\"', '"'))
    figures = len(FIGURES)
    assert probe == {"width": width, "overflow": 0, "images": figures, "shown": figures}
    assert (tmp_path / "shot.png").stat().st_size > 20_000
