"""Herding 20 exemplars of 500 features for each of 100 classes, beside the field's loop.

    python tests/benchmarks/bench_incremental.py [--repeats 5] [--dim 512]

Features are float32, [50 000, 512] by default, herded in float64. The loop is iCaRL's as PyCIL has
it (LAMDA-CL/PyCIL f3509b8, models/base.py): for each exemplar the distances of all samples, whose
rows are then copied without the chosen one. Both take the same exemplars, or the command fails.
Times are CPU times of this process on one thread, median of the repeats, which take turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import numpy as np
import torch
from numpy.typing import NDArray

from ncmethods.incremental import by_cosine, herding_by_class

CLASSES, PER_CLASS, PLACES, BOUND = 100, 500, 20, 1.0


def loop(features: NDArray[np.float64], m: int) -> list[int]:
    """Exemplars of one class."""
    u = features / np.linalg.norm(features, axis=1, keepdims=True)
    left, mean, total, chosen = np.arange(len(u)), u.mean(0), 0.0, []
    for k in range(1, m + 1):
        i = int(np.argmin(np.sqrt(((mean - (u + total) / k) ** 2).sum(1))))
        chosen.append(int(left[i]))
        total = total + u[i]
        u, left = np.delete(u, i, axis=0), np.delete(left, i)
    return chosen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dim", type=int, default=512)
    args = parser.parse_args()
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(1)
    threadpool_limits(1)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(CLASSES * PER_CLASS, args.dim, generator=g).relu()
    y = torch.arange(len(x)) % CLASSES
    rows = [torch.nonzero(y == c).flatten() for c in range(CLASSES)]
    found: dict[str, list[int]] = {}

    def ours() -> None:
        found["ours"] = herding_by_class(x, y, PLACES).tolist()

    def theirs() -> None:
        found["theirs"] = [
            int(at[i]) for at in rows for i in loop(x[at].double().numpy(), PLACES)
        ]  # fmt: skip

    def cosine() -> None:
        for at in rows:
            by_cosine(x[at], PLACES)

    times: dict[str, list[float]] = {"ours": [], "loop": [], "mean cosine": []}
    for repeat in range(args.repeats + 1):
        for name, call in zip(times, (ours, theirs, cosine)):
            start = time.process_time()
            call()
            if repeat:  # the first is a warm-up
                times[name].append(time.process_time() - start)
    middle = {name: statistics.median(values) for name, values in times.items()}
    print(f"torch {torch.__version__}, 1 thread, {CLASSES} classes × {PER_CLASS} × {args.dim}, ")
    print(f"{PLACES} exemplars each, median of {args.repeats} repeats in turn\n")
    print("| | seconds | |\n|---|---|---|")
    held = "met" if middle["ours"] <= BOUND else "MISSED"
    print(f"| herding | {middle['ours']:.2f} | bound {BOUND:g}: {held} |")
    print(f"| the loop | {middle['loop']:.2f} | {middle['loop'] / middle['ours']:.1f} × |")
    print(f"| mean cosine | {middle['mean cosine']:.2f} | |")
    if found["ours"] != found["theirs"]:
        print("\nThe two take different exemplars.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
