"""This process among the ranks that torchrun started, gloo or nccl."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ncmethods._core import InputError, check_choice
from ncmethods.features import FeatureSet

__all__ = ["Process", "average_gradients", "gather", "process"]


@dataclass(frozen=True)
class Process:
    """Rank, number of ranks and device of this process."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0


@contextmanager
def process(device: str = "auto") -> Iterator[Process]:
    """Join the process group that torchrun describes, if any, and leave it at the end.

    Args:
        device: ``"auto"`` takes CUDA, then MPS where there is a single process, then the CPU.

    Raises:
        InputError: a device that this machine lacks.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    mps = world == 1 and torch.backends.mps.is_available()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    kind = device.partition(":")[0]
    check_choice(kind, ("cpu", "cuda", "mps"), "device")
    if (kind == "cuda" and not torch.cuda.is_available()) or (kind == "mps" and not mps):
        raise InputError(f"device {device!r} is not available here. Use cpu.")
    where = torch.device("cuda", local) if device == "cuda" else torch.device(device)
    if where.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.cuda.set_device(where)
    ours = world > 1 and not dist.is_initialized()
    if ours:
        dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
    try:
        rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        yield Process(rank, size, where)
    finally:
        if ours:
            dist.destroy_process_group()


def average_gradients(model: nn.Module, world: int) -> None:
    """Replace each gradient by its mean over the ranks.

    One reduction in the order of the parameters. DistributedDataParallel reorders its buckets after
    the first step: with three ranks or more, a resumed run would round its sums differently.
    """
    if world == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world
    for gradient, mean in zip(gradients, torch.split(flat, [g.numel() for g in gradients])):
        gradient.copy_(mean.view_as(gradient))


def gather(shard: FeatureSet, world: int) -> FeatureSet:
    """The whole FeatureSet from strided shards (rank r holds the samples r, r + world, …)."""
    if world == 1:
        return shard
    parts: list[Any] = [None] * world
    dist.all_gather_object(parts, (shard.features, shard.labels, shard.logits))
    whole = []
    for tensors in zip(*parts):
        N = sum(map(len, tensors))
        out = tensors[0].new_empty(N, *tensors[0].shape[1:])
        for rank, tensor in enumerate(tensors):
            out[rank::world] = tensor
        whole.append(out)
    features, labels, logits = whole
    return FeatureSet(features, labels, shard.num_classes, logits)
