from functools import partial

import numpy as np
import pytest
import torch

from ncmethods._core import InputError
from ncmethods.frames import simplex_etf
from ncmethods.losses.signed_nc1 import signed_nc1
from ncmethods.metrics import cdnv, trace_ratio
from ncmethods.stats import ClassStats

f64 = torch.float64
FEATURES = torch.sin(torch.arange(1, 41, dtype=f64)).reshape(8, 5)
LABELS = torch.tensor([0, 0, 1, 3, 3, 3, 1, 0])
# `compute_cluster` of Han et al.'s code, float64:
# https://github.com/TrustworthyMachineLearning-Lab/grokking_flatness/blob/
# 2b7827dfcfd0d729f96913e6defa1268611d8e87/nc_experiments/training_utils.py
CDNV = 1.0624208811398164
CDNV_GRAD_NORM = 1.2826710142380584
CDNV_GRAD_0 = [
    0.03533293136700466, -0.059074743741141106, -0.09916937189082059, -0.048088136867069836,
    0.04720510942245956,
]  # fmt: skip


def test_share_equals_the_printed_formula():
    x, y = FEATURES.numpy(), LABELS.numpy()
    means = {c: x[y == c].mean(0) for c in (0, 1, 3)}
    W = np.mean([np.mean([np.sum((v - m) ** 2) for v in x[y == c]]) for c, m in means.items()])
    centre = np.mean(list(means.values()), axis=0)
    B = np.mean([np.sum((m - centre) ** 2) for m in means.values()])
    assert signed_nc1(FEATURES, LABELS).item() == pytest.approx(W / (W + B), rel=1e-12)


def test_share_is_a_function_of_the_trace_ratio():
    """With equal counts, where Σ_W by sample and by class agree."""
    h, y = FEATURES[:6], torch.tensor([0, 3, 1, 3, 1, 0])
    ratio = trace_ratio(ClassStats(4, 5).update(h, y)).item()
    got = signed_nc1(h, y).item()
    assert got == pytest.approx(ratio / (1 + ratio), rel=1e-10)


def test_cdnv_equals_the_authors_code():
    h = FEATURES.clone().requires_grad_()
    loss = signed_nc1(h, LABELS, measure="cdnv")
    assert loss.item() == pytest.approx(CDNV, rel=1e-12)
    (grad,) = torch.autograd.grad(loss, h)
    assert grad.norm().item() == pytest.approx(CDNV_GRAD_NORM, rel=1e-10)
    assert grad[0].tolist() == pytest.approx(CDNV_GRAD_0, rel=1e-9)
    stats = ClassStats(4, 5).update(FEATURES, LABELS)
    assert cdnv(stats).item() == pytest.approx(CDNV, rel=1e-10)


@pytest.mark.parametrize("measure", ["share", "cdnv"])
def test_goal_is_a_sign(measure):
    one = signed_nc1(FEATURES, LABELS, measure=measure)
    other = signed_nc1(FEATURES, LABELS, measure=measure, goal="prevent")
    assert one > 0
    assert torch.equal(other, -one)


def test_the_share_lies_between_collapse_and_one_cloud():
    etf = simplex_etf(4, 6, dtype=f64)
    y = torch.arange(16) % 4
    assert signed_nc1(etf[y], y).item() == pytest.approx(0, abs=1e-25)
    offsets = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=f64)
    same = (offsets - offsets.mean(0)).repeat_interleave(4, 0)  # every class has the same mean
    assert signed_nc1(same, y).item() == pytest.approx(1, abs=1e-12)
    # In between: half of the variance within, at V = B.
    noise = torch.cat([offsets - offsets.mean(0)] * 4)
    noise = noise / noise.square().sum(1).mean().sqrt()
    rows = etf.repeat_interleave(4, 0)
    y = torch.arange(4).repeat_interleave(4)
    assert signed_nc1(rows + noise, y).item() == pytest.approx(0.5, rel=1e-12)


