import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ncmethods._core import InputError, check_labels
from ncmethods.frames import nonnegative_orthogonal, simplex_etf
from ncmethods.losses.supcon import prototype_supcon, supcon
from ncmethods.testing import check_loss

f64 = torch.float64


def waves(*shape, phase=0.0):
    """Numbers without a generator, so that they are the same everywhere."""
    i = torch.arange(math.prod(shape), dtype=f64)
    return (torch.sin(1.7 * i + phase) + torch.cos(0.31 * i * i + phase)).reshape(shape)


@pytest.fixture
def batch():
    noise = torch.Generator().manual_seed(1)
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 3, 3, 4])  # class 4 is alone, class 2 absent
    features = torch.randn(10, 6, generator=noise, dtype=f64) + 0.4
    return features, labels, simplex_etf(5, 6, dtype=f64)


def by_loops(features, labels, T, rows=None):
    """The printed formula, sample by sample, in numpy."""
    z = features.numpy() / np.linalg.norm(features.numpy(), axis=1, keepdims=True)
    entries, owners = list(z), labels.tolist()
    if rows is not None:
        entries += list(rows.numpy() / np.linalg.norm(rows.numpy(), axis=1, keepdims=True))
        owners += list(range(len(rows)))
    losses = []
    for i, y in enumerate(labels.tolist()):
        if y < 0:
            continue
        ks = [k for k in range(len(entries)) if k != i and owners[k] >= 0]
        total = sum(math.exp(z[i] @ entries[k] / T) for k in ks)
        positives = [k for k in ks if owners[k] == y]
        terms = [math.log(math.exp(z[i] @ entries[p] / T) / total) for p in positives]
        if terms:
            losses.append(-sum(terms) / len(terms))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("temperature", [0.07, 0.5, 2.0])
def test_it_equals_the_loops(batch, temperature):
    features, labels, weight = batch
    want = by_loops(features, labels, temperature)
    got = supcon(features, labels, temperature=temperature)
    assert got.item() == pytest.approx(want, rel=1e-12)
    want = by_loops(features.relu(), labels, temperature)
    got = supcon(features, labels, temperature=temperature, relu=True)
    assert got.item() == pytest.approx(want, rel=1e-12)
    want = by_loops(features, labels, temperature, 3 * weight)
    got = prototype_supcon(features, labels, 3 * weight, temperature=temperature)
    assert got.item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(("K", "b", "T", "want"), [(2, 2, 1, 0.2395448), (10, 4, 0.1, 1.0987916)])
def test_value_at_a_collapsed_etf(K, b, T, want):
    # Golden check 11: log(b − 1 + (K−1) b e^{−K/((K−1)T)}).
    frame = simplex_etf(K, K + 1, dtype=f64)
    labels = torch.arange(K).repeat(b)
    features = 2.5 * frame[labels]
    got = supcon(features, labels, temperature=T).item()
    assert got == pytest.approx(want, abs=5e-8)
    gap = math.exp(-K / ((K - 1) * T))
    assert got == pytest.approx(math.log(b - 1 + (K - 1) * b * gap), rel=1e-12)
    # One prototype more in each class.
    got = prototype_supcon(features, labels, frame, temperature=T).item()
    assert got == pytest.approx(math.log(b + (K - 1) * (b + 1) * gap), rel=1e-12)


# HobbitLong/SupContrast 66a8fe5, losses.py, run once on these inputs in float64 (with
# base_temperature = temperature). https://github.com/HobbitLong/SupContrast/blob/
# 66a8fe53880d6a1084b2e4e0db0a019024d6d41a/losses.py
@pytest.mark.parametrize(
    ("T", "want"),
    [(0.07, 12.718350057165802), (0.1, 9.16097464092764), (0.5, 3.2257373923878467)],
)
def test_values_of_the_authors_code(T, want):
    views = waves(7, 2, 5)
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 0])
    stacked = torch.cat([views[:, 0], views[:, 1]])
    got = supcon(stacked, labels.repeat(2), temperature=T)
    assert got.item() == pytest.approx(want, rel=1e-12)


def test_a_lone_sample_does_not_count_but_repels():
    # The authors' code counts the lone one of the 7 in the mean, with loss 0: 9.397940196764333.
    x = waves(7, 2, 5)[:, 0].requires_grad_()
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 0])
    loss = supcon(x, labels)
    assert loss.item() * 6 / 7 == pytest.approx(9.397940196764333, rel=1e-12)
    loss.backward()
    assert x.grad[5].norm() > 1e-3
    without = supcon(x.detach()[labels != 2], labels[labels != 2])
    assert abs(without - loss) > 1e-3


def test_rectified_features_end_in_an_orthogonal_frame_under_imbalance():
    noise = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 6 + [1] * 2 + [2] * 2)
    x = torch.rand(10, 5, generator=noise, dtype=f64).requires_grad_()
    adam = torch.optim.Adam([x], lr=0.05)
    for _ in range(400):
        adam.zero_grad()
        loss = supcon(x, labels, temperature=0.5, relu=True)
        loss.backward()
        adam.step()
    z = F.normalize(x.detach().relu(), dim=1)
    same = labels[:, None] == labels
    assert (z @ z.T - same.double()).abs().max() < 0.02
    # Its value at an orthogonal frame: mean of log(b − 1 + (N − b) e^{−1/T}), not below reach.
    b = labels.bincount()[labels].double()
    floor = (b - 1 + (10 - b) * math.exp(-2)).log().mean()
    assert 0 <= loss.item() - floor.item() < 1e-3
    frame = nonnegative_orthogonal(3, 6, dtype=f64)
    at_frame = supcon(frame[labels], labels, temperature=0.5, relu=True)
    torch.testing.assert_close(at_frame, floor, rtol=1e-12, atol=0)


