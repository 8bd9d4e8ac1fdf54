"""Which samples an epoch shows: by class frequency, evenly over classes, or between the two."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Sampler

from ncmethods._core import InputError, check_choice
from ncmethods.data.longtail import class_counts

__all__ = ["BoundBatches", "ClassSampler", "Sampling", "class_shares"]

Sampling = Literal["instance", "sqrt", "balanced", "progressive"]
"""Shares of the classes in an epoch, see :func:`class_shares`."""


def class_shares(counts: Tensor, sampling: Sampling, *, progress: float = 0.0) -> Tensor:
    """Share of each class in an epoch, [K] float64, sum 1; a class without samples has share 0.

    ``instance``: n_c/N. ``sqrt``: ∝ √n_c. ``balanced``: 1/K. ``progressive``: from the first to
    the third, (1−t)·n_c/N + t/K with t = ``progress``.

    Args:
        counts: samples per class [K].
        sampling: one of the four.
        progress: share of the training that lies behind, in [0, 1].

    References:
        Kang et al., ICLR 2020, arXiv:1910.09217 (q = 1, 1/2 and 0, and progressive balance).
    """
    check_choice(sampling, get_args(Sampling), "sampling")
    if not 0 <= progress <= 1:
        raise InputError(f"progress must lie in [0, 1], got {progress}.")
    n = counts.double()
    instance, balanced = n / n.sum(), (n > 0) / (n > 0).double().sum()
    if sampling == "sqrt":
        return n.sqrt() / n.sqrt().sum()
    t = {"instance": 0.0, "balanced": 1.0, "progressive": progress}[sampling]
    return (1 - t) * instance + t * balanced


class ClassSampler(Sampler[int]):
    """Indices of an epoch with given shares of the classes, the same for any number of ranks.

    The epoch depends on (seed, epoch) alone. A class gets its share of the length to one sample,
    and its samples come equally often to one: rare ones are repeated, frequent ones left out only
    once the others of their class have been shown. Rank r takes every ``world``-th index.

    For a ``DataLoader`` pass it as ``sampler=`` and call ``set_epoch`` before each epoch.

    Args:
        labels: of the dataset, int64 [N], or the dataset (see ``data.class_counts``); negative
            labels are left out.
        sampling: see :func:`class_shares`.
        length: samples of an epoch over all ranks; the number of labelled samples if None. (The
            field's class-aware sampler takes K · max n_c, four times as many at R = 100.)
        epochs: of the training, for ``progressive``.
        seed: of all draws.
        rank: of this process.
        world: number of processes; ``length`` is cut to a multiple of it.

    Raises:
        InputError: no labels, ``progressive`` without epochs, or a value out of its range.
    """

    def __init__(
        self,
        labels: Tensor | Sequence[int],
        sampling: Sampling = "balanced",
        *,
        length: int | None = None,
        epochs: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        known = torch.as_tensor(labels).cpu()
        self.counts = class_counts(known)
        class_shares(self.counts, sampling)
        if sampling == "progressive" and (epochs is None or epochs < 1):
            raise InputError(f"sampling='progressive' needs the number of epochs, got {epochs}.")
        whole = int(self.counts.sum())
        length = whole if length is None else length
        if not 0 <= rank < world or length < world or seed < 0:
            raise InputError(
                f"rank must lie in 0 … world − 1, length be at least world, seed at least 0: got "
                f"rank={rank}, world={world}, length={length}, seed={seed}."
            )
        self._labels = known.numpy()
        self.sampling, self.epochs, self.seed = sampling, epochs, seed
        self.length, self.rank, self.world = length // world * world, rank, world
        self._epoch = 0

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Indices of ``epoch`` (from 0) over all ranks, [length]."""
        if self.sampling == "progressive":
            assert self.epochs is not None
            progress = min(1.0, epoch / max(1, self.epochs - 1))
        else:
            progress = 0.0
        shares = class_shares(self.counts, self.sampling, progress=progress).numpy()
        rng = np.random.default_rng([self.seed, epoch, 0])
        # Systematic: class c gets ⌊share · length⌋ or one more, and all together the length.
        edges = np.floor(
            np.append(0.0, shares.cumsum() / shares.sum()) * self.length + rng.random()
        )
        edges[-1] = edges[0] + self.length
        draws = np.diff(edges).astype(np.int64)
        n = self.counts.numpy()
        by_class = np.lexsort((rng.random(len(self._labels)), self._labels))
        by_class = by_class[(self._labels < 0).sum() :]  # shuffled within each class
        start, c = n.cumsum() - n, np.repeat(np.arange(len(n)), draws)
        nth = np.arange(len(c)) - np.repeat(draws.cumsum() - draws, draws)
        chosen: NDArray[np.int64] = by_class[start[c] + nth % n[c]]
        return rng.permutation(chosen)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration shows."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """Indices of this rank."""
        return iter(self.order(self._epoch)[self.rank :: self.world].tolist())

    def __len__(self) -> int:
        """Samples of an epoch on this rank."""
        return self.length // self.world


class BoundBatches(Sampler[list[int]]):
    """Batches to each of which one sample of every class is added, the same ones all along.

    With these binding examples the features of a supervised contrastive loss behind a ReLU have the
    orthogonal frame as their only optimum, however the rest is dealt into batches. Pass it to a
    ``DataLoader`` as ``batch_sampler=``.

    Args:
        batches: lists of indices, e.g. a ``torch.utils.data.BatchSampler``.
        labels: of the dataset, int64 [N].
        seed: of the choice of the examples.

    References:
        "Symmetric Neural-Collapse Representations with Supervised Contrastive Loss: The Impact of
        ReLU and Batching" (batch-binding).
    """

    def __init__(self, batches: Iterable[list[int]], labels: Tensor, *, seed: int = 0) -> None:
        known = torch.as_tensor(labels).cpu()
        counts = class_counts(known).numpy()
        rng = np.random.default_rng(seed)
        order = np.lexsort((rng.random(len(known)), known.numpy()))[int((known < 0).sum()) :]
        self.binding: list[int] = order[(counts.cumsum() - counts)[counts > 0]].tolist()
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        """The batches, each with the binding examples behind it."""
        for batch in self.batches:
            yield [*batch, *self.binding]

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.batches)  # type: ignore[arg-type]
