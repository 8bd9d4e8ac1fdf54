"""What the whole ``report`` costs: seconds, and memory above the statistic it reads.

    python tests/benchmarks/bench_report.py [--repeats 5] [--threads 2]

``ClassStats`` of N = 20 000 rows at K = 1000, D = 2048 is written to a file. A fresh process loads
it, together with an ``nn.Linear`` head and training counts, and calls ``report``. Bounds: 3 s on
two threads, 300 MB. Memory is the process's own peak resident set (the kernel's VmHWM, reset right
before the first call) less what was resident with statistic and head loaded; time is that of the
later calls. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_stats import samples

from ncmethods import metrics
from ncmethods.stats import ClassStats


def resident(key: str) -> int:
    """A line of /proc/self/status in bytes: ``VmRSS`` is resident now, ``VmHWM`` its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def cost(function: Callable[[], Any], repeats: int = 1) -> dict[str, Any]:
    """Peak memory of one call above what is resident before it, and seconds of ``repeats`` calls.

    With one repeat the call that is measured for memory is also the one that is timed.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before is not to be used again unseen
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    before = resident("VmRSS")
    start = time.perf_counter()
    value = function()
    seconds = [time.perf_counter() - start]
    peak = resident("VmHWM") - before
    if repeats > 1:
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
    return {"peak": peak, "seconds": seconds, "value": value}


def apart(script: str, job: str, limit: float | None = None, **arguments: Any) -> dict[str, Any]:
    """Run ``job`` of a script in a fresh process, for ``limit`` seconds, and return its answer."""
    command = [sys.executable, script, "--job", json.dumps([job, arguments])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"> {limit:g} s"}
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1] if done.stderr else "killed"}
    return json.loads(done.stdout.splitlines()[-1])


def run_job(jobs: dict[str, Callable[..., Any]], text: str) -> None:
    """The other side of :func:`apart`."""
    job, arguments = json.loads(text)
    print(json.dumps(jobs[job](**arguments)))


def job_report(directory: str, threads: int, repeats: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    stats = ClassStats.load(Path(directory, "stats.safetensors"))
    torch.manual_seed(0)
    head = torch.nn.Linear(stats.dim, stats.num_classes)
    counts = torch.linspace(1300, 5, stats.num_classes).round()
    small = ClassStats(4, 8).update(torch.randn(40, 8), torch.arange(40) % 4)
    metrics.report(small, torch.nn.Linear(8, 4), counts=torch.tensor([9, 3, 2, 1]))  # load LAPACK
    found = cost(lambda: len(metrics.report(stats, head, counts=counts)), repeats)
    state = sum(b.numel() * b.element_size() for b in stats.buffers())
    return found | {"state": state}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does the script run?")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        return run_job({"report": job_report}, args.job)
    if args.quick:
        args.classes, args.dim, args.samples, args.repeats = 20, 32, 2000, 2
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as directory:
        x, y = samples(args.classes, args.dim, args.samples, 1.0, 1.0)
        stats = ClassStats(args.classes, args.dim).update(x, y)
        stats.save(Path(directory, "stats.safetensors"))
        found = apart(
            __file__, "report", directory=directory, threads=args.threads, repeats=args.repeats
        )
    if "failed" in found:
        sys.exit(found["failed"])
    print(f"torch {torch.__version__}, {args.threads} threads, {args.repeats} repeats")
    print(f"K = {args.classes}, D = {args.dim}, N = {args.samples}, {found['value']} keys")
    best, middle = min(found["seconds"]), statistics.median(found["seconds"])
    print(f"seconds: minimum {best:.2f}, median {middle:.2f} (bound 3)")
    print(f"memory above the state: {found['peak'] / 1e6:.0f} MB (bound 300)", end="")
    print(f"; the state itself: {found['state'] / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
