import math
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ncmethods._core import InputError
from ncmethods.frames import simplex_etf
from ncmethods.losses.bcl import balanced_contrastive
from ncmethods.losses.supcon import prototype_supcon
from ncmethods.testing import check_loss

f64 = torch.float64


def waves(*shape, phase=0.0):
    i = torch.arange(math.prod(shape), dtype=f64)
    return (torch.sin(1.7 * i + phase) + torch.cos(0.31 * i * i + phase)).reshape(shape)


@pytest.fixture
def batch():
    noise = torch.Generator().manual_seed(1)
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 3, 3, 4])
    features = torch.randn(10, 6, generator=noise, dtype=f64)
    return features, labels, torch.randn(5, 6, generator=noise, dtype=f64)


def by_loops(features, labels, rows, T):
    z = F.normalize(torch.cat([features, rows]), dim=1).numpy()
    owners = labels.tolist() + list(range(len(rows)))
    losses = []
    for i, y in enumerate(labels.tolist()):
        others = [k for k in range(len(z)) if k != i]
        total = 0.0
        for c in set(owners):  # mean of e^s over each class, without i itself
            members = [math.exp(z[i] @ z[k] / T) for k in others if owners[k] == c]
            total += sum(members) / len(members)
        positives = [k for k in others if owners[k] == y]
        losses.append(-np.mean([z[i] @ z[p] / T - math.log(total) for p in positives]))
    return np.mean(losses)


@pytest.mark.parametrize("temperature", [0.07, 0.5, 2.0])
def test_it_equals_the_loops(batch, temperature):
    got = balanced_contrastive(*batch, temperature=temperature)
    assert got.item() == pytest.approx(by_loops(*batch, temperature), rel=1e-12)


# FlamieZhu/Balanced-Contrastive-Learning f72d070, loss/contrastive.py (BalSCL), run once in
# float64: value, norm of the gradient in the views, and in the prototypes. https://github.com/FlamieZhu/
# Balanced-Contrastive-Learning/blob/f72d0703794bcec8b00da86774c9d780dc721701/loss/contrastive.py
@pytest.mark.parametrize(
    ("T", "value", "views", "rows"),
    [
        (0.07, 12.055863395631215, 1.5937556754072162, 0.6655611769449092),
        (0.1, 8.377146621245542, 1.0954235477904546, 0.4017704544375786),
        (0.5, 2.292639692716205, 0.20349510920491698, 0.05779699399783914),
    ],
)
def test_values_of_the_authors_code(T, value, views, rows):
    x = waves(7, 2, 5)
    x = torch.cat([x[:, 0], x[:, 1]]).requires_grad_()
    w = waves(5, 5, phase=1.0).requires_grad_()
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 0]).repeat(2)
    loss = balanced_contrastive(x, labels, w, temperature=T)
    loss.backward()
    assert loss.item() == pytest.approx(value, rel=1e-12)
    assert x.grad.norm().item() == pytest.approx(views, rel=1e-10)
    assert w.grad.norm().item() == pytest.approx(rows, rel=1e-10)


@pytest.mark.parametrize("T", [0.1, 1.0])
@pytest.mark.parametrize("counts", [(3, 3, 3, 3), (20, 5, 2, 1)])
def test_at_a_collapsed_simplex(T, counts):
    # Means over classes: e^{1/T} for its own, e^{−1/((K−1)T)} for each other one.
    K = 4
    frame = simplex_etf(K, 6, dtype=f64)
    labels = torch.arange(K).repeat_interleave(torch.tensor(counts))
    x, w = frame[labels].requires_grad_(), frame.clone().requires_grad_()
    loss = balanced_contrastive(x, labels, w, temperature=T)
    want = math.log(1 + (K - 1) * math.exp(-K / ((K - 1) * T)))
    assert loss.item() == pytest.approx(want, rel=1e-12)
    # Stationary for any counts where the anchors are balanced too, and else for equal ones.
    by_class = balanced_contrastive(x, labels, w, temperature=T, balance="batch")
    torch.testing.assert_close(by_class, loss)
    with_prototypes = prototype_supcon(x, labels, w, temperature=T)
    steep = [
        max(g.abs().max().item() for g in torch.autograd.grad(value, (x, w)))
        for value in (by_class, loss, with_prototypes)
    ]
    assert steep[0] < 1e-13
    equal = len(set(counts)) == 1
    assert (steep[1] < 1e-13) == equal
    assert (steep[2] < 1e-13) == equal


