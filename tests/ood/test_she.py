"""SHE: the mean of what is classified correctly, and classes where nothing is."""

import numpy as np
import pytest
import torch
from test_feature_scorers import case, linear

from ncmethods._core import InputError
from ncmethods.features import FeatureSet
from ncmethods.ood.she import SHE

F64 = {"dtype": torch.float64}


def test_is_the_formula_in_numpy():
    train, head, q = case()
    W, b = head.weight.detach().numpy(), head.bias.detach().numpy()
    x, y = train.features.numpy(), train.labels.numpy()
    right = np.argmax(x @ W.T + b, 1) == y
    assert 0 < (~right).sum() < 40
    patterns = [x[right & (y == c)].mean(0) for c in range(4)]
    want = [-h @ patterns[np.argmax(W @ h + b)] for h in q.numpy()]
    np.testing.assert_allclose(SHE.fit(train, head)(q), want, rtol=1e-12)


def test_score_is_linear_along_a_ray():
    train, head, q = case()
    scorer, logits = SHE.fit(train, head), head(q).detach()
    torch.testing.assert_close(scorer(3 * q, logits), 3 * scorer(q, logits))
    assert float(scorer(torch.zeros(1, 8, **F64))) == 0


def test_a_class_that_is_never_right_is_left_out():
    """The next most likely class that has a pattern takes its place; its mean is not zero."""
    train, head, q = case()
    head.bias.data[1] -= 1000
    never = SHE.fit(train, head)
    assert never.known.tolist() == [True, False, True, True]
    logits = torch.tensor([[0.0, 9.0, 3.0, 1.0]], **F64)
    torch.testing.assert_close(never(q[:1], logits), -(q[:1] @ never.patterns[2]))
    single = FeatureSet(train.features[[0]], train.labels[[0]], 4)
    one = SHE.fit(single, linear(torch.zeros(4, 8, **F64), torch.tensor([1.0, 0, 0, 0], **F64)))
    torch.testing.assert_close(one(q), -(q @ train.features[0]))


def test_errors_name_what_is_missing():
    train, head, _ = case()
    with pytest.raises(InputError, match="SHE needs labels"):
        SHE.fit(FeatureSet(train.features, None, 4), head)
    with pytest.raises(InputError, match="none of 40 training samples classified correctly"):
        SHE.fit(FeatureSet(train.features, (head(train.features).argmax(1) + 1) % 4, 4), head)
    wide = linear(torch.ones(5, 8, **F64), torch.zeros(5, **F64))
    with pytest.raises(InputError, match="K = 4"):
        SHE.fit(train, wide)
