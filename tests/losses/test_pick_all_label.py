from itertools import combinations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ncmethods._core import InputError, check_labels
from ncmethods.frames import simplex_etf
from ncmethods.losses.mixing import mixed
from ncmethods.losses.pick_all_label import pick_all_label
from ncmethods.testing import check_loss

f64 = torch.float64
LOGITS = (4 * torch.sin(torch.arange(60, dtype=f64) ** 2 * 0.37)).reshape(12, 5)
ROWS = ["10000", "11000", "00111", "11111", "00001", "01010", "00000", "10001", "00100", "01110",
        "00011", "01000"]  # fmt: skip
MULTI = torch.tensor([[int(c) for c in row] for row in ROWS])


@pytest.mark.parametrize("normalize", [False, True])
def test_it_is_the_sum_over_positive_labels(normalize):
    total = 0.0
    for z, row in zip(LOGITS, MULTI):
        own = [F.cross_entropy(z[None], torch.tensor([c])).item() for c in row.nonzero().flatten()]
        total += (np.mean(own) if normalize and own else np.sum(own)) / 12
    got = pick_all_label(LOGITS, MULTI, normalize=normalize)
    assert got.item() == pytest.approx(total, rel=1e-12)


def test_gradient_is_labels_times_probability_less_labels():
    # ∂/∂z of m·logsumexp(z) − Σ_{c∈S} z_c with m = |S| labels: m p − y.
    z = LOGITS.clone().requires_grad_()
    (grad,) = torch.autograd.grad(pick_all_label(z, MULTI), z)
    want = (MULTI.sum(1, keepdim=True) * LOGITS.softmax(1) - MULTI) / 12
    torch.testing.assert_close(grad, want, rtol=1e-12, atol=1e-14)


def test_one_positive_label_is_cross_entropy():
    labels = torch.arange(12) % 5
    for normalize in (False, True):
        got = pick_all_label(LOGITS, F.one_hot(labels, 5), normalize=normalize)
        torch.testing.assert_close(got, F.cross_entropy(LOGITS, labels), rtol=1e-12, atol=0)


def test_dtypes_of_labels_agree():
    want = pick_all_label(LOGITS, MULTI)
    for dtype in (torch.bool, torch.uint8, torch.int32, torch.float32, f64):
        assert pick_all_label(LOGITS, MULTI.to(dtype)) == want


def test_best_probability_is_shared_by_the_positive_labels():
    # The smallest value with m positive labels is m log m, at p = 1/m on each.
    for m in range(1, 5):
        row = (torch.arange(5) < m).to(f64)[None]
        got = pick_all_label(200 * row, row)
        assert got.item() == pytest.approx(m * np.log(m), abs=1e-9)
        z = (200 * row).requires_grad_()
        (grad,) = torch.autograd.grad(pick_all_label(z, row), z)
        assert grad.abs().max() < 1e-9


def test_tag_wise_average():
    """Li et al.: the best feature of several labels is a scaled mean of single-label ones."""
    W = simplex_etf(4, 3, dtype=f64, generator=torch.Generator().manual_seed(0))
    pairs = torch.tensor(list(combinations(range(4), 2)))
    labels = torch.cat([torch.eye(4), torch.zeros(6, 4).scatter(1, pairs, 1.0)])
    features = torch.zeros(10, 3, dtype=f64, requires_grad=True)
    optimizer = torch.optim.LBFGS([features], max_iter=300, tolerance_grad=1e-12)

    def closure():
        optimizer.zero_grad()
        loss = 10 * pick_all_label(features @ W.T, labels) + 0.05 * features.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    single, double = features.detach()[:4], features.detach()[4:]
    sums = single[pairs].sum(1)
    cosine = F.cosine_similarity(double, sums)
    scale = (double * sums).sum(1) / sums.square().sum(1)
    torch.testing.assert_close(cosine, torch.ones(6, dtype=f64), rtol=0, atol=1e-8)
    torch.testing.assert_close(scale, scale[:1].expand(6), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        F.cosine_similarity(single, W), torch.ones(4, dtype=f64), rtol=0, atol=1e-8
    )


def test_rows_left_out_and_rows_without_labels():
    out = MULTI.clone()
    out[0] = -1
    out[3, 2] = -1  # one entry is enough
    rest = [i for i in range(12) if i not in (0, 3)]
    z = LOGITS.clone().requires_grad_()
    got = pick_all_label(z, out)
    torch.testing.assert_close(got, pick_all_label(z[rest], MULTI[rest]), rtol=1e-12, atol=0)
    (grad,) = torch.autograd.grad(got, z)
    assert not grad[[0, 3, 6]].any()  # row 6 has no label: it counts, and pulls nothing
    rest.remove(6)
    torch.testing.assert_close(10 / 9 * got, pick_all_label(z[rest], MULTI[rest]))
    none = pick_all_label(z, -torch.ones_like(MULTI))
    assert none == 0
    assert not torch.autograd.grad(none, z)[0].any()
    for normalize in (False, True):  # nothing looks at values off the CPU: meta has none
        value = pick_all_label(LOGITS.to("meta"), MULTI.to("meta"), normalize=normalize)
        assert value.shape == ()


@pytest.mark.parametrize("normalize", [False, True])
def test_gradient(normalize):
    z = (LOGITS[:4] / 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pick_all_label(x, MULTI[:4], normalize=normalize), z)


def test_conformance():
    """The checks of a single-label loss, with class indices as multi-hot rows."""

    def loss(logits, labels):
        labels = check_labels(labels, len(logits), logits.shape[1])
        rows = F.one_hot(labels.clamp(min=0), logits.shape[1])
        return pick_all_label(logits, torch.where(labels[:, None] < 0, -1, rows))

    check_loss(loss)


def test_order_and_numbering():
    value = pick_all_label(LOGITS, MULTI)
    samples, classes = torch.arange(12).roll(5), torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(pick_all_label(LOGITS[samples], MULTI[samples]), value)
    torch.testing.assert_close(pick_all_label(LOGITS[:, classes], MULTI[:, classes]), value)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = pick_all_label(LOGITS.float(), MULTI)
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(value.item(), rel=1e-5)
    half = pick_all_label(LOGITS.bfloat16(), MULTI)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(value.item(), rel=0.02)


def test_mixing():
    got = mixed(pick_all_label, MULTI, MULTI.roll(1, 0), 0.3, logits=LOGITS)
    soft = 0.3 * MULTI.to(f64) + 0.7 * MULTI.to(f64).roll(1, 0)
    torch.testing.assert_close(got, F.cross_entropy(LOGITS, soft), rtol=1e-12, atol=0)


def test_errors():
    for labels, words in [
        (torch.arange(12) % 5, "F.one_hot"),
        (MULTI[:, :4], r"multi-hot \(12, 5\)"),
        (MULTI.tolist(), "got list"),
        (2 * MULTI, "must hold 0 and 1"),
        (0.3 * MULTI, "mix the losses"),
        (MULTI * float("nan"), "must hold 0 and 1"),
    ]:
        with pytest.raises(InputError, match=words):
            pick_all_label(LOGITS, labels)
