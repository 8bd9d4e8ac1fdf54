"""What each loss costs, forward and backward, beside ``F.cross_entropy``.

    python tests/benchmarks/bench_losses.py [--repeats 40] [--classes 10 1000] [--only NAME …]

N = 256 samples, D = 512, K classes, float32. Features, logits and rows are leaves. "× CE" is the
time of the loss over that of cross-entropy of [N, K] logits; "floor" is the arithmetic which the
formula cannot do without, timed in the same way, over the same; "/ floor" is the first over the
second. Floors are: one softmax over the K logits (two for mixed labels; targets [N, K] for
multi-hot ones; logistic functions where the loss has those); a pass over [N, D] or [N, K] with a
gradient; the products of rows that the formula names, of unit length where it says so, with their
softmax or draw where it has one; the means of classes with the distances from them; and the
gradients of all this. Times are CPU times of this process on one thread; the repeats of the three
are interleaved and the minimum of each is kept, so that other work on the machine leaves the ratios
alone. Target at K = 1000: 2 × CE, or 2 × the floor where that is more; rows beyond it are marked.

The distances between means (``cdnv``) come from products in float64, and so does their floor: in
float32 the distances of near means would have no digits left.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ncmethods import losses

N, D = 256, 512
Call = Callable[[], Tensor]
HELPERS = {
    "CutMixBox", "LossModule", "cutmix_box", "drw_weights", "remix_labels", "remix_lambda"
}  # fmt: skip


def leaf(*shape: int) -> Tensor:
    return (torch.randn(*shape) / D**0.5).requires_grad_()


def square(*tensors: Tensor) -> Call:
    """One pass over each tensor, with its gradient."""
    return lambda: sum((x.square().sum() for x in tensors), torch.zeros(()))


def contrast(x: Tensor, *rows: Tensor) -> Call:
    """Softmax over the products of each row of ``x``, of unit length, with ``rows``."""

    def call() -> Tensor:
        unit = F.normalize(x, dim=1)
        others = [unit if y is x else y for y in rows]
        return torch.cat([unit @ y.T for y in others], 1).logsumexp(1).mean()

    return call


def spread(x: Tensor, index: Tensor, distances: bool = True) -> Call:
    """Means of the groups ``index``, and the distances from them."""
    counts = index.bincount(minlength=N).clamp(min=1)[:, None]

    def call() -> Tensor:
        means = torch.zeros_like(x).index_add(0, index, x) / counts
        lengths = means.square().sum()
        return lengths + (x - means[index]).square().sum() if distances else lengths

    return call


def gram(x: Tensor) -> Call:
    """Products of all pairs of rows in float64."""

    def call() -> Tensor:
        rows = x.double()
        return (rows @ rows.T).square().sum()

    return call


def nearest(x: Tensor, *others: Tensor) -> Call:
    """For each row the largest product with another, without gradient; then a pass with it."""

    def call() -> Tensor:
        with torch.no_grad():
            other = (x @ x.T).argmax(1)
        return (x - x[other]).square().sum() + square(*others)()

    return call


def drawn(call: Call) -> Call:
    """The call, after a draw of six positives for each row."""
    return lambda: call() + torch.rand(N, N).topk(6, 1).values.sum()


def cases(K: int) -> dict[str, tuple[Call, Call]]:
    """Name → the loss and its floor."""
    torch.manual_seed(0)
    h, z, W, mu = leaf(N, D), leaf(N, K), leaf(K, D), leaf(K, D)
    y, frame = torch.randint(K, (N,)), F.normalize(torch.randn(K, D), dim=1)
    counts = torch.linspace(500, 5, K).long()
    rows = F.normalize(torch.randn(2 * K, D), dim=1)
    owner = torch.arange(K).repeat_interleave(2)
    regularizer, one_hot = losses.CentreRegularizer(K, D), F.one_hot(y, K)
    index = y.unique(return_inverse=True)[1]
    within = spread(h, index)
    table: dict[str, tuple[Call, Call]] = {}

    def plus(one: Call, other: Call) -> Call:
        return lambda: one() + other()

    def add(name: str, floor: Call, more: str = "", **extra: Any) -> None:
        loss = getattr(losses, name)
        table[name + more] = (partial(loss, **extra), floor)

    softmax = partial(F.cross_entropy, z, y)
    by_logits: dict[str, Any] = {"logits": z, "labels": y}
    counted: dict[str, Any] = by_logits | {"counts": counts}
    add("label_smoothing", softmax, **by_logits)
    add("label_aware_smoothing", softmax, **counted)
    add("focal", softmax, **by_logits)
    add("logit_adjusted", softmax, **counted)
    add("vector_scaling", softmax, **counted)
    add("ldam", softmax, **counted)
    add("pick_all_label", partial(F.cross_entropy, z, one_hot.to(z)), logits=z, labels=one_hot)
    add("binary_cross_entropy", lambda: F.logsigmoid(z).sum(), **by_logits)
    add("mse", square(z), **by_logits)
    add("mse", square(z), ", by class", balance="batch", **by_logits)
    add("spectral_decoupling", square(z), **by_logits)

    def ce(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)

    table["mixed"] = (
        partial(losses.mixed, ce, y, y.flip(0), 0.3, logits=z),
        lambda: ce(z, y) + ce(z, y.flip(0)),
    )

    def at_own() -> Tensor:
        return (F.normalize(h, dim=1) * frame[y]).sum()

    by_features: dict[str, Any] = {"features": h, "labels": y}
    add("dot_regression", at_own, weight=frame, **by_features)
    add("dot_regression", at_own, ", plain", weight=frame, balance="none", **by_features)
    add("multi_centre_regression", contrast(h, rows), rows=rows, owner=owner, **by_features)
    add("centre_collapse", contrast(h, frame), weight=frame, counts=counts, **by_features)
    add("nc1_centres", square(h, mu), centres=mu, **by_features)
    add("nc2_max_min_angle", nearest(mu), centres=mu)
    table["CentreRegularizer"] = (partial(regularizer, h, y), nearest(regularizer.centres, h))
    add("live_centres", plus(within, nearest(h)), **by_features)
    add("feature_decay", square(h), **by_features)
    add("tikhonov", square(h, W), weight=W, **by_features)
    add("zero_mean", square(h), **by_features)
    add("norm_variation", square(h), **by_features)
    add("norm_variation", spread(h, index, False), ", means", of="means", **by_features)
    add("signed_nc1", within, **by_features)
    add("signed_nc1", plus(within, gram(h)), ", cdnv", measure="cdnv", **by_features)
    add("svsl", within, layers=[h], labels=y)
    add("koleo", nearest(h), features=h)
    add("supcon", contrast(h, h), **by_features)
    add("supcon", contrast(h, h), ", relu", relu=True, **by_features)
    add("prototype_supcon", contrast(h, h, W), weight=W, **by_features)
    add("balanced_contrastive", contrast(h, h, W), weight=W, **by_features)
    add("k_positive_supcon", drawn(contrast(h, h)), **by_features)
    add("targeted_supcon", drawn(contrast(h, h, frame)), weight=frame, **by_features)
    add("fnc2", contrast(h, h, frame), weight=frame, **by_features)
    return table


def seconds(call: Call, number: int) -> float:
    start = time.process_time()
    for _ in range(number):
        call().backward()
    return (time.process_time() - start) / number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--number", type=int, default=5, help="calls in a repeat")
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 1000])
    parser.add_argument("--only", nargs="+", help="losses to time, by the start of their name")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, 1 thread, N = {N}, D = {D}, ", end="")
    print(f"minimum of {args.repeats} interleaved repeats of {args.number} calls")
    for K in args.classes:
        table = cases(K)
        missing = set(losses.__all__) - HELPERS - {name.partition(",")[0] for name in table}
        if missing:
            print(f"not measured: {', '.join(sorted(missing))}")
        z, y = leaf(N, K), torch.randint(K, (N,))
        print(f"\n| K = {K} | CE ms | × CE | floor | / floor |\n|---|---|---|---|---|")
        for name, (loss, floor) in table.items():
            if args.only and not name.startswith(tuple(args.only)):
                continue
            trials: tuple[Call, ...] = (partial(F.cross_entropy, z, y), loss, floor)
            for trial in trials:
                trial().backward()
            times = [[seconds(t, args.number) for t in trials] for _ in range(args.repeats)]
            base, cost, least = (min(column) for column in zip(*times, strict=True))
            late = " ←" if K >= 1000 and cost > 2 * max(base, least) else ""
            print(
                f"| {name} | {1e3 * base:.2f} | {cost / base:.2f}{late} | {least / base:.2f} | "
                f"{cost / least:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
