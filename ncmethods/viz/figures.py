"""Figures: made with matplotlib's object API, so no window, no backend and no global state."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ncmethods._core import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 4.5  # inches
SMALL, TITLE = 9, 10  # points
INK, GRID, MISSING = "#222222", "#dddddd", "#bbbbbb"
# Okabe & Ito: told apart with every common form of colour blindness.
COLORS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#888888"]
GROUP_COLORS = ["#0072B2", "#56B4E9", "#E69F00", "#D55E00"]
STYLES = ["-", "--", ":", "-."]
ANNOTATE = 12  # classes up to which each cell or bar carries its number
NAMED = 30  # classes up to which each is named on the axis

# Row key without its prefix → (title, y axis, scale).
NC_PANELS = {
    "nc1/pinv": ("NC1 within-class spread", "tr(Σ_W Σ_B⁺) / K", "log"),
    "nc2/equiangular_means": ("NC2 angles of means", "mean |cos + 1/(K−1)|", "linear"),
    "nc2/gram_etf_means": ("NC2 Gram of means", "distance to the ETF", "linear"),
    "nc3/self_duality": ("NC3 head and means", "distance", "linear"),
    "nc4/agreement": ("NC4 nearest mean", "agreement, 0–1", "linear"),
    "angle/rare_means_min": ("Rare means", "smallest angle, degrees", "linear"),
    "angle/rare_weight_min": ("Rare classifier rows", "smallest angle, degrees", "linear"),
}

Rows = Iterable[Mapping[str, Any]]


def nc_curves(
    rows: Rows | Mapping[str, Rows],
    keys: Sequence[str] | None = None,
    *,
    prefixes: Sequence[str] = ("train", "test"),
) -> Figure:
    """Neural-collapse metrics over epochs, one small panel per metric.

    Several rows of one epoch (seeds chained into one list) become their mean and, as a band, their
    range.

    Args:
        rows: of metrics.jsonl, each with ``epoch``; or label → rows, to compare methods.
        keys: metrics without prefix, ``nc1/pinv``; by default the core ones that the rows hold.
        prefixes: which of ``train/nc1/pinv``, ``test/nc1/pinv`` to draw; a key without prefix
            always is.

    Raises:
        InputError: no row holds any of the keys.
    """
    runs = {k: list(v) for k, v in (rows if isinstance(rows, Mapping) else {"": rows}).items()}
    found: dict[str, dict[tuple[str, str], dict[float, list[float]]]] = {}
    for key in keys or NC_PANELS:
        for label, run in runs.items():
            for prefix in (*prefixes, ""):
                name = f"{prefix}/{key}" if prefix else key
                points: dict[float, list[float]] = {}
                for row in run:
                    if row.get(name) is not None and row.get("epoch") is not None:
                        points.setdefault(row["epoch"], []).append(row[name])
                if points:
                    found.setdefault(key, {})[label, prefix] = points
    if not found:
        held = sorted({k for run in runs.values() for row in run for k in row})
        raise InputError(
            f"No row holds {', '.join(keys or NC_PANELS)} with prefix {', '.join(prefixes)} or "
            f"none. The rows hold: {', '.join(held) or 'nothing'}."
        )
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    prefixed = [p for p in prefixes if any(p == q for s in found.values() for _, q in s)]
    names = list(runs) if len(runs) > 1 else prefixed
    colors = dict(zip(names, _cycle(COLORS), strict=False)) | {"": INK}
    styles = dict(zip(prefixed, _cycle(STYLES), strict=False)) | {"": "-"}
    legend = {name: Line2D([], [], color=colors[name]) for name in names}
    if len(prefixed) > 1:
        legend |= {
            p: Line2D([], [], ls=styles[p], color=INK if len(runs) > 1 else colors[p])
            for p in prefixed
        }
    figure, panels = _grid(len(found), height=1.75, legend=len(legend))
    for axes, (key, series) in zip(panels, found.items(), strict=True):
        title, unit, scale = NC_PANELS.get(key, (key, "", "linear"))
        for (label, prefix), points in series.items():
            epochs = sorted(points)
            values = [points[e] for e in epochs]
            color = colors[label if len(runs) > 1 else prefix]
            mean = [sum(v) / len(v) for v in values]
            axes.plot(epochs, mean, styles[prefix], color=color, marker="o", ms=2.5, lw=1.5)
            if any(len(v) > 1 for v in values):
                low, high = [min(v) for v in values], [max(v) for v in values]
                axes.fill_between(epochs, low, high, color=color, alpha=0.2, lw=0)
        if any(v > 0 for points in series.values() for values in points.values() for v in values):
            axes.set_yscale(scale)
            if scale == "log":  # 1, 2, 5, 10 …: labels of every digit would overlap
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
                axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
                axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_title(f"{title}\n{unit}", fontsize=SMALL, color=INK, loc="left")
        axes.set_xlabel("epoch", fontsize=SMALL, color=INK)
        axes.locator_params(axis="x", nbins=5, integer=True, min_n_ticks=1)
    if legend:
        _legend(figure, legend)
    return figure


def cosine_heatmap(
    vectors: Tensor,
    class_names: Sequence[str] | None = None,
    *,
    title: str = "Cosine between classes",
    counts: Tensor | Sequence[int] | None = None,
) -> Figure:
    """Cosines between the rows of ``vectors``, on a fixed scale from −1 to 1.

    Args:
        vectors: class means, already centred, or classifier rows [K, D]; zero rows stay grey.
        class_names: one per class; by default their indices.
        title: of the figure.
        counts: training samples per class [K], written beside the names.
    """
    unit = F.normalize(_matrix("vectors", vectors), dim=1)
    cosines = (unit @ unit.T).clamp(-1, 1)
    cosines[unit.norm(dim=1) < 0.5] = math.nan
    cosines[:, unit.norm(dim=1) < 0.5] = math.nan
    names = _names(len(unit), class_names)
    figure, axes = _heatmap(cosines, names, limits=(-1, 1), cmap="RdBu_r", bar="cosine")
    _class_ticks(axes.yaxis, _names(len(unit), class_names, counts))
    axes.set_title(title, fontsize=TITLE, color=INK)
    return figure


def confusion(
    matrix: Tensor,
    class_names: Sequence[str] | None = None,
    *,
    title: str = "Confusion: share of each true class",
) -> Figure:
    """Confusion matrix with rows normalised to 1; a class without test samples stays grey.

    Args:
        matrix: counts [K, K], true class by row, predicted class by column.
        class_names: one per class; by default their indices.
        title: of the figure.

    Raises:
        InputError: not square.
    """
    counted = _matrix("matrix", matrix)
    if counted.shape[0] != counted.shape[1]:
        raise InputError(f"matrix must be square [K, K], got shape {tuple(counted.shape)}.")
    shares = counted / counted.sum(dim=1, keepdim=True)  # 0 / 0 = NaN: grey
    names = _names(len(shares), class_names)
    figure, axes = _heatmap(shares, names, limits=(0, 1), cmap="Blues", bar="share of true class")
    axes.set_title(title, fontsize=TITLE, color=INK)
    axes.set_xlabel("predicted class", fontsize=SMALL, color=INK)
    axes.set_ylabel("true class", fontsize=SMALL, color=INK)
    return figure


def class_accuracy(
    per_class: Tensor | Sequence[float],
    counts: Tensor | Sequence[int],
    groups: Mapping[str, Sequence[int]],
    class_names: Sequence[str] | None = None,
    *,
    title: str = "Test accuracy by class",
) -> Figure:
    """Accuracy of each class as bars, most frequent class first, shaded by group.

    Args:
        per_class: accuracies in 0–1 [K]; NaN leaves the place empty.
        counts: training samples per class [K].
        groups: name → class indices, say many, medium and few; the legend gives their means.
        class_names: one per class; by default their indices.
        title: of the figure.

    Raises:
        InputError: lengths differ.
    """
    percent = 100 * torch.as_tensor(per_class, dtype=torch.float64)
    number = torch.as_tensor(counts)
    if percent.ndim != 1 or percent.shape != number.shape:
        raise InputError(
            f"per_class and counts must both be [K], got shapes {tuple(percent.shape)} "
            f"and {tuple(number.shape)}."
        )
    K = len(percent)
    names = _names(K, class_names, number)
    order = number.argsort(descending=True, stable=True).tolist()
    place = {k: i for i, k in enumerate(order)}
    figure, axes = _figure(3.5)
    axes.grid(False, axis="x")
    colors = [MISSING] * K
    handles = {}
    for (group, members), color in zip(groups.items(), _cycle(GROUP_COLORS), strict=False):
        for k in members:
            colors[place[k]] = color
        mean = percent[list(members)].nanmean().item()
        if not math.isnan(mean):
            handles[f"{group} {mean:.0f} %"] = color
    bars = axes.bar(range(K), percent[order].nan_to_num().tolist(), color=colors, width=0.85)
    for bar, value in zip(bars, percent[order].tolist(), strict=True):
        if K <= ANNOTATE and not math.isnan(value):
            middle = bar.get_x() + bar.get_width() / 2
            axes.text(middle, value + 1, f"{value:.0f}", ha="center", fontsize=SMALL, color=INK)
    _class_ticks(axes.xaxis, [names[k] for k in order])
    axes.set_xlim(-0.6, K - 0.4)
    axes.set_ylim(0, 108)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("accuracy (%)", fontsize=SMALL, color=INK)
    axes.set_xlabel("class (training samples), most frequent first", fontsize=SMALL, color=INK)
    axes.set_title(title, fontsize=TITLE, color=INK)
    if handles:
        from matplotlib.patches import Patch

        _legend(figure, {name: Patch(color=color) for name, color in handles.items()})
    return figure


def comparison(
    results: Mapping[str, Mapping[str, Sequence[float | None]]],
    metrics: Mapping[str, str] | None = None,
) -> Figure:
    """Methods side by side: one panel per metric, mean ± sd above a dot per seed.

    Args:
        results: method → metric → its values over the seeds; None and NaN are left out.
        metrics: metric → panel title with the unit; by default every metric under its own name.

    Raises:
        InputError: nothing to draw.
    """
    titles = metrics or {m: m for values in results.values() for m in values}
    shown = {m: t for m, t in titles.items() if any(m in values for values in results.values())}
    if not shown:
        raise InputError(
            f"No method has a value for {', '.join(titles) or 'any metric'}; "
            f"methods: {', '.join(results) or 'none'}."
        )
    figure, panels = _grid(len(shown), height=0.75 + 0.2 * len(results))
    for i, (axes, (metric, title)) in enumerate(zip(panels, shown.items(), strict=True)):
        for y, (method, color) in enumerate(zip(results, _cycle(COLORS), strict=False)):
            given = [v for v in results[method].get(metric, []) if v is not None]
            values = torch.tensor(given, dtype=torch.float64)
            values = values[values.isfinite()]
            if not len(values):
                continue
            sd = values.std().item() if len(values) > 1 else 0.0
            axes.plot(values, [y + 0.22] * len(values), "o", ms=2.5, color=color, alpha=0.6, mew=0)
            axes.errorbar(values.mean(), y - 0.1, xerr=sd, fmt="o", ms=5, color=color, capsize=2.5)
        axes.set_ylim(len(results) - 0.5, -0.5)
        names = list(results) if i % 2 == 0 else [""] * len(results)
        axes.set_yticks(range(len(results)), names, fontsize=SMALL)
        axes.locator_params(axis="x", nbins=3)
        axes.set_title(title, fontsize=SMALL, color=INK, loc="left")
    return figure


# --- what the figures share --------------------------------------------------------------------


def _figure(height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="white")
    return figure, _clean(figure.add_subplot())


def _grid(panels: int, height: float, legend: int = 0) -> tuple[Figure, list[Axes]]:
    """A figure of ``panels`` axes in two columns, rows ``height`` inches high, and a legend."""
    from matplotlib.figure import Figure

    rows = math.ceil(panels / 2)
    size = (WIDTH, height * rows + 0.1 + 0.2 * math.ceil(legend / 3))
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    return figure, [_clean(figure.add_subplot(rows, 2, i + 1)) for i in range(panels)]


def _clean(axes: Axes) -> Axes:
    axes.set_facecolor("white")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(which="both", labelsize=SMALL, labelcolor=INK, color=INK)
    axes.grid(color=GRID, lw=0.6)
    axes.set_axisbelow(True)
    return axes


def _legend(figure: Figure, handles: Mapping[str, Any]) -> None:
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=min(len(handles), 3),
        fontsize=SMALL,
        frameon=False,
        labelcolor=INK,
        columnspacing=1.2,
        handlelength=1.8,
    )


def _heatmap(
    values: Tensor, names: Sequence[str], *, limits: tuple[float, float], cmap: str, bar: str
) -> tuple[Figure, Axes]:
    """Square cells of ``values`` [K, K] on the fixed scale ``limits``; NaN is grey."""
    import matplotlib.ticker

    K = len(values)
    figure, axes = _figure(5.0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    colors = matplotlib.colormaps[cmap].with_extremes(bad=MISSING)
    image = axes.imshow(values.numpy(), cmap=colors, vmin=limits[0], vmax=limits[1])
    percent = ", cells × 100" if K <= ANNOTATE else ""
    colorbar = figure.colorbar(image, ax=axes, orientation="horizontal", shrink=0.8, aspect=30)
    colorbar.locator = matplotlib.ticker.MaxNLocator(4)
    colorbar.update_ticks()
    colorbar.set_label(bar + percent, fontsize=SMALL, color=INK)
    colorbar.ax.tick_params(labelsize=SMALL, labelcolor=INK)
    _class_ticks(axes.xaxis, names)
    _class_ticks(axes.yaxis, names)
    for i in range(K) if K <= ANNOTATE else ():
        for j in range(K):
            value = values[i, j].item()
            if not math.isnan(value):
                red, green, blue, _ = colors((value - limits[0]) / (limits[1] - limits[0]))
                dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
                text = f"{100 * value:.0f}".replace("-0", "0").replace("-", "−")
                axes.text(
                    j, i, text, ha="center", va="center", fontsize=SMALL,
                    color="white" if dark else INK,
                )  # fmt: skip
    return figure, axes


def _class_ticks(axis: Any, names: Sequence[str]) -> None:
    """Name every class, or every few where there are too many."""
    step = 1 if len(names) <= NAMED else math.ceil(len(names) / 10)
    places = range(0, len(names), step)
    short = step > 1 or max(map(len, names)) < 3
    rotation = 90 if axis.axis_name == "x" and not short else 0
    axis.set_ticks(places, [names[i] for i in places], rotation=rotation, fontsize=SMALL)


def _names(
    K: int, class_names: Sequence[str] | None, counts: Tensor | Sequence[int] | None = None
) -> list[str]:
    names = [str(k) for k in range(K)] if class_names is None else list(class_names)
    if len(names) != K or (counts is not None and len(counts) != K):
        raise InputError(
            f"class_names and counts must have one entry for each of the {K} classes, got "
            f"{len(names)} names" + ("." if counts is None else f" and {len(counts)} counts.")
        )
    names = [name if len(name) <= 18 else name[:17] + "…" for name in names]
    if counts is None or K > NAMED:
        return names
    return [f"{name} ({int(n)})" for name, n in zip(names, counts, strict=True)]


def _matrix(name: str, value: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim != 2 or not len(value):
        raise InputError(f"{name} must be a 2-D tensor with one row per class, got {value!r:.200}.")
    return value.detach().to("cpu", torch.float64)


def _cycle(colors: Sequence[str]) -> Iterable[str]:
    while True:
        yield from colors
