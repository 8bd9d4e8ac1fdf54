"""A loader whose images live on the device; each batch is a function of (seed, epoch, step)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ncmethods._core import InputError
from ncmethods.data.datasets import ImageData
from ncmethods.data.samplers import ClassSampler


class Batch(NamedTuple):
    """One training batch; with mixup the loss is lam · L(y) + (1 − lam) · L(y_mix)."""

    x: Tensor  # float32 [B, C, H, W]
    y: Tensor  # int64 [B]
    y_mix: Tensor | None  # int64 [B], None without mixup
    lam: float
    share: float = 1.0  # B over the mean of all ranks: weight of this rank's mean
    outliers: Tensor | None = None  # float32 [2B, C, H, W], images of no class


def channel_stats(data: ImageData) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, pixels in [0, 1]; a constant channel has sd 1.

    Raises:
        InputError: there are no images.
    """
    if not len(data):
        raise InputError("channel_stats needs at least one image.")
    means, sds = [], []
    levels = torch.arange(256, dtype=torch.float64) / 255
    for channel in data.images.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean = float(share @ levels)
        means.append(mean)
        sds.append(math.sqrt(float(share @ (levels - mean) ** 2)) or 1.0)
    return means, sds


class DeviceLoader:
    """Batches made on the device from images that stay there as uint8.

    In training, ``epoch(e, start_step)`` yields ``Batch``: shuffled, cropped, flipped, mixed. Batch
    (e, s) depends on (seed, e, s) alone: a resumed run sees what an unbroken one would have seen.
    Each rank takes its slice of one global batch: the union over ranks is the batch of a single
    process. The ⌈N / batch_size⌉ batches of an epoch differ by one image at most, since BatchNorm
    on a last batch of eight, at the full learning rate, can undo an epoch; so do the slices, and
    ``share`` is the weight of a rank's mean in that of the batch.

    With ``views=v`` a batch shows each of its images v times, cropped and flipped independently and
    stacked along B, view after view: rows i and i + B/v are one image. The first view is the batch
    of ``views=1``.

    With ``outliers`` a batch brings two of them for each of its images, drawn with repetition and
    augmented alike; the rest of the batch is what it would be without them.

    With ``train=False``, iterating yields ``(x, y)`` in order, without augmentation; rank r sees
    the images r, r + world, …, each once.

    Args:
        data: images and labels.
        batch_size: images per step over all ranks, at most; more where a rank would have one.
        device: where images and batches live.
        seed: of order and augmentation, ≥ 0; the global random state is not touched.
        train: training or evaluation.
        sampler: whose ``order(epoch)`` says which images an epoch shows; each image once if None.
        mean: of each channel, pixels in [0, 1]; computed from ``data`` if None.
        std: likewise.
        crop: zero padding in pixels before a random crop of the original size.
        flip: mirror half of the images.
        mixup: a of lam ~ Beta(a, a), one lam per batch; 0 is off.
        views: augmented copies of each image in a batch, for contrastive losses; ``batch_size``
            and the length of an epoch still count images.
        outliers: auxiliary images uint8 [M, C, H, W] that belong to no class.
        rank: of this process.
        world: number of processes.

    Raises:
        InputError: a value that cannot work; the message says why.
    """

    def __init__(
        self,
        data: ImageData,
        batch_size: int,
        *,
        device: torch.device | str = "cpu",
        seed: int = 0,
        train: bool = True,
        sampler: ClassSampler | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        crop: int = 0,
        flip: bool = False,
        mixup: float = 0.0,
        views: int = 1,
        outliers: Tensor | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        _, C, H, W = data.images.shape
        if mean is None or std is None:
            measured = channel_stats(data)
            mean, std = mean or measured[0], std or measured[1]
        self.mean, self.std = list(mean), list(std)
        if not len(self.mean) == len(self.std) == C or min(self.std) <= 0:
            raise InputError(
                f"mean and std must have one value per channel ({C}), std > 0, got mean "
                f"{self.mean} and std {self.std}."
            )
        if not 0 <= rank < world:
            raise InputError(f"rank must lie in 0 … world − 1 = {world - 1}, got {rank}.")
        if seed < 0 or crop < 0 or not (math.isfinite(mixup) and mixup >= 0):
            raise InputError(
                f"seed, crop and mixup must be ≥ 0, got seed={seed}, crop={crop}, mixup={mixup}."
            )
        if not train and (crop or flip or mixup or sampler or views != 1 or outliers is not None):
            raise InputError(
                "crop, flip, mixup, outliers, views and a sampler need train=True: evaluation "
                "shows each image once."
            )
        if outliers is not None and (
            outliers.shape[1:] != data.images.shape[1:] or not len(outliers)
        ):
            raise InputError(
                f"outliers must be images [M, {C}, {H}, {W}] like those of the data, M ≥ 1, got "
                f"{tuple(outliers.shape)}."
            )
        if views < 1 or (views > 1 and mixup):
            raise InputError(
                f"views must be at least 1, and 1 with mixup, which mixes the images of a batch: "
                f"got views={views}, mixup={mixup}."
            )
        if views > 1 and not (crop or flip):
            raise InputError(
                f"{views} views without crop or flip are {views} copies of one image. "
                "Set crop or flip, or take one view."
            )
        if train and (batch_size % world or batch_size < 2 * world):
            raise InputError(
                f"batch_size is over all ranks: it must be a multiple of world = {world} with at "
                f"least 2 images per rank, got {batch_size}."
            )
        if train and len(data) < 2 * world:
            raise InputError(
                f"Training needs at least 2 images per rank: {2 * world} for world = {world}, "
                f"got {len(data)}."
            )
        if batch_size < 1:
            raise InputError(f"batch_size must be ≥ 1, got {batch_size}.")
        self.batch_size, self.seed, self.train, self.sampler = batch_size, seed, train, sampler
        self.crop, self.flip, self.mixup, self.views = crop, flip, mixup, views
        self.rank, self.world = rank, world
        self.device = torch.device(device)
        self.images = data.images.to(self.device)
        self.labels = data.labels.to(self.device)
        self.outliers = None if outliers is None else outliers.to(self.device)
        # In units of the uint8 pixels; subtraction and division round the same for every slice.
        self._mean = 255 * torch.tensor(self.mean, device=self.device)[:, None, None]
        self._std = 255 * torch.tensor(self.std, device=self.device)[:, None, None]
        self._rows = torch.arange(H, device=self.device)
        self._cols = torch.arange(W, device=self.device)

    def __len__(self) -> int:
        """Steps per epoch on this rank."""
        if not self.train:
            return math.ceil(len(range(self.rank, len(self.labels), self.world)) / self._per_rank)
        N = self.sampler.length if self.sampler else len(self.labels)
        return min(math.ceil(N / self.batch_size), N // (2 * self.world))

    @property
    def _per_rank(self) -> int:
        return math.ceil(self.batch_size / self.world)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Batches of one epoch, from ``start_step`` on.

        Raises:
            InputError: the loader evaluates, or the position does not exist.
        """
        if not self.train:
            raise InputError("epoch() needs train=True; iterate an evaluation loader directly.")
        if epoch < 0 or not 0 <= start_step <= len(self):
            raise InputError(
                f"epoch must be ≥ 0 and start_step in 0 … {len(self)}, got {epoch}, {start_step}."
            )
        return self._batches(epoch, start_step)

    def _batches(self, epoch: int, start_step: int) -> Iterator[Batch]:
        if self.sampler:
            order = self.sampler.order(epoch)
        else:
            order = self._random(epoch, 0).permutation(len(self.labels))
        N, steps = len(order), len(self)
        for step in range(start_step, steps):
            chosen = order[N * step // steps : N * (step + 1) // steps]
            b = len(chosen)
            # The draws are for the global batch; this rank builds its slice [lo, hi) of it.
            rng = self._random(epoch, step + 1)
            views = [self._draws(chosen, rng) for _ in range(self.views)]
            lo, hi = (b * r // self.world for r in (self.rank, self.rank + 1))
            share = (hi - lo) * self.world / b
            x, y = self._build(np.hstack([draws[:, lo:hi] for draws in views]))
            outliers = None
            if self.outliers is not None:
                own = self._random(epoch, step + 1, 1)
                drawn = self._draws(own.integers(0, len(self.outliers), 2 * b), own)
                outliers = self._images(self.outliers, self._sent(drawn[:, 2 * lo : 2 * hi]))
            if not self.mixup:
                yield Batch(x, y, None, 1.0, share, outliers)
                continue
            lam = float(rng.beta(self.mixup, self.mixup))
            other, y_mix = self._build(views[0][:, rng.permutation(b)[lo:hi]])
            yield Batch(x.mul_(lam).add_(other.mul_(1 - lam)), y, y_mix, lam, share, outliers)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images and labels in order.

        Raises:
            InputError: the loader trains.
        """
        if self.train:
            raise InputError("A training loader has epochs: iterate loader.epoch(e).")
        for start in range(len(self)):
            first = self.rank + start * self._per_rank * self.world
            part = slice(first, first + self._per_rank * self.world, self.world)
            yield self._normalized(self.images[part]), self.labels[part]

    def _random(self, epoch: int, *stream: int) -> np.random.Generator:
        """An own generator for the order (stream 0) or a step (1, 2, …) of ``epoch``."""
        return np.random.default_rng([self.seed, epoch, *stream])

    def _draws(self, chosen: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
        """[4, b]: index, row offset, column offset, mirrored."""
        offsets = rng.integers(0, 2 * self.crop + 1, (2, len(chosen)))
        return np.vstack([chosen, offsets, rng.integers(0, 1 + self.flip, len(chosen))])

    def _normalized(self, images: Tensor) -> Tensor:
        return images.float().sub_(self._mean).div_(self._std)

    def _build(self, draws: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Images and labels for ``draws`` [4, b]."""
        sent = self._sent(draws)
        return self._images(self.images, sent), self.labels[sent[0]]

    def _sent(self, draws: NDArray[np.int64]) -> Tensor:
        """``draws`` on the device."""
        sent = torch.from_numpy(draws)
        if self.device.type == "cuda":
            sent = sent.pin_memory()
        return sent.to(self.device, non_blocking=True)

    def _images(self, source: Tensor, sent: Tensor) -> Tensor:
        """Those of ``source`` that ``sent`` [4, b] draws, cropped, mirrored and normalised."""
        index, dy, dx, mirrored = sent
        images = source[index]
        if self.crop or self.flip:
            images = F.pad(images, (self.crop,) * 4)
            rows = self._rows + dy[:, None]  # [b, H]
            cols = self._cols + dx[:, None]  # [b, W]
            cols = torch.where(mirrored[:, None] == 1, cols.flip(1), cols)
            flat = rows[:, :, None] * images.shape[3] + cols[:, None, :]  # [b, H, W]
            flat = flat[:, None].expand(-1, images.shape[1], -1, -1).flatten(2)
            images = images.flatten(2).gather(2, flat).view(len(index), -1, *self.images.shape[2:])
        return self._normalized(images)
