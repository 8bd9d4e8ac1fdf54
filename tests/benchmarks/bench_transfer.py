"""Five transferability scores beside Transfer-Learning-Library: time and values.

    git clone https://github.com/thuml/Transfer-Learning-Library TLLIB
    OMP_NUM_THREADS=1 python tests/benchmarks/bench_transfer.py --tllib TLLIB [--float32]

H-score, regularised H-score, LogME, LEEP and TransRate of 10 000 × 2048 features in 100 classes,
and source probabilities of 1000 classes for LEEP. Both sides take the same arrays, in float64, or
with ``--float32`` in float32. Ours compute the moments once, in their own row, and the scores from
them; tllib's functions each begin at the features. The two sides are timed in turns by the CPU time
of this process on one thread; the minimum of the repeats is kept. Target for the five together: ten
times faster in float64.

tllib's files of ``tllib/ranking`` are loaded by path. LogME there is compiled by numba if that is
installed; its time is in matrix products either way. Values: tllib divides Σ_B by N − 1 and Σ_T of
the regularised H-score by N, so that one is compared after N/(N − 1); its LogME stops before the
maximum, so ours may be larger by up to 1e-3.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ncmethods.features import FeatureSet
from ncmethods.transfer.h_score import h_score, regularised_h_score
from ncmethods.transfer.leep import leep
from ncmethods.transfer.logme import logme
from ncmethods.transfer.transrate import transrate


def load(folder: str, name: str) -> ModuleType:
    """One file of tllib/ranking; the package itself imports what nobody here needs."""
    try:
        import numba  # noqa: F401
    except ImportError:
        stub: Any = ModuleType("numba")
        stub.njit = lambda f: f
        sys.modules["numba"] = stub
    path = Path(folder, "tllib", "ranking", f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"tllib_{name}", path)
    if spec is None or spec.loader is None or not path.exists():
        raise SystemExit(f"--tllib: no {path}. Clone thuml/Transfer-Learning-Library there.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def samples(N: int, D: int, K: int, Z: int, dtype: torch.dtype) -> tuple[FeatureSet, Tensor]:
    """Rectified features with a decaying spectrum, and source probabilities, some about classes."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(N) % K
    scale = torch.logspace(0, -1.5, D)
    x = (torch.randn(K, D, generator=g)[y] * 0.5 + torch.randn(N, D, generator=g)) * scale
    x = (x @ torch.linalg.qr(torch.randn(D, D, generator=g))[0] + 0.3).relu()
    probs = (torch.randn(N, Z, generator=g) + 2 * torch.randn(K, Z, generator=g)[y]).softmax(1)
    return FeatureSet(x.to(dtype), y, K), probs.to(dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tllib", required=True, help="folder of a clone")
    parser.add_argument("--float32", action="store_true", help="features in float32")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--size", type=int, nargs=4, default=[10_000, 2048, 100, 1000],
                        metavar=("N", "D", "K", "Z"))  # fmt: skip
    args = parser.parse_args()
    torch.set_num_threads(1)
    N, D, K, Z = args.size
    dtype = torch.float32 if args.float32 else torch.float64
    data, probs = samples(N, D, K, Z, dtype)
    assert data.labels is not None
    labels = data.labels
    x, y, p = data.features.numpy(), labels.numpy(), probs.numpy()
    h, me, pre, rate = (load(args.tllib, n) for n in ("hscore", "logme", "leep", "transrate"))
    git = ["git", "-C", args.tllib, "log", "-1", "--format=%H of %as"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"

    fresh = data

    def moments() -> Tensor:
        nonlocal fresh
        fresh = FeatureSet(data.features, labels, K)
        return fresh.frozen.sigma_t

    # Name → ours, tllib's, what tllib's value is divided by, tolerance.
    Side = Callable[[], Any]
    rows: dict[str, tuple[Side, Side, float, float]] = {
        "H-score": (lambda: h_score(fresh.frozen), lambda: h.h_score(x, y), 1, 1e-6),
        "regularised H-score": (
            lambda: regularised_h_score(fresh),
            lambda: h.regularized_h_score(x, y),
            N / (N - 1),
            1e-6,
        ),
        "LogME": (
            lambda: logme(fresh.frozen), lambda: me.log_maximum_evidence(x, y), 1, 1e-3,
        ),
        "LEEP": (
            lambda: leep(probs, labels),
            lambda: pre.log_expected_empirical_prediction(p, y),
            1,
            1e-6,
        ),
        "TransRate": (lambda: transrate(fresh), lambda: rate.transrate(x, y), 1, 1e-6),
    }  # fmt: skip
    ours: dict[str, float] = dict.fromkeys(["moments", *rows], float("inf"))
    theirs = dict.fromkeys(rows, float("inf"))
    values: dict[str, tuple[float, float]] = {}
    tiny = samples(50, 8, 2, 3, dtype)  # load LAPACK
    logme(tiny[0].frozen), np.linalg.svd(tiny[0].features.numpy())
    for _ in range(args.repeats):
        start = time.process_time()
        moments()
        ours["moments"] = min(ours["moments"], time.process_time() - start)
        for name, (mine, peer, factor, _) in rows.items():
            start = time.process_time()
            a = float(mine())
            middle = time.process_time()
            b = float(peer()) / factor
            ours[name] = min(ours[name], middle - start)
            theirs[name] = min(theirs[name], time.process_time() - middle)
            values[name] = (a, b)

    print(f"tllib at {commit}; torch {torch.__version__}, numpy {np.__version__}, 1 thread")
    print(f"N = {N}, D = {D}, K = {K}, Z = {Z}, {str(dtype).removeprefix('torch.')} features, "
          f"minimum of {args.repeats}\n")  # fmt: skip
    print("| | tllib s | ours s | tllib/ours | tllib's value | ours |\n|---|---|---|---|---|---|")
    print(f"| moments | | {ours['moments']:.2f} | | | |")
    for name, (a, b) in values.items():
        ratio = theirs[name] / ours[name]
        print(
            f"| {name} | {theirs[name]:.2f} | {ours[name]:.2f} | {ratio:.1f} | {b:.9g} | {a:.9g} |"
        )
    total = [sum(theirs.values()), sum(ours.values())]
    print(f"| all five | {total[0]:.2f} | {total[1]:.2f} | {total[0] / total[1]:.1f} | | |")
    apart = [n for n, (a, b) in values.items() if abs(a - b) > rows[n][3] * max(1.0, abs(b))]
    if apart:
        raise SystemExit(f"values differ: {', '.join(apart)}")


if __name__ == "__main__":
    main()
