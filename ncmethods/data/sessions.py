"""Streams of classes: which classes arrive in which session, and the images that come with them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ncmethods._core import InputError, check_choice, check_labels
from ncmethods.data.longtail import (
    _labels_of,
    class_counts,
    long_tail_counts,
    long_tail_indices,
)

__all__ = ["ClassIncremental", "ClassSchedule", "Session", "read_index_list", "task_mask"]

Shots = str | os.PathLike[str] | Sequence[str | os.PathLike[str] | Sequence[int] | Tensor]


class ClassSchedule:
    """Which classes arrive in which session.

    Methods number classes by arrival: the first class of the first session is 0. ``remap`` turns
    the numbers of the dataset into those.

    Args:
        num_classes: K.
        base: classes of session 0; 0 takes ``increment`` (the field's B0).
        increment: classes of each further session; the last may have fewer.
        order: class ids of the dataset in their order of arrival; if None, drawn with ``seed``.
        seed: of the order, ``np.random.RandomState(seed).permutation(K)``, where 1993 is the
            field's; None keeps the order of the dataset. Plays no part if ``order`` is given.

    Raises:
        InputError: sizes that make no session, or an order that is no permutation.
    """

    sessions: tuple[tuple[int, ...], ...]
    """Class ids of the dataset, session by session, in their order of arrival."""

    def __init__(
        self,
        num_classes: int,
        base: int,
        increment: int,
        order: Sequence[int] | None = None,
        seed: int | None = 1993,
    ) -> None:
        _check_sizes(num_classes=(num_classes, 1), base=(base, 0), increment=(increment, 0))
        if base > num_classes or (increment == 0 and base != num_classes):
            raise InputError(
                f"{num_classes} classes cannot arrive as {base} in the first session and "
                f"{increment} in each further one. base is num_classes at most, and an increment "
                "of 0 needs base = num_classes."
            )
        if order is None:
            order = (
                range(num_classes)
                if seed is None
                else np.random.RandomState(_checked_seed(seed)).permutation(num_classes).tolist()
            )
        ids = [int(c) for c in order]
        if sorted(ids) != list(range(num_classes)):
            raise InputError(
                f"order must hold each class id 0 … {num_classes - 1} once, got {ids}. For other "
                "ids use ClassSchedule.from_groups."
            )
        starts = [0, *range(base or increment, num_classes, increment or num_classes)]
        ends = [*starts[1:], num_classes]
        self.sessions = tuple(tuple(ids[i:j]) for i, j in zip(starts, ends))

    @classmethod
    def from_groups(cls, groups: Iterable[Iterable[int]]) -> ClassSchedule:
        """A schedule from the class ids of each session, whatever their number.

        Raises:
            InputError: no session, an empty one, a class that arrives twice, a negative id.
        """
        schedule = cls.__new__(cls)
        schedule.sessions = tuple(tuple(int(c) for c in group) for group in groups)
        ids = schedule.order
        empty = [t for t, group in enumerate(schedule.sessions) if not group]
        if empty or not ids:
            raise InputError(
                "Each session brings at least one class, but there is none in "
                + (f"session {empty[0]}." if empty else "the whole schedule.")
            )
        if len(set(ids)) < len(ids) or min(ids) < 0:
            twice = sorted({c for c in ids if ids.count(c) > 1 or c < 0})
            raise InputError(
                f"A class has an id ≥ 0 and arrives once; look at {twice[:10]}. Samples of a class "
                "that come back later belong to no class-incremental schedule."
            )
        return schedule

    @classmethod
    def from_pycil(cls, config: Mapping[str, Any], num_classes: int) -> ClassSchedule:
        """The schedule of a PyCIL config: its keys ``init_cls, increment, shuffle, seed``.

        Without ``shuffle`` PyCIL keeps the order of the dataset. Other keys are left alone; a list
        of seeds, one training each, must hold one.

        Raises:
            InputError: a key is missing, or several seeds.
        """
        needed = ("init_cls", "increment", "shuffle", "seed")
        missing = [key for key in needed if key not in config]
        if missing:
            raise InputError(
                f"A PyCIL config has the keys {', '.join(needed)}; missing: {missing}."
            )
        seed = config["seed"]
        if isinstance(seed, Sequence):
            if len(seed) != 1:
                raise InputError(
                    f"seed = {list(seed)} stands for {len(seed)} trainings, each with a schedule "
                    "of its own: pass config | {'seed': one of them}."
                )
            seed = seed[0]
        return cls(
            num_classes,
            config["init_cls"],
            config["increment"],
            seed=seed if config["shuffle"] else None,
        )

    def extend(self, new: int | Iterable[int]) -> ClassSchedule:
        """This schedule with one more session, for streams whose number of classes is unknown.

        Args:
            new: class ids of the session, or how many, which then follow the largest so far.
        """
        if isinstance(new, int):
            _check_sizes(new=(new, 1))
            first = max(self.order) + 1
            new = range(first, first + new)
        return type(self).from_groups((*self.sessions, tuple(new)))

    @property
    def order(self) -> tuple[int, ...]:
        """Class ids of the dataset by arrival."""
        return tuple(c for group in self.sessions for c in group)

    @property
    def num_classes(self) -> int:
        """Number of classes over all sessions so far, K."""
        return sum(map(len, self.sessions))

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Number of classes before each session, and K at the end.

        Session t brings the classes by arrival from ``boundaries[t]`` to ``boundaries[t + 1] − 1``.
        """
        sizes = [0, *map(len, self.sessions)]
        return tuple(int(n) for n in np.cumsum(sizes))

    def remap(self, labels: Tensor) -> Tensor:
        """Labels of the dataset [N] as numbers by arrival, int64 [N]; negative ones stay.

        Raises:
            InputError: a label that never arrives.
        """
        labels = check_labels(labels)
        new = torch.full((max(self.order) + 1,), -1, device=labels.device)
        new[list(self.order)] = torch.arange(self.num_classes, device=labels.device)
        found = new[labels.clamp(0, len(new) - 1)]
        lost = (labels >= 0) & ((labels >= len(new)) | (found < 0))
        if bool(lost.any()):
            ids = torch.unique(labels[lost]).tolist()
            raise InputError(
                f"The schedule has no session for the classes {ids[:10]}: it knows "
                f"{self.num_classes} ids up to {max(self.order)}. Extend it, or leave them out."
            )
        return torch.where(labels < 0, labels, found)

    def tasks(self, labels: Tensor) -> Tensor:
        """Session in which each class arrives, int64 [N], of labels by arrival [N]; negative −1."""
        ends = torch.tensor(self.boundaries[1:], device=labels.device)
        return torch.where(labels < 0, -1, torch.bucketize(labels, ends, right=True))

    def __len__(self) -> int:
        """Number of sessions."""
        return len(self.sessions)

    def __eq__(self, other: object) -> bool:
        """Whether the same classes arrive in the same order and sessions."""
        return isinstance(other, ClassSchedule) and self.sessions == other.sessions

    def __hash__(self) -> int:
        """Of the sessions."""
        return hash(self.sessions)

    def __repr__(self) -> str:
        """Sizes of the sessions and the first classes."""
        sizes = " + ".join(str(len(group)) for group in self.sessions)
        first = ", ".join(map(str, self.order[:5])) + (", …" if self.num_classes > 5 else "")
        return f"ClassSchedule({self.num_classes} classes: {sizes}; order {first})"


def task_mask(schedule: ClassSchedule, task: int) -> Tensor:
    """Which classes, numbered by arrival, belong to session ``task``: bool [K].

    With task-incremental evaluation only these columns of the logits compete.

    Raises:
        InputError: no such session.
    """
    if not 0 <= task < len(schedule):
        raise InputError(f"task must lie in 0 … {len(schedule) - 1}, got {task}.")
    start, end = schedule.boundaries[task : task + 2]
    number = torch.arange(schedule.num_classes)
    return (number >= start) & (number < end)


class Relabelled(Dataset[Any]):
    """Samples of a map-style dataset with other labels: items ``(x, y, …)`` or dicts.

    Args:
        data: the dataset.
        indices: of the samples, int64 [n].
        targets: their new labels, int64 [n].
    """

    _KEYS = ("y", "label", "labels", "target", "targets")

    def __init__(self, data: Any, indices: Tensor, targets: Tensor) -> None:
        self.data, self.indices, self.targets = data, indices, targets

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.indices)

    def __getitem__(self, i: int) -> Any:
        """The item with its label replaced."""
        item, label = self.data[int(self.indices[i])], int(self.targets[i])
        if isinstance(item, Mapping):
            return {**item, **{key: label for key in self._KEYS if key in item}}
        x, _, *rest = item
        return (x, label, *rest)


