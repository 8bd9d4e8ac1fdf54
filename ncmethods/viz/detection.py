"""Figures of out-of-distribution detection: score histograms, ROC curves, scorers × sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ncmethods._core import InputError
from ncmethods.viz.figures import (
    COLORS,
    INK,
    SMALL,
    STYLES,
    TITLE,
    _figure,
    _heatmap,
    _legend,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["auroc_heatmap", "contact_sheet", "roc_curves", "score_histogram"]


def score_histogram(
    scores: Mapping[str, Tensor],
    *,
    threshold: float | None = None,
    alpha: float | None = None,
    title: str = "",
) -> Figure:
    """Distributions of a score, one outline per set, with the threshold if there is one.

    The axis leaves out the outermost 1 % of each side and what is further from the first set than
    three times its width; all that joins the bars at the ends.

    Args:
        scores: set → scores [N], in-distribution first; it is filled.
        threshold: above which an input is flagged.
        alpha: the share of false alarms that the threshold was made for.
        title: of the figure.

    Raises:
        InputError: no finite score.
    """
    given = {name: s.detach().double().cpu() for name, s in scores.items()}
    given = {name: s[s.isfinite()] for name, s in given.items() if bool(s.isfinite().any())}
    if not given:
        raise InputError(f"There is no finite score to draw in {', '.join(scores) or 'no set'}.")
    ends = torch.stack([s.quantile(torch.tensor([0.01, 0.99]).double()) for s in given.values()])
    (inner, outer), wide = ends[0].tolist(), float(ends[0].diff())
    low = max(float(ends[:, 0].min()), inner - 3 * wide) if wide else float(ends[:, 0].min())
    high = min(float(ends[:, 1].max()), outer + 3 * wide) if wide else float(ends[:, 1].max())
    if threshold is not None:
        low, high = min(low, threshold), max(high, threshold)
    pad = 0.03 * (high - low) or 1.0
    edges = torch.linspace(low - pad, high + pad, 51, dtype=torch.float64)
    figure, axes = _figure(3.2)
    handles: dict[str, Any] = {}
    for i, (name, s) in enumerate(given.items()):
        color, style = COLORS[i % len(COLORS)], STYLES[i // len(COLORS) % len(STYLES)]
        share = torch.histc(s.clamp(low, high), 50, float(edges[0]), float(edges[-1])) / len(s)
        if i == 0:
            axes.stairs(share.numpy(), edges.numpy(), fill=True, color=color, alpha=0.25)
        handles[name] = axes.stairs(
            share.numpy(), edges.numpy(), color=color, lw=1.4, ls=style, fill=False
        )
    if threshold is not None:
        text = "threshold" + (f", α = {alpha:g}" if alpha is not None else "")
        handles[text] = axes.axvline(threshold, color=INK, lw=1.0, ls="--")
    axes.set_xlabel("score, higher = more out-of-distribution", fontsize=SMALL, color=INK)
    axes.set_ylabel("share per bin", fontsize=SMALL, color=INK)
    axes.set_title(title, fontsize=TITLE, color=INK, loc="left")
    _legend(figure, handles)
    return figure


def roc_curves(
    scores_id: Tensor, scores_ood: Mapping[str, Tensor], *, title: str = "", points: int = 400
) -> Figure:
    """Detected share of each set against false alarms, for every threshold.

    Args:
        scores_id: in-distribution scores [N].
        scores_ood: set → scores [M].
        title: of the figure.
        points: per curve, at most.

    Raises:
        InputError: a side without scores.
    """
    s = scores_id.detach().double().cpu().sort().values
    if not len(s) or not scores_ood or not all(len(t) for t in scores_ood.values()):
        raise InputError("roc_curves needs at least one score on each side.")
    figure, axes = _figure(3.6)
    axes.plot([0, 1], [0, 1], color="#bbbbbb", lw=1)
    handles = {}
    for i, (name, given) in enumerate(scores_ood.items()):
        t = given.detach().double().cpu().sort().values
        cuts = torch.unique(torch.cat((s, t)))
        cuts = cuts[torch.linspace(0, len(cuts) - 1, min(points, len(cuts))).long()]
        false, found = (1 - torch.searchsorted(x, cuts, right=False) / len(x) for x in (s, t))
        end = torch.zeros(1)
        (handles[name],) = axes.plot(
            torch.cat((false, end)), torch.cat((found, end)),
            color=COLORS[i % len(COLORS)], ls=STYLES[i // len(COLORS) % len(STYLES)], lw=1.4,
        )  # fmt: skip
    axes.set_xlabel("false alarms (in-distribution flagged)", fontsize=SMALL, color=INK)
    axes.set_ylabel("detected", fontsize=SMALL, color=INK)
    axes.set_aspect("equal")
    axes.set_title(title, fontsize=TITLE, color=INK, loc="left")
    _legend(figure, handles)
    return figure


def auroc_heatmap(
    values: Mapping[str, Mapping[str, float]], sets: Sequence[str], *, title: str = ""
) -> Figure:
    """Scorers by sets, AUROC in per cent in each cell; ½ is chance.

    Args:
        values: scorer → set → AUROC in [0, 1].
        sets: columns, in order.
        title: of the figure.

    Raises:
        InputError: nothing to draw.
    """
    from matplotlib.colors import Normalize

    if not values or not sets:
        raise InputError("auroc_heatmap needs at least one scorer and one set.")
    cells = torch.tensor([[row.get(name, torch.nan) for name in sets] for row in values.values()])
    figure, axes, _ = _heatmap(
        cells,
        norm=Normalize(0.5, 1.0),
        cmap="viridis",
        bar="AUROC (0.5 is chance)",
        cell=lambda value: f"{100 * value:.0f}",
        height=1.5 + 0.2 * len(values),
        square=False,
    )
    axes.set_yticks(range(len(values)), list(values), fontsize=SMALL)
    axes.set_xticks(range(len(sets)), list(sets), fontsize=SMALL, rotation=30, ha="right")
    axes.set_title(title, fontsize=TITLE, color=INK, loc="left")
    return figure


def contact_sheet(images: Sequence[Tensor], captions: Sequence[str], *, title: str = "") -> Figure:
    """Images in rows of six, each with its caption.

    Args:
        images: uint8 [C, H, W], one or three channels.
        captions: as many.
        title: of the sheet.

    Raises:
        InputError: no image, or another number of captions.
    """
    from matplotlib.figure import Figure

    if not images or len(images) != len(captions):
        raise InputError(f"{len(images)} images and {len(captions)} captions: as many of each.")
    columns = min(6, len(images))
    rows = -(-len(images) // columns)
    size = (1.5 * columns, 1.85 * rows + 0.4)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        axes = figure.add_subplot(rows, columns, i + 1)
        shown = image.detach().cpu().permute(1, 2, 0).expand(-1, -1, 3)
        axes.imshow(shown.numpy())
        axes.set_axis_off()
        axes.set_title(caption, fontsize=7, color=INK)
    figure.suptitle(title, fontsize=TITLE, color=INK, x=0.02, ha="left")
    return figure
