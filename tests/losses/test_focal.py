from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ncmethods._core import InputError
from ncmethods.losses.focal import focal
from ncmethods.testing import check_loss

f64 = torch.float64
LABELS = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 4])
LOGITS = (4 * torch.sin(torch.arange(60, dtype=f64) ** 2 * 0.37)).reshape(12, 5)
WEIGHT = torch.tensor([0.2, 0.5, 1.0, 1.5, 1.8], dtype=f64)

# FocalLoss of LDAM-DRW in float64 on LOGITS and LABELS: loss and gradient of row 11.
# https://github.com/kaidic/LDAM-DRW/blob/2536330f2afdaa65618323cb5a5850efccce762a/losses.py
LDAM_DRW = {
    0.5: (
        3.927456178728193,
        [0.025597488960729567, 3.8490427425374024e-05, 0.04563566321481858,
         0.012744365375636755, -0.08401600797861028],
    ),
    1.0: (
        3.870972677124316,
        [0.0260765332830153, 3.9210756702545085e-05, 0.04648971203930842,
         0.012982869858779608, -0.08558832593780588],
    ),
    2.0: (
        3.7801181116007885,
        [0.027016645259400365, 4.062438410382214e-05, 0.048165760561268735,
         0.013450928680464973, -0.0886739588852379],
    ),
}  # fmt: skip


@pytest.mark.parametrize("gamma", LDAM_DRW)
def test_it_agrees_with_the_code_of_ldam_drw(gamma):
    z = LOGITS.clone().requires_grad_()
    loss = focal(z, LABELS, gamma=gamma)
    (grad,) = torch.autograd.grad(loss, z)
    want, row = LDAM_DRW[gamma]
    assert loss.item() == pytest.approx(want, rel=1e-12)
    torch.testing.assert_close(grad[11], torch.tensor(row, dtype=f64), rtol=1e-11, atol=1e-14)


def test_golden_value():
    # Golden check 9: γ = 2 at p = ½ is ¼ log 2.
    loss = focal(torch.zeros(1, 2, dtype=f64), torch.tensor([1]), gamma=2)
    assert loss.item() == pytest.approx(0.1732868, abs=1e-7)


def test_gamma_zero_is_cross_entropy_also_with_weights():
    for weight in (None, WEIGHT):
        z = LOGITS.clone().requires_grad_()
        got, want = (
            focal(z, LABELS, gamma=0, class_weight=weight),
            F.cross_entropy(z, LABELS, weight=weight),
        )
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
        grads = [torch.autograd.grad(v, z, retain_graph=True)[0] for v in (got, want)]
        torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_class_weights_are_a_weighted_mean(gamma):
    values = []
    for z, y in zip(LOGITS.numpy(), LABELS.tolist()):
        p = np.exp(z[y]) / np.exp(z).sum()
        values.append(-((1 - p) ** gamma) * np.log(p))
    want = np.average(values, weights=WEIGHT.numpy()[LABELS.numpy()])
    got = focal(LOGITS, LABELS, gamma=gamma, class_weight=WEIGHT)
    assert got.item() == pytest.approx(want, rel=1e-10)
    assert abs(got - focal(LOGITS, LABELS, gamma=gamma)) > 0.01


@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, f64])
def test_saturated_samples_have_finite_gradients(gamma, dtype):
    # p rounds to 1 (and to 0 in the last row): (1 − p)^γ has infinite slope there for γ < 1.
    z = torch.tensor([[1000.0, 0, 0], [40, 0, 0], [17, 0, 0], [-1000, 0, 0]], dtype=dtype)
    z.requires_grad_()
    loss = focal(z, torch.zeros(4, dtype=torch.long), gamma=gamma)
    (grad,) = torch.autograd.grad(loss, z)
    assert loss.item() == pytest.approx((1000 + np.log(2)) / 4, rel=1e-5)
    assert grad.isfinite().all()
    torch.testing.assert_close(grad[3], torch.tensor([-1, 0.5, 0.5], dtype=dtype) / 4)


def test_small_losses_keep_their_digits():
    # Near p = 1 the loss is (−log p)^{1+γ}; 1 − p as a difference would lose digits.
    z = torch.tensor([[25.0, 0.0]], dtype=f64)
    surprise = F.cross_entropy(z, torch.tensor([0])).item()
    got = focal(z, torch.tensor([0]), gamma=1)
    assert got.item() == pytest.approx(surprise * -np.expm1(-surprise), rel=1e-12)


def test_left_out_labels_and_meta():
    z = LOGITS.clone().requires_grad_()
    for weight in (None, WEIGHT):
        none = focal(z, torch.full((12,), -1), class_weight=weight)
        assert none == 0
        assert not torch.autograd.grad(none, z)[0].any()
        # Nothing looks at values off the CPU: the meta device has none.
        there = None if weight is None else weight.to("meta")
        assert focal(LOGITS.to("meta"), LABELS.to("meta"), class_weight=there).shape == ()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_gradient(gamma):
    z = (LOGITS[:4] / 4).requires_grad_()
    labels = torch.tensor([0, 3, -1, 4])
    assert torch.autograd.gradcheck(lambda x: focal(x, labels, gamma=gamma), z)
    weighted = partial(focal, labels=labels, gamma=gamma, class_weight=WEIGHT)
    assert torch.autograd.gradcheck(weighted, z)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_conformance(gamma):
    check_loss(partial(focal, gamma=gamma))
    check_loss(lambda logits, labels, counts: focal(logits, labels, class_weight=1 / counts))


def test_errors():
    for call, words in [
        (lambda: focal(LOGITS, LABELS, gamma=-1), "gamma must be ≥ 0"),
        (lambda: focal(LOGITS, LABELS, gamma=float("nan")), "gamma must be ≥ 0"),
        (lambda: focal(LOGITS, LABELS, class_weight=WEIGHT[:3]), r"\[K\] with K = 5"),
        (lambda: focal(LOGITS, LABELS + 1), "labels must be < num_classes = 5"),
    ]:
        with pytest.raises(InputError, match=words):
            call()
