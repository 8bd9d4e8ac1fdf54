"""Scorers of features against pytorch-ood, where it is installed; its values are kept for CI."""

import pytest
import torch
from test_feature_scorers import PEER, case, fitted

pytest.importorskip("pytorch_ood")


@pytest.mark.parametrize("name", PEER)
def test_is_pytorch_ood_as_installed(name):
    from pytorch_ood import detector

    train, head, q = case(torch.float32)
    x, y = train.features, train.labels
    theirs = {
        "ViM": lambda: detector.ViM(None, 5, head.weight, head.bias).fit_features(x, y),
        "NCI": lambda: detector.NCI(None, head, 0.1).fit_features(x),
        "fDBD": lambda: detector.fDBD(None, head).fit_features(x),
        "KNN": lambda: detector.KNN(None, k=3).fit_features(x, y),
        "NNGuide": lambda: detector.NNGuide(None, head, 3).fit_features(x, y),
        "SHE": lambda: detector.SHE(None, head).fit_features(x, y),
    }[name]()
    want = theirs.predict_features(q).detach().float() * (3 if name == "fDBD" else 1)
    torch.testing.assert_close(fitted(name, train, head)(q), want, rtol=1e-4, atol=1e-4)
