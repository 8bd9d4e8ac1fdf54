"""Twelve faults of rhubarbwu/neural-collapse, each shown with its installed code beside ours.

``bench_peer.py --faults`` prints them. Every case builds its own data, computes the truth in
float64 by a plain formula (or in closed form), and lets both libraries answer through their public
functions. A case says what it saw: where the peer is right, the last column says so.
"""

from __future__ import annotations

import inspect
import math
import re
import time
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ncmethods import frames, metrics
from ncmethods.stats import ClassStats


class Row(NamedTuple):
    """One line of the table."""

    fault: str
    case: str
    peer: str
    ours: str
    truth: str
    verdict: str  # on the peer: right, wrong, raises, biased, slower, there, absent


def number(value: Any) -> str:
    return value if isinstance(value, str) else f"{float(value):.4g}"


def close(a: Any, b: Any, rtol: float = 1e-2) -> bool:
    return not isinstance(a, str) and math.isclose(float(a), float(b), rel_tol=rtol, abs_tol=1e-9)


def row(fault: str, case: str, peer: Any, ours: Any, truth: Any, rtol: float = 1e-2) -> Row:
    right = close(peer, truth, rtol) if not isinstance(truth, str) else peer == truth
    verdict = "right" if right else "raises" if str(peer).endswith("Error") else "wrong"
    return Row(fault, case, number(peer), number(ours), number(truth), verdict)