@dataclass(frozen=True, eq=False)
class Session:
    """What a learner is given in one session. Labels are numbers by arrival.

    Args:
        index: of the session, from 0.
        new: class ids of the dataset that arrive now; their numbers are those from
            ``len(seen) − len(new)`` to ``len(seen) − 1``.
        seen: class ids that have arrived so far, by arrival.
        train_indices: of the training samples of the new classes, int64 [n].
        train_labels: int64 [n].
        test_indices: of the test samples of all seen classes, int64 [m]; empty without test data.
        test_labels: int64 [m].
        test_tasks: session in which the class of each test sample arrived, int64 [m].
        stream: where it comes from.
    """

    index: int
    new: tuple[int, ...]
    seen: tuple[int, ...]
    train_indices: Tensor
    train_labels: Tensor
    test_indices: Tensor
    test_labels: Tensor
    test_tasks: Tensor
    stream: ClassIncremental

    @cached_property
    def train(self) -> Any:
        """Training samples of the new classes with labels by arrival, as ``stream.subset`` does."""
        return self.stream.subset(self.train_indices)

    @cached_property
    def test_seen(self) -> Any:
        """Test samples of all seen classes with labels by arrival."""
        return self.stream.subset(self.test_indices, test=True)

    def train_with(self, indices: Tensor) -> Any:
        """The training samples of this session, and behind them those at ``indices`` (a memory)."""
        return self.stream.subset(torch.cat([self.train_indices, indices.to(torch.int64)]))


