"""Two ranks against one process: the same statistic, in half the time.

    python tests/benchmarks/bench_ranks.py [--repeats 7]

Two gloo processes with one thread each hold the same features. In turns, rank 0 alone updates a
``ClassStats`` with all rows while rank 1 waits, and both ranks update their halves and
``all_reduce``. Each time ends with ``means``, ``within`` and ``trace`` read; the time of two ranks
is that of the slower one from a common barrier. Minima of the repeats, and the median of their
ratios. ``time / half`` is two ranks over half of one process with one thread: bound 1.15.
``all_reduce`` is its part of the time of two ranks; it does not grow with N. The last columns are
the largest relative differences between the two results in norm: bound 2e-6 for float32 features,
1e-12 for float64. One process with two threads runs apart, since its idle thread would spin on the
core that rank 1 needs.
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


def collect(
    x: Tensor, y: Tensor, K: int, batch: int, *, reduce: bool
) -> tuple[list[Tensor], float]:
    """Counts, means, scatter and traces, and the seconds of ``all_reduce``."""
    stats = ClassStats(K, x.shape[1])
    for rows, labels in zip(x.split(batch), y.split(batch), strict=True):
        stats.update(rows, labels)
    _ = stats.within  # what still waits belongs to the update
    start = time.perf_counter()
    if reduce:
        stats.all_reduce()
    seconds = time.perf_counter() - start
    return [stats.counts.double(), stats.means, stats.within, stats.trace], seconds


def job(
    rank: int, world: int, K: int, D: int, dtype: str, N: int, batch: int, repeats: int
) -> dict[str, Any]:
    x, y = samples(K, D, N, 10.0, 1.0)
    x = x.to(getattr(torch, dtype))
    # Batches in turn, as a sampler gives them out: half of the rows each.
    mine = torch.cat(torch.arange(N).split(batch)[rank::world])
    shard, labels = x[mine].clone(), y[mine].clone()
    one, two, reduce = [], [], []
    for _ in range(repeats + 1):  # the first goes untimed
        if rank == 0:
            start = time.perf_counter()
            alone, _ = collect(x, y, K, batch, reduce=False)
            one.append(time.perf_counter() - start)
        dist.barrier()
        start = time.perf_counter()
        both, seconds = collect(shard, labels, K, batch, reduce=True)
        times = torch.tensor([time.perf_counter() - start, seconds], dtype=torch.float64)
        dist.all_reduce(times, op=dist.ReduceOp.MAX)
        two.append(float(times[0]))
        reduce.append(float(times[1]))
    if rank:
        return {}
    gaps = [float((a - b).norm() / a.norm()) for a, b in zip(alone, both, strict=True)]
    return {"one": one[1:], "two": two[1:], "reduce": reduce[1:], "gaps": gaps}


def threads_job(
    rank: int, world: int, K: int, D: int, dtype: str, N: int, batch: int, repeats: int
) -> float:
    torch.set_num_threads(2)
    x, y = samples(K, D, N, 10.0, 1.0)
    x = x.to(getattr(torch, dtype))
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        collect(x, y, K, batch, reduce=False)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does the script run?")
    args = parser.parse_args()
    sizes = SIZES
    if args.quick:
        sizes, args.samples, args.repeats = [(10, 32, "float32"), (10, 32, "float64")], 2048, 1
    print(f"torch {torch.__version__}, gloo, N = {args.samples}, batch {args.batch}, ", end="")
    print(f"minimum of {args.repeats} interleaved repeats\n")
    heads = ["(K, D)", "dtype", "1 process, 2 threads s", "1 process, 1 thread s", "2 ranks s"]
    heads += ["of it all_reduce s", "time / half", "median", "means", "Σ_W", "traces"]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for K, D, dtype in sizes:
        run = (K, D, dtype, args.samples, args.batch, args.repeats)
        threaded = run_ranks(threads_job, 1, *run, timeout=1200)[0]
        found = run_ranks(job, 2, *run, timeout=1200)[0]
        one, two = found["one"], found["two"]
        middle = statistics.median(2 * b / a for a, b in zip(one, two, strict=True))
        if found["gaps"][0]:
            sys.exit("The counts differ.")
        cells = [f"({K}, {D})", dtype, f"{threaded:.3f}"]
        cells += [f"{min(found[key]):.3f}" for key in ("one", "two", "reduce")]
        cells += [f"{2 * min(two) / min(one):.2f}", f"{middle:.2f}"]
        cells += [f"{gap:.0e}" for gap in found["gaps"][1:]]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
