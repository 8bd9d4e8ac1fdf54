"""Tables and figures of the long-tail study (long-tail.md) from its runs.

    python docs/studies/long_tail.py            # from long-tail.jsonl, which is kept here
    python docs/studies/long_tail.py RUNS       # gather it first, from RUNS/TABLE/METHOD/seedK

Prints the tables in Markdown and writes the figures to docs/studies/figures.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from pathlib import Path

from safetensors.torch import load_file
from scipy import stats

from ncmethods import viz
from ncmethods.tracking import read_rows

HERE = Path(__file__).parent
TABLES = ("exp-100", "exp-50", "exp-10", "step-100", "step-50", "step-10")
TABLES += ("exp-canonical", "step-canonical")
SIDES = ("ce", "la")  # what the others are compared with, seed by seed
CONTROL = "ce-balanced-control"
ANGLES = {
    "NC1": ("train/nc1/pinv", 1, 3),
    "rare means °": ("train/angle/rare_means_min", 1, 1),
    "debiased": ("train/angle/rare_means_min/debiased", 1, 1),
    "test, debiased": ("test/angle/rare_means_min/debiased", 1, 1),
    "rare rows °": ("train/angle/rare_weight_min", 1, 1),
}
BRIEF = ("all %", "few %", "macro-F1", "NLL, T", "test, debiased", "rare rows °")
ACCURACY = {k: v for k, v in viz.ACCURACY.items() if k != "ECE, T"}
KEYS = [key for key, *_ in (*ACCURACY.values(), *ANGLES.values())] + ["train/loss"]


def gather(runs: Path) -> list[dict]:
    """One flat row per run: what was measured last, its recall by class, and what was chosen."""
    rows = []
    for table in TABLES:
        for place in sorted((runs / table).glob("*/seed*/result.json")):
            run, config = place.parent, json.loads((place.parent / "config.json").read_text())
            last = read_rows(run / "metrics.jsonl")[-1]
            confusion = load_file(run / "evaluation.safetensors")["confusion"].double()
            recall = confusion.diagonal() / confusion.sum(1)
            rows.append(
                {"table": table, "method": config["method"], "seed": config["seed"]}
                | {key: config["train"][key] for key in ("lr", "weight_decay")}
                | {key: round(last[key], 5) for key in KEYS if last.get(key) is not None}
                | {"recall": [round(r, 4) for r in recall.tolist()]}
                | {"counts": config["data"]["counts"]}
            )
    return rows


def by_method(rows: list[dict], table: str) -> dict[str, list[dict]]:
    """Rows of one table by method, ordered by seed; methods in the order of their first run."""
    order = ("ce", "la", "vs", "focal", "mse", "drw", "mixup-drw", "balanced-sampling", "centres")
    order += ("ldam-drw", "etf-la", "etf-dr-balanced", CONTROL)
    found = {m: [r for r in rows if (r["table"], r["method"]) == (table, m)] for m in order}
    return {m: sorted(of, key=lambda r: r["seed"]) for m, of in found.items() if of}


def paired(
    found: dict[str, list[dict]], side: str, key: str
) -> dict[str, tuple[float, float, float]]:
    """Mean and sd of the differences to ``side``, in points, and Holm's p of a paired t-test."""
    out = {}
    for method, of in found.items():
        if method in (side, CONTROL) or len(of) != len(found.get(side, ())):
            continue
        d = [100 * (b[key] - a[key]) for a, b in zip(found[side], of, strict=True)]
        p = stats.ttest_1samp(d, 0).pvalue
        out[method] = (statistics.fmean(d), statistics.stdev(d), p)
    ranked = sorted(out, key=lambda m: out[m][2])
    worst = 0.0
    for i, method in enumerate(ranked):
        mean, sd, p = out[method]
        worst = max(worst, min(1.0, (len(ranked) - i) * p))
        out[method] = (mean, sd, worst)
    return out


