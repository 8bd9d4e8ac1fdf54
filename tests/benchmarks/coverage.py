"""How often ``debiased ± t·se`` of a report covers the truth: nominal 95 %.

    python tests/benchmarks/coverage.py [--repeats 200] [--groups 20]

Simulated: Gaussian classes with unequal variances by direction (K = 10, D = 64); the truth is the
report of a point set with exactly the moments of the population. Real: scikit-learn's digits behind
a fixed random ReLU layer; the population is the whole set (each image as likely as the next within
its class), samples are drawn from it with replacement, and the truth is the report of the whole.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from scipy.stats import t as student
from torch import Tensor, nn

from ncmethods import frames, metrics
from ncmethods.stats import ClassStats

f64 = torch.float64
BALANCED = [50] * 10
TAIL = [200, 140, 100, 70, 50, 35, 28, 22, 18, 15]


class Setting(NamedTuple):
    """A population, and how many samples of each class are drawn from it."""

    draw: Callable[[Tensor], Tensor]  # labels → features
    population: tuple[Tensor, Tensor]  # features and labels with its exact moments
    counts: list[int]
    head: nn.Module


def gaussian(means: Tensor, counts: list[int], seed: int) -> Setting:
    """Classes μ_c + A g with g standard normal and A diagonal."""
    K, D = means.shape
    noise = torch.Generator().manual_seed(seed)
    A = torch.diag(torch.linspace(0.3, 1.2, D, dtype=f64))
    head = nn.Linear(D, K, bias=False, dtype=f64)
    with torch.no_grad():
        head.weight.copy_(means + torch.randn(K, D, dtype=f64, generator=noise))
    cross = math.sqrt(D) * torch.cat((A, -A))  # covariance A² exactly
    points = (means[:, None] + cross).flatten(0, 1)
    return Setting(
        lambda y: means[y] + torch.randn(len(y), D, dtype=f64, generator=noise) @ A,
        (points, torch.arange(K).repeat_interleave(2 * D)),
        counts,
        head,
    )


def digits(counts: list[int], seed: int) -> Setting:
    """Digits through a fixed random ReLU layer of 64 units."""
    from sklearn.datasets import load_digits

    noise = torch.Generator().manual_seed(seed)
    x, y = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    W = torch.randn(64, 64, dtype=f64, generator=noise) / 8
    x = (x.double() / 16 @ W).relu()
    order = y.argsort(stable=True)
    x, y = x[order], y[order]
    size = torch.bincount(y)
    first = size.cumsum(0) - size
    stats = ClassStats(10, 64).update(x, y)
    head = nn.Linear(64, 10, bias=False, dtype=f64)
    with torch.no_grad():
        head.weight.copy_(stats.centered_means() + torch.randn(10, 64, dtype=f64, generator=noise))

    def draw(labels: Tensor) -> Tensor:
        u = torch.rand(len(labels), dtype=f64, generator=noise)
        return x[first[labels] + (u * size[labels]).long()]

    return Setting(draw, (x, y), counts, head)


def settings() -> dict[str, Setting]:
    """By name."""
    noise = torch.Generator().manual_seed(0)
    etf = 5 * frames.simplex_etf(10, 64, dtype=f64, generator=noise)
    loose = 0.6 * torch.randn(10, 64, dtype=f64, generator=noise)
    loose[9] = 0.8 * loose[8] + 0.6 * loose[9]
    return {
        "ETF, 50 each": gaussian(etf, BALANCED, 1),
        "no ETF, 50 each": gaussian(loose, BALANCED, 2),
        "no ETF, 200 … 15": gaussian(loose, TAIL, 3),
        "digits, 50 each": digits(BALANCED, 4),
        "digits, 200 … 15": digits(TAIL, 5),
    }


def coverage(setting: Setting, repeats: int, groups: int = 20) -> dict[str, dict[str, float]]:
    """By key: the truth, mean plug-in and debiased values, sd and mean se, and both coverages.

    Of the draws in which value and error are ``defined``, as a share of all.
    """
    draw, (points, point_labels), counts, head = setting
    K, D = len(counts), points.shape[1]
    labels = torch.arange(K).repeat_interleave(torch.tensor(counts))
    how = {"head": head, "rare": [8, 9]}
    # The population with Σ_W weighted like the samples.
    share = torch.tensor(counts) / torch.bincount(point_labels).double()
    truth = metrics.report(ClassStats(K, D, class_weight=share).update(points, point_labels), **how)
    half = float(student.ppf(0.975, groups - 1))
    found: dict[str, list[tuple[float, float, float]]] = {}
    for _ in range(repeats):
        stats = ClassStats(K, D, groups=groups).update(draw(labels), labels)
        report = metrics.report(stats, **how)
        for key in report:
            if f"{key}/se" in report:
                row = (report[key], report[f"{key}/debiased"], report[f"{key}/se"])
                found.setdefault(key, []).append(row)
    out = {}
    for key, rows in found.items():
        values = torch.tensor(rows, dtype=f64)
        defined = values.isfinite().all(1)
        plain, debiased, se = values[defined].T
        hit = [(v - truth[key]).abs() <= half * se for v in (plain, debiased)]
        out[key] = {
            "truth": truth[key],
            "plug-in": float(plain.mean()),
            "debiased": float(debiased.mean()),
            "sd": float(debiased.std()),
            "se": float(se.mean()),
            "cover plug-in": float(hit[0].double().mean()),
            "cover": float(hit[1].double().mean()),
            "defined": float(defined.double().mean()),
        }
    return out


def main() -> None:
    """Print one table per setting."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--groups", type=int, default=20)
    args = parser.parse_args()
    tables = {}
    for name, setting in settings().items():
        print(f"\n{name}; {args.repeats} repeats, G = {args.groups}")
        table = tables[name] = coverage(setting, args.repeats, args.groups)
        columns = list(next(iter(table.values())))
        print(f"{'':31s}" + "".join(f"{c:>14s}" for c in columns))
        for key, row in table.items():
            print(f"{key:31s}" + "".join(f"{row[c]:14.4f}" for c in columns))
    print("\n| key | " + " | ".join(tables) + " |\n|---|" + "--:|" * len(tables))
    for key in tables["digits, 50 each"]:
        cells = []
        for table in tables.values():
            found = table[key]
            share = "" if found["defined"] == 1 else f" (of {100 * found['defined']:.0f} %)"
            cells.append(f"{100 * found['cover']:.0f}{share}")
        print(f"| `{key}` | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