class ClassIncremental:
    """A dataset as a stream of sessions, each with new classes: plain, few-shot or long-tailed.

    Iterating gives :class:`Session`. Everything rests on indices, so that any map-style dataset
    with ``targets`` or ``labels`` will do, and labels alone. Samples with a negative label are left
    out.

    Args:
        dataset: training data, with the class ids that the schedule names.
        schedule: when classes arrive.
        test: test data with the same class ids.
        shots: training samples of each class that arrives after session 0, drawn with ``seed``
            (k-way n-shot, where k is the schedule's increment). The draws are nested, and do not
            depend on the order of the classes.
        shot_indices: the training samples of each session after session 0 themselves, in place of
            ``shots``: sequences of indices, or files that :func:`read_index_list` reads; with one
            more, the first are those of session 0. A folder holds ``session_1.txt`` … for the
            sessions from 0, of which the first is not read (TOPIC's and CEC's lists).
        imbalance: R of an exponential tail, ``long_tail_counts(n_max, K, R)``.
        n_max: training samples of the largest class of that tail; what every class has if None.
        tail: ``"ordered"``: classes become rarer from session to session; ``"shuffled"``: the sizes
            are dealt out by a permutation drawn with ``tail_seed``; or that permutation, [K]: the
            class with number c has the size of rank ``tail[c]``.
        tail_seed: of the shuffled tail; 2023 is NCT's permutation.
        counts: training samples by number of arrival [K] (None: all there are), for other streams.
        seed: of the draws of samples.

    Raises:
        InputError: schedule and data disagree, a session has no data, more samples are wanted than
            there are, options that exclude each other.

    References:
        Tao et al., CVPR 2020 (TOPIC), xyutao/fscil e76d37c: the index lists of few-shot sessions.
        Long-tailed streams: xialeiliu/Long-Tailed-CIL 7db6317 and
        NeuralCollapseApplications/UniCIL 4ad5fec, which keep the first n_c images of a class.
    """

    def __init__(
        self,
        dataset: Any,
        schedule: ClassSchedule,
        *,
        test: Any = None,
        shots: int | None = None,
        shot_indices: Shots | None = None,
        imbalance: float | None = None,
        n_max: int | None = None,
        tail: Literal["ordered", "shuffled"] | Sequence[int] = "ordered",
        tail_seed: int = 2023,
        counts: Sequence[int | None] | None = None,
        seed: int = 0,
    ) -> None:
        chosen = {
            "shots": shots,
            "shot_indices": shot_indices,
            "imbalance": imbalance,
            "counts": counts,
        }
        named = [name for name, value in chosen.items() if value is not None]
        if len(named) > 1 or (n_max is not None and imbalance is None):
            raise InputError(
                "A stream is few-shot (shots or shot_indices), long-tailed (imbalance, n_max) or "
                f"has counts: got {', '.join(named) or 'n_max without imbalance'}. Mixed streams "
                "are written with counts."
            )
        self.dataset, self.test, self.schedule = dataset, test, schedule
        self._labels = _arrivals(dataset, schedule, "training data")
        none = torch.empty(0, dtype=torch.int64)
        self._test_labels = none if test is None else _arrivals(test, schedule, "test data")
        have = class_counts(self._labels, schedule.num_classes).tolist()
        wanted: list[int | None] = [None] * schedule.num_classes
        if shots is not None:
            _check_sizes(shots=(shots, 1))
            first = schedule.boundaries[1]
            wanted[first:] = [shots] * (schedule.num_classes - first)
        if imbalance is not None:
            sizes = long_tail_counts(
                min(have) if n_max is None else n_max, schedule.num_classes, imbalance
            )
            wanted = [sizes[rank] for rank in _ranks(tail, tail_seed, schedule.num_classes)]
        if counts is not None:
            wanted = list(counts)
        kept = self._drawn(have, wanted, seed)
        by_session = schedule.tasks(self._labels[kept])
        self._train = [kept[by_session == t] for t in range(len(schedule))]
        if shot_indices is not None:
            for t, listed in self._listed(shot_indices):
                self._train[t] = listed
        without = [t for t, indices in enumerate(self._train) if not len(indices)]
        if without:
            raise InputError(f"Session {without[0]} has no training samples.")

    def __len__(self) -> int:
        """Number of sessions."""
        return len(self.schedule)

    def __iter__(self) -> Iterator[Session]:
        """The sessions in their order."""
        return (self[t] for t in range(len(self)))

    def __getitem__(self, index: int) -> Session:
        """Session ``index``, from 0.

        Raises:
            IndexError: no such session.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sessions are numbered 0 … {len(self) - 1}, got {index}")
        seen = self.schedule.boundaries[index + 1]
        at = torch.nonzero((self._test_labels >= 0) & (self._test_labels < seen)).flatten()
        return Session(
            index=index,
            new=self.schedule.sessions[index],
            seen=self.schedule.order[:seen],
            train_indices=self._train[index],
            train_labels=self._labels[self._train[index]],
            test_indices=at,
            test_labels=self._test_labels[at],
            test_tasks=self.schedule.tasks(self._test_labels[at]),
            stream=self,
        )

    def labels_of(self, indices: Tensor, *, test: bool = False) -> Tensor:
        """Labels by arrival of the samples at ``indices``, int64 [n]."""
        return (self._test_labels if test else self._labels)[indices]

    def subset(self, indices: Tensor, *, test: bool = False) -> Any:
        """The samples at ``indices`` with labels by arrival.

        ``ImageData`` and ``FeatureSet`` stay what they are, with the K classes of the whole
        schedule in their order of arrival (so that statistics of different sessions add up), and
        without logits, whose columns had another order. Other datasets are wrapped: items
        ``(x, y, …)`` and dicts get the new label, ``targets`` holds all.

        Raises:
            InputError: the stream was made of labels alone, or without test data.
        """
        data = self.test if test else self.dataset
        if data is None or isinstance(data, Tensor | np.ndarray | list | tuple):
            raise InputError(
                f"This stream has no {'test' if test else 'training'} samples but "
                f"{'none at all' if data is None else 'labels alone'}: use the indices of the "
                "session, or pass a dataset."
            )
        labels = self.labels_of(indices, test=test)
        if not (is_dataclass(data) and hasattr(data, "subset")):
            return Relabelled(data, indices, labels)
        has = {field.name for field in fields(data)}
        held: Any = data
        more: dict[str, Any] = {"labels": labels}
        if "classes" in has:
            more["classes"] = tuple(held.classes[c] for c in self.schedule.order)
        if "num_classes" in has:
            more["num_classes"] = self.schedule.num_classes
        if "logits" in has:
            held = replace(held, logits=None)
        return replace(held.subset(indices), **more)

    def _drawn(self, have: Sequence[int], wanted: Sequence[int | None], seed: int) -> Tensor:
        """Indices of ``wanted`` samples of each class (None: all), ascending."""
        if len(wanted) != len(have):
            raise InputError(
                f"counts must have one entry per class: K = {len(have)}, got {len(wanted)}."
            )
        for c, (n, there) in enumerate(zip(wanted, have)):
            if n is not None and not 1 <= n <= there:
                raise InputError(
                    f"{n} training samples wanted of class {self.schedule.order[c]} (number {c} by "
                    f"arrival), which has {there}. Ask for 1 to {there}."
                )
        # Drawn under the ids of the dataset, so that the order of arrival plays no part.
        original, _ = _labels_of(self.dataset)
        full = torch.bincount(original[original >= 0]).tolist()
        for c, n in zip(self.schedule.order, wanted):
            full[c] = full[c] if n is None else n
        return long_tail_indices(original, full, seed=seed).sort().values

    def _listed(self, shot_indices: Shots) -> Iterator[tuple[int, Tensor]]:
        """Session and indices of each given list, checked."""
        later = len(self.schedule) - 1
        if isinstance(shot_indices, str | os.PathLike):
            folder = Path(shot_indices)
            if not folder.is_dir():
                raise InputError(
                    f"{folder} is no folder. A single list is passed as [list], one for each "
                    "session after session 0."
                )
            shot_indices = [folder / f"session_{t + 1}.txt" for t in range(1, later + 1)]
        if len(shot_indices) not in (later, later + 1):
            raise InputError(
                f"shot_indices must have one list for each of the {later} sessions after session 0 "
                f"(or one more, for session 0 too), got {len(shot_indices)}."
            )
        first = len(self.schedule) - len(shot_indices)
        for t, given in enumerate(shot_indices, first):
            if isinstance(given, str | os.PathLike):
                indices = read_index_list(given, self.dataset)
            else:
                indices = torch.as_tensor(given)
                indices = check_labels(indices.reshape(-1)) if len(indices) else indices.long()
            if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(
                self._labels
            ):
                raise InputError(
                    f"Session {t}: indices must lie in 0 … {len(self._labels) - 1}, got "
                    f"{int(indices.min())} … {int(indices.max())}."
                )
            if len(torch.unique(indices)) < len(indices):
                raise InputError(f"Session {t}: a training sample is listed twice.")
            wrong = self._labels[indices]
            wrong = wrong[(wrong < 0) | (self.schedule.tasks(wrong) != t)]
            if len(wrong):
                raise InputError(
                    f"Session {t} brings the classes {self.schedule.sessions[t]}, but {len(wrong)} "
                    f"of its listed samples belong to others, by arrival "
                    f"{torch.unique(wrong).tolist()[:10]}. Are list and schedule of one protocol?"
                )
            yield t, indices


def read_index_list(path: str | os.PathLike[str], dataset: Any = None) -> Tensor:
    """Indices in a text file, int64 [n]: one a line, a number or an image path.

    Paths, as in TOPIC's lists of CUB-200 and miniImageNet, are found among those of
    ``dataset.samples`` (as in torchvision's ``ImageFolder``) by folder and file name.

    Raises:
        InputError: no such file, a line that is no index, or a path that the dataset lacks.
    """
    try:
        lines = [line.strip() for line in Path(path).read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"Cannot read the index list {path}: {error}.") from error
    lines = [line for line in lines if line]
    try:
        return torch.tensor([int(line) for line in lines], dtype=torch.int64)
    except ValueError:
        pass
    samples = getattr(dataset, "samples", None)
    if samples is None:
        raise InputError(
            f"{path} holds image paths ({lines[0]}, …), and the dataset has no .samples to find "
            "them in. Pass one that has, or a list of indices."
        )
    there = {Path(name).parts[-2:]: i for i, (name, *_) in enumerate(samples)}
    missing = [line for line in lines if Path(line).parts[-2:] not in there]
    if missing:
        raise InputError(
            f"{path}: {len(missing)} images are not in the dataset, e.g. {missing[0]}."
        )
    return torch.tensor([there[Path(line).parts[-2:]] for line in lines])


def _arrivals(data: Any, schedule: ClassSchedule, what: str) -> Tensor:
    """Labels by arrival [N] of a dataset that has samples for every session."""
    labels, _ = _labels_of(data)
    try:
        labels = schedule.remap(labels)
    except InputError as error:
        raise InputError(f"Schedule and {what} disagree. {error}") from error
    found = torch.bincount(labels[labels >= 0], minlength=schedule.num_classes) > 0
    for t, (start, end) in enumerate(zip(schedule.boundaries, schedule.boundaries[1:])):
        if not bool(found[start:end].any()):
            raise InputError(
                f"Session {t} has no {what}: no sample of its classes {schedule.sessions[t][:10]}."
            )
    if what == "training data" and not bool(found.all()):
        missing = [c for c, there in zip(schedule.order, found.tolist()) if not there]
        raise InputError(
            f"Schedule and {what} disagree. There is no sample of the scheduled classes "
            f"{missing[:10]}. Leave them out of the schedule."
        )
    return labels


def _ranks(tail: str | Sequence[int], seed: int, num_classes: int) -> list[int]:
    """Rank in the tail of each class by arrival."""
    if isinstance(tail, str):
        check_choice(tail, ("ordered", "shuffled"), "tail")
        if tail == "ordered":
            return list(range(num_classes))
        ranks = np.random.RandomState(_checked_seed(seed)).permutation(num_classes)
        return [int(r) for r in ranks]
    if sorted(tail) != list(range(num_classes)):
        raise InputError(f"tail must hold each rank 0 … {num_classes - 1} once, got {list(tail)}.")
    return list(tail)


def _checked_seed(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise InputError(f"A seed lies in 0 … 2³² − 1, got {seed!r}.")
    return seed


def _check_sizes(**sizes: tuple[int, int]) -> None:
    """Raise unless each named number is an integer of at least its bound."""
    for name, (value, least) in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"{name} must be an integer ≥ {least}, got {value!r}.")
