import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch.nn import functional as F

from ncmethods._core import InputError
from ncmethods.losses.smoothing import label_aware_smoothing, label_smoothing
from ncmethods.testing import check_loss

f64 = torch.float64
COUNTS = torch.tensor([500, 120, 40, 12, 5])
LABELS = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 4])
LOGITS = (4 * torch.sin(torch.arange(60, dtype=f64) ** 2 * 0.37)).reshape(12, 5)

# LabelAwareSmoothing of MiSLAS in float64 on LOGITS, LABELS, COUNTS: loss and gradient of row 0.
# https://github.com/dvlab-research/MiSLAS/blob/0fc381e333d8a11170851b7af2058c59840969e0/methods.py
MISLAS = {
    (0.4, 0.1): (
        3.910799327411866,
        [-0.05527005470768524, -0.0007337793041854212, 0.06833967402129569,
         -0.006006411815163744, -0.006329428194261295],
    ),
    (0.3, 0.0): (
        3.956403134351771,
        [-0.061936721374351904, 0.0009328873624812468, 0.07000634068796238,
         -0.004339745148497077, -0.004662761527594628],
    ),
}  # fmt: skip


def naive(logits, labels, share):
    """Cross-entropy to (1−ε) e_y + ε/K, sample by sample in numpy."""
    losses = []
    for z, y, e in zip(logits.numpy(), labels.tolist(), share):
        target = np.full(len(z), e / len(z))
        target[y] += 1 - e
        losses.append(-(target * (z - np.log(np.exp(z).sum()))).sum())
    return float(np.mean(losses))


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.6, 1.0])
def test_label_smoothing_is_cross_entropy_to_smoothed_targets(epsilon):
    want = naive(LOGITS, LABELS, [epsilon] * 12)
    assert label_smoothing(LOGITS, LABELS, epsilon=epsilon).item() == pytest.approx(want, rel=1e-12)
    plain = label_smoothing(LOGITS, LABELS, epsilon=0)
    torch.testing.assert_close(plain, F.cross_entropy(LOGITS, LABELS), rtol=1e-14, atol=0)


def test_smallest_value_is_at_a_finite_margin():
    # Golden check 9: K = 10, ε = 0.1 has its minimum 0.500288 at the margin log 91 = 4.510860.
    y = torch.tensor([0])

    def at(margin):
        return label_smoothing(margin * F.one_hot(y, 10).to(f64), y, epsilon=0.1).item()

    best = minimize_scalar(at, bracket=(1, 8), options={"xtol": 1e-10})
    assert best.x == pytest.approx(math.log(91), abs=1e-5)
    assert math.log(91) == pytest.approx(4.510860, abs=1e-6)
    assert at(math.log(91)) == pytest.approx(0.500288, abs=1e-6)
    # And it is no saddle: the gradient over all logits is zero there.
    z = (math.log(91) * F.one_hot(y, 10).to(f64)).requires_grad_()
    (grad,) = torch.autograd.grad(label_smoothing(z, y, epsilon=0.1), z)
    assert grad.abs().max() < 1e-12


@pytest.mark.parametrize("epsilons", MISLAS)
def test_it_agrees_with_the_code_of_mislas(epsilons):
    many, few = epsilons
    z = LOGITS.clone().requires_grad_()
    loss = label_aware_smoothing(z, LABELS, COUNTS, epsilon_many=many, epsilon_few=few)
    (grad,) = torch.autograd.grad(loss, z)
    want, row = MISLAS[epsilons]
    assert loss.item() == pytest.approx(want, rel=1e-12)
    torch.testing.assert_close(grad[0], torch.tensor(row, dtype=f64), rtol=1e-12, atol=1e-14)


