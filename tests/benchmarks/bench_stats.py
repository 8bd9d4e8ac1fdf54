"""What ``ClassStats.update`` costs beside the bare matrix product that it cannot avoid.

    python tests/benchmarks/bench_stats.py [--repeats 7] [--threads 2]

For each (K, D) the same N = 50 000 features in batches of 256 go through ``update`` and, in turn,
through ``scatter.addmm_(x.T, x)`` of the full D × D product in float32. The repeats of both are
interleaved and the minimum of each is kept, so that a busy machine slows both alike. ``within`` is
read at the end of every repeat: nothing is left waiting. Target: ratio ≤ 1.6, goal 1.2.

The accuracy columns are the relative Frobenius error of ``within`` against a two-pass float64
reference on the same float32 features, at (offset, σ); target 2e-6.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from ncmethods.stats import ClassStats

SIZES = [(10, 512), (100, 512), (1000, 2048)]
REGIMES = [(10.0, 1.0), (1000.0, 1.0), (10.0, 1e-3)]


def samples(K: int, D: int, N: int, offset: float, sigma: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(K, D, generator=generator) + offset
    y = torch.randint(K, (N,), generator=generator)
    x = torch.empty(N, D).normal_(std=sigma, generator=generator)
    for rows in torch.arange(N).split(4096):
        x[rows] += means[y[rows]]
    return x, y


def bare(x: Tensor, batch: int) -> float:
    scatter = torch.zeros(x.shape[1], x.shape[1])
    start = time.perf_counter()
    for rows in x.split(batch):
        scatter.addmm_(rows.T, rows)
    return time.perf_counter() - start


def ours(x: Tensor, y: Tensor, batch: int, K: int) -> float:
    stats = ClassStats(K, x.shape[1])
    start = time.perf_counter()
    for rows, labels in zip(x.split(batch), y.split(batch), strict=True):
        stats.update(rows, labels)
    _ = stats.within
    return time.perf_counter() - start


def error(K: int, D: int, N: int, batch: int, offset: float, sigma: float) -> float:
    x, y = samples(K, D, N, offset, sigma)
    stats = ClassStats(K, D)
    for rows, labels in zip(x.split(batch), y.split(batch), strict=True):
        stats.update(rows, labels)
    reference = torch.zeros(D, D, dtype=torch.float64)
    for c in range(K):
        r = x[y == c].double()
        r -= r.mean(0)
        reference.addmm_(r.T, r)
    return float((stats.within - reference).norm() / reference.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--no-accuracy", action="store_true", help="leave the error columns out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    errors = [] if args.no_accuracy else REGIMES
    heads = [f"error ({offset:g}, {sigma:g})" for offset, sigma in errors]
    print(f"torch {torch.__version__}, {args.threads} threads, N = {args.samples}, ", end="")
    print(f"batch {args.batch}, minimum of {args.repeats} interleaved repeats")
    columns = ["addmm_ s", "update s", "ratio", *heads]
    print(f"{'K':>5} {'D':>5} " + " ".join(f"{c:>17}" for c in columns))
    for K, D in SIZES:
        x, y = samples(K, D, args.samples, 10.0, 1.0)
        times = [(bare(x, args.batch), ours(x, y, args.batch, K)) for _ in range(args.repeats)]
        base, cost = (min(column) for column in zip(*times, strict=True))
        del x, y
        cells = [f"{base:.3f}", f"{cost:.3f}", f"{cost / base:.2f}"]
        n = min(args.samples, 20_000)
        cells += [f"{error(K, D, n, args.batch, *regime):.1e}" for regime in errors]
        print(f"{K:>5} {D:>5} " + " ".join(f"{c:>17}" for c in cells), flush=True)


if __name__ == "__main__":
    main()
