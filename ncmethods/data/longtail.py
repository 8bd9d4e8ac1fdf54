"""Long-tail profiles: how many images each class keeps, which ones, and which classes are rare."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ncmethods._core import InputError, check_choice, check_labels, check_num_classes
from ncmethods.data.datasets import OWN_TAIL, ImageData, Splits, load
from ncmethods.data.folders import say

Profile = Literal["exp", "step", "balanced"]
"""Shapes of a tail that is cut out of a dataset."""

CONFUSABLE_ORDER = (1, 8, 9, 5, 7, 3, 0, 4, 2, 6)
"""Fashion-MNIST's classes with the ones that look alike (T-shirt, coat, pullover, shirt) last."""


def long_tail_counts(
    n_max: int,
    num_classes: int,
    imbalance: float,
    profile: Profile = "exp",
    *,
    rare_classes: int | None = None,
) -> list[int]:
    """Training images per class, from the most frequent class to the rarest.

    ``exp``: n_c = ⌊n_max · R^(−c/(K−1))⌋. ``step``: n_max for the first classes and ⌊n_max/R⌋ for
    the ``rare_classes`` last ones. ``balanced``: n_max for all (the control; R plays no part).

    Args:
        n_max: images of the most frequent class.
        num_classes: K.
        imbalance: R = n_max / n_min, at least 1.
        profile: shape of the tail.
        rare_classes: size of the rare group of ``step``; half of the classes if None.

    Raises:
        InputError: R < 1, an unknown profile, or a class that would be left without images.

    References:
        Cao et al., arXiv:1906.07413, and its public generator, which the field reuses.
    """
    check_choice(profile, ("exp", "step", "balanced"), "profile")
    check_num_classes(num_classes)
    if not (math.isfinite(imbalance) and imbalance >= 1):
        raise InputError(f"imbalance R = n_max / n_min must be a number ≥ 1, got {imbalance}.")
    if n_max < 1 or (profile != "balanced" and n_max < imbalance):
        raise InputError(
            f"n_max = {n_max} with imbalance {imbalance:g} leaves the rarest class without images. "
            "Lower the imbalance to n_max at most, or raise n_max."
        )
    if rare_classes is not None and (profile != "step" or not 0 < rare_classes < num_classes):
        raise InputError(
            f"rare_classes belongs to profile 'step' and lies between 1 and K − 1 = "
            f"{num_classes - 1}, got {rare_classes} with profile {profile!r}."
        )
    if profile == "balanced":
        return [n_max] * num_classes
    if profile == "exp":
        shares = [imbalance ** (-c / (num_classes - 1)) for c in range(num_classes)]
    else:
        rare = num_classes - num_classes // 2 if rare_classes is None else rare_classes
        shares = [1.0] * (num_classes - rare) + [1 / imbalance] * rare
    # The nudge keeps 500 · 100^(-1) at 5 where rounding would make it 4.999….
    return [math.floor(n_max * share * (1 + 1e-12)) for share in shares]


def long_tail_indices(labels: Tensor, counts: Sequence[int], *, seed: int) -> Tensor:
    """Indices of a random subset with ``counts[c]`` images of class c, without repetition.

    With classes in their canonical order, seed 0 draws the images of the LDAM-DRW generator.

    Args:
        labels: [N] int64.
        counts: images to draw per class.
        seed: of the draw.

    Returns:
        int64 [sum(counts)], class by class.

    Raises:
        InputError: a class has fewer images than its count, or has no count.
    """
    known = check_labels(labels).cpu().numpy()
    if not 0 <= seed < 2**32:
        raise InputError(f"seed must lie in 0 … 2³² − 1, got {seed}.")
    if known.max(initial=-1) >= len(counts):
        raise InputError(
            f"counts must have one entry per class: {len(counts)} given, but there is a label "
            f"{known.max()}."
        )
    rng = np.random.RandomState(seed)  # its stream is frozen: the same subset in every release
    chosen = []
    for c, count in enumerate(counts):
        members = np.flatnonzero(known == c)
        if not 0 <= count <= len(members):
            raise InputError(
                f"Class {c}: {count} images wanted, but the dataset has {len(members)}. "
                "Lower n_max, or change the order of the classes. (A balanced control takes as "
                "many images of every class: data with a tail of its own cannot give it.)"
            )
        rng.shuffle(members)
        chosen.append(members[:count])
    return torch.from_numpy(np.concatenate(chosen))


