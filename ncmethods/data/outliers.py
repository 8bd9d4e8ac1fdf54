"""Images that do not belong: other datasets and synthetic patterns, in the shape of a dataset."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ncmethods._core import InputError, check_choice
from ncmethods.data.datasets import ImageData, load, names

__all__ = ["PATTERNS", "outliers"]


def _uniform(n: int, shape: tuple[int, int, int], rng: torch.Generator) -> Tensor:
    """Each pixel anything."""
    return torch.rand(n, *shape, generator=rng)


def _gaussian(n: int, shape: tuple[int, int, int], rng: torch.Generator) -> Tensor:
    """Grey with normal noise of a quarter of the range."""
    return 0.5 + 0.25 * torch.randn(n, *shape, generator=rng)


def _gratings(n: int, shape: tuple[int, int, int], rng: torch.Generator) -> Tensor:
    """Waves of a random direction, one to eight across the image."""
    C, H, W = shape
    turn, waves, phase = torch.rand(3, n, 1, 1, generator=rng)
    y, x = torch.meshgrid(torch.linspace(0, 1, H), torch.linspace(0, 1, W), indexing="ij")
    along = x * (math.pi * turn).cos() + y * (math.pi * turn).sin()
    wave = (2 * math.pi * ((1 + 7 * waves) * along + phase)).sin()
    grey: Tensor = 0.5 + 0.5 * wave
    return grey[:, None].expand(n, C, H, W)


def _flat(n: int, shape: tuple[int, int, int], rng: torch.Generator) -> Tensor:
    """One grey all over, as of a covered lens."""
    return torch.rand(n, 1, 1, 1, generator=rng).expand(n, *shape)


def _photos(n: int, shape: tuple[int, int, int], rng: torch.Generator) -> Tensor:
    """Squares of 16 to 256 pixels out of scikit-learn's two photographs, half of them mirrored."""
    from sklearn.datasets import load_sample_images

    C, H, W = shape
    whole = [torch.tensor(photo).permute(2, 0, 1) for photo in load_sample_images().images]
    which, size, top, left, mirrored = torch.rand(5, n, generator=rng).tolist()
    made = torch.empty(n, C, H, W)
    for i in range(n):
        photo, side = whole[int(2 * which[i])], int(16 * 16 ** size[i])
        y, x = (int(u * (d - side)) for u, d in zip((top[i], left[i]), photo.shape[1:]))
        part = photo[:, y : y + side, x : x + side]
        made[i] = fitted(part[None].flip(3) if mirrored[i] < 0.5 else part[None], shape)[0]
    return made / 255


PATTERNS: dict[str, Callable[[int, tuple[int, int, int], torch.Generator], Tensor]] = {
    "uniform": _uniform,
    "gaussian": _gaussian,
    "gratings": _gratings,
    "flat": _flat,
    "photos": _photos,
}
"""Images by name that need no dataset: values in [0, 1] from a number, a shape and a generator."""


def outliers(
    name: str,
    shape: tuple[int, int, int],
    *,
    n: int = 2000,
    seed: int = 0,
    root: str | os.PathLike[str] | None = None,
) -> Tensor:
    """Images of another kind, brought to ``shape``.

    Args:
        name: a pattern (``uniform``, ``gaussian``, ``gratings``, ``flat``) or ``photos``, which
            are crops of the two photographs that come with scikit-learn; or a dataset whose test
            images are taken: resized bilinearly, grey repeated or colours averaged.
        shape: (C, H, W) of the images that the model knows.
        n: number of images; of a dataset at most, drawn without repetition.
        seed: of the draw.
        root: where the dataset's files are.

    Returns:
        uint8 [n, C, H, W].

    Raises:
        InputError: an unknown name, or n < 1.
        DataError: the dataset is missing or damaged.
    """
    check_choice(name, (*PATTERNS, *names()), "set of outliers")
    if n < 1:
        raise InputError(f"n must be at least 1, got {n}.")
    rng = torch.Generator().manual_seed(seed)
    if name in PATTERNS:
        return PATTERNS[name](n, shape, rng).clamp(0, 1).mul(255).round().to(torch.uint8)
    images = load(name, None if root is None else Path(root)).test.images
    chosen = images[torch.randperm(len(images), generator=rng)[:n]]
    return fitted(chosen, shape).round().clamp(0, 255).to(torch.uint8)


def fitted(images: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Images [N, …] as float32 [N, *shape]: colours averaged or grey repeated, then resized."""
    images, (C, H, W) = images.float(), shape
    if images.shape[1] != C:
        images = images.mean(1, keepdim=True).expand(-1, C, -1, -1)
    if images.shape[-2:] != (H, W):
        images = F.interpolate(images, (H, W), mode="bilinear", antialias=True)
    return images


def batches_as(
    data: ImageData,
    shape: tuple[int, int, int],
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int,
    rows: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images as another model wants them, and their labels, in even batches.

    Args:
        data: images and labels.
        shape: (C, H, W) that they are brought to, as :func:`fitted` does.
        mean: of each channel, pixels in [0, 1].
        std: likewise.
        batch_size: at most.
        rows: which images, in this order; all if None.
    """
    center, spread = (torch.tensor(v)[:, None, None] for v in (mean, std))
    rows = torch.arange(len(data)) if rows is None else rows
    for some in rows.chunk(-(-len(rows) // batch_size)):
        part = data.subset(some)
        yield (fitted(part.images, shape) / 255 - center) / spread, part.labels
