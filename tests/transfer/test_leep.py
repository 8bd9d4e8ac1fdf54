"""LEEP, NCE and NLEEP against worked examples, limits and scikit-learn."""

import math

import numpy as np
import pytest
import torch
from scipy.special import xlogy
from sklearn.metrics import mutual_info_score

from ncmethods._core import InputError
from ncmethods.features import FeatureSet
from ncmethods.transfer.leep import leep, nce, nleep

P = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.1, 0.9]])
Y = torch.tensor([0, 0, 1, 1])


def random_probs(n=300, z=7, k=4, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, z, generator=rng, dtype=torch.float64).softmax(1),
        torch.randint(k, (n,), generator=rng),
    )


def test_worked_example_and_an_empty_source_class():
    assert float(leep(P, Y)) == pytest.approx(-0.3426157, abs=1e-7)  # sheet, golden 1
    wider = torch.cat([P, torch.zeros(4, 1)], 1)
    assert float(leep(wider, Y)) == float(leep(P, Y))


def test_leep_is_the_sum_over_samples_and_classes():
    p, y = random_probs()
    p, y = p.numpy(), y.numpy()
    joint = np.stack([p[y == c].sum(0) for c in range(4)]) / len(y)
    given = joint / joint.sum(0)
    want = np.mean([np.log(sum(given[y[i], z] * p[i, z] for z in range(7))) for i in range(len(y))])
    assert float(leep(torch.tensor(p), torch.tensor(y))) == pytest.approx(want, rel=1e-12)


def test_nce_is_the_conditional_entropy():
    z, y = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 1, 0, 0, 1, 1])
    one_hot = torch.eye(3)[z]
    assert float(nce(one_hot, y)) == pytest.approx(-math.log(2) / 3, abs=1e-12)  # golden 2
    assert float(leep(one_hot, y)) == pytest.approx(float(nce(one_hot, y)), abs=1e-12)
    p, y = random_probs()
    share = np.bincount(y.numpy()) / len(y)
    want = mutual_info_score(y.numpy(), p.argmax(1).numpy()) + xlogy(share, share).sum()
    assert float(nce(p, y)) == pytest.approx(want, rel=1e-9)


def test_invariances_and_gaps():
    p, y = random_probs()
    value = float(leep(p, y))
    assert float(leep(p[:, torch.randperm(7)], y)) == pytest.approx(value, rel=1e-12)
    assert float(leep(p, 3 - y)) == pytest.approx(value, rel=1e-12)  # other class names
    assert float(leep(p, 5 * y)) == pytest.approx(value, rel=1e-12)  # classes without samples
    assert float(leep(p.repeat(2, 1), y.repeat(2))) == pytest.approx(value, rel=1e-12)
    more = torch.cat([p, p[:9]]), torch.cat([y, -torch.ones(9).long()])
    assert float(leep(*more)) == pytest.approx(value, rel=1e-12)
    assert value <= 0
    assert float(leep(torch.eye(4)[y], y)) == 0.0  # the source knows the labels
    alone = torch.full((4, 2), 0.5)
    assert float(leep(alone, Y)) == pytest.approx(-math.log(2))  # and nothing of them


def test_nleep_is_leep_on_the_mixture_and_repeats():
    rng = torch.Generator().manual_seed(0)
    y = torch.arange(90) % 3
    apart = 20 * torch.eye(3, 8)[y] + torch.randn(90, 8, generator=rng)
    noise = torch.randn(90, 8, generator=rng)
    good, bad = (nleep(FeatureSet(x, y, 3), per_class=1) for x in (apart, noise))
    assert float(good) == pytest.approx(0.0, abs=1e-6)  # one component for each class
    assert float(bad) < -0.5
    data = FeatureSet(noise, y, 3)
    assert float(nleep(data, seed=1)) == float(nleep(data, seed=1))
    for constant in (torch.zeros(90, 8), torch.ones(90, 8)):
        value = float(nleep(FeatureSet(constant, y, 3), per_class=1))
        assert value == pytest.approx(-math.log(3), abs=1e-6)


def test_errors():
    with pytest.raises(InputError, match="sum to one"):
        leep(2 * P, Y)
    with pytest.raises(InputError, match="sum to one"):
        leep(torch.full_like(P, torch.nan), Y)
    with pytest.raises(InputError, match=r"Of logits take the softmax"):
        nce(torch.tensor([[2.0, -1.0]]), torch.tensor([0]))
    with pytest.raises(InputError, match="no labelled row"):
        leep(P, -torch.ones(4).long())
    with pytest.raises(InputError, match=r"\[N, Z\]"):
        leep(P[0], Y)
    with pytest.raises(InputError):
        leep(P, Y[:2])
    few = FeatureSet(torch.randn(8, 3), torch.arange(8) % 4, 4)
    with pytest.raises(InputError, match="fits 20 Gaussians and got 8"):
        nleep(few)
    with pytest.raises(InputError, match="energy is a share"):
        nleep(few, energy=1.5)
