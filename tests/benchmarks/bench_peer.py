"""ncmethods beside rhubarbwu/neural-collapse: time, memory, values, faults. Tables in markdown.

    git clone https://github.com/rhubarbwu/neural-collapse PEER
    python tests/benchmarks/bench_peer.py --peer PEER            # the four timed sections
    python tests/benchmarks/bench_peer.py --peer PEER --faults   # the twelve faults

The peer's functions are called as its README calls them: class means in one pass over the data,
class variances and covariance in a second, NC4 in a third; pair measures in tiles.

* moments: the three accumulators against ``ClassStats`` on the same features in batches of 256.
  Repeats of both sides are interleaved; the ratio is of the minima, the median is of the ratios of
  the repeats. Bounds 1.2, 1.5, 3. Errors are against a two-pass float64 reference.
* model: the same with a ResNet-18 in front. Bound 2. The peer's passes are forward passes; whoever
  keeps all features in memory pays one and is back at the first table.
* measures: the functions at K = 1000, D = 2048 on a given statistic. Ours compute in float64, the
  peer's in float32. Each runs in a process of its own; memory is its peak resident set above what
  was resident with the statistic loaded.
* pairs: CDNV and log energy at K = 30 000, D = 768. The peer walks in tiles and keeps the K × K
  grid; beyond ``--peer-classes`` its time is extrapolated as K² and its memory as 4K² bytes.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from bench_report import apart, cost, run_job
from bench_stats import REGIMES, samples
from torch import Tensor, nn

from ncmethods import metrics
from ncmethods.features import accumulate, extract
from ncmethods.stats import ClassStats

SECTIONS = ("moments", "model", "measures", "pairs")
TILES = (16, 64, 256)  # the peer's tile sizes tried for pair measures; its README shows 64


class Loader:
    """Batches of one data set, counting how often it was gone through."""

    def __init__(self, x: Tensor, y: Tensor, batch: int) -> None:
        self.batches = list(zip(x.split(batch), y.split(batch), strict=True))
        self.passes = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        return iter(self.batches)


def load_peer(path: str) -> ModuleType:
    sys.path.insert(0, path)
    return importlib.import_module("neural_collapse")


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")
    print(flush=True)


def interleaved(repeats: int, *functions: Callable[[], Any]) -> list[list[float]]:
    """Seconds of each function, one list each, taken in turns."""
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for function, column in zip(functions, seconds, strict=True):
            start = time.perf_counter()
            function()
            column.append(time.perf_counter() - start)
    return seconds


def ratio(theirs: list[float], ours: list[float]) -> list[str]:
    middle = statistics.median(a / b for a, b in zip(theirs, ours, strict=True))
    return [f"{min(theirs) / min(ours):.2f}", f"{middle:.2f}"]


# --- moments ------------------------------------------------------------------------------------


def ours_moments(loader: Loader, K: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
    stats = ClassStats(K, D)
    for x, y in loader:
        stats.update(x, y)
    return stats.means, stats.within, stats.trace


def peer_moments(
    nc: ModuleType, loader: Iterable[Any], K: int, D: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Means, Σ_W as a sum, and class variances, in the two passes of the peer's README."""
    mean = nc.accumulate.MeanAccumulator(K, D)
    for x, y in loader:
        mean.accumulate(x, y)
    means, _ = mean.compute()
    var = nc.accumulate.VarNormAccumulator(K, D, M=means)
    covar = nc.accumulate.CovarAccumulator(K, D, M=means)
    for x, y in loader:
        var.accumulate(x, y, means)
        covar.accumulate(x, y, means)
    _, _ = covar.compute(), var.compute()
    return means, covar.totals, var.totals


def errors(
    truth: tuple[Tensor, Tensor, Tensor], found: tuple[Tensor, Tensor, Tensor], sigma: float
) -> list[str]:
    """Largest error of a mean in units of σ, of ``within`` in norm, of a class trace relatively."""
    means = float((found[0].double() - truth[0]).abs().max() / sigma)
    within = float((found[1].double() - truth[1]).norm() / truth[1].norm())
    trace = float(((found[2].double() - truth[2]) / truth[2]).abs().max())
    return [f"{means:.0e}", f"{within:.0e}", f"{trace:.0e}"]