def reorder(data: ImageData, order: Sequence[int]) -> ImageData:
    """Relabel ``data`` so that the new class i is the old class ``order[i]``.

    Args:
        data: images with labels.
        order: a permutation of 0 … K−1, most frequent class first for a long tail.

    Raises:
        InputError: ``order`` is not a permutation of the classes.
    """
    if sorted(order) != list(range(data.num_classes)):
        raise InputError(
            f"order must hold each class index 0 … {data.num_classes - 1} once, got {list(order)}."
        )
    new = torch.empty(data.num_classes, dtype=torch.int64)
    new[list(order)] = torch.arange(data.num_classes)
    return replace(data, labels=new[data.labels], classes=tuple(data.classes[c] for c in order))


def default_order(name: str, num_classes: int) -> tuple[int, ...]:
    """Class order of a long tail on dataset ``name``: canonical, but confusable on Fashion-MNIST.

    In canonical order Fashion-MNIST's tail (sneaker, bag, ankle boot) is easy and hides the effect.
    """
    if name in ("fashion-mini", "fashion-mnist") and num_classes == len(CONFUSABLE_ORDER):
        return CONFUSABLE_ORDER
    return tuple(range(num_classes))


def class_counts(data: object, num_classes: int | None = None) -> Tensor:
    """Samples per class, int64 [K]; negative labels (ignored samples) are not counted.

    Args:
        data: labels (tensor, array or list), or a dataset that holds them: ``ImageData``,
            ``torch.utils.data.Subset``, or one with ``targets`` or ``labels`` as in torchvision.
        num_classes: K; if None, the dataset's ``classes``, or the largest label + 1.

    Raises:
        InputError: no labels found, not integers [N], or a label ≥ K.
    """
    labels, known = _labels_of(data)
    size = num_classes or known
    counts = torch.bincount(labels[labels >= 0], minlength=size or 0)
    if not len(counts):
        raise InputError("There are no labels to count: the dataset is empty.")
    if size is not None and len(counts) > size:
        raise InputError(
            f"Labels must lie below num_classes = {size}, got {int(labels.max())}. "
            "Pass the right num_classes, or drop those samples."
        )
    return counts


def _labels_of(data: object) -> tuple[Tensor, int | None]:
    """Labels [N] of a dataset or of a plain sequence, and the number of classes if it knows it."""
    if isinstance(data, torch.utils.data.Subset):
        labels, known = _labels_of(data.dataset)
        return labels[list(data.indices)], known
    found = getattr(data, "targets", getattr(data, "labels", data))
    if not isinstance(found, Tensor | np.ndarray | list | tuple):
        raise InputError(
            f"class_counts needs labels, or a dataset with .targets or .labels, "
            f"got {type(data).__name__}."
        )
    try:
        labels = torch.as_tensor(found).cpu()
    except (TypeError, ValueError) as error:
        raise InputError(f"labels must be class indices, a list of integers: {error}.") from error
    classes = getattr(data, "classes", None)
    return check_labels(labels), len(classes) if classes else None


def leave_out(data: ImageData, names: Sequence[str]) -> ImageData:
    """``data`` without the images of some classes; the others keep their order.

    Args:
        data: images with labels.
        names: of the classes that go.

    Raises:
        InputError: a class that is none, or fewer than two left.
    """
    for name in names:
        check_choice(name, data.classes, "class")
    kept = [c for c, title in enumerate(data.classes) if title not in names]
    if len(kept) < 2:
        raise InputError(f"Leaving out {', '.join(names)} leaves {len(kept)} classes; 2 it takes.")
    new = torch.full((data.num_classes,), -1)
    new[kept] = torch.arange(len(kept))
    rest = new[data.labels] >= 0
    return ImageData(
        data.images[rest], new[data.labels[rest]], tuple(data.classes[c] for c in kept)
    )


def long_tailed(
    splits: Splits,
    *,
    imbalance: float,
    profile: Profile | Literal["natural"] = "exp",
    n_max: int | None = None,
    order: Sequence[int] | None = None,
    validation: int = 0,
    seed: int,
) -> Splits:
    """A long-tailed training set; the test set stays whole, relabelled in the same order.

    Args:
        splits: training and test images.
        imbalance: R = n_max / n_min.
        profile: ``exp``, ``step`` or ``balanced`` (see ``long_tail_counts``), or ``natural``, which
            keeps every image: for data that has its own tail.
        n_max: images of the most frequent class; what every class can give if None.
        order: old class indices, most frequent first; ``default_order`` if None, and for images
            from files by their number.
        validation: images per class to set aside, of those that the tail leaves out; if none, the
            data's own validation images stay.
        seed: of the subset.

    Raises:
        InputError: ``natural`` with ``validation`` or ``n_max``; see also ``long_tail_counts``,
            ``long_tail_indices`` and ``reorder``.
    """
    K = splits.train.num_classes
    if order is None:
        order = default_order(splits.name, K)
        if splits.name in OWN_TAIL:
            counts = class_counts(splits.train).tolist()
            order = sorted(order, key=lambda c: -counts[c])
    train, test = reorder(splits.train, order), reorder(splits.test, order)
    own = None if splits.validation is None else reorder(splits.validation, order)
    if validation < 0 or (validation and profile == "natural"):
        raise InputError(
            "validation counts images that the tail leaves out; profile 'natural' leaves out none "
            f"and takes 0 only, got {validation} with profile {profile!r}."
        )
    if profile == "natural":
        if n_max is not None:
            raise InputError(
                f"n_max = {n_max} cuts the largest class, and profile 'natural' keeps every image. "
                "Choose the profile exp, step or balanced, or leave n_max away."
            )
        return Splits(train, test, splits.name, own)
    n_max = int(class_counts(train).min()) - validation if n_max is None else n_max
    wanted = long_tail_counts(n_max, K, imbalance, profile)
    # Drawn behind the training images of each class, which do not depend on them.
    drawn = long_tail_indices(train.labels, [n + validation for n in wanted], seed=seed)
    parts = torch.split(drawn, [size for n in wanted for size in (n, validation)])
    kept, aside = torch.cat(parts[::2]), torch.cat(parts[1::2])
    return Splits(train.subset(kept), test, splits.name, train.subset(aside) if validation else own)