def test_a_step_along_the_gradient_cannot_grow_the_features():
    """No change with scale and shift: the gradient is at right angles to both."""
    h = FEATURES.clone().requires_grad_()
    (grad,) = torch.autograd.grad(signed_nc1(h, LABELS, goal="prevent"), h)
    assert grad.norm() > 0.01
    assert (grad * FEATURES).sum().abs() < 1e-14
    assert grad.sum(0).abs().max() < 1e-14


@pytest.mark.parametrize("goal", ["collapse", "prevent"])
def test_descent_reaches_the_goal(goal):
    noise = torch.Generator().manual_seed(1)
    y = torch.arange(20) % 4
    start = simplex_etf(4, 6, dtype=f64)[y]
    h = (start + 0.3 * torch.randn(20, 6, generator=noise, dtype=f64)).requires_grad_()
    before, length = signed_nc1(h, y).item(), h.detach().norm().item()
    optimizer = torch.optim.SGD([h], lr=1.0)
    for _ in range(200):
        optimizer.zero_grad()
        signed_nc1(h, y, goal=goal).backward()
        optimizer.step()
    after = signed_nc1(h, y).item()
    assert 0.2 < before < 0.5
    assert after < 1e-3 if goal == "collapse" else after > 0.95
    assert h.detach().norm().item() < 1.5 * length


def test_the_cdnv_has_no_bound_and_the_share_has():
    """Two class means that approach each other: what preventing collapse would gain."""
    spread = torch.tensor([-1.0, 1.0, -1.0, 1.0], dtype=f64)
    y = torch.tensor([0, 0, 1, 1])
    for gap in (1.0, 1e-2, 1e-4):
        h = torch.stack([spread, torch.tensor([0.0, 0.0, gap, gap], dtype=f64)], 1)
        pair = signed_nc1(h, y, measure="cdnv").item()
        assert pair == pytest.approx(1 / gap**2, rel=1e-6)
        assert signed_nc1(h, y).item() == pytest.approx(1 / (1 + gap**2 / 4), rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, f64])
def test_means_that_coincide_stay_finite(dtype):
    h = torch.tensor([[-1.0], [1.0], [-1.0], [1.0], [5.0]], dtype=dtype, requires_grad=True)
    value = signed_nc1(h, torch.tensor([0, 0, 1, 1, 2]), measure="cdnv")
    (grad,) = torch.autograd.grad(value, h)
    assert value.isfinite()
    assert grad.isfinite().all()


def test_class_with_one_sample_has_no_variance():
    y = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7])
    h = FEATURES.clone().requires_grad_()
    for loss in (signed_nc1, partial(signed_nc1, measure="cdnv")):
        value = loss(h, y)
        assert value.item() == 0
        assert torch.equal(*torch.autograd.grad(value, h), torch.zeros_like(h))


def test_errors():
    with pytest.raises(InputError, match=r"Unknown goal 'prevnt'.*'prevent'"):
        signed_nc1(FEATURES, LABELS, goal="prevnt")
    with pytest.raises(InputError, match="Unknown measure"):
        signed_nc1(FEATURES, LABELS, measure="ratio")


@pytest.mark.parametrize(("offset", "gap"), [(0, 1), (0, 1e-3), (100, 1)])
def test_cdnv_of_float32_features_is_that_of_float64(offset, gap):
    """float32 takes squared distances of means from products; float64 from differences."""
    rng = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 6
    mu = torch.randn(6, 16, generator=rng, dtype=f64)
    mu[1] = mu[0] + gap
    h = (mu[y] + 0.01 * torch.randn(60, 16, generator=rng, dtype=f64) + offset).float()
    found = []
    for x in (h.clone(), h.double()):
        value = signed_nc1(x.requires_grad_(), y, measure="cdnv")
        value.backward()
        found.append((value.item(), x.grad.double()))
    (low, low_grad), (high, high_grad) = found
    tolerance = 1e-4 if offset or gap < 1 else 1e-6
    assert low == pytest.approx(high, rel=tolerance)
    assert (low_grad - high_grad).norm() < 1e-3 * high_grad.norm()
