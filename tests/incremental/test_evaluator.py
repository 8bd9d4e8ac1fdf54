import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ncmethods._core import InputError
from ncmethods.data import ClassSchedule, task_mask
from ncmethods.incremental import (
    IncrementalEvaluator,
    average_incremental,
    backward_transfer,
    base_novel_harmonic,
    forgetting,
    knowledge_retention,
    last,
    performance_drop,
)

# Per-session accuracies that the authors of NC-FSCIL publish; theirs, not ours.
PUBLISHED = {
    "cifar100": [82.52, 76.82, 73.34, 69.68, 66.19, 62.85, 60.96, 59.02, 56.11],
    "miniimagenet": [84.02, 76.80, 72.00, 67.83, 66.35, 64.04, 61.46, 59.54, 58.31],
    "cub200": [80.45, 75.98, 72.30, 70.28, 68.17, 65.16, 64.43, 63.25, 60.66, 60.01, 59.44],
}
FIRST = [60], [80, 50], [70, 40, 90]
SECOND = [60], [70, 50], [80, 65, 90]


def stream(boundaries=(0, 3, 5, 9), seed=5):
    """Answers that are right in somewhat more than 60 % of the cases, session by session."""
    rng = np.random.RandomState(seed)
    for seen in boundaries[1:]:
        labels = np.arange(seen).repeat(20)
        guess = rng.rand(len(labels)) < 0.6
        answers = np.where(guess, labels, rng.randint(seen, size=len(labels)))
        yield torch.from_numpy(answers), torch.from_numpy(labels)


def counted(boundaries=(0, 3, 5, 9), seed=5):
    evaluator = IncrementalEvaluator(boundaries)
    for t, (answers, labels) in enumerate(stream(boundaries, seed)):
        evaluator.update(t, answers, labels)
    return evaluator


# --- definitions --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "kind", "value"),
    [
        (FIRST, "chaudhry", 10),
        (FIRST, "pycil", 10),
        (FIRST, "first_last", 0),
        (SECOND, "chaudhry", -12.5),
        (SECOND, "pycil", 0),
        (SECOND, "first_last", -17.5),
    ],
)
def test_golden_forgetting(rows, kind, value):
    """Golden check 5."""
    assert forgetting(rows, kind) == pytest.approx(value)
    assert forgetting(torch.tensor([[*r, *[0.0] * (3 - len(r))] for r in rows]), kind) == value


@pytest.mark.parametrize(
    ("rows", "kind", "value"),
    [(FIRST, "gem", 0), (FIRST, "all_pairs", 20 / 3), (SECOND, "gem", 17.5)],
)
def test_golden_backward_transfer(rows, kind, value):
    """Golden check 5."""
    assert backward_transfer(rows, kind) == pytest.approx(value)


@pytest.mark.parametrize(
    ("name", "average", "drop"),
    [
        ("cifar100", 67.4989, 26.41),
        ("miniimagenet", 67.8167, 25.71),
        ("cub200", 67.2845, 21.01),
    ],
)
def test_published_averages(name, average, drop):
    """Golden check 6."""
    A = PUBLISHED[name]
    assert average_incremental(A) == pytest.approx(average, abs=5e-5)
    assert performance_drop(torch.tensor(A)) == pytest.approx(drop, abs=1e-4)
    assert last(A) == A[-1]
    if name == "cifar100":
        assert 100 * knowledge_retention(A) == pytest.approx(67.996, abs=5e-4)


def test_published_split():
    """Golden check 6: 73.98 % of 6000 base and 29.30 % of 4000 novel images are 56.11 % of all."""
    state = {"boundaries": [0, 60, 100], "topk": 5, "task_incremental": [None] * 2}
    state |= {"total": [[6000], [6000, 4000]], "right": [[4951], [4439, 1172]], "top": [None] * 2}
    evaluator = IncrementalEvaluator.from_dict(state)
    base, novel, harmonic = evaluator.base_novel()
    assert 100 * base == pytest.approx(73.98, abs=5e-3)
    assert 100 * novel == pytest.approx(29.30, abs=5e-3)
    assert 100 * evaluator.accuracies[-1] == pytest.approx(PUBLISHED["cifar100"][-1], abs=5e-3)
    assert harmonic == pytest.approx(2 * 4439 * 1172 / (4439 * 4000 + 1172 * 6000))


