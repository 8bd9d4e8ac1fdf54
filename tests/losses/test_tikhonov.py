import pytest
import torch

from ncmethods._core import InputError
from ncmethods.losses.tikhonov import feature_decay, tikhonov

f64 = torch.float64
FEATURES = torch.sin(torch.arange(1, 41, dtype=f64)).reshape(8, 5)
WEIGHT = torch.cos(2 * torch.arange(1, 16, dtype=f64)).reshape(3, 5)


def test_feature_decay_is_that_of_hasegawa_and_sato():
    # mean(norm²)/2 as in utils/regularizers.py::set_features_regularization of their code,
    # https://github.com/HN410/Exploring-Weight-Balancing-on-Long-Tailed-Recognition-Problem
    # at f8131b5e9880fbed63b936072308187ad523a16e; run on these features.
    assert feature_decay(FEATURES).item() == pytest.approx(1.2773211845247525, rel=1e-12)
    h = FEATURES.clone().requires_grad_()
    (grad,) = torch.autograd.grad(feature_decay(h), h)
    torch.testing.assert_close(grad, FEATURES / 8, rtol=1e-12, atol=0)


def test_labels_only_leave_samples_out():
    labels = torch.tensor([1, -1, 0, 0, -100, 1, 2, 2])
    want = feature_decay(FEATURES[labels >= 0])
    torch.testing.assert_close(feature_decay(FEATURES, labels), want, rtol=1e-12, atol=0)
    total = tikhonov(FEATURES, WEIGHT, labels, feature=0.3, row=0.0)
    torch.testing.assert_close(total, 0.3 * want, rtol=1e-12, atol=0)


def test_three_terms():
    bias = torch.tensor([1.0, -2.0, 0.5], dtype=f64)
    got = tikhonov(FEATURES, WEIGHT, bias=bias, feature=0.2, row=0.03, offset=0.7)
    want = 0.1 * sum(float(x @ x) for x in FEATURES) / 8
    want += 0.015 * sum(float(w @ w) for w in WEIGHT) + 0.35 * 5.25
    assert got.item() == pytest.approx(want, rel=1e-12)
    # Σ over samples with λ_H is the mean with N·λ_H.
    summed = tikhonov(FEATURES, WEIGHT, feature=8 * 0.01, row=0.0)
    assert summed.item() == pytest.approx(0.005 * FEATURES.square().sum().item(), rel=1e-12)


def test_the_row_term_is_sgd_weight_decay_but_not_that_of_adam():
    def step(make, decay, term):
        W = torch.nn.Parameter(WEIGHT.clone())
        optimizer = make([W], lr=0.1, weight_decay=decay)
        fit = (FEATURES @ W.T).exp().mean()
        (fit + tikhonov(FEATURES, W, feature=0.0, row=term)).backward()
        optimizer.step()
        return W.detach()

    for make, same in ((torch.optim.SGD, True), (torch.optim.AdamW, False)):
        a, b = step(make, 0.05, 0.0), step(make, 0.0, 0.05)
        assert torch.allclose(a, b, rtol=1e-12) == same


def test_errors():
    for call, words in [
        (lambda: tikhonov(FEATURES, WEIGHT[:, :4]), "D = 5 as the features"),
        (lambda: tikhonov(FEATURES, WEIGHT, bias=torch.zeros(5)), "one per class"),
        (lambda: feature_decay(FEATURES[0]), "2-D"),
        (lambda: feature_decay(FEATURES, torch.zeros(3).long()), "8 rows"),
    ]:
        with pytest.raises(InputError, match=words):
            call()
