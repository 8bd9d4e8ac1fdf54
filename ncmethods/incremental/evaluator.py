"""Accuracy over sessions: the matrix of tasks, and the measures that the field takes from it.

R[i][j] is the accuracy on the classes of task j after session i, A_i that on all test samples of
the classes seen so far. Every measure is linear in them, so that shares and percentages both do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ncmethods._core import InputError, check_choice, check_labels, check_logits

__all__ = [
    "BaseNovel",
    "IncrementalEvaluator",
    "average_incremental",
    "backward_transfer",
    "base_novel_harmonic",
    "forgetting",
    "knowledge_retention",
    "last",
    "performance_drop",
]

Accuracies = Tensor | Sequence[float]
Matrix = Tensor | Sequence[Sequence[float]]


class BaseNovel(NamedTuple):
    """Accuracy on the classes of session 0, on those that came later, and their harmonic mean."""

    base: float
    novel: float
    harmonic: float


def average_incremental(accuracies: Accuracies) -> float:
    """Average incremental accuracy: the mean of A_0 … A_T.

    Args:
        accuracies: accuracy over all seen classes after each session, [T + 1].
    """
    return float(_curve(accuracies).mean())


def last(accuracies: Accuracies) -> float:
    """Accuracy over all classes after the last session, A_T."""
    return float(_curve(accuracies)[-1])


def performance_drop(accuracies: Accuracies) -> float:
    """A_0 − A_T (PD of few-shot class-incremental learning)."""
    A = _curve(accuracies)
    return float(A[0] - A[-1])


def knowledge_retention(accuracies: Accuracies) -> float:
    """A_T / A_0 (KR), a share whatever the unit; NaN if A_0 is 0."""
    A = _curve(accuracies)
    return float(A[-1] / A[0]) if A[0] else math.nan


def forgetting(matrix: Matrix, kind: str = "chaudhry") -> float:
    """How much accuracy the tasks before the last one have lost, on average; 0 for one session.

    Three definitions go by this name. With T the last session, the mean over j < T of

    - ``"chaudhry"``: max_{j ≤ i < T} R[i][j] − R[T][j]; negative where a task has become better.
      Also continuum's.
    - ``"pycil"``: max_{j ≤ i ≤ T} R[i][j] − R[T][j]; never negative. PyCIL's.
    - ``"first_last"``: R[j][j] − R[T][j], the negative of backward transfer ``"gem"``. Avalanche's.

    Args:
        matrix: R, [T + 1, T + 1] or its rows; what stands above the diagonal is not read.
        kind: which definition.

    Raises:
        InputError: unknown kind, or a matrix without its lower triangle.

    References:
        Chaudhry et al., ECCV 2018, arXiv:1801.10112. Code: Continvvm/continuum 43ba009
        (metrics.forgetting), LAMDA-CL/PyCIL f3509b8 (trainer.py).
    """
    check_choice(kind, ("chaudhry", "pycil", "first_last"), "kind")
    R = _triangle(matrix)
    T = len(R) - 1
    if T == 0:
        return 0.0
    if kind == "first_last":
        best = R.diagonal()[:T]
    else:
        known = R.masked_fill(torch.ones_like(R).triu(1) > 0, -torch.inf)
        best = known[: T if kind == "chaudhry" else T + 1, :T].amax(0)
    return float((best - R[T, :T]).mean())


def backward_transfer(matrix: Matrix, kind: str = "gem") -> float:
    """How later sessions have changed the accuracy on earlier tasks; 0 for one session.

    - ``"gem"``: the mean over j < T of R[T][j] − R[j][j].
    - ``"all_pairs"``: the mean over all i > j of R[i][j] − R[j][j]. Also continuum's.

    Args:
        matrix: R, [T + 1, T + 1] or its rows; what stands above the diagonal is not read.
        kind: which definition.

    Raises:
        InputError: unknown kind, or a matrix without its lower triangle.

    References:
        Lopez-Paz and Ranzato, NeurIPS 2017, arXiv:1706.08840. Code: Continvvm/continuum 43ba009
        (metrics.backward_transfer).
    """
    check_choice(kind, ("gem", "all_pairs"), "kind")
    R = _triangle(matrix)
    T = len(R) - 1
    if T == 0:
        return 0.0
    change = R - R.diagonal()
    if kind == "gem":
        return float(change[T, :T].mean())
    i, j = torch.tril_indices(T + 1, T + 1, -1)
    return float(change[i, j].mean())


def base_novel_harmonic(predictions: Tensor, labels: Tensor, num_base: int) -> BaseNovel:
    """Shares of right answers on base and on novel classes, and their harmonic mean 2bn/(b + n).

    Args:
        predictions: classes, int64 [N].
        labels: classes by arrival, int64 [N]; negative = ignored.
        num_base: classes of session 0; those from there on are novel.

    Returns:
        base, novel, harmonic: NaN where there are no samples; harmonic is 0 if both are.

    Raises:
        InputError: lengths that differ.
    """
    labels = check_labels(labels)
    right = check_labels(predictions, len(labels)) == labels
    base, novel = right[(labels >= 0) & (labels < num_base)], right[labels >= num_base]
    return _base_novel(int(base.sum()), len(base), int(novel.sum()), len(novel))


class IncrementalEvaluator:
    """Counts right answers by session and task, and reads all measures off them.

    Tasks are the true groups of classes, however they differ in size. All accuracies are shares in
    [0, 1]. The state is whole numbers: it comes back from JSON as it was.

    Args:
        boundaries: of the tasks in the classes by arrival, ``schedule.boundaries``: task j has the
            classes boundaries[j] … boundaries[j + 1] − 1, and boundaries[0] = 0.
        topk: a right answer among so many counts for ``topk_accuracies``; all seen classes where
            they are fewer.

    Raises:
        InputError: boundaries that do not ascend from 0, or topk < 1.
    """

    def __init__(self, boundaries: Sequence[int], *, topk: int = 5) -> None:
        edges = [int(b) for b in boundaries]
        if len(edges) < 2 or edges[0] != 0 or any(a >= b for a, b in pairwise(edges)):
            raise InputError(
                "boundaries must ascend from 0, one more than there are tasks, as "
                f"schedule.boundaries does: got {edges}."
            )
        if isinstance(topk, bool) or not isinstance(topk, int) or topk < 1:
            raise InputError(f"topk must be an integer ≥ 1, got {topk!r}.")
        self.boundaries, self.topk = tuple(edges), topk
        self._total: list[list[int]] = []  # samples of task j after session i
        self._right: list[list[int]] = []
        self._masked: list[list[int] | None] = []  # right among the columns of their own task
        self._among: list[int | None] = []  # label among the k largest logits

    def __len__(self) -> int:
        """Number of sessions so far."""
        return len(self._total)

    def extend(self, new: int) -> None:
        """Add a task of ``new`` classes, where their total is not known beforehand.

        Raises:
            InputError: no class.
        """
        if new < 1:
            raise InputError(f"A task has at least one class, got {new}.")
        self.boundaries = (*self.boundaries, self.boundaries[-1] + new)

    def update(
        self,
        session: int,
        predictions: Tensor | None,
        labels: Tensor,
        logits: Tensor | None = None,
    ) -> float:
        """Count the answers on the test samples of all classes seen after ``session``.

        Args:
            session: from 0; the next one, or one that is there, which is replaced.
            predictions: classes by arrival, int64 [N]; None takes the largest logit of the classes
                seen.
            labels: classes by arrival, int64 [N]; negative = ignored.
            logits: [N, at least the classes seen], for top-k and task-incremental accuracy.

        Returns:
            A_session, the share of right answers over all samples.

        Raises:
            InputError: a session out of turn, labels of classes that have not come, a task without
                samples, lengths that differ, logits with NaN, or neither predictions nor logits.
        """
        if not 0 <= session <= len(self) or session + 2 > len(self.boundaries):
            raise InputError(
                f"Session {session} does not follow: {len(self)} are counted of "
                f"{len(self.boundaries) - 1} tasks. Sessions come in order, from 0; extend adds a "
                "task."
            )
        seen = self.boundaries[session + 1]
        labels = check_labels(labels)
        keep = labels >= 0
        y = labels[keep]
        if len(y) and int(y.max()) >= seen:
            raise InputError(
                f"After session {session} the test set has the {seen} classes seen so far, but "
                f"there is a label {int(y.max())}. Take session.test_seen, numbered by arrival."
            )
        z = None if logits is None else self._scores(logits, len(labels), seen)[keep]
        if predictions is not None:
            answers = check_labels(predictions, len(labels))[keep].to(y.device)
        elif z is not None:
            answers = z.argmax(1).to(y.device)
        else:
            raise InputError("update needs predictions or logits.")

        ends = torch.tensor(self.boundaries[1 : session + 2], device=y.device)
        task, M = torch.bucketize(y, ends, right=True), session + 1
        total = torch.bincount(task, minlength=M).tolist()
        if 0 in total:
            raise InputError(
                f"There is no test sample of task {total.index(0)} after session {session}. Test "
                "on all classes seen so far."
            )
        right = torch.bincount(task[answers == y], minlength=M).tolist()
        masked: list[int] | None = None
        among: int | None = None
        if z is not None:
            y, task, ends = y.to(z.device), task.to(z.device), ends.to(z.device)
            columns = torch.bucketize(torch.arange(seen, device=z.device), ends, right=True)
            own = z.masked_fill(columns != task[:, None], -torch.inf).argmax(1)
            masked = torch.bincount(task[own == y], minlength=M).tolist()
            top = z.topk(min(self.topk, seen), dim=1).indices
            among = int((top == y[:, None]).any(1).sum())
        at = slice(session, M)
        self._total[at], self._right[at] = [total], [right]
        self._masked[at], self._among[at] = [masked], [among]
        return self.accuracies[session]

    @staticmethod
    def _scores(logits: Tensor, rows: int, seen: int) -> Tensor:
        z = check_logits(logits.detach())
        if len(z) != rows or z.shape[1] < seen:
            raise InputError(
                f"logits must be [{rows}, at least the {seen} classes seen], got {tuple(z.shape)}."
            )
        if bool(z[:, :seen].isnan().any()):
            raise InputError("logits hold NaN: nothing can be counted.")
        return z[:, :seen]

    @property
    def matrix(self) -> Tensor:
        """R, float64 [sessions, sessions], NaN above the diagonal."""
        return self._shares(self._right)

    @property
    def task_incremental_matrix(self) -> Tensor:
        """R where only the classes of the sample's own task compete; NaN without logits."""
        return self._shares(self._masked)

    def _shares(self, rows: Sequence[list[int] | None]) -> Tensor:
        R = torch.full((len(self), len(self)), torch.nan, dtype=torch.float64)
        for i, (row, total) in enumerate(zip(rows, self._total)):
            if row is not None:
                R[i, : i + 1] = torch.tensor(row).double() / torch.tensor(total)
        return R

    @property
    def accuracies(self) -> list[float]:
        """A_i, over all test samples after each session."""
        return [sum(row) / sum(total) for row, total in zip(self._right, self._total)]

    @property
    def topk_accuracies(self) -> list[float]:
        """Share of samples whose class is among the k largest logits, after each session."""
        return [
            math.nan if hits is None else hits / sum(total)
            for hits, total in zip(self._among, self._total)
        ]

    @property
    def task_incremental_accuracies(self) -> list[float]:
        """A_i where only the classes of the sample's own task compete; NaN without logits."""
        return [
            math.nan if row is None else sum(row) / sum(total)
            for row, total in zip(self._masked, self._total)
        ]

    def base_novel(self, session: int = -1) -> BaseNovel:
        """Accuracy on base and novel classes after a session, the last if not told otherwise.

        Raises:
            InputError: no such session.
        """
        if not -len(self) <= session < len(self):
            raise InputError(f"{len(self)} sessions are counted; there is no session {session}.")
        right, total = self._right[session], self._total[session]
        return _base_novel(right[0], total[0], sum(right[1:]), sum(total[1:]))

    def average_incremental(self) -> float:
        """See :func:`average_incremental`."""
        return average_incremental(self.accuracies)

    def forgetting(self, kind: str = "chaudhry") -> float:
        """See :func:`forgetting`."""
        return forgetting(self.matrix, kind)

    def backward_transfer(self, kind: str = "gem") -> float:
        """See :func:`backward_transfer`."""
        return backward_transfer(self.matrix, kind)

    def summary(self, prefix: str = "") -> dict[str, float]:
        """All measures by name after the last session so far, ready for a log.

        What cannot be said is absent: measures of novel classes after session 0, those of logits
        without logits.

        Raises:
            InputError: no session has been counted.
        """
        A = self.accuracies
        found = {
            "accuracy": last(A),
            "average": average_incremental(A),
            "performance_drop": performance_drop(A),
            "knowledge_retention": knowledge_retention(A),
            "top": self.topk_accuracies[-1],
            "task_incremental": self.task_incremental_accuracies[-1],
            **self.base_novel()._asdict(),
        }
        found[f"top{self.topk}"] = found.pop("top")
        found |= {
            f"forgetting/{kind}": self.forgetting(kind)
            for kind in ("chaudhry", "pycil", "first_last")
        }
        found |= {
            f"backward_transfer/{kind}": self.backward_transfer(kind)
            for kind in ("gem", "all_pairs")
        }
        return {prefix + name: value for name, value in found.items() if not math.isnan(value)}

    def to_dict(self) -> dict[str, Any]:
        """The state as lists of whole numbers, for JSON."""
        return {
            "boundaries": list(self.boundaries),
            "topk": self.topk,
            "total": [list(row) for row in self._total],
            "right": [list(row) for row in self._right],
            "task_incremental": [None if row is None else list(row) for row in self._masked],
            "top": list(self._among),
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> IncrementalEvaluator:
        """The evaluator whose :meth:`to_dict` gave ``state``.

        Raises:
            InputError: a key is missing, or rows that do not fit the boundaries.
        """
        try:
            self = cls(state["boundaries"], topk=state["topk"])
            self._total = [list(row) for row in state["total"]]
            self._right = [list(row) for row in state["right"]]
            self._masked = [None if row is None else list(row) for row in state["task_incremental"]]
            self._among = list(state["top"])
        except (KeyError, TypeError) as error:
            raise InputError(f"This is no state of an IncrementalEvaluator: {error!r}.") from error
        rows = zip(self._total, self._right, self._masked, self._among, strict=False)
        sizes = {len(self._total), len(self._right), len(self._masked), len(self._among)}
        fits = all(
            len(t) == len(r) == i + 1 and (m is None or len(m) == i + 1)
            for i, (t, r, m, _) in enumerate(rows)
        )
        if len(sizes) > 1 or not fits or len(self) >= len(self.boundaries):
            raise InputError(
                "The rows of this state do not fit: after session i there are i + 1 counts, one "
                "for each task, and no more sessions than tasks."
            )
        return self


def _base_novel(base_right: int, base: int, novel_right: int, novel: int) -> BaseNovel:
    b = base_right / base if base else math.nan
    n = novel_right / novel if novel else math.nan
    return BaseNovel(b, n, 0.0 if b + n == 0 else 2 * b * n / (b + n))


def _curve(accuracies: Accuracies) -> Tensor:
    A = torch.as_tensor(accuracies, dtype=torch.float64)
    if A.ndim != 1 or not len(A):
        raise InputError(
            f"accuracies must be one number for each session, at least one: got {tuple(A.shape)}."
        )
    return A


def _triangle(matrix: Matrix) -> Tensor:
    """R as a float64 square, from a square or from rows with i + 1 entries or more."""
    rows = [torch.as_tensor(row, dtype=torch.float64) for row in matrix]
    if not rows or any(row.ndim != 1 or len(row) < i + 1 for i, row in enumerate(rows)):
        raise InputError(
            "The matrix needs an accuracy for each session i and each task j ≤ i: row i has at "
            f"least i + 1 entries, got rows of {[row.numel() for row in rows]}."
        )
    R = torch.full((len(rows), len(rows)), torch.nan, dtype=torch.float64)
    for i, row in enumerate(rows):
        R[i, : i + 1] = row[: i + 1]
    return R
