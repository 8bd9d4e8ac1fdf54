"""StreamConfig: the options of a class-incremental stream, for commands and records."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ncmethods._core import InputError
from ncmethods.data.datasets import Splits, hold_out, load
from ncmethods.data.sessions import ClassIncremental, ClassSchedule

__all__ = ["StreamConfig"]


@dataclass(frozen=True)
class StreamConfig:
    """A dataset whose classes arrive session by session."""

    name: str = "fashion-mini"
    """One of the names that `ncmethods list` prints."""
    base: int = 0
    """Classes of the first session; 0 takes increment (the field's B0)."""
    increment: int = 2
    """Classes of each further session; the last may have fewer."""
    shots: int | None = None
    """Training images of each class after the first session; all if None."""
    imbalance: float | None = None
    """Exponential long tail over the classes by arrival, largest over smallest class."""
    n_max: int | None = None
    """Training images of the largest class of that tail."""
    tail: Literal["ordered", "shuffled"] = "ordered"
    """Classes become rarer from session to session, or sizes are dealt out at random."""
    seed: int = 0
    """Of the draw of images; that of the class order is --orders."""
    size: int | None = None
    """Side of the images, in pixels; that of the dataset if None."""
    root: Path | None = None
    """Where the dataset's files are, if not in the usual places."""

    def load(self, *, held_out: bool = False) -> Splits:
        """Training and test images; with ``held_out`` a fifth of the training images to test on."""
        splits = load(self.name, self.root, size=self.size)
        return hold_out(splits.train, self.name) if held_out else splits

    def stream(self, splits: Splits, order: int | None) -> ClassIncremental:
        """The sessions, with the classes in the order of that seed, or of the dataset if None.

        Raises:
            InputError: sizes that make no sessions, or more images than there are.
        """
        K = splits.train.num_classes
        if self.base >= K:
            raise InputError(f"{self.name} has {K} classes: a first session of {self.base} is all.")
        return ClassIncremental(
            splits.train,
            ClassSchedule(K, self.base, self.increment, seed=order),
            test=splits.test,
            shots=self.shots,
            imbalance=self.imbalance,
            n_max=self.n_max,
            tail=self.tail,
            seed=self.seed,
        )
