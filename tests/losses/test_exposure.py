"""Outlier exposure and separation: authors' values, closed forms, limits."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ncmethods import frames
from ncmethods._core import InputError
from ncmethods.losses.exposure import outlier_exposure, separation
from ncmethods.testing import check_loss

f64 = torch.float64
FEATURES = torch.sin(torch.arange(1, 51, dtype=f64)).reshape(10, 5)  # four samples, six outliers
WEIGHT = torch.cos(torch.arange(1, 16, dtype=f64)).reshape(3, 5)
LOGITS = FEATURES @ WEIGHT.T + torch.tensor([0.1, -0.2, 0.3], dtype=f64)
LABELS = torch.tensor([0, 1, 2, 2])
# The terms of `train_ours` in Wu et al.'s code on these tensors, float64
# https://github.com/Wuyingwen/Pursuing-Feature-Separation-for-OOD-Detection/blob/
# f041984a9e233fc8eac798cfe8297a7fa85e24ba/cifar10%20and%20cifar100/main.py
EXPOSURE = 1.7651144443956495
SEPARATION = 2.1263680415363457
GRAD_NORM = 0.3439018689123691
GRAD_0 = [
    -0.05086656111395149, 0.04751745848298655, 0.10221414588865393, 0.06293561894897778,
    -0.034205625809911384,
]  # fmt: skip
GRAD_9 = [
    -0.01460017034057487, -0.06354877978182846, -0.054070934161882175, 0.005119478965609839,
    0.059603066741807036,
]  # fmt: skip


def test_they_equal_the_authors_code():
    assert outlier_exposure(LOGITS[4:]).item() == pytest.approx(EXPOSURE, rel=1e-14)
    h = FEATURES.clone().requires_grad_()
    loss = separation(h[:4], LABELS, WEIGHT, h[4:])
    assert loss.item() == pytest.approx(SEPARATION, rel=1e-14)
    (grad,) = torch.autograd.grad(loss, h)
    assert grad.norm().item() == pytest.approx(GRAD_NORM, rel=1e-13)
    assert grad[0].tolist() == pytest.approx(GRAD_0, rel=1e-12)
    assert grad[9].tolist() == pytest.approx(GRAD_9, rel=1e-12)


# --- outlier exposure -----------------------------------------------------------------------------


def test_exposure_is_cross_entropy_with_the_uniform_distribution():
    uniform = torch.full((10, 3), 1 / 3, dtype=f64)
    want = F.cross_entropy(LOGITS, uniform)
    torch.testing.assert_close(outlier_exposure(LOGITS), want, rtol=1e-14, atol=0)
    torch.testing.assert_close(outlier_exposure(LOGITS + 1000), want, rtol=1e-12, atol=0)


def test_exposure_is_least_where_logits_agree():
    flat = torch.full((4, 7), 3.0, requires_grad=True)
    loss = outlier_exposure(flat)
    assert loss.item() == pytest.approx(math.log(7), rel=1e-6)
    (grad,) = torch.autograd.grad(loss, flat)
    assert grad.abs().max() < 1e-7


def test_exposure_in_low_precision_and_without_outliers():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = outlier_exposure(LOGITS.half())
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(outlier_exposure(LOGITS).item(), rel=1e-3)
    none = torch.zeros(0, 3, requires_grad=True)
    assert outlier_exposure(none).item() == 0
    assert torch.autograd.grad(outlier_exposure(none), none)[0].shape == (0, 3)
    with pytest.raises(InputError, match="logits must be"):
        outlier_exposure(torch.zeros(3))


# --- separation -----------------------------------------------------------------------------------


def test_separation_conforms():
    outliers = torch.randn(7, 8, dtype=f64, generator=torch.Generator().manual_seed(5))
    check_loss(partial(separation, outlier_features=outliers))


def test_separation_is_a_loop_in_numpy():
    H, W = FEATURES.numpy(), WEIGHT.numpy()

    def cos(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    outside = np.mean([sum(abs(cos(h, w)) for w in W) for h in H[4:]])
    aligned = np.mean([cos(H[i], W[y]) for i, y in enumerate(LABELS.tolist())])
    got = separation(FEATURES[:4], LABELS, WEIGHT, FEATURES[4:])
    assert got.item() == pytest.approx(outside - aligned, rel=1e-13)
    scaled = separation(3 * FEATURES[:4], LABELS, 5 * WEIGHT, 0.1 * FEATURES[4:])
    torch.testing.assert_close(scaled, got, rtol=1e-13, atol=0)


def test_collapse_and_orthogonal_outliers_have_minus_one():
    W = frames.simplex_etf(4, 9, dtype=f64)
    outside = torch.linalg.svd(W)[2][3:]  # orthogonal to all rows
    labels = torch.arange(8) % 4
    assert separation(W[labels], labels, W, outside).item() == pytest.approx(-1, abs=1e-12)
    # On a row of a simplex ETF: 1 + (K − 1)/(K − 1).
    assert separation(W[labels], labels, W, W).item() == pytest.approx(1, abs=1e-12)


def test_rows_get_no_gradient_and_dead_features_a_finite_one():
    W = WEIGHT.clone().requires_grad_()
    h = FEATURES.clone()
    h[0], h[7] = 0, 0
    h.requires_grad_()
    loss = separation(h[:4], LABELS, W, h[4:])
    loss.backward()
    assert W.grad is None
    assert h.grad.isfinite().all()
    assert torch.equal(h.grad[[0, 7]], torch.zeros(2, 5, dtype=f64))


def test_each_side_may_be_empty():
    only_known = separation(FEATURES[:4], LABELS, WEIGHT, FEATURES[:0])
    only_outliers = separation(FEATURES[:4], LABELS - 9, WEIGHT, FEATURES[4:])
    total = only_known + only_outliers
    assert total.item() == pytest.approx(SEPARATION, rel=1e-14)
    assert separation(FEATURES[:0], LABELS[:0], WEIGHT, FEATURES[:0]).item() == 0


def test_descent_sends_outliers_out_of_the_span():
    W = frames.simplex_etf(3, 5, dtype=f64, generator=torch.Generator().manual_seed(0))
    h = FEATURES.clone().requires_grad_()
    optimizer = torch.optim.SGD([h], lr=0.3)
    for _ in range(1000):
        optimizer.zero_grad()
        separation(h[:4], LABELS, W, h[4:]).backward()
        optimizer.step()
    unit = F.normalize(h.detach(), dim=1)
    assert (unit[:4] * W[LABELS]).sum(1).min() > 0.99
    assert (unit[4:] @ W.T).norm(dim=1).max() < 0.15


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="D = 5"):
        separation(FEATURES[:4], LABELS, WEIGHT, torch.zeros(2, 4))
    with pytest.raises(InputError, match="num_classes = 3"):
        separation(FEATURES[:4], LABELS + 1, WEIGHT, FEATURES[4:])