@dataclass(frozen=True)
class TailConfig:
    """A dataset and its long tail, as a command line or a config file names them."""

    name: str = "fashion-mini"
    """One of the names that `ncmethods list` prints."""
    imbalance: float = 100
    """R, the largest over the smallest class."""
    profile: Literal["exp", "step", "balanced", "natural"] | None = None
    """Exponential decay, half of the classes rare, no tail, or the data's own (all images). None is
    natural for images from files (image-folder, imagenet-lt, ...), exp for the others."""
    n_max: int | None = None
    """Images of the largest class; None takes all that every class has."""
    order: tuple[int, ...] | None = None
    """Old class indices, most frequent first; None takes the dataset's default order, and for
    images from files that of their number."""
    without: tuple[str, ...] = ()
    """Classes that are left out, by name; `ncmethods ood` takes their images for outliers."""
    validation: int = 0
    """Images per class, of those that the tail leaves out, to choose hyperparameters by; without
    them a fifth of the training images is held out for that."""
    groups: str = "thresholds"
    """Many/medium/few by training count (>100, 20 to 100, <20), or by rank, as 3/4/3 or 5/5."""
    root: Path | None = None
    """Where the files are, if not in the usual places."""
    size: int | None = None
    """Resize images to this many pixels. None takes the dataset's size, of an image-folder the
    median short side, at most 64, of published lists 224."""
    skip_unreadable: bool = False
    """Leave out image files that cannot be read; else they are an error."""
    seed: int | None = None
    """Of the choice of images, the same for all runs; None draws them anew with each run's seed."""

    def drawn(self, seed: int) -> TailConfig:
        """This tail for a run with ``seed``, which chooses the images unless their own is set.

        Image files that are all kept are read once for all runs.
        """
        whole = self.name in OWN_TAIL and self.shape == "natural"
        return self if whole or self.seed is not None else replace(self, seed=seed)

    @property
    def shape(self) -> Profile | Literal["natural"]:
        """The profile, also where none is named."""
        return self.profile or ("natural" if self.name in OWN_TAIL else "exp")

    def load(self) -> Splits:
        """The long-tailed training set and the whole test set.

        Raises:
            DataError: the dataset is missing or damaged.
            InputError: a tail that the dataset cannot have.
        """
        whole = load(self.name, self.root, size=self.size, skip_unreadable=self.skip_unreadable)
        if self.without:
            train, test = (leave_out(part, self.without) for part in whole[:2])
            more = whole.validation and leave_out(whole.validation, self.without)
            whole = Splits(train, test, whole.name, more)
        found = long_tailed(
            whole,
            imbalance=self.imbalance,
            profile=self.shape,
            n_max=self.n_max,
            order=self.order,
            validation=self.validation,
            seed=self.seed or 0,
        )
        if self.name in OWN_TAIL and self.shape == "natural":
            counts = class_counts(found.train).tolist()
            ranked = [f"{title} {n}" for title, n in zip(found.train.classes, counts)]
            ends = ranked if len(ranked) <= 12 else [*ranked[:6], "…", *ranked[-6:]]
            say(
                f"{self.name}: all training images, by class: {', '.join(ends)}\n"
                "  its own tail is kept (--data.profile exp would cut one)"
            )
        return found

    def record(self) -> dict[str, Any]:
        """The fields as JSON keeps them, without the machine's paths."""
        fields = asdict(self) | {"profile": self.shape}
        fields["order"] = None if self.order is None else list(self.order)
        del fields["root"]
        for name in ("skip_unreadable", "without"):
            if not fields[name]:
                del fields[name]
        return fields