def test_epsilon_of_each_class():
    # At equal logits every target gives log K, so read ε off the gradient: ∂ℓ/∂z_y = 1/K − target.
    want = 0.1 + 0.3 * np.sin((COUNTS.numpy() - 5) * np.pi / (2 * 495))
    z = torch.zeros(5, 5, dtype=f64, requires_grad=True)
    loss = label_aware_smoothing(z, torch.arange(5), COUNTS)
    (grad,) = torch.autograd.grad(5 * loss, z)
    own = 1 / 5 - grad.diagonal().numpy()  # 1 − ε + ε/5
    np.testing.assert_allclose((1 - own) / (4 / 5), want, rtol=1e-12)


def test_limits_of_label_aware_smoothing():
    even = partial(label_aware_smoothing, epsilon_many=0.3, epsilon_few=0.3)
    same = label_smoothing(LOGITS, LABELS, epsilon=0.3)
    torch.testing.assert_close(even(LOGITS, LABELS, COUNTS), same, rtol=1e-12, atol=0)
    # Equal counts: nothing is frequent. Only ratios of differences matter, so scaling is nothing.
    few = label_smoothing(LOGITS, LABELS, epsilon=0.1)
    got = label_aware_smoothing(LOGITS, LABELS, torch.full((5,), 7))
    torch.testing.assert_close(got, few, rtol=1e-12, atol=0)
    whole = label_aware_smoothing(LOGITS, LABELS, COUNTS)
    part = label_aware_smoothing(LOGITS, LABELS, COUNTS / COUNTS.sum())
    torch.testing.assert_close(part, whole, rtol=1e-6, atol=0)


def test_a_class_without_training_samples():
    # It has the smallest ε and does not move that of the others: n_min is the smallest positive.
    counts = torch.tensor([500, 120, 40, 12, 0])
    rank = np.clip((counts.numpy() - 12) / 488, 0, 1)
    share = 0.1 + 0.3 * np.sin(np.pi / 2 * rank)
    want = naive(LOGITS, LABELS, share[LABELS.numpy()])
    got = label_aware_smoothing(LOGITS, LABELS, counts)
    assert got.item() == pytest.approx(want, rel=1e-12)


LOSSES = {
    "smoothing": label_smoothing,
    "smoothing-half": partial(label_smoothing, epsilon=0.5),
    "aware": partial(label_aware_smoothing, counts=COUNTS),
}


@pytest.mark.parametrize("name", LOSSES)
def test_left_out_labels_and_extremes(name):
    loss = LOSSES[name]
    z = LOGITS.clone().requires_grad_()
    none = loss(z, torch.full((12,), -1))
    (grad,) = torch.autograd.grad(none, z)
    assert none == 0
    assert not grad.any()
    far = (1e4 * LOGITS.float()).requires_grad_()
    value = loss(far, LABELS)
    (grad,) = torch.autograd.grad(value, far)
    assert value.isfinite()
    assert grad.isfinite().all()
    # Nothing looks at values off the CPU: the meta device has none.
    assert loss(LOGITS.to("meta"), LABELS.to("meta")).shape == ()


@pytest.mark.parametrize("name", LOSSES)
def test_gradient(name):
    z = (LOGITS[:4] / 4).requires_grad_()
    labels = torch.tensor([0, 3, -1, 4])
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, labels), z)


@pytest.mark.parametrize("loss", [label_smoothing, label_aware_smoothing])
def test_conformance(loss):
    check_loss(loss)


def test_errors():
    for call, words in [
        (lambda: label_smoothing(LOGITS, LABELS, epsilon=1.5), r"epsilon must lie in \[0, 1\]"),
        (lambda: label_smoothing(LOGITS, LABELS + 1), "labels must be < num_classes = 5"),
        (lambda: label_aware_smoothing(LOGITS, LABELS, COUNTS, epsilon_few=-0.1), "epsilon_few"),
        (lambda: label_aware_smoothing(LOGITS, LABELS, COUNTS[:3]), "length K = 5"),
    ]:
        with pytest.raises(InputError, match=words):
            call()
