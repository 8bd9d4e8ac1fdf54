"""What fixing the classifier saves: parameters, gradients, optimizer state, time.

    python tests/benchmarks/bench_heads.py [--threads 2] [--repeats 5] [--batch 256]

Counts are exact: models are built on the meta device and never run. "Work" is the share of the
head's multiplications in those of a training step, forward and backward, counted by torch on
224 × 224 images. Only the head is timed, on the CPU: forward, backward down to the features and an
SGD-with-momentum step, for ``nn.Linear`` and for ``etf_head`` without and with its BatchNorm neck.
The minimum of interleaved repeats is kept, so that a busy machine slows all three alike.
"""

from __future__ import annotations

import argparse
import time

import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ncmethods import heads
from ncmethods._core import find_head

MODELS = ("resnet18", "resnet50", "vit_b_16")
CLASSES = (10, 1000, 10_000)


def build(name: str, K: int) -> nn.Module:
    with torch.device("meta"):
        return getattr(torchvision.models, name)(num_classes=K)


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def flops(module: nn.Module, x: torch.Tensor) -> int:
    """Multiply-adds of a forward and a backward pass, times 2."""
    with FlopCounterMode(display=False) as counter:
        module(x).sum().backward()
    return counter.get_total_flops()


def seconds(head: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    parameters = list(head.parameters())
    optimizer = torch.optim.SGD(parameters or [torch.zeros(1)], lr=1e-3, momentum=0.9)
    start = time.perf_counter()
    optimizer.zero_grad()
    F.cross_entropy(head(x), y).backward()
    optimizer.step()
    return time.perf_counter() - start


def mega(n: float, unit: str = "MB") -> str:
    return f"{n / 1e6:.2f} {unit}".strip()


def narrowed(K: int) -> tuple[int, int]:
    """Parameters of ResNet-18 with D = 512 and with its last block narrowed to D = K channels."""
    net = build("resnet18", K)
    before = size(net)
    with torch.device("meta"):
        block = net.layer4[1]
        block.conv2, block.bn2 = nn.Conv2d(512, K, 3, padding=1, bias=False), nn.BatchNorm2d(K)
        block.downsample = nn.Sequential(nn.Conv2d(512, K, 1, bias=False), nn.BatchNorm2d(K))
        net.fc = nn.Linear(K, K)
    assert net(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, K)
    return before, size(net)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=256)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, batch {args.batch}, ", end="")
    print(f"minimum of {args.repeats} interleaved repeats\n")

    print("| model, D | K | parameters | in the head | gradient | momentum | AdamW |", end="")
    print(" BN neck adds |\n|---|---|---|---|---|---|---|---|")
    for name in MODELS:
        for K in CLASSES:
            net = build(name, K)
            linear = find_head(net).module
            D, saved = linear.in_features, size(linear)
            neck = size(heads.etf_head(D, 2).neck)
            print(
                f"| {name}, {D} | {K} | {mega(size(net), 'M')} | {mega(saved, 'M')} = "
                f"{saved / size(net):.2%} | {mega(4 * saved)} | {mega(4 * saved)} | "
                f"{mega(8 * saved)} | {neck} |"
            )

    print("\n| model, D | K | work: linear | work: fixed | linear ms | fixed ms | with BN ms |")
    print("|---|---|---|---|---|---|---|")
    for name in MODELS:
        for K in CLASSES:
            net = build(name, K)
            linear = find_head(net).module
            D = linear.in_features
            whole = flops(net, torch.empty(1, 3, 224, 224, device="meta"))
            row = torch.empty(1, D, device="meta", requires_grad=True)
            head = flops(linear, row)
            fixed = flops(linear.requires_grad_(False), row)
            x, y = torch.randn(args.batch, D, requires_grad=True), torch.arange(args.batch) % K
            trials = {
                "linear": nn.Linear(D, K),
                "fixed": heads.FixedHead(F.normalize(torch.randn(K, D)), D, neck=None, scale=10.0),
                "bn": heads.FixedHead(F.normalize(torch.randn(K, D)), D, neck="bn", scale=10.0),
            }
            for trial in trials.values():
                seconds(trial, x, y)
            best = dict.fromkeys(trials, float("inf"))
            for _ in range(args.repeats):
                for key, trial in trials.items():
                    best[key] = min(best[key], seconds(trial, x, y))
            times = " | ".join(f"{1e3 * t:.2f}" for t in best.values())
            print(
                f"| {name}, {D} | {K} | {head / whole:.3%} | "
                f"{fixed / (whole - head + fixed):.3%} | {times} |"
            )

    print("\nResNet-18 with its last block narrowed to D = K:")
    for K in (10, 100):
        before, after = narrowed(K)
        print(f"K = {K}: {mega(before, 'M')} → {mega(after, 'M')}, {1 - after / before:.1%} fewer")


if __name__ == "__main__":
    main()
