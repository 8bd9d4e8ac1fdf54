"""Separation: authors' values, the vertices of a simplex, invariances."""

import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity
from torch import nn

from ncmethods import frames, heads
from ncmethods._core import InputError
from ncmethods.ood.logit import MSP
from ncmethods.ood.separation import Separation

F64 = {"dtype": torch.float64}
FEATURES = torch.sin(torch.arange(1, 51, **F64)).reshape(10, 5)
WEIGHT = torch.cos(torch.arange(1, 16, **F64)).reshape(3, 5)
BIAS = torch.tensor([0.1, -0.2, 0.3], **F64)
# score_type "ours" of Wu et al.'s code on these tensors, float64
# https://github.com/Wuyingwen/Pursuing-Feature-Separation-for-OOD-Detection/blob/
# f041984a9e233fc8eac798cfe8297a7fa85e24ba/cifar10%20and%20cifar100/main.py
SCORES = [
    -2.3171466232152276, -2.833404667606615, -2.3501260001973687, -3.063665892006021,
    -2.4972230575684815, -2.290075597397498, -2.859519764142756, -2.274424216590259,
    -3.1004585262420656, -2.3348916566559637,
]  # fmt: skip


def linear(W, b=None):
    head = nn.Linear(W.shape[1], len(W), bias=b is not None).double()
    head.weight.data.copy_(W)
    if b is not None:
        head.bias.data.copy_(b)
    return head


def test_it_equals_the_authors_code():
    scorer = Separation.fit(head=linear(WEIGHT, BIAS))
    assert scorer(FEATURES).tolist() == pytest.approx(SCORES, rel=1e-13)
    logits = FEATURES @ WEIGHT.T + BIAS
    assert scorer(FEATURES, logits).tolist() == pytest.approx(SCORES, rel=1e-13)


def test_it_is_the_sum_of_cosines_and_the_confidence():
    logits = 5 * torch.randn(10, 3, **F64)
    cosines = cosine_similarity(FEATURES.numpy(), WEIGHT.numpy())
    want = MSP.fit()(None, logits) - torch.from_numpy(abs(cosines).sum(1))
    scorer = Separation.fit(head=linear(7 * WEIGHT, BIAS))
    torch.testing.assert_close(scorer(FEATURES, logits), want)
    torch.testing.assert_close(scorer(4 * FEATURES, logits), want)  # with these logits


def test_values_on_a_simplex():
    W = frames.simplex_etf(5, 7, **F64)
    outside = torch.linalg.svd(W)[2][-1]
    head = linear(W)
    scorer = Separation.fit(head=head)
    x = torch.stack((W[3], outside, torch.zeros(7, **F64)))
    p = head(W[3]).softmax(0).max().item()
    assert scorer(x).tolist() == pytest.approx([-2 - p, -0.2, -0.2], abs=1e-12)


def test_any_head_with_rows_will_do_and_none_is_refused():
    head = heads.etf_head(5, 3)
    assert Separation.fit(head=head)(FEATURES.float()).shape == (10,)
    with pytest.raises(InputError, match="needs the rows"):
        Separation.fit()
