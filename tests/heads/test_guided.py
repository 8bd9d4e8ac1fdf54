"""guided_head: the simplex ETF nearest to moving class means."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from moving_heads import OPTIMIZERS, digits_accuracy, works_everywhere
from scipy.linalg import orthogonal_procrustes
from torch import nn
from torch.nn import functional as F

from ncmethods._core import InputError
from ncmethods.features import capture
from ncmethods.frames import simplex_etf
from ncmethods.heads.classifier import Classifier
from ncmethods.heads.guided import guided_head
from ncmethods.heads.swap import swap_head
from ncmethods.testing import check_frame, check_head


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def plain(K=5, D=8, **options):
    """A float64 head on bare features, with its state in float64."""
    return guided_head(D, K, neck=None, **options).double()


def batch(N=40, K=5, D=8, dtype=torch.float64):
    return torch.randn(N, D, dtype=dtype), torch.arange(N) % K


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("neck", ["bn", "linear", None])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_rows_follow_and_stay_an_etf(optimizer, neck, dtype):
    model = Classifier(nn.Linear(6, 12), guided_head(12, 5, neck=neck)).to(dtype)
    head = model.head
    before = head.weight.clone()
    assert not any(p.shape == (5, 12) for p in head.parameters())
    step = OPTIMIZERS[optimizer](model.parameters())
    for _ in range(3):
        x, y = torch.randn(16, 6, dtype=dtype), torch.randint(5, (16,))
        step.zero_grad()
        out = model(x)
        head.observe(out.features, y)  # before the backward pass: it must not disturb it
        F.cross_entropy(out.logits, y).backward()
        step.step()
        check_frame(head.weight, cosine=-1 / 4)
    assert (head.weight - before).abs().max() > 0.05
    assert head.weight.dtype == head.means.dtype == dtype
    assert head.weight.grad is None


def test_class_means_on_an_etf_are_their_own_rows():
    target = 7 * simplex_etf(5, 8, dtype=torch.float64) + 3  # any length, any offset
    head = plain(pull=0, momentum=0, normalize=False)
    head.observe(target, torch.arange(5))
    torch.testing.assert_close(head.weight, (target - 3) / 7, rtol=0, atol=1e-12)
    torch.testing.assert_close(head.means, target)


@pytest.mark.parametrize(("K", "D"), [(5, 4), (5, 8), (3, 12)])
def test_the_rows_against_scipys_procrustes(K, D):
    """The rotation of a simplex onto the centred class means, another solver and another form."""
    x, y = batch(K=K, D=D)
    head = plain(K, D, pull=0, momentum=0)
    head.observe(x, y)
    u = x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True)
    means = np.stack([u[y.numpy() == k].mean(0) for k in range(K)])
    simplex = simplex_etf(K, D, dtype=torch.float64).numpy()
    R, _ = orthogonal_procrustes(simplex, means - means.mean(0))
    np.testing.assert_allclose(head.weight.numpy(), simplex @ R, rtol=0, atol=1e-10)


def test_moving_averages_against_a_loop():
    head = plain(K=4, D=6, momentum=0.8)
    means = np.full((4, 6), np.nan)
    for labels in ([0, 0, 1, -1], [1, 0, 0, 0], [-100, -1, -1, -1], [2, 1, 2, 2], []):
        x = torch.randn(len(labels), 6, dtype=torch.float64)
        if labels and labels[-1] == 2:
            x[-1, 0] = torch.inf  # a bad row leaves no trace
            labels = [*labels[:-1], 3]
        rows = head.weight.clone()
        head.observe(x, torch.tensor(labels, dtype=torch.int64))
        for k in range(4):
            mine = [
                v / np.linalg.norm(v)
                for v, c in zip(x.numpy(), labels)
                if c == k and np.isfinite(v).all()
            ]
            if mine:
                old = means[k] if np.isfinite(means[k]).all() else np.mean(mine, axis=0)
                means[k] = 0.8 * old + 0.2 * np.mean(mine, axis=0)
        np.testing.assert_allclose(head.means.numpy(), means, rtol=0, atol=1e-12)
        check_frame(head.weight, cosine=-1 / 3)
    assert np.isnan(means[3]).all()
    assert not torch.equal(rows, simplex_etf(4, 6, dtype=torch.float64))


def test_the_pull_holds_the_rows():
    x, y = batch()
    moved = []
    for pull in (1e-3, 1.0, 30.0, 1e9):
        torch.manual_seed(1)
        head = plain(pull=pull, momentum=0)
        before = head.weight.clone()
        head.observe(x, y)
        moved.append(float((head.weight - before).norm()))
    assert moved == sorted(moved, reverse=True)
    assert moved[0] > 1
    assert moved[-1] < 1e-6
    # it minimises cost + pull: no other isometry that we try does better
    head = plain(pull=0.4, momentum=0)
    before = head.weight.clone()
    head.observe(x, y)
    u = F.normalize(x)
    H = torch.stack([u[y == k].mean(0) for k in range(5)])
    H = (H - H.mean(0)) / (H - H.mean(0)).norm()

    def cost(rows):
        # ‖P − P₀‖² = (K−1)/K · ‖F − F₀‖²
        return (H - rows / 5**0.5).square().sum() + 0.2 * 0.8 * (rows - before).square().sum()

    best = cost(head.weight)
    for size in (1e-4, 1e-2, 1.0):
        for _ in range(50):
            A = size * torch.randn(8, 8, dtype=torch.float64)
            other = head.weight @ torch.matrix_exp(A - A.T)
            assert cost(other) > best - 1e-14
    assert cost(before) > best


def test_classes_that_were_not_seen():
    head = plain()
    before = head.weight.clone()
    head.observe(torch.randn(6, 8, dtype=torch.float64), torch.zeros(6).long())
    torch.testing.assert_close(head.weight, before, rtol=0, atol=1e-7)  # one class has no shape
    head.observe(torch.randn(6, 8, dtype=torch.float64), torch.arange(6) % 2)
    check_frame(head.weight, cosine=-1 / 4)
    assert head.means.isnan().all(1).tolist() == [False, False, True, True, True]
    apart = F.normalize(head.means[0] - head.means[1], dim=0)
    assert F.normalize(head.weight[0] - head.weight[1], dim=0) @ apart > 0.99


def test_the_gradient_through_the_rows():
    x, y = batch(N=12)
    start = plain(differentiable=True)
    start.observe(*batch())

    def loss(features, head=start):
        twin = copy.deepcopy(head)
        return twin.logits(features, y).square().sum()

    assert torch.autograd.gradcheck(loss, (x.requires_grad_(),))
    (whole,) = torch.autograd.grad(loss(x), x)
    held = copy.deepcopy(start)
    held.differentiable = False
    (part,) = torch.autograd.grad(loss(x, held), x)
    fixed = copy.deepcopy(held)
    fixed.observe(x, y)
    (want,) = torch.autograd.grad(fixed.logits(x).square().sum(), x)
    torch.testing.assert_close(part, want)
    assert (whole - part).abs().max() > 1e-3
    assert not start.weight.requires_grad
    # also where all singular values are equal
    vertices = simplex_etf(5, 8, dtype=torch.float64).requires_grad_()
    head = plain(differentiable=True, pull=0, momentum=0)
    grad = torch.autograd.grad(head.logits(vertices, torch.arange(5)).pow(3).sum(), vertices)[0]
    assert grad.isfinite().all()


def test_labels_in_the_forward_pass_look_first():
    x, y = batch()
    one, two = plain(), None
    two = copy.deepcopy(one)
    logits = one(x, y)
    two.observe(x, y)
    torch.testing.assert_close(logits, two(x))
    torch.testing.assert_close(one.weight, two.weight)


def test_nothing_moves_in_eval_mode():
    head = plain().eval()
    before = head.weight.clone()
    x, y = batch()
    assert torch.equal(head(x, y), head(x))
    head.observe(x, y)
    assert torch.equal(head.weight, before)
    assert head.means.isnan().all()


def test_maps():
    maps, y = torch.randn(3, 8, 2, 4, dtype=torch.float64), torch.randint(5, (3, 2, 4))
    one = plain()
    two = copy.deepcopy(one)
    one.observe(maps, y)
    two.observe(maps.permute(0, 2, 3, 1).reshape(-1, 8), y.flatten())
    torch.testing.assert_close(one.weight, two.weight)
    assert one(maps, y).shape == (3, 5, 2, 4)


@pytest.mark.parametrize("options", [{}, {"neck": None}, {"differentiable": True}])
def test_everywhere(options):
    def build():
        torch.manual_seed(3)
        head = guided_head(12, 5, **options)
        head.observe(torch.randn(30, 12), torch.arange(30) % 4)  # one class is still unseen
        return head

    works_everywhere(build)
    check_head(partial(guided_head, **options))
    head = build()
    state = copy.deepcopy(head.state_dict())
    assert set(state) >= {"weight", "means"}
    head.observe(torch.randn(30, 12), torch.arange(30) % 5)
    fresh = guided_head(12, 5, **options)
    fresh.load_state_dict(state)
    fresh.observe(*(two := (torch.randn(30, 12), torch.arange(30) % 5)))
    again = build()
    again.observe(*two)
    assert torch.equal(fresh.weight, again.weight)  # training goes on from the state


def test_compiled_code_takes_the_moved_rows():
    torch.compiler.reset()
    x, y = batch(dtype=torch.float32)
    head = guided_head(8, 5)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    compiled(x)
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(3):
            head.observe(head.embed(x), y)
            torch.testing.assert_close(compiled(x), head(x))


def test_somebodys_loop():
    net = swap_head(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), guided_head)
    before = net[1].weight.clone()
    x, y = torch.randn(12, 4), torch.arange(12) % 3
    with capture(net) as seen:
        loss = F.cross_entropy(net(x), y)
        net[1].observe(seen.features, y)
    loss.backward()
    assert (net[1].weight - before).abs().max() > 0.01
    check_frame(net[1].weight, cosine=-1 / 2)


def guided_step(body, x, y, head):
    return F.cross_entropy(head(body(x), y), y)


@pytest.mark.parametrize("differentiable", [False, True])
def test_digits(differentiable):
    head = guided_head(16, 10, differentiable=differentiable)
    assert digits_accuracy(head, guided_step) > 0.9
    check_frame(head.weight, cosine=-1 / 9)


def test_errors():
    x, y = torch.randn(6, 8), torch.arange(6) % 5
    head = guided_head(8, 5)
    for call, words in [
        (lambda: guided_head(8, 10), r"dim ≥ 9, got 8"),
        (lambda: guided_head(8, 5, momentum=1.0), r"momentum must lie in \[0, 1\)"),
        (lambda: guided_head(8, 5, pull=-1.0), "pull must be"),
        (lambda: guided_head(8, 5, neck="bm"), "Unknown neck"),
        (lambda: head.observe(x[:, :7], y), "D = 8"),
        (lambda: head.observe(x, y + 1), "num_classes = 5"),
        (lambda: head.observe(x, y.float()), "integers"),
        (lambda: head.observe(x, y[:5]), "6 rows"),
    ]:
        with pytest.raises(InputError, match=words):
            call()
    assert head.means.isnan().all()