def test_as_continuum_and_pycil_count():
    """Their functions, run once on these answers.

    https://github.com/Continvvm/continuum/blob/43ba0090dec7e5d6976c57df05cb5ef5225e88f2/continuum/metrics/metrics.py#L59
    https://github.com/LAMDA-CL/PyCIL/blob/f3509b8ca3f20660ce4aa13f19d5283de81b4b35/trainer.py#L129
    PyCIL's accuracies are percentages with two digits.
    """
    evaluator = counted()
    wanted = [[47 / 60], [35 / 60, 0.65], [0.65, 0.625, 0.675]]
    for i, row in enumerate(wanted):
        assert evaluator.matrix[i, : i + 1].tolist() == pytest.approx(row, abs=1e-12)
        assert evaluator.matrix[i, i + 1 :].isnan().all()
    assert evaluator.accuracies[-1] == pytest.approx(0.6555555555555556, abs=1e-12)
    assert evaluator.forgetting() == pytest.approx(0.07916666666666666, abs=1e-12)
    assert evaluator.backward_transfer("all_pairs") == pytest.approx(
        -0.11944444444444442, abs=1e-12
    )
    assert 100 * evaluator.forgetting("pycil") == pytest.approx(7.915, abs=5e-3)


matrices = st.integers(1, 6).flatmap(
    lambda T: st.tuples(
        *[st.lists(st.floats(0, 100), min_size=i + 1, max_size=i + 1) for i in range(T)]
    )
)


@given(matrices)
def test_definitions_read_out(rows):
    T = len(rows) - 1
    kept = [rows[j][j] for j in range(T)]
    ends = [rows[T][j] for j in range(T)]
    peaks = [max(rows[i][j] for i in range(j, T)) for j in range(T)]

    def mean(values):
        return sum(values) / len(values) if values else 0.0

    close = {"rel": 1e-9, "abs": 1e-9}
    chaudhry, pycil, first = (forgetting(rows, k) for k in ("chaudhry", "pycil", "first_last"))
    assert chaudhry == pytest.approx(mean([p - e for p, e in zip(peaks, ends)]), **close)
    assert pycil == pytest.approx(mean([max(p, e) - e for p, e in zip(peaks, ends)]), **close)
    assert first == pytest.approx(mean([k - e for k, e in zip(kept, ends)]), **close)
    assert pycil >= max(chaudhry, 0) - 1e-9
    assert chaudhry >= first - 1e-9
    assert backward_transfer(rows) == pytest.approx(-first, **close)
    pairs = [rows[i][j] - rows[j][j] for i in range(T + 1) for j in range(i)]
    assert backward_transfer(rows, "all_pairs") == pytest.approx(mean(pairs), **close)


def test_base_novel_harmonic():
    labels = torch.tensor([0, 0, 1, 1, 2, 3, 3, 3, -1])
    answers = torch.tensor([0, 0, 1, 0, 2, 3, 2, 0, 0])
    found = base_novel_harmonic(answers, labels, 2)
    assert found.base == 0.75
    assert found.novel == 0.5  # weighted by samples: 1 of 1 and 1 of 3
    assert found.harmonic == pytest.approx(2 / (1 / 0.75 + 1 / 0.5))
    assert base_novel_harmonic(labels * 0 + 9, labels, 2) == (0, 0, 0)
    only = base_novel_harmonic(answers[:4], labels[:4], 2)
    assert only.base == 0.75
    assert math.isnan(only.novel)
    assert math.isnan(only.harmonic)


# --- evaluator ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "boundaries", [(0, 50, 60, 70, 80, 90, 100), (0, 10, 15, 20), (0, 6, 7, 8)]
)
def test_tasks_are_the_true_ones(boundaries):
    """PyCIL's groups of ten break here (its issue 36): a row of 7 into 6, and rows too short."""
    evaluator = counted(boundaries)
    R = evaluator.matrix
    assert R.shape == (len(boundaries) - 1,) * 2
    for i, (answers, labels) in enumerate(stream(boundaries)):
        for j, (start, end) in enumerate(pairwise(boundaries[: i + 2])):
            at = (labels >= start) & (labels < end)
            assert R[i, j] == (answers[at] == labels[at]).double().mean()
        assert evaluator.accuracies[i] == pytest.approx(
            float((answers == labels).double().mean()), abs=1e-15
        )


