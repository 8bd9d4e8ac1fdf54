"""Scores of logits: golden values, naive numpy, pytorch-ood, sure and masked predictions."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from ncmethods._core import InputError
from ncmethods.features import FeatureSet
from ncmethods.ood.logit import GEN, MSP, Energy, KLMatching, MaxLogit
from ncmethods.stats import ClassStats

F64 = {"dtype": torch.float64}
SIMPLE = (MSP, MaxLogit, Energy, GEN)


def logits(N=40, K=6, seed=0, scale=3.0):
    return scale * torch.randn(N, K, generator=torch.Generator().manual_seed(seed), **F64)


def train(N=120, K=6, seed=1):
    z = logits(N, K, seed)
    return FeatureSet(torch.zeros(N, 3, **F64), torch.arange(N) % K, K, z)


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def test_golden_values():
    flat = torch.zeros(1, 4, **F64)
    assert float(Energy.fit()(None, flat)) == pytest.approx(-math.log(4), rel=1e-15)
    assert float(Energy.fit(temperature=2)(None, flat)) == pytest.approx(-2 * math.log(4))
    assert float(GEN.fit()(None, flat)) == pytest.approx(3.383453, abs=5e-7)
    assert float(MSP.fit()(None, flat)) == -0.25
    z = torch.tensor([[math.log(3), 0.0, math.log(4)]], **F64)  # p = 3/8, 1/8, 4/8
    assert float(MSP.fit()(None, z)) == pytest.approx(-0.5)
    assert float(MaxLogit.fit()(None, z)) == pytest.approx(-math.log(4))
    assert float(GEN.fit(gamma=0.5, top=2)(None, z)) == pytest.approx(0.5 + math.sqrt(15) / 8)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 7.0])
def test_are_those_of_numpy(temperature):
    z = logits()
    x = z.numpy()
    p = softmax(x / temperature)
    np.testing.assert_allclose(MSP.fit(temperature=temperature)(None, z), -p.max(1), rtol=1e-13)
    np.testing.assert_allclose(
        Energy.fit(temperature=temperature)(None, z),
        -temperature * np.log(np.exp(x / temperature).sum(1)),
        rtol=1e-12,
    )
    np.testing.assert_array_equal(MaxLogit.fit()(None, z), -x.max(1))


@pytest.mark.parametrize("top", [1, 3, 6, 100])
@pytest.mark.parametrize("gamma", [0.1, 1.0, 4.0])
def test_gen_is_that_of_numpy(gamma, top):
    z = logits()
    p = np.sort(softmax(z.numpy()), 1)[:, ::-1][:, :top]
    want = (p**gamma * (1 - p) ** gamma).sum(1)
    np.testing.assert_allclose(GEN.fit(gamma=gamma, top=top)(None, z), want, rtol=1e-9)


def test_gen_of_sure_predictions_keeps_its_digits_in_float32():
    """1 − p = 5·10⁻¹¹ rounds to 0 in float32, whose power 0.1 does not."""
    z = torch.zeros(3, 6, **F64)
    z[:, 2] = torch.tensor([10.0, 25.0, 60.0])
    exact = GEN.fit()(None, z)
    torch.testing.assert_close(GEN.fit()(None, z.float()).double(), exact, rtol=1e-4, atol=0)
    assert (exact.diff() < 0).all()
    with torch.no_grad():
        wild = GEN.fit()(None, torch.tensor([[1e30, 0.0, -1e30], [0.0, -math.inf, -math.inf]]))
    assert wild.tolist() == [0, 0]


def test_kl_matching_is_that_of_numpy():
    data, z = train(), logits(seed=5)
    p, q = softmax(data.logits.numpy()), softmax(z.numpy())
    typical = [p[p.argmax(1) == k].mean(0) for k in range(6)]
    want = [min((r * np.log(r / d)).sum() for d in typical) for r in q]
    np.testing.assert_allclose(KLMatching.fit(data)(None, z), want, rtol=1e-10, atol=1e-12)
    # a typical sample diverges from nothing
    np.testing.assert_allclose(
        KLMatching.fit(data)(None, torch.from_numpy(np.log(typical))), 0, atol=1e-12
    )


def test_kl_matching_asks_for_predictions_not_labels():
    data = train()
    guess = data.logits.argmax(1)
    kept = guess != 2  # never predicted
    part = FeatureSet(data.features[kept], None, 6, data.logits[kept])
    scorer = KLMatching.fit(part)
    assert scorer.log_typical.shape == (5, 6)
    shuffled = FeatureSet(data.features, data.labels.roll(1), 6, data.logits)
    z = logits(seed=5)
    assert KLMatching.fit(shuffled)(None, z).equal(KLMatching.fit(data)(None, z))
    ignored = FeatureSet(data.features, torch.where(kept, data.labels, -1), 6, data.logits)
    torch.testing.assert_close(KLMatching.fit(ignored)(None, z), scorer(None, z))


def test_kl_matching_takes_logits_of_the_head():
    x = torch.randn(80, 3, generator=torch.Generator().manual_seed(2))
    head = nn.Linear(3, 4)
    bare = FeatureSet(x, torch.arange(80) % 4, 4)
    whole = FeatureSet(x, bare.labels, 4, head(x).detach())
    z = logits(K=4, seed=5).float()
    torch.testing.assert_close(KLMatching.fit(bare, head)(None, z), KLMatching.fit(whole)(None, z))
    torch.testing.assert_close(
        KLMatching.fit(bare, head)(x), KLMatching.fit(whole)(None, head(x).detach())
    )
    with pytest.raises(InputError, match="needs the logits"):
        KLMatching.fit(bare)
    with pytest.raises(InputError, match="needs the samples"):
        KLMatching.fit(ClassStats(4, 3).update(x, bare.labels))
    broken = FeatureSet(
        x, bare.labels, 4, whole.logits.clone().index_fill_(0, torch.tensor([1]), math.nan)
    )
    with pytest.raises(InputError, match="1 rows of logits"):
        KLMatching.fit(broken)


@pytest.mark.parametrize("cls", [*SIMPLE, KLMatching])
def test_class_permutation_masked_classes_and_gradient(cls):
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    data, z = train(), logits(seed=5).requires_grad_()
    scorer = cls.fit(data)
    named = cls.fit(FeatureSet(data.features, data.labels, 6, data.logits[:, order]))
    torch.testing.assert_close(named(None, z[:, order]), scorer(None, z))
    scorer(None, z).sum().backward()
    assert z.grad.isfinite().all()
    assert z.grad.abs().sum() > 0
    with torch.no_grad():
        masked = z.detach().clone()
        masked[:, 4] = -math.inf
        assert scorer(None, masked).isfinite().all()
        masked[3] = math.nan
        assert scorer(None, masked).isnan().tolist() == [i == 3 for i in range(len(z))]


def test_sure_is_in_and_flat_is_out():
    z = torch.tensor([[9.0, 0, 0, 0], [0.0, 0, 0, 0]])
    fitted = KLMatching.fit(FeatureSet(torch.zeros(4, 2), None, 4, 9 * torch.eye(4)))
    for scorer in (*(cls.fit() for cls in SIMPLE), fitted):
        sure, flat = scorer(None, z)
        assert sure < flat


# pytorch-ood 0.4.0 on logits(4, 6, seed=5): its GEN averages over classes, ours sums.
KEPT = {
    "MaxSoftmax": [-0.66941163706, -0.64800836258, -0.99207913525, -0.87826000921],
    "MaxLogit": [-2.47071417944, -3.02521928661, -5.75170403926, -4.95865814409],
    "EnergyBased": [-2.87207028548, -3.4590709641, -5.7596564407, -5.08847073522],
    "GEN": [0.72928630469, 0.71181049241, 0.48001462916, 0.60194199513],
    "KLMatching": [0.22526846802, 0.31594596787, 0.31664777711, 0.22413303651],
}


def ours():
    z = logits(4, 6, seed=5)
    return {
        "MaxSoftmax": MSP.fit()(None, z),
        "MaxLogit": MaxLogit.fit()(None, z),
        "EnergyBased": Energy.fit()(None, z),
        "GEN": GEN.fit()(None, z) / 6,
        "KLMatching": KLMatching.fit(train())(None, z),
    }


@pytest.mark.parametrize("name", KEPT)
def test_is_pytorch_oods(name):
    np.testing.assert_allclose(ours()[name], KEPT[name], rtol=1e-9)


def test_kept_values_are_those_of_pytorch_ood():
    detectors = pytest.importorskip("pytorch_ood.detector")
    data, z = train(), logits(4, 6, seed=5)
    for name, kept in KEPT.items():
        theirs = getattr(detectors, name)(None)
        if name == "KLMatching":
            theirs.fit_logits(data.logits, data.labels)
        np.testing.assert_allclose(theirs.predict_logits(z), kept, rtol=1e-9)


def test_differs_from_pytorch_oods_gen_where_a_prediction_is_sure():
    """Theirs clamps p to [10⁻⁷, 1 − 10⁻⁷]: beyond, sure predictions tie."""
    detectors = pytest.importorskip("pytorch_ood.detector")
    z = torch.zeros(2, 6, **F64)
    z[:, 2] = torch.tensor([20.0, 30.0])
    theirs = detectors.GEN(None).predict_logits(z)
    assert theirs[0] == theirs[1]
    mine = GEN.fit()(None, z)
    assert mine[0] > mine[1]


def test_bad_hyperparameters():
    for bad in (0, -1.0, math.inf, math.nan):
        for cls in (MSP, Energy):
            with pytest.raises(InputError, match="temperature must be positive"):
                cls.fit(temperature=bad)
        with pytest.raises(InputError, match="gamma must be positive"):
            GEN.fit(gamma=bad)
    with pytest.raises(InputError, match="top must be positive"):
        GEN.fit(top=0)
    with pytest.raises(InputError, match="number of classes"):
        GEN.fit(top=2.5)
    with pytest.raises(InputError, match="needs logits"):
        MSP.fit()(torch.zeros(2, 3))
