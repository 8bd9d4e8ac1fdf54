"""Out-of-distribution scorers beside pytorch-ood: speed on the same features, at the same AUROC.

    python tests/benchmarks/bench_ood.py [--size full|small] [--repeats 5] [--only NAME …]

Both sides get the same float32 tensors: N training samples of K classes, as many queries from the
classes as from outside, a linear head. full is N = 50 000, q = 10 000, D = 512, K = 100. Every
AUROC must agree to 0.01 points, or the command fails. NECO is in no released peer; it is compared
with what its authors' scripts do, scikit-learn's StandardScaler and a PCA of all D components of
which the first d are read.

Times are CPU times of this process on one thread: median of the repeats (more where a call is
short), which take turns, so that other work on the machine leaves the ratios alone. "theirs / ours"
is the ratio of the medians; it is held against the bound of the project, at size full. Memory is
how far the resident set rises above where it stood.

The family in one pass is everything that moments can fit: the moments of the N features, and from
them Mahalanobis, RelativeMahalanobis, NECO, Residual, NCI, fDBD, WDiscOOD and ViM's subspace; and
again with ViM's scale, which takes a second pass over the features. Theirs one by one is
Mahalanobis, RMD, ViM, NCI and fDBD, with the authors' NECO and without: Residual and WDiscOOD have
no other side. fDBD at K = 1000 is fitted from one sample of a class, so that the distances of all
pairs of rows are what is timed: ours with the moments given, as in the family, and from samples.

Needs pytorch-ood 0.4.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ncmethods import ood
from ncmethods.features import FeatureSet
from ncmethods.ood.vim import Residual
from ncmethods.stats import ClassStats

Call = Callable[[], Any]
SIZES = {"full": (50_000, 10_000, 512, 100, 1000), "small": (5_000, 1_000, 128, 20, 200)}
SAME = 1e-4  # AUROC, 0.01 points
K_NEIGHBOURS = 50
MOMENTS = (ood.Mahalanobis, ood.RelativeMahalanobis, ood.NECO, ood.NCI, ood.fDBD, ood.WDiscOOD)


def made_up(N: int, q: int, D: int, K: int) -> tuple[FeatureSet, nn.Linear, Tensor, Tensor]:
    """Clustered features after a ReLU, a head of their means, queries from inside and outside."""
    rng = torch.Generator().manual_seed(0)
    means = torch.randn(K, D, generator=rng)
    mix = torch.randn(D, D, generator=rng) * torch.logspace(0.8, -0.4, D)[:, None] / D**0.5

    def around(centres: Tensor) -> Tensor:
        noise = torch.randn(len(centres), D, generator=rng) @ mix
        return (centres + 0.7 * noise + 0.5).relu()

    y, y_in, other = torch.arange(N) % K, torch.arange(q) % K, torch.randint(K, (q,), generator=rng)
    train, inside = around(means[y]), around(means[y_in])
    outside = around(0.8 * means[other] + 0.3 * torch.randn(q, D, generator=rng))
    rows = torch.stack([train[y == c].mean(0) for c in range(K)])
    origin = rows.mean(0)
    head = nn.Linear(D, K).requires_grad_(False)
    W = (rows - origin) * (20 / (rows - origin).square().sum(1).mean())
    head.weight.copy_(W)
    head.bias.copy_(-W @ origin - (W * (rows - origin)).sum(1) / 2)
    return FeatureSet(train, y, K), head, inside, outside


class Scripts:
    """NECO as its authors' scripts have it."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def fit_features(self, x: Tensor, y: Tensor) -> Scripts:
        from sklearn.decomposition import PCA
        from sklearn.preprocessing import StandardScaler

        self.scaler = StandardScaler()
        z = self.scaler.fit_transform(x.numpy())
        self.pca = PCA(n_components=x.shape[1]).fit(z)
        return self

    def predict_features(self, x: Tensor) -> Tensor:
        import numpy as np

        z = self.scaler.transform(x.numpy())
        reduced = self.pca.transform(z)[:, : self.rank]
        ratio = np.linalg.norm(reduced, axis=1) / np.linalg.norm(z, axis=1)
        return -torch.from_numpy(ratio)