def test_accuracy_is_weighted_by_samples():
    evaluator = IncrementalEvaluator((0, 1, 2))
    evaluator.update(0, torch.tensor([0, 0]), torch.tensor([0, 0]))
    A = evaluator.update(1, torch.tensor([0, 0, 0, 0]), torch.tensor([0, 0, 0, 1]))
    assert A == evaluator.accuracies[1] == 0.75  # the mean over tasks is 0.5
    assert evaluator.base_novel() == (1, 0, 0)
    assert math.isnan(evaluator.base_novel(0).novel)


def test_task_incremental_and_top_k():
    schedule = ClassSchedule(5, 2, 2, seed=None)  # 2 + 2 + 1
    g = torch.Generator().manual_seed(0)
    evaluator = IncrementalEvaluator(schedule.boundaries, topk=2)
    for t in range(3):
        seen = schedule.boundaries[t + 1]
        labels = torch.randint(seen, (60,), generator=g)
        logits = torch.randn(60, 5, generator=g) + 1.5 * torch.eye(5)[labels]
        logits[:, seen:] += 100  # columns of classes to come play no part
        evaluator.update(t, None, labels, logits)
        tasks = schedule.tasks(labels)
        alone, among, right = 0, 0, 0
        for z, y, task in zip(logits, labels.tolist(), tasks.tolist()):
            own = [c for c in range(5) if task_mask(schedule, task)[c]]
            alone += max(own, key=lambda c: float(z[c])) == y
            ranked = sorted(range(seen), key=lambda c: -float(z[c]))
            among += y in ranked[:2]
            right += y == ranked[0]
        assert evaluator.task_incremental_accuracies[t] == alone / 60
        assert evaluator.topk_accuracies[t] == among / 60
        assert evaluator.accuracies[t] == right / 60
    assert (evaluator.task_incremental_matrix >= evaluator.matrix)[
        torch.ones(3, 3).tril() > 0
    ].all()
    assert evaluator.task_incremental_matrix[2, 2] == 1  # one class alone
    assert evaluator.topk_accuracies[0] == 1  # two classes, top 2


def test_top_k_of_fewer_classes_than_k():
    evaluator = IncrementalEvaluator((0, 2, 8), topk=5)
    evaluator.update(0, None, torch.tensor([0, 1]), torch.tensor([[1.0, 2], [2, 1]]))
    assert evaluator.accuracies == [0]
    assert evaluator.topk_accuracies == [1]


def test_predictions_that_are_not_the_largest_logit():
    """A nearest-mean classifier answers, the logits stand beside it."""
    evaluator = IncrementalEvaluator((0, 2))
    labels = torch.tensor([0, 1, 1])
    evaluator.update(0, labels, labels, -torch.eye(2)[labels])
    assert evaluator.accuracies == [1]
    assert evaluator.task_incremental_accuracies == [0]


def test_without_logits():
    evaluator = counted()
    assert all(math.isnan(v) for v in evaluator.topk_accuracies)
    assert evaluator.task_incremental_matrix.isnan().all()
    assert not {"top5", "task_incremental"} & evaluator.summary().keys()


@pytest.mark.parametrize("logits", [False, True])
def test_json_brings_it_back(logits):
    evaluator = IncrementalEvaluator((0, 3, 5, 9))
    for t, (answers, labels) in enumerate(stream()):
        z = torch.randn(len(labels), 9) if logits else None
        if t == 2:  # resumed before the last session
            evaluator = IncrementalEvaluator.from_dict(json.loads(json.dumps(evaluator.to_dict())))
        evaluator.update(t, answers, labels, z)
    again = IncrementalEvaluator.from_dict(json.loads(json.dumps(evaluator.to_dict())))
    assert again.to_dict() == evaluator.to_dict()
    assert again.summary() == evaluator.summary()
    whole = counted()
    assert torch.equal(again.matrix.nan_to_num(-1), whole.matrix.nan_to_num(-1))
    assert len(again) == 3


def test_summary():
    evaluator = counted()
    found = evaluator.summary("inc/")
    A = evaluator.accuracies
    assert found["inc/accuracy"] == A[-1]
    assert found["inc/average"] == sum(A) / 3
    assert found["inc/performance_drop"] == A[0] - A[-1]
    assert found["inc/knowledge_retention"] == A[-1] / A[0]
    assert found["inc/forgetting/pycil"] == evaluator.forgetting("pycil")
    assert found["inc/backward_transfer/gem"] == -found["inc/forgetting/first_last"]
    assert found["inc/harmonic"] == evaluator.base_novel().harmonic
    json.loads(json.dumps(found, allow_nan=False))
    first = IncrementalEvaluator((0, 3, 5, 9))
    first.update(0, *next(stream()))
    assert "novel" not in first.summary()
    assert first.summary()["forgetting/chaudhry"] == 0