def markdown(rows: list[dict]) -> str:
    """All tables."""
    parts = []
    for table in TABLES:
        found = by_method(rows, table)
        if not found:
            continue
        seeds = len(next(iter(found.values())))
        parts.append(f"### {table} ({seeds} seeds)")
        whole = table.endswith("-100")
        brief = {k: v for k, v in (ACCURACY | ANGLES).items() if k in BRIEF}
        for columns in (ACCURACY, ANGLES) if whole else (brief,):
            titles, lines = viz.summary(found, columns)
            if columns is ACCURACY:
                titles = [titles[0], "lr, wd", *titles[1:]]
                for line in lines:
                    run = found[line[0]][0]
                    line.insert(1, f"{run['lr']:g}, {run['weight_decay']:g}")
            keep = [i for i in range(len(titles)) if any(line[i] != "–" for line in lines)]
            cells = [[line[i] for i in keep] for line in lines]
            parts.append(viz.text_table([titles[i] for i in keep], cells))
        if not whole:
            continue
        sides = {
            (side, name): paired(found, side, key)
            for side in SIDES
            for name, key in (("all", "test/accuracy"), ("few", "test/accuracy/few"))
        }
        lines = []
        for method in found:
            cells = [of.get(method) for of in sides.values()]
            if any(cells):
                lines.append(
                    [method]
                    + [f"{c[0]:+.1f} ± {c[1]:.1f} ({c[2]:.2g})" if c else "–" for c in cells]
                )
        parts.append(viz.text_table(["points", *(f"{n} − {s} (p)" for s, n in sides)], lines))
    return "\n\n".join(parts)


def draw(rows: list[dict], to: Path) -> None:
    """Accuracy against geometry, accuracy by class, and accuracy against R."""
    to.mkdir(exist_ok=True)
    for profile in ("exp", "step"):
        found = by_method(rows, f"{profile}-100")
        if not found:
            continue
        x = (
            "test/angle/rare_means_min/debiased",
            "smallest angle of rare means on test images, degrees",
        )
        y = ("test/accuracy", f"accuracy, {profile}, R = 100")
        values = {m: {k: [r.get(k) for r in of] for k, _ in (x, y)} for m, of in found.items()}
        viz.scatter(values, x, y).savefig(to / f"long-tail-{profile}.png", dpi=150)
    lines = {
        (profile, m): [
            (R, [r["test/accuracy/few"] for r in by_method(rows, f"{profile}-{R}").get(m, [])])
            for R in (10, 50, 100)
        ]
        for profile, m in itertools.product(
            ("exp", "step"), ("ce", "la", "mixup-drw", "ldam-drw", "etf-la")
        )
    }
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.0), layout="constrained")
    for axes, profile in zip(figure.subplots(1, 2, sharey=True), ("exp", "step"), strict=True):
        for (where, method), points in lines.items():
            drawn = [(R, v) for R, v in points if v]
            if where == profile and drawn:
                mean = [100 * statistics.fmean(v) for _, v in drawn]
                sd = [100 * statistics.stdev(v) if len(v) > 1 else 0 for _, v in drawn]
                axes.errorbar(
                    [R for R, _ in drawn], mean, sd, fmt="o-", ms=4, capsize=2, label=method
                )
        axes.set_xscale("log")
        axes.set_xticks([10, 50, 100], ["10", "50", "100"])
        axes.minorticks_off()
        axes.set_title(f"{profile}: accuracy of the few, %", fontsize=9, loc="left")
        axes.set_xlabel("imbalance R", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False)
    figure.savefig(to / "long-tail-R.png", dpi=150)


if __name__ == "__main__":
    kept = HERE / "long-tail.jsonl"
    if len(sys.argv) > 1:
        gathered = gather(Path(sys.argv[1]))
        kept.write_text("".join(json.dumps(row) + "\n" for row in gathered))
    given = [json.loads(line) for line in kept.read_text().splitlines()]
    print(markdown(given))
    draw(given, HERE / "figures")