def moments(nc: ModuleType, args: argparse.Namespace) -> None:
    sizes = [(10, 512, 1.2), (100, 512, 1.5), (1000, 2048, 3.0)]
    if args.quick:
        sizes = [(10, 32, 0.0), (100, 32, 0.0)]
    timed, values = [], []
    for K, D, bound in sizes:
        N = 2000 if args.quick else args.samples
        x, y = samples(K, D, N, 10.0, 1.0)
        ours, peer = Loader(x, y, 256), Loader(x, y, 256)
        a, b = interleaved(
            args.repeats,
            lambda ours=ours, K=K, D=D: ours_moments(ours, K, D),
            lambda peer=peer, K=K, D=D: peer_moments(nc, peer, K, D),
        )
        passes = [loader.passes // args.repeats for loader in (ours, peer)]
        seconds = [f"{min(column):.2f}" for column in (a, b)]
        timed.append([f"({K}, {D})", *seconds, *ratio(b, a), f"≥ {bound}", *passes])
        del x, y, ours, peer
        for offset, sigma in REGIMES:
            x, y = samples(K, D, min(N, 20_000), offset, sigma)
            wide = x.double()
            n = torch.bincount(y, minlength=K)[:, None]
            means = torch.zeros(K, D, dtype=torch.float64).index_add_(0, y, wide) / n
            wide -= means[y]
            trace = torch.zeros(K, dtype=torch.float64).index_add_(0, y, wide.square().sum(1))
            truth = (means, wide.T @ wide, trace)
            del wide
            loader = Loader(x, y, 256)
            cells = zip(
                errors(truth, ours_moments(loader, K, D), sigma),
                errors(truth, peer_moments(nc, loader, K, D), sigma),
                strict=True,
            )
            values.append(
                [f"({K}, {D})", f"({offset:g}, {sigma:g})", *(c for p in cells for c in p)]
            )
    print(f"### Moments: N = {N}, batch 256, minimum of {args.repeats} interleaved repeats\n")
    heads = ["(K, D)", "ours s", "peer s", "peer/ours", "median ratio", "bound"]
    table([*heads, "our passes", "peer's passes"], timed)
    print("Errors: means in σ (largest), Σ_W in norm, class variance (largest, relative)\n")
    heads = [f"{what}, {who}" for what in ("means", "Σ_W", "variance") for who in ("ours", "peer")]
    table(["(K, D)", "(offset, σ)", *heads], values)


# --- a model in front ---------------------------------------------------------------------------


class Features:
    """Penultimate features of a network with a forward pass per iteration, as the peer has them."""

    def __init__(self, net: nn.Module, loader: Loader) -> None:
        self.net, self.loader = net, loader
        self.seen = torch.empty(0)
        net.fc.register_forward_hook(self.watch)

    def watch(self, _module: nn.Module, inputs: tuple[Tensor], _output: Tensor) -> None:
        self.seen = inputs[0].clone()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.loader:
            self.net(images)
            yield self.seen, labels


def model_rows(nc: ModuleType, K: int, N: int, size: int, repeats: int) -> Iterator[list[Any]]:
    from torchvision.models import resnet18

    D = 512
    torch.manual_seed(0)
    net = resnet18(num_classes=K).eval()
    x, y = torch.randn(N, 3, size, size), torch.arange(N) % K
    loaders = [Loader(x, y, 64) for _ in range(5)]
    twice, thrice = (Features(copy.deepcopy(net), loaders[i]) for i in (2, 4))
    W = thrice.net.fc.weight

    @torch.no_grad()
    def bare() -> None:
        for images, _ in loaders[0]:
            net(images)

    def ours() -> None:
        stats = accumulate(net, loaders[1], num_classes=K, progress=False)
        _ = stats.means, stats.within, stats.trace

    @torch.no_grad()
    def peer() -> None:
        peer_moments(nc, twice, K, D)

    def ours_nc4() -> None:
        held = extract(net, loaders[3], num_classes=K, progress=False)
        assert held.logits is not None
        metrics.agreement(held.features, held.logits, held.stats.means)
        _ = held.stats.within, held.stats.trace

    @torch.no_grad()
    def peer_nc4() -> None:
        means, _, _ = peer_moments(nc, thrice, K, D)
        decision = nc.accumulate.DecAccumulator(K, D, M=means, W=W)
        for h, labels in thrice:
            decision.accumulate(h, labels, W, means)
        nc.measure.clf_ncc_agreement(decision)

    found = interleaved(repeats, bare, ours, peer, ours_nc4, peer_nc4)
    passes = [loader.passes // repeats for loader in loaders]
    best = [f"{min(column):.2f}" for column in found]
    for what, a, b in (("moments", 1, 2), ("moments and NC4", 3, 4)):
        ratios = ratio(found[b], found[a])
        yield [K, what, best[0], best[a], best[b], *ratios, "≥ 2", passes[a], passes[b]]


def model(nc: ModuleType, args: argparse.Namespace) -> None:
    N, size = (64, 32) if args.quick else (args.images, 64)
    rows = [row for K in (10, 1000) for row in model_rows(nc, K, N, size, args.repeats)]
    print(f"### ResNet-18 in front: {N} images of {size} × {size}, batch 64\n")
    heads = ["K", "what", "one bare pass s", "ours s", "peer s", "peer/ours", "median ratio"]
    table([*heads, "bound", "our passes", "peer's passes"], rows)
    print(f"NC4: ours keeps the features of its one pass ({N * 512 * 4 / 1e6:.1f} MB here).\n")


# --- measures of a statistic --------------------------------------------------------------------


def log_stats(nc: ModuleType, M: Tensor, G: Tensor, tile: int) -> Any:
    return nc.kernels.kernel_stats(M, G, kernel=nc.kernels.log_kernel, tile_size=tile)[0]


OURS: dict[str, Callable[[ClassStats, nn.Linear], Any]] = {
    "NC1 pinv": lambda s, h: metrics.nc1_pinv(s),
    "trace ratio": lambda s, h: metrics.trace_ratio(s),
    "CDNV": lambda s, h: metrics.cdnv(s),
    "Gram distance to the ETF": lambda s, h: metrics.gram_etf(s.centered_means()),
    "log energy": lambda s, h: metrics.log_energy(s.centered_means())[0],
    "NC3 product": lambda s, h: metrics.product_duality(h.weight, s.centered_means()),
    "NC3 cosine": lambda s, h: metrics.duality_cosine(h.weight, s.centered_means()),
}
PEER: dict[str, Callable[[ModuleType, dict[str, Tensor], Tensor, int], Any]] = {
    "NC1 pinv": lambda nc, s, w, t: nc.measure.covariance_ratio(s["W"], s["M"], s["G"]),
    "trace ratio": lambda nc, s, w, t: nc.measure.covariance_ratio(
        s["W"], s["M"], s["G"], "quotient"
    ),
    "CDNV": lambda nc, s, w, t: nc.measure.variability_cdnv(s["v"], s["M"], tile_size=t),
    "Gram distance to the ETF": lambda nc, s, w, t: nc.measure.simplex_etf_error(s["M"], s["G"]),
    "log energy": lambda nc, s, w, t: log_stats(nc, s["M"], s["G"], t),
    "NC3 product": lambda nc, s, w, t: nc.measure.self_duality_error(w, s["M"], s["G"]),
    "NC3 cosine": lambda nc, s, w, t: (
        1 - nc.measure.similarities(w, s["M"], s["G"], cos=True).mean()
    ),
    "NC1 by svds": lambda nc, s, w, t: nc.measure.covariance_ratio(s["W"], s["M"], s["G"], "svd"),
}
SAME = "all seven"


def job_ours(directory: str, threads: int, repeats: int, measure: str) -> dict[str, Any]:
    torch.set_num_threads(threads)
    stats = ClassStats.load(Path(directory, "ours.safetensors"))
    torch.manual_seed(0)
    head = nn.Linear(stats.dim, stats.num_classes)
    small = ClassStats(4, 8).update(torch.randn(40, 8), torch.arange(40) % 4)
    metrics.report(small, nn.Linear(8, 4))  # load LAPACK
    if measure == "report":
        return cost(lambda: len(metrics.report(stats, head)), repeats)
    chosen = [*OURS] if measure == SAME else [measure]
    return cost(lambda: sum(float(OURS[name](stats, head)) for name in chosen), repeats)


def job_peer(
    peer: str, directory: str, threads: int, repeats: int, measure: str, tile: int
) -> dict[str, Any]:
    nc = load_peer(peer)
    torch.set_num_threads(threads)
    state = torch.load(Path(directory, "peer.pt"))
    torch.manual_seed(0)
    weight = nn.Linear(state["M"].shape[1], len(state["M"])).weight.detach()
    torch.linalg.pinv(torch.eye(8))  # load LAPACK
    chosen = [*OURS] if measure == SAME else [measure]
    return cost(lambda: sum(float(PEER[n](nc, state, weight, tile)) for n in chosen), repeats)


def cell(found: dict[str, Any]) -> list[str]:
    if "failed" in found:
        return [found["failed"], "—", "—"]
    value = found["value"]
    value = f"{value:.4g}" if isinstance(value, float) else f"{value} keys"
    return [f"{min(found['seconds']):.3g}", f"{found['peak'] / 1e6:.0f}", value]


def write_states(nc: ModuleType, directory: str, K: int, D: int, N: int, scatter: bool) -> None:
    """The same data as a statistic of ours and as what the peer's accumulators return."""
    x, y = samples(K, D, N, 1.0, 1.0)
    y[:K] = torch.arange(K)  # no class is empty
    stats = ClassStats(K, D, scatter=scatter).update(x, y)
    stats.save(Path(directory, "ours.safetensors"))
    state = {"M": stats.means.float(), "v": (stats.trace / stats.counts).float()}
    state["G"] = state["M"].mean(0)
    if scatter:
        state["W"] = stats.sigma_w.float()
    torch.save(state, Path(directory, "peer.pt"))


def measures(nc: ModuleType, args: argparse.Namespace) -> None:
    K, D, N = (20, 32, 2000) if args.quick else (1000, 2048, 20_000)
    common = {"threads": args.threads, "repeats": min(args.repeats, 3)}
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        write_states(nc, directory, K, D, N, True)
        for name in (*OURS, SAME):
            a = apart(__file__, "ours", directory=directory, measure=name, **common)
            b = apart(
                __file__, "peer", peer=args.peer, directory=directory, measure=name,
                tile=16, **common,
            )  # fmt: skip
            ours, peer = cell(a), cell(b)
            if name == SAME:
                ours[2] = peer[2] = ""
            faster = f"{min(b['seconds']) / min(a['seconds']):.1f}" if "failed" not in b else "—"
            rows.append([name, ours[0], peer[0], faster, ours[1], peer[1], ours[2], peer[2]])
        a = cell(apart(__file__, "ours", directory=directory, measure="report", **common))
        rows.append(["the whole report", a[0], "—", "—", a[1], "—", a[2], "—"])
        if args.svds:
            b = apart(
                __file__, "peer", peer=args.peer, directory=directory, measure="NC1 by svds",
                tile=16, threads=args.threads, repeats=1, limit=300,
            )  # fmt: skip
            b = cell(b)
            rows.append(["NC1 by svds", "—", b[0], "—", "—", b[1], "—", b[2]])
    print(f"### Measures of a statistic at K = {K}, D = {D}\n")
    heads = ["measure", "ours s", "peer s", "peer/ours", "ours MB", "peer MB"]
    table([*heads, "our value", "peer's value"], rows)


# --- many classes -------------------------------------------------------------------------------


def pairs(nc: ModuleType, args: argparse.Namespace) -> None:
    D, sizes, most = 768, [2000, 4000, 30_000], args.peer_classes
    if args.quick:
        D, sizes, most = 16, [100, 200], 100
    names, rows = ("CDNV", "log energy"), []
    last: dict[str, tuple[int, float]] = {}
    tiles: dict[str, int] = {}
    common = {"threads": args.threads, "repeats": 1}
    for K in sizes:
        with tempfile.TemporaryDirectory() as directory:
            write_states(nc, directory, K, D, 3 * K, False)
            for name in names:
                a = cell(apart(__file__, "ours", directory=directory, measure=name, **common))
                if most < K:
                    k, seconds = last[name]
                    b = [f"({seconds * (K / k) ** 2:.0f})", f"(> {4 * K * K / 1e6:.0f})", "—"]
                else:
                    tried = {
                        tile: apart(
                            __file__, "peer", peer=args.peer, directory=directory, measure=name,
                            tile=tile, **common,
                        )
                        for tile in ([tiles[name]] if name in tiles else TILES)
                    }  # fmt: skip
                    tiles[name] = min(tried, key=lambda tile: tried[tile]["seconds"][0])
                    found = tried[tiles[name]]
                    last[name] = (K, found["seconds"][0])
                    b = cell(found)
                rows.append([K, name, a[0], b[0], a[1], b[1], a[2], b[2], tiles[name]])
    print(f"### Many classes: D = {D}, statistic without scatter (in parentheses: extrapolated)\n")
    heads = ["K", "measure", "ours s", "peer s", "ours MB", "peer MB", "our value", "peer's value"]
    table([*heads, "peer's tile"], rows)


def faults(nc: ModuleType) -> None:
    from faults import rows

    print("### Twelve faults\n")
    table(["fault", "case", "peer", "ours", "truth", "the peer is"], list(rows(nc)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", help="folder of a clone of rhubarbwu/neural-collapse")
    parser.add_argument("--faults", action="store_true", help="the twelve faults, nothing timed")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--samples", type=int, default=50_000, help="rows of the moments")
    parser.add_argument("--images", type=int, default=1024, help="images of the ResNet-18")
    parser.add_argument("--peer-classes", type=int, default=4000, help="largest K of its pairs")
    parser.add_argument("--svds", action="store_true", help="also the peer's svds NC1 (minutes)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does the script run?")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        return run_job({"ours": job_ours, "peer": job_peer}, args.job)
    if not args.peer:
        parser.error("--peer: clone https://github.com/rhubarbwu/neural-collapse, name its folder")
    if args.quick:
        args.repeats = 1
    args.peer = str(Path(args.peer).resolve())
    nc = load_peer(args.peer)
    torch.set_num_threads(args.threads)
    git = ["git", "-C", args.peer, "log", "-1", "--format=%H of %as"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    print(f"peer at {commit}; torch {torch.__version__}, {args.threads} threads\n", flush=True)
    if args.faults:
        return faults(nc)
    for section in args.only:
        globals()[section](nc, args)


if __name__ == "__main__":
    main()