def test_a_session_again_and_more_tasks():
    evaluator = counted()
    before = evaluator.to_dict()
    answers, labels = [*stream()][1]
    evaluator.update(1, labels, labels)
    assert evaluator.accuracies[1] == 1
    evaluator.update(1, answers, labels)
    assert evaluator.to_dict() == before
    with pytest.raises(InputError, match="Session 3 does not follow"):
        evaluator.update(3, torch.arange(11), torch.arange(11))
    evaluator.extend(2)
    assert evaluator.update(3, torch.arange(11), torch.arange(11)) == 1
    assert evaluator.boundaries == (0, 3, 5, 9, 11)


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("session", "answers", "labels", "logits", "match"),
    [
        (1, [0, 1], [0, 1], None, "Session 1 does not follow"),
        (-1, [0, 1], [0, 1], None, "does not follow"),
        (0, [0, 1], [0, 2], None, "label 2"),
        (0, [0], [0, 1], None, "2 rows"),
        (0, None, [0, 1], None, "predictions or logits"),
        (0, None, [0, 1], [[0.0], [1.0]], r"\[2, at least the 2 classes"),
        (0, None, [0, 1], [[0.0, 1.0]], r"\[2, at least the 2 classes"),
        (0, None, [0, 1], [[0.0, math.nan], [0, 1]], "NaN"),
        (0, [], [], None, "no test sample of task 0"),
        (0, [0], [-1], None, "no test sample of task 0"),
    ],
)
def test_updates_that_cannot_be(session, answers, labels, logits, match):
    evaluator = IncrementalEvaluator((0, 2, 3))
    to_labels = [
        None if v is None else torch.tensor(v, dtype=torch.int64) for v in (answers, labels)
    ]
    logits = None if logits is None else torch.tensor(logits)
    with pytest.raises(InputError, match=match):
        evaluator.update(session, *to_labels, logits)
    assert len(evaluator) == 0


def test_a_task_without_test_samples():
    evaluator = IncrementalEvaluator((0, 2, 3))
    evaluator.update(0, torch.tensor([0]), torch.tensor([0]))
    with pytest.raises(InputError, match="no test sample of task 1 after session 1"):
        evaluator.update(1, torch.tensor([0]), torch.tensor([0]))


@pytest.mark.parametrize("boundaries", [(), (0,), (1, 2), (0, 2, 2), (0, 3, 2)])
def test_boundaries_that_cannot_be(boundaries):
    with pytest.raises(InputError, match="ascend from 0"):
        IncrementalEvaluator(boundaries)


def test_other_bad_input():
    evaluator = IncrementalEvaluator((0, 2))
    for call in (evaluator.summary, evaluator.average_incremental):
        with pytest.raises(InputError, match="at least one"):
            call()
    with pytest.raises(InputError, match="no session -1"):
        evaluator.base_novel()
    with pytest.raises(InputError, match="topk"):
        IncrementalEvaluator((0, 2), topk=0)
    with pytest.raises(InputError, match="at least one class"):
        evaluator.extend(0)
    with pytest.raises(InputError, match="Did you mean 'pycil'"):
        forgetting(FIRST, "pycli")
    with pytest.raises(InputError, match="gem, all_pairs"):
        backward_transfer(FIRST, "mean")
    for rows in ([], [[1], [2]], [[]]):
        with pytest.raises(InputError, match="row i has"):
            forgetting(rows)
    assert math.isnan(knowledge_retention([0.0, 0.5]))


@pytest.mark.parametrize(
    "change",
    [
        {"right": [[1], [1]]},
        {"total": [[1, 2]]},
        {"top": []},
        {"boundaries": [0, 3]},
        {"right": None},
    ],
)
def test_states_that_cannot_be(change):
    state = counted().to_dict()
    with pytest.raises(InputError, match="state"):
        IncrementalEvaluator.from_dict(state | change)
    with pytest.raises(InputError, match="'top'"):
        IncrementalEvaluator.from_dict({k: v for k, v in state.items() if k != "top"})