def test_batch_balance_is_the_mean_over_classes(batch):
    features, labels, weight = batch
    z = F.normalize(torch.cat([features, weight]), dim=1)
    s, owner = z[:10] @ z.T / 0.1, torch.cat([labels, torch.arange(5)])
    member = F.one_hot(owner).double()  # [15, 5]
    e = s.exp() * (1 - torch.eye(10, 15, dtype=f64))
    a = member.sum(0) - F.one_hot(labels, 5)  # entries of each class without i
    log_total = (e @ member / a).sum(1).log()
    positive = (labels[:, None] == owner) & ~torch.eye(10, 15, dtype=torch.bool)
    each = log_total - (s * positive).sum(1) / positive.sum(1)
    classes = [0, 1, 3, 4]
    want = torch.stack([each[labels == c].mean() for c in classes]).mean()
    got = balanced_contrastive(features, labels, weight, balance="batch")
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(balanced_contrastive(features, labels, weight), each.mean())


def test_one_sample_of_each_class(batch):
    features, _, weight = batch
    labels = torch.arange(5)
    # b' = 2: own class has 1 entry left, others weigh ½ each of 2.
    z, p = F.normalize(features[:5], dim=1), F.normalize(weight, dim=1)
    e = torch.exp(torch.cat([z @ z.T, z @ p.T], 1) / 0.1)
    cls = torch.arange(5).repeat(2)
    same = labels[:, None] == cls
    total = (e * ~same).sum(1) / 2 + torch.diagonal(e[:, 5:])
    want = (total.log() - (z * p).sum(1) / 0.1).mean()
    got = balanced_contrastive(features[:5], labels, weight)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_invariance_to_length(batch):
    features, labels, weight = batch
    size = torch.rand(10, 1, generator=torch.Generator().manual_seed(3), dtype=f64) * 50 + 0.1
    one = balanced_contrastive(features, labels, weight)
    torch.testing.assert_close(
        balanced_contrastive(size * features, labels, size[:5] * weight), one
    )


def test_ignored_rows_leave_no_trace(batch):
    features, labels, weight = batch
    labels = labels.clone()
    labels[[0, 7]] = torch.tensor([-1, -100])
    keep = labels >= 0
    z = features.clone()
    z[7] = torch.inf
    z.requires_grad_()
    loss = balanced_contrastive(z, labels, weight)
    torch.testing.assert_close(loss, balanced_contrastive(features[keep], labels[keep], weight))
    loss.backward()
    assert not z.grad[~keep].any()
    assert z.grad[keep].isfinite().all()


def test_nothing_labelled_is_zero(batch):
    features, _, weight = batch
    x = features.clone().requires_grad_()
    loss = balanced_contrastive(x, torch.full((10,), -1), weight)
    loss.backward()
    assert loss == 0
    assert not x.grad.any()


def test_small_temperature(batch):
    features, labels, weight = batch
    x = features.float().requires_grad_()
    loss = balanced_contrastive(x, labels, weight.float(), temperature=1e-3)
    loss.backward()
    want = balanced_contrastive(features, labels, weight, temperature=1e-3)
    torch.testing.assert_close(loss.double(), want, rtol=1e-4, atol=0)
    assert x.grad.isfinite().all()


def test_gradients(batch):
    features, labels, weight = batch
    x, w = features.clone().requires_grad_(), weight.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: balanced_contrastive(x, labels, w), (x, w))


@pytest.mark.parametrize("K", [2, 5])
@pytest.mark.parametrize("balance", ["none", "batch"])
def test_conformance(K, balance):
    check_loss(partial(balanced_contrastive, balance=balance), num_classes=K)


def test_errors(batch):
    features, labels, weight = batch
    with pytest.raises(InputError, match="temperature must be > 0"):
        balanced_contrastive(features, labels, weight, temperature=0)
    with pytest.raises(InputError, match="Unknown balance 'global'"):
        balanced_contrastive(features, labels, weight, balance="global")
    with pytest.raises(InputError, match="same projection"):
        balanced_contrastive(features, labels, weight[:, :3])
    with pytest.raises(InputError, match="labels must be < num_classes = 5"):
        balanced_contrastive(features, labels + 1, weight)
