import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ncmethods._core import InputError
from ncmethods.frames import simplex_etf
from ncmethods.losses.fnc2 import fnc2
from ncmethods.losses.supcon import prototype_supcon, supcon
from ncmethods.testing import check_loss

f64 = torch.float64


@pytest.fixture
def batch():
    noise = torch.Generator().manual_seed(1)
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 3, 3, 4])
    return torch.randn(10, 6, generator=noise, dtype=f64), labels, simplex_etf(5, 6, dtype=f64)


def by_loops(features, labels, rows, gamma, T):
    """Equations (13) to (20) of arXiv:2609.03406, pair by pair."""
    z = F.normalize(features, dim=1).numpy()
    p = [] if rows is None else F.normalize(rows, dim=1).numpy()
    n, y = len(z), labels.tolist()
    pairs, own = [], []
    for i in range(n):
        G = sum(math.exp(z[i] @ z[j] / T) for j in range(n) if j != i)
        G += sum(math.exp(z[i] @ row / T) for row in p)
        for j in range(n):
            if j != i and y[i] == y[j]:
                P = math.exp(z[i] @ z[j] / T) / G
                pairs.append(-((1 - P) ** gamma) * math.log(P))
        if rows is not None:
            R = math.exp(z[i] @ p[y[i]] / T) / G
            own.append(-((1 - R) ** gamma) * math.log(R))
    return np.mean(pairs) + (np.mean(own) if own else 0.0)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_it_equals_the_loops(batch, gamma, temperature):
    features, labels, weight = batch
    for rows in (None, weight, 4 * weight):
        want = by_loops(features, labels, rows, gamma, temperature)
        got = fnc2(features, labels, rows, gamma=gamma, temperature=temperature)
        assert got.item() == pytest.approx(want, rel=1e-12)


def test_gamma_zero_is_supcon_on_balanced_batches_only(batch):
    features, labels, weight = batch
    balanced = torch.arange(5).repeat(2)
    plain = supcon(features, balanced, temperature=0.2)
    got = fnc2(features, balanced, gamma=0.0, temperature=0.2)
    torch.testing.assert_close(got, plain, rtol=1e-12, atol=0)
    assert not torch.isclose(fnc2(features, labels, gamma=0.0), supcon(features, labels), rtol=0.01)
    # With prototypes, b samples a class: b · SupCon = (b − 1) · pair term + prototype term.
    rest = fnc2(features, torch.full((10,), -1), weight)  # nothing labelled: 0
    assert rest == 0
    z, p = F.normalize(features, dim=1), weight
    s = torch.cat([z @ z.T, z @ p.T], 1) / 0.2
    s[:, :10].fill_diagonal_(-math.inf)
    own = -s.log_softmax(1)[torch.arange(10), 10 + balanced].mean()
    pair = fnc2(features, balanced, weight, gamma=0.0, temperature=0.2) - own
    with_rows = prototype_supcon(features, balanced, weight, temperature=0.2)
    torch.testing.assert_close(2 * with_rows, pair + own, rtol=1e-12, atol=0)


def test_value_at_a_collapsed_etf():
    # b a class: P = R = 1 / (b + (K−1)(b+1) e^{−K/((K−1)T)}).
    K, b, T, gamma = 4, 3, 0.5, 2.0
    frame = simplex_etf(K, 5, dtype=f64)
    labels = torch.arange(K).repeat(b)
    P = 1 / (b + (K - 1) * (b + 1) * math.exp(-K / ((K - 1) * T)))
    got = fnc2(2 * frame[labels], labels, frame, gamma=gamma, temperature=T)
    assert got.item() == pytest.approx(-2 * (1 - P) ** gamma * math.log(P), rel=1e-12)


def test_pairs_are_averaged_not_anchors(batch):
    """Class 0 has 12 of the 20 ordered pairs, class 1 six, class 3 two."""
    features, labels, _ = batch
    s = F.normalize(features, dim=1) @ F.normalize(features, dim=1).T / 0.1
    log_p = s.fill_diagonal_(-math.inf).log_softmax(1)
    parts = []
    for c in (0, 1, 3):
        pair = (labels[:, None] == c) & (labels == c) & ~torch.eye(10, dtype=torch.bool)
        parts.append(-log_p[pair].mean())
    want = (12 * parts[0] + 6 * parts[1] + 2 * parts[2]) / 20
    torch.testing.assert_close(fnc2(features, labels, gamma=0.0), want, rtol=1e-12, atol=0)


