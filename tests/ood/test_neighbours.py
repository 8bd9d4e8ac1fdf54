"""KNN and NNGuide: golden values, scikit-learn, digits near the bank, chunks."""

import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from test_feature_scorers import case
from torch.nn import functional as F

from ncmethods._core import InputError
from ncmethods.features import FeatureSet
from ncmethods.ood import neighbours
from ncmethods.ood.neighbours import KNN, NNGuide

F64 = {"dtype": torch.float64}


def degrees(*angles):
    a = torch.tensor(angles, **F64) * math.pi / 180
    return torch.stack((a.cos(), a.sin()), 1)


def test_golden_values():
    train = FeatureSet(degrees(0, 90, 180) * torch.tensor([[1], [5], [0.1]], **F64), None, 2)
    q = degrees(60)
    assert float(KNN.fit(train, k=1)(q)) == pytest.approx(2 * math.sin(math.pi / 12), rel=1e-12)
    assert float(KNN.fit(train, k=2)(q)) == pytest.approx(1, rel=1e-12)
    assert float(KNN.fit(train, k=3)(q)) == pytest.approx(3**0.5, rel=1e-12)
    torch.testing.assert_close(KNN.fit(train, k=2)(100 * q), KNN.fit(train, k=2)(q))
    assert float(KNN.fit(train, k=3)(torch.zeros(1, 2, **F64))) == pytest.approx(1)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("k", [1, 7, 300])
def test_is_scikit_learns(k, normalize):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(300, 5, generator=rng, **F64) + 2
    q = torch.cat((torch.randn(40, 5, generator=rng, **F64), x[:3]))
    unit = lambda a: F.normalize(a, dim=1) if normalize else a  # noqa: E731
    found = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(unit(x).numpy())
    want = found.kneighbors(unit(q).numpy())[0][:, -1]
    got = KNN.fit(FeatureSet(x, None, 2), k=k, normalize=normalize)(q)
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-7)  # theirs cancels at the bank


def test_a_small_distance_keeps_its_digits():
    """To the rounding of float32; from its product, √(2 − 2s), it would be known to 3e-4."""
    train = FeatureSet(degrees(0, 90, 180).float(), None, 2)
    for angle in (1e-2, 1e-4, 1e-6):
        q = torch.tensor([[1.0, angle]])
        want = 2 * math.sin(math.atan(angle) / 2)
        assert float(KNN.fit(train, k=1)(q)) == pytest.approx(want, abs=1e-7)
    assert float(KNN.fit(train, k=1)(torch.tensor([[9.0, 0.0]]))) == pytest.approx(0, abs=1e-7)


def test_raw_distances_far_from_zero():
    """Products of rows at 1000 lose the neighbours in float32 unless they are centred."""
    rng = torch.Generator().manual_seed(0)
    x, q = (1000 + torch.randn(n, 6, generator=rng) for n in (400, 30))
    want = torch.cdist(q.double(), x.double()).kthvalue(5, dim=1)[0]
    got = KNN.fit(FeatureSet(x, None, 2), k=5, normalize=False)(q)
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("cls", [KNN, NNGuide])
def test_chunks_are_the_whole_and_bound_the_memory(cls, monkeypatch):
    train, head, _ = case()
    q = torch.randn(50, 8, generator=torch.Generator().manual_seed(3), **F64)
    scorer = cls.fit(train, head, k=4)
    want, sizes = scorer(q), []
    monkeypatch.setattr(neighbours, "_CELLS", 7 * 40 + 5)
    split = torch.split

    def watched(queries, rows):
        sizes.append(rows)
        return split(queries, rows)

    monkeypatch.setattr(torch, "split", watched)
    torch.testing.assert_close(scorer(q), want)
    assert sizes == [7]
    monkeypatch.setattr(neighbours, "_CELLS", 1)  # a bank larger than the bound
    torch.testing.assert_close(scorer(q), want)


def test_the_bank_is_kept_as_precise_as_the_features():
    train, head, _ = case(torch.float32)
    assert KNN.fit(train, k=2).bank.dtype == torch.float32
    assert NNGuide.fit(train, head, k=2).bank.dtype == torch.float32


def test_nnguide_is_the_formula_in_numpy():
    train, head, q = case()
    W, b = head.weight.detach().numpy(), head.bias.detach().numpy()
    energy = lambda h: np.log(np.exp(W @ h + b).sum())  # noqa: E731
    bank = [energy(h) * h / np.linalg.norm(h) for h in train.features.numpy()]
    for k in (1, 5, 40):
        want = []
        for h in q.numpy():
            likeness = sorted((g @ h / np.linalg.norm(h) for g in bank), reverse=True)
            want.append(-energy(h) * np.mean(likeness[:k]))
        np.testing.assert_allclose(NNGuide.fit(train, head, k=k)(q), want, rtol=1e-9)


def test_nnguide_takes_logits_from_elsewhere():
    train, head, q = case()
    logits = head(train.features).detach() + 2  # energies grow by 2
    own = FeatureSet(train.features, None, 4, logits)
    shifted = NNGuide.fit(own, k=3)(q, head(q).detach() + 2)
    head.bias.data += 2
    torch.testing.assert_close(shifted, NNGuide.fit(train, head, k=3)(q))


@pytest.mark.parametrize("cls", [KNN, NNGuide])
@pytest.mark.parametrize("k", [0, 41, 2.5, True])
def test_k_is_checked(cls, k):
    train, head, _ = case()
    with pytest.raises(InputError, match=f"{cls.__name__} needs k between 1 and the 40"):
        cls.fit(train, head, k=k)


def test_a_bank_without_rows_says_so():
    with pytest.raises(InputError, match="at least one training sample"):
        KNN.fit(FeatureSet(torch.zeros(0, 3), None, 2), k=1)
    with pytest.raises(InputError, match="1 training rows hold NaN"):
        KNN.fit(FeatureSet(torch.tensor([[1.0, torch.nan], [1, 2]]), None, 2), k=1)