def test_invariances(batch):
    features, labels, weight = batch
    noise = torch.Generator().manual_seed(2)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=noise, dtype=f64))[0]
    size = torch.rand(10, 1, generator=noise, dtype=f64) * 100 + 0.01
    whole, with_rows = supcon(features, labels), prototype_supcon(features, labels, weight)
    torch.testing.assert_close(supcon(size * features @ turn, labels), whole)
    torch.testing.assert_close(
        prototype_supcon(size * features @ turn, labels, size[:5] * weight @ turn), with_rows
    )
    torch.testing.assert_close(supcon(features.relu(), labels), supcon(features, labels, relu=True))
    torch.testing.assert_close(
        supcon(features.abs(), labels, relu=True), supcon(features.abs(), labels)
    )


@pytest.mark.parametrize("call", [supcon, prototype_supcon])
def test_ignored_rows_leave_no_trace(batch, call):
    features, labels, weight = batch
    rows = () if call is supcon else (weight,)
    labels = labels.clone()
    labels[[0, 7]] = torch.tensor([-1, -100])
    keep = labels >= 0
    z = features.clone()
    z[0] = torch.nan
    z.requires_grad_()
    loss = call(z, labels, *rows)
    torch.testing.assert_close(loss, call(features[keep], labels[keep], *rows))
    loss.backward()
    assert not z.grad[~keep].any()
    assert z.grad[keep].isfinite().all()
    assert z.grad[keep].any()


def test_without_a_pair_there_is_nothing(batch):
    features, _, weight = batch
    for labels in (torch.tensor([3]), torch.tensor([0, 1, 2]), torch.tensor([-1, -1])):
        x = features[: len(labels)].clone().requires_grad_()
        loss = supcon(x, labels)
        loss.backward()
        assert loss == 0
        assert not x.grad.any()
    x = features[:1].clone().requires_grad_()
    loss = prototype_supcon(x, torch.tensor([3]), weight, temperature=0.1)
    cosines = F.cosine_similarity(features[:1], weight) / 0.1  # CE on the cosines
    torch.testing.assert_close(loss, F.cross_entropy(cosines[None], torch.tensor([3])))


def test_small_temperatures_do_not_overflow(batch):
    features, labels, weight = batch
    for T in (1e-2, 1e-3):
        x = features.float().requires_grad_()
        loss = supcon(x, labels, temperature=T) + prototype_supcon(
            x, labels, weight.float(), temperature=T
        )
        loss.backward()
        want = supcon(features, labels, temperature=T) + prototype_supcon(
            features, labels, weight, temperature=T
        )
        torch.testing.assert_close(loss.double(), want, rtol=1e-4, atol=0)
        assert x.grad.isfinite().all()


def test_what_is_not_compared_stays_out_at_any_temperature():
    # The only other sample is opposite: its share of the sum is 1, however small e^{−1/τ} is.
    x = torch.tensor([[1.0, 0.0], [-2.0, 0.0], [0.0, 1.0]])
    for T in (1.0, 1e-3, 1e-9):
        loss = supcon(x, torch.tensor([0, 0, -1]), temperature=T)
        assert loss.item() == pytest.approx(0, abs=1e-6 / T)


def test_a_row_of_zeros_has_a_finite_gradient(batch):
    features, labels, _ = batch
    for relu in (False, True):
        x = features.clone()
        x[2] = 0 if not relu else -1
        x.requires_grad_()
        supcon(x, labels, relu=relu).backward()
        assert x.grad.abs().max() < 100


def test_gradients(batch):
    features, labels, weight = batch
    x, w = features.clone().requires_grad_(), weight.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: supcon(x, labels, temperature=0.3), x)
    assert torch.autograd.gradcheck(lambda x, w: prototype_supcon(x, labels, w), (x, w))


@pytest.mark.parametrize("relu", [False, True])
def test_conformance(relu):
    def bounded(features, labels, weight):  # supcon alone cannot know K
        return supcon(features, check_labels(labels, None, len(weight)), relu=relu)

    for K in (2, 5):
        check_loss(bounded, num_classes=K)
        check_loss(
            lambda features, labels, weight: prototype_supcon(features, labels, weight, relu=relu),
            num_classes=K,
        )


def test_errors(batch):
    features, labels, weight = batch
    for T in (0, -1.0, math.nan):
        with pytest.raises(InputError, match="temperature must be > 0"):
            supcon(features, labels, temperature=T)
    with pytest.raises(InputError, match="10 rows"):
        supcon(features, labels[:3])
    with pytest.raises(InputError, match=r"D = 6 as the features have.*\(5, 4\)"):
        prototype_supcon(features, labels, weight[:, :4])
    with pytest.raises(InputError, match="labels must be < num_classes = 5"):
        prototype_supcon(features, labels + 1, weight)
