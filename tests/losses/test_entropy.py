import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from ncmethods._core import InputError
from ncmethods.losses import entropy
from ncmethods.losses.entropy import koleo

f64 = torch.float64
FEATURES = torch.sin(torch.arange(1, 41, dtype=f64)).reshape(8, 5)
# `EntropyRegLoss` of Harun et al.'s code, float64, 0.1 ppm of which is its second ε:
# https://github.com/yousuf907/NC-OOD/blob/53b3aa1d4c68e41f9d0a7ed6dc1382aa2b88d9bf/resnet/
# custom_loss.py (the same file is in vgg/)
VALUE = 1.5696831858753906
GRAD_NORM = 3.013545185409419
GRAD_0 = [
    -0.4529220745662321, 0.4231012569762585, 0.9101272447865174, 0.5603864417072066,
    -0.3045710708229017,
]  # fmt: skip


def test_it_equals_the_authors_code():
    h = FEATURES.clone().requires_grad_()
    loss = koleo(h)
    assert loss.item() == pytest.approx(VALUE, rel=1e-8)
    (grad,) = torch.autograd.grad(loss, h)
    assert grad.norm().item() == pytest.approx(GRAD_NORM, rel=1e-7)
    assert grad[0].tolist() == pytest.approx(GRAD_0, rel=1e-6)


def test_neighbours_are_those_of_scikit_learn():
    x = np.random.default_rng(0).normal(size=(50, 6))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    distance = NearestNeighbors(n_neighbors=2).fit(unit).kneighbors(unit)[0][:, 1]
    want = -np.log(distance + 1e-8).mean()
    assert koleo(torch.from_numpy(x)).item() == pytest.approx(want, rel=1e-10)


def test_four_points_on_a_circle():
    # Neighbours at 90°, so at distance √2 whatever the lengths.
    h = torch.tensor([[1, 0], [0, 2], [-3, 0], [0, -4]], dtype=f64)
    assert koleo(h).item() == pytest.approx(-math.log(math.sqrt(2)), abs=1e-7)


def test_labels_only_leave_samples_out():
    labels = torch.tensor([3, -1, 0, 0, -100, 3, 2, 2])
    want = koleo(FEATURES[labels >= 0])
    torch.testing.assert_close(koleo(FEATURES, labels), want, rtol=1e-12, atol=0)
    other = koleo(FEATURES, torch.where(labels < 0, labels, 0))
    assert torch.equal(other, koleo(FEATURES, labels))  # which class does not matter


def test_the_gradient_reaches_both_ends():
    h = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.1, 0.0], [-1.0, 0.0, 0.3]], dtype=f64)
    h.requires_grad_()
    Z = torch.nn.functional.normalize(h, dim=1)
    # 0 and 1 are each other's neighbour; that of 2 is 0 or 1, whose gradient it adds to.
    near = (Z[0] - Z[1]).norm()
    third = Z[2] - Z[int((Z[:2] @ Z[2]).argmax())]
    want = torch.autograd.grad(-(2 * near.log() + third.norm().log()) / 3, h)[0]
    got = torch.autograd.grad(koleo(h), h)[0]
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)


def test_duplicates_are_finite():
    h = torch.tensor([[0.6, 0.8], [0.6, 0.8], [0.0, 1.0]], requires_grad=True)
    loss = koleo(h)
    (grad,) = torch.autograd.grad(loss, h)
    third = math.hypot(0.6, 0.2)
    assert loss.item() == pytest.approx(-(2 * math.log(1e-8) + math.log(third)) / 3, rel=1e-5)
    assert grad.isfinite().all()


def test_descent_spreads_a_collapsed_batch():
    noise = torch.Generator().manual_seed(0)
    h = torch.randn(3, 4, generator=noise, dtype=f64)[torch.arange(12) % 3]
    h = (h + 0.01 * torch.randn(12, 4, generator=noise, dtype=f64)).requires_grad_()
    before = koleo(h).item()
    optimizer = torch.optim.SGD([h], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        koleo(h).backward()
        optimizer.step()
    Z = torch.nn.functional.normalize(h.detach(), dim=1)
    distance = torch.cdist(Z, Z) + 9 * torch.eye(12)
    assert before > 3
    assert distance.min() > 0.5


def test_tiles_equal_the_whole(monkeypatch):
    h = torch.randn(23, 4, generator=torch.Generator().manual_seed(4), dtype=f64)
    want = koleo(h)
    monkeypatch.setattr(entropy, "TILE", 5)
    assert torch.equal(koleo(h), want)


def test_fewer_than_two_samples():
    for labels in (None, torch.tensor([0])):
        h = FEATURES[:1].clone().requires_grad_()
        value = koleo(h, labels)
        assert value.item() == 0
        assert torch.equal(*torch.autograd.grad(value, h), torch.zeros_like(h))
    assert koleo(FEATURES, torch.tensor([-1, -1, 4, -1, -1, -1, -1, -1])).item() == 0
    with pytest.raises(InputError, match="8 rows"):
        koleo(FEATURES, torch.zeros(3).long())
