"""Two ranks against one process: the same statistic, in half the time.

    python tests/benchmarks/bench_ranks.py [--repeats 5]

Two gloo processes with one thread each hold the same features. In turns, rank 0 alone updates a
``ClassStats`` with all rows (on one thread, then on two) while rank 1 waits, and both ranks update
their halves and ``all_reduce``. Each time ends with ``means``, ``within`` and ``trace`` read; the
time of two ranks is that of the slower one from a common barrier. Minima and medians of
interleaved repeats. ``time / half`` is two ranks over half of one process with one thread: bound
1.15. The last columns are the largest relative differences between the two results in norm: bound
2e-6 for float32 features, 1e-12 for float64.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench_stats import samples
from distributed import run_ranks

from ncmethods.stats import ClassStats

SIZES = [(10, 512, "float32"), (100, 512, "float32"), (1000, 2048, "float32")]
SIZES += [(100, 512, "float64")]


def collect(x: Tensor, y: Tensor, K: int, batch: int, reduce: bool) -> tuple[Tensor, ...]:
    stats = ClassStats(K, x.shape[1])
    for rows, labels in zip(x.split(batch), y.split(batch), strict=True):
        stats.update(rows, labels)
    if reduce:
        stats.all_reduce()
    return stats.counts.double(), stats.means, stats.within, stats.trace


def job(
    rank: int, world: int, K: int, D: int, dtype: str, N: int, batch: int, repeats: int
) -> dict[str, Any]:
    x, y = samples(K, D, N, 10.0, 1.0)
    x = x.to(getattr(torch, dtype))
    # Batches in turn, as a sampler gives them out: half of the rows each.
    mine = torch.cat(torch.arange(N).split(batch)[rank::world])
    shard, labels = x[mine].clone(), y[mine].clone()
    seconds: dict[str, list[float]] = {"one thread": [], "two threads": [], "two ranks": []}
    for _ in range(repeats + 1):  # the first goes untimed
        for threads, name in ((1, "one thread"), (2, "two threads")):
            if rank == 0:
                torch.set_num_threads(threads)
                start = time.perf_counter()
                alone = collect(x, y, K, batch, reduce=False)
                seconds[name].append(time.perf_counter() - start)
                torch.set_num_threads(1)
            dist.barrier()
        start = time.perf_counter()
        both = collect(shard, labels, K, batch, reduce=True)
        end = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
        dist.all_reduce(end, op=dist.ReduceOp.MAX)
        seconds["two ranks"].append(float(end))
    if rank:
        return {}
    gaps = [float((a - b).norm() / a.norm()) for a, b in zip(alone, both, strict=True)]
    return {"seconds": {name: column[1:] for name, column in seconds.items()}, "gaps": gaps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does the script run?")
    args = parser.parse_args()
    sizes = SIZES
    if args.quick:
        sizes, args.samples, args.repeats = [(10, 32, "float32"), (10, 32, "float64")], 2048, 1
    print(f"torch {torch.__version__}, gloo, N = {args.samples}, batch {args.batch}, ", end="")
    print(f"minimum of {args.repeats} interleaved repeats\n")
    heads = ["(K, D)", "dtype", "1 process, 1 thread s", "1 process, 2 threads s", "2 ranks s"]
    heads += ["time / half", "median", "means", "Σ_W", "traces"]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for K, D, dtype in sizes:
        run = (K, D, dtype, args.samples, args.batch, args.repeats)
        found = run_ranks(job, 2, *run, timeout=1200)[0]
        one, two, ranks = found["seconds"].values()
        middle = statistics.median(2 * b / a for a, b in zip(one, ranks, strict=True))
        assert found["gaps"][0] == 0, "counts differ"
        cells = [f"({K}, {D})", dtype, *(f"{min(column):.3f}" for column in (one, two, ranks))]
        cells += [f"{2 * min(ranks) / min(one):.2f}", f"{middle:.2f}"]
        cells += [f"{gap:.0e}" for gap in found["gaps"][1:]]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