def attempt(function: Callable[[], Any]) -> Any:
    """The value of a call, or the name of what it raised."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = function()
    except Exception as error:
        return type(error).__name__
    return float(value) if not isinstance(value, str) else value


def blobs(K: int, D: int, n: int, radius: float, sigma: float, seed: int = 0) -> tuple[Any, ...]:
    """K classes of n samples about a simplex ETF of this radius, in float32: x, y, vertices."""
    g = torch.Generator().manual_seed(seed)
    M = radius * frames.simplex_etf(K, D, generator=g)
    y = torch.arange(K).repeat(n)
    x = M[y] + sigma * torch.randn(K * n, D, generator=g)
    return x.float(), y, M


def two_pass(x: Tensor, y: Tensor, K: int) -> tuple[Tensor, Tensor, Tensor]:
    """Means [K, D], Σ_W [D, D] and class variances [K] in float64; every class has samples."""
    x = x.double()
    M = torch.stack([x[y == c].mean(0) for c in range(K)])
    r = x - M[y]
    v = torch.stack([r[y == c].square().sum(1).mean() for c in range(K)])
    return M, r.T @ r / len(x), v


def true_nc1(x: Tensor, y: Tensor, K: int) -> float:
    """Tr(Σ_W Σ_B†)/K by an eigendecomposition at rank K − 1, float64."""
    M, W, _ = two_pass(x, y, K)
    M = M - M.mean(0)
    values, vectors = torch.linalg.eigh(M.T @ M / K)
    values, vectors = values[-(K - 1) :], vectors[:, -(K - 1) :]
    return float(((vectors.T @ W @ vectors).diagonal() / values).sum() / K)


def true_cdnv(x: Tensor, y: Tensor, K: int) -> float:
    M, _, v = two_pass(x, y, K)
    square = torch.cdist(M, M, compute_mode="donot_use_mm_for_euclid_dist").square()
    square.fill_diagonal_(torch.inf)
    return float(((v[:, None] + v) / (2 * square)).sum() / (K * (K - 1)))


class Peer:
    """The peer's functions under short names, called as its README calls them."""

    def __init__(self, nc: ModuleType) -> None:
        self.nc, self.m, self.k = nc, nc.measure, nc.kernels

    def moments(self, x: Tensor, y: Tensor, K: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Means, global mean, Σ_W, class variances: two passes over the data."""
        a, size = self.nc.accumulate, (K, x.shape[1])
        mean = a.MeanAccumulator(*size)
        mean.accumulate(x, y)
        M, G = mean.compute()
        covar, var = a.CovarAccumulator(*size, M=M), a.VarNormAccumulator(*size, M=M)
        covar.accumulate(x, y, M)
        var.accumulate(x, y, M)
        return M, G, covar.compute(), var.compute()[0]

    def agreement(self, x: Tensor, y: Tensor, W: Tensor, M: Tensor) -> float:
        accumulator = self.nc.accumulate.DecAccumulator(*W.shape, M=M, W=W)
        accumulator.accumulate(x, y, W, M)
        return float(self.m.clf_ncc_agreement(accumulator))


# --- the faults ---------------------------------------------------------------------------------


def bias(p: Peer) -> Iterator[Row]:
    """1. NC4 without the bias."""
    x, y, M = blobs(10, 64, 100, 5.0, 0.3)
    g = torch.Generator().manual_seed(1)
    offset = 10 * torch.randn(64, generator=g)
    head = torch.nn.Linear(64, 10)
    with torch.no_grad():
        head.weight.copy_(M)
        head.bias.copy_(-(M.float() @ offset))  # takes the offset out of the decision
        x = x + offset
        logits = head(x)
        W = head.weight.detach()
        centres = two_pass(x, y, 10)[0]
        near = torch.cdist(x.double(), centres, compute_mode="donot_use_mm_for_euclid_dist").argmin(
            1
        )
        z = x.double() @ W.double().T + head.bias.double()
        truth = (z.argmax(1) == near).double().mean()
        peer = p.agreement(x, y, W, p.moments(x, y, 10)[0])
        ours = metrics.agreement(x, logits, ClassStats(10, 64).update(x, y).means)
    yield row("1 bias in NC4", "agreement, features shifted, bias undoes it", peer, ours, truth)


def distances(p: Peer) -> Iterator[Row]:
    """2. Nearest mean by ‖x‖² + ‖m‖² − 2x·m in float32, not centred."""
    x0, y, M = blobs(10, 64, 100, 0.1, 0.005)
    # An offset along a direction that no classifier row sees: the linear decision is unharmed.
    direction = torch.linalg.svd(M.double())[2][-1]
    for size in (0, 100, 1000):
        x = (x0.double() + size * direction).float()
        W = (100 * M).float()
        centres = two_pass(x, y, 10)[0]
        exact = torch.cdist(x.double(), centres, compute_mode="donot_use_mm_for_euclid_dist")
        truth = ((x.double() @ W.double().T).argmax(1) == exact.argmin(1)).double().mean()
        peer = p.agreement(x, y, W, p.moments(x, y, 10)[0])
        ours = metrics.agreement(x, x @ W.T, ClassStats(10, 64).update(x, y).means)
        yield row("2 distances", f"agreement, features at offset {size}", peer, ours, truth)


def empty(p: Peer) -> Iterator[Row]:
    """3. A class without samples becomes a mean of zero."""
    name = "3 empty class"
    x, y, _ = blobs(10, 64, 200, 5.0, 0.5)
    x = x + 3.0
    for missing in (1, 2):
        keep = y >= missing
        xs, ys = x[keep], y[keep]
        M, G, W, v = p.moments(xs, ys, 10)
        stats = ClassStats(10, 64).update(xs, ys)
        K = 10 - missing
        label = f"{missing} of 10 empty"
        truth = true_nc1(xs, ys - missing, K)
        peer = attempt(lambda M=M, G=G, W=W: p.m.covariance_ratio(W, M, G))
        yield row(name, f"NC1 pinv, {label}", peer, metrics.nc1_pinv(stats), truth)
        peer = attempt(lambda M=M, G=G, W=W: p.m.covariance_ratio(W, M, G, "svd"))
        yield row(name, f"NC1 by svds, {label}", peer, metrics.nc1_pinv(stats), truth)
        peer = attempt(lambda M=M, v=v: p.m.variability_cdnv(v, M))
        truth = true_cdnv(xs, ys - missing, K)
        yield row(name, f"CDNV, {label}", peer, metrics.cdnv(stats), truth)
        centred = stats.centered_means()[stats.active]
        C = two_pass(xs, ys - missing, K)[0]
        C = C - C.mean(0)
        gram, E = C @ C.T, torch.eye(K, dtype=torch.float64) - 1 / K
        truth = float((gram / gram.norm() - E / E.norm()).norm())
        peer = attempt(lambda M=M, G=G: p.m.simplex_etf_error(M, G))
        yield row(
            name, f"Gram distance to the ETF, {label}", peer, metrics.gram_etf(centred), truth
        )
        U = F.normalize(C, dim=1)
        pairs = torch.pdist(U)
        peer = attempt(lambda M=M, G=G: p.k.kernel_stats(M, G, kernel=p.k.log_kernel)[0])
        ours = metrics.log_energy(centred)[0]
        yield row(name, f"log energy, {label}", peer, ours, -pairs.log().mean())


def cutoff(p: Peer) -> Iterator[Row]:
    """4. The float32 pseudo-inverse drops directions in which the means do spread."""
    K, D, n = 500, 512, 20
    g = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(K, K, generator=g, dtype=torch.float64))[0]
    R = torch.linalg.qr(torch.randn(D, K, generator=g, dtype=torch.float64))[0]
    M = math.sqrt(K) * Q * torch.logspace(0, -3, K, dtype=torch.float64) @ R.T
    y = torch.arange(K).repeat(n)
    x = (M[y] + 0.002 * torch.randn(K * n, D, generator=g, dtype=torch.float64)).float()
    means, G, W, _ = p.moments(x, y, K)
    stats = ClassStats(K, D).update(x, y)
    truth = true_nc1(x, y, K)
    peer = attempt(lambda: p.m.covariance_ratio(W, means, G))
    case = "NC1 pinv, singular values of the means from 1 to 1e-3"
    yield row("4 cutoff of pinv", case, peer, metrics.nc1_pinv(stats), truth)


def interface(p: Peer) -> Iterator[Row]:
    """5. Options that raise or return something else."""
    name, a = "5 options", p.nc.accumulate
    x, y, _ = blobs(10, 64, 100, 5.0, 0.5)
    stats = ClassStats(10, 64).update(x, y)

    mean = a.MeanAccumulator(10, 64)
    mean.accumulate(x, y)
    M, _ = mean.compute()
    peer = attempt(lambda: mean.compute(weighted=True)[1].norm())
    truth = x.double().mean(0).norm()
    ours = stats.global_mean("sample").norm()
    yield row(name, "norm of the sample-weighted global mean", peer, ours, truth)

    covar = a.CovarAccumulator(10, 64, M=M)
    covar.accumulate(x, y, M)
    peer = attempt(lambda: "×".join(map(str, covar.compute([0, 1, 2]).shape)))
    part = ClassStats(10, 64).update(x[y < 3], y[y < 3])
    ours = "×".join(map(str, part.sigma_w.shape))
    yield row(name, "shape of Σ_W of three classes", peer, f"{ours} (own statistic)", "64×64")

    x, y, _ = blobs(65, 64, 40, 5.0, 0.5)
    means, G, W, _ = p.moments(x, y, 65)
    ours = metrics.nc1_pinv(ClassStats(65, 64).update(x, y))
    peer = attempt(lambda: p.m.covariance_ratio(W, means, G, "svd"))
    yield row(name, "NC1 by svds, K − 1 = D", peer, ours, true_nc1(x, y, 65))


def labels(p: Peer) -> Iterator[Row]:
    """6. Labels that are not class indices, and their types."""
    name, a = "6 labels", p.nc.accumulate
    x, y, _ = blobs(10, 64, 100, 5.0, 0.5)
    M, _, _, _ = p.moments(x, y, 10)
    ten = torch.arange(len(y)) < 10

    def theirs(labels: Tensor, features: Tensor = x) -> float:
        accumulator = a.CovarAccumulator(10, 64, M=M)
        accumulator.accumulate(features, labels, M)
        return float(accumulator.totals.trace())

    def mine(labels: Tensor) -> float:
        return float(ClassStats(10, 64).update(x, labels).within.trace())

    def exact(x: Tensor, y: Tensor) -> float:
        return float(two_pass(x, y, 10)[1].trace() * len(x))

    for value in (-100, -1):
        bad = y.masked_fill(ten, value)
        peer, ours = attempt(lambda bad=bad: theirs(bad)), attempt(lambda bad=bad: mine(bad))
        case = f"trace of the scatter, ten rows labelled {value} (ignore)"
        yield row(name, case, peer, ours, exact(x[~ten], y[~ten]))
    bad = y.masked_fill(ten, 10)
    mean = a.MeanAccumulator(10, 64)
    peer = attempt(lambda: mean.accumulate(x, bad)[0].sum())
    peer = peer if isinstance(peer, str) else f"silent, {peer:.0f} rows"
    yield row(name, "means, ten of 1000 labels = K", peer, attempt(lambda: mine(bad)), "InputError")
    byte = y.to(torch.uint8)
    peer, ours = attempt(lambda: theirs(byte)), attempt(lambda: mine(byte))
    yield row(name, "trace of the scatter, uint8 labels", peer, ours, exact(x, y))
    peer = attempt(lambda: a.MeanAccumulator(10, 64).accumulate(x[:1], y[:1])[0].sum())
    ours = attempt(lambda: ClassStats(10, 64).update(x[:1], y[:1]).N)
    yield row(name, "rows counted of a batch of one", peer, ours, 1)


def dtypes(p: Peer) -> Iterator[Row]:
    """7. Types of numbers, autocast, gradients."""
    name = "7 dtypes"
    x, y, W = blobs(10, 64, 100, 5.0, 0.5)
    M, G, S, _ = p.moments(x, y, 10)
    stats = ClassStats(10, 64).update(x, y)
    b = W.bfloat16()
    truth = 1.0
    peer = attempt(lambda: p.agreement(x, y, b, M))
    ours = attempt(lambda: metrics.agreement(x, x.bfloat16() @ b.T, stats.means))
    yield row(name, "agreement, bf16 weights", peer, ours, truth)

    def under(function: Callable[[], Any]) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return function()

    peer = attempt(lambda: under(lambda: p.m.covariance_ratio(S, M, G)))
    ours = attempt(lambda: under(lambda: metrics.nc1_pinv(ClassStats(10, 64).update(x, y))))
    yield row(name, "NC1 pinv under bf16 autocast", peer, ours, true_nc1(x, y, 10))
    C = two_pass(x, y, 10)[0]
    C = C - C.mean(0)
    gram, E = C @ C.T, torch.eye(10, dtype=torch.float64) - 0.1
    truth = (gram / gram.norm() - E / E.norm()).norm()
    peer = attempt(lambda: under(lambda: p.m.simplex_etf_error(M, G)))
    ours = attempt(lambda: under(lambda: metrics.gram_etf(stats.centered_means())))
    yield row(name, "Gram distance under bf16 autocast", peer, ours, truth, 1e-3)
    peer = attempt(lambda: str(p.k.dist_kernel(M.double()).dtype).removeprefix("torch."))
    ours = str(metrics.log_energy(M.double())[0].dtype).removeprefix("torch.")
    yield row(name, "dtype of pair measures of float64 means", peer, ours, "float64")

    x = x.requires_grad_()
    mean = p.nc.accumulate.MeanAccumulator(10, 64)
    mean.accumulate(x, y)
    held = ClassStats(10, 64).update(x, y).means.requires_grad
    peer = "kept" if mean.totals.requires_grad else "dropped"
    yield row(name, "graph of features with grad", peer, "kept" if held else "dropped", "dropped")


def costs(p: Peer) -> Iterator[Row]:
    """8. Time of one batch without the scatter, K = 1000, D = 2048, B = 256."""
    name, K, D, B, batches = "8 cost", 1000, 2048, 256, 16
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(B, D, generator=g), torch.randint(K, (B,), generator=g)
    M = torch.randn(K, D, generator=g)
    mean = p.nc.accumulate.MeanAccumulator(K, D)
    var = p.nc.accumulate.VarNormAccumulator(K, D, M=M)

    def theirs() -> None:
        for _ in range(batches):
            mean.accumulate(x, y)
            var.accumulate(x, y, M)

    def mine() -> None:
        stats = ClassStats(K, D, scatter=False)
        for _ in range(batches):
            stats.update(x, y)
        _ = stats.trace

    def best(function: Callable[[], Any], calls: int = 3) -> float:
        seconds = []
        for _ in range(calls):
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
        return 1e3 * min(seconds)

    a, b = best(theirs) / batches, best(mine) / batches
    yield Row(name, "means and class variances, ms per batch", number(a), number(b), "—", "slower")
    a = best(lambda: p.nc.util.hashify(M))
    yield Row(name, "SHA-256 of the means at each batch, ms", number(a), "none", "—", "slower")


def riesz(p: Peer) -> Iterator[Row]:
    """9. Riesz kernel with s = D − 2 underflows."""
    K = 10
    for D in (16, 256, 512):
        M = frames.simplex_etf(K, D, generator=torch.Generator().manual_seed(0)).float()
        truth = -(D - 2) / 2 * math.log10(2 * K / (K - 1))  # all distances are √(2K/(K−1))
        mean = p.k.kernel_stats(M, kernel=p.k.riesz_kernel)[0]
        peer = math.log10(mean) if mean > 0 else "−∞ (0.0)"
        ours = float(metrics.riesz_energy(M)) / math.log(10)
        yield row("9 Riesz", f"log10 of the energy of an ETF, D = {D}", peer, ours, truth, 1e-4)


def small(p: Peer) -> Iterator[Row]:
    """10. Few samples per class: plug-in values without a word, and ε in the counts."""
    name, K, D = "10 small classes", 10, 64
    truth = 0.25 * (K - 1) ** 2 / (K * 25)  # closed form of the population: σ = 0.5, r = 5
    for n in (1, 2, 5, 20):
        values = []
        for seed in range(20):
            x, y, _ = blobs(K, D, n, 5.0, 0.5, seed)
            M, G, S, _ = p.moments(x, y, K)
            stats = ClassStats(K, D).update(x, y)
            ours = [metrics.nc1_pinv(stats), metrics.debiased_nc1(stats)]
            values.append([p.m.covariance_ratio(S, M, G), *map(float, ours)])
        found = torch.tensor(values, dtype=torch.float64)
        peer, plug, ours = found.nanmean(0).tolist()
        missing = int(found[:, 2].isnan().sum())
        both = f"{number(plug)} plug-in, {number(ours)} debiased"
        both += f" (NaN in {missing} draws)" if 0 < missing < len(found) else ""
        case = f"NC1 pinv, mean of 20 draws, n = {n}"
        verdict = "right" if close(peer, truth, 0.1) else "biased"
        yield Row(name, case, number(peer), both, number(truth), verdict)
    x, y, W = blobs(K, D, 1, 5.0, 0.5)
    peer = p.agreement(x, y, W.float(), p.moments(x, y, K)[0])
    ours = metrics.agreement(x, x @ W.T.float(), ClassStats(K, D).update(x, y).means)
    case = "agreement, n = 1, all agree"
    yield Row(name, case, f"{peer:.7f}", f"{ours:.7f}", "1", "right" if peer == 1 else "wrong")


def order(p: Peer) -> Iterator[Row]:
    """11. Positional bare tensors: its layer-wise example passes means where rows belong."""
    x, y, W = blobs(10, 64, 100, 5.0, 0.5)
    x, W = x + 3.0, W.float()
    M, G, _, _ = p.moments(x, y, 10)
    right = p.m.self_duality_error(W, M, G)
    swapped = p.m.self_duality_error(M, W, G)
    stats = ClassStats(10, 64).update(x, y)
    ours = metrics.product_duality(W, stats.centered_means())
    truth = _product(W, two_pass(x, y, 10)[0])
    yield row("11 order", "NC3 as called in examples/layerwise_mnist.py", swapped, ours, truth)
    yield row("11 order", "NC3 as called in examples/mnist.py", right, ours, truth)


def _product(W: Tensor, M: Tensor) -> float:
    K = len(W)
    P = W.double() @ (M - M.mean(0)).T
    E = torch.eye(K, dtype=torch.float64) - 1 / K
    return float((P / P.norm() - E / E.norm()).norm())


def absent(p: Peer) -> Iterator[Row]:
    """12. What is not there: words looked up in the installed source."""
    modules = (p.nc.accumulate, p.nc.measure, p.nc.kernels, p.nc.util)
    source = "\n".join(inspect.getsource(module) for module in modules)
    stats = ClassStats(2, 4).update(torch.eye(4), torch.arange(4) % 2)
    features = {
        "sums over ranks": (r"distributed|all_reduce", hasattr(ClassStats, "all_reduce")),
        "merge": (r"__add__|merge", hasattr(ClassStats, "__add__")),
        "removal of a part": (r"__sub__|remove", hasattr(ClassStats, "__sub__")),
        "state on disk": (r"state_dict|def save|def load", hasattr(ClassStats, "save")),
        "NC3 ‖W/‖W‖ − M/‖M‖‖": (r"def self_duality\b", hasattr(metrics, "self_duality")),
        "VCI": (r"vci|collapse.index", hasattr(metrics, "vci")),
        "SELI": (r"\bseli\b", hasattr(metrics, "seli")),
        "ranks of features": (r"\w+_rank", hasattr(metrics, "effective_rank")),
        "test moments about train means": (r"def \w*test", hasattr(metrics, "weak_test_nc1")),
        "provenance": (r"provenance", hasattr(metrics.report(stats), "provenance")),
    }
    for what, (words, ours) in features.items():
        theirs = bool(re.search(words, source, re.IGNORECASE))
        there = ("yes" if found else "no" for found in (theirs, ours))
        yield Row("12 absent", what, *there, "—", "there" if theirs else "absent")


CASES = (
    bias, distances, empty, cutoff, interface, labels, dtypes, costs, riesz, small, order, absent,
)  # fmt: skip


def rows(nc: ModuleType) -> Iterator[Row]:
    """Every case, in order."""
    peer = Peer(nc)
    for case in CASES:
        yield from case(peer)
