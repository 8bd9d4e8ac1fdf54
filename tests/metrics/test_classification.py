import math
import sys

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from sklearn.metrics import (
    accuracy_score,
    brier_score_loss,
    confusion_matrix,
    f1_score,
    log_loss,
    recall_score,
)

from ncmethods import metrics
from ncmethods._core import InputError

classification = metrics.classification
f64 = torch.float64


@pytest.fixture(params=[0, 1, 2])
def sample(request):
    noise = torch.Generator().manual_seed(request.param)
    labels = torch.randint(5, (300,), generator=noise)  # class 5 has no samples
    logits = 2 * torch.randn(300, 6, generator=noise, dtype=f64)
    logits[torch.arange(300), labels] += 2
    if request.param == 2:  # class 5 neither seen nor predicted
        logits[:, 5] = -50
    return logits, labels


def test_against_scikit_learn(sample):
    logits, labels = sample
    y, p = labels.numpy(), logits.softmax(1).numpy()
    guess = logits.argmax(1).numpy()
    out = classification(logits, labels)
    assert out["accuracy"] == pytest.approx(accuracy_score(y, guess))
    assert out["f1_macro"] == pytest.approx(f1_score(y, guess, average="macro", zero_division=0))
    assert out["nll"] == pytest.approx(log_loss(y, p, labels=range(6)))
    assert np.array_equal(
        metrics.confusion_matrix(logits, labels), confusion_matrix(y, guess, labels=range(6))
    )
    by_class = metrics.accuracy_by_class(logits, labels)
    want = recall_score(y, guess, average=None, labels=range(5))
    assert by_class[:5].tolist() == pytest.approx(want.tolist())
    assert by_class[5].isnan()
    assert all(type(value) is float for value in out.values())
    assert out.keys() == {
        "accuracy", "f1_macro", "nll", "ece", "brier", "nll/scaled", "ece/scaled",
    }  # fmt: skip


def test_brier_by_formula_and_binary(sample):
    logits, labels = sample
    p = logits.softmax(1).numpy()
    want = ((p - np.eye(6)[labels]) ** 2).sum(1).mean()
    assert metrics.brier(logits, labels).item() == pytest.approx(want)
    two = (labels < 2).long()
    binary = brier_score_loss(two, logits[:, :2].softmax(1)[:, 1])
    assert metrics.brier(logits[:, :2], two).item() == pytest.approx(2 * binary)
    certain = torch.tensor([[1000.0, 0.0]])
    assert metrics.brier(certain, torch.tensor([0])) == 0
    assert metrics.brier(certain, torch.tensor([1])) == 2


def two_class(confidence, right):
    """Logits with the given top probability, and labels that make ``right`` of them true."""
    z = math.log(confidence / (1 - confidence))
    logits = torch.tensor([[z, 0.0]], dtype=f64).repeat(len(right), 1)
    return logits, 1 - torch.tensor(right)


def test_ece_of_a_calibrated_sample_is_zero():
    parts = [
        two_class(0.75, [1, 1, 1, 0]),
        two_class(0.6, [1, 1, 1, 0, 0]),
        two_class(0.9, [1] * 9 + [0]),
    ]
    logits, labels = (torch.cat(x) for x in zip(*parts))
    assert metrics.ece(logits, labels) == pytest.approx(0, abs=1e-12)


def test_ece_closed_forms():
    # Always sure and always wrong: 1. Always sure, half right: ½. Uniform over K: |1/K − acc|.
    sure = torch.tensor([[100.0, 0.0]]).repeat(4, 1)
    assert metrics.ece(sure, torch.ones(4).long()).item() == pytest.approx(1)
    assert metrics.ece(sure, torch.tensor([0, 1, 0, 1])).item() == pytest.approx(0.5)
    flat = torch.zeros(5, 4)
    assert metrics.ece(flat, torch.tensor([0, 0, 0, 1, 1])).item() == pytest.approx(0.6 - 0.25)
    # Two bins with opposite gaps do not cancel; in one bin they do.
    parts = [two_class(0.95, [1, 1, 1, 0]), two_class(0.55, [1, 1, 1, 0])]
    logits, labels = (torch.cat(x) for x in zip(*parts))
    assert metrics.ece(logits, labels).item() == pytest.approx((0.2 + 0.2) / 2)
    assert metrics.ece(logits, labels, bins=1).item() == pytest.approx(0, abs=1e-12)
    # Bins are (lower, upper], as in Guo et al.: confidence ¼ stands below the edge at ¼.
    edge = torch.tensor([[0.0, 0.0, 0.0, 0.0], [math.log(2), 0.0, 0.0, 0.0]], dtype=f64)
    gaps = [1 - 0.25, 0 - 0.4]
    got = metrics.ece(edge, torch.tensor([0, 1]), bins=4).item()
    assert got == pytest.approx((abs(gaps[0]) + abs(gaps[1])) / 2)


