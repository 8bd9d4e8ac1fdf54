"""NCI: golden value, numpy, and what changes nothing."""

import numpy as np
import pytest
import torch
from test_feature_scorers import case
from torch import nn

from ncmethods._core import InputError
from ncmethods.features import FeatureSet
from ncmethods.ood.nci import NCI

F64 = {"dtype": torch.float64}


def diagonal():
    head = nn.Linear(2, 2, bias=False).double()
    head.weight.data.copy_(torch.diag(torch.tensor([2.0, 1.0])))
    train = FeatureSet(torch.tensor([[1, 1], [-1, -1]], **F64), torch.tensor([0, 1]), 2)
    return train, head


def test_golden_value_and_the_mean():
    train, head = diagonal()
    scorer = NCI.fit(train, head, alpha=0.1)
    assert float(scorer(torch.tensor([[3, 4]], **F64))) == pytest.approx(-1.9, rel=1e-12)
    assert float(scorer(torch.zeros(1, 2, **F64))) == 0
    moved = FeatureSet(train.features + 2, train.labels, 2)
    at_mean = NCI.fit(moved, head, alpha=0.1)(torch.full((1, 2), 2, **F64))
    assert float(at_mean) == pytest.approx(-0.4)  # −α‖h‖₁


@pytest.mark.parametrize("alpha", [0.0, 1e-4, 0.3])
def test_is_the_formula_in_numpy(alpha):
    train, head, q = case()
    W, b = head.weight.detach().numpy(), head.bias.detach().numpy()
    mu = train.features.numpy().mean(0)
    want = []
    for h in q.numpy():
        w = W[np.argmax(W @ h + b)]
        want.append(-w @ (h - mu) / np.linalg.norm(h - mu) - alpha * np.abs(h).sum())
    np.testing.assert_allclose(NCI.fit(train, head, alpha=alpha)(q), want, rtol=1e-12)


def test_mean_is_over_samples_not_classes():
    train, head, _ = case()
    keep = train.labels != 2
    keep[2] = True  # one sample of class 2
    tail = FeatureSet(train.features[keep], train.labels[keep], 4)
    torch.testing.assert_close(NCI.fit(tail, head).center, tail.features.mean(0))


def test_without_norm_the_distance_from_the_mean_plays_no_part():
    train, head, q = case()
    scorer = NCI.fit(train, head, alpha=0)
    mu, logits = scorer.center, head(q).detach()
    torch.testing.assert_close(scorer(mu + 7 * (q - mu), logits), scorer(q, logits))
    order = torch.tensor([2, 0, 3, 1])
    named = nn.Linear(8, 4).double()
    named.weight.data.copy_(head.weight[order])
    named.bias.data.copy_(head.bias[order])
    torch.testing.assert_close(NCI.fit(train, named, alpha=0)(q), scorer(q))


@pytest.mark.parametrize("alpha", [-1.0, float("nan")])
def test_alpha_is_checked(alpha):
    with pytest.raises(InputError, match="alpha"):
        NCI.fit(*diagonal(), alpha=alpha)