def test_a_larger_gamma_weighs_easy_pairs_down(batch):
    features, labels, weight = batch
    values = [fnc2(features, labels, weight, gamma=g) for g in (0.0, 0.5, 1.0, 2.0, 5.0)]
    assert all(a > b for a, b in pairwise(values))
    # Only one pair and nothing else: P = 1, the loss and its gradient are 0.
    x = features[:2].clone().requires_grad_()
    for gamma in (0.0, 0.3, 1.0, 2.0):
        loss = fnc2(x, torch.tensor([1, 1]), gamma=gamma)
        (grad,) = torch.autograd.grad(loss, x)
        assert abs(loss.item()) < 1e-12
        assert grad.abs().max() < 1e-12


def test_no_gradient_to_prototypes(batch):
    features, labels, weight = batch
    x, rows = features.clone().requires_grad_(), weight.clone().requires_grad_()
    fnc2(x, labels, rows).backward()
    assert x.grad.any()
    assert rows.grad is None


def test_invariances(batch):
    features, labels, weight = batch
    noise = torch.Generator().manual_seed(2)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=noise, dtype=f64))[0]
    size = torch.rand(10, 1, generator=noise, dtype=f64) * 100 + 0.01
    got = fnc2(size * features @ turn, labels, size[:5] * weight @ turn)
    torch.testing.assert_close(got, fnc2(features, labels, weight))


def test_ignored_rows_leave_no_trace(batch):
    features, labels, weight = batch
    labels = labels.clone()
    labels[[0, 7]] = torch.tensor([-1, -100])
    keep = labels >= 0
    z = features.clone()
    z[0] = torch.nan
    z.requires_grad_()
    for rows in (None, weight):
        loss = fnc2(z, labels, rows)
        torch.testing.assert_close(loss, fnc2(features[keep], labels[keep], rows))
        (grad,) = torch.autograd.grad(loss, z)
        assert not grad[~keep].any()
        assert grad[keep].isfinite().all()


def test_nothing_to_compare_is_zero(batch):
    features, _, _ = batch
    for labels in (torch.tensor([3]), torch.tensor([0, 1, 2]), torch.tensor([-1, -1])):
        x = features[: len(labels)].clone().requires_grad_()
        loss = fnc2(x, labels)
        loss.backward()
        assert loss == 0
        assert not x.grad.any()


def test_small_temperature_keeps_the_gradient_of_the_hardest_pair():
    # P is about e^{−1400}: a floor of 1e-8 under P, as in the derivative, would cut it.
    x = torch.tensor([[1.0, 0.0], [-0.8, 0.6], [1.0, 0.1]], requires_grad=True)
    loss = fnc2(x, torch.tensor([0, 0, 1]), temperature=1e-3)
    loss.backward()
    assert loss.isfinite()
    assert x.grad.isfinite().all()
    assert x.grad[0].norm() > 100


def test_gradients(batch):
    features, labels, weight = batch
    x = features.clone().requires_grad_()
    for gamma in (0.0, 0.5, 2.0):
        assert torch.autograd.gradcheck(
            lambda x, g=gamma: fnc2(x, labels, weight, gamma=g, temperature=0.5), x
        )


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_conformance(gamma):
    for K in (2, 5):
        check_loss(partial(fnc2, gamma=gamma), num_classes=K)


def test_errors(batch):
    features, labels, weight = batch
    with pytest.raises(InputError, match="temperature must be > 0"):
        fnc2(features, labels, temperature=0)
    with pytest.raises(InputError, match="gamma must be ≥ 0"):
        fnc2(features, labels, gamma=-1)
    with pytest.raises(InputError, match="D = 6"):
        fnc2(features, labels, weight[:, :3])
    with pytest.raises(InputError, match="labels must be < num_classes = 5"):
        fnc2(features, labels + 1, weight)