def test_ece_against_a_loop(sample):
    logits, labels = sample
    p = logits.softmax(1)
    confidence, guess = p.max(1)
    total = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            gap = (guess == labels)[inside].double().mean() - confidence[inside].mean()
            total += float(inside.double().mean() * gap.abs())
    assert metrics.ece(logits, labels).item() == pytest.approx(total, abs=1e-12)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_fit_temperature_recovers_the_truth(temperature):
    noise = torch.Generator().manual_seed(7)
    logits = 4 * torch.randn(40_000, 5, generator=noise, dtype=f64)
    labels = torch.multinomial((logits / temperature).softmax(1), 1, generator=noise)[:, 0]
    assert metrics.fit_temperature(logits, labels) == pytest.approx(temperature, rel=0.05)


def test_fit_temperature_is_the_minimum(sample):
    logits, labels = sample
    t = metrics.fit_temperature(logits, labels)
    best = metrics.nll(logits / t, labels)
    for other in (0.9 * t, 0.999 * t, 1.001 * t, 1.1 * t):
        assert metrics.nll(logits / other, labels) > best
    free = minimize_scalar(
        lambda u: float(metrics.nll(logits * u, labels)), bracket=(0.5, 1.0), tol=1e-10
    )
    assert 1 / t == pytest.approx(free.x, rel=1e-4)


def test_fit_temperature_of_perfect_logits_ends_at_a_bound():
    t = metrics.fit_temperature(10 * torch.eye(3), torch.arange(3))
    assert 0 < t < 1


def test_scaled_values_never_use_their_own_half(sample, monkeypatch):
    """Each sample is divided by a temperature fitted on samples that do not include it."""
    logits, labels = sample
    logits[:, 0] += torch.arange(300) * 1e-9  # every row is unlike any other
    module = sys.modules["ncmethods.metrics.classification"]
    fitted_on = {}

    def spy(z, y):
        temperature = 2.0 + len(fitted_on)
        fitted_on[temperature] = set(z[:, 0].tolist())
        return temperature

    monkeypatch.setattr(module, "fit_temperature", spy)
    ratio = logits / module._cross_fitted(logits, labels)
    for value, by_row in zip(logits[:, 0].tolist(), ratio):
        torch.testing.assert_close(by_row, by_row[:1].expand(6))
        assert value not in fitted_on[round(float(by_row[0]), 6)]
    assert len(fitted_on[2.0] | fitted_on[3.0]) == 300
    for c in range(5):  # the halves are stratified
        inside = [v in fitted_on[2.0] for v in logits[labels == c, 0].tolist()]
        assert abs(sum(inside) - len(inside) / 2) <= 0.5


def test_scaling_mends_overconfidence(sample):
    logits, labels = sample
    out = classification(8 * logits, labels)
    assert out["nll/scaled"] < 0.7 * out["nll"]
    assert out["ece/scaled"] < out["ece"]


def test_one_sample():
    out = classification(torch.tensor([[2.0, 1.0]]), torch.tensor([0]))
    assert out["nll/scaled"] == out["nll"]
    assert out["accuracy"] == out["f1_macro"] == 1


def test_groups(sample):
    logits, labels = sample
    by_class = metrics.accuracy_by_class(logits, labels)
    groups = {"many": [0, 1], "few": [3], "absent": [4, 5], "none": []}
    out = classification(logits, labels, groups)
    assert out["accuracy/many"] == pytest.approx(float(by_class[:2].mean()))
    assert out["accuracy/few"] == pytest.approx(float(by_class[3]))
    assert {key for key in out if key.startswith("accuracy/")} == {"accuracy/many", "accuracy/few"}


def test_half_precision_and_graphs(sample):
    logits, labels = sample
    rounded = logits.half()
    want = classification(rounded.double(), labels)
    assert classification(rounded, labels) == want
    assert classification(rounded.double().requires_grad_(), labels) == want


def test_errors(sample):
    logits, labels = sample
    for bad, words in [
        ((logits[0], labels[:1]), "2-D tensor"),
        ((logits[:0], labels[:0]), "at least one row"),
        ((logits, labels[:9]), "300 rows"),
        ((logits, labels + 2), r"labels must lie in 0…5, got 2…6"),
        ((logits, labels - 1), r"got -1…3"),
        ((logits, labels.float()), "integers"),
    ]:
        for measure in (classification, metrics.ece, metrics.brier, metrics.confusion_matrix):
            with pytest.raises(InputError, match=words):
                measure(*bad)
