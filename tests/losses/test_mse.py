from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ncmethods._core import InputError
from ncmethods.losses.mse import binary_cross_entropy, mse
from ncmethods.testing import check_loss

f64 = torch.float64
COUNTS = torch.tensor([500, 120, 40, 12, 5])
LABELS = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 4])
LOGITS = (4 * torch.sin(torch.arange(60, dtype=f64) ** 2 * 0.37)).reshape(12, 5)
HOT = F.one_hot(LABELS, 5).to(f64)
SINGLE = {"target": 30.0, "true_weight": 15.0}


def each(k=1.0, M=1.0):
    """½ [k (z_y − M)² + Σ_{c≠y} z_c²] sample by sample."""
    values = []
    for z, y in zip(LOGITS.tolist(), LABELS.tolist()):
        others = sum(v * v for c, v in enumerate(z) if c != y)
        values.append(0.5 * (k * (z[y] - M) ** 2 + others))
    return np.array(values)


def test_normalisation_against_torch():
    got = mse(LOGITS, LABELS)
    torch.testing.assert_close(got, 5 / 2 * F.mse_loss(LOGITS, HOT), rtol=1e-12, atol=0)
    want = 5 * F.binary_cross_entropy_with_logits(LOGITS, HOT)
    torch.testing.assert_close(binary_cross_entropy(LOGITS, LABELS), want, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("k", "M"), [(1.0, 1.0), (15.0, 30.0), (0.5, 2.0), (1.0, 7.0)])
def test_rescaled_formula(k, M):
    got = mse(LOGITS, LABELS, target=M, true_weight=k)
    assert got.item() == pytest.approx(each(k, M).mean(), rel=1e-12)


@pytest.mark.parametrize("rescale", [{}, SINGLE])
def test_rescaled_as_a_scaled_mean_squared_error(rescale):
    # How public code writes it: the label's output and its target times √k, then torch's MSE.
    k, M = rescale.get("true_weight", 1.0), rescale.get("target", 1.0)
    scale = 1 + (k**0.5 - 1) * HOT
    want = 5 / 2 * F.mse_loss(LOGITS * scale, M * k**0.5 * HOT)
    torch.testing.assert_close(mse(LOGITS, LABELS, **rescale), want, rtol=1e-12, atol=0)


def test_balance():
    values, y = each(), LABELS.numpy()
    within = [values[y == c].mean() for c in range(5)]
    got = mse(LOGITS, LABELS, balance="batch")
    assert got.item() == pytest.approx(np.mean(within), rel=1e-12)
    weights = 1 / COUNTS.numpy()[y]
    got = mse(LOGITS, LABELS, COUNTS, balance="global")
    assert got.item() == pytest.approx(np.average(values, weights=weights), rel=1e-12)
    # Absent classes do not count, and repeated samples of a class change nothing.
    some = LABELS < 3
    got = mse(LOGITS[some], LABELS[some], balance="batch")
    assert got.item() == pytest.approx(np.mean(within[:3]), rel=1e-12)
    twice = [torch.cat([t[:5], t]) for t in (LOGITS, LABELS)]
    got = mse(*twice, balance="batch")
    assert got.item() == pytest.approx(np.mean(within), rel=1e-12)
    assert abs(got - mse(*twice)) > 0.01


def test_a_class_without_training_samples():
    counts = torch.tensor([500, 120, 40, 12, 0])
    weights = 1 / np.maximum(counts.numpy(), 1)[LABELS.numpy()]
    got = mse(LOGITS, LABELS, counts, balance="global")
    assert got.item() == pytest.approx(np.average(each(), weights=weights), rel=1e-12)


def test_minimum_and_gradient():
    z = (30 * HOT).requires_grad_()
    loss = mse(z, LABELS, **SINGLE)
    assert loss == 0
    assert not torch.autograd.grad(loss, z)[0].any()
    # The gradient of the plain form is (z − e_y)/N, of the logistic form (σ(z) − e_y)/N.
    z = LOGITS.clone().requires_grad_()
    (grad,) = torch.autograd.grad(mse(z, LABELS), z)
    torch.testing.assert_close(grad, (LOGITS - HOT) / 12, rtol=1e-12, atol=1e-14)
    (grad,) = torch.autograd.grad(binary_cross_entropy(z, LABELS), z)
    torch.testing.assert_close(grad, (LOGITS.sigmoid() - HOT) / 12, rtol=1e-10, atol=1e-14)


def test_logistic_loss_keeps_its_small_values():
    # log(1 + e^{−z}) of a separated sample is e^{−z}; softplus(z) − z would round it to 0.
    z = torch.tensor([[30.0, -30.0]], requires_grad=True)
    loss = binary_cross_entropy(z, torch.tensor([0]))
    (grad,) = torch.autograd.grad(loss, z)
    small = float(np.exp(-30.0))
    assert loss.item() == pytest.approx(2 * small, rel=1e-5)
    torch.testing.assert_close(grad, torch.tensor([[-small, small]]), rtol=1e-5, atol=0)
    far = binary_cross_entropy(torch.tensor([[-1e4, 1e4]]), torch.tensor([0]))
    assert far.item() == pytest.approx(2e4)


LOSSES = {
    "mse": mse,
    "mse-batch": partial(mse, balance="batch"),
    "mse-global": partial(mse, counts=COUNTS, balance="global"),
    "mse-rescaled": partial(mse, **SINGLE),
    "bce": binary_cross_entropy,
}


@pytest.mark.parametrize("name", LOSSES)
def test_left_out_labels_and_meta(name):
    z = LOGITS.clone().requires_grad_()
    none = LOSSES[name](z, torch.full((12,), -1))
    assert none == 0
    assert not torch.autograd.grad(none, z)[0].any()
    # Nothing looks at values off the CPU: the meta device has none.
    assert LOSSES[name](LOGITS.to("meta"), LABELS.to("meta")).shape == ()


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name):
    z = (LOGITS[:4] / 4).requires_grad_()
    labels = torch.tensor([0, 3, -1, 4])
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, labels), z)


@pytest.mark.parametrize("hyper", [{}, {"balance": "batch"}, {"balance": "global"}, SINGLE])
def test_conformance(hyper):
    check_loss(partial(mse, **hyper))
    check_loss(binary_cross_entropy)


def test_errors():
    for call, words in [
        (lambda: mse(LOGITS, LABELS, balance="globl"), "Did you mean 'global'"),
        (lambda: mse(LOGITS, LABELS, balance="global"), "needs counts"),
        (lambda: mse(LOGITS, LABELS, true_weight=0), "true_weight must be > 0"),
        (lambda: mse(LOGITS, LABELS + 1), "labels must be < num_classes = 5"),
        (lambda: binary_cross_entropy(LOGITS, LABELS[:3]), "12 rows"),
    ]:
        with pytest.raises(InputError, match=words):
            call()