def seconds(call: Call) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def in_turn(calls: dict[str, Call], repeats: int) -> dict[str, float]:
    """Median seconds of each call; the repeats take turns, more of them where all are short."""
    longest = max(seconds(call) for call in calls.values())  # also warms up
    repeats = max(repeats, min(40, int(2 / longest)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(seconds(call))
    return {name: statistics.median(values) for name, values in times.items()}


def peak(call: Call) -> float:
    """MiB by which the resident set rises; NaN where the system does not tell."""

    def status(field: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))

    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
        before = status("VmRSS")
        call()
        return max(0.0, status("VmHWM") - before)
    except OSError:
        call()
        return float("nan")


def row(name: str, theirs: float, ours: float, bound: float | None, *more: str) -> str:
    """One line of a table; milliseconds and their ratio."""
    ratio = theirs / ours
    held = ["", ""] if bound is None else [f"≥ {bound:.3g}", "met" if ratio >= bound else "MISSED"]
    cells = [name, f"{1e3 * theirs:.1f}", f"{1e3 * ours:.1f}", f"{ratio:.3g}", *held, *more]
    return "| " + " | ".join(cells) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", help="scorers to time, by name; no fits then")
    args = parser.parse_args()
    from pytorch_ood import detector
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(1)
    threadpool_limits(1)
    N, q, D, K, many = SIZES[args.size]
    full = args.size == "full"
    print(f"torch {torch.__version__}, pytorch-ood {version('pytorch-ood')}, 1 thread, ", end="")
    print(f"N = {N}, q = {q}, D = {D}, K = {K}, median of {args.repeats} to 40 repeats")
    train, head, inside, outside = made_up(N, q, D, K)
    x, y = train.features, train.labels
    assert y is not None
    train.frozen  # noqa: B018  (the moments that all share)
    rank = D // 2
    neco = ood.NECO.fit(train)

    pairs: dict[str, tuple[ood.Scorer, Any, float]] = {
        "Mahalanobis": (ood.Mahalanobis.fit(train), detector.Mahalanobis(None), 50),
        "RelativeMahalanobis": (ood.RelativeMahalanobis.fit(train), detector.RMD(None), 50),
        "KNN": (ood.KNN.fit(train, k=K_NEIGHBOURS), detector.KNN(None, k=K_NEIGHBOURS), 1.7),
        "NCI": (ood.NCI.fit(train, head, alpha=1e-3), detector.NCI(None, head, 1e-3), 1 / 1.1),
        "fDBD": (ood.fDBD.fit(train, head), detector.fDBD(None, head), 1 / 1.1),
        "ViM": (
            ood.ViM.fit(train, head, rank=rank),
            detector.ViM(None, rank, head.weight, head.bias),
            1 / 1.1,
        ),
        "NECO": (neco, Scripts(neco.rank), 1 / 1.1),
    }
    print("\n## Predict\n")
    print("| scorer | theirs ms | ours ms | theirs / ours | bound | | AUROC ours | theirs |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    apart = []
    for name, (ours, theirs, bound) in pairs.items():
        if args.only and name not in args.only:
            continue
        theirs.fit_features(x, y)
        area = float(ood.auroc(ours(inside), ours(outside)))
        other = float(ood.auroc(theirs.predict_features(inside), theirs.predict_features(outside)))
        if abs(area - other) > SAME:
            apart.append(name)
        calls = {
            "theirs": lambda theirs=theirs: theirs.predict_features(inside),
            "ours": lambda ours=ours: ours(inside),
        }
        times = in_turn(calls, args.repeats)
        both = f"{100 * area:.3f}", f"{100 * other:.3f}"
        print(row(name, times["theirs"], times["ours"], bound if full else None, *both), flush=True)
    if apart:
        print(f"\nAUROC differs by more than 0.01 points: {', '.join(apart)}")
        return 1
    if args.only:
        return 0
    fits(pairs, train, head, args.repeats, full)
    print(f"\n## fDBD, fit at K = {many}\n")
    print("| from | theirs ms | ours ms | theirs / ours | bound | | MiB theirs | ours |")
    print("|---|---|---|---|---|---|---|---|")
    for dim in (D, 2 * D):
        many_classes(many, dim, args.repeats, full)
    return 0


def fits(
    pairs: dict[str, tuple[ood.Scorer, Any, float]],
    train: FeatureSet,
    head: nn.Linear,
    repeats: int,
    full: bool,
) -> None:
    """Print the fit of the family beside theirs one by one, and what a decomposition costs."""
    x, y, K = train.features, train.labels, train.num_classes
    assert y is not None
    rank = x.shape[1] // 2

    def family() -> None:
        stats = ClassStats(K, x.shape[1]).update(x, y).freeze()
        for cls in MOMENTS:
            cls.fit(stats, head)
        Residual.fit(stats, head, rank=rank)  # and ViM's subspace

    def family_and_scale() -> None:
        fresh = FeatureSet(x, y, K)
        for cls in MOMENTS:
            cls.fit(fresh, head)
        Residual.fit(fresh, head, rank=rank)
        ood.ViM.fit(fresh, head, rank=rank)

    others = {
        name: (lambda theirs=theirs: theirs.fit_features(x, y))
        for name, (_, theirs, _) in pairs.items()
        if name != "KNN"
    }
    calls = {
        "family": family,
        "family and scale": family_and_scale,
        "moments": lambda: ClassStats(K, x.shape[1]).update(x, y).freeze(),
        **others,
        "eigh": lambda: torch.linalg.eigh(train.frozen.sigma_t),
    }
    times = in_turn(calls, repeats)
    peers = sum(times[name] for name in others if name != "NECO")
    bound = 3.0 if full else None
    print("\n## Fit, from N features\n")
    print("| | theirs ms | ours ms | theirs / ours | bound | |\n|---|---|---|---|---|---|")
    print(row("family in one pass, 8; theirs 5", peers, times["family"], bound))
    print(row("with ViM's scale, 8; theirs 5", peers, times["family and scale"], bound))
    print(row("with ViM's scale, 8; theirs 5 and NECO", peers + times["NECO"],
              times["family and scale"], bound))  # fmt: skip
    ms = {name: f"{1e3 * value:.0f}" for name, value in times.items()}
    print(f"\nTheirs: {', '.join(f'{name} {ms[name]}' for name in others)} ms. ", end="")
    print(f"Ours: the moments {ms['moments']} ms of the {ms['family']}.")
    print(f"The family makes {decompositions(family)} eigendecompositions of [D, D], ", end="")
    print(
        f"{ms['eigh']} ms each: about −W⁺b for Residual and ViM, and of the correlations for NECO."
    )
    print("Neither can be had from the other; NECO(scale=False) decomposes Σ_T, a third.")


def decompositions(call: Call) -> int:
    """How many eigendecompositions a call makes, of matrices as wide as the features."""
    original, sizes = torch.linalg.eigh, []

    def counted(matrix: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(matrix))
        return original(matrix, *args, **kwargs)

    torch.linalg.eigh = counted
    try:
        call()
    finally:
        torch.linalg.eigh = original
    return sizes.count(max(sizes))


def many_classes(K: int, D: int, repeats: int, full: bool) -> None:
    """Print the fit of fDBD with many classes, and its memory."""
    from pytorch_ood import detector

    head = nn.Linear(D, K).requires_grad_(False)
    x, y = torch.randn(K, D), torch.arange(K)
    stats = ClassStats(K, D).update(x, y).freeze()
    theirs = detector.fDBD(None, head)
    calls: dict[str, Call] = {
        "theirs": lambda: theirs.fit_features(x, y),
        "moments given": lambda: ood.fDBD.fit(stats, head),
        "samples": lambda: ood.fDBD.fit(ClassStats(K, D, scatter=False).update(x, y), head),
    }
    times = in_turn(calls, repeats)
    memory = {name: peak(call) for name, call in calls.items()}
    for name, bound in (("moments given", 50.0), ("samples", None)):
        both = f"{memory['theirs']:.0f}", f"{memory[name]:.0f}"
        held = bound if full else None
        print(row(f"{name}, D = {D}", times["theirs"], times[name], held, *both), flush=True)


if __name__ == "__main__":
    sys.exit(main())
