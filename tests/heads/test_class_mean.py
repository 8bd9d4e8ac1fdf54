"""class_mean_head: moving class means as rows."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from moving_heads import OPTIMIZERS, digits_accuracy, works_everywhere
from sklearn.neighbors import NearestCentroid
from torch import nn
from torch.nn import functional as F

from ncmethods._core import InputError
from ncmethods.features import capture
from ncmethods.heads.class_mean import class_mean_head
from ncmethods.heads.classifier import Classifier
from ncmethods.heads.swap import swap_head
from ncmethods.testing import check_frame, check_head


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("neck", ["bn", "linear", None])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_rows_are_unit_class_means_and_no_optimizer_sees_them(optimizer, neck, dtype):
    head = class_mean_head(12, 5, neck=neck, momentum=0)
    model = Classifier(nn.Linear(6, 12), head).to(dtype)
    assert not any(p.shape == (5, 12) for p in head.parameters())
    step = OPTIMIZERS[optimizer](model.parameters())
    for _ in range(3):
        x, y = torch.randn(20, 6, dtype=dtype), torch.arange(20) % 5
        step.zero_grad()
        out = model(x)
        head.observe(out.features, y)  # before the backward pass: it must not disturb it
        F.cross_entropy(out.logits, y).backward()
        step.step()
        check_frame(head.weight)
        u = F.normalize(out.features.detach())
        want = torch.stack([u[y == k].mean(0) for k in range(5)])
        torch.testing.assert_close(head.means, want)
        torch.testing.assert_close(head.weight, F.normalize(want))
    assert head.weight.dtype == dtype


@pytest.mark.parametrize("center", [False, True])
def test_moving_averages_against_a_loop(center):
    head = class_mean_head(6, 4, momentum=0.7, center=center).double()
    means, first = np.full((4, 6), np.nan), head.weight.clone()
    for labels in ([0, 0, 1, -1], [1, 0, 0, 0], [-100, -1, -1, -1], [2, 1, 2, 2], []):
        x = torch.randn(len(labels), 6, dtype=torch.float64)
        head.observe(x, torch.tensor(labels, dtype=torch.int64))
        for k in range(4):
            mine = [v / np.linalg.norm(v) for v, c in zip(x.numpy(), labels) if c == k]
            if mine:
                old = means[k] if np.isfinite(means[k]).all() else np.mean(mine, axis=0)
                means[k] = 0.7 * old + 0.3 * np.mean(mine, axis=0)
        seen = np.isfinite(means).all(1)
        rows = means[seen] - (means[seen].mean(0) if center else 0)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        np.testing.assert_allclose(head.means.numpy(), means, rtol=0, atol=1e-12)
        np.testing.assert_allclose(head.weight.numpy()[seen], rows, rtol=0, atol=1e-12)
        assert np.array_equal(head.weight.numpy()[~seen], first.numpy()[~seen])
    assert seen.tolist() == [True, True, True, False]


def test_decisions_against_sklearns_nearest_centroid():
    """On unit features whose class means have one length, the largest cosine is the nearest."""
    g = torch.Generator().manual_seed(1)
    centre = torch.eye(4, 8, dtype=torch.float64)
    noise = 0.4 * torch.randn(5, 8, generator=g, dtype=torch.float64)
    signs = torch.cat([noise, -noise])  # the same cloud, in mirrored pairs, round each centre
    x = F.normalize((centre[:, None] + signs * (1 - centre.sum(0))).flatten(0, 1))
    y = torch.arange(4).repeat_interleave(10)
    head = class_mean_head(8, 4, momentum=0).double()
    head.observe(x, y)
    test = torch.randn(200, 8, generator=g, dtype=torch.float64)
    torch.testing.assert_close(head.means.norm(dim=1), head.means.norm(dim=1)[:1].expand(4))
    reference = NearestCentroid().fit(x.numpy(), y.numpy()).predict(F.normalize(test).numpy())
    assert head.eval()(test).argmax(1).tolist() == reference.tolist()


def test_one_class_centred_has_no_direction():
    head = class_mean_head(6, 4, center=True).double()
    before = head.weight.clone()
    head.observe(torch.randn(5, 6, dtype=torch.float64), torch.zeros(5).long())
    assert torch.equal(head.weight, before)


def test_labels_in_the_forward_pass_look_first_and_eval_mode_does_not():
    x, y = torch.randn(20, 8), torch.arange(20) % 5
    one = class_mean_head(8, 5)
    two = copy.deepcopy(one)
    logits = one(x, y)
    two.observe(x, y)
    assert torch.equal(logits, two(x))
    two.eval()
    kept = two.weight.clone()
    two(torch.randn(20, 8), y)
    two.observe(torch.randn(20, 8), y)
    assert torch.equal(two.weight, kept)


@pytest.mark.parametrize("options", [{}, {"neck": "bn"}, {"center": True, "dim": 12}])
def test_everywhere(options):
    def build():
        torch.manual_seed(3)
        head = class_mean_head(12, 5, **options)
        head.observe(torch.randn(30, 12), torch.arange(30) % 4)  # one class is still unseen
        return head

    works_everywhere(build)
    check_head(partial(class_mean_head, **{k: v for k, v in options.items() if k != "dim"}))


def test_somebodys_loop_with_more_classes_than_dimensions():
    net = swap_head(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 9)), class_mean_head)
    x, y = torch.randn(18, 4), torch.arange(18) % 9
    with capture(net) as seen:
        loss = F.cross_entropy(net(x), y)
        net[1].observe(seen.features, y)
    loss.backward()
    assert net[1].weight.shape == (9, 3)
    assert net[1].means.isfinite().all()


@pytest.mark.parametrize("center", [False, True])
def test_digits(center):
    head = class_mean_head(16, 10, neck="bn", center=center)
    step = lambda body, x, y, head: F.cross_entropy(head(body(x), y), y)  # noqa: E731
    assert digits_accuracy(head, step) > 0.9


def test_errors():
    x, y = torch.randn(6, 8), torch.arange(6) % 5
    head = class_mean_head(8, 5)
    for call, words in [
        (lambda: class_mean_head(8, 5, momentum=-0.1), r"momentum must lie in \[0, 1\)"),
        (lambda: class_mean_head(8, 1), "num_classes"),
        (lambda: class_mean_head(8, 5, dim=4), "Without a neck"),
        (lambda: head.observe(x[:, :7], y), "D = 8"),
        (lambda: head.observe(x, y + 1), "num_classes = 5"),
        (lambda: head.observe(x, y.float()), "integers"),
    ]:
        with pytest.raises(InputError, match=words):
            call()
