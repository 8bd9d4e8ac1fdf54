from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ncmethods._core import InputError
from ncmethods.losses.logit_adjusted import logit_adjusted
from ncmethods.losses.vector_scaling import vector_scaling
from ncmethods.testing import check_loss

f64 = torch.float64
COUNTS = torch.tensor([500, 120, 40, 12, 5])
LABELS = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 4])
LOGITS = (4 * torch.sin(torch.arange(60, dtype=f64) ** 2 * 0.37)).reshape(12, 5)

# VSLoss in float64 on LOGITS, LABELS, COUNTS by (γ, τ): loss and gradient of row 11.
# https://github.com/orparask/VS-Loss/blob/7ade9c9959951212415bb9aa4f5563caa5182e5e/class_imbalance/losses.py
AUTHORS = {
    (0.3, 1.0): (
        3.406492617775964,
        [0.08124432811773763, 6.495539194320804e-05, 0.0008173822636599297,
         6.7879251509362e-05, -0.02092291247839106],
    ),
    (0.2, 1.2): (
        3.652861398402838,
        [0.08142319865921599, 3.972424844254908e-05, 0.0010284951463468636,
         6.569130239108872e-05, -0.03316989126757432],
    ),
    (0.15, 0.0): (  # CDT
        3.342278047630398,
        [0.04599853943910526, 0.00010988983534276381, 0.01824253045911425,
         0.004908026297388978, -0.040780445960433676],
    ),
    (0.0, 1.5): (  # logit adjustment
        4.199242674477216,
        [0.07994335813295164, 1.413365934238107e-05, 0.0032249602796893375,
         0.0001479858187620768, -0.08333043789074544],
    ),
}  # fmt: skip


@pytest.mark.parametrize("hyper", AUTHORS)
def test_it_agrees_with_the_authors_code(hyper):
    gamma, tau = hyper
    z = LOGITS.clone().requires_grad_()
    loss = vector_scaling(z, LABELS, COUNTS, gamma=gamma, tau=tau)
    (grad,) = torch.autograd.grad(loss, z)
    want, row = AUTHORS[hyper]
    assert loss.item() == pytest.approx(want, rel=1e-12)
    torch.testing.assert_close(grad[11], torch.tensor(row, dtype=f64), rtol=1e-11, atol=1e-14)


def test_factors():
    # Golden check 8: γ = 0.3, R = 100 has Δ from 1 to 3.981072. Read off: z scaled by Δ is CE of z.
    counts = torch.tensor([5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50])
    delta = (5000 / counts.double()) ** 0.3
    assert delta[0] == 1
    assert delta[9].item() == pytest.approx(3.981072, abs=1e-6)
    z, labels = LOGITS.reshape(6, 10), torch.tensor([0, 3, 5, 9, 9, 2])
    got = vector_scaling(z * delta, labels, counts, gamma=0.3, tau=0)
    torch.testing.assert_close(got, F.cross_entropy(z, labels), rtol=1e-12, atol=0)


def test_limits():
    z = LOGITS.clone().requires_grad_()
    for tau in (0.0, 0.7, 1.0):
        got = vector_scaling(z, LABELS, COUNTS, gamma=0, tau=tau)
        want = logit_adjusted(z, LABELS, COUNTS, tau=tau)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
        grads = [torch.autograd.grad(v, z, retain_graph=True)[0] for v in (got, want)]
        torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-14)
    got = vector_scaling(z, LABELS, COUNTS, gamma=0, tau=0)
    torch.testing.assert_close(got, F.cross_entropy(z, LABELS), rtol=1e-12, atol=0)
    # Only ratios of counts matter, and equal counts are plain cross-entropy.
    torch.testing.assert_close(
        vector_scaling(z, LABELS, COUNTS * 37), vector_scaling(z, LABELS, COUNTS)
    )
    got = vector_scaling(z, LABELS, torch.full((5,), 9))
    torch.testing.assert_close(got, F.cross_entropy(z, LABELS), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("gamma", "tau"), [(0.3, 1.0), (0.3, 0.0), (0.0, 1.0)])
def test_a_class_without_training_samples_takes_no_part(gamma, tau):
    counts = torch.tensor([500, 0, 40, 12, 5])
    keep, hyper = [0, 2, 3, 4], {"gamma": gamma, "tau": tau}
    seen = LABELS != 1
    z = LOGITS[seen].clone().requires_grad_()
    number = torch.tensor([0, -1, 1, 2, 3])
    want = vector_scaling(z[:, keep], number[LABELS[seen]], counts[keep], **hyper)
    got = vector_scaling(z, LABELS[seen], counts, **hyper)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    (grad,) = torch.autograd.grad(got, z)
    assert grad.isfinite().all()
    assert not grad[:, 1].any()
    plain = vector_scaling(z, LABELS[seen], counts, gamma=0, tau=0)
    torch.testing.assert_close(plain, F.cross_entropy(z, LABELS[seen]))


def test_temperatures_move_the_margin_that_separates():
    # Kini et al.: divided logits change the margin of a separable problem, added terms do not. Two
    # classes, one logit gap g each: at loss L the gap is Δ-fold, but only shifted by τ log ratio.
    counts, y = torch.tensor([100, 1]), torch.tensor([1])

    def gap(loss_value, **hyper):
        low, high = 0.0, 1e4
        for _ in range(200):
            middle = (low + high) / 2
            z = torch.tensor([[0.0, middle]], dtype=f64)
            above = vector_scaling(z, y, counts, **hyper) > loss_value
            low, high = (middle, high) if above else (low, middle)
        return low

    for value in (1e-3, 1e-6, 1e-9):
        plain = gap(value, gamma=0, tau=0)
        assert gap(value, gamma=0.3, tau=0) == pytest.approx(plain * 100**0.3, rel=1e-6)
        assert gap(value, gamma=0, tau=1) == pytest.approx(plain + np.log(100), rel=1e-6)


def test_left_out_labels_and_meta():
    z = LOGITS.clone().requires_grad_()
    none = vector_scaling(z, torch.full((12,), -1), COUNTS)
    assert none == 0
    assert not torch.autograd.grad(none, z)[0].any()
    # Nothing looks at values off the CPU: the meta device has none.
    there = [t.to("meta") for t in (LOGITS, LABELS, COUNTS)]
    assert vector_scaling(*there).shape == ()


@pytest.mark.parametrize("hyper", [{}, {"tau": 0.0}, {"gamma": 0.0}, {"gamma": 0.0, "tau": 0.0}])
def test_conformance_and_gradient(hyper):
    loss = partial(vector_scaling, **hyper)
    check_loss(loss)
    z = (LOGITS[:4] / 4).requires_grad_()
    labels = torch.tensor([0, 3, -1, 4])
    assert torch.autograd.gradcheck(lambda x: loss(x, labels, COUNTS), z)


def test_errors():
    for bad, words in [
        ((LOGITS, LABELS, COUNTS[:3]), "length K = 5"),
        ((LOGITS, LABELS + 1, COUNTS), "labels must be < num_classes = 5"),
        ((LOGITS, LABELS, 0 * COUNTS), "not all zero"),
    ]:
        with pytest.raises(InputError, match=words):
            vector_scaling(*bad)
