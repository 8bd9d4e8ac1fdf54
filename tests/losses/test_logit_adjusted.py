import math

import pytest
import torch
from scipy.optimize import minimize
from torch.nn import functional as F

from ncmethods._core import InputError
from ncmethods.losses import logit_adjusted

f64 = torch.float64
COUNTS = torch.tensor([500, 120, 33, 4])


@pytest.fixture
def batch():
    noise = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(10, 4, generator=noise, dtype=f64)
    return logits.requires_grad_(), torch.tensor([0, 0, 0, 0, 0, 1, 1, 2, 2, 3])


def same_with_gradient(got, want, logits):
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 2.5])
def test_it_is_cross_entropy_of_shifted_logits(batch, tau):
    logits, labels = batch
    prior = COUNTS.double() / COUNTS.sum()
    want = F.cross_entropy(logits + tau * prior.log(), labels)
    same_with_gradient(logit_adjusted(logits, labels, COUNTS, tau=tau), want, logits)


def test_only_the_ratios_of_the_counts_matter(batch):
    logits, labels = batch
    same_with_gradient(
        logit_adjusted(logits, labels, COUNTS), logit_adjusted(logits, labels, COUNTS * 37), logits
    )
    same_with_gradient(
        logit_adjusted(logits, labels, torch.full((4,), 9)), F.cross_entropy(logits, labels), logits
    )


def test_it_is_balanced_softmax_and_arb(batch):
    # Golden check 6: Ren et al. 2020 and Xie et al. 2023, written as they print them.
    logits, labels = batch
    n = COUNTS.double()
    softmax = n * logits.exp() / (n * logits.exp()).sum(1, keepdim=True)
    balanced = -softmax.gather(1, labels[:, None]).log().mean()
    own = logits.gather(1, labels[:, None])
    ratio = n / n[labels][:, None]
    arb = -(own.exp() / (ratio * logits.exp()).sum(1, keepdim=True)).log().mean()
    loss = logit_adjusted(logits, labels, COUNTS)
    same_with_gradient(loss, balanced, logits)
    same_with_gradient(loss, arb, logits)


def test_batch_counts_drop_absent_classes(batch):
    # ARB with batch counts: cross-entropy over the classes that are present, plus log b_c.
    logits, _ = batch
    labels = torch.tensor([0, 0, 0, 3, 3, 0, 0, 0, 0, 3])
    b = labels.bincount(minlength=4)
    want = F.cross_entropy(logits[:, [0, 3]] + b[[0, 3]].double().log(), (labels == 3).long())
    loss = logit_adjusted(logits, labels, b)
    same_with_gradient(loss, want, logits)
    (grad,) = torch.autograd.grad(loss, logits)
    assert not grad[:, [1, 2]].any()


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_fisher_consistency(tau):
    # Golden check 7: π = (.9, .1), p(y|x) = (.8, .2). The minimiser of the expected loss has
    # f = log p(y|x) − τ log π: it predicts class 1 at τ = 1 and class 0 with plain CE.
    prior, posterior = torch.tensor([0.9, 0.1], dtype=f64), (0.8, 0.2)

    def expected(gap):
        logits = torch.tensor([[0.0, gap[0]]], dtype=f64)
        return sum(
            p * float(logit_adjusted(logits, torch.tensor([y]), prior, tau=tau))
            for y, p in enumerate(posterior)
        )

    gap = minimize(expected, [0.0], tol=1e-12).x[0]
    assert gap == pytest.approx(math.log(0.2 / 0.8) - tau * math.log(0.1 / 0.9), abs=1e-5)
    if tau:
        assert gap == pytest.approx(math.log(2.25), abs=1e-5)


def test_errors(batch):
    logits, labels = batch
    for bad, words in [
        ((logits[0], labels[:1], COUNTS), "2-D tensor"),
        ((logits.long(), labels, COUNTS), "floating"),
        ((logits, labels[:4], COUNTS), "10 rows"),
        ((logits, labels.double(), COUNTS), "integers"),
        ((logits, labels + 1, COUNTS), "labels must be < num_classes = 4"),
        ((logits, labels, COUNTS[:3]), "length K = 4"),
        ((logits, labels, -COUNTS), "≥ 0"),
        ((logits, labels, 0 * COUNTS), "not all zero"),
    ]:
        with pytest.raises(InputError, match=words):
            logit_adjusted(*bad)
